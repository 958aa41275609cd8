"""Protects data, parser and graders: docstring examples, known hacks, no exception on any string.
Run: pytest tests/test_rewards.py"""
import dataclasses
import doctest
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measure.fuzz import FILES, IMPOSSIBLE, PIECES, fuzz

import rewards
from rewards import TASKS, BadInput, grade, reward_parts
from support import data, math_answers, programs, puzzles, rules

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data files")
EXAMPLES = {
    "sudoku": {"puzzle": "3102200002100320", "solution": "3142243142131324"},
    "countdown": {"nums": [3, 4, 2], "target": 14},
    "story": {"question": "Ann has 70 cups, buys 2.", "answer": "70+2=72\n#### 72"},
    "gsm8k": {"question": "How many are 70 and 2?", "answer": "70 + 2 = 72\n#### 72"},
    "math": {"problem": "x?", "answer": "\\frac{1}{2}"},
    "code": {"text": "Write f.", "code": "def f(x): return x", "test_list": ["assert f(1) == 1"]},
    "formula": {"text": "1>3 0>1", "code": "2*x+1", "test_list": ["assert f(4) == 9"]},
}
RIGHT = {
    "sudoku": "3142243142131324", "countdown": "(3+4)*2", "story": "72", "gsm8k": "72",
    "math": "\\frac{1}{2}", "formula": "2*x+1",
    "code": "def f(x): return x"}
BOXED = [task for task in TASKS if task != "code"]             # whose answers stand in a \\boxed
STYLES = (
    "<think>\n{r}\n</think>\n<answer>\n\\boxed{{{a}}}\n</answer>",
    "\n{r}\n</reasoning>\n<answer>\n\\boxed{{{a}}}\n</answer><|eot_id|>")


