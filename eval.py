"""Evaluation: solved share with its interval, pass@k, majority vote, accuracy against calls.

    python eval.py --model tiny --task sudoku                      the tiny base model
    python eval.py --model runs/sudoku-agrpo-seed0 --steps 16,8,4 --data puzzles.csv
    python eval.py --regrade FILE.jsonl                            grade saved completions again

Every completion is written to a file as soon as it is graded; the same command continues where it
was stopped. agrpo.py evaluates before and after training by the same functions: prompt and grader
are those of training, decoding is greedy. The second half is what happens around its loop.
"""
import contextlib
import dataclasses
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import agrpo
from methods import curriculum, scored, sft
from methods.models import (OWNERS, Settings, check, check_prompts, choices, generate, lengths,
                            method_of, open_policy, sampler, settle)
from rewards import TASKS, BadInput, try_task
from support import checkpoints, cost, files, options, processes, rules, runs, saving
from support.completions import (grade_row, locked_completions, more_columns, open_completions,
                                 regrade, shares)
from support.data import held_out, load_examples, load_split
from support.figures import plot_frontier
from support.files import need
from support.presets import MODELS
from support.processes import once, say
from support.runs import percent, table

def evaluate(complete, task: str, examples: list, batch: int = 256, samples: int = 1, done=None,
             save=None) -> dict:
    """Complete and grade every example `samples` times. complete(examples, keys) -> texts, denoiser
    calls, tokens; keys are (index, sample). done: the rows that there are already, by key;
    save(rows) takes the new ones, batch after batch. Returns what `summary` does."""
    keys, rows = [(i, s) for i in range(len(examples)) for s in range(samples)], dict(done or {})
    for start in tqdm(range(0, len(keys), batch), desc="evaluate", unit="batch", leave=False,
                      disable=None if save else True):
        part = keys[start:start + batch]                       # a stopped one is done again whole
        if rows.keys() >= set(part):
            continue
        clock, chunk, new = time.perf_counter(), [examples[i] for i, _ in part], {}
        texts, *counts = complete(chunk, part)
        with ThreadPoolExecutor(os.cpu_count()) as pool:       # tests of programs run elsewhere
            graded = list(pool.map(lambda text, ex: grade_row(task, text, ex), texts, chunk))
        for key, row, nfe, n in zip(part, graded, *counts):
            if key not in rows:
                new[key] = {"index": key[0], "sample": key[1], **row, "nfe": nfe, "tokens": n}
        each = (time.perf_counter() - clock) / len(part)
        rows |= (new := {key: {**row, "seconds": each} for key, row in new.items()})
        if save:
            save(new.values())
    return summary(task, [rows[key] for key in keys])

def summary(task: str, rows: list[dict]) -> dict:
    """What `shares` has, and nfe (denoiser calls per completion), tokens_per_nfe (before the end),
    seconds, completions, grades."""
    nfe, tokens, seconds = (sum(row[k] for row in rows) for k in ("nfe", "tokens", "seconds"))
    return {**shares(task, rows), "nfe": nfe / len(rows), "tokens_per_nfe": tokens / max(1, nfe),
            "seconds": seconds, "completions": [row["completion"] for row in rows],
            "grades": [row["grade"] for row in rows]}

def trained_on(cfg, examples: list) -> int:
    """How many examples of a file the model's own run was trained on (a fifth was held out)."""
    known = options.saved_settings(cfg.model)
    how = [known.get(k) for k in ("train_examples", "eval_examples", "seed", "data", "test_data")]
    usable = [type(x) for x in how] == [int, int, int, str, str] and Path(how[3] or "-").is_file()
    if not cfg.data or known.get("task") != cfg.task or not usable:
        return 0
    key, seen = TASKS[cfg.task].key, set()
    with contextlib.suppress(BadInput):                        # its files may have changed since
        seen = set(map(key, load_split(cfg.task, *how)[0]))
    return sum(key(ex) in seen for ex in examples)

