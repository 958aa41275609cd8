"""Protects the curricula: prompts drawn by their own record, completions that grow, the state that
both keep. Resuming with them: test_train.py. Run: pytest tests/test_curriculum.py"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import agrpo
from methods import curriculum, dipo, models, room, unfinished
from rewards import TASKS, BadInput

CFG = models.Settings(prompts=3, completions=4, curriculum="solve_rate", solve_rate_floor=0.2)


def state_of(solved, seen):
    return {"solved": torch.tensor(solved).double(), "seen": torch.tensor(seen).double()}


def test_chances_are_p_times_one_minus_p_with_a_floor():
    state = state_of([0, 7, 3.5, 0], [7, 7, 7, 0])             # never, always, at times, not drawn
    p = torch.tensor([0.5 / 8, 7.5 / 8, 4 / 8, 0.5]).double()
    want = 0.8 * p * (1 - p) / (p * (1 - p)).sum() + 0.2 / 4
    assert torch.allclose(curriculum.chances(state, 0.2), want, rtol=1e-7)
    state = state_of([7, 7, 3.5, 0], [7, 7, 7, 0])             # most of the others are easy
    assert curriculum.chances(state, 0.2).argsort(descending=True).tolist()[:2] == [2, 3]
    assert torch.equal(curriculum.chances(state, 1.0), torch.full((4,), 0.25).double())
    assert torch.equal(curriculum.chances(state_of([0, 0], [0, 0]), 0.2), torch.tensor([.5, .5]))


def test_a_record_forgets_by_halves():
    state = state_of([4, 0, 1], [4, 4, 1])
    curriculum.record(state, [0, 2, 0], [1.0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1])
    assert state["solved"].tolist() == [5.5, 0, 3.5] and state["seen"].tolist() == [7, 4, 4.5]


def rollout(policy, examples, keys, cfg):
    """A sampler: example i is right in i % 5 of its 4 completions."""
    solved = [float(n % 4 < ex % 5) for n, ex in enumerate(examples)]
    traj = SimpleNamespace(nfe=torch.ones(1), entropy=torch.ones(1), tokens=torch.ones(1, 1))
    return traj, {"correct": solved}, solved


def one_step(policy, optimizer, examples, step, cfg, sample):
    return agrpo.sample_step(policy, examples, step, cfg, sample)[2]


@pytest.mark.parametrize("n", [20, 2])
def test_each_prompt_has_its_own_record_and_those_at_times_solved_come_most(n):
    state, seen = {}, []

    def sample(policy, examples, keys, cfg):
        seen.append(examples[::4])
        return rollout(policy, examples, keys, cfg)
    step_of = curriculum.by_solve_rate(one_step, state)
    for step in range(200):
        row = step_of(None, None, list(range(n)), step, CFG, sample)
        assert row["drawn_before"] == sum(ex in sum(seen[:-1], []) for ex in seen[-1]) / 3
        assert n < 3 or len({*seen[-1]}) == 3                  # none twice
    p = state["solved"] / state["seen"]
    assert torch.allclose(p, torch.arange(n).double() % 5 / 4)
    if n == 20:                                                # draws of p = 0, 1/4, 1/2, 3/4, 1
        draws = torch.tensor(seen).flatten() % 5
        draws = torch.bincount(draws, minlength=5) / len(draws)
        assert draws[1:4].min() > 2 * draws[[0, 4]].max() and draws[2] > draws[[1, 3]].max()
        assert draws[[0, 4]].min() > 0.2 / 5 / 2               # the floor
    for lost in ({}, {"solved": state["solved"]}, {**state, "seen": torch.ones(n + 1)},
                 {**state, "seen": torch.full((n,), torch.nan)}, {**state, "seen": 3}):
        with pytest.raises(BadInput, match="no record of --curriculum"):
            curriculum.by_solve_rate(one_step, lost)(None, None, list(range(n)), 9, CFG, rollout)
    again = {}
    for step in range(200):
        curriculum.by_solve_rate(one_step, again)(None, None, list(range(n)), step, CFG, rollout)
    assert torch.equal(again["seen"], state["seen"])           # repeatable


def trajectory(cfg, shares):
    """Of ten completions each, of which so many shares have no end."""
    tokens = torch.ones(10 * len(shares), cfg.completion_length)
    for i, share in enumerate(shares):
        tokens[10 * i:10 * i + round(10 - 10 * share), -1] = 0
    return SimpleNamespace(tokens=tokens, prompt_mask=torch.ones(len(tokens), 1))


def grown(curriculum_, shares, **settings):
    """(length, T) of each step; shares: of completions without an end, of each rollout of each."""
    cfg = dataclasses.replace(CFG, completion_length=16, steps=8, block_length=4,
                              curriculum=curriculum_, **settings)
    policy, lengths, rows = agrpo.Policy(torch.nn.Linear(1, 1), 9, 0), [], []

    def step(policy, optimizer, examples, step, cfg, sample):
        lengths.append((cfg.completion_length, cfg.steps))
        for share in shares[step]:
            assert sample(policy, share, None, cfg)[1:] == (1, 2)
        return {"step": step}
    step_of = curriculum.by_length(step, state := {})
    for i in range(len(shares)):
        rows.append(step_of(policy, None, [], i, cfg, lambda policy, share, keys, cfg: (
            trajectory(cfg, [share]), 1, 2)))
    assert [row["completion_length"] for row in rows] == [C for C, _ in lengths]
    assert sum(state["steps"]) == len(shares)
    return lengths


def test_completions_grow_where_too_many_have_no_end_or_after_so_many_steps(capsys):
    shares = [[0.1], [0.3], [0.1], [0.4], [0.9]]
    assert grown("4,8,16", shares) == [(4, 2), (4, 2), (8, 4), (8, 4), (16, 8)]
    assert capsys.readouterr().out == (
        "from step 2 on completions have 8 tokens: of those of 4 30 % had no end\n"
        "from step 4 on completions have 16 tokens: of those of 8 40 % had no end\n")
    assert grown("8,16", shares, grow_at=0.35) == [(8, 4)] * 4 + [(16, 8)]
    assert grown("8,16", shares, grow_at=1.0, grow_after=2) == [(8, 4)] * 2 + [(16, 8)] * 3
    assert grown("8,16", shares, grow_at=1.0) == [(8, 4)] * 5
    several = [[0.1, 0.6], [0.1, 0.1]]                         # a method may sample again
    assert grown("8,16", several, grow_at=0.3) == [(8, 4), (16, 8)]
    assert grown("8,16", several, grow_at=0.4) == [(8, 4), (8, 4)]


@pytest.mark.parametrize("steps", [None, [], [1, 1, 1], [5], "ab", 2, [-1, 3]])
def test_a_record_of_lengths_that_is_none_is_refused(steps):
    cfg = dataclasses.replace(CFG, completion_length=16, block_length=4, curriculum="4,16")
    with pytest.raises(BadInput, match="no record of --curriculum"):
        curriculum.by_length(one_step, {"steps": steps})(None, None, [], 3, cfg, rollout)


@pytest.mark.parametrize("model", ["tiny", "tiny-block"])
def test_the_last_length_is_the_completions(model):
    cfg = models.checked({"model": model, "task": "story", "curriculum": "8,16"})
    assert cfg.completion_length == 16 and models.checked({"model": model}).curriculum == ""
    given = {"model": model, "task": "story", "curriculum": " 8, 16", "completion_length": 16}
    assert models.checked(given) == cfg
    for text in ("", "solve_rate", "8,", "8," + "9" * 5000):
        assert "completion_length" not in curriculum.with_length({"curriculum": text})


@pytest.mark.parametrize("model, method", [
    ("tiny", "agrpo"), ("tiny-block", "agrpo"), ("tiny-block", "dipo"), ("tiny", "tracerl")])
def test_rollouts_and_updates_of_a_shorter_length(here, monkeypatch, model, method):
    """The real sampler and loop at each length; it grows at once."""
    cfg = models.checked({"task": "story", "curriculum": "8,16", "model": model, "method": method,
                          "base_steps": 4, "base_batch": 4, "train_examples": 32, "prompts": 2,
                          "completions": 4})
    policy, tokenizer = models.open_policy(cfg, train=True)
    monkeypatch.setattr(curriculum, "unfinished", lambda traj, *_: torch.ones(len(traj.tokens)))
    step_of = models.method_of(cfg, tokenizer, state := {}).train_step
    optimizer, sample = agrpo.make_optimizer(policy, cfg), models.sampler(tokenizer, cfg)
    shapes, examples = [], TASKS["story"].generate(8, 0, "train")

    def watched(*args):
        traj, *rest = sample(*args)
        shapes.append(traj.tokens.shape[1])
        return traj, *rest
    rows = [step_of(policy, optimizer, examples, i, cfg, watched) for i in range(3)]
    assert [row["completion_length"] for row in rows] == [8, 16, 16] and state["steps"] == [1, 2]
    assert list(dict.fromkeys(shapes)) == [8, 16]


def test_room_is_what_the_prompt_leaves_of_a_block():
    cfg = dataclasses.replace(CFG, completion_length=8, block_length=4)
    tokens = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [1, 0] + [0] * 6])
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 1]])     # prompts of 3, 0 and 3 tokens
    traj = SimpleNamespace(tokens=tokens, prompt_mask=mask)
    blocks = dipo.BlockPolicy(torch.nn.Linear(1, 1), 9, 0, False, 4)
    assert room(traj, blocks, cfg).tolist() == [5, 8, 5]
    assert unfinished(traj, blocks, cfg).tolist() == [True, True, False]
    everything = agrpo.Policy(torch.nn.Linear(1, 1), 9, 0)
    assert unfinished(traj, everything, cfg).tolist() == [False, True, False]
