"""Protects the mathematics: sampler, estimator and gradient against full enumeration of a toy.
Run: pytest tests/test_exact.py"""
import dataclasses
import math
from types import SimpleNamespace

import pytest
import toy
import torch
from methods import samplers
from toy import blank, loss_of

import agrpo
from methods.models import settle
from rewards import BadInput

BASE = toy.Settings(completion_length=3, block_length=3, steps=3, temperature=0.7, clip=0.2,
                    tau_pos=0.7, threshold=0.5, entropy_bound=0.6)  # so that the numbers vary
SETTINGS = [                           # what to enumerate, for every row of UNMASK
    {},
    {"top_k": 2, "order_score": "neg_entropy"},
    {"top_k": 3, "top_p": 0.85},
    {"completion_length": 4, "block_length": 4, "steps": 2},   # two positions a step
    {"completion_length": 4, "block_length": 4, "steps": 2, "top_k": 2, "V": 3},
    {"completion_length": 4, "block_length": 2, "steps": 4},   # two blocks
    {"completion_length": 4, "block_length": 2, "steps": 4, "top_k": 2, "temperature": 1.6, "V": 3},
    {"completion_length": 4, "block_length": 2, "steps": 4, "eos": True},  # may end after the first
    {"completion_length": 4, "block_length": 2, "steps": 4, "eos": True, "turn": 0, "V": 3},
]


def change(**settings):
    return dataclasses.replace(BASE, **settings)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def case(unmasking, settings, seed=0):
    settings = dict(settings)
    eos, V, turn = settings.pop("eos", False), settings.pop("V", 0), settings.pop("turn", None)
    cfg = change(unmasking=unmasking, **settings)
    V = V or (3 if cfg.completion_length == 3 else 2)
    policy = toy.TableDenoiser(cfg.completion_length, V=V, seed=seed, eos=eos)
    policy.turn_id = policy.eos_id if turn is None else turn
    return cfg, policy, toy.enumerate_trajectories(policy, cfg)


def total(found):
    return sum(float(f[2].detach()) for f in found)


def exact(policy, traj, cfg):
    return agrpo.exact_views(traj, None, cfg, policy.mask_id, None)


def gradient_error(policy, cfg, found):
    """Relative error of the expected gradient over all trajectories, against autograd of the exact
    E[R]; and the ratios."""
    rewards = torch.tensor([toy.reward_of(f[0], policy.V) for f in found], dtype=torch.float64)
    prob = torch.stack([f[2] for f in found])
    want, = torch.autograd.grad((prob * rewards).sum(), policy.table, retain_graph=True)
    traj = toy.as_trajectory(policy, cfg, found)
    adv = rewards * prob.detach()      # the weight of a trajectory is its probability
    loss, ratio = loss_of(policy, traj, exact(policy, traj, cfg), adv, cfg)
    got, = torch.autograd.grad(loss, policy.table)
    got = -got * len(found) * cfg.steps                        # undo the mean over rows and Z = T
    return float((got - want).norm() / want.norm()), ratio


# ------------------------------------------------------------------------ sampler and gradient
@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_recorded_log_probs_are_those_of_the_enumeration(unmasking, settings):
    cfg, policy, found = case(unmasking, settings)
    assert abs(total(found) - 1) < 1e-12
    by_key = {toy.key_of(f): f for f in found}
    traj = agrpo.rollout(policy, *blank(64), cfg, [(i,) for i in range(64)])
    for i, key in enumerate(toy.keys_of(traj)):
        f, shown = by_key[key], traj.reveal_step[i] < cfg.steps
        of_tokens = torch.stack(f[3]).double()
        assert torch.allclose(traj.logp[i][shown].exp(), of_tokens[shown], atol=1e-12)
        assert int(traj.nfe[i]) == len(f[4])
        if unmasking != "random":      # whose positions cost log C(open, n)
            logp = float(traj.logp[i].sum() + traj.order_logp[i].sum())        # Eq. 1 and 6
            assert abs(logp - math.log(float(f[2].detach()))) < 1e-10


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2], SETTINGS[-1]], ids=str)
def test_sampled_counts_match_the_enumerated_probabilities(unmasking, settings):
    cfg, policy, found = case(unmasking, settings)
    N, counts = 20_000, {}
    for key in toy.keys_of(agrpo.rollout(policy, *blank(N), cfg, [(7, i) for i in range(N)])):
        counts[key] = counts.get(key, 0) + 1
    expected = {toy.key_of(f): N * float(f[2].detach()) for f in found}
    assert set(counts) <= set(expected)
    likely = {k: e for k, e in expected.items() if e >= 5}
    rest = N - sum(likely.values())
    chi2 = sum((counts.get(k, 0) - e) ** 2 / e for k, e in likely.items())
    if rest >= 5:
        chi2 += (N - sum(counts.get(k, 0) for k in likely) - rest) ** 2 / rest
    freedom = len(likely)
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), (
        f"chi-square {chi2:.0f} of {freedom}; a false alarm is one in 10^5")


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
    """The oracle can fail: tokens only is far off, so agreement above is no accident. It is what
    --position-term off does."""
    cfg, policy, found = case(unmasking, {})
    error, _ = gradient_error(policy, dataclasses.replace(cfg, position_term="off"), found)
    assert error > 0.3


