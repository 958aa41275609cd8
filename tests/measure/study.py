"""What assets/README.md says of variance and bias, measured: CSV and figures, in minutes.

    python tests/measure/study.py [variance_study] [bias_study] [total_error_study] [method_study]
                                  [drawn_threshold_study] [cache_study]       none named: all

1. Variance: for a fixed batch of completions, how far the gradient estimated from a few drawn time
   steps is from the exact sum over all of them, for every row of TIMESTEPS, on a table denoiser of
   6 positions and on the tiny Sudoku model. From the Gram matrix of the gradients of single steps,
   so that hundreds of draws cost nothing.
2. Bias: by full enumeration of 20 random table denoisers in 9 settings, the expected gradient
   against autograd of the exact expected reward for every row of UNMASK, with and without the
   position term; then bias and variance together.
3. Methods: the same for every row of METHODS, each at its best scale, with its variance times its
   passes.
4. A threshold drawn by a controller, counted as one more action: how far that is off.
5. Rollouts with a cache that is not exact: bias and variance, corrected in three ways or not.
"""

import csv
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import tables  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402
from test_exact import SETTINGS, case, gradient_error  # noqa: E402

import agrpo  # noqa: E402
from methods import models, rows_of  # noqa: E402
from methods.models import Settings  # noqa: E402
from rewards import reward_parts  # noqa: E402
from support import data, figures, runs  # noqa: E402

UNMASK, TIMESTEPS = (models.choices()[knob] for knob in ("unmasking", "timesteps"))

ASSETS = Path(__file__).resolve().parents[2] / "assets"
PAPER, DEFAULT = "low_discrepancy", Settings.timesteps
DRAWS = 60


def write(name: str, rows: list[dict]):
    with tables.writing(ASSETS / name) as f:
        out = csv.DictWriter(f, rows[0], lineterminator="\n")
        out.writeheader()
        out.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def ready(policy, traj, adv, cfg):
    """Every state of every completion, prepared for the loss; adv (N,)."""
    views = agrpo.exact_views(traj, adv, cfg, policy.mask_id, None)
    return agrpo.prepare(policy, traj, views, adv[:, None], cfg)


# -------------------------------------------------------------------------------------- variance
def table_batch(seed: int):
    """4 groups of 16 completions of a table denoiser -> policy, trajectory, adv (N,), cfg"""
    cfg = Settings(completion_length=6, block_length=6, steps=6)
    policy = toy.TableDenoiser(6, V=3, seed=seed, scale=2.0)
    prompt = torch.zeros(64, 1, dtype=torch.long)
    traj = agrpo.rollout(
        policy, prompt, torch.ones_like(prompt), cfg, [(seed, i) for i in range(64)]
    )
    reward = torch.tensor(
        [toy.reward_of(row, 3) for row in traj.tokens.tolist()], dtype=torch.float64
    )
    return policy, traj, agrpo.ADVANTAGES["std"](reward.view(4, 16)).view(-1), cfg


def sudoku_batch(seed: int):
    """4 puzzles, 16 completions each, of the tiny base model, one token a step."""
    cfg = dataclasses.replace(models.settle({"task": "sudoku"}), steps=16, prompts=4, device="cpu")
    examples = data.load_examples("sudoku", 256, 0, "train")
    policy, tokenizer = models.open_policy(cfg)
    batch = [
        ex for ex in agrpo.batch_of_examples(examples, seed, cfg) for _ in range(cfg.completions)
    ]
    traj, texts = models.generate(
        policy, tokenizer, batch, [("study", seed, i) for i in range(len(batch))], cfg
    )
    reward = torch.tensor(
        [sum(reward_parts("sudoku", t, ex).values()) for t, ex in zip(texts, batch)],
        dtype=torch.float64,
    )
    return policy, traj, agrpo.ADVANTAGES["std"](reward.view(4, 16)).view(-1), cfg


