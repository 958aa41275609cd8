"""Rollouts with a cache of keys and values, and their weights. What a call computes anew:

    block    block-causal models: the block being denoised, and the one before it, which has just
             become final. Exact: what a finished block holds does not depend on later ones
    dual     the block being denoised, once all columns were computed when the row came to it
             (Fast-dLLM, arXiv 2505.22618)
    prefix   that block and what follows; what comes before is as it was then (likewise)
The last two are approximate: elsewhere keys and values are those of a state some steps old. So the
completions are those of another law, and are weighted by the ratio of the two:
    (10) W = w_t prod_{s drawn, s != t} [ 1 + (w_s - 1) / p_s ], cut to +-W_max,
w_s = pi(step s) / pi_cache(step s); uncut, its expectation is prod_s w_s. That is an importance
weight where the choice of positions counts (position term) or is uniform; with tokens only, the
default, it is none. Nothing repairs what the cache's truncated law never samples.
"""
import dataclasses
import functools

import torch
from torch import Tensor

import agrpo
from methods.scored import score

@dataclasses.dataclass(frozen=True)
class Settings:
    """Of rollouts with a cache."""
    cache: str = "none"                # prefix, dual: what top-k cuts off is lost; block: exact
    importance_cap: float = 2.0        # W_max of Eq. 10; 0: no weights
    importance_level: str = "completion"   # what is weighted; step: each by itself, biased

