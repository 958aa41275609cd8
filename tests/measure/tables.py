"""The tables of README.md and assets/README.md, from the CSV files under assets/.

    python tests/measure/tables.py             rewrites them in place

A table stands between <!-- NAME --> and <!-- /NAME -->, where NAME is a function below. How the CSV
files were made: assets/README.md.
"""

import contextlib
import csv
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from support import files  # noqa: E402
from support.completions import wilson  # noqa: E402

PAGES = (ROOT / "README.md", ROOT / "assets" / "README.md")


@contextlib.contextmanager
def writing(path):
    """A CSV file to write; made.json beside it keeps machine, versions, commit and command."""
    import torch
    part = path.with_suffix(".part")
    with open(part, "w", newline="") as f:
        yield f
    part.replace(path)
    made = files.provenance(torch.nn.Linear(1, 1))
    del made["dtype"]                                          # of each figure its script's own
    made["command"] = made["command"].replace(f"{ROOT}/", "")
    index = path.parent / "made.json"
    known = json.loads(index.read_text()) if index.is_file() else {}
    files.write_json(index, dict(sorted({**known, path.name: made}.items())))


def known(path) -> list[dict]:
    """The rows of a CSV file as text, none where there is no file."""
    return list(csv.DictReader(open(path))) if path.is_file() else []


def write(path, fields: list, rows: list[dict]):
    """Rows as a CSV file, numbers to four digits behind the point."""
    with writing(path) as f:
        out = csv.DictWriter(f, fields, lineterminator="\n")
        out.writeheader()
        out.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def read(name: str) -> list[dict]:
    with open(ROOT / "assets" / name) as f:
        return [
            {
                k: float(v) if re.fullmatch(r"-?[0-9.]+(e[-+]?[0-9]+)?", v) else v
                for k, v in row.items()
            }
            for row in csv.DictReader(f)
        ]


def markdown(header: list, rows: list) -> str:
    return "\n".join(
        f"| {' | '.join(map(str, cells))} |" for cells in (header, ["---"] * len(header), *rows)
    )


def spread(values: list, digits: int = 1) -> str:
    return (
        f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"
        if len(values) > 1
        else f"{values[0]:.{digits}f}"
    )