def gram(policy, traj, adv, cfg) -> tuple:
    """What TIMESTEPS sees of a batch, and the Gram matrix (N T, N T) of A_i times the gradient of
    each (row, step)."""
    views, parameters = ready(policy, traj, adv, cfg), list(policy.model.parameters())
    gradient = torch.zeros(len(adv) * cfg.steps, sum(p.numel() for p in parameters))
    for i in (adv[views.row] != 0).nonzero().squeeze(1).tolist():
        loss, _ = agrpo.policy_loss(policy, traj, views.select(slice(i, i + 1)), cfg)
        place = int(views.row[i]) * cfg.steps + int(views.step[i])
        gradient[place] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    seen = traj, agrpo.steps_inside(traj, cfg), adv.double()
    return seen, (gradient @ gradient.T).double()


def variances(name: str, batches: list) -> list[dict]:
    """Relative variance E|estimate - exact|^2 / |exact|^2 and passes per completion, for every row
    of TIMESTEPS and K."""
    rows, T = [], batches[0][3].steps
    found = [gram(*batch) for batch in batches]
    for rule in TIMESTEPS:
        for K in (1, 2, 3, 4, 5) if T < 8 else (1, 2, 4, 8, 12):
            variance, passes = [], []
            for seen, G in found:
                g, inside, adv = torch.Generator().manual_seed(K), seen[1].double(), seen[2]
                weight = torch.stack(
                    [agrpo.TIMESTEPS[rule](*seen, K, g) for _ in range(DRAWS)]
                )  # (draws, N, T)
                error = (weight - inside).flatten(1)
                variance.append(
                    float(
                        ((error @ G) * error).sum(1).mean()
                        / (inside.flatten() @ G @ inside.flatten())
                    )
                )
                passes.append(float((weight[:, adv != 0] > 0).double().sum(2).mean()))
            rows.append(
                {
                    "model": name,
                    "timesteps": rule,
                    "K": K,
                    "passes": statistics.mean(passes),
                    "relative_variance": statistics.mean(variance),
                    "batches": len(batches),
                    "draws": DRAWS,
                }
            )
    return rows


def at_passes(rows: list[dict], rule: str, passes: float) -> float:
    """Variance of a rule at so many passes, on the line between its measured points (log-log); nan
    outside of them."""
    points = sorted((r["passes"], r["relative_variance"]) for r in rows if r["timesteps"] == rule)
    (x0, y0), (x1, y1) = next(
        ((a, b) for a, b in zip(points, points[1:]) if b[0] >= passes), [(math.nan, math.nan)] * 2
    )
    share = math.log(passes / x0) / math.log(x1 / x0)
    return y0 ** (1 - share) * y1**share


COLOUR = {
    "iid": "#999999",
    "low_discrepancy": "#c0392b",
    "stratified": "#d9822b",
    "stratified_entropy": "#8e5a2b",
    "stratified_gradient": "#7fb3d5",
    "without_replacement_gradient": "#2e8b57",
    "batch_gradient": "#0b62a4",
}


def label_ends(axis, ends: list):
    """(x, y, text, colour) of each line's end, on logarithmic axes: labels keep a line's height
    apart."""
    low, high = (math.log10(v) for v in axis.get_ylim())
    used = math.inf
    for x, y, text, colour in sorted(ends, key=lambda end: -end[1]):
        used = min(math.log10(y), used - 0.045 * (high - low))
        figures.label_end(axis, x, 10**used, text, colour)


