"""Runs programs that nobody has read, and tells which of their tests they pass.

Two processes. A program runs in a sandbox (support/inside.py) and is only asked for values: it sees
neither a test nor what is expected. The tests run outside, on plain values: no name that a program
redefines, no text that it prints, no way of ending passes one. What goes into a call must be
plain, too (or a built-in type), and is copied: a test that looks at an argument again sees it
unchanged. A program that takes more than SECONDS or MEMORY, all its tests included, is killed.

With bubblewrap (apt install bubblewrap) the operating system keeps a program from network, files
and other processes. Without, limits and a Python audit hook do: they hold against what a model
tries by chance, not against somebody who means to break out of the interpreter, least of all where
you are root. A line says which it is. Tests come from the data file and are trusted."""
import ast
import builtins
import contextlib
import decimal
import fractions
import functools
import gc
import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter, OrderedDict, deque
from pathlib import Path

SECONDS, MEMORY = 5, 512               # of a program with all its tests; MB
ANSWER = 1_000_000                     # bytes of a value
LIMITS = (f"ulimit -v {MEMORY * 1024}; ulimit -t {SECONDS}; ulimit -f 0; ulimit -c 0; ulimit -n 64;"
          'ulimit -u 0 2>&- || ulimit -p 0 2>&-; exec "$0" "$@"')          # -u, -p: processes

# --------------------------------------------------------------------- how a program is started
def limited() -> list[str]:
    """An interpreter without packages, with limits on memory, time, files and processes."""
    source = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
    return ["/bin/sh", "-c", LIMITS, os.path.realpath(sys.executable), "-I", "-S", "-c", source]

def bubblewrapped() -> list[str]:
    """The same with no network, no file of the machine but its system and Python, read-only, and
    no process but its own."""
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    for path in ("/usr", "/lib", "/lib64", "/bin"):
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            words += ["--ro-bind", path, path]
    interpreter = os.path.dirname(os.path.realpath(sys.executable))
    for path in ("/etc/ld.so.cache", sys.base_prefix, interpreter):
        words += ["--ro-bind-try", path, path]
    return [*words, "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--remount-ro", "/tmp",
            "--chdir", "/tmp", *limited()]

@functools.cache
def command() -> list[str]:
    """What starts a program: bubblewrap where it works, else limits alone. Says which."""
    from support.processes import say
    if shutil.which("bwrap"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            tried = subprocess.run(bubblewrapped(), input=b"('run', None, '', (), {})\n",
                                   capture_output=True, timeout=30)
            if tried.stdout == b"('value', None)\n":
                say("programs run in bubblewrap: no network, no files, no other processes")
                return bubblewrapped()
    say("programs run in a process with limits; with bubblewrap (bwrap) installed they would be "
        "kept from files and network by the operating system, too")
    return limited()

# ------------------------------------------------------------------ the process that holds tests
class Remote:
    """What a program defined that is no plain value: it can be called, its attributes read and
    set, and be given back."""
    def __init__(self, program, number: int):
        self.__dict__.update(_program=program, _number=number)

    def __call__(self, *arguments, **named):
        return self._program.ask("call", self._number, "", arguments, named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask("get", self._number, name)

    def __setattr__(self, name, value):
        self._program.ask("set", self._number, name, (value,))

    def __eq__(self, other):
        """Another object of the program may be equal; no plain value is."""
        if isinstance(other, Remote) and other._number != self._number:
            return bool(self._program.ask("same", self._number, "", (other,)))
        return self is other

    def __hash__(self):
        return self._number

    def __len__(self):
        return self._program.ask("len", self._number)

    def __bool__(self):
        return self._program.ask("bool", self._number)

    def __iter__(self):
        return iter(self._program.ask("iter", self._number))

    def __getitem__(self, key):
        return self._program.ask("item", self._number, "", (key,))

    def __repr__(self):
        return f"Number({self._number})"

class Ended(BaseException):
    """A program has ended, or says too much: not for a test's `except Exception`."""

class Name(str):
    """A word to be read as it stands."""
    __repr__ = str.__str__

TYPES = {kind.__name__: kind for kind in (bool, bytearray, bytes, complex, dict, float, frozenset,
                                          int, list, range, set, str, tuple)}
LIBRARY = {deque: "collections", Counter: "collections", OrderedDict: "collections",
           decimal.Decimal: "decimal", fractions.Fraction: "fractions"}

def sent(x):
    """An argument as inside.py reads its repr: plain types by name, some objects of the library."""
    if isinstance(x, type) and TYPES.get(x.__name__) is x:
        return Name(x.__name__)
    if type(x) in LIBRARY:
        return Name(f"__import__({LIBRARY[type(x)]!r}).{x!r}")
    if type(x) in (list, tuple, set, frozenset):
        return type(x)(map(sent, x))
    return {sent(k): sent(v) for k, v in x.items()} if type(x) is dict else x

SERIES = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict, deque, bytearray,
                                           OrderedDict)}
SERIES |= {"iter": iter, "Counter": lambda pairs: Counter(dict(pairs))}

