"""DiFFPO (arXiv 2510.02212): a likelihood of two states, and a controller of the sampler.

Two states: what came before a random step s is scored on the completion all MASK, the rest on x_s.
This surrogate is no likelihood of the sampler's; each token counts its truncated ratio to it:
    (7)  w = min(w_max, pi_scored,old / pi_sampled).

Controller: the sampler's threshold is drawn per completion, ease x ~ Normal(mu, sigma) with mu =
Linear(hidden state of the prompt's last token); the published head is not known. Given x the choice
of positions is not random. Over x it is, and it depends on the model: so x is integrated out. At
every step the same positions are revealed for all x between two edges, and
    (9)  log pi_pos(trajectory) = log [ Phi((high - mu) / sigma) - Phi((low - mu) / sigma) ].
Its gradient trains head and model exactly at the first update; later epochs keep these two steps.

As published: two states, one split for old and new, truncated weights, a threshold per prompt.
Different: its settings, head and code are not public, ours stand below. Not here: its 8B results.
"""
import dataclasses
import math

import torch
from torch import Tensor

import agrpo
from methods.diffu_grpo import counted
from methods.samplers import EASE, LEVEL
from methods.scored import score
from support.options import CONTROLLED
from support.files import need
from support.saving import load_extra

@dataclasses.dataclass(frozen=True)
class Settings:
    """With --method diffpo."""
    truncation: float = 2.0            # w_max of Eq. 7; 0: no weights

@dataclasses.dataclass(frozen=True)
class ControllerSettings:
    """With any method: a threshold of the sampler per prompt, learned."""
    controller: str = "off"            # threshold: on probability; entropy: on the summed entropy
    controller_training: str = "joint"  # with the model; alone: the model stays as it is
    controller_sigma: float = 0.5      # deviation of the threshold's logarithm, in training
    controller_lr: float = 0.02        # learning rate of the head
    alpha: float = 0.5                 # the reward is multiplied by (1 - NFE / length)^alpha

# ------------------------------------------------------------------------------------ two states
def diffpo_views(traj, adv, cfg, mask_id: int, g) -> agrpo.Views:
    """Two views a completion, split at a step s ~ U{0 .. its steps - 1}."""
    row = torch.arange(len(traj.tokens), device=traj.tokens.device)
    u = torch.rand(len(row), generator=g, dtype=torch.float64).to(row.device)
    split = (u * traj.nfe).long()
    late, (state, _) = traj.reveal_step >= split[:, None], agrpo.state_at(traj, row, split, mask_id)
    steps = torch.cat([torch.zeros_like(split), split])
    states = torch.cat([torch.full_like(state, mask_id), state])
    targets = torch.cat([counted(traj) & ~late, counted(traj) & late])
    old = "truncated" if cfg.truncation else "scored"
    return agrpo.make_views(traj, row.repeat(2), steps, states, targets, cfg, old)

def truncated(policy, traj, views, cfg):
    """Eq. 7: a weight per token, without a gradient."""
    logp_old = score(policy, traj, views, cfg)[0]
    w = (logp_old - traj.logp[views.row]).exp().clamp(max=cfg.truncation)
    return views._replace(logp_old=logp_old, weight=views.weight * w)

# ---------------------------------------------------------------------------------- the controller
@dataclasses.dataclass
class ControlledTrajectory(agrpo.Trajectory):
    """With what the controller did."""
    ease: Tensor | None = None         # (N,) drawn: minus log threshold, or log entropy bound
    ease_mean: Tensor | None = None    # (N,) mu
    edges: Tensor | None = None        # (N, 2) between them the same positions are revealed
    edge_steps: Tensor | None = None   # (N, 2) the steps that set them; T: none

