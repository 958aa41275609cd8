"""diffu-GRPO (d1, arXiv 2504.12216): the likelihood of a completion in one step.

All tokens are scored at once on a completion that is all MASK. The prompt's tokens are masked at
random, anew for every update: noise against overfitting where one rollout serves many of them.

As published: one-step likelihood, prompt masking, advantage, clip 0.5, KL 0.04; with flags, d1's
prompts (--prompt d1) and fine-tuning first (--sft). Different: one update a rollout where theirs
makes 12 (--inner-epochs); log-probs under the sampler's temperature and support; KL of whole laws,
not k3; no moving reference. Not here: its s1k data.
"""
import dataclasses

import torch
from torch import Tensor

import agrpo

@dataclasses.dataclass(frozen=True)
class Settings:
    """With --method diffu-grpo."""
    prompt_masking: float = 0.15       # share of the prompt's tokens masked

def counted(traj) -> Tensor:
    """(N, C) bool: tokens up to and with the first EOS, of those that a step revealed."""
    ended = (traj.tokens == traj.eos_id).int()
    return (ended.cumsum(1) - ended == 0) & (traj.reveal_step < traj.entropy.shape[1])

def diffu_grpo_views(traj, adv, cfg, mask_id: int, g) -> agrpo.Views:
    """One view a completion."""
    row = torch.arange(len(traj.tokens), device=traj.tokens.device)
    hide = torch.rand(traj.prompt.shape, generator=g) < cfg.prompt_masking
    hide = hide.to(row.device) & traj.prompt_mask.bool()
    blank = torch.full_like(traj.tokens, mask_id)
    return agrpo.make_views(traj, row, torch.zeros_like(row), blank, counted(traj), cfg, "scored",
                            prompt=traj.prompt.masked_fill(hide, mask_id))

agrpo.NORMALIZERS.setdefault("length", (           # a mean over the completion's tokens
    lambda traj, cfg, row, target: counted(traj).sum(1).clamp(min=1)[row]))
agrpo.METHODS.setdefault("diffu-grpo", agrpo.Method(diffu_grpo_views, {
    "position_term": "off", "advantage": "mean", "normalizer": "length", "clip": 0.5, "kl": 0.04}))
