"""Where a gradient's noise comes from, along a training run.

    python tests/measure/noise.py [TASK] [--seed N] [--steps 0,20,60] [FLAGS]     assets/noise.csv

Trains by --method agrpo with the task's defaults (and FLAGS of agrpo.py), and at these steps looks
at the policy with 12 batches of its own rollouts, of the same examples at all steps: how much the
exact gradient varies between batches, what each rule of drawing time steps adds to that, how much
of the gradient one state, one completion, the position term and the end of a text hold (one batch),
and how far one update moves the log-probabilities of the tokens it was made of.
"""

import copy
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402

import agrpo  # noqa: E402
import eval as evaluation  # noqa: E402
from methods import models, scored  # noqa: E402
from support import data  # noqa: E402
import tables  # noqa: E402

PLACE = Path(__file__).resolve().parents[2] / "assets" / "noise.csv"
BATCHES = 12
RULES = {  # name: settings
    "batch_gradient K 1": {"mc_steps": 1},
    "batch_gradient K 2": {"mc_steps": 2},
    "batch_gradient K 4": {"mc_steps": 4},
    "iid K 1": {"mc_steps": 1, "timesteps": "iid"},
    "low_discrepancy K 1": {"mc_steps": 1, "timesteps": "low_discrepancy"},
    "low_discrepancy K 4": {"mc_steps": 4, "timesteps": "low_discrepancy"},
}


def gradient(policy, traj, adv, cfg, views) -> torch.Tensor:
    """Of Eq. 4 for these views, flat."""
    ready = agrpo.prepare(policy, traj, views, adv[:, None], cfg)
    for part in agrpo.micro_batches(ready, cfg):
        agrpo.policy_loss(policy, traj, ready.select(part), cfg)[0].backward()
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.model.parameters()]
    policy.zero_grad(set_to_none=True)
    return torch.cat([g.flatten() for g in flat])


def largest(policy, traj, adv, cfg, views, of) -> float:
    """The longest gradient of the views of one value of `of` (M,), as a share of the sum of all
    their lengths."""
    norms = [
        float(gradient(policy, traj, adv, cfg, views.select(of == value)).norm())
        for value in of.unique()
    ]
    return max(norms) / max(sum(norms), 1e-30)


@torch.no_grad()
def at_the_end(policy, traj, cfg, views) -> tuple[float, float]:
    """Share of the gradient by the logits, squared, that the positions which hold EOS have: of the
    tokens, of the choice of positions."""
    blocks = policy.blocks(views.prompt_mask, traj.tokens.shape[1], cfg.block_length)
    where = agrpo.open_positions(views.state, policy.mask_id, blocks)[1]
    token, won = traj.tokens[views.row][where], views.target[where]
    law = agrpo.Law(policy.logits(views.prompt, views.prompt_mask, views.state, where), cfg)
    rank = traj.rank[views.row].masked_fill(~views.target, -1)
    order = agrpo.losing_logp(law, token, where.nonzero(as_tuple=True), rank, cfg)[1]
    own, end = law.gradient_size(token, won), token == traj.eos_id
    return (
        float(own[end[won]].sum() / own.sum()),
        float(order[end].sum() / order.sum().clamp(min=1e-30)),
    )


def products(a, b) -> torch.Tensor:
    """Products of means, without bias: of all pairs of different rows of (M, P), a mean; and of
    all pairs but those of one row, for each row (M,)."""
    M, whole, same = len(a), a.sum(0), (a * b).sum(1)
    pairs = whole @ b.sum(0) - same.sum()
    without = pairs - a @ b.sum(0) - b @ whole + 2 * same
    return pairs / (M * (M - 1)), without / ((M - 1) * (M - 2))


