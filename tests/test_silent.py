"""Protects the mathematics against errors that no other test notices: each of these fails on one
change that all others let pass. Run: pytest tests/test_silent.py"""
import dataclasses
from types import SimpleNamespace

import pytest
import toy
import torch
from test_exact import change, exact, normal, sampled, seeded
from test_methods import (BLOCKS, BY_THRESHOLD, CFG, controlled, moved, ragged, rolled, step_of,
                          tiny_blocks, views_of)
from toy import Watched, prompts, tiny

import agrpo
import eval as evaluation
from methods import diffpo, samplers, sft, tracerl
from support import options


@pytest.mark.parametrize("rule", ["batch_gradient", "independent_gradient", "stratified_gradient",
                                  "without_replacement_gradient"])
def test_steps_are_drawn_in_proportion_to_the_length_of_their_gradient_not_its_square(rule):
    """Lengths 1 and 4, a tenth evenly: probabilities 0.9 x 0.2 + 0.05 and 0.9 x 0.8 + 0.05."""
    traj = SimpleNamespace(gradient=torch.tensor([[1.0, 16.0]]).double())      # recorded: squared
    inside, stake = torch.ones(1, 2, dtype=torch.bool), torch.ones(1).double()
    weight = torch.cat([agrpo.TIMESTEPS[rule](traj, inside, stake, 1, seeded(i))
                        for i in range(40)])
    for column, p in zip(weight.T, (0.23, 0.77)):
        assert (column > 0).any() and (column[column > 0] * p - 1).abs().max() < 1e-6


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
def test_after_an_update_tokens_are_scored_on_the_support_they_were_drawn_from(unmasking):
    """Not on the top-k of the new parameters, which may have lost them."""
    cfg = change(unmasking=unmasking, completion_length=4, block_length=4, steps=2, top_k=2)
    policy, traj = sampled(cfg, N=24)
    with torch.no_grad():
        policy.table.add_(4.0 * normal(*policy.table.shape, seed=3))
    views = exact(policy, traj, cfg)
    views = views._replace(order_logp_old=traj.order_logp[views.row, views.step])
    got, *_ = agrpo.step_logp(policy, traj, views, cfg)
    z = policy.logits(None, None, views.state, views.target) / cfg.temperature
    of = z.gather(1, traj.support[views.row][views.target]).logsumexp(1)
    token = traj.tokens[views.row][views.target]
    assert torch.allclose(got, z.gather(1, token[:, None]).squeeze(1) - of, atol=1e-12)


def test_a_longer_gradient_is_scaled_down_to_its_limit_and_a_shorter_one_is_not():
    found = {}
    for most in (1e9, 1e-3):
        policy, tokenizer = tiny()
        optimizer = Watched(policy.model)
        row = step_of(dataclasses.replace(CFG, method="exact", max_grad_norm=most), policy,
                      tokenizer, optimizer=optimizer)
        found[most] = torch.cat([g.flatten() for g in optimizer.grads])
        assert row["grad_norm"] > 1e-2                         # logged: as it was
    long, short = found[1e9], found[1e-3]
    assert torch.allclose(short, long * 1e-3 / long.norm(), rtol=1e-3, atol=1e-9)


def test_diffpo_splits_at_the_last_call_of_each_row_for_the_largest_draw(monkeypatch):
    """A split behind it leaves one view, as a split at 0 does: the views' steps do not tell."""
    policy, cfg = tiny_blocks(), dataclasses.replace(BLOCKS, **BY_THRESHOLD)
    traj = ragged(policy, cfg)
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **_: torch.full(shape, 0.999,
                                                                             dtype=dtype))
    views = views_of("diffpo", policy, traj, cfg)
    assert len(traj.nfe.unique()) > 1
    for i, n in enumerate(traj.nfe.tolist()):
        assert views.step[views.row == i].tolist() == [0, n - 1]


