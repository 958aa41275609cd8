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

def heads_of(config) -> tuple[int, int]:
    """Width of the queries and of the keys."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head, config.num_key_value_heads * head

def parameter_count(config) -> int:
    """Of a stock config, embeddings included."""
    h, V, (q, kv) = config.hidden_size, config.vocab_size, heads_of(config)
    layer = 2 * h * (q + kv) + 3 * h * config.intermediate_size + 2 * h
    return config.num_hidden_layers * layer + h * (V * (2 - config.tie_word_embeddings) + 1)

def adapter_count(config, rank: int) -> int:
    """Parameters of adapters of this rank on all linear layers."""
    h, (q, kv) = config.hidden_size, heads_of(config)
    sides = [(h, q), (h, kv), (h, kv), (q, h)] + 3 * [(h, config.intermediate_size)]
    return config.num_hidden_layers * rank * sum(a + b for a, b in sides)

def estimate(config, cfg, prompt_length: int, half: bool) -> dict:
    """Of a training step: gigabytes of memory per process (weights; trained: gradients and AdamW's
    moments, and of adapters themselves; rollout, update: what each adds at its peak) and, of all
    processes, floating point operations and layers started, a backward pass counting as two
    (rollout_flops, update_flops of a step, eval_flops of an evaluation of the held-out examples;
    rollout_layers and so on).

    How many tensors a layer and the sampler hold at once was fitted to measured peaks, and checked
    on other shapes (tests/measure/memory.py)."""
    h, inner, V = config.hidden_size, config.intermediate_size, config.vocab_size
    layers, L, C = config.num_hidden_layers, cfg.block_length, cfg.completion_length
    width, S = 2 if half else 4, prompt_length + C
    frozen, tied = cfg.lora_rank > 0, config.tie_word_embeddings
    base, adapters = parameter_count(config), adapter_count(config, cfg.lora_rank)
    ends, full = h * V * (2 - tied), 0 if frozen else 4 * base     # embeddings and head
    weights = (base - ends) * (0.52 if cfg.quantize else width if frozen else 4)
    weights += ends * (width if frozen else 4) + 2 * h * V * (frozen and half and not tied)
    trained = 16 * adapters if frozen else 12 * base
    rows = min(cfg.rollout_batch or 64, cfg.prompts * cfg.completions)
    open_ = max(L, cfg.eval_block_length)                      # positions under the LM head
    rollout = rows * (S * width * (3 if frozen else 2) * (h + inner)
                      + open_ * V * 4 * (1.9 if cfg.top_k else 5.4))
    if cfg.cache != "none":                                    # keys and values
        rollout += rows * S * width * layers * 2 * heads_of(config)[1]
    layer = width * (8 * h + 4 * inner) + 8 * h * half         # bytes a token in a backward pass
    again = cfg.gradient_checkpointing == "on"
    kept = width * h if again else layer
    at_once = max(1, cfg.tokens_per_pass // S)
    update = at_once * (S * layers * kept + max(
        S * layer * again, L * V * 4 * (1.6 if cfg.top_k else 4.2)))
    update += 2 * base * (half and not frozen)                 # autocast's copies of the weights
    if not cfg.sft:                                            # a second model, and a third
        weights += full * ((cfg.kl > 0 and cfg.kl_reference == "base") + (cfg.value_model == "on"))
        trained *= 1 + (cfg.value_model == "on")
    head, body = 2 * h * V * L, 2 * (base - ends + adapters * frozen)
    token = body + 4 * S * h * layers                          # of one token, without the head
    blocks = C / L
    inside = cfg.steps - blocks                                # steps that do not come to a block
    computed = {"none": cfg.steps * S, "block": cfg.steps * 2 * L, "dual": blocks * S + inside * L,
                "prefix": blocks * S + inside * (C + L) / 2}[cfg.cache]
    forwards, evaluated = 3 - frozen + again, prompt_length + (cfg.eval_length or C)
    a_call = 2 * (cfg.eval_block_length or L) if cfg.cache == "block" else evaluated     # tokens
    memory = {"weights": weights, "trained": trained, "rollout": rollout, "update": update,
              "total": weights + trained + max(rollout, update)}
    scored, evaluations = states_scored(cfg), sum(map(int, cfg.eval_steps.split(",")))
    batches = [0 if cfg.sft else math.ceil(cfg.prompts * cfg.completions / rows),
               math.ceil(cfg.eval_examples / (cfg.rollout_batch or 64))]
    return {**{k: v / 1e9 for k, v in memory.items()},
            "rollout_flops": 0 if cfg.sft else cfg.prompts * cfg.completions * (
                computed * token + cfg.steps * head),
            "update_flops": scored * (forwards * S * token + 3 * head),
            "eval_flops": cfg.eval_examples * evaluations * (
                a_call * (body + 4 * evaluated * h * layers) + head),
            "rollout_layers": layers * batches[0] * cfg.steps,
            "update_layers": layers * math.ceil(scored / at_once) * (3 + again),
            "eval_layers": layers * batches[1] * evaluations}

def seconds(cost: dict, part: str, rate: float, processes: int = 1, gpu: bool = True) -> float:
    """Of "rollout", "update" or "eval" by such an estimate: 40 % of the matmul rate, or what the
    CPU needs to start a GPU's kernels, whichever takes longer."""
    launched = LAUNCH * cost[f"{part}_layers"] * gpu
    return max(cost[f"{part}_flops"] / (0.4 * rate), launched) / processes

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
    extra = extra / 3 + (cfg.value_model == "on")              # a forward each; as much again
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
    """cfg with rollout_batch and tokens_per_pass, where they are 0, and gradient_checkpointing auto
    decided: as large as fits nine tenths of the memory, checkpointing last. None of them changes a
    gradient."""
    def with_largest(part: str, choices: list):
        for some in choices:
            at = dataclasses.replace(cfg, **some)
            cost = estimate(config, at, prompt_length, device != "cpu")
            if cost["weights"] + cost["trained"] + cost[part] < 0.9 * room(device):
                break
        return at
    kept = [cfg.gradient_checkpointing] if cfg.gradient_checkpointing != "auto" else ["off", "on"]
    tokens = [cfg.tokens_per_pass] if cfg.tokens_per_pass else [4096, 2048, 1024]
    rows = [cfg.rollout_batch] if cfg.rollout_batch else [128, 64, 32, 16, 8, 4, 2, 1]
    cfg = with_largest("update", [{"gradient_checkpointing": k, "tokens_per_pass": n}
                                  for k in kept for n in tokens])
    return with_largest("rollout", [{"rollout_batch": n} for n in rows])

