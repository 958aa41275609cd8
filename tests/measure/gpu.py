"""Does everything work on a GPU, and how fast is it? The most important parts first.

    python tests/measure/gpu.py [--minutes 8] [--out FOLDER]      about 8 minutes, 50 GB
    python tests/measure/gpu.py --device cpu --small              the same lines on the CPU

    same      rollouts on the GPU are the CPU's; log-probs scored again are those recorded
    caches    caches, packed pass, FlexAttention and left padding against the plain forward
    steps     the gradient of one step of every method against the CPU's
    families  python agrpo.py, two steps on small checkpoints of each published family; eval.py
    large     one RL step of one night at the shapes of LLaDA-8B, SDAR-1.7B and Qwen3-0.6B, random
              weights; its hours against the forecast
    runs      python agrpo.py, whole and resumed
    compile   the smallest of these and the first under torch.compile

Each part is caught and reported apart. Figures are printed as they come, and stand in gpu.json and
gpu.csv of --out after each. The last lines are a table. Exit code 1: a check failed. It needs
neither tyro nor math-verify.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import gc
import json
import math
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "measure"), str(ROOT / "tests")]
import agrpo  # noqa: E402
import bench  # noqa: E402
import checkpoints as written  # noqa: E402
import eval as evaluation  # noqa: E402
from methods import caches, dipo, scored  # noqa: E402
from methods.models import Settings, compile_layers, generate, settle  # noqa: E402
from shapes import SHAPES, night, stock_config  # noqa: E402
from support import checkpoints, cost, data, tiny  # noqa: E402

class Report:
    """Figures and checks, on the screen and in two files."""
    def __init__(self, folder: Path, about: dict):
        self.folder, self.about, self.rows, self.part = folder, about, [], ""

    def figure(self, what: str, value, unit="", least=None, most=None):
        """A number; with a limit it is a check."""
        value = float(value)
        good = (least is None or value >= least) and (most is None or value <= most)
        verdict = "" if least is most is None else "pass" if good else "FAIL"
        limit = "" if not verdict else f">= {least:g}" if most is None else f"<= {most:g}"
        self.add(what, f"{value:.4g}", unit, limit, verdict)

    def add(self, what, value, unit="", limit="", verdict=""):
        self.rows.append({"part": self.part, "what": what, "value": value, "unit": unit,
                          "limit": limit, "verdict": verdict})
        print(f"{self.part:8} {what:58} {value:>10} {unit:8} {limit:9} {verdict}", flush=True)
        text = json.dumps({**self.about, "figures": self.rows}, indent=1)
        (self.folder / "gpu.json").write_text(text + "\n")
        with open(self.folder / "gpu.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)

@contextlib.contextmanager
def arithmetic(kind: str):
    """Within `with`, policies compute in float32 or bfloat16, on whatever device."""
    autocast = torch.autocast

    def ours(*given, **rest):          # agrpo's is the one that names bfloat16
        rest |= {"enabled": kind == "bfloat16"} if torch.bfloat16 in given else {}
        return autocast(*given, **rest)
    with mock.patch.object(torch, "autocast", ours):
        yield

def settings(**given):
    """As the command line settles them, at the sizes of these checks."""
    return dataclasses.replace(settle({"task": "story", "device": "cpu", **given}), **{
        "completion_length": 32, "block_length": 8, "steps": 16, "prompts": 4, "completions": 4,
        "warmup": 0, "gradient_checkpointing": "off", **given})

def pair(device: str, block=0, width=64):
    """-> tokenizer, the same random policy on the CPU and on the device, as dicts by device."""
    tokenizer = tiny.tiny_tokenizer()
    net = tiny.tiny_model(tokenizer, Settings(base_hidden=width), block)
    known = tokenizer.mask_token_id, tokenizer.eos_token_id
    make = (lambda net: dipo.BlockPolicy(net, *known, block=block)) if block else (
        lambda net: agrpo.Policy(net, *known))
    return tokenizer, make(copy.deepcopy(net)), make(net.to(device))

def examples(n=16):
    """Prompts of different lengths."""
    return data.load_examples("story", n, 0, "train")

def keys(n):
    return [("gpu", i) for i in range(n)]

def ratios(policy, traj, cfg):
    """Of all tokens, and of all choices of positions, at the first update."""
    adv = torch.ones(len(traj.tokens), 1, dtype=torch.float64, device=traj.tokens.device)
    views = agrpo.exact_views(traj, adv[:, 0], cfg, policy.mask_id, None)
    views = agrpo.prepare(policy, traj, views, adv, cfg)
    with torch.no_grad():
        ratio = agrpo.policy_loss(policy, traj, views, cfg)[1].float().cpu()
    return ratio.split([int(views.target.sum()), len(ratio) - int(views.target.sum())])

# ------------------------------------------------------------------------------------ the checks
def same(report, device, small):
    """Rollouts on the device against the CPU's."""
    tokenizer, cpu, gpu = pair(device)
    law = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    for name, given in {"low confidence": {}, "truncated": law, "random order": {
            "unmasking": "random"}, "threshold": {"unmasking": "threshold"}}.items():
        cfg = settings(**given)
        with arithmetic("float32"):
            a, b = (generate(policy, tokenizer, examples(), keys(16), cfg)[0]
                    for policy in (cpu, gpu))
            equal = (a.tokens == b.tokens.cpu()) & (a.reveal_step == b.reveal_step.cpu())
            report.figure(f"{name}: tokens revealed as on the CPU", equal.double().mean(), least=1)
            report.figure(f"{name}: log-probs, largest difference",
                          (a.logp - b.logp.cpu())[equal].abs().max(), "nats", most=1e-4)
            tokens, choices = ratios(gpu, b, cfg)
            report.figure(f"{name}: ratio of tokens - 1", (tokens - 1).abs().max(), most=1e-4)
            if len(choices):
                report.figure(f"{name}: ratio of choices - 1", (choices - 1).abs().max(), most=1e-4)
    with arithmetic("bfloat16"):
        cfg = settings()
        traj = generate(gpu, tokenizer, examples(), keys(16), cfg)[0]
        for name, ratio in zip(("tokens", "choices"), ratios(gpu, traj, cfg)):
            for q in (0.01, 0.99):
                report.figure(f"bfloat16: ratio of {name}, quantile {q}", ratio.quantile(q))
            outside = ((ratio - 1).abs() > cfg.clip).double().mean()
            report.figure(f"bfloat16: {name} clipped at the first update", outside, most=0.05)

