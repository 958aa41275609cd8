"""Protects the evaluation: its numbers against counts by hand, its file of completions (kept,
continued, graded again), its command line. Run: pytest tests/test_eval.py"""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import agrpo
import eval as evaluation
from support import completions, data, options, runs
from tools import Settings, load, save

TINY = ["--model", "tiny", "--task", "sudoku", "--device", "cpu"]
EXAMPLES = [{"question": f"{i}", "answer": f"#### {i}"} for i in range(4)]
SAID = {
    (0, 0): "0",
    (0, 1): "0",
    (0, 2): "9",  # right by majority
    (1, 0): "7",
    (1, 1): "1",
    (1, 2): "7",  # wrong by majority, right once
    (2, 0): "3",
    (2, 1): "2",
    (2, 2): "none",  # a tie: the first said, wrong
    (3, 0): "none",
    (3, 1): "none",
    (3, 2): "none",
}  # no answer at all


def said(examples, keys):
    """A model that says what SAID holds, of 3 tokens in 2 calls."""
    return [SAID[key] for key in keys], [2] * len(keys), [3] * len(keys)


@pytest.fixture
def tiny(here, quick, monkeypatch):
    """A cached tiny base of a few steps under the default flags of eval.py."""
    before = options.before_flags
    monkeypatch.setattr(
        options, "before_flags",
        lambda *given: before(*given) | {"base_steps": 4, "base_batch": 4, "train_examples": 32})
    return here


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_seconds(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines(path)]


def test_pass_at_k_majority_and_shares_by_hand():
    for batch in (1, 5, 100):
        result = evaluation.evaluate(said, "gsm8k", EXAMPLES, batch, samples=3)
        assert result["n"] == 12 and result["k"] == 3 and result["solved"] == 4 / 12
        assert result["pass_at_k"]["solved"] == 3 / 4 and result["majority"]["solved"] == 1 / 4
        assert (
            result["nfe"] == 2
            and result["tokens_per_nfe"] == 1.5
            and result["completions"][:3] == ["0", "0", "9"]
        )
        assert result["pass_at_k"]["ci95"] == completions.wilson(3, 4)
        assert result["ci95"] == completions.bootstrap([2, 1, 1, 0], [3, 3, 3, 3])
    one = evaluation.evaluate(said, "gsm8k", EXAMPLES)
    assert one["solved"] == 1 / 4 and one["ci95"] == completions.wilson(1, 4)
    assert "majority" not in one


def test_files_say_with_what_they_were_made_and_a_change_of_it_is_noted(tiny, capsys):
    flags = [*TINY, "--limit", "2", "--steps", "4", "--out", "e.jsonl"]
    assert evaluation.main(flags) == 0 and "note:" not in capsys.readouterr().out
    made = lines("e.jsonl")[0]["made"]
    assert made == json.loads(Path("e.json").read_text())["made"]
    assert made["torch"] == torch.__version__ and made["dtype"] == "float32"
    assert made["device"].startswith("CPU") and made["command"].startswith("python ")
    assert made["transformers"] == transformers.__version__ and "commit" in made
    text = Path("e.jsonl").read_text()
    Path("e.jsonl").write_text(text.replace(json.dumps(made["device"]), '"NVIDIA H200"'))
    assert evaluation.main([*flags, "--samples", "1"]) == 0
    assert "note: e.jsonl was begun" in (out := capsys.readouterr().out) and "NVIDIA H200" in out
    before = text.partition(', "made"')[0] + "}" + text[text.index("\n"):]      # a file of before
    Path("e.jsonl").write_text(before)
    assert evaluation.main(flags) == 0 and "note:" not in capsys.readouterr().out


def test_a_file_of_other_settings_is_refused_also_where_these_are_the_usual_ones(tiny, capsys):
    flags = [*TINY, "--limit", "2", "--steps", "4", "--out", "e.jsonl"]
    assert evaluation.main([*flags, "--cache", "dual"]) == 0
    before = Path("e.jsonl").read_bytes()
    for more in ([], ["--cache", "prefix"]):
        assert evaluation.main([*flags, *more]) == 2 and "cache" in capsys.readouterr().err
    assert evaluation.main([*flags, "--overwrite"]) == 0
    assert evaluation.main([*flags, "--cache", "dual"]) == 2
    assert Path("e.jsonl").read_bytes() != before


