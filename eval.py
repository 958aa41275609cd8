"""Evaluation: solved share with its interval, denoiser calls, pass@k, majority vote, and the accuracy/NFE frontier.

    python eval.py --model tiny --task sudoku                      the tiny base model (trained on the first call)
    python eval.py --model runs/sudoku-agrpo-seed0 --task sudoku --steps 16,8,4 --data puzzles.csv
    python eval.py --regrade FILE.jsonl                            grade saved completions again, no model needed

Every completion is written to a file as soon as it is graded; the same command continues where it was stopped.
agrpo.py calls `evaluate` before and after training, so both use the sampler, prompt and grader of training.

What agrpo.py needs around the method is here, too: the files of a run, several processes, published checkpoints in stock classes
(FAMILIES), adapters, what a run will cost.
"""
import argparse
import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from tqdm import tqdm

from rewards import TASKS, BadInput, grade, held_out, load_examples, load_split, prompt_for, try_task


def wilson(solved: int, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share (Wilson's score interval): [low, high].

    >>> [round(x, 3) for x in wilson(50, 100)]
    [0.404, 0.596]
    """
    p, centre = solved / n, (solved + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * p * (1 - p) + z * z / 4)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def bootstrap(values: list, draws: int = 2000) -> list[float]:
    """95 % interval of a mean, its examples drawn again with replacement: [low, high].

    >>> bootstrap([0.5] * 10)
    [0.5, 0.5]
    """
    means = np.random.default_rng(0).choice(np.asarray(values, float), (draws, len(values))).mean(1)
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def grade_row(task: str, completion: str, example: dict) -> dict:
    """What is kept of a completion: itself, the answer read from it (None: there is none), its grades."""
    answer = TASKS[task].answer(completion)
    row = {"completion": completion, "answer": None if answer is None else str(answer), "grade": grade(task, completion, example)}
    return {**row, **({TASKS[task].beside[0]: TASKS[task].beside[1](completion, example)} if TASKS[task].beside else {})}


def evaluate(generate, task: str, examples: list, batch: int = 256, samples: int = 1, done: dict | None = None, save=None) -> dict:
    """Complete and grade every example `samples` times. generate(examples, keys) -> trajectory, texts; keys are (index, sample).
    `done` holds the rows that there are already, by key; save(rows, examples) takes the new ones, batch after batch.

    Returns what `summary` does. Rows are made batch by batch, so that a stopped evaluation repeats the batch it was in."""
    keys, rows, done = [(i, s) for i in range(len(examples)) for s in range(samples)], [], done or {}
    for start in tqdm(range(0, len(keys), batch), desc="evaluate", unit="batch", leave=False, disable=None if save else True):
        part = keys[start:start + batch]
        chunk = [examples[i] for i, _ in part]
        if missing := [key for key in part if key not in done]:
            clock = time.perf_counter()
            traj, texts = generate(chunk, part)
            new = [{"index": i, "sample": s, **grade_row(task, text, ex), "nfe": n, "tokens": t}
                   for (i, s), text, ex, n, t in zip(part, texts, chunk, traj.nfe.tolist(), traj.length.tolist())]
            new = [{**row, "seconds": (time.perf_counter() - clock) / len(part)} for row, key in zip(new, part) if key in missing]
            done = done | {(row["index"], row["sample"]): row for row in new}
            if save:
                save(new, [examples[row["index"]] for row in new])
        rows += [done[key] for key in part]
    return summary(task, rows)


def summary(task: str, rows: list[dict]) -> dict:
    """solved (share of grade 1) with ci95, n (completions), grade (mean), beside (mean of the task's second grade), nfe (denoiser calls
    per completion), tokens_per_nfe (tokens before the end, per call), seconds, completions and grades; of several samples (k) also
    pass_at_k (an example counts if any is right) and majority (if the most frequent answer is), with their ci95."""
    groups = {}
    for row in rows:
        groups.setdefault(row["index"], []).append(row)
    shares = [sum(r["grade"] == 1 for r in g) / len(g) for g in groups.values()]
    n, k, calls = len(rows), max(len(g) for g in groups.values()), sum(r["nfe"] for r in rows)
    solved = sum(r["grade"] == 1 for r in rows)
    result = {"solved": solved / n, "n": n, "ci95": wilson(solved, n) if k == 1 else bootstrap(shares),
              "grade": sum(r["grade"] for r in rows) / n, "nfe": calls / n, "tokens_per_nfe": sum(r["tokens"] for r in rows) / max(1, calls),
              "seconds": sum(r["seconds"] for r in rows), "completions": [r["completion"] for r in rows], "grades": [r["grade"] for r in rows]}
    if TASKS[task].beside:
        result["beside"] = sum(r[TASKS[task].beside[0]] for r in rows) / n
    if k > 1:
        any_of, voted = [share > 0 for share in shares], [vote(g) for g in groups.values()]
        result |= {"k": k, **{name: {"solved": sum(x) / len(x), "ci95": wilson(sum(x), len(x))}
                              for name, x in (("pass_at_k", any_of), ("majority", voted))}}
    return result


def vote(rows: list[dict]) -> bool:
    """Whether the answer given most often is right; of equals the one given first."""
    counts = Counter(row["answer"] for row in rows if row["answer"] is not None)
    return bool(counts) and next(row["grade"] == 1 for row in rows if row["answer"] == counts.most_common(1)[0][0])


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
    """What went wrong in one line (and the next, where the first announces it); the kind of error if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2 if lines[0].endswith(":") else 1])


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
    """Indented, whole or not at all."""
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
    done = steps_done(folder / "checkpoint.pt") if resume else 0
    if done > settings["max_steps"]:
        raise BadInput(f"--max-steps {settings['max_steps']}: {folder} has done {done} already, --name NAME starts another run")


def steps_done(checkpoint: Path) -> int:
    """Of a run, by its checkpoint; 0 without one, or where it cannot be read, which load_checkpoint tells."""
    import torch
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:                                                                # many kinds
        return 0


def begin(folder: Path, settings: dict, overwrite: bool):
    """The run's folder with its settings, empty if it is to be overwritten. Raises BadInput."""
    try:
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", settings)
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.strerror}") from None


def whole(value):
    """Sharded tensors put together, in nested dicts, in main memory of the first process (None elsewhere). All must call it."""
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    if not hasattr(value, "full_tensor"):
        return value
    value = value.full_tensor()
    return value.cpu() if processes()[0] == 0 else None


def trained_weights(model) -> dict:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copied(value):
    """A copy in main memory of the tensors in nested dicts and lists."""
    if isinstance(value, (dict, list)):
        return {k: copied(v) for k, v in value.items()} if isinstance(value, dict) else list(map(copied, value))
    return value.detach().to("cpu", copy=True) if hasattr(value, "detach") else value


class Writer:
    """Writes files while the training goes on, one after the other; within `with`, at whose end all are written."""

    def __enter__(self):
        self.pool, self.last = ThreadPoolExecutor(1), None
        return self

    def wait(self):
        """Until nothing is being written. Raises what went wrong."""
        last, self.last = self.last, None
        if last:
            last.result()

    def submit(self, work: Callable):
        self.wait()
        self.last = self.pool.submit(work)

    def __exit__(self, kind, error, trace):
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            print(f"the last checkpoint was not written: {first_line(failed)}", file=sys.stderr)     # what ended the run is told by others
        finally:
            self.pool.shutdown()


def save_checkpoint(path: Path, model, optimizer, writer: Writer, write: bool = True, **rest):
    """The trained weights, the optimizer's state and the rest, atomically, while training goes on. With several processes all take part,
    one writes."""
    import torch
    state = {"model": whole({k: p.data for k, p in trained_weights(model).items()}), "optimizer": whole(optimizer.state_dict()), **rest}
    if write:
        state = copied(state)
        writer.submit(lambda: write_atomically(path, lambda f: torch.save(state, f)))


