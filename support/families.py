"""The families: what config.json says of a published checkpoint, and the stock class it becomes.

    model_type  published as            stock class       what differs
    llada       LLaDA-8B, LLaDA-1.5     LlamaForCausalLM  weights renamed, also those of adapters
    illada      iLLaDA-8B               LlamaForCausalLM  grouped keys, tied head; its config.json
                                                          is inferred from its code
    Dream       Dream-v0, DiffuCoder    Qwen2ForCausalLM  logits stand one position to the left
    sdar        SDAR, TraDo             Qwen3ForCausalLM  block-causal; --model-block if config.json
                                                          has no block_size
    a2d-qwen3   dllm-hub's Qwen3        Qwen3ForCausalLM  prompts with enable_thinking=false;
                diffusion models                          --model-block 32 for bd3lm
    a2d-qwen2   dllm-hub's Qwen2.5-     Qwen2ForCausalLM  the same blocks
                Coder diffusion models

No remote code runs, and every weight must find its place. Log-probs equal a forward written in
plain PyTorch from the published names to 1e-5 (tests/checkpoints.py)."""
import re
from pathlib import Path
from typing import NamedTuple

from support.files import need, read_json, refusing

class Family(NamedTuple):
    """How the checkpoints of one model_type become a stock class of transformers."""
    stock: str                         # Llama: LlamaForCausalLM, LlamaConfig
    fields: dict                       # field of the stock config -> its names in config.json
    fixed: dict                        # what config.json must say, where it says anything but null
    keys: dict = {}                    # names of weights: regular expression -> stock
    shift: bool = False                # the logits of position j stand at j - 1
    blocks: bool | None = False        # attention is block-causal; None: if there is a block_size
    template: dict = {}                # arguments that its chat template is published with

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
FAMILIES = {                           # model_type of config.json; llama: made here
    "llada": Family("Llama", LLADA_FIELDS, LLADA_FIXED, LLADA_KEYS),   # LLaDA-8B, LLaDA-1.5
    "Dream": Family("Qwen2", QWEN_FIELDS, {**QWEN_FIXED, "attention_bias": True}, shift=True),
    "sdar": Family("Qwen3", QWEN3_FIELDS, QWEN_FIXED, blocks=True),    # SDAR, TraDo
    "illada": Family("Llama", QWEN_FIELDS, {**QWEN_FIXED, "mlp_bias": False,       # iLLaDA-8B
                                            "layer_norm_eps": None}),
    "a2d-qwen3": Family("Qwen3", QWEN3_FIELDS, QWEN_FIXED, blocks=None,            # dllm-hub
                        template={"enable_thinking": False}),
    "a2d-qwen2": Family("Qwen2", QWEN_FIELDS, {**QWEN_FIXED, "attention_bias": True}, blocks=None),
    "llama": Family("Llama", QWEN_FIELDS, {"is_causal": False, **QWEN_FIXED}, blocks=None)}

class Checkpoint(NamedTuple):
    """What config.json says, and where the weights are."""
    folder: Path                       # with the weights, or only config.json so far
    family: Family
    config: object                     # of the stock class
    mask_id: int | None                # None: the tokenizer knows
    block: int                         # of the attention, 0: every token sees every token
    adapter: Path | None = None        # the directory of an adapter on it
    base: str = ""                     # the name of the base model, for adapters

def read_checkpoint(folder: Path, block: int = 0, name: str = "") -> Checkpoint:
    """config.json of a directory -> what is known without weights; `block` overrides the file's.
    Raises BadInput: what was found and what is supported."""
    import transformers                # seconds to import: after the checks
    where, path = f"--model {name or folder}", folder / "config.json"
    need(path.is_file(), f"{where}: no config.json there; give 'tiny', a checkpoint directory, or "
         "the hub's owner/name")
    known = read_json(path)
    kind, mask_id = known.get("model_type"), known.get("mask_token_id")
    family, found = FAMILIES.get(kind) if isinstance(kind, str) else None, f"model_type {kind!r}"
    if isinstance(known.get("architectures"), list):
        found += f" ({', '.join(map(str, known['architectures']))})"
    need(family and (kind != "llama" or mask_id is not None),
         f"{where}: {found} with mask_token_id {mask_id!r}; supported are masked diffusion models "
         f"of type {', '.join(FAMILIES)}")
    experts = [k for k, v in known.items() if "expert" in k and type(v) is int and v > 1]
    need(not experts and "moe" not in found.lower(),
         f"{where}: {found} is a mixture of experts, only dense models are supported")
    if no_scaling(known.get("rope_scaling")):
        known = {**known, "rope_scaling": None}
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
        need(tied or type(value) in (int, float) and 0 < value < float("inf"),
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
    block = block or block_of(known, family, folder, name)
    return Checkpoint(folder, family, config, mask_id, block)

def no_scaling(scaling) -> bool:
    """Whether a rope_scaling says in words that there is none."""
    return isinstance(scaling, dict) and scaling.get("factor", 1) == 1 and scaling.get(
        "rope_type", scaling.get("type")) == "default"

def block_of(known: dict, family: Family, folder: Path, name: str) -> int:
    """Tokens in a block of the attention as config.json has it; 0: every token sees every token.
    Raises BadInput where it does not say, or its family has no blocks."""
    where, size = f"--model {name or folder}", known.get("block_size")
    need(size is None or type(size) is int and size >= 0, f"{where}: block_size {size!r}")
    need(not size or family.blocks is not False,
         f"{where}: block_size {size} in a {known['model_type']} model, which attends in both "
         f"directions; --model-block {size} if this one attends in blocks")
    named = any(re.search(r"bd3lm[^/]*(/snapshots/[^/]*)?/?$", str(at), re.I)      # dllm-hub's are
                for at in (folder, name))
    need(size or not family.blocks and not (named and family.blocks is None),
         f"{where}: a block-causal model whose config.json does not give block_size: give "
         "--model-block (SDAR and TraDo: 4, bd3lm: 32)")
    return size or 0

