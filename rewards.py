"""Tasks of agrpo.py: their data, their prompts, one answer parser, grades and rewards.

Two functions are the contract that other code uses; neither raises on any completion string:

    grade(task, completion, example)        -> float in [0, 1]   1 means solved; what evaluation counts
    reward_parts(task, completion, example) -> {name: float}     what training maximises is their sum

Example keys: sudoku {puzzle, solution}, countdown {nums, target}, gsm8k {question, answer}, math {problem, answer}.
Training and evaluation share `find_answer`, so that a completion cannot be right in one and wrong in the other.
"""
import csv
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Callable

import numpy as np


class BadInput(Exception):
    """A mistake of the caller (flag, file, example), told in one line; the command line tools exit with code 2."""


# ------------------------------------------------------------------------------------------- one parser for all tasks
END_OF_TEXT = re.compile(r"<\|(?:eot_id|endoftext|end_of_text|im_end)\|>|</s>")
PLACEHOLDER = re.compile(r"(?:[.…_{}\s]|\\[lc]?dots|\\boxed)*")     # what a copied format holds: no answer
MAX_CHARS = 20_000                     # of a completion, its end: grading stays linear and short


def text_of(completion: str) -> str:
    """A completion up to its end of text."""
    return END_OF_TEXT.split(completion[:10**6], maxsplit=1)[0]


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} that closes and holds more than a placeholder, or None.

    >>> last_boxed(r"so \\boxed{3} and \\boxed{\\frac{1}{2}}, form \\boxed{...}")
    '\\\\frac{1}{2}'
    """
    opened, best = [], (-1, None)                                            # of each open brace: where its box began, or -1
    for m in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]", text):
        if m[0].endswith("{") and m[0] != "\\{":
            opened.append(m.end() if len(m[0]) > 1 else -1)
        elif m[0] == "}" and opened and (start := opened.pop()) > best[0] and len(opened) < 20:
            content = text[start:m.start()].strip()                          # (deeper nesting would take quadratic time)
            best = best if PLACEHOLDER.fullmatch(content) else (start, content)
    return best[1]


def find_answer(completion: str) -> tuple[str, bool]:
    """The answer a completion commits to, and whether it marked it as such: the last usable \\boxed in the last answer tag that
    holds something, else that tag, else the last \\boxed of the text, else (unmarked) the text after the reasoning.

    >>> find_answer("<reasoning>1+1</reasoning><answer>\\\\boxed{2}</answer>"), find_answer("1234"), find_answer("<think>1")
    (('2', True), ('1234', False), ('', False))
    """
    text = text_of(completion)[-MAX_CHARS:]
    for tag in reversed(text.split("<answer>")[1:]):
        inside = tag.split("</answer>", 1)[0]
        if not PLACEHOLDER.fullmatch(found := last_boxed(inside) or inside.strip()):
            return found, True
    if (found := last_boxed(text)) is not None:
        return found, True
    after = re.split(r"</(?:reasoning|think)>", text)[-1]
    return ("" if re.search(r"<(?:reasoning|think)>", after) else after.strip()), False    # reasoning never closed: no answer


# ---------------------------------------------------------------------------------------------------------- 4x4 Sudoku
def sudoku_cells(completion: str) -> tuple[str, bool]:
    """The digits a completion gives for the grid, row by row, and whether they are 16: the answer's digits if so, else its last
    run of 16, else its last four of 4, else, of a marked answer, what it has (cells it lacks stay empty, a surplus is cut, and it is never solved).

    >>> sudoku_cells("<answer>12 34|34 12|21 43|43 21</answer>"), sudoku_cells("<answer>1234 34</answer>"), sudoku_cells("1234")
    (('1234341221434321', True), ('123434', False), ('', False))
    """
    answer, marked = find_answer(completion)
    answer = re.sub(r"(?i)\brow\s*[1-4]\s*:|4\s?[x×]\s?4", " ", answer)
    digits = re.sub(r"[^0-9]", "", answer)
    runs, rows = (re.findall(rf"(?<![0-9])[0-9]{{{n}}}(?![0-9])", answer) for n in (16, 4))
    if len(digits) == 16 or runs or len(rows) > 3:
        return digits if len(digits) == 16 else runs[-1] if runs else "".join(rows[-4:]), True
    return (digits[:16] if marked else ""), False


def sudoku_grade(completion: str, example: dict) -> float:
    """Share of the empty cells that are right, never 1 when a clue was changed. Any valid grid over the clues is a 1.

    >>> ex = {"puzzle": "1234341221434300", "solution": "1234341221434321"}
    >>> sudoku_grade("1234341221434321", ex), sudoku_grade("1234341221434324", ex)
    (1.0, 0.5)
    """
    (cells, whole), puzzle = sudoku_cells(completion), example["puzzle"]
    kept, empty = whole and all(p in ("0", c) for p, c in zip(puzzle, cells)), max(1, puzzle.count("0"))
    if kept and tuple(map(int, cells)) in _sudoku_solutions():
        return 1.0
    right = sum(p == "0" and s == c for p, s, c in zip(puzzle, example["solution"], cells))
    return min(right, empty - 1) / empty


def sudoku_parts(completion: str, example: dict) -> dict:
    """format: 1/2 for 16 cells + 1/2 for the share of clues kept; correct: grade.

    >>> ex = {"puzzle": "1234341221434300", "solution": "1234341221434321"}
    >>> sudoku_parts("1234341221434321", ex), sudoku_parts("no idea", ex)
    ({'format': 1.0, 'correct': 1.0}, {'format': 0.0, 'correct': 0.0})
    """
    (cells, whole), puzzle = sudoku_cells(completion), example["puzzle"]
    kept = sum(p == c for p, c in zip(puzzle, cells) if p != "0") / max(1, 16 - puzzle.count("0"))
    return {"format": 0.5 + 0.5 * kept if whole else 0.0, "correct": sudoku_grade(completion, example)}


@cache
def sudoku_grids() -> np.ndarray:
    """All 288 complete 4x4 grids, (288, 16) of 1..4."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    pairs = [a + b for a in rows for b in rows if all({*a[i:i + 2], *b[i:i + 2]} == {1, 2, 3, 4} for i in (0, 2))]
    return np.array([a + b for a in pairs for b in pairs
                     if all(len({a[c], a[4 + c], b[c], b[4 + c]}) == 4 for c in range(4))])