@pytest.mark.parametrize("unmasking, C, steps", [
    *((rule, 3, 3) for rule in agrpo.UNMASK), ("low_confidence", 4, 2)])   # 2 winners may be equal
def test_ties_go_to_the_leftmost_position_and_keep_the_law_exact(unmasking, C, steps):
    cfg = change(unmasking=unmasking, completion_length=C, block_length=C, steps=steps)
    policy = toy.TableDenoiser(C, seed=5 * (C == 4))           # of two such winners and a loser
    with torch.no_grad():
        policy.table.copy_(policy.table.sign())                # many equal confidences
    found = toy.enumerate_trajectories(policy, cfg)
    assert abs(total(found) - 1) < 1e-12
    assert gradient_error(policy, cfg, found)[0] < 1e-10
    open_, equal = torch.ones(1, 3, dtype=torch.bool), torch.ones(3)
    rank = agrpo.choose(agrpo.UNMASK["random"], equal, open_, torch.zeros(1).long(), 2, cfg)
    assert rank.tolist() == [[0, 1, -1]]


# ------------------------------------------------------------------------------- the time steps
def problem(N=20_000, T=8, seed=0):
    """N rows of the same sum over the first m of T steps: m, the sizes (some of them zero) and f
    differ by the seed. -> what a row of TIMESTEPS is given, m, f."""
    g = seeded(seed)
    m = int(torch.randint(1, T + 1, (1,), generator=g))
    entropy, gradient, f = (torch.rand(T, generator=g, dtype=torch.float64) for _ in range(3))
    adv = torch.randn(N, generator=g, dtype=torch.float64)
    gradient = gradient * (torch.rand(T, generator=g) < 0.8)
    traj = SimpleNamespace(entropy=entropy.repeat(N, 1), gradient=gradient.square().repeat(N, 1))
    return (traj, (torch.arange(T) < m).repeat(N, 1), adv), m, f


def even(N, T, adv=None, size=1.0):
    """N rows of T steps of one size."""
    sizes = torch.full((N, T), size, dtype=torch.float64)
    adv = torch.ones(N, dtype=torch.float64) if adv is None else torch.tensor(adv).double()
    return SimpleNamespace(entropy=sizes, gradient=sizes**2), sizes > 0, adv


@pytest.mark.parametrize("rule", agrpo.TIMESTEPS)
@pytest.mark.parametrize("K", [1, 3, 8, 11])
@pytest.mark.parametrize("seed", range(4))
def test_timesteps_estimate_the_sum_without_bias(rule, K, seed):
    given, m, f = problem(5_000 if rule == "sobol" else 20_000, seed=seed)     # it takes its time
    weight = agrpo.TIMESTEPS[rule](*given, K, seeded(seed))
    assert (weight[:, m:] == 0).all() and (weight >= 0).all() and weight.shape == given[1].shape
    estimate, want = (weight * f).sum(1), float(f[:m].sum())
    if rule.startswith("without_replacement"):
        assert ((weight > 0).sum(1) == min(K, m)).all()        # a pass is paid once, and K are
    once = rule.startswith("without") or rule in ("batch_gradient", "independent_gradient")
    if m <= K and once or rule == "stratified" and m == K:
        assert (estimate - want).abs().max() < 1e-12           # all steps drawn: the sum itself
    # batch points depend on each other, which only makes the mean tighter than this
    error = float(estimate.std() / math.sqrt(len(estimate)))
    assert abs(float(estimate.mean()) - want) <= 4 * error + 1e-9, (
        "4 standard errors: 1 false alarm in 16,000")


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_exactly_unbiased_for_one_draw(floor):
    """With K = 1 the estimate is weight * f(step(u)), u uniform: integrate over u exactly instead
    of sampling."""
    (traj, inside, _), _, _ = problem(N=1)
    cells = 1_000_000
    u = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    p = agrpo.proposal(traj.entropy, inside, floor).expand(cells, -1)
    weight = agrpo.invert(p, u[:, None])
    assert float((weight.mean(0) - inside.double()).abs().max()) < 1e-4