def whole_run(cost: dict, cfg, rate: float, processes: int = 1, gpu: bool = True) -> dict:
    """Seconds of rollout, update, eval (each of one) and of the whole run, evaluations before,
    after and on the way included; and its steps: max_steps, or as many as --hours allow."""
    each = {part: seconds(cost, part, rate, processes, gpu)
            for part in ("rollout", "update", "eval")}
    step = each["rollout"] + each["update"]
    step += each["eval"] / 2 / cfg.eval_every if cfg.eval_every else 0     # points of the curve
    steps = cfg.max_steps
    if cfg.hours:
        steps = max(1, min(steps, int((3600 * cfg.hours - 2 * each["eval"]) / step)))
    return {**each, "steps": steps, "total": steps * step + 2 * each["eval"]}

def announce(config, cfg, lengths: tuple, device: str, processes: int) -> str:
    """The whole run in a sentence, then its parts. lengths: tokens of the longest prompt, and of a
    usual one. Raises BadInput if weights and optimizer alone do not fit the GPU."""
    gpu = device != "cpu"
    cost, usual = (estimate(config, cfg, length, gpu) for length in lengths)
    run = whole_run(usual, cfg, matmul_rate(device), processes, gpu)
    size = {k: f"{v:.1f} GB" if v >= 1 else f"{1e3 * v:.0f} MB" for k, v in cost.items()}
    time = {k: duration(v) for k, v in run.items()}
    kind = "fine-tuning" if cfg.sft else f"--preset {cfg.preset}" if cfg.preset else "one night"
    where = torch.cuda.get_device_name(device) if gpu else "this CPU"
    fewer = f", what --hours {cfg.hours:g} allow," if run["steps"] < cfg.max_steps else ""
    other = "" if cfg.preset or cfg.sft else "; --preset paper runs the published sizes"
    step = duration(run["rollout"] + run["update"])
    text = (f"{cfg.model}, {kind}: {run['steps']} steps{fewer} in {time['total']}, evaluations "
            f"included, and {size['total']} of memory, an estimate for {where}{other}\n"
            f"a step {step}: rollout {time['rollout']}, cache {cfg.cache}, update {time['update']};"
            f" an evaluation {time['eval']}; weights {size['weights']}, "
            f"{'adapters' if cfg.lora_rank else 'gradients'} and optimizer {size['trained']}, "
            f"rollout {size['rollout']} of {cfg.rollout_batch} rows, or update {size['update']} of "
            f"{cfg.tokens_per_pass} tokens")
    text += ", activations computed twice" * (cfg.gradient_checkpointing == "on")
    if gpu:
        least, there = cost["weights"] + cost["trained"], room(device)
        if least > there:
            smaller = ("a larger GPU" if cfg.quantize else "--quantize 4bit" if cfg.lora_rank else
                       "--lora-rank 64")
            raise BadInput(f"weights and optimizer need {least:.0f} GB, this GPU has {there:.0f}: "
                           f"{smaller}")
        if cost["total"] > there:
            text += (f"\nwarning: this GPU has {there:.0f} GB; smaller --rollout-batch and "
                     "--tokens-per-pass need less")
    return text

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
