"""How fast is it, and how near the limit? Not run by pytest.

    python tests/measure/bench.py vocabulary      126,464 tokens, width 512, 4 layers, 8 rows of
                                                  100 + 128 (CPU, 8 minutes, 10 GB)
    python tests/measure/bench.py tiny            the laptop's model
    python tests/measure/bench.py llada           LLaDA-8B, 8 rows of 150 + 384 (a GPU of 80 GB)
    python tests/measure/bench.py scaling         how cost grows with completion length, rows, K and
                                                  vocabulary (CPU, 6 minutes)
    python tests/measure/bench.py check           a shape of seconds, to see that it works; its
                                                  numbers say nothing and are not kept
    python tests/measure/bench.py operators       what Python starts in a denoiser call, by source
                                                  (CPU, a minute)
    python tests/measure/bench.py runs runs/*     what finished runs with and without --cache
                                                  learned, and in which time: assets/cache.csv
    python tests/measure/bench.py tables          tables of assets/README.md from bench-*.csv
                                                  and cache.csv

Random weights, adapters of rank 64 but for tiny. Ratios are to the plain recipe, as published for
LLaDA: logits of every position, float64 Gumbel noise on all of them, no row leaves, K separate
passes with a log-softmax over everything; timed on its first steps only, each costs the same.
Floor: floating point operations over this machine's matmul rate, or bytes of the weights over its
bandwidth, whichever takes longer. Writes assets/bench-SHAPE.csv.

Small models wait on a GPU for the CPU. `operators` counts per pass of the decoder: operators, all
that torch dispatches; calls, those that Python makes; kernels, those that are neither a view nor an
allocation nor made of others. Narrow, bfloat16 with float32 adapters, 28 and 32 layers as the
models have; the counts do not depend on width. What only a CPU does is left out: the parts of a
fused norm, and resolve_conj.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import gc
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SHAPES = {  # V, width, inner, layers, heads, rows, prompt, completion, block, steps, K, adapters,
    # tokens per pass
    "vocabulary": (126464, 512, 1536, 4, 8, 8, 100, 128, 16, 64, 12, 64, 2048),
    "tiny": (32, 64, 256, 4, 4, 256, 20, 16, 16, 8, 1, 0, 12288),
    "llada": (126464, 4096, 12288, 32, 32, 8, 150, 384, 12, 128, 24, 64, 4096),
    "check": (2048, 64, 128, 2, 4, 4, 10, 24, 8, 12, 3, 8, 256),  # seconds: does the script work?
    "scaling": (16384, 192, 576, 3, 3, 4, 64, 128, 16, 64, 6, 16, 4096),
}
MASK, EOS = 5, 6
M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def build(shape, device):
    """-> agrpo.Policy on random weights, attention in both directions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import agrpo
    from support.checkpoints import add_adapter

    V, h, inner, layers, heads, *_, rank, _ = shape
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=h,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        use_cache=False,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        pad_token_id=None,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    config.is_causal = False
    torch.manual_seed(0)
    half = device == "cuda"
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
        net = LlamaForCausalLM(config)
        torch.set_default_dtype(before)
    if half:
        net.get_output_embeddings().float()
    for layer in net.model.layers:
        layer.self_attn.is_causal = False
    if rank:
        net = add_adapter(net, rank, 64.0, 0)
    return agrpo.Policy(net.to(device), MASK, EOS)


# ------------------------------------------------------------------------------ the plain recipe
def plain_choice(logits, x, temperature, count, block):
    """Tokens for all positions by Gumbel-max in float64; of the `block` the `count` whose token has
    the highest probability are taken."""
    import torch

    wide = logits.double()
    noise = (-torch.rand_like(wide).log()) ** temperature
    token = (wide.exp() / noise).argmax(-1)
    confidence = torch.softmax(wide, -1).gather(-1, token[..., None])[..., 0]
    confidence = torch.where((x == MASK) & block, confidence, -torch.inf)
    chosen = torch.zeros_like(x, dtype=torch.bool).scatter(
        1, confidence.topk(count, 1).indices, True
    )
    return torch.where(chosen, token, x)


