"""The oracle of the tests: a table-lookup denoiser so small that every trajectory can be enumerated.

The enumeration is written from METHOD Eq. 1, 2 and 6 with itertools and plain sums, and shares no code with agrpo.py.
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
        self.model = self

    def parameters(self):
        return [self.table]

    def of(self, state):
        """state (C,) tuple -> logits (C, V)"""
        return self.table[sum(s * (self.V + 1) ** i for i, s in enumerate(state))]

    def logits(self, prompt, prompt_mask, state, where):
        index = (state * (self.V + 1) ** torch.arange(self.C)).sum(1)
        return torch.cat([self.table[index], torch.full((len(state), self.C, 1), -math.inf, dtype=torch.float64)], -1)[where]


def law(z, cfg):
    """Eq. 2 for one position: list of probabilities (tensors) over the tokens."""
    z = z / cfg.temperature
    keep = range(len(z))
    if cfg.top_k:
        keep = sorted(keep, key=lambda v: -float(z[v]))[:cfg.top_k]
        p, total, kept = [math.exp(float(z[v])) for v in keep], 0.0, []
        for v, x in zip(keep, p):
            if total < cfg.top_p:
                kept.append(v)
            total += x / sum(p)
        keep = kept
    norm = sum(torch.exp(z[v]) for v in keep)
    return [torch.exp(z[v]) / norm if v in keep else torch.zeros((), dtype=z.dtype) for v in range(len(z))]


def enumerate_trajectories(policy, cfg):
    """Every trajectory as (tokens, reveal_step, probability, token probabilities (C,), position probabilities (T,))."""
    C, L, T = cfg.completion_length, cfg.block_length, cfg.steps
    n, per_block, V, found = C // T, T * L // C, policy.V, []

    def step(t, state, when, prob, token_p, order_p):
        if t == T or t and t % per_block == 0 and all(s == policy.eos_id for s in state[(t // per_block - 1) * L:][:L]):
            tokens = [policy.eos_id if s == policy.mask_id else s for s in state]
            found.append((tokens, when, prob, token_p, order_p))
            return
        start = t // per_block * L
        open_ = [i for i in range(start, start + L) if state[i] == policy.mask_id]
        z = policy.of(tuple(state))
        p = {i: law(z[i], cfg) for i in open_}
        plain = {i: torch.softmax(z[i], 0).tolist() for i in open_}
        branches = {}                                               # (positions, tokens) -> (probability, position part)
        if cfg.unmasking == "low_confidence":
            for candidate in itertools.product(range(V), repeat=len(open_)):
                conf = {i: plain[i][v] for i, v in zip(open_, candidate)}
                best = sorted(open_, key=lambda i: (-conf[i], i))[:n]
                weight = math.prod([p[i][v] for i, v in zip(open_, candidate)])
                key = tuple((i, dict(zip(open_, candidate))[i]) for i in sorted(best))
                branches[key] = branches.get(key, 0) + weight
        else:
            if cfg.unmasking == "random":
                subsets = list(itertools.combinations(open_, min(n, len(open_))))
            else:
                subsets = [tuple(sorted(sorted(open_, key=lambda i: (-max(plain[i]), i))[:n]))]
            for subset in subsets:
                for values in itertools.product(range(V), repeat=len(subset)):
                    branches[tuple(zip(subset, values))] = math.prod([p[i][v] for i, v in zip(subset, values)]) / len(subsets)
        for picks, weight in branches.items():
            if float(weight.detach()) == 0:
                continue
            now, at, tp = list(state), list(when), list(token_p)
            for i, v in picks:
                now[i], at[i], tp[i] = v, t, p[i][v]
            tokens_part = math.prod([p[i][v] for i, v in picks])
            step(t + 1, now, at, prob * weight, tp, order_p + [weight / tokens_part])

    step(0, [policy.mask_id] * C, [T] * C, torch.ones((), dtype=torch.float64), [torch.ones(())] * C, [])
    return found


def reward_of(tokens, V):
    """Any fixed function of the completion that is not symmetric in its positions."""
    return math.sin(1.0 + sum((i + 2) * (v + 1) ** 2 for i, v in enumerate(tokens))) + (tokens[0] == V - 1)


def as_trajectory(policy, cfg, found):
    """The enumerated trajectories as one agrpo.Trajectory with the probabilities of the enumeration as old log-probs."""
    N, T = len(found), cfg.steps
    order_logp = torch.zeros(N, T, dtype=torch.float64)
    for i, (*_, order_p) in enumerate(found):
        if cfg.unmasking == "low_confidence":
            order_logp[i, :len(order_p)] = torch.tensor([float(x) for x in order_p], dtype=torch.float64).log()
    tokens, steps = torch.tensor([f[0] for f in found]), torch.tensor([f[1] for f in found])
    logp = torch.tensor([[float(x) for x in f[3]] for f in found], dtype=torch.float64).log()
    nfe = torch.tensor([len(f[4]) for f in found])
    prompt = torch.zeros(N, 1, dtype=torch.long)
    support = None
    if cfg.top_k:                                                   # recover the support ids from the enumeration's law
        support = torch.full((N, cfg.completion_length, cfg.top_k), policy.V + 1)
        for i, (tok, when, *_) in enumerate(found):
            for j, t in enumerate(when):
                state = tuple(policy.mask_id if w >= t else v for v, w in zip(tok, when))
                if t < T:
                    ids = [v for v, x in enumerate(law(policy.of(state)[j], cfg)) if float(x) > 0]
                    support[i, j, :len(ids)] = torch.tensor(ids)
    return agrpo.Trajectory(prompt, torch.ones_like(prompt), tokens, steps, logp, order_logp, torch.ones_like(logp), support, nfe,
                            policy.eos_id)
