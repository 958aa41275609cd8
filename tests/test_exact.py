"""Protects the mathematics: sampler, estimator and gradient against full enumeration of a toy. Run: pytest tests/test_exact.py"""
import dataclasses
import math

import pytest
import toy
import torch

import agrpo

BASE = agrpo.Config(completion_length=3, block_length=3, steps=3, temperature=0.7, normalizer="steps", clip=0.2)
SETTINGS = [                                                        # what to enumerate, for every row of UNMASK
    {},
    {"top_k": 2},
    {"top_k": 3, "top_p": 0.85},
    {"completion_length": 4, "block_length": 4, "steps": 2},        # two positions a step
    {"completion_length": 4, "block_length": 2, "steps": 4},        # two blocks
    {"completion_length": 4, "block_length": 2, "steps": 2, "eos": True},   # ... that may end after the first
]


def case(unmasking, settings, seed=0):
    settings = dict(settings)
    eos = settings.pop("eos", False)
    cfg = dataclasses.replace(BASE, unmasking=unmasking, **settings)
    policy = toy.TableDenoiser(cfg.completion_length, V=3 if cfg.completion_length == 3 else 2, seed=seed, eos=eos)
    return cfg, policy, toy.enumerate_trajectories(policy, cfg)


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probabilities_sum_to_one(unmasking, settings):
    _, _, found = case(unmasking, settings)
    assert abs(sum(float(f[2]) for f in found) - 1) < 1e-12


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2], SETTINGS[5]], ids=str)
def test_sampled_counts_match_the_enumerated_probabilities(unmasking, settings):
    cfg, policy, found = case(unmasking, settings)
    N = 20_000
    prompt = torch.zeros(N, 1, dtype=torch.long)
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(7, i) for i in range(N)])
    counts = {}
    for key in zip(map(tuple, traj.tokens.tolist()), map(tuple, traj.reveal_step.tolist())):
        counts[key] = counts.get(key, 0) + 1
    expected = {(tuple(f[0]), tuple(f[1])): N * float(f[2]) for f in found}
    assert set(counts) <= set(expected)
    likely = {k: e for k, e in expected.items() if e >= 5}
    rest = N - sum(likely.values())
    chi2 = sum((counts.get(k, 0) - e) ** 2 / e for k, e in likely.items())
    if rest >= 5:
        chi2 += (N - sum(counts.get(k, 0) for k in likely) - rest) ** 2 / rest
    freedom = len(likely)
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), f"chi-square {chi2:.0f} of {freedom}; a false alarm is one in 10^5"


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_recorded_log_probs_are_those_of_the_enumeration(unmasking, settings):
    cfg, policy, found = case(unmasking, settings)
    by_key = {(tuple(f[0]), tuple(f[1])): f for f in found}
    prompt = torch.zeros(64, 1, dtype=torch.long)
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(64)])
    for i in range(64):
        f = by_key[tuple(traj.tokens[i].tolist()), tuple(traj.reveal_step[i].tolist())]
        shown = traj.reveal_step[i] < cfg.steps
        assert torch.allclose(traj.logp[i][shown].exp(), torch.stack(f[3]).double()[shown], atol=1e-12)
        assert int(traj.nfe[i]) == len(f[4])
        total = traj.logp[i].sum() + traj.order_logp[i].sum()                        # Eq. 1 and 6: the law of the trajectory
        if unmasking != "random":                                                    # whose positions cost log C(open, n)
            assert abs(float(total) - math.log(float(f[2]))) < 1e-10


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_expected_gradient_is_autograd_of_the_exact_expected_reward(unmasking, settings, seed):
    cfg, policy, found = case(unmasking, settings, seed)
    rewards = torch.tensor([toy.reward_of(f[0], policy.V) for f in found], dtype=torch.float64)
    expected = sum(f[2] * r for f, r in zip(found, rewards))
    want, = torch.autograd.grad(expected, policy.table)
    traj = toy.as_trajectory(policy, cfg, found)
    views = agrpo.exact_views(traj, cfg, policy.mask_id, None)
    adv = rewards * torch.tensor([float(f[2]) for f in found], dtype=torch.float64)  # weight of a trajectory = its probability
    loss, ratio = agrpo.policy_loss(policy, traj, views, adv, cfg)
    got, = torch.autograd.grad(loss, policy.table)
    got = -got * len(found) * cfg.steps                                              # undo the mean over rows and Z = T
    assert (ratio - 1).abs().max() < 1e-12
    assert (got - want).norm() / want.norm() < 1e-12


