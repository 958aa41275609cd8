"""Which values settings may have, and what goes with what: everything that is refused before any
work."""
import dataclasses
import re
from importlib.util import find_spec
from pathlib import Path

import torch

from rewards import FORMATS, TASKS, BadInput
from support.data import check_files
from support.files import need
from support.options import CONTROLLED, device_for, flag, for_evaluation, numbers
from support.presets import APPROXIMATE, PRESETS, TINY

NOT_RANDOM = ("low_confidence", "confidence", "threshold", "entropy_bound", "left_to_right")
WITHOUT_DRAWS = ("exact", "diffu-grpo", "diffpo", "tracerl", "dipo")   # of the methods here
CHOICES = {
    "task": TASKS, "preset": PRESETS, "prompt": ("", "bare", *FORMATS), "quantize": ("", "4bit"),
    "device": ("auto", "cpu", "cuda"), "position_term": ("on", "off"),
    "order_score": ("max_prob", "neg_entropy"), "compile": ("off", "on"),
    "value_model": ("off", "on"), "gradient_checkpointing": ("auto", "on", "off"),
    "base_even": ("off", "on"),
    "cache": ("none", "prefix", "dual", "block"), "importance_level": ("completion", "step"),
    "kl_reference": ("base", "old"), "controller": ("off", *CONTROLLED),
    "controller_training": ("joint", "alone"),
    "report_to": ("", "tensorboard", "wandb", "trackio")}      # and the tables of agrpo.py
MAY_BE_ZERO = {                        # beside those that are 0 by default
    "max_steps", "rollout_batch", "tokens_per_pass", "entropy_bound", "overlong_from", "warmup",
    "weight_decay", "eval_every", "base_lazy", "dynamic_sampling", "prompt_masking",
    "importance_cap", "truncation", "gamma", "lam", "alpha", "grow_at"}

def read_weights(task: str, text: str) -> dict:
    """"correct=2,format=0.5" -> the task's weights with these changed. Raises BadInput.
    >>> read_weights("countdown", "correct=2")
    {'format': 1, 'correct': 2.0}"""
    weights = dict(TASKS[task].weights)
    for item in filter(None, text.split(",")):
        m = re.fullmatch(r"\s*(.+?)\s*=\s*(-?[0-9]{1,6}(?:\.[0-9]{1,6})?)\s*", item)
        if not m or m[1] not in weights:
            raise BadInput(f"--reward-weights {item!r}: must be NAME=NUMBER, the names for {task} "
                           f"are {', '.join(weights)}")
        weights[m[1]] = float(m[2])
    return weights

