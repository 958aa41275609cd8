"""The moving picture of README.md: Sudokus denoised by the base and by the trained model.

    python tests/measure/film.py runs/sudoku-agrpo-seed0        writes assets/film.gif

The first three held-out puzzles, greedy, one token a denoiser call. On the right the held-out share
of all seeds, from assets/curve-sudoku.csv.
"""

import csv
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from methods import models  # noqa: E402
from support import data, options, runs  # noqa: E402
from support.figures import COLOUR, label_end  # noqa: E402

ASSETS = Path(__file__).resolve().parents[2] / "assets"
PUZZLES, STEP, END = 3, 300, 1800  # milliseconds of a frame, and of a puzzle's last
RIGHT, WRONG, GIVEN = "#1b1b1b", "#c0392b", "#eeeeee"


def denoised(model: str, cfg, examples: list) -> tuple:
    """Tokens as digits, and the step that revealed each: (n, 16) both."""
    policy, tokenizer = models.open_policy(dataclasses.replace(cfg, model=model))
    at = dataclasses.replace(options.for_evaluation(cfg), steps=16)
    traj, _ = models.generate(policy, tokenizer, examples, [*range(len(examples))], at)
    return [[tokenizer.decode([t]) for t in row] for row in traj.tokens], traj.reveal_step.tolist()


def draw_grid(axis, title, example, digits, when, step):
    """The cells revealed up to a step; digits of the puzzle on grey, wrong ones red."""
    axis.clear()
    for cell, (digit, t) in enumerate(zip(digits, when)):
        y, x = divmod(cell, 4)
        given = example["puzzle"][cell] != "0"
        colour = GIVEN if given else "white"
        axis.add_patch(plt.Rectangle((x, 3 - y), 1, 1, fc=colour, ec="#bbbbbb"))
        good, seen = digit == example["solution"][cell], t <= step
        axis.text(
            x + 0.5, 3.5 - y, digit if seen else (example["puzzle"][cell] if given else "·"),
            ha="center", va="center_baseline", fontsize=19 if seen else 11,
            color=(RIGHT if good else WRONG) if seen else "#aaaaaa",
        )
    for k in (0, 2, 4):
        axis.plot([k, k], [0, 4], color="#333333", lw=1.6)
        axis.plot([0, 4], [k, k], color="#333333", lw=1.6)
    done = step == max(when)
    solved = "".join(digits) == example["solution"]
    verdict = ("solved" if solved else "wrong") if done else f"{min(step + 1, 16)} of 16 calls"
    axis.set_title(f"{title}: {verdict}", fontsize=11,
                   color=WRONG if done and not solved else COLOUR["trained"] if done else RIGHT)
    axis.set(xlim=(-0.1, 4.1), ylim=(-0.1, 4.1), aspect="equal")
    axis.axis("off")


def draw_curve(axis):
    """Held-out share against minutes: mean, lowest and highest of the seeds."""
    with open(ASSETS / "curve-sudoku.csv") as f:
        rows = list(csv.DictReader(f))
    base = {r["seed"]: 100 * float(r["base"]) for r in
            csv.DictReader(open(ASSETS / "results.csv")) if r["task"] == "sudoku"
            and r["steps"] == "16"}
    curves = []
    for seed in sorted(base):
        own = [r for r in rows if r["seed"] == seed]
        minutes = np.cumsum([float(r["rollout_seconds"]) + float(r["update_seconds"])
                             for r in own]) / 60
        held = [(m, 100 * float(r["heldout"])) for m, r in zip(minutes, own) if r["heldout"]]
        curves.append(tuple(zip((0.0, base[seed]), *held)))
    grid = np.linspace(0, min(x[-1] for x, _ in curves), 50)
    y = np.array([np.interp(grid, *curve) for curve in curves])
    axis.fill_between(grid, y.min(0), y.max(0), color=COLOUR["trained"], alpha=0.15, lw=0)
    axis.plot(grid, y.mean(0), color=COLOUR["trained"], lw=2)
    axis.axhline(np.mean([*base.values()]), color=COLOUR["base"], ls=":", lw=1.5)
    label_end(axis, grid[-1], y.mean(0)[-1], "AGRPO", COLOUR["trained"])
    label_end(axis, grid[-1], np.mean([*base.values()]) + 4, "base", COLOUR["base"])
    axis.set(ylim=(0, 100), xlim=(0, grid[-1] * 1.02), xlabel="minutes of rollout and update")
    axis.set_title(f"held-out Sudokus solved, %, {len(curves)} seeds", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def main(folder: str):
    cfg = runs.read_settings(Path(folder) / "config.json", models.Settings)
    _, examples = data.load_split(cfg.task, cfg.train_examples, PUZZLES, cfg.seed)
    films = [denoised(cfg.model, cfg, examples), denoised(f"{folder}/model", cfg, examples)]
    fig, axes = plt.subplots(1, 3, figsize=(9, 2.9), dpi=80, layout="constrained",
                             width_ratios=(1, 1, 1.7))
    draw_curve(axes[2])
    frames, times = [], []
    for i, example in enumerate(examples):
        last = max(max(when[i]) for _, when in films)
        for step in range(-1, last + 1):
            for axis, title, (digits, when) in zip(axes, ("base", "after AGRPO"), films):
                draw_grid(axis, title, example, digits[i], when[i], min(step, max(when[i])))
            fig.canvas.draw()
            image = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3].copy())
            frames.append(image.quantize(64))
            times.append(END if step == last else STEP)
    frames[0].save(ASSETS / "film.gif", save_all=True, append_images=frames[1:], duration=times,
                   loop=0, optimize=True)
    print(f"{len(frames)} frames, {(ASSETS / 'film.gif').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