def load_checkpoint(path: Path, model, optimizer) -> dict:
    """Puts a checkpoint's weights into model and optimizer, returns the step and seconds it was saved at; raises BadInput."""
    import torch

    def like(value, parameter):                                                      # a shard of what was saved whole
        if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
            return value
        return torch.distributed.tensor.distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    try:
        saved, weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True), trained_weights(model)
        if saved["model"].keys() != weights.keys():
            raise ValueError("it holds other weights")
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(like(saved["model"][name], parameter))
        for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
            for k, value in saved["optimizer"]["state"].get(i, {}).items():
                saved["optimizer"]["state"][i][k] = like(value, parameter)
        optimizer.load_state_dict(saved["optimizer"])
        return {"step": saved["step"], "seconds": saved["seconds"]}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                                                       # torch raises many kinds, and advice that is not for here
        why = first_line(error)
        raise BadInput(f"{path} cannot be read: {'it is no checkpoint, or not whole' if 'weights_only' in why else why}") from None


def read_log(path: Path, before_step: float = math.inf) -> list[dict]:
    """The whole rows of log.csv before a step: what was logged after the checkpoint, or half written, is done again."""
    if not path.is_file():
        return []
    with open(path, newline="", errors="replace") as f:
        try:
            return [row for row in csv.DictReader(f) if None not in row.values() and row.get("step", "").isdecimal()
                    and int(row["step"]) < before_step]
        except csv.Error as error:
            raise BadInput(f"{path}: {error}") from None


def write_log(path: Path, rows: list[dict]):
    """All rows of a log.csv, whole or not at all."""
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)] if rows else []
    write_atomically(path, lambda f: f.write("".join(line + "\n" for line in lines).encode()))


def append_log(path: Path, row: dict):
    """One row more; the first brings the header."""
    with open(path, "a") as f:
        f.write(("" if f.tell() else ",".join(row) + "\n") + ",".join(map(str, row.values())) + "\n")


def report(folder: Path, cfg, heldout: list, base: list, trained: list, seconds: dict):
    """What a finished run leaves: samples.txt, curve.png, frontier.png, summary.json, and the table on the screen.
    base, trained: results of `evaluate`, one per number of steps, the headline first."""
    samples = [f"{cfg.task}, greedy, {base[0]['steps']} denoising steps; + marks a solved one\n"]
    for ex, *pair in list(zip(heldout, base[0]["completions"], trained[0]["completions"]))[:20]:
        before, after = (f"{'+' if TASKS[cfg.task].grade(c, ex) == 1 else ' '} {c}" for c in pair)
        samples.append(f"prompt    {''.join(prompt_for(cfg.task, ex, cfg.prompt, cfg.system_prompt))}\n  base    {before}\n  trained {after}\n")
    write_atomically(folder / "samples.txt", lambda f: f.write("\n".join(samples).encode()))
    rows = read_log(folder / "log.csv")
    if rows:
        plot_curves(folder / "curve.png", [(rows, base[0], trained[0])], cfg.task, "fine-tuning" if cfg.sft else
                    "the controller" if cfg.controller != "off" and cfg.controller_training == "alone" else {"agrpo": "AGRPO"}.get(cfg.method, cfg.method))
    plot_frontier(folder / "frontier.png", {"base": base, "trained": trained}, cfg.task)
    short = [{k: r[0][k] for k in ("solved", "n", "ci95")} for r in (base, trained)]
    by_steps = [{"steps": b["steps"], "nfe": t["nfe"], "base": b["solved"], "trained": t["solved"], "base_nfe": b["nfe"]} for b, t in zip(base, trained)]
    seconds = {k: round(v, 1) for k, v in {**seconds, "total": sum(seconds.values())}.items()}
    write_json(folder / "summary.json", {
        "task": cfg.task, "model": cfg.model, "method": "sft" if cfg.sft else cfg.method, "seed": cfg.seed, "base": short[0], "trained": short[1],
        "by_steps": by_steps, "seconds": seconds, "peak_memory_mb": peak_memory_mb()})
    print(f"\n{cfg.task}, {base[0]['n']} held-out examples, greedy: solved (95 % interval)")
    lines = [[b["steps"], f"{b['nfe']:.1f} -> {t['nfe']:.1f}" if abs(b["nfe"] - t["nfe"]) > 0.05 else f"{t['nfe']:.1f}", percent(b), percent(t)]
             for b, t in zip(base, trained)]
    print(table(["steps", "NFE", "base", "trained"], lines))
    print(f"{len(rows)} training step{'s' * (len(rows) != 1)}, {seconds['total']:.0f} s in all. Look at {folder}/{'curve' if rows else 'frontier'}.png and "
          f"{folder}/samples.txt")


# -------------------------------------------------------------------------------------------------- several processes
def processes() -> tuple[int, int]:
    """This process's rank, and how many there are; accelerate launch and torchrun start several."""
    import torch.distributed as dist
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def everyones(objects: list) -> list:
    """The lists of all processes, one after the other."""
    if processes()[1] == 1:
        return objects
    from accelerate.utils import gather_object
    return gather_object(objects)


def anyone(wants: bool) -> bool:
    """Whether any process does. All must ask."""
    return any(everyones([wants]))


def once(work: Callable, *args):
    """work(*args) on the first process only; what it returns or raises is every process's."""
    result = [None, None]
    if processes()[0] == 0:
        try:
            result[0] = work(*args)
        except Exception as error:                                                   # else the others would wait for ever
            result[1] = error
    if processes()[1] > 1:
        import torch
        torch.distributed.broadcast_object_list(result)
    if result[1]:
        raise result[1]
    return result[0]


def say(*words):
    """print, once for all processes."""
    if processes()[0] == 0:
        print(*words, flush=True)


# ------------------------------------------------------------------------- models: published checkpoints in stock classes
class Family(NamedTuple):
    """How the checkpoints of one model_type become a stock class of transformers."""
    stock: str                         # Llama: LlamaForCausalLM, LlamaConfig
    fields: dict                       # field of the stock config -> its names in config.json, the first that is there
    fixed: dict                        # what config.json must say, where it says anything but null
    keys: dict = {}                    # names of weights: regular expression as published -> stock
    shift: bool = False                # the logits of position j stand at j - 1
    blocks: bool = False               # attention is block-causal: a token sees its own block and those before


LLADA_FIELDS = {"vocab_size": ("embedding_size", "vocab_size"), "hidden_size": ("d_model",), "intermediate_size": ("mlp_hidden_size",),
                "num_hidden_layers": ("n_layers",), "num_attention_heads": ("n_heads",), "num_key_value_heads": ("n_kv_heads", "n_heads"),
                "rms_norm_eps": ("rms_norm_eps",), "rope_theta": ("rope_theta",), "max_position_embeddings": ("max_sequence_length",),
                "tie_word_embeddings": ("weight_tying",)}
LLADA_FIXED = {"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "block_group_size": 1, **dict.fromkeys(
    ("include_bias", "include_qkv_bias", "bias_for_layer_norm", "attention_layer_norm", "scale_logits", "input_emb_norm", "alibi",
     "multi_query_attention"), False)}
LLADA_KEYS = {r"^model\.transformer\.wte\.": "model.embed_tokens.", r"^model\.transformer\.ln_f\.": "model.norm.",
              r"^model\.transformer\.ff_out\.": "lm_head.", **{
                  rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.": rf"model.layers.\1.{stock}." for theirs, stock in (
                      ("q_proj", "self_attn.q_proj"), ("k_proj", "self_attn.k_proj"), ("v_proj", "self_attn.v_proj"),
                      ("attn_out", "self_attn.o_proj"), ("ff_proj", "mlp.gate_proj"), ("up_proj", "mlp.up_proj"), ("ff_out", "mlp.down_proj"),
                      ("attn_norm", "input_layernorm"), ("ff_norm", "post_attention_layernorm"))}}
QWEN_FIELDS = {name: (name,) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                          "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings")}
QWEN_FIXED = {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False, "use_mrope": False, "attention_bias": False}
QWEN3_FIELDS = {**QWEN_FIELDS, "head_dim": ("head_dim",)}