@pytest.mark.parametrize("name, value", [
    ("index", "0"), ("index", 1.0), ("sample", None), ("completion", 5), ("nfe", None),
    ("tokens", "x"), ("example", [])])
def test_a_line_that_holds_no_completion_is_refused(tiny, name, value, capsys):
    flags = [*TINY, "--limit", "2", "--steps", "4", "--out", "e.jsonl"]
    assert evaluation.main(flags) == 0
    header, first, *rest = lines("e.jsonl")
    for made in (None, [], "x", 3):                            # does no harm
        whole = [{**header, "made": made}, first, *rest]
        Path("e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
        assert evaluation.main(flags) == 0
    broken = [header, {**first, name: value}, *rest]
    Path("e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in broken))
    capsys.readouterr()
    assert evaluation.main(flags) == 2 and capsys.readouterr().err.count("\n") == 1


def test_intervals_hold_what_they_promise():
    """Wilson at 30 of 100 from its defining equation; a bootstrap of 400 shares against the normal
    interval, within 10 %."""
    for end in completions.wilson(30, 100):
        assert abs(end - 0.3) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 100), rel=1e-9)
    values = [0.0] * 280 + [1.0] * 120
    low, high = completions.bootstrap(values, [1] * len(values))
    assert (high - low) / 2 == pytest.approx(
        1.96 * math.sqrt(0.3 * 0.7 / 400), rel=0.1) and low < 0.3 < high


CUTS = {                               # bytes that a kill left of a file of so many
    "nothing": lambda whole: 0, "the header": lambda whole: whole.index("\n") + 1,
    "a third": lambda whole: len(whole) // 3, "all but 3": lambda whole: len(whole) - 3,
    "all but 2": lambda whole: len(whole) - 2, "all but 1": lambda whole: len(whole) - 1,
    "all": len}


@pytest.mark.parametrize("cuts", [
    ["nothing", "the header", "a third", "all but 1"],
    pytest.param(CUTS, marks=pytest.mark.whole)], ids=["some", "every"])
def test_a_killed_evaluation_continues_and_ends_the_same(tiny, cuts, capsys):
    flags = [*TINY, "--limit", "10", "--steps", "8,4", "--batch", "4"]
    assert evaluation.main([*flags, "--out", "whole.jsonl"]) == 0
    whole, table = Path("whole.jsonl").read_text(), capsys.readouterr().out
    assert len(lines("whole.jsonl")) == 1 + 20 and Path("whole.png").is_file()
    for cut in cuts:
        Path("part.jsonl").write_text(whole[:CUTS[cut](whole)])
        assert evaluation.main([*flags, "--out", "part.jsonl"]) == 0
        assert without_seconds("part.jsonl") == without_seconds("whole.jsonl"), cut
        part, all_ = ([{k: v for k, v in row.items() if k != "seconds"}
                       for row in json.loads(Path(f"{name}.json").read_text())["results"]]
                      for name in ("part", "whole"))
        assert part == all_ and len(part) == 2, cut
    assert "NFE" in table and "cells" in table


def test_a_second_call_makes_only_what_is_missing(tiny, monkeypatch):
    assert evaluation.main([*TINY, "--limit", "6", "--steps", "8", "--out", "e.jsonl"]) == 0
    before, generate, calls = Path("e.jsonl").read_text(), evaluation.generate, []
    monkeypatch.setattr(
        evaluation, "generate",
        lambda *a: calls.append((a[4].completion_length, a[4].steps)) or generate(*a))
    assert evaluation.main(
        [*TINY, "--limit", "6", "--steps", "8,4", "--lengths", "16,32", "--out", "e.jsonl"]) == 0
    assert calls == [(16, 4), (32, 8), (32, 4)] and Path("e.jsonl").read_text().startswith(before)
    shapes = [(r["length"], r["steps"]) for r in json.loads(Path("e.json").read_text())["results"]]
    assert shapes == [(16, 8), (16, 4), (32, 8), (32, 4)]


