"""MATH: what an answer is without its typesetting, how it is written, whether two are equal.
math-verify may compute forever (9^{9^{9^9}}), so it runs in a process of its own: this file."""
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache

MATH_LIMIT, MATH_CHARS = 5, 500        # seconds for one comparison; characters of an answer
UNICODE = str.maketrans({"−": "-", "–": "-", "°": "", "∞": "\\infty ", "π": "\\pi ", "√": "\\sqrt ",
                         "×": "\\times ", "·": "\\cdot ", "∪": "\\cup ", "±": "\\pm "})
TEXT = (r"\\(?:text(?!style)[a-z]*|math(?:rm|bf|it|sf|tt|normal)|[mh]box|emph|boldsymbol|bm"
        r"|operatorname)\s*")
UNIT = (r"(?!.*\b(?:or|and|to|more|less|least|most|than|not|hundred|thousand|million|billion|lakh|"
        r"trillion|dozens?|squared|cubed|remainder|plus|minus|times|over|divided|by|choose|mod|pi|"
        r"factorial|infinity|half|halves|thirds|tenths|sqrt|ln|log|sin|cos|tan|exp|rad|radians?|"
        r"base|binary|ternary|octal|hex(?:adecimal)?)\b)"
        r"(?:(?:[A-Za-z/]{2,}|[mgshL])\b[\s.]*)+")         # words that do not change a number
WHOLE_STYLE = (                        # (pattern, replacement) of what does not change an answer
    (r"^.{0,40}?\b(?:[Aa]nswer|[Vv]alue|[Rr]esult)\b(?:\s+is)?\s*:?\s*"         # the answer is
     r"|^[*`=\s]+|(?<![*`\s.])[*`\s.]++$", ""),
    (r"\{\s*\\(?:rm|bf|it|sf|tt|em)(?![A-Za-z])", r"\\text{"),                  # {\rm miles}
    ("^" + TEXT + r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}$", r"\1"),
    (r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])|(?<!\\)\\[()\[\]]|\\?\$|\\?%"
     r"|\^\s*\{?\\circ\}?|\\(?:text)?degree", ""),
    (r"(?<=[0-9])(?:\{,\}|,?\\!|\\[,;:])\s*(?=[0-9]{3}(?![0-9]))", ""),         # 58{,}500
    (r"(?<!\\)\\[,;!: ]|\\q?quad(?![A-Za-z])|~", " "),
    (r"\\l(?:e|eq|eqq|eqslant)(?![A-Za-z])|<=", "≤"), (r"\\lt(?![A-Za-z])", "<"),
    (r"\\g(?:e|eq|eqq|eqslant)(?![A-Za-z])|>=", "≥"), (r"\\gt(?![A-Za-z])", ">"),
    (r"[(\[]\s*\\begin\{(?:array|(?:small)?matrix)\}(?:\s*\{[clr| ]*\})?(.*?)"  # not a determinant
     r"\\end\{(?:array|(?:small)?matrix)\}\s*[)\]]", r"\\begin{pmatrix}\1\\end{pmatrix}"),
    (r"(\\(?:begin|end)\{)[bB]matrix\}", r"\1pmatrix}"),
    (rf"(?:,\s*+)?(?:{TEXT}\{{\s*(?:or|and)\s*\}}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z]))\s*", ","))
ITEM_STYLE = (                         # ... of an item of a list
    (rf"(?:(?<=[0-9}}])|(?<=\\pi))\s*(?:{TEXT}\{{\s*"                           # 5 cm^2
     rf"{UNIT}\}}|(?<=[0-9])\s+{UNIT})(?:\^\{{?[0-9]\}}?)?[.\s]*$", ""),
    (TEXT + r"\{([^{}]*)\}", r" \1 "), (r"[.,;\s]+$", ""))
