"""What each lever of the cost buys: solved share per second against the published estimator.

    python tests/measure/levers.py       runs every arm, three seeds

Each run has the same processor time of rollout and update on one thread (other work on the machine
does not count), from the same base model of its seed; all but what an arm names is the laptop's
default. Held-out shares: 256 examples, greedy, one token a step, by low confidence, Sudoku at
the end also left to right. Rows go to assets/levers.csv after every run, and a run that is there is
not made again. The table: python tests/measure/tables.py.
"""

import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402

import agrpo  # noqa: E402
import eval as evaluation  # noqa: E402
from methods import models, scored  # noqa: E402
from support import data, options  # noqa: E402
import tables  # noqa: E402

PLACE = Path(__file__).resolve().parents[2] / "assets" / "levers.csv"
BUDGET = {"sudoku": 30}  # seconds
POINTS = 3  # of each curve
OURS = "--prompts 16 --completions 8"  # the published batch
FULL = {"sudoku": 16, "story": 16}  # tokens of a completion: FULL of the flags below
ARMS = {  # lever: {setting: flags}; K = 1, low confidence and half of the steps where not named
    "published estimator": {"": f"{OURS} --preset paper"},
    "ours": {"": OURS},
    "K": {
        "2": f"{OURS} --mc-steps 2",
        "4": f"{OURS} --mc-steps 4",
        "all": f"{OURS} --method exact",
    },
    "prompts x completions": {
        f"{b} x {g}": f"--prompts {b} --completions {g}"
        for b, g in ((32, 4), (8, 16), (4, 32), (4, 8), (8, 8), (32, 8), (16, 16))
    },
    "tokens a step": {"1": f"{OURS} --steps FULL", "4": f"{OURS} --steps QUARTER"},
    "sampler": {
        "threshold 0.9": f"{OURS} --unmasking threshold --threshold 0.9 --steps FULL",
        "threshold 0.7": f"{OURS} --unmasking threshold --threshold 0.7 --steps FULL",
        "random": f"{OURS} --unmasking random",
        "left to right": f"{OURS} --unmasking left_to_right --steps FULL",
        "JustGRPO": f"{OURS} --preset justgrpo",
    },
    "cache": {"dual": f"{OURS} --cache dual"},
}


def run(
    task: str, seed: int, flags: str, budget: float = 0, points=POINTS, pool=None, **optim
) -> list[dict]:
    """One run of `budget` seconds (0: the task's) -> its held-out shares, from the base model on.
    pool: examples to train on, by default all. optim: what to set in the optimizer, as betas."""
    C, budget = FULL[task], budget or BUDGET[task]
    flags = flags.replace("FULL", str(C)).replace("QUARTER", str(C // 4)).split()
    cfg, _ = evaluation.parse(
        ["--task", task, "--seed", str(seed), "--device", "cpu", *flags]
        + (["--eval-steps", str(C)] if "tiny-block" not in flags else [])
    )
    C = int(cfg.eval_steps.split(",")[0])  # tiny-block: more, a block may be cut
    policy, tokenizer = models.open_policy(cfg, train=True)
    train, test = data.load_split(task, cfg.train_examples, 256, seed)
    train = train[:pool]
    optimizer, sample = agrpo.make_optimizer(policy, cfg), models.sampler(tokenizer, cfg)
    for group in optimizer.param_groups:
        group |= optim
    method = evaluation.method_of(cfg, tokenizer)
    method.begin(policy, optimizer, cfg)
    if cfg.kl:
        scored.keep_reference(policy)
    one_step, rows, total = method.train_step or agrpo.train_step, [], {"passes": 0, "calls": 0}
    seconds = rollout = step = 0

    def measured() -> float:
        return evaluation.evaluate_at(policy, tokenizer, cfg, test, C)["solved"]

    rows.append({"seconds": 0, "step": 0, **total, "held_out": measured(), "rollout": 0})
    while seconds < budget:
        clock = time.process_time()
        row = one_step(policy, optimizer, train, step, cfg, sample)
        spent = time.process_time() - clock
        seconds, step = seconds + spent, step + 1
        rollout += spent * row["rollout_seconds"] / (row["rollout_seconds"] + row["update_seconds"])
        total["passes"] += row["passes"]
        total["calls"] += row["nfe"] * row["sampled"]
        if seconds >= budget * len(rows) / points:
            rows.append(
                {"seconds": seconds, "step": step, **total, "held_out": measured()}
                | {"rollout": rollout / seconds}
            )
    if task != "sudoku":
        return rows
    at = dataclasses.replace(options.for_evaluation(cfg), unmasking="left_to_right", steps=C)
    rows[-1]["left_to_right"] = evaluation.evaluate(
        lambda exs, keys: evaluation.completed(policy, tokenizer, exs, keys, at), task, test
    )["solved"]
    return rows


FIELDS = "task lever setting seed seconds step passes calls rollout held_out left_to_right".split()


def main(tasks: list):
    torch.set_num_threads(1)
    rows = tables.known(PLACE)
    for task in tasks:
        for seed in range(3):
            for lever, settings in ARMS.items():
                for setting, flags in settings.items():
                    key = {"task": task, "lever": lever, "setting": setting, "seed": str(seed)}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    clock = time.time()
                    new = run(task, seed, flags)
                    rows += [{**key, **row} for row in new]
                    tables.write(PLACE, FIELDS, rows)
                    print(
                        *key.values(), f"{time.time() - clock:.0f} s", new[-1], sep="  ", flush=True
                    )


if __name__ == "__main__":
    main(list(BUDGET))
