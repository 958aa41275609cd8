"""Protects data, parser and graders: the docstring examples, a list of known hacks, and no exception on any string.
Run: pytest tests/test_rewards.py"""
import doctest
import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from fuzz import FILES, IMPOSSIBLE, PIECES, fuzz
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
import rewards
from rewards import TASKS, BadInput, grade, reward, reward_parts

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data files beside the project")
EXAMPLES = {
    "sudoku": {"puzzle": "3102200002100320", "solution": "3142243142131324"},
    "countdown": {"nums": [3, 4, 2], "target": 14},
    "gsm8k": {"question": "How many are 70 and 2?", "answer": "70 + 2 = 72\n#### 72"},
    "math": {"problem": "x?", "answer": "\\frac{1}{2}"},
}
RIGHT = {"sudoku": "3142243142131324", "countdown": "(3+4)*2", "gsm8k": "72", "math": "\\frac{1}{2}"}
STYLES = ("<think>\n{r}\n</think>\n<answer>\n\\boxed{{{a}}}\n</answer>", "\n{r}\n</reasoning>\n<answer>\n\\boxed{{{a}}}\n</answer><|eot_id|>")


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("module", [rewards, evaluation], ids=lambda m: m.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_in_every_form_they_come_in(task):
    ex, answer = EXAMPLES[task], RIGHT[task]
    for text in (f"<answer>{answer}</answer>", f"<think>well</think><answer>\n{answer}\n</answer>", f"\\boxed{{{answer}}}",
                 f"<reasoning>\nno 1, 2\n</reasoning>\n<answer>\n\\boxed{{{answer}}}\n</answer><|eot_id|><|endoftext|>", answer,
                 f"<think>1</think><answer>\\boxed{{{answer}}}</answer><answer>", f"<answer>{answer}", f"<answer>\\boxed{{...}} \\boxed{{{answer}}} \\boxed{{}}",
                 f"<reasoning>7</reasoning>\n{answer}", f"<answer>\\fbox{{{answer}}}</answer>", f"<answer>\\boxed{{\\boxed{{{answer}}}}}</answer>"):
        assert grade(task, text, ex) == 1, text
        assert grade(task, text.replace(answer, {"math": "3"}.get(task, "8" + answer[1:])), ex) < 1
    assert reward(task, f"<think>\n</think><answer>{answer}</answer>", ex) == 4


WRITTEN = {                            # gold -> how people and models write a right answer, and what looks like one and is wrong
    "gsm8k": {
        "#### 1,234.5": (["$1,234.50", "1234.5 dollars", r"\$1{,}234.5", r"1\,234.5", "2469/2", r"\frac{2469}{2}", "1234 1/2", "1234.5%", "= 1234.5.",
                          "1,234.5 (rounded)", r"\text{1,234.5 eggs}", "1\u00a0234.5", "**1234.5**", "`1234.5`", r"\underline{1234.5}", "1200 + 34.5\n1234.5", "Total: 1234.5"],
                         ["12,34.5", "-1234.5", "1.234.5", "1 234.5", "1234", "1234,5"]),
        "#### 2": (["2 cm^2", r"2\text{ m}^{2}", "$2", "US$2", "2.00", "4/2", "1 + 1 = 2", "4 / 2", r"\frac 4 2", r"\approx 2", "2,", r"2\%", r"x \rightarrow 2", "2!"],
                   ["1/2", "1e2", "2e0", "1+2", "2/3", "10^2", "m2", "3:2", "-2", "−2", "0,2", "1,2", "2*2", "2/0", "4 2", "1, 2", "1 or 2", "1 and 2", "2 million", "2k",
                    "2 thousand", "- 2", "-{2}", "-(2)", "- $2", "-US$2", "minus 2", r"\sqrt{2}", "2^{2}", "10**2", "3^{2}", r"\frac{x}{2}", "(3)(2)", "3 (2)", "1/2 2", "3 ≠ 2",
                    r"3 \neq 2", r"3 \times 2", r"3 \cdot 2", "3 × 2", "2 * 3", r"2\sqrt{3}", r"2\pi", "2(3)", "> 2", r"\log 2", r"6 \div 2", "(2)^2", "{2}^2", "2²", "1 egg or 2 eggs", "1 or maybe 2", "1 to 2", "1;2", "1 & 2", r"2 \times x", "2 / x", "2x", "2π", "50% of 2", "half of 2",
                    "sqrt(2)", "not 2", "less than 2", "2M", "2 dozen", "2 (thousand)", "negative 2", "x - 2", "|2|^2", r"-\left(2\right)"]),
        "#### -5": (["-5", "−5", "-$5", "$-5", "-5.0", "x = -5", "- 5", "minus 5", r"\boxed{-5}"], ["5", "10-5", "10 - 5"]),
        "#### 2.5": ([r"2 \frac{1}{2}", r"2\frac12", "2 1/2", "5/2", "2.50"], [r"\frac{1}{2}", "2 1/4"])},
    "math": {
        r"\frac{1}{8}": ([r"\dfrac18", "1/8", r"\tfrac{1}{8}", r"x = \frac{1}{8}", "1 / 8", r"\frac1{8}", r"\frac{1}8", r"\(\frac{1}{8}\)"],
                         ["0.125", r"\frac{3}{24}", r"\frac{8}{1}", "1 8", "18", r"\frac{-1}{-8}x", r"\frac18\%"]),
        r"\frac{2}{4}": ([r"\frac24"], [r"\frac{3}{6}", "0.5"]), "58,500": (["58500", "58{,}500", r"58\,500", "58,500.00", r"58,\!500", "**58500**", r"\$58,500"], ["58501", "58", "58 5", "5 8500", "58,50"]),
        r"11,\! 111,\! 100": (["11111100", "11,111,100", r"11{,}111{,}100"], ["11,111,1"]),
        r"\$36": (["36", "36.00", r"\$36", r"36\text{ dollars}", "36 dollars"], ["35", r"36\text{ or 4}", r"36\text{4}", r"36\text{ million}", r"36\mathrm{i}", r"36\text{x}",
                                                                                r"36\text{.5}", r"36\text{ or more}", "36 million", "36 x", r"36\text{ squared}", "36!"]),
        "2": (["2.0", "x=2", "x_1 = 2", "AB = 2", "f(2)=2", r"\angle A = 2^\circ", "2°", "2 cm", "2~\\text{cm}", r"\[2\]", r"\boldsymbol{2}", "2.", r"\{2\}", "The answer is $2$.", "Final Answer: 2", "`2`", "**2**.", "= 2", r"\theta = 2", "2 km/h", r"2\text{ Students}."],
              [r"\frac{6}{3}", "1+1", "2.0000001", "200\\%", "-2", "3 = 1", "20", "1 2", "y+2", r"\{3\}", "2 pi", r"2\text{ pi}", "2 divided by two", "2 more", r"2\mathrm{ln}", "2 tenths"]),
        ".0000672": (["0.0000672"], [".0000671", ".000067", "-.0000672"]), "15\\%": (["15", "15%"], ["0.15", "1500\\%"]),
        r"\text{(C)}": (["C", "(C)", r"\textbf{(C)}", r"\text{C}", r"\text{(C)}."], ["D", r"\text{(C)}\text{ or (D)}", "CD", "c"]),
        r"\text{Evelyn}": (["Evelyn", "evelyn"], ["nylevE", "Angela", r"\text{Evelyn}\text{ or Angela}"]),
        "even": ([r"\text{even}"], ["neve", "odd"]), r"x \in [-2,7]": (["[-2, 7]", r"\left[-2,7\right]"], ["(-2,7)", "[-2,8]", r"\{-2,7\}", "-2,7"]),
        "2516_8": (["2516_{8}"], ["2516", "1358", "2516_9"]), r"16\sqrt{3}": ([r"16 \sqrt 3", r"\sqrt{3} \cdot 16", "16√3"], ["27.712813", r"16\sqrt{2}", r"16\sqrt{33}"]),
        "1,-2": (["-2,1", "1, -2", r"\{1,-2\}"], ["1,2", "1,1,-2", "(1,-2)", "1", "[1,-2]"]),
        "(1,2)": (["(1, 2)", r"\left( 1,2 \right)", "(1.0,2)"], [r"\{1,2\}", "(2,1)", "1,2", "[1,2]", "(1,2,2)", "(1.0000001,2)"]),
        "2k+2": (["2 + 2k", "2(k+1)", "2k + 2"], ["2K+2", "2x+2", "2k+3"]), r"90^\circ": (["90", r"90^{\circ}", "90 degrees", r"90\text{ degrees}"], [r"\frac{\pi}{2}"]),
        r"15\mbox{ cm}^2": (["15", r"15\text{ cm}^2", "15 cm^2", "15 square cm"], ["225", "15^2"]),
        r"\frac32,-\frac12": ([r"-\frac{1}{2}, \frac{3}{2}"], ["1.5,-0.5", r"\frac64,-\frac12"]), r"(-\infty,0]": (["(−∞,0]", r"(-\infty, 0]"], [r"(-\infty,0)", r"[-\infty,0]"]),
        r"(3,\infty)": (["(3,\\infty)"], [r"(3,\infty]"]), "y = 2x + 3": (["2x+3", "y=3+2x"], ["x = 2x + 3"]), r"[\frac{3}{5}, \frac83)": (["[3/5, 8/3)"], ["[0.6, 8/3)"]),
        r"5.4 \text{ cents}": (["5.4", r"5.4 \text{ cents}."], ["5.04"]), r"\{1,2\}": (["1, 2", r"\{2,1\}"], [r"\{1\}", "1"]), r"\boldsymbol{\frac12}": (["1/2"], ["2"]),
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": ([r"\begin{pmatrix}1\\2\end{pmatrix}"], [r"\begin{pmatrix}2\\1\end{pmatrix}"])},
    "countdown": {
        "3,4,2=14": (["(3 + 4) * 2", r"2 \times (3+4)", r"2 \cdot \left(3 + 4\right) = 14", "14 = (3+4)*2", "[3+4] x 2", "2×(4+3)=14.0", "The expression is (3+4)*2.",
                      "(3+4) ⋅ 2", r"(3+4) \ast 2", "$(3+4)*2$", "so: (3+4)*2", "**(3+4)*2**", "`(3+4)*2`", "(3+4)*2\n= 14", r"\text{(3+4)*2}", r"\displaystyle (3+4)*2"],
                     ["(3+4)*2 = 15", "3+4*2", "(3+4)*2 = 14 = 14", "(3+4)2", "3+4=7*2=14", r"\sqrt{3+4}*2", r"\log(3+4)*2", "5^{(3+4)*2}", "5*e*(3+4)*2", "(3+4)*2!",
                      "(3+4)*2 + five", "15 ≠ (3+4)*2", r"15 \neq (3+4)*2", r"(3+4)*2 \cdot \pi", "(3+4)*2x", "x(3+4)*2", "(3+4)*2-", "1 (3+4)*2", "sqrt (3+4)*2", "log (3+4)*2", "(3+4)*2 squared"]),
        "6,3,2=4": ([r"\frac{6}{3} + 2", "6/3+2", r"6 \div 3 + 2", r"\frac63+2"], [r"\frac{6}{2} + 3", "6//3+2"]), "84,2=168": (["84*2"], [r"\frac84*2"])},
    "sudoku": {
        "3142243142131324": (["3142\n2431\n4213\n1324", "3 1 4 2 | 2 4 3 1 | 4 2 1 3 | 1 3 2 4", "3142 2431 4213 1324", "Row 1: 3142 Row 2: 2431 Row 3: 4213 Row 4: 1324",
                              "The 4x4 solution is:\n3142\n2431\n4213\n1324", "Row 1: 3 1 4 2\nRow 2: 2 4 3 1\nRow 3: 4 2 1 3\nRow 4: 1 3 2 4", "The 4x4 grid: 3 1 4 2 / 2 4 3 1 / 4 2 1 3 / 1 3 2 4", "3102200002100320 is solved by 3142243142131324"],
                             ["3142 2431 4213 132", "1324421324313142", "3142243142131325"])},
}


@pytest.mark.parametrize("task", WRITTEN)
def test_answers_as_they_are_written(task):
    wrong = []
    for gold, (right_ones, wrong_ones) in WRITTEN[task].items():
        ex = {"question": "", "problem": "", "answer": gold}
        if task == "countdown":
            ex = {"nums": [int(x) for x in gold.split("=")[0].split(",")], "target": int(gold.split("=")[1])}
        if task == "sudoku":
            ex = EXAMPLES[task]
        for answers, right in ((right_ones, True), (wrong_ones, False)):
            for answer in answers:
                for text in (f"<answer>{answer}</answer>", f"<think>1 2</think><answer>\\boxed{{{answer}}}</answer>"):
                    if (grade(task, text, ex) == 1) != right:
                        wrong.append((gold, text, right))
    assert not wrong


def test_an_expression_copied_from_the_problem_is_no_solution_of_it():
    for problem, gold, echo in (("Simplify $19x + 1 - 4x - 81$.", "15x - 80", "19x + 1 - 4x - 81"), ("Simplify $\\sqrt{242}$.", "11\\sqrt2", "\\sqrt{242}"),
                                ("Compute $\\frac{4+6a}{5}-\\frac{1+3a}{4}$.", "\\frac{11+9a}{20}", "\\frac{4+6a}{5} - \\frac{1+3a}{4}")):
        assert grade("math", f"\\boxed{{{echo}}}", {"problem": problem, "answer": gold}) == 0 and grade("math", echo, {"problem": "", "answer": gold}) == 1
    assert grade("math", "\\boxed{x+1}", {"problem": "Which is larger, $x+1$ or $x$?", "answer": "x+1"}) == 1


def test_an_answer_is_read_up_to_a_size():
    ex = {"problem": "", "answer": "1"}
    assert grade("math", "<answer>" + "(" * 200 + "1" + ")" * 200 + "</answer>", ex) == 0 and grade("math", f"\\boxed{{1{' ' * 600}}}", ex) == 1
    assert grade("math", f"\\boxed{{1{'+0' * 300}}}", ex) == 0 and TASKS["math"].beside[1](f"\\boxed{{1{'+0' * 300}}}", ex) == 0
    assert grade("gsm8k", "72" + " " * rewards.MAX_CHARS + "<answer>72</answer>", EXAMPLES["gsm8k"]) == 1
    assert grade("gsm8k", "<answer>72" + ". so" * rewards.MAX_CHARS, EXAMPLES["gsm8k"]) == 0             # only the end is read
    assert grade("countdown", "<answer>" + "(" * 21 + "3+4" + ")" * 21 + "*2</answer>", EXAMPLES["countdown"]) == 0
    assert grade("countdown", "<answer>" + "(" * 19 + "3+4" + ")" * 19 + "*2</answer>", EXAMPLES["countdown"]) == 1


def test_equal_in_value_is_shown_beside_equal_in_form():
    name, value = TASKS["math"].beside
    for gold, answer, equal in (("\\frac{1}{8}", "0.125", 1), ("2516_8", "2516", 1), ("2", "\\frac{6}{3}", 1), ("2", "3", 0), ("\\text{A}", "B", 0)):
        ex = {"problem": "", "answer": gold}
        assert value(answer, ex) == equal and grade("math", answer, ex) == 0


TRICKS = {
    "sudoku": ["3102200002100320", "1234" * 4, "1234" * 40, "3142243142131324 1234123412341234", "exit()", "", "31422431421313240", "314224314213132",
               "3142243142131324" * 2],
    "countdown": ["14", "14=14", "3+4+2=14", "7*2", "(3+4)*2*1", "3+4*2+3", "14*1", "(3+4)*2 or 1", "3*4+2.0", "34-20", "9**9**9", "-" * 150, "3/0",
                  "__import__('os')", "(" * 100 + "3", "(" * 200, "exit()", "Numbers: [3, 4, 2] Target: 14", "3, 4, 2, 14", "(3+4)*2, (3-4)*2", "(3+4)*2=99"],
    "gsm8k": ["0 1 2 3 4 5 6 7 8 9", "".join(map(str, range(100))), " ".join(map(str, range(100))), "720", "7 2", "-72", "7.2", "exit()", "\\boxed{}",
              "How many are 70 and 2?", "72 or 73", "\\boxed{72} \\boxed{73}", "1e72", "0,72", "71,72", "70+2", "72^2"],
    "math": ["\\frac{2}{1}", "", "1", "\\boxed{", "x", "9^{9^{9^{9}}}", "(1000000)!!", "exit()", "\\frac{1}{2}, \\frac{1}{3}", "0 1 2 3 4 5 6 7 8 9",
             "\\boxed{\\frac{1}{2}} \\boxed{\\frac{1}{3}}", "x?"],
}


@pytest.mark.parametrize("task", TASKS)
def test_known_tricks_do_not_pay(task):
    """Several boxed answers, all the digits, the numbers of the statement, the statement echoed, exit(), an answer outside the tag."""
    for text in TRICKS[task]:
        said = text if text.strip("\\boxed{}") else "?"                                  # an empty tag or box takes nothing back
        for form in (text, f"<answer>{text}</answer>", f"<answer>\\boxed{{{text}}}</answer>", f"\\boxed{{{RIGHT[task]}}} <answer>{said}</answer>",
                     f"<answer>\\boxed{{{RIGHT[task]}}}</answer> no, <answer>{said}</answer>"):
            assert grade(task, form, EXAMPLES[task]) < 1, form
            assert reward(task, form, EXAMPLES[task]) < 4
    echo = rewards.prompt_for(task, EXAMPLES[task], "d1")[0]
    assert grade(task, echo, EXAMPLES[task]) < 1 and grade(task, f"<answer>{echo}</answer>", EXAMPLES[task]) < 1


@pytest.mark.parametrize("task", TASKS)
def test_no_string_raises(task):
    pieces = st.sampled_from(PIECES)

    @settings(max_examples=200, deadline=None)
    @given(st.one_of(st.text(), st.lists(st.one_of(pieces, st.text(max_size=5))).map("".join)), st.sampled_from(IMPOSSIBLE[task]))
    def check(text, ex):
        assert 0 <= grade(task, text, ex) < 1 and 0 <= reward(task, text, ex) < 4
    check()


@pytest.mark.parametrize("task", TASKS)
def test_mutated_completions_never_raise_and_never_win(task):
    fuzz(task, 100 if task == "math" else 1000, seed=1)                                   # tests/fuzz.py runs 100,000 of them, and times them


# ------------------------------------------------------------------------------------------------------ golds and real texts
@needs_data
def test_every_gsm8k_solution_is_right_and_wrong_once_its_number_is_changed():
    golds = [row for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl") for row in jsonl(SHARED / name)]
    assert len(golds) == 8792
    rng = random.Random(0)
    for ex in golds:
        reasoning, number = (part.strip() for part in ex["answer"].rsplit("####", 1))
        value = Fraction(number.replace(",", ""))
        wrong = rng.choice([str(value + 1), str(-value - 1), f"{number}0" if value else "10", f"{number}.5", str(value * 2 + 1), f"1{number}"])
        for style in STYLES:
            assert grade("gsm8k", style.format(r=reasoning, a=number), ex) == 1, number
            assert grade("gsm8k", style.format(r=reasoning, a=wrong), ex) == 0, (number, wrong)
        assert grade("gsm8k", ex["answer"], ex) == 1                                      # as it stands


def changed(answer):
    """The answer with its first digit, or else its last letter, replaced by another."""
    at = [m.start() for m in re.finditer("[0-9]", answer)] or [m.start() for m in re.finditer("[A-Za-z](?![A-Za-z]*[{\\\\])", answer)]
    i = at[0] if answer[at[0]].isdigit() else at[-1]
    other = str((int(answer[i]) + 1) % 10) if answer[i].isdigit() else "Z" if answer[i] != "Z" else "Q"
    return answer[:i] + other + answer[i + 1:]


@needs_data
def test_every_math_answer_is_right_and_wrong_once_changed():
    golds = [row["gold"] for row in jsonl(SHARED / "llada_generations" / "math500_128.jsonl")]
    for gold in golds:
        ex = {"problem": "", "answer": gold}
        for style in STYLES:
            assert grade("math", style.format(r="so $x = 1$ and \\frac{1}{2}", a=gold), ex) == 1, gold
            assert grade("math", style.format(r=gold, a=changed(gold)), ex) == 0, (gold, changed(gold))


@needs_data
def test_published_generations_grade_as_published():
    """d1's own grader: GSM8K 783 of 1130, MATH-500 130 of 500, Countdown 53 of 256, Sudoku 240 of 2048 cells and 1 puzzle. Ours: what each
    text says; where the two differ was looked at one by one."""
    solved, cells = Counter(), 0.0
    for task, name in FILES.items():
        for row in jsonl(SHARED / "llada_generations" / f"{name}.jsonl"):
            ex = TASKS[task].row(row)
            result = grade(task, row["completion"], ex)
            solved[task] += result == 1
            cells += result * ex["puzzle"].count("0") if task == "sudoku" else 0
    assert solved == {"gsm8k": 792, "math": 135, "countdown": 54, "sudoku": 1} and round(cells) == 241
    assert abs(792 - 784) <= 11.3 and abs(135 - 130) <= 5 and abs(54 - 53) <= 2.56 and abs(241 - 240) <= 20.48


# --------------------------------------------------------------------------------------------- math-verify and its time limit
EQUAL = {"problem": "", "answer": "16\\sqrt{3}"}


@pytest.fixture
def one_second(monkeypatch):
    """A worker with a limit of a second."""
    monkeypatch.setattr(rewards, "MATH_LIMIT", 1)
    monkeypatch.setattr(rewards._workers, "math", rewards.MathWorker())
    rewards.math_equal.cache_clear()
    yield
    if rewards._workers.math.process:
        rewards._workers.math.stop()


def verdicts(queue=None):
    found = [grade("math", answer, EQUAL) for answer in ("\\sqrt{3}*16", "9^{9^{9^{9}}}", "16*\\sqrt{3}", "\\sqrt{3}*15")]
    if queue is not None:
        queue.put(found)
    return found


def test_the_time_limit_holds_in_threads_and_processes_alike(one_second):
    clock, found = time.perf_counter(), []
    threads = [threading.Thread(target=lambda: found.append(verdicts())) for _ in range(2)]
    queue = multiprocessing.get_context("fork").Queue()
    assert verdicts() == [1, 0, 1, 0]                                                     # the main thread; then, of a fork and of threads
    children = [multiprocessing.get_context("fork").Process(target=verdicts, args=(queue,), daemon=True)]
    rewards.math_equal.cache_clear()
    for worker in (*children, *threads):
        worker.start()
    found.append(queue.get(timeout=60))
    for worker in (*children, *threads):
        worker.join(60)
    assert found == [[1, 0, 1, 0]] * 3
    assert time.perf_counter() - clock < 60                                           


def test_a_lost_verdict_is_asked_again_and_an_interrupted_one_is_never_anothers():
    assert grade("math", "\\sqrt{3}*(24-8)", EQUAL) == 1
    os.kill(rewards._workers.math.process.pid, signal.SIGKILL)
    assert grade("math", "\\sqrt{3}*(25-9)", EQUAL) == 1                                  # killed by somebody: asked once more

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
    queue = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=lambda: queue.put(grade("math", "\\sqrt{3}*(26-10)", EQUAL)), daemon=True)
    child.start()
    assert queue.get(timeout=60) == 1
    child.join(60)
    thread.join(60)


def test_an_ignored_alarm_in_our_process_does_not_lift_the_limit(one_second):
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        assert grade("math", "9^{9^{9^{9}}}-\\sqrt{3}", EQUAL) == 0
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_missing_library_is_told_and_not_graded_as_wrong(monkeypatch):
    monkeypatch.setattr(rewards._workers, "math", rewards.MathWorker())
    monkeypatch.setattr(rewards.sys, "executable", "/bin/false")
    with pytest.raises(BadInput, match="math-verify"):
        grade("math", "\\sqrt{3}*(23-7)", EQUAL)


# ----------------------------------------------------------------------------------------------------- prompts, rewards, data
@pytest.mark.parametrize("style", rewards.FORMATS)
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_states_the_problem_and_asks_for_what_is_graded(task, style):
    message, begin = rewards.prompt_for(task, EXAMPLES[task], style)
    assert TASKS[task].question(EXAMPLES[task]) in message and "\\boxed{" in message and "<answer>" in message
    assert ("<think>" in message, begin) == (style == "agrpo", "<reasoning>" if style == "d1" else "")
    assert rewards.prompt_for(task, EXAMPLES[task], style, "Do it.") == (f"Do it.\n\n{TASKS[task].question(EXAMPLES[task])}", begin)
    tag = "think" if style == "agrpo" else "reasoning"
    text = f"{'' if begin else f'<{tag}>'} so </{tag}><answer>\\boxed{{{RIGHT[task]}}}</answer>"
    assert reward(task, text, EXAMPLES[task]) == 4                                        # what it asks for earns all


def test_weights_are_read_by_name():
    assert rewards.read_weights("gsm8k", "correct=1, think=0") == {"think": 0.0, "answer": 0.5, "correct": 1.0}
    text = "</think><answer>72</answer>"
    assert reward_parts("gsm8k", text, EXAMPLES["gsm8k"], {"think": 0, "answer": 2, "correct": 1}) == {"think": 0, "answer": 2, "correct": 1}
    for bad in ("right=1", "correct", "correct=x", "correct=nan", "=", "correct=1e9"):
        with pytest.raises(BadInput, match="--reward-weights"):
            rewards.read_weights("gsm8k", bad)


def test_published_data_sets_load_through_the_datasets_library(tmp_path, monkeypatch):
    """The real loading code on data sets of the published layout that lie in a folder; MATH trains on nothing that is tested."""
    import datasets
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    problems = [{"problem": f"What is {i} plus  {i}?", "answer": str(2 * i), "level": 1} for i in range(9)]
    for name, rows in (("m500/test", problems[:3]), ("math/train", [*problems, {**problems[0], "problem": "What is 0 plus 0?"}])):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setitem(TASKS["math"].hub, "train", (str(tmp_path / "math"), None, "train"))
    monkeypatch.setitem(TASKS["math"].hub, "test", (str(tmp_path / "m500"), None, "test"))
    train, test = rewards.load_split("math", 0, 2, 0)
    assert [ex["answer"] for ex in test] == ["0", "2"] and [ex["answer"] for ex in train] == ["6", "8", "10", "12", "14", "16"]
    monkeypatch.setitem(TASKS["math"].hub, "test", ("nobody/none", None, "test"))
    with pytest.raises(BadInput, match="--data FILE, lines of JSON with problem and answer"):
        rewards.load_examples("math", 5, 0, "test")


@needs_data
def test_a_second_file_is_held_out():
    train, test = rewards.load_split("gsm8k", 0, 100, 0, str(SHARED / "gsm8k_train.jsonl"), str(SHARED / "gsm8k_test.jsonl"))
    assert len(train) == 7473 and len(test) == 100 and test[0]["question"].startswith("Janet")
    train, test = rewards.load_split("gsm8k", 0, 9999, 0, str(SHARED / "gsm8k_test.jsonl"))
    assert len(train) + len(test) == 1319 and not {ex["question"] for ex in train} & {ex["question"] for ex in test}


# ------------------------------------------------------------------------------------------------------ Sudoku and Countdown
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


def test_solutions_of_countdown_solve_it():
    for nums, target in (([3, 4, 2], 14), ([7, 1, 5, 9], 31), ([6, 3, 2], 4), ([8, 3], 24), ([5], 5), ([1, 5, 5, 5], 24)):
        assert grade("countdown", rewards.countdown_solve(nums, target), {"nums": nums, "target": target}) == 1
    assert rewards.countdown_solve([0, 0], 3) is None


@needs_data
def test_real_files_load_and_their_solutions_are_right():
    for task, name, n in (("sudoku", "sudoku4x4_test.csv", 500), ("countdown", "countdown3_test.jsonl", 256), ("gsm8k", "gsm8k_test.jsonl", 1319)):
        data = rewards.load_examples(task, 0, 0, "test", str(SHARED / name))
        assert len(data) == n and sum(grade(task, TASKS[task].gold(ex) or "", ex) for ex in data) == n


def test_an_answer_cannot_close_the_box_it_is_put_in():
    assert grade("math", "<answer>3} \\boxed{\\frac{1}{2}} \\boxed{3</answer>", {"problem": "", "answer": "3"}) == 0
