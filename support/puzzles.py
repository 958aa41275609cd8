"""The makers of Sudokus, Countdowns and stories, and the split that an example belongs to."""
import hashlib
import itertools
import operator
import random
import re
from fractions import Fraction

import numpy as np

ORDERS = list(itertools.permutations(range(4)))
BANDS = [a + b for a in ORDERS for b in ORDERS if len({*a[:2], *b[:2]}) == 4]
GRIDS = 1 + np.array([a + b for a in BANDS for b in BANDS            # all (288, 16), of 1 to 4
                      if all(len({a[c], a[c + 4], b[c], b[c + 4]}) == 4 for c in range(4))], "i1")
SOLUTIONS = {"".join(map(str, grid)) for grid in GRIDS}
SWAPS = [p for p in ORDERS if p[0] // 2 == p[1] // 2]      # of rows or columns: bands stay bands
IMAGES = [np.arange(16).reshape(4, 4)[np.ix_(rows, cols)] for rows in SWAPS for cols in SWAPS]
SYMMETRIES = np.reshape([(image, image.T) for image in IMAGES], (128, 16))

def in_split(key, split: str, test_share: float = 0.2) -> bool:
    """Whether examples of a key (Task.key) are in `split`: a hash decides, whatever the seed."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return (int.from_bytes(digest[:4], "big") < test_share * 2**32) == (split == "test")

def sudoku_class(puzzles: np.ndarray) -> np.ndarray:
    """(n, 16) puzzles -> (n,) int64, equal for two puzzles iff a symmetry of the grid and a
    renaming of the digits maps one to the other."""
    images = np.asarray(puzzles)[:, SYMMETRIES]                                # (n, 128, 16)
    cells = [(images == digit) @ 5 ** np.arange(15, -1, -1) for digit in range(1, 5)]
    renamed = np.tensordot([4, 3, 2, 1], np.sort(cells, 0), 1)       # 1 is what appears first
    return renamed.min(-1)                                           # the smallest image

def sudoku_generate(n: int, seed: int, split: str) -> list[dict]:
    """`n` different puzzles with one solution, 6 to 10 empty cells, of the classes of `split`."""
    rng, found = np.random.default_rng([seed, split == "test"]), {}
    while len(found) < n:
        solution = GRIDS[rng.integers(288, size=512)]
        holes = rng.integers(6, 11, size=(512, 1))
        puzzle = np.where(rng.random((512, 16)).argsort(1).argsort(1) < holes, 0, solution)
        solves = ((puzzle[:, None] == GRIDS) | (puzzle[:, None] == 0)).all(-1)     # (512, 288)
        puzzle, solution = (cells[solves.sum(1) == 1] for cells in (puzzle, solution))
        for p, s, c in zip(puzzle, solution, sudoku_class(puzzle)):
            if in_split(int(c), split):
                found.setdefault("".join(map(str, p)), "".join(map(str, s)))
    return [{"puzzle": p, "solution": s} for p, s in itertools.islice(found.items(), n)]

def sudoku_lazy(example: dict, rng: random.Random) -> str:
    """Each row's holes filled with its missing digits, in order: columns and boxes are ignored."""
    rows = re.findall("....", example["puzzle"])
    for i, row in enumerate(rows):
        for digit in sorted(set("1234") - set(row)):
            rows[i] = rows[i].replace("0", digit, 1)
    return "".join(rows)

def countdown_solve(nums: list, target: int) -> str | None:
    """An expression for the target: sums and differences, in the given order, where possible.
    >>> countdown_solve([3, 4, 2], 14), countdown_solve([30, 100, 93], 23), countdown_solve([3], 7)
    ('2*(3+4)', '30-100+93', None)"""
    for signs in itertools.product((1, -1), repeat=len(nums)):
        terms = [*map(operator.mul, signs, nums)]
        if sum(terms) == target and 1 in signs:
            terms.insert(0, terms.pop(signs.index(1)))         # a minus cannot stand first
            return "".join(f"{term:+}" for term in terms).removeprefix("+")
    failed = set()                                             # numbers that do not make the target

    def search(pool):
        """Merges any two of [(text, value)] until one is left -> its text, or None."""
        if len(pool) == 1:
            return pool[0][0] if pool[0][1] == target else None
        if (numbers := tuple(sorted(x for _, x in pool))) in failed:
            return None
        for i, j in itertools.combinations(range(len(pool)), 2):
            (a, x), (b, y), rest = pool[i], pool[j], [*pool[:i], *pool[i + 1:j], *pool[j + 1:]]
            made = [(f"({a}+{b})", x + y), (f"({a}-{b})", x - y), (f"({a}*{b})", x * y),
                    (f"({b}-{a})", y - x)]
            made += [(f"({a}/{b})", x / y)] if y else []
            made += [(f"({b}/{a})", y / x)] if x else []
            for pair in made:
                if found := search([*rest, pair]):
                    return found
        failed.add(numbers)
    found = search([(str(n), Fraction(n)) for n in nums])
    return found and found[1:-1]

def countdown_generate(n: int, seed: int, split: str) -> list[dict]:
    """`n` different statements: 3 two-digit numbers, a target in 1..100 that + and - reach."""
    rng, found = np.random.default_rng([seed, split == "test"]), {}
    while len(found) < n:
        nums, sign = rng.integers(10, 100, 3), rng.choice([-1, 1], 3)
        target = int((nums * sign).sum())
        if 1 <= target <= 100 and in_split((*sorted(nums.tolist()), target), split):
            found.setdefault((*nums.tolist(), target))
    return [{"nums": nums, "target": target} for *nums, target in found]

NAMES, THINGS = "Ann Ben Eva Max Tom Zoe".split(), "cups eggs keys nuts pens toys".split()
GAINS, LOSSES = "buys finds gets makes wins".split(), "breaks drops loses sells uses".split()
STORY_WORDS = (*NAMES, *THINGS, *GAINS, *LOSSES, "has", *map(str, range(40)), *"+-=,.",
               "<answer>", "</answer>")

def chain(numbers: list[int]) -> str:
    """A first number and what is added to it, one after the other, with each result.
    >>> chain([27, 5, -3])
    '27+5=32-3=29'"""
    totals = itertools.accumulate(numbers)
    return f"{next(totals)}" + "".join(f"{n:+}={total}" for n, total in zip(numbers[1:], totals))

def story_answer(steps: str) -> str:
    """A chain with its last result in answer tags.
    >>> story_answer("27+5=32-3=29")
    '27+5=32-3=<answer>29</answer>'"""
    steps, _, answer = steps.rpartition("=")
    return f"{steps}=<answer>{answer}</answer>"

def story_generate(n: int, seed: int, split: str) -> list[dict]:
    """`n` different stories of one to three operations, all results between 10 and 39, which have
    tokens; so has the sum of all numbers, the lazy answer. A sequence of numbers and operations is
    in one split only."""
    rng, found = np.random.default_rng([seed, split == "test"]), {}
    while len(found) < n:
        changes = rng.integers(2, 6, rng.integers(1, 4))           # adding all up is seldom right
        changes *= rng.choice([-1, 1], len(changes), p=[0.7, 0.3])
        numbers = [int(rng.integers(11, 38)), *changes.tolist()]
        kinds = (NAMES, THINGS, *(GAINS if change > 0 else LOSSES for change in changes))
        name, thing, *verbs = (str(rng.choice(words)) for words in kinds)
        events = "".join(f", {verb} {abs(x)}" for verb, x in zip(verbs, numbers[1:]))
        answer = f"{chain(numbers)}\n#### {sum(numbers)}"
        if (min(itertools.accumulate(numbers)) >= 10 and sum(map(abs, numbers)) < 40
                and in_split(answer, split)):
            found.setdefault(f"{name} has {numbers[0]} {thing}{events}.", answer)
    return [{"question": story, "answer": answer} for story, answer in found.items()]

def story_lazy(example: dict, rng: random.Random) -> str:
    """A chain that adds all numbers up, whatever the story says."""
    return story_answer(chain([*map(int, re.findall("[0-9]+", example["question"]))]))
