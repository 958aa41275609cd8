"""Protects the mathematics: sampler, estimator and gradient against full enumeration of a toy. Run: pytest tests/test_exact.py"""
import dataclasses
import math

import pytest
import toy
import torch

import agrpo

BASE = agrpo.Config(completion_length=3, block_length=3, steps=3, temperature=0.7, normalizer="steps", clip=0.2,
                    tau_pos=0.7, threshold=0.5, entropy_bound=0.6)                   # so that the numbers revealed vary
SETTINGS = [                                                        # what to enumerate, for every row of UNMASK
    {},
    {"top_k": 2, "order_score": "neg_entropy"},
    {"top_k": 3, "top_p": 0.85},
    {"completion_length": 4, "block_length": 4, "steps": 2},        # two positions a step
    {"completion_length": 4, "block_length": 4, "steps": 2, "top_k": 2, "V": 3},
    {"completion_length": 4, "block_length": 2, "steps": 4},        # two blocks
    {"completion_length": 4, "block_length": 2, "steps": 4, "top_k": 2, "temperature": 1.6, "V": 3},
    {"completion_length": 4, "block_length": 2, "steps": 4, "eos": True},   # ... that may end after the first
]


def case(unmasking, settings, seed=0):
    settings = dict(settings)
    eos, V = settings.pop("eos", False), settings.pop("V", 0)
    cfg = dataclasses.replace(BASE, unmasking=unmasking, **settings)
    policy = toy.TableDenoiser(cfg.completion_length, V=V or (3 if cfg.completion_length == 3 else 2), seed=seed, eos=eos)
    return cfg, policy, toy.enumerate_trajectories(policy, cfg)


def gradient_error(policy, cfg, found):
    """Relative error of the expected gradient over all trajectories, against autograd of the exact E[R]; and the ratios."""
    rewards = torch.tensor([toy.reward_of(f[0], policy.V) for f in found], dtype=torch.float64)
    prob = torch.stack([f[2] for f in found])
    want, = torch.autograd.grad((prob * rewards).sum(), policy.table, retain_graph=True)
    traj, adv = toy.as_trajectory(policy, cfg, found), rewards * prob.detach()       # weight of a trajectory = its probability
    loss, ratio = agrpo.policy_loss(policy, traj, agrpo.exact_views(traj, adv, cfg, policy.mask_id, None), adv, cfg)
    got, = torch.autograd.grad(loss, policy.table)
    got = -got * len(found) * cfg.steps                                              # undo the mean over rows and Z = T
    return float((got - want).norm() / want.norm()), ratio


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probabilities_sum_to_one(unmasking, settings):
    _, _, found = case(unmasking, settings)
    assert abs(sum(float(f[2].detach()) for f in found) - 1) < 1e-12


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2], SETTINGS[-1]], ids=str)
def test_sampled_counts_match_the_enumerated_probabilities(unmasking, settings):
    cfg, policy, found = case(unmasking, settings)
    N = 20_000
    prompt = torch.zeros(N, 1, dtype=torch.long)
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(7, i) for i in range(N)])
    counts = {}
    for key in zip(*(map(tuple, x.tolist()) for x in (traj.tokens, traj.reveal_step, traj.rank))):
        counts[key] = counts.get(key, 0) + 1
    expected = {tuple(map(tuple, (f[0], f[1], f[5]))): N * float(f[2].detach()) for f in found}
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
    by_key = {tuple(map(tuple, (f[0], f[1], f[5]))): f for f in found}
    prompt = torch.zeros(64, 1, dtype=torch.long)
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(64)])
    for i in range(64):
        f = by_key[tuple(tuple(x[i].tolist()) for x in (traj.tokens, traj.reveal_step, traj.rank))]
        shown = traj.reveal_step[i] < cfg.steps
        assert torch.allclose(traj.logp[i][shown].exp(), torch.stack(f[3]).double()[shown], atol=1e-12)
        assert int(traj.nfe[i]) == len(f[4])
        total = traj.logp[i].sum() + traj.order_logp[i].sum()                        # Eq. 1 and 6: the law of the trajectory
        if unmasking != "random":                                                    # whose positions cost log C(open, n)
            assert abs(float(total) - math.log(float(f[2].detach()))) < 1e-10


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_expected_gradient_is_autograd_of_the_exact_expected_reward(unmasking, settings):
    for seed in range(20):
        cfg, policy, found = case(unmasking, settings, seed)
        error, ratio = gradient_error(policy, cfg, found)
        assert (ratio - 1).abs().max() < 1e-12
        assert error < 1e-12, f"denoiser {seed}: off by {error:.1e}"


