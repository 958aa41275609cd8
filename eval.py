"""Evaluation: solved share with its interval, denoiser calls, and the accuracy/NFE frontier.

    python eval.py --model tiny --task sudoku                      the tiny base model (trained on the first call)
    python eval.py --model runs/sudoku-agrpo-seed0 --task sudoku --steps 16,8,4 --data puzzles.csv

agrpo.py calls `evaluate` before and after training, so both use the sampler, prompt and grader of training.
"""
import argparse
import csv
import dataclasses
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Callable

from rewards import TASKS, BadInput, held_out, load_examples


def wilson(solved: int, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share (Wilson's score interval): [low, high].

    >>> [round(x, 3) for x in wilson(50, 100)]
    [0.404, 0.596]
    """
    p, centre = solved / n, (solved + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * p * (1 - p) + z * z / 4)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def evaluate(generate, task: str, examples: list, batch: int = 256) -> dict:
    """Complete and grade every example. generate(examples, keys) -> trajectory, texts.

    Returns solved (share of grade 1), n, ci95, grade (mean), nfe (denoiser calls per completion), tokens_per_nfe (tokens
    before the end, per call), seconds, and the completions."""
    clock, grades, nfe, length, texts = time.perf_counter(), [], 0, 0, []
    for i in range(0, len(examples), batch):
        chunk = examples[i:i + batch]
        traj, out = generate(chunk, [("eval", i + j) for j in range(len(chunk))])
        grades += [TASKS[task].grade(text, ex) for text, ex in zip(out, chunk)]
        nfe += int(traj.nfe.sum())
        length += int(((traj.tokens == traj.eos_id).int().cumsum(1) == 0).sum())
        texts += out
    n, solved = len(examples), sum(g == 1 for g in grades)
    return {"solved": solved / n, "n": n, "ci95": wilson(solved, n), "grade": sum(grades) / n, "nfe": nfe / n,
            "tokens_per_nfe": length / nfe, "seconds": time.perf_counter() - clock, "completions": texts}


def percent(result: dict) -> str:
    """'34.0 % (29.9 to 38.2)'"""
    return f"{100 * result['solved']:.1f} % ({100 * result['ci95'][0]:.1f} to {100 * result['ci95'][1]:.1f})"


def table(header: list, rows: list) -> str:
    """A plain table, columns as wide as their widest cell."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(str(cell).ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [header, *rows])


# ------------------------------------------------------------------------------------------------- files of a run folder
def write_atomically(path: Path, write: Callable):
    """write(file) into a neighbour that then takes the place of `path`: a reader sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def first_line(error: Exception) -> str:
    """What went wrong in one line; the kind of error if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_json(path: Path, kind: type = dict):
    """The object in a JSON file; raises BadInput if there is none of this kind."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None
    if not isinstance(value, kind) or not value:
        raise BadInput(f"cannot read {path}: not a JSON {'object' if kind is dict else 'list'} with something in it")
    return value


def write_json(path: Path, value):
    write_atomically(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def check(folder: Path, settings: dict, may_change: tuple, resume: bool, overwrite: bool):
    """Raises BadInput if the folder holds something already, or, to be resumed, no run or one of another configuration."""
    if folder.parent.exists() and not folder.parent.is_dir():
        raise BadInput(f"{folder.parent} is not a folder")
    is_run = (folder / "config.json").is_file() and not folder.is_symlink()
    if resume and overwrite:
        raise BadInput("--resume and --overwrite contradict each other")
    if resume and not is_run:
        raise BadInput(f"--resume: no run in {folder}")
    free = not os.path.lexists(folder) or folder.is_dir() and all(p.name.endswith(".partial") for p in folder.iterdir())
    if not free and not resume and not (overwrite and is_run):                       # a kill at birth leaves an empty folder
        raise BadInput(f"{folder} holds a run already: --resume continues it, --overwrite replaces it, --name NAME starts another"
                       if is_run else f"{folder} exists and is not a run folder: --name NAME starts elsewhere")
    saved = read_json(folder / "config.json") if resume else {}
    other = [k for k, v in settings.items() if resume and k not in may_change and saved.get(k) != v]
    if other:
        raise BadInput(f"{folder} was run with {', '.join(f'{k}={saved.get(k)!r}' for k in other)}, not "
                       f"{', '.join(f'{k}={settings[k]!r}' for k in other)}")


def save_checkpoint(path: Path, model, optimizer, **rest):
    """Weights of both and the rest, atomically."""
    import torch
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **rest}
    write_atomically(path, lambda f: torch.save(state, f))


def load_checkpoint(path: Path, model, optimizer) -> dict:
    """Puts a checkpoint's weights into model and optimizer, returns the step and seconds it was saved at; raises BadInput."""
    import torch
    try:
        saved = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return {"step": saved["step"], "seconds": saved["seconds"]}
    except Exception as error:                                                       # torch raises many kinds
        raise BadInput(f"{path} cannot be read: {first_line(error)}") from None


def read_log(path: Path, before_step: float = math.inf) -> list[dict]:
    """The whole rows of log.csv before a step: what was logged after the checkpoint, or half written, is done again."""
    if not path.is_file():
        return []
    with open(path, newline="", errors="replace") as f:
        return [row for row in csv.DictReader(f) if None not in row.values() and row.get("step", "").isdecimal()
                and int(row["step"]) < before_step]


def write_log(path: Path, rows: list[dict]):
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)] if rows else []
    write_atomically(path, lambda f: f.write("".join(line + "\n" for line in lines).encode()))


