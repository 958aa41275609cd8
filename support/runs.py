"""The folder of a run: settings, log, checkpoints, results; stopping and resuming to the bit."""
import contextlib
import dataclasses
import fcntl
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from rewards import TASKS, BadInput, prompt_for
from support.cost import peak_memory_mb
from support.figures import plot_curves, plot_frontier
from support.files import need, read_json, refusing, write_atomically, write_json
from support.log import append_log, read_log, tracker, write_log
from support.processes import anyone, once, processes, say
from support.rules import read_weights
from support.verdict import AFTER, verdict

def read_results(path: Path) -> list[dict]:
    """Evaluations that a run kept. Raises BadInput."""
    kinds = {"ci95": list, "completions": list, **dict.fromkeys(("steps", "n"), int),
             **dict.fromkeys(("solved", "nfe", "seconds"), float)}
    results = read_json(path, list)
    need(results and all(isinstance(result, dict) and all(
        isinstance(result.get(k), kind) for k, kind in kinds.items()) for result in results),
        f"cannot read {path}: it holds no evaluations")
    return results

def read_settings(path: Path, settings: type):
    """The settings that a run kept. Raises BadInput."""
    kinds = {field.name: field.type for field in dataclasses.fields(settings)}
    known = {k: v for k, v in read_json(path).items() if k in kinds}
    need(isinstance(known.get("task"), str) and all(type(v) is kinds[k] for k, v in known.items()),
         f"{path} is not the configuration of a run")
    need(known["task"] in TASKS, f"{path}: no task is called {known['task']!r} here; a task of "
         "your own resumes with the file that defines it")
    return settings(**known)

def kept(cfg):
    """The settings that cfg's folder holds, where it does: with the sizes that memory decided."""
    with contextlib.suppress(BadInput):                        # broken, or not there
        return read_settings(Path("runs") / cfg.name / "config.json", type(cfg))
    return cfg

def check(folder: Path, settings: dict, may_change: tuple, resume: bool, overwrite: bool):
    """Raises BadInput if the folder holds something already, or, to be resumed, no run or one of
    other settings."""
    need(folder.parent.is_dir() or not folder.parent.exists(), f"{folder.parent} is not a folder")
    need(not (resume and overwrite), "--resume and --overwrite contradict each other")
    is_run = (folder / "config.json").is_file() and not folder.is_symlink()
    need(is_run or not resume, f"--resume: no run in {folder}")
    free = not os.path.lexists(folder) or folder.is_dir() and all(
        p.name.endswith(".partial") for p in folder.iterdir())     # a kill at birth leaves that
    need(free or resume or overwrite and is_run,
         f"{folder} holds a run already: --resume continues it, --overwrite replaces it, --name "
         "NAME starts another" if is_run else
         f"{folder} exists and is not a run folder: --name NAME starts elsewhere")
    if not resume:
        return
    saved = read_json(folder / "config.json")
    if other := [k for k, v in settings.items() if k not in may_change and saved.get(k, v) != v]:
        was, now = (", ".join(f"{k}={of.get(k)!r}" for k in other) for of in (saved, settings))
        raise BadInput(f"{folder} was run with {was}, not {now}: give the same, or --name NAME")
    done = 0
    with contextlib.suppress(Exception):                       # none yet, or told when it is loaded
        done = int(torch.load(folder / "checkpoint.pt", mmap=True, map_location="cpu",
                              weights_only=True)["step"])
    need(done <= settings["max_steps"], f"--max-steps {settings['max_steps']}: {folder} has done "
         f"{done} already, --name NAME starts another run")

@contextlib.contextmanager
def begun(folder: Path, settings: dict, overwrite: bool):
    """Within `with`, the run's folder belongs to this process; with its settings, and empty if it
    is to be overwritten. Raises BadInput."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)   # let go when the process ends
        except OSError:
            os.close(lock)
            raise BadInput(f"another process is writing {folder}") from None
        for path in folder.iterdir() if overwrite else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(folder / "config.json", settings)
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        os.close(lock)

# ------------------------------------------------------------------------------------ checkpoints
def trained_weights(model) -> dict:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}

def save_checkpoint(path: Path, model, optimizer, **rest):
    """The trained weights, the optimizer's state and the rest, whole or not at all."""
    weights = {name: p.detach() for name, p in trained_weights(model).items()}
    state = {"model": weights, "optimizer": optimizer.state_dict(), **rest}
    write_atomically(path, lambda f: torch.save(state, f))

def load_checkpoint(path: Path, model, optimizer) -> dict:
    """Puts a checkpoint's weights into model and optimizer; returns its step, seconds and state.
    Raises BadInput."""
    with refusing(f"{path} cannot be read"):
        try:
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError("it is no checkpoint, or not whole") from None
        weights = trained_weights(model)
        if saved["model"].keys() != weights.keys():
            raise ValueError("it holds other weights")
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(saved["model"][name])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds = saved["step"], {k: float(v) for k, v in saved["seconds"].items()}
        if type(step) is not int or step < 0:
            raise ValueError(f"it is of step {step!r}")
        return {"step": step, "seconds": seconds, "state": dict(saved.get("state", {}))}

