"""AGRPO, Amortized Group Relative Policy Optimization: RL for masked diffusion language models.

The algorithm (arXiv 2510.04019) in five lines:
    1. For each of B prompts denoise G completions; of each token keep the step that revealed it.
    2. Reward them; advantage = reward compared with the other completions of the same prompt.
    3. The policy gradient is a sum over denoising steps: draw K of them per completion (Eq. 5).
    4. Rebuild the state x_t of each, score what it revealed again; clipped ratio (Eq. 3, 4).
    5. Weight each by 1 / (Z x mean number of draws), accumulate, then one optimizer step.
    python agrpo.py                  a laptop, minutes: a tiny diffusion model learns 4x4 Sudoku
    python agrpo.py --task gsm8k     one GPU, one night: LoRA on LLaDA-8B-Instruct
B prompts x G completions = N rows; P prompt, C completion, L block length; T steps; K mc_steps;
    M views: a view is a state with the tokens to score on it; V vocabulary; x_t state, o tokens,
    u reveal_step, U_t target, A adv, r ratio, Z normalizer, tau temperature; R rows of N, n or l
    positions of theirs, k tokens of a support. Eq. 1 to 6: our numbers, not the paper's (notebook).
Differs from the official code (`--preset paper` takes 2 to 4 back):
    1. the choice of positions counts where it depends on the model (Eq. 6); 2. all steps until the
    sampler stops count: with Z = T and leave_one_out, 1/T of the gradient of E[R]; 3. rollouts by
    low confidence; 4. time steps drawn over the batch, none twice, by the norm of their gradient.
"""
import dataclasses
import hashlib
import importlib
import math
import sys
import time
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

@dataclasses.dataclass(frozen=True)
class Config:
    """What the method reads. In brackets the paper's value, where the tiny model's is another."""
    method: str = "agrpo"              # which states are scored
    seed: int = 0                      # everything random is a function of it
    prompts: int = 16                  # B per step
    completions: int = 16              # G per prompt [8]
    completion_length: int = 16        # C tokens [384]
    block_length: int = 16             # L tokens; blocks are denoised left to right [12]
    steps: int = 8                     # T at most; each reveals at least C/T tokens [128]
    unmasking: str = "low_confidence"  # which positions a step reveals [random]
    position_term: str = "on"          # off: without Eq. 6, biased unless they are random [off]
    temperature: float = 1.0           # tau [0.6]
    top_k: int = 0                     # sample among the k likeliest tokens; 0: all [150]
    top_p: float = 1.0                 # of these k the fewest that hold this share of them [0.99]
    timesteps: str = "batch_gradient"  # how the K time steps are drawn [low_discrepancy]
    mc_steps: int = 1                  # K per completion with an advantage, on average [24]
    normalizer: str = "steps"          # Z: steps = T; last_step = the paper's m [last_step]
    advantage: str = "leave_one_out"   # of a reward within its group [mean]
    clip: float = 0.2                  # eps of Eq. 4; acts from the second inner epoch on
    clip_high: float = 0.0             # eps above 1, if it differs; 0: as clip
    kl: float = 0.0                    # beta of Eq. 4; its reference: --kl-reference
    inner_epochs: int = 1              # optimizer steps per rollout
    lr: float = 5e-4                   # of AdamW [5e-6]
    warmup: int = 5                    # steps of linear warm-up [1 %]
    decay_steps: int = 0               # cosine decay to zero over so many; 0: none [all]
    weight_decay: float = 0.01         # of AdamW
    max_grad_norm: float = 1.0         # longer gradients are scaled down to it
    tokens_per_pass: int = 12288       # per forward and backward; 0: as memory allows

class Rows(dict):
    """A table of functions. A name that it does not hold is looked for in methods/."""
    def __missing__(self, name):
        importlib.import_module("methods").load(name)
        return dict(self)[name]

