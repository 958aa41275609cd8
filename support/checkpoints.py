"""Published checkpoints in stock classes of transformers, no remote code; adapters.

runs/NAME/model is an adapter that PeftModel.from_pretrained loads on the stock class, opened with
its weights renamed (attention in both directions, blocks and Dream's shift are the policy's):
    model = load_model(read_checkpoint(find_folder("GSAI-ML/LLaDA-8B-Instruct")), torch.bfloat16)
    model = peft.PeftModel.from_pretrained(model, "runs/gsm8k-agrpo-seed0/model")
An adapter of the published LLaDA class (blocks.0.ff_proj: d1's trainer and its kin) is renamed as
it is opened, and takes its base's tokenizer if it brings none. --merge DIR writes base and adapter
as one checkpoint in the family's own layout, names and precision; --model runs/NAME trains on."""
import contextlib
import functools
import json
import os
import re
import types
import warnings
from pathlib import Path

import torch

from support.families import Checkpoint, read_checkpoint
from support.files import need, read_json, refusing
from support.presets import MODELS
from support.templates import (encode_prompts, end_of_turn, in_turns,  # noqa: F401
                               set_template_args)

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "*.py"]

# ------------------------------------------------------------------------------------ where it is
def in_run(folder: Path) -> Path:
    """The model of a run folder; any other folder as it is. Raises BadInput for a run that has
    none yet."""
    if any((folder / "model" / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
        return folder / "model"
    config = folder / "config.json"
    need(not config.is_file() or not {"task", "mc_steps"} <= read_json(config).keys(),
         f"--model {folder}: this run is not finished; agrpo.py --resume finishes it")
    return folder

def check_model_exists(model: str):
    """Raises BadInput for a path that leads nowhere, and for what is no name on the hub."""
    need(len(model) <= 1000 and "\0" not in model, "--model is no name of a directory")
    if os.path.isdir(model):           # False, too, where a name is too long for the file system
        return
    written_as_path = model.startswith((".", "/", "~", "runs/"))   # runs/x is no owner/name
    need(not written_as_path and not os.path.isdir(os.path.dirname(model)),
         f"--model {model}: there is no such folder")
    need(re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", model),         # the hub's own limit
         f"--model {model}: no such directory; give 'tiny', a checkpoint directory, the hub's "
         f"owner/name, or one of {', '.join(MODELS)}")

def find_folder(model: str, weights: bool = True) -> Path:
    """--model -> a local directory: itself, or the hub's repository, downloaded once (without
    weights: the small files). Raises BadInput."""
    check_model_exists(model)
    if Path(model).is_dir():
        return in_run(Path(model))
    import huggingface_hub
    files = SMALL_FILES + ["*.safetensors"] * weights
    with refusing(f"--model {model}: neither a directory here nor found on the hub"):
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=files))

def base_of(folder: Path) -> str:
    """The checkpoint that an adapter directory belongs to. Raises BadInput."""
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    need(isinstance(base, str) and base,
         f"{folder / 'adapter_config.json'} does not name its base model")
    return base

