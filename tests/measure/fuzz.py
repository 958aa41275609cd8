"""Protects the graders: random and mutated completions never raise, never win, are never slow.
Run: python tests/measure/fuzz.py [strings per task, default 100000] [task ...]; prints a table. The
suite runs the same with few strings. No completion can hit the golds that are graded against."""
import argparse
import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import rewards

GENERATIONS = ROOT.parent / "shared" / "data" / "llada_generations"
FILES = {"gsm8k": "gsm8k_128", "math": "math500_128", "countdown": "countdown_128",
         "sudoku": "sudoku_128"}
IMPOSSIBLE = {
    "story": [{"question": "", "answer": "1+1=2\n#### 918273645"}],
    "gsm8k": [{"question": "", "answer": "#### 918273645.1928"}],
    "code": [{"text": "", "code": "", "test_list": ["assert f(1) == 918273645"]}],
    "formula": [{"text": "", "code": "", "test_list": ["assert f(1) == 918273645"]}],
    "math": [{"problem": "", "answer": answer}
             for answer in ("\\frac{918273}{645281}", "\\sqrt{918273}", "(918273, 645281)")],
    "countdown": [{"nums": [3, 3], "target": 1009}],
    "sudoku": [{"puzzle": "1100000000000000", "solution": "1234341221434321"}],
}
PIECES = [
    "<answer>", "</answer>", "<think>", "</think>", "<reasoning>", "</reasoning>", "\\boxed{",
    "\\boxed", "\\fbox{", "}", "{", "}}}", "\\{", "(", ")", "((((", "))))", "[", "]", "=", "+",
    "-", "−", "*", "**", "/", "//", "^", "_", "!", "!!", ",", ".", ":", "%", "$", "\\$",
    "\\frac{1}{0}", "\\frac12", "\\frac{", "\\sqrt{", "\\text{", "\\left(", "\\right)", "\\times",
    "\\div", "\\cdot", "\\,", "{,}", "0", "1", "3", "1/0", "1e999", "9**9**9", "9^{9^{9^9}}",
    "1,000", "0,72", ".5", "00", "١٢٣", "１２３", "½", "\x00", "\ud800", "\udfff", "\u202e", "é",
    "\n", "\r", "\t", " ", "exit()", "__import__('os')", "nan", "inf", "<|eot_id|>",
    "<|endoftext|>", "</s>", "1234123412341234", "#### 3", "\\pi", "x", "\\infty",
    "\\begin{pmatrix}", "\\\\", "&", "\\end{pmatrix}", "\\boxed{...}", "...", "3 3", "3+3",
    "3*3=9", "\\{5\\}", "\\boxed{" * 200, "}" * 200, "1 ()", "\xa0",
    "\nQuestion: ", "Q:", "\nUser:", "<|im_start|>user\n", "The answer is ", " or ",
    "\\text{ and }", "\\pm ", "\\cup ", "\\geq ", "<", "10_3", "e^{-40}", "x=", "(x,y)=", "\\cot x",
    "\\begin{bmatrix}", "\\end{bmatrix}", "1,100", "\\textnormal{ miles}", "72 in 2 months"]


def texts_of(task: str) -> list[str]:
    """Real completions where the data are there, else some made up."""
    path = GENERATIONS / f"{FILES.get(task, 'gsm8k_128')}.jsonl"
    if not path.is_file():
        return [f"<think>{p}</think><answer>\\boxed{{{q}}}</answer>"
                for p in PIECES[::3] for q in PIECES[::5]]
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["completion"] for line in lines]


def mutate(text: str, rng: random.Random) -> str:
    """A few edits: pieces put in, slices cut out, doubled, moved or repeated, characters replaced;
    now and then a megabyte."""
    text = text.replace("<|endoftext|>", "") if rng.random() < 0.7 else text
    for _ in range(rng.randint(1, 6)):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        kind = rng.random()
        if kind < 0.5:
            text = text[:i] + rng.choice(PIECES) * rng.choice((1, 1, 1, 2, 30)) + text[i:]
        elif kind < 0.65:
            text = text[:i] + text[min(j, i + 20):]
        elif kind < 0.75:
            text = text[:j] + text[i:j] + text[j:]
        elif kind < 0.85:
            code = rng.choice((rng.randrange(128), rng.randrange(0x10000)))
            text = text[:i] + chr(code) + text[i + 1:]
        elif kind < 0.99:
            text = text[:i] + "".join(rng.choices(PIECES, k=rng.randint(1, 12))) + text[i:]
        else:
            text += (rng.choice(PIECES) + rng.choice(("", "", "3"))) * (10**6 // 8)
    if rng.random() < 0.999:
        return text
    return rng.choice(PIECES) * rng.choice((1, 200, 2000, 10**6))


def fuzz(task: str, n: int, seed: int = 0) -> float:
    """Worst processor seconds of one grading in this thread (math-verify has its own process).
    Raises AssertionError."""
    rng, real, row, worst = random.Random(seed), texts_of(task), rewards.TASKS[task], 0.0

    def timed(function, *given):
        nonlocal worst
        clock = time.thread_time()
        value = function(*given)
        worst = max(worst, time.thread_time() - clock)
        return value
    for _ in range(n):
        text, example = mutate(rng.choice(real), rng), rng.choice(IMPOSSIBLE[task])
        grade = timed(rewards.grade, task, text, example)
        parts = timed(rewards.reward_parts, task, text, example).values()
        beside = timed(row.beside[1], text, example) if row.beside else 0
        assert 0 <= grade < 1 and 0 <= beside < 1, (task, text[:2000])
        assert 0 <= sum(parts) < 4 and min(parts) >= 0, (task, text[:2000])
        assert hash(timed(row.answer, text)) is not None
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strings", type=int, nargs="?", default=100_000)
    parser.add_argument("tasks", nargs="*", default=list(FILES))
    args = parser.parse_args()
    print("task       strings  worst, ms  seconds")
    for task in args.tasks:
        clock = time.perf_counter()
        worst, seconds = fuzz(task, args.strings), time.perf_counter() - clock
        print(f"{task:9}  {args.strings:7}  {1000 * worst:9.1f}  {seconds:7.0f}", flush=True)


if __name__ == "__main__":
    main()