FAMILIES = {                           # model_type of config.json
    "llada": Family("Llama", LLADA_FIELDS, LLADA_FIXED, LLADA_KEYS),                 # LLaDA-8B, LLaDA-1.5
    "Dream": Family("Qwen2", QWEN_FIELDS, {**QWEN_FIXED, "attention_bias": True}, shift=True),      # Dream-v0, DiffuCoder
    "sdar": Family("Qwen3", QWEN3_FIELDS, QWEN_FIXED, blocks=True),                  # SDAR, TraDo
    "a2d-qwen3": Family("Qwen3", QWEN3_FIELDS, QWEN_FIXED),                          # dllm-hub's Qwen3 diffusion models
    "llama": Family("Llama", QWEN_FIELDS, {"is_causal": False, **QWEN_FIXED}),       # the tiny models made here
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Checkpoint(NamedTuple):
    """What config.json says."""
    folder: Path                       # with the weights, or only config.json so far
    family: Family
    config: object                     # of the stock class
    mask_id: int | None                # None: the tokenizer knows
    block: int                         # of the attention, 0: every token sees every token


def in_run(folder: Path) -> Path:
    """The model of a run folder; any other folder as it is. Raises BadInput for a run that has none yet."""
    if any((folder / "model" / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder / "model"
    if (folder / "config.json").is_file() and {"task", "mc_steps"} <= read_json(folder / "config.json").keys():
        raise BadInput(f"--model {folder}: this run is not finished; agrpo.py --resume finishes it")
    return folder


def find_folder(model: str, weights: bool = True) -> Path:
    """--model -> a local directory: itself, or the hub's repository, downloaded once (without weights: the small files). Raises BadInput."""
    if Path(model).is_dir():
        return in_run(Path(model))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or Path(model).parent.is_dir():
        raise BadInput(f"--model {model}: no such directory; give 'tiny', a checkpoint directory, or the hub's owner/name")
    import huggingface_hub
    try:
        files = ["*.json", "*.txt", "*.jinja", "*.model", "*.py"] + ["*.safetensors"] * weights
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=files))
    except Exception as error:                                                       # no such repository, no network, no room on the disk
        raise BadInput(f"--model {model}: neither a directory here nor found on the hub: {first_line(error)}") from None


def read_checkpoint(folder: Path, block: int = 0, name: str = "") -> Checkpoint:
    """config.json of a directory -> what is known without weights. `block` overrides the one in the file. Raises BadInput: one line that says
    what was found and what is supported."""
    import transformers                                                              # seconds to import: after the checks
    if not (folder / "config.json").is_file():
        raise BadInput(f"--model {name or folder}: no config.json there; give 'tiny', a checkpoint directory, or the hub's owner/name")
    known = read_json(folder / "config.json")
    kind, where = known.get("model_type"), f"--model {name or folder}"
    family, mask_id = FAMILIES.get(kind) if isinstance(kind, str) else None, known.get("mask_token_id")
    if not family or kind == "llama" and mask_id is None:
        raise BadInput(f"{where}: model_type {kind!r} with mask_token_id {mask_id!r}; supported are masked diffusion models of type "
                       f"{', '.join(FAMILIES)}")
    rope = known.get("rope_parameters") if isinstance(known.get("rope_parameters"), dict) else {}      # as transformers 5 writes it
    known = {**known, "rope_theta": known.get("rope_theta", rope.get("rope_theta"))}
    if (scaled := rope.get("rope_type", "default")) != "default":
        raise BadInput(f"{where}: rope_type {scaled!r} is not supported")
    for name_, value in family.fixed.items():
        if known.get(name_) not in (None, value):
            raise BadInput(f"{where}: {name_} {known[name_]!r} is not supported, only {value!r}")
    fields = {}
    for field, names in family.fields.items():
        value = next((known[n] for n in names if known.get(n) is not None), None)
        if field == "tie_word_embeddings":
            value = bool(value)
        elif not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise BadInput(f"{where}: its config.json has {' or '.join(names)} {value!r}")
        fields[field] = value
    if mask_id is not None and (type(mask_id) is not int or not 0 <= mask_id < fields["vocab_size"]):
        raise BadInput(f"{where}: mask_token_id {mask_id!r} in a vocabulary of {fields['vocab_size']}")
    theta = fields.pop("rope_theta")
    try:                                                                             # pad_token_id would take the gradient of its row away
        config = getattr(transformers, family.stock + "Config")(**fields, rope_parameters={"rope_type": "default", "rope_theta": float(theta)},
                                                                pad_token_id=None, bos_token_id=None, eos_token_id=None, use_cache=False)
    except Exception as error:                                                       # its own checks
        raise BadInput(f"{where}: {first_line(error)}") from None
    config.is_causal, config.mask_token_id = False, mask_id
    block = block or (known.get("block_size") if family.blocks else known.get("block_size", 0) if kind == "llama" else 0)
    if type(block) is not int or block < 0 or family.blocks and not block:
        raise BadInput(f"{where}: a block-causal model whose config.json does not give block_size: give --model-block (SDAR and TraDo: 4)")
    return Checkpoint(folder, family, config, mask_id, block)


def load_tokenizer(folder: Path):
    """By its own files alone: published classes need remote code, and read config.json. Raises BadInput."""
    import transformers
    try:
        kind = transformers.PreTrainedTokenizerFast
        if not (folder / "tokenizer.json").is_file():
            kind = transformers.Qwen2Tokenizer                                       # Dream's
            if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
                raise FileNotFoundError("there is neither tokenizer.json nor vocab.json with merges.txt")
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:                                                       # whatever the libraries raise on a bad file
        raise BadInput(f"--model {folder}: its tokenizer cannot be read: {first_line(error)}") from None


def load_model(checkpoint: Checkpoint, dtype, quantize: str = "", device: str = "cpu"):
    """The stock model with every weight found, attention in both directions, in `dtype` on the device. Raises BadInput."""
    import torch
    import transformers
    folder, family, config = checkpoint.folder, checkpoint.family, checkpoint.config
    transformers.utils.logging.set_verbosity_error()                                 # what does not fit is an error here, not a report
    transformers.utils.logging.disable_progress_bar()
    settings = {"device_map": device} if torch.device(device).type != "cpu" else {}  # straight to the device
    if quantize:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    try:
        model, info = getattr(transformers, family.stock + "ForCausalLM").from_pretrained(
            folder, config=config, key_mapping=family.keys or None, dtype=dtype, attn_implementation="sdpa", output_loading_info=True,
            ignore_mismatched_sizes=True, **settings)                                # they are listed in info, and refused below
        if config.tie_word_embeddings and not head_is_tied(checkpoint):
            raise ValueError("its output weights are not its embeddings, yet config.json says that they are tied")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise BadInput(f"--model {folder}: {first_line(error)}") from None
    problems = {k: sorted(map(str, info[k]))[:3] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
    if problems:
        raise BadInput(f"--model {folder}: weights do not fit: {problems}")
    return model


def head_is_tied(checkpoint: Checkpoint) -> bool:
    """False if the files hold output weights that differ from the embeddings (from_pretrained would take no notice)."""
    import torch
    from safetensors import safe_open
    found = {}
    for file in sorted(checkpoint.folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                stock = next((re.sub(old, new, name) for old, new in checkpoint.family.keys.items() if re.match(old, name)), name)
                if stock in ("lm_head.weight", "model.embed_tokens.weight"):
                    found[stock] = f.get_tensor(name)
    return len(found) < 2 or torch.equal(*found.values())


def encode_prompts(tokenizer, prompts: list[tuple[str, str]]) -> tuple:
    """(user message, what the completion is made to begin with), through the tokenizer's chat template -> ids and mask (N, P),
    left padded."""
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False) + begin
             for message, begin in prompts]
    out = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    return out["input_ids"], out["attention_mask"]


def end_of_turn(tokenizer) -> int | None:
    """The special token, other than EOS, that the chat template writes after an answer; None if there is none."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}], tokenize=False)
    after = tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False)["input_ids"][:1]
    return after[0] if after and after[0] in tokenizer.added_tokens_decoder and after[0] != tokenizer.eos_token_id else None


def open_checkpoint(cfg, weights: bool = False):
    """cfg.model, what is known of it without its weights -> Checkpoint, tokenizer, directory of its adapter or None. Raises BadInput."""
    folder, adapter = find_folder(cfg.model, weights), None
    if (folder / "adapter_config.json").is_file():
        adapter, folder = folder, find_folder(base_of(folder), weights)
    checkpoint = read_checkpoint(folder, cfg.model_block, cfg.model)
    tokenizer = load_tokenizer(adapter or folder)
    mask_id = tokenizer.mask_token_id if checkpoint.mask_id is None else checkpoint.mask_id
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token                 # padding is masked, whatever it is
    try:
        if encode_prompts(tokenizer, [("1", "")])[0].numel() == 0:
            raise ValueError("its chat template makes nothing of a message")
        end_of_turn(tokenizer)
    except Exception as error:                                                       # a broken template
        raise BadInput(f"--model {cfg.model}: {first_line(error)}") from None
    for token, name in ((mask_id, "mask"), (tokenizer.eos_token_id, "end-of-sequence")):
        if token is None or token >= checkpoint.config.vocab_size:
            raise BadInput(f"--model {cfg.model}: neither its config.json nor its tokenizer gives a {name} token of its vocabulary")
    return checkpoint._replace(mask_id=mask_id), tokenizer, adapter


def computed_again(layer) -> Callable:
    """Gradient checkpointing: a forward that keeps only its inputs, and runs a second time in the backward pass. A method of the layer, so
    that a copy of the layer has one of its own."""
    import types

    import torch
    import torch.utils.checkpoint

    def forward(self, *args, **kwargs):
        plain = functools.partial(type(self).forward, self)
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return torch.utils.checkpoint.checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return types.MethodType(forward, layer)


def add_adapter(model, rank: int, alpha: float, seed: int, name: str = "default"):
    """LoRA on all linear layers, float32, at first without effect; a second set if there is one already."""
    import peft
    import torch
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=ALL_LINEAR, lora_dropout=0.0, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():               # initialisation draws from the global generator
        warnings.simplefilter("ignore", FutureWarning)                               # peft asks transformers by an old name
        torch.manual_seed(seed)
        return model.add_adapter(name, config) if hasattr(model, "peft_config") else peft.get_peft_model(model, config, adapter_name=name)


def load_adapter(model, folder: Path, trainable: bool):
    """A saved adapter on its base. Raises BadInput if a weight of it finds no place."""
    import peft
    import torch
    from safetensors import safe_open
    try:
        if not (folder / "adapter_model.safetensors").is_file():
            raise FileNotFoundError("there is no adapter_model.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        with safe_open(folder / "adapter_model.safetensors", "pt") as f:
            left = set(f.keys()) ^ set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
        if left:
            raise ValueError(f"weights do not fit: {sorted(left)[:3]}")
        return model
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise BadInput(f"--model {folder}: adapter: {first_line(error)}") from None


def save_controller(controller, folder: Path):
    """Writes controller.safetensors."""
    from safetensors.torch import save_file
    save_file({k: v.detach().cpu().contiguous() for k, v in controller.state_dict().items()}, folder / "controller.safetensors")


def read_controller(folder: Path, width: int) -> dict | None:
    """The saved head of a sampler's controller beside a model, None if there is none. Raises BadInput."""
    from safetensors.torch import load_file
    path = folder / "controller.safetensors"
    if not path.exists():
        return None
    try:
        saved = load_file(path)
        if {k: tuple(v.shape) for k, v in saved.items()} != {"weight": (1, width), "bias": (1,)}:
            raise ValueError("not the head of this model")
        return saved
    except Exception as error:
        raise BadInput(f"{path}: {first_line(error)}") from None


def adapter_shape(folder: Path) -> dict:
    """lora_rank and lora_alpha of an adapter directory. Raises BadInput."""
    known = read_json(folder / "adapter_config.json")
    shape = {"lora_rank": known.get("r"), "lora_alpha": known.get("lora_alpha")}
    if not all(isinstance(x, (int, float)) and x > 0 for x in shape.values()) or type(shape["lora_rank"]) is not int:
        raise BadInput(f"{folder / 'adapter_config.json'} has r {shape['lora_rank']!r}, lora_alpha {shape['lora_alpha']!r}")
    return {**shape, "lora_alpha": float(shape["lora_alpha"])}


def base_of(folder: Path) -> str:
    """The checkpoint that an adapter directory belongs to. Raises BadInput."""
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise BadInput(f"{folder / 'adapter_config.json'} does not name its base model")
    return base


def stored_dtype(folder: Path):
    """The precision that a checkpoint's config.json states; float32 if none."""
    import torch
    known = read_json(folder / "config.json")
    dtype = getattr(torch, str(known.get("dtype") or known.get("torch_dtype")).removeprefix("torch."), None)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def save_weights(model, tokenizer, folder: Path, source: Path | None, base: str = "", weights: dict | None = None):
    """Into a new directory: an adapter as peft writes it, on `base`, or the whole checkpoint in the layout of its source: weights under the
    published names and in the stated precision, and every small file of the source as it is."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])       # embeddings were not trained
        (folder / "README.md").unlink(missing_ok=True)                               # an empty model card
        tokenizer.save_pretrained(folder)
        return
    weights = model.state_dict() if weights is None else weights
    dtype = stored_dtype(source) if source else None
    model.save_pretrained(folder, state_dict={k: v.to(dtype or v.dtype) for k, v in weights.items()})      # the loading's renaming is undone
    if source is None:
        tokenizer.save_pretrained(folder)
        return
    (folder / "generation_config.json").unlink(missing_ok=True)                      # the source's own, if it has one
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model", ".py") and not file.name.endswith(".index.json") and file.name != "agrpo.json":
            shutil.copyfile(file, folder / file.name)


def merge(cfg, out: str):
    """--merge: adapter and base as one checkpoint, in the base's own layout and precision, for the tools that read that. Raises BadInput."""
    path = Path(out or ".")
    if os.path.lexists(path) or not path.parent.is_dir():
        raise BadInput(f"--merge {out!r}: " + ("exists already" if os.path.lexists(path) else f"there is no folder {path.parent}"))
    checkpoint, tokenizer, adapter = open_checkpoint(cfg, weights=True)
    if not adapter:
        raise BadInput(f"--merge: {cfg.model} holds no adapter; give the trained model: --model runs/NAME")
    model = load_adapter(load_model(checkpoint, stored_dtype(checkpoint.folder)), adapter, trainable=False).merge_and_unload()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_weights(model, tokenizer, partial, checkpoint.folder)
        for name in ("agrpo.json", "controller.safetensors"):                        # the prompt it was trained with, its sampler
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, partial / name)
        partial.rename(path)
    except OSError as error:
        raise BadInput(f"--merge {path}: {error.strerror}") from None


