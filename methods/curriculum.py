"""Curricula: what is learned first. Off by default; both change what is maximised.

solve_rate: a prompt that is always or never solved teaches nothing, so prompts are drawn in
proportion to p (1 - p) (arXiv 2502.12272), p the share of their own past completions that was
right. It needs prompts that come back: fewer examples than steps x prompts.
Lengths such as 128,256,384: completions begin short and grow (TraceRL, arXiv 2509.06949, trains
long reasoning in stages). Steps grow with them: as many tokens a step as at the last length.
"""
import dataclasses
from collections.abc import Callable

import torch

import agrpo
from support.processes import say
from support.rules import stages

@dataclasses.dataclass(frozen=True)
class Settings:
    """What is learned first."""
    curriculum: str = ""               # solve_rate: prompts by their record; 128,256,384: lengths
    solve_rate_floor: float = 0.1      # share of draws that are even
    grow_at: float = 0.25              # longer when more than this share of completions has no end
    grow_after: int = 0                # longer after so many steps at a length; 0: never for that

def with_length(given: dict) -> dict:
    """The flags given; the last of a curriculum's lengths is also the completion's."""
    last = given.get("curriculum", "").split(",")[-1].strip()
    return {"completion_length": int(last), **given} if last.isdecimal() else given

MEMORY, PRIOR = 0.5, 1.0               # what a past rollout still counts; completions as expected

def chances(state: dict, floor: float) -> torch.Tensor:
    """(n,) of each prompt, in proportion to p (1 - p), with a floor. What was never drawn has the
    p of all completions of the step before."""
    p = (state["solved"] + PRIOR * state["mean"]) / (state["seen"] + PRIOR)
    return agrpo.proposal((p * (1 - p))[None], torch.ones(1, len(p)), floor)[0]

def record(state: dict, index: list, solved: list):
    """Adds a rollout: G completions for each prompt of index (B,), solved (B G,)."""
    right = torch.as_tensor(solved, dtype=torch.float64).view(len(index), -1)      # (B, G)
    for name, new in (("solved", right.sum(1)), ("seen", right.shape[1])):
        state[name][index] = MEMORY * state[name][index] + new
    state["mean"] = float(right.mean())

def by_solve_rate(one_step: Callable, state: dict) -> Callable:
    """one_step on prompts drawn by their record, none twice in a step. state: what is kept from
    step to step, changed in place."""
    def step_of(policy, optimizer, examples, step: int, cfg, sample) -> dict:
        n, B, g = len(examples), cfg.prompts, agrpo.generator("curriculum", cfg.seed, step)
        for name in ("solved", "seen"):
            state.setdefault(name, torch.zeros(n, dtype=torch.float64))
        state.setdefault("mean", 0.5)
        p = chances(state, cfg.solve_rate_floor)
        drawn = p.multinomial(B, replacement=B > n, generator=g).tolist()
        index = agrpo.batch_of_examples(drawn, step, cfg)      # the order that sample_step takes

        def recorded(policy, batch, keys, cfg):
            traj, parts, solved = sample(policy, batch, keys, cfg)
            record(state, index, solved)
            return traj, parts, solved
        return one_step(policy, optimizer, [examples[i] for i in drawn], step, cfg, recorded)
    return step_of

def by_length(one_step: Callable, state: dict, unfinished: list) -> Callable:
    """one_step at the length of the moment. unfinished: of each rollout the share without an end,
    by the sampler; state as above."""
    def step_of(policy, optimizer, examples, step: int, cfg, sample) -> dict:
        at, last = stages(cfg), state.setdefault("steps", [0])     # steps at each length so far
        now = at[len(last) - 1]
        row = one_step(policy, optimizer, examples, step, now, sample)
        last[-1] += 1
        if len(last) < len(at) and (unfinished[-1] > cfg.grow_at or last[-1] == cfg.grow_after):
            last.append(0)
            say(f"after step {step}: completions of {at[len(last) - 1].completion_length} tokens, "
                f"{100 * unfinished[-1]:.0f} % of those of {now.completion_length} had no end")
        return {**row, "completion_length": now.completion_length}
    return step_of
