"""The file of graded completions that an evaluation writes, continues and grades again."""
import contextlib
import fcntl
import json
import math
import statistics
from pathlib import Path

import numpy as np

from rewards import TASKS, BadInput, grade
from support.files import need, refusing, write_atomically
from support.processes import say
from support.runs import percent, table

HEADER = '{"settings": '               # how the first line of our files begins

def read_completions(path: Path) -> tuple[dict, list[dict]]:
    """Settings ({} if the file is not ours) and rows of a .jsonl file. In a file of ours a line
    counts once its newline is there: a kill may cut the last one off. Raises BadInput."""
    rows, number = [], 1
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        ours = lines[0].startswith(HEADER)
        for number, line in enumerate(lines[:-1] if ours else lines, start=1):
            if line:
                rows.append(json.loads(line))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {path}:{number}: {error}") from None
    known = rows[0]["settings"] if ours and rows else {}
    need(isinstance(known, dict), f"cannot read {path}: its settings are no object")
    return (known, rows[1:]) if known else ({}, rows)

def open_completions(path: Path, settings: dict, overwrite: bool) -> list[dict]:
    """The rows of a file that was made with these settings, none of a new one, which is made.
    Raises BadInput if it was made with others (unless they may be overwritten), is no file of ours
    (never overwritten), or cannot be written."""
    need(path.suffix == ".jsonl", f"--out {path}: must be a .jsonl file")
    with refusing(f"--out {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as f:
            if f.tell() == 0:
                return []
    known, rows = read_completions(path)
    need(known, f"--out {path}: there is such a file, and this program did not make it")
    kinds = {"index": int, "sample": int, "nfe": int, "tokens": int, "completion": str,
             "example": dict}
    need(all(isinstance(row, dict) and all(type(row.get(k)) is kind for k, kind in kinds.items())
             for row in rows), f"cannot read {path}: not every line holds a completion")
    names = [k for k in {**known, **settings} if k in settings or k != "weights"]   # opened later
    other = ", ".join(k for k in names if known.get(k) != settings.get(k))
    need(overwrite or not other, f"{path} was made with another {other}: --overwrite replaces it, "
         "--out FILE.jsonl goes elsewhere")
    return [] if overwrite else rows

@contextlib.contextmanager
def locked_completions(path: Path, settings: dict, overwrite: bool, made: dict):
    """The rows of `open_completions` and the file to append to, for one process at a time; a new
    one begins with the settings and `made` (files.provenance). Raises BadInput."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)      # let go when the process ends
        except OSError:
            raise BadInput(f"another evaluation is writing {path}") from None
        rows = open_completions(path, settings, overwrite)
        f.truncate(path.read_bytes().rfind(b"\n") + 1 if rows else 0)      # whole lines
        if not rows:
            f.write(json.dumps({"settings": settings, "made": made}) + "\n")
        f.flush()
        with open(path, encoding="utf-8") as begun:
            was = json.loads(begun.readline()).get("made")
        was = was if isinstance(was, dict) else made           # files of before do not say
        other = [f"{was.get(k)} -> {made[k]}" for k in ("device", "dtype", "torch", "transformers")
                 if was.get(k) != made[k]]
        if other:
            say(f"note: {path} was begun with another device or version: {', '.join(other)}")
        yield rows, f

def wilson(solved: int, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share (Wilson's score interval): [low, high].
    >>> [round(x, 3) for x in wilson(50, 100)]
    [0.404, 0.596]"""
    p, centre = solved / n, (solved + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * p * (1 - p) + z * z / 4)
    return [max(0.0, centre - half), min(1.0, centre + half)]

def pass_at(k: int, right: int, n: int) -> float:
    """Probability that one of k samples is right, where `right` of n were: without bias (Chen et
    al. 2021, arXiv 2107.03374, Eq. 1).
    >>> pass_at(1, 1, 4), pass_at(2, 1, 4)
    (0.25, 0.5)"""
    return 1 - math.comb(n - right, k) / math.comb(n, k)

def bootstrap(right: list, of: list, draws: int = 2000) -> list[float]:
    """95 % interval of a share, `right` of so many samples of each example, which are drawn again
    with replacement: [low, high]. Where their shares are all equal, wilson of the examples.
    >>> [round(x, 2) for x in bootstrap([1, 3, 0, 2], [4, 4, 4, 4])]
    [0.12, 0.62]"""
    right, of, n = np.asarray(right, float), np.asarray(of, float), len(right)
    if len(set(right / of)) == 1:
        return wilson(n * right[0] / of[0], n)
    drawn = np.random.default_rng(0).integers(n, size=(draws, n))
    return [float(x) for x in np.percentile(right[drawn].sum(1) / of[drawn].sum(1), [2.5, 97.5])]

def grade_row(task: str, completion: str, example: dict) -> dict:
    """What is kept of a completion: itself, the answer read from it (None if none), grades."""
    answer, beside = TASKS[task].answer(completion), TASKS[task].beside
    row = {"completion": completion, "answer": None if answer is None else str(answer),
           "grade": grade(task, completion, example)}
    if beside:
        row[beside[0]] = beside[1](completion, example)
    return row

def shares(task: str, rows: list[dict]) -> dict:
    """rows of grade_row, with an `index` of their example -> solved (share of grade 1) with ci95,
    n (completions), grade (mean), beside (mean of the task's second grade); of k samples each also
    k, pass_at (of fewer), pass_at_k (an example counts if any is right) and majority (if the most
    frequent answer is), with their ci95."""
    by_example = {}
    for row in rows:
        by_example.setdefault(str(row["index"]), []).append(row)
    groups = list(by_example.values())
    right, n = [sum(row["grade"] == 1 for row in g) for g in groups], len(rows)
    ci95 = wilson(sum(right), n) if n == len(groups) else bootstrap(right, list(map(len, groups)))
    result = {"solved": sum(right) / n, "n": n, "ci95": ci95,
              "grade": sum(row["grade"] for row in rows) / n}
    if TASKS[task].beside:
        result["beside"] = sum(row[TASKS[task].beside[0]] for row in rows) / n
    k, fewer = max(map(len, groups)), min(map(len, groups))
    if 1 < k == fewer:                                         # not in a file half done
        at = {j: sum(pass_at(j, c, k) for c in right) / len(right) for j in (2, 4, 8, 16) if j < k}
        result |= {"k": k, "pass_at": at}
        for name, hits in (("pass_at_k", sum(map(bool, right))),
                           ("majority", sum(map(vote, groups)))):
            result[name] = {"solved": hits / len(groups), "ci95": wilson(hits, len(groups))}
    return result

def vote(rows: list[dict]) -> bool:
    """Whether the answer given most often is right; of equals the one given first."""
    answers = [row["answer"] for row in rows if row["answer"] is not None]
    if not answers:
        return False
    first = statistics.mode(answers)
    return next(row["grade"] == 1 for row in rows if row["answer"] == first)

def more_columns(task: str, result: dict) -> dict:
    """What a table shows beside the solved share: of several samples, and the second grade."""
    columns = {}
    if "k" in result:
        columns = {f"pass@{k}": f"{100 * x:.1f} %" for k, x in result["pass_at"].items()}
        columns |= {f"pass@{result['k']}": percent(result["pass_at_k"]),
                    "majority": percent(result["majority"])}
    if "beside" in result:
        columns[TASKS[task].beside[0]] = f"{100 * result['beside']:.1f} %"
    return columns

def regrade(path: Path, task: str, out: str, overwrite: bool) -> int:
    """Grade the completions of a file again, ours or {question, completion, gold} as d1 publishes
    them; print the shares and what changed. Raises BadInput."""
    settings, rows = read_completions(path)
    asked, task = task, str(settings.get("task", task))
    need(rows and task in TASKS and asked in ("", task),
         f"--regrade {path}: {len(rows) or 'no'} completions, of task {task!r}: --task tells which "
         "where the file does not, and a task of your own is known where its file is run")
    settings = {**settings, "task": task, "regraded": str(path)}
    if out:
        open_completions(Path(out), settings, overwrite)
    changed, groups = [], {}
    for number, row in enumerate(rows, start=1):
        try:
            example = row["example"] if "example" in row else TASKS[task].row(row)
            new = {**row, **grade_row(task, row["completion"], example), "example": example}
            index = [row["index"], example] if type(row.get("index")) is int else number
            was, shape = float(row.get("grade", new["grade"])), (
                str(row.get("length", "")), str(row.get("steps", "")))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"--regrade {path}, completion {number}: {type(error).__name__} {error}"
                           ) from None
        if was != new["grade"]:
            changed.append(f"  completion {number}: {was:g} -> {new['grade']:g}, answer "
                           f"read: {str(new['answer'])[:80]!r}")
        groups.setdefault(shape, []).append((new, index))
    lines = []
    for (length, steps), graded in groups.items():
        result = shares(task, [{**row, "index": index} for row, index in graded])
        lines.append({"length": length, "steps": steps, "n": result["n"],
                      "solved": sum(row["grade"] == 1 for row, _ in graded),
                      "share (95 % interval)": percent(result), **more_columns(task, result)})
    print(table(lines), *changed[:20], sep="\n")
    if out:
        kept = [{"settings": settings}, *(row for graded in groups.values() for row, _ in graded)]
        write_atomically(Path(out), lambda f: f.writelines(
            (json.dumps(row) + "\n").encode() for row in kept))
    return 0
