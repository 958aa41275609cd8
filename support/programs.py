"""Programs as answers: their examples, what is read from a completion, which tests it passes."""
import ast
import importlib
import random
import re
import sys
import warnings

from support.puzzles import in_split
from support.sandbox import testers

FENCE = re.compile(r"```[ \t]*\w*[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
LONGEST = 20_000                       # characters of a program that is tried

def code_of(text: str) -> str:
    """The program of a completion: the last fenced block inside its answer tag, else the last one,
    else the tag's text, else what follows the reasoning.
    >>> code_of("<answer>```python\\nx = 1\\n```</answer>"), code_of("x = 2")
    ('x = 1\\n', 'x = 2')"""
    inside = text.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in text else ""
    blocks = FENCE.findall(inside) or FENCE.findall(text)
    return blocks[-1] if blocks else inside or re.split(r"</(?:reasoning|think)>", text)[-1].strip()

def parsed(program: str) -> list:
    """Its statements; none if it is no Python."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []

def imports_of(code: str) -> str:
    """What a right program imports of the standard library and does not define anew. Tests may use
    it, as in math.isclose: from a program they would take whatever goes by that name."""
    body, found = parsed(code), []
    own = {getattr(statement, "name", "") for statement in body}
    for line in body:
        if isinstance(line, (ast.Import, ast.ImportFrom)):
            modules = [str(line.module)] if isinstance(line, ast.ImportFrom) else [
                alias.name for alias in line.names]
            names = {alias.asname or alias.name.split(".")[0] for alias in line.names}
            if not {x.split(".")[0] for x in modules} <= sys.stdlib_module_names - {"__future__"}:
                continue
            if "*" in names:
                names = {*dir(importlib.import_module(modules[0]))}
            if not names & own:
                found.append(ast.unparse(line))
    return "\n".join(found)

def future_first(text: str) -> str:
    """A program whose lines `from __future__ import` come first, as they must."""
    lines = text.split("\n")
    return "\n".join(sorted(lines, key=lambda line: not line.startswith("from __future__ ")))

def passed(program: str, example: dict) -> tuple[bool, ...]:
    """Whether it passes each test of an example, in the sandbox; what is no Python passes none."""
    before = f"{imports_of(str(example.get('code', '')))}\n{example.get('setup', '')}"
    tests = tuple(future_first(f"{before}\n{test}") for test in example["test_list"])
    if len(program) > LONGEST or not parsed(program):
        return (False,) * len(tests)
    return testers.passed(future_first(f"{example.get('before', '')}\n{program}"), tests)

def shown(example: dict) -> str:
    """The test that the statement shows, which names the function; none if it is the only one."""
    return example["test_list"][0] if len(example["test_list"]) > 1 else ""

def code_question(example: dict) -> str:
    """The statement, with a test where there are several."""
    test = shown(example)
    return example["text"] + (f"\nIt must pass tests such as:\n{test}" if test else "")

def code_grade(text: str, example: dict) -> float:
    """1 if there are tests and the program passes all, else 0."""
    found = passed(code_of(text), example)
    return float(bool(found) and all(found))

def code_parts(text: str, example: dict) -> dict:
    """format: 1/2 for a fenced block + 1/2 for Python that is more than an expression; tests: share
    passed of those that the statement does not show."""
    program = code_of(text)
    hidden = passed(program, example)[bool(shown(example)):]
    python = not all(isinstance(statement, ast.Expr) for statement in parsed(program))
    return {"format": (bool(FENCE.search(text)) + python) / 2,
            "tests": sum(hidden) / max(1, len(hidden))}

def code_row(row: dict) -> dict:
    """A row of MBPP (text or prompt, code, test_list) or HumanEval (prompt, entry_point,
    canonical_solution, test) -> example."""
    if "entry_point" in row:
        before, name = row["prompt"].partition(f"def {row['entry_point']}(")[0], row["entry_point"]
        return tested({"text": row["prompt"], "code": row["prompt"] + row["canonical_solution"],
                       "test_list": [f"{row['test']}\ncheck({name})"], "before": before,
                       "setup": before})
    tests, more = row["test_list"], [*row.get("test_imports", ()), row.get("test_setup_code", "")]
    if not isinstance(tests, list) or not tests or not all(isinstance(x, str) for x in tests):
        raise ValueError("test_list must be a list of tests")
    if not all("assert" in test or "raise" in test for test in tests):
        raise ValueError("test_list: a test without assert tests nothing")
    return tested({"text": str(row["text"] if "text" in row else row["prompt"]), "before": "",
                   "code": str(row["code"]), "test_list": tests,
                   "setup": "\n".join(filter(None, more))})

def tested(example: dict) -> dict:
    """An example. Raises ValueError if its tests pass where there is no program."""
    if all(passed("pass", example)):
        raise ValueError("test_list: all its tests pass without a program")
    return example

# --------------------------------------------------------- on a laptop: programs from examples
FORMULA_WORDS = (*"x*+->", *map(str, range(41)))

def formulas() -> list[str]:
    """All that a puzzle may ask for: a*x+b, x+b, x*x+b."""
    lines = [f"{a}*x{b:+}".replace("+0", "") for a in range(2, 6) for b in range(-4, 10)]
    plain = [f"x{b:+}" for b in range(-4, 10) if b]
    return lines + plain + [f"x*x{b:+}".replace("+0", "") for b in range(-4, 10)]

def value_of(formula: str, x: int) -> int:
    """Of one of `formulas`.
    >>> value_of("2*x+3", 4)
    11"""
    return eval(formula, {"__builtins__": {}}, {"x": x})       # never of a completion

def formula_generate(n: int, seed: int, split: str) -> list[dict]:
    """`n` different statements: a formula at three places of 0 to 6, tested at all of 0 to 9. A
    formula at a set of places is in one split only."""
    rng, found, known = random.Random(f"{seed} {split}"), {}, formulas()
    while len(found) < n:
        formula, places = rng.choice(known), rng.sample(range(7), 3)
        values = [value_of(formula, x) for x in places]
        if all(0 <= y <= 40 for y in values) and in_split((formula, *sorted(places)), split):
            found.setdefault(" ".join(f"{x}>{y}" for x, y in zip(places, values)), formula)
    return [{"text": text, "code": formula, "test_list": [
        f"assert f({x}) == {value_of(formula, x)}" for x in range(10)]}
        for text, formula in found.items()]

def formula_lazy(example: dict, rng: random.Random) -> str:
    """A sum that fits the first pair and looks no further."""
    x, y = map(int, example["text"].split()[0].split(">"))
    return f"x{y - x:+}" if y != x else "x"

def formula_of(answer: str) -> str:
    """An answer that is a formula over x, else ""."""
    answer = answer.strip()
    read = re.fullmatch(r"[x0-9+*() -]{1,60}", answer) and "**" not in answer  # (9**9**9 is slow)
    return answer if read and parsed(answer) else ""

def formula_passed(answer: str, example: dict) -> tuple[bool, ...]:
    """Which tests a formula passes, as a function of x; what is none passes none."""
    formula = formula_of(answer)
    return passed(f"def f(x): return {formula}" if formula else "", example)

def formula_grade(answer: str, example: dict) -> float:
    """1 if there are tests and the formula passes all, else 0."""
    found = formula_passed(answer, example)
    return float(bool(found) and all(found))

def formula_parts(answer: str, example: dict) -> dict:
    """format: a formula; tests: share of the tests that it passes."""
    found = formula_passed(answer, example)
    return {"format": float(bool(formula_of(answer))), "tests": sum(found) / max(1, len(found))}