def plot_variance(rows: list[dict], model: str, title: str):
    def draw(axis):
        mine, ends = [r for r in rows if r["model"] == model], []
        for rule, colour in COLOUR.items():
            points = sorted(
                (r["passes"], r["relative_variance"]) for r in mine if r["timesteps"] == rule
            )
            axis.plot(
                *zip(*points),
                color=colour,
                marker="o",
                ms=4,
                lw=2.4 if rule in (PAPER, DEFAULT) else 1.2,
                ls="--" if rule == PAPER else "-",
            )
            ends.append(
                (
                    *points[-1],
                    rule + {PAPER: " (paper)", DEFAULT: " (default)"}.get(rule, ""),
                    colour,
                )
            )
        low, high = min(r["passes"] for r in mine), max(r["passes"] for r in mine)
        top = at_passes(mine, "iid", low) * 1.6
        axis.plot([low, high], [top, top * low / high], color="black", ls=":", lw=1)
        axis.annotate("slope -1", (low * 1.05, top * 1.1), fontsize=8)
        axis.set(xscale="log", yscale="log", xlim=(low * 0.95, high * 3.2))
        ticks = [k for k in (1, 2, 3, 4, 6, 8, 12) if k <= high * 1.1]
        axis.set_xticks(ticks, labels=map(str, ticks))
        axis.minorticks_off()
        label_ends(axis, ends)

    figures.figure(
        ASSETS / f"variance-{model}.png",
        title,
        "forward and backward passes per completion",
        "variance / |gradient|$^2$",
        draw,
        size=(8, 4.6),
    )


def variance_study():
    rows = variances("table", [table_batch(s) for s in range(4)]) + variances(
        "sudoku", [sudoku_batch(s) for s in range(2)]
    )
    write("variance.csv", rows)
    for model, title in (
        ("table", "How far is the estimated gradient from the exact one? Table denoiser, 6 steps"),
        (
            "sudoku",
            "How far is the estimated gradient from the exact one? Tiny Sudoku model, 16 steps",
        ),
    ):
        mine = [r for r in rows if r["model"] == model]
        print(
            f"\n{model}: variance / |gradient|^2 at equal passes per completion, and how many "
            f"times lower than {PAPER}"
        )
        lines = [
            [
                rule,
                *(
                    x
                    for passes in (1, 2, 3)
                    for v in [at_passes(mine, rule, passes)]
                    for x in (f"{v:.2g}", f"{at_passes(mine, PAPER, passes) / v:.1f}x")
                ),
            ]
            for rule in TIMESTEPS
        ]
        print(
            runs.table(
                [
                    dict(zip(["timesteps", "1 pass", "", "2 passes", "", "3 passes", ""], line))
                    for line in lines
                ]
            )
        )
        plot_variance(rows, model, title)


# ------------------------------------------------------------------------------------------ bias
def bias_study():
    rows = []
    for unmasking in UNMASK:
        for settings in SETTINGS:
            on, off = [], []
            for seed in range(20):
                cfg, policy, found = case(unmasking, settings, seed)
                on.append(gradient_error(policy, cfg, found)[0])
                off.append(
                    gradient_error(policy, dataclasses.replace(cfg, position_term="off"), found)[0]
                )
            rows.append(
                {
                    "unmasking": unmasking,
                    "setting": " ".join(f"{k}={v}" for k, v in settings.items()),
                    "denoisers": 20,
                    "error_max": max(on),
                    "tokens_only_median": statistics.median(off),
                    "tokens_only_max": max(off),
                }
            )
    write("bias.csv", rows)
    print(
        "\nexpected gradient against autograd of the exact E[R], relative error over 9 settings "
        "x 20 denoisers"
    )
    print(tables.bias())
    if max(r["error_max"] for r in rows) > 1e-10:
        raise SystemExit("the gradient is not exact")


def scores(policy, cfg, found) -> torch.Tensor:
    """Gradient of the log-probability of each trajectory, as the loss sees it: (trajectories,
    parameters)."""
    traj, ones = toy.as_trajectory(policy, cfg, found), torch.ones(len(found), dtype=torch.float64)
    views = ready(policy, traj, ones, cfg)
    out = []
    for i in range(len(found)):
        loss, _ = agrpo.policy_loss(policy, traj, views.select(views.row == i), cfg)
        out.append(-torch.autograd.grad(loss, policy.table)[0].flatten() * len(found) * cfg.steps)
    return torch.stack(out)


