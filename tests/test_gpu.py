"""Protects the check that is run where a GPU is: every line of it, on the CPU, without tyro and
math-verify. Run: pytest tests/test_gpu.py --all"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = "tyro", "math_verify"


@pytest.mark.whole
def test_every_part_passes_on_the_cpu(tmp_path):
    script = str(ROOT / "tests" / "measure" / "gpu.py")
    argv = [script, "--device", "cpu", "--small", "--out", str(tmp_path)]
    code = (f"import runpy, sys; sys.modules.update(dict.fromkeys({WITHOUT})); sys.argv = {argv}; "
            f"runpy.run_path({script!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert {row["part"] for row in figures} == {
        "same", "caches", "steps", "runs", "families", "large", "compile"}
    assert sum(row["verdict"] == "pass" for row in figures) > 50
    assert len((tmp_path / "gpu.csv").read_text().splitlines()) == len(figures) + 1