def close(report, what, a, b, most=1e-4):
    report.figure(what, (a.cpu().double() - b.cpu().double()).abs().max(), "nats", most=most)

def cached_or_not(report, device, small):
    """Caches, the packed pass, FlexAttention, padding."""
    tokenizer, cpu, gpu = pair(device)
    _, _, blocks = pair(device, block=8)
    with arithmetic("float32"):
        plain, cached = (generate(blocks, tokenizer, examples(), keys(16), settings(cache=kind))[0]
                         for kind in ("none", "block"))
        equal = (plain.tokens == cached.tokens).double().mean()
        report.figure("block cache: tokens of the plain rollout", equal, least=1)
        close(report, "block cache: log-probs", plain.logp, cached.logp)
        for kind in ("dual", "prefix"):
            cfg = settings(cache=kind)
            a, b = (generate(policy, tokenizer, examples(), keys(16), cfg)[0]
                    for policy in (cpu, gpu))
            report.figure(f"{kind} cache: tokens as on the CPU",
                          (a.tokens == b.tokens.cpu()).double().mean(), least=1)
            close(report, f"{kind} cache: log-probs, against the CPU", a.logp, b.logp)
            cfg = dataclasses.replace(cfg, steps=4)            # all is computed at each block
            a, b = (generate(gpu, tokenizer, examples(), keys(16), dataclasses.replace(
                cfg, cache=word))[0] for word in ("none", kind))
            close(report, f"{kind} cache, a step a block: the plain log-probs", a.logp, b.logp)
        cfg, adv = settings(method="dipo"), plain.logp[:, 0]
        views = dipo.dipo_views(plain, adv, cfg, blocks.mask_id, None)
        def packed():
            logp = scored.score(blocks, plain, views._replace(old="tokens"), cfg)[0]
            return torch.zeros_like(plain.logp).index_add(0, views.row, logp)
        dense = packed()
        seen = plain.reveal_step < cfg.steps
        close(report, "packed pass: log-probs of the rollout", plain.logp[seen], dense[seen])
        eager = torch.compiler.set_stance("force_eager" if device == "cpu" else "default")
        blocks.flex = True
        with eager:
            close(report, "FlexAttention: log-probs of the packed pass", dense, packed(), 1e-3)
        ids, mask = checkpoints.encode_prompts(tokenizer, [("1 " * n, "") for n in range(1, 9)])
        state = torch.full((8, 16), gpu.mask_id, device=device)
        where, ids, mask = torch.ones_like(state).bool(), ids.to(device), mask.to(device)
        with torch.no_grad():
            together = gpu.logits(ids, mask, state, where).view(8, 16, -1).log_softmax(-1)
            alone = [gpu.logits(ids[i:i + 1, -n:], mask[i:i + 1, -n:], state[:1], where[:1])
                     for i, n in enumerate(mask.sum(1).tolist())]
        alone = torch.stack(alone).log_softmax(-1)
        inside = alone.isfinite()
        close(report, "left-padded rows: log-probs alone", together[inside], alone[inside])