def generator(*key) -> torch.Generator:
    """A local generator that depends on its key alone: any step or row can be repeated alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

# ---------------------------------------------------------------- the denoiser and its token law
class Policy(torch.nn.Module):
    """A denoiser: what rollout and step_logp ask is its ids, `blocks` and `logits`."""
    def __init__(self, model, mask_id: int, eos_id: int, shift=False):         # shift: Dream's
        super().__init__()
        self.model, self.mask_id, self.eos_id = model.eval(), mask_id, eos_id  # no dropout
        self.shift, self.turn_id = shift, eos_id               # or <|eot_id|>: also ends a text

    def logits(self, prompt, prompt_mask, state, where) -> Tensor:
        """prompt, prompt_mask (N, P), state (N, C), where (N, C) bool -> (n, V), row-major, from
        the LM head at `where` only, in float32. Padding is masked, positions count from the first
        real token: a padded row scores as it does alone. MASK is no token to sample."""
        hidden, head = self.hidden(prompt, prompt_mask, state), self.model.get_output_embeddings()
        at = hidden[:, 1 - self.shift:][:, :state.shape[1]][where]  # (n, width); shifted: one left
        dtype = torch.promote_types(at.dtype, torch.float32)   # bfloat16 is off by 0.1 nats
        logits = torch.nn.functional.linear(at.to(dtype), head.weight.to(dtype))
        logits[:, self.mask_id] = -math.inf
        return logits

    def hidden(self, prompt, prompt_mask, state) -> Tensor:
        """(N, 1 + C, width): of the prompt's last token and of the completion."""
        ids = torch.cat([prompt, state], 1)                                    # (N, S)
        real = torch.cat([prompt_mask, torch.ones_like(state)], 1)
        everyone = real.bool()[:, None, None].expand(-1, 1, ids.shape[1], -1)  # (N, 1, S, S)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        return self.decode(ids, everyone, positions)[:, -1 - state.shape[1]:]

    def decode(self, ids, sees, positions, **rest) -> Tensor:
        """The model without its head: (N, S, width). On a GPU float32 weights meet bfloat16."""
        decoder, mixed = self.model.get_decoder(), ids.is_cuda and self.model.dtype == torch.float32
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed):
            return decoder(input_ids=ids, attention_mask=sees, position_ids=positions, **rest)[0]

    def blocks(self, prompt_mask, C: int, L: int) -> Tensor:
        """(N, C) the block of each position; C: it is EOS from the start."""
        return (torch.arange(C, device=prompt_mask.device) // L).expand(len(prompt_mask), C)

class LogSumExp(torch.autograd.Function):
    """z (n, k) -> log sum exp z (n,), softmax z (n, k) without a gradient: one pass, not three."""
    @staticmethod
    def forward(ctx, z):
        p = z.softmax(-1)
        ctx.save_for_backward(p)
        ctx.mark_non_differentiable(p)
        return z.amax(-1) - p.amax(-1).log(), p
    @staticmethod
    def backward(ctx, grad, _):
        return grad[:, None] * ctx.saved_tensors[0]

LOG_ZERO = -1e4                        # stands for log 0: exp gives 0, sums stay finite
class Law:
    """Eq. 2: the tempered, truncated sampling law of n positions, from logits (n, V).
    support (n, k) ids, V = none: the top-k, then top-p (the token that crosses p stays in), or
    the rollout's, given for all positions or the `known` (n,) bool. None: everything. p (n, k):
    the probabilities, without a gradient. Temperature 0: all on the likeliest token."""
    def __init__(self, logits, cfg: Config, support=None, known=None):
        V, self.tau, self.logits = logits.shape[1], cfg.temperature or 1.0, logits
        if cfg.temperature == 0:
            support = logits.argmax(-1, keepdim=True)
        elif cfg.top_k and (support is None or known is not None):
            top, found = logits.detach().topk(min(cfg.top_k, V), dim=-1)       # (n, k), falling
            p = (top / self.tau).softmax(-1)
            found = found.masked_fill(p.cumsum(-1) - p >= cfg.top_p, V)
            support = found if support is None else found.index_put((known,), support)
        self.support, self.inside = support, logits                            # inside (n, k)
        if support is not None:
            at = support.clamp(max=V - 1)
            self.inside = logits.gather(1, at).masked_fill(support == V, -math.inf)
        self.z = self.inside if self.tau == 1.0 else self.inside / self.tau
        self.lse, self.p = LogSumExp.apply(self.z)                             # (n,), (n, k)
        self.plain_lse = (self.lse if self.z is logits else LogSumExp.apply(logits)[0]).detach()

    def index(self, token) -> Tensor:
        """token (n,) -> (n,) where it stands in the support."""
        return token if self.support is None else (self.support == token[:, None]).int().argmax(1)

    def logp(self, token) -> Tensor:
        """(n,) under the law; LOG_ZERO outside of its support."""
        logp = self.z.gather(1, self.index(token)[:, None]).squeeze(1) - self.lse
        outside = None if self.support is None else (self.support != token[:, None]).all(1)
        return logp if outside is None else logp.masked_fill(outside, LOG_ZERO)

    def confidence(self, token) -> Tensor:
        """(n,) what LLaDA compares: the log-probability untempered, without a gradient."""
        return self.logits.detach().gather(1, token[:, None]).squeeze(1) - self.plain_lse

    def divergence(self, at, logits, cfg: Config) -> Tensor:
        """(m,) KL(this law || that of logits (m, V) on its support) at positions `at` (n,) bool."""
        other = Law(logits.detach(), cfg, None if self.support is None else self.support[at])
        mine, theirs = self.z[at] - self.lse[at, None], other.z - other.lse[:, None]   # (m, k)
        return (mine.exp() * (mine - theirs).masked_fill(mine == -math.inf, 0.0)).sum(1)

    def draw(self, u) -> Tensor:
        """u (n,) in [0, 1) -> token ids (n,), by inverting the cumulative distribution."""
        cdf = self.p.double().cumsum(1)
        u = u.double().clamp(max=1 - 2**-50)[:, None] * cdf[:, -1:]            # below the sum
        index = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)
        return (index if self.support is None else self.support.gather(1, index)).squeeze(1)

    def gradient_size(self, token, chosen) -> Tensor:
        """|d log p(token) / d logits|^2 at the positions `chosen` (n,) bool."""
        index, own = self.index(token)[chosen, None], self.logp(token)[chosen]
        others = torch.linalg.vector_norm(self.p[chosen].scatter_(1, index, 0.0), dim=1)
        return (own.expm1()**2 + others**2) / self.tau**2

