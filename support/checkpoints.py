"""Published checkpoints in stock classes of transformers, no remote code; adapters."""
import functools
import os
import re
import types
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from support.files import need, read_json, refusing

class Family(NamedTuple):
    """How the checkpoints of one model_type become a stock class of transformers."""
    stock: str                         # Llama: LlamaForCausalLM, LlamaConfig
    fields: dict                       # field of the stock config -> its names in config.json
    fixed: dict                        # what config.json must say, where it says anything but null
    keys: dict = {}                    # names of weights: regular expression -> stock
    shift: bool = False                # the logits of position j stand at j - 1
    blocks: bool = False               # attention is block-causal

LLADA_FIELDS = {
    "vocab_size": ("embedding_size", "vocab_size"), "hidden_size": ("d_model",),
    "intermediate_size": ("mlp_hidden_size",), "num_hidden_layers": ("n_layers",),
    "num_attention_heads": ("n_heads",), "num_key_value_heads": ("n_kv_heads", "n_heads"),
    "rms_norm_eps": ("rms_norm_eps",), "rope_theta": ("rope_theta",),
    "max_position_embeddings": ("max_sequence_length",), "tie_word_embeddings": ("weight_tying",)}
LLADA_FIXED = {
    "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True,
    "block_group_size": 1, **dict.fromkeys((
        "include_bias", "include_qkv_bias", "bias_for_layer_norm", "attention_layer_norm",
        "scale_logits", "input_emb_norm", "alibi", "multi_query_attention"), False)}
LLADA_KEYS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.", r"^model\.transformer\.ff_out\.": "lm_head.",
    **{rf"^model\.transformer\.blocks\.(\d+)\.{published}\.": rf"model.layers.\1.{stock}."
       for published, stock in (
           ("q_proj", "self_attn.q_proj"), ("k_proj", "self_attn.k_proj"),
           ("v_proj", "self_attn.v_proj"), ("attn_out", "self_attn.o_proj"),
           ("ff_proj", "mlp.gate_proj"), ("up_proj", "mlp.up_proj"), ("ff_out", "mlp.down_proj"),
           ("attn_norm", "input_layernorm"), ("ff_norm", "post_attention_layernorm"))}}
QWEN_FIELDS = {name: (name,) for name in LLADA_FIELDS}
QWEN3_FIELDS = {**QWEN_FIELDS, "head_dim": ("head_dim",)}
QWEN_FIXED = {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False,
              "use_mrope": False, "attention_bias": False}
FAMILIES = {                           # model_type of config.json
    "llada": Family("Llama", LLADA_FIELDS, LLADA_FIXED, LLADA_KEYS),   # LLaDA-8B, LLaDA-1.5
    "Dream": Family("Qwen2", QWEN_FIELDS, {**QWEN_FIXED, "attention_bias": True}, shift=True),
    "sdar": Family("Qwen3", QWEN3_FIELDS, QWEN_FIXED, blocks=True),    # SDAR, TraDo
    "a2d-qwen3": Family("Qwen3", QWEN3_FIELDS, QWEN_FIXED),            # dllm-hub's Qwen3
    "llama": Family("Llama", QWEN_FIELDS, {"is_causal": False, **QWEN_FIXED})}     # made here
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "*.py"]

class Checkpoint(NamedTuple):
    """What config.json says, and where the weights are."""
    folder: Path                       # with the weights, or only config.json so far
    family: Family
    config: object                     # of the stock class
    mask_id: int | None                # None: the tokenizer knows
    block: int                         # of the attention, 0: every token sees every token
    adapter: Path | None = None        # the directory of an adapter on it
    base: str = ""                     # the name of the base model, for adapters

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
         f"--model {model}: no such directory; give 'tiny', a checkpoint directory, or the hub's "
         "owner/name")

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