# --------------------------------------------------------------------------------- a training run
@contextlib.contextmanager
def stop_requests():
    """Within `with`, the first Ctrl-C or SIGTERM lets the current step finish and be saved; a
    second one ends at once. Yields the list of those that came."""
    came = []

    def ask(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

GIVE_UP = 3                            # steps in a row whose loss or gradient is not finite

@dataclasses.dataclass
class Run:
    """What agrpo.train asks of a run: settings, model, data, the steps left to do, and a place for
    what each of them returns: log, checkpoints, held-out curve."""
    cfg: object
    folder: Path
    policy: torch.nn.Module
    examples: list
    sample: Callable                   # as agrpo.sample_step takes it
    cut: list                          # of each rollout the share without an end, by sample
    state: dict                        # what method keeps from step to step
    method: tuple                      # the row of METHODS
    evaluate: Callable                 # () -> a result with solved and seconds
    seconds: dict = dataclasses.field(default_factory=lambda: dict.fromkeys(
        ("base_model", "rollout", "update", "eval"), 0.0))
    base: list = ()                    # results of the evaluation before training
    stopped: bool = False
    skipped: int = 0                   # steps in a row

    def steps(self, optimizer):
        """The steps from the folder's checkpoint on, to max_steps, to the end of --hours or until a
        stop is asked for."""
        start, self.last, self.optimizer = 0, self.cfg.max_steps, optimizer
        self.first = processes()[0] == 0
        log, self.checkpoint = self.folder / "log.csv", self.folder / "checkpoint.pt"
        if self.checkpoint.is_file():
            saved = load_checkpoint(self.checkpoint, self.policy, optimizer)
            start = saved["step"]
            self.seconds.update(saved["seconds"])
            self.state.update(saved["state"])
            self.last = once(self.within_hours, start)
            if start >= self.last:
                end = "max-steps" if start == self.cfg.max_steps else f"hours {self.cfg.hours:g}"
                say(f"nothing is left to do after step {start - 1}: a larger --{end} goes on")
        once(lambda: write_log(log, read_log(log, before_step=start)))
        with (tracker(self.cfg, self.folder) as self.track, stop_requests() as self.stops,
              tqdm(desc="agrpo", unit="step", initial=start, total=max(start, self.last),
                   disable=None if self.first else True) as self.progress):
            step = start
            while step < self.last and not self.stopped:
                yield step
                step += 1
        self.stopped = self.stopped and step < self.last

    def within_hours(self, done: int) -> int:
        """The last step: as many as --hours allow at the pace of those done, the evaluations to
        come included. The time before the first evaluation does not count."""
        cfg, spent = self.cfg, sum(self.seconds[part] for part in ("rollout", "update", "eval"))
        if not cfg.hours or not done:
            return cfg.max_steps
        self.base = self.base or read_results(self.folder / "eval_base.json")
        point = self.base[0]["seconds"] / 2 / cfg.eval_every if cfg.eval_every else 0.0
        left = 3600 * cfg.hours - 2 * sum(r["seconds"] for r in self.base) - spent
        each = (self.seconds["rollout"] + self.seconds["update"]) / done + point
        return min(cfg.max_steps, done + max(0, int(left / max(each, 1e-9))))

    def keep(self, row: dict):
        """The row goes to the log, then the weights: a run killed in between repeats the step."""
        cfg, done = self.cfg, row["step"] + 1
        for part in ("rollout", "update"):
            self.seconds[part] += row[f"{part}_seconds"]
        if cfg.eval_every and done % cfg.eval_every == 0:
            result = self.evaluate()
            row["heldout"] = result["solved"]
            self.seconds["eval"] += result["seconds"]
        row["peak_memory_mb"] = peak_memory_mb()
        self.stopped, bad = anyone(bool(self.stops)), row["skipped"]
        self.skipped = bad * (self.skipped + 1)
        self.last = once(self.within_hours, done)
        save = done % cfg.save_every == 0 or self.stopped or done >= self.last
        if self.first:
            append_log(self.folder / "log.csv", row)
        if self.first and save:
            save_checkpoint(self.checkpoint, self.policy, self.optimizer, step=done,
                            seconds=self.seconds, state=self.state)
        self.track(row)
        if self.skipped == GIVE_UP:
            raise FloatingPointError(
                f"step {row['step']}: loss or gradient was not finite {GIVE_UP} times in a row; no "
                "such step changed the weights, the last checkpoint is intact (try a lower --lr; "
                "does a reward, advantage or time-step rule of your own return NaN?)")
        self.progress.total = self.last
        self.progress.update()
        shown = ("loss", "reward", "solved", "heldout", "ratio", "grad_norm", "entropy", "nfe")
        shown = {k: f"{row[k]:.3g}" for k in shown if k in row}
        self.progress.set_postfix(shown)
        if self.first and self.progress.disable:               # a file, not a terminal
            print(f"step {row['step']}:", *(f"{k} {v}" for k, v in shown.items()), flush=True)
        if self.first and done == AFTER and "reward" in row and not cfg.curriculum:
            self.progress.write(verdict(read_log(self.folder / "log.csv"), self.cut), end="")

def opening(cfg, policy, examples: int, heldout: int, folder: Path) -> str:
    """What is printed when a run begins."""
    size, trained = (sum(p.numel() for p in some) / 1e6
                     for some in (policy.parameters(), trained_weights(policy).values()))
    part = f", {trained:.2f} M of them trained" if trained < size else ""
    most = sum(max(0, w) for w in read_weights(cfg.task, cfg.reward_weights).values())
    return (f"{cfg.model} model of {size:.2f} M parameters{part}; {cfg.task}: {examples} "
            f"{'answers to learn' if cfg.sft else 'examples'}, {heldout} held out; {folder} "
            "(log.csv: a row a step)" + ("" if cfg.sft else
            f"\na step: {cfg.prompts} x {cfg.completions} completions, sampled; the parts of the "
            f"reward weigh {most:g} in all" + "; heldout: greedy, on half of those held out" * bool(
                cfg.eval_every)))

# ---------------------------------------------------------------------------------------- results
def percent(result: dict) -> str:
    """'34.0 % (29.9 to 38.2)'"""
    low, high = result["ci95"]
    return f"{100 * result['solved']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

def table(rows: list[dict]) -> str:
    """A plain table, columns as wide as their widest cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
                     for row in cells)

def learner(cfg) -> str:
    """What the curve asks about."""
    if cfg.sft:
        return "fine-tuning"
    if cfg.controller != "off" and cfg.controller_training == "alone":
        return "the controller"
    return "AGRPO" if cfg.method == "agrpo" else cfg.method

def report(folder: Path, cfg, heldout: list, base: list, trained: list, seconds: dict, made: dict):
    """What a finished run leaves: samples.txt, curve.png, frontier.png, summary.json, the table on
    the screen. base, trained: results of eval.evaluate, one per number of steps, headline first."""
    samples = [f"{cfg.task}, greedy, {base[0]['steps']} denoising steps; + marks a solved one\n"]
    for ex, *pair in list(zip(heldout, base[0]["completions"], trained[0]["completions"]))[:20]:
        before, after = (f"{'+' if TASKS[cfg.task].grade(c, ex) == 1 else ' '} {c}" for c in pair)
        prompt = "".join(prompt_for(cfg.task, ex, cfg.prompt, cfg.system_prompt))
        samples.append(f"prompt    {prompt}\n  right     {TASKS[cfg.task].gold(ex)}\n"
                       f"  base    {before}\n  trained {after}\n")
    write_atomically(folder / "samples.txt", lambda f: f.write("\n".join(samples).encode()))
    rows = read_log(folder / "log.csv")
    if rows:
        plot_curves(folder / "curve.png", [(rows, base[0], trained[0])], cfg.task, learner(cfg))
    plot_frontier(folder / "frontier.png", {"base": base, "trained": trained}, cfg.task)
    before, after = ({k: r[0][k] for k in ("solved", "n", "ci95")} for r in (base, trained))
    seconds = {k: round(v, 1) for k, v in {**seconds, "total": sum(seconds.values())}.items()}
    write_json(folder / "summary.json", {
        "task": cfg.task, "model": cfg.model, "method": "sft" if cfg.sft else cfg.method,
        "seed": cfg.seed, "base": before, "trained": after,
        "by_steps": [{"steps": b["steps"], "nfe": t["nfe"], "base": b["solved"],
                      "trained": t["solved"], "base_nfe": b["nfe"]} for b, t in zip(base, trained)],
        "seconds": seconds, "peak_memory_mb": peak_memory_mb(), "made": made})
    print(f"\n{cfg.task}, {base[0]['n']} held-out examples, greedy: solved (95 % interval)")
    lines = []
    for b, t in zip(base, trained):
        was = f"{b['nfe']:.1f} -> " if abs(b["nfe"] - t["nfe"]) > 0.05 else ""
        lines.append({"steps": b["steps"], "NFE": f"{was}{t['nfe']:.1f}", "base": percent(b),
                      "trained": percent(t)})
    print(table(lines))
    print(f"{len(rows)} training step{'s' * (len(rows) != 1)}, {seconds['total']:.0f} s in all. "
          f"Look at {folder}/{'curve' if rows else 'frontier'}.png and {folder}/samples.txt")
