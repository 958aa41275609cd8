"""The command line: settings, their presets, and what a task or a model makes of them.

Settings have owners: agrpo.Config what the method reads, each file of methods/ its own, this file
the run's. All together are one flat object, `cfg`, and a flag each. Their comments are the help.
"""
import contextlib
import dataclasses
import inspect
import io
import os
import re
from pathlib import Path
from typing import Annotated

import torch

from rewards import TASKS, BadInput
from support.checkpoints import (adapter_shape, base_of, check_model_exists, in_run,
                                 open_checkpoint, saved_settings)
from support.cost import SMALL, parameter_count
from support.data import check_files
from support.files import need, read_json
from support.presets import (APPROXIMATE, GREEDY, LARGE, LLADA, PRESETS, SFT,
                             TASK_SHAPES, TINY, WITH_CACHE, default_model, hub_name, sizes)
from support.templates import (read_template_args, set_template_args, template_args,
                               write_template_args)

@dataclasses.dataclass(frozen=True)
class Run:
    """What to learn, with which model, where."""
    task: str = "sudoku"               # its name
    model: str = "tiny"                # tiny, tiny-block, a short name, a directory, owner/name
    data: str = ""                     # a file of examples instead of generated or published ones
    test_data: str = ""                # a file to hold out; without it a fifth of --data is
    skip_bad_examples: bool = False    # leave out those whose own answer is graded wrong
    max_steps: int = 100               # training steps, each a rollout and its update
    hours: float = 0.0                 # stop after so many, evaluations included; 0: no limit
    preset: str = ""                   # paper: AGRPO as published; justgrpo: JustGRPO
    sft: str = ""                      # fine-tuning instead of RL: gold, or a file of answers
    device: str = "auto"               # auto: cuda if there is one
    name: str = ""                     # of the folder runs/NAME; default: TASK-METHOD-seedSEED
    prompt: str = ""                   # bare, agrpo, d1; default: as trained, or agrpo, tiny: bare
    system_prompt: str = ""            # instructions in place of the prompt's own
    template_args: str = ""            # of its chat template: enable_thinking=true, or none
    rollout_batch: int = 256           # completions denoised at once; 0: as memory allows
    save_every: int = 1                # steps between checkpoints
    eval_every: int = 20               # steps between points of the held-out curve; 0: off

@dataclasses.dataclass(frozen=True)
class Reward:
    """The reward."""
    reward_weights: str = ""           # of its parts, such as correct=3,format=0.5
    overlong_penalty: float = 0.0      # taken from the reward of a completion that is full ...
    overlong_from: float = 0.8         # ... rising from 0 at this share of its length

@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation before, during and after training."""
    eval_examples: int = 512           # held-out examples; the curve takes half of them
    eval_length: int = 0               # completion length; 0: as in training
    eval_block_length: int = 0         # likewise
    eval_steps: str = "16,8,4"         # denoising steps; the first is the main result
    report_to: str = ""                # also to tensorboard, wandb or trackio, by accelerate

@dataclasses.dataclass(frozen=True)
class Weights:
    """The model's weights."""
    lora_rank: int = 0                 # of adapters on all linear layers; 0: all weights [64]
    lora_alpha: float = 64.0           # adapters' outputs count alpha / rank times
    quantize: str = ""                 # 4bit: the frozen base in NF4 (bitsandbytes, a GPU)
    gradient_checkpointing: str = "auto"   # on, off; auto: if memory would not suffice
    compile: str = "off"               # on: torch.compile of the model
    model_block: int = 0               # tokens in an attention block; 0: as config.json says

@dataclasses.dataclass(frozen=True)
class Actions:
    """What to do."""
    resume: bool = False               # continue runs/NAME
    overwrite: bool = False            # replace runs/NAME
    rebuild_base: bool = False         # train the tiny base model again
    merge: str = ""                    # write the adapter of --model and its base here, and stop
    help_all: bool = False             # all flags: of every method, the tiny model, memory

NO_END = 10**6                         # steps that no --hours allow
MAY_CHANGE = ("name", "max_steps", "hours", "device", "save_every", "rollout_batch",
              "tokens_per_pass", "gradient_checkpointing", "compile", "report_to")     # on --resume
CONTROLLED = {"threshold": "threshold", "entropy": "entropy_bound"}    # by which --unmasking

def flag(name: str) -> str:
    """max_steps -> --max-steps"""
    return "--" + name.replace("_", "-")

