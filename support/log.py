"""log.csv: a row a step.

    step, lr, peak_memory_mb, rollout_seconds, update_seconds    of the step
    loss                    of fine-tuning; of those below it has heldout, grad_norm and skipped
    reward, reward_PART     mean reward of the completions sampled, and of each of its parts
    solved, sampled         share of them that is solved, and how many there were
    heldout                 share solved greedily, of one half of the held-out examples, every
                            --eval-every steps
    ratio, clip_fraction    mean ratio, share outside of the clip range: of tokens, and of choices
                            of positions
    grad_norm, skipped      norm before clipping; 1 if the step was not applied
    entropy, nfe            of the sampling law, nats a token; denoiser calls a completion
    ease                    a controller's mean: minus log threshold, or log bound
    passes, passes_saved    states scored with a gradient; states left out, as theirs is zero
    is_weight, is_capped    with --cache prefix or dual: mean weight, share truncated. A weight of
                            mean 1 where the order counts or is random (but for what is truncated
                            and what the cache's law never samples); with tokens only, a mean near 1
                            says no more than that the cache is close
    completion_length, drawn_before  with --curriculum: of this step; share of its prompts that were
                            drawn before. reward and solved are then of the prompts drawn, at the
                            length of the moment: across steps only heldout compares
"""
import contextlib
import csv
import dataclasses
import io
import math
from pathlib import Path

from support.files import refusing, write_atomically

ENDS = {True: ("step", "loss", "grad_norm", "skipped", "lr"),      # columns, of fine-tuning and RL
        False: ("solved", "ratio", "clip_fraction", "grad_norm", "entropy", "nfe", "ease",
                "is_weight", "is_capped", "sampled", "passes", "passes_saved", "skipped", "lr")}
LAST = ("heldout", "peak_memory_mb", "rollout_seconds", "update_seconds")

def ordered(row: dict) -> dict:
    """A row with all columns of the log in their order, blank where it has nothing."""
    parts = [k for k in row if k.startswith("reward_")]
    names = ENDS[True] if "loss" in row else ("step", "reward", *parts, *ENDS[False])
    return {k: round(row[k], 3) if k.endswith("_seconds") else row.get(k, "")
            for k in (*names, *LAST, *{"completion_length", "drawn_before"} & row.keys())}

def read_log(path: Path, before_step: float = math.inf) -> list[dict]:
    """Whole rows of log.csv before a step: later ones are done again. Raises BadInput."""
    if not path.is_file():
        return []
    with refusing(path), open(path, newline="", errors="replace") as f:
        return [row for row in csv.DictReader(f) if None not in row.values()
                and row.get("step", "").isdecimal() and int(row["step"]) < before_step]

def write_log(path: Path, rows: list[dict]):
    """All rows of a log.csv, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((*rows[:1], *map(dict.values, rows)))
    write_atomically(path, lambda f: f.write(text.getvalue().encode()))

def append_log(path: Path, row: dict):
    """One row more; the first brings the header."""
    row = ordered(row)
    with open(path, "a") as f:
        lines = csv.writer(f, lineterminator="\n")
        if not f.tell():
            lines.writerow(row)
        lines.writerow(row.values())

@contextlib.contextmanager
def tracker(cfg, folder: Path):
    """Yields track(row of the log): to the tracker of --report-to by accelerate, or nowhere."""
    if not cfg.report_to:
        yield lambda row: None
        return
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=cfg.device == "cpu", log_with=cfg.report_to, project_dir=folder)
    accelerator.init_trackers("agrpo", dataclasses.asdict(cfg))
    try:
        yield lambda row: accelerator.log(row, step=row["step"])
    finally:
        accelerator.end_training()
