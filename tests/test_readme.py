"""Protects the README: its recipes run, its tables are those of assets/*.csv, what it names exists. Run: pytest tests/test_readme.py"""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy
import torch

import agrpo
import eval as evaluation
import rewards
from support import runs
from tools import Settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "measure"))
import tables  # noqa: E402

README = (ROOT / "README.md").read_text()
RECIPES = {
    re.match(r"# (\w+)\.py", block)[1]: block
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    if block.startswith("# ")
}


@pytest.mark.parametrize("page", tables.PAGES, ids=["README", "assets"])
def test_tables_are_those_of_the_csv_files(page):
    text = page.read_text()
    assert tables.filled(text) == text, "python tests/measure/tables.py makes them anew"
    assert not re.search(
        r"\b[A-Z]+_[A-Z]+\b", re.sub(r"AGRPO_CACHE|OMP_NUM_THREADS|TASK_SHAPES", "", text)
    ), "a placeholder"


def test_every_table_stands_somewhere_and_markers_come_in_pairs():
    assert {
        name for page in tables.PAGES for name in re.findall(r"<!-- (\w+) -->", page.read_text())
    } == set(tables.TABLES)
    for broken in (
        "<!-- bias -->\n",
        "<!-- bias -->\n<!-- /bais -->",
        "<!-- nothing -->\n<!-- /nothing -->",
        "<!--bias-->\n<!-- bias -->\n<!-- /bias -->",
        "<!-- bias -->\n<!-- seeds -->\n<!-- /seeds -->\n<!-- /bias -->",
    ):
        with pytest.raises(ValueError):
            tables.filled(broken)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_runs(name, here, quick):
    assert len(RECIPES[name].splitlines()) < 20
    (here / f"{name}.py").write_text(RECIPES[name])
    shape = (
        ["--completion-length", "8", "--block-length", "8", "--steps", "4"]
        if name == "sort_digits"
        else []
    )
    done = subprocess.run(
        [sys.executable, f"{name}.py", *quick, *shape, "--max-steps", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    if name == "sample":
        assert "revealed in steps [" in done.stdout
        return
    assert "2 training steps" in done.stdout
    (folder,) = Path("runs").iterdir()
    rows = runs.read_log(folder / "log.csv")
    assert len(rows) == 2
    told = README.split("## The log")[1].split("\n## ")[0]  # every column is told of
    assert not [
        column
        for column in rows[0]
        if not re.search(rf"\b{'reward_PART' if column.startswith('reward_') else column}\b", told)
    ]


def test_recipes_are_a_task_and_a_method():
    assert list(RECIPES) == ["sort_digits", "own_reward", "every_other", "sample"]


def test_the_recipe_of_a_task_reads_a_file_too(here, quick):
    (here / "sort_digits.py").write_text(RECIPES["sort_digits"])
    (here / "digits.jsonl").write_text(
        "".join(json.dumps({"digits": str(i)}) + "\n" for i in range(100000, 100200))
    )
    done = subprocess.run(
        [
            sys.executable,
            "sort_digits.py",
            *quick,
            "--completion-length",
            "8",
            "--block-length",
            "8",
            "--steps",
            "4",
            "--max-steps",
            "1",
            "--data",
            "digits.jsonl",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_the_recipe_of_a_method_is_unbiased(monkeypatch):
    """Its expected gradient over both starts of all trajectories is autograd of the exact E[R]."""
    monkeypatch.setattr(sys, "exit", lambda code: None)
    monkeypatch.setattr(agrpo, "main", lambda argv: 0)
    monkeypatch.setattr(agrpo, "METHODS", agrpo.Rows(agrpo.METHODS))
    exec(RECIPES["every_other"], {})
    cfg = Settings(completion_length=3, block_length=3, steps=3)
    policy = toy.TableDenoiser(3, 2, seed=1)
    found = toy.enumerate_trajectories(policy, cfg)
    prob, reward = (
        torch.stack([f[2] for f in found]),
        torch.tensor([toy.reward_of(f[0], 2) for f in found], dtype=torch.float64),
    )
    (exact,) = torch.autograd.grad((prob * reward).sum(), policy.table, retain_graph=True)
    traj, ours, starts = toy.as_trajectory(policy, cfg, found), 0.0, set()
    adv, draw = prob.detach() * reward, torch.randint
    for start in (0, 1):
        monkeypatch.setattr(
            torch,
            "randint",
            lambda high, shape, generator=None, start=start: (
                starts.add(high) or torch.full(shape, start)
            ),
        )
        views = agrpo.METHODS["every-other"].views(traj, adv, cfg, policy.mask_id, None)
        views = agrpo.prepare(policy, traj, views, adv[:, None], cfg)
        monkeypatch.setattr(torch, "randint", draw)
        loss, _ = agrpo.policy_loss(policy, traj, views, cfg)
        ours = ours - torch.autograd.grad(loss, policy.table)[0] * len(found) * cfg.steps / 2
    assert starts == {2} and float((ours - exact).norm() / exact.norm()) < 1e-12


WORKS = {
    "question": lambda ex: ex["digits"],
    "gold": lambda ex: ex["digits"],
    "grade": lambda text, ex: float(text == ex["digits"]),
    "generate": lambda n, seed, split: [{"digits": f"{i:04}" + split[:1]} for i in range(n)],
    "lazy": lambda ex, rng: "0",
}


@pytest.mark.parametrize(
    "change",
    [
        {"grade": lambda text, ex: 2.0},
        {"grade": lambda text, ex: math.nan},
        {"grade": lambda text, ex: None},
        {"grade": lambda text, ex: 1 / 0},
        {"parts": lambda text, ex: {"other": 1.0}},
        {"weights": {"correct": 3, "absent": 1}},
        {"question": lambda ex: 7},
        {"gold": lambda ex: None},
        {"canonical": lambda ex: []},
        {"generate": lambda n, seed, split: []},
        {"generate": lambda n, seed, split: None},
        {"generate": None},
        {"lazy": None},
        {"answer": lambda text: text[100]},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_task_that_cannot_work_is_one_line(change, here, quick, capsys, monkeypatch):
    monkeypatch.setitem(rewards.TASKS, "mine", rewards.Task(**WORKS | change))
    for model in ([], ["--model", "tiny"]):
        assert agrpo.main([*quick, "--task", "mine", *model, "--max-steps", "1"]) == 2
        text = capsys.readouterr().err
        assert "mine" in text and text.count("\n") == 1, text
    assert not Path("runs").exists()


def test_a_task_with_the_least_runs_and_its_base_model_is_its_own(here, quick, capsys, monkeypatch):
    flags, made = (
        [
            *quick,
            "--task",
            "mine",
            "--completion-length",
            "8",
            "--block-length",
            "8",
            "--steps",
            "4",
            "--max-steps",
            "1",
        ],
        "making the tiny base model",
    )
    monkeypatch.setitem(rewards.TASKS, "mine", rewards.Task(**WORKS))
    assert agrpo.main([*flags, "--name", "a"]) == 0 and made in capsys.readouterr().out
    assert agrpo.main([*flags, "--name", "b"]) == 0 and made not in capsys.readouterr().out
    monkeypatch.setitem(
        rewards.TASKS, "mine", rewards.Task(**WORKS | {"lazy": lambda ex, rng: "1"})
    )
    assert (
        agrpo.main([*flags, "--name", "c"]) == 0 and made in capsys.readouterr().out
    )  # edited: another base model
    assert (
        evaluation.main(
            [
                "--model",
                "runs/c",
                "--task",
                "mine",
                "--steps",
                "4",
                "--limit",
                "4",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    Path("bad.jsonl").write_text('{"digits": "1234"}\n{"digit": "1"}\n')
    Path("worse.jsonl").write_text('{"digits": "1234"}\n["digits"]\n')
    for name in ("bad", "worse"):
        assert (
            agrpo.main([*flags, "--name", "d", "--data", f"{name}.jsonl"]) == 2
            and f"{name}.jsonl:2" in capsys.readouterr().err
        )


def test_functions_and_sections_of_the_map_exist():
    rows = (
        README.split("| equation | function, in agrpo.py where no file is named |")[1]
        .split("\n\n")[0]
        .splitlines()[2:]
    )
    book = json.loads((ROOT / "walkthrough.ipynb").read_text())
    sections = {
        number
        for cell in book["cells"]
        for number in re.findall(r"^## (\d+) ", "".join(cell["source"]), re.MULTILINE)
    }
    assert len(rows) > 12
    for row in rows:
        _, _, functions, where, _, _ = (cell.strip() for cell in row.split("|"))
        file = re.search(r"(\w+/\w+)\.py", functions)
        thing_of = importlib.import_module(file[1].replace("/", ".")) if file else agrpo
        for name in re.findall(r"`([\w.]+)`", functions):
            thing = agrpo if hasattr(agrpo, name.split(".")[0]) else thing_of
            for part in name.split("."):
                thing = getattr(thing, part)
        assert set(where.split(", ")) <= sections, row


@pytest.mark.parametrize("page", tables.PAGES, ids=["README", "assets"])
def test_links_lead_somewhere(page):
    text = page.read_text()
    headings = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        assert not path or (page.parent / path).exists(), link
        if anchor:
            there = (
                headings
                if not path
                else {
                    re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                    for h in re.findall(
                        r"^#+ (.*)$", (page.parent / path).read_text(), re.MULTILINE
                    )
                }
            )
            assert anchor in there, link


def test_flags_exist():
    flag = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    known = {"--help", "--all"}
    for tool in ("agrpo.py", "eval.py"):
        known |= set(
            flag.findall(
                subprocess.run(
                    [sys.executable, ROOT / tool, "--help-all"], capture_output=True, text=True
                ).stdout
            )
        )
    for page in tables.PAGES:
        assert not set(flag.findall(page.read_text())) - known