# --------------------------------------------------------------------- its tokenizer and prompts
def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer can be read there; its settings alone do not make one."""
    there = [(folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    return there[0] or all(there[1:])

def load_tokenizer(folder: Path):
    """By its own files alone: published classes need remote code. Raises BadInput."""
    import transformers
    with refusing(f"--model {folder}: its tokenizer cannot be read"):
        if not has_tokenizer(folder):
            raise FileNotFoundError("there is neither tokenizer.json nor vocab.json with "
                                    "merges.txt")
        plain = (folder / "tokenizer.json").is_file()          # Dream's is not
        kind = transformers.PreTrainedTokenizerFast if plain else transformers.Qwen2Tokenizer
        tokenizer = kind.from_pretrained(folder, trust_remote_code=False)
        path = folder / "special_tokens_map.json"              # which transformers may not read
        named = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name in ("mask_token", "eos_token"):
            token = named.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token and getattr(tokenizer, name) is None:     # not in the vocabulary: its next id
                tokenizer.add_special_tokens({name: token})
        return tokenizer

def saved_settings(model: str) -> dict:
    """What a model was trained with here; {} if it was not."""
    path = in_run(Path(model)) / "agrpo.json"
    known = read_json(path) if path.is_file() else {}
    for kind, names in ((str, "task prompt system_prompt controller eval_steps template_args"),
                        (int, "completion_length block_length eval_length eval_block_length "
                              "model_block")):
        for name in set(names.split()) & known.keys():
            need(type(known[name]) is kind, f"{path}: {name} is {known[name]!r}")
    return known

def open_checkpoint(model: str, block: int = 0, weights: bool = False):
    """What is known of a model without its weights -> Checkpoint, tokenizer. Raises BadInput."""
    folder, adapter, base = find_folder(model, weights), None, model
    trained = saved_settings(str(folder))
    if (folder / "adapter_config.json").is_file():
        adapter, base = folder, base_of(folder)
        folder = find_folder(base, weights)
    about = read_checkpoint(folder, block or trained.get("model_block", 0), model)
    tokenizer = load_tokenizer(adapter if adapter and has_tokenizer(adapter) else folder)
    named = [i for token, i in tokenizer.get_added_vocab().items() if "mask" in token.lower()]
    known = (about.mask_id, tokenizer.mask_token_id, *(named if len(named) == 1 else ()))
    mask_id = next((i for i in known if i is not None), None)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token   # masked, whatever it is
    reads = str(tokenizer.chat_template or "")
    if not trained or "template_args" in trained:              # earlier ones were trained without
        tokenizer.template_args = {k: v for k, v in about.family.template.items() if k in reads}
    with refusing(f"--model {model}"):                         # a broken template
        set_template_args(tokenizer, trained.get("template_args", ""))
        said = in_turns(tokenizer, [("user", "1")], add_generation_prompt=True)
        if not tokenizer(said, add_special_tokens=False)["input_ids"]:
            raise ValueError("its chat template makes nothing of a message")
        end_of_turn(tokenizer)
    for token, name in ((mask_id, "mask"), (tokenizer.eos_token_id, "end-of-sequence")):
        need(token is not None and token < about.config.vocab_size,
             f"--model {model}: neither its config.json nor its tokenizer gives a {name} token of "
             "its vocabulary")
    need(mask_id not in (tokenizer.eos_token_id, end_of_turn(tokenizer)),
         f"--model {model}: its mask token, {mask_id}, is the end of a sequence or turn")
    return about._replace(mask_id=mask_id, adapter=adapter, base=base), tokenizer

# ----------------------------------------------------------------------------------- its weights
def load_model(about: Checkpoint, dtype, quantize: str = "", device: str = "cpu"):
    """The stock model with every weight found, attention in both directions. Raises BadInput."""
    import transformers
    transformers.utils.logging.set_verbosity_error()           # what does not fit is an error here
    transformers.utils.logging.disable_progress_bar()
    settings = {"device_map": device} if torch.device(device).type != "cpu" else {}
    if quantize:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16)
    stock = getattr(transformers, about.family.stock + "ForCausalLM")
    with refusing(f"--model {about.folder}"):
        model, info = stock.from_pretrained(
            about.folder, config=about.config, key_mapping=about.family.keys or None, dtype=dtype,
            attn_implementation="sdpa", output_loading_info=True, ignore_mismatched_sizes=True,
            **settings)                # mismatched sizes are listed in info, and refused below
        if about.config.tie_word_embeddings and not head_is_tied(about):
            raise ValueError("its output weights are not its embeddings, yet config.json says that "
                             "they are tied")
    problems = {k: sorted(map(str, info[k]))[:3]
                for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
    need(not problems, f"--model {about.folder}: weights do not fit: {problems}")
    return model

def stock_name(name: str, keys: dict) -> str:
    """A weight's name in the published class -> in the stock class."""
    return next((re.sub(old, new, name) for old, new in keys.items() if re.match(old, name)), name)

