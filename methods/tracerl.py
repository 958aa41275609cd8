"""TraceRL (arXiv 2509.06949): steps merged, a value model, larger blocks in the update.

Value model: what reward a masked position expects, read before it is revealed. A backbone of its
own, or, beside adapters, a second set of adapters on the same one; its head is zero at first.
Block schedule: a block-causal model is updated with larger blocks of attention than it was rolled
out with, and then rolled out with these.

As published: merged steps, value model, GAE, larger blocks in the update, advantage std, clip 0.2.
KL to the policy before the update acts from the second inner epoch on. Different: shrink 2 for the
tiny model; KL of whole laws, not k3. Not here: its inference engines.
"""
import contextlib
import copy
import dataclasses

import torch
from torch import Tensor

import agrpo
from support.checkpoints import add_adapter

@dataclasses.dataclass(frozen=True)
class Settings:
    """With --method tracerl."""
    shrink: int = 8                    # steps merged; tiny models: 2, block-causal ones: 1
    update_block: int = 0              # tokens in an attention block in the update; 0: as it is
    value_model: str = "off"           # on: per-token baselines
    value_lr: float = 5e-4             # its learning rate
    gamma: float = 1.0                 # discount per step
    lam: float = 1.0                   # lambda of the advantages

def tracerl_views(traj, adv, cfg, mask_id: int, g) -> agrpo.Views:
    """Every step, `shrink` neighbours merged: what they revealed is scored on the first's state."""
    first = torch.arange(cfg.steps) % cfg.shrink == 0
    row, step = (agrpo.steps_inside(traj, cfg) & first).nonzero(as_tuple=True)
    row, step = row.to(traj.tokens.device), step.to(traj.tokens.device)
    state, _ = agrpo.state_at(traj, row, step, mask_id)
    u = traj.reveal_step[row]
    merged = (u >= step[:, None]) & (u < step[:, None] + cfg.shrink) & (u < cfg.steps)
    as_seen = cfg.shrink == 1 and not cfg.update_block
    return agrpo.make_views(traj, row, step, state, merged, cfg, traj.old if as_seen else "scored")

class ValueModel(torch.nn.Module):
    """The backbone and Linear(width, 1), zero at first."""

    def __init__(self, policy, cfg):
        super().__init__()
        self.policy = (policy,)                                # in a tuple: no module of this one
        self.trained = [p for p in policy.model.parameters() if p.requires_grad]
        if cfg.lora_rank:
            add_adapter(policy.model, cfg.lora_rank, cfg.lora_alpha, cfg.seed + 1, "value")
            own = [p for name, p in policy.model.named_parameters() if ".value." in name]
        else:
            self.body = copy.deepcopy(policy)
            self.body.model.get_output_embeddings().requires_grad_(False)
            self.policy = (self.body,)
            own = [p for p in self.body.model.parameters() if p.requires_grad]
        embeddings = policy.model.get_output_embeddings().weight
        self.head = torch.nn.Linear(embeddings.shape[1], 1, device=embeddings.device)
        for p in self.head.parameters():
            torch.nn.init.zeros_(p)
        self.own = [*self.head.parameters(), *own]
        self.switch("default")

    @contextlib.contextmanager
    def on(self):
        """Within `with`, the adapters in use are the value model's, forward and backward."""
        self.switch("value")
        try:
            yield
        finally:
            self.switch("default")

    def switch(self, name: str):
        """Adapters: "default", the policy's, or "value"."""
        if hasattr(self.policy[0].model, "peft_config"):
            self.policy[0].model.set_adapter(name)
            for p in self.trained + self.own:                  # switching freezes the others
                p.requires_grad_(True)

    def values(self, views) -> Tensor:
        """(targets,) in row-major order."""
        policy, C = self.policy[0], views.state.shape[1]
        first = int(views.prompt_mask.any(0).int().argmax())
        hidden = policy.hidden(views.prompt[:, first:], views.prompt_mask[:, first:], views.state)
        at = hidden[:, 1 - policy.shift:][:, :C][views.target]
        return self.head(at.to(torch.promote_types(at.dtype, torch.float32))).squeeze(1)

    @torch.no_grad()
    def of(self, traj, views, cfg) -> Tensor:
        """(N, C), zero where no view has a target."""
        value = torch.zeros_like(traj.tokens, dtype=torch.float64)
        with self.on():
            for part in map(views.select, agrpo.micro_batches(views, cfg)):
                n, position = part.target.nonzero(as_tuple=True)
                value[part.row[n], position] = self.values(part).double()
        return value

    def loss(self, traj, views, value_old, returns, clip: float) -> Tensor:
        """1/2 max((V - R)^2, (V_clip - R)^2), weighted as the policy's loss."""
        target, row = views.target, views.row
        value, old, aim = self.values(views), value_old[row][target], returns[row][target]
        clipped = old + (value - old).clamp(-clip, clip)
        loss = 0.5 * torch.maximum((value - aim)**2, (clipped - aim)**2)
        return (loss * views.weight.expand(target.shape)[target]).sum() / len(traj.tokens)