@pytest.mark.parametrize("unmasking", ["low_confidence", "plackett_luce"])
def test_without_the_position_term_the_gradient_is_biased(unmasking):
    """The oracle can fail: tokens only is far off, so agreement above is no accident. It is what --position-term off does."""
    cfg, policy, found = case(unmasking, {})
    error, _ = gradient_error(policy, dataclasses.replace(cfg, position_term="off"), found)
    assert error > 0.3


def problem(N=20_000, T=8, seed=0):
    """N rows of the same sum: horizon, sizes (some of them zero) and f differ by the seed."""
    g = torch.Generator().manual_seed(seed)
    horizon = torch.randint(1, T + 1, (1,), generator=g).expand(N).contiguous()
    entropy, gradient, f = (torch.rand(T, generator=g, dtype=torch.float64) for _ in range(3))
    adv = torch.randn(N, generator=g, dtype=torch.float64)
    gradient = gradient * (torch.rand(T, generator=g) < 0.8)
    return agrpo.Visits(horizon, entropy.expand(N, T).contiguous(), gradient.expand(N, T).contiguous(), adv), f


@pytest.mark.parametrize("rule", agrpo.TIMESTEPS)
@pytest.mark.parametrize("K", [1, 3, 8, 11])
@pytest.mark.parametrize("seed", range(4))
def test_timesteps_estimate_the_sum_without_bias(rule, K, seed):
    visits, f = problem(seed=seed)
    weight = agrpo.TIMESTEPS[rule](visits, K, torch.Generator().manual_seed(seed))
    m = int(visits.horizon[0])
    assert bool((weight[:, m:] == 0).all()) and bool((weight >= 0).all()) and weight.shape == visits.entropy.shape
    estimate, exact = (weight * f).sum(1), float(f[:m].sum())
    if rule.startswith("without_replacement"):
        assert bool(((weight > 0).sum(1) == min(K, m)).all())                        # a pass is paid once, and K are
    if m <= K and ("without" in rule or rule in ("batch_gradient", "independent_gradient")) or rule == "stratified" and m == K:
        assert (estimate - exact).abs().max() < 1e-12                                # all steps drawn: the sum itself
    # batch points are dependent across rows, which only makes the mean tighter than this standard error
    error = float(estimate.std() / math.sqrt(len(estimate)))
    assert abs(float(estimate.mean()) - exact) <= 4 * error + 1e-9, "4 standard errors: 1 false alarm in 16,000"


@pytest.mark.parametrize("points", ["batch", "stratified", "sobol", "iid"])
def test_exactly_unbiased_for_one_draw(points, monkeypatch):
    """With K = 1 the estimate is weight * f(step(u)), u uniform: integrate over u exactly instead of sampling."""
    visits, f = problem(N=1)
    cells = 1_000_000
    u = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    monkeypatch.setitem(agrpo.POINTS, points, lambda N, K, g: u[:, None])
    rule = agrpo.with_replacement(points, "entropy", floor=0.1)
    weight = rule(agrpo.Visits(*(x.expand(cells, *x.shape[1:]) for x in visits)), 1, None)
    assert float((weight.mean(0) - visits.inside.double()).abs().max()) < 1e-4


def test_systematic_sampling_hits_each_column_with_its_probability():
    """Every offset of the comb, not a sample of them: the share of offsets that hit a column is min(1, c size), and the
    number of hits is always the number asked for."""
    size = torch.tensor([[5.0, 0.0, 1.0, 2.0, 0.5, 1.5]], dtype=torch.float64)      # with 3 draws the first is sure
    offsets = (torch.arange(100_000, dtype=torch.float64)[:, None] + 0.5) / 100_000
    many = torch.full((100_000, 1), 3)
    rand, torch.rand = torch.rand, lambda *a, **k: offsets
    try:
        weight = agrpo.systematic(size.expand(100_000, -1), many, None)
    finally:
        torch.rand = rand
    assert torch.allclose((weight > 0).double().mean(0), torch.tensor([1, 0, 0.4, 0.8, 0.2, 0.6]).double(), atol=1e-4)
    assert bool(((weight > 0).sum(1) == 3).all())
    assert torch.allclose(weight.mean(0), torch.tensor([1.0, 0, 1, 1, 1, 1]).double(), atol=1e-4)