def total_error_study():
    """Bias and standard deviation of the mean over n completions, advantage R - E[R], relative to
    the exact gradient."""
    rows = []
    for unmasking in UNMASK:
        for term in ("on", "off") if agrpo.UNMASK[unmasking].order_logp else ("on",):
            bias, deviation = [], []
            for seed in range(10):
                cfg, policy, found = case(unmasking, {}, seed)
                prob = torch.stack([f[2] for f in found])
                reward = torch.tensor(
                    [toy.reward_of(f[0], policy.V) for f in found], dtype=torch.float64
                )
                (exact,) = torch.autograd.grad(
                    (prob * reward).sum(), policy.table, retain_graph=True
                )
                prob, exact = prob.detach(), exact.flatten()
                estimate = (reward - prob @ reward)[:, None] * scores(
                    policy, dataclasses.replace(cfg, position_term=term), found
                )
                mean = prob @ estimate
                bias.append(float((mean - exact).norm() / exact.norm()))
                deviation.append(
                    float((prob @ (estimate - mean).square().sum(1)).sqrt() / exact.norm())
                )
            rows.append(
                {
                    "unmasking": unmasking,
                    "position_term": term,
                    "denoisers": 10,
                    "bias": statistics.median(bias),
                    "deviation_of_one": statistics.median(deviation),
                    **{
                        f"error_of_{n}": math.hypot(
                            statistics.median(bias), statistics.median(deviation) / math.sqrt(n)
                        )
                        for n in (16, 256, 4096)
                    },
                }
            )
    write("total-error.csv", rows)
    print(
        "\nbias and standard deviation of the mean of n completions, relative to the exact "
        "gradient (3 positions, 3 tokens)"
    )
    print(
        runs.table(
            [
                dict(
                    zip(
                        [
                            "unmasking",
                            "position term",
                            "bias",
                            "deviation, n = 1",
                            "total, n = 16",
                            "n = 256",
                            "n = 4096",
                        ],
                        line,
                    )
                )
                for line in [
                    [
                        r["unmasking"],
                        r["position_term"],
                        f"{r['bias']:.2g}",
                        f"{r['deviation_of_one']:.1f}",
                        *(f"{r[f'error_of_{n}']:.2f}" for n in (16, 256, 4096)),
                    ]
                    for r in rows
                ]
            ]
        )
    )

    def draw(axis):
        shown = {
            ("random", "on"): "#999999",
            ("low_confidence", "off"): "#c0392b",
            ("low_confidence", "on"): "#0b62a4",
            ("plackett_luce", "off"): "#e59a92",
            ("plackett_luce", "on"): "#2e8b57",
        }
        n, ends = [2**k for k in range(2, 17)], []
        for r in rows:
            if (key := (r["unmasking"], r["position_term"])) in shown:
                y = [math.hypot(r["bias"], r["deviation_of_one"] / math.sqrt(k)) for k in n]
                axis.plot(n, y, color=shown[key], lw=2, ls="--" if key[1] == "off" else "-")
                ends.append(
                    (
                        n[-1],
                        y[-1],
                        key[0] + (", tokens only" if key[1] == "off" else ""),
                        shown[key],
                    )
                )
        axis.set(xscale="log", yscale="log", xlim=(n[0], n[-1] * 40))
        label_ends(axis, ends)

    figures.figure(
        ASSETS / "total-error.png",
        "Does the gradient become right with more completions?",
        "completions in the mean (3 positions, 3 tokens, enumerated)",
        "bias and noise / |gradient|",
        draw,
        size=(8, 4.6),
    )