@pytest.mark.parametrize("rule", ["low_discrepancy", "batch", "stratified", "sobol"])
def test_points_lie_evenly_over_the_batch_or_over_every_row(rule):
    """A step for each cell: 8 rows of 4 draws over 32 equal steps hit each of them once in the
    batch; over 4 steps, each of them once a row."""
    over_batch = rule in ("low_discrepancy", "batch")
    T = 32 if over_batch else 4
    for seed in range(5):
        drawn = agrpo.TIMESTEPS[rule](*even(8, T), 4, seeded(seed)) > 0
        assert (drawn.sum(0) == 1).all() if over_batch else drawn.all()


def test_systematic_sampling_hits_each_column_with_its_probability(monkeypatch):
    """Every offset of the comb, not a sample of them: the share of offsets that hit a column is
    min(1, c size), and the number of hits is always the number asked for."""
    size = torch.tensor([[5.0, 0.0, 1.0, 2.0, 0.5, 1.5]], dtype=torch.float64)   # the first is sure
    n = 100_000
    offsets = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    monkeypatch.setattr(torch, "rand", lambda *shape, **rest: offsets)
    weight = agrpo.systematic(size.expand(n, -1), torch.full((n, 1), 3), None)
    share = torch.tensor([1, 0, 0.4, 0.8, 0.2, 0.6]).double()
    assert torch.allclose((weight > 0).double().mean(0), share, atol=1e-4)
    assert ((weight > 0).sum(1) == 3).all()
    assert torch.allclose(weight.mean(0), (share > 0).double(), atol=1e-4)


def test_the_batch_rule_spends_its_passes_where_the_gradient_is():
    rule = agrpo.TIMESTEPS["batch_gradient"]
    weight = rule(*even(4, 8, [0.0, 1, -1, 6]), 2, seeded(0))
    drawn = (weight > 0).sum(1)
    assert drawn[0] == 0 and drawn.sum() == 6 and drawn[3] > drawn[1:3].sum()
    none = rule(*even(4, 8, [0.0] * 4), 2, torch.Generator())
    assert (none == 0).all()           # no advantage anywhere: nothing to do


@pytest.mark.parametrize("rule", agrpo.TIMESTEPS)
def test_tensors_that_share_memory_are_as_good_as_their_copies(rule):
    """What a rollout or a rule of one's own hands over may be expanded: it has no rows of its own
    to view in another shape."""
    copies, inside, adv = even(6, 8)
    expanded = SimpleNamespace(entropy=torch.ones(1).double().expand(6, 8),
                               gradient=torch.ones(1).double().expand(6, 8))
    now = agrpo.TIMESTEPS[rule](expanded, inside[:1].expand(6, 8), adv[:1].expand(6), 2, seeded(0))
    assert torch.equal(now, agrpo.TIMESTEPS[rule](copies, inside, adv, 2, seeded(0)))


@pytest.mark.parametrize("rule", agrpo.TIMESTEPS)
def test_weights_are_bounded_but_for_the_papers_rule(rule):
    """Sizes that are nearly zero: m / (floor K) bounds the weights (times mean |A| / |A| over the
    batch)."""
    adv = problem(N=64)[0][2]
    traj, inside, adv = even(64, 8, adv.tolist(), size=1e-3)
    traj.entropy[:, 0], traj.gradient[:, 0] = 1.0, 1.0
    bound = torch.full((64, 1), 8 / 0.1 / 2, dtype=torch.float64)
    if rule in ("batch_gradient", "independent_gradient"):
        bound = bound * (adv.abs().mean() / adv.abs())[:, None]
    weights = torch.stack([agrpo.TIMESTEPS[rule](traj, inside, adv, 2, seeded(i))
                           for i in range(200)])
    bounded = bool((weights <= bound.clamp(min=1) * 2 * 1.0001).all())
    assert bounded == (rule != "low_discrepancy")


