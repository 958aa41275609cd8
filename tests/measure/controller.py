"""Does a threshold per prompt solve more per denoiser call? Accuracy against NFE.

    python tests/measure/controller.py runs/* FILE*.json     assets/controller.csv and its figure

Runs with --controller at their own thresholds; evaluations (.json of eval.py) of models without one
at fixed bounds of --unmasking entropy_bound.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support import figures  # noqa: E402
import tables  # noqa: E402

ASSETS = Path(__file__).resolve().parents[2] / "assets"


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
            lower = 5 * name.startswith("model, then")         # it ends where another does
            figures.label_end(axis, x[-1], y[-1] - lower, name, colour)
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
    found = [Path(f) for f in sorted(sys.argv[1:])]
    runs = [f for f in found if (f / "summary.json").is_file()]
    kinds = [json.loads((f / "config.json").read_text()).get("controller", "off") for f in runs]
    frontier([f for f, kind in zip(runs, kinds) if kind != "off"],
             [f for f in found if f.suffix == ".json"])