NAME = r"(?:[A-Za-z]|[A-Z]{2,3}|\\[a-z]+)(?:_\{?\w+\}?|\(-?\w\))?"
LABEL = rf"^\s*(?:\\angle\s*)?({NAME}|\(\s*{NAME}(?:\s*,\s*{NAME})+\s*\))\s*(?:=|\\in(?![A-Za-z]))"
NUMBER_STYLE = (                       # ... without its label
    (r"^\s*\\\{((?:(?!\\[{}]).)*)\\\}\s*$", r"\1"),        # a set is the list of its items
    (r"^\s*\(([A-Za-z])\)\s*$", r"\1"), (r"\\[dtc]frac", r"\\frac"),            # (C)
    (r"(?<![\\A-Za-z])(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln)(?=[ (])", r"\\\g<0>"),
    (r"\\frac\s*([0-9])(?=\s*[0-9{])", r"\\frac{\1}"), (r"\\sqrt\s*([0-9])", r"\\sqrt{\1}"),
    (r"\\frac\s*(\{[^{}]*\})\s*([0-9])", r"\\frac\1{\2}"),
    (r"(?<![0-9A-Za-z}.])([0-9]+)\s*/\s*([0-9]+)(?![0-9A-Za-z{.])", r"\\frac{\1}{\2}"),
    (r"(?<![0-9])\.(?=[0-9])", "0."), (r"(\.[0-9]*?)0+(?![0-9])", r"\1"), (r"\.(?![0-9])", ""),
    (r"(\\[A-Za-z]+\s)\s*(?=[A-Za-z])|(?<![0-9])\s+|\s+(?![0-9])", r"\1"))      # \cot x
THOUSANDS = r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])"
ASKS_FOR_A_LIST = (
    r"(?is)separated by (?:a )?comma|comma.separated|^(?!.*\bhow many\b).*"
    r"\b(?:enter|find|give|list|name|state|determine|compute|what are) "
    r"(?:all|both|the (?:\w+ )?(?:roots|zeroe?s|solutions|values))\b")

def styled(text: str, patterns: tuple) -> str:
    """The text with all patterns replaced, one after the other."""
    for pattern, replacement in patterns:
        text = re.sub(pattern, replacement, text.strip())
    return text

def depths(text: str) -> list[int]:
    """How many brackets are open after each character."""
    return list(itertools.accumulate((c in "([{") - (c in ")]}") for c in text))

def cut(text: str, separator: str) -> tuple[str, list[str]]:
    """The separators outside of brackets, joined, and the pieces between them.
    >>> cut("(1,2),3", ","), cut("1<x<2", "<")
    ((',', ['(1,2)', '3']), ('<<', ['1', 'x', '2']))"""
    depth = depths(text)
    found = [m for m in re.finditer(separator, text) if not depth[m.start()]]
    ends = [0, *(end for m in found for end in m.span()), len(text)]
    return "".join(m[0] for m in found), [text[a:b] for a, b in zip(ends[::2], ends[1::2])]

def math_normal(answer: str, listed: bool = False) -> str:
    """An answer without what is only typesetting: equal strings are equal answers. In brackets, or
    where a list is meant, a comma between digits is no thousands separator.
    >>> math_normal(r"x = \\dfrac12"), math_normal("58,500.0"), math_normal(r"36\\text{ inches}")
    ('\\\\frac{1}{2}', '58500', '36')
    >>> math_normal("x=1 or x=100"), math_normal("1,100", listed=True), math_normal("x > 2")
    ('1,100', '1,100', '2<x')"""
    text = styled(answer.translate(UNICODE), WHOLE_STYLE)
    depth = depths(text)
    if not listed:
        text = re.sub(THOUSANDS, lambda m: m[0].replace(",", "" if not depth[m.start()] else ","),
                      text)
    items = [styled(item, ITEM_STYLE) for item in cut(text, ",")[1]]
    labels = {m[1].split("_")[0] for item in items if (m := re.match(LABEL, item))}
    for i, item in enumerate(items):                       # x = 1, y = 2 is not 2, 1
        item = styled(re.sub(LABEL, "", item) if len(labels) < 2 else item, NUMBER_STYLE)
        signs, sides = cut(item, "[<>≤≥]")
        if signs and not set(signs) & {"<", "≤"}:          # x > 2 is 2 < x
            signs = signs[::-1].translate({ord(">"): "<", ord("≥"): "≤"})
            item = "".join(map("".join, itertools.zip_longest(sides[::-1], signs, fillvalue="")))
        items[i] = item
    return ",".join(items)

def math_pair(example: dict, answer: str) -> tuple[str, str]:
    """Gold and answer, normalised. 1,100 is a list where the problem asks for one, and an answer
    also where the gold is surely one; else it is a number: of a gold alone nobody can tell.
    >>> math_pair({"answer": "1,100", "problem": "Find all roots."}, "1100")
    ('1,100', '1100')
    >>> math_pair({"answer": "1,100"}, "1100"), math_pair({"answer": "100,1"}, "1,100")
    (('1100', '1100'), ('100,1', '1,100'))"""
    gold, asked = example["answer"], bool(re.search(ASKS_FOR_A_LIST, example.get("problem", "")))
    normal = math_normal(gold, asked)
    return normal, math_normal(answer, asked or "," in cut(normal, ",")[0])