@cache
def _sudoku_solutions() -> frozenset:
    return frozenset(map(tuple, sudoku_grids().tolist()))


@cache
def _sudoku_symmetries() -> np.ndarray:
    """The 128 cell permutations that map grids to grids: rows and columns within and between bands, and transposition."""
    orders = [a + b for x in ([0, 1], [1, 0]) for y in ([2, 3], [3, 2]) for a, b in ((x, y), (y, x))]
    cells = np.arange(16).reshape(4, 4)
    return np.array([m.ravel() for r in orders for c in orders for m in (cells[np.ix_(r, c)], cells[np.ix_(r, c)].T)])


def sudoku_class(puzzles: np.ndarray) -> np.ndarray:
    """(n, 16) puzzles -> (n,) int64, equal for two puzzles iff a symmetry of the grid and a renaming of the digits maps
    one to the other: digits are renamed by first appearance, then the smallest of the 128 images is taken."""
    images = puzzles[:, _sudoku_symmetries()]                               # (n, 128, 16)
    first = np.stack([np.where((images == d).any(-1), (images == d).argmax(-1), 16) for d in range(1, 5)], -1)
    rank = first.argsort(-1, kind="stable").argsort(-1) + 1                 # (n, 128, 4) the new name of digit d + 1
    renamed = np.where(images > 0, np.take_along_axis(rank, np.maximum(images, 1) - 1, -1), 0)
    return (renamed * 5 ** np.arange(15, -1, -1)).sum(-1).min(-1)


def sudoku_generate(n: int, seed: int, split: str, holes=(6, 10)) -> list[dict]:
    """`n` different puzzles with one solution each, `holes` empty cells, from the classes that belong to `split`."""
    rng, found, grids = np.random.default_rng([seed, split == "test"]), {}, sudoku_grids()
    while len(found) < n:
        solution = grids[rng.integers(288, size=512)]
        count = rng.integers(holes[0], holes[1] + 1, size=(512, 1))
        puzzle = np.where(rng.random((512, 16)).argsort(1).argsort(1) < count, 0, solution)
        unique = ((puzzle[:, None] == grids) | (puzzle[:, None] == 0)).all(-1).sum(-1) == 1
        puzzle, solution = puzzle[unique], solution[unique]
        for p, s, c in zip(puzzle, solution, sudoku_class(puzzle)):
            if in_split(int(c), split):
                found.setdefault("".join(map(str, p)), "".join(map(str, s)))
    return [{"puzzle": p, "solution": s} for p, s in itertools.islice(found.items(), n)]


def sudoku_lazy(example: dict, rng: random.Random) -> str:
    """Each row's holes filled with that row's missing digits in ascending order: columns and boxes are ignored."""
    out = ""
    for r in range(0, 16, 4):
        row = example["puzzle"][r:r + 4]
        missing = iter(sorted(set("1234") - set(row)))
        out += "".join(next(missing) if c == "0" else c for c in row)
    return out


def sudoku_row(row: dict) -> dict:
    """A row of a data file -> example; columns puzzle and solution in any case, or d1's generations: question, gold."""
    ex = {k.lower(): str(v).strip() for k, v in row.items() if k}
    if "puzzle" not in ex and (m := re.search("[0-4]{16}", ex.get("question", ""))):
        ex["puzzle"], ex["solution"] = m[0], ex["gold"]
    puzzle, solution = ex["puzzle"], ex["solution"]
    if not re.fullmatch("[0-4]{16}", puzzle) or not re.fullmatch("[1-4]{16}", solution):
        raise ValueError("puzzle and solution must be 16 digits each, 0 for an empty cell")
    if sudoku_grade(solution, {"puzzle": puzzle, "solution": solution}) < 1:
        raise ValueError("the solution is not a valid grid over the puzzle's clues")
    return {"puzzle": puzzle, "solution": solution}