def at(points: list[tuple], x: float) -> float:
    """Linear between measured points, level beyond the last."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def groups(rows: list, *keys) -> dict:
    found = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in keys), []).append(row)
    return found


# --------------------------------------------------------------------------------------- results
def first_steps(rows: list) -> list:
    """Of each run the row of the headline number of steps, which comes first."""
    return [
        own[0]
        for _, own in sorted(
            groups(rows, "task", "seed").items(),
            key=lambda item: (item[0][0] != "sudoku", *item[0]),
        )
    ]


def results() -> str:
    lines = []
    for (task,), own in groups(first_steps(read("results.csv")), "task").items():
        half, quarter = (
            [
                100 * r["trained"]
                for r in groups(read("results.csv"), "task", "steps")[task, own[0]["steps"] // k]
            ]
            for k in (2, 4)
        )
        lines.append(
            [
                task,
                f"{spread([100 * r['base'] for r in own])} in {own[0]['steps']:.0f}",
                f"{spread([100 * r['trained'] for r in own])} in {own[0]['steps']:.0f}",
                f"{spread(half)} in {own[0]['steps'] / 2:.0f}",
                f"{spread(quarter)} in {own[0]['steps'] / 4:.0f}",
                len(own),
                f"{own[0]['n']:.0f}",
                spread([(r["rollout_seconds"] + r["update_seconds"]) / 60 for r in own]),
                f"`python agrpo.py --task {task} --seed SEED`",
            ]
        )
    return markdown(
        [
            "task",
            "base, % in steps",
            "trained",
            "at half of the steps",
            "at a quarter",
            "seeds",
            "examples",
            "minutes of rollout and update",
            "command",
        ],
        lines,
    )


def seeds() -> str:
    def with_interval(solved: float, n: float) -> str:
        low, high = wilson(round(solved * n), int(n))
        return f"{100 * solved:.1f} ({100 * low:.1f} to {100 * high:.1f})"

    lines = []
    for r in first_steps(read("results.csv")):
        shares = [with_interval(r[k], r["n"]) for k in ("base", "trained")]
        lines.append(
            [
                r["task"],
                f"{r['seed']:.0f}",
                *shares,
                f"{100 * (r['trained'] - r['base']):+.1f}",
                f"{r['total_seconds'] - r['base_model_seconds']:.0f}",
                f"{r['peak_memory_mb']:.0f}",
            ]
        )
    return markdown(
        ["task", "seed", "base, %", "trained, %", "gain", "seconds", "memory, MB"], lines
    )


def mistakes() -> str:
    """Shares of what the models of all seeds wrote, base -> trained."""
    rows, lines = read("mistakes.csv"), []
    total = {key: sum(r["n"] for r in own) for key, own in groups(
        rows, "model", "operations").items()}
    for (what,), own in groups(rows, "kind").items():
        cells = []
        for operations in ((1, 2, 3), (1,), (2,), (3,)):
            shares = []
            for who in ("base", "trained"):
                n = sum(r["n"] for r in own if r["model"] == who and r["operations"] in operations)
                shares.append(100 * n / sum(total[who, k] for k in operations))
            cells.append(f"{shares[0]:.1f} -> {shares[1]:.1f}")
        lines.append([what, *cells])
    header = ["%", "all", *(f"{n} operation{'s' * (n > 1)}" for n in (1, 2, 3))]
    return markdown(header, lines)


NOISE = {  # of noise.csv, and what it is called in the table
    "solved": "solved, of what is sampled, %",
    "entropy": "entropy of the law, nats a token",
    "batch": "variance between batches, all steps scored / square of the mean gradient",
    "batch, error": "... standard error of that (jackknife)",
    "batch_gradient K 1": "drawing 1 step a completion (`batch_gradient`) adds to it, %",
    "batch_gradient K 2": "... 2 steps, %",
    "batch_gradient K 4": "... 4 steps, %",
    "iid K 1": "even, independent draws (`iid`), 1 step, %",
    "low_discrepancy K 1": "the published rule of drawing steps, 1 step, %",
    "low_discrepancy K 4": "... 4 steps, %",
    "position term": "mean of the position term, squared / of the gradient, squared, %",
    "position term, batch": "the same of single batches, %",
    "largest state": "longest gradient of a drawn state / sum of all lengths, %",
    "largest completion": "... of a completion, %",
    "tokens at the end": "places after the end, of the tokens' squared gradient by the logits, %",
    "positions at the end": "... of the position term's, %",
    "moved, mean": "log-probability of a token moved by one update: mean",
    "moved, 99 %": "... 99th percentile",
    "moved, largest": "... largest",
}


def noise() -> str:
    """A column for each step of training that was looked at, means of the seeds."""
    rows = [r for r in read("noise.csv") if r["task"] == "story"]
    columns, lines = sorted({(r["flags"], r["step"]) for r in rows}), []
    for what, words in NOISE.items():
        cells = [statistics.mean(
            r["value"] for r in rows if (r["what"], r["flags"], r["step"]) == (what, *column)
        ) for column in columns]
        cells = [100 * x if words.endswith("%") else x for x in cells]
        lines.append([words, *("0" if abs(x) < 1e-3 else f"{x:.2g}" if abs(x) < 10 else f"{x:.0f}"
                               for x in cells)])
    header = [""]
    for flags, step in columns:
        seeds = {r["seed"] for r in rows if (r["flags"], r["step"]) == (flags, step)}
        header.append(f"{f'`{flags}`' if flags else 'default'}, before step {step + 1:.0f} "
                      f"({'seeds' if len(seeds) > 1 else 'seed'} {min(seeds):.0f}"
                      + f" to {max(seeds):.0f}" * (len(seeds) > 1) + ")")
    return markdown(header, lines)


METHODS = {  # paper; states of a completion that are scored; what is scored on each
    "agrpo": ("2510.04019", "x_t of K drawn steps", "what step t revealed, and its order"),
    "exact": ("", "x_t of every step", "the same"),
    "tracerl": ("2509.06949", "the first of every `--shrink` steps", "what these steps revealed"),
    "dipo": ("2512.22234", "step j of every block, packed", "what these steps revealed"),
    "diffpo": ("2510.02212", "all MASK; x_s of a random s", "what steps < s revealed; the rest"),
    "diffu-grpo": ("2504.12216", "all MASK, a noisy prompt", "all tokens up to the end"),
}


def methods() -> str:
    """The six methods, and what each reaches in compare.csv on the two tiny models."""
    rows, lines = groups(read("compare.csv"), "arm"), []
    for name, (paper, states, scored) in METHODS.items():
        cells = []
        for arm in (name, f"{name}, tiny-block"):
            ends = [run[-1] for run in groups(rows.get((arm,), []), "seed").values()]
            cells.append(spread([100 * end["held_out"] for end in ends]) if ends else "")
        paper = f"[{paper}](https://arxiv.org/abs/{paper})" if paper else ""
        lines.append([f"`{name}`", paper, states, scored, *cells])
    return markdown(
        ["`--method`", "arXiv", "states", "scored on them", "tiny, %", "tiny-block, %"], lines
    )


def compare() -> str:
    """Each arm of compare.csv, after a quarter of the time and at the end, against the default."""
    lines, against = [], {}
    for (group,), own in groups(read("compare.csv"), "group").items():
        for i, ((arm,), mine) in enumerate(groups(own, "arm").items()):
            runs = groups(mine, "seed")
            curves = {seed: [100 * row["held_out"] for row in run] for seed, run in runs.items()}
            early = [100 * at([(r["seconds"], r["held_out"]) for r in run], run[-1]["seconds"] / 4)
                     for run in runs.values()]
            ours = against.setdefault("blocks" in group, curves)   # which have another model
            ends = [run[-1] for run in runs.values()]
            lines.append([
                "" if i else group, arm, f"{statistics.mean(e['step'] for e in ends):.0f}",
                f"{statistics.mean(e['passes'] / e['step'] for e in ends):.0f}",
                spread(early), spread([curve[-1] for curve in curves.values()]),
                ", ".join(f"{c[-1] - ours[seed][-1]:+.1f}" for seed, c in curves.items()),
                f"{max(max(curve) - curve[-1] for curve in curves.values()):.1f}",
            ])
    return markdown(["", "", "steps", "passes a step", "after a quarter, %", "at the end, %",
                     "minus the default, by seed", "at most below its best"], lines)


def curriculum() -> str:
    """Seconds to a held-out share, and the share at the end, with and without each curriculum."""
    lines, share = [], 0.6
    for (task, pool), own in groups(read("curriculum.csv"), "task", "examples").items():
        plain = []
        for (arm,), mine in groups(own, "curriculum").items():
            runs = [run for _, run in sorted(groups(mine, "seed").items())]
            when = [first(share, [(r["held_out"], r["seconds"]) for r in run]) for run in runs]
            ends = [100 * run[-1]["held_out"] for run in runs]
            plain = plain or ends
            lines.append([
                task, f"{pool:.0f}", arm, f"{statistics.mean(r[-1]['step'] for r in runs):.0f}",
                f"{statistics.mean(r[-1]['passes'] / r[-1]['step'] for r in runs):.0f}",
                ", ".join(f"{s:.0f}" if s else "never" for s in when), spread(ends),
                ", ".join(f"{a - b:+.1f}" for a, b in zip(ends, plain)),
            ])
    return markdown(["task", "examples", "curriculum", "steps", "passes a step",
                     f"seconds to {100 * share:.0f} %, by seed", "at the end, %",
                     "minus none, by seed"], lines)


def first(x: float, points: list[tuple]) -> float | None:
    """Where points (x, y) first reach x, linear between them; None if they do not."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x1 >= x:
            return y0 + (y1 - y0) * max(0.0, x - x0) / (x1 - x0) if x0 < x else y0
    return None


