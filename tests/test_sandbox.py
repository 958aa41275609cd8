"""Programs in the sandbox: what is right passes, no trick does, nothing is left behind.
Run: pytest tests/test_sandbox.py"""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import sandbox

MARK, COMMAND = f"mark-{os.getpid()}", sandbox.command         # on our programs' command lines
LEVELS = {"bubblewrap": sandbox.bubblewrapped, "limits": sandbox.limited}
TESTS = ["for y, z in zip([3, 5], map(f, [1, 2])): assert y == z\nassert f(1) == 3",
         "x = f(4)\nassert x == 9 and not x != 9 and x + 1 == 10"]
RIGHT = "def f(x):\n    return 2 * x + 1"


@pytest.fixture(params=LEVELS, scope="module")
def tester(request):
    """A process that holds tests, with the programs at one level."""
    if request.param == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    start = [*LEVELS[request.param](), MARK]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "command", lambda: start)
        found = sandbox.Tester()
        assert found.verdicts(RIGHT, TESTS) == [True, True]
        yield found
        found.process.kill()
        found.process.communicate()


EXPECTS = "try:\n    f(1)\nexcept Exception: pass\nelse: raise OSError"
ANY = "class Any(int):\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n"
HACKS = {  # none passes a test; {place} is a file that must stay as it is
    "exit": "exit()",
    "os._exit": "import os\nos._exit(0)",
    "exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "equal to all": ANY + "def f(x): return Any()",
    "object equal to all": "class A:\n    def __eq__(s, o): return True\ndef f(x): return A()",
    "text equal to all": "class S(str):\n    __eq__ = lambda s, o: True\ndef f(x): return S('1')",
    "assertions that are none": "import builtins\nbuiltins.AssertionError = OSError\nf = int",
    "errors swallowed": "import sys\nsys.excepthook = print\ndef f(x): raise AssertionError",
    "printed verdict": "print('[true, true]', flush=True)\ndef f(x): return 1",
    "verdict in every pipe": "import os, sys\nw = sys._getframe(1).f_locals['write']\n"
                             "for fd in range(20):\n    try: w(fd, b\"('value', 3)\\n[true]\\n\")\n"
                             "    except OSError: pass\ndef f(x): return 1",
    "the library's write": "import os\nos.write(1, b'[true, true]')\ndef f(x): return 1",
    "loop": "while True: pass",
    "loop in the call": "def f(x):\n    while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "lock": "import _thread\nl = _thread.allocate_lock()\nl.acquire(); l.acquire()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb by posix": "import posix\nwhile True: posix.fork()",
    "subprocess": "import subprocess\nsubprocess.Popen(['sleep', '1234'])\ndef f(x): return 1",
    "system": "import os\nos.system('sleep 1234 &')\ndef f(x): return 1",
    "multiprocessing": "import multiprocessing as m\nm.Process(target=print).start()",
    "threads": "import threading as t\nfor i in range(9999): t.Thread(target=exec, args=('while 1: "
               "0',)).start()",
    "a gigabyte printed": "for i in range(1000): print('x' * 10**6)\ndef f(x): return 1",
    "a gigabyte returned": "def f(x): return 'x' * 10**9",
    "memory": "x = []\nwhile True: x.append(bytearray(10**7))",
    "tests on the command line": "import os\nfor p in os.listdir('/proc'):\n"
                                 "    open(f'/proc/{p}/cmdline').read()\ndef f(x): return 1",
    "the parent's memory": "import os\nopen('/proc/self/mem', 'rb').read(1)\ndef f(x): return 1",
    "the harness edited": f"open({str(Path(sandbox.__file__))!r}, 'a').write('x')",
    "delete": "import os\nos.remove('{place}')",
    "delete a tree": "import shutil\nshutil.rmtree('{folder}')",
    "rename": "import os\nos.rename('{place}', '{place}2')",
    "fifo": "import os\nos.mkfifo('{place}2')",
    "truncate": "import os\nos.truncate('{place}', 0)",
    "chmod": "import os\nos.chmod('{place}', 0)",
    "link": "import os\nos.symlink('/etc', '{place}2')",
    "pathlib": "import pathlib\npathlib.Path('{place}').write_text('x')",
    "FileIO": "import _io\n_io.FileIO('{place}', 'w').write(b'x')",
    "a path that lies": "class P(str):\n    def startswith(s, *a): return True\n"
                        "    def __contains__(s, x): return False\nopen(P('{place}'), 'w')",
    "builtins that lie": "import builtins\nbuiltins.type = lambda *a: str\nbuiltins.str = object\n"
                         "open('{place}', 'w')",
    "variables of the hook": "try: open('{place}', 'w')\nexcept PermissionError as e:\n"
        "    t = e.__traceback__\n    while t.tb_next: t = t.tb_next\n"
        "    for k in ('library', 'events', 'never', 'changing'):\n"
        "        t.tb_frame.f_locals[k] = {'library': ('/',), 'changing': 0}.get(k, frozenset())\n"
        "open('{place}', 'w')",
    "posix anew": "import sys\ndel sys.modules['posix']\nimport posix\nposix.remove('{place}')",
    "posix made anew": "import _imp\nclass S: pass\ns = S()\ns.name, s.origin = 'posix', None\n"
                       "_imp.create_builtin(s).mkfifo('{place}2')",
    "a module by another name": "import _imp, sys\nclass S: pass\ns = S()\ns.name = 'a._ctypes'\n"
                                "s.origin = sys.path[2] + '/_ctypes.so'\n_imp.create_dynamic(s)",
    "functions in a set": "import os\n{f.__name__: f for f in os.supports_dir_fd}['mkfifo']("
                          "'{place}2')",
    "Tcl": "import _tkinter\n_tkinter.create(None, '', 'T', 0, 1, 0, 0, None).eval('exec mkdir "
           "{place}2')",
    "no more of them": "def f(x): raise StopIteration",
    "ctypes": "import ctypes\nctypes.CDLL(None).unlink(b'{place}')",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "limits raised": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))\n"
                     "while True: pass",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 22))\ndef f(x): return 1",
    "objects of others": "import gc\ngc.get_objects()\ndef f(x): return 1",
    "exit, of which a test expects an error": "import sys\ndef f(x): sys.exit(1)",
    "Ctrl-C": "def f(x): raise KeyboardInterrupt",
    "too much, where an error is expected": "def f(x): return 'x' * 10**7",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "a list in a list in ...": "def f(x):\n    y = []\n    for i in range(10**5): y = [y]\n"
                               "    return y",
    "no end of values": "class I:\n    __iter__ = lambda s: s\n    __next__ = lambda s: 1\n"
                        "def f(x): return I()",
    "an attribute for all": "class A:\n    def __getattr__(s, n): return 3\ndef f(x): return A()",
    "no Python": "def f(x) return 3",
    "half a letter": "def f(x): return '\\ud800'",
}