def add_controller(policy, cfg, about, train: bool):
    """policy.controller: hidden state (N, width) -> mu (N, 1); as saved beside the model, or, to
    train, at first the configured threshold for every prompt. Raises BadInput."""
    head, folder = policy.model.get_output_embeddings().weight, about.adapter or about.folder
    policy.controller = torch.nn.Linear(head.shape[1], 1, device=head.device)
    torch.nn.init.zeros_(policy.controller.weight)
    torch.nn.init.constant_(policy.controller.bias, EASE[CONTROLLED[cfg.controller]](cfg))
    need(load_extra(policy.controller, folder / "controller.safetensors") or train,
         f"--controller {cfg.controller}: {folder} has no controller.safetensors")

def ease_mean(policy, prompt, prompt_mask, C: int) -> Tensor:
    """mu (N,) in float64, read from the prompt before an empty completion."""
    blank = prompt.new_full((len(prompt), C), policy.mask_id)
    hidden = policy.hidden(prompt, prompt_mask, blank)[:, 0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return policy.controller(hidden.to(dtype)).squeeze(1).double()

def edges_of_step(ranked, count, name: str, n: int) -> tuple[Tensor, Tensor]:
    """The eases (R,) from which on a step reveals `count` (R,) positions, -inf if it had to, and
    from which on more, inf if there are none. ranked (R, C): scores, falling; -inf: closed."""
    level, count, open_ = LEVEL[name](ranked), count[:, None], (ranked > -math.inf).sum(1, True)
    low = level.gather(1, count - 1).masked_fill(count <= n, -math.inf)
    high = level.gather(1, count.clamp(max=level.shape[1] - 1))
    high = high.masked_fill(count >= open_, math.inf)
    return low.squeeze(1).double(), high.squeeze(1).double()

@torch.no_grad()
def controlled_rollout(policy, prompt, prompt_mask, cfg, keys) -> ControlledTrajectory:
    """agrpo.rollout with a threshold drawn for each row, or at temperature 0 its mean."""
    mean, T = ease_mean(policy, prompt, prompt_mask, cfg.completion_length), cfg.steps
    name = CONTROLLED[cfg.controller]
    seeds = [key if isinstance(key, tuple) else (key,) for key in keys]
    noise = torch.stack([torch.randn((), generator=agrpo.generator("ease", *seed),
                                     dtype=torch.float64) for seed in seeds]).to(mean.device)
    ease = mean + cfg.controller_sigma * noise * (cfg.temperature > 0)
    edges = mean.new_tensor([-math.inf, math.inf]).repeat(len(mean), 1)
    edge_steps = torch.full_like(edges, T, dtype=torch.long)
    step = iter(range(T))

    def count(ranked, rows, cfg):
        t, n = next(step), cfg.completion_length // T
        many = (LEVEL[name](ranked) <= ease[rows, None]).sum(1).clamp(min=n)
        many = many.minimum((ranked > -math.inf).sum(1))
        for side, edge in enumerate(edges_of_step(ranked, many, name, n)):
            nearer = edge < edges[rows, side] if side else edge > edges[rows, side]
            edges[rows[nearer], side], edge_steps[rows[nearer], side] = edge[nearer], t
        return many
    by = dataclasses.replace(cfg, unmasking=name)
    traj = agrpo.rollout(policy, prompt, prompt_mask, by, keys, count=count)
    return ControlledTrajectory(**vars(traj), ease=ease, ease_mean=mean, edges=edges,
                                edge_steps=edge_steps)

def ease_logp(edges, mean, sigma: float) -> Tensor:
    """Eq. 9: edges (N, 2), mean (N,) -> (N,). Where both edges are above the mean: the same mass
    on its other side, where it does not round to 1 - 1."""
    low, high = ((edges - mean[:, None]) / sigma).unbind(1)
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    return (torch.special.ndtr(high) - torch.special.ndtr(low)).clamp(min=1e-300).log()

def edges_again(policy, traj, row, cfg) -> Tensor:
    """The edges (M, 2) of some rows under the present parameters, from the steps that set them."""
    edges, name = traj.edges[row], CONTROLLED[cfg.controller]
    for side in (0, 1):
        at = (traj.edge_steps[row, side] < cfg.steps).nonzero().squeeze(1)
        if len(at):
            of, step = row[at], traj.edge_steps[row[at], side]
            state, target = agrpo.state_at(traj, of, step, policy.mask_id)
            blocks = policy.blocks(traj.prompt_mask[of], state.shape[1], cfg.block_length)
            open_ = agrpo.open_positions(state, policy.mask_id, blocks)[1]
            law = agrpo.Law(policy.logits(traj.prompt[of], traj.prompt_mask[of], state, open_), cfg)
            value = agrpo.UNMASK[name].score(law, None, None, cfg)
            dense = value.new_full(open_.shape, -math.inf).masked_scatter(open_, value)
            ranked = dense.sort(dim=1, descending=True, stable=True)[0]
            again = edges_of_step(ranked, target.sum(1), name, cfg.completion_length // cfg.steps)
            edges = edges.index_put((at, torch.full_like(at, side)), again[side])
    return edges

def controller_loss(policy, traj, row, adv, cfg) -> tuple[Tensor, Tensor]:
    """Minus Eq. 4 for some rows' choice of positions (Eq. 9), and their ratios: one action, of the
    weight that a step has when Z = T. adv (N, 1)."""
    mean = ease_mean(policy, traj.prompt[row], traj.prompt_mask[row], traj.tokens.shape[1])
    joint = cfg.controller_training == "joint"
    edges = edges_again(policy, traj, row, cfg) if joint else traj.edges[row]
    logp = ease_logp(edges, mean, cfg.controller_sigma)
    logp_old = ease_logp(traj.edges[row], traj.ease_mean[row], cfg.controller_sigma)
    gain, ratio = agrpo.surrogate(logp, logp_old, adv[row, 0], cfg)
    return -gain.sum() / (cfg.steps * len(traj.tokens)), ratio

def begin(policy, optimizer, cfg):
    """The head learns in a group of its own."""
    if cfg.controller_training == "alone":
        del optimizer.param_groups[0]                          # the model's, which is frozen
    head = list(policy.controller.parameters())
    optimizer.add_param_group({"params": head, "scale": cfg.controller_lr / cfg.lr})

def controller_step(policy, optimizer, examples, step: int, cfg, sample) -> dict:
    """agrpo.train_step, where right answers in few denoiser calls count more, and the controller
    learns from the same completions."""
    def discounted(*args):
        traj, parts, solved = sample(*args)
        speed = (1 - traj.nfe.cpu().double() / cfg.completion_length) ** cfg.alpha
        faster = {name: torch.as_tensor(part, dtype=torch.float64) * (
            1 if name == "overlong" else speed) for name, part in parts.items()}
        return traj, faster, solved
    traj, reward, row = agrpo.sample_step(policy, examples, step, cfg, discounted)
    learners, alone = [], cfg.controller_training == "alone"   # rows with an advantage, as views

    def per_token(views, adv):
        rows = (adv[:, 0] != 0).nonzero().squeeze(1)
        blank = torch.full_like(traj.tokens[rows], policy.mask_id)
        learners[:] = adv, agrpo.make_views(traj, rows, torch.zeros_like(rows), blank,
                                            torch.ones_like(blank, dtype=torch.bool), cfg, "scored")
        return torch.zeros_like(adv) if alone else adv         # no views of a model that is frozen

    def also(views):
        adv, rows = learners
        return agrpo.accumulate(rows, cfg, lambda part: controller_loss(
            policy, traj, part.row, adv, cfg))
    at = dataclasses.replace(cfg, kl=0.0) if alone else cfg
    after = agrpo.update(policy, optimizer, traj, reward, step, at, per_token, also)
    return {**row, **after, "ease": float(traj.ease.mean())}

agrpo.OLD_LOGP.setdefault("truncated", truncated)
agrpo.METHODS.setdefault("diffpo", agrpo.Method(diffpo_views, {
    "position_term": "off", "advantage": "mean", "normalizer": "length"}))
