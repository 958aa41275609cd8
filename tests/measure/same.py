"""Do twelve short runs still give the same numbers? Records the log and a hash of the final weights
of each, and compares two records: every column but times and memory, to the bit.

    python tests/measure/same.py record OUT [--root TREE] [--only NAME ...]
    python tests/measure/same.py compare OLD NEW

Run both on one machine. One thread, so that no sum depends on how work was shared out.
"""
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
DATA = HERE.parent / "shared" / "data" / "gsm8k_train.jsonl"
SHORT = ["--device", "cpu", "--seed", "0", "--max-steps", "6", "--prompts", "4", "--completions",
         "8", "--eval-examples", "16", "--eval-every", "3"]
TINY = [*SHORT, "--base-steps", "300", "--train-examples", "256"]
RUNS = {
    "default": TINY,
    "paper": [*TINY, "--preset", "paper"],
    "blocks": [*TINY, "--unmasking", "low_confidence", "--block-length", "4", "--top-k", "5",
               "--top-p", "0.9", "--inner-epochs", "2", "--mc-steps", "2"],
    "exact": [*TINY, "--method", "exact", "--task", "story"],
    "diffu-grpo": [*TINY, "--method", "diffu-grpo", "--inner-epochs", "2"],
    "diffpo": [*TINY, "--method", "diffpo", "--controller", "threshold", "--inner-epochs", "2"],
    "tracerl": [*TINY, "--method", "tracerl", "--value-model", "on", "--inner-epochs", "2"],
    "cache": [*TINY, "--cache", "dual", "--block-length", "4"],
    "sft": [*(w for w in TINY if w not in ("--completions", "8")), "--sft", "gold"],
    "dipo": [*TINY, "--model", "tiny-block", "--method", "dipo", "--block-length", "4"],
    "llada": [*SHORT, "--task", "gsm8k", "--model", "LLADA", "--data", str(DATA), "--steps", "8",
              "--completion-length", "24", "--block-length", "12", "--eval-steps", "8",
              "--lora-rank", "4", "--lora-alpha", "64", "--top-k", "20", "--mc-steps", "4",
              "--lr", "1e-3", "--warmup", "2"],
    "two processes": TINY,
}
NOT_COMPARED = ("rollout_seconds", "update_seconds", "peak_memory_mb")


def weights_hash(folder: Path) -> str:
    """Of all tensors in a saved model, by name."""
    from safetensors.torch import load_file
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def record(out: Path, root: Path, only: list[str]):
    """Runs each of RUNS in an empty folder by the code of `root`."""
    work, found = Path(tempfile.mkdtemp()), {}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
           "AGRPO_CACHE": str(work / "cache")}
    script = next(p for p in (root / "tests").rglob("checkpoints.py"))
    for name, flags in RUNS.items():
        if only and name not in only:
            continue
        if "LLADA" in flags:
            checkpoint = [sys.executable, str(script), "llada", str(work / "llada"), str(DATA)]
            subprocess.run(checkpoint, env=env, check=True, stdout=subprocess.DEVNULL)
        flags = [str(work / "llada") if flag == "LLADA" else flag for flag in flags]
        start = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] * (name == "two processes")
        command = [sys.executable, *start, str(root / "agrpo.py"), *flags, "--name", "run"]
        where = work / ("run-" + name.replace(" ", "-"))
        where.mkdir()
        done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}", flush=True)
            continue
        folder = where / "runs" / "run"
        rows = list(csv.DictReader(open(folder / "log.csv")))
        base, summary = (json.loads((folder / f"{what}.json").read_text())
                         for what in ("eval_base", "summary"))
        found[name] = {
            "columns": list(rows[0]), "weights": weights_hash(folder / "model"),
            "rows": [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in rows],
            "base": [r["completions"] for r in base], "by_steps": summary["by_steps"],
            "keys": sorted(summary), "summary": {k: summary[k] for k in ("base", "trained")}}
        for word in ("base", "trained"):
            found[name]["summary"][word].pop("seconds", None)
        copy = out.parent / f"{out.stem}-weights" / name.replace(" ", "-")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "model", copy)
        print(f"{name}: {len(rows)} steps, weights {found[name]['weights'][:12]}", flush=True)
        out.write_text(json.dumps(found, indent=1))


def difference(a: str, b: str) -> float:
    """Relative, of two cells; infinite unless they are equal or numbers."""
    try:
        a, b = float(a), float(b)
        return abs(a - b) / max(abs(a), abs(b))
    except (TypeError, ValueError):
        return float("inf")


def compare(old: Path, new: Path) -> int:
    """Prints what differs; the exit code is 1 if a run is missing, its weights or completions
    differ, or a column by more than 1e-6 (1e-12 and less is the order of a sum)."""
    before, after, worst = json.loads(old.read_text()), json.loads(new.read_text()), 0
    for name, was in before.items():
        now = after.get(name)
        if now is None:
            print(f"{name}: missing")
            worst = 1
            continue
        found = {}
        for a, b in zip(was["rows"], now["rows"]):
            for column in sorted(set(a) | set(b)):
                if a.get(column) != b.get(column):
                    size = difference(a.get(column), b.get(column))
                    found[column] = max(size, found.get(column, 0))
        other = [k for k in was if k != "rows" and was[k] != now[k]]
        other += ["steps"] * (len(was["rows"]) != len(now["rows"]))
        worst |= bool(other) or max(found.values(), default=0) > 1e-6
        sizes = ", ".join(f"{k} {v:.0e}" for k, v in found.items())
        print(f"{name}: {len(was['rows'])} steps, "
              + (f"{', '.join(other)} differ" if other else "weights and completions to the bit")
              + (f"; relative differences: {sizes}" if found else ", every column, too"))
    return worst


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["help"]
    if what == "compare" and len(rest) == 2:
        sys.exit(compare(*map(Path, rest)))
    if what != "record" or not rest:
        sys.exit(__doc__)
    root = Path(rest[rest.index("--root") + 1]).resolve() if "--root" in rest else HERE
    record(Path(rest[0]), root, rest[rest.index("--only") + 1:] if "--only" in rest else [])
