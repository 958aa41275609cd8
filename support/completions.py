"""The file of graded completions that an evaluation writes, continues and grades again."""
import contextlib
import fcntl
import json
import math
import os
from pathlib import Path

import numpy as np

from rewards import TASKS, BadInput, grade
from support.runs import first_line, percent, table, write_atomically

KEPT = {"length": int, "steps": int, "index": int, "sample": int, "nfe": int, "tokens": int,
        "completion": str, "grade": (int, float), "seconds": (int, float), "example": dict}
HEADER = '{"settings": '

def read_completions(path: Path) -> tuple[dict, list[dict]]:
    """Settings (the first line, {} if it is not ours) and rows of a .jsonl file, without a last
    line cut off by a kill. Raises BadInput."""
    rows, number = [], 0
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate([*lines, last] if is_object(last) else lines, start=1):
            rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise ValueError("not an object")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}:{number}: {first_line(error)}") from None
    settings = rows[0].get("settings") if rows else None
    return (settings, rows[1:]) if isinstance(settings, dict) else ({}, rows)

def is_object(line: str) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False

def write_completions(path: Path, settings: dict, rows: list[dict]):
    """The whole file at once, atomically."""
    lines = [(json.dumps(row) + "\n").encode() for row in [{"settings": settings}, *rows]]
    write_atomically(path, lambda f: f.writelines(lines))

def open_completions(path: Path, settings: dict, overwrite: bool) -> list[dict]:
    """The rows of a file that was made with these settings, none of a new one. Raises BadInput if
    it was made with others (unless they may be overwritten), is no file of ours (never
    overwritten), or cannot be written."""
    try:
        place = next(p for p in (path, *path.parents) if p.exists())
        start = path.read_bytes()[:1000] if place == path else b""
    except (OSError, ValueError):      # a folder, a name too long
        place = None
    fits = place and path.suffix == ".jsonl" and os.access(place, os.W_OK)
    if not fits or place != path and not place.is_dir():
        raise BadInput(f"--out {str(path)[:200]}: must be a .jsonl file in a folder that can be "
                       "written to")
    if b"\n" not in start and HEADER.encode().startswith(start[:len(HEADER)]):
        return []                      # new, empty, or killed at its first line
    known, rows = read_completions(path)
    elsewhere = "--out FILE.jsonl goes elsewhere"
    if not known:
        raise BadInput(f"{path} exists and holds no completions of this program: {elsewhere}")
    other = [k for k in settings if known.get(k) != settings[k]]
    if other and not overwrite:
        raise BadInput(f"{path} holds completions made with another {', '.join(other)}: "
                       f"--overwrite replaces them, {elsewhere}")
    for number, row in enumerate(rows, start=2):
        if not all(isinstance(row.get(name), kind) for name, kind in KEPT.items()):
            raise BadInput(f"{path}:{number}: not a completion of this program")
    return [] if overwrite else rows

@contextlib.contextmanager
def locked_completions(path: Path, settings: dict, overwrite: bool):
    """The rows of `open_completions` and the file to append to, its last line whole, for one
    process at a time. Raises BadInput."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        f = open(path, "a", encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"cannot write {str(path)[:200]}: {why}") from None
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)      # let go when the process ends
        except OSError:
            raise BadInput(f"another evaluation is writing {path}") from None
        rows, raw = open_completions(path, settings, overwrite), path.read_bytes()
        if not rows:
            f.truncate(0)
            f.write(json.dumps({"settings": settings}) + "\n")
        elif not raw.endswith(b"\n"):
            whole = raw.rfind(b"\n") + 1
            last = raw[whole:].decode(errors="replace")
            f.write("\n") if is_object(last) else f.truncate(whole)
        f.flush()
        yield rows, f

def wilson(solved: int, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share (Wilson's score interval): [low, high].

    >>> [round(x, 3) for x in wilson(50, 100)]
    [0.404, 0.596]
    """
    p, centre = solved / n, (solved + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * p * (1 - p) + z * z / 4)
    return [max(0.0, centre - half), min(1.0, centre + half)]

def bootstrap(values: list, draws: int = 2000) -> list[float]:
    """95 % interval of a mean, its examples drawn again with replacement: [low, high].

    >>> bootstrap([0.5] * 10)
    [0.5, 0.5]
    """
    drawn = np.random.default_rng(0).choice(np.asarray(values, float), (draws, len(values)))
    return [float(x) for x in np.percentile(drawn.mean(1), [2.5, 97.5])]

def grade_row(task: str, completion: str, example: dict) -> dict:
    """What is kept of a completion: itself, the answer read from it (None if none), grades."""
    answer, row = TASKS[task].answer(completion), TASKS[task]
    kept = {"completion": completion, "answer": None if answer is None else str(answer),
            "grade": grade(task, completion, example)}
    return {**kept, **({row.beside[0]: row.beside[1](completion, example)} if row.beside else {})}

def regrade(path: Path, task: str, out: str, overwrite: bool) -> int:
    """Grade the completions of a file again, ours or {question, completion, gold} as d1 publishes
    them; print what changed. Raises BadInput."""
    settings, rows = read_completions(path)
    task, groups = task or str(settings.get("task")), {}
    if task not in TASKS or not rows or settings.get("task", task) != task:
        why = "no completions in it" if not rows else f"give --task ({', '.join(TASKS)})"
        why = f"these are of task {settings['task']}" if rows and settings else why
        raise BadInput(f"--regrade {path}: {why}")
    if out:
        open_completions(Path(out), {}, overwrite)
        if Path(out).exists() and not overwrite:
            raise BadInput(f"--out {out} exists: --overwrite replaces it")
    for number, row in enumerate(rows, start=1 + bool(settings)):
        try:
            example = row["example"] if settings else TASKS[task].row(row)
            new = {"index": number - 1, **row, **grade_row(task, row["completion"], example),
                   "example": example}
            if not isinstance(row["completion"], str):
                raise TypeError("completion")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{path}:{number}: not a {task} completion with its example: "
                           f"{type(error).__name__} {error}") from None
        was = row.get("grade") if isinstance(row.get("grade"), (int, float)) else None
        shape = str(row.get("length", "")), str(row.get("steps", ""))
        groups.setdefault(shape, []).append((was, new))
    lines, changed, beside = [], [], TASKS[task].beside
    for (length, steps), pairs in groups.items():
        n, solved = len(pairs), sum(row["grade"] == 1 for _, row in pairs)
        before = [was for was, _ in pairs if was is not None]
        other = [(was, row) for was, row in pairs if was is not None and was != row["grade"]]
        changed += other
        share = percent({"solved": solved / n, "ci95": wilson(solved, n)})
        second = sum(row[beside[0]] for _, row in pairs) / n if beside else 0
        lines.append({"length": length, "steps": steps, "n": n,
                      "solved before": f"{sum(was == 1 for was in before)} of {len(before)}",
                      "solved": solved, "share (95 % interval)": share, "changed": len(other),
                      **({beside[0]: f"{100 * second:.1f} %"} if beside else {})})
    print(table(lines))
    for was, row in changed[:20]:
        print(f"  example {row['index']}: {was:g} -> {row['grade']:g}, answer read: "
              f"{str(row['answer'])[:80]!r}")
    if out:
        every = [row for pairs in groups.values() for _, row in pairs]
        write_completions(Path(out), {**settings, "task": task}, every)
        print(f"graded again: {out}")
    return 0