def test_without_the_position_law_low_confidence_is_biased():
    """The oracle can fail: tokens only is far off, so agreement above is no accident."""
    cfg, policy, found = case("low_confidence", {})
    rewards = torch.tensor([toy.reward_of(f[0], policy.V) for f in found], dtype=torch.float64)
    want, = torch.autograd.grad(sum(f[2] * r for f, r in zip(found, rewards)), policy.table)
    traj = toy.as_trajectory(policy, cfg, found)
    adv = rewards * torch.tensor([float(f[2]) for f in found], dtype=torch.float64)
    token_only = dataclasses.replace(cfg, unmasking="confidence")                    # scores tokens, no law
    loss, _ = agrpo.policy_loss(policy, traj, agrpo.exact_views(traj, cfg, policy.mask_id, None), adv, token_only)
    got, = torch.autograd.grad(loss, policy.table)
    assert (-got * len(found) * cfg.steps - want).norm() / want.norm() > 0.5


def problem(N=20_000, T=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    horizon = torch.randint(1, T + 1, (1,), generator=g).expand(N).contiguous()
    entropy, f = (torch.rand(T, generator=g, dtype=torch.float64) for _ in range(2))
    return horizon, entropy.expand(N, T).contiguous(), f


@pytest.mark.parametrize("rule", agrpo.TIMESTEPS)
@pytest.mark.parametrize("K", [1, 3, 8, 11])
@pytest.mark.parametrize("seed", range(4))
def test_timesteps_estimate_the_sum_without_bias(rule, K, seed):
    horizon, entropy, f = problem(seed=seed)
    step, weight = agrpo.TIMESTEPS[rule](horizon, entropy, K, torch.Generator().manual_seed(seed))
    assert bool(((step < horizon[:, None]) | (weight == 0)).all()) and bool((step >= 0).all())
    row, merged, total = agrpo.merge_duplicates(step, weight, 8)
    estimate = torch.zeros(len(horizon), dtype=torch.float64).index_add(0, row, total * f[merged])
    exact = float(f[: int(horizon[0])].sum())
    if rule == "without_replacement" and int(horizon[0]) <= K or rule == "stratified" and int(horizon[0]) == K:
        assert (estimate - exact).abs().max() < 1e-12
    # batch points are dependent across rows, which only makes the mean tighter than this standard error
    error = float(estimate.std() / math.sqrt(len(estimate)))
    assert abs(float(estimate.mean()) - exact) <= 4 * error + 1e-9, "4 standard errors: 1 false alarm in 16,000"
    assert len(set(zip(row.tolist(), merged.tolist()))) == len(row)                  # a pass is paid once


@pytest.mark.parametrize("rule", ["batch", "stratified", "sobol", "iid"])
def test_exactly_unbiased_for_one_draw(rule):
    """With K = 1 the estimate is weight * f(step(u)), u uniform: integrate over u exactly instead of sampling."""
    horizon, entropy, f = problem(N=1)
    cells = 1_000_000
    u = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    grid = agrpo.draws(lambda N, K, g: u[:, None], agrpo.by_entropy(0.1))
    step, weight = grid(horizon.expand(cells), entropy.expand(cells, 8), 1, None)
    estimate = float((weight * f[step]).mean())
    assert abs(estimate - float(f[: int(horizon[0])].sum())) < 1e-4


def test_the_last_step_is_drawn_and_u_never_reaches_one():
    horizon, entropy = torch.full((1000,), 8), torch.ones(1000, 8, dtype=torch.float64)
    for rule in agrpo.TIMESTEPS.values():
        step, weight = rule(horizon, entropy, 4, torch.Generator().manual_seed(0))
        assert int(step.max()) == 7 and int(step.min()) == 0 and bool((weight > 0).all())
    always_one = agrpo.draws(lambda N, K, g: torch.ones(N, K, dtype=torch.float64), agrpo.uniform)
    step, weight = always_one(horizon, entropy, 2, None)
    assert int(step.max()) == 7 and bool(torch.isfinite(weight).all())


def sampled(cfg, N=64, eos=False, seed=0):
    policy = toy.TableDenoiser(cfg.completion_length, seed=seed, eos=eos)
    prompt = torch.zeros(N, 1, dtype=torch.long)
    return policy, agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(seed, i) for i in range(N)])