def reward(task, text, ex):
    return sum(reward_parts(task, text, ex).values())


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("module", [rewards, math_answers, programs, puzzles, rules],
                         ids=lambda m: m.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("task", BOXED)
def test_right_answers_in_every_form_they_come_in(task):
    ex, a = EXAMPLES[task], RIGHT[task]
    reasoned = f"<reasoning>\nno 1, 2\n</reasoning>\n<answer>\n\\boxed{{{a}}}\n</answer>"
    for text in (
            a, f"\\boxed{{{a}}}", f"<answer>{a}", f"<answer>{a}</answer>",
            f"<think>well</think><answer>\n{a}\n</answer>",
            f"{reasoned}<|eot_id|><|endoftext|>", f"<reasoning>7</reasoning>\n{a}",
            f"<think>1</think><answer>\\boxed{{{a}}}</answer><answer>",
            f"<answer>\\boxed{{...}} \\boxed{{{a}}} \\boxed{{}}",
            f"<answer>\\fbox{{{a}}}</answer>", f"<answer>\\boxed{{\\boxed{{{a}}}}}</answer>"):
        assert grade(task, text, ex) == 1, text
        assert grade(task, text.replace(a, {"math": "3"}.get(task, "8" + a[1:])), ex) < 1
    assert reward(task, f"<think>\n70+2=72</think><answer>{a}</answer>", ex) == 4


WRITTEN = {    # gold -> how a right answer is written, what looks like one and is wrong
    "gsm8k": {
        "#### 1,234.5": (
            ["$1,234.50", "1234.5 dollars", r"\$1{,}234.5", r"1\,234.5", "2469/2",
             r"\frac{2469}{2}", "1234 1/2", "1234.5%", "= 1234.5.", "1,234.5 (rounded)",
             r"\text{1,234.5 eggs}", "1\u00a0234.5", "**1234.5**", "`1234.5`",
             r"\underline{1234.5}", "1200 + 34.5\n1234.5", "Total: 1234.5"],
            ["12,34.5", "-1234.5", "1.234.5", "1 234.5", "1234", "1234,5"]),
        "#### 2": (
            ["2 cm^2", r"2\text{ m}^{2}", "$2", "US$2", "2.00", "4/2", "1 + 1 = 2", "4 / 2",
             r"\frac 4 2", r"\approx 2", "2,", r"2\%", r"x \rightarrow 2", "2!"],
            ["1/2", "1e2", "2e0", "1+2", "2/3", "10^2", "m2", "3:2", "-2", "−2", "0,2", "1,2",
             "2*2", "2/0", "4 2", "1, 2", "1 or 2", "1 and 2", "2 million", "2k", "2 thousand",
             "- 2", "-{2}", "-(2)", "- $2", "-US$2", "minus 2", r"\sqrt{2}", "2^{2}", "10**2",
             "3^{2}", r"\frac{x}{2}", "(3)(2)", "3 (2)", "1/2 2", "3 ≠ 2", r"3 \neq 2",
             r"3 \times 2", r"3 \cdot 2", "3 × 2", "2 * 3", r"2\sqrt{3}", r"2\pi", "2(3)", "> 2",
             r"\log 2", r"6 \div 2", "(2)^2", "{2}^2", "2²", "1 egg or 2 eggs", "1 or maybe 2",
             "1 to 2", "1;2", "1 & 2", r"2 \times x", "2 / x", "2x", "2π", "50% of 2",
             "half of 2", "sqrt(2)", "not 2", "less than 2", "2M", "2 dozen", "2 (thousand)",
             "negative 2", "x - 2", "|2|^2", r"-\left(2\right)"]),
        "#### -5": (
            ["-5", "−5", "-$5", "$-5", "-5.0", "x = -5", "- 5", "minus 5", r"\boxed{-5}"],
            ["5", "10-5", "10 - 5"]),
        "#### 2.5": (
            [r"2 \frac{1}{2}", r"2\frac12", "2 1/2", "5/2", "2.50"],
            [r"\frac{1}{2}", "2 1/4"]),
    },
    "math": {
        r"\frac{1}{8}": (
            [r"\dfrac18", "1/8", r"\tfrac{1}{8}", r"x = \frac{1}{8}", "1 / 8", r"\frac1{8}",
             r"\frac{1}8", r"\(\frac{1}{8}\)"],
            ["0.125", r"\frac{3}{24}", r"\frac{8}{1}", "1 8", "18", r"\frac{-1}{-8}x",
             r"\frac18\%"]),
        r"\frac{2}{4}": ([r"\frac24"], [r"\frac{3}{6}", "0.5"]),
        "58,500": (
            ["58500", "58{,}500", r"58\,500", "58,500.00", r"58,\!500", "**58500**", r"\$58,500"],
            ["58501", "58", "58 5", "5 8500", "58,50"]),
        r"11,\! 111,\! 100": (["11111100", "11,111,100", r"11{,}111{,}100"], ["11,111,1"]),
        r"\$36": (
            ["36", "36.00", r"\$36", r"36\text{ dollars}", "36 dollars"],
            ["35", r"36\text{ or 4}", r"36\text{4}", r"36\text{ million}", r"36\mathrm{i}",
             r"36\text{x}", r"36\text{.5}", r"36\text{ or more}", "36 million", "36 x",
             r"36\text{ squared}", "36!"]),
        "2": (
            ["2.0", "x=2", "x_1 = 2", "AB = 2", "f(2)=2", r"\angle A = 2^\circ", "2°", "2 cm",
             "2~\\text{cm}", r"\[2\]", r"\boldsymbol{2}", "2.", r"\{2\}", "The answer is $2$.",
             "Final Answer: 2", "`2`", "**2**.", "= 2", r"\theta = 2", "2 km/h",
             r"2\text{ Students}."],
            [r"\frac{6}{3}", "1+1", "2.0000001", "200\\%", "-2", "3 = 1", "20", "1 2", "y+2",
             r"\{3\}", "2 pi", r"2\text{ pi}", "2 divided by two", "2 more", r"2\mathrm{ln}",
             "2 tenths"]),
        ".0000672": (["0.0000672"], [".0000671", ".000067", "-.0000672"]),
        "15\\%": (["15", "15%"], ["0.15", "1500\\%"]),
        r"\text{(C)}": (
            ["C", "(C)", r"\textbf{(C)}", r"\text{C}", r"\text{(C)}."],
            ["D", r"\text{(C)}\text{ or (D)}", "CD", "c"]),
        r"\text{Evelyn}": (
            ["Evelyn", "evelyn"],
            ["nylevE", "Angela", r"\text{Evelyn}\text{ or Angela}"]),
        "even": ([r"\text{even}"], ["neve", "odd"]),
        r"x \in [-2,7]": (
            ["[-2, 7]", r"\left[-2,7\right]"],
            ["(-2,7)", "[-2,8]", r"\{-2,7\}", "-2,7"]),
        "2516_8": (["2516_{8}"], ["2516", "1358", "2516_9"]),
        r"16\sqrt{3}": (
            [r"16 \sqrt 3", r"\sqrt{3} \cdot 16", "16√3"],
            ["27.712813", r"16\sqrt{2}", r"16\sqrt{33}"]),
        "1,-2": (["-2,1", "1, -2", r"\{1,-2\}"], ["1,2", "1,1,-2", "(1,-2)", "1", "[1,-2]"]),
        "(1,2)": (
            ["(1, 2)", r"\left( 1,2 \right)", "(1.0,2)"],
            [r"\{1,2\}", "(2,1)", "1,2", "[1,2]", "(1,2,2)", "(1.0000001,2)"]),
        "2k+2": (["2 + 2k", "2(k+1)", "2k + 2"], ["2K+2", "2x+2", "2k+3"]),
        r"90^\circ": (
            ["90", r"90^{\circ}", "90 degrees", r"90\text{ degrees}"],
            [r"\frac{\pi}{2}"]),
        r"15\mbox{ cm}^2": (
            ["15", r"15\text{ cm}^2", "15 cm^2", "15 square cm"],
            ["225", "15^2"]),
        r"\frac32,-\frac12": ([r"-\frac{1}{2}, \frac{3}{2}"], ["1.5,-0.5", r"\frac64,-\frac12"]),
        r"(-\infty,0]": (["(−∞,0]", r"(-\infty, 0]"], [r"(-\infty,0)", r"[-\infty,0]"]),
        r"(3,\infty)": (["(3,\\infty)"], [r"(3,\infty]"]),
        "y = 2x + 3": (["2x+3", "y=3+2x"], ["x = 2x + 3"]),
        r"[\frac{3}{5}, \frac83)": (["[3/5, 8/3)"], ["[0.6, 8/3)"]),
        r"5.4 \text{ cents}": (["5.4", r"5.4 \text{ cents}."], ["5.04"]),
        r"\{1,2\}": (["1, 2", r"\{2,1\}"], [r"\{1\}", "1"]),
        r"\boldsymbol{\frac12}": (["1/2"], ["2"]),
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": (
            [r"\begin{pmatrix}1\\2\end{pmatrix}"],
            [r"\begin{pmatrix}2\\1\end{pmatrix}"]),
    },
    "countdown": {
        "3,4,2=14": (
            ["(3 + 4) * 2", r"2 \times (3+4)", r"2 \cdot \left(3 + 4\right) = 14", "14 = (3+4)*2",
             "[3+4] x 2", "2×(4+3)=14.0", "The expression is (3+4)*2.", "(3+4) ⋅ 2",
             r"(3+4) \ast 2", "$(3+4)*2$", "so: (3+4)*2", "**(3+4)*2**", "`(3+4)*2`",
             "(3+4)*2\n= 14", r"\text{(3+4)*2}", r"\displaystyle (3+4)*2"],
            ["(3+4)*2 = 15", "3+4*2", "(3+4)*2 = 14 = 14", "(3+4)2", "3+4=7*2=14",
             r"\sqrt{3+4}*2", r"\log(3+4)*2", "5^{(3+4)*2}", "5*e*(3+4)*2", "(3+4)*2!",
             "(3+4)*2 + five", "15 ≠ (3+4)*2", r"15 \neq (3+4)*2", r"(3+4)*2 \cdot \pi",
             "(3+4)*2x", "x(3+4)*2", "(3+4)*2-", "1 (3+4)*2", "sqrt (3+4)*2", "log (3+4)*2",
             "(3+4)*2 squared"]),
        "6,3,2=4": (
            [r"\frac{6}{3} + 2", "6/3+2", r"6 \div 3 + 2", r"\frac63+2"],
            [r"\frac{6}{2} + 3", "6//3+2"]),
        "84,2=168": (["84*2"], [r"\frac84*2"]),
    },
    "sudoku": {
        "3142243142131324": (
            ["3142\n2431\n4213\n1324", "3 1 4 2 | 2 4 3 1 | 4 2 1 3 | 1 3 2 4",
             "3142 2431 4213 1324", "Row 1: 3142 Row 2: 2431 Row 3: 4213 Row 4: 1324",
             "The 4x4 solution is:\n3142\n2431\n4213\n1324",
             "Row 1: 3 1 4 2\nRow 2: 2 4 3 1\nRow 3: 4 2 1 3\nRow 4: 1 3 2 4",
             "The 4x4 grid: 3 1 4 2 / 2 4 3 1 / 4 2 1 3 / 1 3 2 4",
             "3102200002100320 is solved by 3142243142131324"],
            ["3142 2431 4213 132", "1324421324313142", "3142243142131325"]),
    },
}