def advantage() -> str:
    lines = []
    for (task,), own in groups(read("advantage.csv"), "task").items():
        for steps in sorted({r["steps"] for r in own}, reverse=True):
            by = {rule: [100 * r["trained"] for r in rows] for (rule, _), rows in groups(
                [r for r in own if r["steps"] == steps], "advantage", "steps").items()}
            ours, theirs = by["leave_one_out"], by["std"]
            less = [f"{a - b:+.1f}" for a, b in zip(ours, theirs)]
            lines.append([task, f"{steps:.0f}", spread(ours), spread(theirs), ", ".join(less)])
    header = ["task", "steps", "`leave_one_out`", "`std`", "difference, seed by seed"]
    return markdown(header, lines)


def fewer_steps() -> str:
    lines = []
    for first in first_steps(read("results.csv")):
        task, seed = first["task"], first["seed"]
        full, half, quarter = groups(read("results.csv"), "task", "seed")[task, seed]
        lines.append(
            [
                task,
                f"{seed:.0f}",
                f"{100 * full['base']:.1f} in {full['nfe']:.0f}",
                *(f"{100 * r['trained']:.1f} in {r['nfe']:.0f}" for r in (half, quarter)),
            ]
        )
    return markdown(
        ["task", "seed", "base, % in denoiser calls", "trained, at half", "trained, at a quarter"],
        lines,
    )


