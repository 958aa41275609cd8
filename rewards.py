"""Tasks: examples, prompts, one answer parser, grades and rewards. A task is a row of TASKS.

    grade(task, completion, example)        -> float in [0, 1]   1 is solved; evaluation counts it
    reward_parts(task, completion, example) -> {name: float}     training maximises their sum

Neither raises on any completion, and both read the same answer (`find_answer`). Examples: sudoku
{puzzle, solution}, countdown {nums, target}, gsm8k and story {question, answer}, math {problem,
answer}, code and formula {text, code, test_list}."""
import ast
import json
import operator
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

from support import programs
from support.math_answers import (MATH_CHARS, math_copied, math_equal, math_form,
                                  math_normal, math_pair)
from support.puzzles import (SOLUTIONS, STORY_WORDS, chain, countdown_generate, countdown_solve,
                             in_split, story_answer, story_generate,  # noqa: F401
                             story_lazy, sudoku_class, sudoku_generate, sudoku_lazy)

class BadInput(Exception):
    """A mistake of the caller (flag, file, example), in one line. Commands exit with code 2."""

# ---------------------------------------------------------------------- one parser for all tasks
PLACEHOLDER = re.compile(r"(?:[.…_{}\s]|\\[lc]?dots|\\boxed)*")     # a copied format: no answer
MAX_CHARS = 20_000                     # read at the end of a completion: grading stays linear
END = r"<\|(?:eot_id|endoftext|end_of_text|im_end)\|>|</s>|<end_of_turn>"
ASKED = r"[ \t#*]*+(?i:question|q|problem|exercise|user|human|instruction)\b[ \t0-9*]*+:"
NEXT = (rf"(?:\n|(?<=[.!?0-9)}}$>])){ASKED}|<\|(?:im_start|start_header_id|user)\|>"
        r"|<start_of_turn>|\[INST\]")
ANSWERED = (r"####\s*\S|\\(?:boxed|fbox)\s*\{(?!\s*(?:[.…_}]|\\[lc]?dots))|</answer>|answer is\b",
            rf"|[0-9][^\w\n]{{0,8}}\s*(?={NEXT})", r"|\n[ \t#*>]*+(?:Answer|Solution|A)\b[ \t*]*+:")

def before_end(completion: str) -> str:
    """A completion up to its end of text."""
    return re.split(END, completion[:10**6], maxsplit=1)[0]

def text_of(completion: str) -> str:
    """A completion up to its end of text, or to the question that a base model goes on with: the
    next one after it has marked an answer or, if it marks none, given a number.
    >>> text_of("#### 72\\nQ: 5 + 5? #### 10"), text_of("Restated:\\nQ: 70 + 2?\\n#### 72")
    ('#### 72', 'Restated:\\nQ: 70 + 2?\\n#### 72')"""
    text = before_end(completion)
    begin = len(text) - len(re.split("</(?:reasoning|think)>", text, maxsplit=1)[-1])
    rest = text[begin:begin + MAX_CHARS]                   # (it may ask itself in the reasoning)
    again = bool(re.match(rf"\s*+{ASKED}", rest))          # it begins by restating the problem
    found = re.search(ANSWERED[0] + ANSWERED[1 + again], rest)
    found = found or not again and re.search("[0-9]", rest)
    end = found and re.compile(NEXT).search(rest, found.end())
    return text[:begin + end.start()] if end else text

