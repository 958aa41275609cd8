"""Checkpoints and adapters written, merged, told apart."""
import contextlib
import hashlib
import os
import shutil
from pathlib import Path

import torch

from rewards import BadInput
from support.checkpoints import SMALL_FILES, load_adapter, load_model, open_checkpoint
from support.files import need, read_json, refusing, write_json
from support.presets import TINY

def stored_dtype(folder: Path):
    """The precision that a checkpoint's config.json states; float32 if none."""
    known = read_json(folder / "config.json")
    name = str(known.get("dtype") or known.get("torch_dtype")).removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32

def save_weights(model, tokenizer, folder: Path, source: Path | None, base: str = ""):
    """Into a new directory: an adapter as peft writes it, on `base`, or the whole checkpoint in the
    layout of its source: weights under the published names and in the stated precision, and every
    small file of the source as it is."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    if hasattr(model, "peft_config"):
        base = str(Path(base).resolve()) if Path(base).is_dir() else base
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])
        (folder / "README.md").unlink(missing_ok=True)         # an empty model card
        tokenizer.save_pretrained(folder)
        return
    dtype = stored_dtype(source) if source else None
    weights = {k: v.to(dtype or v.dtype) for k, v in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)          # the loading's renaming is undone
    if source is None:
        tokenizer.save_pretrained(folder)
        return
    (folder / "generation_config.json").unlink(missing_ok=True)    # the source's own, if it has one
    for pattern in SMALL_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json") and file.name != "agrpo.json":
                shutil.copyfile(file, folder / file.name)

@contextlib.contextmanager
def replacing(path: Path):
    """Yields a directory to write, which at the end takes the place of `path`."""
    partial, old = (path.with_name(f"{path.name}.{os.getpid()}.{end}")     # two may make the same
                    for end in ("partial", "old"))
    yield partial
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)

def save_model(path: Path, model, tokenizer, settings: dict, source: Path | None, base: str,
               extra: dict | None = None):
    """Write a directory that open_checkpoint reads, with the settings it was made with, whole or
    not at all. extra: further modules, each as NAME.safetensors."""
    from safetensors.torch import save_model as save_module
    with replacing(path) as partial:
        save_weights(model, tokenizer, partial, source, base)
        for name, module in (extra or {}).items():
            save_module(module, partial / f"{name}.safetensors")
        write_json(partial / "agrpo.json", settings)

def load_extra(module, path: Path) -> bool:
    """Loads a module saved beside a model; whether there is one. Raises BadInput."""
    from safetensors.torch import load_file
    if not path.exists():
        return False
    with refusing(path):
        saved, own = load_file(path), module.state_dict()
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in own.items()}:
            raise ValueError("not of this model")
        module.load_state_dict(saved)
    return True

def fingerprint(model) -> str:
    """Changes when the weights do: a hash of the first numbers of every parameter."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(name.encode() + p.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

def merge(model: str, block: int, out: str):
    """--merge: adapter and base as one checkpoint, in the base's own layout and precision, for the
    tools that read that. Raises BadInput."""
    path = Path(out)
    need(not os.path.lexists(path), f"--merge {out!r}: exists already")
    need(path.parent.is_dir(), f"--merge {out!r}: there is no folder {path.parent}")
    no_adapter = f"--merge: {model} holds no adapter, as --model runs/NAME trained by LoRA does"
    need(model not in TINY, no_adapter)
    about, tokenizer = open_checkpoint(model, block, weights=True)
    adapter = about.adapter
    need(adapter, no_adapter)
    net = load_adapter(load_model(about, stored_dtype(about.folder)), about, trainable=False)
    try:
        with replacing(path) as partial:
            save_weights(net.merge_and_unload(), tokenizer, partial, about.folder)
            for name in ("agrpo.json", "controller.safetensors"):      # its prompt, its sampler
                if (adapter / name).is_file():
                    shutil.copyfile(adapter / name, partial / name)
    except OSError as error:
        raise BadInput(f"--merge {path}: {error.strerror}") from None