# ----------------------------------------------------------------------------------------------------------- Countdown
LATEX = [(re.compile(p), r) for p, r in (
    (r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r"((\1)/(\2))"), (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\(?:times|cdot|ast)(?![A-Za-z])|\\\*|[×·⋅∙∗]", "*"), (r"\\div(?![A-Za-z])|÷", "/"), (r"[−–]", "-"),
    (r"\\(?:left|right|displaystyle|text)(?![A-Za-z])|\\[()\[\],;!]|\$", ""), (r"(?<!\s)\s++(?==)", " "), (r"[\[{]", "("), (r"[\]}]", ")"), (r"(?<=[0-9)])(\s?)[xX](?=\s?[0-9(])", r"\1*"))]
EXPRESSION = re.compile(r"(?:(?<![^\s:,;])|(?=[ \t]))[-+*/()=0-9. \t]++(?:(?<=[ \t.])|(?![^\s:,;!]))")     # not glued to a word
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def evaluate_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an expression over + - * / ( ) and integers, or None if it is anything else. Never `eval`.

    >>> evaluate_expression("(3 + 4) * 2"), evaluate_expression("9**9**9")
    ((Fraction(14, 1), [3, 4, 2]), None)
    """
    if len(text) > 200 or max(text.count("("), text.count("-")) > 20 or not re.fullmatch(r"(?:[0-9]{1,9}(?![0-9])|[-+*/()\s])+", text):
        return None                                                          # the parser recurses once for each ( and -
    tokens, numbers = re.findall(r"[0-9]+|\S", text)[::-1], []               # a stack, and what is on its way to the value

    def atom():
        """A number, a negated one, or what stands in parentheses."""
        token = tokens.pop()
        if token == "-":
            return -atom()
        if token != "(":
            numbers.append(int(token))
            return Fraction(numbers[-1])
        value = chain("+-")
        if tokens.pop() != ")":
            raise ValueError
        return value

    def chain(operators):                                                    # left-associative: part (operator part)*
        part = atom if operators == "*/" else lambda: chain("*/")
        value = part()
        while tokens and tokens[-1] in operators:
            value = OPERATORS[tokens.pop()](value, part())
        return value

    try:
        value = chain("+-")
    except (ValueError, IndexError, ZeroDivisionError):
        return None
    return None if tokens else (value, numbers)


def countdown_expression(completion: str) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of the expression a completion commits to: the last of its answer, LaTeX operators understood; an
    equation with a number counts if it is true.

    >>> countdown_expression("<answer>\\\\boxed{3 \\\\times (4 - 1) = 9}</answer>"), countdown_expression("3 * 3 = 8")
    ((Fraction(9, 1), [3, 4, 1]), None)
    """
    text = find_answer(completion)[0][-2000:].strip("*`'\" ")
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    chunks = [chunk for chunk in EXPRESSION.findall(text) if re.search("[0-9]", chunk)]
    if not chunks or re.search(r"[\\^!%_√≠<>≤≥]|\b(?:sqrt|log|ln|exp|sin|cos|tan|squared|cubed)\b", text):     # done more than we read
        return None
    sides = [side.strip() for side in chunks[-1].strip("=. \t").split("=")]
    number = re.compile(r"-?[0-9]{1,9}(?:\.0*)?")
    if len(sides) == 2 and number.fullmatch(sides[0]):
        sides.reverse()                                                      # 14 = (3+4)*2
    parsed = evaluate_expression(sides[0]) if len(sides) < 3 else None
    if parsed and len(sides) == 2 and not (number.fullmatch(sides[1]) and parsed[0] == Fraction(sides[1])):
        return None
    return parsed


def countdown_grade(completion: str, example: dict) -> float:
    """1 if the expression uses each number once and gives the target, else 0.

    >>> ex = {"nums": [3, 4, 2], "target": 14}
    >>> countdown_grade("(3+4)*2", ex), countdown_grade("7*2", ex)
    (1.0, 0.0)
    """
    parsed = countdown_expression(completion)
    return float(parsed is not None and Counter(parsed[1]) == Counter(example["nums"]) and parsed[0] == example["target"])


def countdown_parts(completion: str, example: dict) -> dict:
    """format: 1/2 for an expression + 1/2 if it uses each number once; correct: 1 if solved.

    >>> ex = {"nums": [3, 4, 2], "target": 14}
    >>> [sum(countdown_parts(c, ex).values()) for c in ("(3+4)*2", "3+4+2", "7*2", "no")]
    [2.0, 1.0, 0.5, 0.0]
    """
    parsed = countdown_expression(completion)
    uses = parsed is not None and Counter(parsed[1]) == Counter(example["nums"])
    return {"format": 0.5 * (parsed is not None) + 0.5 * uses, "correct": countdown_grade(completion, example)}


def countdown_solve(nums: list, target: int) -> str | None:
    """An expression that uses each number once and gives the target: sums and differences if possible, in the given order if
    possible, else products too.

    >>> countdown_solve([3, 4, 2], 14), countdown_solve([30, 100, 93], 23), countdown_solve([3, 3], 7)
    ('2*(3+4)', '30-100+93', None)
    """
    for order in itertools.permutations(nums):
        for signs in itertools.product((1, -1), repeat=len(nums) - 1):
            if order[0] + sum(s * n for s, n in zip(signs, order[1:])) == target:
                return str(order[0]) + "".join(f"{'+' if s > 0 else '-'}{n}" for s, n in zip(signs, order[1:]))

    def search(pool):
        """Pairs of (text, value): merges any two until one is left; its text if its value is the target, else None."""
        if len(pool) == 1:
            return pool[0][0] if pool[0][1] == target else None
        for (i, (a, x)), (j, (b, y)) in itertools.permutations(enumerate(pool), 2):
            rest = [pool[k] for k in range(len(pool)) if k not in (i, j)]
            for op, value in (("+", x + y), ("-", x - y), ("*", x * y), ("/", x / y if y else None)):
                if value is not None and (found := search([*rest, (f"({a}{op}{b})", value)])):
                    return found
        return None
    found = search([(str(n), Fraction(n)) for n in nums])
    return found and found[1:-1]


def countdown_generate(n: int, seed: int, split: str) -> list[dict]:
    """`n` different statements of 3 two-digit numbers with a target in 1..100 that + and - reach (as nearly all of
    the published ones). Statements equal up to the order of the numbers share a split."""
    rng, found = np.random.default_rng([seed, split == "test"]), {}
    while len(found) < n:
        nums, sign = rng.integers(10, 100, 3), rng.choice([-1, 1], 3)
        target = int((nums * sign).sum())
        if 1 <= target <= 100 and in_split((*sorted(nums.tolist()), target), split):
            found.setdefault((*nums.tolist(), target))
    return [{"nums": list(key[:3]), "target": key[3]} for key in found]


def countdown_lazy(example: dict, rng: random.Random) -> str:
    """The numbers added up in the order of the statement: the target is ignored."""
    return "+".join(map(str, example["nums"]))


def countdown_row(row: dict) -> dict:
    """A row of a data file -> example; {nums, target}, d1's {input: "30,100,93", output: "23"} or its generations' gold."""
    if "gold" in row:
        row = dict(zip(("nums", "target"), row["gold"]))
    nums = row["nums"] if "nums" in row else [int(x) for x in str(row["input"]).split(",")]
    target = row["target"] if "target" in row else int(str(row["output"]))
    if not nums or not all(type(x) is int for x in [*nums, target]):
        raise ValueError("nums must be a list of integers, target an integer")
    return {"nums": list(nums), "target": target}


# --------------------------------------------------------------------------------------------------------------- GSM8K
TYPESETTING = [(re.compile(p), r) for p, r in (
    (r"\\[dtc]?frac\s*\{?([0-9]+)\}?\s*\{?([0-9]+)\}?", r" \1/\2"), (r"\\[,;!: ]|\{,\}|\\(?=[$%])|(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9])", ""),
    (r"[−–‐﹣－]", "-"), (r"\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|[×·⋅•∙]|(?<=[0-9])\s?\*\*\s?(?=[0-9])", "*"), (r"\\div(?![A-Za-z])|÷", "/"), (r"\*\*|\\(?:text|mbox|underline|bf)\w*\s*\{?", " "),
    (r"(?<=[A-Za-z])\}?\s?\^\s?\{?-?[0-9]+\}?|\^\s?\{?\\circ\}?", ""), (r"(?<=[0-9])\s+\((?![a-z]*(?:thousand|million))[^()]*\)\s*+\.?\s*+$", ""))]    # powers of units, (asides)
_RUN = r"[-+]?[$€£¥]?[-+]?\.?[0-9][0-9.,]*(?:[eE][-+]?[0-9]+)?"
ARITHMETIC = re.compile(rf"(?<![A-Za-z0-9_^])(?:[-+]?[0-9]+\s+(?=[0-9]+\s?/\s?[0-9]))?{_RUN}(?:(?:\s?[-+*/^x]\s?|:){_RUN})*")
NUMBER = re.compile(r"([-+]?)[$€£¥]?([-+]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
FRACTION = re.compile(r"([-+]?)(?:([0-9]+)\s+)?([0-9]+)\s?/\s?([0-9]+)")
MINUS = re.compile(r"(?:^|[^A-Za-z0-9)}\]\s])\s*-\s*(?:US)?[$€£¥]?\s*$|\b(?:minus|negative)\s+$")       # of a number, apart from it
NOT_ALONE = re.compile(                # what before a number says that it is not the answer: an operator, a bracket, another guess, a command
    r"[*/^+≠<>≤≥√]\s*[\[({]*\s*$|[0-9})\]]\s*[-+]?\s*[\[({]\s*$|[0-9]\s*(?:[;|&,]|\\\\)?[ \t]+$|[0-9][;|&]\s*$|-\s*(?:US\$|\\?[\[({]|\\left\W)\s*$"
    r"|[0-9][^0-9.\n]{0,20}\b(?:or|and|to|through)\s+(?:\w+\s+)?$|\b(?:half|%|percent) of\s+$|\b(?:sqrt|log|ln|not|than)\s*\(?\s*$|[A-Za-z]\s-\s$"
    r"|\\(?!boxed|fbox|left|approx|quad|qquad|therefore|implies|[Ll]?(?:ong)?[Rr]ightarrow|to|math|displaystyle)[A-Za-z]+\s*[\[({]*\s*$|\|$")
MULTIPLIED = re.compile(               # what after it says so
    r"\s*(?:[kKMB]\b|(?:mil|bn|hundred|thousand|million|billion|trillion|dozen|squared|cubed|pi)\b|[²³½π|]|[)}]*\s*\^|\(|\\(?:sqrt|pi|times|cdot|left)|[-+*/]\s?[A-Za-z]\b)"
    r"|[xyn]\b")


def last_number(text: str) -> Fraction | None:
    """The last number of a text: sign, currency, thousands commas, decimals, a/b, 1 1/2, \\frac read, units ignored. None if there
    is none, if it is malformed (0,72), if something is left to do with it (2*36, 3 million), or if it is one of a list (71 or 72).

    >>> last_number("that makes $1,234.50 in all"), last_number(r"2\\frac{1}{2} cm^2"), last_number("1e72")
    (Fraction(2469, 2), Fraction(5, 2), None)
    """
    text = text[-2000:]
    for pattern, replacement in TYPESETTING:
        text = pattern.sub(replacement, text)
    last = None
    for last in ARITHMETIC.finditer(text):
        pass
    before, found, after = (text[max(0, last.start() - 40):last.start()], last[0], text[last.end():]) if last else ("", "", "")
    if NOT_ALONE.search(before) or found[-1:] not in (".", ",") and MULTIPLIED.match(after):
        return None
    sign = -1 if MINUS.search(before) else 1
    if m := NUMBER.fullmatch(found.rstrip(".,")):
        return sign * Fraction(m[3].replace(",", "")) * (-1 if "-" in (m[1], m[2]) else 1)
    if (m := FRACTION.fullmatch(found.rstrip(".,"))) and int(m[4]):
        return sign * (int(m[2] or 0) + Fraction(int(m[3]), int(m[4]))) * (-1 if m[1] == "-" else 1)
    return None


def gsm8k_gold(example: dict) -> str:
    """What stands after #### in the example's answer."""
    return example["answer"].rsplit("####")[-1].strip()


def gsm8k_grade(completion: str, example: dict) -> float:
    """1 if the answer's last number equals the number after #### in the example's answer.

    >>> ex = {"question": "", "answer": "... #### 72"}
    >>> gsm8k_grade("<answer>\\boxed{72 eggs}</answer>", ex), gsm8k_grade("27", ex)
    (1.0, 0.0)
    """
    gold = last_number(gsm8k_gold(example))
    return float(gold is not None and last_number(find_answer(completion)[0]) == gold)


# ---------------------------------------------------------------------------------------------------------------- MATH
UNICODE = str.maketrans({"−": "-", "–": "-", "∞": "\\infty ", "π": "\\pi ", "√": "\\sqrt ", "°": "", "×": "\\times ", "·": "\\cdot ", "∪": "\\cup "})
UNIT = (r"(?!.*\b(?:or|and|to|more|less|least|most|than|not|hundred|thousand|million|billion|trillion|lakh|dozens?|squared|cubed|remainder|plus|minus|times|over|"
        r"divided|by|choose|mod|factorial|infinity|half|halves|thirds|tenths|pi|sqrt|ln|log|sin|cos|tan|exp|rad|radians?)\b)(?:(?:[A-Za-z/]{2,}|[mgshL])\b[\s.]*)+")
MATH_STYLE = [(re.compile(p), r) for p, r in (                               # what does not change an answer
    (r"^.{0,40}?\b(?:[Aa]nswer|[Vv]alue|[Rr]esult)\b(?:\s+is)?\s*:?\s*|^[*`=\s]+|(?<![*`\s.])[*`\s.]++$", ""), (r"^\\(?:boldsymbol|mathbf|bm)\s*\{(.*)\}$", r"\1"),
    (r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])|(?<!\\)\\[()\[\]]|\\?\$|\\?%|\^\s*\{?\\circ\}?|\\degree", ""), (r"[.,;\s]+$", ""),
    (r"(?<=[0-9])(?:,|\{,\}|,?\\[,!;:])\s*(?=[0-9]{3}(?![0-9]))", ""), (r"(?<!\\)\\[,;!: ]|\\q?quad(?![A-Za-z])|~", " "),     # thousands; spaces
    (rf"(?:(?<=[0-9}}])|(?<=\\pi))\s*(?:\\(?:text|mathrm|mbox|textrm)\s*\{{\s*{UNIT}\}}|(?<=[0-9])\s+{UNIT})(?:\^\{{?[0-9]\}}?)?[.\s]*$", ""),
    (r"\\(?:text|mathrm|mathbf|textbf|boldsymbol|mbox|textrm)\s*\{([^{}]*)\}", r" \1 "), (r"[.,;\s]+$", ""),
    (r"^\s*(?:\\angle\s*)?(?:[A-Za-z]|[A-Z]{2,3}|\\[a-z]+)(?:_\{?\w+\}?|\(-?\w\))?\s*(?:=|\\in(?![A-Za-z]))", ""), (r"^\s*\(([A-Za-z])\)\s*$", r"\1"),
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"), (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*(\{[^{}]*\})\s*([0-9])", r"\\frac\1{\2}"), (r"\\sqrt\s*([0-9])", r"\\sqrt{\1}"),
    (r"^\s*(-?[0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)\s*$", r"\1\\frac{\2}{\3}"), (r"(?<![0-9A-Za-z}.])([0-9]+)\s*/\s*([0-9]+)(?![0-9A-Za-z{.])", r"\\frac{\1}{\2}"),
    (r"(?<![0-9])\.(?=[0-9])", "0."), (r"(\.[0-9]*?)0+(?![0-9])", r"\1"), (r"\.(?![0-9])", ""), (r"(?<![0-9])\s+|\s+(?![0-9])", ""))]