def head_is_tied(about: Checkpoint) -> bool:
    """False if the files hold output weights that differ from the embeddings (from_pretrained would
    take no notice)."""
    from safetensors import safe_open
    found = {}
    for file in sorted(about.folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                stock = stock_name(name, about.family.keys)
                if stock in ("lm_head.weight", "model.embed_tokens.weight"):
                    found[stock] = f.get_tensor(name)
    return len(found) < 2 or torch.equal(*found.values())

def load_network(model: str, device: str, cfg, train: bool) -> tuple:
    """A directory or the hub's owner/name -> network, tokenizer, Checkpoint. To train: with
    adapters if cfg.lora_rank, else all of it in float32; what is not trained is bfloat16 on a GPU.
    Raises BadInput unless it is a masked diffusion model of FAMILIES, every weight found."""
    about, tokenizer = open_checkpoint(model, cfg.model_block, weights=True)
    set_template_args(tokenizer, cfg.template_args)
    full = train and not cfg.lora_rank
    half = torch.device(device).type == "cuda" and not full
    net = load_model(about, torch.bfloat16 if half else torch.float32, cfg.quantize, device)
    if half and not about.config.tie_word_embeddings:
        net.get_output_embeddings().float()                    # once, not in every call of logits
    if about.adapter:
        net = load_adapter(net, about, trainable=train and not full)
        net = net.merge_and_unload().requires_grad_(True) if full else net
    elif train and not full:
        net = add_adapter(net, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    if train and cfg.gradient_checkpointing == "on":
        for layer in net.get_decoder().layers:
            layer.forward = computed_again(layer)
    lean(net)
    return net if cfg.quantize else net.to(device), tokenizer, about

def computed_again(layer):
    """Gradient checkpointing: a forward that keeps only its inputs, and runs a second time in the
    backward pass. A method of the layer, so that a copy of the layer has one of its own."""
    from torch.utils.checkpoint import checkpoint

    def forward(self, *args, **kwargs):
        plain = functools.partial(type(self).forward, self)
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return types.MethodType(forward, layer)

def lean(net):
    """Adapters and norms in fewer passes over their tensors than their libraries make: W x + sB(Ax)
    with one addition, in the precision of x; a norm in one kernel of a GPU."""
    for module in net.modules():
        if isinstance(getattr(module, "lora_A", None), torch.nn.ModuleDict):
            module.forward = types.MethodType(adapted, module)
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(normed, module)

def adapted(self, x):
    """One adapter, unmerged, without dropout; whatever else there is, is peft's own to compute."""
    if (name := lone_adapter(self)) is None:
        return type(self).forward(self, x)
    A, B = (part[name].weight.to(x.dtype) for part in (self.lora_A, self.lora_B))
    y, low = self.base_layer(x), torch.nn.functional.linear(x, A)
    return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), B.t(),
                       alpha=self.scaling[name]).view_as(y)

def lone_adapter(self) -> str | None:
    """The name of the adapter, if it is all that counts."""
    active = [name for name in self.active_adapters if name in self.lora_A]
    plain = len(active) == 1 and active[0] not in self.lora_variant and (      # no DoRA
        self.lora_B[active[0]].bias is None)
    return active[0] if plain and not (self.disable_adapters or self.merged) else None

@contextlib.contextmanager
def adapters_cast_once(net):
    """Within `with` no weight changes, and there is no autograd: adapters are looked up and cast
    once, not in every call. Saves 4 of 10 operators of a call (bench.py operators). Compiled layers
    are left alone: their casts are fused, and another forward would compile them again."""
    plain = [module for module in net.modules() if not getattr(net, "compiled", False)
             and getattr(module.forward, "__func__", None) is adapted and lone_adapter(module)]
    for module in plain:
        name = lone_adapter(module)
        weights = functools.cache(functools.partial(transposed, module, name))
        module.forward = functools.partial(without_casts, module.base_layer.forward, weights,
                                           module.scaling[name])
    try:
        with torch.no_grad():
            yield
    finally:
        for module in plain:
            module.forward = types.MethodType(adapted, module)

