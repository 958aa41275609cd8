"""What learns stories fastest: methods, samplers, time steps, and what else may matter.

    python tests/measure/compare.py [GROUP ...]     three seeds; assets/compare.csv and compare.png

Each run of a group has the same processor time of rollout and update on one thread, from the same
base model of its seed. All but what an arm names is the default; a method brings its own advantage
and loss settings, the learning rate is the default's for all. Held-out shares: 256 stories, greedy,
low confidence, one token a step. A run whose rows are there is not made again; those of an arm that
has changed must be deleted. Prints the table.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402

from support import figures  # noqa: E402
import levers  # noqa: E402
import tables  # noqa: E402

PLACE = Path(__file__).resolve().parents[2] / "assets" / "compare.csv"
BUDGET, SHORT = 60, {"method, blocks": 16}  # seconds of a run: agrpo has learned all by then
POINTS, SEEDS = 4, 3  # of a curve
BLOCK = "--model tiny-block"
ARMS = {  # group: {arm: flags}; NAME=NUMBER is a setting of the optimizer, not a flag
    "method": {
        "agrpo": "",
        "exact": "--method exact",
        "tracerl": "--method tracerl",
        "diffpo": "--method diffpo",
        "diffu-grpo": "--method diffu-grpo",
    },
    "method, blocks": {
        "agrpo, tiny-block": BLOCK,
        "dipo, tiny-block": f"{BLOCK} --method dipo",
        "tracerl, tiny-block": f"{BLOCK} --method tracerl",
    },
    "sampler": {
        "tokens only": "--position-term off",
        "confidence": "--unmasking confidence",
        "plackett_luce": "--unmasking plackett_luce",
        "random": "--unmasking random",
    },
    "time steps": {
        "K 2": "--mc-steps 2",
        "K 4": "--mc-steps 4",
        "iid": "--timesteps iid",
        "low_discrepancy": "--timesteps low_discrepancy",
    },
    "published estimator": {"random, K 2 of 8": "--preset paper"},
    "rate": {
        "lr 1e-4": "--lr 1e-4",
        "lr 5e-4": "--lr 5e-4",
        "lr 1e-3": "--lr 1e-3",
        "lr 5e-4, beta2 0.999": "--lr 5e-4 beta2=0.999",
        "lr 5e-4, K 4": "--lr 5e-4 --mc-steps 4",
        "lr 5e-4, norm 0.3": "--lr 5e-4 --max-grad-norm 0.3",
        "lr 5e-4, warm-up 30": "--lr 5e-4 --warmup 30",
        "lr 5e-4, KL 0.01": "--lr 5e-4 --kl 0.01",
    },
    "advantage": {"15/16 of the default": "--advantage mean", "std": "--advantage std"},
    "batch": {
        "16 x 8": "--completions 8",
        "8 x 8": "--prompts 8 --completions 8",
        "two inner epochs": "--inner-epochs 2",
    },
}
COLOUR = dict(zip(ARMS, "#0b62a4 #2e8b57 #d9822b #8e5a2b #c0392b #777777 #7b52ab #555555".split()))
FIELDS = "group arm seed seconds step passes held_out".split()


def draw(axis):
    """A dot for each seed at the end of the time, a bar at their mean; the default's dotted."""
    y, places = 0.0, {}
    for (group,), own in tables.groups(tables.read("compare.csv"), "group").items():
        for (arm,), runs in tables.groups(own, "arm").items():
            ends = [100 * seed[-1]["held_out"] for seed in tables.groups(runs, "seed").values()]
            axis.plot(ends, [y] * len(ends), "o", color=COLOUR[group], alpha=0.5, ms=5, mew=0)
            axis.plot([statistics.mean(ends)], [y], "|", color=COLOUR[group], ms=10, mew=2)
            if not places:
                axis.axvline(statistics.mean(ends), color=COLOUR[group], lw=0.8, ls=":")
            places[f"{group}: {arm}"] = y
            y -= 1
        y -= 0.6
    axis.set_yticks(list(places.values()), labels=list(places), fontsize=8)
    axis.margins(y=0.02)


def main(wanted: list):
    torch.set_num_threads(1)
    for seed in range(SEEDS):
        for group, arms in ARMS.items():
            for arm, flags in arms.items():
                key = {"group": group, "arm": arm, "seed": str(seed)}
                there = any(key.items() <= row.items() for row in tables.known(PLACE))
                if there or wanted and group not in wanted:
                    continue
                words, clock = flags.split(), time.time()
                optim = {"betas": (0.9, float(w[6:])) for w in words if w.startswith("beta2=")}
                flags = " ".join(w for w in words if not w.startswith("beta2="))
                budget = SHORT.get(group, BUDGET)
                new = levers.run("story", seed, flags, budget, POINTS, **optim)
                rows = [{**key, **{k: row[k] for k in FIELDS[3:]}} for row in new]
                tables.write(PLACE, FIELDS, tables.known(PLACE) + rows)  # others may have written
                curve = [f"{100 * r['held_out']:.0f}" for r in new]
                print(*key.values(), *curve, f"{time.time() - clock:.0f} s", flush=True)
    order = {arm: n for n, arm in enumerate((g, a) for g, arms in ARMS.items() for a in arms)}
    rows = sorted(tables.known(PLACE), key=lambda row: order[row["group"], row["arm"]])
    tables.write(PLACE, FIELDS, rows)
    print("\n" + tables.compare())
    figures.figure(
        PLACE.with_suffix(".png"),
        f"What learns stories in {BUDGET} seconds ({SHORT['method, blocks']} in blocks)?",
        "held out, greedy: solved, % (dots: seeds; bar: mean; dotted: mean of the default)",
        "",
        draw,
        (8, 6.5),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
