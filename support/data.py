"""Examples: generated, from a file, or from a published data set; what is trained on, what not.

    task       --data FILE: .csv with a header, or lines of JSON           from the hub without one
    sudoku     Puzzle, Solution: 16 digits, 0 an empty cell (.csv)         (generated)
    countdown  {"nums": [30, 100, 93], "target": 23} or                    (generated)
               {"input": "30,100,93", "output": "23"}
    story      question, answer: "27+5=32-3=29\\n#### 29"                   (generated)
    formula    text, code, test_list                                       (generated)
    gsm8k      question, answer: "... #### 72"                             openai/gsm8k
    math       problem, answer                                             nlile/hendrycks-MATH-
                                                                           benchmark; MATH-500
    code       MBPP's text or prompt, code, test_list; HumanEval's         google-research-datasets/
               prompt, entry_point, canonical_solution, test               mbpp; openai_humaneval

agrpo.py: --test-data FILE is held out; without it about a fifth of --data, whole classes of it. An
example whose own answer is graded wrong is refused, with its line; --skip-bad-examples leaves such
ones out and counts them. Of the hub's MATH no problem of MATH-500 is trained on."""
import csv
import io
import json
import os
from pathlib import Path

from rewards import TASKS, BadInput, gold_is_right, in_split, try_task
from support import programs
from support.files import need, refusing
from support.processes import say

def held_out(task: str, example: dict) -> bool:
    """Whether an example's statement, up to symmetry, is one that no training here ever sees."""
    return in_split(TASKS[task].key(example), "test")

def check_files(data: str = "", test_data: str = ""):
    """Raises BadInput unless the files can be read. Costs nothing: called before any work."""
    for flag, path in (("--data", data), ("--test-data", test_data)):
        need(not path or os.access(path, os.R_OK) and not os.path.isdir(path),
             f"cannot read {flag} {path}: there is no such file, or no permission to read it")

def read_rows(path: str, convert) -> list[dict]:
    """The rows of a file, .csv with a header or lines of JSON, converted. BadInput has the line."""
    found, number, table = [], 0, None
    try:
        raw = Path(path).read_bytes()
        rows = io.StringIO(raw.decode("utf-8-sig"), newline="")
        if str(path).lower().endswith(".csv"):
            rows = table = csv.DictReader(rows)
        for number, row in enumerate(rows, start=1):
            if table or row.strip():
                row = row if table else json.loads(row)
                if not isinstance(row, dict):
                    raise ValueError("one object a line")
                found.append(convert(row))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}:{1 + raw.count(10, 0, error.start)}: {error}") from None
    except Exception as error:                             # of a row, or of code that is not ours
        number = table.line_num + isinstance(error, csv.Error) if table else number
        missing = "no column " if isinstance(error, KeyError) else ""
        raise BadInput(f"{path}:{number}: {missing}{error}") from None
    need(found, f"{path}: no rows in it")
    return found

def read_pairs(path: str) -> list[dict]:
    """The rows {"prompt", "completion"} of a file of JSON lines. Raises BadInput."""
    def convert(row):
        for name in ("prompt", "completion"):
            if not isinstance(row.get(name), str) or not row[name]:
                raise ValueError(f'no text {name!r} in it: {{"prompt": ..., "completion": ...}}')
            row[name].encode()                             # no half of a surrogate pair
        return row
    return read_rows(path, convert)

def converted(task: str, row: dict, skip: bool) -> dict | None:
    """A row as an example; None for one to be left out. Raises ValueError for an example whose own
    answer its grade does not take: nothing could be learned from it."""
    text = json.dumps(example := TASKS[task].row(row), ensure_ascii=False)
    text.encode()                                          # no half of a surrogate pair
    try:
        TASKS[task].key(example)                           # by way of the columns that it needs
        if gold_is_right(task, example):
            return example
        tests = example["test_list"] if task == "code" else ()
        failed = [f"; it fails {test.strip()[:120]!r}" for test, fine in zip(
            tests, programs.passed(str(example["code"]), example) if tests else ()) if not fine]
        raise ValueError(f"its own answer is graded wrong (--skip-bad-examples leaves such ones "
                         f"out): {text[:80]}...{''.join(failed[:1])}")
    except ValueError:
        if not skip:
            raise

def kept(examples: list, where: str) -> list[dict]:
    """Those that are not to be left out; says how many are. Raises BadInput if all are."""
    found = [ex for ex in examples if ex is not None]
    need(found, f"{where}: no example whose own answer is graded right")
    if len(found) < len(examples):
        say(f"{where}: left out {len(examples) - len(found)} of {len(examples)} examples, whose "
            "own answer is graded wrong")
    return found

def from_file(task: str, path: str, skip: bool = False) -> list[dict]:
    """The examples of a file. skip: leave out those whose own answer is graded wrong, instead of
    refusing the file. Raises BadInput."""
    check_files(path)
    return kept(read_rows(path, lambda row: converted(task, row, skip)), path)

def from_hub(task: str, split: str, skip: bool = False) -> list[dict]:
    """The examples of a published data set, downloaded once. Raises BadInput with what helps."""
    need(TASKS[task].hub, f"--task {task} needs --data FILE")
    import datasets
    import huggingface_hub
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()    # its retries take half a minute
    name, config, part = TASKS[task].hub[split]
    try:
        rows = list(datasets.load_dataset(name, config, split=part))
    except Exception as error:                             # many kinds, from three libraries
        columns = {"math": "problem and answer", "code": "text, code and test_list"}
        raise BadInput(f"cannot load {name} ({type(error).__name__}): without network give --data "
                       f"FILE, lines of JSON with {columns.get(task, 'question and answer')}"
                       ) from None
    examples = []
    for number, row in enumerate(rows, start=1):
        with refusing(f"{name}, {part}, row {number}"):
            examples.append(converted(task, row, skip))
    return kept(examples, name)

def load_examples(task: str, n: int, seed: int, split: str, path="", skip=False) -> list[dict]:
    """The first `n` examples (0: all) of a file, or of a split, generated or published."""
    if path or not TASKS[task].generate:
        found = from_file(task, path, skip) if path else from_hub(task, split, skip)
        return found[:n or None]
    examples = list(TASKS[task].generate(n, seed, split) or [])
    need(len(examples) == n, f"task {task}: generate made {len(examples)} examples of {n}")
    return examples

def load_split(task: str, n: int, n_test: int, seed: int, path="", test_path="", skip=False):
    """Training and held-out examples, no statement in both: generated or published, or from files;
    a file without a second one is divided by `held_out`."""
    check_files(path, test_path)
    if not path and TASKS[task].generate:
        train, test = load_examples(task, n, seed, "train"), load_examples(task, n_test, 0, "test")
        need(set(map(TASKS[task].question, train)).isdisjoint(map(TASKS[task].question, test)),
             f"task {task}: generate makes the same examples to train on and to hold out; "
             "rewards.in_split(text, split) says which are whose")
    elif path and not test_path:
        examples = from_file(task, path, skip)
        train, test = ([ex for ex in examples if held_out(task, ex) == side] for side in (0, 1))
    else:
        test, key = load_examples(task, 0, 0, "test", test_path, skip), TASKS[task].key
        tested = set(map(key, test))
        train = [ex for ex in load_examples(task, 0, 0, "train", path, skip)
                 if key(ex) not in tested]
    need(train and test, f"--data {path}: too few examples to train on some and hold others out")
    try_task(task, train[0])
    return train, test[:n_test]
