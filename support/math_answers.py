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
                         "×": "\\times ", "·": "\\cdot ", "∪": "\\cup "})
UNIT = (r"(?!.*\b(?:or|and|to|more|less|least|most|than|not|hundred|thousand|million|billion|lakh|"
        r"trillion|dozens?|squared|cubed|remainder|plus|minus|times|over|divided|by|choose|mod|pi|"
        r"factorial|infinity|half|halves|thirds|tenths|sqrt|ln|log|sin|cos|tan|exp|rad|radians?)\b)"
        r"(?:(?:[A-Za-z/]{2,}|[mgshL])\b[\s.]*)+")         # words that do not change a number
MATH_STYLE = (                         # (pattern, replacement) of what does not change an answer
    (r"^.{0,40}?\b(?:[Aa]nswer|[Vv]alue|[Rr]esult)\b(?:\s+is)?\s*:?\s*"         # the answer is
     r"|^[*`=\s]+|(?<![*`\s.])[*`\s.]++$", ""), (r"^\\(?:boldsymbol|mathbf|bm)\s*\{(.*)\}$", r"\1"),
    (r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])|(?<!\\)\\[()\[\]]|\\?\$|\\?%"
     r"|\^\s*\{?\\circ\}?|\\degree", ""), (r"[.,;\s]+$", ""),
    (r"(?<=[0-9])(?:,|\{,\}|,?\\[,!;:])\s*(?=[0-9]{3}(?![0-9]))", ""),          # 58,500
    (r"(?<!\\)\\[,;!: ]|\\q?quad(?![A-Za-z])|~", " "),
    (r"(?:(?<=[0-9}])|(?<=\\pi))\s*(?:\\(?:text|mathrm|mbox|textrm)\s*\{\s*"    # 5 cm^2
     + UNIT + r"\}|(?<=[0-9])\s+" + UNIT + r")(?:\^\{?[0-9]\}?)?[.\s]*$", ""),
    (r"\\(?:text|mathrm|mathbf|textbf|boldsymbol|mbox|textrm)\s*\{([^{}]*)\}", r" \1 "),
    (r"[.,;\s]+$", ""), (r"^\s*(?:\\angle\s*)?(?:[A-Za-z]|[A-Z]{2,3}|\\[a-z]+)"
                         r"(?:_\{?\w+\}?|\(-?\w\))?\s*(?:=|\\in(?![A-Za-z]))", ""),     # f(x) =
    (r"^\s*\(([A-Za-z])\)\s*$", r"\1"), (r"\\[dtc]frac", r"\\frac"),            # (C)
    (r"\\frac\s*([0-9])(?=\s*[0-9{])", r"\\frac{\1}"), (r"\\sqrt\s*([0-9])", r"\\sqrt{\1}"),
    (r"\\frac\s*(\{[^{}]*\})\s*([0-9])", r"\\frac\1{\2}"),
    (r"^\s*(-?[0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)\s*$", r"\1\\frac{\2}{\3}"),     # 1 1/2
    (r"(?<![0-9A-Za-z}.])([0-9]+)\s*/\s*([0-9]+)(?![0-9A-Za-z{.])", r"\\frac{\1}{\2}"),
    (r"(?<![0-9])\.(?=[0-9])", "0."), (r"(\.[0-9]*?)0+(?![0-9])", r"\1"), (r"\.(?![0-9])", ""),
    (r"(?<![0-9])\s+|\s+(?![0-9])", ""))

def math_normal(answer: str) -> str:
    """An answer without what is only typesetting: equal strings are equal answers.
    >>> math_normal(r"x = \\dfrac12"), math_normal("58,500.0"), math_normal(r"36\\text{ inches}")
    ('\\\\frac{1}{2}', '58500', '36')"""
    answer = answer.translate(UNICODE)
    for pattern, replacement in MATH_STYLE:
        answer = re.sub(pattern, replacement, answer.strip())
    return answer

def math_form(normal: str) -> tuple:
    """How a normalised answer is written: the brackets of a list, then its items' forms, sorted:
    decimal, fraction (in lowest terms), unreduced (fraction), base B, word or other.
    >>> math_form("(0.5,2)"), math_form(r"\\frac{3}{24}"), math_form("(x+1)(x-1)")
    (('()', 'decimal', 'decimal'), ('', 'unreduced'), ('', 'other'))"""
    def form(item):
        if m := re.fullmatch(r"[-+]?\\frac\{([-+]?[0-9]+)\}\{([-+]?[0-9]+)\}", item):
            return "fraction" if math.gcd(int(m[1]), int(m[2])) == 1 else "unreduced"
        if m := re.fullmatch(r"[0-9A-F]+_\{?([0-9]+)\}?", item):
            return f"base {m[1]}"
        word = "word" if re.fullmatch("[A-Za-z]{2,}", item) else "other"
        return "decimal" if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?", item) else word
    text = re.sub(r"^\\\{(.*)\\\}$", r"\1", normal)           # a set is the list of its items
    depth = list(itertools.accumulate((c in "([{") - (c in ")]}") for c in text))
    whole = text[:1] in ("(", "[") and 0 not in depth[:-1]           # one bracket around it all
    commas = [i for i, c in enumerate(text) if c == "," and depth[i] == whole]
    whole = whole and commas != []
    cuts = itertools.pairwise([whole - 1, *commas, len(text) - whole])
    return text[0] + text[-1] if whole else "", *sorted(form(text[a + 1:b]) for a, b in cuts)

@lru_cache(100_000)
def math_equal(gold: str, answer: str) -> bool:
    """Whether two LaTeX answers are equal in value. Raises ImportError without math-verify."""
    a, b = math_normal(gold), math_normal(answer)
    labels = {m[1] for x in (gold, answer) if (m := re.match(r"\s*([A-Za-z])\s*=", x))}
    percent = "%" in answer and "%" not in gold and not b.isdecimal()           # 10% may be meant
    if not a or not b or percent or len(labels) > 1 or len(answer) > MATH_CHARS:
        return False                                       # y = x + 1 is not x = x + 1
    if a == b:
        return True
    braces = re.sub(r"\\[{}]|[^{}]", "", answer)
    while "{}" in braces:
        braces = braces.replace("{}", "")
    if braces or "boxed" in answer or not answer.isprintable():
        return False                                       # it would close the box it is put in
    (bracket, *forms), (other, *others) = math_form(a), math_form(b)
    if forms == others == ["decimal"]:                     # math-verify rounds ...
        return Fraction(a.strip(r"\{}")) == Fraction(b.strip(r"\{}"))
    if "word" in forms + others:                           # ... multiplies the letters of words
        return a.lower() == b.lower()
    bases = forms != others and forms[0][:4] == others[0][:4] == "base"        # ... leaves them out
    letters = [set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", x))) for x in (a, b)]
    if bases or bracket != other or len(forms) != len(others) or letters[0] != letters[1]:
        return False                                       # ... takes a pair for a set, K for k
    return verifier.equal(a, b)

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
    from math_verify import parse, verify
    from resource import RLIMIT_DATA, getrlimit, setrlimit
    with suppress(ValueError, OSError):                    # 4 GB, where the system can limit it
        setrlimit(RLIMIT_DATA, (4 * 2**30, getrlimit(RLIMIT_DATA)[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(int(sys.argv[1]))
        verdict = 0
        with suppress(Exception):                          # whatever sympy makes of a string
            a, b = (parse(f"\\boxed{{{x}}}", parsing_timeout=None) for x in json.loads(line))
            verdict = int(verify(a, b, float_rounding=12, timeout_seconds=None))
        signal.alarm(0)
        print(verdict, flush=True)