LABEL = re.compile(r"\s*([A-Za-z])\s*=")
MATH_LIMIT, MATH_CHARS = 5, 500        # seconds for one comparison, kept by the operating system; characters of an answer


def math_normal(answer: str) -> str:
    """An answer without what is only typesetting: equal strings are equal answers.

    >>> math_normal(r"x = \\dfrac12"), math_normal("58,500.0"), math_normal(r"36\\text{ inches}"), math_normal(r"\\text{(C)}")
    ('\\\\frac{1}{2}', '58500', '36', 'C')
    """
    answer = answer.translate(UNICODE)
    for pattern, replacement in MATH_STYLE:
        answer = pattern.sub(replacement, answer.strip())
    return answer


def without_braces(normal: str) -> str:
    """A set without the braces around it."""
    return re.sub(r"^\\\{(.*)\\\}$", r"\1", normal)


def math_form(normal: str) -> tuple:
    """How a normalised answer is written: its outer brackets, such as [), or none, then sorted of each of its items decimal, fraction (in
    lowest terms), unreduced (fraction), base B, word or other.

    >>> math_form("(0.5,2)"), math_form(r"\\frac{3}{24}"), math_form("2516_8"), math_form("(x+1)(x-1)")
    (('()', 'decimal', 'decimal'), ('', 'unreduced'), ('', 'base 8'), ('', 'other'))
    """
    def form(item):
        if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?", item):
            return "decimal"
        if m := re.fullmatch(r"[-+]?\\frac\{([-+]?[0-9]+)\}\{([-+]?[0-9]+)\}", item):
            return "fraction" if math.gcd(int(m[1]), int(m[2])) == 1 else "unreduced"
        if m := re.fullmatch(r"[0-9A-F]+_\{?([0-9]+)\}?", item):
            return f"base {m[1]}"
        return "word" if re.fullmatch(r"[A-Za-z]{2,}", item) else "other"

    text = without_braces(normal)                                            # a set is the list of its items
    depth = list(itertools.accumulate((c in "([{") - (c in ")]}") for c in text))
    inside = text[:1] in ("(", "[") and 0 not in depth[:-1]
    items = [""]
    for c, d in zip(text, depth):
        items = [*items, ""] if c == "," and d == inside else [*items[:-1], items[-1] + c]
    if inside and len(items) > 1:
        return text[0] + text[-1], *sorted(map(form, [items[0][1:], *items[1:-1], items[-1][:-1]]))
    return "", *sorted(map(form, [text] if inside else items))


