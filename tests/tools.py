"""Shortcuts of the tests: a policy from a directory, a step with the real sampler, a loss."""
import dataclasses
from pathlib import Path

import agrpo
from methods import models
from support import saving

Settings = models.Settings


def load(model, cfg=None, train=False):
    """Directory -> policy, tokenizer, on the CPU."""
    cfg = cfg or Settings(task="gsm8k")
    return models.open_policy(dataclasses.replace(cfg, model=str(model), device="cpu"), train)


def save(policy, tokenizer, path, cfg):
    """Policy -> directory."""
    base = getattr(policy, "base", "")
    saving.save_model(Path(path), policy.model, tokenizer, dataclasses.asdict(cfg),
                      getattr(policy, "source", None), base)


def train_step(policy, tokenizer, optimizer, examples, step, cfg):
    """agrpo.train_step with the sampler and rewards of cfg.task."""
    for group in optimizer.param_groups:
        group.setdefault("scale", 1.0)
    return agrpo.train_step(policy, optimizer, examples, step, cfg, models.sampler(tokenizer, cfg))


def exact_loss(policy, traj, adv, cfg):
    """The loss of every state of every completion, and its ratios; adv (N,)."""
    views = agrpo.exact_views(traj, adv, cfg, policy.mask_id, None)
    views = agrpo.prepare(policy, traj, views, adv[:, None], cfg)
    return agrpo.policy_loss(policy, traj, views, cfg)