def processes():
    """What still runs, after three seconds at most, of our programs or of what they may have left;
    not the process with tests."""
    for _ in range(30):
        lines = subprocess.run(["ps", "axwwo", "args"], capture_output=True, text=True).stdout
        found = [line for line in lines.split("\n")
                 if MARK in line and str(sandbox.__file__) not in line or line == "sleep 1234"]
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.mark.parametrize("name", HACKS)
def test_no_trick_passes_a_test_or_leaves_anything(name, tester, tmp_path):
    place, clock = tmp_path / "precious", time.time()
    place.write_text("years of work")
    harness = Path(sandbox.__file__).read_bytes()
    program = HACKS[name].replace("{place}", str(place)).replace("{folder}", str(tmp_path))
    assert tester.verdicts(program, TESTS if "expect" not in name else [EXPECTS] * 2) == [
        False, False]
    assert time.time() - clock < sandbox.SECONDS + 10          # 5, on a machine that is not busy
    assert os.listdir(tmp_path) == ["precious"] and place.read_text() == "years of work"
    assert place.stat().st_mode & 0o777 and Path(sandbox.__file__).read_bytes() == harness
    assert not processes()
    assert tester.verdicts(RIGHT, TESTS) == [True, True]       # and the next one is not harmed


@pytest.mark.parametrize("program, test", [
    ("import collections, heapq, math, re, itertools, functools, bisect, string, typing, random, "
     "datetime, decimal, fractions, statistics, copy, operator, cmath, sys, os, hashlib, enum, "
     "dataclasses, textwrap, json, queue\ndef f(): return collections.Counter('abb')",
     "assert f() == {'a': 1, 'b': 2}"),
    ("def f(): return (1.5, float('inf'), 1 + 2j, None, True, b'x', {1, 2}, frozenset('a'))",
     "assert f() == (1.5, float('inf'), 1 + 2j, None, True, b'x', {1, 2}, frozenset('a'))"),
    ("def f(x): return map(str, x)", "assert list(f([1, 2])) == ['1', '2'] and f([1]) != ['1']"),
    ("def f(): return {1: [2]}.items(), range(3)", "a, b = f()\nassert b == range(3)"),
    ("def f(): return 10 ** 5000", "assert f() == 10 ** 5000"),
    ("def f(x): return x['nan'] != x['nan']", "assert f({'nan': float('nan')})"),
    ("class Node:\n    def __init__(self, v): self.v, self.left = v, None\n"
     "def depth(n): return 1 + depth(n.left) if n else 0",
     "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2 and root.left.v == 2"),
    ("def f(x): raise KeyError(x)", "try:\n    f(1)\n    raise OSError\nexcept KeyError: pass"),
    ("def poly(xs, x): return 0\ndef zero(xs): return -xs[0] / xs[1]",
     "def poly(xs, x): return sum(c * x ** i for i, c in enumerate(xs))\n"
     "def check(g): assert abs(poly([1, 2], g([1, 2]))) < 1e-9\ncheck(zero)"),
    ("def sum(a, b): return a + b", "assert sum(1, 2) == 3"),
    ("from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass P:\n"
     "    x: int\n    next: 'P' = None\ndef f(): return P(1, P(2))", "assert f().next.x == 2"),
    ("class Own(ValueError): pass\ndef f(): raise Own",
     "try:\n    f()\n    raise OSError\nexcept ValueError: pass"),
    ("import decimal, fractions\ndef f(): return decimal.Decimal('0.1'), fractions.Fraction(1, 3)",
     "import decimal, fractions\nassert f() == (decimal.Decimal('0.1'), fractions.Fraction(1, 3))"),
    ("import collections\ndef f(): return collections.deque([1, {2}]), bytearray(b'ab')",
     "import collections\nassert f() == (collections.deque([1, {2}]), bytearray(b'ab'))"),
    ("import enum\nclass Colour(enum.Enum):\n    RED, BLUE = 1, 2\ndef f(x): return Colour.RED",
     "assert f(1) == Colour.RED and f(1) != Colour.BLUE and f(1).name == 'RED'"),
    ("def f(xs, kind): return [x for x in xs if not isinstance(x, kind)], type(xs)",
     "assert f([1, 'a', 2.5], int) == (['a', 2.5], list) and f((1,), (str, int)) == ([], tuple)"),
    ("def push(q, x): q.append(x); return q\ndef size(q): return len(q)\ndef total(*x): "
     "return sum(x, x[0] - x[0])\ndef most(c): return c.most_common(1)",
     "from collections import Counter, deque\nfrom decimal import Decimal\n"
     "from fractions import Fraction\nassert size(push(deque([1]), 2)) == 2\n"
     "assert total(Decimal('1.10'), Decimal('2.20')) == Decimal('3.30')\n"
     "assert total(Fraction(1, 3), 1) == Fraction(4, 3) and most(Counter('aab')) == [('a', 2)]"),
    ("class Fraction:\n    numerator = 7\n    def whole(s): return 3\ndef f(): return Fraction()",
     "assert f().whole() == 3 and f().numerator == 7"),
    ("class Box:\n    def __init__(s, *x): s.x = x\n    def __len__(s): return len(s.x)\n"
     "    def __getitem__(s, i): return s.x[i]\n    def __iter__(s): return iter(s.x)\n"
     "    def __eq__(s, o): return s.x == o.x",
     "box = Box(1, 2)\nassert len(box) == 2 and box[1] == 2 and [*box] == [1, 2] and not Box()\n"
     "assert box == Box(1, 2) and box != Box(2, 1) and box != (1, 2) and box in [Box(1, 2)]"),
    ("from collections import Counter, OrderedDict\n"
     "def f(x): return Counter(x), OrderedDict(a=1, b=2)",
     "from collections import OrderedDict\nc, d = f('aab')\nassert c['z'] == 0 and c == {'a': 2, "
     "'b': 1}\nassert d == OrderedDict(a=1, b=2) != OrderedDict(b=2, a=1)"),
    ("class P: pass\ndef f(n): return [P() for i in range(n)]", "assert len(f(20000)) == 20000"),
    ("N = 3", "assert N == 3"), ("print('hello')\ndef f(): return input", "f()")],
    ids=["library", "values", "iterator", "views", "long", "nan", "objects", "error", "check",
         "sum", "dataclass", "own error", "fractions", "deque", "enum",
         "types", "arguments", "own fraction", "box", "counter", "many objects", "constant",
         "prints"])