def gradient(policy, traj, cfg, views, adv, micro=10**9):
    policy.table.grad = None
    for part in torch.arange(len(views.row)).split(micro):
        agrpo.policy_loss(policy, traj, views.select(part), adv, cfg)[0].backward()
    return policy.table.grad.clone()


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("normalizer", agrpo.NORMALIZERS)
def test_all_steps_without_replacement_give_the_exact_gradient(unmasking, normalizer):
    cfg = dataclasses.replace(BASE, unmasking=unmasking, normalizer=normalizer, timesteps="without_replacement", mc_steps=3)
    policy, traj = sampled(cfg, eos=True)
    adv = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = gradient(policy, traj, cfg, agrpo.exact_views(traj, cfg, policy.mask_id, None), adv)
    for micro in (1, 7, 10**9):
        views = agrpo.agrpo_views(traj, cfg, policy.mask_id, torch.Generator().manual_seed(0))
        assert (gradient(policy, traj, cfg, views, adv, micro) - exact).norm() < 1e-12 * exact.norm()


@pytest.mark.parametrize("rule", agrpo.TIMESTEPS)
def test_the_estimated_gradient_averages_to_the_exact_one(rule):
    cfg = dataclasses.replace(BASE, timesteps=rule, mc_steps=2)
    policy, traj = sampled(cfg, N=16)
    adv = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = gradient(policy, traj, cfg, agrpo.exact_views(traj, cfg, policy.mask_id, None), adv)
    along = [float((gradient(policy, traj, cfg, agrpo.agrpo_views(traj, cfg, policy.mask_id, torch.Generator().manual_seed(i)), adv)
                    * exact).sum() / exact.norm() ** 2) for i in range(400)]
    mean, error = torch.tensor(along).mean(), torch.tensor(along).std() / 20
    assert abs(float(mean) - 1) < 4 * float(error) + 1e-12, f"{mean} +- {error}; 4 standard errors: 1 false alarm in 16,000"


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
def test_ratio_is_exactly_one_at_the_first_update(unmasking):
    cfg = dataclasses.replace(BASE, unmasking=unmasking, top_k=2)
    policy, traj = sampled(cfg)
    views = agrpo.exact_views(traj, cfg, policy.mask_id, None)
    _, ratio = agrpo.policy_loss(policy, traj, views, torch.ones(64, dtype=torch.float64), cfg)
    assert ratio.numel() == 64 * 3 and bool((ratio == 1).all())


def test_states_are_rebuilt_as_they_were_visited():
    cfg = dataclasses.replace(BASE, completion_length=4, block_length=2, steps=4)
    policy, seen = toy.TableDenoiser(4), []
    inner = policy.logits
    policy.logits = lambda p, m, state, where: seen.append(state.clone()) or inner(p, m, state, where)
    prompt = torch.zeros(8, 1, dtype=torch.long)
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(8)])
    for t, state in enumerate(seen):
        rebuilt, target = agrpo.state_at(traj, torch.arange(8), torch.full((8,), t), policy.mask_id)
        assert torch.equal(rebuilt, state) and bool((target.sum(1) == 1).all())