def tiny_tokenizer():
    """One token a character (printable ASCII), with a chat template: the same path as every other checkpoint."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ["<pad>", "<unk>", "<eos>", "<mask>", "<|user|>", "<|assistant|>"]
    vocab = {token: i for i, token in enumerate(special + [chr(c) for c in [10, *range(32, 127)]])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>",
                                        mask_token="<mask>", additional_special_tokens=special[4:], padding_side="left",
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    return tokenizer


def tiny_model(tokenizer, cfg, block: int = 0):
    """A stock Llama that attends in both directions, or to blocks of so many tokens and those before them, randomly initialised from the seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=cfg.base_hidden, intermediate_size=4 * cfg.base_hidden,
                         num_hidden_layers=cfg.base_layers, num_attention_heads=cfg.base_hidden // 16,
                         rope_parameters={"rope_type": "default", "rope_theta": 4.0},    # a context of 40, not 4000:
                         initializer_range=0.06,                                     # ... a slow rotation cannot tell neighbours apart
                         max_position_embeddings=256, tie_word_embeddings=False, use_cache=False, is_causal=False,
                         pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         mask_token_id=tokenizer.mask_token_id, **({"block_size": block} if block else {}))
    with torch.random.fork_rng(devices=[]):                                          # initialisation draws from the global one
        torch.manual_seed(cfg.seed)
        return LlamaForCausalLM(config)


SMALL = 1e9                            # parameters up to which a model may run without a GPU


