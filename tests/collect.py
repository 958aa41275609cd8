"""Collect finished runs of the default settings into CSV and figures. Run: python tests/collect.py runs/NAME ... (writes assets/; then tests/tables.py)."""
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval as evaluation  # noqa: E402
import tables  # noqa: E402

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def main(folders):
    found = [(Path(f), json.loads((Path(f) / "summary.json").read_text())) for f in sorted(folders)]
    fields = ["task", "seed", "steps", "nfe", "n", "base", "trained", "total_seconds", "base_model_seconds", "rollout_seconds", "update_seconds",
              "eval_seconds", "peak_memory_mb"]
    with open(ASSETS / "results.csv", "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(fields)
        for _, s in found:
            for point in s["by_steps"]:
                out.writerow([s["task"], s["seed"], point["steps"], point["nfe"], s["base"]["n"], point["base"], point["trained"],
                              *(s["seconds"][k] for k in ("total", "base_model", "rollout", "update", "eval")), s["peak_memory_mb"]])
    print(tables.seeds(), tables.fewer_steps(), sep="\n\n")
    for task in sorted({s["task"] for _, s in found}):
        runs = [(f, s) for f, s in found if s["task"] == task]
        logs = [evaluation.read_log(f / "log.csv") for f, _ in runs]
        with open(ASSETS / f"curve-{task}.csv", "w", newline="") as f:
            out = csv.writer(f, lineterminator="\n")
            keep = ["step", "reward", "solved", "heldout", "entropy", "nfe", "passes", "rollout_seconds", "update_seconds"]
            out.writerow(["seed", *keep])
            for (_, s), log in zip(runs, logs):
                out.writerows([s["seed"], *(row[k] for k in keep)] for row in log)
        evaluation.plot_curves(ASSETS / f"curve-{task}.png", [(log, s["base"], s["trained"]) for (_, s), log in zip(runs, logs)], task)
        mean = {}
        for name in ("base", "trained"):
            mean[name] = []
            for i, point in enumerate(runs[0][1]["by_steps"]):
                values = [s["by_steps"][i][name] for _, s in runs]
                mean[name].append({"nfe": point["nfe"], "solved": sum(values) / len(values), "ci95": [min(values), max(values)]})
        evaluation.plot_frontier(ASSETS / f"frontier-{task}.png", mean, task, band="band: lowest and highest of the seeds")


if __name__ == "__main__":
    main(sys.argv[1:])
