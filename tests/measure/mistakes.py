"""What goes wrong in stories, before and after training.

    python tests/measure/mistakes.py runs/story-agrpo-*      assets/mistakes.csv; prints samples

Base and trained model of each run complete the held-out stories greedily, one token a step; every
chain is compared with the story's.
"""

import collections
import csv
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402

import eval as evaluation  # noqa: E402
from methods import models  # noqa: E402
from rewards import TASKS, gold_completion, grade, story_parts, text_of  # noqa: E402
from support import data  # noqa: E402
import tables  # noqa: E402

PLACE = Path(__file__).resolve().parents[2] / "assets" / "mistakes.csv"
KINDS = (
    "right chain",
    "right answer, other chain",
    "adds up all numbers",
    "no chain",
    "other number of steps",
    "wrong number",
    "wrong sign",
    "wrong sum",
)


def parts(text: str) -> tuple[list, list, list]:
    """"27+5=32-3=<answer>29</answer>" -> numbers [27, 5, 3], signs [+, -], results [32, 29]."""
    first, rest = re.match(r"([0-9]+)(.*)", re.sub("</?answer>", "", text)).groups()
    steps = re.findall("([-+])([0-9]+)=([0-9]+)", rest)
    return (
        [int(first), *(int(n) for _, n, _ in steps)],
        [sign for sign, *_ in steps],
        [int(result) for *_, result in steps],
    )


def kind(completion: str, example: dict) -> str:
    """One of KINDS, the first that holds."""
    text, gold = text_of(completion), gold_completion("story", example, "bare")
    if text == gold:
        return "right chain"
    if grade("story", text, example) == 1:
        return "right answer, other chain"
    if text == TASKS["story"].lazy(example, None):
        return "adds up all numbers"
    if story_parts(text, example)["format"] < 1:
        return "no chain"
    (numbers, signs, _), right = parts(text), parts(gold)
    if len(signs) != len(right[1]):
        return "other number of steps"
    if numbers != right[0]:
        return "wrong number"
    return "wrong sign" if signs != right[1] else "wrong sum"


def main(folders: list):
    torch.set_num_threads(1)
    rows, shown = [], 0
    for folder in folders:
        seed = json.loads((Path(folder) / "config.json").read_text())["seed"]
        for who, flags in (
            ("base", ["--task", "story", "--seed", str(seed)]),
            ("trained", ["--model", folder]),
        ):
            cfg, _ = evaluation.parse([*flags, "--device", "cpu"])
            policy, tokenizer = models.open_policy(cfg)
            examples, C = data.load_examples("story", 512, 0, "test"), cfg.completion_length
            texts = evaluation.evaluate_at(policy, tokenizer, cfg, examples, C)["completions"]
            counts = collections.Counter(
                (ex["answer"].count("="), kind(text, ex)) for text, ex in zip(texts, examples)
            )
            rows += [
                [seed, who, n, what, counts[n, what]] for n in (1, 2, 3) for what in KINDS
            ]
            if shown < 2:
                shown += 1
                for text, ex in list(zip(texts, examples))[:20]:
                    print(f"{who}: {ex['question']:50} {text:40} {kind(text, ex)}")
    with tables.writing(PLACE) as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["seed", "model", "operations", "kind", "n"])
        out.writerows(rows)
    print("\n" + tables.mistakes())


if __name__ == "__main__":
    main(sys.argv[1:])
