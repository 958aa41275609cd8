"""What walkthrough.ipynb draws: one function a figure, one question a figure; and source()."""

import ast
import inspect
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown

import agrpo
from methods import samplers

DARK, MID, LIGHT = "#0b3c66", "#d9822b", "#b8c4cc"             # apart also in grey
STYLE = {"figure.dpi": 90, "figure.constrained_layout.use": True, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.titlesize": 11}
plt.rcParams.update(STYLE)


def table_source(name):
    """The lines that make a table of agrpo.py or methods/samplers.py."""
    for text in map(inspect.getsource, (agrpo, samplers)):
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return ast.get_source_segment(text, node)


def source(*things):
    """The source of functions and classes, and of tables by their name."""
    text = [table_source(x) if isinstance(x, str) else inspect.getsource(x) for x in things]
    text = "\n\n".join(textwrap.dedent(part).rstrip() for part in text)
    return Markdown(f"```python\n{text}\n```")


def label(axis, x, y, text, away=(5, 0), **how):
    """A word beside a point."""
    axis.annotate(text, (x, y), xytext=away, textcoords="offset points", va="center", **how)


def lattice(axis, rows, columns, colour):
    """Thin lines between the cells of an image."""
    axis.set_xticks(np.arange(columns) - 0.5, minor=True)
    axis.set_yticks(np.arange(rows) - 0.5, minor=True)
    axis.grid(False)
    axis.grid(which="minor", color=colour, lw=0.4)
    axis.tick_params(which="minor", length=0)


def strip(traj, prompt, cells, likeliest):
    """A 4x4 grid per step: black revealed now, white earlier, hatched MASK with what the model
    holds for likeliest there (T, 16)."""
    T, when = int(traj.nfe[0]), traj.reveal_step[0].tolist()
    fig, axes = plt.subplots(2, (T + 3) // 2, figsize=(11, 5.2))
    for axis in axes.flat:
        axis.set_axis_off()
    for panel, axis in enumerate(axes.flat[:T + 2]):
        t = panel - 2                              # -2: the prompt, -1: before the first step
        axis.set(xlim=(-0.05, 4.05), ylim=(4.05, -0.05), aspect="equal")
        axis.set_title(["prompt", "all MASK"][panel] if t < 0 else f"step {t}", fontsize=10)
        for i, (token, step) in enumerate(zip(cells, when)):
            y, x = divmod(i, 4)
            new, masked = panel > 0 and step == t, panel > 0 and step > t
            text = likeliest[t][i] if t >= 0 and masked else "" if masked else token
            text = text if panel else prompt[i].replace("0", "")
            fill, ink = ("black", "white") if new else ("white", "0.5" if masked else "black")
            axis.add_patch(plt.Rectangle((x, y), 1, 1, fc="0.9" if masked else fill, ec="0.45",
                                         lw=0.8, hatch="" if t >= 0 or not masked else "////"))
            axis.text(x + 0.5, y + 0.55, text, ha="center", va="center", color=ink,
                      fontsize=9 if masked else 13)
    fig.suptitle("In which order does the model fill in a Sudoku? (black: revealed now, grey: MASK "
                 "with the token likeliest there)")
    plt.show()


def blocks(words, size):
    """A completion's tokens in their blocks; what follows the end is grey."""
    fig, axis = plt.subplots(figsize=(11, 1.1))
    end = words.index("<eos>") if "<eos>" in words else len(words)
    for i, word in enumerate(words):
        axis.add_patch(plt.Rectangle((i, 0), 1, 1, fc="0.9" if i >= end else "white", ec="0.6"))
        axis.text(i + 0.5, 0.5, word.replace("answer", "a").replace("<eos>", "EOS"), ha="center",
                  va="center", fontsize=10)
    for edge in range(0, len(words) + 1, size):
        axis.plot([edge, edge], [-0.1, 1.1], color="black", lw=2.5)
    axis.set(xlim=(-0.1, len(words) + 0.1), ylim=(-0.15, 1.15),
             title="Where does a text end? (black: edges of blocks; <a>: <answer>)")
    axis.axis("off")
    plt.show()


def tree(found, reward_of):
    """All trajectories of a table denoiser: [(tokens, reveal_step, probability, ...)]."""
    def path(tokens, when):
        return ["".join(str(v) if w < t else "·" for v, w in zip(tokens, when)) for t in range(4)]
    leaves = sorted((path(f[0], f[1]), float(f[2].detach()), reward_of(f[0], 2)) for f in found)
    nodes = {}                                     # the beginning of a path -> its leaves
    for i, (states, _, _) in enumerate(leaves):
        for t in range(4):
            nodes.setdefault(tuple(states[:t + 1]), []).append(i)
    likely = max(range(len(leaves)), key=lambda i: leaves[i][1])
    fig, axis = plt.subplots(figsize=(11, 0.19 * len(leaves) + 1))
    for key, below in nodes.items():
        x, y, bold = len(key) - 1, np.mean(below), likely in below
        colour, p = "black" if bold else "0.6", sum(leaves[i][1] for i in below)
        if x:
            axis.plot([x - 1, x], [np.mean(nodes[key[:-1]]), y], color=colour, lw=0.4 + 9 * p,
                      solid_capstyle="round", zorder=1)
        axis.text(x, y, key[-1], family="monospace", fontsize=9 if x < 3 else 8, ha="center",
                  va="center", zorder=2, weight="bold" if bold else "normal",
                  bbox={"fc": "white", "ec": colour, "pad": 1.5})
        if x == 3:
            axis.text(x + 0.12, y, f"p {p:.3f}   R {leaves[below[0]][2]:+.2f}", fontsize=8,
                      va="center", family="monospace")
    axis.set(xlim=(-0.2, 3.75), ylim=(len(leaves), -1), yticks=[], title="What can a denoiser of "
             f"3 positions and 2 tokens do? All {len(leaves)} trajectories (width: probability, "
             "black: the likeliest)")
    axis.set_xticks(range(4), [f"$x_{t}$" for t in range(4)])
    axis.grid(False)
    plt.show()


def losers(F, won, places, t):
    """How surely each open position lost: F, won (n,), places (n,)."""
    fig, axis = plt.subplots(figsize=(9, 2.8))
    axis.bar(places[~won], F[~won], color=LIGHT, ec="black")
    for place in places[won].tolist():
        axis.text(place, 0.03, "won", rotation=90, ha="center", fontsize=10)
    axis.set(title=f"With which probability does each candidate lose step {t}?", ylabel="$F_j(c)$",
             xlabel="position (empty: revealed before)", xticks=range(16), xlim=(-0.6, 15.6),
             ylim=(0, 1.05))
    plt.show()


def estimates(curves):
    """{size: (errors of the running mean (M,), deviation of one draw)}."""
    fig, axis = plt.subplots(figsize=(7.5, 3.8))
    for (size, (error, one)), colour, style in zip(curves.items(), (MID, DARK), ("--", "-")):
        n = torch.arange(1, len(error) + 1)
        axis.plot(n, error, style, color=colour, lw=1.5)
        axis.plot(n, one / n.sqrt(), ":", color=colour, lw=1)
        name = {"uniform": "uniform $p$"}.get(size, f"$p$ by {size}")
        label(axis, len(error), float(error[-1]), name, color=colour)
    axis.set(xscale="log", yscale="log", xlim=(1, 30000), ylabel="|mean - exact| / |exact|",
             title="Does one drawn step estimate the sum over all six?",
             xlabel="estimates averaged, K = 1 each (dotted: one draw's deviation / $\\sqrt{n}$)")
    plt.show()


def comb(pi, hit, offset):
    """Systematic sampling: inclusion probabilities end to end, and the teeth."""
    fig, axis = plt.subplots(figsize=(9, 1.9))
    edge = 0.0
    for t, width in enumerate(pi.tolist()):
        fill, ink = ("0.45", "white") if hit[t] else ("0.92", "black")
        axis.barh(0, width, left=edge, color=fill, ec="black")
        axis.text(edge + width / 2, 0, str(t), ha="center", va="center", color=ink)
        edge += width
    for k in range(round(edge)):
        axis.axvline(k + offset, color="black", lw=2.5, ls=(0, (2, 1)))
    axis.set(title="Which steps does the comb hit? (width: probability of being drawn)", yticks=[],
             xlabel="running sum of $\\pi$", xlim=(0, edge))
    plt.show()


def variances(curves):
    """{rule: [(passes, variance), ...]}"""
    looks = {"iid": ("0.6", "-", "o", ""), "low_discrepancy": ("black", "--", "s", " (published)"),
             "stratified_gradient": (MID, "-", "v", ""),
             "without_replacement_gradient": (MID, "--", "D", ""),
             "batch_gradient": (DARK, "-", "o", " (default)")}
    fig, axis = plt.subplots(figsize=(8.5, 4.2))
    for rule, points in curves.items():
        colour, style, marker, note = looks[rule]
        axis.plot(*zip(*points), style, color=colour, marker=marker, ms=5, lw=2 if note else 1.2,
                  label=rule + note)
    top = curves["iid"][0][1] * 1.5
    axis.plot([1, 5], [top, top / 5], ":", color="black", lw=1, label="slope -1")
    axis.set(xscale="log", yscale="log", xlabel="passes per completion",
             ylabel="variance / |gradient|$^2$",
             title="How far is the estimated gradient from the exact one?")
    axis.set_xticks([1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"])
    axis.minorticks_off()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    plt.show()


def clipped(r, gains):
    """The surrogate against the ratio, by sign of the advantage."""
    fig, axis = plt.subplots(figsize=(7, 3))
    for (A, gain), style in zip(gains.items(), ("-", "--")):
        axis.plot(r, gain, style, color="black", lw=2)
        label(axis, float(r[-1]), float(gain[-1]), f"A = {A:+.0f}")
    axis.axvspan(0.8, 1.2, color="0.85", zorder=0)
    axis.annotate("1 - clip .. 1 + clip", (1.0, -1.65), ha="center", fontsize=9)
    axis.set(title="Where does an update stop pulling? (flat: no gradient)", xlabel="ratio r",
             ylabel="surrogate", xlim=(0.4, 2.0))
    plt.show()


def same(exact, ours):
    """Two gradients, parameter by parameter."""
    fig, axis = plt.subplots(figsize=(4, 3.8))
    axis.axline((0, 0), slope=1, color="0.6", lw=1)
    axis.plot(exact, ours, "o", ms=5, mfc="none", color="black")
    axis.set(title="Is it the gradient of E[R]?", xlabel="autograd of the enumerated E[R]",
             ylabel="expected gradient of the loss")
    plt.show()


def learning(log, base, trained):
    """Solved share while training; base and trained: results of an evaluation."""
    seconds = np.cumsum([row["rollout_seconds"] + row["update_seconds"] for row in log])
    share = np.array([100 * row["solved"] for row in log])
    smooth = [share[max(0, i - 9):i + 1].mean() for i in range(len(share))]
    before, after = 100 * base["solved"], 100 * trained["solved"]
    fig, axis = plt.subplots(figsize=(8, 3.8))
    axis.plot(seconds, share, color="0.75", lw=0.8)            # each step; black: mean of ten
    axis.plot(seconds, smooth, color="black", lw=2)
    axis.axhline(before, color="0.4", ls="--", lw=1)
    axis.plot(seconds[-1], after, "s", color="black", ms=8)
    label(axis, seconds[-1], smooth[-1], "sampled in 8 steps", fontsize=9)
    label(axis, seconds[-1] * 1.12, before, "base, held out, greedy, 16 steps", (0, 7), fontsize=9)
    label(axis, seconds[-1], after, "trained, held out, greedy, 16", (7, 0), fontsize=9)
    axis.set(title="Does AGRPO make the model better at Sudoku? (one seed)", ylabel="solved, %",
             ylim=(0, 100), xlabel="seconds of rollout and update (grey: each step)",
             xlim=(0, seconds[-1] * 1.4))
    plt.show()


def frontier(base, trained, base_sure, trained_sure):
    """Solved share against denoiser calls; sure: by the sampler threshold."""
    fig, axis = plt.subplots(figsize=(8, 3.8))
    for results, style, fill, name in ((trained, "-s", "black", "trained"),
                                       (base, "--o", "white", "base")):
        x, y = [r["nfe"] for r in results], [100 * r["solved"] for r in results]
        bars = np.abs(100 * np.array([r["ci95"] for r in results]).T - y)
        axis.errorbar(x, y, yerr=bars, fmt=style, color="black", capsize=3, lw=1.8, mfc=fill)
        label(axis, x[0], y[0], name, (8, 0))
    for sure, fill, name in ((trained_sure, "black", "trained"), (base_sure, "white", "base")):
        x, y = sure["nfe"], 100 * sure["solved"]
        bars = np.abs(100 * np.array([sure["ci95"]]).T - y)
        axis.errorbar(x, y, yerr=bars, fmt="*", ms=14, capsize=3, mfc=fill, color="black")
        label(axis, x, y, f"{name}, threshold 0.9", (-8, 24), fontsize=9)
    axis.set(title="How many Sudokus are solved in how many denoiser calls?", xticks=[2, 4, 8, 16],
             xlabel="NFE: denoiser calls per completion (bars: 95 % interval)",
             ylabel="solved, %", xlim=(0, 19), ylim=(0, 100))
    plt.show()


def views_of(views, known, mask_id):
    """{method: Views of one completion}: what is scored, what is read."""
    C = int(known.sum())
    fig, axes = plt.subplots(2, 3, figsize=(12, 6.2))
    for axis, (name, v) in zip(axes.flat, views.items()):
        M = len(v.row)
        read = torch.where(v.state == mask_id, 1.0, 0.72)
        axis.imshow(read.masked_fill(v.target, 0.0)[:, :C], cmap="gray", vmin=0, vmax=1,
                    aspect="auto")
        axis.set(title=f"{name}: {M} pass{'es' * (M > 1)}", xticks=range(0, C, 4), yticks=range(M))
        axis.set_yticklabels([int(s) if M <= 8 or k % 2 == 0 else "" for k, s in enumerate(v.step)],
                             fontsize=8)
        lattice(axis, M, C, "0.5")
    for axis in axes[:, 0]:
        axis.set_ylabel("state before step")
    axes[1, 2].set_ylabel("step of each block")
    for axis in axes[1]:
        axis.set_xlabel("position in the completion")
    fig.suptitle("What does each method score, and having read what?   "
                 "black: scored, grey: read, white: MASK")
    plt.show()


def likelihoods(found):
    """{title: (recorded, scored, mean distance)}"""
    fig, axes = plt.subplots(1, len(found), figsize=(12, 3.8), sharex=True, sharey=True)
    for axis, (title, (recorded, scored, distance)) in zip(axes, found.items()):
        axis.hexbin(recorded, scored, gridsize=28, cmap="gray_r", bins="log",
                    extent=(-3, 0, -3, 0), mincnt=1)
        axis.axline((0, 0), slope=1, color="black", lw=0.8, ls="--")
        axis.set(title=f"{title}: mean difference {distance:.3f} nats", xlim=(-3, 0.05),
                 ylim=(-3, 0.05), xlabel="log-prob when sampled")
    axes[0].set_ylabel("log-prob as scored")
    fig.suptitle("How far is the scored likelihood from the sampler's? (darker: more tokens, on a "
                 "log scale; below -3 not shown)")
    plt.show()


def thresholds(traj, mu):
    """All thresholds with the same outcome, for each completion of one prompt."""
    fig, axis = plt.subplots(figsize=(9, 3.8))
    x = torch.linspace(-0.2, 0.4, 400, dtype=torch.float64)
    axis.fill_between(x, 13 - 11 * torch.exp(-0.5 * ((x - mu) / 0.1) ** 2), 13, color="0.9")
    for y, row in enumerate(traj.ease.argsort().tolist(), start=1):
        (low, high), calls = traj.edges[row].tolist(), int(traj.nfe[row])
        axis.plot([max(low, -0.2), min(high, 0.4)], [y, y], color="black", lw=4,
                  solid_capstyle="butt")
        axis.plot(float(traj.ease[row]), y, "o", mfc="white", color="black", ms=6)
        axis.annotate(f"{calls} call{'s' * (calls > 1)}", (0.405, y), va="center", fontsize=8,
                      annotation_clip=False)
    axis.set(title="Which thresholds would have revealed the same?", yticks=[],
             ylabel="completions of one prompt", xlim=(-0.2, 0.4), ylim=(13, 0),
             xlabel="ease = - log threshold (circle: drawn; bar: same outcome, cut at -0.2; "
                    "shade: its law)")
    plt.show()


def packed(sees, P, C, tail):
    """Who may look at whom in DiPO's packed pass."""
    S = len(sees)
    fig, axis = plt.subplots(figsize=(5.6, 5))
    axis.imshow(torch.where(sees, 0.25, 1.0), cmap="gray", vmin=0, vmax=1)
    edges = [0, P, P + C, P + C + tail, S]
    for edge in edges[1:-1]:
        axis.axhline(edge - 0.5, color="black", lw=1)
        axis.axvline(edge - 0.5, color="black", lw=1)
    middle = [(a + b - 1) / 2 for a, b in zip(edges, edges[1:])]
    axis.set_xticks(middle, ["prompt", "clean", "prompt's\nend", "noisy"])
    axis.set_yticks(middle, ["prompt", "clean", "prompt's\nend", "noisy"])
    lattice(axis, S, S, "0.85")
    axis.set(title="Who may look at whom? (dark: may)", xlabel="looked at", ylabel="looking")
    plt.show()


def weights_of_caches(noise, off):
    """{weights: largest relative errors at each noise}"""
    fig, axis = plt.subplots(figsize=(7.5, 3.4))
    for (arm, y), style, colour in zip(off.items(), (":", "--", "-"), ("0.4", MID, "black")):
        axis.plot(noise, [100 * e for e in y], style, marker="o", color=colour, lw=2, label=arm)
    axis.set(title="How biased is the gradient after rollouts by another law?",
             xlabel="how far the cache's logits are off (standard deviation)",
             ylabel="relative error, %")
    axis.legend(title="weights", frameon=False)
    plt.show()


def biases(bias):
    """{(sampler, "on" or "off"): relative error}"""
    names = list(dict.fromkeys(name for name, _ in bias))
    fig, axis = plt.subplots(figsize=(9, 3))
    off, on = ([bias[name, term] for name in names] for term in ("off", "on"))
    x = np.arange(len(names))
    axis.bar(x - 0.2, off, 0.4, color="0.75", ec="black", hatch="///", label="tokens only")
    axis.bar(x + 0.2, on, 0.4, color="black", label="tokens and positions")
    axis.set_xticks(x, names)
    axis.set(title="How far off is the expected gradient? (worst of 5 enumerated denoisers)",
             ylabel="relative error", yscale="log", ylim=(1e-17, 30))
    axis.legend(frameon=False)
    plt.show()