def test_stopped_by_hand_it_keeps_what_is_done(tiny, monkeypatch, capsys):
    generate, calls = evaluation.generate, []

    def stop_at_the_third(*a):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*a)

    flags = [*TINY, "--limit", "6", "--steps", "4", "--batch", "2", "--out", "e.jsonl"]
    monkeypatch.setattr(evaluation, "generate", stop_at_the_third)
    assert evaluation.main(flags) == 130 and len(lines("e.jsonl")) == 1 + 4
    assert "continues" in capsys.readouterr().err
    assert evaluation.main(flags) == 0 and len(lines("e.jsonl")) == 1 + 6 and len(calls) == 4


def test_other_settings_weights_or_examples_are_never_mixed(tiny, capsys):
    assert evaluation.main([*TINY, "--limit", "4", "--steps", "4"]) == 0
    assert evaluation.main([*TINY, "--limit", "4", "--steps", "4", "--unmasking", "random"]) == 0
    assert evaluation.main([*TINY, "--limit", "4", "--steps", "4", "--seed", "1"]) == 0
    assert len(list(Path("runs").glob("eval-sudoku-tiny-*.jsonl"))) == 3  # a file each
    assert evaluation.main([*TINY, "--limit", "4", "--steps", "4", "--out", "e.jsonl"]) == 0
    before = Path("e.jsonl").read_bytes()
    capsys.readouterr()
    assert evaluation.main(
        [*TINY, "--limit", "4", "--steps", "4", "--out", "e.jsonl", "--temperature", "1"]) == 2
    assert "temperature" in capsys.readouterr().err and Path("e.jsonl").read_bytes() == before
    Path("x.csv").write_text("Puzzle,Solution\n3102200002100320,3142243142131324\n")
    assert evaluation.main([*TINY, "--data", "x.csv", "--steps", "4", "--out", "f.jsonl"]) == 0
    Path("x.csv").write_text(
        "Puzzle,Solution\n3142200002100320,3142243142131324\n")  # the file changed under its name
    assert evaluation.main([*TINY, "--data", "x.csv", "--steps", "4", "--out", "f.jsonl"]) == 2
    assert evaluation.main(
        [*TINY, "--data", "x.csv", "--steps", "4", "--out", "f.jsonl", "--overwrite"]) == 0
    assert (
        lines("f.jsonl")[1]["example"]["puzzle"] == "3142200002100320"
        and len(lines("f.jsonl")) == 2
    )
    Path("notes.jsonl").write_text('{"mine": 1}\n')
    assert evaluation.main(
        [*TINY, "--limit", "4", "--steps", "4", "--out", "notes.jsonl", "--overwrite"]) == 2
    assert Path("notes.jsonl").read_text() == '{"mine": 1}\n'


def test_other_weights_under_the_same_path_are_not_mixed(here, quick, capsys):
    assert agrpo.main([*quick, "--max-steps", "0", "--name", "m"]) == 0
    flags = ["--model", "runs/m", "--limit", "4", "--steps", "4"]
    assert evaluation.main(flags) == 0 and evaluation.main([*flags, "--out", "e.jsonl"]) == 0
    before = Path("e.jsonl").read_bytes()
    policy, tokenizer = load("runs/m/model")
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[0, 40] += (
            1  # one number, among the first of its parameter
        )
    save(policy, tokenizer, Path("runs/m/model"),
         runs.read_settings(Path("runs/m/config.json"), Settings))
    capsys.readouterr()
    assert (
        evaluation.main([*flags, "--out", "e.jsonl"]) == 2
        and "weights" in capsys.readouterr().err
        and Path("e.jsonl").read_bytes() == before
    )
    assert (
        evaluation.main(flags) == 0 and len(list(Path("runs").glob("eval-sudoku-m-*.jsonl"))) == 2)


def test_two_evaluations_do_not_write_one_file(tiny, capsys):
    flags = [*TINY, "--limit", "2", "--steps", "4", "--out", "e.jsonl"]
    with open("e.jsonl", "a") as f:
        completions.fcntl.flock(f, completions.fcntl.LOCK_EX)
        assert evaluation.main(flags) == 2 and "another" in capsys.readouterr().err
    assert evaluation.main(flags) == 0


