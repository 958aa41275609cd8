"""Published methods beside AGRPO, one file each, and further rows of agrpo.py's tables.

A file is imported when one of its rows is asked for, and adds them to the tables, where they have
no row of that name yet. A method of your own: a file like diffu_grpo.py, and its name in ROWS.
"""
import importlib

import torch

ROWS = {                               # table of agrpo.py: row -> file
    "METHODS": {"diffu-grpo": "diffu_grpo", "diffpo": "diffpo", "tracerl": "tracerl",
                "dipo": "dipo"},
    "UNMASK": dict.fromkeys(("confidence", "plackett_luce", "threshold", "entropy_bound",
                             "left_to_right"), "samplers"),
    "TIMESTEPS": {**dict.fromkeys((
        "iid", "batch", "stratified", "stratified_entropy", "stratified_gradient", "sobol",
        "without_replacement", "without_replacement_gradient"), "samplers"),
        "independent_gradient": "caches"},
    "ADVANTAGES": {"none": "tracerl"},
    "NORMALIZERS": {"length": "diffu_grpo", "state_tokens": "tracerl", "batch_tokens": "dipo"},
    "OLD_LOGP": {"scored": "scored", "truncated": "diffpo", "tokens": "dipo",
                 "cached": "caches"},
}

def load(name: str):
    """Import the file that adds the row `name`. Raises KeyError if there is none."""
    file = next((rows[name] for rows in ROWS.values() if name in rows), None)
    if file is None:
        raise KeyError(f"{name!r} is no row of agrpo.py's tables, nor of any file in methods/")
    importlib.import_module(f"methods.{file}")

def rows_of(traj, index):
    """Some rows of a trajectory, by indices or bool (N,)."""
    return mapped(lambda x: x[index.to(x.device)], traj)

def to(traj, device):
    """The same on a device."""
    return mapped(lambda x: x.to(device), traj)

def mapped(change, traj):
    """The same with every tensor changed."""
    return type(traj)(**{name: change(x) if isinstance(x, torch.Tensor) else x
                         for name, x in vars(traj).items()})

def lengths(traj, policy):
    """(N,) tokens before the first EOS or end of turn, where a completion ends."""
    end = (traj.tokens == policy.eos_id) | (traj.tokens == policy.turn_id)
    return (~end).int().cumprod(1).sum(1)

def room(traj, policy, cfg):
    """(N,) tokens that could be written: all but what a block-causal model leaves to the prompt."""
    return (policy.blocks(traj.prompt_mask, cfg.completion_length, cfg.block_length)
            < cfg.completion_length).sum(1)

def unfinished(traj, policy, cfg):
    """(N,) whether a completion has no end."""
    return lengths(traj, policy) >= room(traj, policy, cfg)

def join(parts: list):
    """The rows of all trajectories, prompts padded to the widest."""
    P, joined = max(part.prompt.shape[1] for part in parts), {}
    for name, first in vars(parts[0]).items():
        values = [getattr(part, name) for part in parts]
        if name in ("prompt", "prompt_mask"):
            values = [torch.nn.functional.pad(x, (P - x.shape[1], 0)) for x in values]
        joined[name] = torch.cat(values) if isinstance(first, torch.Tensor) else first
    return type(parts[0])(**joined)
