"""Old log-probs of states that the sampler did not see, and the reference of the KL term."""
import dataclasses

import torch
from torch import Tensor

import agrpo

@dataclasses.dataclass(frozen=True)
class Settings:
    """With --kl."""
    kl_reference: str = "base"         # base: before training; old: before each update [TraceRL]

@torch.no_grad()
def score(policy, traj, views, cfg) -> tuple[Tensor, Tensor | None]:
    """agrpo.step_logp of all views, dense: tokens (M, C), 0 where there is no target, and the
    choices of positions (M,), None if they do not count. Each process scores its share."""
    (rank, world), found, device = agrpo.processes(), [], views.row.device
    cfg = dataclasses.replace(cfg, kl=0.0)
    mine = torch.arange(len(views.row), device=device)[rank::world]
    for part in agrpo.micro_batches(views.select(mine), cfg):
        some = views.select(mine[part])
        logp, order_logp, _ = agrpo.step_logp(policy, traj, some, cfg)
        dense = some.target.double().masked_scatter(some.target, logp.double())
        found.append([x if x is None else x.cpu() for x in (mine[part], dense, order_logp)])
    found = agrpo.gather(found)
    if not found:
        return views.target.double(), None
    index, *found = zip(*found)
    back = torch.cat(index).argsort()
    return tuple(None if x[0] is None else torch.cat(x).double()[back].to(device) for x in found)

def scored(policy, traj, views, cfg):
    """Scored on the same views before the update. With one inner epoch the first evaluation gives
    the same, and costs nothing."""
    if cfg.inner_epochs == 1:
        return views
    return views._replace(logp_old=score(policy, traj, views, cfg)[0])

class Reference:
    """A denoiser: the policy with its trainable weights as they were when this was made."""

    def __init__(self, policy):
        self.policy = policy
        self.kept = [[p, p.detach().clone()] for p in policy.model.parameters() if p.requires_grad]

    def swap(self):
        """Exchanges the policy's weights and those kept."""
        for pair in self.kept:
            pair[0].data, pair[1] = pair[1], pair[0].data

    @torch.no_grad()
    def logits(self, *sees) -> Tensor:
        """As the policy's."""
        self.swap()
        try:
            return self.policy.logits(*sees)
        finally:
            self.swap()

def keep_reference(policy):
    """What the KL term of Eq. 4 compares with from now on: the policy as it is."""
    policy.reference = Reference(policy)

def kept_each_step(train_step):
    """--kl-reference old: the reference is the policy before each update."""
    def step_of(policy, *args):
        keep_reference(policy)
        return train_step(policy, *args)
    return step_of

agrpo.OLD_LOGP.setdefault("scored", scored)
