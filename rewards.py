"""Tasks of agrpo.py: their data, their prompts, one answer parser, grades and rewards.

Two functions are the contract that other code uses; neither raises on any completion string:

    grade(task, completion, example)  -> float in [0, 1]   1 means solved; what evaluation counts
    reward(task, completion, example) -> float             what training maximises: the sum of reward_parts()

Example keys: sudoku {puzzle, solution}, countdown {nums, target}, gsm8k {question, answer}, math {problem, answer}.
Training and evaluation share `extract_answer`, so that a completion cannot be right in one and wrong in the other.
"""
import csv
import hashlib
import itertools
import json
import random
import re
import threading
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Callable

import numpy as np


class BadInput(Exception):
    """A mistake of the caller (flag, file, example), told in one line; the command line tools exit with code 2."""


# ------------------------------------------------------------------------------------------- one parser for all tasks
END_OF_TEXT = re.compile(r"<\|(?:eot_id|endoftext|end_of_text|im_end)\|>|</s>")
MAX_CHARS = 100_000                            # a completion is read up to here: grading stays linear and short


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces close, or None.

    >>> last_boxed(r"so \\boxed{3} and \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    for start in reversed([m.end() for m in re.finditer(r"\\f?boxed\s*\{", text)][-20:]):
        depth = 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                if text[start:i].strip():
                    return text[start:i].strip()
                break
    return None


def extract_answer(completion: str) -> str:
    """The answer a completion commits to: the last \\boxed in the last <answer> tag, else the tag's content, else the
    last \\boxed of the text, else the text after the reasoning.

    >>> extract_answer("<reasoning>1+1</reasoning><answer>\\\\boxed{2}</answer>")
    '2'
    >>> extract_answer("1234")
    '1234'
    """
    text = END_OF_TEXT.split(completion[:MAX_CHARS], maxsplit=1)[0]
    head, tag, tail = text.rpartition("<answer>")
    if tag:
        inside = tail.split("</answer>", 1)[0]
        return last_boxed(inside) or inside.strip()
    return last_boxed(text) or re.split(r"</(?:reasoning|think)>", text)[-1].strip()


# ---------------------------------------------------------------------------------------------------------- 4x4 Sudoku
def sudoku_cells(completion: str) -> str | None:
    """The 16 digits a completion gives for the grid, or None: the answer's digits if there are just 16, else its last
    run of 16.

    >>> sudoku_cells("<answer>12 34|34 12|21 43|43 21</answer>")
    '1234341221434321'
    """
    answer = extract_answer(completion)
    digits = re.sub(r"[^0-9]", "", answer)
    runs = re.findall(r"(?<![0-9])[0-9]{16}(?![0-9])", answer)
    return digits if len(digits) == 16 else runs[-1] if runs else None


def sudoku_grade(completion: str, example: dict) -> float:
    """Share of the empty cells that are right, never 1 when a clue was changed. Any valid grid over the clues is a 1.

    >>> ex = {"puzzle": "1234341221434300", "solution": "1234341221434321"}
    >>> sudoku_grade("1234341221434321", ex), sudoku_grade("1234341221434324", ex)
    (1.0, 0.5)
    """
    cells, puzzle = sudoku_cells(completion), example["puzzle"]
    if cells is None:
        return 0.0
    kept, empty = all(p in ("0", c) for p, c in zip(puzzle, cells)), max(1, puzzle.count("0"))
    if kept and tuple(map(int, cells)) in set(map(tuple, sudoku_grids().tolist())):
        return 1.0
    right = sum(p == "0" and s == c for p, s, c in zip(puzzle, example["solution"], cells))
    return min(right, empty - 1) / empty


def sudoku_parts(completion: str, example: dict) -> dict:
    """format: 1/2 for 16 cells + 1/2 for the share of clues kept; correct: 3 x grade.

    >>> sum(sudoku_parts("1234341221434321", {"puzzle": "1234341221434300", "solution": "1234341221434321"}).values())
    4.0
    >>> sum(sudoku_parts("no idea", {"puzzle": "1234341221434300", "solution": "1234341221434321"}).values())
    0.0
    """
    cells, puzzle = sudoku_cells(completion), example["puzzle"]
    if cells is None:
        return {"format": 0.0, "correct": 0.0}
    kept = sum(p == c for p, c in zip(puzzle, cells) if p != "0") / max(1, 16 - puzzle.count("0"))
    return {"format": 0.5 + 0.5 * kept, "correct": 3 * sudoku_grade(completion, example)}


@cache
def sudoku_grids() -> np.ndarray:
    """All 288 complete 4x4 grids, (288, 16) of 1..4."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    pairs = [a + b for a in rows for b in rows if all({*a[i:i + 2], *b[i:i + 2]} == {1, 2, 3, 4} for i in (0, 2))]
    return np.array([a + b for a in pairs for b in pairs
                     if all(len({a[c], a[4 + c], b[c], b[4 + c]}) == 4 for c in range(4))])


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
    """A row of a data file -> example; columns puzzle and solution in any case."""
    ex = {k.lower(): str(v).strip() for k, v in row.items() if k}
    puzzle, solution = ex["puzzle"], ex["solution"]
    if not re.fullmatch("[0-4]{16}", puzzle) or not re.fullmatch("[1-4]{16}", solution):
        raise ValueError("puzzle and solution must be 16 digits each, 0 for an empty cell")
    if sudoku_grade(solution, {"puzzle": puzzle, "solution": "-" * 16}) < 1:
        raise ValueError("the solution is not a valid grid over the puzzle's clues")
    return {"puzzle": puzzle, "solution": solution}


# ----------------------------------------------------------------------------------------------------------- Countdown
LATEX = [(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"), (r"\\times|\\cdot|×|·", "*"), (r"\\div|÷", "/"),
         (r"−|–", "-"), (r"\\left|\\right|\\[()\[\]]|\$|\\,|\\;", "")]


def evaluate_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an expression over + - * / ( ) and integers, or None if it is anything else. Never `eval`.

    >>> evaluate_expression("(3 + 4) * 2")
    (Fraction(14, 1), [3, 4, 2])
    >>> evaluate_expression("9**9**9") is None
    True
    """
    if len(text) > 200 or not re.fullmatch(r"(?:[0-9]{1,9}(?![0-9])|[-+*/()\s])+", text):
        return None
    tokens, numbers, i = re.findall(r"[0-9]+|[-+*/()]", text), [], 0
    if text.count("(") > 20 or text.count("-") > 20:                         # the parser recurses once for each
        return None

    def take(*wanted):
        nonlocal i
        if i < len(tokens) and (tokens[i] in wanted or "number" in wanted and tokens[i].isdigit()):
            i += 1
            return tokens[i - 1]

    def chain(part, *ops):                       # left-associative: part (op part)*
        value = part()
        while op := take(*ops):
            other = part()
            value = value + other if op == "+" else value - other if op == "-" else value * other if op == "*" \
                else value / other
        return value

    def atom():
        if take("-"):
            return -atom()
        if take("("):
            value = total()
            if not take(")"):
                raise ValueError
            return value
        if not (token := take("number")):
            raise ValueError
        numbers.append(int(token))
        return Fraction(int(token))

    def total():
        return chain(lambda: chain(atom, "*", "/"), "+", "-")

    try:
        value = total()
        return (value, numbers) if i == len(tokens) else None
    except (ValueError, ZeroDivisionError):
        return None


def countdown_expression(completion: str) -> tuple[Fraction, list[int]] | None:
    """The expression a completion commits to, "= target" and LaTeX operators tolerated.

    >>> countdown_expression("<answer>\\\\boxed{3 \\\\times (4 - 1) = 9}</answer>")
    (Fraction(9, 1), [3, 4, 1])
    """
    text = extract_answer(completion)
    if len(text) > 2000:
        return None
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    return evaluate_expression(lines[-1].split("=")[0])


def countdown_grade(completion: str, example: dict) -> float:
    """1 if the expression uses each number once and gives the target, else 0.

    >>> ex = {"nums": [3, 4, 2], "target": 14}
    >>> countdown_grade("(3+4)*2", ex), countdown_grade("7*2", ex)
    (1.0, 0.0)
    """
    parsed = countdown_expression(completion)
    return float(parsed is not None and Counter(parsed[1]) == Counter(example["nums"]) and parsed[0] == example["target"])


def countdown_parts(completion: str, example: dict) -> dict:
    """format: 1/2 for an expression + 1/2 if it uses each number once; correct: 3 if solved.

    >>> ex = {"nums": [3, 4, 2], "target": 14}
    >>> [sum(countdown_parts(c, ex).values()) for c in ("(3+4)*2", "3+4+2", "7*2", "no")]
    [4.0, 1.0, 0.5, 0.0]
    """
    parsed = countdown_expression(completion)
    uses = parsed is not None and Counter(parsed[1]) == Counter(example["nums"])
    return {"format": 0.5 * (parsed is not None) + 0.5 * uses, "correct": 3 * countdown_grade(completion, example)}


def expressions(nums: list, operators: str = "+-*/") -> list[tuple[str, Fraction]]:
    """Every expression over the numbers in this order, no needless parentheses, with its value."""
    if len(nums) == 1:
        return [(str(nums[0]), Fraction(nums[0]))]
    found = []
    for i in range(len(nums) - 1, 0, -1):
        for (left, a), (right, b) in itertools.product(expressions(nums[:i], operators), expressions(nums[i:], operators)):
            for op in operators if b else operators.replace("/", ""):
                tight = op in "*/"
                lhs = f"({left})" if tight and re.search(r"[-+](?![^(]*\))", left) else left
                rhs = f"({right})" if len(nums) - i > 1 and (tight or re.search(r"[-+]", right)) else right
                found.append((f"{lhs}{op}{rhs}", {"+": a + b, "-": a - b, "*": a * b, "/": b and a / b}[op]))
    return found


def countdown_solve(nums: list, target: int) -> str | None:
    """An expression that uses each number once and gives the target: without products and in the given order if possible.

    >>> countdown_solve([3, 4, 2], 14), countdown_solve([30, 100, 93], 23)
    ('(3+4)*2', '30-100+93')
    """
    for operators in ("+-", "+-*/"):
        for order in itertools.permutations(nums):
            for text, value in expressions(list(order), operators):
                if value == target:
                    return text
    return None


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
    """A row of a data file -> example; {nums, target} or d1's {input: "30,100,93", output: "23"}."""
    nums = row["nums"] if "nums" in row else [int(x) for x in str(row["input"]).split(",")]
    target = row["target"] if "target" in row else int(str(row["output"]))
    if not nums or not all(type(x) is int for x in [*nums, target]):
        raise ValueError("nums must be a list of integers, target an integer")
    return {"nums": list(nums), "target": target}


# ------------------------------------------------------------------------------------------------------ GSM8K and MATH
NUMBER = re.compile(r"[-−]?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|[-−]?\.[0-9]+")


def last_number(text: str) -> Fraction | None:
    """The last number of a text, thousands commas, sign, currency and decimals read; None if there is none.

    >>> last_number("that makes $1,234.50 in all")
    Fraction(2469, 2)
    """
    found = NUMBER.findall(text[-2000:])
    return Fraction(found[-1].replace(",", "").replace("$", "").replace("−", "-")) if found else None


def gsm8k_grade(completion: str, example: dict) -> float:
    """1 if the answer's last number equals the number after #### in the example's answer.

    >>> gsm8k_grade("<answer>\\\\boxed{72}</answer>", {"question": "", "answer": "... #### 72"})
    1.0
    """
    gold = last_number(str(example["answer"]).rsplit("####")[-1])
    return float(gold is not None and last_number(extract_answer(completion)) == gold)


TOWER = re.compile(r"\^\s*\{?\s*[0-9]+\s*\}?\s*\^|\^\s*\{?\s*[0-9]{5,}|!\s*!|[0-9]{4,}\s*\)?\s*!")   # numbers too large to compute


def math_grade(completion: str, example: dict) -> float:
    """1 if math-verify finds the answer equal to the example's.

    >>> math_grade(r"<answer>\\boxed{\\frac{1}{2}}</answer>", {"problem": "", "answer": "0.5"})
    1.0
    """
    from math_verify import parse, verify                                   # slow to import, and only this task needs it
    answer = extract_answer(completion)
    depth = [answer[:i + 1].count("{") - answer[:i + 1].count("}") for i in range(len(answer[:500]))]
    if len(answer) > 500 or "boxed" in answer or any(d < 0 for d in depth) or depth[-1:] not in ([], [0]) or TOWER.search(answer):
        return 0.0
    limit = 5 if threading.current_thread() is threading.main_thread() else None     # seconds; math-verify's needs signals
    try:
        gold, answer = (parse(f"\\boxed{{{t}}}", parsing_timeout=limit) for t in (str(example["answer"]), answer))
        return float(verify(gold, answer, timeout_seconds=limit))
    except Exception:                                                       # a completion must never end a run
        return 0.0


def tag_parts(completion: str, correct: float) -> dict:
    """The published sum of the two maths tasks: 1/2 for reasoning tags + 1/2 for answer tags + 3 if correct."""
    def tagged(name):
        start = completion.find(f"<{name}>")
        return start >= 0 and completion.find(f"</{name}>", start) >= 0

    return {"think": 0.5 * (tagged("think") or tagged("reasoning")), "answer": 0.5 * tagged("answer"), "correct": 3 * correct}


# ----------------------------------------------------------------------------------------------------- the table of tasks
@dataclass(frozen=True)
class Task:
    """One row of TASKS. `generate` and `lazy` are None for tasks whose data cannot be made up."""
    prompt: Callable[[dict], str]                          # example -> what the user says
    gold: Callable[[dict], str]                            # example -> a right completion
    grade: Callable[[str, dict], float]
    parts: Callable[[str, dict], dict]
    row: Callable[[dict], dict]                            # a row of a data file -> example
    statement: Callable[[dict], object]                    # equal for two examples that are the same but for symmetry
    generate: Callable[[int, int, str], list] | None = None
    lazy: Callable[[dict, random.Random], str] | None = None


def _columns(*names):
    def read(row):
        if not all(type(row[name]) in (str, int, float) for name in names):
            raise ValueError(f"{' and '.join(names)} must be text")
        return {name: str(row[name]) for name in names}
    return read


TASKS = {
    "sudoku": Task(lambda ex: ex["puzzle"], lambda ex: ex["solution"], sudoku_grade, sudoku_parts, sudoku_row,
                   lambda ex: int(sudoku_class(np.array([[int(c) for c in ex["puzzle"]]]))[0]), sudoku_generate, sudoku_lazy),
    "countdown": Task(lambda ex: f"{','.join(map(str, ex['nums']))}={ex['target']}",
                      lambda ex: countdown_solve(ex["nums"], ex["target"]), countdown_grade, countdown_parts, countdown_row,
                      lambda ex: (*sorted(ex["nums"]), ex["target"]), countdown_generate, countdown_lazy),
    "gsm8k": Task(lambda ex: ex["question"], lambda ex: ex["answer"], gsm8k_grade,
                  lambda c, ex: tag_parts(c, gsm8k_grade(c, ex)), _columns("question", "answer"), lambda ex: ex["question"]),
    "math": Task(lambda ex: ex["problem"], lambda ex: ex["answer"], math_grade,
                 lambda c, ex: tag_parts(c, math_grade(c, ex)), _columns("problem", "answer"), lambda ex: ex["problem"]),
}


def grade(task: str, completion: str, example: dict) -> float:
    """Grade in [0, 1]; 1 is solved. Never raises on any completion."""
    return TASKS[task].grade(completion, example)


def reward_parts(task: str, completion: str, example: dict) -> dict:
    """The named parts whose sum is the reward, each logged as a column of its own."""
    return TASKS[task].parts(completion, example)


def reward(task: str, completion: str, example: dict) -> float:
    """What training maximises, 0 to 4: format up to 1 + correct up to 3. Never raises on any completion."""
    return float(sum(reward_parts(task, completion, example).values()))


def in_split(statement, split: str, test_share: float = 0.2) -> bool:
    """Whether a statement (up to symmetry: pass its class) belongs to `split`: a hash decides, so that train and test
    are disjoint whatever the seed and the number of examples."""
    digest = hashlib.sha256(repr(statement).encode()).digest()
    return (int.from_bytes(digest[:4], "big") < test_share * 2**32) == (split == "test")


def held_out(task: str, example: dict) -> bool:
    """Whether an example's statement, up to symmetry, is one that no training of this project ever sees."""
    return in_split(TASKS[task].statement(example), "test")


def load_examples(task: str, n: int, seed: int, split: str, path: str | None = None) -> list[dict]:
    """`n` examples from the task's generator or (all of them if n is 0) from a file: .csv, or .jsonl / .json lines.
    Raises BadInput with file and line number."""
    if path is None:
        if TASKS[task].generate is None:
            raise BadInput(f"task {task} cannot be generated: give --data FILE with columns as in the README")
        return TASKS[task].generate(n, seed, split)
    examples, number = [], 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            is_csv = str(path).lower().endswith(".csv")
            rows = csv.DictReader(f) if is_csv else (line for line in f)
            for i, row in enumerate(rows, start=1):
                number = rows.line_num if is_csv else i
                if is_csv or row.strip():
                    examples.append(TASKS[task].row(row if is_csv else json.loads(row)))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read --data {path}: {error}") from None
    except KeyError as error:
        raise BadInput(f"{path}:{number}: no column {error} for task {task}") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error) as error:
        raise BadInput(f"{path}:{number + isinstance(error, csv.Error)}: {error}") from None
    if not examples:
        raise BadInput(f"{path}: no examples in it")
    return examples[:n] if n else examples


def load_split(task: str, n: int, n_test: int, seed: int, path: str | None = None) -> tuple[list[dict], list[dict]]:
    """Training and held-out examples, no statement in both: generated, or a file's own, divided by `held_out`."""
    if path is None:
        return load_examples(task, n, seed, "train"), load_examples(task, n_test, 0, "test")
    examples = load_examples(task, 0, seed, "", path)
    train, test = ([ex for ex in examples if held_out(task, ex) == side] for side in (False, True))
    if not train or not test:
        raise BadInput(f"--data {path}: {len(examples)} examples are too few to hold some out")
    return train, test[:n_test]
