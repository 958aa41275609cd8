"""Files written whole or not at all, and mistakes in one line."""
import contextlib
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from rewards import BadInput

def write_atomically(path: Path, write):
    """write(file) into a neighbour that then takes the place of `path`: a reader sees the old file
    or the new one. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as f:
        try:
            write(f)
        except RuntimeError as error:                          # torch.save's, on a full disk
            raise OSError(f"cannot write {path}: {first_line(error)}") from None
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)

def first_line(error: Exception) -> str:
    """What went wrong in one line (and the next, where the first announces it)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    return " ".join(lines[:2 if lines[0].endswith(":") else 1])

def need(holds, message: str):
    """Raises BadInput with the message unless the condition holds."""
    if not holds:
        raise BadInput(message)

@contextlib.contextmanager
def refusing(what: str):
    """Within `with`, an error of a library, whatever its kind, is BadInput: what, and why in one
    line."""
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BadInput(f"{what}: {first_line(error)}") from None

def read_json(path: Path, kind: type = dict):
    """The object in a JSON file. Raises BadInput if there is none of this kind."""
    with refusing(f"cannot read {path}"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    what = "object" if kind is dict else "list"
    need(isinstance(value, kind) and value,
         f"cannot read {path}: not a JSON {what} with something in it")
    return value

def write_json(path: Path, value):
    """Indented, whole or not at all."""
    write_atomically(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))

def provenance(model) -> dict:
    """What figures depend on beside their settings: device, precision of most weights, versions,
    commit ("" without git), command. The same code can be points apart on two kinds of GPU."""
    import transformers
    weight, commit = next(model.parameters()), ""
    cpu = f"CPU ({platform.machine()}), threads: {torch.get_num_threads()}"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty"],
            capture_output=True, text=True, timeout=10).stdout.strip()
    return {"device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else cpu,
            "dtype": str(weight.dtype).removeprefix("torch."), "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
            "commit": commit, "command": shlex.join(["python", *sys.argv])}

def digest(value) -> str:
    """Eight letters that change when a value that JSON holds does."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]
