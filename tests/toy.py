"""The oracle of the tests: a table-lookup denoiser so small that it can be enumerated whole.

The enumeration is written from Eq. 1, 2 and 6 with itertools and plain sums, and shares no code
with agrpo.py.
"""
import itertools
import math

import torch

import agrpo
from eval import Settings, generate
from methods import dipo
from rewards import TASKS
from support.tiny import tiny_model, tiny_tokenizer


class TableDenoiser:
    """Logits (C, V) looked up by the whole state: V tokens 0..V-1, MASK = V, the last token is EOS
    if eos is True. float64; `table` (states, C, V) is the parameter.

    Has the same verb as agrpo.Policy."""

    def __init__(self, C=3, V=3, seed=0, eos=False, scale=1.0):
        g = torch.Generator().manual_seed(seed)
        self.C, self.V, self.mask_id, self.eos_id = C, V, V, V - 1 if eos else -1
        table = torch.randn((V + 1) ** C, C, V, generator=g, dtype=torch.float64)
        self.table = (scale * table).requires_grad_()
        self.model, self.turn_id = self, self.eos_id
        self.mean = torch.zeros((), dtype=torch.float64, requires_grad=True)   # of a controller

    def parameters(self):
        return [self.table]

    def of(self, state):
        """state (C,) tuple -> logits (C, V)"""
        return self.table[sum(s * (self.V + 1) ** i for i, s in enumerate(state))]

    def logits(self, prompt, prompt_mask, state, where):
        return self.without_mask(self.all_logits(state))[where]

    def without_mask(self, z):
        """(N, C, V) -> (N, C, V + 1): MASK is no token to sample."""
        return torch.nn.functional.pad(z, (0, 1), value=-math.inf)

    def all_logits(self, state):
        return self.table[(state * (self.V + 1) ** torch.arange(self.C)).sum(1)]

    def blocks(self, prompt_mask, C, L):
        return (torch.arange(C) // L).expand(len(prompt_mask), C)

    def hidden(self, prompt, prompt_mask, state):
        """What a controller reads: nothing of the prompt."""
        return torch.zeros(len(prompt), 1 + state.shape[1], 1, dtype=torch.float64)

    def controller(self, hidden):
        """(N, 1) -> mu (N, 1)."""
        return self.mean.expand(len(hidden), 1).clone()


class BlockTableDenoiser(TableDenoiser):
    """The same, block-causal: a position's logits do not depend on later blocks."""

    def __init__(self, C, V, size, **rest):
        super().__init__(C, V, **rest)
        self.size = self.block = size

    def of(self, state):
        def seen(i):
            return tuple(s if j // self.size <= i // self.size else self.mask_id
                         for j, s in enumerate(state))
        return torch.stack([super(BlockTableDenoiser, self).of(seen(i))[i] for i in range(self.C)])

    def logits(self, prompt, prompt_mask, state, where):
        """Behind a packed prompt (its mask has 2s) the final text stands before each block."""
        packed, block, parts = bool((prompt_mask == 2).any()), torch.arange(self.C) // self.size, []
        before = prompt[:, -self.C:] if packed else state
        for b in range(self.C // self.size):            # this block noisy, none after it
            here = torch.where(block == b, state, self.mask_id)
            parts.append(self.all_logits(torch.where(block < b, before, here))[:, block == b])
        return self.without_mask(torch.cat(parts, 1))[where]


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
    norm, zero = sum(torch.exp(z[v]) for v in keep), torch.zeros((), dtype=z.dtype)
    return [torch.exp(z[v]) / norm if v in keep else zero for v in range(len(z))]


def ways(rule, open_, plain, n, cfg):
    """Ways in which a step may choose positions without looking at the candidates: [(positions in
    order, probability)]."""
    most = {i: max(plain[i]) for i in open_}
    entropy = {i: -sum(x * torch.log(x) for x in plain[i]) for i in open_}
    score = {i: torch.log(most[i]) if cfg.order_score == "max_prob" else -entropy[i] for i in open_}

    def best(by):
        return sorted(open_, key=lambda i: (-float(by[i].detach()), i))

    if rule == "random":
        drawn = list(itertools.permutations(open_, min(n, len(open_))))
        return [(order, 1 / len(drawn)) for order in drawn]
    if rule == "left_to_right":
        return [(tuple(open_[:n]), 1)]
    if rule == "confidence":
        return [(tuple(best(score)[:n]), 1)]
    if rule == "threshold":
        sure = sum(float(x.detach()) >= cfg.threshold for x in most.values())
        return [(tuple(best(most)[:max(n, sure)]), 1)]
    if rule == "entropy_bound":
        order, count = best({i: -x for i, x in entropy.items()}), 0
        for k in range(1, len(order) + 1):
            h = [float(entropy[i].detach()) for i in order[:k]]
            count = k if sum(h) - max(h) <= cfg.entropy_bound else count
        return [(tuple(order[:max(n, count)]), 1)]
    found = []                                         # plackett_luce: every ordered draw
    e = {i: torch.exp(score[i] / cfg.tau_pos) for i in open_}
    for drawn in itertools.permutations(open_, min(n, len(open_))):
        prob, left = 1, list(open_)
        for i in drawn:
            prob = prob * e[i] / sum(e[k] for k in left)
            left.remove(i)
        found.append((drawn, prob))
    return found


def branches_of(policy, cfg, state):
    """What a step may do in a state: {((position, token), ...) in the order chosen: (probability,
    probability of its tokens)}."""
    L, n, found = cfg.block_length, cfg.completion_length // cfg.steps, {}
    start = next(b for b in range(0, len(state), L) if policy.mask_id in state[b:b + L])
    open_ = [i for i in range(start, start + L) if state[i] == policy.mask_id]
    z, V = policy.of(state), range(policy.V)
    p, plain = {i: law(z[i], cfg) for i in open_}, {i: torch.softmax(z[i], 0) for i in open_}
    if cfg.unmasking == "low_confidence":
        for candidate in itertools.product(V, repeat=len(open_)):
            drawn = dict(zip(open_, candidate))
            best = sorted(open_, key=lambda i: (-float(plain[i][drawn[i]].detach()), i))[:n]
            key = tuple((i, drawn[i]) for i in best)
            found[key] = found.get(key, 0) + math.prod([p[i][v] for i, v in drawn.items()])
    else:
        for order, chance in ways(cfg.unmasking, open_, plain, n, cfg):
            for values in itertools.product(V, repeat=len(order)):
                prob = chance * math.prod([p[i][v] for i, v in zip(order, values)])
                found[tuple(zip(order, values))] = prob
    return {picks: (prob, {i: p[i][v] for i, v in picks}) for picks, prob in found.items()
            if float(prob.detach()) > 0}


def enumerate_trajectories(policy, cfg):
    """Every trajectory as (tokens, reveal_step, probability, token probabilities (C,), position
    probabilities (T,), rank (C,))."""
    C, L, T, known, found = cfg.completion_length, cfg.block_length, cfg.steps, {}, []

    def step(t, state, when, prob, token_p, order_p, ranks):
        blocks = [state[b:b + L] for b in range(0, C, L)]
        ends = {policy.eos_id, policy.turn_id}
        ended = any(ends & set(block) and policy.mask_id not in block for block in blocks)
        if policy.mask_id not in state or ended:
            tokens = [policy.eos_id if s == policy.mask_id else s for s in state]
            found.append((tokens, when, prob, token_p, order_p, ranks))
            return
        if state not in known:
            known[state] = branches_of(policy, cfg, state)
        for picks, (weight, of_token) in known[state].items():
            now, at, tp, rank = list(state), list(when), list(token_p), list(ranks)
            for k, (i, v) in enumerate(picks):
                now[i], at[i], tp[i], rank[i] = v, t, of_token[i], k
            order = [*order_p, weight / math.prod(of_token.values())]
            step(t + 1, tuple(now), at, prob * weight, tp, order, rank)

    one = torch.ones((), dtype=torch.float64)
    step(0, (policy.mask_id,) * C, [T] * C, one, [one] * C, [], [0] * C)
    return found


def key_of(trajectory):
    """What tells an enumerated trajectory from all others: tokens, steps, ranks."""
    tokens, steps, *_, rank = trajectory
    return tuple(tokens), tuple(steps), tuple(rank)


def keys_of(traj):
    """The same of each row of an agrpo.Trajectory."""
    return list(zip(*(map(tuple, x.tolist()) for x in (traj.tokens, traj.reveal_step, traj.rank))))


def reward_of(tokens, V):
    """Any fixed function of the completion that is not symmetric in its positions."""
    total = sum((i + 2) * (v + 1) ** 2 for i, v in enumerate(tokens))
    return math.sin(1.0 + total) + (tokens[0] == V - 1)


def numbers(tensors):
    """Nested lists of tensors -> one tensor, float64, without a gradient."""
    return torch.tensor([[float(x.detach()) for x in row] for row in tensors], dtype=torch.float64)


def as_trajectory(policy, cfg, found):
    """The enumerated trajectories as one agrpo.Trajectory with the probabilities of the enumeration
    as old log-probs."""
    N, T = len(found), cfg.steps
    order_logp = torch.zeros(N, T, dtype=torch.float64)
    if cfg.unmasking in ("low_confidence", "plackett_luce"):
        for i, (*_, order_p, _) in enumerate(found):
            order_logp[i, :len(order_p)] = numbers([order_p])[0].log()
    tokens, steps, rank = (torch.tensor([f[k] for f in found]) for k in (0, 1, 5))
    logp, nfe = numbers([f[3] for f in found]).log(), torch.tensor([len(f[4]) for f in found])
    prompt, support = torch.zeros(N, 1, dtype=torch.long), None
    if cfg.top_k:                                      # the ids, from the enumeration's law
        support, known = torch.full((N, cfg.completion_length, cfg.top_k), policy.V + 1), {}
        for i, (tok, when, *_) in enumerate(found):
            for j, t in enumerate(when):
                state = tuple(policy.mask_id if w >= t else v for v, w in zip(tok, when))
                if t < T:
                    if (state, j) not in known:
                        p = law(policy.of(state)[j].detach(), cfg)
                        known[state, j] = [v for v, x in enumerate(p) if float(x) > 0]
                    support[i, j, :len(known[state, j])] = torch.tensor(known[state, j])
    ones = torch.ones_like(order_logp)                 # entropy and gradient: not looked at
    return agrpo.Trajectory(prompt, torch.ones_like(prompt), tokens, steps, rank, logp, order_logp,
                            ones, ones, nfe, policy.eos_id, support)


def blank(N, P=1):
    """A prompt (N, P) and its mask, for denoisers that do not look at them."""
    return torch.zeros(N, P, dtype=torch.long), torch.ones(N, P, dtype=torch.long)


def loss_of(policy, traj, views, adv, cfg):
    """Prepared and scored: the loss and the ratios. adv (N,) or (N, C)."""
    adv = adv if adv.dim() == 2 else adv[:, None]
    return agrpo.policy_loss(policy, traj, agrpo.prepare(policy, traj, views, adv, cfg), cfg)


# ------------------------------------------------- small networks, where a table does not suffice
NEUTRAL = Settings(prompts=2, completions=4, base_hidden=32, base_layers=2, shrink=1,
                   prompt_masking=0.0, truncation=0.0, dynamic_sampling=0)


def tiny(cfg=NEUTRAL, block=0, dtype=torch.float64):
    """A stock Llama of random weights as a policy, and a tokenizer of characters."""
    tokenizer = tiny_tokenizer()
    known = (tiny_model(tokenizer, cfg, block).to(dtype), tokenizer.mask_token_id,
             tokenizer.eos_token_id)
    policy = dipo.BlockPolicy(*known, block=block) if block else agrpo.Policy(*known)
    return policy, tokenizer


def prompts(*lengths, V=100):
    """Random prompts of these lengths, left padded, and their mask."""
    P = max(lengths)
    prompt = torch.randint(6, V, (len(lengths), P), generator=torch.Generator().manual_seed(1))
    return prompt, (torch.arange(P) >= P - torch.tensor(lengths)[:, None]).long()


def examples(n=16, task="sudoku"):
    return TASKS[task].generate(n, 0, "train")


def varied(text, example):
    """A reward that differs, from models that solve nothing."""
    return float(sum(map(ord, text)) % 7)


def sampling(tokenizer, reward=varied):
    """What a train_step samples with: completions, and reward(text, example) of each."""
    def sample(policy, examples, keys, cfg):
        traj, texts = generate(policy, tokenizer, examples, keys, cfg)
        rewards = [reward(*pair) for pair in zip(texts, examples)]
        return traj, {"correct": rewards}, [False] * len(texts)
    return sample


class Watched(torch.optim.SGD):
    """Counts its steps and keeps the gradients of the last."""
    steps = 0

    def __init__(self, model, lr=0.1):
        super().__init__([{"params": list(model.parameters()), "scale": 1.0}], lr=lr)

    def step(self, closure=None):
        self.steps += 1
        self.grads = [p.grad.clone() for group in self.param_groups for p in group["params"]
                      if p.grad is not None]
        return super().step(closure)