def share(row: dict, name: str = "solved") -> str:
    """'5.8 (4.1 to 8.2)', or nothing"""
    return (
        f"{100 * row[name]:.1f} ({100 * row[name + '_low']:.1f} to {100 * row[name + '_high']:.1f})"
        if row[name] != ""
        else ""
    )


def puzzles() -> str:
    rows = groups([r for r in read("evaluations.csv") if r["data"]], "task", "seed", "model")
    lines = []
    for task, seed in sorted({key[:2] for key in rows}, key=lambda key: (key[0] != "sudoku", key)):
        (base,), (trained,) = rows[task, seed, "tiny"], rows[task, seed, "trained"]
        unseen = [f"{100 * row['never_trained_on']:.1f}" for row in (base, trained)]
        lines.append(
            [
                f"{base['data']}, {base['n']:.0f}",
                f"{seed:.0f}",
                share(base),
                share(trained),
                f"{', '.join(unseen)} ({base['never_n']:.0f})",
            ]
        )
    return markdown(
        [
            "file, n",
            "seed",
            "base, %",
            "trained, %",
            "both on those in a class never trained on, % (n)",
        ],
        lines,
    )


def adaptive() -> str:
    rows = [
        r
        for r in read("evaluations.csv")
        if not r["data"] and r["k"] == 1 and r["model"] == "trained"
    ]
    return markdown(
        ["`--unmasking`", "seed", "NFE", "solved, %", "n"],
        [
            [
                f"`{r['unmasking']}`",
                f"{r['seed']:.0f}",
                f"{r['nfe']:.1f}",
                share(r),
                f"{r['n']:.0f}",
            ]
            for r in rows
        ],
    )


def samples() -> str:
    lines = []
    for r in read("evaluations.csv"):
        if r["k"] > 1:
            greedy = next(
                x
                for x in first_steps(read("results.csv"))
                if (x["task"], x["seed"]) == (r["task"], r["seed"])
            )
            lines.append(
                [
                    r["task"],
                    f"{100 * greedy['base']:.1f}",
                    share(r),
                    share(r, "pass_at_k"),
                    share(r, "majority"),
                ]
            )
    return markdown(
        ["task", "one greedy answer, %", "one sampled", "pass@16", "majority of 16"],
        sorted(lines, reverse=True),
    )


# ----------------------------------------------------------------------------- bias and variance
def bias() -> str:
    lines = []
    for (unmasking,), own in groups(read("bias.csv"), "unmasking").items():
        low, high = (100 * f(r["tokens_only_median"] for r in own) for f in (min, max))
        lines.append(
            [
                f"`{unmasking}`",
                f"{max(r['error_max'] for r in own):.0e}",
                *(
                    [
                        f"{low:.0f} to {high:.0f} %",
                        f"{100 * max(r['tokens_only_max'] for r in own):.0f} %",
                    ]
                    if high > 1e-6
                    else ["the same", ""]
                ),
            ]
        )
    return markdown(
        [
            "`--unmasking`",
            "relative error",
            "tokens only (`--position-term off`): median by setting",
            "worst",
        ],
        lines,
    )


def at_passes(rows: list, rule: str, passes: float) -> float:
    """Variance of a rule at so many passes, linear between its measured points in logarithms."""
    from math import exp, log

    points = sorted(
        (log(r["passes"]), log(r["relative_variance"])) for r in rows if r["timesteps"] == rule
    )
    return exp(at(points, log(passes)))


def variance() -> str:
    lines = []
    for passes in (1, 2, 3):
        cells = []
        for (_,), own in groups(read("variance.csv"), "model").items():
            published, ours = (
                at_passes(own, rule, passes) for rule in ("low_discrepancy", "batch_gradient")
            )
            cells.append(f"{published / ours:.0f}x ({ours:.2g} against {published:.2g})")
        lines.append([passes, *cells])
    return markdown(
        ["passes per completion", "table denoiser, 6 steps", "tiny Sudoku model, 16 steps"], lines
    )