def test_the_share_in_classes_never_trained_on(tiny, capsys):
    examples = data.load_examples("sudoku", 12, 0, "train")[:5] + data.load_examples(
        "sudoku", 3, 0, "test")
    Path("x.csv").write_text(
        "Puzzle,Solution\n" + "".join(f"{ex['puzzle']},{ex['solution']}\n" for ex in examples))
    assert evaluation.main([*TINY, "--data", "x.csv", "--steps", "4", "--out", "e.jsonl"]) == 0
    assert (
        json.loads(Path("e.json").read_text())["results"][0]["held_out"]["n"] == 3
        and "of 3" in capsys.readouterr().out
    )


def test_a_length_that_does_not_fit_the_context_is_refused(tiny, capsys):
    assert evaluation.main([*TINY, "--limit", "2", "--lengths", "16,256", "--steps", "16"]) == 2
    assert "256" in capsys.readouterr().err and not list(Path("runs").glob("eval*"))


def test_a_length_below_the_default_fits_where_the_default_does_not(here, quick):
    assert agrpo.main([*quick, "--max-steps", "0", "--name", "m"]) == 0
    Path("x.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    flags = ["--model", "runs/m", "--task", "gsm8k", "--data", "x.jsonl", "--block-length", "16",
             "--steps", "16"]
    assert (
        evaluation.main([*flags, "--lengths", "16"]) == 0
        and evaluation.main([*flags, "--lengths", "256"]) == 2
    )


def test_an_unfinished_run_is_refused(here, quick, capsys):
    assert agrpo.main([*quick, "--max-steps", "1", "--name", "x"]) == 0
    shutil.rmtree("runs/x/model")
    assert evaluation.main(["--model", "runs/x"]) == 2 and "not finished" in capsys.readouterr().err


def test_samples_are_different_and_repeatable(tiny):
    flags = [*TINY, "--limit", "3", "--steps", "4", "--temperature", "1", "--unmasking", "random",
             "--samples", "4"]
    assert (
        evaluation.main([*flags, "--out", "a.jsonl"]) == 0
        and evaluation.main([*flags, "--out", "b.jsonl", "--batch", "12"]) == 0
    )
    assert without_seconds("a.jsonl") == without_seconds("b.jsonl")
    assert len({row["completion"] for row in lines("a.jsonl")[1:5]}) > 1
    result = json.loads(Path("a.json").read_text())["results"][0]
    assert result["k"] == 4 and result["n"] == 12 and set(result["majority"]) == {"solved", "ci95"}