def test_the_batch_rule_spends_its_passes_where_the_gradient_is():
    ones = torch.ones(4, 8, dtype=torch.float64)
    visits = agrpo.Visits(torch.full((4,), 8), ones, ones, torch.tensor([0.0, 1, -1, 6], dtype=torch.float64))
    weight = agrpo.TIMESTEPS["batch_gradient"](visits, 2, torch.Generator().manual_seed(0))
    drawn = (weight > 0).sum(1)
    assert int(drawn[0]) == 0 and int(drawn.sum()) == 6 and int(drawn[3]) > int(drawn[1:3].sum())
    none = agrpo.TIMESTEPS["batch_gradient"](visits._replace(adv=torch.zeros(4).double()), 2, torch.Generator())
    assert bool((none == 0).all())                                                   # no advantage anywhere: nothing to do


@pytest.mark.parametrize("rule", agrpo.TIMESTEPS)
def test_weights_are_bounded_but_for_the_papers_rule(rule):
    """Sizes that are nearly zero: m / (floor K) bounds the weights (times mean |A| / |A| over the batch)."""
    visits, _ = problem(N=64)
    visits = visits._replace(entropy=visits.entropy * 0 + 1e-3, gradient=visits.gradient * 0 + 1e-3, horizon=torch.full((64,), 8))
    visits.entropy[:, 0], visits.gradient[:, 0] = 1.0, 1.0
    bound = 8 / 0.1 / 2 * (visits.adv.abs().mean() / visits.adv.abs())[:, None] if rule in ("batch_gradient", "independent_gradient") else 8 / 0.1 / 2
    weights = torch.stack([agrpo.TIMESTEPS[rule](visits, 2, torch.Generator().manual_seed(i)) for i in range(200)])
    assert bool((weights <= torch.clamp(torch.as_tensor(bound), min=1) * 2 * 1.0001).all()) == (rule != "batch_entropy")


def test_the_last_step_is_drawn_and_u_never_reaches_one(monkeypatch):
    ones = torch.ones(1000, 8, dtype=torch.float64)
    visits = agrpo.Visits(torch.full((1000,), 8), ones, ones, ones[:, 0])
    for rule in agrpo.TIMESTEPS.values():
        weight = rule(visits, 4, torch.Generator().manual_seed(0))
        assert bool((weight > 0).any(0).all()) and bool(torch.isfinite(weight).all())
    monkeypatch.setitem(agrpo.POINTS, "iid", lambda N, K, g: torch.ones(N, K, dtype=torch.float64))
    weight = agrpo.TIMESTEPS["iid"](visits, 2, None)
    assert bool((weight[:, 7] > 0).all()) and bool(torch.isfinite(weight).all())


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
    exact = gradient(policy, traj, cfg, agrpo.exact_views(traj, adv, cfg, policy.mask_id, None), adv)
    for micro in (1, 7, 10**9):
        views = agrpo.agrpo_views(traj, adv, cfg, policy.mask_id, torch.Generator().manual_seed(0))
        assert (gradient(policy, traj, cfg, views, adv, micro) - exact).norm() < 1e-12 * exact.norm()


