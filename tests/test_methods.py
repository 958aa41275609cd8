"""Protects the rows of METHODS, the value model, the controller and block-causal models: against
enumeration, against each other, against the uncached and unpacked forward.
Run: pytest tests/test_methods.py, with --all the whole runs, too"""
import csv
import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import toy
import torch
from checkpoints import write_checkpoint
from test_exact import change
from toy import NEUTRAL, Watched, blank, examples, loss_of, prompts, sampling, tiny, varied

import agrpo
import eval as evaluation
import methods.models
from eval import lengths, open_policy, parse, settle
from methods import caches, diffpo, diffu_grpo, dipo, join, rows_of, scored, sft, tracerl
from support import checkpoints, cost, data, options, saving

CFG = dataclasses.replace(NEUTRAL, position_term="off")
BLOCKS = dataclasses.replace(CFG, model="tiny-block", completion_length=20, block_length=4,
                             steps=10, cache="block")
BY_THRESHOLD = {"unmasking": "threshold", "threshold": 0.03, "steps": 20}      # steps vary by row
RAGGED = (9, 8, 7, 6, 3, 1)            # prompts that end anywhere in a block


def tiny_blocks(cfg=BLOCKS):
    return tiny(cfg, block=4)[0]


def rolled(policy, cfg, *of):
    """Rows of prompts of these lengths, rolled out as configured."""
    roll = agrpo.rollout if cfg.cache == "none" else caches.cached_rollout
    return roll(policy, *prompts(*of), cfg, [(i,) for i in range(len(of))])


def ragged(policy, cfg=BLOCKS):
    return rolled(policy, cfg, *RAGGED)


def views_of(method, policy, traj, cfg, adv=None, seed=0):
    adv = torch.ones(len(traj.tokens)) if adv is None else adv
    return agrpo.METHODS[method].views(traj, adv, cfg, policy.mask_id, agrpo.generator(seed))


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(policy, traj, views, adv, cfg):
    loss, _ = loss_of(policy, traj, views, adv, cfg)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@torch.no_grad()
def logp_of(policy, traj, views, cfg):
    return agrpo.step_logp(policy, traj, views, cfg)[0]


def recorded_of(traj, views):
    return traj.logp[views.row][views.target]


def targets_per_token(traj, views):
    return torch.zeros_like(traj.tokens).index_add(0, views.row, views.target.long())


@torch.no_grad()
def moved(policy, size=0.05):
    """All that is trained; adapters begin at zero, and leave it."""
    for i, (name, p) in enumerate(policy.named_parameters()):
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
            p.add_(size * p.abs().mean() * noise).add_(size * ("lora_B" in name))


def step_of(cfg, policy, tokenizer, reward=varied, step=0, optimizer=None, n=16):
    """A step of training as agrpo.train takes it."""
    method = evaluation.method_of(cfg, tokenizer)
    if not optimizer:
        optimizer = agrpo.make_optimizer(policy, cfg)
        method.begin(policy, optimizer, cfg)
    one_step = method.train_step or agrpo.train_step
    return one_step(policy, optimizer, examples(n), step, cfg, sampling(tokenizer, reward))


@pytest.fixture
def losses(monkeypatch):
    """What policy_loss was given and gave: [(views, loss, ratios)]."""
    kept, inner = [], agrpo.policy_loss

    def policy_loss(policy, traj, views, cfg):
        kept.append((views, *inner(policy, traj, views, cfg)))
        return kept[-1][1:]
    monkeypatch.setattr(agrpo, "policy_loss", policy_loss)
    return kept


# ------------------------------------------------------------------------------------- the views
@pytest.mark.parametrize("unmasking", ["low_confidence", "threshold", "random"])
@pytest.mark.parametrize("method, shrink, update_block", [
    ("exact", 1, 0), ("tracerl", 1, 0), ("tracerl", 2, 0), ("tracerl", 3, 0), ("tracerl", 8, 0),
    ("tracerl", 1, 8), ("dipo", 1, 0)])