# --------------------------------------------------------------------------- what it says it is
def read_checkpoint(folder: Path, block: int = 0, name: str = "") -> Checkpoint:
    """config.json of a directory -> what is known without weights; `block` overrides the file's.
    Raises BadInput: what was found and what is supported."""
    import transformers                # seconds to import: after the checks
    where, path = f"--model {name or folder}", folder / "config.json"
    need(path.is_file(), f"{where}: no config.json there; give 'tiny', a checkpoint directory, or "
         "the hub's owner/name")
    known = read_json(path)
    kind, mask_id = known.get("model_type"), known.get("mask_token_id")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    need(family and (kind != "llama" or mask_id is not None),
         f"{where}: model_type {kind!r} with mask_token_id {mask_id!r}; supported are masked "
         f"diffusion models of type {', '.join(FAMILIES)}")
    rope = known.get("rope_parameters")                        # as transformers 5 writes it
    known = {**(rope if isinstance(rope, dict) else {}), **known}
    for field, value in {**family.fixed, "rope_type": "default"}.items():
        found = known.get(field)
        need(found in (None, value),
             f"{where}: {field} {found!r} is not supported, only {value!r}")
    fields = {}
    for field, names in family.fields.items():
        value = next((known[n] for n in names if known.get(n) is not None), None)
        tied = field == "tie_word_embeddings"
        need(tied or type(value) in (int, float) and value > 0,
             f"{where}: its config.json has {' or '.join(names)} {value!r}")
        fields[field] = bool(value) if tied else value
    V = fields["vocab_size"]
    need(mask_id is None or type(mask_id) is int and 0 <= mask_id < V,
         f"{where}: mask_token_id {mask_id!r} in a vocabulary of {V}")
    rope = {"rope_type": "default", "rope_theta": float(fields.pop("rope_theta"))}
    with refusing(where):              # a pad_token_id would take the gradient of its row away
        config = getattr(transformers, family.stock + "Config")(
            **fields, rope_parameters=rope, pad_token_id=None, bos_token_id=None,
            eos_token_id=None, use_cache=False)
    config.is_causal, config.mask_token_id = False, mask_id
    if family.blocks or kind == "llama":
        block = block or known.get("block_size", 0 if kind == "llama" else None)
    need(type(block) is int and block >= family.blocks,
         f"{where}: a block-causal model whose config.json does not give block_size: give "
         "--model-block (SDAR and TraDo: 4)")
    return Checkpoint(folder, family, config, mask_id, block)

def load_tokenizer(folder: Path):
    """By its own files alone: published classes need remote code. Raises BadInput."""
    import transformers
    kind = transformers.PreTrainedTokenizerFast
    with refusing(f"--model {folder}: its tokenizer cannot be read"):
        if not (folder / "tokenizer.json").is_file():
            kind = transformers.Qwen2Tokenizer                 # Dream's
            if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
                raise FileNotFoundError("there is neither tokenizer.json nor vocab.json with "
                                        "merges.txt")
        return kind.from_pretrained(folder, trust_remote_code=False)

def encode_prompts(tokenizer, prompts: list[tuple[str, str]]) -> tuple:
    """(user message, what the completion is made to begin with), through the tokenizer's chat
    template -> ids and mask (N, P), left padded."""
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": message}],
                                           add_generation_prompt=True, tokenize=False) + begin
             for message, begin in prompts]
    out = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left",
                    return_tensors="pt")
    return out["input_ids"], out["attention_mask"]

