"""The figures of runs and evaluations."""
import math
from pathlib import Path

import numpy as np

COLOUR = {"base": "#777777", "trained": "#0b62a4", "sampled": "#d9822b"}
OTHERS = ["#0b62a4", "#d9822b", "#4c8c4a", "#7b5aa6", "#a03050"]   # for lines without a meaning

def figure(path: Path, title: str, xlabel: str, ylabel: str, draw, size=(7, 4)):
    """One figure, one question: draw(axis), then written as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axis = plt.subplots(figsize=size, dpi=120, layout="constrained")
    draw(axis)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    fig.savefig(path)
    plt.close(fig)

def label_end(axis, x, y, text, colour):
    """A line's name at its end."""
    axis.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center",
                  color=colour, fontsize=9)

def plot_curves(path: Path, runs: list[tuple], task: str, method: str = "AGRPO"):
    """Solved share against training minutes; runs: (rows of log.csv, base, trained or None), one
    per seed: their mean, and a band from the lowest to the highest. Completions sampled in training
    (mean of ten steps) and held-out ones decoded greedily."""
    import pandas as pd

    def draw(axis):
        """The curves of all runs."""
        sampled, held = [], []                                 # of each run: minutes, %
        for rows, base, trained in runs:
            log = pd.DataFrame(rows).apply(pd.to_numeric, errors="coerce")
            log.index = (log.rollout_seconds + log.update_seconds).cumsum() / 60
            if "solved" in log:
                share = 100 * log.solved
                if len(runs) == 1:
                    axis.plot(share, color=COLOUR["sampled"], alpha=0.3, lw=0.6)
                sampled.append((log.index, share.rolling(10, min_periods=1).mean()))
            points = {0.0: base["solved"], **log.heldout.iloc[:-1].dropna()}
            points |= {log.index[-1]: trained["solved"]} if trained else {}
            held.append(([*points], [100 * y for y in points.values()]))
        end = max(x[-1] for x, _ in held + sampled)            # a run that has ended stays there
        grid, ends = np.linspace(0, end, 101), []
        base = 100 * sum(b["solved"] for _, b, _ in runs) / len(runs)
        for curves, kind, text, style in (
                (sampled, "sampled", "sampled in training", (0, (4, 1))),
                (held, "trained", "held out, greedy", "-")):
            if curves:
                y = np.array([np.interp(grid, *curve) for curve in curves])
                axis.fill_between(grid, y.min(0), y.max(0), color=COLOUR[kind], alpha=0.15, lw=0)
                axis.plot(grid, y.mean(0), color=COLOUR[kind], lw=2, ls=style)
                ends.append((y.mean(0)[-1], text, kind))
        if len(runs) == 1:
            axis.plot(*held[0], "o", color=COLOUR["trained"], ms=4)
        axis.axhline(base, color=COLOUR["base"], ls=":", lw=1.5)
        top, used = max(axis.get_ylim()[1], 1e-9), -math.inf   # labels at ends, none over another
        for y, text, kind in sorted([*ends, (base + 0.03 * top, "base, held out", "base")]):
            used = max(y, used + 0.05 * top)
            label_end(axis, end, used, text, COLOUR[kind])
        axis.set_xlim(0, end * 1.35)
        axis.set_ylim(0, max(top, used + 0.05 * top))
    several = (f" (mean of {len(runs)} seeds, band: lowest and highest)" if len(runs) > 1 else
               " (thin: each step, dashed: mean of ten)")
    figure(path, f"Does {method} make the model better at {task}?",
           "minutes of rollout and update" + several, "solved, %", draw)

def plot_frontier(path: Path, curves: dict, task: str, band: str = "band: 95 % interval"):
    """Solved share against denoiser calls: {name: [result, ...]}, a line each with its band."""
    def draw(axis):
        """A line for each of the results."""
        for place, (name, results) in enumerate(curves.items()):
            results = sorted(results, key=lambda r: r["nfe"])
            x, y = [r["nfe"] for r in results], [100 * r["solved"] for r in results]
            colour = COLOUR.get(name, OTHERS[place % len(OTHERS)])
            low, high = zip(*[[100 * c for c in r["ci95"]] for r in results])
            axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0 if len(x) > 1 else 3)
            axis.plot(x, y, color=colour, marker="o", lw=2)
            label_end(axis, x[-1], y[-1], name, colour)
        axis.margins(x=0.12)
        axis.set_ylim(-0.02 * axis.get_ylim()[1])              # a line at 0 stays visible
    figure(path, f"How many {task} answers are solved in how many denoiser calls?",
           f"NFE: denoiser calls per completion ({band})", "solved, %", draw)
