"""Collect finished runs of the default settings into CSV and figures.

    python tests/measure/collect.py runs/NAME ... runs/eval-*.json

The .json files are results of eval.py. Writes assets/; then run tests/measure/tables.py. Rows of
other tasks, and other evaluations, stay as they are.
"""

import csv
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support import figures, log as run_log  # noqa: E402
import tables  # noqa: E402

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def others(name: str, columns: list, new: list[dict]) -> list[dict]:
    """The rows that a file has of what `new` does not measure again; `columns` tell them apart."""
    with open(ASSETS / name, newline="") as f:
        made = {tuple(str(row[c]) for c in columns) for row in new}
        return [row for row in csv.DictReader(f) if tuple(row[c] for c in columns) not in made]


def evaluations(paths):
    """What eval.py measured of the tiny models and of those trained from them."""
    rows = []
    for path in paths:
        data = json.loads(Path(path).read_text())
        s = data["settings"]
        for r in data["results"]:
            known = {name: r.get(name, {}) for name in ("pass_at_k", "majority", "held_out")}
            row = {
                "task": s["task"],
                "model": "tiny" if s["model"] == "tiny" else "trained",
                "seed": int((re.findall(r"-seed(\d+)", s["model"]) or [s["seed"]])[-1]),
                "data": Path(s["data"]).name,
                "unmasking": s["unmasking"],
                "temperature": s["temperature"],
                "steps": r["steps"],
                "nfe": round(r["nfe"], 2),
                "n": r["n"],
                "k": r.get("k", 1),
            }
            for name, value in (
                ("solved", r),
                ("pass_at_k", known["pass_at_k"]),
                ("majority", known["majority"]),
            ):
                low, high = value.get("ci95", ("", ""))
                row |= {name: value.get("solved", ""), f"{name}_low": low, f"{name}_high": high}
            rows.append(
                {
                    **row,
                    "never_trained_on": known["held_out"].get("solved", ""),
                    "never_n": known["held_out"].get("n", ""),
                }
            )
    rows = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    rows += others(
        "evaluations.csv", ["task", "model", "seed", "data", "unmasking", "steps", "k"], rows
    )
    with tables.writing(ASSETS / "evaluations.csv") as f:
        out = csv.DictWriter(f, rows[0], lineterminator="\n")
        out.writeheader()
        out.writerows(sorted(rows, key=lambda row: [str(v) for v in row.values()]))


def main(arguments):
    if paths := [x for x in arguments if x.endswith(".json")]:
        evaluations(paths)
    folders = [x for x in arguments if not x.endswith(".json")]
    found = [(Path(f), json.loads((Path(f) / "summary.json").read_text())) for f in sorted(folders)]
    fields = [
        "task",
        "seed",
        "steps",
        "nfe",
        "n",
        "base",
        "trained",
        "total_seconds",
        "base_model_seconds",
        "rollout_seconds",
        "update_seconds",
        "eval_seconds",
        "peak_memory_mb",
    ]
    kept = others("results.csv", ["task"], [s for _, s in found])
    with tables.writing(ASSETS / "results.csv") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(fields)
        out.writerows(row.values() for row in kept)
        for _, s in found:
            for point in s["by_steps"]:
                out.writerow(
                    [
                        s["task"],
                        s["seed"],
                        point["steps"],
                        point["nfe"],
                        s["base"]["n"],
                        point["base"],
                        point["trained"],
                        *(
                            s["seconds"][k]
                            for k in ("total", "base_model", "rollout", "update", "eval")
                        ),
                        s["peak_memory_mb"],
                    ]
                )
    print(tables.seeds(), tables.fewer_steps(), sep="\n\n")
    for task in sorted({s["task"] for _, s in found}):
        runs = [(f, s) for f, s in found if s["task"] == task]
        logs = [run_log.read_log(f / "log.csv") for f, _ in runs]
        with tables.writing(ASSETS / f"curve-{task}.csv") as f:
            out = csv.writer(f, lineterminator="\n")
            keep = [
                "step",
                "reward",
                "solved",
                "heldout",
                "entropy",
                "nfe",
                "passes",
                "rollout_seconds",
                "update_seconds",
            ]
            out.writerow(["seed", *keep])
            for (_, s), log in zip(runs, logs):
                out.writerows([s["seed"], *(row[k] for k in keep)] for row in log)
        figures.plot_curves(
            ASSETS / f"curve-{task}.png",
            [(log, s["base"], s["trained"]) for (_, s), log in zip(runs, logs)],
            task,
        )
        mean = {}
        for name in ("base", "trained"):
            mean[name] = []
            for i, point in enumerate(runs[0][1]["by_steps"]):
                values = [s["by_steps"][i][name] for _, s in runs]
                mean[name].append(
                    {
                        "nfe": point["nfe"],
                        "solved": sum(values) / len(values),
                        "ci95": [min(values), max(values)],
                    }
                )
        figures.plot_frontier(
            ASSETS / f"frontier-{task}.png",
            mean,
            task,
            band="band: lowest and highest of the seeds",
        )


if __name__ == "__main__":
    main(sys.argv[1:])