def end_of_turn(tokenizer) -> int | None:
    """The special token, other than EOS, that the chat template writes after an answer."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}, {
        "role": "assistant", "content": "ANSWER"}], tokenize=False)
    after = tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False)["input_ids"][:1]
    special = after and after[0] in tokenizer.added_tokens_decoder
    return after[0] if special and after[0] != tokenizer.eos_token_id else None

def open_checkpoint(model: str, block: int = 0, weights: bool = False):
    """What is known of a model without its weights -> Checkpoint, tokenizer. Raises BadInput."""
    folder, adapter, base = find_folder(model, weights), None, model
    if (folder / "adapter_config.json").is_file():
        adapter, base = folder, base_of(folder)
        folder = find_folder(base, weights)
    about = read_checkpoint(folder, block, model)
    tokenizer = load_tokenizer(adapter or folder)
    named = [i for token, i in tokenizer.get_added_vocab().items() if "mask" in token.lower()]
    known = (about.mask_id, tokenizer.mask_token_id, *(named if len(named) == 1 else ()))
    mask_id = next((i for i in known if i is not None), None)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token   # masked, whatever it is
    with refusing(f"--model {model}"):                         # a broken template
        if encode_prompts(tokenizer, [("1", "")])[0].numel() == 0:
            raise ValueError("its chat template makes nothing of a message")
        end_of_turn(tokenizer)
    for token, name in ((mask_id, "mask"), (tokenizer.eos_token_id, "end-of-sequence")):
        need(token is not None and token < about.config.vocab_size,
             f"--model {model}: neither its config.json nor its tokenizer gives a {name} token of "
             "its vocabulary")
    need(mask_id != tokenizer.eos_token_id,
         f"--model {model}: its mask token is its end-of-sequence token, {mask_id}")
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

def head_is_tied(about: Checkpoint) -> bool:
    """False if the files hold output weights that differ from the embeddings (from_pretrained would
    take no notice)."""
    from safetensors import safe_open
    found = {}
    for file in sorted(about.folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                stock = next((re.sub(old, new, name) for old, new in about.family.keys.items()
                              if re.match(old, name)), name)
                if stock in ("lm_head.weight", "model.embed_tokens.weight"):
                    found[stock] = f.get_tensor(name)
    return len(found) < 2 or torch.equal(*found.values())

def load_network(model: str, device: str, cfg, train: bool) -> tuple:
    """A directory or the hub's owner/name -> network, tokenizer, Checkpoint. To train: with
    adapters if cfg.lora_rank, else all of it in float32; what is not trained is bfloat16 on a GPU.
    Raises BadInput unless it is a masked diffusion model of FAMILIES, every weight found."""
    about, tokenizer = open_checkpoint(model, cfg.model_block, weights=True)
    full = train and not cfg.lora_rank
    half = torch.device(device).type == "cuda" and not full
    net = load_model(about, torch.bfloat16 if half else torch.float32, cfg.quantize, device)
    if half and not about.config.tie_word_embeddings:
        net.get_output_embeddings().float()                    # once, not in every call of logits
    if about.adapter:
        net = load_adapter(net, about.adapter, trainable=train and not full)
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
    active = [name for name in self.active_adapters if name in self.lora_A]
    if self.disable_adapters or self.merged or len(active) != 1:
        return type(self).forward(self, x)
    A, B = (part[active[0]].weight.to(x.dtype) for part in (self.lora_A, self.lora_B))
    y, low = self.base_layer(x), torch.nn.functional.linear(x, A)
    return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), B.t(),
                       alpha=self.scaling[active[0]]).view_as(y)

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

def load_adapter(model, folder: Path, trainable: bool):
    """A saved adapter on its base. Raises BadInput if a weight of it finds no place."""
    import peft
    from safetensors import safe_open
    path = folder / "adapter_model.safetensors"
    with refusing(f"--model {folder}: adapter"):
        if not path.is_file():
            raise FileNotFoundError("there is no adapter_model.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        with safe_open(path, "pt") as f:
            left = set(f.keys()) ^ set(peft.get_peft_model_state_dict(
                model, save_embedding_layers=False))
        if left:
            raise ValueError(f"weights do not fit: {sorted(left)[:3]}")
        return model

def adapter_shape(folder: Path) -> dict:
    """lora_rank and lora_alpha of an adapter directory. Raises BadInput."""
    known = read_json(folder / "adapter_config.json")
    rank, alpha = known.get("r"), known.get("lora_alpha")
    need(type(rank) is int and rank > 0 and type(alpha) in (int, float) and alpha > 0,
         f"{folder / 'adapter_config.json'} has r {rank!r}, lora_alpha {alpha!r}")
    return {"lora_rank": rank, "lora_alpha": float(alpha)}