@pytest.mark.parametrize("rule", agrpo.TIMESTEPS)
def test_the_estimated_gradient_averages_to_the_exact_one(rule):
    cfg = dataclasses.replace(BASE, timesteps=rule, mc_steps=2)
    policy, traj = sampled(cfg, N=16)
    adv = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = gradient(policy, traj, cfg, agrpo.exact_views(traj, adv, cfg, policy.mask_id, None), adv)
    along = []
    for i in range(400):
        views = agrpo.agrpo_views(traj, adv, cfg, policy.mask_id, torch.Generator().manual_seed(i))
        along.append(float((gradient(policy, traj, cfg, views, adv) * exact).sum() / exact.norm() ** 2))
    mean, error = torch.tensor(along).mean(), torch.tensor(along).std() / 20
    assert abs(float(mean) - 1) < 4 * float(error) + 1e-12, f"{mean} +- {error}; 4 standard errors: 1 false alarm in 16,000"


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
def test_ratio_is_exactly_one_at_the_first_update(unmasking):
    cfg = dataclasses.replace(BASE, unmasking=unmasking, top_k=2)
    policy, traj = sampled(cfg)
    views = agrpo.exact_views(traj, None, cfg, policy.mask_id, None)
    _, ratio = agrpo.policy_loss(policy, traj, views, torch.ones(64, dtype=torch.float64), cfg)
    assert ratio.numel() == 64 * 3 * (2 if agrpo.UNMASK[unmasking].order_logp else 1) and bool((ratio == 1).all())


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"completion_length": 4, "block_length": 4, "steps": 2}], ids=str)
def test_recorded_sizes_are_those_of_the_gradient_by_the_logits(unmasking, settings):
    """A table denoiser's parameters are its logits: the length recorded of each step is that of its gradient by the table. And the
    entropy recorded of a step is that of the laws of the positions it revealed."""
    cfg = dataclasses.replace(BASE, unmasking=unmasking, **settings)
    policy, traj = sampled(cfg, N=6)
    views, ones = agrpo.exact_views(traj, None, cfg, policy.mask_id, None), torch.ones(6, dtype=torch.float64)
    for k in range(len(views.row)):
        i, t = int(views.row[k]), int(views.step[k])
        state, where = tuple(views.state[k].tolist()), views.target[k].nonzero().flatten().tolist()
        laws = [[float(x.detach()) for x in toy.law(policy.of(state)[j], cfg)] for j in where]
        assert abs(float(traj.entropy[i, t]) + sum(p * math.log(p) for law in laws for p in law if p > 0)) < 1e-12
        if unmasking != "plackett_luce":                                             # whose positions and tokens share logits
            loss, _ = agrpo.policy_loss(policy, traj, views.select(slice(k, k + 1)), ones, cfg)
            size = float(torch.autograd.grad(loss, policy.table)[0].norm()) * 6 * cfg.steps
            assert abs(size - float(traj.gradient[i, t].sqrt())) < 1e-10
    seen = agrpo.visits_of(traj, ones, traj.nfe)
    assert torch.equal(seen.entropy, traj.entropy) and torch.equal(seen.gradient, traj.gradient.sqrt())


def test_the_papers_normalizer_counts_steps_up_to_the_last_token_that_is_no_end():
    when = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2], [0, 1, 2, 3]])
    tokens = torch.tensor([[0, 1, 2, 2], [2, 0, 1, 0], [2, 2, 2, 2]])                # 2 is the end
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    traj = agrpo.Trajectory(tokens[:, :0], tokens[:, :0], tokens, when, when * 0, zeros, zeros, zeros, zeros, None,
                            torch.full((3,), 4), 2)
    cfg = dataclasses.replace(BASE, completion_length=4, steps=4)
    row, target = torch.arange(3), when < 2
    for name, horizon, Z in (("last_step", [2, 3, 1], [2, 3, 1]), ("steps", [4, 4, 4], [4, 4, 4]), ("length", [4, 4, 4], [3, 1, 1]),
                             ("state_tokens", [4, 4, 4], [2, 2, 2]), ("batch_tokens", [4, 4, 4], [4, 4, 4])):
        assert agrpo.NORMALIZERS[name].horizon(traj).tolist() == horizon
        assert agrpo.NORMALIZERS[name].divisor(traj, cfg, row, target).tolist() == Z


def enumerated_logps(policy, cfg, traj, i):
    """Token log-probs {position: log p} and position log-probs [per step] of row i of a trajectory, from the toy's own laws."""
    tokens, when, rank = (x[i].tolist() for x in (traj.tokens, traj.reveal_step, traj.rank))
    token_logp, order_logp = {}, []
    for t in range(int(traj.nfe[i])):
        state = tuple(policy.mask_id if w >= t else v for v, w in zip(tokens, when))
        drawn = sorted((j for j in range(len(tokens)) if when[j] == t), key=lambda j: rank[j])
        of = {j: float(toy.law(policy.of(state)[j], cfg)[tokens[j]].detach()) for j in drawn}
        token_logp |= {j: math.log(p) for j, p in of.items()}
        if cfg.unmasking in ("low_confidence", "plackett_luce"):
            same = (lambda picks: picks) if cfg.unmasking == "plackett_luce" else (lambda picks: tuple(sorted(picks)))
            branches = {same(picks): prob for picks, (prob, _) in toy.branches_of(policy, cfg, state).items()}
            prob = branches.get(same(tuple((j, tokens[j]) for j in drawn)), torch.tensor(0.0))
            order_logp.append(math.log(float(prob.detach()) / math.prod(of.values())) if float(prob.detach()) else -math.inf)
        else:
            order_logp.append(None)
    return token_logp, order_logp