def parameter_count(config) -> int:
    """Of a stock config, embeddings included."""
    h, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head = getattr(config, "head_dim", None) or h // heads
    layer = 2 * h * head * (heads + kv) + 3 * h * config.intermediate_size + 2 * h
    return config.num_hidden_layers * layer + h * (config.vocab_size * (1 if config.tie_word_embeddings else 2) + 1)


def adapter_count(config, rank: int) -> int:
    """Parameters of adapters of this rank on all linear layers."""
    h, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head = getattr(config, "head_dim", None) or h // heads
    sides = [(h, heads * head), (h, kv * head), (h, kv * head), (heads * head, h)] + 3 * [(h, config.intermediate_size)]
    return config.num_hidden_layers * rank * sum(a + b for a, b in sides)


def kv_share(config) -> float:
    """Width of the keys, of the model's."""
    return config.num_key_value_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) / config.hidden_size


def estimate(config, cfg, prompt_length: int, half: bool, processes: int = 1) -> dict:
    """Of a training step, from shapes alone: gigabytes of memory per process (weights, trained: gradients and AdamW's moments, and of adapters
    themselves; rollout, update: what each adds at its peak) and the floating point operations of all processes (rollout_flops, update_flops
    of a step, eval_flops of an evaluation of the held-out examples).

    How many tensors a layer and the sampler hold at once was fitted to measured peaks, and checked on other shapes (tests/memory.py)."""
    h, I, V, layers = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    width, S = 2 if half else 4, prompt_length + cfg.completion_length
    base, adapters = parameter_count(config), adapter_count(config, cfg.lora_rank)
    frozen = cfg.lora_rank > 0
    ends = h * V * (1 if config.tie_word_embeddings else 2)                          # embeddings and head; a frozen head is float32 on a GPU
    weights = (base - ends) * (0.52 if cfg.quantize else width if frozen else 4) + ends * (width if frozen else 4) + (
        2 * h * V if frozen and half and not config.tie_word_embeddings else 0)
    trained = 16 * adapters if frozen else 12 * base
    if cfg.fsdp == "on":
        weights, trained = weights / processes, trained / processes
    open_ = max(cfg.block_length, cfg.eval_block_length)                             # positions of a row under the LM head
    together = min(cfg.rollout_batch, cfg.prompts * cfg.completions)
    rollout = together * (S * width * (3 * (h + I) if frozen else 2 * (h + I)) + open_ * V * 4 * (1.9 if cfg.top_k else 5.4))
    if cfg.cache != "none":                                                          # keys and values
        rollout += together * S * width * layers * 2 * h * kv_share(config)
    layer = width * (8 * h + 4 * I) + (8 * h if half else 0)                         # bytes a token that a layer's backward pass needs
    kept, again = (width * h, layer) if cfg.gradient_checkpointing == "on" else (layer, 0)
    update = max(1, cfg.tokens_per_pass // S) * (S * layers * kept + max(S * again, cfg.block_length * V * 4 * (1.6 if cfg.top_k else 4.2)))
    update += 2 * base if half and not frozen and cfg.fsdp == "off" else 0           # autocast's copies of the weights
    if not cfg.sft:                                                                  # a second model, and a third
        weights += 4 * base * (cfg.kl > 0 and cfg.kl_reference == "base" and not frozen) + (0 if frozen else 4 * base) * (cfg.value_model == "on")
        trained *= 1 + (cfg.value_model == "on")
    rows, head, body = cfg.prompts * cfg.completions, 2 * h * V * cfg.block_length, 2 * (base - ends + (adapters if frozen else 0))
    token = body + 4 * S * h * layers                                                # of one token, without the head
    forward, L, blocks = S * token, cfg.block_length, cfg.completion_length / cfg.block_length
    inside = cfg.steps - blocks                                                      # steps that do not come to a block
    computed = {"none": cfg.steps * S, "block": cfg.steps * 2 * L, "dual": blocks * S + inside * L,
                "prefix": blocks * S + inside * (cfg.completion_length + L) / 2}[cfg.cache]
    passes = (2 if frozen else 3) + (cfg.gradient_checkpointing == "on")             # in units of a forward
    evaluated = prompt_length + (cfg.eval_length or cfg.completion_length)
    return {**{k: v / 1e9 for k, v in (("weights", weights), ("trained", trained), ("rollout", rollout), ("update", update),
                                       ("total", weights + trained + max(rollout, update)))},
            "rollout_flops": 0 if cfg.sft else rows * (computed * token + cfg.steps * head), "update_flops": states_scored(cfg) * (passes * forward + 3 * head),
            "eval_flops": cfg.eval_examples * sum(numbers(cfg.eval_steps, "--eval-steps")) * (evaluated * (body + 4 * evaluated * h * layers) + head)}


def states_scored(cfg) -> float:
    """Forward and backward passes over a prompt and a completion in a training step, in the long run."""
    if cfg.sft:
        return cfg.prompts
    blocks = cfg.completion_length // cfg.block_length
    each = {"agrpo": min(cfg.mc_steps, cfg.steps), "exact": cfg.steps, "diffu-grpo": 1, "diffpo": 2, "tracerl": -(-cfg.steps // cfg.shrink),
            "dipo": 2 * min(cfg.block_length, -(-cfg.steps // blocks))}.get(cfg.method, cfg.steps)  # dipo reads the completion twice
    if cfg.controller != "off":
        each = 1 if cfg.controller_training == "alone" else each + 3
    extra = ((cfg.kl > 0 and cfg.kl_reference == "base") + (cfg.cache in ("prefix", "dual"))) / 3 + (cfg.value_model == "on")     # a forward each; as much again
    return cfg.prompts * cfg.completions * cfg.inner_epochs * each * (1 + extra)


def matmul_rate(device: str) -> float:
    """Floating point operations per second of a large matrix product: bfloat16 on a GPU, float32 else."""
    import torch
    n, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (1024, torch.float32)
    a, best = torch.ones(n, n, dtype=dtype, device=device), math.inf
    for _ in range(5):
        clock = time.perf_counter()
        float((a @ a)[0, 0])                                                         # waits for it
        best = min(best, time.perf_counter() - clock)
    return 2 * n**3 / best


def with_checkpointing(config, cfg, prompt_length: int, device: str, processes: int):
    """cfg with gradient_checkpointing auto decided: on where the update would otherwise not fit the GPU's memory, or this machine's."""
    import torch
    if cfg.gradient_checkpointing != "auto":
        return cfg
    half = device.startswith("cuda")
    room = torch.cuda.get_device_properties(device).total_memory if half else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    off, on = (dataclasses.replace(cfg, gradient_checkpointing=word) for word in ("off", "on"))
    return off if estimate(config, off, prompt_length, half, processes)["total"] < 0.9 * room / 1e9 else on


def announce(config, cfg, prompt_length: int, device: str, processes: int) -> str:
    """The estimate in words. Raises BadInput if weights and optimizer alone do not fit the GPU."""
    import torch
    cost = estimate(config, cfg, prompt_length, device.startswith("cuda"), processes)
    seconds = [cost[k] / (0.4 * matmul_rate(device) * processes) for k in ("rollout_flops", "update_flops", "eval_flops")]
    size = {k: f"{cost[k]:.1f} GB" if cost[k] >= 1 else f"{1e3 * cost[k]:.0f} MB" for k in ("total", "weights", "trained", "rollout", "update")}
    step, whole_run = seconds[0] + seconds[1], cfg.max_steps * (seconds[0] + seconds[1]) + 2 * seconds[2]
    text = (f"estimate: {size['total']} of memory beyond torch's own (weights {size['weights']}, {'adapters' if cfg.lora_rank else 'gradients'} and optimizer "
            f"{size['trained']}, rollout {size['rollout']} or update {size['update']}); {duration(step)} a step (rollout {duration(seconds[0])}, update "
            f"{duration(seconds[1])}), {duration(seconds[2])} for the evaluation before and after, {duration(whole_run)} for {cfg.max_steps} steps, "
            f"at 40 % of this machine's matmul rate" + (", activations computed twice" if cfg.gradient_checkpointing == "on" else ""))
    if device.startswith("cuda"):
        room = torch.cuda.get_device_properties(device).total_memory / 1e9
        if cost["weights"] + cost["trained"] > room:
            raise BadInput(f"weights and optimizer need {cost['weights'] + cost['trained']:.0f} GB, this GPU has {room:.0f}: "
                           + ("a larger GPU" if cfg.quantize else "--quantize 4bit" if cfg.lora_rank else
                              "--lora-rank 64, or --fsdp on with more GPUs"))
        if cost["total"] > room:
            text += f"\nwarning: this GPU has {room:.0f} GB; smaller --rollout-batch and --tokens-per-pass need less"
    return text


def duration(seconds: float) -> str:
    """'12 s', '3.4 min', '2.0 h', '15 days'"""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600), (math.inf, "days", 86400)):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 9.95 else f"{seconds / size:.0f} {unit}"


def out_of_memory(error: Exception, cfg) -> str:
    """One line: where it ran out, and the flag to change."""
    frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if "rollout" in frames:
        where, flags = "in a rollout", f"--rollout-batch {max(1, cfg.rollout_batch // 2)}"
    elif frames & {"policy_loss", "step_logp", "values", "denoising_loss", "backward"}:
        where, flags = "in the update", f"--tokens-per-pass {max(1, cfg.tokens_per_pass // 2)}"
        flags += " or --gradient-checkpointing on" if cfg.gradient_checkpointing != "on" else ""
    else:
        return "the GPU ran out of memory with weights and optimizer: --quantize 4bit, a smaller --lora-rank or --fsdp on with more GPUs need less"
    return f"the GPU ran out of memory {where}: --resume with {flags} continues from the last checkpoint"


@contextlib.contextmanager
def tracker(cfg, folder: Path):
    """Yields track(row of the log): to the tracker of --report-to by accelerate, or nowhere."""
    if not cfg.report_to:
        yield lambda row: None
        return
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=cfg.device == "cpu", log_with=cfg.report_to, project_dir=folder)
    accelerator.init_trackers("agrpo", dataclasses.asdict(cfg))
    try:
        yield lambda row: accelerator.log({k: v for k, v in row.items() if not isinstance(v, str)}, step=row["step"])
    finally:
        accelerator.end_training()


# -------------------------------------------------------------------------------------------------------------- figures
COLOUR = {"base": "#777777", "trained": "#0b62a4", "sampled": "#d9822b"}
OTHERS = ["#0b62a4", "#d9822b", "#4c8c4a", "#7b5aa6", "#a03050"]                     # for lines without a meaning of their own


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
    """A line's name at its end."""
    axis.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", color=colour, fontsize=9)


def plot_curves(path: Path, runs: list[tuple], task: str, method: str = "AGRPO"):
    """Solved share against training minutes; runs: (rows of log.csv, base, trained or None), one per seed: their mean, and a band from the
    lowest to the highest. Completions sampled in training (mean of ten steps) and held-out ones decoded greedily."""
    def draw(axis):
        """Means, bands, labels."""
        sampled, held = [], []                                                       # of each run: minutes, %
        for rows, base, trained in runs:
            minutes = np.cumsum([float(row["rollout_seconds"]) + float(row["update_seconds"]) for row in rows]) / 60
            share = [100 * float(row["solved"]) for row in rows if "solved" in row]          # none in supervised fine-tuning
            if len(runs) == 1:
                axis.plot(minutes[:len(share)], share, color=COLOUR["sampled"], alpha=0.3, lw=0.6)
            sampled += [(minutes, [sum(share[max(0, i - 9):i + 1]) / len(share[max(0, i - 9):i + 1]) for i in range(len(share))])] if share else []
            points = [(0.0, 100 * base["solved"])] + [(m, 100 * float(r["heldout"])) for m, r in zip(minutes[:-1], rows) if r["heldout"]]
            held.append(list(zip(*points, *[(minutes[-1], 100 * trained["solved"])] if trained else [])))
        grid, ends = np.linspace(0, end := max(x[-1] for x, _ in held + sampled), 101), []         # a run that has ended stays where it is
        base = 100 * sum(b["solved"] for _, b, _ in runs) / len(runs)
        for curves, kind, text, style in ((sampled, "sampled", "sampled in training", (0, (4, 1))), (held, "trained", "held out, greedy", "-")):
            if curves:
                y = np.array([np.interp(grid, *curve) for curve in curves])
                axis.fill_between(grid, y.min(0), y.max(0), color=COLOUR[kind], alpha=0.15, lw=0)
                axis.plot(grid, y.mean(0), color=COLOUR[kind], lw=2, ls=style)
                ends.append((y.mean(0)[-1], text, kind))
        if len(runs) == 1:
            axis.plot(*held[0], "o", color=COLOUR["trained"], ms=4)
        axis.axhline(base, color=COLOUR["base"], ls=":", lw=1.5)
        top, used = max(axis.get_ylim()[1], 1e-9), -math.inf                         # labels at the ends, none over another
        for y, text, kind in sorted([*ends, (base + 0.03 * top, "base, held out", "base")]):
            used = max(y, used + 0.05 * top)
            label_end(axis, end, used, text, COLOUR[kind])
        axis.set_xlim(0, end * 1.35)
        axis.set_ylim(0, max(top, used + 0.05 * top))
    figure(path, f"Does {method} make the model better at {task}?",
           "minutes of rollout and update" + (f" (mean of {len(runs)} seeds, band: lowest and highest)" if len(runs) > 1 else ""), "solved, %", draw)


def plot_frontier(path: Path, curves: dict, task: str, band: str = "band: 95 % interval"):
    """Solved share against denoiser calls per completion: {name: [result, ...]}, one line each with its band."""
    def draw(axis):
        """A line a curve."""
        for place, (name, results) in enumerate(curves.items()):
            results = sorted(results, key=lambda r: r["nfe"])
            x, y = [r["nfe"] for r in results], [100 * r["solved"] for r in results]
            colour = COLOUR.get(name, OTHERS[place % len(OTHERS)])
            axis.fill_between(x, *zip(*[[100 * c for c in r["ci95"]] for r in results]), color=colour, alpha=0.15, lw=0 if len(x) > 1 else 3)
            axis.plot(x, y, color=colour, marker="o", lw=2)
            label_end(axis, x[-1], y[-1], name, colour)
        axis.margins(x=0.12)
        axis.set_ylim(-0.02 * axis.get_ylim()[1])                                    # a line at 0 stays visible
    figure(path, f"How many {task} answers are solved in how many denoiser calls?", f"NFE: denoiser calls per completion ({band})",
           "solved, %", draw)


# --------------------------------------------------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, and a flag is given in full."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")


def add_flags(parser, settings, choices: dict, only=None, recipe: dict | None = None):
    """Every field of a dataclass (or those of `only`) as a flag, its meaning the comment behind it: max_steps -> --max-steps. `recipe` holds
    the defaults of published checkpoints."""
    source = inspect.getsource(type(settings))
    meaning, group, place = dict(re.findall(r"^    (\w+): .*?# (.*)$", source, re.MULTILINE)), parser, {}
    for title, name in re.findall(r"^    (?:# (.*)|(\w+): .*)$", source, re.MULTILINE):              # flags stand under their comment, as the fields
        group = parser.add_argument_group(title) if title and not only else group
        place[name] = group
    meaning = {k: re.sub(r" \[paper: .*\]", "", v) for k, v in meaning.items()} if only else meaning      # the paper's are for training
    for field in dataclasses.fields(settings):
        if only is None or field.name in only:
            words = f" ({', '.join(filter(None, choices[field.name]))})" if field.name in choices else ""
            default = f" [default: {getattr(settings, field.name)}" + (f"; checkpoints: {recipe[field.name]}" if recipe and field.name in recipe else "") + "]"
            place[field.name].add_argument("--" + field.name.replace("_", "-"), type=field.type, default=argparse.SUPPRESS,
                                           help=(meaning.get(field.name, "") + words + default * (default != " [default: ]")).replace("%", "%%"))


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
    """Highest so far of this process, megabytes: of the GPU if there is one, else resident."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


# ----------------------------------------------------------------------------------------------- a file of graded completions
KEPT = {"length": int, "steps": int, "index": int, "sample": int, "nfe": int, "tokens": int, "completion": str, "grade": (int, float),
        "seconds": (int, float), "example": dict}                                    # of every completion


def read_completions(path: Path) -> tuple[dict, list[dict]]:
    """Settings (the first line, {} if it is not ours) and rows of a .jsonl file, without a last line cut off by a kill. Raises BadInput."""
    rows, number = [], 0
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate([*lines, last] if is_object(last) else lines, start=1):
            rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {path}: {error}" if isinstance(error, OSError) else f"{path}:{number}: {first_line(error)}") from None
    settings = rows[0].get("settings") if rows else None
    return (settings, rows[1:]) if isinstance(settings, dict) else ({}, rows)


def is_object(line: str) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def write_completions(path: Path, settings: dict, rows: list[dict]):
    """The whole file at once, atomically."""
    write_atomically(path, lambda f: f.writelines((json.dumps(row) + "\n").encode() for row in [{"settings": settings}, *rows]))


HEADER = '{"settings": '


def open_completions(path: Path, settings: dict, overwrite: bool) -> list[dict]:
    """The rows of a file that was made with these settings, none of a new one. Raises BadInput if it was made with others (unless they may be
    overwritten), is no file of ours (never overwritten), or cannot be written."""
    try:
        place = next(p for p in (path, *path.parents) if p.exists())
        start = path.read_bytes()[:1000] if place == path else b""
    except (OSError, ValueError):                                                    # a folder, a name too long
        place = None
    if not place or path.suffix != ".jsonl" or not os.access(place, os.W_OK) or place != path and not place.is_dir():
        raise BadInput(f"--out {str(path)[:200]}: must be a .jsonl file in a folder that can be written to")
    if b"\n" not in start and HEADER.encode().startswith(start[:len(HEADER)]):       # new, empty, or killed at its first line
        return []
    known, rows = read_completions(path)
    other = [k for k in settings if known.get(k) != settings[k]]
    if not known:
        raise BadInput(f"{path} exists and holds no completions of this program: --out FILE.jsonl goes elsewhere")
    if other and not overwrite:
        raise BadInput(f"{path} holds completions made with another {', '.join(other)}: --overwrite replaces them, --out FILE.jsonl goes elsewhere")
    for number, row in enumerate(rows, start=2):
        if not all(isinstance(row.get(name), kind) for name, kind in KEPT.items()):
            raise BadInput(f"{path}:{number}: not a completion of this program")
    return [] if overwrite else rows


@contextlib.contextmanager
def locked_completions(path: Path, settings: dict, overwrite: bool):
    """The rows of `open_completions` and the file to append to, its last line whole, for one process at a time. Raises BadInput."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        f = open(path, "a", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot write {str(path)[:200]}: {error.strerror if isinstance(error, OSError) else error}") from None
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)                            # let go when the process ends, however
        except OSError:
            raise BadInput(f"another evaluation is writing {path}") from None
        rows, raw = open_completions(path, settings, overwrite), path.read_bytes()
        if not rows:
            f.truncate(0)
            f.write(json.dumps({"settings": settings}) + "\n")
        elif not raw.endswith(b"\n"):
            whole = raw.rfind(b"\n") + 1
            f.write("\n") if is_object(raw[whole:].decode(errors="replace")) else f.truncate(whole)
        f.flush()
        yield rows, f