# ----------------------------------------------------------------- which positions a step reveals
class Unmask(NamedTuple):
    """A row of UNMASK. No order_logp: the choice does not depend on theta, or is not random."""
    score: Callable                    # (law, token, noise, cfg), each of n open positions -> (n,)
    order_logp: Callable | None = None  # (law, token, at, rank, cfg): see losing_logp
    count: Callable | None = None      # (ranked (R, C), rows (R,), cfg) -> (R,) how many; else C/T

def losing_logp(law: Law, token, at, rank, cfg: Config) -> tuple[Tensor, Tensor]:
    """Eq. 6 -> log-probability (R,) that every open position not revealed drew a loser: confidence
    below c, that of the least confident winner, or equal and further right. And the squared norm of
    its gradient by each position's logits (n,). at: row and position (n,) each; rank (R, C)."""
    (row, position), C, lost = at, rank.shape[1], (rank[at] < 0).nonzero().squeeze(1)
    sure = law.confidence(token).masked_fill(rank[at] < 0, math.inf)
    dense = torch.full(rank.shape, math.inf, dtype=sure.dtype, device=sure.device)
    c, from_right = dense.index_put(at, sure).flip(1).min(1)                   # (R,), rightmost
    row, position = row[lost], position[lost]                                  # (l,)
    right = (position > C - 1 - from_right[row])[:, None]
    sure = law.inside.detach()[lost] - law.plain_lse[lost, None]               # (l, k)
    wins = (sure > c[row, None]) | (sure == c[row, None]) & ~right
    z = law.z[lost].masked_fill(wins, -math.inf)
    none = z.detach().amax(1) == -math.inf                     # not one candidate would lose
    mass, q = LogSumExp.apply(z.masked_fill(none[:, None], 0.0))
    log_f = (mass - law.lse[lost]).masked_fill(none, LOG_ZERO)                 # (l,) log F_j(c)
    losers = torch.linalg.vector_norm(q, dim=1) * log_f.detach().expm1()
    winners = torch.linalg.vector_norm(law.p[lost].masked_fill(~wins, 0.0), dim=1)
    size = (losers**2 + winners**2).masked_fill(none, 0.0) / law.tau**2        # |d log F / dz|^2
    logp = torch.zeros_like(c).index_add(0, row, log_f)
    return logp, torch.zeros_like(law.lse).index_put((lost,), size)

UNMASK = Rows({
    "random": Unmask(lambda law, token, u, cfg: u),
    "low_confidence": Unmask(lambda law, token, u, cfg: law.confidence(token), losing_logp)})

def open_positions(state, mask_id: int, blocks) -> tuple[Tensor, Tensor]:
    """(N, C) bool: the first block with a masked position, and the masked positions in it."""
    masked = state == mask_id
    block = blocks == blocks.masked_fill(~masked, blocks.shape[1]).amin(1, keepdim=True)
    return block, block & masked

def choose(rule: Unmask, score, open_, rows, n: int, cfg: Config) -> Tensor:
    """score (open_.sum(),), open_ (R, C) -> rank (R, C) = 0, 1, .. of the best scored open
    positions, n a row or what the rule's count says; -1 elsewhere. Ties go to the leftmost."""
    dense = torch.full(open_.shape, -math.inf, dtype=score.dtype, device=score.device)
    ranked, best = dense.masked_scatter(open_, score).sort(dim=1, descending=True, stable=True)
    count = rule.count(ranked, rows, cfg).clamp(min=n)[:, None] if rule.count else n
    return (rank := best.argsort(dim=1)).masked_fill(~open_ | (rank >= count), -1)

@dataclasses.dataclass
class Trajectory:
    """What a rollout did, N rows. One integer per token, reveal_step, is the trajectory."""
    prompt: Tensor                     # (N, P) ids, left padded
    prompt_mask: Tensor                # (N, P) 1 = real token
    tokens: Tensor                     # (N, C) final completion
    reveal_step: Tensor                # (N, C) step that revealed the token; T: after the end
    rank: Tensor                       # (N, C) 0, 1, ..: its order among those of the step
    logp: Tensor                       # (N, C) of the token under the sampling law, when revealed
    order_logp: Tensor                 # (N, T) of each step's choice of positions
    entropy: Tensor                    # (N, T) of the law, over the positions revealed, nats
    gradient: Tensor                   # (N, T) |d log pi(step) / d logits|^2: which steps to draw
    nfe: Tensor                        # (N,) denoiser calls of the row = its number of steps
    eos_id: int
    support: Tensor | None = None      # (N, C, k) of the law, V = none; None: everything
    old: str = "recorded"              # old log-probs of its states: a row of OLD_LOGP
    @property
    def last_step(self) -> Tensor:
        """(N,) the last step that revealed a token other than EOS; 0 if there is none."""
        return torch.where(self.tokens != self.eos_id, self.reveal_step, 0).amax(1)