@pytest.mark.parametrize("task", WRITTEN)
def test_answers_as_they_are_written(task):
    wrong = []
    for gold, verdicts in WRITTEN[task].items():
        ex = {"question": "", "problem": "", "answer": gold}
        if task == "countdown":
            nums, target = gold.split("=")
            ex = {"nums": [int(x) for x in nums.split(",")], "target": int(target)}
        if task == "sudoku":
            ex = EXAMPLES[task]
        for answers, right in zip(verdicts, (True, False)):
            for answer in answers:
                for text in (f"<answer>{answer}</answer>",
                             f"<think>1 2</think><answer>\\boxed{{{answer}}}</answer>"):
                    if (grade(task, text, ex) == 1) != right:
                        wrong.append((gold, text, right))
    assert not wrong


def test_an_expression_copied_from_the_problem_is_no_solution_of_it():
    for problem, gold, echo in (
            ("Simplify $19x + 1 - 4x - 81$.", "15x - 80", "19x + 1 - 4x - 81"),
            ("Simplify $\\sqrt{242}$.", "11\\sqrt2", "\\sqrt{242}"),
            ("Compute $\\frac{4+6a}{5}-\\frac{1+3a}{4}$.", "\\frac{11+9a}{20}",
             "\\frac{4+6a}{5} - \\frac{1+3a}{4}")):
        assert grade("math", f"\\boxed{{{echo}}}", {"problem": problem, "answer": gold}) == 0
        assert grade("math", echo, {"problem": "", "answer": gold}) == 1
    ex = {"problem": "Which is larger, $x+1$ or $x$?", "answer": "x+1"}
    assert grade("math", "\\boxed{x+1}", ex) == 1


def test_an_answer_is_read_up_to_a_size():
    ex = {"problem": "", "answer": "1"}
    assert grade("math", "<answer>" + "(" * 200 + "1" + ")" * 200 + "</answer>", ex) == 0
    assert grade("math", f"\\boxed{{1{' ' * 600}}}", ex) == 1
    long = f"\\boxed{{1{'+0' * 300}}}"
    assert grade("math", long, ex) == 0 and TASKS["math"].beside[1](long, ex) == 0
    apart, after = " " * rewards.MAX_CHARS, ". so" * rewards.MAX_CHARS
    assert grade("gsm8k", f"72{apart}<answer>72</answer>", EXAMPLES["gsm8k"]) == 1
    assert grade("gsm8k", f"<answer>72{after}", EXAMPLES["gsm8k"]) == 0    # only the end is read
    for depth, solved in ((21, 0), (19, 1)):
        text = "<answer>" + "(" * depth + "3+4" + ")" * depth + "*2</answer>"
        assert grade("countdown", text, EXAMPLES["countdown"]) == solved


def test_equal_in_value_is_shown_beside_equal_in_form():
    value = TASKS["math"].beside[1]
    for gold, answer, equal in (("\\frac{1}{8}", "0.125", 1), ("2516_8", "2516", 1),
                                ("2", "\\frac{6}{3}", 1), ("2", "3", 0), ("\\text{A}", "B", 0)):
        ex = {"problem": "", "answer": gold}
        assert value(answer, ex) == equal and grade("math", answer, ex) == 0


TRICKS = {
    "sudoku": [
        "3102200002100320", "1234" * 4, "1234" * 40, "3142243142131324 1234123412341234",
        "exit()", "", "31422431421313240", "314224314213132", "3142243142131324" * 2],
    "countdown": [
        "14", "14=14", "3+4+2=14", "7*2", "(3+4)*2*1", "3+4*2+3", "14*1", "(3+4)*2 or 1",
        "3*4+2.0", "34-20", "9**9**9", "-" * 150, "3/0", "__import__('os')", "(" * 100 + "3",
        "(" * 200, "exit()", "Numbers: [3, 4, 2] Target: 14", "3, 4, 2, 14", "(3+4)*2, (3-4)*2",
        "(3+4)*2=99"],
    "story": [
        "0 1 2 3 4 5 6 7 8 9", " ".join(map(str, range(100))), "70+2", "70+2=", "Ann", "exit()",
        "70, 2", "72 or 73", "70+2=72=73", "7 2"],
    "gsm8k": [
        "0 1 2 3 4 5 6 7 8 9", "".join(map(str, range(100))), " ".join(map(str, range(100))),
        "720", "7 2", "-72", "7.2", "exit()", "\\boxed{}", "How many are 70 and 2?", "72 or 73",
        "\\boxed{72} \\boxed{73}", "1e72", "0,72", "71,72", "70+2", "72^2"],
    "math": [
        "\\frac{2}{1}", "", "1", "\\boxed{", "x", "9^{9^{9^{9}}}", "(1000000)!!", "exit()",
        "\\frac{1}{2}, \\frac{1}{3}", "0 1 2 3 4 5 6 7 8 9",
        "\\boxed{\\frac{1}{2}} \\boxed{\\frac{1}{3}}", "x?"],
    "formula": ["x+2", "", "3", "2*x+1, 2*x+2", "2*x+1 or x", "lambda: 9", "exit()", "9 if 1 else",
                "[9, 3, 1][-x]", "2*x+1)(", "2*x+1\nx", "__import__('os')"],
}


