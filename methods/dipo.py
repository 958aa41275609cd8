"""DiPO (DiRL, arXiv 2512.22234): block-causal models, every step scored in a few packed passes.

A block sees itself and the final text of the blocks before it. So the j-th steps of all blocks are
scored in one pass over [prompt | final text | state]. Blocks count from the prompt's first token;
counted from the completion's, the replay would not be what the sampler saw. Dynamic sampling:
groups of equal rewards, which teach nothing, are replaced by those of other prompts.

As published: block cache, packed passes, a mean over the batch's tokens, clip 0.2 and 0.28,
advantage std, fine-tuning first. Different: no KL term unless asked for (--kl); where blocks
begin; only whole blocks are denoised, so that a completion may take fewer calls than steps. Not
here: its inference server.
"""
import dataclasses
import functools
import time

import torch
from torch import Tensor

import agrpo
from methods import join, rows_of

@dataclasses.dataclass(frozen=True)
class Settings:
    """With --method dipo."""
    dynamic_sampling: int = 3          # times that groups of equal rewards are replaced

def packed(prompt, prompt_mask, tokens) -> dict:
    """The prompt of a packed pass: the final text (N, C) behind it, marked by 2 in its mask."""
    return {"prompt": torch.cat([prompt, tokens], 1),
            "prompt_mask": torch.cat([prompt_mask, torch.full_like(tokens, 2)], 1)}