def test_every_revealed_token_is_a_target_exactly_once(unmasking, method, shrink, update_block):
    cfg = dataclasses.replace(BLOCKS, **BY_THRESHOLD, shrink=shrink, update_block=update_block)
    cfg = dataclasses.replace(cfg, unmasking=unmasking)
    policy = tiny_blocks()
    traj = ragged(policy, cfg)
    views = views_of(method, policy, traj, cfg)
    assert torch.equal(targets_per_token(traj, views), (traj.reveal_step < cfg.steps).long())
    assert (views.state[views.target] == policy.mask_id).all()     # is masked where it is scored
    if method == "dipo":
        per_row = torch.bincount(views.row)
        assert per_row.max() <= 4 and (per_row < traj.nfe).all()
    if method == "tracerl":
        assert torch.equal(torch.bincount(views.row), -(-traj.nfe // shrink))


@pytest.mark.parametrize("unmasking, top_k", [
    ("low_confidence", 0), ("threshold", 0), ("random", 5), ("low_confidence", 5)])
@pytest.mark.parametrize("method", ["exact", "tracerl", "dipo"])
def test_the_replay_equals_the_recorded_log_probs_wherever_prompts_end(unmasking, top_k, method):
    cfg = dataclasses.replace(BLOCKS, **BY_THRESHOLD, top_k=top_k, temperature=0.8)
    cfg = dataclasses.replace(cfg, unmasking=unmasking)
    policy = tiny_blocks()
    traj = ragged(policy, cfg)
    assert len(traj.nfe.unique()) > 1
    views = views_of(method, policy, traj, cfg)
    assert views.old in ("recorded", "tokens")
    assert (logp_of(policy, traj, views, cfg) - recorded_of(traj, views)).abs().max() < 1e-10


def test_blocks_counted_from_the_completion_would_not_replay():
    """The oracle can fail: with blocks aligned at the response it is off."""
    policy = tiny_blocks()
    traj = ragged(policy)
    eight = (torch.arange(9) >= 1).long().expand(6, 9)         # as if all prompts had 8 tokens
    lazy = dataclasses.replace(traj, prompt_mask=eight)
    views = views_of("dipo", policy, lazy, BLOCKS)
    C = traj.tokens.shape[1]
    mask = torch.cat([traj.prompt_mask[views.row], views.prompt_mask[:, -C:]], 1)
    views = views._replace(prompt_mask=mask)
    assert (logp_of(policy, traj, views, BLOCKS) - recorded_of(traj, views)).abs().max() > 1e-3


@pytest.mark.parametrize("normalizer", agrpo.NORMALIZERS)
def test_shrink_of_one_is_the_exact_sum_and_dipo_the_same_in_fewer_passes(normalizer):
    cfg = dataclasses.replace(BLOCKS, **BY_THRESHOLD, normalizer=normalizer)
    policy = tiny_blocks()
    traj, adv = ragged(policy, cfg), normal(6)
    exact, trace, packed = (views_of(m, policy, traj, cfg) for m in ("exact", "tracerl", "dipo"))
    want = gradient(policy, traj, exact, adv, cfg)
    assert torch.equal(want, gradient(policy, traj, trace, adv, cfg))
    assert len(packed.row) < len(exact.row)
    if normalizer != "state_tokens":   # its states are others
        got = gradient(policy, traj, packed, adv, cfg)
        assert (got - want).norm() < 1e-6 * want.norm()        # the stock RMSNorm is float32


@pytest.mark.parametrize("unmasking", ["random", "confidence"])
def test_dipo_is_the_exact_gradient_of_a_block_causal_denoiser(unmasking):
    """Every trajectory enumerated: the expected gradient is autograd of E[R] over the mean number
    of tokens, all C of them here."""
    cfg = change(unmasking=unmasking, completion_length=4, block_length=2, steps=4,
                 normalizer="batch_tokens")
    policy = toy.BlockTableDenoiser(4, 2, 2, seed=3)
    found = toy.enumerate_trajectories(policy, cfg)
    rewards = torch.tensor([toy.reward_of(f[0], 2) for f in found], dtype=torch.float64)
    prob = torch.stack([f[2] for f in found])
    want, = torch.autograd.grad((prob * rewards).sum(), policy.table, retain_graph=True)
    traj = toy.as_trajectory(policy, cfg, found)
    traj.prompt = traj.prompt_mask = blank(len(found), 2)[1]   # a whole block
    views = views_of("dipo", policy, traj, cfg)
    assert len(views.row) == 2 * len(found)
    loss, ratio = loss_of(policy, traj, views, rewards * prob.detach(), cfg)
    got = -torch.autograd.grad(loss, policy.table)[0] * len(found) * 4
    assert (ratio - 1).abs().max() < 1e-12 and (got - want).norm() < 1e-12 * want.norm()


@pytest.mark.parametrize("epochs", [1, 2])
def test_with_larger_blocks_in_the_update_the_first_ratio_is_one(epochs):
    cfg = dataclasses.replace(BLOCKS, method="tracerl", update_block=8, inner_epochs=epochs)
    policy = tiny_blocks()
    traj = ragged(policy, cfg)
    with tracerl.attention_blocks(policy, cfg.update_block):
        views = views_of("tracerl", policy, traj, cfg)
        _, ratio = loss_of(policy, traj, views, normal(6), cfg)
        away = logp_of(policy, traj, views, cfg) - recorded_of(traj, views)
    assert (ratio == 1).all() if epochs == 1 else (ratio - 1).abs().max() < 1e-12
    assert views.old == "scored" and policy.block == 4
    assert away.abs().max() > 1e-3     # larger blocks see more


@pytest.mark.parametrize("value_model", ["off", "on"])
def test_a_step_updates_with_larger_blocks_and_rolls_out_with_its_own(value_model, monkeypatch):
    policy, tokenizer = tiny(BLOCKS, block=4)
    cfg = dataclasses.replace(BLOCKS, method="tracerl", update_block=8, value_model=value_model)
    make = with_value if value_model == "on" else agrpo.make_optimizer
    optimizer, seen, inner = make(policy, cfg), [], dipo.BlockPolicy.decode

    def decode(self, *args, **rest):
        if self is policy:
            seen.append((torch.is_grad_enabled(), self.block))
        return inner(self, *args, **rest)
    monkeypatch.setattr(dipo.BlockPolicy, "decode", decode)
    row = tracerl.train_step(policy, optimizer, examples(), 0, cfg, sampling(tokenizer))
    assert set(seen) == {(False, 4), (True, 8)}                # rolled out, updated
    assert row["ratio"] == 1.0 and row["passes"] > 0 and policy.block == 4


def test_dipo_never_shows_what_was_filled_in_after_the_end():
    """Of a row that ends after its first block: what the sampler had not seen is MASK, as in the
    states that it saw."""
    policy = tiny_blocks()
    traj = rolled(policy, BLOCKS, 8, 8)
    traj.tokens[0, 4:], traj.reveal_step[0, 4:] = policy.eos_id, BLOCKS.steps
    packed, seen = (views_of(m, policy, traj, BLOCKS) for m in ("dipo", "tracerl"))
    packed, seen = (v.state[v.row == 0] for v in (packed, seen))
    assert len(packed) == 2 and torch.equal(packed, seen)
    assert (packed[:, 4:] == policy.mask_id).all()


def test_diffu_grpo_masks_prompts_from_a_local_generator_and_counts_up_to_the_first_end():
    policy, _ = tiny()
    cfg = dataclasses.replace(CFG, prompt_masking=0.5, normalizer="length")
    traj = rolled(policy, cfg, *[35] * 7, 40)
    prompt, padding = traj.prompt, traj.prompt_mask == 0
    traj.tokens[0, :5], traj.tokens[0, 5], traj.tokens[1, 0] = 10, policy.eos_id, policy.eos_id
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    views, again, other = (views_of("diffu-grpo", policy, traj, cfg, seed=x) for x in "aab")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(views.prompt, again.prompt) and not torch.equal(views.prompt, other.prompt)
    hidden = views.prompt == policy.mask_id
    assert not hidden[padding].any() and torch.equal(views.prompt[~hidden], prompt[~hidden])
    n = int((~padding).sum())
    assert abs(float(hidden[~padding].double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(n)
    assert (views.state == policy.mask_id).all() and views.old == "scored"
    ends = [row.index(policy.eos_id) + 1 if policy.eos_id in row else 16
            for row in traj.tokens.tolist()]
    assert ends[:2] == [6, 1] and views.target.sum(1).tolist() == ends
    assert torch.allclose(views.weight, 1 / torch.tensor(ends, dtype=torch.float64)[:, None])
    assert all(bool(t[:n].all()) for t, n in zip(views.target, ends))


def test_diffpo_splits_at_a_step_of_the_row_and_at_zero_is_diffu_grpo(monkeypatch):
    policy, _ = tiny()
    cfg = dataclasses.replace(CFG, normalizer="length")
    traj, adv, seen = rolled(policy, cfg, *[9] * 6), normal(6), set()
    for i in range(30):
        views = views_of("diffpo", policy, traj, cfg, seed=i)
        assert torch.equal(targets_per_token(traj, views), diffu_grpo.counted(traj).long())
        u, empty = traj.reveal_step[views.row], (views.state == policy.mask_id).all(1)
        late = views.step > 0
        assert (u[late] >= views.step[late, None])[views.target[late]].all()
        assert empty[~late].all() and not empty[late].any()
        seen |= set(views.step[late].tolist())
    assert seen == set(range(1, 8))
    monkeypatch.setattr(torch, "rand",
                        lambda *shape, **rest: torch.zeros(*shape, dtype=rest.get("dtype")))
    zero, plain = (views_of(m, policy, traj, cfg) for m in ("diffpo", "diffu-grpo"))
    assert len(zero.row) == 6 and torch.equal(plain.prompt, traj.prompt)       # nothing is hidden
    one, other = (gradient(policy, traj, views, adv, cfg) for views in (zero, plain))
    assert torch.equal(one, other) and one.norm() > 0


def test_diffpo_splits_at_any_call_that_a_row_took_and_no_later():
    traj = ragged(tiny_blocks(), cfg := dataclasses.replace(BLOCKS, **BY_THRESHOLD))
    assert len(traj.nfe.unique()) > 1
    drawn = [set() for _ in traj.nfe]
    for i in range(300):
        views = views_of("diffpo", tiny_blocks(), traj, cfg, seed=i)
        for row, step in zip(views.row.tolist(), views.step.tolist()):
            drawn[row].add(step)
    # a step is missed with probability (1 - 1/20)^300 = 2e-7 at most
    assert drawn == [set(range(n)) for n in traj.nfe.tolist()]


def test_what_no_step_revealed_is_not_counted_and_the_batchs_tokens_are_exact():
    """Prompts that end inside a block: the last, partial block is EOS from the start."""
    traj = ragged(tiny_blocks())
    traj.tokens.masked_fill_((traj.tokens == traj.eos_id) & (traj.reveal_step < 10), 7)
    filled = traj.reveal_step == BLOCKS.steps
    assert filled.any() and not (diffu_grpo.counted(traj) & filled).any()
    assert torch.equal(diffu_grpo.counted(traj), ~filled)
    row = torch.zeros(1, dtype=torch.long)
    Z, = agrpo.NORMALIZERS["batch_tokens"](traj, BLOCKS, row, None).tolist()
    assert Z == int((~filled).sum()) / 6 and Z != round(Z, 6)  # not one that float32 holds


class JointDenoiser(toy.TableDenoiser):
    """The true conditionals of a joint distribution over V^C: what a perfect model predicts in each
    state."""

    def __init__(self, C, V, seed):
        super().__init__(C, V)
        g, joint = torch.Generator().manual_seed(seed), torch.zeros((V,) * C, dtype=torch.float64)
        for i in range(C):             # left to right, each table at random
            table = 0.6 * torch.randn((V,) * (i + 1), generator=g, dtype=torch.float64)
            joint = joint + table.log_softmax(-1).view((V,) * (i + 1) + (1,) * (C - i - 1))
        self.joint = joint.exp()
        table = torch.zeros((V + 1) ** C, C, V, dtype=torch.float64)
        for state in itertools.product(range(V + 1), repeat=C):
            left = self.joint
            for i, s in enumerate(state):
                left = left.select(i, s).unsqueeze(i) if s < V else left
            index = sum(s * (V + 1) ** i for i, s in enumerate(state))
            for i, s in enumerate(state):
                if s == V:
                    table[index, i] = left.sum([j for j in range(C) if j != i]).log().flatten()
        self.table = table


def surrogates_divergence(joint):
    """KL(true || surrogate), random order, of one state and of two, from entropies of the joint:
    sum of marginals less the joint's; the marginals of a random prefix and what it implies for
    the rest."""
    C = joint.dim()

    def entropy(*kept):
        p = joint.sum([i for i in range(C) if i not in kept]) if len(kept) < C else joint
        return -float((p * p.log()).sum())
    alone, whole, two = sum(map(entropy, range(C))), entropy(*range(C)), 0.0
    for s in range(C):
        for S in itertools.combinations(range(C), s):
            given = entropy(*S) if S else 0.0
            rest = sum(entropy(*S, i) - given for i in range(C) if i not in S)
            two += (sum(entropy(i) for i in S) + rest) / math.comb(C, s) / C
    return alone - whole, two - whole


def test_two_states_are_nearer_to_the_sampler_than_one():
    """Mean KL(true || surrogate) of a tabular joint, sampled by `rollout`, scored through the
    views."""
    cfg = change(unmasking="random", completion_length=6, block_length=6, steps=6, temperature=1.0,
                 position_term="off", prompt_masking=0.0)
    N, exact = 4000, []
    for seed in range(4):
        policy = JointDenoiser(6, 3, seed)
        exact.append(surrogates_divergence(policy.joint))
        traj = agrpo.rollout(policy, *blank(N), cfg, [(seed, i) for i in range(N)])
        for method, want in zip(("diffu-grpo", "diffpo"), exact[-1]):
            views = views_of(method, policy, traj, cfg, seed=seed)
            row = views.row[views.target.nonzero()[:, 0]]
            surrogate = torch.zeros(N, dtype=torch.float64).index_add(
                0, row, logp_of(policy, traj, views, cfg))
            sampled = traj.logp.sum(1) - surrogate
            error = float(sampled.std()) / math.sqrt(N)
            assert abs(float(sampled.mean()) - want) < 4.5 * error, (
                f"{sampled.mean():.4f}, exact {want:.4f}; a false alarm is one in 150,000")
    one, two = (sum(column) for column in zip(*exact))
    assert 0.36 < one / 4 < 0.46 and 0.6 < two / one < 0.75, exact


# --------------------------------------------------------------------- the loss that they share
@pytest.mark.parametrize("method", ["diffu-grpo", "diffpo", "tracerl"])
def test_old_log_probs_are_those_of_the_same_views(method):
    """Ratio one at the first update, whichever way the old ones come; after an update the ratio is
    new / old of the view."""
    policy, _ = tiny()
    cfg = dataclasses.replace(CFG, shrink=2, prompt_masking=0.3, tokens_per_pass=60)
    twice = dataclasses.replace(cfg, inner_epochs=2)
    traj, adv = rolled(policy, cfg, *[9] * 6), torch.ones(6, 1, dtype=torch.float64)
    views = views_of(method, policy, traj, cfg, seed=1)
    plain, kept = (agrpo.prepare(policy, traj, views, adv, c) for c in (cfg, twice))
    assert plain.logp_old is None and kept.logp_old is not None
    old = logp_of(policy, traj, views, cfg)
    for at_first in (plain, kept):
        _, ratio = agrpo.policy_loss(policy, traj, at_first, cfg)
        assert (ratio - 1).abs().max() < 1e-12
    assert (old - recorded_of(traj, views)).abs().max() > 0.01     # not the sampler's likelihood
    moved(policy)
    _, ratio = agrpo.policy_loss(policy, traj, kept, cfg)
    new = logp_of(policy, traj, views, cfg)
    assert torch.allclose(ratio, (new - old).exp(), atol=1e-12) and (ratio - 1).abs().max() > 0.01


def test_importance_weights_are_the_truncated_ratio_of_surrogate_and_behaviour():
    policy, _ = tiny()
    cfg = dataclasses.replace(CFG, truncation=1.01, clip=0.2)
    traj, adv = rolled(policy, cfg, *[9] * 6), normal(6)
    views = views_of("diffpo", policy, traj, cfg, seed=1)
    logp, *_ = agrpo.step_logp(policy, traj, views, cfg)
    row = views.target.nonzero()[:, 0]
    w = (logp.detach() - recorded_of(traj, views)).exp().clamp(max=1.01)
    assert (w == 1.01).any() and (w < 1.01).any()
    head = policy.model.lm_head.weight
    want, = torch.autograd.grad(
        -(logp * w * adv[views.row[row]] * views.weight[row, 0]).sum() / 6, head)
    got, = torch.autograd.grad(loss_of(policy, traj, views, adv, cfg)[0], head)
    assert (got - want).norm() < 1e-12 * want.norm()


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("unmasking, position_term", [
    ("random", "off"), ("low_confidence", "on"), ("low_confidence", "off"), ("plackett_luce", "on"),
    ("threshold", "off")])
def test_the_kl_term_has_the_gradient_of_the_exact_divergence(unmasking, position_term, top_k):
    """Every trajectory, every step, views of any weight: autograd of sum p log(p / reference) over
    the laws of what the step revealed, whatever rule chose it, by the enumeration's own law."""
    cfg = change(completion_length=3, block_length=3, steps=3, temperature=0.7, top_k=top_k, kl=0.3,
                 unmasking=unmasking, position_term=position_term, threshold=0.5)
    policy, other = toy.TableDenoiser(3), toy.TableDenoiser(3, seed=5)
    policy.reference = other
    traj = toy.as_trajectory(policy, cfg, toy.enumerate_trajectories(policy, cfg))
    views, want = views_of("exact", policy, traj, cfg), 0.0
    views = views._replace(weight=normal(len(views.row), 1).abs(), adv=views.weight * 0,
                           logp_old=traj.logp[views.row], order_logp_old=(
                               traj.order_logp[views.row, views.step]))
    for state, target, weight in zip(views.state, views.target, views.weight[:, 0]):
        z, q = (model.of(tuple(state.tolist())) for model in (policy, other))
        for j in target.nonzero().flatten().tolist():
            p = toy.law(z[j], cfg)
            kept = [v for v in range(3) if float(p[v].detach()) > 0]
            norm = sum((q[j][v] / 0.7).exp() for v in kept)
            want = want + weight * sum(
                p[v] * (p[v] * norm / (q[j][v] / 0.7).exp()).log() for v in kept)
    loss, _ = agrpo.policy_loss(policy, traj, views, cfg)
    want = 0.3 * want / len(traj.tokens)
    assert abs(float((loss - want).detach())) < 1e-12 and want > 1e-3
    got, want = (torch.autograd.grad(x, policy.table)[0] for x in (loss, want))
    assert (got - want).abs().max() < 1e-12 and want.norm() > 1e-3
    assert other.table.grad is None
    policy.reference = policy                          # nothing for the reference itself
    assert abs(float(agrpo.policy_loss(policy, traj, views, cfg)[0].detach())) < 1e-12


def test_what_one_of_the_laws_cannot_do_has_neither_ratio_nor_gradient():
    never, logp = agrpo.LOG_ZERO, torch.tensor([-1.0, -2.0], dtype=torch.float64)
    for new, old in ((never, -1.0), (-1.0, never), (never, never), (never - 3, -0.5)):
        new = torch.cat([logp, torch.tensor([new]).double()]).requires_grad_()
        old = torch.cat([logp - 0.1, torch.tensor([old]).double()])
        gain, ratio = agrpo.surrogate(new, old, torch.ones(3).double(), change(clip=0.5))
        slope, = torch.autograd.grad(gain.sum(), new)
        assert ratio.tolist()[2] == 1.0 and slope[2] == 0.0 and (slope[:2] > 1).all()
        assert bool(gain.isfinite().all())


def test_a_skipped_step_leaves_the_weights_whatever_the_inner_epochs(monkeypatch):
    cfg = dataclasses.replace(CFG, method="exact", inner_epochs=3, lr=1e-2, warmup=0)
    policy, tokenizer = tiny()
    optimizer, inner, calls = agrpo.make_optimizer(policy, cfg), agrpo.accumulate, []
    before = [p.detach().clone() for p in policy.model.parameters()]

    def accumulate(*args):
        calls.append(1)
        loss, ratios = inner(*args)
        return (math.nan if len(calls) == 2 else loss), ratios
    assert step_of(cfg, policy, tokenizer, optimizer=optimizer)["skipped"] == 0
    assert not all(map(torch.equal, before, policy.model.parameters()))
    before = [p.detach().clone() for p in policy.model.parameters()]
    monkeypatch.setattr(agrpo, "accumulate", accumulate)       # the second epoch is not finite
    assert step_of(cfg, policy, tokenizer, step=1, optimizer=optimizer)["skipped"] == 1
    assert len(calls) == 3 and all(map(torch.equal, before, policy.model.parameters()))


def small(tmp_path, **settings):
    """Settings for a checkpoint of 0.1 M parameters, written."""
    if not (tmp_path / "model").exists():
        write_checkpoint(tmp_path / "model", "llada")
    return dataclasses.replace(
        CFG, **{"task": "gsm8k", "model": str(tmp_path / "model"), "device": "cpu",
                "completion_length": 8, "block_length": 4, "steps": 4, "lora_alpha": 8.0,
                "gradient_checkpointing": "off", **settings})


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_the_model_to_begin_with(tmp_path, rank):
    cfg = small(tmp_path, lora_rank=rank, kl=0.5)
    policy, _ = open_policy(cfg, train=True)
    scored.keep_reference(policy)
    names = [n for n, _ in policy.named_parameters()]
    traj, adv = rolled(policy, cfg, 5, 5, 5, 5), torch.zeros(4, dtype=torch.float64)
    views = views_of("exact", policy, traj, cfg)
    sees = views.prompt, views.prompt_mask, views.state, views.target
    before, first = logp_of(policy, traj, views, cfg), policy.logits(*sees)
    assert abs(float(loss_of(policy, traj, views, adv, cfg)[0].detach())) < 1e-9
    moved(policy, 0.2)
    now = logp_of(policy, traj, views, cfg)
    prepared = agrpo.prepare(policy, traj, views, adv[:, None], cfg)
    assert torch.equal(policy.reference.logits(*sees), first)
    assert torch.equal(logp_of(policy, traj, views, cfg), now)     # and all is back in its place
    assert (now - before).abs().max() > 0.01
    loss, _ = agrpo.policy_loss(policy, traj, prepared, cfg)
    assert loss > 1e-4 and [n for n, _ in policy.named_parameters()] == names
    loss.backward()
    assert all((p.grad is not None) <= p.requires_grad for p in policy.parameters())
    assert any(p.grad is not None for p in policy.parameters())


def test_every_completion_has_its_kl_term_also_those_without_an_advantage():
    """All rewards equal: what moves the policy is Eq. 4's KL alone, the same by all methods that
    score the visited states."""
    norms = []
    for method, K in (("exact", 1), ("tracerl", 1), ("agrpo", 8)):     # K = T: every step is drawn
        policy, tokenizer = tiny()
        scored.keep_reference(policy)
        moved(policy)
        cfg = dataclasses.replace(CFG, method=method, mc_steps=K, kl=0.5, max_grad_norm=1e9)
        optimizer = Watched(policy.model)
        row = step_of(cfg, policy, tokenizer, lambda *_: 1.0, optimizer=optimizer)
        assert row["passes"] == 8 * 8
        norms.append(row["grad_norm"])
        without = dataclasses.replace(cfg, kl=0.0)             # no gradient, no pass
        assert step_of(without, policy, tokenizer, lambda *_: 1.0,
                       optimizer=optimizer)["passes"] == 0
    assert norms[0] > 1e-3 and all(abs(x / norms[0] - 1) < 1e-4 for x in norms)
    tracerl = {"method": "tracerl"}    # against the model before the update, once: likewise none
    assert settle(tracerl).kl == 0.0 and settle({**tracerl, "inner_epochs": 2}).kl == 0.01


def test_gradient_checkpointing_does_not_share_layers_with_copies(tmp_path):
    """A copied layer computes, and recomputes, with its own weights: value model and reference are
    the same with it and without."""
    found = []
    for checkpointing in ("off", "on"):
        cfg = small(tmp_path, kl=0.5, gradient_checkpointing=checkpointing)
        policy, _ = open_policy(cfg, train=True)
        scored.keep_reference(policy)
        value = tracerl.ValueModel(policy, cfg)
        torch.nn.init.ones_(value.head.weight)
        traj, adv = rolled(policy, cfg, 5, 5, 5, 5), torch.ones(4, dtype=torch.float64)
        views = views_of("exact", policy, traj, cfg)
        with torch.no_grad():
            for p in policy.model.parameters():
                p.mul_(1.1)
        zeros = torch.zeros(4, 8, dtype=torch.float64)
        value.loss(traj, views, zeros, zeros + 1, 0.2).backward()
        assert all(p.grad is None for p in policy.model.parameters())
        without = [name for name, p in value.named_parameters() if p.grad is None]
        assert without == ["body.model.lm_head.weight"]        # no part of a value
        values = torch.cat([p.grad.flatten() for p in value.own])
        found.append((values, gradient(policy, traj, views, adv, cfg)))
    for one, other in zip(*found):
        assert (one - other).norm() < 1e-5 * one.norm()


def test_trained_on_from_an_adapter_the_reference_is_that_adapter(tmp_path):
    cfg = small(tmp_path, lora_rank=4, kl=0.5)
    policy, tokenizer = open_policy(cfg, train=True)
    for name, p in policy.named_parameters():
        p.data.add_(0.1 * ("lora_B" in name))
    saving.save_model(tmp_path / "adapter", policy.model, tokenizer, dataclasses.asdict(cfg),
                      policy.source, policy.base)
    for rank in (4, 0):
        again = dataclasses.replace(cfg, model=str(tmp_path / "adapter"), lora_rank=rank)
        policy, _ = open_policy(again, train=True)
        scored.keep_reference(policy)
        traj = rolled(policy, cfg, 5, 5, 5, 5)
        views = views_of("exact", policy, traj, cfg)
        sees = views.prompt, views.prompt_mask, views.state, views.target
        first = policy.logits(*sees)
        moved(policy, 0.2)
        assert torch.equal(policy.reference.logits(*sees), first)
        assert (policy.logits(*sees) - first)[:, :4].abs().max() > 0.01


@pytest.mark.parametrize("method", ["agrpo", "exact", "diffu-grpo", "diffpo", "tracerl", "dipo"])
def test_shares_of_the_views_make_the_whole(method, monkeypatch):
    """Each of three processes scores some, whatever a method's views hold; gradients add up."""
    policy, found = tiny_blocks(), []
    traj, adv = ragged(policy), normal(6)
    views = views_of(method, policy, traj, BLOCKS)
    views = agrpo.prepare(policy, traj, views, adv[:, None], BLOCKS)

    def loss_of_part(part):
        found.extend(zip(part.row.tolist(), part.step.tolist(), part.state.tolist()))
        return agrpo.policy_loss(policy, traj, part, BLOCKS)

    def gradients(ranks):
        policy.zero_grad(set_to_none=True)
        total = 0.0
        for rank, world in ranks:
            monkeypatch.setattr(agrpo, "processes", lambda: (rank, world))
            total += agrpo.accumulate(views, BLOCKS, loss_of_part)[0]
        return total, torch.cat([p.grad.flatten() for p in policy.parameters()])
    total, whole = gradients([(0, 1)])
    alone, found = found, []
    shared, parts = gradients([(0, 3), (1, 3), (2, 3)])
    assert sorted(found) == sorted(alone) and len(alone) == len(views.row) > 3
    assert total == pytest.approx(shared, rel=1e-9)
    assert (whole - parts).norm() < 1e-6 * whole.norm()        # the stock RMSNorm is float32


@pytest.mark.parametrize("method", ["agrpo", "diffu-grpo", "diffpo"])
def test_inner_epochs_make_so_many_updates_on_views_of_their_own(method, losses):
    policy, tokenizer = tiny()
    cfg = dataclasses.replace(CFG, method=method, inner_epochs=3, prompt_masking=0.2, lr=0.1,
                              normalizer="length")
    optimizer = Watched(policy.model)
    row = step_of(cfg, policy, tokenizer, optimizer=optimizer)
    views, _, ratio = zip(*losses)
    assert optimizer.steps == 3 == len(losses) and row["passes"] == sum(len(v.row) for v in views)
    assert (ratio[0] - 1).abs().max() < 1e-9 and (ratio[2] - 1).abs().max() > 1e-4
    drawn = [v.prompt if method == "diffu-grpo" else v.step for v in views]
    assert not all(torch.equal(drawn[0], x) for x in drawn[1:])


def test_dynamic_sampling_replaces_groups_of_equal_rewards_a_bounded_number_of_times(monkeypatch):
    policy, tokenizer = tiny()
    cfg = dataclasses.replace(CFG, prompts=3, dynamic_sampling=2, method="dipo")
    puzzles, kept, asked = examples(32), [], []
    rich = {ex["puzzle"] for ex in puzzles[::2]}               # half of all prompts teach something
    monkeypatch.setattr(agrpo, "update", lambda policy, optimizer, traj, reward, step, cfg: (
        kept.append((traj, reward)) or {}))

    def run(step, reward):
        sample = sampling(tokenizer, reward)

        def noted(policy, batch, keys, cfg):
            asked.append((batch, keys))
            return sample(policy, batch, keys, cfg)
        row = dipo.train_step(policy, None, puzzles, step, cfg, noted)
        return row, *kept[-1]

    def some(text, ex):
        return varied(text, ex) * (ex["puzzle"] in rich)
    sampled, equal = [], 0
    for step in range(8):
        asked.clear()
        row, traj, reward = run(step, some)
        texts = [tokenizer.decode(t[:n]) for t, n in zip(traj.tokens, lengths(traj, policy))]
        for group in traj.prompt.view(3, 4, -1):
            assert (group == group[0]).all()                   # groups stay together
        puzzle = [tokenizer.decode(p[m.bool()][1:17])
                  for p, m in zip(traj.prompt, traj.prompt_mask)]
        assert reward.tolist() == [varied(t, None) * (p in rich) for t, p in zip(texts, puzzle)]
        assert row["sampled"] == sum(len(batch) for batch, _ in asked) in range(12, 37, 4)
        every = [r for batch, keys in asked
                 for r in sampling(tokenizer, some)(policy, batch, keys, cfg)[1]["correct"]]
        assert row["reward"] == pytest.approx(sum(every) / len(every))     # of all completions
        _, again, reward_again = run(step, some)
        assert torch.equal(again.tokens, traj.tokens) and torch.equal(reward_again, reward)
        sampled.append(row["sampled"])
        equal += int((reward.view(3, 4).amax(1) == reward.view(3, 4).amin(1)).sum())
    assert max(sampled) > 12 and equal < 8                     # 12 of 24 groups without it
    asked.clear()
    assert run(0, lambda *_: 1.0)[0]["sampled"] == 36          # bounded
    (first, _), (second, _), (third, _) = asked                # other prompts, other noise
    assert first != second != third and len({key for _, keys in asked for key in keys}) == 36


# --------------------------------------------------------------------------------- the value model
def with_value(policy, cfg):
    """The optimizer of a policy with a value model in float64."""
    optimizer = agrpo.make_optimizer(policy, cfg)
    tracerl.begin(policy, optimizer, cfg)
    policy.value.double()
    return optimizer


def test_gae_without_discount_is_reward_minus_value_and_with_it_the_recursion():
    value, reward = normal(5, 7, seed=0), normal(5)
    step = torch.tensor([[0, 0, 1, 2, 2, 3, -1]] * 4 + [[1, 0, -1, -1, -1, -1, -1]])
    adv, returns = tracerl.gae(reward, value, step, 1.0, 1.0)
    counts = step >= 0
    assert torch.allclose(adv[counts], (reward[:, None] - value)[counts], atol=1e-12)
    assert (adv[~counts] == 0).all()
    assert torch.allclose(returns[counts], reward[:, None].expand(5, 7)[counts])
    adv, returns = tracerl.gae(reward, value, step, 0.9, 0.8)
    v = value[0]                       # by hand, from the last step back
    last = reward[0] - v[5]
    two = torch.stack([-v[j] + 0.9 * v[5] + 0.72 * last for j in (3, 4)])
    one = -v[2] + 0.9 * (v[3] + v[4]) / 2 + 0.72 * two.mean()
    none = torch.stack([-v[j] + 0.9 * v[2] + 0.72 * one for j in (0, 1)])
    discount = torch.tensor([0.729, 0.729, 0.81, 0.9, 0.9, 1.0]).double()
    assert torch.allclose(adv[0][:6], torch.stack([*none, one, *two, last]))
    assert torch.allclose(returns[0][:6], reward[0] * discount)


@pytest.mark.parametrize("kind", ["own backbone", "adapters"])
def test_the_value_model_learns_what_states_expect_and_leaves_the_policy_alone(kind, tmp_path):
    learns = {"value_lr": 3e-3, "lr": 1e-5, "warmup": 1, "clip": 5.0, "value_model": "on"}
    if kind == "adapters":
        cfg = small(tmp_path, lora_rank=4, **learns)
        policy, tokenizer = open_policy(cfg, train=True)
    else:
        cfg = dataclasses.replace(CFG, **learns)
        policy, tokenizer = tiny(cfg, dtype=torch.float32)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = agrpo.make_optimizer(policy, cfg)
    tracerl.begin(policy, optimizer, cfg)
    groups = [group["params"] for group in optimizer.param_groups]
    assert [len(params) for params in groups] == [len(trained), len(policy.value.own)]
    assert not {id(p) for p in groups[0]} & {id(p) for p in groups[1]}
    traj = rolled(policy, cfg, *[5] * 16)
    views = views_of("exact", policy, traj, cfg)
    logp = logp_of(policy, traj, views, cfg)
    assert (policy.value.of(traj, views, cfg) == 0).all()      # zero at first
    reward, losses = (traj.prompt[:, 0] % 2).double(), []      # known from the prompt
    returns = reward[:, None].expand(traj.tokens.shape)
    for _ in range(40):
        old = policy.value.of(traj, views, cfg)
        with policy.value.on():
            loss = policy.value.loss(traj, views, old, returns, cfg.clip)
            loss.backward()
        assert all(p.grad is None for p in groups[0])          # not the policy's
        losses.append(float(loss.detach()))
        agrpo.optimizer_step(optimizer, 0, cfg, True)
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(logp_of(policy, traj, views, cfg), logp)
    with policy.value.on():            # V_clip stays near the old value: the larger of the two
        tight = policy.value.loss(traj, views, torch.zeros_like(old), returns, 1e-3)
    assert float(tight.detach()) > losses[-1]
    if kind == "adapters":
        saving.save_model(tmp_path / "saved", policy.model, tokenizer,
                          dataclasses.asdict(cfg), policy.source, policy.base)
        assert not (tmp_path / "saved" / "value").exists()
        back, _ = open_policy(dataclasses.replace(cfg, model=str(tmp_path / "saved")))
        assert torch.allclose(logp_of(back, traj, views, cfg), logp, atol=1e-5)


def test_the_value_loss_is_its_definition_weighted_as_the_policys():
    """Token by token: 1/2 max((V - R)^2, (V_clip - R)^2), of weights that differ from view to view,
    over N."""
    policy = tiny_blocks()
    cfg = dataclasses.replace(BLOCKS, **BY_THRESHOLD, normalizer="state_tokens")
    traj = ragged(policy, cfg)
    views = views_of("tracerl", policy, traj, cfg)
    value = tracerl.ValueModel(policy, cfg).double()
    g = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(value.head.weight, generator=g)
    now = value.of(traj, views, cfg)
    old, returns = (now + 0.5 * normal(*now.shape, seed=seed) for seed in (1, 2))
    want = 0.0
    for row, target, weight in zip(views.row.tolist(), views.target, views.weight[:, 0].tolist()):
        for j in target.nonzero()[:, 0].tolist():
            V, V0, R = float(now[row, j]), float(old[row, j]), float(returns[row, j])
            near = V0 + min(max(V - V0, -0.2), 0.2)
            want += weight * 0.5 * max((V - R) ** 2, (near - R) ** 2) / 6
    got = float(value.loss(traj, views, old, returns, 0.2).detach())
    assert len(views.weight.unique()) > 1 and got == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("shrink", [1, 3])
def test_advantages_follow_the_steps_that_were_scored(shrink, losses):
    """Of a discounted reward, with a value that is zero everywhere: R g^(steps left), where merged
    steps are one."""
    policy, tokenizer = tiny(BLOCKS, block=4)
    cfg = dataclasses.replace(BLOCKS, method="tracerl", advantage="none", value_model="on",
                              gamma=0.9, lam=0.8, shrink=shrink, kl=0.0)
    optimizer, kept, sample = with_value(policy, cfg), [], sampling(tokenizer, lambda *_: 1.0)

    def noted(*args):
        kept.append(sample(*args))
        return kept[-1]
    tracerl.train_step(policy, optimizer, examples(), 0, cfg, noted)
    (traj, *_), (views, *_) = *kept, *losses
    last = (traj.nfe - 1) // shrink
    left = (last[views.row] - views.step // shrink)[:, None].expand(views.target.shape)
    want = (0.9 * 0.8) ** left[views.target].double()          # R and V* = 0, so A = r + g l A*
    assert torch.allclose(views.adv[views.target], want) and len(want.unique()) > 2


def test_a_value_model_gives_every_token_its_own_advantage(losses):
    """Through train_step: with a value that is one everywhere, R = 1 teaches nothing and R = 0
    pushes down."""
    for reward, moves in ((1.0, False), (0.0, True)):
        losses.clear()
        policy, tokenizer = tiny()
        cfg = dataclasses.replace(CFG, method="tracerl", advantage="none", value_model="on")
        optimizer = with_value(policy, cfg)
        torch.nn.init.ones_(policy.value.head.bias)
        row = step_of(cfg, policy, tokenizer, lambda *_: reward, optimizer=optimizer)
        adv = losses[0][0].adv
        assert adv.shape == (8 * 8, 16) and torch.allclose(adv, torch.full_like(adv, reward - 1))
        assert (row["grad_norm"] > 1e-6) == moves and row["passes"] == 8 * 8


# ---------------------------------------------------------------------------------- the controller
def controlled(policy, cfg, N, mean, *key):
    """A rollout of N rows, the controller's mean set."""
    with torch.no_grad():
        policy.mean.fill_(mean)
    return diffpo.controlled_rollout(policy, *blank(N), cfg, [(*key, i) for i in range(N)])


def levels_of(policy, rule):
    """All eases at which a step of the table denoiser may begin to reveal more: tensors, rising."""
    plain = policy.table.log_softmax(-1)
    if rule == "threshold":
        levels = -plain.amax(-1).flatten()
    else:                              # every sum of entropies but the largest that may come up
        h, sums = -(plain.exp() * plain).sum(-1), []
        for n in (2, 3):
            for S in itertools.combinations(range(policy.C), n):
                some = torch.stack([h[:, i] for i in S])
                sums.append((some.sum(0) - some.amax(0)).log())
        levels = torch.cat(sums)
    levels = levels[levels.detach().argsort()]
    return levels[torch.tensor([True, *(levels.diff().detach() > 1e-12)])]


@pytest.mark.parametrize("rule, knob", [("threshold", "threshold"), ("entropy", "entropy_bound")])
@pytest.mark.parametrize("training", ["joint", "alone"])
def test_the_controllers_gradient_is_autograd_of_the_exact_expectation(rule, knob, training):
    """The threshold integrated out by enumeration: between neighbouring levels of the table all
    thresholds act alike, so E[R] is a sum over intervals of their mass times the enumerated mean
    reward there; its ends move with the table. Model and head are both exact, and leaving the ends
    out is not."""
    sigma, mean, C = 0.6, 0.5 if rule == "threshold" else -1.0, 3
    cfg = change(unmasking=options.CONTROLLED[rule], controller=rule, controller_sigma=sigma,
                 position_term="off", temperature=1.0, controller_training=training)
    policy = toy.TableDenoiser(C, V=2, seed=5)
    levels = levels_of(policy, rule)
    bounds = [-math.inf, *levels.tolist(), math.inf]
    middles = [bounds[1] - 1, *((levels[1:] + levels[:-1]) / 2).tolist(), bounds[-2] + 1]

    def reward(f):
        return toy.reward_of(f[0], 2) * (1 - len(f[4]) / (C + 1)) ** 0.5

    def key(f):
        return toy.key_of(f)[:2]
    with torch.no_grad():
        policy.mean.fill_(mean)
    normal, end = torch.distributions.Normal(policy.mean, sigma), torch.zeros(()).double()
    cut = [end, *map(normal.cdf, levels), end + 1]
    total, still, found, within, sampled = 0.0, 0.0, {}, {}, {}
    certain = dataclasses.replace(cfg, controller_sigma=1e-12)
    for k, x in enumerate(middles):
        ease = {knob: math.exp(-x if rule == "threshold" else x)}
        here = toy.enumerate_trajectories(policy, dataclasses.replace(cfg, **ease))
        mass, J = cut[k + 1] - cut[k], sum(f[2] * reward(f) for f in here)
        total, still = total + mass * J, still + mass.detach() * J
        for f in here:
            _, before = found.get(key(f), (f, 0.0))
            found[key(f)] = (f, before + float((mass * f[2]).detach()))
            within.setdefault(key(f), []).append(k)
        traj = controlled(policy, certain, 400, x, k)
        for i, (tokens, when, _) in enumerate(toy.keys_of(traj)):
            sampled.setdefault((tokens, when), rows_of(traj, torch.tensor([i])))
    assert set(sampled) == set(found) and abs(sum(p for _, p in found.values()) - 1) < 1e-9
    assert len({round(reward(f), 9) for f, _ in found.values()}) > 5
    traj = join([sampled[k] for k in found])
    for row, k in zip(traj.edges.tolist(), found):     # within these the trajectory comes up
        for edge, want in zip(row, (bounds[min(within[k])], bounds[max(within[k]) + 1])):
            assert edge == want or abs(edge - want) < 1e-9
    with torch.no_grad():
        policy.mean.fill_(mean)
    traj.ease_mean = torch.full((len(found),), mean, dtype=torch.float64)
    adv = torch.tensor([reward(f) * p for f, p in found.values()], dtype=torch.float64)
    loss, ratio = diffpo.controller_loss(policy, traj, torch.arange(len(adv)), adv[:, None], cfg)
    tokens, _ = loss_of(policy, traj, views_of("exact", policy, traj, cfg), adv, cfg)
    wrt = policy.table, policy.mean
    got = torch.autograd.grad(-(loss + tokens) * len(adv) * cfg.steps, wrt)
    want = torch.autograd.grad(total, wrt, retain_graph=True)
    assert (ratio - 1).abs().max() < 1e-9
    assert abs(float(got[1] - want[1])) < 1e-9 * abs(float(want[1]))
    if training == "joint":
        assert float((got[0] - want[0]).norm() / want[0].norm()) < 1e-9
        without, = torch.autograd.grad(still, policy.table)
        assert float((without - want[0]).norm() / want[0].norm()) > 0.1


def test_the_law_of_the_ease_stays_finite_far_out():
    inf = math.inf
    edges = [[30.0, 31.0], [-31.0, -30.0], [60.0, inf], [-inf, inf], [5.0, 5.0]]
    mean = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    logp = diffpo.ease_logp(torch.tensor(edges, dtype=torch.float64), mean, 1.0)
    logp.sum().backward()
    assert logp.isfinite().all() and mean.grad.isfinite().all() and logp[3] == 0
    one, other = logp[:2].tolist()
    assert abs(one - other) < 1e-9 and one < -400


def test_thresholds_are_drawn_from_the_controllers_law_and_act_row_by_row():
    policy, N = toy.TableDenoiser(3, V=2, seed=5), 4000
    cfg = change(unmasking="threshold", controller="threshold", controller_sigma=0.6)
    traj = controlled(policy, cfg, N, 0.4)
    z = (traj.ease - 0.4) / 0.6
    assert abs(float(z.mean())) < 4 / math.sqrt(N)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / N)
    assert (traj.edges[:, 0] <= traj.ease).all() and (traj.ease <= traj.edges[:, 1]).all()
    assert len(traj.nfe.unique()) > 1
    for i in range(20):                # as with that threshold set by hand
        by_hand = dataclasses.replace(cfg, threshold=math.exp(-float(traj.ease[i])))
        alone = agrpo.rollout(policy, *blank(1), by_hand, [(i,)])
        assert toy.keys_of(alone)[0] == toy.keys_of(traj)[i]
    greedy = controlled(policy, dataclasses.replace(cfg, temperature=0.0), 3, 0.4)
    assert torch.allclose(greedy.ease, torch.tensor(0.4).double())
    named = diffpo.controlled_rollout(policy, *blank(2), cfg, [7, "seven"])        # any keys
    assert named.ease[0] != named.ease[1]


@pytest.mark.parametrize("training", ["joint", "alone"])
def test_with_a_controller_rewards_count_by_their_speed_and_head_and_model_learn(training, losses):
    policy, tokenizer = tiny()
    cfg = dataclasses.replace(CFG, controller="threshold", controller_training=training, steps=16,
                              unmasking="threshold", threshold=0.03, alpha=0.5, method="exact")
    width = policy.model.get_output_embeddings().weight.shape[1]
    policy.controller = torch.nn.Linear(width, 1).double()
    torch.nn.init.zeros_(policy.controller.weight)
    torch.nn.init.constant_(policy.controller.bias, -math.log(0.03))
    policy.model.requires_grad_(training == "joint")
    first = {name: p.detach().clone() for name, p in policy.named_parameters()}
    kept, sample = [], sampling(tokenizer)

    def noted(*args):
        kept.append(sample(*args))
        return kept[-1]
    method = evaluation.method_of(cfg, tokenizer)
    optimizer = agrpo.make_optimizer(policy, cfg) if training == "joint" else Watched(policy.model)
    method.begin(policy, optimizer, cfg)
    row = method.train_step(policy, optimizer, examples(), 0, cfg, noted)
    (traj, parts, _), = kept
    assert len(traj.nfe.unique()) > 1 and (traj.ease != traj.ease[0]).any()
    speed = (1 - traj.nfe.double() / 16) ** 0.5
    reward = torch.tensor(parts["correct"]).double() * speed
    assert row["reward"] == pytest.approx(float(reward.mean()))
    assert row["ease"] == pytest.approx(float(traj.ease.mean()))
    learned = {name.split(".")[0] for name, p in policy.named_parameters()
               if not torch.equal(p, first[name])}
    assert learned == ({"model", "controller"} if training == "joint" else {"controller"})
    assert (row["passes"] > 0) == (training == "joint") and len(losses) == (training == "joint")


# ---------------------------------------------------------------------------- block-causal models
@pytest.mark.parametrize("unmasking", ["low_confidence", "threshold", "plackett_luce"])
def test_a_rollout_with_the_block_cache_equals_one_without(unmasking):
    policy = tiny_blocks()
    cfg = dataclasses.replace(BLOCKS, **BY_THRESHOLD, position_term="on")
    cfg = dataclasses.replace(cfg, unmasking=unmasking)
    cached, plain = ragged(policy, cfg), ragged(policy, dataclasses.replace(cfg, cache="none"))
    for name, value in vars(plain).items():
        if isinstance(value, torch.Tensor):
            other = vars(cached)[name]
            same = value.dtype == torch.long and torch.equal(other, value)
            assert same or torch.allclose(other, value, atol=1e-10), name
    assert cached.old == plain.old == "recorded"


def test_a_mask_token_in_the_prompt_does_not_mislead_the_block_cache():
    policy, (prompt, mask) = tiny_blocks(), prompts(9, 9)
    prompt[0, 3] = policy.mask_id
    plain = agrpo.rollout(policy, prompt, mask, BLOCKS, [(0,), (1,)])
    cached = caches.cached_rollout(policy, prompt, mask, BLOCKS, [(0,), (1,)])
    assert torch.equal(cached.tokens, plain.tokens)
    assert (cached.logp - plain.logp).abs().max() < 1e-10


def test_the_block_cache_computes_two_blocks_a_call():
    policy, widths = tiny_blocks(), []
    inner = policy.decode

    def decode(ids, *args, **rest):
        widths.append(ids.shape[1])
        return inner(ids, *args, **rest)
    policy.decode = decode
    ragged(policy)
    assert widths[0] == 9 and set(widths[1:]) == {8}       # the prompt once, then 2 x 4 columns


def test_a_published_block_model_rolls_out_with_the_cache(tmp_path):
    write_checkpoint(tmp_path / "model", "sdar")
    cfg = dataclasses.replace(BLOCKS, model=str(tmp_path / "model"), device="cpu",
                              completion_length=12, steps=12)
    policy = open_policy(cfg)[0].double()
    assert policy.block == 4
    cached, plain = ragged(policy, cfg), ragged(policy, dataclasses.replace(cfg, cache="none"))
    assert torch.equal(cached.tokens, plain.tokens)
    assert (cached.logp - plain.logp).abs().max() < 1e-10
    views = views_of("dipo", policy, cached, cfg)
    assert (logp_of(policy, cached, views, cfg) - recorded_of(cached, views)).abs().max() < 1e-10


def test_flex_attention_from_the_same_rule_gives_the_same_log_probs():
    policy = tiny_blocks()
    traj = ragged(policy)
    views = views_of("dipo", policy, traj, BLOCKS)
    policy.float()
    with torch.compiler.set_stance("force_eager"):
        dense = logp_of(policy, traj, views, BLOCKS)
        policy.flex = True
        flex = logp_of(policy, traj, views, BLOCKS)
    assert policy.model.config._attn_implementation == "flex_attention"
    assert (dense - flex).abs().max() < 1e-4
    policy.flex = False
    assert torch.equal(logp_of(policy, traj, views, BLOCKS), dense)


def test_the_block_rule_by_hand():
    """Prompt of 3 in blocks of 2, completion of 3: [p p | p c | c c], then the noisy copy from the
    prompt's last token on."""
    block, noisy = torch.tensor([[0, 0, 1, 1, 2, 2, 1, 1, 2, 2]]), torch.arange(10) >= 6
    rule = dipo.block_rule(block, torch.ones(1, 10, dtype=torch.bool), noisy)
    sees = dipo.block_mask(rule, 1, 10, "cpu", False)[0, 0].int().tolist()
    assert sees == [[1, 1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
                    [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
                    [1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
                    [1, 1, 0, 0, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 1, 1, 0, 0],
                    [1, 1, 1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 1, 1]]


def test_sft_of_a_block_model_reads_each_block_behind_the_final_text_before_it():
    """The packed loss against one forward per block, each with its own t."""
    policy, (prompt, mask) = tiny_blocks(), prompts(7, 6, 5, 4, 3)
    tokens = torch.randint(6, 100, (5, 12), generator=torch.Generator().manual_seed(1))
    is_masked, weight = sft.noise(tokens, 4, mask, agrpo.generator("n"))
    got = sft.denoising_loss(policy, prompt, mask, tokens, is_masked, weight)
    total, block = 0.0, (torch.arange(12) + mask.sum(1, keepdim=True) % 4) // 4
    for i in range(5):
        for b in block[i].unique().tolist():
            here = block[i] == b
            assert len(weight[i][here].unique()) == 1          # one t a block
            where = is_masked[i] & here
            if where.any():
                state = tokens[i].masked_fill(where, policy.mask_id)[None]
                at = prompt[i:i + 1], mask[i:i + 1], state, where[None]
                logp = policy.logits(*at).log_softmax(-1)
                own = logp.gather(1, tokens[i][where][:, None]).squeeze(1)
                total = total - (own * weight[i][where]).sum()
    assert abs(float((got - total / 60).detach())) < 1e-10
    many = sft.noise(tokens.repeat(100, 1), 4, mask.repeat(100, 1), agrpo.generator("m"))
    t = 1 / many[1]
    assert 0 < t.min() and t.max() <= 1 and abs(float(t.mean()) - 0.5) < 0.02


def test_an_empty_prompt_is_as_good_as_any():
    """As a tokenizer pads it: a column that is not real."""
    policy, _ = tiny()
    nothing, some = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    one, five = (agrpo.rollout(policy, x, torch.zeros_like(x), CFG, [0, 1])
                 for x in (nothing, some))
    assert torch.equal(one.tokens, five.tokens) and (one.logp - five.logp).abs().max() < 1e-10
    views = views_of("exact", policy, one, CFG)
    assert (logp_of(policy, one, views, CFG) - recorded_of(one, views)).abs().max() < 1e-10


# ------------------------------------------------------------------------------- the command line
def test_the_published_settings_of_a_method_come_with_its_name_and_flags_win():
    for method, row in agrpo.METHODS.items():
        model = ["--model", "tiny-block"] if method == "dipo" else []
        cfg = parse(["--method", method, "--inner-epochs", "2", *model])[0]
        assert {k: getattr(cfg, k) for k in row.settings} == row.settings
    assert {"kl", "clip", "advantage"} <= set(agrpo.METHODS["diffu-grpo"].settings)
    assert parse(["--method", "diffu-grpo"])[0].prompt_masking == 0.15
    assert parse(["--method", "diffpo"])[0].truncation == 2.0
    assert parse(["--method", "dipo", "--model", "tiny-block"])[0].dynamic_sampling == 3
    assert parse(["--method", "diffu-grpo", "--clip", "0.1", "--inner-epochs", "2"])[0].clip == 0.1
    shrunk = [parse(["--method", "tracerl", *words])[0].shrink
              for words in ((), ("--model", "tiny-block"), ("--shrink", "4"))]
    assert shrunk == [2, 1, 4]
    assert settle({"task": "gsm8k", "model": "owner/name", "method": "tracerl"}).shrink == 8


@pytest.mark.parametrize("flags, name", [
    ("", "sudoku-agrpo-seed0"), ("--preset paper", "sudoku-paper-seed0"),
    ("--sft gold --seed 2", "sudoku-sft-seed2"),
    ("--method dipo --model tiny-block", "sudoku-tiny-block-dipo-seed0"),
    ("--method tracerl --value-model on", "sudoku-tracerl-value-seed0"),
    ("--controller entropy", "sudoku-agrpo-entropy-joint-seed0")])
def test_default_names_tell_runs_apart(here, flags, name):
    assert parse(flags.split())[0].name == name


@pytest.mark.parametrize("method", ["agrpo", "exact", "diffu-grpo", "diffpo", "tracerl", "dipo"])
def test_the_estimate_counts_the_passes_that_a_step_makes(here, method):
    """Of the tiny models, where every group has an advantage: the logged passes of a step, packed
    ones read twice the length."""
    packed = method == "dipo"
    cfg = parse(["--method", method, *["--model", "tiny-block"] * packed, "--prompts", "4",
                 "--completions", "8"])[0]
    cfg = dataclasses.replace(cfg, base_hidden=32, base_layers=2, kl=0.0)
    policy, tokenizer = tiny(cfg, block=4 * packed)
    row = step_of(cfg, policy, tokenizer, n=8)
    assert abs(row["passes"] * (1 + packed) / cost.states_scored(cfg) - 1) < 0.2


def test_the_estimate_of_fine_tuning_and_a_controller():
    assert cost.states_scored(parse(["--sft", "gold", "--prompts", "4"])[0]) == 4
    alone = parse(["--controller", "entropy", "--controller-training", "alone"])[0]
    assert cost.states_scored(alone) == 16 * 16                # the head's, one state a completion
    both = parse(["--controller", "entropy"])[0]
    assert cost.states_scored(both) == 16 * 16 * 4


BAD = [
    ("--method dipo", "block-causal"), ("--update-block 8", "block-causal"),
    ("--method ppo", "agrpo, exact, diffu-grpo"), ("--value-model on", "--method tracerl"),
    ("--method diffpo --position-term on", "--position-term"),
    ("--model tiny-block --method tracerl --update-block 6", "multiple"),
    ("--model tiny-block --update-block 6", "multiple"),
    ("--model tiny-block --update-block 8", "--method tracerl"),
    ("--prompt-masking 1", "--prompt-masking"), ("--prompt-masking 0.1", "diffu-grpo"),
    ("--gamma 1.5 --value-model on --method tracerl", "--gamma"),
    ("--gamma 0.9", "--value-model on"), ("--inner-epochs 0", "--inner-epochs"),
    ("--controller threshold --unmasking random", "--unmasking"), ("--controller x", "entropy"),
    ("--controller entropy --method tracerl --value-model on", "--value-model"),
    ("--alpha 1", "--controller"), ("--shrink 2", "tracerl"),
    ("--truncation -1 --method diffpo", "--truncation"), ("--truncation 2", "diffpo"),
    ("--dynamic-sampling 2", "--method dipo"), ("--kl nan", "--kl"),
    ("--method tracerl --shrink 1 --value-model on --position-term on", "--position-term"),
    ("--curriculum rate", "128,256,384"), ("--curriculum 16", "two or more"),
    ("--curriculum 16,8", "two or more"),
    ("--curriculum 0,16", "two or more"),
    ("--curriculum 8,16", "--block-length 16"),
    ("--curriculum 8,16 --block-length 8 --sft gold", "--sft"),
    ("--curriculum 8,16 --block-length 8 --steps 6", "--steps 6 does not reveal"),
    ("--curriculum 4,16 --block-length 4 --mc-steps 3", "there are 2 steps"),
    ("--curriculum 8,16 --completion-length 8", "--completion-length 8"),
    ("--curriculum solve_rate --controller entropy", "--controller"),
    ("--curriculum solve_rate --method dipo --model tiny-block", "--dynamic-sampling"),
    ("--curriculum solve_rate --solve-rate-floor 1.5", "--solve-rate-floor"),
    ("--solve-rate-floor 0.2", "--curriculum solve_rate"),
    ("--curriculum solve_rate --grow-at 0.5", "with lengths"), ("--grow-after 3", "with lengths"),
    ("--model-block 4", "tiny-block"),
    ("--method diffpo --mc-steps 2", "--method agrpo"),
    ("--method diffpo --preset paper", "its own --method"),
    ("--model tiny-block --block-length 8", "blocks of 4"),
    ("--model tiny-block --task gsm8k", "sudoku, story, formula"),
    ("--model tiny-block --eval-steps 16", "20, 10, 5"),
    ("--sft gold --value-model on --method tracerl", "--sft"), ("--sft .", "--sft"),
    ("--sft nowhere.jsonl", "--sft"), ("--sft bad.jsonl", "bad.jsonl:2"),
    ("--sft empty.jsonl", "no rows"), ("--sft long.jsonl", "are longer, the shortest has 99"),
    ("--sft mask.jsonl", "answer 2"), ("--sft half.jsonl", "half.jsonl:1"),
    ("--sft latin.jsonl", "latin.jsonl:1"), ("--sft wide.jsonl", "context is 256"),
    ("--sft list.jsonl", "one object"), ("--sft unknown.jsonl", "no token for")]


@pytest.mark.parametrize("flags, word", BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(here, flags, word, capsys):
    good = '{"prompt": "1", "completion": "2"}\n'
    for name, text in {
            "bad": good + '{"prompt": "1"}\n', "empty": "\n", "list": "[1]\n",
            "mask": good + '{"prompt": "1", "completion": "<mask>"}\n',
            "unknown": '{"prompt": "1", "completion": "\u00e9"}\n',
            "half": '{"prompt": "1", "completion": "a\\ud800"}\n',
            "wide": json.dumps({"prompt": "1" * 300, "completion": "2"}) + "\n",
            "long": json.dumps({"prompt": "1", "completion": "2" * 99}) + "\n"}.items():
        Path(f"{name}.jsonl").write_text(text, encoding="utf-8")
    Path("latin.jsonl").write_bytes('{"prompt": "1", "completion": "\u00e9"}\n'.encode("latin-1"))
    assert go("--name", "bad", *flags.split()) == 2
    err = capsys.readouterr().err
    assert word in err and len(err.strip().splitlines()) == 1 and not Path("runs/bad").exists()


# ------------------------------------------------------------------------------------ whole runs
whole = pytest.mark.whole
QUICK = ["--device", "cpu", "--max-steps", "2", "--eval-every", "0", "--eval-examples", "8",
         "--prompts", "2", "--completions", "4", "--train-examples", "64"]
SMALL = ["--base-steps", "4", "--base-hidden", "32", "--base-layers", "2"]


def go(*flags):
    """A run of seconds; one that goes on from another has its sizes."""
    goes_on, quick = any(flag.startswith("runs/") for flag in flags), list(QUICK)
    if "--sft" in flags:
        at = quick.index("--completions")
        del quick[at:at + 2]
    return agrpo.main([*quick, *([] if goes_on else SMALL), *flags])


def log_of(name):
    with open(Path("runs") / name / "log.csv") as f:
        return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k}
                for row in csv.DictReader(f)]


def read(path):
    return json.loads(Path(path).read_text())


@pytest.fixture
def rewarded(monkeypatch):
    """Models that solve nothing are rewarded for something that varies."""
    monkeypatch.setattr(methods.models, "reward_parts",
                        lambda task, text, example, weights: {"correct": varied(text, example)})


@whole
@pytest.mark.parametrize("flags", [
    "--method exact", "--method diffu-grpo", "--method diffpo --inner-epochs 2",
    "--method tracerl --value-model on", "--method dipo --model tiny-block",
    "--controller entropy --entropy-bound 12",
    "--controller threshold --controller-training alone --threshold 0.03",
    "--model tiny-block --method tracerl --update-block 8 --value-model on",
    "--controller threshold --model tiny-block --method dipo --dynamic-sampling 0",
    "--sft gold", "--sft gold --model tiny-block"])
def test_every_method_runs_and_resumes_to_the_bit(here, flags, rewarded):
    flags = flags.split()
    assert go("--name", "whole", "--max-steps", "4", *flags) == 0
    assert go("--name", "parts", "--max-steps", "2", *flags) == 0
    assert go("--name", "parts", "--max-steps", "4", "--resume", *flags) == 0
    assert log_of("whole") == log_of("parts") and len(log_of("whole")) == 4
    a, b = (torch.load(Path("runs") / n / "checkpoint.pt", weights_only=True)["model"]
            for n in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(float(row["grad_norm"]) > 0 for row in log_of("whole"))


@whole
def test_a_method_of_ones_own_is_a_function_and_a_row(here, monkeypatch):
    """What METHODS promises: nothing else has to know of it."""
    def last_step_views(traj, adv, cfg, mask_id, g):
        last = torch.nn.functional.one_hot(traj.nfe - 1, cfg.steps)
        return agrpo.views_where(last.double(), traj, cfg, mask_id)
    monkeypatch.setitem(agrpo.METHODS, "last-step", agrpo.Method(last_step_views))
    assert go("--method", "last-step") == 0 and len(log_of("sudoku-last-step-seed0")) == 2
    first = "runs/sudoku-last-step-seed0"
    assert go("--method", "last-step", "--model", first) == 0
    assert len(log_of("sudoku-on-sudoku-last-step-seed0-last-step-seed0")) == 2


@pytest.mark.parametrize("table, name, row", [
    ("TIMESTEPS", "timesteps", lambda traj, inside, *rest: inside[:, :2].double()),
    ("TIMESTEPS", "timesteps", lambda traj, inside, *rest: inside[:1].double()),
    ("TIMESTEPS", "timesteps", lambda traj, inside, *rest: 0 * inside[:, :1].double()),
    ("ADVANTAGES", "advantage", lambda reward: reward.mean(1)),
    ("ADVANTAGES", "advantage", lambda reward: torch.cat([reward, reward]))])
def test_a_row_of_ones_own_with_another_shape_is_not_trained_with(table, name, row, monkeypatch):
    monkeypatch.setitem(getattr(agrpo, table), "mine", row)
    policy, tokenizer = tiny()
    with pytest.raises((AssertionError, RuntimeError), match=r"\(N, T\)|shape"):
        step_of(dataclasses.replace(CFG, **{name: "mine"}), policy, tokenizer)


@whole
def test_a_controller_is_saved_with_the_model_and_used_by_eval(here, capsys, rewarded):
    def evaluate(*flags):
        return evaluation.main(["--model", "runs/c", "--limit", "8", *flags])

    def nfe(name):
        return read(f"{name}.json")["results"][0]["nfe"]
    assert go("--name", "c", "--controller", "entropy", "--max-steps", "3", "--controller-lr",
              "0.5", "--entropy-bound", "12") == 0
    table = capsys.readouterr().out
    assert read("runs/c/model/agrpo.json")["controller"] == "entropy"
    assert evaluate("--out", "c.jsonl") == 0
    out = capsys.readouterr().out
    assert f"{nfe('c'):.1f}" in table and "16" in out
    assert evaluate("--controller", "off", "--steps", "16", "--out", "d.jsonl") == 0
    assert nfe("d") == 16.0
    cfg = dataclasses.replace(CFG, model="runs/c/model", device="cpu", controller="entropy")
    policy, _ = open_policy(cfg)
    assert float(policy.controller.weight.abs().max()) > 0
    assert evaluate("--entropy-bound", "1", "--out", "x.jsonl") == 2
    assert "--controller off" in capsys.readouterr().err
    assert go("--model", "runs/c", "--controller", "threshold", "--name", "other") == 2
    assert "another kind" in capsys.readouterr().err
    from safetensors.torch import load_file, save_file
    head = Path("runs/c/model/controller.safetensors")
    saved = load_file(head)
    save_file({**saved, "bias": saved["bias"] + 9.0}, head)    # other weights, other completions
    assert evaluate("--out", "c.jsonl") == 2 and "weights" in capsys.readouterr().err
    assert evaluate("--out", "y.jsonl") == 0 and nfe("y") == 1.0
    other = {"weight": torch.ones(1, 7), "bias": torch.ones(1)}
    for spoil in (lambda: head.write_bytes(b"no"), lambda: save_file(other, head), head.unlink):
        spoil()
        assert evaluate("--out", "e.jsonl") == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@whole
def test_sft_then_rl_in_two_commands(here, capsys):
    rows = [("1234", "12"), ("4321", "34"), ("1", "x" * 30)]
    Path("pairs.jsonl").write_text("".join(
        json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    assert go("--sft", "pairs.jsonl", "--name", "s") == 0
    assert "1 of 3 answers, of more than 16 tokens" in capsys.readouterr().out
    first = log_of("s")[0]
    assert {"loss", "grad_norm"} <= first.keys() and float(first["loss"]) > 0
    assert go("--model", "runs/s", "--name", "r") == 0         # sizes of the model it began with
    assert Path("runs/r/model/config.json").is_file()
    assert read("runs/r/config.json")["prompt"] == "bare"
    here, tiny_one = (settle({"task": "story", "model": m}) for m in ("runs/r", "tiny"))
    assert dataclasses.replace(here, model="tiny") == tiny_one
    assert go("--model", "runs/r", "--lora-rank", "4", "--name", "a") == 0
    assert go("--model", "runs/a", "--name", "b") == 0
    assert Path("runs/b/model/adapter_config.json").is_file()


def test_an_sft_file_may_hold_any_line_separator_but_newline_inside_a_text(here):
    row = {"prompt": "1\u2028\u0085", "completion": "2"}
    Path("pairs.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert data.read_pairs("pairs.jsonl") == [row]


@whole
@pytest.mark.parametrize("model", ["tiny", "tiny-block"])
def test_sft_learns_the_answers(here, model):
    """Loss falls, and greedy answers are those of the file."""
    Path("pairs.jsonl").write_text("".join(
        json.dumps({"prompt": str(i), "completion": str(i) * 4}) + "\n" for i in range(1, 5)))
    assert go("--model", model, "--sft", "pairs.jsonl", "--name", model, "--max-steps", "150",
              "--lr", "5e-3", "--prompts", "16", "--decay-steps", "150") == 0
    losses = [float(row["loss"]) for row in log_of(model)]
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    policy, tokenizer = open_policy(
        dataclasses.replace(CFG, model=f"runs/{model}/model", device="cpu"))
    cfg = options.for_evaluation(parse(["--model", model])[0])
    ids, mask = checkpoints.encode_prompts(tokenizer, [(str(i), "") for i in range(1, 5)])
    traj = agrpo.rollout(policy, ids, mask, cfg, [(i,) for i in range(4)])
    texts = [tokenizer.decode(t[:n]) for t, n in zip(traj.tokens, lengths(traj, policy))]
    assert texts == ["1111", "2222", "3333", "4444"]


@whole
def test_training_with_larger_blocks_then_rolling_out_with_them(here):
    base = ["--model", "tiny-block", "--method", "tracerl"]
    assert go(*base, "--update-block", "8", "--name", "wide") == 0
    assert float(log_of("wide")[0]["ratio"]) == 1.0
    assert go("--model", "runs/wide", "--model-block", "8", "--completion-length", "24", "--steps",
              "24", "--eval-steps", "24", "--method", "dipo", "--name", "larger") == 0
    assert parse(["--model", "runs/wide"])[0].block_length == 4
    assert parse(["--model", "runs/larger", "--model-block", "8"])[0].block_length == 8