def append_log(path: Path, row: dict):
    with open(path, "a") as f:
        f.write(("" if f.tell() else ",".join(row) + "\n") + ",".join(map(str, row.values())) + "\n")


def report(folder: Path, cfg, heldout: list, base: list, trained: list, seconds: dict):
    """What a finished run leaves: samples.txt, curve.png, frontier.png, summary.json, and the table on the screen.
    base, trained: results of `evaluate`, one per number of steps, the headline first."""
    samples = [f"{cfg.task}, greedy, {base[0]['steps']} denoising steps; + marks a solved one\n"]
    for ex, *pair in list(zip(heldout, base[0]["completions"], trained[0]["completions"]))[:20]:
        before, after = (f"{'+' if TASKS[cfg.task].grade(c, ex) == 1 else ' '} {c}" for c in pair)
        samples.append(f"prompt    {TASKS[cfg.task].prompt(ex)}\n  base  {before}\n  after {after}\n")
    write_atomically(folder / "samples.txt", lambda f: f.write("\n".join(samples).encode()))
    rows = read_log(folder / "log.csv")
    if rows:
        plot_curves(folder / "curve.png", [(rows, base[0], trained[0])], cfg.task)
    plot_frontier(folder / "frontier.png", {"base": base, "trained": trained}, cfg.task)
    short = [{k: r[0][k] for k in ("solved", "n", "ci95")} for r in (base, trained)]
    by_steps = [{"steps": b["steps"], "nfe": t["nfe"], "base": b["solved"], "trained": t["solved"]} for b, t in zip(base, trained)]
    seconds = {k: round(v, 1) for k, v in {**seconds, "total": sum(seconds.values())}.items()}
    write_json(folder / "summary.json", {
        "task": cfg.task, "model": cfg.model, "method": cfg.method, "seed": cfg.seed, "base": short[0], "trained": short[1],
        "by_steps": by_steps, "seconds": seconds, "peak_memory_mb": peak_memory_mb()})
    print(f"\n{cfg.task}, {base[0]['n']} held-out examples, greedy: solved (95 % interval)")
    lines = [[b["steps"], f"{t['nfe']:.1f}", percent(b), percent(t)] for b, t in zip(base, trained)]
    print(table(["steps", "NFE", "base", "trained"], lines))
    print(f"{len(rows)} training steps, {seconds['total']:.0f} s in all. Look at {folder}/{'curve' if rows else 'frontier'}.png and "
          f"{folder}/samples.txt")


# -------------------------------------------------------------------------------------------------------------- figures
COLOUR = {"base": "#777777", "trained": "#0b62a4", "sampled": "#d9822b"}


