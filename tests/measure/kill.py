"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with a
run left alone: nothing may be lost but the step that was under way.

    python tests/measure/kill.py [kills [flags of agrpo.py]]      20 by default, three minutes
"""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

AGRPO = str(Path(__file__).resolve().parents[2] / "agrpo.py")
QUICK = [
    "--base-steps",
    "20",
    "--base-batch",
    "8",
    "--train-examples",
    "64",
    "--eval-examples",
    "16",
    "--prompts",
    "4",
    "--completions",
    "8",
    "--eval-steps",
    "4",
    "--eval-every",
    "5",
    "--device",
    "cpu",
]


def log_of(name):
    path = Path("runs", name, "log.csv")
    return (
        [
            {k: v for k, v in row.items() if "seconds" not in k and "memory" not in k}
            for row in csv.DictReader(open(path))
        ]
        if path.is_file()
        else []
    )


def checkpoint_of(name):
    path = Path("runs", name, "checkpoint.pt")
    return torch.load(path, weights_only=True) if path.is_file() else {"step": 0}


def main(kills, flags):
    work, rng, total = Path(tempfile.mkdtemp()), random.Random(0), 12 * kills
    os.chdir(work)
    env = {
        **os.environ,
        "AGRPO_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, AGRPO, *QUICK, *flags, "--max-steps", str(total)]
    subprocess.run([*command, "--name", "alone"], env=env, check=True, stdout=subprocess.DEVNULL)
    landed = 0
    for i in range(kills):
        before = checkpoint_of("killed")["step"]
        resume = ["--resume"] if Path("runs/killed/config.json").is_file() else []
        process = subprocess.Popen(
            [*command, "--name", "killed", *resume], env=env, stdout=subprocess.DEVNULL
        )
        begun = time.time()
        while (
            checkpoint_of("killed")["step"] == before
            and process.poll() is None
            and time.time() - begun < 60
        ):
            time.sleep(0.02)  # past start-up, then at any moment of a step
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        landed += process.wait() == -signal.SIGKILL
        step = checkpoint_of("killed")["step"]  # readable, whole, and never behind
        assert step >= before and len(log_of("killed")) >= step, (
            before,
            step,
            len(log_of("killed")),
        )
        print(f"kill {i + 1}: at step {step}", flush=True)
    subprocess.run(
        [*command, "--name", "killed", "--resume"], env=env, check=True, stdout=subprocess.DEVNULL
    )
    a, b = checkpoint_of("alone"), checkpoint_of("killed")
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]), "weights differ"
    assert log_of("alone") == log_of("killed"), "logs differ"
    shutil.rmtree(work)
    print(
        f"{landed} of {kills} kills landed in a running process; the run killed and the run left "
        "alone agree to the bit, log and weights"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, sys.argv[2:])