def test_surrogate_clips_on_the_side_that_the_advantage_says():
    logp, old = torch.tensor([0.5, 0.5, -0.5, -0.5]), torch.zeros(4)
    gain, ratio = agrpo.surrogate(logp, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    e, d = math.exp(0.5), math.exp(-0.5)
    assert torch.allclose(gain, torch.tensor([1.2, -e, d, -0.8])) and torch.allclose(ratio, torch.tensor([e, e, d, d]))


def test_advantages():
    r = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert torch.allclose(agrpo.ADVANTAGES["mean"](r), torch.tensor([[-2.0, -1.0, 3.0], [0, 0, 0]]))
    assert torch.allclose(agrpo.ADVANTAGES["leave_one_out"](r)[0], torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5]))
    std = agrpo.ADVANTAGES["std"](r)
    assert torch.allclose(std[0].std(), torch.tensor(1.0), atol=1e-3) and bool((std[1] == 0).all())   # no 0/0 in the second


def test_ties_go_to_the_leftmost_position_and_keep_the_law_exact():
    cfg = dataclasses.replace(BASE, unmasking="low_confidence")
    policy = toy.TableDenoiser(3)
    with torch.no_grad():
        policy.table.copy_(policy.table.sign())                                      # many equal confidences
    found = toy.enumerate_trajectories(policy, cfg)
    traj = toy.as_trajectory(policy, cfg, found)
    assert abs(sum(float(f[2]) for f in found) - 1) < 1e-12
    views = agrpo.exact_views(traj, cfg, policy.mask_id, None)
    rewards = torch.tensor([toy.reward_of(f[0], 3) for f in found], dtype=torch.float64)
    want, = torch.autograd.grad(sum(f[2] * r for f, r in zip(found, rewards)), policy.table)
    loss, _ = agrpo.policy_loss(policy, traj, views, rewards * torch.tensor([float(f[2]) for f in found], dtype=torch.float64), cfg)
    got, = torch.autograd.grad(loss, policy.table)
    assert (-got * len(found) * 3 - want).norm() / want.norm() < 1e-10
    assert agrpo.choose(torch.tensor([1.0, 1.0, 1.0]), torch.ones(1, 3, dtype=torch.bool), 2).tolist() == [[True, True, False]]


def test_top_p_keeps_the_token_that_crosses_p_and_survives_huge_logits():
    cfg = dataclasses.replace(BASE, temperature=1.0, top_k=4, top_p=0.7)
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log() + 5000.0
    logp, support = agrpo.sampling_law(logits, cfg)
    assert torch.allclose(logp.exp(), torch.tensor([[0.625, 0.375, 0, 0]]).double()) and support.tolist() == [[0, 1, 4, 4]]
    again, _ = agrpo.sampling_law(logits, dataclasses.replace(cfg, top_p=0.1), support)
    assert torch.equal(again, logp)                                                  # a given support is used as it is


def test_a_block_longer_than_the_prompt_is_denoised_and_all_eos_rows_do_no_harm():
    cfg = dataclasses.replace(BASE, completion_length=4, block_length=2, steps=4, unmasking="confidence", normalizer="last_step")
    policy = toy.TableDenoiser(4, eos=True)
    prompt = torch.zeros(32, 0, dtype=torch.long)                                    # no prompt at all
    with torch.no_grad():
        policy.table[..., 2] += 3.0                                                  # EOS most of the time
    traj = agrpo.rollout(policy, prompt, prompt, cfg, [(i,) for i in range(32)])
    ended = (traj.tokens[:, :2] == 2).all(1)
    assert bool(ended.any()) and bool((~ended).any()) and bool((traj.tokens != policy.mask_id).all())
    assert torch.equal(traj.nfe, torch.where(ended, 2, 4))                           # finished rows left the batch
    assert bool((traj.tokens[ended] == 2).all()) and bool((traj.reveal_step[ended][:, 2:] == 4).all())
    views = agrpo.agrpo_views(traj, cfg, policy.mask_id, torch.Generator().manual_seed(0))
    loss, _ = agrpo.policy_loss(policy, traj, views, torch.ones(32, dtype=torch.float64), cfg)
    assert bool(torch.isfinite(loss)) and int(traj.last_step[ended].max()) == 0
