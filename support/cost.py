"""What a run will cost, from shapes alone: memory and time; and what to do when it was too much."""
import dataclasses
import math
import os
import resource
import sys
import timeit
import traceback

import torch

from rewards import BadInput

SMALL = 1e9                            # parameters up to which a model may run without a GPU
LAUNCH = 2.75e-3                       # seconds in which the CPU starts a layer's kernels: an
                                       # H200's machine, 28 layers of any width (assets/gpu.csv)

def attention_widths(config) -> tuple[int, int]:
    """Of the queries and of the keys."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head, config.num_key_value_heads * head

def parameter_count(config) -> int:
    """Of a stock config, embeddings included."""
    h, V, (q, kv) = config.hidden_size, config.vocab_size, attention_widths(config)
    layer = 2 * h * (q + kv) + 3 * h * config.intermediate_size + 2 * h
    return config.num_hidden_layers * layer + h * (V * (2 - config.tie_word_embeddings) + 1)

def adapter_count(config, rank: int) -> int:
    """Parameters of adapters of this rank on all linear layers."""
    h, (q, kv) = config.hidden_size, attention_widths(config)
    sides = [(h, q), (h, kv), (h, kv), (q, h)] + 3 * [(h, config.intermediate_size)]
    return config.num_hidden_layers * rank * sum(a + b for a, b in sides)

def estimate(config, cfg, prompt_length: int, half: bool, processes: int = 1) -> dict:
    """What a training step takes: `memory` and `work`."""
    return memory(config, cfg, prompt_length, half) | work(config, cfg, prompt_length, processes)

def memory(config, cfg, prompt_length: int, half: bool) -> dict:
    """Gigabytes of a process: weights; trained: gradients and AdamW's moments, and adapters
    themselves; what rollout, update and evaluation add at their peaks; total.

    How many tensors a layer and the sampler hold at once was fitted to measured peaks, and checked
    on other shapes (tests/measure/memory.py)."""
    h, inner, V = config.hidden_size, config.intermediate_size, config.vocab_size
    layers, L, C = config.num_hidden_layers, cfg.block_length, cfg.completion_length
    width, S = 2 if half else 4, prompt_length + C
    frozen, tied = cfg.lora_rank > 0, config.tie_word_embeddings
    base, adapters = parameter_count(config), adapter_count(config, cfg.lora_rank)
    vocabulary, full = h * V * (2 - tied), 0 if frozen else 4 * base   # embeddings and head
    weights = (base - vocabulary) * (0.52 if cfg.quantize else width if frozen else 4)
    weights += vocabulary * (width if frozen else 4) + 2 * h * V * (frozen and half and not tied)
    trained = 16 * adapters if frozen else 12 * base

    def denoising(rows, length, open_, keys_and_values, logits):
        a_row = length * width * (3 if frozen else 2) * (h + inner) + open_ * V * 4 * logits
        return rows * (a_row + keys_and_values * length * width * layers * 2
                       * attention_widths(config)[1])
    batch, N = cfg.rollout_batch or 64, cfg.prompts * cfg.completions
    rollout = denoising(min(batch, N), S, max(L, cfg.eval_block_length), cfg.cache != "none",
                        1.9 if cfg.top_k else 5.4)
    evaluation = denoising(min(batch, cfg.eval_examples), prompt_length + (cfg.eval_length or C),
                           cfg.eval_block_length or L, cfg.cache == "block", 1.9)
    layer = width * (8 * h + 4 * inner) + 8 * h * half         # bytes a token in a backward pass
    again = cfg.gradient_checkpointing == "on"
    kept = width * h if again else layer
    update = max(1, cfg.tokens_per_pass // S) * (S * layers * kept + max(
        S * layer * again, L * V * 4 * (1.6 if cfg.top_k else 4.2)))
    update += 2 * base * (half and not frozen)                 # autocast's copies of the weights
    if not cfg.sft:                                            # a second model, and a third
        weights += full * ((cfg.kl > 0 and cfg.kl_reference == "base") + (cfg.value_model == "on"))
        trained *= 1 + (cfg.value_model == "on")
    total = weights + trained + max(rollout, update, evaluation)
    return {k: v / 1e9 for k, v in {
        "weights": weights, "trained": trained, "rollout": rollout, "update": update,
        "evaluation": evaluation, "total": total}.items()}

def work(config, cfg, prompt_length: int, processes: int = 1) -> dict:
    """Of a training step, and of an evaluation of all held-out examples: floating point operations
    of all processes (rollout_flops, update_flops, eval_flops), and the layers that one process
    starts (rollout_layers and so on). A backward pass counts as two forwards, as one through frozen
    weights; against torch's own count: tests/test_night.py."""
    h, V, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    L, C, T, N = cfg.block_length, cfg.completion_length, cfg.steps, cfg.prompts * cfg.completions
    S, blocks, frozen = prompt_length + C, C / L, cfg.lora_rank > 0
    adapters = 2 * adapter_count(config, cfg.lora_rank) * frozen
    body = 2 * (parameter_count(config) - h * V * (2 - config.tie_word_embeddings)) + adapters

    def attention(tokens, length):     # tokens that see so many
        return tokens * 4 * length * attention_widths(config)[0] * layers

    def forward(tokens, length):
        return tokens * body + attention(tokens, length)

    def head(block, a_step):           # of the positions that are open, on average
        return h * V * (block + a_step)
    later = T - blocks                                         # steps that do not begin a block
    tokens = {"none": T * S, "block": T * 2 * L + prompt_length, "dual": blocks * S + later * L,
              "prefix": blocks * S + later * (C + L) / 2}[cfg.cache]
    again = cfg.gradient_checkpointing == "on"
    eval_steps, eval_S = all_steps(cfg), prompt_length + (cfg.eval_length or C)
    eval_L = cfg.eval_block_length or L
    a_call = 2 * eval_L if cfg.cache == "block" else eval_S    # tokens
    scored, batch = states_scored(cfg), cfg.rollout_batch or 64

    def batches(rows, size):           # of one process
        return math.ceil(math.ceil(rows / processes) / size)
    return {
        "rollout_flops": 0 if cfg.sft else N * (forward(tokens, S) + T * head(L, C / T)),
        "update_flops": scored * ((3 - frozen + again) * forward(S, S) + (3 - frozen) * head(
            L, C / T) + frozen * (S * adapters + attention(S, S))),        # these two cost three
        "eval_flops": cfg.eval_examples * sum(
            n * (forward(a_call, eval_S) + head(eval_L, (cfg.eval_length or C) / n))
            for n in eval_steps),
        "rollout_layers": 0 if cfg.sft else layers * batches(N, min(batch, N)) * T,
        "update_layers": layers * batches(scored, max(1, cfg.tokens_per_pass // S)) * (3 + again),
        "eval_layers": layers * batches(cfg.eval_examples, batch) * sum(eval_steps)}

def all_steps(cfg) -> list[int]:
    """The numbers of denoising steps of an evaluation."""
    return [int(n) for n in cfg.eval_steps.split(",")]

def seconds(cost: dict, part: str, rate: float, processes: int = 1, gpu: bool = True) -> float:
    """Of "rollout", "update" or "eval" by such an estimate: 40 % of the matmul rate, or what the
    CPU needs to start a GPU's kernels, whichever takes longer."""
    return max(cost[f"{part}_flops"] / (0.4 * rate) / processes,
               LAUNCH * cost[f"{part}_layers"] * gpu)

def states_scored(cfg) -> float:
    """Forward and backward passes over a prompt and a completion in a training step."""
    if cfg.sft:
        return cfg.prompts
    T, blocks = cfg.steps, cfg.completion_length // cfg.block_length
    each = {"agrpo": min(cfg.mc_steps, T), "diffu-grpo": 1, "diffpo": 2,
            "tracerl": -(-T // cfg.shrink),
            "dipo": 2 * min(cfg.block_length, -(-T // blocks))}.get(cfg.method, T)
    if cfg.controller != "off":
        each = 1 if cfg.controller_training == "alone" else each + 3
    extra = (cfg.kl > 0 and cfg.kl_reference == "base") + (cfg.cache in ("prefix", "dual"))
    extra = extra / (3 - (cfg.lora_rank > 0)) + (cfg.value_model == "on")  # a forward; all again
    return cfg.prompts * cfg.completions * cfg.inner_epochs * each * (1 + extra)

def matmul_rate(device: str) -> float:
    """Operations per second of a large matrix product: bfloat16 on a GPU, float32 else."""
    n, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (1024, torch.float32)
    a = torch.randn(n, n, dtype=dtype, device=device)     # zeros or ones would be faster
    seconds = timeit.repeat(lambda: float((a @ a)[0, 0]), number=1)        # float waits for it
    return 2 * n**3 / min(seconds)

def room(device: str) -> float:
    """Gigabytes of memory that a GPU has, or this machine."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9

def fitted(config, cfg, prompt_length: int, device: str):
    """cfg with rollout_batch and tokens_per_pass, where they are 0, and gradient_checkpointing,
    where it is auto, decided: the largest that fit into 0.9 of the memory; checkpointing only where
    nothing fits without it. None of them changes a gradient."""
    def largest(cfg, parts: tuple, choices: list):
        for some in choices:
            at = dataclasses.replace(cfg, **some)
            cost = memory(config, at, prompt_length, device != "cpu")
            most = max(cost[part] for part in parts)
            if cost["weights"] + cost["trained"] + most < 0.9 * room(device):
                break
        return at
    kept = [cfg.gradient_checkpointing] if cfg.gradient_checkpointing != "auto" else ["off", "on"]
    tokens = [cfg.tokens_per_pass] if cfg.tokens_per_pass else [4096, 2048, 1024]
    rows = [cfg.rollout_batch] if cfg.rollout_batch else [128, 64, 32, 16, 8, 4, 2, 1]
    cfg = largest(cfg, ("update",), [{"gradient_checkpointing": k, "tokens_per_pass": n}
                                     for k in kept for n in tokens])
    return largest(cfg, ("rollout", "evaluation"), [{"rollout_batch": n} for n in rows])

def whole_run(cost: dict, cfg, rate: float, processes: int = 1, gpu: bool = True) -> dict:
    """Seconds of rollout, update, eval (each of one) and of the whole run, evaluations before,
    after and on the way included; and its steps: max_steps, or as many as --hours allow."""
    each = {part: seconds(cost, part, rate, processes, gpu)
            for part in ("rollout", "update", "eval")}
    point = each["eval"] / 2 * all_steps(cfg)[0] / sum(all_steps(cfg))     # of the held-out curve
    step = each["rollout"] + each["update"] + (point / cfg.eval_every if cfg.eval_every else 0)
    steps = cfg.max_steps
    if cfg.hours:
        steps = max(1, min(steps, int((3600 * cfg.hours - 2 * each["eval"]) / step)))
    return {**each, "steps": steps, "total": steps * step + 2 * each["eval"]}

def announce(config, cfg, lengths: tuple, device: str, processes: int) -> str:
    """The whole run in a sentence, then its parts. lengths: tokens of the longest prompt, and of a
    usual one. Raises BadInput if weights and optimizer alone do not fit the GPU."""
    gpu, longest = device != "cpu", max(lengths)
    cost = memory(config, cfg, longest, gpu)
    run = whole_run(work(config, cfg, lengths[1], processes), cfg, matmul_rate(device), processes,
                    gpu)
    size = {k: f"{v:.1f} GB" if v >= 1 else f"{1e3 * v:.0f} MB" for k, v in cost.items()}
    time, steps = {k: duration(v) for k, v in run.items()}, run["steps"]
    kind = ", fine-tuning" if cfg.sft else f", --preset {cfg.preset}" if cfg.preset else ""
    fewer = f" (as many as fit into --hours {cfg.hours:g})" if steps < cfg.max_steps else ""
    where = torch.cuda.get_device_name(device) if gpu else "this CPU"
    text = [f"{cfg.model}{kind}, estimated for {where}: {steps} step{'s' * (steps != 1)}{fewer}, "
            f"{time['total']} with evaluations (less where completions end early), "
            f"{size['total']} of memory"
            + ("" if cfg.preset or cfg.sft else "; --preset paper runs the published sizes")]
    text.append(
        f"a step {duration(run['rollout'] + run['update'])}: rollout {time['rollout']}, update "
        f"{time['update']}; an evaluation {time['eval']}; memory: weights {size['weights']}, "
        f"{'adapters' if cfg.lora_rank else 'gradients'} and optimizer {size['trained']}, and the "
        f"largest of rollout {size['rollout']} (at most {cfg.rollout_batch} completions at once), "
        f"evaluation {size['evaluation']}, update {size['update']} ({cfg.tokens_per_pass} tokens "
        f"at once{', with gradient checkpointing' * (cfg.gradient_checkpointing == 'on')})")
    if cfg.cache in ("prefix", "dual"):
        text.append(f"--cache {cfg.cache}: rollouts are approximate, and the update scores tokens "
                    "only; --cache none is exact and slower")
    if cfg.hours and run["total"] > 3660 * cfg.hours:
        text.append(f"warning: a step and two evaluations take {time['total']}, more than --hours "
                    f"{cfg.hours:g}; fewer --eval-examples or --eval-steps take less")
    if gpu:
        least, there = cost["weights"] + cost["trained"], room(device)
        if least > there:
            smaller = ("a larger GPU" if cfg.quantize else "--quantize 4bit" if cfg.lora_rank else
                       "--lora-rank 64")
            raise BadInput(f"weights and optimizer need {least:.0f} GB, this GPU has {there:.0f}: "
                           f"{smaller}")
        if cost["total"] > there:
            text.append(f"warning: this GPU has {there:.0f} GB; smaller --rollout-batch and "
                        "--tokens-per-pass need less")
    return "\n".join(text)

def duration(seconds: float) -> str:
    """'12 s', '3.4 min', '2.0 h', '15 days'"""
    units = ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600), (math.inf, "days", 86400))
    unit, size = next((unit, size) for limit, unit, size in units if seconds < limit)
    n = seconds / size
    return f"{n:.2g} {unit}" if n < 9.95 else f"{n:.0f} {unit}"

def out_of_memory(error: Exception, cfg) -> str:
    """One line: where it ran out, and the flag to change."""
    frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if "rollout" in frames:
        where, flags = "in a rollout", f"--rollout-batch {max(1, cfg.rollout_batch // 2)}"
    elif frames & {"policy_loss", "step_logp", "values", "denoising_loss", "backward"}:
        where, flags = "in the update", f"--tokens-per-pass {max(1, cfg.tokens_per_pass // 2)}"
        if cfg.gradient_checkpointing != "on":
            flags += " or --gradient-checkpointing on"
    else:
        return ("the GPU ran out of memory with weights and optimizer: --quantize 4bit or a "
                "smaller --lora-rank need less")
    return (f"the GPU ran out of memory {where}: --resume with {flags} continues from the last "
            "checkpoint")

def peak_memory_mb() -> int:
    """Highest so far of this process, megabytes: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