@pytest.mark.parametrize("task", BOXED)
def test_known_tricks_do_not_pay(task):
    """Several boxed answers, all the digits, the numbers of the statement, the statement echoed,
    exit(), an answer outside the tag."""
    right = f"\\boxed{{{RIGHT[task]}}}"
    for text in TRICKS[task]:
        said = text if text.strip("\\boxed{}") else "?"   # an empty tag or box takes nothing back
        for form in (text, f"<answer>{text}</answer>", f"<answer>\\boxed{{{text}}}</answer>",
                     f"{right} <answer>{said}</answer>",
                     f"<answer>{right}</answer> no, <answer>{said}</answer>"):
            assert grade(task, form, EXAMPLES[task]) < 1, form
            assert reward(task, form, EXAMPLES[task]) < 4
    echo = rewards.prompt_for(task, EXAMPLES[task], "d1")[0]
    assert grade(task, echo, EXAMPLES[task]) < 1
    assert grade(task, f"<answer>{echo}</answer>", EXAMPLES[task]) < 1


@pytest.mark.parametrize("task", TASKS)
def test_no_string_raises(task):
    parts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)))

    @settings(max_examples=200, deadline=None)
    @given(st.one_of(st.text(), parts.map("".join)), st.sampled_from(IMPOSSIBLE[task]))
    def check(text, ex):
        assert 0 <= grade(task, text, ex) < 1 and 0 <= reward(task, text, ex) < 4
    check()


@pytest.mark.parametrize("task", TASKS)
def test_mutated_completions_never_raise_and_never_win(task):
    """tests/measure/fuzz.py runs 100,000 of them, and times them."""
    fuzz(task, 100 if task == "math" else 1000, seed=1)


# -------------------------------------------------------------------------- golds and real texts
@needs_data
def test_every_gsm8k_solution_is_right_and_wrong_once_its_number_is_changed():
    names = ("gsm8k_train.jsonl", "gsm8k_test.jsonl")
    golds = [row for name in names for row in jsonl(SHARED / name)]
    assert len(golds) == 8792
    rng = random.Random(0)
    for ex in golds:
        reasoning, number = (part.strip() for part in ex["answer"].rsplit("####", 1))
        value = Fraction(number.replace(",", ""))
        wrong = rng.choice([str(value + 1), str(-value - 1), f"{number}0" if value else "10",
                            f"{number}.5", str(value * 2 + 1), f"1{number}"])
        for style in STYLES:
            assert grade("gsm8k", style.format(r=reasoning, a=number), ex) == 1, number
            assert grade("gsm8k", style.format(r=reasoning, a=wrong), ex) == 0, (number, wrong)
        assert grade("gsm8k", ex["answer"], ex) == 1                           # as it stands


def changed(answer):
    """The answer with its first digit, or else its last letter, replaced by another."""
    digits = [m.start() for m in re.finditer("[0-9]", answer)]
    letters = [m.start() for m in re.finditer("[A-Za-z](?![A-Za-z]*[{\\\\])", answer)]
    i = digits[0] if digits else letters[-1]
    if digits:
        return answer[:i] + str((int(answer[i]) + 1) % 10) + answer[i + 1:]
    return answer[:i] + ("Z" if answer[i] != "Z" else "Q") + answer[i + 1:]


