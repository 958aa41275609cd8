"""Compare samplers and presets over seeds.

    python tests/measure/compare_samplers.py runs/*     assets/samplers.csv and a figure per task

Expects finished runs of the same tasks, models and seeds that differ in --unmasking,
--position-term or --preset. Seconds are those of rollout and update; held-out shares those of the
runs' own log (half of the held-out examples) and summary (all of them).
"""

import csv
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support import figures, runs as run_folder  # noqa: E402
import tables  # noqa: E402
from tables import at, markdown, spread  # noqa: E402

ASSETS = Path(__file__).resolve().parents[2] / "assets"
COLOUR = {
    "low_confidence": "#0b62a4",
    "low_confidence, tokens only": "#7fb3d5",
    "confidence": "#d9822b",
    "plackett_luce": "#2e8b57",
    "random": "#999999",
    "official preset": "#c0392b",
}


def load(folder: Path) -> dict:
    """One finished run: its arm, task, seed, and (step, seconds, reward, solved in training,
    held-out share or None) of each step."""
    cfg, summary = (
        json.loads((folder / name).read_text()) for name in ("config.json", "summary.json")
    )
    arm = (
        "official preset"
        if cfg["preset"] in ("official", "paper")
        else cfg["unmasking"] + (", tokens only" if cfg["position_term"] == "off" else "")
    )
    points, seconds = [], 0.0
    for row in run_folder.read_log(folder / "log.csv"):
        seconds += float(row["rollout_seconds"]) + float(row["update_seconds"])
        points.append(
            (
                int(row["step"]) + 1,
                seconds,
                float(row["reward"]),
                float(row["solved"]),
                float(row["heldout"]) if row["heldout"] else None,
            )
        )
    return {
        "task": cfg["task"],
        "arm": arm,
        "seed": cfg["seed"],
        "points": points,
        "base": summary["base"]["solved"],
        "final": summary["trained"]["solved"],
    }


def held_out(run: dict) -> list[tuple]:
    return [(0.0, run["base"])] + [(s, h) for _, s, _, _, h in run["points"] if h is not None]


def reached(points: list[tuple], share: float) -> float | None:
    """Seconds until the held-out share is first reached, linear between measured points; None if
    never."""
    for (s0, h0), (s1, h1) in zip(points, points[1:]):
        if h1 >= share:
            return s0 + (s1 - s0) * max(0.0, (share - h0) / (h1 - h0)) if h1 > h0 else s0
    return None


def main(folders):
    runs = [load(Path(f)) for f in sorted(folders) if (Path(f) / "summary.json").is_file()]
    with tables.writing(ASSETS / "samplers.csv") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(
            [
                "task",
                "sampler",
                "seed",
                "step",
                "seconds",
                "reward",
                "solved_in_training",
                "held_out",
            ]
        )
        for run in runs:
            for i in range(4, len(run["points"]), 5):  # rewards: means of five steps
                step, seconds, _, _, held = run["points"][i]
                reward, solved = (
                    statistics.mean(p[k] for p in run["points"][i - 4 : i + 1]) for k in (2, 3)
                )
                out.writerow(
                    [
                        run["task"],
                        run["arm"],
                        run["seed"],
                        step,
                        f"{seconds:.1f}",
                        f"{reward:.4f}",
                        f"{solved:.4f}",
                        "" if held is None else f"{held:.4f}",
                    ]
                )
    for task in sorted({run["task"] for run in runs}):
        mine = [run for run in runs if run["task"] == task]
        budget = min(run["points"][-1][1] for run in mine)
        steps = mine[0]["points"][-1][0]
        print(
            f"\n{task}: solved, % of held-out examples, mean +- sd over seeds; "
            f"at equal time = after {budget:.0f} s of rollout and update\n"
        )
        lines = []
        for arm in COLOUR:
            if own := sorted(
                (run for run in mine if run["arm"] == arm), key=lambda run: run["seed"]
            ):
                targets = {
                    run["seed"]: held_out(run)[-1][1]
                    for run in mine
                    if run["arm"] == "official preset"
                }
                needed = [
                    reached(held_out(run), targets[run["seed"]])
                    for run in own
                    if run["seed"] in targets
                ]
                pace = statistics.median(
                    b[1] - a[1] for run in own for a, b in zip(run["points"], run["points"][1:])
                )
                lines.append(
                    [
                        arm,
                        len(own),
                        spread([100 * run["final"] for run in own]),
                        spread([100 * at(held_out(run), budget) for run in own]),
                        f"{pace:.2f}",
                        ", ".join("never" if s is None else f"{s:.0f}" for s in needed),
                    ]
                )
        header = [
            "sampler in training",
            "seeds",
            f"after {steps} steps",
            "at equal time",
            "seconds a step",
            "seconds to official's last held-out share",
        ]
        print(markdown(header, lines))

        def draw(axis, mine=mine):
            last = min(run["points"][-1][1] for run in mine)
            ends = []
            for arm, colour in COLOUR.items():
                if own := [run for run in mine if run["arm"] == arm]:
                    grid = [last * k / 40 for k in range(1, 41)]
                    smooth = [
                        [
                            (
                                p[1],
                                statistics.mean(q[2] for q in run["points"][max(0, i - 9) : i + 1]),
                            )
                            for i, p in enumerate(run["points"])
                        ]
                        for run in own
                    ]
                    y = [[at([(0.0, s[0][1]), *s], x) for s in smooth] for x in grid]
                    axis.fill_between(
                        grid,
                        [min(v) for v in y],
                        [max(v) for v in y],
                        color=colour,
                        alpha=0.10,
                        lw=0,
                    )
                    axis.plot(grid, [statistics.mean(v) for v in y], color=colour, lw=2)
                    ends.append((statistics.mean(y[-1]), arm, colour))
            low, high = axis.get_ylim()
            used = -1e9
            for y, arm, colour in sorted(ends):
                used = max(y, used + 0.045 * (high - low))
                figures.label_end(axis, last, used, arm, colour)
            axis.set_xlim(0, last * 1.4)

        figures.figure(
            ASSETS / f"samplers-{task}.png",
            f"Which sampler learns {task} fastest?",
            "seconds of rollout and update (mean of 3 seeds, band: lowest and highest)",
            "reward in training (0 to 4)",
            draw,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
