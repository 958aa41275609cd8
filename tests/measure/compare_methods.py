"""Compare methods over seeds.

    python tests/measure/compare_methods.py time           first: assets/methods-pace.csv
    python tests/measure/compare_methods.py runs/*         finished runs that differ in --method

`time` measures processor seconds a step of every method, on one thread. With finished runs it
writes assets/methods.csv and a figure per task and model, and prints the tables: held-out share
(half of the held-out examples, every --eval-every steps) after equal time (steps x pace), after
equal numbers of passes (states scored with a gradient), and at the end. Runs of `--controller` make
the frontier: assets/controller.csv and its figure, with `--unmasking entropy_bound` evaluations
(.json of eval.py) of the others.
"""

import csv
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import agrpo  # noqa: E402
import eval as evaluation  # noqa: E402
from methods import models, scored  # noqa: E402
from support import data, figures, options, runs as run_folder  # noqa: E402
import tables  # noqa: E402
from tables import at, spread  # noqa: E402

ASSETS = Path(__file__).resolve().parents[2] / "assets"
COLOUR = {
    "agrpo": "#0b62a4",
    "exact": "#7fb3d5",
    "dipo": "#2e8b57",
    "tracerl": "#8e5a2b",
    "diffpo": "#d9822b",
    "diffu-grpo": "#c0392b",
}
STYLE = {"exact": "--", "tracerl": ":", "diffpo": "-."}  # so that grey print tells them apart


def pace(steps: int = 5):
    """Seconds a step of rollout and update on one thread, in processor time, so that other work on
    the machine does not count; median without the first."""
    import torch

    torch.set_num_threads(1)
    rows = []
    for task in ("sudoku", "story"):
        for model in options.TINY:
            for method in COLOUR:
                if method == "dipo" and model == "tiny":
                    continue
                cfg, _ = evaluation.parse(
                    ["--task", task, "--model", model, "--method", method, "--device", "cpu"]
                )
                policy, tokenizer = models.open_policy(cfg, train=True)
                if cfg.kl and cfg.kl_reference == "base":
                    scored.keep_reference(policy)
                optimizer, examples = (
                    agrpo.make_optimizer(policy, cfg),
                    data.load_examples(task, 512, 0, "train"),
                )
                rule, sample = evaluation.method_of(cfg, tokenizer), models.sampler(tokenizer, cfg)
                rule.begin(policy, optimizer, cfg)
                one_step, spent, passes = rule.train_step or agrpo.train_step, [], []
                for step in range(steps):
                    clock = time.process_time()
                    row = one_step(policy, optimizer, examples, step, cfg, sample)
                    passes.append(row["passes"])
                    spent.append(time.process_time() - clock)
                rows.append(
                    {
                        "task": task,
                        "model": model,
                        "method": method,
                        "steps": steps - 1,
                        "passes": statistics.mean(passes[1:]),
                        "seconds": f"{statistics.median(spent[1:]):.3f}",
                    }
                )
                print(rows[-1], flush=True)
    with tables.writing(ASSETS / "methods-pace.csv") as f:
        out = csv.DictWriter(f, rows[0], lineterminator="\n")
        out.writeheader()
        out.writerows(rows)


def seconds_a_step() -> dict:
    with open(ASSETS / "methods-pace.csv") as f:
        return {
            (r["task"], r["model"], r["method"]): float(r["seconds"]) for r in csv.DictReader(f)
        }


