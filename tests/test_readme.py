"""Protects the README: its recipes run, its tables are those of assets/*.csv, what it names exists.
Run: pytest tests/test_readme.py"""

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
from support import log
from tools import Settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "measure"))
import tables  # noqa: E402

README = (ROOT / "README.md").read_text()
RECIPES = {                            # the blocks that begin with # NAME.py: python NAME.py FLAGS
    re.match(r"# (\w+)\.py: python ", block)[1]: block
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    if re.match(r"# \w+\.py: python ", block)}


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
    for broken in ("<!-- bias -->\n", "<!-- bias -->\n<!-- /bais -->",
                   "<!-- nothing -->\n<!-- /nothing -->",
                   "<!--bias-->\n<!-- bias -->\n<!-- /bias -->",
                   "<!-- bias -->\n<!-- seeds -->\n<!-- /seeds -->\n<!-- /bias -->"):
        with pytest.raises(ValueError):
            tables.filled(broken)


SHOWN = {name: block.splitlines()[0].partition(f"python {name}.py")[2].split()
         for name, block in RECIPES.items()}                   # the flags
TRAINS = [name for name in RECIPES if "main(" in RECIPES[name]]


@pytest.fixture
def tables_of_its_own(monkeypatch):
    """What a recipe changes, for a recipe that runs in this process."""
    for table in ("METHODS", "UNMASK", "TIMESTEPS", "ADVANTAGES"):
        monkeypatch.setattr(agrpo, table, agrpo.Rows(getattr(agrpo, table)))
    tasks = dict(rewards.TASKS)
    yield
    rewards.TASKS.clear()
    rewards.TASKS.update(tasks)


