"""What a run is forecast to cost, by model, GPU and preset, from shapes alone.

    python tests/measure/nights.py             assets/nights.csv, which tables.py makes a table of
    python tests/measure/nights.py measured    the forecast of a step by that measured, of gpu.csv
"""
import csv
import dataclasses
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402
from support import cost  # noqa: E402
import tables  # noqa: E402
from shapes import SHAPES, night, stock_config  # noqa: E402

ASSETS = Path(__file__).resolve().parents[2] / "assets"
REACHED = 0.78                         # of the peak by large products, as on the H200 (gpu.csv)
GPUS = {name: (memory, REACHED * peak, generation) for name, memory, peak, generation in (
    ("12 GB (RTX 3060)", 12.6, 25.5e12, 8),    # gigabytes; operations per second of bfloat16,
    ("24 GB (RTX 4090)", 25.4, 165e12, 8),     # summed in float32, dense, by the data sheets;
    ("40 GB (A100)", 42.3, 312e12, 8),         # compute capability
    ("80 GB (H100)", 84.9, 989e12, 9))}
LONGEST, USUAL = 400, 250              # tokens of GSM8K's prompts

OLD = {"block_length": 4, "steps": 128, "cache": "block"}      # of small models in that run
MEASURED = {                           # shape of gpu.csv: model, flags, settings of that run
    "8B": ("llada-8b", {"cache": "none"}, {}),
    "8B, dual cache": ("llada-8b", {"cache": "dual"}, {}),
    "1.7B, block cache": ("sdar-1.7b", {}, OLD),
    "0.6B, block cache": ("qwen3-0.6b-bd3lm", {}, OLD)}

def measured():
    """Forecast by measured seconds of rollout, update and step, of the H200's run 1."""
    with open(ASSETS / "gpu.csv") as f:
        found = {(r["what"], r["unit"]): r["value"] for r in csv.DictReader(f) if r["run"] == "1"}
    rate = 1e12 * float(found["matmul rate", "TFLOP/s"])
    for shape, (name, flags, own) in MEASURED.items():
        cfg = dataclasses.replace(night(name, **flags), **own, rollout_batch=64,
                                  tokens_per_pass=4096, gradient_checkpointing="off")
        forecast, real = cost.work(stock_config(name), cfg, 200), [
            float(next(v for (what, unit), v in found.items()
                       if what.startswith(f"{shape}: {part}") and unit == "s"))
            for part in ("rollout", "update of")]
        guess = [cost.seconds(forecast, part, rate) for part in ("rollout", "update")]
        ratios = [a / b for a, b in zip((*guess, sum(guess)), (*real, sum(real)))]
        print(f"{shape}: rollout, update, step", *(f"{ratio:.2f}" for ratio in ratios))

def main():
    rows = []
    for gpu, (memory, rate, generation) in GPUS.items():
        with mock.patch.multiple(torch.cuda, is_available=lambda: True,
                                 get_device_capability=lambda device: (generation, 0)), \
                mock.patch.object(cost, "room", lambda device: memory):
            for preset in ("", "paper", "justgrpo"):
                for name in SHAPES:
                    config, cfg = stock_config(name), night(name, preset=preset)
                    cfg = cost.fitted(config, cfg, LONGEST, "cuda:0")
                    run = cost.whole_run(cost.estimate(config, cfg, USUAL, True), cfg, rate)
                    total = cost.estimate(config, cfg, LONGEST, True)["total"]
                    rows.append({
                        "model": name, "gpu": gpu, "preset": preset or "one night",
                        "cache": cfg.cache, "rollout_batch": cfg.rollout_batch,
                        "tokens_per_pass": cfg.tokens_per_pass, "gradient_checkpointing":
                        cfg.gradient_checkpointing, "steps": run["steps"],
                        "seconds_a_step": f"{run['rollout'] + run['update']:.1f}",
                        "seconds_an_evaluation": f"{run['eval']:.0f}",
                        "hours": f"{run['total'] / 3600:.1f}", "gigabytes": f"{total:.1f}",
                        "fits": int(total < memory)})
    with tables.writing(ASSETS / "nights.csv") as f:
        out = csv.DictWriter(f, rows[0], lineterminator="\n")
        out.writeheader()
        out.writerows(rows)

if __name__ == "__main__":
    measured() if sys.argv[1:] == ["measured"] else main()
