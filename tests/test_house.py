"""Protects the layout: who imports whom, agrpo.py alone in an empty folder, sizes.
Run: pytest tests/test_house.py"""
import ast
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import agrpo

ROOT = Path(agrpo.__file__).resolve().parent
ALL_FILES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py")
                   if not any(part[0] == "." or part in ("runs", "shared")
                              for part in p.relative_to(ROOT).parts))
FILES = [p for p in ALL_FILES if p.parts[0] != "tests"]
MAY_IMPORT = {                         # a file or a package: what it may import at its top
    "agrpo": (), "rewards": ("support.math_answers", "support.programs", "support.puzzles"),
    "support": ("rewards", "support"), "methods": ("agrpo", "rewards", "support", "methods"),
    "eval": ("agrpo", "rewards", "support", "methods", "eval")}


def module_of(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_at_top(path):
    """Modules of the project that are imported with this one: all but those inside functions."""
    found, left = set(), list(ast.parse((ROOT / path).read_text(encoding="utf-8")).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports by full names only"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(MODULES)) or {node.module}
        left += ast.iter_child_nodes(node)
    return found & set(MODULES)


@pytest.fixture(scope="module")
def graph():
    return {name: imports_at_top(path) for name, path in MODULES.items()}


def within(name, places):
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name, graph):
    room = name.split(".")[0]
    assert room in MAY_IMPORT, f"{name}: in no known place"
    wrong = [other for other in graph[name] if not within(other, MAY_IMPORT[room])]
    assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_no_imports_in_a_circle(graph):
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
    assert set(order) == set(MODULES)
    assert sum(map(len, graph.values())) > 20                  # they were found


def test_agrpo_imports_the_standard_library_and_torch():
    source = ast.parse((ROOT / "agrpo.py").read_text(encoding="utf-8"))
    names = {alias.name for node in source.body if isinstance(node, ast.Import)
             for alias in node.names}
    names |= {node.module for node in source.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch"}


ALONE = '''
import json, sys
import torch
trained = torch.nn.Linear(2, 3)        # what torch itself loads, and when
torch.optim.AdamW(trained.parameters(), fused=True)
trained(torch.ones(1, 2)).sum().backward()
before = set(sys.modules)
import agrpo

class Toy(torch.nn.Module):
    """Four tokens, MASK is the last; each position has logits of its own."""
    mask_id, eos_id, blocks = 4, 9, agrpo.Policy.blocks
    def __init__(self):
        super().__init__()
        self.model, self.table = torch.nn.ParameterList([torch.zeros(4, 4)]), None
    def logits(self, prompt, prompt_mask, state, where):
        z = torch.nn.functional.pad(self.model[0], (0, 1), value=-torch.inf)
        return z.expand(len(state), 4, 5)[where]

def sample(policy, examples, keys, cfg):
    prompt = torch.zeros(len(examples), 1, dtype=torch.long)
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, keys)
    right = (traj.tokens == 2).double().mean(1)
    return traj, {"correct": right}, right == 1

cfg = agrpo.Config(prompts=2, completions=8, completion_length=4, block_length=4, steps=4,
                   mc_steps=4, lr=0.05, warmup=1)
policy = Toy()
optimizer = agrpo.make_optimizer(policy, cfg)
rows = [agrpo.train_step(policy, optimizer, [0, 1, 2], step, cfg, sample) for step in range(40)]
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"rows": rows, "new": sorted(new - set(sys.stdlib_module_names))}))
'''


def alone(folder, script):
    """A script run in a folder by an interpreter that knows of no other."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_file_copied_alone_learns(tmp_path):
    shutil.copy(ROOT / "agrpo.py", tmp_path)
    found = alone(tmp_path, ALONE)
    assert set(found["new"]) <= {"agrpo", "torch"}             # nothing else was imported
    rewards, first = [row["reward"] for row in found["rows"]], found["rows"][0]
    assert first["ratio"] == 1.0 and first["skipped"] == 0 and first["passes"] > 0
    assert sum(rewards[-5:]) / 5 > 0.5 > sum(rewards[:5]) / 5  # it was 1/4 by chance


def test_rows_of_methods_are_loaded_when_their_name_is_asked_for():
    """In an interpreter that has imported nothing of methods/ before."""
    found = alone(ROOT, '''
import json, sys
import agrpo
held = {name: len(getattr(agrpo, name)) for name in ("METHODS", "UNMASK", "TIMESTEPS")}
early = [name for name in sys.modules if name.split(".")[0] in ("methods", "transformers")]
from methods import ROWS
missing = []
for table, rows in ROWS.items():
    for row in rows:
        getattr(agrpo, table)[row]
    for wrong in ("no such row", "iid" if table != "TIMESTEPS" else "threshold"):
        try:
            getattr(agrpo, table)[wrong]
            missing.append((table, wrong))
        except KeyError:
            pass
    own = {"METHODS": {"agrpo", "exact"}, "UNMASK": {"random", "low_confidence"},
           "TIMESTEPS": {"low_discrepancy", "batch_gradient"},
           "ADVANTAGES": {"mean", "leave_one_out", "std"}, "NORMALIZERS": {"steps", "last_step"},
           "OLD_LOGP": {"recorded"}}[table]
    missing += [(table, row) for row in set(getattr(agrpo, table)) - set(rows) - own]
print(json.dumps({"held": held, "early": early, "missing": missing}))
''')
    assert found["held"] == {"METHODS": 2, "UNMASK": 2, "TIMESTEPS": 2} and not found["early"]
    assert not found["missing"]        # and no row that ROWS does not know


# ----------------------------------------------------------------------------------------- sizes
ROOMS = [(str(p.relative_to(ROOT)), most) for folder, most in (("methods", 250), ("support", 350))
         for p in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("name, most", [
    ("agrpo.py", 600), ("rewards.py", 500), ("eval.py", 400), *ROOMS])
def test_files_are_short(name, most):
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= most, f"{name} has {lines} lines"


def test_agrpo_has_at_most_8000_tokens():
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENCODING, tokenize.ENDMARKER}
    source = io.StringIO((ROOT / "agrpo.py").read_text(encoding="utf-8"))
    tokens = sum(t.type not in blank for t in tokenize.generate_tokens(source.readline))
    assert tokens <= 8000, f"agrpo.py has {tokens} tokens"


def too_wide(text):
    return {number: len(line) for number, line in enumerate(text.splitlines(), start=1)
            if len(line) > 100}


@pytest.mark.parametrize("path", ALL_FILES, ids=str)
def test_no_line_is_wider_than_100_columns(path):
    wide = too_wide((ROOT / path).read_text(encoding="utf-8"))
    assert not wide, f"line: columns, {wide}"


def test_no_line_of_the_notebook_is_wider_than_100_columns():
    cells = json.loads((ROOT / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    wide = {f"code cell {i}": too_wide(text) for i, text in enumerate(code, 1) if too_wide(text)}
    assert code and not wide, f"line: columns, by cell: {wide}"


def test_agrpo_reads_all_of_its_settings():
    source = (ROOT / "agrpo.py").read_text(encoding="utf-8")
    idle = [field.name for field in dataclasses.fields(agrpo.Config)
            if not re.search(rf"\bcfg\.{field.name}\b", source)]
    assert not idle, f"not read by agrpo.py: {', '.join(idle)}"