def load(folder: Path, paces: dict) -> dict:
    """One finished run: its held-out shares as (seconds, share) and (passes, share) from the base
    model on."""
    cfg, summary = (
        json.loads((folder / name).read_text()) for name in ("config.json", "summary.json")
    )
    key, passes = (cfg["task"], cfg["model"], cfg["method"]), 0
    base = json.loads((folder / "eval_base.json").read_text())[0]["grades"]
    half = base[: (len(base) + 1) // 2]  # the part that is looked at while training
    curve = [(0, 0.0, 0, sum(g == 1 for g in half) / len(half))]
    for row in run_folder.read_log(folder / "log.csv"):
        passes += int(row["passes"])
        if row["heldout"]:
            step = int(row["step"]) + 1
            curve.append((step, step * paces[key], passes, float(row["heldout"])))
    return {
        "key": key,
        "seed": cfg["seed"],
        "curve": curve,
        "seconds": [(c[1], c[3]) for c in curve],
        "by_passes": [(c[2], c[3]) for c in curve],
        "steps": len(run_folder.read_log(folder / "log.csv")),
        "base": summary["base"]["solved"],
        "final": summary["by_steps"],
    }


def compare(runs: list):
    with tables.writing(ASSETS / "methods.csv") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["task", "model", "method", "seed", "step", "seconds", "passes", "held_out"])
        for run in runs:
            out.writerows(
                [*run["key"], run["seed"], step, f"{s:.1f}", p, f"{h:.4f}"]
                for step, s, p, h in run["curve"]
            )
    for task, model in sorted({run["key"][:2] for run in runs}):
        mine = [run for run in runs if run["key"][:2] == (task, model)]
        budget, passes = (
            min(run["seconds"][-1][0] for run in mine),
            min(run["by_passes"][-1][0] for run in mine),
        )
        base = [100 * run["curve"][0][3] for run in mine if run["key"][2] == "agrpo"]
        print(
            f"\n{task}, --model {model}: base {spread(base) if base else 'not run'}; "
            "held-out solved, %, mean +- sd over seeds\n"
        )
        lines = []
        for method in COLOUR:
            if own := sorted(
                (run for run in mine if run["key"][2] == method), key=lambda run: run["seed"]
            ):
                calls = statistics.mean(run["final"][0]["nfe"] for run in own)
                each = statistics.mean(run["by_passes"][-1][0] / run["curve"][-1][0] for run in own)
                lines.append(
                    [
                        method,
                        len(own),
                        spread([100 * at(run["seconds"], budget) for run in own]),
                        spread([100 * at(run["by_passes"], passes) for run in own]),
                        own[0]["steps"],
                        spread([100 * run["final"][0]["trained"] for run in own]),
                        f"{calls:.1f}",
                        f"{own[0]['seconds'][-1][0] / own[0]['curve'][-1][0]:.2f}",
                        f"{each:.0f}",
                    ]
                )
        header = [
            "method",
            "seeds",
            f"after {budget:.0f} s",
            f"after {passes} passes",
            "steps",
            "after these, all held-out",
            "NFE",
            "seconds a step",
            "passes a step",
        ]
        print(tables.markdown(header, lines))

        def draw(axis, mine=mine, budget=budget):
            ends, grid = [], [budget * k / 60 for k in range(61)]
            for method, colour in COLOUR.items():
                if own := [run for run in mine if run["key"][2] == method]:
                    y = [[100 * at(run["seconds"], x) for run in own] for x in grid]
                    axis.fill_between(
                        grid,
                        [min(v) for v in y],
                        [max(v) for v in y],
                        color=colour,
                        alpha=0.10,
                        lw=0,
                    )
                    axis.plot(
                        grid,
                        [statistics.mean(v) for v in y],
                        color=colour,
                        lw=2,
                        ls=STYLE.get(method, "-"),
                    )
                    ends.append((statistics.mean(y[-1]), method, colour))
            high, used = axis.get_ylim()[1], -1e9
            for y, method, colour in sorted(ends):
                used = max(y, used + 0.045 * high)
                figures.label_end(axis, budget, used, method, colour)
            axis.set_xlim(0, budget * 1.25)
            axis.set_ylim(0)

        figures.figure(
            ASSETS / f"methods-{task}-{model}.png",
            f"Which method learns {task} fastest? --model {model}",
            "seconds of rollout and update, one thread (mean of seeds, band: lowest and highest)",
            "held out, greedy: solved, %",
            draw,
        )


def frontier(folders: list, evaluations: list):
    """Accuracy against NFE: evaluations (.json of eval.py) of models at fixed bounds, and runs with
    a controller at their own."""
    points = []
    for path in evaluations:
        data = json.loads(Path(path).read_text())
        name, seed = (
            ("base" if data["settings"]["model"] == "tiny" else "model alone"),
            data["settings"]["seed"],
        )
        points += [
            (name, data["settings"]["entropy_bound"], seed, r["nfe"], r["solved"])
            for r in data["results"]
        ]
    for folder in folders:
        cfg, summary = (
            json.loads((folder / n).read_text()) for n in ("config.json", "summary.json")
        )
        name = "joint" if cfg["controller_training"] == "joint" else "model, then controller alone"
        points.append(
            (
                name,
                cfg["alpha"],
                cfg["seed"],
                summary["by_steps"][0]["nfe"],
                summary["by_steps"][0]["trained"],
            )
        )
    with tables.writing(ASSETS / "controller.csv") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["what", "bound_or_alpha", "seed", "nfe", "solved"])
        out.writerows((*p[:3], f"{p[3]:.2f}", f"{p[4]:.4f}") for p in sorted(points))
    print("\n" + tables.controller())
    means = {}
    for name, knob in sorted({p[:2] for p in points}):
        own = [p for p in points if p[:2] == (name, knob)]
        means.setdefault(name, []).append(
            (statistics.mean(p[3] for p in own), 100 * statistics.mean(p[4] for p in own))
        )

    def draw(axis):
        for (name, rows), colour, marker in zip(
            means.items(), ("#777777", "#2e8b57", "#0b62a4", "#d9822b"), "svo^"
        ):
            x, y = [r[0] for r in sorted(rows)], [r[1] for r in sorted(rows)]
            axis.plot(x, y, color=colour, marker=marker, lw=1.5)
            figures.label_end(axis, x[-1], y[-1], name, colour)
        axis.margins(x=0.3)
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 4, 8, 16], labels=["1", "2", "4", "8", "16"])
        axis.minorticks_off()

    figures.figure(
        ASSETS / "controller.png",
        "Does a threshold per puzzle solve more per denoiser call?",
        "NFE: denoiser calls per completion (mean of seeds)",
        "sudoku, held out: solved, %",
        draw,
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["time"]:
        clock = time.perf_counter()
        pace()
        print(f"{time.perf_counter() - clock:.0f} s")
    else:
        finished = [Path(f) for f in sorted(sys.argv[1:]) if (Path(f) / "summary.json").is_file()]
        settings = [json.loads((f / "config.json").read_text()) for f in finished]
        paces = seconds_a_step()
        plain = [
            load(f, paces)
            for f, cfg in zip(finished, settings)
            if cfg.get("controller", "off") == "off" and not cfg.get("sft")
        ]
        compare(plain)
        print("\n" + tables.methods_pace())
        if controlled := [
            f for f, cfg in zip(finished, settings) if cfg.get("controller", "off") != "off"
        ]:
            frontier(controlled, [f for f in sys.argv[1:] if f.endswith(".json")])