def here_and_now(name, monkeypatch, *flags):
    """Its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    with pytest.raises(SystemExit) as stop:
        exec(RECIPES[name], {"__name__": "__main__"})
    return stop.value.code


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short(name):
    assert len(RECIPES[name].splitlines()) < 20


@pytest.mark.parametrize("name", TRAINS)
def test_a_recipe_trains_and_the_readme_tells_of_its_log(name, here, quick, tables_of_its_own,
                                                         monkeypatch, capsys):
    flags = [*SHOWN[name], *quick, "--max-steps", "2"]
    assert here_and_now(name, monkeypatch, *flags) == 0
    assert "2 training steps" in capsys.readouterr().out
    (folder,) = Path("runs").iterdir()
    rows = log.read_log(folder / "log.csv")
    assert len(rows) == 2
    names = ["reward_PART" if name.startswith("reward_") else name for name in rows[0]]
    told = log.__doc__                                         # of every column
    assert not [name for name in names if not re.search(rf"\b{name}\b", told)]


@pytest.mark.parametrize("name", TRAINS)
def test_the_flags_that_a_recipe_is_shown_with_are_taken(name, here, tables_of_its_own,
                                                         monkeypatch):
    parsed = []
    monkeypatch.setattr(evaluation, "run_training", lambda cfg, *_, **__: parsed.append(cfg) or 0)
    assert here_and_now(name, monkeypatch, *SHOWN[name]) == 0 and len(parsed) == 1


@pytest.mark.whole
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_as_a_file(name, here, quick):
    """Those that train with a file of examples, too, where the task is theirs; others on the tiny
    base model, which is made for them."""
    flags = SHOWN[name] + [*quick, "--max-steps", "2"] * (name in TRAINS)
    if name == "sort_digits":
        Path("digits.jsonl").write_text("".join(f'{{"digits": "{i}"}}\n'
                                                for i in range(100000, 100200)))
        flags += ["--data", "digits.jsonl"]
    Path(f"{name}.py").write_text(RECIPES[name])
    done = subprocess.run([sys.executable, f"{name}.py", *flags], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    said = {"sample": "revealed in steps ["}.get(name, "")
    assert ("2 training steps" if name in TRAINS else said) in done.stdout


def test_the_puzzle_of_the_sampler_alone_can_be_solved():
    puzzle, = re.findall(r'"puzzle": "([0-4]{16})"', RECIPES["sample"])
    answer, = re.findall(r"# ([1-4]{16}), which is right", RECIPES["sample"])
    assert rewards.grade("sudoku", answer, {"puzzle": puzzle, "solution": answer}) == 1


def test_recipes_are_a_task_a_method_and_more():
    assert {"sort_digits", "every_other"} <= set(TRAINS) and "sample" in RECIPES
    for name, block in RECIPES.items():
        assert block.startswith(f"# {name}.py: python {name}.py"), name


def test_the_recipe_of_a_method_is_unbiased(monkeypatch):
    """Its expected gradient over both starts of all trajectories is autograd of the exact E[R]."""
    monkeypatch.setattr(sys, "exit", lambda code: None)
    monkeypatch.setattr(agrpo, "main", lambda argv: 0)
    monkeypatch.setattr(agrpo, "METHODS", agrpo.Rows(agrpo.METHODS))
    exec(RECIPES["every_other"], {})
    cfg = Settings(completion_length=3, block_length=3, steps=3)
    policy = toy.TableDenoiser(3, 2, seed=1)
    found = toy.enumerate_trajectories(policy, cfg)
    prob, reward = (torch.stack([f[2] for f in found]),
                    torch.tensor([toy.reward_of(f[0], 2) for f in found], dtype=torch.float64))
    (exact,) = torch.autograd.grad((prob * reward).sum(), policy.table, retain_graph=True)
    traj, ours, starts = toy.as_trajectory(policy, cfg, found), 0.0, set()
    adv, draw = prob.detach() * reward, torch.randint
    for start in (0, 1):
        monkeypatch.setattr(
            torch,
            "randint",
            lambda high, shape, generator=None, start=start: (
                starts.add(high) or torch.full(shape, start)),
        )
        views = agrpo.METHODS["every-other"].views(traj, adv, cfg, policy.mask_id, None)
        views = agrpo.prepare(policy, traj, views, adv[:, None], cfg)
        monkeypatch.setattr(torch, "randint", draw)
        loss, _ = agrpo.policy_loss(policy, traj, views, cfg)
        ours = ours - torch.autograd.grad(loss, policy.table)[0] * len(found) * cfg.steps / 2
    assert starts == {2} and float((ours - exact).norm() / exact.norm()) < 1e-12


WORKS = {"question": lambda ex: ex["digits"], "gold": lambda ex: ex["digits"],
         "grade": lambda text, ex: float(text == ex["digits"]),
         "generate": lambda n, seed, split: [{"digits": f"{i:04}" + split[:2]} for i in range(n)],
         "lazy": lambda ex, rng: "0"}


@pytest.mark.parametrize(
    "change",
    [{"grade": lambda text, ex: 2.0}, {"grade": lambda text, ex: math.nan},
     {"grade": lambda text, ex: None}, {"grade": lambda text, ex: 1 / 0},
     {"parts": lambda text, ex: {"other": 1.0}}, {"answer": lambda text: text[100]},
     {"question": lambda ex: 7}, {"gold": lambda ex: None}, {"canonical": lambda ex: []},
     {"generate": lambda n, seed, split: []}, {"generate": lambda n, seed, split: None},
     {"generate": None}, {"lazy": None}, {"lazy": lambda ex, rng: 7}],
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
        [*quick, "--task", "mine", "--completion-length", "8", "--block-length", "8", "--steps",
         "4", "--max-steps", "1"],
        "making the tiny base model",
    )
    monkeypatch.setitem(rewards.TASKS, "mine", rewards.Task(**WORKS))
    assert agrpo.main([*flags, "--name", "a"]) == 0 and made in capsys.readouterr().out
    assert agrpo.main([*flags, "--name", "b"]) == 0 and made not in capsys.readouterr().out
    monkeypatch.setitem(
        rewards.TASKS, "mine", rewards.Task(**WORKS | {"lazy": lambda ex, rng: "1"}))
    # edited: another base model
    assert agrpo.main([*flags, "--name", "c"]) == 0 and made in capsys.readouterr().out
    assert evaluation.main(
        ["--model", "runs/c", "--task", "mine", "--steps", "4", "--limit", "4", "--device",
         "cpu"]
    ) == 0
    Path("bad.jsonl").write_text('{"digits": "1234"}\n{"digit": "1"}\n')
    Path("worse.jsonl").write_text('{"digits": "1234"}\n["digits"]\n')
    for name in ("bad", "worse"):
        assert (
            agrpo.main([*flags, "--name", "d", "--data", f"{name}.jsonl"]) == 2
            and f"{name}.jsonl:2" in capsys.readouterr().err
        )


def test_the_readme_is_of_one_sitting():
    lines = README.splitlines()
    assert len(lines) <= 150 and len(README.split()) <= 2000
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize("page", tables.PAGES, ids=["README", "assets"])
def test_links_lead_somewhere(page):
    text = page.read_text()
    headings = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.fullmatch(r"https://arxiv.org/abs/\d{4}\.\d{5}", link):
            continue
        assert not path or (page.parent / path).exists(), link
        if anchor:
            there = (
                headings
                if not path
                else {
                    re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                    for h in re.findall(
                        r"^#+ (.*)$", (page.parent / path).read_text(), re.MULTILINE)
                }
            )
            assert anchor in there, link


def test_flags_exist(capsys):
    flag = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    for tool in (agrpo, evaluation):
        with pytest.raises(SystemExit):
            tool.main(["--help-all"])
    known = {"--all", "--small", "--minutes"} | set(flag.findall(capsys.readouterr().out))
    for page in tables.PAGES:
        assert set(flag.findall(page.read_text())) <= known