def figure(path: Path, title: str, xlabel: str, ylabel: str, draw, size=(7, 4)):
    """One figure, one question: draw(axis), then written as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axis = plt.subplots(figsize=size, dpi=120, layout="constrained")
    draw(axis)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    fig.savefig(path)
    plt.close(fig)


def label_end(axis, x, y, text, colour):
    axis.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", color=colour, fontsize=9)


def plot_curves(path: Path, runs: list[tuple], task: str):
    """Solved share against training minutes; runs: (rows of log.csv, base, trained or None), one per seed. Completions
    sampled in training (mean of ten steps) and held-out ones decoded greedily."""
    def draw(axis):
        for rows, base, trained in runs:
            spent = [(float(row["rollout_seconds"]) + float(row["update_seconds"])) / 60 for row in rows]
            minutes = [sum(spent[:i + 1]) for i in range(len(spent))]
            share = [100 * float(row["solved"]) for row in rows]
            smooth = [sum(share[max(0, i - 9):i + 1]) / len(share[max(0, i - 9):i + 1]) for i in range(len(share))]
            held = [(0.0, 100 * base["solved"])] + [(m, 100 * float(r["heldout"])) for m, r in zip(minutes[:-1], rows) if r["heldout"]]
            held += [(minutes[-1], 100 * trained["solved"])] if trained else []
            axis.plot(minutes, share, color=COLOUR["sampled"], alpha=0.25, lw=0.8)
            axis.plot(minutes, smooth, color=COLOUR["sampled"], lw=1.5, ls=(0, (4, 1)))
            axis.plot(*zip(*held), color=COLOUR["trained"], lw=2, marker="o", ms=4)
            axis.axhline(100 * base["solved"], color=COLOUR["base"], ls=":", lw=1)
        top, used = axis.get_ylim()[1], -math.inf                                    # labels at the ends, none over another
        ends = [(100 * base["solved"] + 0.03 * top, "base, held out", "base"), (held[-1][1], "held out, greedy", "trained"),
                (smooth[-1], "sampled in training", "sampled")]
        for y, text, colour in sorted(ends):
            used = max(y, used + 0.05 * top)
            label_end(axis, minutes[-1], used, text, COLOUR[colour])
        axis.set_xlim(0, minutes[-1] * 1.35)
        axis.set_ylim(0)
    figure(path, f"Does AGRPO make the model better at {task}?", "minutes of rollout and update", "solved, %", draw)


def plot_frontier(path: Path, curves: dict, task: str, band: str = "band: 95 % interval"):
    """Solved share against denoiser calls per completion: {name: [result, ...]}, one line each with its band."""
    def draw(axis):
        for name, results in curves.items():
            results = sorted(results, key=lambda r: r["nfe"])
            x, y = [r["nfe"] for r in results], [100 * r["solved"] for r in results]
            colour = COLOUR.get(name, COLOUR["trained"])
            axis.fill_between(x, *zip(*[[100 * c for c in r["ci95"]] for r in results]), color=colour, alpha=0.15, lw=0)
            axis.plot(x, y, color=colour, marker="o", lw=2)
            label_end(axis, x[-1], y[-1], name, colour)
        axis.margins(x=0.12)
        axis.set_ylim(0)
    figure(path, f"How many {task} answers are solved per denoiser call?", f"NFE: denoiser calls per completion ({band})",
           "solved, %", draw)


# --------------------------------------------------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")


def add_flags(parser, settings, choices: dict, only=None):
    """Every field of a dataclass (or those of `only`) as a flag, its meaning the comment behind it: max_steps -> --max-steps."""
    meaning = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(type(settings)), re.MULTILINE))
    for field in dataclasses.fields(settings):
        if only is None or field.name in only:
            words = f" ({', '.join(filter(None, choices[field.name]))})" if field.name in choices else ""
            parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=argparse.SUPPRESS,
                                help=f"{meaning.get(field.name, '')}{words} [default: {getattr(settings, field.name)}]"
                                .replace("%", "%%"))


def check_settings(settings, choices: dict, may_be_zero: set):
    """Raises BadInput for a field that is none of its choices, or a number that is negative, infinite or zero against the rules."""
    for field in dataclasses.fields(settings):
        value, flag = getattr(settings, field.name), "--" + field.name.replace("_", "-")
        rows = choices.get(field.name, (value,))
        if value not in rows:
            raise BadInput(f"unknown {flag} {value!r}: one of {', '.join(filter(None, rows))}")
        if field.type in (int, float):
            if value >= 2**31:
                raise BadInput(f"{flag} is too large")
            if not (value > 0 or value == 0 and field.name in may_be_zero):                # nan is neither
                raise BadInput(f"{flag} {value} must be {'at least' if field.name in may_be_zero else 'above'} 0")


def read_settings(path: Path, settings: type):
    """The dataclass that write_json kept. Raises BadInput."""
    known = {k: v for k, v in read_json(path).items() if k in settings.__dataclass_fields__}
    if known.get("task") not in TASKS or any(type(v) is not settings.__dataclass_fields__[k].type for k, v in known.items()):
        raise BadInput(f"{path} is not the configuration of a run")
    return settings(**known)


class StopRequest:
    """Within `with`, the first Ctrl-C or SIGTERM lets the current step finish and be saved; a second one ends at once."""

    def __enter__(self):
        self.wanted, self.before = False, {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def peak_memory_mb() -> int:
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


SAMPLING = ("task", "model", "data", "seed", "device", "completion_length", "block_length", "unmasking", "order_score", "tau_pos",
            "threshold", "entropy_bound", "temperature", "top_k", "top_p")               # what an evaluation takes of agrpo.Config


def main(argv=None) -> int:
    """The command line; returns the exit code: 0 done, 2 a mistake of the caller, 130 stopped."""
    import agrpo                                                             # here: agrpo itself imports this file
    parser = Parser(prog="eval.py", description="Solved share of a model on a task, greedy by default. "
                    "--model takes 'tiny', a checkpoint directory or a run folder of agrpo.py.")
    add_flags(parser, agrpo.Config(**agrpo.EVALUATION), agrpo.CHOICES, SAMPLING)
    parser.add_argument("--limit", type=int, default=0, help="examples; 0: 512 generated ones, or the whole file")
    parser.add_argument("--steps", default="", help="denoising steps, comma separated; several draw the frontier")
    parser.add_argument("--samples", type=int, default=1, help="completions per example (needs a temperature): pass@k")
    parser.add_argument("--batch", type=int, default=256, help="completions denoised at once")
    parser.add_argument("--out", default="", help="write results and completions to this .json, the figure beside it")
    try:
        args = parser.parse_args(argv)
        given = {k: v for k, v in vars(args).items() if k in SAMPLING}
        path = Path(given.get("model", "tiny"))
        if str(path) != "tiny" and (path / "model" / "config.json").is_file():       # a run folder
            path = path / "model"
        elif (path / "checkpoint.pt").is_file():
            raise BadInput(f"--model {path}: this run is not finished; agrpo.py --resume finishes it")
        known = read_json(path / "agrpo.json") if (path / "agrpo.json").is_file() else {}
        task = given.get("task") or str(known.get("task", "sudoku"))
        shape = {k: known[k] for k, kind in (("completion_length", int), ("block_length", int), ("eval_steps", str))
                 if type(known.get(k)) is kind}
        shape |= {"eval_steps": args.steps} if args.steps else {}
        cfg = dataclasses.replace(agrpo.config_for(task), **{**shape, **agrpo.EVALUATION, **given, "task": task, "model": str(path)})
        if not 0 < args.samples < 10**6 or not 0 <= args.limit <= 10**5 or args.batch < 1 or args.samples > 1 and cfg.temperature == 0:
            raise BadInput("--samples and --batch must be at least 1, --limit 0 to 100000; several --samples need a --temperature")
        if args.out and (not args.out.endswith(".json") or not Path(args.out).parent.is_dir() or Path(args.out).is_dir()):
            raise BadInput(f"--out {args.out}: must be a .json file in a folder that exists")
        agrpo.validate(cfg, training=False)
        examples = load_examples(task, args.limit or (0 if cfg.data else 512), 0, "test", cfg.data or None)
        policy, tokenizer = agrpo.open_model(cfg, examples)
        results, rows = [], []
        for steps in agrpo.steps_of(cfg):
            repeated = [ex for ex in examples for _ in range(args.samples)]
            at = dataclasses.replace(cfg, steps=steps)
            result = evaluate(lambda exs, keys: agrpo.generate(policy, tokenizer, at, exs, [("eval", cfg.seed, *k) for k in keys]),
                              task, repeated, args.batch)
            solved = [TASKS[task].grade(t, ex) == 1 for t, ex in zip(result["completions"], repeated)]
            any_of = [any(solved[i:i + args.samples]) for i in range(0, len(solved), args.samples)]
            held = [s for s, ex in zip(solved, repeated) if held_out(task, ex)]
            result["ci95"] = wilson(result["solved"] * len(examples), len(examples))     # samples of one example are not independent
            results.append({"steps": steps, **result, "pass_at_k": sum(any_of) / len(any_of), "k": args.samples,
                            "held_out": {"solved": sum(held) / max(1, len(held)), "n": len(held)}})
            rows.append([steps, f"{result['nfe']:.1f}", f"{result['tokens_per_nfe']:.2f}", percent(result), result["n"],
                         *([f"{100 * results[-1]['pass_at_k']:.1f} %"] if args.samples > 1 else []),
                         *([f"{100 * sum(held) / len(held):.1f} % of {len(held)}"] if cfg.data and held else []),
                         f"{result['seconds']:.1f}"])
    except BadInput as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(table(["steps", "NFE", "tokens/NFE", "solved (95 % interval)", "n", *([f"pass@{args.samples}"] if args.samples > 1 else []),
                 *(["solved, class never trained on"] if cfg.data and held else []), "seconds"], rows))
    if args.out:
        write_json(Path(args.out), {"settings": dataclasses.asdict(cfg), "results": results})
    if len(results) > 1:
        picture = Path(args.out or f"frontier-{task}").with_suffix(".png")
        plot_frontier(picture, {path.parent.name if path.name == "model" else path.name: results}, task)
        print(f"frontier: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