class MathWorker:
    """math-verify in a process of its own. Its time limit is an alarm that ends that process, whatever the library computes, so it
    holds in any thread or process of ours and leaves nothing behind; the next question starts a new one. Of one thread only."""

    def __init__(self):
        self.forget()
        os.register_at_fork(after_in_child=self.forget)                      # the pipe is the parent's

    def forget(self):
        self.process = None

    def start(self):
        path = os.pathsep.join([str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(                                     # a session of its own: Ctrl-C is not for it
            [sys.executable, "-P", "-c", f"import rewards; rewards.math_worker({MATH_LIMIT})"], env={**os.environ, "PYTHONPATH": path}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        if self.process.stdout.readline() != "ready\n":
            raise BadInput("math-verify does not start; is it installed? pip install -r requirements.txt")

    def stop(self) -> int:
        process, self.process = self.process, None
        if process is None:                                                  # it never came up
            return 0
        process.kill()
        process.communicate()
        return process.returncode

    def equal(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds the two equal in value; False if it cannot tell in time."""
        for _ in range(2):                                                   # a worker that somebody killed is asked once more
            try:
                if self.process is None:
                    self.start()
                self.process.stdin.write(json.dumps([gold, answer]) + "\n")
                self.process.stdin.flush()
                if verdict := self.process.stdout.readline():
                    return verdict == "1\n"
            except OSError:
                pass
            except BaseException:                                            # its verdict would answer the next question
                self.stop()
                raise
            if self.stop() == -signal.SIGALRM:
                return False
        return False


def math_worker(limit: int):
    """Of each line [gold, answer] on stdin whether math-verify finds them equal, 1 or 0, on stdout; ends after `limit` seconds on one."""
    import resource
    from math_verify import parse, verify
    signal.signal(signal.SIGALRM, signal.SIG_DFL)                            # it ends the process, whatever we inherited
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    with suppress(ValueError, OSError):                                      # 4 GB of memory, where the system keeps that limit
        resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(limit)
        try:
            gold, answer = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line))
            equal = verify(gold, answer, float_rounding=12, timeout_seconds=None)
        except Exception:                                                    # whatever sympy makes of a strange string
            equal = False
        signal.alarm(0)
        print(int(bool(equal)), flush=True)


class Workers(threading.local):
    """Each thread's own: graders in several threads do not wait for one another."""

    def __init__(self):
        self.math = MathWorker()


_workers = Workers()


@cache
def graders() -> ThreadPoolExecutor:
    """Threads that grade while a model is busy. What may take long runs in a process of its own, with a time limit."""
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1), "grader")


os.register_at_fork(after_in_child=graders.cache_clear)                      # its threads are the parent's




@lru_cache(100_000)
def math_equal(gold: str, answer: str) -> bool:
    """Whether two LaTeX answers are equal in value, however they are written: by math-verify, unless the strings settle it."""
    a, b = math_normal(gold), math_normal(answer)
    labels = [m[1] for m in map(LABEL.match, (gold, answer)) if m]
    if not a or not b or len(answer) > MATH_CHARS or len({*labels}) > 1:     # y = x + 1 is not x = x + 1
        return False
    if "%" in answer and "%" not in gold and not b.isdecimal():              # 10% may answer "what percentage", 0.15% not
        return False
    if a == b:
        return True
    nesting = list(itertools.accumulate(((c == "{") - (c == "}") for c in re.sub(r"\\[{}]", "", answer)), initial=0))
    if nesting[-1] or min(nesting) < 0 or "boxed" in answer or not answer.isprintable():     # it would escape the box it is put in
        return False
    (bracket, *forms), (other, *others) = math_form(a), math_form(b)
    letters = [set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", x))) for x in (a, b)]
    if forms == others == ["decimal"]:
        return Fraction(without_braces(a)) == Fraction(without_braces(b))    # math-verify rounds
    if "word" in [*forms, *others]:
        return a.lower() == b.lower()                                        # ... reads words as letters that commute
    if bracket != other or len(forms) != len(others) or letters[0] != letters[1]:
        return False                                                         # ... takes a pair for a set, and K for k
    if forms != others and forms[0].startswith("base") and others[0].startswith("base"):
        return False                                                         # ... and leaves the base out
    return _workers.math.equal(a, b)


def math_answer(completion: str) -> str:
    """The answer of a completion; too long a one is cut, and then equal to none."""
    return find_answer(completion)[0][:MATH_CHARS + 1]


def math_value(completion: str, example: dict) -> float:
    """1 if the answer equals the example's in value, in any form.

    >>> [math_value(rf"\\boxed{{{a}}}", {"problem": "", "answer": r"\\frac{1}{8}"}) for a in ("0.125", r"\\frac{3}{24}", "0.1")]
    [1.0, 1.0, 0.0]
    """
    return float(math_equal(example["answer"], math_answer(completion)))


def math_grade(completion: str, example: dict) -> float:
    """1 if the answer equals the example's and is written in the same form: a fraction in lowest terms, a decimal, a number in
    its base, and not as an expression copied from the problem. That is a convention: strings compared after normalisation, as the
    published tables are made, ask for the same, and many problems do ("as a common fraction"). math_value does not ask.

    >>> [math_grade(rf"\\boxed{{{a}}}", {"problem": "", "answer": r"\\frac{1}{8}"}) for a in ("1/8", r"\\dfrac18", "0.125", "3/24")]
    [1.0, 1.0, 0.0, 0.0]
    """
    gold, answer = example["answer"], math_answer(completion)
    a, b = math_normal(gold), math_normal(answer)
    in_form = a == b or (form := math_form(a)) == math_form(b) and "unreduced" not in form
    echo = a != b and re.search(r".[-+*/^]|\\", b) and b in math_normal(example["problem"][:5000])     # the task, not its solution
    return float(in_form and not echo and math_equal(gold, answer))


def tag_parts(completion: str, grade: float) -> dict:
    """Of the two maths tasks. think: the reasoning is closed (the prompt may have opened it); answer: an answer tag is opened and
    closed; correct: grade."""
    text = text_of(completion)
    start = text.find("<answer>")
    return {"think": float("</think>" in text or "</reasoning>" in text),
            "answer": float(start >= 0 and text.find("</answer>", start) >= 0), "correct": grade}


# -------------------------------------------------------------------------------------------------------------- prompts
FORMATS = {                            # --prompt: (how the answer is to be laid out, how the completion begins, an answer laid out so)
    "agrpo": ("First think it through between <think> and </think>. Then give nothing but the final answer, as \\boxed{{{form}}}, between "
              "<answer> and </answer>.", "", "<think>{reasoning}</think>\n<answer>\\boxed{{{gold}}}</answer>"),
    "d1": ("Answer in this format:\n<reasoning>\nyour reasoning\n</reasoning>\n<answer>\n\\boxed{{{form}}}\n</answer>", "<reasoning>",
           "\n{reasoning}\n</reasoning>\n<answer>\n\\boxed{{{gold}}}\n</answer>"),
}


def prompt_for(task: str, example: dict, style: str, system_prompt: str = "") -> tuple[str, str]:
    """The user's message, and what the completion is made to begin with. Style "bare" (or none): the statement alone, as the
    tiny model knows it. The published styles put the instructions before the statement, in one message; `system_prompt` replaces them.

    >>> prompt_for("countdown", {"nums": [3, 4, 2], "target": 14}, "bare")
    ('3,4,2=14', '')
    """
    row = TASKS[task]
    if style in ("bare", ""):
        return (row.bare or row.question)(example), ""
    layout, begin, _ = FORMATS[style]
    return f"{system_prompt or row.instruction + ' ' + layout.format(form=row.form)}\n\n{row.question(example)}", begin


def gold_completion(task: str, example: dict, style: str) -> str:
    """A right completion in the layout of the prompt's style: what supervised fine-tuning teaches. Its reasoning is GSM8K's own.

    >>> gold_completion("gsm8k", {"question": "?", "answer": "4 + 4 is <<4+4=8>>8.\\n#### 8"}, "agrpo")
    '<think>4 + 4 is 8.</think>\\n<answer>\\\\boxed{8}</answer>'
    """
    gold = TASKS[task].gold(example)
    if style in ("bare", ""):
        return gold
    words, _, _ = example["answer"].partition("####") if task == "gsm8k" else ("", "", "")
    return FORMATS[style][2].format(reasoning=re.sub(r"<<.*?>>", "", words).strip(), gold=gold)


# ----------------------------------------------------------------------------------------------------- the table of tasks
@dataclass(frozen=True)
class Task:
    """One row of TASKS. The first three are all that a task with a --data file needs; `generate` makes examples up instead, and with
    `lazy` the tiny model can begin with it. None of the functions of a completion may raise on any text."""
    question: Callable[[dict], str]                        # example -> the statement in words
    gold: Callable[[dict], str]                            # example -> a right answer
    grade: Callable[[str, dict], float]                    # completion, example -> [0, 1], 1 is solved
    instruction: str = "Solve the problem step by step."   # what to do with it
    form: str = "the answer"                               # what stands in the box
    parts: Callable[[str, dict], dict] | None = None       # of the reward, each in [0, 1]; default: "correct", the grade
    weights: dict = field(default_factory=lambda: {"correct": 3})      # of the parts: the published sum
    answer: Callable[[str], object] = lambda c: find_answer(c)[0] or None      # completion -> what is put to the vote, None for no answer
    row: Callable[[dict], dict] = dict                     # a row of a data file -> example
    key: Callable[[dict], object] | None = None            # equal for two examples that are the same but for symmetry; default: question
    bare: Callable[[dict], str] | None = None              # example -> the statement as the tiny model knows it; default: question
    beside: tuple[str, Callable] | None = None             # a second grade to report: its name, (completion, example) -> [0, 1]
    generate: Callable[[int, int, str], list] | None = None            # number, seed, "train" or "test" -> examples
    lazy: Callable[[dict, random.Random], str] | None = None           # example, random numbers -> what the tiny model mostly answers at first
    hub: dict | None = None                                # split -> arguments of datasets.load_dataset

    @property
    def speaks_tiny(self) -> bool:
        """Whether a tiny base model can be made for it."""
        return bool(self.generate and self.lazy)

    def __post_init__(self):
        for name, default in (("parts", lambda c, ex: {"correct": self.grade(c, ex)}), ("key", self.question)):
            object.__setattr__(self, name, getattr(self, name) or default)           # frozen


def text_row(question: str, row: dict) -> dict:
    """A row with a statement and an answer in words -> example; d1's generations call them question and gold (a few are null)."""
    statement = row["question"] if question not in row and "question" in row else row[question]
    answer = (row["gold"] or "") if "gold" in row and "answer" not in row else row["answer"]
    example = {question: statement, "answer": answer}
    if not all(type(value) in (str, int, float) for value in example.values()):
        raise ValueError(f"{question} and answer must be text")
    return {k: str(v) for k, v in example.items()}


TASKS = {
    "sudoku": Task(
        question=lambda ex: f"Puzzle: {ex['puzzle']}", bare=lambda ex: ex["puzzle"], gold=lambda ex: ex["solution"],
        instruction="Solve a 4x4 Sudoku. The puzzle is 16 digits, row by row, 0 for an empty cell. Every row, every column and every 2x2 "
                    "box must hold 1, 2, 3 and 4 once each; the given digits stay.", form="the 16 digits of the solution",
        grade=sudoku_grade, beside=("cells", sudoku_grade), answer=lambda c: sudoku_cells(c)[0] or None,
        parts=sudoku_parts, weights={"format": 1, "correct": 3},
        row=sudoku_row, key=lambda ex: int(sudoku_class(np.array([[int(c) for c in ex["puzzle"]]]))[0]),
        generate=sudoku_generate, lazy=sudoku_lazy),
    "countdown": Task(
        question=lambda ex: f"Numbers: {ex['nums']}\nTarget: {ex['target']}", bare=lambda ex: f"{','.join(map(str, ex['nums']))}={ex['target']}",
        instruction="Find an arithmetic expression that equals the target. Use each of the numbers exactly once, the operations +, -, *, / "
                    "and parentheses, and nothing else.", form="the expression", gold=lambda ex: countdown_solve(ex["nums"], ex["target"]),
        grade=countdown_grade, answer=lambda c: find_answer(c)[0].replace(" ", "") or None,
        parts=countdown_parts, weights={"format": 1, "correct": 3},
        row=countdown_row, key=lambda ex: (*sorted(ex["nums"]), ex["target"]), generate=countdown_generate, lazy=countdown_lazy),
    "gsm8k": Task(
        question=lambda ex: ex["question"], instruction="Solve the problem step by step.", form="the number", gold=gsm8k_gold,
        grade=gsm8k_grade, answer=lambda c: last_number(find_answer(c)[0]),
        parts=lambda c, ex: tag_parts(c, gsm8k_grade(c, ex)), weights={"think": 0.5, "answer": 0.5, "correct": 3},
        row=partial(text_row, "question"), key=lambda ex: ex["question"],
        hub={"train": ("openai/gsm8k", "main", "train"), "test": ("openai/gsm8k", "main", "test")}),
    "math": Task(
        question=lambda ex: ex["problem"], instruction="Solve the problem step by step.", form="the answer in simplest form",
        gold=lambda ex: ex["answer"],
        grade=math_grade, beside=("any form", math_value), answer=lambda c: math_normal(math_answer(c)) or None,
        parts=lambda c, ex: tag_parts(c, math_grade(c, ex)), weights={"think": 0.5, "answer": 0.5, "correct": 3},
        row=partial(text_row, "problem"), key=lambda ex: " ".join(ex["problem"].split()),
        hub={"train": ("nlile/hendrycks-MATH-benchmark", None, "train"), "test": ("HuggingFaceH4/MATH-500", None, "test")}),
}


def grade(task: str, completion: str, example: dict) -> float:
    """Grade in [0, 1]; 1 is solved. Never raises on any completion, if the task's own function does not."""
    value = TASKS[task].grade(completion, example)
    if not 0 <= value <= 1:
        raise BadInput(f"task {task}: a grade of {value}, it must be between 0 and 1")
    return float(value)


def try_task(task: str, example: dict):
    """Raises BadInput unless the functions of a task's row work on an example, with its right answer and with an empty completion."""
    row, name = TASKS[task], "a function"
    try:
        for name, words in (("question", row.question(example)), ("gold", row.gold(example)), ("bare", (row.bare or row.question)(example))):
            if not isinstance(words, str):
                raise TypeError(f"{words!r} is no text")
        for completion in (row.gold(example), ""):
            name = "grade"
            grade(task, completion, example)
            name = "parts"
            parts = row.parts(completion, example)
            if not parts or set(parts) != set(row.weights) or not all(math.isfinite(value) for value in parts.values()):
                raise ValueError(f"{parts}, the weights are {row.weights}: a number for each")
            name = "answer"
            row.answer(completion)
        name = "key"
        hash(row.key(example))
    except BadInput:
        raise
    except Exception as error:                                               # of code that is not ours
        raise BadInput(f"task {task}: {name} does not work on {str(example)[:100]}: {type(error).__name__}: {error}") from None


def reward_parts(task: str, completion: str, example: dict, weights: dict | None = None) -> dict:
    """The named parts whose sum is the reward, each logged as a column of its own; weights: as Task.weights, by default the
    published sum, 0 to 4. Never raises on any completion.

    >>> reward_parts("countdown", "3+4+2", {"nums": [3, 4, 2], "target": 14})
    {'format': 1.0, 'correct': 0.0}
    """
    weights = weights or TASKS[task].weights
    return {name: weights[name] * value for name, value in TASKS[task].parts(completion, example).items()}


def reward(task: str, completion: str, example: dict) -> float:
    """The published reward, 0 to 4: format up to 1 + correct up to 3."""
    return float(sum(reward_parts(task, completion, example).values()))


def overlong(length: int, limit: int, free: float) -> float:
    """How far a completion of `length` tokens goes beyond the share `free` of its limit: 0 up to there, 1 at the limit. (DAPO's soft
    overlong punishment, arXiv 2503.14476; free = 0 punishes every token.)

    >>> overlong(80, 100, 0.8), overlong(90, 100, 0.8), overlong(100, 100, 0.8)
    (0.0, 0.5, 1.0)
    """
    return round(min(1.0, max(0.0, (length / limit - free) / (1 - free))), 9)


def read_weights(task: str, text: str) -> dict:
    """"correct=2,format=0.5" -> the task's weights with these changed. Raises BadInput.

    >>> read_weights("countdown", "correct=2")
    {'format': 1, 'correct': 2.0}
    """
    weights = dict(TASKS[task].weights)
    for item in filter(None, text.split(",")):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in weights or not re.fullmatch(r"-?[0-9]{1,6}(\.[0-9]{1,6})?", value):
            raise BadInput(f"--reward-weights {item!r}: must be NAME=NUMBER, the names for {task} are {', '.join(weights)}")
        weights[name] = float(value)
    return weights


# ---------------------------------------------------------------------------------------------------------------- data
def in_split(key, split: str, test_share: float = 0.2) -> bool:
    """Whether the examples of a key (Task.key) belong to `split`: a hash decides, so that train and test are disjoint whatever
    the seed and the number of examples."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return (int.from_bytes(digest[:4], "big") < test_share * 2**32) == (split == "test")


def held_out(task: str, example: dict) -> bool:
    """Whether an example's statement, up to symmetry, is one that no training of this project ever sees."""
    return in_split(TASKS[task].key(example), "test")


def from_hub(task: str, split: str) -> list[dict]:
    """The examples of a published data set, downloaded once by the datasets library. Raises BadInput with what helps."""
    import datasets
    import huggingface_hub
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()                      # its retries take half a minute, in silence
    name, config, part = TASKS[task].hub[split]
    try:
        return [TASKS[task].row(row) for row in datasets.load_dataset(name, config, split=part)]
    except Exception as error:                                               # many kinds, from three libraries
        raise BadInput(f"cannot load {name} ({type(error).__name__}): without network give --data FILE, lines of JSON with "
                       f"{getattr(TASKS[task].row, 'args', ['question'])[0]} and answer") from None


def from_file(task: str, path: str) -> list[dict]:
    """The examples of a file: .csv with a header, or lines of JSON. Raises BadInput with file and line number."""
    examples, number = [], 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            is_csv = str(path).lower().endswith(".csv")
            rows = csv.DictReader(f) if is_csv else (line for line in f)
            for i, row in enumerate(rows, start=1):
                number = rows.line_num if is_csv else i
                if is_csv or row.strip():
                    found = row if is_csv else json.loads(row)
                    if not isinstance(found, dict):
                        raise ValueError("one object a line")
                    examples.append(TASKS[task].row(found))
                    TASKS[task].key(examples[-1])                            # by way of the columns that it needs
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read --data {path}: {error}") from None
    except KeyError as error:
        raise BadInput(f"{path}:{number}: no column {error} for task {task}") from None
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, csv.Error) as error:
        raise BadInput(f"{path}:{number + isinstance(error, csv.Error)}: {error}") from None
    if not examples:
        raise BadInput(f"{path}: no examples in it")
    return examples


def read_pairs(path: str) -> list[dict]:
    """The rows {"prompt", "completion"} of a file of JSON lines. Raises BadInput with file and line number."""
    rows, number = [], 0
    try:
        for number, line in enumerate(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if line.strip():
                rows.append(json.loads(line.decode()))
                if not isinstance(rows[-1], dict):
                    raise ValueError("one object a line")
                for name in ("prompt", "completion"):
                    if not isinstance(rows[-1].get(name), str) or not rows[-1][name]:
                        raise ValueError(f"no text {name!r} in it")
                    rows[-1][name].encode()                                  # no half of a surrogate pair
    except OSError as error:
        raise BadInput(f"cannot read --sft {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f'{path}:{number}: not a line {{"prompt": ..., "completion": ...}}: {error}') from None
    if not rows:
        raise BadInput(f"{path}: no rows in it")
    return rows


def load_examples(task: str, n: int, seed: int, split: str, path: str = "") -> list[dict]:
    """`n` examples of a split, generated, or the first n (all if n is 0) of a file or of the published data set. Raises BadInput."""
    if not path and TASKS[task].generate:
        examples = list(TASKS[task].generate(n, seed, split) or [])
        if len(examples) != n:
            raise BadInput(f"task {task}: generate made {len(examples)} examples of {n}")
        return examples
    if not path and not TASKS[task].hub:
        raise BadInput(f"--task {task} needs --data FILE")
    examples = from_file(task, path) if path else from_hub(task, split)
    return examples[:n] if n else examples


def load_split(task: str, n: int, n_test: int, seed: int, path: str = "", test_path: str = "") -> tuple[list[dict], list[dict]]:
    """Training and held-out examples, no statement in both: generated or published, or from files; a file without a second
    one is divided by `held_out`."""
    if not path and TASKS[task].generate:
        train, test = load_examples(task, n, seed, "train"), load_examples(task, n_test, 0, "test")
        try_task(task, train[0])
        return train, test
    if path and not test_path:
        examples = from_file(task, path)
        train, test = ([ex for ex in examples if held_out(task, ex) == side] for side in (False, True))
    else:
        test = load_examples(task, 0, 0, "test", test_path)
        tested = set(map(TASKS[task].key, test))
        train = [ex for ex in load_examples(task, 0, 0, "train", path) if TASKS[task].key(ex) not in tested]
    if not train or not test:
        raise BadInput(f"--data {path}: too few examples to train on some and hold others out")
    try_task(task, train[0])
    return train, test[:n_test]
