"""The oracle of the tests: a table-lookup denoiser so small that every trajectory can be enumerated.

The enumeration is written from Eq. 1, 2 and 6 with itertools and plain sums, and shares no code with agrpo.py.
"""
import itertools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import agrpo  # noqa: E402


class TableDenoiser:
    """Logits (C, V) looked up by the whole state: V tokens 0..V-1, MASK = V, the last token is EOS if eos is True.

    Has the same verb as agrpo.Policy. float64; `table` (states, C, V) is the parameter."""

    def __init__(self, C=3, V=3, seed=0, eos=False, scale=1.0):
        g = torch.Generator().manual_seed(seed)
        self.C, self.V, self.mask_id, self.eos_id = C, V, V, V - 1 if eos else -1
        self.table = (scale * torch.randn((V + 1) ** C, C, V, generator=g, dtype=torch.float64)).requires_grad_()
        self.model, self.turn_id, self.block = self, None, 0
        self.wait_for_others = lambda: None
        self.mean = torch.zeros((), dtype=torch.float64, requires_grad=True)             # of a controller's threshold

    def parameters(self):
        return [self.table]

    def of(self, state):
        """state (C,) tuple -> logits (C, V)"""
        return self.table[sum(s * (self.V + 1) ** i for i, s in enumerate(state))]

    def logits(self, prompt, prompt_mask, state, where, clean=None, cache=None, with_ease=False):
        z = self.all_logits(state)
        z = torch.cat([z, torch.full((len(state), self.C, 1), -math.inf, dtype=torch.float64)], -1)[where]
        return (z, self.mean.expand(len(state)).clone()) if with_ease else z

    def all_logits(self, state):
        return self.table[(state * (self.V + 1) ** torch.arange(self.C)).sum(1)]