def test_what_is_right_passes(program, test, tester):
    assert tester.verdicts(program, [test, "assert False"]) == [True, False]


@pytest.mark.parametrize("word", ["eval", "exec", "open", "type", "object", "__loader__"])
@pytest.mark.parametrize("how", ["by the table of types", "by the pipe"])
def test_no_function_comes_out_of_a_program(word, how, tester, tmp_path):
    """It says plain values and plain types: what else, the tests would call outside."""
    place = str(tmp_path / "place")
    program = ("import sys\nf = sys._getframe(1)\nf.f_locals['write'](f.f_locals['out'],"
               " b'(\"value\", None)\\n(\"value\", (\"type\", \"WORD\"))\\n')")
    if how == "by the table of types":
        program = "import __main__\nclass decode: pass\n__main__.TYPES[decode] = 'WORD'"
    tests = [f"decode({f'open({place!r}, chr(119))'!r})", f"decode({place!r}, 'w')"]
    assert tester.verdicts(program.replace("WORD", word), tests) == [False, False]
    assert not os.listdir(tmp_path)


def test_what_a_program_leaves_in_the_tester_is_let_go(tester):
    """Objects that bear the number of a whole text; then the next program has all the memory."""
    flood = ("import sys\nf0 = sys._getframe(1).f_locals\ndef f(n):\n"
             "    f0['write'](f0['out'], b\"('value', ('object', 'x%d\" % n + b'x' * 900000 + "
             "b\"'))\\n\")")
    for _ in range(2):
        tester.verdicts(flood, ["for i in range(10**6):\n    try: f(i)\n    except TypeError: 0"])
    right = "def g(n): return list(range(n))"
    assert tester.verdicts(right, ["assert len(g(130000)) == 130000"]) == [True]