def regrade(path: Path, task: str, out: str, overwrite: bool) -> int:
    """Grade the completions of a file again, ours or {question, completion, gold} as d1 publishes them; print what changed."""
    settings, rows = read_completions(path)
    task, groups = task or str(settings.get("task")), {}
    if task not in TASKS or not rows or settings.get("task", task) != task:
        raise BadInput(f"--regrade {path}: " + ("no completions in it" if not rows else f"these are of task {settings['task']}" if settings else
                                                f"give --task ({', '.join(TASKS)})"))
    if out:
        open_completions(Path(out), {}, overwrite)
        if Path(out).exists() and not overwrite:
            raise BadInput(f"--out {out} exists: --overwrite replaces it")
    for number, row in enumerate(rows, start=1 + bool(settings)):
        try:
            example = row["example"] if settings else TASKS[task].row(row)
            new = {"index": number - 1, **row, **grade_row(task, row["completion"], example), "example": example}
            if not isinstance(row["completion"], str):
                raise TypeError("completion")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{path}:{number}: not a {task} completion with its example: {type(error).__name__} {error}") from None
        was = row.get("grade") if isinstance(row.get("grade"), (int, float)) else None
        groups.setdefault((str(row.get("length", "")), str(row.get("steps", ""))), []).append((was, new))
    lines, beside = [], TASKS[task].beside
    for shape, pairs in groups.items():
        n, solved, before = len(pairs), sum(row["grade"] == 1 for _, row in pairs), [was for was, _ in pairs if was is not None]
        lines.append([*shape, n, f"{sum(was == 1 for was in before)} of {len(before)}", solved,
                      percent({"solved": solved / n, "ci95": wilson(solved, n)}), sum(was is not None and was != row["grade"] for was, row in pairs),
                      *([f"{100 * sum(row[beside[0]] for _, row in pairs) / n:.1f} %"] if beside else [])])
    print(table(["length", "steps", "n", "solved before", "solved", "share (95 % interval)", "changed", *([beside[0]] if beside else [])], lines))
    for was, row in [(w, r) for pairs in groups.values() for w, r in pairs if w is not None and w != r["grade"]][:20]:
        print(f"  example {row['index']}: {was:g} -> {row['grade']:g}, answer read: {str(row['answer'])[:80]!r}")
    if out:
        write_completions(Path(out), {**settings, "task": task}, [row for pairs in groups.values() for _, row in pairs])
        print(f"graded again: {out}")
    return 0


