"""Protects the README: its recipes run, its tables are those of assets/*.csv, what it names exists. Run: pytest tests/test_readme.py"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tables
import toy
import torch

import agrpo
import eval as evaluation

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = {re.match(r"# (\w+)\.py", block)[1]: block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if block.startswith("# ")}


@pytest.mark.parametrize("page", tables.PAGES, ids=["README", "assets"])
def test_tables_are_those_of_the_csv_files(page):
    text = page.read_text()
    assert re.findall(r"<!-- (\w+) -->", text) and tables.filled(text) == text, "python tests/tables.py makes them anew"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_runs(name, here, quick):
    assert len(RECIPES[name].splitlines()) <= 20
    (here / f"{name}.py").write_text(RECIPES[name])
    shape = ["--completion-length", "8", "--block-length", "8", "--steps", "4"] if name == "sort_digits" else []
    done = subprocess.run([sys.executable, f"{name}.py", *quick, *shape, "--max-steps", "2"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "2 training steps" in done.stdout
    folder, = Path("runs").iterdir()
    assert len(evaluation.read_log(folder / "log.csv")) == 2


def test_recipes_are_a_task_and_a_method():
    assert list(RECIPES) == ["sort_digits", "every_other"]


def test_the_recipe_of_a_task_reads_a_file_too(here, quick):
    (here / "sort_digits.py").write_text(RECIPES["sort_digits"])
    (here / "digits.jsonl").write_text("".join(json.dumps({"digits": str(i)}) + "\n" for i in range(100000, 100200)))
    done = subprocess.run([sys.executable, "sort_digits.py", *quick, "--completion-length", "8", "--block-length", "8", "--steps", "4", "--max-steps", "1",
                           "--data", "digits.jsonl"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_the_recipe_of_a_method_is_unbiased(monkeypatch):
    """Its expected gradient over both starts of all trajectories is autograd of the exact E[R]."""
    monkeypatch.setattr(sys, "exit", lambda code: None)
    monkeypatch.setattr(agrpo, "main", lambda argv: 0)
    monkeypatch.setattr(agrpo, "VIEWS", dict(agrpo.VIEWS))
    exec(RECIPES["every_other"], {})
    cfg = agrpo.Config(completion_length=3, block_length=3, steps=3)
    policy = toy.TableDenoiser(3, 2, seed=1)
    found = toy.enumerate_trajectories(policy, cfg)
    prob, reward = torch.stack([f[2] for f in found]), torch.tensor([toy.reward_of(f[0], 2) for f in found], dtype=torch.float64)
    exact, = torch.autograd.grad((prob * reward).sum(), policy.table, retain_graph=True)
    traj, ours, starts = toy.as_trajectory(policy, cfg, found), 0.0, set()
    adv, draw = prob.detach() * reward, torch.randint
    for start in (0, 1):
        monkeypatch.setattr(torch, "randint", lambda high, shape, generator=None, start=start: starts.add(high) or torch.full(shape, start))
        views = agrpo.VIEWS["every-other"](traj, adv, cfg, policy.mask_id, None)
        monkeypatch.setattr(torch, "randint", draw)
        loss, _ = agrpo.policy_loss(policy, traj, views, adv, cfg)
        ours = ours - torch.autograd.grad(loss, policy.table)[0] * len(found) * cfg.steps / 2
    assert starts == {2} and float((ours - exact).norm() / exact.norm()) < 1e-12


def test_functions_and_sections_of_the_map_exist():
    rows = README.split("| equation | function in agrpo.py |")[1].split("\n\n")[0].splitlines()[2:]
    book = json.loads((ROOT / "walkthrough.ipynb").read_text())
    sections = {number for cell in book["cells"] for number in re.findall(r"^## (\d+) ", "".join(cell["source"]), re.MULTILINE)}
    assert len(rows) > 12
    for row in rows:
        _, _, functions, where, _, _ = (cell.strip() for cell in row.split("|"))
        for name in re.findall(r"`([\w.]+)`", functions):
            thing = evaluation if name == "FAMILIES" else agrpo
            for part in name.split("."):
                thing = getattr(thing, part)
        assert set(where.split(", ")) <= sections, row


@pytest.mark.parametrize("page", tables.PAGES, ids=["README", "assets"])
def test_links_lead_somewhere(page):
    text = page.read_text()
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        assert not path or (page.parent / path).exists(), link
        if anchor:
            there = headings if not path else {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(
                r"^#+ (.*)$", (page.parent / path).read_text(), re.MULTILINE)}
            assert anchor in there, link


def test_flags_exist():
    flag = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    known = {"--help"}
    for tool in ("agrpo.py", "eval.py"):
        known |= set(flag.findall(subprocess.run([sys.executable, ROOT / tool, "--help"], capture_output=True, text=True).stdout))
    for page in tables.PAGES:
        assert not set(flag.findall(page.read_text())) - known