def methods_gradient(parameters: str = "shared") -> str:
    kinds = [
        (a, u) for a in ("full attention", "block-causal") for u in ("random", "low_confidence")
    ]
    rows, lines = [r for r in read("methods-gradient.csv") if r["parameters"] == parameters], []
    for (method,), own in groups(rows, "method").items():
        mine, cells = {(r["attention"], r["unmasking"]): r for r in own}, []
        for r in map(mine.get, kinds):
            cells += (
                [
                    f"{100 * r['bias_median']:.0f} % ({100 * r['bias_max']:.0f} %)"
                    if r["bias_max"] > 1e-6
                    else "0",
                    f"{r['variance_times_passes']:.0f}",
                ]
                if r
                else ["", ""]
            )
        lines.append([method, f"{mine['block-causal', 'random']['passes']:.1f}", *cells])
    return markdown(
        ["method", "passes", *(x for a, u in kinds for x in (f"{a}, {u}: bias", "noise"))], lines
    )


# ------------------------------------------------------------------------------------- one night
def nights() -> str:
    """Hours and gigabytes by model and GPU."""
    found = groups(read("nights.csv"), "model", "gpu", "preset")
    gpus = list(dict.fromkeys(gpu for _, gpu, _ in found))

    def cell(model, gpu, preset):
        (r,) = found.get((model, gpu, preset), [None])
        if r is None or not r["fits"]:
            return "does not fit"
        hours = f"{r['hours']:.3g} h" if r["hours"] < 48 else f"{r['hours'] / 24:.0f} days"
        steps = f", {r['steps']:.0f} steps" if preset == "one night" and r["steps"] < 300 else ""
        cache = ", `dual`" if r["cache"] == "dual" else ""
        return f"{hours}, {r['gigabytes']:.0f} GB{steps}{cache}"

    return markdown(
        ["`--model`", *gpus, *(f"`--preset {name}`, {gpus[-1]}" for name in ("paper", "justgrpo"))],
        [
            [
                f"`{model}`",
                *(cell(model, gpu, "one night") for gpu in gpus),
                *(cell(model, gpus[-1], preset) for preset in ("paper", "justgrpo")),
            ]
            for model in dict.fromkeys(model for model, _, _ in found)
        ],
    )


def lever_runs() -> dict:
    """(task, lever, setting) -> {seed: rows of a run, from the base model on}"""
    found = {}
    for (task, lever, setting, seed), own in groups(
        read("levers.csv"), "task", "lever", "setting", "seed"
    ).items():
        found.setdefault((task, lever, setting), {})[seed] = own
    return found


