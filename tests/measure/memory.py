"""Is the memory estimate right? Two training steps of three shapes (random weights, CPU, float32),
each in a process of its own: resident memory of the weights, and the peak of rollout and update
above them, beside what the estimate says.

    python tests/measure/memory.py             writes assets/memory.csv (six minutes, 2 GB)
    python tests/measure/memory.py SHAPE       one of SHAPES, prints its numbers
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SHAPES = {  # name: (V, width, inner, layers, heads, settings); the estimate's coefficients were
    # fitted to three others
    "large vocabulary": (
        126464,
        192,
        512,
        3,
        3,
        dict(
            completion_length=96,
            block_length=12,
            steps=8,
            lora_rank=8,
            rollout_batch=8,
            tokens_per_pass=4 * 196,
        ),
    ),
    "wide, adapters": (
        4000,
        1280,
        3400,
        3,
        10,
        dict(
            completion_length=160,
            block_length=16,
            steps=10,
            lora_rank=32,
            rollout_batch=8,
            tokens_per_pass=8 * 260,
        ),
    ),
    "full fine-tuning, checkpointing": (
        16000,
        640,
        1792,
        6,
        10,
        dict(
            completion_length=128,
            block_length=32,
            steps=4,
            lora_rank=0,
            rollout_batch=8,
            tokens_per_pass=16 * 228,
            gradient_checkpointing="on",
        ),
    ),
}
PROMPT = 100


def resident(peak=False):
    """MB that this process holds, or held at most since `reset`."""
    return (
        next(
            int(line.split()[1])
            for line in open("/proc/self/status")
            if line.startswith("VmHWM" if peak else "VmRSS")
        )
        / 1e3
    )


def reset():
    Path("/proc/self/clear_refs").write_text("5")


def measure(name):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import agrpo
    from methods import join
    from methods.models import Settings
    from support import checkpoints, cost

    torch.set_num_threads(2)
    V, h, inner, layers, heads, settings = SHAPES[name]
    cfg = Settings(
        task="gsm8k",
        prompts=2,
        completions=8,
        temperature=0.6,
        top_k=150,
        top_p=0.99,
        mc_steps=1,
        device="cpu",
        **settings,
    )
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=h,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        use_cache=False,
        max_position_embeddings=1024,
        pad_token_id=None,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    config.is_causal = False
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )(torch.zeros(1, 1).long())
    (torch.ones(512, 512) @ torch.ones(512, 512)).sum()
    if cfg.lora_rank:
        import peft  # noqa: F401
    import gc

    gc.collect()
    empty = resident()
    net = LlamaForCausalLM(config)
    net = checkpoints.add_adapter(net, cfg.lora_rank, 64.0, 0) if cfg.lora_rank else net
    for layer in net.get_decoder().layers if cfg.gradient_checkpointing == "on" else ():
        layer.forward = checkpoints.computed_again(layer)
    policy = agrpo.Policy(net, 5, 6)
    optimizer = agrpo.make_optimizer(policy, cfg)
    prompt = torch.full((16, PROMPT), 7)
    peaks = {"weights": resident() - empty}
    for turn in range(2):  # the first turn makes the optimizer's state
        base = resident()
        reset()
        traj = join(
            [
                agrpo.rollout(
                    policy,
                    prompt[part],
                    torch.ones_like(prompt[part]),
                    cfg,
                    [(turn, i) for i in part],
                )
                for part in torch.arange(16).split(cfg.rollout_batch)
            ]
        )
        peaks["rollout"] = resident(peak=True) - base
        reset()
        before = resident()
        adv = torch.tensor([1.0, -1.0] * 8, dtype=torch.float64)
        views = agrpo.agrpo_views(traj, adv, cfg, 5, agrpo.generator(turn))
        views = agrpo.prepare(policy, traj, views, adv[:, None], cfg)
        for part in agrpo.micro_batches(views, cfg):
            loss, _ = agrpo.policy_loss(policy, traj, views.select(part), cfg)
            loss.backward()
        del loss
        grads = sum(p.grad.numel() for p in policy.parameters() if p.grad is not None) * 4e-6
        peaks["update"] = resident(peak=True) - before - grads
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        peaks["trained"] = resident() - empty - peaks["weights"]
        optimizer.zero_grad(set_to_none=True)
    own = (
        sum(p.numel() for p in policy.parameters() if p.requires_grad) * 4e-6
        if cfg.lora_rank
        else 0
    )  # adapters are among the weights there
    peaks["weights"], peaks["trained"] = peaks["weights"] - own, peaks["trained"] + own
    peaks["total"] = peaks["weights"] + peaks["trained"] + max(peaks["rollout"], peaks["update"])
    estimated = {k: v * 1e3 for k, v in cost.memory(config, cfg, PROMPT, half=False).items()}
    largest = max(estimated["rollout"], estimated["update"])  # nothing is evaluated here
    estimated["total"] = estimated["weights"] + estimated["trained"] + largest
    print(json.dumps({"measured": peaks, "estimated": estimated}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(measure(sys.argv[1]))
    rows = []
    for name in SHAPES:
        exact = {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "100000",
            "MALLOC_TRIM_THRESHOLD_": "100000",
            "MALLOC_ARENA_MAX": "1",
        }  # freed is freed
        result = json.loads(
            subprocess.run(
                [sys.executable, __file__, name],
                capture_output=True,
                text=True,
                check=True,
                env=exact,
            ).stdout.splitlines()[-1]
        )
        for part, got in result["measured"].items():
            rows.append(
                {
                    "shape": name,
                    "part": part,
                    "measured_mb": round(got),
                    "estimated_mb": round(result["estimated"][part]),
                    "ratio": round(result["estimated"][part] / got, 2),
                }
            )
            print(*rows[-1].values(), sep="\t", flush=True)
    import tables
    with tables.writing(ROOT / "assets" / "memory.csv") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