def math_parts(normal: str) -> tuple[str, list[str]]:
    """What holds the parts of a normalised answer together, "" for a list, and the parts: of a
    tuple or interval, list, matrix, union or chain of inequalities; else itself.
    >>> math_parts("(0.5,2]"), math_parts("1,2"), math_parts("5≤x"), math_parts("7")
    (('(]', ['0.5', '2']), ('', ['1', '2']), ('≤', ['5', 'x']), ('', ['7']))"""
    m = re.fullmatch(r"\\begin\{pmatrix\}(.*?)(?:\\\\)?\\end\{pmatrix\}", normal)
    if m and "\\begin" not in m[1]:
        rows = [row.split("&") for row in m[1].split("\\\\")]
        return f"matrix {[*map(len, rows)]}", sum(rows, [])
    if normal[:1] in ("(", "[") and 0 not in depths(normal)[:-1]:    # one bracket around it all
        commas, items = cut(normal[1:-1], ",")
        return (normal[0] + normal[-1], items) if commas else ("", [normal])
    for separator in (",", r"\\cup(?![A-Za-z])", "[<>≤≥]"):
        found, items = cut(normal, separator)
        if found:
            return "" if separator == "," else found, items
    return "", [normal]

DECIMAL = r"[-+]?[0-9]+(?:\.[0-9]+)?"
BASE = r"([-+]?[0-9A-F]+|\([0-9A-F]+\))_(?!\{?10\b)\{?(.+?)\}?"

def math_form(normal: str) -> tuple:
    """How a normalised answer is written: what holds its parts, then the parts' forms, sorted:
    decimal, fraction (in lowest terms), unreduced (fraction), base B, word or other.
    >>> math_form("(0.5,2)"), math_form(r"\\frac{3}{24}"), math_form("(x+1)(x-1)")
    (('()', 'decimal', 'decimal'), ('', 'unreduced'), ('', 'other'))"""
    def form(item):
        if m := re.fullmatch(r"[-+]?\\frac\{([-+]?[0-9]+)\}\{([-+]?[0-9]+)\}", item):
            return "fraction" if math.gcd(int(m[1]), int(m[2])) == 1 else "unreduced"
        if m := re.fullmatch(BASE, item):
            return f"base {m[2]}"
        word = "word" if re.fullmatch("[A-Za-z]{2,}", item) else "other"
        return "decimal" if re.fullmatch(DECIMAL, item) else word
    kind, parts = math_parts(normal)
    return kind, *sorted(map(form, parts))

def math_copied(problem: str, answer: str) -> bool:
    """Whether an answer that something is to be done with stands in the problem.
    >>> [math_copied("Simplify $1 + x - 1$.", answer) for answer in ("1+x-1", "x")]
    [True, False]"""
    problem, answer = (styled(text.translate(UNICODE), WHOLE_STYLE + NUMBER_STYLE)
                       for text in (problem, answer))
    return bool(re.search(r".[-+*/^]|\\", answer)) and answer in problem

@lru_cache(100_000)
def math_equal(gold: str, answer: str, a: str, b: str) -> bool:
    """Whether two LaTeX answers, normalised to a and b, are equal in value. Raises ImportError
    without math-verify."""
    label = r"\s*([A-Za-z]|\([A-Za-z](?:,\s?[A-Za-z])+\))\s*="
    labels = {m[1] for x in (gold, answer) if (m := re.match(label, x))}
    percent = "%" in answer and "%" not in gold and not b.isdecimal()           # 10% may be meant
    if not a or not b or percent or len(labels) > 1 or len(answer) > MATH_CHARS:
        return False                                       # y = x + 1 is not x = x + 1
    if a == b:
        return True
    braces = [0, *depths(re.sub(r"\\[{}]|[^{}]", "", answer))]
    if min(braces) < 0 or braces[-1] or "boxed" in answer or not b.isprintable():
        return False                                       # it would close the box it is put in
    return verifier.equal(a, b)