def test_each_test_has_a_verdict_of_its_own(tester):
    assert tester.verdicts(RIGHT, ["assert f(1) == 3", "assert f(2) == 6", "assert g(1)", "f("]
                           ) == [True, False, False, False]


def test_a_test_that_never_ends_is_ended_with_its_program(tester):
    clock = time.time()
    assert tester.verdicts(RIGHT, ["while True: f(1)", "assert f(1) == 3"]) == [False, False]
    assert time.time() - clock < sandbox.SECONDS + 5 and not processes()
    assert tester.verdicts(RIGHT, TESTS) == [True, True]


def test_a_tester_that_hangs_is_ended_with_its_program(tester, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", -4)                # of the parent: one second in all
    assert tester.verdicts("def f(x):\n    while True: pass", ["f(1)"]) == [False]
    monkeypatch.undo()
    assert not processes() and tester.verdicts(RIGHT, TESTS) == [True, True]


def test_a_tester_that_was_ended_is_replaced_and_asked_again(tester):
    for _ in range(3):
        assert tester.verdicts(RIGHT, TESTS) == [True, True]
        os.kill(tester.process.pid, 9)
        assert tester.verdicts(RIGHT, TESTS) == [True, True]


def test_what_comes_without_the_token_is_no_verdict(tester, monkeypatch):
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda n: float("nan"))  # equal to none
    assert tester.verdicts(RIGHT, TESTS) == [False, False]


def test_many_threads_take_turns_and_what_is_known_is_not_run_again(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor
    monkeypatch.setattr(sandbox, "command", sandbox.limited)
    testers, tests = sandbox.Testers(), tuple(TESTS)
    wrong = RIGHT.replace("+ 1", "+ 2")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda program: testers.passed(program, tests), [RIGHT, wrong] * 8))
    assert found == [(True, True), (False, False)] * 8
    monkeypatch.setattr(sandbox.Tester, "verdicts", None)
    assert testers.passed(RIGHT, tests) == (True, True)


def test_it_says_which_kind_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    assert COMMAND.__wrapped__() == sandbox.limited()
    assert "with bubblewrap (bwrap) installed" in capsys.readouterr().out
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: "bwrap")
    monkeypatch.setattr(sandbox, "bubblewrapped", lambda: [sys.executable, "-c", "1/0"])
    assert COMMAND.__wrapped__() == sandbox.limited()          # it is there, and does not work