STEPS = {"agrpo": {}, "paper": {"preset": "paper"}, "exact": {"method": "exact"},
         "KL": {"kl": 0.04, "inner_epochs": 2}, "diffu-grpo": {"method": "diffu-grpo"},
         "diffpo": {"method": "diffpo"}, "dipo": {"method": "dipo", "model": "tiny-block"},
         "controller": {"method": "diffpo", "controller": "threshold"},
         "value model": {"method": "tracerl", "value_model": "on"}, "dual": {"cache": "dual"}}

class Kept(torch.optim.SGD):
    """Keeps the gradients, and changes nothing."""
    def step(self):
        self.kept = torch.cat([p.grad.detach().cpu().flatten() for group in self.param_groups
                               for p in group["params"] if p.grad is not None])

def thirds(tokenizer):
    """A sampler whose reward is the share of token ids that 3 divides."""
    def sample(policy, batch, keys, cfg):
        traj, _ = generate(policy, tokenizer, batch, keys, cfg)
        reward = (traj.tokens.cpu() % 3 == 0).double().mean(1)
        return traj, {"thirds": reward}, reward > 0.4
    return sample

def steps(report, device, small):
    """The gradient of one train_step of every method."""
    for name, given in STEPS.items():
        cfg, gradient = settings(**given), []
        tokenizer, *policies = pair(device, block=8 if given.get("model") else 0)
        method = evaluation.method_of(cfg, tokenizer)
        with arithmetic("float32"):
            for policy in policies:
                torch.manual_seed(0)
                if cfg.controller != "off":
                    at = next(policy.parameters()).device
                    policy.controller = torch.nn.Linear(64, 1).to(at)
                if cfg.kl:
                    scored.keep_reference(policy)
                optimizer = Kept([{"params": list(policy.model.parameters()), "scale": 1.0}], 1.0)
                method.begin(policy, optimizer, cfg)
                one = method.train_step or agrpo.train_step
                row = one(policy, optimizer, examples(), 0, cfg, thirds(tokenizer))
                gradient.append(optimizer.kept)
        away = (gradient[0] - gradient[1]).norm() / gradient[0].norm()
        report.figure(f"{name}: gradient against the CPU's, relative", away, most=1e-3)
        report.figure(f"{name}: skipped", row["skipped"], most=0)

def runs(report, device, small):
    """python agrpo.py in a folder of its own: six steps at once, and three and three; then more."""
    sizes = {"max_steps": 6, "eval_examples": 16, "prompts": 4, "device": device, "base_steps": 20}
    long = sizes if small else {"max_steps": 60, "device": device}
    def run(name, resume=False, **given):
        cfg = settle({"task": "sudoku", "name": name, **given})
        actions = {"resume": resume, "overwrite": False, "rebuild_base": False}
        code = evaluation.run_training(cfg, agrpo.train, actions)
        log = list(csv.DictReader(open(Path("runs") / name / "log.csv")))
        return code, log, json.loads((Path("runs") / name / "summary.json").read_text())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), \
            mock.patch.dict(os.environ, {"AGRPO_CACHE": f"{folder}/cache"}):
        whole = run("whole", **sizes)[1]
        run("parts", **{**sizes, "max_steps": 3})
        parts = run("parts", True, **sizes)[1]
        far = max(abs(float(a[k]) - float(b[k])) for a, b in zip(whole, parts, strict=True)
                  for k in ("reward", "ratio", "grad_norm"))
        report.figure("resumed: log against the run without a stop", far, most=1e-6)
        code, log, summary = run("long", **long)
        report.figure("default run: exit code", code, most=0)
        seconds = [sum(float(row[k]) for row in log) for k in ("rollout_seconds", "update_seconds")]
        report.figure(f"default run: rollouts of {len(log)} steps", seconds[0], "s")
        report.figure(f"default run: updates of {len(log)} steps", seconds[1], "s")
        for word in ("base", "trained"):
            report.figure(f"default run: solved, {word}", 100 * summary[word]["solved"], "%")