SAMPLING = ("task", "model", "model_block", "quantize", "data", "prompt", "system_prompt", "seed", "device", "block_length", "unmasking", "cache",
            "order_score", "controller", "tau_pos", "threshold", "entropy_bound", "temperature", "top_k", "top_p")               # what an evaluation takes of agrpo.Config


def fingerprint(model) -> str:
    """Changes when the weights do: a hash of the first numbers of every parameter."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode() + p.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def numbers(text: str, flag: str) -> list[int]:
    """"16,8" -> [16, 8], each once. Raises BadInput."""
    if not re.fullmatch(r"\s*[0-9]{1,6}(\s*,\s*[0-9]{1,6})*\s*", text):
        raise BadInput(f"{flag} {text!r}: numbers separated by commas")
    return list(dict.fromkeys(map(int, text.split(","))))


def settings_of(args) -> tuple:
    """The command line -> Config of the sampler, and the (length, steps) to evaluate. Raises BadInput before any work."""
    import agrpo                                                             # here: agrpo itself imports this file
    given = {k: v for k, v in vars(args).items() if k in SAMPLING}
    path = Path(given.get("model") or agrpo.config_for(given.get("task", "sudoku")).model)
    path = in_run(path)
    known = read_json(path / "agrpo.json") if (path / "agrpo.json").is_file() else {}
    task = given.get("task") or str(known.get("task", "sudoku"))
    if fixed := {"threshold", "entropy_bound"} & given.keys() if given.get("controller", known.get("controller", "off")) != "off" else ():
        raise BadInput(f"--{sorted(fixed)[0].replace('_', '-')}: the controller of {path} sets it; --controller off leaves it aside")
    given |= {"task": task, "model": str(path), "controller": given.get("controller") or str(known.get("controller", "off"))}
    if given["controller"] not in ("off", known.get("controller")):
        raise BadInput(f"--controller {given['controller']}: {path} has " + ("none" if known.get("controller", "off") == "off" else known["controller"]))
    if given["controller"] != "off" and "unmasking" in given:
        raise BadInput(f"--unmasking: {path} has a controller, {given['controller']}, that sets it; --controller off leaves it aside")
    cfg, shape = agrpo.config_for(task, str(path)), {}
    if known.get("task") == task:                                                    # the shape it was evaluated with in training
        known = {"completion_length": known.get("eval_length") or known.get("completion_length"),
                 "block_length": known.get("eval_block_length") or known.get("block_length"), "eval_steps": known.get("eval_steps")}
        if [type(x) for x in known.values()] == [int, int, str]:
            cfg, shape = dataclasses.replace(cfg, eval_length=0, eval_block_length=0, **known), known
    cfg = agrpo.with_model(dataclasses.replace(cfg, **given, rollout_batch=args.batch), {**shape, **given})
    cfg = dataclasses.replace(agrpo.evaluation_config(cfg), **given, eval_length=0, eval_block_length=0)
    if not 0 < args.samples < 10**6 or not 0 <= args.limit <= 10**5 or args.batch < 1:
        raise BadInput("--samples and --batch must be at least 1, --limit 0 to 100000")
    if args.samples > 1 and cfg.temperature == 0 and cfg.unmasking != "random":
        raise BadInput(f"--samples {args.samples} of a greedy sampler are all the same: give a --temperature")
    cfg, shapes = agrpo.with_prompt(cfg), []
    for length in numbers(args.lengths, "--lengths") if args.lengths else [cfg.completion_length]:
        for steps in numbers(args.steps or cfg.eval_steps, "--steps"):
            agrpo.validate(dataclasses.replace(cfg, completion_length=length, eval_steps=str(steps)), training=False)
            shapes.append((length, steps))
    return cfg, shapes


def trained_on(cfg, examples: list) -> int:
    """How many examples of a file the model's own run was trained on (a fifth of the file was held out)."""
    saved = Path(cfg.model) / "agrpo.json"
    known = read_json(saved) if saved.is_file() else {}
    how = [known.get(k) for k in ("train_examples", "eval_examples", "seed", "data", "test_data")]
    if not cfg.data or known.get("task") != cfg.task or [type(x) for x in how] != [int, int, int, str, str] or not Path(how[3] or "-").is_file():
        return 0
    key = TASKS[cfg.task].key
    keys = {key(ex) for ex in load_split(cfg.task, *how)[0]}
    return sum(key(ex) in keys for ex in examples)