class Program:
    """A program in its sandbox."""
    def __init__(self, start: list[str]):
        self.remotes = {}              # by number: the same object is the same to a test
        self.process = subprocess.Popen(
            start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd="/", env={}, start_new_session=True)

    def ask(self, verb: str, number=None, name="", arguments=(), named={}):
        """What it answers; raises what it raised, or Ended."""
        request = repr((verb, number, name, sent(arguments), sent(named)))
        try:
            self.process.stdin.write(request.encode("utf-8", "backslashreplace") + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline(ANSWER)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            self.process.kill()
            raise Ended
        kind, what = ast.literal_eval(line.decode())
        if kind == "value":
            return self.value(what)
        error = getattr(builtins, what, None)
        if isinstance(error, type) and not issubclass(error, Exception):       # SystemExit
            raise Ended
        known = isinstance(error, type)
        stop = what in ("StopIteration", "StopAsyncIteration")  # would end a loop of the test
        raise error() if known and not stop else RuntimeError(what)

    def value(self, x):
        """A value as inside.py writes it, read."""
        if not isinstance(x, tuple):
            return x
        kind, what = x
        if kind in SERIES:
            return SERIES[kind]([self.value(y) for y in what])
        if kind == "object" and type(what) is int:
            return self.remotes.setdefault(what, Remote(self, what))
        make = {"float": float, "complex": complex, "Decimal": decimal.Decimal,
                "Fraction": lambda parts: fractions.Fraction(*parts),
                "range": lambda parts: range(*parts), "type": TYPES.__getitem__}
        return make[kind](what)

def run_test(program: Program, test: str):
    """Runs a test, with the names of the program that it uses. Raises if it fails."""
    tree, scope = ast.parse(test), {"__name__": "test"}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if own := used - vars(builtins).keys():                    # else a function is called sum
        used = own
    for name in used:
        with contextlib.suppress(KeyError):
            scope[name] = program.ask("get", None, name)
    exec(compile(tree, "test", "exec"), scope)

def verdicts(source: str, tests: list[str], start: list[str], began) -> list[bool]:
    """Whether a program passes each test, in SECONDS for all. began(pid) is called first."""
    program, found = Program(start), [False] * len(tests)
    try:
        began(program.process.pid)
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.1)     # again, if a test catches it
        program.ask("run", None, source)
        for i, test in enumerate(tests):
            with contextlib.suppress(Exception, Ended):
                run_test(program, test)
                found[i] = True
    except BaseException:                                      # time is over, or it does not load
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        program.process.kill()
        program.process.communicate()
        program.remotes.clear()                                # which hold the program
        gc.collect()
    return found

# ---------------------------------------------------------------------------- many, and in order
class Tester:
    """A process that holds tests, for one program after another."""
    process = None

    def verdicts(self, program: str, tests: list[str]) -> list[bool]:
        """Those of `verdicts`. A process that has ended is replaced, and asked again, once."""
        found = self.ask(program, tests)
        found = self.ask(program, tests) if found is None else found
        return found or [False] * len(tests)

    def ask(self, program: str, tests: list[str]) -> list[bool] | None:
        """The verdicts; none is passed if the process takes too long; None if it has ended."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(                   # in a session of its own: no Ctrl-C
                [sys.executable, "-P", __file__, json.dumps(command())], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                start_new_session=True)
        pid, found, took_long, token = 0, None, [], secrets.token_hex(8)

        def stop():
            """The program first: its number is its own as long as its parent lives."""
            if pid and self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()
        late = threading.Timer(SECONDS + 5, lambda: (took_long.append(1), stop()))
        late.start()
        try:
            print(json.dumps([token, program, tests]), file=self.process.stdin, flush=True)
            pid = int(self.process.stdout.readline())
            said, verdict = json.loads(self.process.stdout.readline())
            if said == token and len(verdict) == len(tests):   # nobody else knows the token
                found = verdict
        except (OSError, ValueError, TypeError):               # it has ended, or something else
            pass
        finally:
            late.cancel()
            if found is None:
                stop()
                with contextlib.suppress(OSError, ValueError):
                    self.process.communicate()
        return [False] * len(tests) if took_long else found

class Testers:
    """As many as there are cores for this process; threads take turns."""
    def __init__(self):
        self.idle, here = queue.SimpleQueue(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        for _ in range(max(1, (os.cpu_count() or 1) // here)):
            self.idle.put(Tester())

    @functools.lru_cache(maxsize=10_000)                       # a group holds many twice
    def passed(self, program: str, tests: tuple[str, ...]) -> tuple[bool, ...]:
        """Whether a program passes each test."""
        tester = self.idle.get()
        try:
            return tuple(tester.verdicts(program, list(tests)))
        finally:
            self.idle.put(tester)

testers = Testers()
os.register_at_fork(after_in_child=testers.__init__)           # pipes are the parent's

if __name__ == "__main__":             # the process: answers a line [program, tests] with verdicts
    def late(*_):
        """No except clause of a test takes it."""
        raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, late)
    sys.set_int_max_str_digits(0)
    answers = os.fdopen(os.dup(1), "w")                        # a test may print
    sys.stdout = open(os.devnull, "w")
    with contextlib.suppress(ImportError, ValueError, OSError):    # 2 GB, where it can be limited
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    for line in sys.stdin:
        token, *what = json.loads(line)
        found = verdicts(*what, json.loads(sys.argv[1]),
                         lambda pid: print(pid, file=answers, flush=True))
        print(json.dumps([token, found]), file=answers, flush=True)