def families(report, device, small):
    """Published layouts, small: log-probs of the opened model, two steps, an evaluation."""
    sizes = {"task": "countdown", "device": device, "prompts": 2, "completions": 4, "max_steps": 2,
             "completion_length": 32, "block_length": 8, "steps": 16, "mc_steps": 2, "warmup": 0,
             "lora_rank": 4, "kl": 0.04, "eval_examples": 4, "eval_steps": "16", "eval_every": 0}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), \
            mock.patch.dict(os.environ, {"AGRPO_CACHE": f"{folder}/cache"}):
        for family, own in {"llada": {}, "Dream": {}, "a2d-qwen3": {}, "sdar": {
                "block_length": 4, "cache": "block", "method": "tracerl", "value_model": "on"},
                }.items():
            written.write_checkpoint(family, family, heads=4, kv=4)
            actions = {"resume": False, "overwrite": False, "rebuild_base": False}
            cfg = settle({**sizes, **own, "model": f"./{family}", "name": family})
            code = evaluation.run_training(cfg, agrpo.train, actions)
            log = list(csv.DictReader(open(Path("runs") / family / "log.csv")))
            report.figure(f"{family}: exit code of two steps", code, most=0)
            report.figure(f"{family}: skipped", sum(int(row["skipped"]) for row in log), most=0)
            report.figure(f"{family}: mean ratio - 1", max(abs(float(row["ratio"]) - 1)
                                                           for row in log), most=0.02)

# ------------------------------------------------------------------------------------ large models
LARGE = {                              # model by its short name, what differs from one night
    "8B": ("llada-8b", {"cache": "none"}), "8B, dual cache": ("llada-8b", {"cache": "dual"}),
    "1.7B, block cache": ("sdar-1.7b", {}), "0.6B, block cache": ("qwen3-0.6b-bd3lm", {}),
    "8B, 8 rows": ("llada-8b", {"cache": "none", "prompts": 1, "gradient_checkpointing": "on"}),
    "8B, paper, 8 rows": ("llada-8b", {"preset": "paper", "prompts": 1, "steps": 32,    # of 128
                                       "gradient_checkpointing": "on"})}
MASK, EOS, PROMPT = 5, 6, 200

def large_policy(config, block: int, cfg, device: str, lean=True):
    """Random bfloat16 weights made on the device, with adapters."""
    kind = transformers.AutoModelForCausalLM.from_config
    torch.manual_seed(0)
    with torch.device(device):
        net = kind(config, dtype=torch.bfloat16)
    if device != "cpu" and not config.tie_word_embeddings:
        net.get_output_embeddings().float()                    # as a checkpoint is loaded
    net = checkpoints.add_adapter(net, cfg.lora_rank, cfg.lora_alpha, 0).to(device)
    if cfg.gradient_checkpointing == "on":
        for layer in net.get_decoder().layers:
            layer.forward = checkpoints.computed_again(layer)
    if lean:
        checkpoints.lean(net)
    policy = dipo.BlockPolicy(net, MASK, EOS, block=block) if block else \
        agrpo.Policy(net, MASK, EOS)
    policy.flex = device != "cpu"
    return policy

def block_of(name, small) -> int:
    """Tokens in a block of its attention."""
    return min(SHAPES[name][1], 4 if small else math.inf)

def settings_of(name, given, config, device, small):
    """Settings of a step at these sizes, as one night on this GPU takes them."""
    cfg = night(name, **given)
    if small:
        cfg = dataclasses.replace(cfg, prompts=min(2, cfg.prompts), completions=2, mc_steps=2,
                                  completion_length=24, steps=6, lora_rank=4, top_k=50,
                                  block_length=block_of(name, small) or 12)
    return cost.fitted(config, cfg, PROMPT, device)