def test_the_last_step_is_drawn_and_u_never_reaches_one():
    for rule in agrpo.TIMESTEPS.values():
        weight = rule(*even(1000, 8), 4, seeded(0))
        assert (weight > 0).any(0).all() and weight.isfinite().all()
    for m in (8, 5):                   # the last that counts, not one behind it
        p = (torch.arange(8) < m).double().expand(3, 8) / m
        weight = agrpo.invert(p, torch.ones(3, 2, dtype=torch.float64))
        assert (weight[:, m - 1] > 0).all() and (weight > 0).sum() == 3 and weight.isfinite().all()


# --------------------------------------------------------------- from draws to the policy's loss
def sampled(cfg, N=64, eos=False, seed=0):
    policy = toy.TableDenoiser(cfg.completion_length, seed=seed, eos=eos)
    return policy, agrpo.rollout(policy, *blank(N), cfg, [(seed, i) for i in range(N)])


def gradient(policy, traj, cfg, views, adv, micro=10**9):
    policy.table.grad = None
    views = agrpo.prepare(policy, traj, views, adv[:, None], cfg)
    for part in torch.arange(len(views.row)).split(micro):
        agrpo.policy_loss(policy, traj, views.select(part), cfg)[0].backward()
    return policy.table.grad.clone()


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("normalizer", agrpo.NORMALIZERS)
def test_all_steps_without_replacement_give_the_exact_gradient(unmasking, normalizer):
    cfg = change(unmasking=unmasking, normalizer=normalizer, timesteps="without_replacement",
                 mc_steps=3)
    policy, traj = sampled(cfg, eos=True)
    adv = normal(64)
    want = gradient(policy, traj, cfg, exact(policy, traj, cfg), adv)
    for micro in (1, 7, 10**9):
        views = agrpo.agrpo_views(traj, adv, cfg, policy.mask_id, seeded(0))
        got = gradient(policy, traj, cfg, views, adv, micro)
        assert (got - want).norm() < 1e-12 * want.norm()


@pytest.mark.parametrize("rule", agrpo.TIMESTEPS)
def test_the_estimated_gradient_averages_to_the_exact_one(rule):
    cfg = change(timesteps=rule, mc_steps=2)
    policy, traj = sampled(cfg, N=64)
    adv, along = normal(64), []
    want = gradient(policy, traj, cfg, exact(policy, traj, cfg), adv)
    for i in range(100):
        views = agrpo.agrpo_views(traj, adv, cfg, policy.mask_id, seeded(i))
        got = gradient(policy, traj, cfg, views, adv)
        along.append(float((got * want).sum() / want.norm() ** 2))
    mean, error = torch.tensor(along).mean(), torch.tensor(along).std() / 10
    assert abs(float(mean) - 1) < 4 * float(error) + 1e-12, (
        f"{mean} +- {error}; 4 standard errors: 1 false alarm in 16,000")


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
def test_ratio_is_exactly_one_at_the_first_update(unmasking):
    cfg = change(unmasking=unmasking, top_k=2)
    policy, traj = sampled(cfg)
    _, ratio = loss_of(policy, traj, exact(policy, traj, cfg), torch.ones(64).double(), cfg)
    kinds = 2 if agrpo.UNMASK[unmasking].order_logp else 1     # tokens, choices of positions
    assert ratio.numel() == 64 * 3 * kinds and (ratio == 1).all()


@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("settings", [
    {}, {"top_k": 2}, {"completion_length": 4, "block_length": 4, "steps": 2}], ids=str)
def test_recorded_sizes_are_those_of_the_gradient_by_the_logits(unmasking, settings):
    """A table denoiser's parameters are its logits: the length recorded of each step is that of its
    gradient by the table. And the entropy recorded of a step is that of the laws of the positions
    it revealed."""
    cfg = change(unmasking=unmasking, **settings)
    policy, traj = sampled(cfg, N=6)
    views, one = exact(policy, traj, cfg), torch.ones(6, dtype=torch.float64)
    for k, (i, t) in enumerate(zip(views.row.tolist(), views.step.tolist())):
        z, where = policy.of(tuple(views.state[k].tolist())), views.target[k].nonzero()[:, 0]
        laws = [[float(x.detach()) for x in toy.law(z[j], cfg)] for j in where.tolist()]
        entropy = -sum(p * math.log(p) for law in laws for p in law if p > 0)
        assert abs(float(traj.entropy[i, t]) - entropy) < 1e-12
        if unmasking != "plackett_luce":                       # tokens and order share logits
            loss, _ = loss_of(policy, traj, views.select(slice(k, k + 1)), one, cfg)
            size = float(torch.autograd.grad(loss, policy.table)[0].norm()) * 6 * cfg.steps
            assert abs(size - float(traj.gradient[i, t].sqrt())) < 1e-10