# --------------------------------------------------------------------------------------- methods
ARMS = {  # what is compared: method and settings beside its published ones
    "agrpo": ("agrpo", {}),
    "exact": ("exact", {}),
    "agrpo, tokens only": ("agrpo", {"position_term": "off"}),
    "tracerl, shrink 1": ("tracerl", {"shrink": 1}),
    "tracerl, shrink 2": ("tracerl", {"shrink": 2}),
    "dipo": ("dipo", {}),
    "diffpo": ("diffpo", {}),
    "diffpo, no weights": ("diffpo", {"truncation": 0.0}),
    "diffu-grpo": ("diffu-grpo", {}),
}


def view_gradients(policy, traj, views, cfg) -> torch.Tensor:
    """(views, parameters): of each view's part of the loss, times -N: of its own log-probs, weight
    included."""
    ones = torch.ones(len(traj.tokens), 1, dtype=torch.float64)
    if views.adv is None:
        views = agrpo.prepare(policy, traj, views, ones, cfg)
    else:
        views = views._replace(adv=ones[views.row])
    out = []
    for i in range(len(views.row)):
        loss, _ = agrpo.policy_loss(policy, traj, views.select(slice(i, i + 1)), cfg)
        out.append(-torch.autograd.grad(loss, policy.table)[0].flatten() * len(traj.tokens))
    return torch.stack(out)


def method_estimates(policy, cfg, found, batches: torch.Tensor, adv: torch.Tensor):
    """Expected gradient of a method over all trajectories, its estimates from batches (b, n) of
    trajectories with their noise over views, and its passes per completion. adv (trajectories,)."""
    traj, prob = toy.as_trajectory(policy, cfg, found), torch.stack([f[2] for f in found]).detach()
    traj.prompt = traj.prompt_mask = torch.ones(len(found), cfg.block_length, dtype=torch.long)
    N, T = len(found), cfg.steps
    if cfg.method == "agrpo":
        views = ready(policy, traj, torch.ones(N, dtype=torch.float64), cfg)
        each = torch.zeros(N * T, policy.table.numel(), dtype=torch.float64)
        each[views.row * T + views.step] = view_gradients(policy, traj, views, cfg)
        each = each.view(N, T, -1)
        mean, passes, estimates = prob @ (adv[:, None] * each.sum(1)), [], []
        size = torch.stack(
            [
                torch.autograd.grad(agrpo.policy_loss(policy, traj, v, cfg)[0], policy.table)[
                    0
                ].norm()
                for v in (views.select(slice(i, i + 1)) for i in range(len(views.row)))
            ]
        ).double()
        gradient = torch.zeros(N, T, dtype=torch.float64)
        gradient[views.row, views.step] = (
            size / views.weight[:, 0] * N
        ) ** 2  # as the rollout records it
        traj.gradient = gradient
        for i, batch in enumerate(batches):
            some = rows_of(traj, batch)
            weight = agrpo.TIMESTEPS[cfg.timesteps](
                some,
                agrpo.steps_inside(some, cfg),
                adv[batch],
                cfg.mc_steps,
                torch.Generator().manual_seed(i),
            )
            passes.append(float((weight > 0).sum()) / len(batch))
            estimates.append(
                (adv[batch, None, None] * weight[:, :, None] * each[batch]).sum((0, 1)) / len(batch)
            )
        return mean, torch.stack(estimates), statistics.mean(passes)
    if cfg.method == "diffpo":  # every split of every trajectory
        parts, counts = [], []
        for k in range(T):
            real, torch.rand = (
                torch.rand,
                lambda *shape, **kw: torch.full(shape, (k + 0.5) / T, dtype=kw["dtype"]),
            )
            try:
                views = agrpo.METHODS["diffpo"].views(traj, adv, cfg, policy.mask_id, None)
            finally:
                torch.rand = real
            parts.append(
                torch.zeros(N, policy.table.numel(), dtype=torch.float64).index_add(
                    0, views.row, view_gradients(policy, traj, views, cfg)
                )
            )
            counts.append(len(views.row) / N)
        each, passes = torch.stack(parts, 1), statistics.mean(counts)  # (N, splits, parameters)
    else:
        views = agrpo.METHODS[cfg.method].views(
            traj, adv, cfg, policy.mask_id, torch.Generator().manual_seed(0)
        )
        each = torch.zeros(N, policy.table.numel(), dtype=torch.float64).index_add(
            0, views.row, view_gradients(policy, traj, views, cfg)
        )[:, None]
        passes = float(prob @ torch.bincount(views.row, minlength=N).double())
    g = torch.Generator().manual_seed(0)
    split = torch.randint(each.shape[1], batches.shape, generator=g)
    estimates = torch.stack([(adv[b, None] * each[b, s]).mean(0) for b, s in zip(batches, split)])
    return prob @ (adv[:, None] * each.mean(1)), estimates, passes


