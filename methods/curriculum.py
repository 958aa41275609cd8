"""Curricula: what is learned first. Off by default; both change what is maximised.

solve_rate: a prompt that is always or never solved teaches nothing, so prompts are drawn in
proportion to p (1 - p) (after arXiv 2502.12272), p the share of their own past completions that was
right. It needs prompts that come back: fewer examples than steps x prompts.
Lengths such as 128,256,384: completions begin short and grow up to the last, which is
--completion-length (TraceRL, arXiv 2509.06949, trains long reasoning in stages). Steps grow with
them: as many tokens a step at all lengths. A completion without an end holds neither EOS nor an end
of turn.
The logged reward and solved share are those of the prompts drawn, at the length of the moment:
across steps only `heldout` compares.
"""
import dataclasses
import re
from collections.abc import Callable

import torch

import agrpo
from methods import unfinished
from support.files import need
from support.processes import say
from support.rules import stages

@dataclasses.dataclass(frozen=True)
class Settings:
    """What is learned first."""
    curriculum: str = ""               # solve_rate: prompts by their record; 128,256,384: lengths
    solve_rate_floor: float = 0.1      # share of prompts that are drawn whatever their record
    grow_at: float = 0.25              # longer when more than this share of completions has no end
    grow_after: int = 0                # longer after so many steps at a length; 0: no such limit

def with_length(given: dict) -> dict:
    """The flags given; the last of a curriculum's lengths is also the completion's."""
    if "curriculum" not in given:
        return given
    given = {**given, "curriculum": given["curriculum"].replace(" ", "")}
    last = given["curriculum"].rpartition(",")[2]
    return {"completion_length": int(last), **given} if re.fullmatch("[0-9]{1,6}", last) else given

LOST = "the checkpoint has no record of --curriculum, or another one: --name NAME starts anew"
MEMORY = 0.5                           # weight of a prompt's earlier completions in its record
PRIOR = 1.0                            # completions that a record begins with, at the mean of all

def chances(state: dict, floor: float) -> torch.Tensor:
    """(n,) of each prompt, in proportion to p (1 - p), with a floor. What was not drawn yet has the
    mean p of the prompts that were, at first 1/2."""
    solved, seen = state["solved"], state["seen"]
    drawn = seen > 0
    mean = (solved[drawn] / seen[drawn]).mean() if drawn.any() else 0.5
    p = (solved + PRIOR * mean) / (seen + PRIOR)
    return agrpo.proposal((p * (1 - p))[None], torch.ones(1, len(p)), floor)[0]

def record(state: dict, index: list, solved: list):
    """Adds a rollout: G completions for each prompt of index (B,), solved (B G,)."""
    right = torch.as_tensor(solved, dtype=torch.float64).view(len(index), -1)      # (B, G)
    for i, new in zip(index, right):
        state["solved"][i] = MEMORY * state["solved"][i] + new.sum()
        state["seen"][i] = MEMORY * state["seen"][i] + len(new)

def by_solve_rate(one_step: Callable, state: dict) -> Callable:
    """one_step on prompts drawn by their record, none twice in a step if there are enough. state:
    what is kept from step to step, changed in place."""
    def step_of(policy, optimizer, examples, step: int, cfg, sample) -> dict:
        """As agrpo.train_step."""
        n, B, g = len(examples), cfg.prompts, agrpo.generator("curriculum", cfg.seed, step)
        need(step == 0 or all(isinstance(x := state.get(name), torch.Tensor) and x.shape == (n,)
             and bool((x >= 0).all()) for name in ("solved", "seen")), LOST)
        if step == 0:
            state.update(solved=torch.zeros(n).double(), seen=torch.zeros(n).double())
            if cfg.max_steps * B < 2 * n:
                say(f"--curriculum solve_rate: {cfg.max_steps * B} draws from {n} examples, few "
                    "come back, so that their record hardly matters")
        p = chances(state, cfg.solve_rate_floor)
        drawn = p.multinomial(B, replacement=B > n, generator=g).tolist()
        index = agrpo.batch_of_examples(drawn, step, cfg)      # the order that sample_step takes
        known = float((state["seen"][drawn] > 0).double().mean())

        def recorded(policy, batch, keys, cfg):
            traj, parts, solved = sample(policy, batch, keys, cfg)
            record(state, index, solved)
            return traj, parts, solved
        row = one_step(policy, optimizer, [examples[i] for i in drawn], step, cfg, recorded)
        return {**row, "drawn_before": known}
    return step_of

def by_length(one_step: Callable, state: dict) -> Callable:
    """one_step at the length of the moment; state as above."""
    def step_of(policy, optimizer, examples, step: int, cfg, sample) -> dict:
        """As agrpo.train_step."""
        at_length, done = stages(cfg), state.setdefault("steps", [0])      # at each length so far
        need(type(done) is list and 0 < len(done) <= len(at_length) and sum(done) == step, LOST)
        now, cut = at_length[len(done) - 1], []

        def watched(policy, batch, keys, cfg):
            traj, *rest = sample(policy, batch, keys, cfg)
            cut.append(unfinished(traj, policy, cfg).double())
            return traj, *rest
        row = one_step(policy, optimizer, examples, step, now, watched)
        done[-1] += 1
        share = float(torch.cat(cut).mean())
        if len(done) < len(at_length) and (share > cfg.grow_at or done[-1] == cfg.grow_after):
            say(f"from step {step + 1} on completions have {at_length[len(done)].completion_length}"
                f" tokens: of those of {now.completion_length} {100 * share:.0f} % had no end")
            done.append(0)
        return {**row, "completion_length": now.completion_length}
    return step_of