@torch.no_grad()
def rollout(policy, prompt, prompt_mask, cfg: Config, keys: list, count=None) -> Trajectory:
    """Denoise one completion per row of prompt (N, P), block by block, in at most T steps. keys: N
    hashables; a row's random numbers depend on its key alone. A row is finished, and leaves the
    batch, once a complete block holds the end of its text. count: in place of UNMASK's."""
    N, C, L, T = len(prompt), cfg.completion_length, cfg.block_length, cfg.steps
    rule, mask_id, eos_id = UNMASK[cfg.unmasking], policy.mask_id, policy.eos_id
    rule = rule._replace(count=count or rule.count)
    seeds = [generator(*(key if isinstance(key, tuple) else (key,))) for key in keys]
    u = torch.stack([torch.rand(T, 2, L, generator=g, dtype=torch.float64) for g in seeds])
    u, blocks = u.to(prompt.device), policy.blocks(prompt_mask, C, L)          # blocks (N, C)
    tokens = prompt.new_full((N, C), mask_id).masked_fill(blocks == C, eos_id)  # now the state x_t
    zeros = [prompt.new_zeros(N, width, dtype=torch.float64) for width in (C, T, T, T)]
    traj = Trajectory(prompt, prompt_mask, tokens, torch.full_like(tokens, T),
                      torch.zeros_like(tokens), *zeros, prompt.new_zeros(N), eos_id)
    for t in range(T):
        block, open_ = open_positions(tokens, mask_id, blocks)
        rows = open_.any(1).nonzero().squeeze(1)               # (R,) of N, not finished; row: of R
        if not len(rows):
            break
        block, open_ = block[rows], open_[rows]                                # (R, C)
        at = row, position = open_.nonzero(as_tuple=True)                      # (n,), row-major
        law = Law(policy.logits(prompt[rows], prompt_mask[rows], tokens[rows], open_), cfg)
        u_token, u_order = u[rows[row], t, :, position % L].unbind(-1)
        token = law.draw(u_token)                              # a candidate for each position
        rank = choose(rule, rule.score(law, token, u_order, cfg), open_, rows, C // T, cfg)
        won = rank[at] >= 0
        where = rows[row[won]], position[won]
        tokens[where], traj.reveal_step[where], traj.rank[where] = token[won], t, rank[at][won]
        traj.logp[where] = law.logp(token)[won].double()
        traj.entropy[:, t].index_add_(0, where[0], torch.special.entr(law.p[won]).sum(-1).double())
        traj.gradient[:, t].index_add_(0, where[0], law.gradient_size(token, won).double())
        if law.support is not None:
            if traj.support is None:
                traj.support = tokens.new_zeros((N, C, law.support.shape[1]))
            traj.support[where] = law.support[won]
        if rule.order_logp and cfg.position_term == "on":
            log_choice, size = rule.order_logp(law, token, at, rank, cfg)      # Eq. 6
            traj.order_logp[rows, t] = log_choice.double()
            traj.gradient[:, t].index_add_(0, rows[row], size.double())
        traj.nfe[rows] += 1
        ends = block & ((tokens == eos_id) | (tokens == getattr(policy, "turn_id", eos_id)))[rows]
        ended = rows[ends.any(1) & ~(open_ & (rank < 0)).any(1)]
        tokens[ended] = tokens[ended].masked_fill(tokens[ended] == mask_id, eos_id)    # no loss
        del law                                                # before the next logits are made
    return traj

# ------------------------------------------------- states visited, and their steps scored again
def state_at(traj: Trajectory, row, step, mask_id: int) -> tuple[Tensor, Tensor]:
    """row, step (M,) -> x_t (M, C) as the denoiser saw it before step t, and U_t (M, C) bool."""
    u = traj.reveal_step[row]                                  # states are never stored
    return traj.tokens[row].masked_fill(u >= step[:, None], mask_id), u == step[:, None]

class Views(NamedTuple):
    """What a method scores: M views, each a row of one forward and backward."""
    row: Tensor                        # (M,) of the trajectory
    step: Tensor                       # (M,) the first step that it stands for
    prompt: Tensor                     # (M, P) what the denoiser sees of the prompt
    prompt_mask: Tensor                # (M, P)
    state: Tensor                      # (M, C) ... and of the completion
    target: Tensor                     # (M, C) bool, positions whose log-prob counts
    weight: Tensor                     # (M, 1) or (M, C), 1 / (Z x mean number of draws)
    old: str                           # where old log-probs come from: a row of OLD_LOGP
    adv: Tensor | None = None          # (M, 1) or (M, C): this and the rest by `prepare`
    logp_old: Tensor | None = None     # (M, C); None: those of the first evaluation
    order_logp_old: Tensor | None = None    # (M,); None: the choice of positions does not count
    def select(self, index) -> "Views":                        # indices, a slice or bool (M,)
        return Views(*(x[index] if isinstance(x, Tensor) else x for x in self))

def make_views(traj, row, step, state, target, cfg, old: str, weight=1.0, **prompt) -> Views:
    """Views of `weight` / Z; those without a target are left out."""
    weight = (weight / NORMALIZERS[cfg.normalizer](traj, cfg, row, target).double())[:, None]
    views = Views(row, step, traj.prompt[row], traj.prompt_mask[row], state, target, weight, old)
    return views._replace(**prompt).select(target.any(1))

def step_logp(policy, traj: Trajectory, views: Views, cfg: Config):
    """Eq. 1 for each view under the present parameters, one forward: log-probs (targets,), in
    row-major order; those of the choice of positions (M,), None if it has none; with cfg.kl the
    divergence of each target's whole law from policy.reference's (targets,), else None."""
    row, target, order_logp, where = views.row, views.target, None, views.target
    first = int(views.prompt_mask.any(0).int().argmax())       # what is padding in all rows
    sees = views.prompt[:, first:], views.prompt_mask[:, first:], views.state
    if cfg.position_term == "on" and views.order_logp_old is not None:
        order_logp = UNMASK[cfg.unmasking].order_logp
    if order_logp:                                             # needs the losers' logits, too
        blocks = policy.blocks(sees[1], target.shape[1], cfg.block_length)
        where = open_positions(views.state, policy.mask_id, blocks)[1]
    token, hit = traj.tokens[row][where], target[where]
    support = None if traj.support is None else traj.support[row][target]
    law = Law(policy.logits(*sees, where), cfg, support, hit if order_logp else None)
    logp = law.logp(token)[hit]
    kl = law.divergence(hit, policy.reference.logits(*sees, target), cfg) if cfg.kl else None
    if not order_logp:
        return logp, None, kl
    at, rank = where.nonzero(as_tuple=True), traj.rank[row].masked_fill(~target, -1)
    return logp, order_logp(law, token, at, rank, cfg)[0], kl

# ------------------------------------------------------------------ quasi-Monte-Carlo time steps
def proposal(size, inside, floor: float) -> Tensor:
    """p (R, S), rows sum to 1: in proportion to size `inside`, with a floor that bounds weights."""
    size, even = (size + 1e-9) * inside, inside.double() / inside.sum(1, True).clamp(min=1)
    return (1 - floor) * size / size.sum(1, True).clamp(min=1e-300) + floor * even

def invert(p, u) -> Tensor:
    """Points u (N, K) in [0, 1) through the inverse distribution of p (N, T) -> weight (N, T)."""
    cdf, last = p.cumsum(1), p.shape[1] - 1 - (p > 0).flip(1).int().argmax(1, keepdim=True)
    u = u.clamp(max=1 - 2**-53) * cdf[:, -1:]                  # it may have been rounded up to 1
    step = torch.searchsorted(cdf, u, right=True).minimum(last)
    return torch.zeros_like(p).scatter_add_(1, step, 1 / (u.shape[1] * p.gather(1, step)))

def low_discrepancy(traj: Trajectory, inside, stake, K: int, g) -> Tensor:
    """AGRPO's: one point in each of N K cells of [0, 1), dealt out at random; p ~ entropy."""
    cell = torch.randperm(len(stake) * K, generator=g).view(-1, K)
    u = (cell + torch.rand(cell.shape, generator=g, dtype=torch.float64)) / cell.numel()
    return invert(proposal(traj.entropy.cpu(), inside, floor=0.0), u)

def inclusion(size, count) -> Tensor:
    """pi_s = min(1, c size_s) for size (R, S), c such that each row sums to `count` (R, 1)."""
    sure = torch.zeros_like(size, dtype=torch.bool)
    while True:                                                # what would exceed 1 is certain
        rest = size.masked_fill(sure, 0.0)
        pi = (count - sure.sum(1, True)) * rest / rest.sum(1, True).clamp(min=1e-300)
        if not (pi >= 1 - 1e-9).any():
            return pi.masked_fill(sure, 1.0)
        sure |= pi >= 1 - 1e-9

def systematic(size, count, g) -> Tensor:
    """`count` (R, 1) different columns of each row of size (R, S): a comb of teeth one apart, at a
    random offset, over the running sum of pi. -> 1/pi where it hits, else 0 (Horvitz-Thompson)."""
    pi, offset = inclusion(size, count), torch.rand(len(size), 1, generator=g, dtype=torch.float64)
    teeth = (pi.cumsum(1) - offset).ceil()                     # teeth up to each column
    hit = teeth.diff(dim=1, prepend=torch.zeros_like(teeth[:, :1])) > 0
    return torch.where(hit, 1 / pi, 0.0)

def batch_gradient(traj: Trajectory, inside, stake, K: int, g, draw=systematic) -> Tensor:
    """Ours: K steps per row with a stake, over all rows at once and none twice, in proportion to
    stake times the norm of the step's gradient; shuffled, so that the comb meets no period."""
    count = inside.sum(1).clamp(max=K)[stake != 0].sum().reshape(1, 1)
    inside, size = inside & (stake != 0)[:, None], traj.gradient.cpu().sqrt()
    p = proposal(size.reshape(1, -1), inside.reshape(1, -1), floor=0.1)
    p = p * stake.abs().repeat_interleave(inside.shape[1])     # sizes now: need not sum to 1
    order = torch.randperm(p.shape[1], generator=g)
    return draw(p[:, order], count, g)[:, order.argsort()].reshape(inside.shape)

# (traj, inside (N, T) bool: the steps that count, stake (N,) = |A| + beta, K, g) -> weight (N, T),
# draws / their mean number; all on the CPU. E[weight] = 1: sum_t weight_t f_t is unbiased (Eq. 5)
TIMESTEPS = Rows({"low_discrepancy": low_discrepancy, "batch_gradient": batch_gradient})

# ------------------------------------------------------------------ advantages, methods, the loss
def within_group(scale: Callable) -> Callable:
    """reward (B, G) -> (B, G), less the group's mean; zero where all are equal: no pass for it."""
    return lambda r: scale(r, r - r.mean(1, keepdim=True)).masked_fill(
        r.amax(1, keepdim=True) == r.amin(1, keepdim=True), 0.0)

ADVANTAGES = Rows({                    # std turns the gradient where rewards have > 2 values
    "mean": within_group(lambda r, adv: adv),
    "leave_one_out": within_group(lambda r, adv: adv * r.shape[1] / (r.shape[1] - 1)),
    "std": within_group(lambda r, adv: adv / (r.std(1, keepdim=True) + 1e-4))})

# (traj, cfg, row (M,), target (M, C)) -> Z (M,), which Eq. 4 divides the sum over steps by
NORMALIZERS = Rows({                   # T, a constant: the expected gradient is 1/T of E[R]'s
    "steps": lambda traj, cfg, row, target: torch.full_like(row, cfg.steps),
    "last_step": lambda traj, cfg, row, target: traj.last_step[row] + 1})  # m: no stopping time

class Method(NamedTuple):
    """A row of METHODS."""
    views: Callable                    # (traj, adv (N,), cfg, mask_id, generator) -> Views
    settings: dict = {}                # as published; flags win over them
    train_step: Callable | None = None  # in place of ours
    begin: Callable = lambda policy, optimizer, cfg: None      # before the first step

def steps_inside(traj: Trajectory, cfg: Config) -> Tensor:
    """(N, T) bool, on the CPU: the steps that count; with the paper's Z only up to last_step."""
    horizon = traj.last_step + 1 if cfg.normalizer == "last_step" else traj.nfe
    return torch.arange(traj.entropy.shape[1]) < horizon.cpu()[:, None]

def views_where(weight, traj: Trajectory, cfg: Config, mask_id: int) -> Views:
    """weight (N, T) -> the visited states where it is not zero."""
    assert weight.shape == traj.entropy.shape, f"weight {[*weight.shape]} is not (N, T)"
    row, step = weight.nonzero(as_tuple=True)
    row, step, weight = (x.to(traj.tokens.device) for x in (row, step, weight[row, step]))
    return make_views(traj, row, step, *state_at(traj, row, step, mask_id), cfg, traj.old, weight)

def agrpo_views(traj: Trajectory, adv, cfg: Config, mask_id: int, g) -> Views:
    """AGRPO: K drawn steps a completion, weight 1 / (Z x mean number of draws) (Eq. 5)."""
    stake = (adv.abs() + cfg.kl).cpu().double()                # under a KL term all rows count
    weight = TIMESTEPS[cfg.timesteps](traj, steps_inside(traj, cfg), stake, cfg.mc_steps, g)
    return views_where(weight, traj, cfg, mask_id)

def exact_views(traj: Trajectory, adv, cfg: Config, mask_id: int, g) -> Views:
    """Every step of every completion: what agrpo estimates, at up to T/K times the cost."""
    return views_where(steps_inside(traj, cfg).double(), traj, cfg, mask_id)

METHODS = Rows({"agrpo": Method(agrpo_views), "exact": Method(exact_views)})

def surrogate(logp, logp_old, adv, cfg: Config) -> tuple[Tensor, Tensor]:
    """Eq. 3 and 4, elementwise: min(r A, clip(r) A), and the ratio r without a gradient. A token of
    probability 0 (LOG_ZERO) under one of the laws has r = 1 and no gradient."""
    ratio = torch.where(torch.minimum(logp, logp_old) > LOG_ZERO / 2, logp - logp_old, 0.0).exp()
    clipped = ratio.clamp(1 - cfg.clip, 1 + (cfg.clip_high or cfg.clip))
    return torch.minimum(ratio * adv, clipped * adv), ratio.detach()

def policy_loss(policy, traj: Trajectory, views: Views, cfg: Config) -> tuple[Tensor, Tensor]:
    """Minus Eq. 4 for some prepared views, and ratios (of tokens, then of choices of positions)."""
    target, (logp, order_logp, kl) = views.target, step_logp(policy, traj, views, cfg)
    logp_old = logp.detach() if views.logp_old is None else views.logp_old[target]
    adv, weight = (x.expand(target.shape)[target] for x in (views.adv, views.weight))
    gain, ratio = surrogate(logp, logp_old, adv * weight, cfg)
    gain = gain if kl is None else gain - cfg.kl * weight * kl
    total = gain.sum()                              # Eq. 1 is a sum over the tokens of a step
    if order_logp is not None:                      # one action, clipped once, not with each token
        adv = (views.adv * views.weight)[:, 0]
        gain, order_ratio = surrogate(order_logp, views.order_logp_old, adv, cfg)
        total, ratio = total + gain.sum(), torch.cat([ratio, order_ratio])
    return -total / len(traj.tokens), ratio         # 1/N: a mean over all completions

def recorded(policy, traj: Trajectory, views: Views, cfg: Config, positions=True) -> Views:
    """Old log-probs are the rollout's."""
    order_logp = traj.order_logp[views.row, views.step] if positions else None
    return views._replace(logp_old=traj.logp[views.row], order_logp_old=order_logp)

OLD_LOGP = Rows({"recorded": recorded})         # (policy, traj, views, cfg) -> views

def prepare(policy, traj: Trajectory, views: Views, adv, cfg: Config) -> Views:
    """The views that have a gradient, with adv (N, 1) or (N, C) and all that policy_loss needs."""
    if not cfg.kl and adv.shape[1] == 1:                       # steps that were certain have none
        moves = traj.gradient[views.row, views.step] > 0
        moves |= views.old != "recorded" or cfg.inner_epochs > 1
        views = views.select(moves & (adv[views.row, 0] != 0))
    return OLD_LOGP[views.old](policy, traj, views._replace(adv=adv[views.row]), cfg)

# -------------------------------------------------------------------------------------- the loop
def processes() -> tuple[int, int]:
    """This process's rank, and how many there are (torchrun, accelerate launch)."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)

def gather(objects: list) -> list:
    """The lists of all processes, one after the other."""
    lists = [objects] * processes()[1]
    if len(lists) > 1:
        dist.all_gather_object(lists, objects)
    return [x for part in lists for x in part]

def batch_of_examples(examples: list, step: int, cfg: Config) -> list:
    """B examples for a step: epochs over the data, each in its own order."""
    n, at = len(examples), range(step * cfg.prompts, (step + 1) * cfg.prompts)
    order = [torch.randperm(n, generator=generator("data", cfg.seed, i // n))[i % n] for i in at]
    return [examples[i] for i in order]

def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, then constant, or with decay_steps a cosine that ends there."""
    done = min(1.0, max(0, step - cfg.warmup) / max(1, cfg.decay_steps - cfg.warmup))
    warm = min(1.0, (step + 1) / max(1, cfg.warmup))
    return cfg.lr * warm * 0.5 * (1 + math.cos(math.pi * done * (cfg.decay_steps > 0)))

def micro_batches(views: Views, cfg: Config) -> list[Tensor]:
    """Indices of the views, in parts of at most tokens_per_pass, longest prompts first."""
    size = max(1, cfg.tokens_per_pass // (views.prompt.shape[1] + views.state.shape[1]))
    order = views.prompt_mask.bool().sum(1).argsort(descending=True, stable=True)
    return [part for part in order.split(size) if len(part)]

def accumulate(views: Views, cfg: Config, loss_of: Callable) -> tuple[float, list]:
    """Gradients of this process's views -> its loss, ratios. loss_of(views) -> loss, ratios."""
    (rank, world), total, ratios = processes(), 0.0, []
    mine = views.select(slice(rank, None, world))
    for part in micro_batches(mine, cfg):
        loss, ratio = loss_of(mine.select(part))
        loss.backward()
        total += float(loss.detach())
        ratios.append(ratio.float().cpu())
    return total, ratios

def optimizer_step(optimizer, step: int, cfg: Config, finite: bool) -> tuple[float, bool]:
    """The optimizer's step -> norm of the (first group's) gradient, and whether it was applied."""
    norms = []
    for group in optimizer.param_groups:
        for p in group["params"] if processes()[1] > 1 else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        norms += [float(torch.nn.utils.clip_grad_norm_(group["params"], cfg.max_grad_norm))]
        group["lr"] = learning_rate(step, cfg) * group["scale"]
    if finite := all(gather([finite and all(map(math.isfinite, norms))])):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms[0], finite

def sample_step(policy, examples: list, step: int, cfg: Config, sample: Callable):
    """G completions for each of B prompts -> Trajectory, reward (N,), what is logged. sample is
    (policy, examples, keys, cfg) -> Trajectory, parts of rewards {name: (N,)}, which are right."""
    clock = time.perf_counter()
    batch = [ex for ex in batch_of_examples(examples, step, cfg) for _ in range(cfg.completions)]
    keys = [("rollout", cfg.seed, step, i) for i in range(len(batch))]
    traj, parts, solved = sample(policy, batch, keys, cfg)
    parts = {name: torch.as_tensor(part, dtype=torch.float64) for name, part in parts.items()}
    reward = sum(parts.values())
    return traj, reward, {
        "step": step, "reward": float(reward.mean()), "sampled": len(batch),
        **{f"reward_{name}": float(part.mean()) for name, part in parts.items()},
        "solved": sum(map(float, solved)) / len(batch), "nfe": float(traj.nfe.float().mean()),
        "entropy": float(traj.entropy.sum() / traj.tokens.numel()),
        "rollout_seconds": time.perf_counter() - clock}

def update(policy, optimizer, traj: Trajectory, reward, step: int, cfg: Config,
           per_token=lambda views, adv: adv, also=lambda views: (0.0, [])) -> dict:
    """Advantages, views, gradients, an optimizer step per inner epoch -> what is logged. A second
    network: per_token(views, adv (N, 1)) -> adv (N, C), also(views) -> loss, ratios: its own."""
    clock, groups, ratios = time.perf_counter(), reward.view(-1, cfg.completions), []
    adv = ADVANTAGES[cfg.advantage](groups).reshape(reward.shape)                      # (N,)
    finite = all(bool(x.isfinite().all()) for x in (adv, traj.logp, traj.order_logp, traj.gradient))
    adv = adv.to(traj.logp.device) if finite else torch.zeros_like(traj.logp[:, 0])
    made = [METHODS[cfg.method].views(traj, adv, cfg, policy.mask_id, generator(
        "timesteps", cfg.seed, step, *([i] if i else []))) for i in range(cfg.inner_epochs)]
    adv = per_token(made[0], adv[:, None])
    epochs = [prepare(policy, traj, views, adv, cfg) for views in made]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in weights] if cfg.inner_epochs > 1 else []
    for views in epochs:
        loss, some = accumulate(views, cfg, lambda part: policy_loss(policy, traj, part, cfg))
        other, more = also(views)
        norm, finite = optimizer_step(optimizer, step, cfg, finite and math.isfinite(loss + other))
        ratios += some + more
    for p, was in zip(weights, before) if not finite else ():  # earlier inner epochs, too
        p.data.copy_(was)
    ratio = torch.cat(gather(ratios) or [torch.ones(1)])
    outside = ((ratio < 1 - cfg.clip) | (ratio > 1 + (cfg.clip_high or cfg.clip))).float()
    drawn, used = (sum(len(views.row) for views in some) for some in (made, epochs))
    return {"ratio": float(ratio.mean()), "clip_fraction": float(outside.mean()), "passes": used,
            "grad_norm": norm, "passes_saved": drawn - used, "skipped": int(not finite),
            "lr": learning_rate(step, cfg), "update_seconds": time.perf_counter() - clock}

def train_step(policy, optimizer, examples: list, step: int, cfg: Config, sample: Callable) -> dict:
    """One step of RL, start to end; returns what is logged."""
    traj, reward, row = sample_step(policy, examples, step, cfg, sample)
    return {**row, **update(policy, optimizer, traj, reward, step, cfg)}

def make_optimizer(policy, cfg: Config) -> torch.optim.Optimizer:
    """AdamW over groups that are clipped apart; `scale`: of a group's learning rate."""
    groups = [{"params": [p for p in policy.model.parameters() if p.requires_grad], "scale": 1.0}]
    return torch.optim.AdamW(groups, cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)

def train(run):
    """The loop. A run (support.runs.Run) has model and data, keeps log, checkpoints, curve."""
    policy, cfg, method = run.policy, run.cfg, run.method
    optimizer, one_step = make_optimizer(policy, cfg), method.train_step or train_step
    method.begin(policy, optimizer, cfg)
    for step in run.steps(optimizer):                          # from the last checkpoint on
        run.keep(one_step(policy, optimizer, run.examples, step, cfg, run.sample))

def main(argv=None) -> int:
    """The command line; returns the exit code."""
    return importlib.import_module("eval").training(argv, train)

if __name__ == "__main__":                                     # by its name: tables exist once
    sys.exit(importlib.import_module("agrpo").main())