def test_the_papers_normalizer_counts_steps_up_to_the_last_token_that_is_no_end():
    when = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2], [0, 1, 2, 3]])
    tokens = torch.tensor([[0, 1, 2, 2], [2, 0, 1, 0], [2, 2, 2, 2]])          # 2 is the end
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    traj = agrpo.Trajectory(tokens[:, :0], tokens[:, :0], tokens, when, when * 0, zeros, zeros,
                            zeros, zeros, torch.full((3,), 4), 2)
    row, target = torch.arange(3), when < 2
    for name, horizon, Z in (("last_step", [2, 3, 1], [2, 3, 1]), ("steps", [4, 4, 4], [4, 4, 4]),
                             ("length", [4, 4, 4], [3, 1, 1]),
                             ("state_tokens", [4, 4, 4], [2, 2, 2]),
                             ("batch_tokens", [4, 4, 4], [4, 4, 4])):
        cfg = change(completion_length=4, steps=4, normalizer=name)
        assert agrpo.steps_inside(traj, cfg).sum(1).tolist() == horizon
        assert agrpo.NORMALIZERS[name](traj, cfg, row, target).tolist() == Z


def enumerated_logps(policy, cfg, traj, i):
    """Token log-probs {position: log p} and position log-probs [per step] of row i of a trajectory,
    from the toy's own laws."""
    tokens, when, rank = (x[i].tolist() for x in (traj.tokens, traj.reveal_step, traj.rank))
    ordered = cfg.unmasking == "plackett_luce"
    token_logp, order_logp = {}, []

    def as_key(picks):
        return tuple(picks) if ordered else tuple(sorted(picks))
    for t in range(int(traj.nfe[i])):
        state = tuple(policy.mask_id if w >= t else v for v, w in zip(tokens, when))
        drawn = sorted((j for j in range(len(tokens)) if when[j] == t), key=lambda j: rank[j])
        of = {j: float(toy.law(policy.of(state)[j], cfg)[tokens[j]].detach()) for j in drawn}
        token_logp |= {j: math.log(p) for j, p in of.items()}
        if cfg.unmasking not in ("low_confidence", "plackett_luce"):
            order_logp.append(None)
            continue
        branches = toy.branches_of(policy, cfg, state)
        branches = {as_key(picks): float(prob.detach()) for picks, (prob, _) in branches.items()}
        prob = branches.get(as_key((j, tokens[j]) for j in drawn), 0.0)
        order_logp.append(math.log(prob / math.prod(of.values())) if prob else -math.inf)
    return token_logp, order_logp