def read_flags(prog: str, text: str, owners: dict, argv: list[str], settled=None) -> dict:
    """The flags given, of dataclasses by the name of their group; --help prints them, with the
    defaults of settled(), and ends. Raises BadInput with the parser's complaint in one line."""
    import tyro
    os.environ.setdefault("COLUMNS", "100")
    defaults = {}
    if {"-h", "--help", "--help-all"} & set(argv):
        argv, defaults = ["--help"], dataclasses.asdict(settled()) if settled else {}
    both, said = dataclasses.make_dataclass("Flags", [
        (name, owner, dataclasses.field(default_factory=lambda owner=owner: owner(
            **{f.name: defaults[f.name] for f in dataclasses.fields(owner) if f.name in defaults})))
        for name, owner in owners.items()]), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(both, prog=prog, description=text, args=argv, config=(
                tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    except BrokenPipeError:                                    # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(0) from None
    except SystemExit as stop:
        if stop.code == 0:                                     # help
            raise
        lines = [line.strip("│╭╮╰╯─|+- ") for line in said.getvalue().splitlines()]
        what = [line for line in lines if line][1:2] or ["bad flags"]      # below its title
        raise BadInput(f"{what[0]} (--help lists the flags)") from None
    names = {word.split("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
    given = {name: value for group in vars(found).values() for name, value in vars(group).items()
             if name in names}
    if "model" in given:
        given["model"] = hub_name(given["model"])
    if given.get("template_args"):                             # one spelling of each
        given["template_args"] = write_template_args(read_template_args(given["template_args"]))
    return given

def subset(owners: list[type], names: tuple, defaults: dict) -> type:
    """A dataclass of some of their settings, with their comments and other defaults."""
    from tyro.conf import arg
    fields = []
    for owner in owners:
        meaning = dict(re.findall(r"^    (\w+): .*?# ([^[\n]+)", inspect.getsource(owner), re.M))
        fields += [(f.name, Annotated[f.type, arg(help=meaning[f.name].strip())],
                    defaults.get(f.name, f.default))
                   for f in dataclasses.fields(owner) if f.name in names]
    return dataclasses.make_dataclass("Sampling", fields, frozen=True)

def numbers(text: str, name: str) -> list[int]:
    """"16,8" -> [16, 8], each once. Raises BadInput."""
    need(re.fullmatch(r"\s*[0-9]{1,6}(\s*,\s*[0-9]{1,6})*\s*", text),
         f"{name} {text!r}: numbers separated by commas")
    return list(dict.fromkeys(map(int, text.split(","))))

# ------------------------------------------------------------------------ settings before flags
def made_here(model: str) -> str:
    """Which of TINY a model is, or was trained from; "" for others."""
    if model in TINY:
        return model
    if not Path(model).is_dir():
        return ""
    folder = in_run(Path(model))
    if (folder / "adapter_config.json").is_file():
        folder = in_run(Path(base_of(folder)))
    known = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    tiny = "tiny-block" if known.get("block_size") else "tiny"
    return tiny if known.get("model_type") == "llama" else ""

def before_flags(given: dict, published: dict) -> dict:
    """What the task, the kind of model, the method (published: as it is in the literature), the
    preset and the GPU ask for."""
    model, preset = given.get("model", ""), given.get("preset", "")
    device = device_of(given.get("device", "auto"))
    if model and model not in TINY:
        check_model_exists(model)
    known = saved_settings(model).get("task") if model and Path(model).is_dir() else None
    task = given.get("task", known or "sudoku")                # a trained model's own
    need(task in TASKS, f"--model {model}: no task is called {task!r} here; a task of your own is "
         "known where its file is run")
    need(model or TASKS[task].generate or TASKS[task].hub,
         f"--task {task} needs --model DIR: for the tiny model it has no generate and lazy")
    model = model or ("tiny" if TASKS[task].speaks_tiny else default_model(device))
    kind = made_here(model)
    if kind:
        settings = TASK_SHAPES.get(task, {}) | published | {"shrink": 2}   # 8: all 8 steps in one
        if model not in TINY and (in_run(Path(model)) / "adapter_config.json").is_file():
            settings |= {"lora_rank": 64}
        settings |= PRESETS[preset][0]
    else:
        settings = PRESETS[preset][0] | sizes(model, preset, device) | published
    settings |= resized(settings, given)
    if given.get("sft"):
        settings |= SFT[bool(kind)]
    return settings | {"task": task, "model": model}

def hours_or_steps(cfg, given: dict):
    """--max-steps alone: so many, however long; --hours alone: so long, however many, unless the
    learning rate decays to the last of them."""
    if "max_steps" in given and "hours" not in given:
        return dataclasses.replace(cfg, hours=0.0)
    if given.get("hours") and "max_steps" not in given and not cfg.decay_steps:
        return dataclasses.replace(cfg, max_steps=NO_END)
    need(cfg.hours or cfg.max_steps < NO_END, "--hours 0: this run has no other end, --max-steps "
         "gives it one")
    return cfg

def resized(settings: dict, given: dict) -> dict:
    """What lengths of one's own change: what is evaluated, and the steps, as many tokens a step as
    before, or a few more where these do not divide the blocks."""
    C, at, changed = given.get("completion_length"), settings | given, {}
    if C and C != settings.get("completion_length"):           # also evaluated
        changed = {"eval_length": 0, "eval_block_length": 0}
    if "eval_length" not in settings:                          # a tiny model's
        return changed
    for name, length, block in (("steps", "completion_length", "block_length"),
                                ("eval_steps", "eval_length", "eval_block_length")):
        now, had = ({**at, **changed, **given}[length] or at["completion_length"]), settings[length]
        L = {**at, **changed, **given}[block] or at["block_length"]
        most = max(1, now * int(settings[name]) // had)
        if now != had:
            fit = (n for n in range(most, 0, -1) if now % n == 0 and n * L % now == 0)
            changed[name] = type(settings[name])(next(fit, most))
    return changed

def with_prompt(cfg):
    """The prompt settled: the one given, else the one this checkpoint was trained with here, else
    the published one."""
    if cfg.prompt:
        return cfg
    known = saved_settings(cfg.model)
    style = known.get("prompt") or ("bare" if known or cfg.model in TINY else "agrpo")
    system = cfg.system_prompt or str(known.get("system_prompt", ""))
    return dataclasses.replace(cfg, prompt=str(style), system_prompt=system)

def tiny_block(cfg) -> int:
    """Tokens in a block of the tiny block-causal model; 0 for the one that sees everything."""
    return (cfg.model_block or 4) if cfg.model == "tiny-block" else 0

def unless_given(cfg, given: dict, **settings):
    """cfg with those settings that were not asked for otherwise."""
    return dataclasses.replace(cfg, **{k: v for k, v in settings.items() if k not in given})

def with_cache(cfg, given: dict, block: int, config):
    """The cache asked for; else in blocks the exact one, and one night's, where the model is worth
    it and it goes with all that was asked for. Raises BadInput."""
    fits = (config and parameter_count(config) > LARGE and cfg.method in ("agrpo", "exact")
            and cfg.controller == cfg.value_model == "off" and not cfg.sft
            and not given.keys() & {*WITH_CACHE, "normalizer"})
    cache = given.get("cache", "block" if block else cfg.cache if fits else "none")
    kinds = "in blocks, its cache is exact (block)" if block else "in both directions: prefix, dual"
    need(cache not in (APPROXIMATE if block else ("block",)),
         f"--cache {cache}: {cfg.model} attends {kinds}")
    also = WITH_CACHE if cache in APPROXIMATE and cfg.method in ("agrpo", "exact") else {}
    return dataclasses.replace(unless_given(cfg, given, **also), cache=cache)

def in_blocks(cfg, given: dict, block: int):
    """A block-causal model is denoised in the blocks of its attention, and where nothing else is
    asked for, one token a step. Raises BadInput."""
    if other := {given.get(k, block) for k in ("block_length", "eval_block_length")} - {block, 0}:
        raise BadInput(f"--block-length {other.pop()}: the attention of {cfg.model} has blocks of "
                       f"{block}; leave it out")
    C = steps = cfg.completion_length
    eval_steps = str(cfg.eval_length or C)
    if made_here(cfg.model) and "completion_length" not in given:
        C = (-(-C // block) + 1) * block                       # the first is what the prompt left
        halves = [C >> k for k in range(3 if cfg.controller == "off" else 1) if block % 2**k == 0]
        steps, eval_steps = halves[:2][-1], ",".join(map(str, halves))
    return unless_given(cfg, given, block_length=block, eval_block_length=block, shrink=1,
                        completion_length=C, eval_steps=eval_steps,
                        steps=C if cfg.unmasking == "left_to_right" else steps)

def with_model(cfg, given: dict):
    """What the checkpoint settles: an adapter's rank is its own, cache and blocks go with its
    attention. Raises BadInput."""
    need_gpu(cfg)
    need(cfg.model != "tiny" or not cfg.model_block,
         "--model-block: the model tiny attends both ways, tiny-block in blocks")
    about = None
    if cfg.model not in TINY:
        about, tokenizer = open_checkpoint(cfg.model, cfg.model_block)
        set_template_args(tokenizer, cfg.template_args)
        cfg = dataclasses.replace(cfg, template_args=cfg.template_args or template_args(
            tokenizer, about.family))
        need(tokenizer.chat_template or cfg.prompt == "bare" or cfg.sft
             or cfg.prompt == saved_settings(cfg.model).get("prompt"),
             f"--model {cfg.model} has no chat template: --prompt bare gives it the statements as "
             "plain text, --sft gold or --sft FILE trains it on plain text first")
    block = about.block if about else tiny_block(cfg)
    if about and about.adapter and cfg.lora_rank:
        own = adapter_shape(about.adapter)
        if other := [f"{flag(k)} {given[k]}" for k in own if given.get(k, own[k]) != own[k]]:
            raise BadInput(f"{other[0]}: the adapter in {cfg.model} has "
                           f"{', '.join(f'{k} {v}' for k, v in own.items())}; --lora-rank 0 trains "
                           "all weights")
        cfg = dataclasses.replace(cfg, **own)
    cfg = with_cache(cfg, given, block, about and about.config)
    needs = "--update-block" if cfg.update_block else "--method dipo"
    need(block or cfg.method != "dipo" and not cfg.update_block,
         f"{needs} needs a block-causal model (SDAR, --model tiny-block): {cfg.model} attends in "
         "both directions")
    if cfg.controller != "off":                                # it may take any number of steps
        rule, had = CONTROLLED[cfg.controller], saved_settings(cfg.model).get("controller", "off")
        need(given.get("unmasking", rule) == rule,
             f"--controller {cfg.controller} goes with --unmasking {rule}")
        need(had in ("off", cfg.controller),
             f"--controller {cfg.controller}: {cfg.model} has another kind, {had}")
        C = cfg.completion_length
        cfg = unless_given(cfg, given, unmasking=rule, steps=C, position_term="off",
                           eval_steps=str(cfg.eval_length or C))
    if cfg.unmasking == "left_to_right":                       # a token a step
        cfg = unless_given(cfg, given, steps=cfg.completion_length)
    return in_blocks(cfg, given, block) if block else cfg

def for_evaluation(cfg):
    """cfg with the greedy sampler, or the controller's, and the shape to evaluate with."""
    at = dataclasses.replace(
        cfg, completion_length=cfg.eval_length or cfg.completion_length,
        block_length=cfg.eval_block_length or cfg.block_length,
        cache="none" if cfg.cache in APPROXIMATE else cfg.cache, **GREEDY)
    if cfg.controller == "off":
        return at
    return dataclasses.replace(at, unmasking=CONTROLLED[cfg.controller], controller_sigma=1e-9)

# ------------------------------------------------------------------------------- device and name
def device_of(wanted: str) -> str:
    """"cpu", or this process's "cuda:i"."""
    local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"          # several processes: one GPU each
    return local if wanted in ("auto", "cuda") and torch.cuda.is_available() else "cpu"

def device_for(cfg) -> str:
    """Where a run computes."""
    return device_of(cfg.device)

def need_gpu(cfg):
    """Raises BadInput, one line that says what would run here, if the model is too large for a
    machine without a GPU; before that for a model or a file of examples that is not there."""
    if cfg.model in TINY:
        return
    check_files(cfg.data, cfg.test_data)
    local = Path(cfg.model).is_dir()
    small = local and parameter_count(
        open_checkpoint(cfg.model, cfg.model_block)[0].config) < SMALL
    asked = not local and cfg.device == "cpu" and cfg.model != LLADA
    need(small or asked or device_for(cfg) != "cpu",
         f"--task {cfg.task} on {cfg.model} needs a CUDA GPU (24 GB for 8 billion parameters with "
         "adapters), and there is none. Without one: python agrpo.py --task sudoku (a tiny model, "
         "minutes; also a task of your own with generate and lazy), or --model DIR "
         "--device cpu with a checkpoint below 1 billion parameters (tests/checkpoints.py)")

def default_name(cfg) -> str:
    """TASK-WHAT-seedSEED, where WHAT is the method, or the preset of agrpo, and all that sets the
    run apart from the plain one."""
    method = "" if cfg.method in ("agrpo", "exact") and cfg.preset else cfg.method
    parts = (cfg.task, "tiny-block" if cfg.model == "tiny-block" else "",
             f"on-{Path(cfg.model).name}" if cfg.model not in (*TINY, LLADA) else "",
             *(["sft"] if cfg.sft else [method, cfg.preset]),
             "value" if cfg.value_model == "on" else "",
             f"{cfg.controller}-{cfg.controller_training}" if cfg.controller != "off" else "",
             f"by-{re.sub('[^a-z0-9_]+', '-', cfg.curriculum)[:30]}" if cfg.curriculum else "",
             f"seed{cfg.seed}")
    return "-".join(filter(None, parts))[:100]