def equal(a: str, b: str) -> bool:
    """Whether two normalised answers are equal in value, part by part: math-verify takes a pair for
    a set, and rounds. Lists, sets and unions in any order; ± stands for two items."""
    def parts_of(text):
        kind, parts = math_parts(text)
        return kind, parts if kind else [x for part in parts for x in dict.fromkeys(
            part.replace("\\pm", one).replace("\\mp", two) for one, two in ("+-", "-+"))]
    (kind, parts), (other, others) = parts_of(a), parts_of(b)
    if kind != other or len(parts) != len(others):
        return False
    if len(parts) == 1:
        return a == b or equal_numbers(a, b)
    if kind and "\\cup" not in kind:
        return all(map(equal, parts, others))
    for part in parts:
        found = next((x for x in others if equal(part, x)), None)
        if found is None:
            return False
        others.remove(found)
    return True

def equal_numbers(a: str, b: str) -> bool:
    """Whether two answers without parts are equal in value, by math-verify and, because it rounds
    what is small, relatively: 2^{-55} is not 2^{-56}."""
    from math_verify import parse, verify
    from sympy import Expr, Float, N, Rational, simplify
    if re.fullmatch(DECIMAL, a) and re.fullmatch(DECIMAL, b):
        return Fraction(a) == Fraction(b)
    based, other = re.fullmatch(BASE, a), re.fullmatch(BASE, b)
    if based or other:                                     # the problem may name the gold's base
        return bool(based) and based.groups() == (other.groups() if other else (b, based[2]))
    if any(re.fullmatch("[A-Za-z]{2,}", x) for x in (a, b)):         # it multiplies their letters
        return a.lower() == b.lower()
    letters = [set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", x))) for x in (a, b)]
    if letters[0] != letters[1]:                           # it takes K for k
        return False
    a, b = (parse(f"\\boxed{{{x}}}", parsing_timeout=None) for x in (a, b))
    if isinstance(a[0], Expr) and isinstance(b[0], Expr):
        names = sorted(a[0].free_symbols | b[0].free_symbols, key=str)
        at = {name: Rational(i + 17, 13) for i, name in enumerate(names)}
        x, y = (side.doit().subs(at) for side in (a[0], b[0]))
        error = 1e-12 if x.has(Float) or y.has(Float) else Rational(1, 10**50)
        if not (x.is_Rational and y.is_Rational):          # (what is rational is exact)
            x, y = N(x, 60), N(y, 60)
        elif x != y:
            return False
        if (x - y).is_number and (x - y).is_finite:
            close = abs(x - y) <= error * max(abs(x), abs(y)) or simplify(a[0] - b[0]) == 0
            if not close or not names:
                return bool(close)
    return verify(a, b, float_rounding=12, timeout_seconds=None)

class Verifier:
    """math-verify in a process of its own, which an alarm ends when a comparison takes too long,
    whatever it computes; the next one starts another. Threads take turns."""
    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def stop(self):
        """Whatever the process is doing."""
        if self.process:
            self.process.kill()
            self.process.communicate()

    def equal(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds, in time, that two are equal in value."""
        pipe, verdict = subprocess.PIPE, ""
        with self.lock:
            try:
                if not self.process or self.process.poll() is not None:
                    self.process = subprocess.Popen(       # in a session of its own: no Ctrl-C
                        [sys.executable, "-P", __file__, str(MATH_LIMIT)], stdin=pipe, stdout=pipe,
                        stderr=subprocess.DEVNULL, text=True, start_new_session=True)
                    if self.process.stdout.readline() != "ready\n":
                        raise ImportError("math-verify is missing: pip install -r requirements.txt")
                print(json.dumps([gold, answer]), file=self.process.stdin, flush=True)
                verdict = self.process.stdout.readline()
            finally:
                if not verdict:                            # or it would answer the next question
                    self.stop()
        return verdict == "1\n"

verifier = Verifier()
os.register_at_fork(after_in_child=verifier.__init__)      # pipes and lock are the parent's

if __name__ == "__main__":             # the process: answers a line [gold, answer] with 1 or 0
    import math_verify  # noqa: F401
    from resource import RLIMIT_DATA, getrlimit, setrlimit
    with suppress(ValueError, OSError):                    # 4 GB, where the system can limit it
        setrlimit(RLIMIT_DATA, (4 * 2**30, getrlimit(RLIMIT_DATA)[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(int(sys.argv[1]))
        verdict = 0
        with suppress(Exception):                          # whatever sympy makes of a string
            verdict = int(equal(*json.loads(line)))
        signal.alarm(0)
        print(verdict, flush=True)
