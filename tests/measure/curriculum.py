"""Do the curricula learn faster? Three seeds each; assets/curriculum.csv, and the table.

    python tests/measure/curriculum.py [SEED ...]

Each run has the same processor time of rollout and update on one thread, from the same base model
of its seed; all but what an arm names is the default. Held-out shares: 256 examples, greedy, low
confidence, one token a step. A run whose rows are there is not made again.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402

import levers  # noqa: E402
import tables  # noqa: E402

PLACE = Path(__file__).resolve().parents[2] / "assets" / "curriculum.csv"
BUDGET, POINTS, SEEDS = 60, 15, 3  # seconds of a run, points of its curve
RATE = {"none": "", "solve_rate": "--curriculum solve_rate"}
ARMS = {  # (task, examples to train on): {curriculum: flags}
    ("sudoku", 256): RATE,
    ("story", 256): RATE,
    ("sudoku", 4096): RATE,
    ("story", 4096): {
        **RATE,
        "8,16 at 25 % without an end": "--curriculum 8,16",
        "8,16 after 10 steps": "--curriculum 8,16 --grow-at 1 --grow-after 10",
        "8,16 after 20 steps": "--curriculum 8,16 --grow-at 1 --grow-after 20",
    },
}
FIELDS = "task examples curriculum seed seconds step passes held_out".split()


def main(seeds: list):
    torch.set_num_threads(1)
    for seed in map(int, seeds or range(SEEDS)):
        for (task, pool), arms in ARMS.items():
            for arm, flags in arms.items():
                key = dict(zip(FIELDS, (task, str(pool), arm, str(seed))))
                if any(key.items() <= row.items() for row in tables.known(PLACE)):
                    continue
                clock = time.time()
                new = levers.run(task, seed, flags, BUDGET, POINTS, pool)
                rows = [{**key, **{k: row[k] for k in FIELDS[4:]}} for row in new]
                tables.write(PLACE, FIELDS, tables.known(PLACE) + rows)  # others may have written
                curve = [f"{100 * row['held_out']:.0f}" for row in new]
                print(*key.values(), *curve, f"{time.time() - clock:.0f} s", flush=True)
    order = [(task, str(pool), arm) for (task, pool), arms in ARMS.items() for arm in arms]
    rows = sorted(
        tables.known(PLACE), key=lambda r: order.index((r["task"], r["examples"], r["curriculum"]))
    )
    tables.write(PLACE, FIELDS, rows)
    print("\n" + tables.curriculum())


if __name__ == "__main__":
    main(sys.argv[1:])