class BlockPolicy(agrpo.Policy):
    """A denoiser whose attention is block-causal over blocks of `block` tokens (SDAR, TraDo)."""

    def __init__(self, model, mask_id: int, eos_id: int, shift=False, block: int = 4):
        super().__init__(model, mask_id, eos_id, shift)
        self.block, self.flex = block, False                   # flex: FlexAttention, on GPUs

    def blocks(self, prompt_mask, C: int, L: int) -> Tensor:
        """(N, C): the first block is what the prompt left of one; only whole ones are denoised."""
        offset = (prompt_mask == 1).sum(1, keepdim=True) % self.block
        position = torch.arange(C, device=prompt_mask.device)
        return ((position + offset) // L).masked_fill(position >= C - offset, C)

    def hidden(self, prompt, prompt_mask, state) -> Tensor:
        """As agrpo.Policy's. Behind a packed prompt each block of the state is read after the final
        text of those before it."""
        C, final = state.shape[1], bool((prompt_mask == 2).any())
        P = prompt.shape[1] - C * final
        ids = torch.cat([prompt, state], 1)[:, :P + C]                     # all real, in order
        real = torch.cat([prompt_mask[:, :P], torch.ones_like(state)], 1)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        noisy = torch.zeros(P + C, dtype=torch.bool, device=ids.device)
        if final:                                              # the state's first block may begin
            tail = min(P, max(1, self.block - 1))              # with the prompt's last tokens
            ids = torch.cat([ids, prompt[:, P - tail:P], state], 1)
            real, positions = (torch.cat([x, x[:, P - tail:]], 1) for x in (real, positions))
            noisy = torch.arange(ids.shape[1], device=ids.device) >= P + C
        rule = block_rule(positions // self.block, real.bool(), noisy)
        sees = block_mask(rule, *ids.shape, ids.device, self.flex)
        return self.decode(ids, sees, positions)[:, -1 - C:]

    def decode(self, ids, sees, positions, **rest) -> Tensor:
        kind = "sdpa" if isinstance(sees, Tensor) else "flex_attention"
        self.model.get_decoder().config._attn_implementation = kind
        return super().decode(ids, sees, positions, **rest)

def block_rule(block, real, noisy):
    """Block-causal attention from indices alone: (row, head, query, key) -> bool. block, real
    (N, S), noisy (S,). Noisy sees noisy of its own block and clean of earlier ones; clean sees
    clean up to its own block, never noisy. A padded query sees itself: no NaN."""
    def sees(n, head, q, k):
        same, before = block[n, q] == block[n, k], block[n, q] > block[n, k]
        allowed = torch.where(noisy[k], noisy[q] & same, before | (same & ~noisy[q]))
        return (q == k) | (allowed & real[n, q] & real[n, k])
    return sees

def block_mask(rule, N: int, S: int, device, flex: bool):
    """The rule as FlexAttention's block mask, never a dense (S, S), or as a dense (N, 1, S, S)."""
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask
        return create_block_mask(rule, N, None, S, S, device=device)
    n, s = torch.arange(N, device=device), torch.arange(S, device=device)
    return rule(n[:, None, None], 0, s[:, None], s)[:, None]

def dipo_views(traj, adv, cfg, mask_id: int, g) -> agrpo.Views:
    """Every step of every block, the j-th steps of all blocks in one view: as many views as the
    slowest block took steps."""
    u, device = traj.reveal_step, traj.tokens.device
    C = u.shape[1]
    offset = traj.prompt_mask.sum(1, keepdim=True) % cfg.block_length
    block = (torch.arange(C, device=device) + offset) // cfg.block_length  # (N, C)
    same = block[:, :, None] == block[:, None, :]                          # (N, C, C)
    local = u - torch.where(same, u[:, None, :], cfg.steps).amin(2)        # step within its block
    local = torch.where(u < cfg.steps, local, C)               # filled in after the end: never seen
    slowest = local.masked_fill(local == C, -1).amax(1, keepdim=True)
    row, step = (torch.arange(cfg.steps, device=device) <= slowest).nonzero(as_tuple=True)
    state = traj.tokens[row].masked_fill(local[row] >= step[:, None], mask_id)
    return agrpo.make_views(traj, row, step, state, local[row] == step[:, None], cfg, "tokens",
                            **packed(traj.prompt[row], traj.prompt_mask[row], traj.tokens[row]))

def train_step(policy, optimizer, examples, step: int, cfg, sample) -> dict:
    """agrpo.train_step with dynamic sampling; what is logged of the rollout is of all completions
    sampled, but entropy and nfe of those that are learned from."""
    clock, G = time.perf_counter(), cfg.completions
    traj, reward, row = agrpo.sample_step(policy, examples, step, cfg, sample)
    for attempt in range(1, cfg.dynamic_sampling + 1):
        groups = reward.view(-1, G)
        equal = groups.amax(1) == groups.amin(1)
        if not equal.any():
            break
        g = agrpo.generator("refill", cfg.seed, step, attempt - 1)
        chosen = torch.randint(len(examples), (int(equal.sum()),), generator=g).tolist()
        batch = [examples[i] for i in chosen for _ in range(G)]
        keys = [("rollout", cfg.seed, step, i, attempt) for i in range(len(batch))]
        more, parts, solved = sample(policy, batch, keys, cfg)
        new = {f"reward_{name}": torch.as_tensor(part, dtype=torch.float64)
               for name, part in parts.items()}
        new |= {"reward": sum(new.values()), "solved": torch.tensor(solved, dtype=torch.float64)}
        different = (~equal).repeat_interleave(G)
        traj = join([rows_of(traj, different), more])
        reward = torch.cat([reward[different], new["reward"]])
        n = row["sampled"] + len(batch)
        row |= {name: (row[name] * row["sampled"] + float(x.sum())) / n for name, x in new.items()}
        row |= {"sampled": n, "nfe": float(traj.nfe.float().mean()),
                "entropy": float(traj.entropy.sum() / traj.tokens.numel())}
    row["rollout_seconds"] = time.perf_counter() - clock
    return {**row, **agrpo.update(policy, optimizer, traj, reward, step, cfg)}

agrpo.OLD_LOGP.setdefault("tokens", functools.partial(agrpo.recorded, positions=False))
agrpo.NORMALIZERS.setdefault("batch_tokens", (     # all tokens of the batch; Eq. 4 is a mean over N
    lambda traj, cfg, row, target: ((traj.reveal_step < cfg.steps).sum().double()
                                    / len(traj.tokens)).clamp(min=1e-9).expand(len(row))))
agrpo.METHODS.setdefault("dipo", agrpo.Method(dipo_views, {
    "position_term": "off", "normalizer": "batch_tokens", "advantage": "std", "clip_high": 0.28},
    train_step))
