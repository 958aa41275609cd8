"""Inside the sandbox: runs a program, then answers what the tests ask of it, line by line.

support/sandbox.py starts this text alone, in an interpreter without packages. It never sees a test:
names, calls and their arguments come in, and only plain values go out."""
import os
import sys
from _collections import deque

KEPT = """fspath fstat getcwd listdir lstat scandir stat stat_result urandom DirEntry PathLike
    error""".split()                   # of what talks to the operating system: to import modules
NEVER = """ctypes _ctypes _ctypes_test _posixsubprocess _posixshmem _multiprocessing posix nt gc
    _socket fcntl mmap _testcapi _testinternalcapi _testmultiphase _testclinic _xxsubinterpreters
    _tkinter _curses _curses_panel faulthandler readline signal spwd pwd grp nis ossaudiodev
    syslog termios resource _imp""".split()    # modules
EVENTS = """import exec compile marshal.loads builtins.id builtins.input array.__new__
    object.__getattr__ object.__setattr__ object.__delattr__ sys._getframe sys.excepthook
    sys.unraisablehook""".split()      # of sys.audit: what a program that computes may cause

class Number:
    """An object that was handed out, in the arguments of a call."""
    def __init__(self, number: int):
        self.number = number

KINDS = frozenset(x for x in vars(sys.modules["builtins"]).values()
                  if isinstance(x, type) and issubclass(x, BaseException))
TYPES = {x: x.__name__ for x in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list,
                                 range, set, str, tuple)}
SERIES = dict, list, tuple, set, frozenset, deque, bytearray
SPECIAL = {"len": len, "bool": bool, "iter": iter, "item": lambda x, key: x[key],
           "same": lambda x, y: x == y}
VIEWS = {}.keys().__class__, {}.values().__class__, {}.items().__class__

def written(x, objects: dict, depth=0) -> str:
    """A value as text that holds plain values alone; any other is kept, and its number written:
    the same for the same object."""
    if depth > 50:
        raise RecursionError
    if x is None or x is True or x is False or x is ...:
        return repr(x)
    for kind in (int, str, bytes):
        if isinstance(x, kind):
            return kind.__repr__(x)
    for kind in (float, complex):                              # which may be inf or nan
        if isinstance(x, kind):
            return f"({kind.__name__!r}, {kind.__repr__(x)!r})"
    if type(x) is range:
        return f"('range', [{x.start}, {x.stop}, {x.step}])"
    if type(x) is type and x in TYPES:
        return f"('type', {TYPES[x]!r})"
    if type(x) is getattr(sys.modules.get("decimal"), "Decimal", None):
        return f"('Decimal', {str.__repr__(str(x))})"
    if type(x) is getattr(sys.modules.get("fractions"), "Fraction", None):
        return f"('Fraction', [{int.__repr__(x.numerator)}, {int.__repr__(x.denominator)}])"
    kind = next((kind for kind in SERIES if isinstance(x, kind)), None)
    if kind is None and not isinstance(x, VIEWS) and not hasattr(type(x), "__next__"):
        objects[id(x)] = x                                     # kept, so that no other has its id
        return f"('object', {id(x)})"
    parts = x.items() if kind is dict else x
    if kind is dict:
        parts = [(key, value) for key, value in parts]
    name = kind.__name__ if kind else "iter"
    for special in ("Counter", "OrderedDict") if kind is dict else ():
        if type(x) is getattr(sys.modules.get("collections"), special, None):
            name = special
    return f"({name!r}, [{', '.join(written(y, objects, depth + 1) for y in parts)}])"

def given(x, objects: dict):
    """An argument, with the objects that were handed out."""
    if type(x) in (list, tuple, set, frozenset):
        return type(x)(given(y, objects) for y in x)
    if type(x) is dict:
        return {given(k, objects): given(v, objects) for k, v in x.items()}
    return objects[x.number] if type(x) is Number else x

def serve(requests, out: int, write=os.write):
    """Answers requests (verb, object, name, arguments, named arguments) until they end."""
    program = sys.modules["program"] = type(sys)("program")
    objects, scope = {}, vars(program)
    readable = {"Number": Number, "inf": float("inf"), "nan": float("nan")}
    for line in requests:
        try:
            verb, target, name, arguments, named = eval(line, readable)
            arguments, named, value = given(arguments, objects), given(named, objects), None
            if verb == "run":
                exec(compile(name, "program", "exec"), scope)
            elif verb == "call":
                value = objects[target](*arguments, **named)
            elif verb in SPECIAL:
                value = SPECIAL[verb](objects[target], *arguments)
            elif verb == "set":
                setattr(objects[target], name, *arguments)
            else:
                value = scope[name] if target is None else getattr(objects[target], name)
            said = f"('value', {written(value, objects)})\n"
        except BaseException as error:                         # exit() too
            kinds = [kind.__name__ for kind in type(error).__mro__ if kind in KINDS]
            said = f"('error', {kinds[0]!r})\n"
        text = said.encode("utf-8", "backslashreplace")
        while text:
            text = text[write(out, text):]

def close_doors():
    """No function of the operating system but to look a module up, no module that has others, and
    an audit hook, which no program can take off, for what is left."""
    for name in set(sys.builtin_module_names) - set(NEVER):    # no other way leads to these ...
        __import__(name)
    del sys.modules["_imp"].create_builtin                     # ... or makes a new posix
    for name in ("dir_fd", "effective_ids", "fd", "follow_symlinks"):      # sets of functions
        getattr(os, f"supports_{name}").clear()
    system = sys.modules["posix"]
    for name in set(dir(system)) - set(KEPT):
        if callable(getattr(system, name)):
            delattr(system, name)
            vars(os).pop(name, None)
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event, arguments, type=type, str=str, events=frozenset(EVENTS), changing=changing,
             library=tuple(filter(None, sys.path)), never=frozenset(NEVER)):
        """A program may change every builtin name, and the variables of a frame: what decides here
        are defaults, which are set anew at every call."""
        if event == "import":
            name, path = arguments[0], arguments[1] if type(arguments[1]) is str else ""
            fine = type(name) is str and never.isdisjoint(
                [*name.split("."), path.rpartition("/")[2].partition(".")[0]])
        elif event in ("open", "os.listdir", "os.scandir"):
            path, flags = arguments[0], arguments[2] if event == "open" else 0
            fine = type(path) is str and path.startswith(library) and ".." not in path and not (
                flags & changing)
        else:
            fine = event in events
        if not fine:
            raise PermissionError(event)
    sys.addaudithook(hook)

if __name__ == "__main__":
    sys.set_int_max_str_digits(0)
    asked, answers, null = os.fdopen(os.dup(0), "rb"), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    close_doors()
    serve(asked, answers)
