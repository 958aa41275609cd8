"""Protects training by several processes: the gradient of one process, with adapters, in full, with
a value model, a controller, and of SFT; one log, one checkpoint. Two processes, CPU (gloo).
Run: pytest tests/test_parallel.py"""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from conftest import QUICK

HERE = Path(__file__).resolve().parent
AGRPO = str(HERE.parent / "agrpo.py")


def start(*command, processes=2, **more):
    """A Popen of the script, alone or by torchrun."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    launcher = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
              str(processes)]
    )
    return subprocess.Popen([*launcher, *map(str, command)], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **more)


def run(*command, processes=2):
    process = start(*command, processes=processes)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


KINDS = {"lora": 4, "full": 3, "value": 3, "controller": 3, "sft": 3}     # prompts of a step


@pytest.mark.whole
def test_two_processes_give_the_gradient_of_one(tmp_path):
    """3 prompts do not divide: shares and numbers of passes differ between the processes."""
    write_checkpoint(tmp_path / "m", "llada")
    for n in (1, 2):
        (tmp_path / f"{n}").mkdir()
        code, out, err = run(HERE / "parallel.py", tmp_path / "m", tmp_path / f"{n}",
                             *(f"{kind}={prompts}" for kind, prompts in KINDS.items()), processes=n)
        assert code == 0, err
    for kind in KINDS:
        same_step(kind, *(torch.load(tmp_path / f"{n}/{kind}.pt", weights_only=True)
                          for n in (1, 2)))


def same_step(kind, one, two):
    for part in ("grads", "after"):
        assert one[part].keys() == two[part].keys(), kind
        a, b = (torch.cat([v.flatten() for v in x[part].values()]) for x in (one, two))
        assert a.norm() > 0.1 and (a - b).norm() < 1e-6 * a.norm(), kind
    one, two = one["row"], two["row"]
    assert one.keys() == two.keys(), kind
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-6), kind
    if kind == "sft":
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-9)
        return
    assert one["passes"] == two["passes"] > 0 and one["reward"] == two["reward"], kind
    assert two["ratio"] == pytest.approx(one["ratio"]), kind
    assert kind == "value" or one["ratio"] == pytest.approx(1.0), kind


def log_of(name):
    with open(f"runs/{name}/log.csv") as f:
        return [
            {k: float(v or 0) for k, v in row.items() if "seconds" not in k and "memory" not in k}
            for row in csv.DictReader(f)
        ]


@pytest.mark.whole
def test_a_run_by_two_processes_has_one_log_and_one_checkpoint_and_resumes(here):
    flags = [*QUICK, "--base-steps", "60", "--base-batch", "16", "--eval-examples", "9",
             "--prompts", "3"]  # able to solve some
    assert run(AGRPO, *flags, "--max-steps", "4", "--name", "one", processes=1)[0] == 0
    code, out, err = run(AGRPO, *flags, "--max-steps", "2", "--name", "two")
    assert code == 0 and out.count("held-out examples, greedy") == 1, err
    code, out, err = run(AGRPO, "--resume", "--max-steps", "4", "--name", "two")
    assert code == 0, err
    one, two = log_of("one"), log_of("two")
    assert [r["step"] for r in two] == [0, 1, 2, 3] and any(r["grad_norm"] > 0 for r in one)
    assert all(a == pytest.approx(b, rel=1e-4, abs=1e-6) for a, b in zip(one, two))
    a, b = (torch.load(f"runs/{n}/checkpoint.pt", weights_only=True) for n in ("one", "two"))
    assert all(torch.allclose(a["model"][k], b["model"][k], atol=1e-5) for k in a["model"])
    assert (
        not list(Path("runs/two").glob("*.partial"))
        and (Path("runs/two/model/model.safetensors")).is_file()
    )
    code, out, err = run(AGRPO, "--resume", "--name", "two", "--lr", "7")
    assert code != 0 and err.count("agrpo: ") == 1 and "lr=7.0" in err


@pytest.mark.whole
def test_sigterm_to_the_launcher_leaves_a_checkpoint(here):
    process = start(AGRPO, *QUICK, "--name", "x", "--max-steps", "100000")
    deadline = time.time() + 120
    while not Path("runs/x/checkpoint.pt").is_file() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    done = torch.load("runs/x/checkpoint.pt", weights_only=True)["step"]
    assert process.returncode != 0 and done >= 1 and len(log_of("x")) == done
    assert run(AGRPO, "--name", "x", "--resume", "--max-steps", str(done + 1), processes=1)[0] == 0