def run(args) -> int:
    """Complete, grade, save, print: everything that `python eval.py` does with a model."""
    import agrpo
    cfg, shapes = settings_of(args)
    settings, results = {k: getattr(cfg, k) for k in SAMPLING if getattr(cfg, k) != {"controller": "off", "cache": "none"}.get(k)}, []
    if args.out:                                                                     # before a model is opened or trained
        open_completions(Path(args.out), settings, args.overwrite)
    examples = load_examples(cfg.task, args.limit or (512 if TASKS[cfg.task].generate and not cfg.data else 0), 0, "test", cfg.data)
    try_task(cfg.task, examples[0])
    if seen := trained_on(cfg, examples):
        print(f"note: the model was trained on {seen} of these {len(examples)} examples", flush=True)
    if cfg.model not in agrpo.TINY:
        checkpoint, tokenizer, _ = agrpo.open_checkpoint(cfg)
        agrpo.check_context(checkpoint.config, tokenizer, dataclasses.replace(cfg, completion_length=max(shapes)[0]), examples)
    policy, tokenizer = agrpo.open_model(cfg)
    settings |= {"weights": fingerprint(policy.model) + (fingerprint(policy.controller) if policy.controller else "")}
    name = Path(cfg.model).parent.name if Path(cfg.model).name == "model" else Path(cfg.model).name
    out = Path(args.out or f"runs/eval-{cfg.task}-{name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}.jsonl")
    with locked_completions(out, settings, args.overwrite) as (stored, f):
        stored = [row for row in stored if row["index"] < len(examples)]             # a smaller --limit takes what it needs
        if any(row["example"] != examples[row["index"]] for row in stored):
            raise BadInput(f"{out} holds completions of other examples: --overwrite replaces them, --out FILE.jsonl goes elsewhere")
        for length, steps in shapes:
            at, shape = dataclasses.replace(cfg, completion_length=length, steps=steps), {"length": length, "steps": steps}

            def generate(exs, keys, at=at):
                return agrpo.generate(policy, tokenizer, at, exs, [("eval", cfg.seed, *key) for key in keys])

            def save(rows, exs, shape=shape):
                f.writelines(json.dumps({**shape, **row, "example": ex}) + "\n" for row, ex in zip(rows, exs))
                f.flush()
            done = {(row["index"], row["sample"]): {**row, **grade_row(cfg.task, row["completion"], row["example"])}
                    for row in stored if shape.items() <= row.items()}               # one grader for all, also after an update
            results.append({**shape, **evaluate(generate, cfg.task, examples, args.batch, args.samples, done, save)})
            if cfg.data and TASKS[cfg.task].generate:                                # a file's puzzles may have been made for training too
                held = [place for place, ex in enumerate(examples) if held_out(cfg.task, ex)]
                shares = [[g == 1 for g in results[-1]["grades"][i * args.samples:(i + 1) * args.samples]] for i in held]
                results[-1]["held_out"] = {"solved": sum(map(sum, shares)) / max(1, len(held) * args.samples), "n": len(held)}
    report_evaluation(cfg.task, name, settings, results, out)
    return 0


def report_evaluation(task: str, name: str, settings: dict, results: list[dict], out: Path):
    """The table on the screen; beside the completions the results (.json) and, of several, the frontier (.png)."""
    rows, beside = [], TASKS[task].beside
    for r in results:
        rows.append({"length": r["length"], "steps": r["steps"], "NFE": f"{r['nfe']:.1f}", "tokens/NFE": f"{r['tokens_per_nfe']:.2f}",
                     "solved (95 % interval)": percent(r), "n": r["n"],
                     **({f"pass@{r['k']}": percent(r["pass_at_k"]), "majority": percent(r["majority"])} if "k" in r else {}),
                     **({beside[0]: f"{100 * r['beside']:.1f} %"} if beside else {}),
                     **({"solved, class never trained on": f"{100 * r['held_out']['solved']:.1f} % of {r['held_out']['n']}"} if "held_out" in r else {}),
                     "seconds": f"{r['seconds']:.1f}"})
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    write_json(out.with_suffix(".json"), {"settings": settings, "results": [
        {k: v for k, v in r.items() if k not in ("completions", "grades")} for r in results]})
    print(f"every completion with its grade: {out}", end="\n" if len(results) == 1 else "; ")
    if len(results) > 1:
        lengths = list(dict.fromkeys(r["length"] for r in results))
        curves = {f"{name}, {length} tokens" if len(lengths) > 1 else name: [r for r in results if r["length"] == length] for length in lengths}
        plot_frontier(out.with_suffix(".png"), curves, task)
        print(f"frontier: {out.with_suffix('.png')}")


def main(argv=None) -> int:
    """The command line; returns the exit code: 0 done, 2 a mistake of the caller, 130 stopped."""
    import agrpo
    parser = Parser(prog="eval.py", description="Solved share of a model on a task, greedy by default. "
                    "--model takes 'tiny', a checkpoint directory or a run folder of agrpo.py.")
    add_flags(parser, agrpo.Config(**agrpo.EVALUATION), agrpo.CHOICES, SAMPLING)
    for flag, default, text in (
            ("limit", 0, "examples; 0: 512 generated ones, or all there are"), ("lengths", "", "completion lengths, comma separated"),
            ("steps", "", "denoising steps, comma separated; several draw the frontier"),
            ("samples", 1, "k completions per example: pass@k and majority vote; needs a temperature"),
            ("batch", 64, "completions denoised at once; fewer need less memory"),
            ("out", "", "the completions' .jsonl file, results (.json) and figure (.png) beside it; default runs/eval-TASK-MODEL-SETTINGS.jsonl"),
            ("regrade", "", "grade the completions of this file again and stop")):
        parser.add_argument("--" + flag, type=type(default), default=default, help=text)
    parser.add_argument("--overwrite", action="store_true", help="start over: replace what the output file holds")
    try:
        args = parser.parse_args(argv)
        return regrade(Path(args.regrade), getattr(args, "task", ""), args.out, args.overwrite) if args.regrade else run(args)
    except BadInput as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
