"""Protects programs as answers: what is read from a completion, files as published, the grade.
Run: pytest tests/test_programs.py"""
import json
import random

import pytest

from rewards import TASKS, BadInput, gold_completion, grade, prompt_for, reward_parts
from support import completions, data, programs

PROBLEMS = [  # name, parameters, right, wrong, calls with their results
    ("add", "a, b", "a + b", "a - b", "(1, 2) == 3; (2, 5) == 7; (0, 0) == 0"),
    ("square", "x", "x * x", "x * 2", "(2,) == 4; (3,) == 9; (-1,) == 1"),
    ("last", "xs", "xs[-1]", "xs[0]", "([1, 2],) == 2; ('abc',) == 'c'"),
    ("even", "n", "n % 2 == 0", "n % 2", "(2,) == True; (3,) == False"),
    ("words", "s", "s.split()", "list(s)", "('a b',) == ['a', 'b']; ('',) == []"),
    ("pairs", "xs", "list(zip(xs, xs[1:]))", "xs", "([1, 2, 3],) == [(1, 2), (2, 3)]"),
    ("unique", "xs", "set(xs)", "set(xs[1:])", "([1, 1, 2],) == {1, 2}; ([5],) == {5}"),
    ("counts", "s", "collections.Counter(s)", "{}", "('aab',) == {'a': 2, 'b': 1}"),
    ("hypotenuse", "a, b", "math.hypot(a, b)", "a + b", "(3, 4) == 5.0; (6, 8) == 10.0"),
    ("largest", "xs, k", "heapq.nlargest(k, xs)", "xs[:k]", "([1, 3, 2], 2) == [3, 2]"),
    ("digits", "s", "re.findall('[0-9]+', s)", "[s]", "('a12b3',) == ['12', '3']; ('',) == []"),
    ("reverse", "s", "s[::-1]", "s[::1]", "('abc',) == 'cba'; ('ab',) == 'ba'"),
    ("total", "xs", "sum(xs)", "max(xs)", "([1, 2],) == 3; ([4, 4],) == 8"),
    ("nested", "n", "[[i] * i for i in range(n)]", "[]", "(3,) == [[], [1], [2, 2]]; (1,) == [[]]"),
    ("nothing", "x", "None", "x", "(1,) == None; ('a',) == None"),
    ("factorial", "n", "1 if n < 2 else n * factorial(n - 1)", "n", "(5,) == 120; (50,) == "
     "30414093201713378043612608166064768844377641568960512000000000000"),
    ("power", "a, b", "a ** b", "a * b", "(2, 10) == 1024; (3, 0) == 1"),
    ("merged", "a, b", "{**a, **b}", "a", "({1: 2}, {3: 4}) == {1: 2, 3: 4}; ({}, {}) == {}"),
    ("bits", "n", "bin(n)", "hex(n)", "(5,) == '0b101'; (2,) == '0b10'"),
    ("clipped", "x, low, high", "min(max(x, low), high)", "x", "(5, 0, 3) == 3; (-1, 0, 3) == 0"),
]
BEFORE = "import collections\nimport heapq\nimport math\nimport re\n\n"


def calls(problem):
    return [f"assert {{name}}{call.strip()}" for call in problem[4].split(";")]


def mbpp(problem, body):
    name, parameters = problem[:2]
    return {"task_id": 1, "text": f"Write a function {name}.", "test_setup_code": "",
            "code": f"{BEFORE}def {name}({parameters}):\r\n    return {body}",
            "test_list": [call.replace("{name}", name) for call in calls(problem)],
            "challenge_test_list": []}


def human_eval(problem, body):
    name, parameters = problem[:2]
    checks = "\n".join("    " + call.replace("{name}", "candidate") for call in calls(problem))
    return {"task_id": "HumanEval/0", "entry_point": name,
            "canonical_solution": f"    return {body}\n",
            "prompt": f'{BEFORE}def {name}({parameters}):\n    """Does it."""\n',
            "test": f"\n\nMETADATA = {{}}\n\n\ndef check(candidate):\n{checks}\n"}


@pytest.mark.parametrize("published", [mbpp, human_eval])
def test_published_rows_take_their_own_solutions_and_no_others(published, tmp_path):
    rows = [published(problem, problem[2]) for problem in PROBLEMS]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = data.from_file("code", str(path))           # their own solutions pass
    assert len(examples) == len(PROBLEMS) == 20
    for problem, ex in zip(PROBLEMS, examples):
        wrong = programs.code_row(published(problem, problem[3]))["code"]
        for style in ("bare", "agrpo", "d1"):
            text = gold_completion("code", ex, style)
            assert grade("code", text, ex) == 1 and grade("code", text.replace(
                ex["code"], wrong), ex) == 0
        assert sum(reward_parts("code", text, ex).values()) == 4


def test_a_row_whose_own_solution_fails_is_refused_with_its_line(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(mbpp(PROBLEMS[0], "a - b")) + "\n")
    with pytest.raises(BadInput, match="jsonl:1: its own.*it fails 'assert add") as error:
        data.from_file("code", str(path))
    assert "\n" not in str(error.value)
    for row in ({"text": "x", "code": "y"}, {"text": "x", "code": "y", "test_list": "assert 1"},
                {"text": "x", "code": "y", "test_list": []},
                {"text": "x", "code": "def y(): pass", "test_list": ["print(y())"]},
                {"text": "x", "code": "def y(): pass", "test_list": ["assert True"]}):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(BadInput, match="jsonl:1: .*test_list"):
            data.from_file("code", str(path))