def report_evaluation(task: str, name: str, about: dict, results: list[dict], out: Path):
    """The table on the screen; beside the completions the results (.json) and, of several, the
    frontier (.png)."""
    rows = []
    for r in results:
        row = {"length": r["length"], "steps": r["steps"], "NFE": f"{r['nfe']:.1f}", "tokens/NFE":
               f"{r['tokens_per_nfe']:.2f}", "solved (95 % interval)": percent(r), "n": r["n"]}
        row |= more_columns(task, r)
        if (held := r.get("held_out")) and held["n"]:
            row["solved, class never trained on"] = f"{100 * held['solved']:.1f} % of {held['n']}"
        rows.append({**row, "seconds": f"{r['seconds']:.1f}"})
    print(table(rows))
    kept = [{k: v for k, v in r.items() if k not in ("completions", "grades")} for r in results]
    files.write_json(out.with_suffix(".json"), {**about, "results": kept})
    said = f"every completion with its grade: {out}"
    if len(results) > 1:
        curves = {}
        for r in results:
            curves.setdefault(f"{name}, {r['length']} tokens", []).append(r)
        curves = {name: results} if len(curves) == 1 else curves
        plot_frontier(out.with_suffix(".png"), curves, task)
        said += f"; frontier: {out.with_suffix('.png')}"
    print(said)

# ------------------------------------------------------------------------- python eval.py
SAMPLING = ("task", "model", "data", "prompt", "system_prompt", "seed", "device", "block_length",
            "unmasking", "cache", "temperature", "top_k", "top_p", "order_score", "tau_pos",
            "threshold", "entropy_bound", "controller", "model_block", "quantize", "template_args")

@dataclasses.dataclass(frozen=True)
class Flags:
    """Of eval.py alone."""
    steps: str = ""                    # denoising steps, comma separated; several: the frontier
    lengths: str = ""                  # completion lengths, comma separated
    samples: int = 1                   # k completions per example: pass@k, vote; a temperature
    limit: int = 0                     # examples; 0: 512 generated ones, or all there are
    batch: int = 64                    # completions denoised at once; fewer need less memory
    out: str = ""                      # the completions' .jsonl; .json and .png beside it
    regrade: str = ""                  # grade the completions of this file again, and stop
    overwrite: bool = False            # start over: replace what the output file holds
    skip_bad_examples: bool = False    # leave out those whose own answer is graded wrong

def settings_of(given: dict, flags) -> tuple:
    """The command line -> settings of the sampler, the (length, steps) to evaluate. Raises
    BadInput before any work."""
    cfg = settle(given, {"temperature"})
    path, task = checkpoints.in_run(Path(cfg.model)), cfg.task
    known = options.saved_settings(str(path))
    had = str(known.get("controller", "off"))
    controller = given.get("controller", had)
    need(controller in ("off", had),
         f"--controller {controller}: {path} has {'none' if had == 'off' else had}, leave it out")
    if controller != "off" and (idle := {"unmasking", "threshold", "entropy_bound"} & given.keys()):
        raise BadInput(f"{options.flag(sorted(idle)[0])}: the controller of {path}, {controller}, "
                       "sets it; --controller off leaves it aside")
    given = {**given, "task": task, "model": str(path), "controller": controller}
    whole = {"eval_length": 0, "eval_block_length": 0}         # they are the shape itself here
    cfg, fixed = settle(given, {"temperature"}), given
    shape = {"completion_length": known.get("eval_length") or known.get("completion_length"),
             "block_length": known.get("eval_block_length") or known.get("block_length"),
             "eval_steps": known.get("eval_steps")}
    if known.get("task") == task and [type(x) for x in shape.values()] == [int, int, str]:
        fixed = {**shape, **whole, **given}                    # as it was evaluated in training
    cfg = options.with_model(dataclasses.replace(cfg, **fixed, rollout_batch=flags.batch), fixed)
    cfg = dataclasses.replace(options.for_evaluation(cfg), **given, **whole)
    need(0 < flags.samples < 10**6 and 0 <= flags.limit <= 10**5 and flags.batch > 0,
         "--samples and --batch must be at least 1, --limit 0 to 100000")
    need(flags.samples == 1 or cfg.temperature > 0 or cfg.unmasking not in rules.NOT_RANDOM,
         f"--samples {flags.samples} of a greedy sampler are all the same: give a --temperature")
    all_lengths = options.numbers(flags.lengths or str(cfg.completion_length), "--lengths")
    all_steps = options.numbers(flags.steps or cfg.eval_steps, "--steps")
    shapes = [(length, steps) for length in all_lengths for steps in all_steps]
    for length, steps in shapes:
        at = dataclasses.replace(cfg, completion_length=length, eval_steps=str(steps))
        rules.validate(at, choices(), False, {}, given, training=False)
    return cfg, shapes