def test_regrade_agrees_with_the_grades_that_were_saved_and_finds_a_changed_one(tiny, capsys):
    assert evaluation.main([*TINY, "--limit", "4", "--steps", "8,4", "--out", "e.jsonl"]) == 0
    capsys.readouterr()
    assert evaluation.main(["--regrade", "e.jsonl"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3  # a header, two numbers of steps
    rows = lines("e.jsonl")
    rows[2]["grade"], rows[2]["completion"] = 0.0, rows[2]["example"]["solution"]
    Path("e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluation.main(["--regrade", "e.jsonl", "--out", "new.jsonl"]) == 0
    assert "0 -> 1" in capsys.readouterr().out
    assert (
        lines("new.jsonl")[2]["grade"] == 1 and lines("new.jsonl")[1]["grade"] == rows[1]["grade"])
    assert lines("e.jsonl") == rows  # the file itself is left alone
    Path("mine.txt").write_text("mine")
    for out in ("e.jsonl", "mine.txt", "."):
        assert evaluation.main(["--regrade", "e.jsonl", "--out", out]) == 2
    assert (
        evaluation.main(["--regrade", "e.jsonl", "--out", "new.jsonl", "--overwrite"]) == 0
        and Path("mine.txt").read_text() == "mine"
    )
    assert (
        evaluation.main(["--regrade", "e.jsonl", "--task", "math"]) == 2
        and "sudoku" in capsys.readouterr().err
    )


def columns_of(text, n):
    """The first rows of a printed table: [{name: cell}]."""
    header, *rows = text.splitlines()[:n + 1]
    at = [m.start() for m in re.finditer(r"\S+(?: \S+)*", header)] + [None]
    return [{header[a:b].strip(): row[a:b].strip() for a, b in zip(at, at[1:])} for row in rows]


def test_regrade_of_several_samples_shows_what_the_evaluation_did(tiny, capsys):
    flags = "--limit 6 --steps 4 --samples 4 --temperature 1 --out e.jsonl"
    assert evaluation.main([*TINY, *flags.split()]) == 0
    header, made, *_ = (line.split("  ") for line in capsys.readouterr().out.splitlines()[-3:])
    assert evaluation.main(["--regrade", "e.jsonl"]) == 0
    again = capsys.readouterr().out
    words = [cell.strip() for cell in made if "%" in cell]     # share, pass@k, majority, cells
    assert len(words) == 5 and [w for w in words if w not in again] == []
    rows = lines("e.jsonl")
    half = [{**row, "steps": 2} for row in rows[1:4] + rows[5:7]]     # half done
    others = [{**row, "index": 0, "steps": 1} for row in rows[1::4]]       # examples that share it
    text = "".join(json.dumps(row) + "\n" for row in [rows[0], *half, *rows[1:], *others])
    Path("more.jsonl").write_text(text)
    assert evaluation.main(["--regrade", "more.jsonl"]) == 0
    two, four, one = columns_of(capsys.readouterr().out, 3)
    assert four == columns_of(again, 1)[0]
    assert two["n"] == "5" and "%" in two["cells"] and two["majority"] == two["pass@2"] == ""
    assert one["n"] == "6" and one["pass@4"] == ""             # a sample each, not six of one


def test_the_interval_of_examples_with_more_samples_than_others():
    rows = [{"index": i, "grade": 1.0, "answer": "1"} for i in range(30)] + [
        {"index": 30, "grade": 0.0, "answer": "2"}] * 20
    result = completions.shares("gsm8k", rows)
    low, high = result["ci95"]
    assert result["solved"] == 0.6 and low < 0.6 <= high and "k" not in result
    wrong = completions.shares("gsm8k", [{"index": i // 4, "grade": 0, "answer": None}
                                         for i in range(40)])
    assert wrong["ci95"] == completions.wilson(0, 10)          # not 0 to 0


def test_regrade_reads_published_generations(here, capsys):
    Path("g.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"question": "1+1?", "completion": "so </reasoning><answer>\\boxed{2}</answer>",
                 "gold": 2.0},
                {"question": "?", "completion": "3", "gold": None},
            )
        )
    )
    assert evaluation.main(["--regrade", "g.jsonl", "--task", "gsm8k"]) == 0
    assert "50.0 %" in capsys.readouterr().out
    Path("s.jsonl").write_text(
        json.dumps(
            {"question": "Solve: 3102200002100320\n", "completion": "<answer>3142</answer>",
             "gold": "3142243142131324"}
        )
    )
    assert (
        evaluation.main(["--regrade", "s.jsonl", "--task", "sudoku", "--out", "s2.jsonl"]) == 0
        and evaluation.main(["--regrade", "s2.jsonl"]) == 0
    )
    assert capsys.readouterr().out.count("12.5 %") == 2  # one of eight cells
    Path("c.jsonl").write_text(
        json.dumps({"question": "", "completion": "\\boxed{(3+4)*2}", "gold": [[3, 4, 2], 14]}))
    assert (
        evaluation.main(["--regrade", "c.jsonl", "--task", "countdown"]) == 0
        and "100.0 %" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "flags, word",
    [(["--steps", "4,x"], "--steps"), (["--step", "4"], "--step"), (["--steps", "3"], "--steps 3"),
     (["--lengths", "16,15"], "15"), (["--lengths", ","], "--lengths"),
     (["--steps", "0"], "--steps 0"), (["--samples", "4"], "--temperature"),
     (["--samples", "0"], "--samples"), (["--limit", "-1"], "--limit"),
     (["--out", "x.json"], ".jsonl"), (["--out", "dir.jsonl"], ".jsonl"),
     (["--prompt", "d2"], "--prompt"), (["--task", "gsm8k"], "tiny"),
     (["--model", "nowhere"], "no such directory"),
     (["--regrade", "no.jsonl", "--task", "math"], "no.jsonl"),
     (["--regrade", "empty.jsonl", "--task", "math"], "no completions"),
     (["--out", "x" * 300 + ".jsonl", "--limit", "2", "--steps", "4"], ".jsonl"),
     (["--regrade", "bad.jsonl", "--task", "math"], "bad.jsonl:2"),
     (["--regrade", "rows.jsonl"], "--task"),
     (["--regrade", "rows.jsonl", "--task", "math"], "completion 1"),
     (["--regrade", "list.jsonl", "--task", "math"], "completion 1"),
     (["--out", "file/x.jsonl", "--limit", "2", "--steps", "4"], "file"),
     (["--data", "no.csv"], "no.csv"), (["--top-p", "0.5"], "top-p"),
        (["--model", "a\nb"], "--model"),
        (["--tau-pos", "2"], "plackett_luce"), (["--threshold", "0.5"], "--unmasking threshold"),
        (["--lr", "1"], "--lr"), (["--samples"], "--samples"), (["--seed", "x"], "--seed")],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny, flags, word, capsys):
    Path("dir.jsonl").mkdir()
    Path("file").write_text("")
    Path("bad.jsonl").write_text(
        '{"problem": "", "answer": "1", "completion": "1"}\n{"problem": \n')
    Path("rows.jsonl").write_text('{"completion": "1"}\n')
    Path("list.jsonl").write_text("[1]\n")
    Path("empty.jsonl").write_text("")
    before = {p: p.stat().st_mtime_ns for p in Path().rglob("*")}
    given = (
        flags
        if "--regrade" in flags
        else ["--device", "cpu", *([] if "--model" in flags else ["--model", "tiny"]),
              *([] if "--task" in flags else ["--task", "sudoku"]), *flags]
    )
    assert evaluation.main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("eval: ") and err.count("\n") == 1 and word in err
    assert {p: p.stat().st_mtime_ns for p in Path().rglob("*")} == before


def test_a_model_of_another_task_and_a_file_held_out_in_training_are_named(here, quick, capsys):
    rows = data.load_examples("sudoku", 12, 7, "train")
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert agrpo.main([*quick, "--max-steps", "0", "--name", "m", "--data", "own.jsonl",
                       "--test-data", "own.jsonl"]) == 2       # nothing is left to train on
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data.load_examples(
        "sudoku", 9, 8, "train")))
    assert agrpo.main([*quick, "--max-steps", "0", "--name", "m", "--data", "own.jsonl",
                       "--test-data", "other.jsonl"]) == 0
    capsys.readouterr()
    flags = ["--model", "runs/m", "--steps", "4", "--device", "cpu"]
    assert evaluation.main([*flags, "--out", "e.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "has learned" not in said and "--test-data other.jsonl was held out" in said
    assert evaluation.main([*flags, "--data", "other.jsonl"]) == 0
    assert "held out" not in capsys.readouterr().out
    assert evaluation.main([*flags, "--limit", "2", "--task", "countdown"]) == 0
    assert "note: runs/m/model has learned sudoku, not countdown" in capsys.readouterr().out


def test_an_unknown_task_is_one_line_where_it_says_which_model(here, capsys):
    assert evaluation.main(["--task", "chess"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("eval: unknown --task 'chess'") and err.count("\n") == 1 and not out


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    model, path = torch.nn.Linear(2, 1), tmp_path / "checkpoint.pt"
    optimizer = torch.optim.AdamW(model.parameters())
    runs.save_checkpoint(path, model, optimizer, step=1, seconds={})
    before = path.read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError("no space")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        runs.save_checkpoint(path, model, optimizer, step=2, seconds={})
    assert path.read_bytes() == before
    assert runs.load_checkpoint(path, model, optimizer)["step"] == 1
