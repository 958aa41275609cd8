"""One training step for each kind, its gradient saved by the first process. Started by
tests/test_parallel.py, alone or by torchrun:
python tests/parallel.py MODEL_DIR OUT_DIR lora|full|value|controller|sft=PROMPTS ..."""

import dataclasses
import gc
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import agrpo  # noqa: E402
from methods import diffpo, models, scored, sft, tracerl  # noqa: E402
from rewards import TASKS  # noqa: E402


def varied(task, text, example, weights):
    return {"correct": float(sum(map(ord, text)) % 7)}


def step_of(kind, prompts, model, out):
    """A step, and what the first process writes of it."""
    cfg = models.Settings(task="countdown", model=model, prompt="bare", device="cpu",
                          prompts=prompts, completions=4, completion_length=12, block_length=4,
                          steps=6, mc_steps=2, unmasking="low_confidence",
                          lora_rank=4 if kind in ("lora", "value") else 0, tokens_per_pass=80,
                          rollout_batch=5, max_grad_norm=1e9, gradient_checkpointing="on")
    more = {
        "value": {"method": "tracerl", "value_model": "on", "kl": 0.1, "inner_epochs": 2,
                  "position_term": "off", "shrink": 1},
        "controller": {"controller": "threshold", "threshold": 0.03, "unmasking": "threshold",
                       "steps": 12, "position_term": "off"},
        "sft": {"sft": "gold", "tokens_per_pass": 60},
    }
    cfg = dataclasses.replace(cfg, **more.get(kind, {}))
    policy, tokenizer = models.open_policy(cfg, train=True)
    policy.double()
    if kind == "value":
        scored.keep_reference(policy)
        policy.value = tracerl.ValueModel(policy, cfg).double()
        torch.nn.init.constant_(policy.value.head.weight, 0.1)
    if cfg.lora_rank:  # B is zero at first, and A would get no gradient
        for i, (name, p) in enumerate(sorted(policy.named_parameters())):
            if "lora_B" in name:
                p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    trained, grads = [(n, p) for n, p in policy.named_parameters() if p.requires_grad], {}

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            grads.update({name: p.grad.clone() for name, p in trained})
            return super().step(closure)

    optimizer = Watched([{"params": [p for _, p in trained], "scale": 1.0}], lr=0.1)
    examples = TASKS["countdown"].generate(8, 0, "train")
    if kind == "sft":
        rows = sft.sft_examples(tokenizer, cfg, examples, 4096, policy.mask_id)
        row = sft.step_with(tokenizer)(policy, optimizer, rows, 0, cfg)
    else:
        step = {"value": tracerl.train_step, "controller": diffpo.controller_step}.get(
            kind, agrpo.train_step)
        row = step(policy, optimizer, examples, 0, cfg, models.sampler(tokenizer, cfg))
    after = {name: p.data for name, p in trained}
    if agrpo.processes()[0] == 0:
        torch.save(
            {"grads": grads, "after": after,
             "row": {k: v for k, v in row.items() if "seconds" not in k and "memory" not in k}},
            out)


def main(model, out, *kinds):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import accelerate
        accelerate.PartialState(cpu=True)
    torch.set_num_threads(1)
    models.reward_parts = varied
    for kind in kinds:
        name, prompts = kind.split("=")
        step_of(name, int(prompts), model, f"{out}/{name}.pt")
    if agrpo.processes()[1] > 1:
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