MATRIX = r"\begin{%smatrix} 1 & 2 \\ 3 & 4 \end{%smatrix}"
MATH_PAIRS = [                         # gold, answer, grade (the same form), value (any form)
    ("(3,2)", "(x,y)=(3,2)", 1, 1), ("(3,2)", "(x, y) = (2,3)", 0, 0),
    ("(2,3)", "(a,b)=(2,3)", 1, 1),
    (MATRIX % ("p", "p"), MATRIX % ("b", "b"), 1, 1),
    (MATRIX % ("b", "b"), MATRIX % ("p", "p"), 1, 1),
    (MATRIX % ("p", "p"), MATRIX % ("v", "v"), 0, 0),
    (r"\cot x", r"\cot(x)", 1, 1), (r"\sin(2x)", r"\sin 2x", 1, 1), (r"\cot x", r"\tan(x)", 0, 0),
    ("2,3", r"2 \text{ or } 3", 1, 1), ("2,3", "x=2, x=3", 1, 1), ("2,3", "3 and 2", 1, 1),
    ("2,3", r"x = 2 \text{ or } x = 3", 1, 1), ("2,3", r"2 \text{ or } 4", 0, 0),
    ("2,3", "x=2, y=3", 0, 0),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}", 0, 1),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}", 0, 1),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{17}", 0, 0), (r"1 \pm \sqrt{19}", "1", 0, 0),
    (r"x \geq 5", r"5 \leq x", None, 1), ("x>2", "2<x", None, 1),
    (r"x \ge 5", r"x \geqslant 5", 1, 1),
    (r"x \geq 5", r"5 \geq x", 0, 0), (r"x \geq 5", "x > 5", 0, 0), ("1<x<2", "2>x>1", None, 1),
    ("125", r"125\textnormal{ miles}", 1, 1), ("125", r"125 \mathrm{cm}", 1, 1),
    ("58,500", "58500", 1, 1), ("58500", "58{,}500", 1, 1), ("[-36,104]", "-36104", 0, 0),
    ("[-36,104]", "[-36104]", 0, 0), ("(1,100)", "1100", 0, 0), ("(1,100)", "(1,100)", 1, 1),
    (r"\frac{1}{2^{56}}", r"\frac{1}{2^{55}}", 0, 0), ("e^{-40}", "e^{-41}", 0, 0),
    (r"2^{-56}", r"\frac{1}{2^{56}}", None, 1), ("10^{-15}", "10^{-14}", 0, 0),
    ("10^{30}+1", "10^{30}", 0, 0),
    ("10", "10_3", 0, 0), ("10_3", "10_4", 0, 0), ("10_3", "10_3", 1, 1), ("3", "10_3", 0, 0),
    ("(x,y)=(3,2)", "(y,x)=(3,2)", 0, 0), ("(1,2,3)", "(x_1,x_2,x_3)=(1,2,3)", 1, 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\left[\begin{array}{c}1\\2\\\end{array}\right]", 1, 1),
    (r"\begin{pmatrix}1/5\\2\end{pmatrix}", r"\begin{bmatrix}0.2\\2\end{bmatrix}", 0, 1),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", 0, 0),
    (r"\ln 2", "ln(2)", 1, 1), (r"\sin^2 x", r"\sin^2\left(x\right)", 1, 1),
    (r"\log_2 x", r"\log_2(x)", 1, 1), (r"\cot x", r"\cot(y)", 0, 0),
    ("1,2,3", "1, 2, and 3", 1, 1), ("2,3", "x_1=2, x_2=3", 1, 1), ("2", r"2 \text{ or } 3", 0, 0),
    ("2,3", r"2 \quad \textnormal{or} \quad 3", 1, 1), ("3,5,100", "35100", 0, 0),
    (r"\pm 2", "-2, 2", 0, 1), (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5", 0, 1),
    (r"-2 \le x < \frac12", r"0.5 \gt x \geqslant -2", 0, 1), (r"x \ge 5", r"y \ge 5", 0, 0),
    (r"(2,12) \cup (12,102)", r"(12,102)\cup(2,12)", 1, 1), (r"x \in [1,100]", "[1100]", 0, 0),
    ("100,1", "1,100", 1, 1), ("1, 100", "1100", 0, 0), (r"\{1,100\}", "1100", 0, 0),
    *(("125", answer, 1, 1) for answer in (
        r"125\emph{ miles}", r"125~\textup{miles}", r"\text{125 miles}", r"125\,{\rm miles}",
        r"125\hbox{ m}^2", r"125 \operatorname{cm}", r"125\textdegree")),
    (r"\frac{1}{2}", r"\frac12\text{ cm}", 1, 1), (r"2\pi", r"2\pi\textnormal{ cm}^2", 1, 1),
    ("125", r"125\textnormal{ million}", 0, 0), ("0", "2^{-60}", 0, 0),
    (r"\frac{x}{2^{56}}", r"\frac{x}{2^{55}}", 0, 0), ("10^{100}", "10^{100}+1", 0, 0),
    (r"6.02 \times 10^{-23}", r"6.03 \times 10^{-23}", 0, 0), ("(e^{-40},1)", "(e^{-41},1)", 0, 0),
    (r"6.02 \times 10^{23}", "602" + "0" * 21, 0, 1), ("10", "10_{10}", 0, 1),
    ("10", r"10 \text{ base three}", 0, 0), ("(10,2)", "(10_3,2)", 0, 0), ("10_3", "10", 0, 1)]


@pytest.mark.parametrize("gold, answer, form, value", MATH_PAIRS)
def test_math_answers_are_compared_part_by_part(gold, answer, form, value):
    ex, text = {"problem": "", "answer": gold}, f"<answer>\\boxed{{{answer}}}</answer>"
    assert rewards.math_value(text, ex) == value
    assert form is None or grade("math", text, ex) == form


@pytest.mark.parametrize("problem, answer, right", [
    ("Find all roots, separated by commas.", "1100", 0), ("Find all roots.", "1,100", 1),
    ("Find all roots.", "100,1", 1), ("Give the values as a comma-separated list.", "1100", 0),
    ("Find the sum of all roots.", "1100", 1), ("In how many ways can one list all?", "1100", 1),
    ("How many are there?", "1100", 1), ("", "1100", 1)])
def test_a_comma_divides_a_list_where_one_is_asked_for(problem, answer, right):
    """The gold 1,100 alone is a number: of it nobody could tell."""
    assert grade("math", f"\\boxed{{{answer}}}", {"problem": problem, "answer": "1,100"}) == right


@pytest.mark.parametrize("text, right", [
    ("#### 72\n\nQuestion: Ann has 5, and 5 more? #### 10", 1),
    ("<answer>72</answer>\n\nQ: next\n<answer>10</answer>", 1),
    ("The answer is 72.\n\nUser: 5+5?\nAssistant: The answer is 10", 1),
    (r"\boxed{72}<|im_start|>user" "\n" r"5+5?\boxed{10}", 1),
    ("#### 10\n\nQuestion: Ann has 70 and 2? #### 72", 0),
    ("Question: what is 3 times 24?\n#### 72", 1), ("Problem: 70 + 2?\nSolution: 72", 1),
    ("<think>Question: why 5?\n</think>#### 72", 1), ("She has 72 eggs.\n\nQ: 5+5?\nA: 10", 1),
    ("Question: 70 + 2?\nAnswer: 72\n\nQuestion: 5+5?\nAnswer: 10", 1),
    ("Let me restate.\n**Problem 1:** 70 and 2?\nAnswer: 72", 1), ("72 [INST] 5+5? [/INST] 10", 1),
    ("\nthe answer is 10?\nQ: sure?\n</reasoning>\n<answer>72</answer>\nHuman: 5+5?\n10", 1),
    ("#### 72 Question: 5+5? #### 10", 1), ("It goes in \\boxed{...}.\nQ: 70+2?\n\\boxed{72}", 1),
    ("He drives 60 miles in 72 minutes.", 1),
    (r"\boxed{72 in 2 months}", 1), (r"\boxed{72 clips in 2 months}", 1),    # 72 of something
    (r"\boxed{2 clips in 72 months}", 0), (r"\boxed{72 or 2}", 0)])
def test_what_counts_is_the_answer_to_the_question_not_to_the_next_one(text, right):
    assert grade("gsm8k", text, {"question": "", "answer": "#### 72"}) == right


@pytest.mark.parametrize("piece", [
    " ", "\n", ",", ".", "#", "* ", "> ", "3 ", "3\n", "\nQ:", "Question 1", "</think>", "</s>"])
def test_the_next_question_is_looked_for_in_linear_time(piece):
    clock = time.thread_time()
    for begin in ("", "#### 3"):
        rewards.text_of(begin + piece * (10**6 // len(piece)))
    rewards.last_number(piece * 2000)
    math_answers.math_normal(piece * (500 // len(piece)) + "1")
    assert time.thread_time() - clock < 2                  # it was minutes if quadratic


@needs_data
def test_every_math_answer_is_right_and_wrong_once_changed():
    for row in jsonl(SHARED / "llada_generations" / "math500_128.jsonl"):
        gold, ex = row["gold"], {"problem": "", "answer": row["gold"]}
        for style in STYLES:
            right = style.format(r="so $x = 1$ and \\frac{1}{2}", a=gold)
            assert grade("math", right, ex) == 1, gold
            assert grade("math", style.format(r=gold, a=changed(gold)), ex) == 0, gold


@needs_data
def test_published_generations_grade_as_published():
    """d1's own grader: GSM8K 783 of 1130, MATH-500 130 of 500, Countdown 53 of 256, Sudoku 240 of
    2048 cells and 1 puzzle. Ours: what each text says; where the two differ was looked at one by
    one."""
    solved, cells = Counter(), 0.0
    for task, name in FILES.items():
        for row in jsonl(SHARED / "llada_generations" / f"{name}.jsonl"):
            ex = TASKS[task].row(row)
            result = grade(task, row["completion"], ex)
            solved[task] += result == 1
            cells += result * ex["puzzle"].count("0") if task == "sudoku" else 0
    assert solved == {"gsm8k": 792, "math": 135, "countdown": 54, "sudoku": 1}
    assert round(cells) == 241
    assert abs(792 - 784) <= 11.3 and abs(135 - 130) <= 5
    assert abs(54 - 53) <= 2.56 and abs(241 - 240) <= 20.48


# ------------------------------------------------------------------ math-verify and its time limit
EQUAL = {"problem": "", "answer": "16\\sqrt{3}"}
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def one_second(monkeypatch):
    """A process with a limit of a second."""
    monkeypatch.setattr(math_answers, "MATH_LIMIT", 1)
    math_answers.verifier.stop()
    math_answers.math_equal.cache_clear()
    yield
    math_answers.verifier.stop()


def verdicts(queue=None):
    answers = ("\\sqrt{3}*16", "9^{9^{9^{9}}}", "16*\\sqrt{3}", "\\sqrt{3}*15")
    found = [grade("math", answer, EQUAL) for answer in answers]
    if queue is not None:
        queue.put(found)
    return found


def test_the_time_limit_holds_in_threads_and_processes_alike(one_second):
    clock, found, queue = time.perf_counter(), [], FORK.Queue()
    assert verdicts() == [1, 0, 1, 0]                      # the main thread; then threads, a fork
    threads = [threading.Thread(target=lambda: found.append(verdicts())) for _ in range(2)]
    child = FORK.Process(target=verdicts, args=(queue,), daemon=True)
    math_answers.math_equal.cache_clear()
    for worker in (child, *threads):
        worker.start()
    found.append(queue.get(timeout=60))
    for worker in (child, *threads):
        worker.join(60)
    assert found == [[1, 0, 1, 0]] * 3
    assert time.perf_counter() - clock < 60


def test_a_killed_process_is_replaced_and_an_interrupted_verdict_is_never_anothers():
    assert grade("math", "\\sqrt{3}*(24-8)", EQUAL) == 1
    math_answers.verifier.process.kill()                   # by somebody
    math_answers.verifier.process.wait()
    assert grade("math", "\\sqrt{3}*(25-9)", EQUAL) == 1

    def interrupt(number, frame):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            grade("math", "9^{9^{9^{9}}}*\\sqrt{3}", EQUAL)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [grade("math", f"\\sqrt{{3}}*{n}", EQUAL) for n in (15, 14, 13)] == [0, 0, 0]


def test_a_fork_while_another_thread_waits_does_not_hang(one_second):
    thread = threading.Thread(target=grade, args=("math", "9^{9^{9^{9}}}+\\sqrt{3}", EQUAL))
    thread.start()
    time.sleep(0.5)
    queue = FORK.Queue()
    child = FORK.Process(
        target=lambda: queue.put(grade("math", "\\sqrt{3}*(26-10)", EQUAL)), daemon=True)
    child.start()
    assert queue.get(timeout=60) == 1
    child.join(60)
    thread.join(60)


def test_a_missing_library_is_told_and_not_graded_as_wrong(monkeypatch):
    math_answers.verifier.stop()
    monkeypatch.setattr(math_answers.sys, "executable", "/bin/false")
    with pytest.raises(ImportError, match="math-verify"):
        grade("math", "\\sqrt{3}*(23-7)", EQUAL)


def test_math_verify_is_neither_imported_nor_outlives_us():
    """A script without an `if __name__` guard, run from elsewhere than the repository."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import rewards, support.math_answers
print(rewards.grade("math", r"\\sqrt{{3}}*16", {EQUAL!r}))
print(support.math_answers.verifier.process.pid)
print([name for name in ("math_verify", "sympy", "datasets", "torch") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True,
                          timeout=60, check=True)
    solved, pid, imported = done.stdout.split("\n")[:3]
    assert solved == "1.0" and imported == "[]"
    for _ in range(100):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the process is still there after 10 seconds")


# ------------------------------------------------------------------------ prompts, rewards, data
@pytest.mark.parametrize("style", rewards.FORMATS)
@pytest.mark.parametrize("task", BOXED)
def test_a_prompt_states_the_problem_and_asks_for_what_is_graded(task, style):
    ex, statement = EXAMPLES[task], TASKS[task].question(EXAMPLES[task])
    message, begin = rewards.prompt_for(task, ex, style)
    assert statement in message and "\\boxed{" in message and "<answer>" in message
    assert ("<think>" in message) == (style == "agrpo")
    assert begin == ("<reasoning>" if style == "d1" else "")
    assert rewards.prompt_for(task, ex, style, "Do it.") == (f"Do it.\n\n{statement}", begin)
    tag = "think" if style == "agrpo" else "reasoning"
    opened = "" if begin else f"<{tag}>"
    thought = "70+2=72" if task == "story" else "so"
    text = f"{opened} {thought} </{tag}><answer>\\boxed{{{RIGHT[task]}}}</answer>"
    assert reward(task, text, ex) == 4                     # what it asks for earns all


def test_weights_are_read_by_name():
    read, ex = rules.read_weights, EXAMPLES["gsm8k"]
    expected = {"think": 0.0, "answer": 0.5, "correct": 1.0}
    assert read("gsm8k", "correct=1, think=0") == expected
    weights = {"think": 0, "answer": 2, "correct": 1}
    assert reward_parts("gsm8k", "</think><answer>72</answer>", ex, weights) == weights
    for bad in ("right=1", "correct", "correct=x", "correct=nan", "=", "correct=1e9"):
        with pytest.raises(BadInput, match="--reward-weights"):
            read("gsm8k", bad)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_with_another_grade_or_question_is_trained_and_told_apart_by_it(task, monkeypatch):
    ex = EXAMPLES[task]
    for row in (TASKS[task], rewards.Task(TASKS[task].question, lambda ex: "", lambda c, ex: 0)):
        new = dataclasses.replace(row, grade=lambda text, ex: 0.25)
        monkeypatch.setitem(TASKS, "new", new)
        assert grade("new", RIGHT[task], ex) == 0.25
        assert reward_parts("new", RIGHT[task], ex)["correct"] == 0.25 * row.weights["correct"]
        asked = dataclasses.replace(row, canonical=None, question=lambda ex: "same")
        assert asked.key(ex) == "same"
    partial = dataclasses.replace(new, parts=lambda c, ex: {"fit": 0.5}, weights={"fit": 2})
    monkeypatch.setitem(TASKS, "new", partial)             # no weight for it: the grade is no part
    assert reward_parts("new", RIGHT[task], ex) == {"fit": 1}
    data.try_task("new", ex)


def test_published_data_sets_load_through_the_datasets_library(tmp_path, monkeypatch):
    """The real loading code on data sets of the published layout that lie in a folder; MATH trains
    on nothing that is tested."""
    import datasets
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    problems = [{"problem": f"What is {i} plus  {i}?", "answer": str(2 * i), "level": 1}
                for i in range(9)]
    again = {**problems[0], "problem": "What is 0 plus 0?"}
    for name, rows in (("m500/test", problems[:3]), ("math/train", [*problems, again])):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub = TASKS["math"].hub
    monkeypatch.setitem(hub, "train", (str(tmp_path / "math"), None, "train"))
    monkeypatch.setitem(hub, "test", (str(tmp_path / "m500"), None, "test"))
    train, test = data.load_split("math", 0, 2, 0)
    assert [ex["answer"] for ex in test] == ["0", "2"]
    assert [ex["answer"] for ex in train] == ["6", "8", "10", "12", "14", "16"]
    monkeypatch.setitem(hub, "test", ("nobody/none", None, "test"))
    with pytest.raises(BadInput, match="--data FILE, lines of JSON with problem and answer"):
        data.load_examples("math", 5, 0, "test")


@needs_data
def test_a_second_file_is_held_out():
    files = [str(SHARED / f"gsm8k_{name}.jsonl") for name in ("train", "test")]
    train, test = data.load_split("gsm8k", 0, 100, 0, *files)
    assert len(train) == 7473 and len(test) == 100 and test[0]["question"].startswith("Janet")
    train, test = data.load_split("gsm8k", 0, 9999, 0, files[1])
    assert len(train) + len(test) == 1319
    assert not {ex["question"] for ex in train} & {ex["question"] for ex in test}


def test_a_missing_file_is_named(tmp_path):
    there = tmp_path / "there.csv"
    there.write_text("Puzzle,Solution\n")
    data.check_files()
    data.check_files(str(there), str(there))
    for files, told in ((("no.csv", ""), "--data no.csv"), ((str(tmp_path), ""), "--data /"),
                        ((str(there), "no.csv"), "--test-data no.csv")):
        for check in (data.check_files, lambda *files: data.load_split("sudoku", 9, 9, 0, *files)):
            with pytest.raises(BadInput, match=f"cannot read {told}") as error:
                check(*files)
            assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="--data no.csv"):
        data.load_examples("sudoku", 9, 0, "test", "no.csv")
    with pytest.raises(BadInput, match="cannot read no.jsonl"):
        data.read_pairs("no.jsonl")


GOOD_ROWS = {"x.csv": b"Puzzle,Solution\n3102200002100320,3142243142131324\n",
             "x.jsonl": b'{"puzzle": "3102200002100320", "solution": "3142243142131324"}\n',
             "pairs.jsonl": '{"prompt": "1\u2028\u0085", "completion": "2"}\r\n'.encode()}


@pytest.mark.parametrize("name, more, told", [
    ("x.csv", b"310220000210032,3142243142131324\n", "x.csv:3: puzzle and solution"),
    ("x.csv", b'"3"', "x.csv:3: puzzle and solution"), ("x.csv", b"\xff", "x.csv:3: .*utf-8"),
    ("x.csv", b"1" * 200_000, "x.csv:3: field larger"),
    ("x.jsonl", b"\n{", "x.jsonl:3"), ("x.jsonl", b"[1]\n", "x.jsonl:2: one object a line"),
    ("x.jsonl", b'{"puzzle": "3102200002100320"}', "x.jsonl:2: no column 'solution'"),
    ("x.jsonl", b"[" * 99_999, "x.jsonl:2"), ("pairs.jsonl", b"[1]", "pairs.jsonl:2: one object"),
    ("pairs.jsonl", b'{"prompt": "1"}', "pairs.jsonl:2: no text 'completion'"),
    ("pairs.jsonl", b'{"prompt": "\xe9"}', "pairs.jsonl:2: .*utf-8"),
    ("pairs.jsonl", b'{"prompt": "\\ud800", "completion": "1"}', "pairs.jsonl:2: .*utf-8")])
def test_a_bad_line_is_told_by_its_number(name, more, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(content):
        Path(name).write_bytes(content)
        return data.read_pairs(name) if name == "pairs.jsonl" else data.from_file("sudoku", name)
    assert len(read(b"\xef\xbb\xbf" + GOOD_ROWS[name])) == 1
    with pytest.raises(BadInput, match=told):
        read(GOOD_ROWS[name] + more)
    with pytest.raises(BadInput, match=f"{name}: no rows in it"):
        read(b"\n")


# -------------------------------------------------------------------------- Sudoku and Countdown
def test_sudoku_by_cells_clues_and_any_valid_grid():
    ex = EXAMPLES["sudoku"]
    assert grade("sudoku", "3142243142131323", ex) == 7 / 8          # one of eight cells wrong
    assert grade("sudoku", "4142243142131324", ex) < 1               # a clue changed
    two = {"puzzle": "1200340021004300", "solution": "1234341221434321"}       # two solutions
    grids = ["".join(map(str, grid)) for grid in puzzles.GRIDS]
    right = [grid for grid in grids if grade("sudoku", grid, two) == 1]
    assert len(right) > 1 and two["solution"] in right


def test_sudoku_class_is_the_same_for_symmetric_puzzles_only():
    rng = np.random.default_rng(0)
    made = np.array([list(ex["puzzle"]) for ex in puzzles.sudoku_generate(50, 0, "train")], int)
    for p in made.reshape(-1, 4, 4):
        q = p[[2, 3, 1, 0]][:, [1, 0, 2, 3]].T             # bands, rows, columns, transposition
        rename = np.array([0, *(rng.permutation(4) + 1)])
        a, b = puzzles.sudoku_class(np.stack([p.ravel(), rename[q].ravel()]))
        assert a == b
    assert len(set(puzzles.sudoku_class(made).tolist())) > 40
    assert len(puzzles.GRIDS) == 288
    assert len(np.unique(puzzles.SYMMETRIES, axis=0)) == 128


def test_generated_puzzles_have_one_solution():
    grids = {"".join(map(str, grid)) for grid in puzzles.GRIDS}
    for ex in puzzles.sudoku_generate(100, 1, "test"):
        fits = [g for g in grids if all(p in ("0", c) for p, c in zip(ex["puzzle"], g))]
        assert fits == [ex["solution"]]


def test_solutions_of_countdown_solve_it():
    for nums, target in (([3, 4, 2], 14), ([7, 1, 5, 9], 31), ([6, 3, 2], 4), ([8, 3], 24),
                         ([5], 5), ([1, 5, 5, 5], 24)):
        solution = puzzles.countdown_solve(nums, target)
        assert grade("countdown", solution, {"nums": nums, "target": target}) == 1
    assert puzzles.countdown_solve([0, 0], 3) is None
    for nums, target in (([25, 50, 75, 100, 3, 6], 952), ([3, 8, 8, 3], 24)):
        assert grade("countdown", puzzles.countdown_solve(nums, target), {
            "nums": nums, "target": target}) == 1
    with pytest.raises(ValueError, match="1 to 6"):
        TASKS["countdown"].row({"nums": [1] * 7, "target": 7})


@needs_data
def test_real_files_load_and_their_solutions_are_right():
    for task, name, n in (("sudoku", "sudoku4x4_test.csv", 500),
                          ("gsm8k", "gsm8k_test.jsonl", 1319),
                          ("countdown", "countdown3_test.jsonl", 256)):
        examples = data.load_examples(task, 0, 0, "test", str(SHARED / name))
        right = sum(grade(task, TASKS[task].gold(ex) or "", ex) for ex in examples)
        assert len(examples) == right == n


def test_an_answer_cannot_close_the_box_it_is_put_in():
    text = "<answer>3} \\boxed{\\frac{1}{2}} \\boxed{3</answer>"
    assert grade("math", text, {"problem": "", "answer": "3"}) == 0


BAD_GOLDS = {                          # task: rows whose own answer can never be right
    "gsm8k": ['{"question": "q", "answer": "NaN"}', '{"question": "q", "answer": "She has none."}'],
    "math": ['{"problem": "p", "answer": "$\\\\boxed{0}$"}'],
    "countdown": ['{"nums": [3, 3, 1], "target": 997}', '{"nums": "331", "target": 7}']}
GOOD_GOLDS = {"gsm8k": '{"question": "q", "answer": "2 + 2 = 4\\n#### 4"}',
              "math": '{"problem": "p", "answer": "\\\\frac{1}{2}"}',
              "countdown": '{"nums": [3, 3, 1], "target": 7}'}


@pytest.mark.parametrize("task, bad", [(t, bad) for t in BAD_GOLDS for bad in BAD_GOLDS[t]])
def test_an_example_whose_own_answer_is_graded_wrong_is_refused_or_left_out(
        task, bad, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD_GOLDS[task]}\n{bad}\n")
    with pytest.raises(BadInput, match="rows.jsonl:2: its own answer is graded wrong"):
        data.from_file(task, str(path))
    assert len(data.from_file(task, str(path), skip=True)) == 1
    assert "left out 1 of 2 examples" in capsys.readouterr().out
    path.write_text(bad + "\n")
    with pytest.raises(BadInput, match="no example whose own answer"):
        data.from_file(task, str(path), skip=True)


def test_half_of_a_surrogate_pair_is_one_line_with_its_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD_GOLDS["gsm8k"] + '\n{"question": "q \\ud800", "answer": "#### 1"}\n')
    with pytest.raises(BadInput, match="rows.jsonl:2: .*surrogates"):
        data.from_file("gsm8k", str(path))


def test_labelled_rows_of_a_sudoku_are_read():
    ex = {"puzzle": "1234341221434300", "solution": "1234341221434321"}
    text = "R1: 1 2 3 4\nR2: 3 4 1 2\nR3: 2 1 4 3\nR4: 4 3 2 1"
    for labels in (text, text.replace("R", "r"), text.replace("R", "Row ")):
        assert grade("sudoku", f"<answer>{labels}</answer>", ex) == 1.0
    assert grade("sudoku", text.replace("4 3 2 1", "4 3 1 2"), ex) < 1.0