def levers() -> str:
    """What each lever brings in the same time."""
    runs, lines = lever_runs(), []
    for (task, lever, setting), own in runs.items():
        paper, ours = (
            runs[task, name, ""] for name in ("published estimator", "ours")
        )
        budget = max(rows[-1]["seconds"] for rows in paper.values())

        def share(of, seed):
            return 100 * at([(r["seconds"], r["held_out"]) for r in of[seed]], budget)

        def gain(of, s):
            return share(of, s) - 100 * of[s][0]["held_out"]

        ratios = [gain(own, s) / gain(paper, s) for s in own]
        last = [rows[-1] for rows in own.values()]
        lines.append(
            [
                task,
                f"{lever} {setting:g}" if setting != str(setting) else f"{lever} {setting}".strip(),
                len(own),
                f"{statistics.mean(r['step'] for r in last):.0f}",
                f"{100 * statistics.mean(r['rollout'] for r in last):.0f}",
                spread([share(own, s) for s in own]),
                ", ".join(f"{share(own, s) - share(ours, s):+.1f}" for s in own),
                f"{statistics.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        )
    return markdown(
        [
            "task",
            "lever",
            "seeds",
            "steps",
            "time in rollouts, %",
            "held out, %",
            "minus `ours`, by seed",
            "gain a second, times the published (lowest to highest seed)",
        ],
        lines,
    )


def left_to_right() -> str:
    """Trained by one order, evaluated by two."""
    names = {
        ("ours", ""): "low confidence",
        ("tokens a step", "1"): "low confidence, a token a step",
        ("sampler", "random"): "random",
        ("sampler", "left to right"): "left to right, K = 1",
        ("sampler", "JustGRPO"): "left to right, all steps (JustGRPO)",
    }
    return markdown(
        ["task", "trained", "seeds", "evaluated by low confidence, %", "left to right, %"],
        [
            [
                task,
                names[lever, setting],
                len(own),
                *(
                    spread([100 * rows[-1][name] for rows in own.values()])
                    for name in ("held_out", "left_to_right")
                ),
            ]
            for (task, lever, setting), own in lever_runs().items()
            if (lever, setting) in names
        ],
    )


# --------------------------------------------------------------------- controller, speed, caches
def controller() -> str:
    lines = [
        (
            what,
            f"{knob:g}",
            len(own),
            f"{statistics.mean(r['nfe'] for r in own):.1f}",
            f"{100 * statistics.mean(r['solved'] for r in own):.1f}",
        )
        for (what, knob), own in groups(read("controller.csv"), "what", "bound_or_alpha").items()
    ]
    return markdown(
        ["what", "bound or alpha", "seeds", "NFE", "solved, %"],
        sorted(lines, key=lambda line: (line[0], float(line[3]), float(line[4]))),
    )


def bench(name: str = "bench-vocabulary.csv") -> str:
    return markdown(
        [
            "",
            "seconds",
            "times faster",
            "peak memory, MB",
            "of the plain recipe's",
            "floor / seconds",
        ],
        [
            [
                f"{r['part']}: {r['variant']}",
                f"{r['seconds']:.3g}",
                f"{r['ratio']:.3g}",
                f"{r['peak_mb']:.0f}",
                r["memory_ratio"],
                r["share_of_floor"],
            ]
            for r in read(name)
        ],
    )


def scaling() -> str:
    lines = []
    for (axis,), own in groups(read("bench-scaling.csv"), "axis").items():
        mine = {r["part"]: r["exponent"] for r in own}
        lines.append(
            [
                axis,
                ", ".join(str(own[0]["values"]).split()),
                *(mine.get(part, "") for part in ("rollout", "dual rollout", "update")),
            ]
        )
    return markdown(["grows with", "values", "rollout", "dual rollout", "update"], lines)


def cache_bias() -> str:
    lines, arms = [], ("none", "step", "completion, at most 2", "completion")
    for (unmasking, noise, kl), own in groups(
        read("cache-bias.csv"), "unmasking", "noise", "kl_median"
    ).items():
        mine = {r["correction"]: r for r in own}
        lines.append(
            [
                unmasking,
                f"{noise} ({kl:.2f})",
                *(
                    x
                    for arm in arms
                    for x in (
                        "0"
                        if mine[arm]["bias_max"] < 1e-9
                        else f"{100 * mine[arm]['bias_median']:.1f} %",
                        f"{mine[arm]['variance_median']:.0f}",
                    )
                ),
            ]
        )
    return markdown(
        [
            "sampler",
            "noise on the logits (KL, nats)",
            *(x for arm in arms for x in (f"{arm}: bias", "variance")),
        ],
        lines,
    )


def cache() -> str:
    lines = []
    for (task, kind, order, weights), own in groups(
        read("cache.csv"), "task", "cache", "position_term", "weights"
    ).items():
        shares = [100 * r["trained"] for r in own]
        lines.append(
            [
                f"`--cache {kind}`",
                "tokens and order" if order == "on" else "tokens",
                weights,
                ", ".join(f"{x:.1f}" for x in shares),
                f"{statistics.mean(shares):.1f}",
            ]
        )
    return markdown(
        ["rollouts", "in the likelihood", "weights", "trained, %, by seed", "mean"], lines
    )


TABLES = {
    f.__name__: f
    for f in (
        results,
        seeds,
        methods,
        compare,
        curriculum,
        advantage,
        fewer_steps,
        mistakes,
        noise,
        puzzles,
        adaptive,
        samples,
        bias,
        variance,
        methods_gradient,
        nights,
        levers,
        left_to_right,
        controller,
        bench,
        scaling,
        cache_bias,
        cache,
    )
}


def filled(text: str) -> str:
    """A page with its tables made anew. Raises ValueError for a marker without its other half, or
    of no table."""
    marks = re.findall(r"<!--\s*(/?\s*\S+)\s*-->", text)
    if marks != [mark for name in marks[::2] for mark in (name, "/" + name)] or not set(
        marks[::2]
    ) <= set(TABLES):
        raise ValueError(
            f"markers are <!-- NAME --> and <!-- /NAME -->, NAME one of {', '.join(TABLES)}; "
            f"here are {marks}"
        )
    return re.sub(
        r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)",
        lambda m: f"{m[1]}{TABLES[m[2]]()}\n\n{m[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
