"""AGRPO: reinforcement learning for masked diffusion language models, in one file.

The algorithm in five lines:
    1. For each of B prompts denoise G completions; of each token keep the step that revealed it and its log-prob.
    2. Reward the completions; advantage = reward compared with the other G-1 of the same prompt.
    3. The policy gradient is a sum over denoising steps t: draw K of them per completion, where it is large (Eq. 5).
    4. Rebuild the state x_t each drawn step saw; score what it revealed again; clipped ratio times advantage (Eq. 3, 4).
    5. Weight each by 1/(Z x how often it is drawn on average), accumulate all gradients, then take one optimizer step.

How to read it: part one, the first half, is AGRPO from settings to the loop, complete. Part two adds the other published methods as rows of the
same tables (diffu-GRPO, DiFFPO, TraceRL, DiPO), a value model, a controller of the sampler, block-causal attention and its cache. Part three is
loading, fine-tuning and the command line.

Commands:
    python agrpo.py                          a laptop, minutes: trains a tiny diffusion model, then improves it by AGRPO;
                                             ends with a table of solved Sudokus before and after, and runs/.../curve.png
    python agrpo.py --task countdown         the same for arithmetic; --help lists every knob of Config below
    python agrpo.py --method diffpo          another method: exact, diffu-grpo, diffpo, tracerl; with --model tiny-block also dipo
    python agrpo.py --sft gold               supervised fine-tuning, then --model runs/sudoku-sft-seed0 for RL on top
    python agrpo.py --task gsm8k             one GPU, 24 GB or more: LoRA on LLaDA-8B-Instruct by the published recipe
    accelerate launch agrpo.py --task gsm8k  several GPUs share every step

Glossary, symbol in the paper's sense = name here (equation numbers are this project's own, listed in the README):
    q prompt (N, P) left padded        o tokens (N, C) final completion           x_t state: o with steps >= t masked again
    u reveal_step (N, C)               U_t target: positions with u == t          T steps, K mc_steps, Z normalizer
    A adv (N,)                         r ratio = exp(logp - logp_old)             B prompts x G completions = N rows
    C completion length                L block length                             V vocabulary, tau temperature
    view: a state with the tokens to score on it      behaviour: the sampler as it was      ease: how much its threshold lets through

Departs from the paper or its official code in (`--preset official` goes back in 2 to 5):
    1. where the order of unmasking depends on the model's random choices, its own log-probability is part of the likelihood
       (Eq. 6): the gradient is exact (almost everywhere) under every sampler (`--position-term off`: tokens only, as published);
    2. every step until the sampler itself stops counts, also those that reveal the end, and Z = T, a constant: with
       `--advantage leave_one_out` the expected gradient is 1/T that of E[R], exactly (theirs: `--normalizer last_step`);
    3. advantages are divided by the group's standard deviation, which weights prompts (theirs: `--advantage mean`);
    4. rollouts unmask as evaluation does, by low confidence, not at random (theirs: `--unmasking random`);
    5. time steps are drawn over the whole batch, none twice, in proportion to the size of their gradient, with weights that
       keep the sum exact (theirs: `--timesteps batch_entropy`);
    6. a finished row leaves the batch, zero-advantage groups are skipped (unless a KL term acts), and MASK itself is never sampled.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import eval as run_folder              # evaluation, figures and the files of a run
from eval import (SMALL, adapter_shape, add_adapter, anyone, base_of, computed_again, encode_prompts, end_of_turn, everyones,
                  load_adapter, load_model, merge, once, open_checkpoint, parameter_count, processes, read_controller, save_controller,
                  save_weights, say, tiny_model, tiny_tokenizer)
from rewards import (FORMATS, TASKS, BadInput, gold_completion, grade, graders, load_examples, load_split, overlong, prompt_for, read_pairs,
                     read_weights, reward_parts)


# ------------------------------------------------------------------------------------------------------------- settings
@dataclasses.dataclass(frozen=True)
class Config:
    """One line per knob; the command line is made from it (max_steps -> --max-steps). CHOICES lists what words a knob takes."""
    task: str = "sudoku"               # what to learn
    model: str = "tiny"                # "tiny", "tiny-block", a directory with a checkpoint, or the hub's owner/name
    model_block: int = 0               # block-causal models: tokens in a block of their attention; 0: as its config.json says
    quantize: str = ""                 # 4bit: the frozen base in NF4 (bitsandbytes, a GPU)
    data: str = ""                     # a file of examples instead of generated or published ones
    test_data: str = ""                # a file to hold out; without it a fifth of --data is
    prompt: str = ""                   # how a task is put; default: as the checkpoint was trained here, tiny: bare, others: agrpo
    system_prompt: str = ""            # instructions in place of the prompt's own
    sft: str = ""                      # supervised fine-tuning instead of RL: gold (the task's right answers) or a file of prompts, completions
    seed: int = 0                      # everything random is a function of it
    device: str = "auto"               # auto: cuda if there is one
    name: str = ""                     # run folder runs/NAME; default TASK-METHOD-seedSEED, or with the preset's name or sft
    preset: str = ""                   # official: the published estimator settings; 24gb, 80gb: for GPUs of this memory
    max_steps: int = 100               # optimizer steps = rollouts
    # rollout
    prompts: int = 16                  # B per step [paper: 16]
    completions: int = 16              # G per prompt [paper: 8]
    completion_length: int = 16        # C tokens [paper: 384]
    block_length: int = 16             # L tokens; blocks are denoised left to right [paper: 12]
    steps: int = 8                     # T at most; each reveals at least C/T tokens [paper: 128]
    unmasking: str = "low_confidence"  # which positions a step reveals [paper: random]
    position_term: str = "on"          # off: token log-probs only, biased where the order is random by the model [paper: off]
    order_score: str = "max_prob"      # how sure a position is, for confidence and plackett_luce
    tau_pos: float = 1.0               # temperature of plackett_luce
    threshold: float = 0.9             # for unmasking threshold: reveal all whose likeliest token has this probability
    entropy_bound: float = 0.1         # for unmasking entropy_bound: on the summed entropies less the largest, nats
    temperature: float = 1.0           # tau [paper: 0.6]
    top_k: int = 0                     # sample among the k likeliest tokens; 0: all [paper: 150]
    top_p: float = 1.0                 # ... and among the fewest that hold this much probability; needs top_k [paper: 0.99]
    cache: str = "none"                # of keys and values in rollouts: prefix, dual (approximate, the update corrects), block (block-causal models, exact)
    dynamic_sampling: int = 0          # times that groups of equal rewards are replaced by those of other prompts [DiPO]
    # estimator and loss
    method: str = "agrpo"              # which states are scored: a row of VIEWS, with the settings of PUBLISHED
    timesteps: str = "batch_gradient"  # how agrpo's K time steps are drawn [paper: batch_entropy]
    mc_steps: int = 1                  # K time steps drawn per completion with an advantage, on average [paper: 24]
    normalizer: str = "steps"          # Z: a row of NORMALIZERS: steps = T, constant; last_step = m of each completion; tokens .. [paper: last_step]
    advantage: str = "std"             # of a reward within its group [paper: mean]
    clip: float = 0.2                  # eps of Eq. 4; acts from the second inner epoch on [diffu-GRPO: 0.5]
    clip_high: float = 0.0             # eps above 1, where it is another; 0: as clip [DiPO: 0.28]
    kl: float = 0.0                    # beta of Eq. 4 [diffu-GRPO: 0.04, TraceRL: 0.01]
    kl_reference: str = "base"         # the model to begin with, or old: before the update, acts from the second inner epoch on [TraceRL: old]
    inner_epochs: int = 1              # optimizer steps per rollout [paper: 1, diffu-GRPO: 12]
    shrink: int = 1                    # tracerl: steps merged into one state [TraceRL: 8, block-causal 1]
    prompt_masking: float = 0.0        # diffu-grpo: share of the prompt's tokens masked [diffu-GRPO: 0.15]
    is_cap: float = 0.0                # C of Eq. 7 and 10: what was sampled by another law counts probability / probability times, at most C; 0: once
    is_level: str = "completion"       # what is weighted after rollouts with a cache: whole completions, or each step by itself, biased
    update_block: int = 0              # block-causal models: blocks of so many tokens in the update; 0: those of the rollout [TraceRL: larger]
    value_model: str = "off"           # on: per-token baselines (TraceRL); for methods that score every step
    value_lr: float = 5e-4             # of the value model
    gamma: float = 1.0                 # discount per step, for the value model
    lam: float = 1.0                   # lambda of its advantages
    # a controller of the sampler [DiFFPO]
    controller: str = "off"            # a threshold of the sampler per prompt, on probability or on entropy; sets unmasking, steps, eval_steps
    controller_training: str = "joint"     # with the model, or alone: the model stays as it is
    controller_sigma: float = 0.5      # deviation of the threshold's logarithm, drawn in training
    controller_lr: float = 0.02        # of the controller's head
    alpha: float = 0.5                 # with a controller each part of the reward counts (1 - NFE / length)^alpha times
    reward_weights: str = ""           # of the reward's parts, such as correct=3,format=0.5; default: the published sums
    overlong_penalty: float = 0.0      # taken from the reward of a completion that fills its whole length ...
    overlong_from: float = 0.8         # ... rising from 0 at this share of it
    # optimizer
    lora_rank: int = 0                 # of adapters on all linear layers; 0: full fine-tuning, in float32 [paper: 64]
    lora_alpha: float = 64.0           # their outputs count alpha / rank times
    lr: float = 5e-4                   # AdamW [paper: 5e-6, LoRA]
    warmup: int = 5                    # steps of linear warm-up
    decay_steps: int = 0               # cosine decay to zero over this many steps; 0: constant
    weight_decay: float = 0.01         # of AdamW
    max_grad_norm: float = 1.0         # longer gradients are scaled down to it
    rollout_batch: int = 256           # completions denoised at once; this and the next two change memory, never the gradient
    tokens_per_pass: int = 12288       # prompt and completion tokens per forward and backward: as many views as fit, at least one
    gradient_checkpointing: str = "auto"   # on: a layer's activations are computed again in the backward pass; auto: if memory would not suffice
    compile: str = "off"               # on: torch.compile of the model
    fsdp: str = "off"                  # on: processes share the weights too, for full fine-tuning (as by accelerate launch --use_fsdp)
    # evaluation and run folder
    eval_examples: int = 512           # held-out examples before and after
    eval_length: int = 0               # completion length to evaluate with; 0: as in training
    eval_block_length: int = 0         # likewise
    eval_steps: str = "16,8,4"         # denoising steps to evaluate with; the first is the headline
    eval_every: int = 20               # steps between points of the held-out curve (half the examples); 0: off
    save_every: int = 1                # steps between checkpoints
    report_to: str = ""                # a tracker of accelerate as well: tensorboard, wandb, trackio
    train_examples: int = 4096         # generated; a file gives all it has
    # the tiny base model
    base_steps: int = 1600             # SFT steps
    base_batch: int = 32               # rows per SFT step
    base_lr: float = 3e-3              # AdamW's, up for a tenth of the steps, then down to zero
    base_lazy: float = 0.6             # share of the corpus whose answers follow the lazy rule
    base_hidden: int = 64              # width; heads of 16
    base_layers: int = 4               # of the Llama


TASK_SHAPES = {                        # what a task needs otherwise; flags win over it
    "countdown": {"completion_length": 12, "block_length": 12, "steps": 6, "eval_steps": "12,6,3", "max_steps": 150, "lr": 1e-3,
                  "base_batch": 48},
}

TINY = ("tiny", "tiny-block")          # models made here
LLADA = "GSAI-ML/LLaDA-8B-Instruct"    # what the tasks without a tiny model start from
RECIPE = {                             # what every checkpoint but "tiny" gets: the published recipe, five epochs of GSM8K
    "max_steps": 2335, "prompts": 16, "completions": 8, "completion_length": 384, "block_length": 12, "steps": 128, "temperature": 0.6,
    "top_k": 150, "top_p": 0.99, "mc_steps": 24, "lora_rank": 64, "lr": 5e-6, "warmup": 23, "decay_steps": 2335,
    "eval_length": 256, "eval_block_length": 32, "eval_steps": "128", "eval_examples": 256, "eval_every": 100}

PUBLISHED = {                          # --method: what it was published with, where known; flags win over it
    "agrpo": {},
    "exact": {},
    # d1: reward minus group mean, clip 0.5, KL to the base model
    "diffu-grpo": {"position_term": "off", "advantage": "mean", "normalizer": "length", "clip": 0.5, "kl": 0.04, "prompt_masking": 0.15},
    "diffpo": {"position_term": "off", "advantage": "mean", "normalizer": "length", "is_cap": 2.0},            # C is not public: ours
    "tracerl": {"position_term": "off", "normalizer": "state_tokens", "kl": 0.01, "kl_reference": "old", "shrink": 8},
    "dipo": {"position_term": "off", "normalizer": "batch_tokens", "clip_high": 0.28, "dynamic_sampling": 3},
}
TINY_SHRINK = 2                        # 8 of 128 steps would be half a step of the tiny model's 8
SFT = {"lr": 1e-3, "max_steps": 400, "prompts": 32, "warmup": 40, "decay_steps": 400}            # --sft, tiny models; a step is `prompts` rows
SFT_RECIPE = {"lr": 1e-5, "max_steps": 1000, "prompts": 16, "warmup": 20, "decay_steps": 1000}   # ... checkpoints

PRESETS = {                            # --preset; flags win over it
    "": {},
    "official": {"unmasking": "random", "timesteps": "batch_entropy", "mc_steps": 2, "normalizer": "last_step", "advantage": "mean"},
    # 24 of 128 steps there, 2 of 8 here
    "24gb": {"rollout_batch": 8, "tokens_per_pass": 2048},                           # the default below 60 GB
    "80gb": {"rollout_batch": 64, "tokens_per_pass": 4096},                          # ... and above
}


# --------------------------------------------------------------------------------------------------- policy and sampler
class Policy(torch.nn.Module):
    """A model with one verb. Everything below sees a denoiser only through `logits`, mask_id, eos_id and block."""

    def __init__(self, model, mask_id: int, eos_id: int, turn_id: int | None = None, shift: bool = False, block: int = 0):
        """turn_id also ends a text (<|eot_id|>); shift: logits stand one position to the left (Dream); block: block-causal attention
        over blocks of so many tokens, counted from the first real one (SDAR), 0: every token sees every token."""
        super().__init__()
        self.model, self.mask_id, self.eos_id, self.turn_id, self.shift, self.block = model, mask_id, eos_id, turn_id, shift, block
        self.sharded = False                                                         # by FSDP: see shard
        self.flex, self.compiled = False, None                                       # FlexAttention for the masks of blocks: on GPUs; --compile
        self.controller = self.value = self.reference = None                         # see add_controller, ValueModel, keep_reference
        self.eval()                                                                  # dropout would break ratio = 1

    def logits(self, prompt: Tensor, prompt_mask: Tensor, state: Tensor, where: Tensor, clean: Tensor | None = None, cache=None,
               with_ease: bool = False):
        """prompt, prompt_mask (N, P); state (N, C) ids; where (N, C) bool, or its n indices -> (n, V) float32, row-major.

        The LM head runs only at `where`, in float32. Padding is masked and positions count from the first real token, so that
        a padded row scores as it does alone. MASK gets -inf: it is no token to sample. For block-causal models: with `clean` (N, C), the
        final text, each block of the state is read behind the final text of those before it, all in one pass; with `cache` only the block
        being denoised is computed. with_ease: (logits, what the controller makes of the prompt (N,))."""
        if self.sharded and not torch.is_grad_enabled():
            anyone(True)                                                             # see wait_for_others
        return self(prompt, prompt_mask, state, where, clean, cache, with_ease)

    def forward(self, prompt, prompt_mask, state, where, clean=None, cache=None, with_ease=False):
        """What `logits` does, as the module's call: the hooks of sharded weights hang on it."""
        hidden, head = self.hidden(prompt, prompt_mask, state, clean, cache), self.model.get_output_embeddings()
        at = hidden[:, 1 - self.shift:][:, :state.shape[1]][where]                   # (n, width)
        dtype = torch.promote_types(at.dtype, torch.float32)                         # bfloat16 logits would be off by 0.1 nats
        logits = torch.nn.functional.linear(at.to(dtype), head.weight.to(dtype))     # (n, V)
        logits[:, self.mask_id] = -math.inf                                          # in place: a copy of (n, V) would cost as much as the sampler
        return (logits, self.controller(hidden[:, 0].to(dtype)).squeeze(1)) if with_ease else logits

    def hidden(self, prompt, prompt_mask, state, clean=None, cache=None) -> Tensor:
        """(N, 1 + C, width): of the prompt's last token and of the completion."""
        ids, P, C = torch.cat([prompt, state], 1), prompt.shape[1], state.shape[1]   # (N, S), S = P + C
        real = torch.cat([prompt_mask, torch.ones_like(state)], 1)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        if cache is not None:
            return cache.read(self, ids, real.bool(), positions, P)[:, -1 - C:]
        noisy = torch.zeros(P + C, dtype=torch.bool, device=ids.device)
        if clean is not None:                                                        # [clean | noisy]: the noisy part begins with the prompt's
            tail = min(P, max(1, self.block - 1))                                    # last tokens, as its first block may be partly prompt
            ids = torch.cat([prompt, clean, ids[:, P - tail:]], 1)
            real, positions = (torch.cat([x, x[:, P - tail:]], 1) for x in (real, positions))
            noisy = torch.arange(ids.shape[1], device=ids.device) >= P + C
        if self.block:
            mask = block_mask(block_rule(positions // self.block, real.bool(), noisy), *ids.shape, ids.device, self.flex)
        else:                                                                        # (N, 1, S, S); were it (N, S), the library would look whether
            # it hides anything, and wait for the GPU
            mask = real.bool()[:, None, None].expand(-1, 1, ids.shape[1], -1)
        return self.decode(ids, mask, positions)[:, -1 - C:]

    def decode(self, ids, attention_mask, positions, cache=None) -> Tensor:
        """The model without its head: (N, width of ids, hidden)."""
        decoder = self.model.get_decoder()
        if self.block:
            decoder.config._attn_implementation = "sdpa" if isinstance(attention_mask, Tensor) else "flex_attention"
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            out = (self.compiled or decoder)(input_ids=ids, attention_mask=attention_mask, position_ids=positions, past_key_values=cache)
        return out.last_hidden_state

    def wait_for_others(self):
        """Sharded weights travel between processes in every forward, so all must make equally many: one that has finished its
        rollouts goes through the motions until the others have, too."""
        one = torch.zeros((1, 2), dtype=torch.long, device=next(self.parameters()).device)
        while self.sharded and anyone(False):
            with torch.no_grad():
                self(one, torch.ones_like(one), one, one.bool())


def generator(*key) -> torch.Generator:
    """A local generator that depends on its key alone: no hidden state, so any step or row can be repeated alone. (torch
    uses 32 bits of a seed: two of a run's thousands of keys may share a stream, two rows of one group hardly ever.)"""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class LogSumExp(torch.autograd.Function):
    """z (n, k) -> log sum exp z (n,), and softmax z (n, k), which carries no gradient. By way of the softmax it is one pass over z; its
    gradient is the softmax, which is there already."""

    @staticmethod
    def forward(ctx, z):
        p = z.softmax(-1)
        ctx.save_for_backward(p)
        ctx.mark_non_differentiable(p)
        return z.amax(-1) - p.amax(-1).log(), p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        return grad[:, None] * ctx.saved_tensors[0]


class Law:
    """Eq. 2: the tempered, truncated sampling law of n positions, made from logits (n, V), over a support of k tokens.

    support (n, k) ids, V = none: found by top-k, then top-p (the token that crosses p stays in), unless given, where `known` (n,)
    says so: the update passes that of the rollout. None: the whole vocabulary. At temperature 0 all is on the likeliest token.
    p (n, k): the law's probabilities, without a gradient."""

    def __init__(self, logits: Tensor, cfg: Config, support: Tensor | None = None, known: Tensor | None = None):
        self.logits, V, temperature = logits, logits.shape[1], cfg.temperature or 1.0
        if cfg.temperature == 0:
            support = logits.argmax(-1, keepdim=True)
        elif cfg.top_k and (support is None or known is not None):
            top, found = logits.detach().topk(min(cfg.top_k, V), dim=-1)             # (n, k) in descending order
            p = (top / temperature).softmax(-1)
            found = found.masked_fill(p.cumsum(-1) - p >= cfg.top_p, V)              # the mass before it already reached p
            support = found if support is None else found.index_put((known.nonzero().squeeze(1),), support)
        self.support, self.inside = support, logits                                  # inside (n, k): logits of the support
        if support is not None:
            self.inside = logits.gather(1, support.clamp(max=V - 1)).masked_fill(support == V, -math.inf)
        self.z = self.inside if temperature == 1.0 else self.inside / temperature
        self.lse, self.p = LogSumExp.apply(self.z)

    @functools.cached_property
    def plain_lse(self) -> Tensor:
        """(n,) of the logits themselves, without a gradient."""
        with torch.no_grad():
            return self.lse.detach() if self.z is self.logits else LogSumExp.apply(self.logits)[0]

    def place(self, token: Tensor) -> Tensor:
        """(n,) in the support, where it is in it."""
        return token if self.support is None else (self.support == token[:, None]).int().argmax(1)

    def logp(self, token: Tensor) -> Tensor:
        """(n,) under the law; LOG_ZERO outside of its support."""
        logp = self.z.gather(1, self.place(token)[:, None]).squeeze(1) - self.lse
        return logp if self.support is None else logp.masked_fill(~(self.support == token[:, None]).any(1), LOG_ZERO)

    def conf(self, token: Tensor) -> Tensor:
        """(n,) plain log-probability, which LLaDA compares: neither tempered nor truncated. Without a gradient."""
        return self.logits.detach().gather(1, token[:, None]).squeeze(1) - self.plain_lse

    def draw(self, u: Tensor) -> Tensor:
        """u (n,) in [0, 1) -> token ids (n,), by inverting the cumulative distribution in float64: first among stretches of the support,
        then within one, so that no running sum over a large vocabulary is made."""
        k = self.p.shape[1]
        width = k if k < 1024 else math.isqrt(k)
        whole = self.p[:, :k // width * width].unflatten(1, (-1, width))
        sums = torch.cat([whole.sum(-1, dtype=torch.float64), self.p[:, k // width * width:].sum(-1, True, dtype=torch.float64)], 1)
        upto, u = sums.cumsum(1), u.double().clamp(max=1 - 2**-50)[:, None]          # so that u times a sum is below the sum
        stretch = torch.searchsorted(upto, u * upto[:, -1:], right=True).clamp(max=sums.shape[1] - 1)          # (n, 1)
        left = u * upto[:, -1:] - (upto - sums).gather(1, stretch)
        inside = stretch * width + torch.arange(width, device=u.device)              # (n, width)
        within = self.p.gather(1, inside.clamp(max=k - 1)).double().masked_fill(inside >= k, 0.0).cumsum(1)
        left = torch.minimum(left, within[:, -1:] * (1 - 2**-50))                    # the two sums may differ in their last bit
        place = (stretch * width + torch.searchsorted(within, left, right=True)).clamp(max=k - 1)
        return (place if self.support is None else self.support.gather(1, place)).squeeze(1)


# Which positions a step reveals. It sees the open positions, n in all (masked, in the block being denoised) of R rows: their law, token (n,)
# candidates, u (n,) noise. A row of UNMASK:
#   score(law, token, u, cfg) -> (n,)              the highest of each row are revealed, ties go to the leftmost position
#   level(ranked) -> (R, C)                        from each row's scores in falling order, -inf where none is open: how great the row's
#                                                  `ease` must be for so many to be revealed, and ease(cfg), as configured: the logarithm of
#                                                  an entropy bound, minus that of a threshold. None: C/T are. Never fewer: T steps are enough
#   order_logp(law, token, at, rank, lost, cfg) -> log pi_pos (R,), the log-probability of the choice, and how long its gradient by the
#       logits of each position is, squared (n,), None: as autograd says. at: rows and positions (n,) each; rank (R, C) = 0, 1, .. as chosen,
#       -1 not revealed: what the trajectory keeps of the choice; lost (l,): which of the n were not revealed.
#       No order_logp: the choice does not depend on theta (random), or given theta it is not random at all. Then the token log-probs
#       alone are the exact law (almost everywhere: where two scores tie, E[R] has no derivative).
class Unmask(NamedTuple):
    """A row of UNMASK: see above."""
    score: Callable
    order_logp: Callable | None = None
    level: Callable | None = None
    ease: Callable = lambda cfg: 0.0


LOG_ZERO = -1e4                        # stands for log 0: exp gives 0, sums stay finite, its gradient is 0


def block_offset(policy, prompt_mask: Tensor) -> Tensor:
    """(N, 1) how far into a block the completion begins. Blocks count from the completion's first token, but for block-causal
    models from the prompt's, as their attention does: the first block is then what the prompt left of one."""
    offset = prompt_mask.sum(1, keepdim=True)
    return offset % policy.block if policy.block else torch.zeros_like(offset)


def current_block(state: Tensor, mask_id: int, block_length: int, offset: Tensor) -> Tensor:
    """state (N, C), offset (N, 1) -> (N, C) bool: the first block that has a masked position; it is the one being denoised."""
    C = state.shape[1]
    block = (torch.arange(C, device=state.device) + offset) // block_length          # (N, C)
    return block == block.masked_fill(state != mask_id, C).amin(1, keepdim=True)


def in_order(score: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
    """score (open_.sum(),), open_ (N, C) -> scores in falling order, -inf where none is open, and their positions, both (N, C)."""
    dense = torch.full(open_.shape, -math.inf, dtype=score.dtype, device=score.device)
    return dense.masked_scatter(open_, score).sort(dim=1, descending=True, stable=True)


def choose(score: Tensor, open_: Tensor, n: int, level: Callable | None = None, ease: Tensor | None = None) -> Tensor:
    """The best scored open positions of each row: n, or as many as its ease (N, 1) allows. -> rank (N, C)."""
    ranked, best = in_order(score, open_)
    rank = torch.empty_like(best).scatter_(1, best, torch.arange(best.shape[1], device=best.device).expand_as(best))
    many = (level(ranked) <= ease).sum(1).clamp(min=n)[:, None] if level else n
    return rank.masked_fill(~open_ | (rank >= many), -1)


ORDER_SCORE = {                        # how sure a position is, whatever token it draws: law -> (n,)
    "max_prob": lambda law: law.logits.max(-1).values - LogSumExp.apply(law.logits)[0],          # its logarithm
    # clamped: 0 log 0 = 0, and so its gradient
    "neg_entropy": lambda law: ((conf := law.logits.log_softmax(-1)).exp() * conf.clamp(min=LOG_ZERO)).sum(-1),
}


def losing_logp(law, token, at, rank, lost, cfg) -> tuple[Tensor, Tensor]:
    """Eq. 6: log-probability (R,) that every open position not revealed drew a candidate that loses: one whose confidence is
    below c, the lowest that won, or equal to it but further right. (Winners' candidates are accounted for by their own
    token log-probs.) If under new parameters no candidate of a position would lose, its log-probability is LOG_ZERO."""
    (row, position), C = at, rank.shape[1]
    winners = torch.full(rank.shape, math.inf, dtype=law.z.dtype, device=rank.device)            # (R, C)
    winners = winners.index_put(at, law.conf(token).masked_fill(rank[at] < 0, math.inf))
    lowest, place = winners.flip(1).min(1)                                           # (R,) c, and where: rightmost of equals
    row, position = row[lost], position[lost]
    c, right_of_it = lowest[row, None], (position > C - 1 - place[row])[:, None]     # (l, 1)
    conf = law.inside.detach()[lost].sub_(law.plain_lse[lost, None])                 # (l, k)
    wins = (conf > c).logical_or_((conf == c).logical_and_(~right_of_it))
    z = law.z[lost].masked_fill_(wins, -math.inf)                                    # of the candidates that lose
    none = z.detach().amax(1) == -math.inf
    mass, q = LogSumExp.apply(z.masked_fill_(none[:, None], 0.0))
    log_f = (mass - law.lse[lost]).masked_fill(none, LOG_ZERO)                       # (l,) log F_j(c)
    # d log F / dz = p (loses / F - 1), and p loses / F = q
    of_losers, of_winners = torch.linalg.vector_norm(q, dim=1), torch.linalg.vector_norm(law.p[lost].masked_fill_(~wins, 0.0), dim=1)
    size = ((of_losers * log_f.detach().expm1())**2 + of_winners**2).masked_fill(none, 0.0) / (cfg.temperature or 1.0)**2
    return torch.zeros_like(lowest).index_add(0, row, log_f), torch.zeros_like(law.lse).index_put((lost,), size)


def plackett_luce_logp(law, token, at, rank, lost, cfg) -> tuple[Tensor, None]:
    """log-probability (R,) of drawing the revealed positions in the order of their rank: each against all not drawn before it."""
    score = torch.full(rank.shape, -1e30, dtype=law.z.dtype, device=rank.device).index_put(
        at, ORDER_SCORE[cfg.order_score](law) / cfg.tau_pos)                         # (R, C), exp(-1e30) = 0: closed positions
    drawn_first = rank.masked_fill(rank < 0, rank.shape[1]).argsort(dim=1, stable=True)
    score, drawn = score.gather(1, drawn_first), rank.gather(1, drawn_first) >= 0
    return (score - score.flip(1).logcumsumexp(1).flip(1)).masked_fill(~drawn, 0.0).sum(1), None


UNMASK = {
    "random": Unmask(lambda law, token, u, cfg: u),
    "confidence": Unmask(lambda law, token, u, cfg: ORDER_SCORE[cfg.order_score](law)),
    "low_confidence": Unmask(lambda law, token, u, cfg: law.conf(token), losing_logp),
    # as in DCoLT, trains the order too: Gumbel noise on the scores makes their order a draw with logits score / tau_pos
    "plackett_luce": Unmask(lambda law, token, u, cfg: ORDER_SCORE[cfg.order_score](law) / cfg.tau_pos -
                            (-u.clamp(min=1e-300).log()).log(), plackett_luce_logp),
    "threshold": Unmask(lambda law, token, u, cfg: ORDER_SCORE["max_prob"](law), None,           # all that are sure enough
                        lambda ranked: -ranked, lambda cfg: -math.log(cfg.threshold)),
    "entropy_bound": Unmask(lambda law, token, u, cfg: ORDER_SCORE["neg_entropy"](law), None,    # while sum H - max H <= the bound
                            lambda ranked: (ranked - ranked.cumsum(1)).nan_to_num(math.inf).clamp(min=1e-30).log(),
                            lambda cfg: math.log(max(cfg.entropy_bound, 1e-29))),
}


@dataclasses.dataclass
class Trajectory:
    """What a rollout did, N rows. Together with the parameters it determines everything after the rollout."""
    prompt: Tensor                     # (N, P) ids, left padded
    prompt_mask: Tensor                # (N, P) 1 = real token
    tokens: Tensor                     # (N, C) final completion
    reveal_step: Tensor                # (N, C) step that revealed the token; T: filled in after the row had finished
    rank: Tensor                       # (N, C) place among those that the step revealed: 0, 1, ..
    logp: Tensor                       # (N, C) log-prob of the token under the sampling law when revealed
    order_logp: Tensor                 # (N, T) log-prob of each step's choice of positions, 0 without a law
    entropy: Tensor                    # (N, T) of the sampling law, summed over the positions that each step revealed, nats
    gradient: Tensor                   # (N, T) of each step's log-probs by the logits, squared lengths: tokens + positions
    support: Tensor | None             # (N, C, k) ids of the sampling law's support, V = none; None: all
    nfe: Tensor                        # (N,) denoiser calls the row took part in = its number of steps
    eos_id: int
    turn_id: int | None = None
    ease: Tensor | None = None         # (N,) where a controller drew it, and the mean of its law
    ease_mean: Tensor | None = None
    edges: Tensor | None = None        # (N, 2) between which eases the same positions would have been revealed at every step
    edge_steps: Tensor | None = None   # (N, 2) the steps that say so; T: none

    @property
    def last_step(self) -> Tensor:
        """(N,) the last step that revealed a token other than EOS; 0 for a completion that is all EOS."""
        return torch.where(self.tokens != self.eos_id, self.reveal_step, 0).amax(1)

    @property
    def counted(self) -> Tensor:
        """(N, C) bool: tokens up to and with the first EOS, of those that a step revealed: what one-step likelihoods count."""
        ended = (self.tokens == self.eos_id).int()
        return (ended.cumsum(1) - ended == 0) & (self.reveal_step < self.entropy.shape[1])

    @property
    def length(self) -> Tensor:
        """(N,) tokens before the first EOS or end of turn, where a completion ends."""
        goes_on = self.tokens != self.eos_id if self.turn_id is None else (self.tokens != self.eos_id) & (self.tokens != self.turn_id)
        return goes_on.int().cumprod(1).sum(1)

    def to(self, device) -> "Trajectory":
        """The same on a device."""
        return Trajectory(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})

    def prompts(self, row: Tensor, prompt: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prompts (M, P) of some rows, or others in their place, and their mask, without the columns that are padding in all of them."""
        mask = self.prompt_mask[row]
        P = max(1, int(mask.sum(1).max())) if len(row) else 1
        return (self.prompt[row] if prompt is None else prompt)[:, -P:], mask[:, -P:]

    def rows(self, index) -> "Trajectory":
        """Some of the rows, by indices or bool (N,)."""
        return Trajectory(**{k: v[index] if isinstance(v, Tensor) else v for k, v in vars(self).items()})

    @staticmethod
    def join(parts: list) -> "Trajectory":
        """The rows of all parts, prompts padded to the widest."""
        P = max(p.prompt.shape[1] for p in parts)
        left = {k: [torch.nn.functional.pad(vars(p)[k], (P - p.prompt.shape[1], 0)) for p in parts] for k in ("prompt", "prompt_mask")}
        return Trajectory(**{k: torch.cat(left.get(k) or [vars(p)[k] for p in parts]) if isinstance(v, Tensor) else v
                             for k, v in vars(parts[0]).items()})


@torch.no_grad()
def rollout(policy, prompt: Tensor, prompt_mask: Tensor, cfg: Config, keys: list) -> Trajectory:
    """Denoise one completion per row of prompt (N, P), block by block, T steps in all.

    keys: one hashable per row. A row's random numbers depend on its key alone, not on its neighbours or its padding.
    A row is finished, and leaves the batch, once a whole block of it is EOS; the rest is filled with EOS. Of a block-causal model's
    completion only whole blocks are denoised: what would begin another one is EOS from the start."""
    N, C, L, T = len(prompt), cfg.completion_length, cfg.block_length, cfg.steps
    rule, mask_id, eos_id, device = UNMASK[cfg.unmasking], policy.mask_id, policy.eos_id, prompt.device
    u = torch.stack([torch.rand(T, 2, L, generator=generator(*key), dtype=torch.float64) for key in keys]).to(device)
    offset = block_offset(policy, prompt_mask)                                       # (N, 1)
    tokens = prompt.new_full((N, C), mask_id)                                        # while MASK is in it, the state x_t
    tokens.masked_fill_(torch.arange(C, device=device) >= C - offset, eos_id)
    logp_, order_logp_, entropy_, gradient_ = (torch.zeros(N, width, dtype=torch.float64, device=device) for width in (C, T, T, T))
    traj = Trajectory(prompt, prompt_mask, tokens, torch.full_like(tokens, T), torch.zeros_like(tokens), logp_, order_logp_,
                      entropy_, gradient_, None, torch.zeros_like(tokens[:, 0]), eos_id, policy.turn_id)
    ease = torch.full((N, 1), rule.ease(cfg), dtype=torch.float64, device=device)
    ended = torch.zeros(N, 1, dtype=torch.bool, device=device)
    # sharded weights: all processes make equally many forwards, and these would be of several kinds
    cache = Cache(cfg.cache, N, L) if cfg.cache != "none" and not policy.sharded else None
    for t in range(T):
        block = current_block(tokens, mask_id, L, offset) & ~ended                   # (N, C)
        seen = (block & (tokens == mask_id)).cpu().numpy()                           # which are open: all that a step waits for the GPU for
        if not seen.any():
            break
        alive = np.flatnonzero(seen.any(1))                                          # rows not finished, R of them
        index = [torch.from_numpy(x).to(device, non_blocking=True) for x in (alive, *seen[alive].nonzero())]
        rows, (row, position) = index[0], index[1:]                                  # (R,), and (n,) row-major, as logits
        if cache:
            cache.aim(alive, rows, seen[alive].argmax(1))
        ask = cfg.controller != "off" and t == 0
        if t == 0 and not ask and not cache:
            logits = first_logits(policy, prompt, prompt_mask, tokens, seen)         # (n, V)
        else:
            logits = policy.logits(prompt[rows], prompt_mask[rows], tokens[rows], (row, position), cache=cache, with_ease=ask)
        if ask:
            logits, mean = logits
            draw_ease(traj, mean.double(), keys, cfg)
            ease = traj.ease[:, None]
        law = Law(logits, cfg)
        u_token, u_order = u[rows[row], t, :, position % L].unbind(-1)               # (n,) each
        token = law.draw(u_token)                                                    # a candidate for every open position
        score = rule.score(law, token, u_order, cfg)
        open_ = torch.zeros_like(tokens[rows], dtype=torch.bool).index_put((row, position), torch.ones_like(row, dtype=torch.bool))
        rank = choose(score, open_, C // T, rule.level, ease[rows])                  # (R, C)
        place = rank[row, position]                                                  # (n,)
        # those revealed come first; how many there are is known, unless the rule has levels: then all are looked at
        many = len(row) if rule.level else int(np.minimum(seen.sum(1), C // T).sum())
        first, lost = (place < 0).int().argsort(stable=True).split([many, len(row) - many])
        won, at = place[first] >= 0, (rows[row[first]], position[first])             # row and position in (N, C)
        own, p = law.logp(token)[first], law.p[first]
        entropy = torch.special.entr(p).sum(-1)
        others = torch.linalg.vector_norm(p.scatter_(1, law.place(token)[first, None], 0.0), dim=1)
        size = (own.expm1()**2 + others**2) / (cfg.temperature or 1.0)**2            # |d own / d logits|^2
        for kept, value, nothing in ((tokens, token[first], mask_id), (traj.reveal_step, torch.full_like(first, t), T),
                                     (traj.rank, place[first], 0), (traj.logp, own.double(), 0.0)):
            kept.index_put_(at, value.masked_fill(~won, nothing))
        for kept, value in ((traj.entropy, entropy), (traj.gradient, size)):
            kept[:, t].index_add_(0, at[0], value.double() * won)
        if law.support is not None:
            if traj.support is None:
                traj.support = tokens.new_zeros((N, C, law.support.shape[1]))
            traj.support.index_put_(at, law.support[first] * won[:, None])
        if rule.order_logp and cfg.position_term == "on":
            order_logp, size = rule.order_logp(law, token, (row, position), rank, lost, cfg)
            if size is None:
                with torch.enable_grad():                                            # to the logits only, for its size
                    z = logits.detach().requires_grad_()
                    again, _ = rule.order_logp(Law(z, cfg), token, (row, position), rank, lost, cfg)
                    size = torch.autograd.grad(again.sum(), z)[0].square().sum(-1)   # (n,)
            traj.order_logp[:, t].index_put_((rows,), order_logp.double())
            traj.gradient[:, t].index_add_(0, rows[row], size.double())
        if traj.edges is not None:
            narrow_edges(traj, rows, t, *edges_of_step(score, open_, rank, cfg))
        traj.nfe.index_add_(0, rows, torch.ones_like(rows))
        ended |= ((tokens == eos_id) | ~block).all(1, keepdim=True)
    tokens.masked_fill_(tokens == mask_id, eos_id)                                   # deterministic: carries no loss
    return traj


def first_logits(policy, prompt: Tensor, prompt_mask: Tensor, tokens: Tensor, seen) -> Tensor:
    """Logits (n, V) where `seen` (N, C) is open, all completions MASK: those of one prompt are one state, computed once."""
    _, some, same = np.unique(torch.cat([prompt, prompt_mask], 1).cpu().numpy(), axis=0, return_index=True, return_inverse=True)
    index = [torch.from_numpy(x).to(prompt.device) for x in (some, *seen[some].nonzero())]
    logits = policy.logits(*(x[index[0]] for x in (prompt, prompt_mask, tokens)), tuple(index[1:]))
    many, place = seen.sum(1), np.cumsum(seen, 1) - 1                                # of each row; of each open position in its row
    start = np.cumsum(many[some]) - many[some]                                       # of each state's logits
    return logits[torch.from_numpy((start[same.reshape(-1), None] + place)[seen]).to(prompt.device)]


# ------------------------------------------------------------------------------- states visited, and their steps scored
def state_at(traj: Trajectory, row: Tensor, step: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Rebuild x_t: row, step (M,) -> state (M, C) as the denoiser saw it before step t, target (M, C) = revealed by it.

    This is all the memory the method needs: one integer per token is the trajectory."""
    u = traj.reveal_step[row]                                                        # (M, C)
    return traj.tokens[row].masked_fill(u >= step[:, None], mask_id), u == step[:, None]


def step_logp(policy, traj: Trajectory, views: "Views", cfg: Config):
    """Eq. 1, one step of each of M views under the current parameters: token log-probs (targets,) in row-major order, and
    the log-probability (M,) of the choice of positions, None if the rule has none. One forward: the LM head is needed at
    the targets, and for a position law also at the open positions that lost."""
    row, state, target = views.row, views.state, views.target
    order_logp = UNMASK[cfg.unmasking].order_logp if cfg.position_term == "on" and views.visited else None
    where = target
    if order_logp:
        offset = block_offset(policy, traj.prompt_mask[row])
        where = current_block(state, policy.mask_id, cfg.block_length, offset) & (state == policy.mask_id)
    prompt, prompt_mask = traj.prompts(row, views.prompt)
    at, tokens = where.nonzero(as_tuple=True), traj.tokens[row]
    logits = policy.logits(prompt, prompt_mask, state, at, clean=tokens if views.packed else None)             # (n, V)
    hit, theirs = target[at], traj.support is None or views.visited and approximate(cfg)        # a cache's support is not the model's
    support = None if theirs else traj.support[row][target]
    law = Law(logits, cfg, support, hit if order_logp and not theirs else None)       # losers' support is found again, the same at theta_old
    token_logp = law.logp(tokens[at])[hit]
    if not order_logp:
        return token_logp, None
    return token_logp, order_logp(law, tokens[at], at, traj.rank[row].masked_fill(~target, -1), (~hit).nonzero().squeeze(1), cfg)[0]


# ------------------------------------------------------------------------------------------- quasi-Monte-Carlo timesteps
# Eq. 5. A row of TIMESTEPS maps (visits, K, generator) to weight (N, T): 0 for a step not drawn, else 1/(K p_t) for each time
# it was drawn (1/pi_t if it is drawn at most once, with probability pi_t), so that E[weight] = 1 for every t below the horizon
# of a row with an advantage, and sum_t weight_t f_t estimates sum_t f_t without bias. A step drawn twice is one pass with twice
# the weight. A row makes three choices: how evenly its points lie, where the proposal p_t draws more (a row of SIZES), and
# whether it may draw a step twice.
class Visits(NamedTuple):
    """What is known of each step when the draws are made."""
    horizon: Tensor                    # (N,) = m, the steps that count
    entropy: Tensor                    # (N, T) summed over the tokens that the step revealed
    gradient: Tensor                   # (N, T) length of the gradient of the step's log-prob with respect to the logits
    adv: Tensor                        # (N,)

    @property
    def inside(self) -> Tensor:
        """(N, T) bool: steps below the horizon."""
        return torch.arange(self.entropy.shape[1]) < self.horizon[:, None]


SIZES = {
    "uniform": lambda visits: torch.ones_like(visits.entropy),
    "entropy": lambda visits: visits.entropy,
    "root_entropy": lambda visits: visits.entropy.sqrt(),
    "gradient": lambda visits: visits.gradient,
}


def proposal(size: Tensor, inside: Tensor, floor: float) -> Tensor:
    """p (R, S), rows sum to 1: proportional to size, mixed with a uniform floor that bounds the weights; zero outside `inside`."""
    size, inside = (size + 1e-9) * inside, inside.double()                           # all sizes zero: uniform
    return (1 - floor) * size / size.sum(1, keepdim=True) + floor * inside / inside.sum(1, keepdim=True)


def sobol(N, K, g):
    """Scrambled Sobol: K points of an N-dimensional sequence, a dimension a row (in groups of the engine's maximum)."""
    most = torch.quasirandom.SobolEngine.MAXDIM
    seeds = torch.randint(2**31, (-(-N // most),), generator=g).tolist()
    return torch.cat([torch.quasirandom.SobolEngine(min(most, N - i * most), scramble=True, seed=s)
                      .draw(K, dtype=torch.float64) for i, s in enumerate(seeds)], 1).T.contiguous()


POINTS = {                             # N, K, generator -> u (N, K) in [0, 1)
    "iid": lambda N, K, g: torch.rand(N, K, generator=g, dtype=torch.float64),
    # the paper's: N K points, one per cell of an even grid over [0, 1), dealt out at random: even over the batch
    "batch": lambda N, K, g: (torch.randperm(N * K, generator=g).view(N, K) + POINTS["iid"](N, K, g)) / (N * K),
    # one point in each K-th of [0, 1) for every row: even for each completion, whose advantage the draws share
    "stratified": lambda N, K, g: (torch.arange(K) + POINTS["iid"](N, K, g)) / K,
    "sobol": sobol,
}


def with_replacement(points: str, size: str, floor: float = 0.1) -> Callable:
    """K points of each row go through the inverse distribution of its proposal."""
    def rule(visits, K, g):
        p = proposal(SIZES[size](visits), visits.inside, floor)                      # (N, T)
        cdf = p.cumsum(1)
        u = POINTS[points](len(p), K, g).clamp(max=1 - 2**-53)                       # it may round up to 1
        step = torch.minimum(torch.searchsorted(cdf, u * cdf[:, -1:], right=True), visits.horizon[:, None] - 1)
        return torch.zeros_like(p).scatter_add_(1, step, 1 / (K * p.gather(1, step)))
    return rule


def without_replacement(size: str, floor: float = 0.1) -> Callable:
    """K different steps of each row by systematic sampling; K >= m gives the exact sum."""
    return lambda visits, K, g: systematic(proposal(SIZES[size](visits), visits.inside, floor),
                                           visits.horizon.clamp(max=K)[:, None], g)


def over_batch(size: str, floor: float = 0.1, draw: Callable | None = None) -> Callable:
    """The same over all steps of all rows at once, in proportion to |A| times size: as many passes as K a row, spent where the
    gradient is. Rows without an advantage have none, and get no pass. The steps are laid out in random order, so that no
    period of the batch meets that of the comb. draw: `independent` in place of the comb."""
    def rule(visits, K, g):
        if not visits.adv.any():
            return torch.zeros_like(visits.entropy)
        active, shuffled = visits.adv != 0, torch.randperm(visits.entropy.numel(), generator=g)
        p = proposal(SIZES[size](visits).view(1, -1), (visits.inside & active[:, None]).view(1, -1), floor)
        p = p * visits.adv.abs().repeat_interleave(visits.entropy.shape[1])          # the floor bounds |A| x weight
        weight = (draw or systematic)(p[:, shuffled], visits.horizon.clamp(max=K)[active].sum().view(1, 1), g)
        return weight[:, shuffled.argsort()].view_as(visits.entropy)
    return rule


def inclusion(size: Tensor, many: Tensor) -> Tensor:
    """pi_s = min(1, c size_s) for size (R, S), c such that each row sums to `many` (R, 1)."""
    sure = torch.zeros_like(size, dtype=torch.bool)
    while True:                                                                      # find c: who would exceed 1 is sure
        rest = size.masked_fill(sure, 0.0)
        pi = (many - sure.sum(1, keepdim=True)) * rest / rest.sum(1, keepdim=True).clamp(min=1e-300)
        if not (more := pi >= 1 - 1e-9).any():
            break
        sure |= more
    return pi.masked_fill(sure, 1.0)


def systematic(size: Tensor, many: Tensor, g: torch.Generator) -> Tensor:
    """`many` (R, 1) different columns of each row of size (R, S), column s with probability pi_s: a comb of teeth one apart, at a
    random offset, laid over the running sum of pi. It hits a column at most once and neighbours seldom together.
    -> 1/pi_s where hit, else 0: the estimate of Horvitz and Thompson."""
    pi = inclusion(size, many)
    teeth = (pi.cumsum(1) - torch.rand(len(size), 1, generator=g, dtype=torch.float64)).ceil()      # teeth up to each column
    return torch.where(teeth.diff(dim=1, prepend=torch.zeros_like(teeth[:, :1])) > 0, 1 / pi, 0.0)


def independent(size: Tensor, many: Tensor, g: torch.Generator) -> Tensor:
    """The same, but each column by itself: `many` on average, and the product over a row of 1 + (w_s - 1)/pi_s where hit has the
    expectation prod_s w_s, which Eq. 10 needs."""
    pi = inclusion(size, many)
    return torch.where(torch.rand(pi.shape, generator=g, dtype=torch.float64) < pi, 1 / pi, 0.0)


TIMESTEPS = {
    "iid": with_replacement("iid", "uniform"),
    "batch": with_replacement("batch", "uniform"),
    "batch_entropy": with_replacement("batch", "entropy", floor=0.0),  # the paper's: weights without a bound
    "stratified": with_replacement("stratified", "uniform"),
    "stratified_entropy": with_replacement("stratified", "entropy"),
    "stratified_root_entropy": with_replacement("stratified", "root_entropy"),
    "stratified_gradient": with_replacement("stratified", "gradient"),
    "sobol": with_replacement("sobol", "uniform"),
    "without_replacement": without_replacement("uniform"),
    "without_replacement_gradient": without_replacement("gradient"),
    "batch_gradient": over_batch("gradient"),                                        # the default
    "independent_gradient": over_batch("gradient", draw=independent),                # ... after rollouts with an approximate cache
}


# ------------------------------------------------------------------------------------- advantages, views, the surrogate
def zero_if_equal(advantage: Callable) -> Callable:
    """reward (B, G) -> adv (B, G), exactly zero where a group's rewards are equal: by rounding alone it would cost passes."""
    return lambda r: advantage(r).masked_fill(r.amax(1, keepdim=True) == r.amin(1, keepdim=True), 0.0)


ADVANTAGES = {
    "mean": zero_if_equal(lambda r: r - r.mean(1, keepdim=True)),
    "leave_one_out": zero_if_equal(lambda r: (r - r.mean(1, keepdim=True)) * r.shape[1] / (r.shape[1] - 1)),
    "std": zero_if_equal(lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)),
    "none": lambda r: r,                                                             # for a value model, which is a baseline itself
}


class Normalizer(NamedTuple):
    """What the sum of Eq. 4 is divided by."""
    horizon: Callable                  # traj -> (N,), the steps that count
    divisor: Callable                  # traj, cfg, row (M,), target (M, C) of the views -> Z (M,)


NORMALIZERS = {
    "steps": Normalizer(lambda traj: traj.nfe, lambda traj, cfg, row, target: torch.full_like(row, cfg.steps)),      # T: gradient of E[R]
    "last_step": Normalizer(lambda traj: traj.last_step + 1, lambda traj, cfg, row, target: traj.last_step[row] + 1),    # AGRPO's m
    "length": Normalizer(lambda traj: traj.nfe, lambda traj, cfg, row, target: traj.counted.sum(1).clamp(min=1)[row]),   # d1: a mean over tokens
    # DiPO: a sum over all tokens of the batch, divided by their number; Eq. 4 is a mean over the N completions
    "batch_tokens": Normalizer(lambda traj: traj.nfe, lambda traj, cfg, row, target: (
        (traj.reveal_step < cfg.steps).sum() / len(traj.tokens)).clamp(min=1e-9).expand(len(row))),
    "state_tokens": Normalizer(lambda traj: traj.nfe, lambda traj, cfg, row, target: target.sum(1).clamp(min=1)),    # TraceRL: a mean over each state's
}


# A method is a row of VIEWS: (traj, adv (N,), cfg, mask_id, generator) -> the pieces of work that the loss scores. What differs is which
# states are scored, and which tokens on each. Where the states are those that the sampler saw, the old log-probs are the recorded ones; for
# the others (`scored`) the surrogate likelihood is another one than the sampler's, so old and new are both scored on the same views.
# A method of your own: a function like exact_views, a row of VIEWS, and, if it has settings, a row of PUBLISHED.
class Views(NamedTuple):
    """What a method scores: M pieces of work, one forward and backward row each."""
    row: Tensor                        # (M,) of the trajectory
    step: Tensor                       # (M,) the first step that it stands for
    state: Tensor                      # (M, C) what the denoiser sees
    target: Tensor                     # (M, C) bool, positions whose log-prob counts
    weight: Tensor                     # (M,)
    prompt: Tensor | None = None       # (M, P) what the denoiser sees of the prompt, if not all
    visited: bool = False              # each state is the one that the sampler saw at that step
    scored: bool = False               # old log-probs are to be scored on these views: the recorded ones are of another law
    packed: bool = False               # each block of the state is read behind the final text of those before it
    drawn: Tensor | None = None        # (M,) 1 / probability of drawing the view, where it was drawn
    logp_old: Tensor | None = None     # (M, C) of tokens and (M,) of the choice of positions, if scored: see score_old
    order_logp_old: Tensor | None = None

    def select(self, index) -> "Views":
        """Some of the views, by indices, a slice or bool (M,)."""
        return Views(*(x[index] if isinstance(x, Tensor) else x for x in self))


def make_views(traj: Trajectory, row: Tensor, step: Tensor, state: Tensor, target: Tensor, weight, cfg: Config, **rest) -> Views:
    """Views of weight / Z; those without a target are left out."""
    row, step = row.to(target.device), step.to(target.device)
    weight = weight / NORMALIZERS[cfg.normalizer].divisor(traj, cfg, row, target).double()
    return Views(row, step, state, target, weight, **rest).select(target.any(1))


def views_where(weight: Tensor, traj: Trajectory, cfg: Config, mask_id: int) -> Views:
    """weight (N, T) -> the steps where it is not zero, as views."""
    row, step = (weight != 0).nonzero(as_tuple=True)
    row, step, weight = (x.to(traj.tokens.device) for x in (row, step, weight[row, step]))
    return make_views(traj, row, step, *state_at(traj, row, step, mask_id), weight, cfg, drawn=weight, visited=not cfg.update_block,
                      scored=cfg.update_block > 0 or approximate(cfg))


def steps_below_horizon(traj: Trajectory, cfg: Config) -> Tensor:
    """(N, T) bool: those that count."""
    return torch.arange(cfg.steps) < NORMALIZERS[cfg.normalizer].horizon(traj).cpu()[:, None]


def visits_of(traj: Trajectory, adv: Tensor, horizon: Tensor) -> Visits:
    """What the rollout recorded of each step, on the CPU, with adv (N,) and horizon (N,)."""
    return Visits(horizon.cpu(), traj.entropy.cpu(), traj.gradient.cpu().sqrt(), adv.cpu().double())


def agrpo_views(traj: Trajectory, adv: Tensor, cfg: Config, mask_id: int, g: torch.Generator) -> Views:
    """AGRPO (arXiv 2510.04019): K drawn states a completion, on average over those with an advantage; weight 1/(Z E[number of draws]) (Eq. 5)."""
    visits = visits_of(traj, adv.abs() + cfg.kl if kl_acts(cfg) else adv, NORMALIZERS[cfg.normalizer].horizon(traj))
    return views_where(TIMESTEPS[cfg.timesteps](visits, cfg.mc_steps, g), traj, cfg, mask_id)


def exact_views(traj: Trajectory, adv: Tensor, cfg: Config, mask_id: int, g: torch.Generator) -> Views:
    """Every state of every completion: what agrpo estimates, at up to T/K times the cost."""
    return views_where(steps_below_horizon(traj, cfg).double(), traj, cfg, mask_id)


VIEWS = {"agrpo": agrpo_views, "exact": exact_views}                                 # further rows: part two


def approximate(cfg: Config) -> bool:
    """Whether rollouts sample from another law than the model's: that of its forward with a cache."""
    return cfg.cache in ("prefix", "dual")


def teaches(views: Views, traj: Trajectory, adv: Tensor, cfg: Config) -> Tensor:
    """(M,) bool: views that can have a gradient. None has without an advantage, or, where old log-probs are the recorded ones, if all
    steps that revealed its targets had probability one; unless a KL term acts."""
    if kl_acts(cfg):
        return torch.ones_like(views.row, dtype=torch.bool)
    useful = adv[views.row] != 0
    if not views.scored:
        size = traj.gradient[views.row].gather(1, traj.reveal_step[views.row].clamp(max=cfg.steps - 1))
        useful &= ((size > 0) & views.target).any(1)
    return useful


def correct_for_cache(views: Views, traj: Trajectory, cfg: Config) -> Views:
    """Eq. 10: views of states visited by a rollout with a cache, their weights times W = pi(completion) / pi_cache(completion), truncated
    at is_cap. Of a completion's steps only those drawn are scored, s with probability 1/drawn_s, independently: the product of
    1 + (w_s - 1) drawn_s over them has the expectation prod_s w_s over all steps. `is_level step`: W = w_t, as is common, biased.
    Without a position term the choices of positions, as the cache made them, count as given."""
    behaviour = traj.logp[views.row]
    log_w = (views.logp_old - behaviour).masked_fill(~views.target, 0.0).sum(1)
    if views.order_logp_old is not None:
        log_w = log_w + views.order_logp_old - traj.order_logp[views.row, views.step]
    w = log_w.exp()
    if cfg.is_level == "completion":
        factor = torch.ones_like(traj.entropy).index_put((views.row, views.step), 1 + (w - 1) * views.drawn)           # (N, T)
        one = torch.ones_like(factor[:, :1])
        before = torch.cat([one, factor[:, :-1]], 1).cumprod(1)
        after = torch.cat([one, factor.flip(1)[:, :-1]], 1).cumprod(1).flip(1)
        w = w * (before * after)[views.row, views.step]                              # all factors but its own
    return views._replace(weight=views.weight * w.clamp(-cfg.is_cap, cfg.is_cap))


def surrogate(logp: Tensor, logp_old: Tensor, adv: Tensor, clip: float, clip_high: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eq. 3 and 4, elementwise: min(r A, clip(r) A) and the ratio r."""
    ratio = (logp - logp_old).exp()
    return torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + (clip_high or clip)) * adv), ratio.detach()


def kl_acts(cfg: Config) -> bool:
    """Whether the KL term has a gradient: to the policy before the update it has none at the first."""
    return cfg.kl > 0 and (cfg.kl_reference == "base" or cfg.inner_epochs > 1)


def k3(logp: Tensor, logp_old: Tensor, logp_reference: Tensor) -> Tensor:
    """The KL term of Eq. 4, elementwise: r (exp(s) - s - 1), s = log(reference / policy). Its gradient is that of KL(policy || reference)
    in expectation over tokens drawn from the old policy."""
    s = logp_reference - logp
    return (logp - logp_old).exp() * (s.exp() - s - 1)


def policy_loss(policy, traj: Trajectory, views: Views, adv: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """Minus Eq. 4 for some of the views, and their ratios (tokens, then choices of positions); adv (N,), or (N, C) of a value model.
    Losses of disjoint parts add up."""
    row, target = views.row, views.target
    logp, order_logp = step_logp(policy, traj, views, cfg)
    view_of = target.nonzero(as_tuple=True)[0]                                       # (targets,) the view of each token
    behaviour = traj.logp[row][target]
    logp_old = behaviour if not views.scored else logp.detach() if views.logp_old is None else views.logp_old[target]
    weight = views.weight[view_of]                               # may be negative (Eq. 10), and clips as a negative advantage does
    token_adv = adv[row][target] if adv.dim() == 2 else adv[row[view_of]]
    gain, ratio = surrogate(logp, logp_old, token_adv * weight.sign(), cfg.clip, cfg.clip_high)
    gain = gain * weight.abs()
    if cfg.is_cap and not views.visited:
        gain = gain * (logp_old - behaviour).exp().clamp(max=cfg.is_cap)             # Eq. 7: w, without a gradient
    if cfg.kl:
        gain = gain - cfg.kl * weight * k3(logp, logp_old, logp_old if cfg.kl_reference == "old" else reference_logp(policy, traj, views, cfg))
    total = gain.sum()                                           # tokens of a step are summed: Eq. 1 is a sum over them
    # The choice of positions is one action of the step, made once however many tokens it reveals: its ratio enters, and is
    # clipped, once per step. Multiplied into the token ratios it would count n times and drag tokens over the clip range.
    if order_logp is not None:
        of_step = (adv[row] * target).sum(1) / target.sum(1) if adv.dim() == 2 else adv[row]
        order_old = (traj.order_logp[row, views.step] if not views.scored else
                     order_logp.detach() if views.order_logp_old is None else views.order_logp_old)
        gain, order_ratio = surrogate(order_logp, order_old, of_step * views.weight.sign(), cfg.clip, cfg.clip_high)
        total, ratio = total + (gain * views.weight.abs()).sum(), torch.cat([ratio, order_ratio])
    return -total / len(traj.tokens), ratio                      # 1/N: mean over completions, skipped ones (adv 0) included


def pieces(index: Tensor, size: int) -> list:
    """Parts of at most so many; none of nothing."""
    return [part for part in index.split(size) if len(part)]


def passes(traj: Trajectory, cfg: Config, views: Views | None = None, rows: Tensor | None = None) -> list:
    """Indices of the views (or the rows of a trajectory), packed into passes of at most tokens_per_pass, longest prompts first: little is padding."""
    rows = views.row if views is not None else rows
    P, C = traj.prompt.shape[1], traj.tokens.shape[1] * (1 + (views is not None and views.packed))
    order = traj.prompt_mask.sum(1)[rows].argsort(descending=True, stable=True)
    return pieces(order, max(1, cfg.tokens_per_pass // (P + C)))


# ----------------------------------------------------------------------------------------------------------- the loop
def generate(policy, tokenizer, cfg: Config, examples: list, keys: list, each: Callable = lambda i, text: None) -> tuple[Trajectory, list]:
    """One completion per example -> trajectory, texts. The one way from an example to a text, in training and evaluation.

    Each process denoises its share, rollout_batch rows at once, those with long prompts first, and then all have all rows: what follows
    is the same on each. each(i, text): called for a process's own rows while the others are still to be denoised."""
    device, (rank, world) = next(policy.model.parameters()).device, processes()
    ids, prompt_mask = encode_prompts(tokenizer, [prompt_for(cfg.task, ex, cfg.prompt, cfg.system_prompt) for ex in examples])
    length, found = prompt_mask.sum(1), []
    mine = torch.tensor_split(torch.arange(len(examples)), world)[rank]              # neighbours: whole prompts, where they divide
    for part in pieces(mine[length[mine].argsort(descending=True, stable=True)], cfg.rollout_batch):
        P = max(1, int(length[part].max()))
        traj = rollout(policy, ids[part, -P:].to(device), prompt_mask[part, -P:].to(device), cfg, [keys[i] for i in part])
        texts = [tokenizer.decode(row[:n]) for row, n in zip(traj.tokens.cpu(), traj.length.tolist())]
        for i, text in zip(part.tolist(), texts):
            each(i, text)
        found.append((part, traj.to("cpu") if world > 1 else traj, texts))
    policy.wait_for_others()
    index, parts, texts = zip(*everyones(found))
    back, texts = torch.cat(index).argsort(), sum(texts, [])
    return Trajectory.join(parts).rows(back.to(parts[0].tokens.device)).to(device), [texts[i] for i in back]


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, then constant or cosine. A function of the step alone: nothing to save, nothing to resume."""
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / cfg.decay_steps))) if cfg.decay_steps else 1.0
    return cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup)) * decay


def make_optimizer(policy, cfg: Config) -> torch.optim.Optimizer:
    """AdamW over groups that are clipped apart: the policy's weights, and, each with a learning rate of its own, controller and value model."""
    value = policy.value.own if policy.value else []
    head = list(policy.controller.parameters()) if policy.controller else []
    weights = [p for p in policy.model.parameters() if p.requires_grad and not any(p is q for q in value)]
    groups = [{"params": params, "lr": cfg.lr * scale, "scale": scale} for params, scale in
              ((weights, 1.0), (head, cfg.controller_lr / cfg.lr), (value, cfg.value_lr / cfg.lr)) if params]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)


def batch_of_examples(examples: list, step: int, cfg: Config) -> list:
    """B examples for a step: passes over the data, each in an order of its own."""
    places = range(step * cfg.prompts, (step + 1) * cfg.prompts)
    order = {e: torch.randperm(len(examples), generator=generator("data", cfg.seed, e)) for e in
             {i // len(examples) for i in places}}
    return [examples[order[i // len(examples)][i % len(examples)]] for i in places]


def share(views: Views, equal: bool) -> Views:
    """This process's part of the views, dealt out in turn; if equal, to each as many, some again with weight 0."""
    rank, world = processes()
    if equal and (extra := -len(views.row) % world):
        again = views.select(torch.arange(extra, device=views.row.device) % max(1, len(views.row)))
        again = again._replace(weight=torch.zeros_like(again.weight))
        views = Views(*(torch.cat(pair) if isinstance(pair[0], Tensor) else pair[0] for pair in zip(views, again)))
    return views.select(slice(rank, None, world))


def sum_gradients(trained: list, max_norm: float, sharded: bool = False) -> float:
    """Adds up the processes' gradients, clips them together, returns their norm before that. (No wrapper with hooks of its own: the losses
    of disjoint views add up, so one sum after the last backward is all there is to do. FSDP has summed while going backward.)"""
    if processes()[1] > 1 and anyone(any(p.grad is not None for p in trained)):
        for p in trained:
            if sharded:
                p.grad.mul_(processes()[1])                                          # FSDP took the mean
            else:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def optimizer_step(policy, optimizer, step: int, cfg: Config, finite: bool) -> tuple[float, bool]:
    """The one place where weights change: norm of the policy's gradient, and whether it was applied: not unless all of it is finite."""
    norms = [sum_gradients(group["params"], cfg.max_grad_norm, policy.sharded) for group in optimizer.param_groups]
    finite = not anyone(not (finite and all(map(math.isfinite, norms))))
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg) * group.get("scale", 1.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms[0], finite


def sample(policy, tokenizer, batch: list, keys: list, cfg: Config) -> tuple[Trajectory, list, list]:
    """One completion per example -> trajectory, the named parts of each reward, and whether each is solved."""
    weights, graded = read_weights(cfg.task, cfg.reward_weights), []

    def judge(i, text):
        return i, reward_parts(cfg.task, text, batch[i], weights), grade(cfg.task, text, batch[i]) == 1

    try:
        traj, _ = generate(policy, tokenizer, cfg, batch, keys, each=lambda i, text: graded.append(graders().submit(judge, i, text)))
        verdicts = everyones([verdict.exception() or verdict.result() for verdict in graded])
    except BaseException:
        graders().shutdown(wait=False, cancel_futures=True)                          # nobody waits for the rest
        graders.cache_clear()
        raise
    for error in verdicts:
        if isinstance(error, BaseException):                                         # one process's is all's
            raise error
    _, parts, solved = zip(*sorted(verdicts, key=lambda x: x[0]))
    if cfg.controller != "off":                                                      # DiFFPO: right, and in few denoiser calls
        parts = [{k: v * (1 - n / cfg.completion_length)**cfg.alpha for k, v in p.items()} for p, n in zip(parts, traj.nfe.tolist())]
    if cfg.overlong_penalty:
        parts = [{**p, "overlong": -cfg.overlong_penalty * overlong(n, cfg.completion_length, cfg.overlong_from)}
                 for p, n in zip(parts, traj.length.tolist())]
    return traj, list(parts), list(solved)


def sample_groups(policy, tokenizer, examples: list, step: int, cfg: Config) -> tuple[Trajectory, Tensor, list, list]:
    """B groups of G completions -> trajectory, reward (N,), and parts and solved of all that was sampled. Dynamic sampling (DiPO): groups
    of equal rewards, which teach nothing, are dropped and other prompts take their place, a few times at most."""
    G, kept, reward, all_parts, all_solved = cfg.completions, [], torch.zeros(0, dtype=torch.float64), [], []
    prompts = batch_of_examples(examples, step, cfg)
    for attempt in range(cfg.dynamic_sampling + 1):
        batch = [ex for ex in prompts for _ in range(G)]
        traj, parts, solved = sample(policy, tokenizer, batch, [("rollout", cfg.seed, step, i, *[attempt][:attempt]) for i in range(len(batch))], cfg)
        kept, reward = kept + [traj], torch.cat([reward, torch.tensor([sum(p.values()) for p in parts], dtype=torch.float64)])
        all_parts, all_solved = all_parts + parts, all_solved + solved
        groups = reward.view(-1, G)
        equal = groups.amax(1) == groups.amin(1)
        if attempt == cfg.dynamic_sampling or not equal.any():
            break
        different = (~equal).repeat_interleave(G)
        kept, reward = [Trajectory.join(kept).rows(different.to(traj.tokens.device))], reward[different]
        g = generator("refill", cfg.seed, step, attempt)
        prompts = [examples[i] for i in torch.randint(len(examples), (int(equal.sum()),), generator=g).tolist()]
    return Trajectory.join(kept), reward, all_parts, all_solved


def accumulate(loss_of: Callable, traj: Trajectory, views: Views, policy, cfg: Config, ratios: list | None = None) -> float:
    """Gradients of this process's share of the views, pass after pass; returns its loss."""
    total, mine = torch.zeros((), dtype=torch.float64), share(views, policy.sharded)
    for part in passes(traj, cfg, mine):
        loss, ratio = loss_of(mine.select(part))
        loss.backward()
        total += loss.detach().cpu()
        if ratios is not None:
            ratios.append(ratio.float().cpu())
    return float(total)


def train_step(policy, tokenizer, optimizer, examples: list, step: int, cfg: Config) -> dict:
    """One step of RL, start to end, the same for all methods; returns the row of the log."""
    # sample: B prompts, G completions each; reward and advantage
    clock = time.perf_counter()
    traj, reward, parts, solved = sample_groups(policy, tokenizer, examples, step, cfg)
    group_adv = adv = ADVANTAGES[cfg.advantage](reward.view(-1, cfg.completions)).view(-1)
    finite = all(bool(x.isfinite().all()) for x in (adv, traj.logp, traj.order_logp, traj.gradient))
    group_adv = adv = (adv if finite else torch.zeros_like(adv)).to(traj.logp.device)
    rollout_seconds, clock = time.perf_counter() - clock, time.perf_counter()
    # views: which states to score, and with which weight; per-token advantages, where a value model gives them
    block, policy.block = policy.block, cfg.update_block or policy.block
    epochs = [VIEWS[cfg.method](traj, adv, cfg, policy.mask_id, generator("timesteps", cfg.seed, step, *[epoch][:epoch]))
              for epoch in range(cfg.inner_epochs)]
    if policy.value:
        value = policy.value.of(traj, epochs[0], cfg)
        scored = torch.zeros_like(traj.tokens).index_add(0, epochs[0].row, epochs[0].target.long()) > 0
        when = (traj.reveal_step // cfg.shrink).masked_fill(~scored, -1)
        adv, returns = gae(adv, value, when, cfg.gamma, cfg.lam)
    if cfg.controller != "off" and cfg.controller_training == "alone":
        epochs = [views.select(slice(0, 0)) for views in epochs]
    made = sum(len(views.row) for views in epochs)
    if not policy.value:
        epochs = [views.select(teaches(views, traj, adv, cfg)) for views in epochs]  # no gradient: no pass
    if epochs[0].scored and (cfg.inner_epochs > 1 or approximate(cfg)):
        epochs = [score_old(policy, traj, views, cfg) for views in epochs]
    is_weight = torch.zeros(0)                                                       # Eq. 10: W of the views scored
    if epochs[0].visited and approximate(cfg) and cfg.is_cap:
        before, epochs = epochs, [correct_for_cache(views, traj, cfg) for views in epochs]
        is_weight = torch.cat([now.weight.cpu() / then.weight.cpu() for now, then in zip(epochs, before)])
    # accumulate the gradient over passes and processes, then one optimizer step
    ratios, applied = [], True
    for views in epochs:
        total = accumulate(lambda part: policy_loss(policy, traj, part, adv, cfg), traj, views, policy, cfg, ratios)
        if cfg.controller != "off":
            rows = (group_adv != 0).nonzero().squeeze(1)[processes()[0]::processes()[1]]
            for part in passes(traj, cfg, rows=rows):
                loss, ratio = controller_loss(policy, traj, rows[part], group_adv, cfg)
                loss.backward()
                total, ratios = total + float(loss.detach()), [*ratios, ratio.float().cpu()]
        if policy.value:
            with policy.value.on():
                total += accumulate(lambda part: (policy.value.loss(traj, part, value, returns, cfg.clip), None), traj, views, policy, cfg)
        grad_norm, applied = optimizer_step(policy, optimizer, step, cfg, finite and applied and math.isfinite(total))
    policy.block = block
    ratios = everyones(ratios)
    ratio, mean = torch.cat(ratios or [torch.ones(1)]), lambda xs: float(np.mean(list(xs)))
    return {"step": step, "reward": mean(sum(p.values()) for p in parts), **{f"reward_{k}": mean(p[k] for p in parts) for k in parts[0]},
            "solved": mean(solved), "ratio": float(ratio.mean()),
            "clip_fraction": float(((ratio < 1 - cfg.clip) | (ratio > 1 + (cfg.clip_high or cfg.clip))).float().mean()), "grad_norm": grad_norm,
            "entropy": float(traj.entropy.sum() / traj.tokens.numel()), "nfe": float(traj.nfe.float().mean()),
            "ease": float(traj.ease.mean()) if traj.ease is not None else "", "is_weight": float(is_weight.mean()) if len(is_weight) else "",
            "is_capped": float((is_weight.abs() >= cfg.is_cap * (1 - 1e-9)).double().mean()) if len(is_weight) else "", "sampled": len(parts),
            "passes": (scored := sum(len(views.row) for views in epochs)), "passes_saved": made - scored, "skipped": int(not applied),
            "lr": learning_rate(step, cfg), "heldout": "",
            "peak_memory_mb": run_folder.peak_memory_mb(), "rollout_seconds": round(rollout_seconds, 3),
            "update_seconds": round(time.perf_counter() - clock, 3)}


# ==================================================================================== part two: the other methods, in the same frame
def diffu_grpo_views(traj: Trajectory, adv: Tensor, cfg: Config, mask_id: int, g: torch.Generator) -> Views:
    """diffu-GRPO (d1, arXiv 2504.12216): all tokens at once from a completion that is all MASK, one forward; the prompt's tokens are
    masked at random, anew for every update: noise against overfitting where one rollout serves many of them."""
    row = torch.arange(len(traj.tokens), device=traj.tokens.device)
    hide = (torch.rand(traj.prompt.shape, generator=g) < cfg.prompt_masking).to(row.device) & traj.prompt_mask.bool()
    return make_views(traj, row, torch.zeros_like(row), torch.full_like(traj.tokens, mask_id), traj.counted, 1.0, cfg,
                      prompt=traj.prompt.masked_fill(hide, mask_id), scored=True)


def diffpo_views(traj: Trajectory, adv: Tensor, cfg: Config, mask_id: int, g: torch.Generator) -> Views:
    """DiFFPO (arXiv 2510.02212), the two-state mean field: what came before a random step s is scored on the completion all MASK, the
    rest on x_s. The surrogate is no likelihood of the sampler's: `is_cap` weights each token by the truncated ratio of the two (Eq. 7)."""
    row = torch.arange(len(traj.tokens), device=traj.tokens.device)
    split = (torch.rand(len(row), generator=g, dtype=torch.float64).to(row.device) * traj.nfe).long()
    late, (state, _) = traj.reveal_step >= split[:, None], state_at(traj, row, split, mask_id)
    return make_views(traj, row.repeat(2), torch.cat([torch.zeros_like(split), split]), torch.cat([torch.full_like(state, mask_id), state]),
                      torch.cat([traj.counted & ~late, traj.counted & late]), 1.0, cfg, scored=True)


def tracerl_views(traj: Trajectory, adv: Tensor, cfg: Config, mask_id: int, g: torch.Generator) -> Views:
    """TraceRL (arXiv 2509.06949): every step, `shrink` neighbours merged: all that they revealed is scored on the state of the first."""
    every = torch.arange(cfg.steps)
    row, step = (steps_below_horizon(traj, cfg) & (every % cfg.shrink == 0)).nonzero(as_tuple=True)
    row, step = row.to(traj.tokens.device), step.to(traj.tokens.device)
    state, _ = state_at(traj, row, step, mask_id)
    u = traj.reveal_step[row]
    merged = (u >= step[:, None]) & (u < step[:, None] + cfg.shrink) & (u < cfg.steps)
    as_seen = cfg.shrink == 1 and not cfg.update_block
    return make_views(traj, row, step, state, merged, 1.0, cfg, visited=as_seen, scored=not as_seen or approximate(cfg),
                      drawn=torch.ones_like(row, dtype=torch.float64))


def dipo_views(traj: Trajectory, adv: Tensor, cfg: Config, mask_id: int, g: torch.Generator) -> Views:
    """DiPO (DiRL, arXiv 2512.22234), for block-causal models: every step of every block, the j-th steps of all blocks in one pass, each read
    behind the final text of the blocks before it: as many passes as the slowest block took steps. Blocks count from the prompt's first
    token; counted from the completion's, the replay would not be what the sampler saw."""
    size, u = cfg.update_block or cfg.block_length, traj.reveal_step
    N, C = u.shape
    block = (torch.arange(C, device=u.device) + traj.prompt_mask.sum(1, keepdim=True) % size) // size                # (N, C)
    same = block[:, :, None] == block[:, None, :]                                                                  # (N, C, C)
    local = u - torch.where(same, u[:, None, :], cfg.steps).amin(2)                  # (N, C) which step of its block, from 0
    local = torch.where(u < cfg.steps, local, C)                                     # filled in after the end: no step of ours, and never seen
    row, step = (torch.arange(cfg.steps, device=u.device) <= local.masked_fill(local == C, -1).amax(1, keepdim=True)).nonzero(as_tuple=True)
    state = traj.tokens[row].masked_fill(local[row] >= step[:, None], mask_id)
    return make_views(traj, row, step, state, local[row] == step[:, None], 1.0, cfg, packed=True, scored=cfg.update_block > 0)


VIEWS |= {"diffu-grpo": diffu_grpo_views, "diffpo": diffpo_views, "tracerl": tracerl_views, "dipo": dipo_views}


# ------------------------------------------------------------------------- old log-probs of scored views, KL to the first model
@torch.no_grad()
def score_old(policy, traj: Trajectory, views: Views, cfg: Config) -> Views:
    """The views with their log-probs under the present parameters; each process scores its share."""
    (rank, world), found = processes(), []
    mine = torch.arange(len(views.row), device=views.row.device)[rank::world]
    for part in passes(traj, cfg, views.select(mine)):
        some = views.select(mine[part])
        logp, order_logp = step_logp(policy, traj, some, cfg)
        dense = torch.zeros(some.target.shape, dtype=torch.float64, device=logp.device).masked_scatter(some.target, logp.double())
        found.append([x if x is None or world == 1 else x.cpu() for x in (mine[part], dense, order_logp)])
    policy.wait_for_others()
    found = everyones(found) or [[views.row, views.target.double(), None]]           # no views at all
    index, logp, order_logp = ([x.to(views.row.device) for x in xs if x is not None] for xs in zip(*found))
    back = torch.cat(index).argsort()
    return views._replace(logp_old=torch.cat(logp)[back], order_logp_old=torch.cat(order_logp).double()[back] if order_logp else None)


def keep_reference(policy):
    """Before training: a copy of the weights that will be trained, all or the adapters."""
    policy.reference = [(p, p.detach().clone()) for p in policy.model.parameters() if p.requires_grad]


@torch.no_grad()
def reference_logp(policy, traj: Trajectory, views: Views, cfg: Config) -> Tensor:
    """(targets,) under the model to begin with: its weights take the place of the trained ones for one forward."""
    trained = [p.data for p, _ in policy.reference]
    try:
        for p, first in policy.reference:
            p.data = first
        return step_logp(policy, traj, views, cfg)[0]
    finally:
        for (p, _), now in zip(policy.reference, trained):
            p.data = now


# ------------------------------------------------------------------------------------------- per-token baselines (TraceRL)
class ValueModel(Policy):
    """TraceRL's diffusion value model: what reward a masked position expects, read before it is revealed. A backbone of its own, or, beside
    adapters, a second set of adapters on the same one; its head is zero at first. `logits` gives values (n, 1)."""

    def __init__(self, policy: Policy, cfg: Config):
        super().__init__(policy.model, policy.mask_id, policy.eos_id, policy.turn_id, policy.shift, policy.block)
        self.flex, parameter = policy.flex, next(policy.model.parameters())
        self.trained = [p for p in policy.model.parameters() if p.requires_grad]
        if cfg.lora_rank:
            add_adapter(policy.model, cfg.lora_rank, cfg.lora_alpha, cfg.seed + 1, "value")
        else:
            self.model = copy.deepcopy(policy.model)
            self.model.get_output_embeddings().requires_grad_(False)
        self.head = torch.nn.Linear(self.model.get_output_embeddings().weight.shape[1], 1, device=parameter.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        with self.on():
            own = [p for p in self.model.parameters() if p.requires_grad and not any(p is q for q in self.trained)]
        self.own = [*self.head.parameters(), *own]
        self.switch("default")

    def switch(self, name: str):
        """Which adapters are in use: "default", the policy's, or "value"."""
        if hasattr(self.model, "peft_config"):
            self.model.set_adapter(name)
            for p in self.trained + getattr(self, "own", []):                        # switching freezes those not in use
                p.requires_grad_(True)

    @contextlib.contextmanager
    def on(self):
        """The adapters in use are the value model's, forward and backward."""
        self.switch("value")
        try:
            yield
        finally:
            self.switch("default")

    def forward(self, prompt, prompt_mask, state, where, clean=None, cache=None, with_ease=False):
        at = self.hidden(prompt, prompt_mask, state, clean)[:, 1 - self.shift:][:, :state.shape[1]][where]
        return torch.nn.functional.linear(at.to(torch.promote_types(at.dtype, torch.float32)), self.head.weight, self.head.bias)

    def values(self, traj: Trajectory, views: Views) -> Tensor:
        """(targets,) in row-major order."""
        row, clean = views.row, traj.tokens[views.row] if views.packed else None
        return self.logits(*traj.prompts(row), views.state, views.target, clean=clean).squeeze(1)

    @torch.no_grad()
    def of(self, traj: Trajectory, views: Views, cfg: Config) -> Tensor:
        """(N, C), zero where no view has a target."""
        value = torch.zeros(traj.tokens.shape, dtype=torch.float64, device=traj.tokens.device)
        with self.on():
            for part in map(views.select, passes(traj, cfg, views)):
                n, position = part.target.nonzero(as_tuple=True)
                value[part.row[n], position] = self.values(traj, part).double()
        return value

    def loss(self, traj: Trajectory, views: Views, value_old: Tensor, returns: Tensor, clip: float) -> Tensor:
        """1/2 max((V - R)^2, (V_clip - R)^2), weighted as the policy's loss."""
        value, old, target = self.values(traj, views), value_old[views.row][views.target], returns[views.row][views.target]
        clipped = old + (value - old).clamp(-clip, clip)
        loss = 0.5 * torch.maximum((value - target)**2, (clipped - target)**2)
        return (loss * views.weight[views.target.nonzero(as_tuple=True)[0]]).sum() / len(traj.tokens)


def gae(reward: Tensor, value: Tensor, step: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, C) of TraceRL: reward (N,) falls on the tokens of the last step; value (N, C); step (N, C), -1 for tokens
    that do not count. With means over the tokens of the next step marked *:
    R_j = r_j + gamma R*,  A_j = r_j - V_j + gamma V* + gamma lam A*."""
    adv, returns, last = torch.zeros_like(value), torch.zeros_like(value), step.amax(1)
    next_ = torch.zeros(3, len(value), dtype=value.dtype, device=value.device)       # R*, V*, A* of the step after
    for t in range(int(last.max()), -1, -1):
        here = step == t
        r = (reward * (last == t))[:, None]
        R, A = r + gamma * next_[0][:, None], r - value + gamma * next_[1][:, None] + gamma * lam * next_[2][:, None]
        returns, adv = torch.where(here, R, returns), torch.where(here, A, adv)
        mean = torch.stack([(x * here).sum(1) for x in (returns, value, adv)]) / here.sum(1).clamp(min=1)
        next_ = torch.where(here.any(1), mean, next_)
    return adv, returns


# --------------------------------------------------------------------------------------- a controller of the sampler (DiFFPO)
# The sampler's threshold is drawn per completion, ease x ~ Normal(mu, sigma), mu = Linear(hidden state of the prompt's
# last token); the head is not published, this one begins at the configured threshold. Given x the choice of positions is not random, but over
# x it is, and its law depends on the model's confidences: x counted as one more action leaves that out, and the model's gradient is off by 25
# to 62 % on tables. So x is integrated out: at every step the same positions are revealed for all x between two edges, and
#   (9)  log pi_pos(traj) = log [ Phi((high - mu) / sigma) - Phi((low - mu) / sigma) ],
# the edges being levels of one step each. Its gradient trains head and model exactly (at the first update; later ones keep these two steps).
CONTROLLERS = {"off": "", "threshold": "threshold", "entropy": "entropy_bound"}      # --controller -> the sampler that it sets


def add_controller(policy, cfg: Config, saved: dict | None = None):
    """policy.controller: hidden state (N, width) -> mu (N, 1), saved or, for every prompt, the configured threshold's."""
    head = policy.model.get_output_embeddings().weight
    policy.controller = torch.nn.Linear(head.shape[1], 1, device=head.device)
    torch.nn.init.zeros_(policy.controller.weight)
    torch.nn.init.constant_(policy.controller.bias, UNMASK[CONTROLLERS[cfg.controller]].ease(cfg))
    if saved:
        policy.controller.load_state_dict(saved)


def draw_ease(traj: Trajectory, mean: Tensor, keys: list, cfg: Config):
    """Sets a trajectory's ease from mean (N,): drawn, or at temperature 0 the mean itself."""
    noise = torch.stack([torch.randn((), generator=generator("ease", *key), dtype=torch.float64) for key in keys]).to(mean.device)
    traj.ease, traj.ease_mean = mean + cfg.controller_sigma * noise * (cfg.temperature > 0), mean
    traj.edges = torch.tensor([-math.inf, math.inf], dtype=torch.float64, device=mean.device).repeat(len(mean), 1)
    traj.edge_steps = torch.full((len(mean), 2), cfg.steps, device=mean.device)


def edges_of_step(score: Tensor, open_: Tensor, rank: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """The eases (N,) from which on a step reveals as many as it did, -inf if it had to, and from which on more, inf if there are no more."""
    level, many = UNMASK[cfg.unmasking].level(in_order(score, open_)[0]), (rank >= 0).sum(1, keepdim=True)           # (N, C), (N, 1)
    low = level.gather(1, many - 1).masked_fill(many <= cfg.completion_length // cfg.steps, -math.inf)
    high = level.gather(1, many.clamp(max=level.shape[1] - 1)).masked_fill(many >= open_.sum(1, keepdim=True), math.inf)
    return low.squeeze(1), high.squeeze(1)


def narrow_edges(traj: Trajectory, rows: Tensor, t: int, low: Tensor, high: Tensor):
    """Takes a step's edges into the trajectory's, in place."""
    for side, edge, nearer in ((0, low.double(), torch.gt), (1, high.double(), torch.lt)):
        better = nearer(edge, traj.edges[rows, side])
        traj.edges[rows[better], side], traj.edge_steps[rows[better], side] = edge[better], t


def ease_logp(edges: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """Eq. 9: edges (N, 2), mean (N,) -> (N,). Both edges above the mean: the same mass on its other side, where it does not round to 1 - 1."""
    low, high = ((edges - mean[:, None]) / sigma).unbind(1)
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    return (torch.special.ndtr(high) - torch.special.ndtr(low)).clamp(min=1e-300).log()


def edges_again(policy, traj: Trajectory, row: Tensor, cfg: Config) -> Tensor:
    """The edges (M, 2) of some rows under the present parameters, from the two steps that set them."""
    edges = traj.edges[row]
    for side in (0, 1):
        at = (traj.edge_steps[row, side] < cfg.steps).nonzero().squeeze(1)
        if len(at):
            state, target = state_at(traj, row[at], traj.edge_steps[row[at], side], policy.mask_id)
            offset = block_offset(policy, traj.prompt_mask[row[at]])
            open_ = current_block(state, policy.mask_id, cfg.block_length, offset) & (state == policy.mask_id)
            law = Law(policy.logits(*traj.prompts(row[at]), state, open_), cfg)
            score = UNMASK[cfg.unmasking].score(law, None, None, cfg)
            edges = edges.index_put((at, torch.full_like(at, side)), edges_of_step(score, open_, target.long() - 1, cfg)[side].double())
    return edges


def controller_loss(policy, traj: Trajectory, row: Tensor, adv: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """Minus Eq. 4 for the choice of positions by eases of some rows (Eq. 9), and their ratios: one action, weighted as a step is when Z = T."""
    blank = torch.full_like(traj.tokens[row], policy.mask_id)
    _, mean = policy.logits(*traj.prompts(row), blank, torch.zeros_like(blank, dtype=torch.bool), with_ease=True)
    edges = edges_again(policy, traj, row, cfg) if cfg.controller_training == "joint" else traj.edges[row]
    logp, logp_old = (ease_logp(e, m.double(), cfg.controller_sigma) for e, m in ((edges, mean), (traj.edges[row], traj.ease_mean[row])))
    gain, ratio = surrogate(logp, logp_old, adv[row], cfg.clip, cfg.clip_high)
    return -gain.sum() / (cfg.steps * len(traj.tokens)), ratio


# ----------------------------------------------------------------------------------- block-causal models (DiRL), caches of keys and values
def block_rule(block: Tensor, real: Tensor, noisy: Tensor) -> Callable:
    """Block-causal attention from indices alone: (row, head, query, key) -> bool. block, real (N, S), noisy (S,). A block sees itself and,
    in their final text, those before it: noisy sees noisy of its own block and clean of earlier ones, clean sees clean up to its own
    block, never noisy (DiRL, arXiv 2512.22234). A padded query sees itself: no NaN."""
    def sees(n, head, q, k):
        same, before = block[n, q] == block[n, k], block[n, q] > block[n, k]
        allowed = torch.where(noisy[k], noisy[q] & same, before | (same & ~noisy[q]))
        return (q == k) | (allowed & real[n, q] & real[n, k])
    return sees


def block_mask(rule: Callable, N: int, S: int, device, flex: bool):
    """The rule as FlexAttention's block mask, never a dense (S, S) tensor, or as a dense one (N, 1, S, S)."""
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask
        return create_block_mask(rule, N, None, S, S, device=device)
    n, s = torch.arange(N, device=device), torch.arange(S, device=device)
    return rule(n[:, None, None], 0, s[:, None], s)[:, None]


class Cache:
    """Keys and values of N rows, of all columns of prompt and completion, and which of them a call computes anew (rows may stand at
    different blocks):
    block    block-causal models: the block being denoised, and the one before it, which has just become final. Exact: what a finished
             block holds does not depend on later ones
    dual     the block being denoised, once all columns were computed when the row came to it (Fast-dLLM, arXiv 2505.22618)
    prefix   that block and what follows; what comes before it is as it was when the row came to it (likewise)
    The last two are approximate: elsewhere keys and values are those of a state some steps old."""

    def __init__(self, kind: str, N: int, block_length: int):
        self.kind, self.N, self.block_length, self.kept = kind, N, block_length, {}  # kept: layer -> keys, values (N, heads, S + 1, size)
        self.came_to = np.full(N, -1)                                                # where the block begins at which a row was computed whole

    def aim(self, alive, rows: Tensor, first_open):
        """The rows of the next call, as array (n,) and on the device, and the first open position of each (n,)."""
        start = first_open // self.block_length * self.block_length
        self.rows, self.start, self.anew = rows, start, start != self.came_to[alive]
        self.came_to[alive] = start

    def update(self, key, value, layer, *_):
        """What a layer calls: stores its keys and values (n, heads, w, size) of `columns` (n, w), returns those of all columns."""
        if layer not in self.kept:
            self.kept[layer] = [x.new_zeros(self.N, x.shape[1], self.width, x.shape[3]) for x in (key, value)]
        for kept, new in zip(self.kept[layer], (key, value)):
            heads = torch.arange(kept.shape[1], device=kept.device)
            kept.index_put_((self.now[:, None, None], heads[:, None], self.columns[:, None]), new)
        return self.kept[layer] if len(self.now) == self.N else [kept[self.now] for kept in self.kept[layer]]

    def get_seq_length(self, *_):
        return 0                                                                     # positions are given

    def read(self, policy, ids, real, positions, P: int) -> Tensor:
        """The hidden states (n, S, width) of the columns computed, zero elsewhere. ids, real, positions (n, S), the first P columns a prompt."""
        (n, S), device = ids.shape, ids.device
        self.width, pad = S + 1, S - real.sum(1, keepdim=True)                       # column S takes what does not exist
        ids, real, block = (torch.nn.functional.pad(x, (0, 1)) for x in (ids, real, positions // max(1, policy.block)))
        every = torch.arange(S + 1, device=device)

        def compute(columns, at=slice(None)):                                        # (m, w), of rows `at` of the n -> (m, S + 1, width)
            self.columns, self.now, there = columns, self.rows[at], real[at][:, None]
            if policy.block:
                own = block[at].gather(1, columns)[:, :, None]
                there = (own >= block[at][:, None]) & there & real[at].gather(1, columns)[:, :, None]
            sees = there | (columns[:, :, None] == every)
            hidden = policy.decode(ids[at].gather(1, columns), sees[:, None], (columns - pad[at]).clamp(min=0), self)
            return hidden.new_zeros(len(columns), S + 1, hidden.shape[2]).scatter(1, columns[:, :, None].expand_as(hidden), hidden)

        if self.kind == "block":
            if not self.kept:                                                        # the prompt first
                compute(every[:P].expand(n, -1))
            masked = (ids == policy.mask_id) & (every >= P)
            current = block.masked_fill(~masked, S).amin(1, keepdim=True)            # (n, 1)
            columns = pad + (current - 1) * policy.block + torch.arange(2 * policy.block, device=device)
            return compute(columns.masked_fill((columns < pad) | (columns >= S), S))[:, :S]
        if self.anew.all():
            return compute(every[:S].expand(n, -1))[:, :S]
        start = self.start + P - policy.shift                                        # (n,) with the column that the first logits stand at
        ends = start + policy.shift + self.block_length if self.kind == "dual" else np.full(n, S)
        columns = np.minimum(start[:, None] + np.arange((ends - start).max()), S)
        columns, groups = torch.from_numpy(columns).to(device), [torch.from_numpy(x.nonzero()[0]).to(device) for x in (self.anew, ~self.anew)]
        if not len(groups[0]):
            return compute(columns)[:, :S]
        parts = [compute(every[:S].expand(len(groups[0]), -1), groups[0]), compute(columns[groups[1]], groups[1])]
        return torch.cat(parts)[torch.cat(groups).argsort()][:, :S]


# ======================================================================== part three: models, fine-tuning, settings, command line
# ------------------------------------------------------------------------------------------------ models, in and out
def load_policy(model: str, device: str, cfg: Config = Config(), train: bool = False) -> tuple[Policy, object]:
    """A directory or the hub's owner/name -> policy, tokenizer. To train: with adapters if lora_rank, else all of it in float32; what is
    not trained is bfloat16 on a GPU. Raises BadInput unless it is a masked diffusion model of FAMILIES whose every weight is found."""
    checkpoint, tokenizer, adapter = open_checkpoint(dataclasses.replace(cfg, model=model), weights=True)
    device = "cpu" if train and cfg.fsdp == "on" else device                         # whole in main memory; shard moves the parts
    half, full = torch.device(device).type == "cuda", train and not cfg.lora_rank
    net = load_model(checkpoint, torch.bfloat16 if half and not full else torch.float32, cfg.quantize, device)
    if half and not full and not checkpoint.config.tie_word_embeddings:
        net.get_output_embeddings().float()                                          # once, not in every call of logits
    if adapter:
        net = load_adapter(net, adapter, trainable=train and not full)
        net = net.merge_and_unload().requires_grad_(True) if full else net
    elif train and not full:
        net = add_adapter(net, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    policy = Policy(net, checkpoint.mask_id, tokenizer.eos_token_id, end_of_turn(tokenizer), checkpoint.family.shift, checkpoint.block)
    policy.flex = bool(checkpoint.block) and torch.device(device).type == "cuda"
    policy.source, policy.base = checkpoint.folder, base_of(adapter) if adapter else model
    for layer in net.get_decoder().layers if train and cfg.gradient_checkpointing == "on" else ():
        layer.forward = computed_again(layer)
    if cfg.compile == "on":
        policy.compiled = torch.compile(net.get_decoder().forward, dynamic=True)
    policy = policy if cfg.quantize else policy.to(device)
    if cfg.controller != "off":
        if train and cfg.controller_training == "alone":
            policy.model.requires_grad_(False)
        saved = read_controller(adapter or checkpoint.folder, checkpoint.config.hidden_size)
        if saved is None and not train:
            raise BadInput(f"--controller {cfg.controller}: {model} has no controller.safetensors")
        add_controller(policy, cfg, saved)
    return policy, tokenizer


def shard(policy, device: str = "cpu"):
    """FSDP: each process keeps a part of every weight, its gradient and its optimizer state, on the device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    kind = torch.device(device).type
    how = {"mesh": init_device_mesh(kind, (processes()[1],)), "reshard_after_forward": True,       # else policy.parameters() may be gathered copies
           "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if kind == "cuda" else MixedPrecisionPolicy()}
    for layer in policy.model.get_decoder().layers:
        fully_shard(layer, **how)
    fully_shard(policy, **how)
    policy.sharded = True


def save_model(policy, tokenizer, path: Path, cfg: Config):
    """Write a directory that load_policy reads, with the settings it was made with, whole or not at all: the adapter (for peft), or the
    checkpoint in the layout and precision of its source."""
    weights = None if hasattr(policy.model, "peft_config") else run_folder.whole(policy.model.state_dict())
    if processes()[0]:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")                   # two processes may make the same base
    source = getattr(policy, "source", None)
    save_weights(policy.model, tokenizer, partial, source, getattr(policy, "base", ""), weights)
    if policy.controller:
        save_controller(policy.controller, partial)
    run_folder.write_json(partial / "agrpo.json", dataclasses.asdict(cfg))
    if path.exists():
        path.rename(old := path.with_name(f"{path.name}.{os.getpid()}.old"))
        shutil.rmtree(old)
    partial.rename(path)


# ------------------------------------------------------------------------------------- supervised fine-tuning, the tiny base model
def encode_answers(tokenizer, texts: list[str], C: int, policy) -> Tensor:
    """(n, C): each answer, the end of its turn where there is one, then EOS to the end. Raises BadInput if one is longer."""
    tokens = torch.full((len(texts), C), policy.eos_id)
    for i, text in enumerate(texts):
        answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [policy.turn_id] * (policy.turn_id is not None)
        if len(answer) > C:
            raise BadInput(f"--completion-length {C}: an answer has {len(answer)} tokens, {text[:60]!r}")
        tokens[i, :len(answer)] = torch.tensor(answer)
    return tokens


def noise(tokens: Tensor, block: int, prompt_mask: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eq. 8: t ~ U(0, 1], each completion token masked with probability t -> is_masked, 1 / t, both (N, C). One t a row, stratified over the
    batch; block-causal models: one a block, as each block is denoised by itself."""
    N, C = tokens.shape
    if block:
        of = (torch.arange(C) + prompt_mask.sum(1, keepdim=True).cpu() % block) // block                         # (N, C)
        many = int(of.max()) + 1
        t = (torch.randperm(N * many, generator=g).view(N, many) + torch.rand(N, many, generator=g)) / (N * many)
        t = (1 - t).gather(1, of)
    else:
        t = 1 - (torch.arange(N)[:, None] + torch.rand(N, 1, generator=g)) / N
    return torch.rand(N, C, generator=g) < t, (1 / t).expand(N, C)


def sft_loss(policy, prompt: Tensor, prompt_mask: Tensor, tokens: Tensor, g: torch.Generator) -> Tensor:
    """Eq. 8 with noise drawn from g."""
    return denoising_loss(policy, prompt, prompt_mask, tokens, *(x.to(tokens.device) for x in noise(tokens, policy.block, prompt_mask, g)))


def denoising_loss(policy, prompt: Tensor, prompt_mask: Tensor, tokens: Tensor, is_masked: Tensor, weight: Tensor) -> Tensor:
    """Eq. 8: cross-entropy of the masked tokens / t, mean over all tokens (N, C)."""
    logits = policy.logits(prompt, prompt_mask, tokens.masked_fill(is_masked, policy.mask_id), is_masked, clean=tokens if policy.block else None)
    loss = torch.nn.functional.cross_entropy(logits, tokens[is_masked], reduction="none")
    return (loss * weight[is_masked]).sum() / tokens.numel()


def sft_step(policy, tokenizer, optimizer, examples: list, step: int, cfg: Config) -> dict:
    """One step of supervised fine-tuning (Eq. 8) on rows {"prompt": (message, beginning), "answer": text}, in place of train_step."""
    clock, device, (rank, world) = time.perf_counter(), next(policy.model.parameters()).device, processes()
    batch = batch_of_examples(examples, step, cfg)
    ids, prompt_mask = encode_prompts(tokenizer, [row["prompt"] for row in batch])
    tokens, g = encode_answers(tokenizer, [row["answer"] for row in batch], cfg.completion_length, policy), generator("sft", cfg.seed, step)
    is_masked, weight = noise(tokens, policy.block, prompt_mask, g)
    total = 0.0
    width = ids.shape[1] + cfg.completion_length * (1 + bool(policy.block))
    for part in pieces(torch.tensor_split(torch.arange(len(batch)), world)[rank], max(1, cfg.tokens_per_pass // width)):
        at = (x[part].to(device) for x in (ids, prompt_mask, tokens, is_masked, weight))
        loss = denoising_loss(policy, *at) * len(part) / len(batch)
        loss.backward()
        total += float(loss.detach())
    grad_norm, applied = optimizer_step(policy, optimizer, step, cfg, math.isfinite(total))
    return {"step": step, "loss": sum(everyones([total])), "grad_norm": grad_norm, "skipped": int(not applied), "lr": learning_rate(step, cfg),
            "heldout": "", "peak_memory_mb": run_folder.peak_memory_mb(), "rollout_seconds": 0.0,
            "update_seconds": round(time.perf_counter() - clock, 3)}


def sft_examples(tokenizer, cfg: Config, examples: list, context: int, mask_id: int) -> list:
    """Prompts and answers to fine-tune on: the task's right answers to its examples, in the prompt's format, or the rows of a file. Says
    how many are too long for --completion-length, and leaves them out. Raises BadInput if none is left, or a row cannot be learned."""
    if cfg.sft == "gold":
        rows = [{"prompt": prompt_for(cfg.task, ex, cfg.prompt, cfg.system_prompt), "answer": gold_completion(cfg.task, ex, cfg.prompt)}
                for ex in examples]
    else:
        rows = [{"prompt": (row["prompt"], ""), "answer": row["completion"]} for row in read_pairs(cfg.sft)]
    ended, answers = end_of_turn(tokenizer) is not None, tokenizer([row["answer"] for row in rows], add_special_tokens=False)["input_ids"]
    for number, ids in enumerate(answers, start=1):
        if {mask_id, tokenizer.eos_token_id, tokenizer.unk_token_id} & set(ids):
            raise BadInput(f"--sft {cfg.sft}, answer {number}: it holds the token of MASK or of the end, or what the model has no token for, "
                           f"{rows[number - 1]['answer'][:60]!r}")
    short = [row for row, ids in zip(rows, answers) if len(ids) + ended <= cfg.completion_length]
    if len(short) < len(rows):
        say(f"left out: {len(rows) - len(short)} of {len(rows)} answers, of more than {cfg.completion_length} tokens")
    if not short:
        raise BadInput(f"--completion-length {cfg.completion_length}: all answers of --sft {cfg.sft} are longer, the shortest has "
                       f"{min(map(len, answers)) + ended} tokens")
    longest = encode_prompts(tokenizer, [row["prompt"] for row in short])[0].shape[1]
    if longest + cfg.completion_length > context:
        raise BadInput(f"--sft {cfg.sft}: the longest prompt has {longest} tokens, a completion {cfg.completion_length}; the context is {context}")
    return short


def tiny_block(cfg: Config) -> int:
    """Tokens in a block of the tiny block-causal model; 0 for the one that sees everything."""
    return (cfg.model_block or 4) if cfg.model == "tiny-block" else 0


def train_base(cfg: Config, device: str) -> tuple[Policy, object]:
    """The tiny base model: able, but not inclined. SFT on answers of which a share of base_lazy follow a lazy rule, the others
    are right, so that many samples find a right answer and a single one seldom does."""
    task, tokenizer = TASKS[cfg.task], tiny_tokenizer()
    block = tiny_block(cfg)
    policy = Policy(tiny_model(tokenizer, cfg, block).to(device), tokenizer.mask_token_id, tokenizer.eos_token_id, block=block)
    examples, rng = load_examples(cfg.task, 4 * cfg.train_examples, cfg.seed, "train"), random.Random(cfg.seed)
    ids, prompt_mask = encode_prompts(tokenizer, [prompt_for(cfg.task, ex, "bare") for ex in examples])
    texts = [(task.gold(ex), task.lazy(ex, rng)) for ex in examples]
    answers = torch.stack([encode_answers(tokenizer, kind, cfg.completion_length, policy) for kind in zip(*texts)])  # 0 right, 1 lazy
    g = generator("sft", cfg.seed)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=cfg.base_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(                                    # up for a tenth of the steps, then down to zero
        optimizer, lambda s: min(1.0, 10 * (s + 1) / cfg.base_steps, (1 - s / cfg.base_steps) / 0.9))
    print(f"making the tiny base model: {cfg.base_steps} steps of supervised fine-tuning, once", flush=True)
    progress = tqdm(range(cfg.base_steps), desc="base model", unit="step", mininterval=1, disable=None)
    for step in progress:
        index = torch.randint(len(examples), (cfg.base_batch,), generator=g)
        lazy = (torch.rand(cfg.base_batch, generator=g) < cfg.base_lazy).long()
        loss = sft_loss(policy, *(x.to(device) for x in (ids[index], prompt_mask[index], answers[lazy, index])), g)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return policy, tokenizer


def tiny_base(cfg: Config, device: str, rebuild: bool = False) -> str:
    """Directory of the tiny base model, trained on the first call and cached under $AGRPO_CACHE (~/.cache/agrpo)."""
    knobs = {k: v for k, v in dataclasses.asdict(cfg).items() if k.startswith("base_")
             or k in ("task", "seed", "completion_length", "train_examples")}
    knobs |= {"block": tiny_block(cfg)} if tiny_block(cfg) else {}
    task, some = TASKS[cfg.task], load_examples(cfg.task, 16, cfg.seed, "train")
    knobs["corpus"] = [(prompt_for(cfg.task, ex, "bare"), task.gold(ex), task.lazy(ex, random.Random(0))) for ex in some]      # a task edited is another
    cache = Path(os.environ.get("AGRPO_CACHE", "~/.cache/agrpo")).expanduser()
    path = cache / f"{cfg.model}-{cfg.task}-{hashlib.sha256(json.dumps(knobs).encode()).hexdigest()[:12]}"
    if rebuild or not (path / "config.json").is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot keep the base model in {cache}: {error}") from None
        trained = train_base(cfg, device)
        if rebuild or not path.exists():                                             # another process may have been faster
            save_model(*trained, path, cfg)
    return str(path)


# -------------------------------------------------------------------------------------------- run folder, command line
EVALUATION = {"unmasking": "low_confidence", "position_term": "off", "temperature": 0.0, "top_k": 0, "top_p": 1.0}     # greedy, as the paper's
MAY_CHANGE = ("max_steps", "device", "save_every", "rollout_batch", "tokens_per_pass", "gradient_checkpointing", "compile", "fsdp",
              "report_to")             # on --resume
WITH_CACHE = {"is_cap": 2.0, "timesteps": "independent_gradient", "position_term": "off"}      # --cache prefix or dual; flags win over it
GIVE_UP = 3                            # steps in a row whose loss or gradient is not finite


def find_adapter(model: str) -> Path | None:
    """The directory of the adapter that a local model is, None for a whole checkpoint."""
    folder = run_folder.in_run(Path(model))
    return folder if (folder / "adapter_config.json").is_file() else None


def made_here(model: str) -> str:
    """Which of TINY a model is, or was trained from; "" for others."""
    if model in TINY or not Path(model).is_dir():
        return model if model in TINY else ""
    adapter = find_adapter(model)
    folder = run_folder.in_run(Path(base_of(adapter) if adapter else model))
    known = run_folder.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return ("tiny-block" if known.get("block_size") else "tiny") if known.get("model_type") == "llama" else ""


def config_for(task: str, model: str = "", preset: str = "", method: str = "agrpo", sft: str = "") -> Config:
    """The settings before flags: of the tiny models by task; of every other checkpoint the recipe, and what the GPU's memory allows."""
    model = model or ("tiny" if TASKS[task].speaks_tiny else LLADA)
    if kind := made_here(model):
        shape = {**TASK_SHAPES.get(task, {}), "lora_rank": RECIPE["lora_rank"] * (model not in TINY and find_adapter(model) is not None)}
        sized, small = preset, {"shrink": min(TINY_SHRINK, PUBLISHED.get(method, {}).get("shrink", 1))}
    else:
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 0
        sized, small = preset if preset.endswith("gb") else "24gb" if memory < 60 else "80gb", {}
        shape = {**PRESETS[preset], **RECIPE}
    return Config(**{"task": task, "model": model, "preset": preset, "method": method, **shape, **PUBLISHED.get(method, {}), **small, **PRESETS[sized],
                     **((SFT if kind else SFT_RECIPE) if sft else {})})


def saved_settings(model: str) -> dict:
    """What a model was trained with here; {} if it was not."""
    path = run_folder.in_run(Path(model)) / "agrpo.json"
    return run_folder.read_json(path) if path.is_file() else {}


def with_prompt(cfg: Config) -> Config:
    """The prompt settled: the one given, else the one this checkpoint was trained with here, else the published one."""
    if cfg.prompt:
        return cfg
    known = saved_settings(cfg.model)
    style = known.get("prompt") or ("bare" if known or cfg.model in TINY else "agrpo")
    return dataclasses.replace(cfg, prompt=str(style), system_prompt=cfg.system_prompt or str(known.get("system_prompt", "")))


def with_model(cfg: Config, given: dict) -> Config:
    """What the checkpoint settles: an adapter's rank is its own; a block-causal model is denoised in the blocks of its attention, and where
    nothing else is asked for, one token a step."""
    need_gpu(cfg)
    checkpoint, _, adapter = (None, None, None) if cfg.model in TINY else open_checkpoint(cfg)
    if adapter and cfg.lora_rank:
        own = adapter_shape(adapter)
        if other := [f"--{k.replace('_', '-')} {given[k]}" for k in own if given.get(k, own[k]) != own[k]]:
            raise BadInput(f"{other[0]}: the adapter in {cfg.model} has {', '.join(f'{k} {v}' for k, v in own.items())}; "
                           "--lora-rank 0 trains all weights")
        cfg = dataclasses.replace(cfg, **own)
    if cfg.model == "tiny" and cfg.model_block:
        raise BadInput("--model-block: the model tiny attends in both directions, tiny-block in blocks")
    block = tiny_block(cfg) if cfg.model in TINY else checkpoint.block
    if (kept := given.get("cache", "block" if block else "none")) in (("prefix", "dual") if block else ("block",)):
        raise BadInput(f"--cache {kept}: {cfg.model} attends {'in blocks, its cache is exact (block)' if block else 'in both directions: prefix or dual'}")
    cfg = dataclasses.replace(cfg, cache=kept)
    if approximate(cfg):
        fitting = WITH_CACHE if cfg.method in ("agrpo", "exact") else {"is_cap": WITH_CACHE["is_cap"]}
        cfg = dataclasses.replace(cfg, **{k: v for k, v in fitting.items() if k not in given})
    if not block and (cfg.method == "dipo" or cfg.update_block):
        raise BadInput(f"{'--method dipo' if cfg.method == 'dipo' else '--update-block'} needs a block-causal model (SDAR, --model tiny-block): "
                       f"{cfg.model} attends in both directions")
    if cfg.controller != "off":                                                      # it may take any number of steps
        shape = {"unmasking": (rule := CONTROLLERS[cfg.controller]), "steps": cfg.completion_length, "position_term": "off",
                 "eval_steps": str(cfg.eval_length or cfg.completion_length)}
        if given.get("unmasking", rule) != rule:
            raise BadInput(f"--controller {cfg.controller} goes with --unmasking {rule}")
        if (had := saved_settings(cfg.model).get("controller", "off")) not in ("off", cfg.controller):
            raise BadInput(f"--controller {cfg.controller}: {cfg.model} has a controller of another kind, {had}")
        cfg = dataclasses.replace(cfg, **{k: v for k, v in shape.items() if k not in given})
    if not block:
        return cfg
    if other := {given.get("block_length", block), given.get("eval_block_length", block)} - {block, 0}:
        raise BadInput(f"--block-length {other.pop()}: the attention of {cfg.model} has blocks of {block}; leave it out")
    shape = {"block_length": block, "eval_block_length": block, "shrink": 1, "steps": cfg.completion_length,
             "eval_steps": str(cfg.eval_length or cfg.completion_length)}
    if made_here(cfg.model) and "completion_length" not in given:                    # a block more: the first is what the prompt left of one
        C = (-(-cfg.completion_length // block) + 1) * block
        halves = [C >> k for k in range(3) if block % 2**k == 0]
        shape |= {"completion_length": C, "steps": halves[:2][-1], "eval_steps": ",".join(map(str, halves))}
        if cfg.controller != "off":
            shape |= {"steps": C, "eval_steps": str(C)}
    return dataclasses.replace(cfg, **{k: v for k, v in shape.items() if k not in given})


def evaluation_config(cfg: Config) -> Config:
    """cfg with the sampler of EVALUATION, or the controller's, and the shape to evaluate with."""
    at = dataclasses.replace(cfg, completion_length=cfg.eval_length or cfg.completion_length, block_length=cfg.eval_block_length or cfg.block_length,
                             cache="none" if approximate(cfg) else cfg.cache, **EVALUATION)
    return at if cfg.controller == "off" else dataclasses.replace(at, unmasking=CONTROLLERS[cfg.controller], controller_sigma=1e-9)


def steps_of(cfg: Config) -> list[int]:
    """The numbers of denoising steps to evaluate with; the first is the headline. Raises BadInput."""
    return run_folder.numbers(cfg.eval_steps, "--eval-steps")


CHOICES = {"task": TASKS, "preset": PRESETS, "prompt": ("", "bare", *FORMATS), "device": ("auto", "cpu", "cuda"), "unmasking": UNMASK,
           "position_term": ("on", "off"), "order_score": ORDER_SCORE, "method": VIEWS, "timesteps": TIMESTEPS, "normalizer": NORMALIZERS,
           "advantage": ADVANTAGES, "quantize": ("", "4bit"), **dict.fromkeys(("compile", "fsdp", "value_model"), ("off", "on")),
           "gradient_checkpointing": ("auto", "on", "off"), "cache": ("none", "prefix", "dual", "block"), "is_level": ("completion", "step"),
           "kl_reference": ("base", "old"), "controller": CONTROLLERS, "controller_training": ("joint", "alone"),
           "report_to": ("", "tensorboard", "wandb", "trackio")}
MAY_BE_ZERO = {"seed", "max_steps", "top_k", "entropy_bound", "overlong_penalty", "overlong_from", "warmup", "decay_steps", "weight_decay",
               "eval_every", "base_lazy", "lora_rank", "eval_length", "eval_block_length", "model_block", "dynamic_sampling", "clip_high", "kl",
               "prompt_masking", "is_cap", "update_block", "gamma", "lam", "alpha"}


def validate(cfg: Config, training: bool = True):
    """Raises BadInput with one line for any setting that cannot work. Costs nothing: called before any work."""
    def need(holds, message):
        if not holds:
            raise BadInput(message)

    run_folder.check_settings(cfg, CHOICES, MAY_BE_ZERO if training else {*MAY_BE_ZERO, "temperature"})
    need(cfg.model not in TINY or TASKS[cfg.task].speaks_tiny,
         f"--model {cfg.model} speaks {' and '.join(name for name, task in TASKS.items() if task.speaks_tiny)} only (tasks with generate "
         f"and lazy): --task {cfg.task} needs --model DIR")
    at = evaluation_config(cfg)
    for C, L, all_steps in ((cfg.completion_length, cfg.block_length, [cfg.steps] if training else []),
                            (at.completion_length, at.block_length, steps_of(cfg))):
        need(C % L == 0, f"completion length {C} is not a multiple of --block-length {L}")
        for steps in all_steps:
            possible = [n for n in range(C, 0, -1) if C % n == 0 and n * L % C == 0]
            need(steps in possible, f"{steps} steps do not reveal equal parts of the {C} tokens, and of each block of {L}; these do: "
                 + ", ".join(map(str, possible)))
    need(cfg.top_p <= 1 and (cfg.top_p == 1 or cfg.top_k), "--top-p is at most 1, and needs --top-k: the support is stored as ids")
    need(cfg.completions > 1, "--completions must be at least 2: an advantage compares the completions of a prompt")
    need(max(cfg.threshold, cfg.base_lazy) <= 1, "--threshold and --base-lazy must be at most 1")
    need(cfg.overlong_from < 1, "--overlong-from is a share of the length, below 1")
    need(not cfg.test_data or cfg.data or TASKS[cfg.task].hub, "--test-data goes with --data")
    read_weights(cfg.task, cfg.reward_weights)
    need(cfg.model not in TINY or max(cfg.completion_length, cfg.eval_length) <= 200,
         f"--completion-length {cfg.completion_length}: the tiny model's context is 256")
    need(max(cfg.train_examples, cfg.eval_examples) <= 100_000, "--train-examples and --eval-examples must be at most 100000")
    need(cfg.base_hidden % 16 == 0, f"--base-hidden {cfg.base_hidden} must be a multiple of 16")
    need(re.fullmatch(r"\w[\w.-]{0,100}", cfg.name or "x"), f"--name {cfg.name!r} must be a plain name: the folder is runs/NAME")
    need(cfg.temperature == 0 or 1e-3 <= cfg.temperature <= 1e3, f"--temperature {cfg.temperature} must be between 0.001 and 1000")
    need(1e-3 <= cfg.tau_pos <= 1e3, f"--tau-pos {cfg.tau_pos} must be between 0.001 and 1000")
    need(cfg.device != "cuda" or torch.cuda.is_available(), "--device cuda: there is none here")
    need(not cfg.quantize or device_for(cfg) != "cpu" and find_spec("bitsandbytes") and (cfg.lora_rank or not training),
         f"--quantize {cfg.quantize} needs a GPU, the package bitsandbytes and adapters (--lora-rank 64)")
    need(not cfg.update_block or cfg.update_block % cfg.block_length == 0,
         f"--update-block {cfg.update_block} is not a multiple of the rollout's blocks of {cfg.block_length}")
    if training and cfg.position_term == "on" and UNMASK[cfg.unmasking].order_logp:
        need(PUBLISHED.get(cfg.method, {}).get("position_term") != "off",
             f"--position-term on goes with states as the sampler saw them (agrpo, exact), --method {cfg.method} scores tokens only")
        need(not cfg.update_block, "--update-block needs --position-term off: the states are not as the sampler saw them")
    need(cfg.value_model == "off" or cfg.method in ("exact", "tracerl", "dipo"),
         f"--value-model on needs a method that scores every step (exact, tracerl, dipo), not {cfg.method}")
    need(cfg.value_model == "off" or cfg.controller == "off" or cfg.controller_training == "joint", "--controller-training alone trains no value model")
    need(cfg.shrink == 1 or cfg.method == "tracerl", f"--shrink {cfg.shrink} goes with --method tracerl")
    need(cfg.prompt_masking == 0 or cfg.method == "diffu-grpo", "--prompt-masking goes with --method diffu-grpo")
    need(cfg.prompt_masking < 1 and max(cfg.gamma, cfg.lam) <= 1, "--prompt-masking must be below 1, --gamma and --lam at most 1")
    need(not cfg.sft or cfg.sft == "gold" or Path(cfg.sft).is_file(), f"--sft {cfg.sft}: gold, or a file of prompts and completions")
    need(not cfg.sft or cfg.controller == cfg.value_model == "off", "--sft trains no controller and no value model")
    need(cfg.controller == "off" or not cfg.update_block, "--controller goes without --update-block: its thresholds are those of the rollout")
    need(cfg.fsdp == "off" or cfg.controller == cfg.value_model == "off" and not cfg.sft and not (cfg.kl and cfg.kl_reference == "base"),
         "--fsdp on goes without --sft, --controller, --value-model and --kl to the base model")
    if training and approximate(cfg):
        need(cfg.controller == cfg.value_model == cfg.fsdp == "off" and not cfg.sft,
             f"--cache {cfg.cache} goes without --controller, --value-model, --fsdp and --sft")
        need(cfg.normalizer != "last_step" or not cfg.is_cap or cfg.is_level == "step",
             "--normalizer last_step counts only a part of the steps, whole completions are weighted by all: --normalizer steps, or --is-level step")
        need(cfg.method != "agrpo" or not cfg.is_cap or cfg.is_level == "step" or cfg.timesteps == "independent_gradient",
             f"--timesteps {cfg.timesteps} with --cache {cfg.cache}: --timesteps independent_gradient, as whole completions are weighted by steps drawn "
             "independently, or --is-level step")
        need(cfg.position_term == "off" or not UNMASK[cfg.unmasking].order_logp or cfg.is_cap and cfg.is_level == "completion",
             f"--position-term on with --cache {cfg.cache} needs weights of whole completions: --is-level completion and --is-cap above 0, or "
             "--position-term off")
    need(cfg.fsdp == "off" or not cfg.lora_rank, "--fsdp on shares the weights of full fine-tuning: --lora-rank 0")
    need(cfg.fsdp == "off" or int(os.environ.get("WORLD_SIZE", 1)) > 1,
         "--fsdp on needs several processes (accelerate launch or torchrun); here: --fsdp off")
    need(not cfg.report_to or find_spec(cfg.report_to), f"--report-to {cfg.report_to}: the package {cfg.report_to} is not installed")


def need_gpu(cfg: Config):
    """Raises BadInput, one line that says what would run here, if the model is too large for a machine without a GPU."""
    local = cfg.model in TINY or Path(cfg.model).is_dir()
    if not local and len(Path(cfg.model).parts) > 1 and Path(cfg.model).parent.is_dir():
        raise BadInput(f"--model {cfg.model}: there is no such folder")
    if not local and "/" not in cfg.model:
        raise BadInput(f"--model {cfg.model}: no such directory, and names on the hub are owner/name")
    if device_for(cfg) != "cpu" or local and (cfg.model in TINY or parameter_count(open_checkpoint(cfg)[0].config) < SMALL) or (
            not local and cfg.device == "cpu" and cfg.model != LLADA):
        return
    raise BadInput(f"--task {cfg.task} on {cfg.model} needs a CUDA GPU (24 GB for 8 billion parameters with adapters), and there is none "
                   "here. Here runs: python agrpo.py --task sudoku (a tiny model, minutes; of your own tasks, those with generate and lazy), or "
                   "--model DIR --device cpu with a checkpoint below 1 billion parameters (the README shows how to make one)")


def device_for(cfg: Config) -> str:
    """"cpu", or this process's "cuda:i"."""
    local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"                                # several processes: one GPU each
    return local if cfg.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu"


def open_model(cfg: Config, rebuild: bool = False, train: bool = False):
    """cfg.model -> policy, tokenizer on the device."""
    model = once(tiny_base, cfg, device_for(cfg), rebuild) if cfg.model in TINY else cfg.model
    return load_policy(model, device_for(cfg), cfg, train)


def check_context(config, tokenizer, cfg: Config, examples: list) -> int:
    """Tokens of the longest prompt. Raises BadInput if it and its completion do not fit the model's context."""
    length = encode_prompts(tokenizer, [prompt_for(cfg.task, ex, cfg.prompt, cfg.system_prompt) for ex in examples])[0].shape[1]
    longest = max(cfg.completion_length, cfg.eval_length)
    if length + longest > (room := config.max_position_embeddings):
        raise BadInput(f"the longest prompt has {length} tokens, a completion {longest}; the context is {room}")
    return length


def evaluate(policy, tokenizer, cfg: Config, examples: list, steps: int) -> dict:
    """eval.evaluate with the sampler of EVALUATION at so many denoising steps."""
    at = dataclasses.replace(evaluation_config(cfg), steps=steps)
    return {"steps": steps, **run_folder.evaluate(lambda exs, keys: generate(policy, tokenizer, at, exs, keys), cfg.task, examples,
                                                  cfg.rollout_batch * processes()[1])}


def train(policy, tokenizer, cfg: Config, folder: Path, examples: list, heldout: list, seconds: dict) -> bool:
    """The loop, from the folder's checkpoint to max_steps. False if a stop was asked for before that."""
    if cfg.kl and cfg.kl_reference == "base" and not cfg.sft:
        keep_reference(policy)
    policy.value = ValueModel(policy, cfg) if cfg.value_model == "on" else None
    optimizer, start, log, checkpoint = make_optimizer(policy, cfg), 0, folder / "log.csv", folder / "checkpoint.pt"
    one_step = sft_step if cfg.sft else train_step
    first, in_a_row = processes()[0] == 0, 0
    if checkpoint.is_file():
        saved = run_folder.load_checkpoint(checkpoint, policy, optimizer)
        start = saved["step"]
        seconds.update(saved["seconds"])
    once(lambda: run_folder.write_log(log, run_folder.read_log(log, before_step=start)))
    with (run_folder.tracker(cfg, folder) as track, run_folder.StopRequest() as stop, run_folder.Writer() as writer,
          tqdm(desc="agrpo", unit="step", initial=start, total=max(start, cfg.max_steps), disable=None if first else True) as progress):
        for step in range(start, cfg.max_steps):
            row = one_step(policy, tokenizer, optimizer, examples, step, cfg)
            for part in ("rollout", "update"):
                seconds[part] += row[f"{part}_seconds"]
            if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
                result = evaluate(policy, tokenizer, cfg, heldout, steps_of(cfg)[0])
                row["heldout"], seconds["eval"] = result["solved"], seconds["eval"] + result["seconds"]
            stopped, in_a_row = anyone(stop.wanted), in_a_row + 1 if row["skipped"] else 0
            if first:
                run_folder.append_log(log, row)                  # the row first, then the checkpoint: a run killed in
            if (step + 1) % cfg.save_every == 0 or stopped or step + 1 == cfg.max_steps:       # between repeats a step
                run_folder.save_checkpoint(checkpoint, policy, optimizer, writer, first, step=step + 1, seconds=seconds)
            track(row)
            if in_a_row == GIVE_UP:
                raise FloatingPointError(f"step {step}: loss or gradient was not finite {GIVE_UP} times in a row; no such step changed the weights, "
                                         "the last checkpoint is intact (try a lower --lr)")
            progress.update()
            progress.set_postfix({k: f"{row[k]:.3g}" for k in ("loss", "reward", "solved", "ratio", "grad_norm", "entropy", "nfe") if k in row})
            if stopped:
                return step + 1 == cfg.max_steps
    return True


def forecast(cfg: Config, folder: Path, examples: list, heldout: list, overwrite: bool) -> tuple[list, Config]:
    """The checks that need the checkpoint's small files; then what the run will cost, printed. Returns the rows to train on, and the
    settings with gradient_checkpointing decided."""
    tokenizer = tiny_tokenizer()
    context, mask_id = 256, tokenizer.mask_token_id
    if cfg.model not in TINY:
        checkpoint, tokenizer, adapter = open_checkpoint(cfg)
        if overwrite and any(folder.resolve() in place.resolve().parents for place in (checkpoint.folder, adapter or checkpoint.folder)):
            raise BadInput(f"--overwrite would delete {cfg.model}, the model to begin with: --name NAME starts another run")
        context, mask_id = checkpoint.config.max_position_embeddings, checkpoint.mask_id
        length = check_context(checkpoint.config, tokenizer, cfg, examples + heldout)
        cfg = run_folder.with_checkpointing(checkpoint.config, cfg, length, device_for(cfg), processes()[1])
        print(run_folder.announce(checkpoint.config, cfg, length, device_for(cfg), processes()[1]), flush=True)
    return sft_examples(tokenizer, cfg, examples, context, mask_id) if cfg.sft else examples, cfg


def run(cfg: Config, resume: bool = False, overwrite: bool = False, rebuild_base: bool = False) -> int:
    """Everything that `python agrpo.py` does: base, evaluation, training, evaluation, table. Returns the exit code."""
    folder = Path("runs") / cfg.name
    once(run_folder.check, folder, dataclasses.asdict(cfg), MAY_CHANGE, resume, overwrite)
    examples, heldout = load_split(cfg.task, cfg.train_examples, cfg.eval_examples, cfg.seed, cfg.data, cfg.test_data)
    begin = time.perf_counter()
    rows, cfg = once(forecast, cfg, folder, examples, heldout, overwrite)
    policy, tokenizer = open_model(cfg, rebuild_base, train=True)
    once(run_folder.begin, folder, dataclasses.asdict(cfg), overwrite)               # nothing is replaced before the model is there
    size = [sum(p.numel() for p in policy.parameters() if p.requires_grad or not only) / 1e6 for only in (False, True)]
    if cfg.fsdp == "on":
        shard(policy, device_for(cfg))
    seconds = {"base_model": time.perf_counter() - begin, "rollout": 0.0, "update": 0.0, "eval": 0.0}
    say(f"{cfg.model} model of {size[0]:.2f} M parameters{f', {size[1]:.2f} M of them trained' if size[1] < size[0] else ''}; {cfg.task}: "
        f"{len(rows)} {'answers to learn' if cfg.sft else 'examples'}, {len(heldout)} held out; {folder} (log.csv: a row a step)")

    if not once((folder / "eval_base.json").is_file):                                # a resumed run has it
        results = [evaluate(policy, tokenizer, cfg, heldout, n) for n in steps_of(cfg)]
        once(run_folder.write_json, folder / "eval_base.json", results)
    base = run_folder.read_json(folder / "eval_base.json", list)
    say(f"base: {run_folder.percent(base[0])} of {base[0]['n']} held-out solved, greedy, {base[0]['steps']} steps, {base[0]['nfe']:.1f} denoiser calls")
    if not train(policy, tokenizer, cfg, folder, rows, heldout[:(len(heldout) + 1) // 2], seconds):
        say("stopped; the same command with --resume continues")
        return 130
    trained = [evaluate(policy, tokenizer, cfg, heldout, n) for n in steps_of(cfg)]
    seconds["eval"] += sum(r["seconds"] for r in base + trained)
    save_model(policy, tokenizer, folder / "model", cfg)
    once(run_folder.report, folder, cfg, heldout, base, trained, seconds)
    return 0


def default_name(cfg: Config) -> str:
    """TASK-WHAT-seedSEED, where WHAT is the method, or the preset of agrpo, and all that sets the run apart from the plain one."""
    begun = [cfg.model] if cfg.model == "tiny-block" else [f"on-{Path(cfg.model).name}"] if made_here(cfg.model) and cfg.model != "tiny" else []
    what = ["sft"] if cfg.sft else [cfg.preset or cfg.method] if cfg.method == "agrpo" else [cfg.method, *filter(None, [cfg.preset])]
    more = ["value"] * (cfg.value_model == "on") + [f"{cfg.controller}-{cfg.controller_training}"] * (cfg.controller != "off")
    return "-".join([cfg.task, *begun, *what, *more, f"seed{cfg.seed}"])[:100]


def as_visited(cfg: Config) -> bool:
    """Whether the method scores states as the sampler saw them."""
    return cfg.method in ("agrpo", "exact", "dipo") or cfg.method == "tracerl" and cfg.shrink == 1 and not cfg.update_block


USED_WITH = {                          # flags that would be ignored without another one
    "value_model": ("--value-model on", ("gamma", "lam", "value_lr"), lambda cfg: cfg.value_model == "on"),
    "controller": ("--controller", ("alpha", "controller_training", "controller_sigma", "controller_lr"), lambda cfg: cfg.controller != "off"),
    "agrpo": ("--method agrpo", ("mc_steps", "timesteps"), lambda cfg: cfg.method == "agrpo"),
    "scored": ("states that the sampler did not see (diffu-grpo, diffpo, merged tracerl), or --cache prefix or dual", ("is_cap",),
               lambda cfg: not as_visited(cfg) or approximate(cfg)),
    "cache": ("--cache prefix or dual, weights (--is-cap) and states as the sampler saw them (agrpo, exact, tracerl --shrink 1)", ("is_level",),
              lambda cfg: approximate(cfg) and as_visited(cfg) and cfg.is_cap > 0),
    "official": ("--method agrpo", ("preset",), lambda cfg: cfg.preset != "official" or cfg.method == "agrpo"),
}


def parse(argv) -> tuple[Config, dict]:
    """The command line: every field of Config is a flag; what is not given comes from the preset, the recipe or the task's shape."""
    words = lambda settings: ", ".join(f"{k} {v}" for k, v in settings.items())      # noqa: E731
    sets = {**{f"--method {method}": settings for method, settings in PUBLISHED.items() if settings}, "--sft": SFT, "--cache dual": WITH_CACHE}
    parser = run_folder.Parser(prog="agrpo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                               epilog="set by the method, where no flag does:\n" + "\n".join(f"    {k:<20} {words(v)}" for k, v in sets.items()))
    run_folder.add_flags(parser, Config(), CHOICES, recipe=RECIPE)
    for flag, text in (("--resume", "continue runs/NAME"), ("--overwrite", "replace runs/NAME"),
                       ("--rebuild-base", "train the tiny base model again")):
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--merge", metavar="DIR", default=None, help="write the adapter of --model and its base to DIR as one checkpoint, and stop")
    given = vars(parser.parse_args(argv))
    flags = {k: given.pop(k) for k in ("resume", "overwrite", "rebuild_base", "merge")}
    run_folder.check_settings(dataclasses.replace(Config(), **given), CHOICES, set(MAY_BE_ZERO))
    if len(given.get("model", "")) > 1000 or "\0" in given.get("model", ""):
        raise BadInput("--model is no name of a directory")
    cfg = config_for(*(given.get(k, getattr(Config, k) if k == "task" else "") for k in ("task", "model", "preset")), given.get("method", "agrpo"),
                     given.get("sft", ""))
    if "completion_length" in given:                                                 # a shape of one's own is also evaluated
        cfg = dataclasses.replace(cfg, eval_length=0, eval_block_length=0)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        cfg = dataclasses.replace(cfg, fsdp="on")
    cfg = dataclasses.replace(cfg, **given)
    cfg = dataclasses.replace(with_prompt(cfg), name=cfg.name or default_name(cfg))
    saved = Path("runs") / cfg.name / "config.json"
    if flags["resume"] and saved.is_file():                                          # the folder's settings, then the flags given
        cfg = dataclasses.replace(run_folder.read_settings(saved, Config), **{**given, "name": cfg.name})
        need_gpu(cfg)
    elif flags["merge"] is None:
        cfg = with_model(cfg, given)
    validate(cfg)
    for goes_with, names, used in USED_WITH.values():
        if idle := [name for name in names if name in given and not used(cfg)]:
            raise BadInput(f"--{idle[0].replace('_', '-')} {given[idle[0]]} goes with {goes_with}")
    return cfg, flags


def main(argv=None) -> int:
    """The command line; returns the exit code: 0 done, 1 the run failed, 2 a mistake of the caller, 130 stopped."""
    cfg = None
    try:
        cfg, flags = parse(argv)
        if (path := flags.pop("merge")) is not None:
            merge(cfg, path)
            print(f"merged: {path}")
            return 0
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            import accelerate
            accelerate.PartialState(cpu=device_for(cfg) == "cpu")                    # joins the processes
        code = run(cfg, **flags)
        if processes()[1] > 1:                                                       # not after an error: others may wait for this one
            gc.collect()                                                             # what holds on to the group goes first, on all
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        return code
    except (BadInput, FloatingPointError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"agrpo: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except torch.OutOfMemoryError as error:
        print(f"agrpo: {run_folder.out_of_memory(error, cfg)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        begun = cfg and (Path("runs") / cfg.name / "config.json").is_file()
        print("interrupted; " + ("what was saved is intact: --resume continues" if begun else "nothing was begun: the same command starts again"), file=sys.stderr)
        return 130


# what `python -m pydoc agrpo` shows: all that is defined here but torch's own kinds of class, whose pages (agrpo.Policy,
# agrpo.ValueModel) are mostly torch's
__all__ = [name for name, thing in list(globals().items()) if getattr(thing, "__module__", "") == __name__
           and not (isinstance(thing, type) and issubclass(thing, (torch.nn.Module, torch.autograd.Function)))]

if __name__ == "__main__":
    sys.exit(main())