def look(policy, tokenizer, train, cfg, seed: int) -> dict:
    """All figures at one policy."""
    sample, batch = models.sampler(tokenizer, cfg), []
    exact = dataclasses.replace(cfg, method="exact")
    tokens_only = dataclasses.replace(exact, position_term="off")
    found, added = {}, {name: [] for name in RULES}
    for b in range(BATCHES):
        traj, reward, log = agrpo.sample_step(
            policy, train, b, dataclasses.replace(cfg, seed=1000 + seed), sample
        )
        adv = agrpo.ADVANTAGES[cfg.advantage](reward.view(-1, cfg.completions)).flatten()
        views = agrpo.exact_views(traj, adv, exact, policy.mask_id, None)
        whole = gradient(policy, traj, adv, exact, views)
        tokens = gradient(policy, traj, adv, tokens_only, views)
        batch.append((whole, tokens))
        for name, settings in RULES.items():
            at = dataclasses.replace(cfg, **settings)
            drawn = agrpo.agrpo_views(
                traj, adv, at, policy.mask_id, agrpo.generator("noise", seed, b, name)
            )
            estimate = gradient(policy, traj, adv, at, drawn)
            added[name].append(float((estimate - whole).square().sum()))
            if b == 0 and name == "batch_gradient K 1":
                each = torch.arange(len(drawn.row))
                found["largest state"] = largest(policy, traj, adv, at, drawn, each)
        if b == 0:
            found["solved"], found["entropy"] = log["solved"], log["entropy"]
            found["largest completion"] = largest(policy, traj, adv, exact, views, views.row)
            found["tokens at the end"], found["positions at the end"] = at_the_end(
                policy, traj, cfg, views
            )
    whole, tokens = (torch.stack(g).double() for g in zip(*batch))
    order, M, square = whole - tokens, len(whole), whole.square().sum(1)
    signal, signals = products(whole, whole)
    apart, others = square.mean() - signal, (square.sum() - square) / (M - 1) - signals
    found["batch"], spread = float(apart / signal), others / signals       # jackknife
    found["batch, error"] = float((M - 1) ** 0.5 * spread.std(correction=0))
    found |= {rule: sum(x) / M / float(apart) for rule, x in added.items()}
    found["position term"] = float(products(order, order)[0] / signal)
    found["position term, batch"] = float(order.square().sum() / square.sum())
    return found


def moved(policy, traj, cfg, views, update) -> dict:
    """|log-ratio| of the tokens of these views by one update: mean, 99 %, largest."""
    @torch.no_grad()
    def logp():
        return agrpo.step_logp(policy, traj, views, cfg)[0]

    before = logp()
    update()
    change = (logp() - before).abs()
    return {
        "moved, mean": float(change.mean()),
        "moved, 99 %": float(change.quantile(0.99)),
        "moved, largest": float(change.max()),
    }


def main(argv: list):
    torch.set_num_threads(1)
    task = argv.pop(0) if argv and not argv[0].startswith("--") else "story"
    named = {"--seed": "0", "--steps": "0,20,60"}
    for name in list(named):
        if name in argv:
            at = argv.index(name)
            named[name] = argv.pop(at + 1)
            argv.pop(at)
    seed, steps = int(named["--seed"]), [*map(int, named["--steps"].split(","))]
    cfg, _ = evaluation.parse(["--task", task, "--seed", str(seed), "--device", "cpu", *argv])
    if cfg.method != "agrpo" or cfg.cache != "none":
        raise SystemExit("noise.py: --method agrpo, without a cache")
    policy, tokenizer = models.open_policy(cfg, train=True)
    if cfg.kl:
        scored.keep_reference(policy)
    train, _ = data.load_split(task, cfg.train_examples, 64, seed)
    optimizer, sample = agrpo.make_optimizer(policy, cfg), models.sampler(tokenizer, cfg)
    key = {"task": task, "flags": " ".join(argv), "seed": str(seed)}
    for step in range(max(steps) + 1):
        if step not in steps:
            agrpo.train_step(policy, optimizer, train, step, cfg, sample)
            continue
        found = look(copy.deepcopy(policy), tokenizer, train, cfg, seed)
        traj, reward, _ = agrpo.sample_step(policy, train, step, cfg, sample)
        views = agrpo.exact_views(traj, None, cfg, policy.mask_id, None)
        found |= moved(
            policy, traj, cfg, views,
            lambda: agrpo.update(policy, optimizer, traj, reward, step, cfg),
        )
        here = {**key, "step": str(step)}
        rows = [row for row in tables.known(PLACE) if not here.items() <= row.items()]
        rows += [{**here, "what": k, "value": f"{v:.4g}"} for k, v in found.items()]
        tables.write(PLACE, [*here, "what", "value"], rows)
        print(step, {k: f"{v:.4g}" for k, v in found.items()}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