@pytest.mark.parametrize("position_term", ["on", "off"])
@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
def test_after_an_update_tokens_are_clipped_one_by_one_and_the_choice_of_positions_once(unmasking, position_term):
    """Eq. 3, 4, 6 under parameters other than the rollout's, where ratios differ from 1, against sums written out here."""
    cfg = dataclasses.replace(BASE, unmasking=unmasking, completion_length=4, block_length=4, steps=2, position_term=position_term)
    policy, traj = sampled(cfg, N=24)
    old = [enumerated_logps(policy, cfg, traj, i) for i in range(24)]
    with torch.no_grad():
        policy.table.add_(4.0 * torch.randn(policy.table.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    adv = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    views = agrpo.exact_views(traj, adv, cfg, policy.mask_id, None)
    loss, _ = agrpo.policy_loss(policy, traj, views, adv, cfg)
    want, clipped, gone = 0.0, 0, 0
    for i, a in enumerate(adv.tolist()):
        new = enumerated_logps(policy, cfg, traj, i)
        terms = [new[0][j] - old[i][0][j] for j in new[0]]
        if position_term == "on":
            terms += [n - o for n, o in zip(new[1], old[i][1]) if o is not None]
        for log_ratio in terms:
            ratio = math.exp(log_ratio)
            want -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a) / 2 / 24           # Z = T = 2, mean over 24 rows
            clipped, gone = clipped + (abs(ratio - 1) > 0.2), gone + (ratio == 0)
    assert abs(float(loss.detach()) - want) < 1e-12 * max(1, abs(want)) and clipped > 10
    if unmasking == "low_confidence" and position_term == "on":
        assert gone > 0                                                              # steps the new parameters would never take
        assert bool(torch.isfinite(torch.autograd.grad(loss, policy.table)[0]).all())


BOTH = torch.tensor([0, 0]), torch.tensor([0, 1])                                    # one row, two open positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_law_of_losing_stays_finite_when_nothing_or_everything_loses(dtype):
    def order_logp(winner, loser):
        """Position 0 revealed token 0; logits of both -> log-probability of the choice, and its gradient."""
        logits = torch.tensor([winner, loser], dtype=dtype).requires_grad_()
        cfg = dataclasses.replace(BASE, temperature=1.0)
        out, size = agrpo.losing_logp(agrpo.Law(logits, cfg), torch.tensor([0, 1]), BOTH, torch.tensor([[0, -1]]), torch.tensor([1]), cfg)
        found = torch.autograd.grad(out.sum(), logits, retain_graph=True)[0]
        assert torch.allclose(size, found.square().sum(1), atol=1e-5 if dtype == torch.float32 else 1e-12)
        return float(out.detach()), torch.autograd.grad(out.sum(), logits)[0]

    nothing, gradient = order_logp([-50.0, 0.0, 0.0], [0.0, 0.0, 0.0])               # every candidate would have won
    assert nothing == agrpo.LOG_ZERO and bool((gradient == 0).all())
    everything, gradient = order_logp([50.0, 0.0, 0.0], [0.0, 0.1, 0.2])
    assert abs(everything) < 1e-6 and gradient.abs().max() < 1e-6
    for gap in (10.0, 40.0, 80.0, 200.0):                                            # all but a sliver loses, or only a sliver
        few, gradient = order_logp([3.0, 0.0, 0.0], [gap, 0.0, 0.0])
        assert abs(few - (math.log(2) - gap)) < 1e-3 * gap and bool(torch.isfinite(gradient).all()) and gradient[1, 0] < -0.99
        most, gradient = order_logp([gap, 0.0, -gap], [2 * gap, 0.0, 0.0])
        assert bool(torch.isfinite(gradient).all()) and math.isfinite(most)
    with_mask = torch.tensor([[1.0, 0.0, -math.inf], [0.5, 0.2, -math.inf]], dtype=dtype).requires_grad_()     # MASK's column
    for rule in ("low_confidence", "plackett_luce"):
        for score in agrpo.ORDER_SCORE:
            cfg = dataclasses.replace(BASE, order_score=score)
            out, _ = agrpo.UNMASK[rule].order_logp(agrpo.Law(with_mask, cfg), torch.tensor([0, 1]), BOTH, torch.tensor([[0, -1]]), torch.tensor([1]), cfg)
            assert bool(torch.isfinite(torch.autograd.grad(out.sum(), with_mask)[0]).all())


@pytest.mark.parametrize("unmasking, knob", [("threshold", "threshold"), ("entropy_bound", "entropy_bound")])
def test_rules_that_reveal_a_varying_number_take_fewer_steps_and_never_more_than_T(unmasking, knob):
    def nfe(value, steps=4):
        cfg = dataclasses.replace(BASE, unmasking=unmasking, completion_length=4, block_length=4, steps=steps, **{knob: value})
        policy, traj = sampled(cfg, N=200)
        assert int(traj.nfe.max()) <= steps and bool((traj.tokens != policy.mask_id).all())
        for i in range(200):                                                         # steps are numbered without a gap
            assert sorted(set(traj.reveal_step[i].tolist())) == list(range(int(traj.nfe[i])))
        return float(traj.nfe.double().mean())

    strict, middle, loose = (1.0, 0.5, 0.3) if unmasking == "threshold" else (0.0, 0.5, 10.0)
    assert nfe(strict) == 4 > nfe(middle) > nfe(loose) == 1
    assert nfe(strict, steps=2) == 2                                                 # at least C/T a step


def test_states_are_rebuilt_as_they_were_visited():
    cfg = dataclasses.replace(BASE, completion_length=4, block_length=2, steps=4)
    policy, seen = toy.TableDenoiser(4), []
    inner = policy.logits
    policy.logits = lambda p, m, state, where, **_: seen.append(state.clone()) or inner(p, m, state, where)
    prompt = torch.zeros(8, 1, dtype=torch.long)
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(8)])
    for t, state in enumerate(seen):
        rebuilt, target = agrpo.state_at(traj, torch.arange(8), torch.full((8,), t), policy.mask_id)
        assert torch.equal(rebuilt, state.expand(8, 4)) and bool((target.sum(1) == 1).all())      # the first is computed once for all rows


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


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
def test_ties_go_to_the_leftmost_position_and_keep_the_law_exact(unmasking):
    cfg = dataclasses.replace(BASE, unmasking=unmasking)
    policy = toy.TableDenoiser(3)
    with torch.no_grad():
        policy.table.copy_(policy.table.sign())                                      # many equal confidences
    found = toy.enumerate_trajectories(policy, cfg)
    assert abs(sum(float(f[2].detach()) for f in found) - 1) < 1e-12
    assert gradient_error(policy, cfg, found)[0] < 1e-10
    assert agrpo.choose(torch.tensor([1.0, 1.0, 1.0]), torch.ones(1, 3, dtype=torch.bool), 2).tolist() == [[0, 1, -1]]