def rolled(roll):
    """A sampler of random prompts and rewards."""
    def sample(policy, batch, keys, cfg):
        g, device = torch.Generator().manual_seed(0), next(policy.parameters()).device
        V, N = policy.model.config.vocab_size, len(batch)
        prompt = torch.randint(7, V, (N, PROMPT), generator=g).to(device)
        with checkpoints.adapters_cast_once(policy.model):
            traj = roll(policy, prompt, torch.ones_like(prompt), cfg, keys)
        reward = torch.rand(N, generator=g, dtype=torch.float64)
        return traj, {"random": reward}, reward > 0.5
    return sample

def one_step(report, name, policy, config, cfg, device):
    """A whole RL step: seconds, tokens a second, memory against the forecast, utilisation."""
    roll = agrpo.rollout if cfg.cache == "none" else caches.cached_rollout
    method, optimizer = evaluation.method_of(cfg, None), agrpo.make_optimizer(policy, cfg)
    before = bench.memory(device, reset=True)
    row = (method.train_step or agrpo.train_step)(policy, optimizer, [{}] * cfg.prompts, 0, cfg,
                                                  rolled(roll))
    forecast, rate = cost.estimate(config, cfg, PROMPT, device != "cpu"), cost.matmul_rate(device)
    tokens = cfg.prompts * cfg.completions * cfg.completion_length
    report.figure(f"{name}: skipped", row["skipped"], most=0)
    report.figure(f"{name}: mean ratio", row["ratio"])
    report.figure(f"{name}: clipped at the first update", row["clip_fraction"])
    report.figure(f"{name}: rollout", row["rollout_seconds"], "s")
    report.figure(f"{name}: rollout", tokens / row["rollout_seconds"], "tokens/s")
    report.figure(f"{name}: update of {row['passes']} states", row["update_seconds"], "s")
    for part in ("rollout", "update"):
        used = forecast[f"{part}_flops"] / row[f"{part}_seconds"] / rate
        report.figure(f"{name}: {part}, share of the matmul rate", 100 * used, "%")
        report.figure(f"{name}: {part}, forecast", cost.seconds(forecast, part, rate), "s")
    if cfg.prompts > 1:
        for kind, parts in (("measured", row), ("forecast", {
                f"{part}_seconds": cost.seconds(forecast, part, rate)
                for part in ("rollout", "update")})):
            hours = cfg.max_steps * (parts["rollout_seconds"] + parts["update_seconds"]) / 3600
            report.figure(f"{name}: {cfg.max_steps} such steps, {kind}", hours, "h")
    peak = (bench.memory(device) - (0 if device == "cuda" else before)) / 1e3
    report.figure(f"{name}: peak memory", peak, "GB")
    parts = forecast["weights"], forecast["trained"], max(forecast["rollout"], forecast["update"])
    report.figure(f"{name}: peak memory, forecast", sum(parts), "GB")

def free(device):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()

def large(report, device, small):
    """One RL step of every shape; the plain recipe's first steps beside that of 8 rows."""
    report.figure("matmul rate", cost.matmul_rate(device) / 1e12, "TFLOP/s")
    for name, (model, given) in LARGE.items():
        try:
            config = stock_config(model, small)
            cfg = settings_of(model, given, config, device, small)
            policy = large_policy(config, block_of(model, small), cfg, device)
            profile(report, name, policy, cfg, device)
            one_step(report, name, policy, config, cfg, device)
            if cfg.prompts == 1 and not cfg.preset:
                plain(report, name, policy, cfg, device)
        except Exception as error:
            report.add(f"{name}: {first_line(error)}", "", verdict="FAIL")
            traceback.print_exc()
        policy = None
        free(device)
        report.check_time()