def run(given: dict, flags) -> int:
    """Complete, grade, save, print: everything that `python eval.py` does with a model."""
    need(os.environ.get("WORLD_SIZE", "1") == "1", "an evaluation is one process: without torchrun")
    cfg, shapes = settings_of(given, flags)
    usual = {"controller": "off", "cache": "none", "template_args": ""}
    settings = {k: getattr(cfg, k) for k in SAMPLING if getattr(cfg, k) != usual.get(k)}
    if flags.out:                                              # before a model is opened or trained
        open_completions(Path(flags.out), settings, flags.overwrite)
    n = flags.limit or (512 if TASKS[cfg.task].generate and not cfg.data else 0)
    examples = load_examples(cfg.task, n, 0, "test", cfg.data, flags.skip_bad_examples)
    try_task(cfg.task, examples[0])
    known = options.saved_settings(cfg.model)
    if known.get("task", cfg.task) != cfg.task:
        say(f"note: {cfg.model} has learned {known['task']}, not {cfg.task}")
    elif known.get("test_data") and not cfg.data:
        say(f"note: in training --test-data {known['test_data']} was held out; --data FILE tells "
            "what to evaluate on")
    if seen := trained_on(cfg, examples):
        say(f"note: the model was trained on {seen} of these {len(examples)} examples")
    check_prompts(dataclasses.replace(cfg, completion_length=max(shapes)[0]), examples)
    policy, tokenizer = open_policy(cfg)
    settings["weights"], made = saving.fingerprint(policy), files.provenance(policy)
    name = Path(cfg.model.removesuffix("/model")).name
    out = Path(flags.out or f"runs/eval-{cfg.task}-{name}-{files.digest(settings)}.jsonl")
    results = []
    with locked_completions(out, settings, flags.overwrite, made) as (stored, f):
        stored = [row for row in stored if row["index"] < len(examples)]
        need(all(row["example"] == examples[row["index"]] for row in stored),
             f"{out} holds completions of other examples: --overwrite replaces them, --out "
             "FILE.jsonl goes elsewhere")
        for length, steps in shapes:
            at = dataclasses.replace(cfg, completion_length=length, steps=steps)
            shape = {"length": length, "steps": steps}

            def complete(exs, keys, at=at):
                return completed(policy, tokenizer, exs, [("eval", cfg.seed, *k) for k in keys], at)

            def save(rows, shape=shape):
                f.writelines(json.dumps({**shape, **row, "example": examples[row["index"]]}) + "\n"
                             for row in rows)
                f.flush()
            done = {(row["index"], row["sample"]): {
                **row, **grade_row(cfg.task, row["completion"], row["example"])}
                for row in stored if shape.items() <= row.items()}     # graded again
            results.append({**shape, **evaluate(complete, cfg.task, examples, flags.batch,
                                                flags.samples, done, save)})
            if cfg.data and TASKS[cfg.task].generate:          # it may have been made for training
                held, k = [held_out(cfg.task, ex) for ex in examples], flags.samples
                right = sum(grade == 1 and held[i // k]
                            for i, grade in enumerate(results[-1]["grades"]))
                results[-1]["held_out"] = {"solved": right / max(1, sum(held) * k), "n": sum(held)}
    report_evaluation(cfg.task, name, {"settings": settings, "made": made}, results, out)
    return 0

def completed(policy, tokenizer, examples: list, keys: list, cfg) -> tuple[list, list, list]:
    """Texts, denoiser calls and tokens of a completion for each example."""
    traj, texts = generate(policy, tokenizer, examples, keys, cfg)
    return texts, traj.nfe.tolist(), lengths(traj, policy).tolist()

def names(*tables) -> str:
    """What --task, --model, --unmasking and these may be, for --help."""
    all_rows = {"task": TASKS, "model": MODELS, **choices()}
    return "".join(f"\n{options.flag(knob)}: {', '.join(rows)}" for knob, rows in all_rows.items()
                   if knob in ("task", "model", "unmasking", *tables))

def main(argv=None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    try:
        sampling = options.subset(list(OWNERS.values()), SAMPLING, options.GREEDY)
        argv, text = sys.argv[1:] if argv is None else argv, __doc__.partition("\n\nEvery")[0]
        given = options.read_flags(
            "eval.py", text + names(), {"evaluation": Flags, "sampling": sampling}, argv)
        flags = Flags(**{k: given.pop(k) for k in [*given] if k not in SAMPLING})
        if flags.regrade:
            need(given.keys() <= {"task"} and flags.steps == flags.lengths == "",
                 "--regrade goes with --task, --out and --overwrite alone: it uses no model")
            return regrade(Path(flags.regrade), given.get("task", ""), flags.out, flags.overwrite)
        return run(given, flags)
    except (BadInput, OSError, FloatingPointError) as error:
        print("eval:", *str(error).splitlines(), file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130

# ----------------------------------------------------------- python agrpo.py, around its loop
def evaluate_at(policy, tokenizer, cfg, examples: list, steps: int) -> dict:
    """`evaluate` with the sampler that models are evaluated with, at so many denoising steps."""
    at = dataclasses.replace(options.for_evaluation(cfg), steps=steps)
    batch = cfg.rollout_batch * agrpo.processes()[1]
    return {"steps": steps, **evaluate(lambda exs, keys: completed(
        policy, tokenizer, exs, keys, at), cfg.task, examples, batch)}

def parse(argv: list[str]) -> tuple:
    """agrpo.py's command line -> settings, and what else is to be done. Raises BadInput."""
    short, asked = {"-h", "--help"} & set(argv), {word.removeprefix("--") for word in argv}
    owners = {name.replace("-", "_"): owner for i, (name, owner) in enumerate(OWNERS.items())
              if i < 4 or not short or name in asked}
    text = agrpo.__doc__.partition("\n\n")[0] + names(*choices()) + (
        "\n\nDefaults are those of the --task, --model, --method, --preset and --sft given.")
    known = {word[2:]: value for word, value in zip(argv, argv[1:])
             if word in ("--task", "--model", "--method", "--preset", "--sft")}
    given = curriculum.with_length(options.read_flags(
        "agrpo.py", text, owners, argv, lambda: settle(known)))
    actions = {f.name: given.pop(f.name, None) for f in dataclasses.fields(options.Actions)}
    cfg = settle(given)
    cfg = dataclasses.replace(cfg, name=cfg.name or options.default_name(cfg))
    saved = Path("runs") / cfg.name / "config.json"
    if actions["resume"] and saved.is_file():                  # its settings, then the flags given
        kept = runs.read_settings(saved, Settings)
        cfg = dataclasses.replace(kept, **{**given, "name": cfg.name})
        options.need_gpu(cfg := options.hours_or_steps(cfg, given))
    elif actions["merge"] is None:
        cfg = options.with_model(cfg, given)
    return check(cfg, given), actions

def forecast(cfg, folder: Path, examples: list, heldout: list, overwrite: bool) -> tuple:
    """The checks that need the checkpoint's small files; then what the run will cost, printed.
    Returns the rows to train on, and the settings with those decided that memory decides."""
    about, tokenizer, length = check_prompts(cfg, examples + heldout)
    if cfg.model not in options.TINY:
        used = (about.folder, about.adapter or about.folder)
        within = any(folder.resolve() in place.resolve().parents for place in used)
        need(not (overwrite and within), f"--overwrite would delete {cfg.model}, the model to "
             "begin with: --name NAME starts another run")
        device = options.device_for(cfg)
        cfg = cost.fitted(about.config, cfg, length[0], device)
        print(cost.announce(about.config, cfg, length, device, agrpo.processes()[1]), flush=True)
    if cfg.sft:
        context = about.config.max_position_embeddings
        examples = sft.sft_examples(tokenizer, cfg, examples, context, about.mask_id)
    return examples, cfg

def run_training(cfg, loop, actions: dict) -> int:
    """What to train on, the model, the run's folder; then `learn`. Returns the exit code."""
    folder, clock, overwrite = Path("runs") / cfg.name, time.perf_counter(), actions["overwrite"]
    examples, heldout = load_split(cfg.task, cfg.train_examples, cfg.eval_examples, cfg.seed,
                                   cfg.data, cfg.test_data, cfg.skip_bad_examples)
    settings = {**dataclasses.asdict(cfg), "examples": files.digest(examples + heldout)}
    once(runs.check, folder, settings, options.MAY_CHANGE, actions["resume"], overwrite)
    examples, cfg = once(forecast, cfg, folder, examples, heldout, overwrite)
    policy, tokenizer = open_policy(cfg, True, actions["rebuild_base"])
    with contextlib.ExitStack() as stack:                      # the model is there: now the folder
        settings |= dataclasses.asdict(cfg)
        once(lambda: stack.enter_context(runs.begun(folder, settings, overwrite)))
        return learn(cfg, loop, folder, policy, tokenizer, examples, heldout, clock)

def learn(cfg, loop, folder: Path, policy, tokenizer, examples, heldout, clock) -> int:
    """In the run's folder: evaluation, the loop, evaluation, table. Returns the exit code."""
    steps, half = options.numbers(cfg.eval_steps, "--eval-steps"), (len(heldout) + 1) // 2
    state, cut = {}, []
    run = runs.Run(cfg, folder, policy, examples, sampler(tokenizer, cfg, cut), cut, state,
                   method_of(cfg, tokenizer, state),
                   lambda: evaluate_at(policy, tokenizer, cfg, heldout[:half], steps[0]))
    run.seconds["base_model"] = time.perf_counter() - clock
    say(runs.opening(cfg, policy, len(examples), len(heldout), folder))
    if not once((folder / "eval_base.json").is_file):              # a resumed run has it
        results = [evaluate_at(policy, tokenizer, cfg, heldout, n) for n in steps]
        once(files.write_json, folder / "eval_base.json", results)
    base = runs.read_results(folder / "eval_base.json")
    say(f"base: {percent(base[0])} of {base[0]['n']} held-out solved, greedy, {base[0]['steps']} "
        f"steps, {base[0]['nfe']:.1f} denoiser calls")
    if cfg.kl and not cfg.sft:
        scored.keep_reference(policy)
    loop(run)
    if run.stopped:
        say("stopped; the same command with --resume continues")
        return 130
    after = [evaluate_at(policy, tokenizer, cfg, heldout, n) for n in steps]
    run.seconds["eval"] += sum(r["seconds"] for r in base + after)
    extra = {"controller": policy.controller} if cfg.controller != "off" else {}
    once(saving.save_model, folder / "model", policy.model, tokenizer, dataclasses.asdict(cfg),
         policy.source, policy.base, extra)
    once(runs.report, folder, cfg, heldout, base, after, run.seconds, files.provenance(policy))
    return 0

def training(argv, loop) -> int:
    """agrpo.py's command line around its loop; returns the exit code: 0 done, 1 failed, 2 wrong
    input, 130 stopped."""
    cfg = None
    try:
        cfg, actions = parse(sys.argv[1:] if argv is None else argv)
        if (out := actions["merge"]) is not None:
            saving.merge(cfg.model, cfg.model_block, out)
            print(f"merged: {out}")
            return 0
        processes.join(cpu=options.device_for(cfg) == "cpu")
        code = run_training(cfg, loop, actions)
        processes.leave()                                      # not after an error: others may wait
        return code
    except (BadInput, FloatingPointError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("agrpo:", *str(error).splitlines(), file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except (torch.OutOfMemoryError, OSError) as error:
        why = error if isinstance(error, OSError) else cost.out_of_memory(error, runs.kept(cfg))
        print(f"agrpo: {why}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        begun = cfg and (Path("runs") / cfg.name / "config.json").is_file()
        print("interrupted; " + (
            "what was saved is intact: --resume continues" if begun else
            "nothing was begun: the same command starts again"), file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.exit(main())
