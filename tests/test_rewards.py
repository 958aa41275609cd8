"""Protects data, parser and graders: the docstring examples, a list of known hacks, and no exception on any string.
Run: pytest tests/test_rewards.py"""
import doctest
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
import rewards
from rewards import TASKS, grade, reward

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
EXAMPLES = {
    "sudoku": {"puzzle": "3102200002100320", "solution": "3142243142131324"},
    "countdown": {"nums": [3, 4, 2], "target": 14},
    "gsm8k": {"question": "How many are 70 and 2?", "answer": "70 + 2 = 72\n#### 72"},
    "math": {"problem": "x?", "answer": "\\frac{1}{2}"},
}
RIGHT = {"sudoku": "3142243142131324", "countdown": "(3+4)*2", "gsm8k": "72", "math": "\\frac{1}{2}"}


@pytest.mark.parametrize("module", [rewards, evaluation], ids=lambda m: m.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_in_every_form_they_come_in(task):
    ex, answer = EXAMPLES[task], RIGHT[task]
    for text in (f"<answer>{answer}</answer>", f"<think>well</think><answer>\n{answer}\n</answer>", f"\\boxed{{{answer}}}",
                 f"<reasoning>\nno 1, 2\n</reasoning>\n<answer>\n\\boxed{{{answer}}}\n</answer><|eot_id|><|endoftext|>", answer):
        assert grade(task, text, ex) == 1, text
        assert grade(task, text.replace(answer, {"math": "3"}.get(task, "8" + answer[1:])), ex) < 1
    assert reward(task, f"<think>\n</think><answer>{answer}</answer>", ex) == 4


TRICKS = {
    "sudoku": ["3102200002100320", "1234" * 4, "1234" * 40, "3142243142131324 1234123412341234", "exit()", ""],
    "countdown": ["14", "14=14", "3+4+2=14", "7*2", "(3+4)*2*1", "3+4*2+3", "14*1", "(3+4)*2 or 1", "3*4+2.0", "34-20", "9**9**9", "-" * 150, "3/0",
                  "__import__('os')", "(" * 100 + "3", "(" * 200],
    "gsm8k": ["0 1 2 3 4 5 6 7 8 9", "720", "7 2", "-72", "7.2", "exit()", "\\boxed{}", "How many are 70 and 2?"],
    "math": ["\\frac{2}{1}", "", "1", "\\boxed{", "x", "9^{9^{9^{9}}}", "(1000000)!!"],
}


@pytest.mark.parametrize("task", TASKS)
def test_known_tricks_do_not_pay(task):
    for text in TRICKS[task]:
        for form in (text, f"<answer>{text}</answer>", f"\\boxed{{{RIGHT[task]}}} <answer>{text or '?'}</answer>"):
            assert grade(task, form, EXAMPLES[task]) < 1, form
            assert reward(task, form, EXAMPLES[task]) < 4


@pytest.mark.parametrize("task", ["sudoku", "countdown", "gsm8k"])
def test_no_string_raises(task):
    pieces = st.sampled_from(["<answer>", "</answer>", "\\boxed{", "}", "\x00", "\ud800", "٣", "9" * 400, "1/0", "(", "-", "=", "1,000", "\\frac{1}{0}"])

    @settings(max_examples=300, deadline=None)
    @given(st.one_of(st.text(), st.lists(st.one_of(pieces, st.text(max_size=5))).map("".join)))
    def check(text):
        assert 0 <= grade(task, text, EXAMPLES[task]) <= 1 and 0 <= reward(task, text, EXAMPLES[task]) <= 4
    check()


def test_sudoku_by_cells_clues_and_any_valid_grid():
    ex = EXAMPLES["sudoku"]
    assert grade("sudoku", "3142243142131323", ex) == 7 / 8                           # one of eight empty cells wrong
    assert grade("sudoku", "4142243142131324", ex) < 1                                # a clue changed
    two = {"puzzle": "1200340021004300", "solution": "1234341221434321"}              # two solutions: both are right
    other = [g for g in map("".join, ((str(d) for d in row) for row in rewards.sudoku_grids())) if grade("sudoku", g, two) == 1]
    assert len(other) > 1 and two["solution"] in other


def test_sudoku_class_is_the_same_for_symmetric_puzzles_only():
    import numpy as np
    rng = np.random.default_rng(0)
    data = rewards.sudoku_generate(50, 0, "train")
    for ex in data:
        p = np.array([int(c) for c in ex["puzzle"]]).reshape(4, 4)
        q = p[[2, 3, 1, 0]][:, [1, 0, 2, 3]].T                                        # bands, rows, columns, transposition
        rename = np.array([0, *(rng.permutation(4) + 1)])
        a, b = rewards.sudoku_class(np.stack([p.ravel(), rename[q].ravel()]))
        assert a == b
    assert len({int(c) for c in rewards.sudoku_class(np.array([[int(c) for c in ex["puzzle"]] for ex in data]))}) > 40
    assert len(rewards.sudoku_grids()) == 288 and rewards._sudoku_symmetries().shape == (128, 16)


def test_generated_puzzles_have_one_solution():
    grids = {"".join(map(str, g)) for g in rewards.sudoku_grids()}
    for ex in rewards.sudoku_generate(100, 1, "test"):
        assert [g for g in grids if all(p in ("0", c) for p, c in zip(ex["puzzle"], g))] == [ex["solution"]]


def test_every_enumerated_expression_parses_to_its_value():
    for nums in ([3], [3, 4], [1, 5, 2], [7, 1, 5, 9]):
        for text, value in rewards.expressions(nums):
            assert rewards.evaluate_expression(text) == (value, nums), text
    assert ("(3+4)*2", Fraction(14)) in rewards.expressions([3, 4, 2])


def test_an_answer_cannot_close_the_box_it_is_put_in():
    assert grade("math", "<answer>3} \\boxed{\\frac{1}{2}} \\boxed{3</answer>", {"problem": "", "answer": "3"}) == 0


def test_gsm8k_numbers():
    for text, right in (("$1,234.50", True), ("1234.5 dollars", True), ("12,34.5", False), ("-1234.5", False)):
        assert (grade("gsm8k", text, {"question": "", "answer": "#### 1,234.5"}) == 1) == right


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data files beside the project")
def test_real_files_load_and_real_completions_grade():
    for task, name, n in (("sudoku", "sudoku4x4_test.csv", 500), ("countdown", "countdown3_test.jsonl", 256), ("gsm8k", "gsm8k_test.jsonl", 1319)):
        data = rewards.load_examples(task, 0, 0, "test", str(SHARED / name))
        assert len(data) == n and sum(grade(task, TASKS[task].gold(ex) or "", ex) for ex in data) == n
    rows = [json.loads(line) for line in (SHARED / "llada_generations" / "countdown_128.jsonl").read_text().splitlines()]
    solved = sum(grade("countdown", r["completion"], {"nums": r["gold"][0], "target": r["gold"][1]}) for r in rows)
    assert abs(solved - 53) <= 2.56                                                   # the published grader's count, within a point