@pytest.mark.parametrize("position_term", ["on", "off"])
@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
def test_after_an_update_tokens_are_clipped_one_by_one_and_the_choice_of_positions_once(
        unmasking, position_term):
    """Eq. 3, 4, 6 under parameters other than the rollout's, where ratios differ from 1, against
    sums written out here."""
    cfg = change(unmasking=unmasking, completion_length=4, block_length=4, steps=2,
                 position_term=position_term, clip_high=0.7)
    policy, traj = sampled(cfg, N=24)
    old = [enumerated_logps(policy, cfg, traj, i) for i in range(24)]
    with torch.no_grad():
        policy.table.add_(4.0 * normal(*policy.table.shape, seed=3))
    adv, want, clipped, gone = normal(24), 0.0, 0, 0
    loss, _ = loss_of(policy, traj, exact(policy, traj, cfg), adv, cfg)
    for i, a in enumerate(adv.tolist()):
        new = enumerated_logps(policy, cfg, traj, i)
        terms = [new[0][j] - old[i][0][j] for j in new[0]]
        if position_term == "on":
            terms += [n - o for n, o in zip(new[1], old[i][1]) if o is not None]
        for log_ratio in terms:
            lost = log_ratio == -math.inf      # what the new law cannot do carries no ratio
            ratio = 1.0 if lost else math.exp(log_ratio)
            gain = min(ratio * a, min(max(ratio, 0.8), 1.7) * a)
            want -= gain / 2 / 24      # Z = T = 2, mean over 24 rows
            clipped, gone = clipped + (abs(ratio - 1) > 0.2), gone + lost
    assert abs(float(loss.detach()) - want) < 1e-12 * max(1, abs(want)) and clipped > 10
    if unmasking == "low_confidence" and position_term == "on":
        assert gone > 0                # steps that the new parameters would never take
        assert torch.autograd.grad(loss, policy.table)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_law_of_losing_stays_finite_when_nothing_or_everything_loses(dtype):
    at, rank, token = (torch.tensor([0, 0]), torch.tensor([0, 1])), torch.tensor([[0, -1]]), [0, 1]
    cfg, tolerance = change(temperature=1.0), 1e-5 if dtype == torch.float32 else 1e-12

    def order_logp(winner, loser):
        """Of one row two open positions, the first revealed token 0; logits of both -> the
        log-probability of the choice, and its gradient."""
        logits = torch.tensor([winner, loser], dtype=dtype).requires_grad_()
        law = agrpo.Law(logits, cfg)
        out, size = agrpo.losing_logp(law, torch.tensor(token), at, rank, cfg)
        found, = torch.autograd.grad(out.sum(), logits)
        assert torch.allclose(size, found.square().sum(1), atol=tolerance)
        return float(out.detach()), found

    nothing, found = order_logp([-50.0, 0.0, 0.0], [0.0, 0.0, 0.0])    # every candidate would win
    assert nothing == agrpo.LOG_ZERO and (found == 0).all()
    everything, found = order_logp([50.0, 0.0, 0.0], [0.0, 0.1, 0.2])
    assert abs(everything) < 1e-6 and found.abs().max() < 1e-6
    for gap in (10.0, 40.0, 80.0, 200.0):      # all but a sliver loses, or only a sliver
        few, found = order_logp([3.0, 0.0, 0.0], [gap, 0.0, 0.0])
        assert abs(few - (math.log(2) - gap)) < 1e-3 * gap
        assert found.isfinite().all() and found[1, 0] < -0.99
        most, found = order_logp([gap, 0.0, -gap], [2 * gap, 0.0, 0.0])
        assert found.isfinite().all() and math.isfinite(most)
    for rule in ("low_confidence", "plackett_luce"):
        for score in samplers.ORDER_SCORE:
            logits = torch.tensor([[1.0, 0.0, -math.inf], [0.5, 0.2, -math.inf]], dtype=dtype)
            law = agrpo.Law(logits.requires_grad_(), cfg)      # with MASK's column
            out, _ = agrpo.UNMASK[rule].order_logp(law, torch.tensor(token), at, rank,
                                                   dataclasses.replace(cfg, order_score=score))
            assert torch.autograd.grad(out.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("unmasking", ["threshold", "entropy_bound"])
def test_rules_that_reveal_a_varying_number_take_fewer_steps_and_never_more_than_T(unmasking):
    def nfe(value, steps=4):
        cfg = change(unmasking=unmasking, completion_length=4, block_length=4, steps=steps,
                     **{unmasking: value})                     # the knob has the rule's name
        policy, traj = sampled(cfg, N=200)
        assert int(traj.nfe.max()) <= steps and (traj.tokens != policy.mask_id).all()
        for i in range(200):           # steps are numbered without a gap
            assert sorted(set(traj.reveal_step[i].tolist())) == list(range(int(traj.nfe[i])))
        return float(traj.nfe.double().mean())

    strict, middle, loose = (1.0, 0.5, 0.3) if unmasking == "threshold" else (0.0, 0.5, 10.0)
    assert nfe(strict) == 4 > nfe(middle) > nfe(loose) == 1
    assert nfe(strict, steps=2) == 2   # at least C/T a step


def test_states_are_rebuilt_as_they_were_visited():
    cfg = change(completion_length=4, block_length=2, steps=4)
    policy, seen = toy.TableDenoiser(4), []
    inner = policy.logits

    def logits(prompt, prompt_mask, state, where):
        seen.append(state.clone())
        return inner(prompt, prompt_mask, state, where)
    policy.logits = logits
    traj = agrpo.rollout(policy, *blank(8), cfg, list(range(8)))
    assert len(seen) == 4
    for t, state in enumerate(seen):
        step = torch.full((8,), t)
        rebuilt, target = agrpo.state_at(traj, torch.arange(8), step, policy.mask_id)
        assert torch.equal(rebuilt, state) and (target.sum(1) == 1).all()


def test_any_hashable_is_a_key_and_a_row_depends_on_its_own_alone():
    cfg = change(completion_length=4, block_length=2, steps=4)
    keys = [3, "three", ("three", 3), (3,), 3.5]
    policy = toy.TableDenoiser(4)
    together = agrpo.rollout(policy, *blank(5), cfg, keys)
    for i, key in enumerate(keys):
        alone = agrpo.rollout(policy, *blank(1), cfg, [key])
        assert torch.equal(alone.tokens[0], together.tokens[i])
        assert torch.equal(alone.reveal_step[0], together.reveal_step[i])
    assert toy.keys_of(together)[0] == toy.keys_of(together)[3]        # 3 is the key (3,)
    hot = dataclasses.replace(cfg, temperature=5.0)
    many = agrpo.rollout(policy, *blank(200), hot, [f"row {i}" for i in range(200)])
    assert len(set(toy.keys_of(many))) > 40                    # noise of their own


def test_surrogate_clips_on_the_side_that_the_advantage_says():
    logp, adv = torch.tensor([0.5, 0.5, -0.5, -0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    gain, ratio = agrpo.surrogate(logp, torch.zeros(4), adv, change(clip=0.2))
    e, d = math.exp(0.5), math.exp(-0.5)
    assert torch.allclose(gain, torch.tensor([1.2, -e, d, -0.8]))
    assert torch.allclose(ratio, torch.tensor([e, e, d, d]))
    higher, _ = agrpo.surrogate(logp, torch.zeros(4), adv, change(clip=0.2, clip_high=0.28))
    assert torch.allclose(higher, torch.tensor([1.28, -e, d, -0.8]))   # the upper side only


# ------------------------------------------------------------------------------------ the tables
def test_advantages():
    r = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    of = {name: rule(r) for name, rule in agrpo.ADVANTAGES.items()}
    assert torch.allclose(of["mean"], torch.tensor([[-2.0, -1.0, 3.0], [0, 0, 0]]))
    left_out = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5])
    assert torch.allclose(of["leave_one_out"][0], left_out) and (of["leave_one_out"][1] == 0).all()
    assert torch.allclose(of["std"][0].std(), torch.tensor(1.0), atol=1e-3)
    assert (of["std"][1] == 0).all() and torch.equal(of["none"], r)    # no 0/0


@pytest.mark.parametrize("name, rule", [
    ("slip", lambda r: r - r.mean(1)),     # (16, 16) less (16,): means of other prompts' groups
    ("flat", lambda r: (r - r.mean(1, keepdim=True)).view(-1)), ("means", lambda r: r.mean(1))],
    ids=["slip", "flat", "means"])
def test_an_advantage_without_keepdim_is_refused(name, rule, monkeypatch):
    """Before any work, also where as many prompts as completions would let it run."""
    monkeypatch.setitem(agrpo.ADVANTAGES, name, rule)
    with pytest.raises(BadInput, match=f"{name}.*keepdim"):
        settle({"advantage": name, "prompts": 16, "completions": 16})
    monkeypatch.setitem(agrpo.ADVANTAGES, name, lambda r: (r - r.mean()) / r.std())
    assert settle({"advantage": name}).advantage == name       # over the whole batch it may look


# ------------------------------------------------------------------------------ the law of tokens
def test_top_p_keeps_the_token_that_crosses_p_and_survives_huge_logits():
    cfg = change(temperature=1.0, top_k=4, top_p=0.7)
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log() + 5000.0
    law = agrpo.Law(logits, cfg)
    assert torch.allclose(law.p, torch.tensor([[0.625, 0.375, 0, 0]]).double())
    assert law.support.tolist() == [[0, 1, 4, 4]]
    assert abs(float(law.logp(torch.tensor([1])).exp()) - 0.375) < 1e-12
    again = agrpo.Law(logits, dataclasses.replace(cfg, top_p=0.1), law.support)
    assert torch.equal(again.p, law.p)                         # a given support is used as it is


@pytest.mark.parametrize("V", [5, 1023, 1024, 5000])
def test_a_draw_inverts_the_cumulative_distribution(V):
    logits = torch.randn(200, V, generator=seeded(0)) * 3
    logits[:, [0, V // 2, V - 1]] = -math.inf                  # first, last or between: no token
    u = torch.rand(200, generator=seeded(1), dtype=torch.float64)
    u[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    law = agrpo.Law(logits, change(temperature=1.0))
    token, upto = law.draw(u), law.p.double().cumsum(1)
    assert (law.p.gather(1, token[:, None]) > 0).all()
    u = u.clamp(max=1 - 2**-50)
    want = torch.searchsorted(upto, (u * upto[:, -1])[:, None], right=True).squeeze(1)
    assert int((token != want).sum()) <= 1                     # but for the last bit


def test_log_sum_exp_has_the_value_and_the_gradient_of_the_library():
    z, weight = normal(20, 300, seed=0), normal(20)
    z[:, 7] = -math.inf
    z.requires_grad_()
    value, p = agrpo.LogSumExp.apply(z)
    assert (value - z.logsumexp(-1)).abs().max() < 1e-12 and not p.requires_grad
    assert (p - z.softmax(-1)).abs().max() < 1e-14
    got, want = (torch.autograd.grad((weight * x).sum(), z)[0] for x in (value, z.logsumexp(-1)))
    assert (got - want).abs().max() < 1e-14


def test_a_block_longer_than_the_prompt_is_denoised_and_all_eos_rows_do_no_harm():
    cfg = change(completion_length=4, block_length=2, steps=4, unmasking="confidence",
                 normalizer="last_step")
    policy = toy.TableDenoiser(4, eos=True)
    with torch.no_grad():
        policy.table[..., 2] += 3.0                            # EOS most of the time
    traj = agrpo.rollout(policy, *blank(32, 0), cfg, [(i,) for i in range(32)])    # no prompt
    ended = (traj.tokens[:, :2] == 2).any(1)
    assert ended.any() and (~ended).any() and (traj.tokens != policy.mask_id).all()
    assert torch.equal(traj.nfe, torch.where(ended, 2, 4))     # finished rows left the batch
    assert (traj.tokens[ended, 2:] == 2).all() and (traj.reveal_step[ended, 2:] == 4).all()
    traj.prompt, adv = blank(32)[0], torch.ones(32, dtype=torch.float64)
    traj.prompt_mask = torch.zeros_like(traj.prompt)           # as a tokenizer pads an empty one
    views = agrpo.agrpo_views(traj, adv, cfg, policy.mask_id, seeded(0))
    loss, _ = loss_of(policy, traj, views, adv, cfg)
    nothing = (traj.tokens == 2).all(1)
    assert loss.isfinite() and nothing.any() and int(traj.last_step[nothing].max()) == 0


class Writes(toy.TableDenoiser):
    """Is sure of one text, whatever the state."""
    def __init__(self, text, eos_id=1, turn_id=2):
        self.text, self.mask_id, self.eos_id, self.turn_id = torch.tensor(text), 9, eos_id, turn_id

    def logits(self, prompt, prompt_mask, state, where):
        z = torch.nn.functional.one_hot(self.text, 10).double() * 50
        return z.expand(len(state), -1, -1)[where]


@pytest.mark.parametrize("text, block, calls", [
    ([5, 6, 2, 8] + 28 * [8], 4, 4), ([5, 6, 8, 8, 8, 1] + 26 * [8], 4, 8), (32 * [2], 4, 4),
    (32 * [1], 4, 4), (32 * [8], 4, 32), ([8, 8, 8, 1] + 28 * [8], 4, 4), ([2] + 31 * [8], 32, 32)])
def test_a_row_is_finished_once_a_complete_block_holds_the_end_of_its_text(text, block, calls):
    """EOS is 1, the end of a turn 2. What follows is EOS, without a step or a log-probability."""
    policy = Writes(text)
    cfg = change(completion_length=32, block_length=block, steps=32)
    traj = agrpo.rollout(policy, *blank(2), cfg, ["a", "b"])
    assert traj.nfe.tolist() == [calls, calls]
    assert traj.tokens[0].tolist() == text[:calls] + [1] * (32 - calls)
    assert (traj.reveal_step[0, calls:] == 32).all() and (traj.reveal_step[0, :calls] < calls).all()
    assert (traj.logp[0, calls:] == 0).all() and (traj.order_logp[0, calls:] == 0).all()