@pytest.mark.parametrize("text, want", [
    ("<answer>\n```python\nx = 1\n```\n</answer>", "x = 1\n"),
    ("```\nx = 0\n```\nno:\n```py\nx = 1\n```", "x = 1\n"),
    ("```python\nx = 0\n```<answer>```python\nx = 1\n```</answer> ```x\ny\n```", "x = 1\n"),
    ("<answer>x = 1</answer>", "x = 1"), ("<think>no</think>x = 1", "x = 1"), ("x = 1", "x = 1"),
    ("```python\r\nx = 1\n", "x = 1\n"), ("<answer>```python\nx = 1", "x = 1"), ("", "")])
def test_the_program_of_a_completion(text, want):
    assert programs.code_of(text) == want


def test_parts_count_the_tests_that_the_statement_does_not_show():
    ex = programs.code_row(mbpp(PROBLEMS[0], "a + b"))
    message, _ = prompt_for("code", ex, "agrpo")
    assert "assert add(1, 2) == 3" in message and "assert add(2, 5)" not in message
    assert "```python\nthe program\n```" in message and "boxed" not in message
    shown = "def add(a, b):\n    return 3"                     # what was shown, by heart
    assert reward_parts("code", f"```\n{shown}\n```", ex) == {
        "format": 1.0, "tests": 0.0, "correct": 0.0}
    half = "def add(a, b):\n    return 7 if a else 0"          # two of three, not the one shown
    assert reward_parts("code", half, ex) == {"format": 0.5, "tests": 1.0, "correct": 0.0}
    for text in ("def add(", "hello", "'hello there'"):
        assert reward_parts("code", text, ex) == {"format": 0.0, "tests": 0.0, "correct": 0.0}


@pytest.mark.parametrize("cheat", [
    "class math: isclose = lambda *a, **k: True\n", "sqrt = lambda x: 0\n",
    "import math\nmath.isclose = lambda *a, **k: True\n", "Counter = lambda *a: 0\n"])
def test_what_the_right_program_imports_is_the_tests_own(cheat):
    code = ("import math, numpy\nimport math\nfrom math import sqrt\nfrom . import x\n"
            "from collections import Counter, deque\nfrom heapq import merge\n"
            "def merge(x): return x\ndef f(x): return x")
    code = f"from __future__ import annotations\n{code}"
    ex = {"text": "", "code": code, "setup": "from __future__ import annotations", "test_list": [
        "assert math.isclose(f(4), sqrt(16)) and merge(3) == 3\n"
        "assert f(Counter([1])) == Counter([1])"]}
    right = "def f(x): return x\ndef merge(x): return x"
    assert programs.imports_of(code) == (
        "import math\nfrom math import sqrt\nfrom collections import Counter, deque")
    assert grade("code", right, ex) == 1
    assert grade("code", f"from __future__ import annotations\n{right}",
                 {**ex, "before": "import math"}) == 1
    star = "from math import *\ndef comb(n): return n\nimport heapq"
    assert programs.imports_of(star) == "import heapq"
    assert grade("code", f"{cheat}def f(x): return 0\ndef merge(x): return x", ex) == 0


def test_the_contract_of_three_columns():
    ex = {"text": "Write add.", "code": "def add(a, b): return a + b",
          "test_list": ["assert add(1, 2) == 3"]}
    assert grade("code", ex["code"], ex) == 1 and grade("code", "def add(a, b): return 4", ex) == 0
    rng = random.Random(0)
    for _ in range(20):
        text = "".join(rng.choices("()[]{}:`'\"\\\n\x00\ud800 abcdef=+<>/%", k=40))
        assert grade("code", text, ex) == 0


def test_formulas_are_split_and_lazy_ones_fit_the_first_pair_only(monkeypatch):
    train, test = (programs.formula_generate(300, 0, split) for split in ("train", "test"))
    key = TASKS["formula"].key
    assert set(map(key, train)).isdisjoint(map(key, test))
    fits = []
    for ex in test:
        pairs = [tuple(map(int, pair.split(">"))) for pair in ex["text"].split()]
        lazy = programs.formula_lazy(ex, None)
        assert all(programs.value_of(ex["code"], x) == y for x, y in pairs) and len(pairs) == 3
        assert programs.value_of(lazy, pairs[0][0]) == pairs[0][1]
        fits.append(lazy == ex["code"])
    assert 0 < sum(fits) / len(fits) < 0.3
    assert grade("formula", "x+x+1", {"test_list": ["assert f(3) == 7"]}) == 1   # another way
    for task in ("code", "formula"):                           # no tests: nothing is solved
        ex = {"text": "", "code": "x", "test_list": []}
        assert grade(task, "x", ex) == 0 and reward_parts(task, "x", ex)["tests"] == 0
    ex = {"test_list": ["assert f(3) == 7"]}
    for text, form in (("x+x+1", 1), ("2*x", 1), ("hello", 0), ("x>3", 0), ("x**2", 0), ("x+", 0)):
        assert reward_parts("formula", text, ex)["format"] == form / 2, text
    monkeypatch.setattr(programs.testers, "passed", None)      # what is no formula is never run
    assert grade("formula", "9**9**9", {"test_list": ["assert f(3)"]}) == 0
    assert grade("formula", "__import__('os').name", {"test_list": ["assert f(3)"]}) == 0


def test_pass_at_k_is_without_bias():
    """Against the average over all choices of k of n samples."""
    import itertools
    right = [1, 0, 0, 1, 0]
    for k in range(1, 6):
        chosen = list(itertools.combinations(right, k))
        assert completions.pass_at(k, sum(right), len(right)) == pytest.approx(
            sum(map(any, chosen)) / len(chosen), abs=1e-12)