def plain_rollout(policy, prompt, cfg, steps, head_only=False):
    """The first `steps` denoising steps; head_only: logits of the masked positions of the block,
    the rest as it was."""
    import torch

    x, P = (
        torch.cat(
            [prompt, torch.full((len(prompt), cfg.completion_length), MASK, device=prompt.device)],
            1,
        ),
        prompt.shape[1],
    )
    per_block, columns = (
        cfg.steps * cfg.block_length // cfg.completion_length,
        torch.arange(x.shape[1], device=x.device),
    )
    for t in range(steps):
        begin = P + t // per_block * cfg.block_length
        block = ((columns >= begin) & (columns < begin + cfg.block_length)).expand_as(x)
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            if not head_only:
                logits = policy.model(input_ids=x, attention_mask=torch.ones_like(x)).logits
                x = plain_choice(
                    logits, x, cfg.temperature, cfg.completion_length // cfg.steps, block
                )
                continue
            open_ = block & (x == MASK)
            logits = policy.logits(prompt, torch.ones_like(prompt), x[:, P:], open_[:, P:])
            wide = logits.double()
            token = (wide.exp() / (-torch.rand_like(wide).log()) ** cfg.temperature).argmax(-1)
            p = torch.softmax(wide, -1).gather(-1, token[:, None])[:, 0]
            confidence = torch.full(
                x.shape, -torch.inf, dtype=p.dtype, device=x.device
            ).masked_scatter(open_, p)
            candidates = x.masked_scatter(open_, token)
            chosen = torch.zeros_like(open_).scatter(
                1, confidence.topk(cfg.completion_length // cfg.steps, 1).indices, True
            )
            x = torch.where(chosen, candidates, x)
    return x


def plain_update(policy, traj, cfg, passes):
    """`passes` of K: each the state of one time step for all rows, logits and log-softmax of every
    position."""
    import torch

    every = torch.arange(len(traj.tokens), device=traj.tokens.device)
    import agrpo

    for k in range(passes):
        state, target = agrpo.state_at(
            traj, every, torch.full_like(every, (k * cfg.steps) // cfg.mc_steps), MASK
        )
        x = torch.cat([traj.prompt, state], 1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            logits = policy.model(input_ids=x, attention_mask=torch.ones_like(x)).logits
        logp = (logits.float() / cfg.temperature).log_softmax(-1)[:, traj.prompt.shape[1] :]
        loss = -(logp.gather(-1, traj.tokens[..., None])[..., 0] * target).sum()
        loss.backward()


# ------------------------------------------------------------------------------------- measuring
def memory(device, reset=False):
    """MB at most since the last reset, of this process or the GPU's tensors; after a reset, what is
    held now."""
    if device == "cuda":
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is freed, so that peaks are peaks
        Path("/proc/self/clear_refs").write_text("5")
    return (
        next(
            int(line.split()[1])
            for line in open("/proc/self/status")
            if line.startswith("VmRSS" if reset else "VmHWM")
        )
        / 1e3
    )


def timed(work, device, repeat=1, small=None):
    """Median seconds, and peak MB above what was held before, of `small` if that needs as much in
    less time; once before, to warm up, if it is repeated. The peak is taken in a turn of its own,
    in which the allocator gives back at once what is freed: that takes time."""
    import torch

    seconds, libc = [], ctypes.CDLL(None)
    gc.collect()
    libc.mallopt(M_MMAP_THRESHOLD, 2**20)
    before = memory(device, reset=True)
    (small or work)()
    peak = memory(device) - before
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # as it would come to be by itself
    for turn in range(repeat + (repeat > 1)):
        clock = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - clock)
    return statistics.median(seconds[repeat > 1 :]), peak


def bandwidth(device):
    """Bytes per second that are read, of a large sum."""
    import torch

    x, best = torch.ones(2**28 if device == "cuda" else 2**26, device=device), 9e9
    for _ in range(5):
        clock = time.perf_counter()
        float(x.sum())
        best = min(best, time.perf_counter() - clock)
    return 4 * x.numel() / best


def floors(shape, cfg, rate, width):
    """Seconds that operations or bytes must take: {rollout exact, prefix, dual, update}, and the
    operations of the update."""
    V, h, inner, layers, heads, N, P, C, L, T, K, rank, _ = shape
    S, body = (
        P + C,
        layers * (4 * h * h + 3 * h * inner)
        + (layers * rank * (4 * 2 * h + 3 * (h + inner)) if rank else 0),
    )
    per_block = T * L // C

    def forward(queries, keys=S):
        return N * queries * (2 * body + 4 * keys * h * layers)

    open_ = (
        sum(L - k * C // T for k in range(per_block)) * C // L
    )  # masked positions of the block, over all steps
    head, weights = N * open_ * 2 * h * V, width * body + width * h * V

    def seconds(flops, calls):
        return max(flops / rate[0], calls * weights / rate[1])

    blocks = C // L
    prefix = sum(forward(S) + (per_block - 1) * forward(C - b * L) for b in range(blocks))
    passes, back = N * K, 2 if rank else 3  # frozen weights have no gradient of their own
    shown = (
        cfg.block_length - (per_block - 1) / 2 * C / T
    )  # open positions of a drawn state, on average
    update = K * forward(S) * back + passes * shown * 2 * h * V * back
    return {
        "exact": seconds(T * forward(S) + head, T),
        "prefix": seconds(prefix + head, T),
        "dual": seconds(blocks * (forward(S) + (per_block - 1) * forward(L)) + head, T),
        "update": seconds(update, 2),
    }, update


def config(shape, **settings):
    from methods.models import Settings

    V, h, inner, layers, heads, N, P, C, L, T, K, rank, budget = shape
    return Settings(
        **{
            **dict(
                task="gsm8k",
                completion_length=C,
                block_length=L,
                steps=T,
                mc_steps=K,
                temperature=0.6,
                tokens_per_pass=budget,
                rollout_batch=N,
                lora_rank=rank,
                unmasking="low_confidence",
                gradient_checkpointing="off",
            ),
            **settings,
        }
    )


def roll(policy, prompt, full, cfg, keys):
    """A rollout, with a cache if cfg says so; the update scores it as if it were the model's."""
    import agrpo
    from methods.caches import cached_rollout

    if cfg.cache == "none":
        return agrpo.rollout(policy, prompt, full, cfg, keys)
    traj = cached_rollout(policy, prompt, full, cfg, keys)
    traj.old = "recorded"
    return traj


def update(policy, traj, cfg, most=None):
    """A whole update, or its first passes."""
    import torch

    import agrpo

    adv = torch.where(
        torch.arange(len(traj.tokens), device=traj.tokens.device) % 2 == 0, 1.0, -1.0
    ).double()
    views = agrpo.agrpo_views(traj, adv, cfg, MASK, agrpo.generator("bench"))
    views = agrpo.prepare(policy, traj, views, adv[:, None], cfg)
    for part in agrpo.micro_batches(views, cfg)[:most]:
        agrpo.policy_loss(policy, traj, views.select(part), cfg)[0].backward()
    for p in policy.parameters():
        p.grad = None


def ladder(name, device, threads, plain_steps, plain_passes):
    """Every feature in turn, in one run."""
    import torch

    import agrpo
    from support import cost as models
    from support.checkpoints import computed_again

    shape = SHAPES[name]
    V, h, inner, layers, heads, N, P, C, L, T, K, rank, budget = shape
    empty = memory(device, reset=True)
    policy = build(shape, device)
    gc.collect()
    weights = memory(device, reset=True) - empty
    prompt = torch.randint(7, V, (N, P), generator=torch.Generator().manual_seed(0)).to(device)
    full, keys = torch.ones_like(prompt), [("bench", i) for i in range(N)]
    rates, rows = [(models.matmul_rate(device), bandwidth(device)) for _ in range(3)], []

    def row(part, variant, seconds, peak, which, amount, unit):
        peak += weights
        first = next((r for r in rows if r["part"] == part), {"seconds": seconds, "peak_mb": peak})
        rows.append(
            {
                "part": part,
                "variant": variant,
                "seconds": round(seconds, 3),
                unit: round(amount / seconds, 1),
                "peak_mb": round(peak),
                "ratio": round(first["seconds"] / seconds, 2),
                "memory_ratio": round(peak / first["peak_mb"], 2),
                "floor": which,
            }
        )
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)

    print(f"{name} on {device}, {threads} threads; weights {weights:.0f} MB", flush=True)
    repeat = 3 if name in ("tiny", "check") or device == "cuda" else 1
    off = config(shape, position_term="off")

    def ours(cfg):  # and one step a block, whose memory is the same
        return [
            lambda c=c: roll(policy, prompt, full, c, keys)
            for c in (cfg, dataclasses.replace(cfg, steps=C // L))
        ]

    def measure(part, variant, works, which, amount, unit):
        row(part, variant, *timed(works[0], device, repeat, works[1]), which, amount, unit)

    seconds, peak = timed(lambda: plain_rollout(policy, prompt, off, plain_steps), device)
    row("rollout", "plain recipe", seconds * T / plain_steps, peak, "exact", N * C, "tokens_per_s")
    seconds, peak = timed(
        lambda: plain_rollout(policy, prompt, off, 4 * plain_steps, head_only=True), device
    )
    row(
        "rollout",
        "+ head at the block's masked positions",
        seconds * T / (4 * plain_steps),
        peak,
        "exact",
        N * C,
        "tokens_per_s",
    )
    for variant, cfg, which in (
        ("+ one-pass sampler (no float64, no Gumbel noise)", off, "exact"),
        ("+ records of the position law", config(shape), "exact"),
        ("  the same with top-k 150, top-p 0.99", config(shape, top_k=150, top_p=0.99), "exact"),
        ("+ prefix cache", config(shape, cache="prefix"), "prefix"),
        ("+ dual cache", config(shape, cache="dual"), "dual"),
        (
            "  the same with top-k 150, top-p 0.99",
            config(shape, cache="dual", top_k=150, top_p=0.99),
            "dual",
        ),
    ):
        measure("rollout", variant, ours(cfg), which, N * C, "tokens_per_s")
    traj = agrpo.rollout(policy, prompt, full, config(shape), keys)
    seconds, peak = timed(lambda: plain_update(policy, traj, off, plain_passes), device)
    row("update", "plain recipe", seconds * K / plain_passes, peak, "update", N * K, "passes_per_s")
    for variant, cfg in (
        (
            "+ head at the targets, K separate passes",
            dataclasses.replace(off, tokens_per_pass=N * (P + C)),
        ),
        ("+ packed up to --tokens-per-pass", off),
        ("+ position law (head at all open positions)", config(shape)),
        ("  the same with top-k 150, top-p 0.99", config(shape, top_k=150, top_p=0.99)),
    ):
        of = (
            roll(policy, prompt, full, dataclasses.replace(cfg, cache="dual"), keys)
            if cfg.top_k
            else traj
        )
        measure(
            "update",
            variant,
            [lambda most=most: update(policy, of, cfg, most) for most in (None, 2)],
            "update",
            N * K,
            "passes_per_s",
        )
    both = [lambda most=most: update(policy, traj, config(shape), most) for most in (None, 2)]
    decoder = policy.model.get_decoder()
    plain, decoder.forward = decoder.forward, torch.compile(decoder.forward, dynamic=True)
    both[1]()  # compiles
    measure("update", "  position law, torch.compile", both, "update", N * K, "passes_per_s")
    ours(config(shape))[1]()
    measure(
        "rollout",
        "  position law, no cache, torch.compile",
        ours(config(shape)),
        "exact",
        N * C,
        "tokens_per_s",
    )
    decoder.forward = plain
    for layer in policy.model.get_decoder().layers:
        layer.forward = computed_again(layer)
    measure(
        "update", "  position law, gradient checkpointing", both, "update", N * K, "passes_per_s"
    )
    rate = [
        max(r)
        for r in zip(*rates, *[(models.matmul_rate(device), bandwidth(device)) for _ in range(3)])
    ]  # the machine at its best
    floor, update_flops = floors(shape, config(shape), rate, 2 if device == "cuda" else 4)
    for r in rows:
        r["floor_seconds"] = round(floor[r.pop("floor")], 3)
        r["share_of_floor"] = round(r["floor_seconds"] / r["seconds"], 2)
    print(f"{rate[0] / 1e9:.0f} GFLOP/s, {rate[1] / 1e9:.1f} GB/s")
    for r in rows:
        print(
            f"{r['part']} {r['variant']}: floor {r['floor_seconds']} s, "
            f"{r['share_of_floor']} of the time"
            + (
                f", model FLOP utilisation {update_flops / r['seconds'] / rate[0]:.2f}"
                if r["part"] == "update"
                else ""
            )
        )
    return rows


def scaling(device):
    """Seconds of rollout (exact, dual) and update against one size at a time, and the exponent of a
    straight line through the logarithms."""
    import math

    import numpy as np
    import torch

    import agrpo

    base, rows = SHAPES["scaling"], []
    axes = {
        "completion length": (7, (64, 128, 256, 512)),
        "rows": (5, (2, 4, 8, 16)),
        "K": (10, (3, 6, 12, 24)),
        "vocabulary": (0, (4096, 16384, 65536, 126464)),
    }
    for axis, (place, values) in axes.items():
        found = {"rollout": [], "dual rollout": [], "update": []}
        for value in values:
            shape = list(base)
            shape[place] = value
            shape[9] = shape[7] // 2  # two tokens a step
            policy, cfg = build(shape, device), config(shape)
            prompt = torch.randint(
                7, shape[0], (shape[5], shape[6]), generator=torch.Generator().manual_seed(0)
            ).to(device)
            full, keys = torch.ones_like(prompt), [("bench", i) for i in range(len(prompt))]
            traj = agrpo.rollout(policy, prompt, full, cfg, keys)
            for part, work in (
                ("rollout", lambda: agrpo.rollout(policy, prompt, full, cfg, keys)),
                ("update", lambda: update(policy, traj, cfg)),
                (
                    "dual rollout",
                    lambda: roll(
                        policy, prompt, full, dataclasses.replace(cfg, cache="dual"), keys
                    ),
                ),
            ):
                if part == "update" or axis != "K":
                    found[part].append(timed(work, device, small=lambda: None)[0])
        for part, seconds in found.items():
            if seconds:
                exponent = np.polyfit(
                    [math.log(v) for v in values], [math.log(s) for s in seconds], 1
                )[0]
                rows.append(
                    {
                        "axis": axis,
                        "values": " ".join(map(str, values)),
                        "part": part,
                        "seconds": " ".join(f"{s:.3f}" for s in seconds),
                        "exponent": round(float(exponent), 2),
                    }
                )
                print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


FREE = set(
    "alias as_strided as_strided_ chunk contiguous detach empty empty_like empty_strided expand "
    "expand_as flatten lift_fresh narrow permute reshape _reshape_alias resize_ resolve_conj "
    "result_type select slice split squeeze squeeze_ t to transpose unbind _unsafe_view unsqueeze "
    "unsqueeze_ view view_as".split()
)
CASTS = ", adapters cast in every call"
LAYERS = {  # of a rollout: model of shapes.py, keys' heads of 4, --cache
    "0.6B, block cache": ("qwen3-0.6b-bd3lm", 2, "block"),
    "0.6B, block cache" + CASTS: ("qwen3-0.6b-bd3lm", 2, "block"),
    "0.6B": ("qwen3-0.6b-bd3lm", 2, "none"),
    "8B": ("llada-8b", 4, "none"),
    "8B, dual cache": ("llada-8b", 4, "dual"),
}


@contextlib.contextmanager
def named(net):
    """Operators within `with` stand below the name of what called them, in a profile."""
    from unittest import mock

    import torch

    from methods.caches import CachedPolicy

    def under(name, function):
        def call(*args, **kwargs):
            with torch.profiler.record_function(f"from {name}"):
                return function(*args, **kwargs)

        return call

    attention = type(net.get_decoder().layers[0].self_attn)
    stock = sys.modules[attention.__module__]
    kinds = {"RMSNorm": "norms", "Attention": "attention", "DecoderLayer": "layers"}
    with contextlib.ExitStack() as stack:

        def replace(where, what, name):
            new = under(name, getattr(where, what))
            stack.enter_context(mock.patch.object(where, what, new))

        replace(CachedPolicy, "update", "cache")
        replace(stock, "apply_rotary_pos_emb", "rotary")
        replace(torch.nn.functional, "scaled_dot_product_attention", "sdpa")
        replace(net.get_decoder(), "forward", "decoder")
        for module in net.modules():
            own = [name for end, name in kinds.items() if type(module).__name__.endswith(end)]
            if hasattr(module, "lora_A"):
                own = ["linear layers, adapters"]
            if own:
                replace(module, "forward", own[0])
        yield


def count(events) -> dict:
    """Source -> operators, calls, kernels."""
    found = {}

    def above(event):
        while event := event.cpu_parent:
            yield event.name

    def kernels(event):
        name = event.name.removeprefix("aten::")
        inner = [] if name == "_fused_rms_norm" else event.cpu_children
        return sum(map(kernels, inner)) or name not in FREE

    for event in events:
        parents = list(above(event))
        if (
            not event.name.startswith("aten::")
            or event.name == "aten::resolve_conj"
            or "aten::_fused_rms_norm" in parents
        ):
            continue
        source = next((name[5:] for name in parents if name.startswith("from ")), "rollout, head")
        row = found.setdefault(source, {"operators": 0, "calls": 0, "kernels": 0})
        row["operators"] += 1
        if not any(name.startswith("aten::") for name in parents):
            row["calls"] += 1
            row["kernels"] += kernels(event)
    return found


def operators():
    """What Python starts in one pass of the decoder, by source."""
    from unittest import mock

    import gpu
    import torch

    import agrpo
    from methods import caches
    from support import checkpoints

    rows = []
    for name, (model, heads, cache) in LAYERS.items():
        about = gpu.stock_config(model, True)
        layers = {"num_hidden_layers": gpu.SHAPES[model][0][3], "num_key_value_heads": heads}
        config = type(about)(**{**about.to_dict(), **layers, "layer_types": None})
        cfg = gpu.settings_of(model, {"cache": cache}, config, "cpu", True)
        cfg = dataclasses.replace(cfg, steps=2 * cfg.completion_length // cfg.block_length)
        policy = gpu.large_policy(config, gpu.block_of(model, True), cfg, "cpu")
        if not config.tie_word_embeddings:
            policy.model.get_output_embeddings().float()
        sample = gpu.rolled(agrpo.rollout if cache == "none" else caches.cached_rollout)
        batch = [{}, {}], ["a", "b"], cfg
        with contextlib.ExitStack() as stack:
            if name.endswith(CASTS):
                stack.enter_context(
                    mock.patch.object(checkpoints, "adapters_cast_once", contextlib.nullcontext)
                )
            stack.enter_context(checkpoints.adapters_cast_once(policy.model))
            stack.enter_context(named(policy.model))
            sample(policy, *batch)  # what is made once in a rollout
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
                sample(policy, *batch)
        passes = sum(event.name == "from decoder" for event in p.events())
        found = count(p.events())
        for source in sorted(found, key=lambda source: -found[source]["operators"]):
            row = {k: round(n / passes, 1) for k, n in found[source].items()}
            rows.append({"shape": name, "source": source, **row})
        whole = {k: sum(r[k] for r in found.values()) / passes for k in row}
        rows.append({"shape": name, "source": "all", **{k: round(n) for k, n in whole.items()}})
        for row in rows[-len(found) - 1 :]:
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def collect(folders):
    """A row per finished run."""
    import json

    rows = []
    for folder in map(Path, folders):
        if (folder / "summary.json").is_file():
            cfg, summary = (
                json.loads((folder / name).read_text()) for name in ("config.json", "summary.json")
            )
            weights = (
                ""
                if cfg["cache"] == "none"
                else "none"
                if not cfg["importance_cap"]
                else cfg["importance_level"]
            )
            rows.append(
                {
                    "task": cfg["task"],
                    "cache": cfg["cache"],
                    "position_term": cfg["position_term"],
                    "weights": weights,
                    "seed": cfg["seed"],
                    "base": summary["base"]["solved"],
                    "trained": summary["trained"]["solved"],
                    **{k: summary["seconds"][k] for k in ("rollout", "update")},
                }
            )
    return sorted(rows, key=lambda r: [str(x) for x in r.values()])


def tables():
    """Markdown from the CSV files."""
    import tables as pages

    for file in sorted((ROOT / "assets").glob("bench-*.csv")):
        rows = pages.read(file.name)
        print(f"\n{file.name}: {rows[0]['device']}, {rows[0]['versions']}\n")
        if "operators" in rows[0]:
            names = ["shape", "source", "operators", "calls", "kernels"]
            print(pages.markdown(names, [[row[name] for name in names] for row in rows]))
            continue
        print(pages.scaling() if "exponent" in rows[0] else pages.bench(file.name))
    print("\n" + pages.cache())


def main():
    import tables as pages

    if sys.argv[1:2] == ["tables"]:
        return tables()
    if sys.argv[1:2] == ["runs"]:
        rows = collect(sys.argv[2:])
        with pages.writing(ROOT / "assets" / "cache.csv") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return tables()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=[*SHAPES, "operators"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="", help="folder of the CSV; default assets")
    args = parser.parse_args()
    import torch
    import transformers

    device = args.device or ("cuda" if args.shape == "llada" else "cpu")
    torch.set_num_threads(args.threads)
    rows = (
        scaling(device)
        if args.shape == "scaling"
        else operators()
        if args.shape == "operators"
        else ladder(args.shape, device, args.threads, 2, 1)
    )
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if args.shape != "check":
        file = Path(args.out or ROOT / "assets") / f"bench-{args.shape}.csv"
        with pages.writing(file) as f:
            writer = csv.DictWriter(
                f, {k: 0 for row in rows for k in row} | {"device": 0, "versions": 0}, restval=""
            )
            writer.writeheader()
            writer.writerows(
                {**row, "variant": row["variant"].strip(), "device": where, "versions": versions}
                if "variant" in row
                else {**row, "device": where, "versions": versions}
                for row in rows
            )
        print(file)


if __name__ == "__main__":
    main()