class BlockTableDenoiser(TableDenoiser):
    """The same, block-causal: a position's logits do not depend on later blocks."""

    def __init__(self, C, V, size, **rest):
        super().__init__(C, V, **rest)
        self.size = size

    def of(self, state):
        seen = [tuple(s if j // self.size <= i // self.size else self.mask_id for j, s in enumerate(state)) for i in range(self.C)]
        return torch.stack([super(BlockTableDenoiser, self).of(s)[i] for i, s in enumerate(seen)])

    def logits(self, prompt, prompt_mask, state, where, clean=None, cache=None, with_ease=False):
        block, parts = torch.arange(self.C) // self.size, []
        for b in range(self.C // self.size):                                             # this block noisy, those before it final, none after it
            seen = torch.where(block < b, state if clean is None else clean, torch.where(block == b, state, self.mask_id))
            parts.append(self.all_logits(seen)[:, block == b])
        z = torch.cat(parts, 1)
        return torch.cat([z, torch.full((len(state), self.C, 1), -math.inf, dtype=torch.float64)], -1)[where]


def law(z, cfg):
    """Eq. 2 for one position: list of probabilities (tensors) over the tokens."""
    z = z / cfg.temperature
    keep = range(len(z))
    if cfg.top_k:
        keep = sorted(keep, key=lambda v: -float(z[v].detach()))[:cfg.top_k]
        p, total, kept = [math.exp(float(z[v].detach())) for v in keep], 0.0, []
        for v, x in zip(keep, p):
            if total < cfg.top_p:
                kept.append(v)
            total += x / sum(p)
        keep = kept
    norm = sum(torch.exp(z[v]) for v in keep)
    return [torch.exp(z[v]) / norm if v in keep else torch.zeros((), dtype=z.dtype) for v in range(len(z))]


def ways(rule, open_, plain, n, cfg):
    """Ways in which a step may choose positions without looking at the candidates: [(positions in order, probability)]."""
    most = {i: max(plain[i]) for i in open_}
    entropy = {i: -sum(x * torch.log(x) for x in plain[i]) for i in open_}
    score = {i: torch.log(most[i]) if cfg.order_score == "max_prob" else -entropy[i] for i in open_}

    def best(by):
        return sorted(open_, key=lambda i: (-float(by[i].detach()), i))

    if rule == "random":
        drawn = list(itertools.permutations(open_, min(n, len(open_))))
        return [(order, 1 / len(drawn)) for order in drawn]
    if rule == "confidence":
        return [(tuple(best(score)[:n]), 1)]
    if rule == "threshold":
        return [(tuple(best(most)[:max(n, sum(float(x.detach()) >= cfg.threshold for x in most.values()))]), 1)]
    if rule == "entropy_bound":
        order, many = best({i: -x for i, x in entropy.items()}), 0
        for k in range(1, len(order) + 1):
            h = [float(entropy[i].detach()) for i in order[:k]]
            many = k if sum(h) - max(h) <= cfg.entropy_bound else many
        return [(tuple(order[:max(n, many)]), 1)]
    found = []                                                       # plackett_luce: every ordered draw
    for drawn in itertools.permutations(open_, min(n, len(open_))):
        prob, left = 1, list(open_)
        for i in drawn:
            prob = prob * torch.exp(score[i] / cfg.tau_pos) / sum(torch.exp(score[k] / cfg.tau_pos) for k in left)
            left.remove(i)
        found.append((drawn, prob))
    return found


def branches_of(policy, cfg, state):
    """What a step may do in a state: {((position, token), ...) in the order chosen: (probability, probability of its tokens)}."""
    L, n, found = cfg.block_length, cfg.completion_length // cfg.steps, {}
    start = next(b for b in range(0, len(state), L) if policy.mask_id in state[b:b + L])
    open_ = [i for i in range(start, start + L) if state[i] == policy.mask_id]
    z = policy.of(state)
    p, plain = {i: law(z[i], cfg) for i in open_}, {i: torch.softmax(z[i], 0) for i in open_}
    if cfg.unmasking == "low_confidence":
        for candidate in itertools.product(range(policy.V), repeat=len(open_)):
            drawn = dict(zip(open_, candidate))
            best = sorted(open_, key=lambda i: (-float(plain[i][drawn[i]].detach()), i))[:n]
            key = tuple((i, drawn[i]) for i in best)
            found[key] = found.get(key, 0) + math.prod([p[i][v] for i, v in drawn.items()])
    else:
        for order, chance in ways(cfg.unmasking, open_, plain, n, cfg):
            for values in itertools.product(range(policy.V), repeat=len(order)):
                found[tuple(zip(order, values))] = chance * math.prod([p[i][v] for i, v in zip(order, values)])
    return {picks: (prob, {i: p[i][v] for i, v in picks}) for picks, prob in found.items() if float(prob.detach()) > 0}


def enumerate_trajectories(policy, cfg):
    """Every trajectory as (tokens, reveal_step, probability, token probabilities (C,), position probabilities (T,), rank (C,))."""
    C, L, T, known, found = cfg.completion_length, cfg.block_length, cfg.steps, {}, []

    def step(t, state, when, prob, token_p, order_p, place):
        blocks = [state[b:b + L] for b in range(0, C, L)]
        if policy.mask_id not in state or any(all(s == policy.eos_id for s in block) for block in blocks):
            tokens = [policy.eos_id if s == policy.mask_id else s for s in state]
            found.append((tokens, when, prob, token_p, order_p, place))
            return
        if state not in known:
            known[state] = branches_of(policy, cfg, state)
        for picks, (weight, of_token) in known[state].items():
            now, at, tp, rank = list(state), list(when), list(token_p), list(place)
            for k, (i, v) in enumerate(picks):
                now[i], at[i], tp[i], rank[i] = v, t, of_token[i], k
            step(t + 1, tuple(now), at, prob * weight, tp, order_p + [weight / math.prod(of_token.values())], rank)

    step(0, (policy.mask_id,) * C, [T] * C, torch.ones((), dtype=torch.float64), [torch.ones(())] * C, [], [0] * C)
    return found


def reward_of(tokens, V):
    """Any fixed function of the completion that is not symmetric in its positions."""
    return math.sin(1.0 + sum((i + 2) * (v + 1) ** 2 for i, v in enumerate(tokens))) + (tokens[0] == V - 1)


def as_trajectory(policy, cfg, found):
    """The enumerated trajectories as one agrpo.Trajectory with the probabilities of the enumeration as old log-probs."""
    N, T = len(found), cfg.steps
    order_logp = torch.zeros(N, T, dtype=torch.float64)
    for i, (*_, order_p, _) in enumerate(found):
        if cfg.unmasking in ("low_confidence", "plackett_luce"):
            order_logp[i, :len(order_p)] = torch.tensor([float(x.detach()) for x in order_p], dtype=torch.float64).log()
    tokens, steps, rank = (torch.tensor([f[k] for f in found]) for k in (0, 1, 5))
    logp = torch.tensor([[float(x.detach()) for x in f[3]] for f in found], dtype=torch.float64).log()
    nfe = torch.tensor([len(f[4]) for f in found])
    prompt = torch.zeros(N, 1, dtype=torch.long)
    support = None
    if cfg.top_k:                                                   # recover the support ids from the enumeration's law
        support, known = torch.full((N, cfg.completion_length, cfg.top_k), policy.V + 1), {}
        for i, (tok, when, *_) in enumerate(found):
            for j, t in enumerate(when):
                state = tuple(policy.mask_id if w >= t else v for v, w in zip(tok, when))
                if t < T:
                    if (state, j) not in known:
                        known[state, j] = [v for v, x in enumerate(law(policy.of(state)[j].detach(), cfg)) if float(x) > 0]
                    support[i, j, :len(known[state, j])] = torch.tensor(known[state, j])
    return agrpo.Trajectory(prompt, torch.ones_like(prompt), tokens, steps, rank, logp, order_logp, order_logp.exp(),
                            order_logp.exp(), support, nfe, policy.eos_id)