def test_after_an_update_the_controllers_ratio_is_new_over_old_and_clipped():
    cfg = change(unmasking="threshold", controller="threshold", controller_sigma=0.6,
                 controller_training="alone")
    policy, N = toy.TableDenoiser(3, V=2, seed=5), 40
    traj, adv = controlled(policy, cfg, N, 0.4), normal(40)
    with torch.no_grad():
        policy.mean.fill_(1.0)
    loss, ratio = diffpo.controller_loss(policy, traj, torch.arange(N), adv[:, None], cfg)
    cdf = torch.distributions.Normal(torch.tensor([[0.4], [1.0]]).double(), 0.6).cdf
    low, high = cdf(traj.edges[:, 0]), cdf(traj.edges[:, 1])   # of the old mean, of the new
    r = (high - low)[1] / (high - low)[0]
    assert torch.allclose(ratio, r, atol=1e-9) and (r - 1).abs().max() > cfg.clip
    want = -torch.minimum(r * adv, r.clamp(0.8, 1.2) * adv).sum() / (cfg.steps * N)
    assert torch.allclose(loss, want, atol=1e-12)


@pytest.mark.parametrize("rule", ["threshold", "entropy"])
@pytest.mark.parametrize("block_length, steps", [(4, 4), (2, 4), (4, 2)])
def test_edges_hold_the_ease_and_are_found_again_in_blocks_and_with_several_a_step(
        rule, block_length, steps):
    cfg = change(unmasking=options.CONTROLLED[rule], controller=rule, controller_sigma=0.6,
                 completion_length=4, block_length=block_length, steps=steps)
    policy = toy.TableDenoiser(4, V=2, seed=5)
    traj = controlled(policy, cfg, 200, 0.5 if rule == "threshold" else -1.0)
    assert (traj.edges[:, 0] <= traj.ease).all() and (traj.ease <= traj.edges[:, 1]).all()
    assert (traj.edges.isfinite().sum(0) > 0).all()
    again = diffpo.edges_again(policy, traj, torch.arange(200), cfg)
    assert torch.allclose(again, traj.edges, atol=1e-12)


def test_speed_counts_for_what_is_earned_not_for_a_penalty(monkeypatch):
    traj, kept = SimpleNamespace(nfe=torch.tensor([4, 12]), ease=torch.zeros(2)), []
    monkeypatch.setattr(agrpo, "sample_step", lambda *args: (kept.append(args[-1]()), (
        traj, None, {}))[1])
    monkeypatch.setattr(agrpo, "update", lambda *_: {})
    parts = {"correct": [1.0, 2.0], "overlong": [-0.5, -0.5]}
    diffpo.controller_step(None, None, None, 0, dataclasses.replace(CFG, alpha=0.5),
                           lambda *_: (traj, parts, None))
    (_, faster, _), = kept
    assert faster["correct"].tolist() == pytest.approx([0.75 ** 0.5, 2 * 0.25 ** 0.5])
    assert faster["overlong"].tolist() == [-0.5, -0.5]


def test_a_controller_reads_the_prompts_last_token():
    policy, _ = tiny()
    policy.controller = torch.nn.Linear(32, 1).double()
    prompt, mask = prompts(7, 7)
    ids = torch.cat([prompt, torch.full((2, 4), policy.mask_id)], 1)
    sees = torch.ones(2, 1, 11, 11, dtype=torch.bool)
    hidden = policy.decode(ids, sees, torch.arange(11).expand(2, -1))[:, 6]    # of 0 .. 6
    got = diffpo.ease_mean(policy, prompt, mask, 4)
    assert torch.allclose(got, policy.controller(hidden).squeeze(1), atol=1e-9)


def test_the_reference_old_is_the_policy_before_each_update(monkeypatch):
    cfg = dataclasses.replace(CFG, method="exact", kl=0.5, kl_reference="old", inner_epochs=2)
    (policy, tokenizer), same = tiny(), []

    def update(policy, *_):
        same.append(all(torch.equal(p, was) for p, was in policy.reference.kept))
        moved(policy)
        return {}
    monkeypatch.setattr(agrpo, "update", update)
    for step in range(2):
        step_of(cfg, policy, tokenizer, step=step)
        same.append(any(torch.equal(p, was) for p, was in policy.reference.kept))
    assert same == [True, False, True, False]