def stages(cfg) -> list:
    """cfg at each length of its curriculum, with as many tokens a step as at its own; [cfg] without
    lengths. Raises BadInput."""
    if cfg.curriculum in ("", "solve_rate"):
        return [cfg]
    need(cfg.curriculum[0].isdigit(),
         f"unknown --curriculum {cfg.curriculum!r}: solve_rate, or lengths such as 128,256,384")
    lengths, C = numbers(cfg.curriculum, "--curriculum"), cfg.completion_length
    need(len(lengths) > 1 and 0 < lengths[0] and lengths == sorted(lengths) and lengths[-1] == C,
         f"--curriculum {cfg.curriculum}: two or more lengths that grow to --completion-length {C}")
    need(all(n % cfg.block_length == 0 for n in lengths), f"--curriculum {cfg.curriculum}: lengths "
         f"must be multiples of --block-length {cfg.block_length}")
    return [dataclasses.replace(cfg, completion_length=n, steps=cfg.steps * n // C)
            for n in lengths]

def check_values(cfg, choices: dict, may_be_zero: set):
    """Raises BadInput for a setting that is none of its choices, or a number that is negative,
    infinite or zero against the rules."""
    for field in dataclasses.fields(cfg):
        value, rows = getattr(cfg, field.name), choices.get(field.name)
        if rows is not None and value not in rows:
            words = ", ".join(filter(None, rows))
            raise BadInput(f"unknown {flag(field.name)} {value!r}: one of {words}")
        if field.type in (int, float):
            need(not value >= 2**31, f"{flag(field.name)} is too large")
            zero = field.default == 0 or field.name in may_be_zero
            least = "at least" if zero else "above"            # nan is neither
            need(value > 0 or value == 0 and zero, f"{flag(field.name)} {value} must be {least} 0")

GOES_WITH = (                          # settings, and what they act with only
    ("mc_steps timesteps", "--method agrpo", lambda c: c.method not in WITHOUT_DRAWS),
    ("mc_steps timesteps lr kl", "--controller-training joint",
     lambda c: c.controller == "off" or c.controller_training == "joint"),
    ("method unmasking position_term temperature top_k top_p timesteps mc_steps normalizer clip "
     "clip_high advantage kl kl_reference inner_epochs completions reward_weights overlong_penalty "
     "curriculum",
     "RL, not with --sft", lambda c: not c.sft),
    ("system_prompt", "--prompt agrpo or d1"),
    ("template_args", "a chat template, not with --model tiny", lambda c: c.model not in TINY),
    ("base_steps base_batch base_lr base_lazy base_lazy_from base_hidden base_layers base_theta "
     "base_even", "--model tiny or tiny-block"),
    ("train_examples", "generated examples, not with --data",
     lambda c: c.model in TINY or TASKS[c.task].generate and not c.data),
    ("preset", "its own --method: leave that out",
     lambda c: not c.preset or c.method == PRESETS[c.preset][0].get("method", "agrpo")),
    ("clip clip_high", "--inner-epochs 2 or more: at the first every ratio is 1",
     lambda c: c.inner_epochs > 1),
    ("kl_reference", "--kl"),
    ("kl", "--inner-epochs 2 or more, or --kl-reference base",
     lambda c: c.inner_epochs > 1 or c.kl_reference == "base"),
    ("lora_alpha", "--lora-rank"), ("overlong_from", "--overlong-penalty"),
    ("solve_rate_floor", "--curriculum solve_rate"),
    ("grow_at grow_after", "--curriculum with lengths",
     lambda c: c.curriculum not in ("", "solve_rate")),
    ("order_score", "--unmasking confidence or plackett_luce"),
    ("tau_pos", "--unmasking plackett_luce"), ("threshold", "--unmasking threshold"),
    ("entropy_bound", "--unmasking entropy_bound"),
    ("importance_cap importance_level", "--cache prefix or dual"),
    ("prompt_masking", "--method diffu-grpo"), ("truncation", "--method diffpo"),
    ("dynamic_sampling", "--method dipo"), ("shrink update_block value_model", "--method tracerl"),
    ("gamma lam value_lr", "--value-model on"),
    ("alpha controller_training controller_sigma controller_lr", "--controller"))

def is_set(cfg, words: str) -> bool:
    """Whether a flag has one of the values that the words give, or, without any, is not off."""
    name, _, values = words[2:].partition(" ")
    value = getattr(cfg, name.replace("-", "_"))
    return value in values.split(" or ") if values else value not in (0, "off")

def check_goes_with(cfg, given):
    """Raises BadInput for a setting given that would not act."""
    for names, words, *rule in GOES_WITH:
        for name in set(names.split()) & set(given):
            need(rule[0](cfg) if rule else is_set(cfg, words),
                 f"{flag(name)} {getattr(cfg, name)} goes with {words}")

def validate(cfg, choices: dict, order_term: bool, published: dict, given=(), training=True):
    """Raises BadInput with one line for any setting that cannot work, before any work."""
    zero = MAY_BE_ZERO | (set() if training else {"temperature"})
    check_values(cfg, {**CHOICES, **choices}, zero)
    speak = ", ".join(name for name, task in TASKS.items() if task.speaks_tiny)
    need(cfg.model not in TINY or TASKS[cfg.task].speaks_tiny,
         f"--model {cfg.model} speaks {speak} only (tasks with generate and lazy): --task "
         f"{cfg.task} needs --model DIR")
    at, C = for_evaluation(cfg), cfg.completion_length
    T = stages(cfg)[0].steps if training else cfg.steps        # of the shortest
    for part, all_steps in ((cfg, [cfg.steps] if training else []),
                            (at, numbers(cfg.eval_steps, "--eval-steps"))):
        length, L = part.completion_length, part.block_length
        need(length % L == 0, f"completion length {length} is not a multiple of --block-length {L}")
        fit = [n for n in range(length, 0, -1) if length % n == 0 and n * L % length == 0]
        for steps in all_steps:
            name = "--steps" if part is cfg or not training else "--eval-steps"
            need(steps in fit, f"{name} {steps} does not reveal equal parts of {length} tokens, "
                 f"and of each block of {L}; these do: " + ", ".join(map(str, fit)))
    need(cfg.top_p <= 1 and (cfg.top_p == 1 or cfg.top_k),
         "--top-p is at most 1, and needs --top-k: the support is stored as ids")
    need(cfg.completions > 1, "--completions must be at least 2: an advantage compares them")
    need(not training or not cfg.decay_steps or cfg.max_steps <= cfg.decay_steps,
         f"--max-steps {cfg.max_steps}: the learning rate has decayed to zero after --decay-steps "
         f"{cfg.decay_steps}")
    need(not {"mc_steps"} & set(given) or cfg.mc_steps <= T,
         f"--mc-steps {cfg.mc_steps}: there are {T} steps; --method exact takes all")
    for name in ("threshold", "base_lazy", "base_lazy_from", "gamma", "lam", "grow_at",
                 "solve_rate_floor"):
        need(getattr(cfg, name) <= 1, f"{flag(name)} must be at most 1")
    for name in ("overlong_from", "prompt_masking"):
        need(getattr(cfg, name) < 1, f"{flag(name)} must be below 1")
    for name, value in (("temperature", cfg.temperature), ("tau_pos", cfg.tau_pos)):
        need(1e-3 <= value <= 1e3 or value == 0 == cfg.temperature,
             f"{flag(name)} {value} must be between 0.001 and 1000")
    need(not cfg.test_data or cfg.data or TASKS[cfg.task].hub, "--test-data goes with --data")
    check_files(cfg.data, cfg.test_data)
    read_weights(cfg.task, cfg.reward_weights)
    need(cfg.model not in TINY or max(C, cfg.eval_length) <= 200,
         f"--completion-length {C}: the tiny model's context is 256")
    need(max(cfg.train_examples, cfg.eval_examples) <= 100_000,
         "--train-examples and --eval-examples must be at most 100000")
    need(cfg.base_hidden % 16 == 0, f"--base-hidden {cfg.base_hidden} must be a multiple of 16")
    need(re.fullmatch(r"\w[\w.-]{0,100}", cfg.name or "x"),
         f"--name {cfg.name!r} must be a plain name: the folder is runs/NAME")
    need(cfg.device != "cuda" or torch.cuda.is_available(), "--device cuda: no GPU was found")
    need(not cfg.quantize or device_for(cfg) != "cpu" and find_spec("bitsandbytes")
         and (cfg.lora_rank or not training),
         f"--quantize {cfg.quantize} needs a GPU, bitsandbytes and adapters (--lora-rank 64)")
    need(not cfg.report_to or find_spec(cfg.report_to),
         f"--report-to {cfg.report_to}: the package {cfg.report_to} is not installed")
    need(cfg.sft in ("", "gold") or Path(cfg.sft).is_file(),
         f"--sft {cfg.sft}: gold, or a file of prompts and completions")
    need(not cfg.sft or cfg.controller == cfg.value_model == "off",
         "--sft trains no controller and no value model")
    if training:
        validate_update(cfg, order_term, published)
    check_goes_with(cfg, given)

def validate_update(cfg, order_term: bool, published: dict):
    """What of the update does not go together. Raises BadInput."""
    need(cfg.position_term == "off" or not order_term or published.get("position_term") != "off",
         f"--position-term on goes with states as the sampler saw them (agrpo, exact), --method "
         f"{cfg.method} scores tokens only")
    need(not cfg.update_block or cfg.update_block % cfg.block_length == 0,
         f"--update-block {cfg.update_block} is not a multiple of the rollout's blocks of "
         f"{cfg.block_length}")
    need(not cfg.curriculum or cfg.controller == "off" and not (
         cfg.method == "dipo" and cfg.dynamic_sampling and cfg.curriculum == "solve_rate"),
         f"--curriculum {cfg.curriculum} goes without --controller, and solve_rate without "
         "--dynamic-sampling, which draws other prompts in place of those that teach nothing")
    need(cfg.controller == "off" or cfg.preset != "justgrpo",
         "--controller sets the order of unmasking, which --preset justgrpo fixes")
    need(cfg.controller == "off" or cfg.value_model == "off" and not cfg.update_block
         and cfg.method != "dipo" or cfg.method == "dipo" and not cfg.dynamic_sampling,
         "--controller goes without --value-model, --update-block and --dynamic-sampling")
    if cfg.cache in APPROXIMATE:
        need(cfg.controller == cfg.value_model == "off" and not cfg.sft,
             f"--cache {cfg.cache} goes without --controller, --value-model, --sft")
        need(cfg.method in ("agrpo", "exact") or cfg.method == "tracerl" and cfg.shrink == 1,
             f"--cache {cfg.cache} goes with states as the sampler saw them (agrpo, exact, tracerl "
             "--shrink 1)")
        whole = cfg.importance_cap and cfg.importance_level == "completion"
        need(not whole or cfg.normalizer != "last_step",
             "--normalizer last_step counts only a part of the steps, whole completions are "
             "weighted by all: --normalizer steps, or --importance-level step")
        need(not whole or cfg.method != "agrpo" or cfg.timesteps == "independent_gradient",
             f"--timesteps {cfg.timesteps} with --cache {cfg.cache}: --timesteps "
             "independent_gradient (whole completions are weighted by steps drawn so), or "
             "--importance-level step")
        need(whole or cfg.position_term == "off" or not order_term,
             f"--position-term on with --cache {cfg.cache} needs weights of whole completions: "
             "--importance-level completion and --importance-cap above 0, or --position-term off")