KINDS = [
    ("full attention", "shared"),
    ("block-causal", "shared"),
    ("full attention", "free"),
    ("block-causal", "free"),
]


def features(C: int, V: int) -> torch.Tensor:
    """(states, 1 + C (V + 1)): a constant and each position's token. Logits linear in them share
    parameters between states, as a network does; free ones have parameters of their own for every
    state."""
    states = torch.tensor(
        [[(k // (V + 1) ** i) % (V + 1) for i in range(C)] for k in range((V + 1) ** C)]
    )
    return torch.cat(
        [torch.ones(len(states), 1), torch.nn.functional.one_hot(states, V + 1).flatten(1)], 1
    ).double()


def method_study():
    """Bias and variance of each method's gradient, up to its own scale, on table denoisers."""
    rows, base, phi = [], Settings(completion_length=4, steps=4, temperature=1.0), features(4, 2)
    for attention, parameters in KINDS:
        for unmasking in ("random", "low_confidence"):
            for arm, (method, settings) in ARMS.items():
                if method == "dipo" and attention == "full attention":
                    continue
                bias, noise, passes = [], [], []
                for seed in range(10):
                    L = 2 if attention == "block-causal" else 4
                    policy = (
                        toy.BlockTableDenoiser(4, 2, 2, seed=seed, scale=2.0)
                        if L == 2
                        else toy.TableDenoiser(4, 2, seed=seed, scale=2.0)
                    )
                    if parameters == "shared":
                        w = torch.randn(
                            phi.shape[1],
                            4 * 2,
                            generator=torch.Generator().manual_seed(seed),
                            dtype=torch.float64,
                        )
                        policy.table.data.copy_((phi @ w).view(-1, 4, 2))
                    cfg = dataclasses.replace(
                        base,
                        unmasking=unmasking,
                        block_length=L,
                        method=method,
                        **{
                            **agrpo.METHODS[method].settings,
                            "kl": 0.0,
                            "prompt_masking": 0.0,
                            **settings,
                        },
                    )
                    found = toy.enumerate_trajectories(policy, cfg)
                    prob = torch.stack([f[2] for f in found])
                    reward = torch.tensor(
                        [toy.reward_of(f[0], 2) for f in found], dtype=torch.float64
                    )
                    exact = torch.autograd.grad(
                        (prob * reward).sum(), policy.table, retain_graph=True
                    )[0].flatten()
                    prob = prob.detach()
                    batches = torch.multinomial(
                        prob,
                        300 * 64,
                        replacement=True,
                        generator=torch.Generator().manual_seed(seed),
                    ).view(300, 64)
                    mean, estimates, cost = method_estimates(
                        policy, cfg, found, batches, reward - prob @ reward
                    )
                    if parameters == "shared":  # chain rule: logits = phi w
                        exact, mean, estimates = (
                            (phi.T @ x.view(*x.shape[:-1], len(phi), -1)).flatten(-2)
                            for x in (exact, mean, estimates)
                        )
                    cosine = float(mean @ exact / mean.norm() / exact.norm())
                    bias.append(
                        math.sqrt(max(0.0, 1 - cosine**2)) if cosine > 0 else 1.0
                    )  # min over c of |c mean - exact| / |exact|
                    noise.append(
                        float((estimates - mean).square().sum(1).mean() * 64 / mean.square().sum())
                    )
                    passes.append(cost)
                rows.append(
                    {
                        "attention": attention,
                        "parameters": parameters,
                        "unmasking": unmasking,
                        "method": arm,
                        "denoisers": 10,
                        "bias_median": statistics.median(bias),
                        "bias_max": max(bias),
                        "variance_of_one": statistics.median(noise),
                        "passes": statistics.mean(passes),
                        "variance_times_passes": statistics.median(noise) * statistics.mean(passes),
                    }
                )
    write("methods-gradient.csv", rows)
    for parameters in ("shared", "free"):
        print(
            f"\n{parameters} parameters: expected gradient against the exact one, each at its best "
            "scale (median, worst of 10 denoisers of 4 positions, 2 tokens, 4 steps), and variance "
            "of one completion x passes, relative to its own mean\n"
        )
        print(tables.methods_gradient(parameters))


def drawn_threshold_study():
    """What a drawn threshold, counted as one more action, leaves out of the model's gradient: that
    its levels move. E[R] is a sum over the intervals between the table's levels, of their mass
    times the enumerated mean reward there; autograd with the masses held still against all."""
    rows, sigma, mean = [], 0.5, 0.5
    for V in (2, 3):
        for scale in (1.0, 2.0):
            for seed in range(3):
                cfg = Settings(
                    completion_length=3,
                    block_length=3,
                    steps=3,
                    temperature=1.0,
                    unmasking="threshold",
                )
                policy = toy.TableDenoiser(3, V, seed=seed, scale=scale)
                levels = (-policy.table.log_softmax(-1).amax(-1)).flatten()
                levels = levels[levels.detach().argsort()]
                levels = levels[torch.tensor([True, *(levels.diff().detach() > 1e-12)])]
                normal, ends = torch.distributions.Normal(mean, sigma), levels.detach().tolist()
                cut = [
                    torch.zeros((), dtype=torch.float64),
                    *map(normal.cdf, levels),
                    torch.ones((), dtype=torch.float64),
                ]
                whole, still = 0.0, 0.0
                for low, high, x in zip(
                    cut,
                    cut[1:],
                    [ends[0] - 1, *((a + b) / 2 for a, b in zip(ends, ends[1:])), ends[-1] + 1],
                ):
                    if float((high - low).detach()) > 1e-12:
                        found = toy.enumerate_trajectories(
                            policy, dataclasses.replace(cfg, threshold=math.exp(-x))
                        )
                        J = sum(
                            f[2] * toy.reward_of(f[0], V) * (1 - len(f[4]) / 4) ** 0.5
                            for f in found
                        )
                        whole, still = whole + (high - low) * J, still + (high - low).detach() * J
                exact, without = (
                    torch.autograd.grad(x, policy.table, retain_graph=True)[0]
                    for x in (whole, still)
                )
                rows.append(
                    {
                        "tokens": V,
                        "scale": scale,
                        "seed": seed,
                        "relative_error": float((without - exact).norm() / exact.norm()),
                    }
                )
    write("drawn-threshold.csv", rows)
    errors = [100 * r["relative_error"] for r in rows]
    print(
        "\na drawn threshold as one more action: the model's gradient is off by "
        f"{min(errors):.0f} to {max(errors):.0f} %, median {statistics.median(errors):.0f} % "
        f"({len(rows)} denoisers)"
    )


def cache_study():
    """Rollouts sampled with another law than the model's, as a cache makes it: bias and variance of
    the gradient of E[R] from one completion, all steps scored, with no correction, each step's
    ratio, and the completion's, truncated or not. The other law: the table's logits plus noise."""
    rows, base = (
        [],
        Settings(
            completion_length=4,
            block_length=4,
            steps=4,
            temperature=1.0,
            method="exact",
            cache="dual",
        ),
    )
    arms = {
        "none": {"importance_cap": 0.0},
        "step": {"importance_level": "step"},
        "completion, at most 2": {},
        "completion": {"importance_cap": 1e9},
    }
    for unmasking in ("random", "low_confidence"):
        for noise in (0.2, 0.5, 1.0):
            bias, variance, distance = {arm: [] for arm in arms}, {arm: [] for arm in arms}, []
            for seed in range(10):
                policy, cached = (toy.TableDenoiser(4, 2, seed=seed) for _ in range(2))
                with torch.no_grad():
                    cached.table += noise * torch.randn(
                        cached.table.shape,
                        generator=torch.Generator().manual_seed(1000 + seed),
                        dtype=torch.float64,
                    )
                    cached.table[-1] = policy.table[
                        -1
                    ]  # all MASK: where a block begins the cache is fresh
                cfg = dataclasses.replace(base, unmasking=unmasking)
                truth, found = (
                    toy.enumerate_trajectories(policy, cfg),
                    toy.enumerate_trajectories(cached, cfg),
                )
                mean = sum(f[2] * toy.reward_of(f[0], 2) for f in truth)
                exact = torch.autograd.grad(mean, policy.table)[0].flatten()
                traj, prob = (
                    toy.as_trajectory(cached, cfg, found),
                    torch.stack([f[2] for f in found]).detach(),
                )
                adv = (
                    torch.tensor([toy.reward_of(f[0], 2) for f in found], dtype=torch.float64)
                    - mean.detach()
                )
                traj.old, traj.support, ones = (
                    "cached",
                    None,
                    torch.ones(len(found), dtype=torch.float64),
                )
                views = ready(policy, traj, ones, dataclasses.replace(cfg, importance_cap=0.0))
                gradients = (
                    view_gradients(policy, traj, views, cfg) * cfg.steps
                )  # (views, parameters), Z = T undone
                known = {(*f[0], *f[1]): float(f[2].detach()) for f in truth}
                distance.append(
                    sum(
                        p * math.log(p / max(known.get((*f[0], *f[1]), 0.0), 1e-9))
                        for p, f in zip(prob.tolist(), found)
                    )
                )
                for arm, change in arms.items():
                    how = dataclasses.replace(cfg, **change)
                    weight = (ready(policy, traj, ones, how).weight / views.weight)[:, 0]
                    each = torch.zeros(
                        len(found), gradients.shape[1], dtype=torch.float64
                    ).index_add(0, views.row, gradients * (weight * adv[views.row])[:, None])
                    expected = prob @ each
                    bias[arm].append(float((expected - exact).norm() / exact.norm()))
                    variance[arm].append(
                        float(prob @ (each - expected).square().sum(1) / exact.square().sum())
                    )
            rows += [
                {
                    "unmasking": unmasking,
                    "noise": noise,
                    "kl_median": statistics.median(distance),
                    "correction": arm,
                    "denoisers": 10,
                    "bias_median": statistics.median(bias[arm]),
                    "bias_max": max(bias[arm]),
                    "variance_median": statistics.median(variance[arm]),
                }
                for arm in arms
            ]
    write("cache-bias.csv", rows)
    print(
        "\nrollouts by another law: bias and variance of the gradient (relative to its length, and "
        "its square), medians of 10 table denoisers\n"
    )
    print(tables.cache_bias())


if __name__ == "__main__":
    clock = time.perf_counter()
    for study in (
        variance_study,
        bias_study,
        total_error_study,
        method_study,
        drawn_threshold_study,
        cache_study,
    ):
        if len(sys.argv) == 1 or study.__name__ in sys.argv[1:]:
            study()
    print(f"\n{time.perf_counter() - clock:.0f} s")