def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} that closes and holds more than a placeholder, or None.
    >>> last_boxed(r"so \\boxed{3} and \\boxed{\\frac{1}{2}}, form \\boxed{...}")
    '\\\\frac{1}{2}'"""
    opened, begin, best = [], -1, None                     # of each open brace: its box, or -1
    for m in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]", text):
        if m[0].endswith("{") and m[0] != "\\{":
            opened.append(m.end() if len(m[0]) > 1 else -1)
        elif m[0] == "}" and opened and (start := opened.pop()) > begin and len(opened) < 20:
            content = text[start:m.start()].strip()        # (deeper would take quadratic time)
            if not PLACEHOLDER.fullmatch(content):
                begin, best = start, content
    return best

def find_answer(completion: str) -> tuple[str, bool]:
    """The answer, and whether it is marked: of the last answer tag that holds any, its last \\boxed
    or all of it, else the last \\boxed of the text, else (unmarked) the text after the reasoning.
    >>> find_answer("<answer>\\\\boxed{2}</answer>"), find_answer("1234"), find_answer("<think>1")
    (('2', True), ('1234', False), ('', False))"""
    text = text_of(completion)[-MAX_CHARS:]
    for tag in reversed(text.split("<answer>")[1:]):
        inside = tag.split("</answer>", 1)[0]
        if not PLACEHOLDER.fullmatch(found := last_boxed(inside) or inside.strip()):
            return found, True
    if (found := last_boxed(text)) is not None:
        return found, True
    after = re.split(r"</(?:reasoning|think)>", text)[-1]
    return "" if re.search(r"<(?:reasoning|think)>", after) else after.strip(), False

# ------------------------------------------------------------------------------------ 4x4 Sudoku
def sudoku_cells(completion: str) -> tuple[str, bool]:
    """The digits given for the grid, row by row, and whether they are 16: the answer's digits, or
    its last run of 16, or its last four of 4. Else what a marked answer has, at most 16.
    >>> [sudoku_cells(f"<answer>{x}</answer>") for x in ("12 34|34 12|21 43|43 21", "1234 34")]
    [('1234341221434321', True), ('123434', False)]"""
    answer, marked = find_answer(completion)
    answer = re.sub(r"(?i)\br(?:ow)?\s*[1-4]\s*:|4\s?[x×]\s?4", " ", answer)
    digits, runs = re.sub("[^0-9]", "", answer), re.findall("[0-9]+", answer)
    grids, rows = ([run for run in runs if len(run) == n] for n in (16, 4))
    found = digits if len(digits) == 16 else grids[-1] if grids else "".join(rows[-4:])
    return (found, True) if len(found) == 16 else (digits[:16] if marked else "", False)

def sudoku_grade(completion: str, example: dict) -> float:
    """1 for any valid grid over the clues, else the share of empty cells that are right, below 1.
    >>> ex = {"puzzle": "1234341221434300", "solution": "1234341221434321"}
    >>> sudoku_grade("1234341221434321", ex), sudoku_grade("1234341221434324", ex)
    (1.0, 0.5)"""
    (cells, whole), puzzle = sudoku_cells(completion), example["puzzle"]
    kept = all(p in ("0", c) for p, c in zip(puzzle, cells))
    if whole and kept and cells in SOLUTIONS:
        return 1.0
    empty = max(1, puzzle.count("0"))
    right = sum(p == "0" and s == c for p, s, c in zip(puzzle, example["solution"], cells))
    return min(right, empty - 1) / empty

def sudoku_parts(completion: str, example: dict) -> dict:
    """format: 1/2 for 16 cells + 1/2 for the share of clues kept.
    >>> [sudoku_parts(x, {"puzzle": "12" + "0" * 14}) for x in ("1234341221434321", "no")]
    [{'format': 1.0}, {'format': 0.0}]"""
    cells, whole = sudoku_cells(completion)
    kept = [p == c for p, c in zip(example["puzzle"], cells) if p != "0"]
    return {"format": 0.5 + 0.5 * sum(kept) / max(1, len(kept)) if whole else 0.0}

def sudoku_row(row: dict) -> dict:
    """A row of a file -> example: puzzle and solution, in any case, or question and gold."""
    row = {name.lower(): text for name, text in row.items() if name}
    if "gold" in row:
        row |= {"puzzle": re.search("[0-4]{16}", row["question"])[0], "solution": row["gold"]}
    example = {name: str(row[name]).strip() for name in ("puzzle", "solution")}
    if (not re.fullmatch("[0-4]{16}", example["puzzle"])
            or sudoku_grade(example["solution"], example) < 1):
        raise ValueError("puzzle and solution must be 16 digits each, 0 for an empty cell, and fit")
    return example

# ------------------------------------------------------------------------------------- Countdown
LATEX = (                              # (pattern, replacement): what an expression is written with
    (r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r"((\1)/(\2))"),
    (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\(?:times|cdot|ast)(?![A-Za-z])|\\\*|[×·⋅∙∗]", "*"), (r"\\div(?![A-Za-z])|÷", "/"),
    (r"[−–]", "-"), (r"\\(?:left|right|displaystyle|text)(?![A-Za-z])|\\[()\[\],;!]|\$", ""),
    (r"(?<!\s)\s++(?==)", " "), (r"[\[{]", "("), (r"[\]}]", ")"),
    (r"(?<=[0-9)])(\s?)[xX](?=\s?[0-9(])", r"\1*"))
EXPRESSION = r"(?:(?<![^\s:,;])|(?=[ \t]))[-+*/()=0-9. \t]++(?:(?<=[ \t.])|(?![^\s:,;!]))"
NOT_READ = r"[\\^!%_√≠<>≤≥]|\b(?:sqrt|log|ln|exp|sin|cos|tan|squared|cubed)\b"    # is not evaluated
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.USub: operator.neg}

def evaluate_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and sorted numbers of an expression over + - * / ( ) and integers, None for all else.
    >>> evaluate_expression("(3 + 4) * 2"), evaluate_expression("9**9**9")
    ((Fraction(14, 1), [2, 3, 4]), None)"""
    def value(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        sides = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return OPERATORS[type(node.op)](*map(value, sides))
    allowed = re.fullmatch(r"(?:[0-9]{1,9}(?![0-9])|[-+*/()\s])+", text)
    if not allowed or len(text) > 200 or max(text.count("("), text.count("-")) > 20:
        return None                                        # nesting takes stack
    plain = re.sub(r"\b0+(?=[0-9])", "", " ".join(text.split()))     # Python refuses 007
    try:
        numbers = sorted(map(int, re.findall("[0-9]+", plain)))
        return value(ast.parse(plain, mode="eval").body), numbers
    except (SyntaxError, AttributeError, KeyError, ZeroDivisionError):
        return None

def countdown_expression(completion: str) -> tuple[Fraction, list[int]] | None:
    """`evaluate_expression` of an answer's last one; an equation with a number must be true.
    >>> [countdown_expression(x) for x in (r"\\boxed{3 \\times (4 - 1) = 9}", "3 * 3 = 8")]
    [(Fraction(9, 1), [1, 3, 4]), None]"""
    text = find_answer(completion)[0][-2000:].strip("*`'\" ")
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    chunks = [chunk for chunk in re.findall(EXPRESSION, text) if re.search("[0-9]", chunk)]
    if not chunks or re.search(NOT_READ, text):
        return None
    sides = [side.strip() for side in chunks[-1].strip("=. \t").split("=")]
    number = re.compile(r"-?[0-9]{1,9}(?:\.0*)?")
    if len(sides) == 2 and number.fullmatch(sides[0]):
        sides.reverse()                                    # 14 = (3+4)*2
    parsed = evaluate_expression(sides[0])
    true = parsed and all(number.fullmatch(x) and Fraction(x) == parsed[0] for x in sides[1:])
    return parsed if true and len(sides) < 3 else None

def countdown_parts(completion: str, example: dict) -> dict:
    """format: 1/2 for an expression + 1/2 if it uses each number once.
    >>> [countdown_parts(x, {"nums": [3, 4, 2]})["format"] for x in ("3+4+2", "7*2", "no")]
    [1.0, 0.5, 0.0]"""
    parsed = countdown_expression(completion)
    once = parsed and parsed[1] == sorted(example["nums"])
    return {"format": (bool(parsed) + bool(once)) / 2}

def countdown_grade(completion: str, example: dict) -> float:
    """1 if the expression uses each number once and gives the target, else 0.
    >>> [countdown_grade(x, {"nums": [3, 4, 2], "target": 14}) for x in ("(3+4)*2", "7*2")]
    [1.0, 0.0]"""
    return float(countdown_expression(completion) == (example["target"], sorted(example["nums"])))

def countdown_row(row: dict) -> dict:
    """A row of a file -> example: nums and target, input "30,100,93" and output "23", or gold."""
    if "gold" in row:
        nums, target = row["gold"]
    else:
        nums, target = (row[k] for k in (("input", "output") if "input" in row else
                                         ("nums", "target")))
    nums = nums.split(",") if isinstance(nums, str) else nums
    if not 1 <= len(nums) <= 6:
        raise ValueError(f"{len(nums)} numbers, there must be 1 to 6")
    return {"nums": [int(str(n)) for n in nums], "target": int(str(target))}   # 2.5 is refused

# ----------------------------------------------------------------------------------------- GSM8K
TYPESETTING = (                        # (pattern, replacement): what numbers are written with
    (r"\\[dtc]?frac\s*\{?([0-9]+)\}?\s*\{?([0-9]+)\}?", r" \1/\2"), (r"[−–‐﹣－]", "-"),
    (r"\\[,;!: ]|\{,\}|\\(?=[$%])|(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9])", ""),
    (r"\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|[×·⋅•∙]|(?<=[0-9])\s?\*\*\s?(?=[0-9])", "*"),
    (r"\\div(?![A-Za-z])|÷", "/"), (r"\*\*|\\(?:text|mbox|underline|bf)\w*\s*\{?", " "),
    (r"(?<=[A-Za-z])\}?\s?\^\s?\{?-?[0-9]+\}?|\^\s?\{?\\circ\}?", ""),         # cm^2
    (r"^(\W*+[0-9][0-9.,]*+(?: [a-z]+)?) (?:in|for|after|every|per) [0-9]+ [a-z]+\.?$", r"\1"),
    (r"(?<=[0-9])\s+\((?![a-z]*(?:thousand|million))[^()]*\)\s*+\.?\s*+$", ""))    # (an aside)
RUN = r"[-+]?[$€£¥]?[-+]?\.?[0-9][0-9.,]*(?:[eE][-+]?[0-9]+)?"
ARITHMETIC = (rf"(?<![A-Za-z0-9_^])(?:[-+]?[0-9]+\s+(?=[0-9]+\s?/\s?[0-9]))?{RUN}"
              rf"(?:(?:\s?[-+*/^x]\s?|:){RUN})*")
NUMBER = r"[-+]?[$€£¥]?[-+]?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
FRACTION = r"[-+]?(?:([0-9]+)\s+)?([0-9]+)\s?/\s?([0-9]+)"
MINUS = r"(?:^|[^A-Za-z0-9)}\]\s])\s*-\s*(?:US)?[$€£¥]?\s*$|\b(?:minus|negative)\s+$"   # apart
NOT_ALONE = (                          # what before a number says that it is not the answer
    r"[*/^+≠<>≤≥√]\s*[\[({]*\s*$|[0-9})\]]\s*[-+]?\s*[\[({]\s*$"               # an operator
    r"|[0-9]\s*(?:[;|&,]|\\\\)?[ \t]+$|[0-9][;|&]\s*$|-\s*(?:US\$|\\?[\[({]|\\left\W)\s*$"
    r"|[0-9][^0-9.\n]{0,20}\b(?:or|and|to|through)\s+(?:\w+\s+)?$"             # another guess
    r"|\b(?:half|%|percent) of\s+$|\b(?:sqrt|log|ln|not|than)\s*\(?\s*$|[A-Za-z]\s-\s$"
    r"|\\(?!boxed|fbox|left|approx|quad|qquad|therefore|implies|[Ll]?(?:ong)?[Rr]ightarrow|to|math"
    r"|displaystyle)[A-Za-z]+\s*[\[({]*\s*$|\|$")                              # a command
MULTIPLIED = (                         # what after it says so
    r"\s*(?:[kKMB]\b|(?:mil|bn|hundred|thousand|million|billion|trillion|dozen|squared|cubed|pi)\b"
    r"|[²³½π|]|[)}]*\s*\^|\(|\\(?:sqrt|pi|times|cdot|left)|[-+*/]\s?[A-Za-z]\b)|[xyn]\b")

def last_number(text: str) -> Fraction | None:
    """The last number of a text: sign, currency, commas, decimals, a/b, 1 1/2 read, units ignored.
    None if it is malformed (0,72), not computed (2*36, 3 million), or one of a list (71 or 72).
    >>> last_number("makes $1,234.50"), last_number(r"2\\frac{1}{2} cm^2"), last_number("1e72")
    (Fraction(2469, 2), Fraction(5, 2), None)"""
    text = text[-2000:]
    for pattern, replacement in TYPESETTING:
        text = re.sub(pattern, replacement, text)
    last = [re.search(r"\Z", text), *re.finditer(ARITHMETIC, text)][-1]         # or nothing
    before, found = text[max(0, last.start() - 40):last.start()], last[0].rstrip(".,")
    multiplied = found == last[0] and re.match(MULTIPLIED, text[last.end():])
    if multiplied or re.search(NOT_ALONE, before):
        return None
    sign = -1 if ("-" in found) != bool(re.search(MINUS, before)) else 1
    if m := re.fullmatch(NUMBER, found):
        return sign * Fraction(m[1].replace(",", ""))
    if (m := re.fullmatch(FRACTION, found)) and int(m[3]):
        return sign * (int(m[1] or 0) + Fraction(int(m[2]), int(m[3])))
    return None

def gsm8k_grade(completion: str, example: dict) -> float:
    """1 if the answer's last number equals the number after #### in the example's answer.
    >>> [gsm8k_grade(x, {"answer": "... #### 72"}) for x in ("<answer>72 eggs</answer>", "27")]
    [1.0, 0.0]"""
    gold = last_number(example["answer"].rsplit("####")[-1])
    return float(gold is not None and last_number(find_answer(completion)[0]) == gold)

def tag_parts(completion: str, example: dict) -> dict:
    """think: the reasoning is closed (the prompt may have opened it); answer: so is its tag."""
    text = text_of(completion)
    return {"think": float("</think>" in text or "</reasoning>" in text),
            "answer": float("</answer>" in text.partition("<answer>")[2])}

def gsm8k_gold(example: dict) -> str:
    """The number after ####."""
    return example["answer"].rsplit("####")[-1].strip()

# --------------------------------------------------------------------------------------- stories
CHAIN = r"[0-9]+(?:[-+][0-9]+=[0-9]+)*[-+][0-9]+=(?:[0-9]+)?"   # the last result may be tagged

def story_gold(example: dict) -> str:
    """A right completion as the tiny model writes it: the chain, its last result in answer tags.
    >>> story_gold({"answer": "27+5=32-3=29\\n#### 29"})
    '27+5=32-3=<answer>29</answer>'"""
    steps, number = example["answer"].partition("####")[0].strip(), gsm8k_gold(example)
    terms = [int(term[:9]) for term in re.findall("(?:^|[-+])[0-9]+", steps)]
    if len(terms) < 2 or chain(terms) != steps or not steps.endswith(f"={number}"):
        raise ValueError("the answer must be a right chain of + and -, no result negative, and its "
                         "last result again, such as 27+5=32-3=29 #### 29 (--skip-bad-examples)")
    return story_answer(steps)

def story_parts(completion: str, example: dict) -> dict:
    """format: 1/2 for reasoning that is a chain of sums, right or wrong + 1/2 for a number between
    answer tags.
    >>> [story_parts(x, {}) for x in ("27+5=<answer>32</answer>", "27+=<answer>32</answer>")]
    [{'format': 1.0}, {'format': 0.5}]"""
    reasoning, _, answer = text_of(completion).partition("<answer>")
    said = re.sub(r"</?(?:think|reasoning)>|\s", "", reasoning)
    closed = re.fullmatch(r"\s*(?:\\boxed\{[0-9]+\}|[0-9]+)\s*</answer>\s*", answer)
    return {"format": (bool(re.fullmatch(CHAIN, said)) + bool(closed)) / 2}

# ------------------------------------------------------------------------------------------ MATH
def math_answer(completion: str) -> str:
    """The answer of a completion; too long a one is cut, and then equal to none."""
    return find_answer(completion)[0][:MATH_CHARS + 1]

def math_value(completion: str, example: dict) -> float:
    """1 if the answer equals the example's in value, in any form.
    >>> [math_value(x, {"answer": r"\\frac{1}{8}"}) for x in ("0.125", "0.1")]
    [1.0, 0.0]"""
    answer = math_answer(completion)
    return float(math_equal(example["answer"], answer, *math_pair(example, answer)))

def math_grade(completion: str, example: dict) -> float:
    """1 if the answer equals the example's, is written in the same form (lowest terms, decimal,
    base) and not copied from the problem. Published tables, comparing strings, ask for the same.
    >>> [math_grade(x, {"answer": r"\\frac{1}{8}", "problem": ""}) for x in ("1/8", "0.125")]
    [1.0, 0.0]"""
    answer = math_answer(completion)
    gold, normal = math_pair(example, answer)
    form = math_form(normal)
    if gold != normal and (form != math_form(gold) or "unreduced" in form
                           or math_copied(example["problem"][:5000], answer)):
        return 0.0
    return math_value(completion, example)

# --------------------------------------------------------------------------------------- prompts
FORMATS = {     # --prompt: (layout that is asked for, how a completion begins, an answer laid out)
    "agrpo": (("First think it through between <think> and </think>. Then give nothing but the "
               "final answer, as {form}, between <answer> and </answer>."),
              "", "<think>{reasoning}</think>\n<answer>{gold}</answer>"),
    "d1": (("Answer in this format:\n<reasoning>\nyour reasoning\n</reasoning>\n"
            "<answer>\n{form}\n</answer>"),
           "<reasoning>", "\n{reasoning}\n</reasoning>\n<answer>\n{gold}\n</answer>")}

def prompt_for(task: str, example: dict, style: str, system_prompt: str = "") -> tuple[str, str]:
    """The user's message, and what the completion begins with. Style "bare" (or none) is the
    statement as the tiny model knows it; `system_prompt` replaces the instructions.
    >>> prompt_for("countdown", {"nums": [3, 4, 2], "target": 14}, "bare")
    ('3,4,2=14', '')"""
    row = TASKS[task]
    if style not in FORMATS:
        return (row.bare or row.question)(example), ""
    layout, begin, _ = FORMATS[style]
    instructions = system_prompt or f"{row.instruction} {layout.format(form=row.marked % row.form)}"
    return f"{instructions}\n\n{row.question(example)}", begin

def gold_completion(task: str, example: dict, style: str) -> str:
    """A right completion in the prompt's layout, for fine-tuning; its reasoning stands before ####.
    >>> gold_completion("gsm8k", {"answer": "2 + 2 = <<2+2=4>>4\\n#### 4"}, "agrpo")
    '<think>2 + 2 = 4</think>\\n<answer>\\\\boxed{4}</answer>'"""
    gold = TASKS[task].gold(example)
    if style not in FORMATS:
        return (TASKS[task].bare_gold or TASKS[task].gold)(example)
    words, marked, _ = str(example.get("answer", "")).partition("####")
    words = re.sub(r"<<.*?>>", "", words).strip() if marked else ""
    return FORMATS[style][2].format(reasoning=words, gold=TASKS[task].marked % gold)

def gold_is_right(task: str, example: dict) -> bool:
    """Whether an example's own answer is graded 1, alone or in a prompt's layout.
    >>> [gold_is_right("countdown", {"nums": [3, 3, 1], "target": t}) for t in (7, 997)]
    [True, False]"""
    if not isinstance(TASKS[task].gold(example), str):
        return False
    return any(grade(task, gold_completion(task, example, style), example) == 1
               for style in ("bare", "agrpo"))

# ---------------------------------------------------------------------------- the table of tasks
@dataclass(frozen=True)
class Task:
    """One row of TASKS. The first three are all that a task with a --data file needs; `generate`
    makes examples up, and with `lazy` the tiny model can begin with them. No function of a
    completion may raise on any text. What is None is looked up at each call."""
    question: Callable[[dict], str]               # example -> the statement in words
    gold: Callable[[dict], str]                   # example -> a right answer
    grade: Callable[[str, dict], float]           # completion, example -> [0, 1], 1 is solved
    instruction: str = "Solve the problem step by step."
    form: str = "the answer"                      # what the prompt says stands there ...
    marked: str = "\\boxed{%s}"                   # ... marked as an answer
    parts: Callable[[str, dict], dict] = lambda text, ex: {}  # of the reward, beside the grade ...
    weights: dict = field(default_factory=lambda: {"correct": 3})    # ... which is "correct"
    answer: Callable[[str], object] = lambda text: find_answer(text)[0] or None    # for the vote
    row: Callable[[dict], dict] = dict            # a row of a data file -> example
    canonical: Callable[[dict], object] | None = None    # equal up to symmetry; None: question
    bare: Callable[[dict], str] | None = None     # the tiny model's statement; None: question
    bare_gold: Callable[[dict], str] | None = None    # its right completion; None: gold
    words: tuple = ()                             # its tokens, no spaces; (): one a character
    beside: tuple[str, Callable] | None = None    # a second grade to report: name, function
    generate: Callable[[int, int, str], list] | None = None    # n, seed, split -> examples
    lazy: Callable[[dict, object], str] | None = None   # the tiny model's first answers
    hub: dict | None = None                       # split -> arguments of datasets.load_dataset

    @property
    def speaks_tiny(self) -> bool:
        """Whether a tiny base model can be made for it."""
        return bool(self.generate and self.lazy)

    def key(self, example: dict):
        """Equal for two examples that are the same but for symmetry."""
        return (self.canonical or self.question)(example)

def text_row(question: str, row: dict) -> dict:
    """A row of a file -> example: a statement, and answer or gold, which may be null."""
    statement = row.get(question, row.get("question"))
    answer = row["answer"] if "answer" in row or "gold" not in row else row["gold"] or ""
    if not {type(statement), type(answer)} <= {str, int, float}:
        raise ValueError(f"{question} and answer must be text")
    return {question: str(statement), "answer": str(answer)}

TASKS = {
    "sudoku": Task(
        instruction="Solve a 4x4 Sudoku. The puzzle is 16 digits, row by row, 0 for an empty cell. "
                    "Every row, every column and every 2x2 box must hold 1, 2, 3 and 4 once each; "
                    "the given digits stay.", form="the 16 digits of the solution",
        question=lambda ex: f"Puzzle: {ex['puzzle']}", bare=lambda ex: ex["puzzle"],
        gold=lambda ex: ex["solution"], grade=sudoku_grade, beside=("cells", sudoku_grade),
        parts=sudoku_parts, weights={"format": 1, "correct": 3}, generate=sudoku_generate,
        answer=lambda text: sudoku_cells(text)[0] or None, row=sudoku_row, lazy=sudoku_lazy,
        canonical=lambda ex: int(sudoku_class([[*map(int, ex["puzzle"])]])[0])),
    "countdown": Task(
        instruction="Find an arithmetic expression that equals the target. Use each of the numbers "
                    "exactly once, the operations +, -, *, / and parentheses, and nothing else.",
        question=lambda ex: f"Numbers: {ex['nums']}\nTarget: {ex['target']}", form="the expression",
        bare=lambda ex: f"{','.join(map(str, ex['nums']))}={ex['target']}", parts=countdown_parts,
        gold=lambda ex: countdown_solve(ex["nums"], ex["target"]), grade=countdown_grade,
        weights={"format": 1, "correct": 3}, row=countdown_row,
        answer=lambda text: find_answer(text)[0].replace(" ", "") or None,
        canonical=lambda ex: (*sorted(ex["nums"]), ex["target"]), generate=countdown_generate),
    "story": Task(
        instruction="Solve the problem as a chain of sums such as 27+5=32-3=29, step by step.",
        question=lambda ex: ex["question"], form="the number", row=partial(text_row, "question"),
        gold=gsm8k_gold, bare_gold=story_gold, grade=gsm8k_grade, parts=story_parts,
        weights={"format": 1, "correct": 3}, answer=lambda text: last_number(find_answer(text)[0]),
        canonical=story_gold, generate=story_generate, lazy=story_lazy,
        words=STORY_WORDS),
    "gsm8k": Task(
        question=lambda ex: ex["question"], form="the number", row=partial(text_row, "question"),
        gold=gsm8k_gold, grade=gsm8k_grade, parts=tag_parts,
        weights={"think": 0.5, "answer": 0.5, "correct": 3},
        answer=lambda text: last_number(find_answer(text)[0]),
        hub={split: ("openai/gsm8k", "main", split) for split in ("train", "test")}),
    "math": Task(
        question=lambda ex: ex["problem"], form="the answer in simplest form",
        gold=lambda ex: ex["answer"], grade=math_grade, beside=("any form", math_value),
        parts=tag_parts, weights={"think": 0.5, "answer": 0.5, "correct": 3},
        answer=lambda text: math_normal(math_answer(text)) or None,
        row=partial(text_row, "problem"), canonical=lambda ex: " ".join(ex["problem"].split()),
        hub={"train": ("nlile/hendrycks-MATH-benchmark", None, "train"),
             "test": ("HuggingFaceH4/MATH-500", None, "test")}),
    "code": Task(
        instruction="Write a Python program.", form="the program", marked="```python\n%s\n```",
        question=programs.code_question, gold=lambda ex: ex["code"], row=programs.code_row,
        grade=lambda text, ex: programs.code_grade(before_end(text), ex),
        parts=lambda text, ex: programs.code_parts(before_end(text), ex),
        answer=lambda text: programs.code_of(before_end(text)) or None,
        weights={"format": 1, "tests": 1, "correct": 2},
        canonical=lambda ex: " ".join(ex["text"].split()),
        hub={"train": ("google-research-datasets/mbpp", "full", "train"),
             "test": ("openai/openai_humaneval", None, "test")}),
    "formula": Task(
        instruction="Find the formula over x, of + - * and numbers, behind these pairs x>result.",
        question=lambda ex: ex["text"], gold=lambda ex: ex["code"], form="the formula",
        grade=lambda text, ex: programs.formula_grade(find_answer(text)[0], ex),
        parts=lambda text, ex: programs.formula_parts(find_answer(text)[0], ex),
        weights={"format": 0.5, "tests": 0.5, "correct": 3}, generate=programs.formula_generate,
        canonical=lambda ex: " ".join(sorted(ex["text"].split())), lazy=programs.formula_lazy,
        words=programs.FORMULA_WORDS)}

def grade(task: str, completion: str, example: dict) -> float:
    """Grade in [0, 1]; 1 is solved. Never raises if the task's own function does not."""
    return float(TASKS[task].grade(completion, example))

def reward_parts(task: str, completion: str, example: dict, weights: dict | None = None) -> dict:
    """The named parts whose sum is the reward; weights: Task.weights, 0 to 4 in all, or these.
    >>> reward_parts("countdown", "3+4+2", {"nums": [3, 4, 2], "target": 14})
    {'format': 1.0, 'correct': 0.0}"""
    row = TASKS[task]
    parts, weights = row.parts(completion, example), weights or row.weights
    if "correct" in weights:
        parts = {**parts, "correct": row.grade(completion, example)}
    if unknown := parts.keys() - weights.keys():
        raise ValueError(f"no weight for the parts {', '.join(unknown)}")
    return {name: weight * parts.get(name, 0.0) for name, weight in weights.items()}

def try_task(task: str, example: dict):
    """Raises BadInput unless a task's functions work on an example, its gold and an empty text."""
    row = TASKS[task]
    try:
        hash(row.key(example))
        if json.loads(json.dumps(example)) != example:
            raise ValueError("an example holds what JSON does not, such as a tuple")
        gold = row.gold(example)
        "".join([gold, row.question(example), (row.bare or row.question)(example)])     # all text
        for completion in (gold, ""):
            reward_parts(task, completion, example)
            row.answer(completion)
            if not 0 <= (value := grade(task, completion, example)) <= 1:
                raise ValueError(f"a grade of {value}, it must be between 0 and 1")
    except Exception as error:                             # of code that is not ours
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise BadInput(f"task {task} does not work on {str(example)[:100]}: {type(error).__name__}:"
                       f" {error} ({at.filename}:{at.lineno})") from None

def overlong(length: int, limit: int, free: float) -> float:
    """DAPO's soft overlong punishment (2503.14476): 0 up to `free` of the limit, 1 at the limit.
    >>> overlong(80, 100, 0.8), overlong(90, 100, 0.8), overlong(100, 100, 0.8)
    (0.0, 0.5, 1.0)"""
    return round(min(1.0, max(0.0, (length / limit - free) / (1 - free))), 9)