def transposed(module, name: str, *dtypes) -> list:
    """A and B of an adapter."""
    parts = zip((module.lora_A, module.lora_B), dtypes)
    return [part[name].weight.to(dtype).t() for part, dtype in parts]

def without_casts(base, weights, scaling: float, x):
    """As adapted; in two dimensions, where a product is one operator."""
    rows = x.flatten(0, -2)
    y = base(rows)
    A, B = weights(x.dtype, y.dtype)
    return y.addmm_(torch.mm(rows, A), B, alpha=scaling).view(*x.shape[:-1], y.shape[-1])

def normed(self, x):
    """What the class computes."""
    return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

def add_adapter(model, rank: int, alpha: float, seed: int, name: str = "default"):
    """LoRA on all linear layers, float32, at first without effect; a second set if there is one."""
    import peft
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=ALL_LINEAR, lora_dropout=0.0,
                             task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)         # peft uses an old name
        torch.manual_seed(seed)                                # it draws from the global generator
        if hasattr(model, "peft_config"):
            return model.add_adapter(name, config)
        return peft.get_peft_model(model, config, adapter_name=name)

def load_adapter(model, about: Checkpoint, trainable: bool):
    """A saved adapter on its base; one that was trained on the published class is renamed, as the
    weights of the base are. Raises BadInput if a weight of it finds no place."""
    import peft
    from safetensors import safe_open
    folder, keys = about.adapter, about.family.keys
    path, config = folder / "adapter_model.safetensors", None
    with refusing(f"--model {folder}: adapter"):
        if not path.is_file():
            raise FileNotFoundError("there is no adapter_model.safetensors")
        with safe_open(path, "pt") as f:
            published = list(f.keys())
        prefix = "base_model.model."
        stock = [prefix + stock_name(name.removeprefix(prefix), keys) for name in published]
        if stock != published:
            config = on_stock_class(peft.PeftConfig.from_pretrained(folder), stock)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable,
                                                   config=config, key_mapping=keys or None)
        if getattr(model.active_peft_config, "alora_invocation_tokens", None):
            raise ValueError("an adapter that acts behind its own tokens alone is not supported")
        head = model.get_output_embeddings()
        if hasattr(head, "lora_A"):                            # Policy.logits reads its weight
            if trainable:
                raise ValueError("an adapter on the output head is not trained here: --merge first")
            head.merge()
        left = set(stock) ^ set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
        if left:
            raise ValueError(f"weights do not fit: {sorted(left)[:3]}")
        return model

def on_stock_class(config, stock: list[str]):
    """adapter_config.json of an adapter trained on the published class: its modules are those that
    it has weights for, by their stock names. Raises ValueError for what names other modules."""
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters",
                  "trainable_token_indices"):
        if getattr(config, field, None):
            raise ValueError(f"its weights have the names of the published class, and its {field} "
                             "cannot be renamed: merge it there, and give the merged checkpoint")
    config.target_modules = sorted({name.removeprefix("base_model.model.").partition(".lora_")[0]
                                    for name in stock})
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    return config

def adapter_shape(folder: Path) -> dict:
    """lora_rank and lora_alpha of an adapter directory. Raises BadInput."""
    known = read_json(folder / "adapter_config.json")
    rank, alpha = known.get("r"), known.get("lora_alpha")
    need(type(rank) is int and rank > 0 and type(alpha) in (int, float) and alpha > 0,
         f"{folder / 'adapter_config.json'} has r {rank!r}, lora_alpha {alpha!r}")
    return {"lora_rank": rank, "lora_alpha": float(alpha)}