def test_top_p_keeps_the_token_that_crosses_p_and_survives_huge_logits():
    cfg = dataclasses.replace(BASE, temperature=1.0, top_k=4, top_p=0.7)
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log() + 5000.0
    law = agrpo.Law(logits, cfg)
    assert torch.allclose(law.p, torch.tensor([[0.625, 0.375, 0, 0]]).double()) and law.support.tolist() == [[0, 1, 4, 4]]
    assert abs(float(law.logp(torch.tensor([1])).exp()) - 0.375) < 1e-12
    again = agrpo.Law(logits, dataclasses.replace(cfg, top_p=0.1), law.support)
    assert torch.equal(again.p, law.p)                                               # a given support is used as it is


@pytest.mark.parametrize("V", [5, 1023, 1024, 5000])
def test_a_draw_inverts_the_cumulative_distribution(V):
    logits = torch.randn(200, V, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, [0, V // 2, V - 1]] = -math.inf                                        # no token to draw, first, last or between
    u = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    law = agrpo.Law(logits, dataclasses.replace(BASE, temperature=1.0))
    upto = law.p.double().cumsum(1)
    token = law.draw(u)
    assert bool((law.p.gather(1, token[:, None]) > 0).all())
    u = u.clamp(max=1 - 2**-50)
    want = torch.searchsorted(upto, (u * upto[:, -1])[:, None], right=True).squeeze(1)
    assert int((token != want).sum()) <= 1                                           # but for the last bit


def test_log_sum_exp_has_the_value_and_the_gradient_of_the_library():
    z = torch.randn(20, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        z[:, 7] = -math.inf
    weight = torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, p = agrpo.LogSumExp.apply(z)
    assert (value - z.logsumexp(-1)).abs().max() < 1e-12 and not p.requires_grad
    got, want = (torch.autograd.grad((weight * x).sum(), z)[0] for x in (value, z.logsumexp(-1)))
    assert (got - want).abs().max() < 1e-14


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
    adv = torch.ones(32, dtype=torch.float64)
    views = agrpo.agrpo_views(traj, adv, cfg, policy.mask_id, torch.Generator().manual_seed(0))
    loss, _ = agrpo.policy_loss(policy, traj, views, adv, cfg)
    assert bool(torch.isfinite(loss)) and int(traj.last_step[ended].max()) == 0