def profile(report, name, policy, cfg, device):
    """The first two blocks of a rollout: operators and seconds a denoiser call, share of the time
    that the GPU works; the most expensive operators to profile.txt."""
    cfg = dataclasses.replace(cfg, completion_length=2 * cfg.block_length, steps=4)
    sample = rolled(agrpo.rollout if cfg.cache == "none" else caches.cached_rollout)
    batch = [{}] * cfg.prompts * cfg.completions, [("a", i) for i in range(
        cfg.prompts * cfg.completions)], cfg
    sample(policy, *batch)
    clock = time.perf_counter()
    traj = sample(policy, *batch)[0]
    calls, seconds = int(traj.nfe.max()), time.perf_counter() - clock
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=kinds) as profiler:
        sample(policy, *batch)
    table = profiler.key_averages()
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    busy = sum(getattr(row, own) for row in table if device == "cpu" or not (
        row.key.startswith("aten::") or row.key == "Command Buffer Full")) / 1e6   # kernels
    operators = sum(row.count for row in table if row.key.startswith("aten::"))
    report.figure(f"{name}: a denoiser call", 1e3 * seconds / calls, "ms")
    report.figure(f"{name}: operators a call", operators / calls)
    report.figure(f"{name}: the device works", 100 * busy / seconds, "%")
    with open(report.folder / "profile.txt", "a") as f:
        print(f"{name}, {calls} calls\n{table.table(sort_by=own, row_limit=25)}", file=f)

def plain(report, name, policy, cfg, device):
    """Seconds that the recipe as it is often written takes: its first steps, times their number."""
    N, calls = cfg.prompts * cfg.completions, 2
    prompt = torch.randint(7, policy.model.config.vocab_size, (N, PROMPT), device=device)
    clock = time.perf_counter()
    bench.plain_rollout(policy, prompt, cfg, calls)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - clock) * cfg.steps / calls
    report.figure(f"{name}: rollout, plain recipe", seconds, "s")

def compiled(report, device, small):
    """Large shapes under torch.compile, as --compile on: short ones first, then a step as above."""
    for name in ("0.6B, block cache", "8B, 8 rows"):
        (model, given), config = LARGE[name], stock_config(LARGE[name][0], small)
        cfg = settings_of(model, given, config, device, small)
        policy = large_policy(config, block_of(model, small), cfg, device)
        compile_layers(policy.model, "eager" if small else "inductor")
        clock = time.perf_counter()
        profile(report, f"{name}, compiled", policy, cfg, device)
        report.figure(f"{name}, compiled: first rollouts", time.perf_counter() - clock, "s")
        short = dataclasses.replace(cfg, completion_length=2 * cfg.block_length, steps=4,
                                    mc_steps=1)
        clock = time.perf_counter()
        one_step(mock.Mock(), "", policy, config, short, device)
        report.figure(f"{name}, compiled: a first, short step", time.perf_counter() - clock, "s")
        one_step(report, f"{name}, compiled", policy, config, cfg, device)
        policy = None
        free(device)
        report.check_time()

def first_line(error) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150]

class OutOfTime(Exception):
    """The minutes are over."""

PARTS = {"same": same, "caches": cached_or_not, "steps": steps, "families": families,
         "large": large, "runs": runs, "compile": compiled}

def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="no part begins after these")
    parser.add_argument("--out", default=".", help="folder of the results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    flags = parser.parse_args()
    if flags.device == "cuda" and not torch.cuda.is_available():
        print("gpu: there is no CUDA device here; --device cpu --small runs the same lines",
              file=sys.stderr)
        return 2
    where = torch.cuda.get_device_name() if flags.device == "cuda" else "CPU"
    about = {"device": where, "torch": torch.__version__, "transformers": transformers.__version__,
             "command": " ".join(["python", "tests/measure/gpu.py", *sys.argv[1:]])}
    folder, clock = Path(flags.out), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder.resolve(), about)

    def check_time():
        if time.monotonic() - clock > 60 * flags.minutes:
            raise OutOfTime
    report.check_time = check_time
    print(json.dumps(about))
    for name in flags.parts:
        report.part = name
        try:
            check_time()
            PARTS[name](report, flags.device, flags.small)
        except OutOfTime:
            report.add("the minutes were over", "")
        except Exception as error:
            report.add(first_line(error), "", verdict="FAIL")
            traceback.print_exc()
        free(flags.device)
    failed = [row for row in report.rows if row["verdict"] == "FAIL"]
    print(f"\n{where}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{time.monotonic() - clock:.0f} s")
    for name in flags.parts:
        words = [row["verdict"] for row in report.rows if row["part"] == name]
        print(f"{name:8} {words.count('pass'):3} passed {words.count('FAIL'):3} failed")
    for row in failed:
        print(f"FAIL {row['part']}: {row['what']} {row['value']} {row['limit']}")
    return bool(failed)

if __name__ == "__main__":
    sys.exit(main())
