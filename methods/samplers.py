"""Further samplers and further choices of time steps, to compare with agrpo.py's own."""
import dataclasses
import functools
import math

import torch
from torch import Tensor

import agrpo

@dataclasses.dataclass(frozen=True)
class Settings:
    """Of samplers."""
    order_score: str = "max_prob"      # how sure a position is, for confidence and plackett_luce
    tau_pos: float = 1.0               # temperature of plackett_luce
    threshold: float = 0.9             # for threshold: reveal all whose likeliest token has it
    entropy_bound: float = 0.1         # for entropy_bound: summed entropies less the largest, nats

# ------------------------------------------------------------------------ which positions: UNMASK
def neg_entropy(law) -> Tensor:
    """(n,) clamped: 0 log 0 = 0, and so its gradient."""
    logp = law.logits.log_softmax(-1)
    return (logp.exp() * logp.clamp(min=agrpo.LOG_ZERO)).sum(-1)

ORDER_SCORE = {                        # how sure a position is, whatever it draws: law -> (n,)
    "max_prob": lambda law: law.logits.max(-1).values - agrpo.LogSumExp.apply(law.logits)[0],
    "neg_entropy": neg_entropy}

def plackett_luce_logp(law, token, at, rank, cfg) -> tuple[Tensor, Tensor]:
    """log-probability (R,) of drawing the revealed positions in the order of their rank, each
    against all not drawn before it; and the size (n,) of its gradient, in a rollout."""
    def order_logp(law):
        value = ORDER_SCORE[cfg.order_score](law) / cfg.tau_pos
        score = torch.full(rank.shape, -1e30, dtype=law.z.dtype, device=rank.device)   # closed
        score = score.index_put(at, value)                                             # (R, C)
        order = rank.masked_fill(rank < 0, rank.shape[1]).argsort(dim=1, stable=True)
        score, drawn = score.gather(1, order), rank.gather(1, order) >= 0
        left = score.flip(1).logcumsumexp(1).flip(1)
        return (score - left).masked_fill(~drawn, 0.0).sum(1)
    if torch.is_grad_enabled():
        return order_logp(law), torch.zeros_like(law.lse)
    with torch.enable_grad():                                  # to the logits only
        z = law.logits.detach().requires_grad_()
        size = torch.autograd.grad(order_logp(agrpo.Law(z, cfg)).sum(), z)[0].square().sum(-1)
    return order_logp(law), size

def gumbel(u) -> Tensor:
    """Noise that makes the order of scores a draw with these as logits."""
    return -(-u.clamp(min=1e-300).log()).log()

# how great a row's ease must be for so many positions to be revealed: scores in falling order,
# -inf where none is open (R, C) -> (R, C); and the configured ease: minus the logarithm of a
# threshold, or the logarithm of an entropy bound
LEVEL = {"threshold": lambda ranked: -ranked,
         "entropy_bound": lambda ranked: (ranked - ranked.cumsum(1)).nan_to_num(math.inf).clamp(
             min=1e-30).log()}
EASE = {"threshold": lambda cfg: -math.log(cfg.threshold),
        "entropy_bound": lambda cfg: math.log(max(cfg.entropy_bound, 1e-29))}

def count_by(name: str):
    """As many positions as the configured ease allows."""
    return lambda ranked, rows, cfg: (LEVEL[name](ranked).double() <= EASE[name](cfg)).sum(1)

agrpo.UNMASK |= {
    "confidence": agrpo.Unmask(lambda law, token, u, cfg: ORDER_SCORE[cfg.order_score](law)),
    # as in DCoLT: trains the order, too
    "plackett_luce": agrpo.Unmask(lambda law, token, u, cfg: ORDER_SCORE[cfg.order_score](law)
                                  / cfg.tau_pos + gumbel(u), plackett_luce_logp),
    # all that are sure enough; while sum H - max H <= the bound
    "threshold": agrpo.Unmask(lambda law, token, u, cfg: ORDER_SCORE["max_prob"](law), None,
                              count_by("threshold")),
    "entropy_bound": agrpo.Unmask(lambda law, token, u, cfg: neg_entropy(law), None,
                                  count_by("entropy_bound")),
    # JustGRPO's (arXiv 2601.15165) where steps is completion_length: scores are equal, and ties
    # go to the leftmost
    "left_to_right": agrpo.Unmask(lambda law, token, u, cfg: torch.zeros_like(law.lse))
    } | agrpo.UNMASK   # one's own stay

# ------------------------------------------------------------------------ which steps: TIMESTEPS
def iid(N: int, K: int, g) -> Tensor:
    """u (N, K) in [0, 1)."""
    return torch.rand(N, K, generator=g, dtype=torch.float64)

def batch(N: int, K: int, g) -> Tensor:
    """One point in each cell of an even grid over [0, 1), dealt out to the rows at random."""
    return (torch.randperm(N * K, generator=g).view(N, K) + iid(N, K, g)) / (N * K)

def stratified(N: int, K: int, g) -> Tensor:
    """One point in each K-th of [0, 1) for every row: its draws share an advantage."""
    return (torch.arange(K) + iid(N, K, g)) / K

def sobol(N: int, K: int, g) -> Tensor:
    """K points of a scrambled N-dimensional sequence, a dimension a row."""
    most = torch.quasirandom.SobolEngine.MAXDIM
    seeds = torch.randint(2**31, (-(-N // most),), generator=g).tolist()
    return torch.cat([torch.quasirandom.SobolEngine(
        min(most, N - i * most), scramble=True, seed=seed).draw(K, dtype=torch.float64)
        for i, seed in enumerate(seeds)], 1).T.contiguous()

SIZES = {"uniform": lambda traj: torch.ones_like(traj.entropy),
         "entropy": lambda traj: traj.entropy, "gradient": lambda traj: traj.gradient.sqrt()}

def with_replacement(points, size: str, traj, inside, stake, K: int, g) -> Tensor:
    """K points of each row through the inverse distribution of its proposal."""
    p = agrpo.proposal(SIZES[size](traj).cpu(), inside, 0.1)
    return agrpo.invert(p, points(len(p), K, g))

def without_replacement(size: str, traj, inside, stake, K: int, g) -> Tensor:
    """K different steps of each row; as many as there are give the exact sum."""
    p = agrpo.proposal(SIZES[size](traj).cpu(), inside, 0.1)
    return agrpo.systematic(p, inside.sum(1).clamp(max=K)[:, None], g)

agrpo.TIMESTEPS |= {
    "iid": functools.partial(with_replacement, iid, "uniform"),
    "batch": functools.partial(with_replacement, batch, "uniform"),
    "stratified": functools.partial(with_replacement, stratified, "uniform"),
    "stratified_entropy": functools.partial(with_replacement, stratified, "entropy"),
    "stratified_gradient": functools.partial(with_replacement, stratified, "gradient"),
    "sobol": functools.partial(with_replacement, sobol, "uniform"),
    "without_replacement": functools.partial(without_replacement, "uniform"),
    "without_replacement_gradient": functools.partial(without_replacement, "gradient"),
    **agrpo.TIMESTEPS}