def test_the_reference_old_goes_with_a_controller_too():
    cfg = dataclasses.replace(CFG, kl=0.5, kl_reference="old", controller="threshold")
    step = evaluation.method_of(cfg, None).train_step
    assert step is not diffpo.controller_step and "kept_each_step" in step.__qualname__
    assert evaluation.method_of(dataclasses.replace(cfg, kl=0.0), None).train_step is (
        diffpo.controller_step)


@pytest.mark.parametrize("score", samplers.ORDER_SCORE)
def test_recorded_sizes_of_a_drawn_order_are_those_of_its_gradient_by_the_logits(score):
    cfg = change(unmasking="plackett_luce", order_score=score)
    at, rank = (torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 2])), torch.tensor(
        [[1, -1, 0], [-1, -1, 0]])
    logits = normal(5, 4).requires_grad_()
    order_logp = agrpo.UNMASK["plackett_luce"].order_logp
    value, _ = order_logp(agrpo.Law(logits, cfg), None, at, rank, cfg)
    want, = torch.autograd.grad(value.sum(), logits)
    with torch.no_grad():
        _, size = order_logp(agrpo.Law(logits, cfg), None, at, rank, cfg)
    assert torch.allclose(size, want.square().sum(1), atol=1e-12) and (size > 0).all()


@pytest.mark.parametrize("shift", [False, True])
def test_values_are_read_where_the_logits_are(shift):
    """A head that is a token's row of the LM head gives that token's logits."""
    policy, _ = tiny()
    policy.shift = shift               # Dream's: one position to the left
    cfg = dataclasses.replace(CFG, value_model="on")
    traj = rolled(policy, cfg, 5, 9)
    views, value = views_of("exact", policy, traj, cfg), tracerl.ValueModel(policy, cfg).double()
    with torch.no_grad():
        value.head.weight.copy_(policy.model.lm_head.weight[10:11])
        want = policy.logits(views.prompt, views.prompt_mask, views.state, views.target)[:, 10]
        assert torch.allclose(value.values(views), want, atol=1e-9)


def test_fine_tuning_has_one_gradient_whatever_the_tokens_per_pass():
    found = []
    for tokens in (1, 60, 100_000):
        cfg = dataclasses.replace(CFG, prompts=5, tokens_per_pass=tokens, max_grad_norm=1e9)
        policy, tokenizer = tiny()
        rows = [{"prompt": (str(i), ""), "answer": str(i) * 4} for i in range(5)]
        optimizer = Watched(policy.model)
        row = sft.step_with(tokenizer)(policy, optimizer, rows, 0, cfg)
        found.append((row["loss"], torch.cat([g.flatten() for g in optimizer.grads])))
    for loss, grad in found[1:]:
        assert abs(loss / found[0][0] - 1) < 1e-6
        assert (grad - found[0][1]).norm() < 1e-6 * found[0][1].norm()


@pytest.mark.parametrize("clip_high, share", [(0.0, 0.6), (0.28, 0.4)])
def test_the_logged_share_of_clipped_ratios_knows_both_edges(clip_high, share, monkeypatch):
    policy, tokenizer = tiny()
    ratios = torch.tensor([0.7, 0.85, 1.1, 1.25, 1.4])
    monkeypatch.setattr(agrpo, "accumulate", lambda *_: (0.0, [ratios]))
    cfg = dataclasses.replace(CFG, method="exact", clip=0.2, clip_high=clip_high)
    row = step_of(cfg, policy, tokenizer)
    assert row["clip_fraction"] == pytest.approx(share)
    assert row["ratio"] == pytest.approx(float(ratios.mean()))