def gae(reward, value, step, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, C): reward (N,) falls on the tokens of the last step; value and
    step (N, C), -1 for tokens that do not count. With means over the next step's tokens marked *:
    R_j = r_j + gamma R*,  A_j = r_j - V_j + gamma V* + gamma lam A*."""
    adv, returns, last = torch.zeros_like(value), torch.zeros_like(value), step.amax(1)
    after = value.new_zeros(3, len(value))                     # R*, V*, A* of the step after
    for t in range(int(last.max()), -1, -1):
        here, r = step == t, (reward * (last == t))[:, None]
        R = r + gamma * after[0][:, None]
        A = r - value + gamma * after[1][:, None] + gamma * lam * after[2][:, None]
        returns, adv = torch.where(here, R, returns), torch.where(here, A, adv)
        mean = torch.stack([(x * here).sum(1) for x in (returns, value, adv)])
        after = torch.where(here.any(1), mean / here.sum(1).clamp(min=1), after)
    return adv, returns

@contextlib.contextmanager
def attention_blocks(policy, block: int):
    """Within `with`, blocks of so many tokens; 0: as they are."""
    before = getattr(policy, "block", 0)
    policy.block = block or before
    try:
        yield
    finally:
        policy.block = before

def begin(policy, optimizer, cfg):
    """The value model learns in a group of its own."""
    if cfg.value_model == "on":
        policy.value = ValueModel(policy, cfg)
        optimizer.add_param_group({"params": policy.value.own, "scale": cfg.value_lr / cfg.lr})

def train_step(policy, optimizer, examples, step: int, cfg, sample) -> dict:
    """agrpo.train_step with larger blocks in the update, and advantages by a value model."""
    traj, reward, row = agrpo.sample_step(policy, examples, step, cfg, sample)
    before = []                                                # values and returns

    def per_token(views, adv):
        value = policy.value.of(traj, views, cfg)
        scored = torch.zeros_like(traj.tokens).index_add(0, views.row, views.target.long()) > 0
        when = (traj.reveal_step // cfg.shrink).masked_fill(~scored, -1)
        adv, returns = gae(adv[:, 0], value, when, cfg.gamma, cfg.lam)
        before[:] = value, returns
        return adv

    def also(views):
        with policy.value.on():
            return agrpo.accumulate(views, cfg, lambda part: (
                policy.value.loss(traj, part, *before, cfg.clip), torch.zeros(0)))
    hooks = (per_token, also) if cfg.value_model == "on" else ()
    with attention_blocks(policy, cfg.update_block):
        return {**row, **agrpo.update(policy, optimizer, traj, reward, step, cfg, *hooks)}

agrpo.ADVANTAGES.setdefault("none", lambda r: r)               # a value model is a baseline itself
agrpo.NORMALIZERS.setdefault("state_tokens", (     # a mean over each state's tokens
    lambda traj, cfg, row, target: target.sum(1).clamp(min=1)))
agrpo.METHODS.setdefault("tracerl", agrpo.Method(tracerl_views, {
    "position_term": "off", "normalizer": "state_tokens", "advantage": "std", "kl": 0.01,
    "kl_reference": "old"},
    train_step, begin))