class CachedPolicy:
    """A policy for one rollout of N rows, that computes only some columns of prompt and completion
    anew. The first column of its prompts is no token, but the row's number."""

    def __init__(self, policy, kind: str, N: int, block_length: int):
        self.policy, self.kind, self.N, self.block_length = policy, kind, N, block_length
        self.mask_id, self.blocks = policy.mask_id, policy.blocks
        self.eos_id = policy.eos_id
        self.turn_id = getattr(policy, "turn_id", policy.eos_id)
        self.block, self.kept = getattr(policy, "block", 0), {}    # layer -> keys, values
        self.came_to = torch.full((N,), -1)                    # the block at which a row was whole

    def logits(self, prompt, prompt_mask, state, where) -> Tensor:
        """As the policy's, for the rows that prompt[:, 0] names."""
        self.rows, rows = prompt[:, 0], prompt[:, 0].cpu()
        self.start = where.int().argmax(1).cpu() // self.block_length * self.block_length
        self.anew = self.start != self.came_to[rows]
        self.came_to[rows] = self.start
        self.policy.hidden = self.hidden                       # the head is the policy's own
        try:
            return self.policy.logits(prompt[:, 1:], prompt_mask[:, 1:], state, where)
        finally:
            del self.policy.hidden

    def hidden(self, prompt, prompt_mask, state) -> Tensor:
        """(n, 1 + C, width), zero where nothing was computed."""
        ids, P, C = torch.cat([prompt, state], 1), prompt.shape[1], state.shape[1]
        real = torch.cat([prompt_mask, torch.ones_like(state)], 1)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        return self.read(ids, real.bool(), positions, P)[:, -1 - C:]

    def update(self, key, value, layer, *_):
        """What a layer calls: stores its keys and values (n, heads, w, size) of `columns` (n, w),
        returns those of all columns."""
        if layer not in self.kept:
            self.kept[layer] = [x.new_zeros(self.N, self.width, x.shape[1], x.shape[3])
                                for x in (key, value)]
        for kept, new in zip(self.kept[layer], (key, value)):
            kept[self.at] = new.transpose(1, 2)
        whole = len(self.now) == self.N
        return [(kept if whole else kept[self.now]).transpose(1, 2) for kept in self.kept[layer]]

    def get_seq_length(self, *_):
        return 0                                               # positions are given

    def read(self, ids, real, positions, P: int) -> Tensor:
        """ids, real, positions (n, S), the first P columns a prompt -> (n, S, width)."""
        (n, S), device, size = ids.shape, ids.device, self.block
        self.width, pad = S + 1, S - real.sum(1, keepdim=True)     # column S: what does not exist
        ids, real, block = (torch.nn.functional.pad(x, (0, 1))
                            for x in (ids, real, positions // max(1, size)))
        every = torch.arange(S + 1, device=device)

        def compute(columns, at=slice(None)):
            """columns (m, w), of the rows `at` -> (m, S, width)"""
            self.now, there = self.rows[at], real[at][:, None]
            self.at = self.now[:, None], columns
            if size:
                own = block[at].gather(1, columns)[:, :, None]
                there = there & real[at].gather(1, columns)[:, :, None]
                there = (own >= block[at][:, None]) & there
            sees = there | (columns[:, :, None] == every)
            hidden = self.policy.decode(ids[at].gather(1, columns), sees[:, None],
                                        (columns - pad[at]).clamp(min=0), past_key_values=self)
            full = hidden.new_zeros(len(columns), S + 1, hidden.shape[2])
            return full.scatter(1, columns[:, :, None].expand_as(hidden), hidden)[:, :S]
        if self.kind == "block":
            if not self.kept:                                  # the prompt first
                compute(every[:P].expand(n, -1))
            masked = (ids == self.mask_id) & (every >= P) & (every < S)
            current = block.masked_fill(~masked, S).amin(1, keepdim=True)      # (n, 1)
            columns = pad + (current - 1) * size + torch.arange(2 * size, device=device)
            return compute(columns.masked_fill((columns < pad) | (columns >= S), S))
        shift = int(self.policy.shift)                         # the first logits stand one before
        start = self.start + P - shift
        width = shift + self.block_length if self.kind == "dual" else S - int(start.min())
        columns = (start[:, None] + torch.arange(width)).clamp(max=S).to(device)
        rows = [x.nonzero().squeeze(1).to(device) for x in (self.anew, ~self.anew)]
        parts = [compute(of[at], at) for of, at in zip((every[:S].expand(n, -1), columns), rows)
                 if len(at)]
        return torch.cat(parts)[torch.cat(rows).argsort()]

def cached_rollout(policy, prompt, prompt_mask, cfg, keys):
    """agrpo.rollout with --cache. After an approximate one the views of its states are "cached",
    and the update finds the support of the law itself: a cache's is not the model's."""
    number = torch.arange(len(prompt), device=prompt.device)[:, None]
    cached = CachedPolicy(policy, cfg.cache, len(prompt), cfg.block_length)
    traj = agrpo.rollout(cached, torch.cat([number, prompt], 1),
                         torch.cat([torch.zeros_like(number), prompt_mask], 1), cfg, keys)
    traj.prompt, traj.prompt_mask = prompt, prompt_mask
    if cfg.cache != "block":
        traj.old, traj.support = "cached", None
    return traj

def cached(policy, traj, views, cfg):
    """Old log-probs are the model's own, and the views' weights counted W times (Eq. 10). Of a
    completion's steps only those drawn are scored, s with probability p_s, independently.
    --importance-level step: W = w_t, as is common, biased. Without a position term the choices of
    positions, as the cache made them, count as given."""
    row, step = views.row, views.step
    views = views._replace(order_logp_old=traj.order_logp[row, step])
    logp, order_logp = score(policy, traj, views, cfg)
    behaviour, old = traj.logp[row], views.order_logp_old
    views = views._replace(logp_old=logp, order_logp_old=order_logp)
    if not cfg.importance_cap:
        return views
    log_w = (logp - behaviour).masked_fill(~views.target, 0.0).sum(1)
    w = (log_w if order_logp is None else log_w + order_logp - old).exp()
    if cfg.importance_level == "completion":
        Z = agrpo.NORMALIZERS[cfg.normalizer](traj, cfg, row, views.target).double()
        drawn = views.weight[:, 0] * Z                         # 1 / p_s
        factor = torch.ones_like(traj.entropy).index_put((row, step), 1 + (w - 1) * drawn)
        one = torch.ones_like(factor[:, :1])                   # all factors but its own (N, T)
        before = torch.cat([one, factor[:, :-1]], 1).cumprod(1)
        after = torch.cat([one, factor.flip(1)[:, :-1]], 1).cumprod(1).flip(1)
        w = w * (before * after)[row, step]
    w = w.clamp(-cfg.importance_cap, cfg.importance_cap)
    traj.importance = [*getattr(traj, "importance", []), w.cpu()]      # for the log, by epoch
    return views._replace(weight=views.weight * w[:, None])

def train_step(policy, optimizer, examples, step: int, cfg, sample) -> dict:
    """agrpo.train_step, with the mean weight and the share that was cut in its log."""
    traj, reward, row = agrpo.sample_step(policy, examples, step, cfg, sample)
    row |= agrpo.update(policy, optimizer, traj, reward, step, cfg)
    if w := getattr(traj, "importance", None):
        w = torch.cat(w)
        cut = (w.abs() >= cfg.importance_cap * (1 - 1e-9)).double()
        row |= {"is_weight": float(w.mean()), "is_capped": float(cut.mean())} if len(w) else {}
    return row

def independent(size, count, g) -> Tensor:
    """As agrpo.systematic, but each column by itself: `count` on average, as Eq. 10 needs."""
    pi = agrpo.inclusion(size, count)
    return torch.where(torch.rand(pi.shape, generator=g, dtype=torch.float64) < pi, 1 / pi, 0.0)

agrpo.OLD_LOGP.setdefault("cached", cached)
agrpo.TIMESTEPS.setdefault("independent_gradient", functools.partial(
    agrpo.batch_gradient, draw=independent))
