"""Writes small random checkpoints in the layout of the published ones (names of weights,
config.json, shards, tokenizer files), and computes their logits in plain PyTorch from the published
names. Shares no code with agrpo.py or transformers' models.

    python tests/checkpoints.py llada DIR [gsm8k_train.jsonl]      writes one, of 0.2 M parameters

With the file it learns a tokenizer and the format from it.
"""
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

LLADA_CHAT = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
QWEN_CHAT = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN3_CHAT = QWEN_CHAT.removesuffix("{% endif %}") + (
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
# mask, end, start, and the rest of the special tokens; of iLLaDA's only the mask is known here
SPECIAL = {"llada": ("<|mdm_mask|>", "<|endoftext|>", "<|startoftext|>", "<|start_header_id|>",
                     "<|end_header_id|>", "<|eot_id|>"),
           "Dream": ("<|mask|>", "<|endoftext|>", "<|beginoftext|>", "<|im_start|>", "<|im_end|>"),
           "sdar": ("<|MASK|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
           "illada": ("<[MASK]>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
           "a2d-qwen3": ("<|mask|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
           "a2d-qwen2": ("<|mask|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")}
A2D, BIASED = ("a2d-qwen3", "a2d-qwen2"), ("Dream", "a2d-qwen2")      # biased: q, k and v
# published names, of Qwen's kind and of LLaDA's: of a layer attention's norm, query, key, value,
# output, the MLP's norm, gate, up, down; embedding, last norm, head; config.json's numbers
LAYERS = "model.layers", "model.transformer.blocks"
LAYER = (("input_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"), "post_attention_layernorm",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
         ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj",
          "ff_out"))
ENDS = (("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        tuple(f"model.transformer.{x}.weight" for x in ("wte", "ln_f", "ff_out")))
SHAPE = (("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
         ("d_model", "n_layers", "n_heads", "n_kv_heads"))


def write_tokenizer(folder, family, corpus=(), size=300):
    """Byte-level BPE with the family's special tokens after its vocabulary; the files that the
    family publishes. -> (mask_id, eos_id)"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    special, alphabet = SPECIAL[family], sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(corpus or ["how many apples are left? #### 72"] * 2, trainer)
    mask, end, *rest = special
    named = {"eos_token": end, "pad_token": end}
    if family not in A2D:
        named["bos_token"] = rest[0]
    if family in ("llada", "illada"):                  # the tokenizer does not say which it is
        rest.append(mask)
    else:
        named["mask_token"] = mask
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=rest,
                                        **named)
    tokenizer.chat_template = {"llada": LLADA_CHAT, "a2d-qwen3": QWEN3_CHAT,
                               "sdar": QWEN3_CHAT}.get(family, QWEN_CHAT)
    ids = tokenizer.convert_tokens_to_ids([mask, end])
    tokenizer.save_pretrained(folder)
    if family == "Dream":              # vocab.json, merges.txt, a class that transformers lacks
        core.model.save(str(folder))
        (folder / "tokenizer.json").unlink()
        saved = json.loads((folder / "tokenizer_config.json").read_text())
        plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        decoder = {str(i): {"content": token.content, "special": True, **plain}
                   for i, token in tokenizer.added_tokens_decoder.items()}
        saved |= {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": decoder,
                  "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    return ids


def config_of(family, V, mask_id, eos_id, h, layers, heads, kv, inner, length, tied):
    """config.json, as published."""
    if family == "llada":
        return {
            "activation_type": "silu", "alibi": False, "architectures": ["LLaDAModelLM"],
            "attention_dropout": 0.0, "attention_layer_norm": False,
            "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig",
                         "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
            "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama",
            "d_model": h, "embedding_size": V, "eos_token_id": eos_id, "include_bias": False,
            "include_qkv_bias": False, "init_device": "meta", "input_emb_norm": False,
            "layer_norm_type": "rms", "mask_token_id": mask_id, "max_sequence_length": length,
            "mlp_hidden_size": inner, "mlp_ratio": 4, "model_type": "llada",
            "multi_query_attention": None, "n_heads": heads, "n_kv_heads": kv, "n_layers": layers,
            "pad_token_id": eos_id, "rms_norm_eps": 1e-5, "rope": True,
            "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
            "torch_dtype": "float32", "use_cache": False, "vocab_size": V, "weight_tying": tied}
    name = {"Dream": "DreamModel", "sdar": "SDARForCausalLM", "illada": "ILLaDAForCausalLM",
            "a2d-qwen3": "A2DQwen3LMHeadModel", "a2d-qwen2": "A2DQwen2LMHeadModel"}
    config = {
        "architectures": [name[family]], "auto_map": {"AutoModel": f"modeling.{name[family]}"},
        "attention_dropout": 0.0, "bos_token_id": eos_id, "eos_token_id": eos_id,
        "hidden_act": "silu", "hidden_size": h, "initializer_range": 0.02,
        "intermediate_size": inner, "max_position_embeddings": length,
        "max_window_layers": layers, "model_type": family, "num_attention_heads": heads,
        "num_hidden_layers": layers, "num_key_value_heads": kv, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": tied, "torch_dtype": "float32", "use_cache": False,
        "use_sliding_window": False, "vocab_size": V}
    if family == "Dream":
        return config | {"mask_token_id": mask_id, "pad_token_id": eos_id, "use_mrope": False}
    if family == "illada":
        return config | {"attention_bias": False, "mlp_bias": False, "layer_norm_eps": None,
                         "resid_pdrop": 0.0, "pad_token_id": eos_id}
    if family == "a2d-qwen2":
        return config | {"layer_types": ["full_attention"] * layers, "use_mrope": False}
    config |= {"attention_bias": False, "head_dim": 2 * h // heads}    # need not add up to h
    if family == "sdar":
        config |= {"attn_implementation": "flex_attention", "block_size": 4, "debug": False,
                   "fuse_cross_entropy": True}
    return config


def write_checkpoint(folder, family, seed=0, h=32, layers=2, heads=4, kv=2, inner=48, length=2048,
                     tied=None, corpus=(), size=300, shards=2, extra=0, block=0):
    """A directory as the family publishes it, random weights from the seed; `extra` embedding rows
    beyond the tokenizer; `block`: a block_size in config.json. -> weights by published name,
    config."""
    folder, llada = Path(folder), family == "llada"
    folder.mkdir(parents=True)
    mask_id, eos_id = write_tokenizer(folder, family, corpus, size)
    V, tied = max(mask_id, eos_id) + 10 + extra, (
        family in (*A2D, "illada")) if tied is None else tied
    config = config_of(family, V, mask_id, eos_id, h, layers, heads, kv, inner, length, tied)
    config |= {"block_size": block} if block else {}
    g, d = torch.Generator().manual_seed(seed), config.get("head_dim", h // heads)

    def normal(*shape):
        return torch.randn(*shape, generator=g) / math.sqrt(shape[-1])

    def scale(n):
        return 1 + 0.2 * torch.randn(n, generator=g)
    embed, final, head = ENDS[llada]
    # tied: logits of standard deviation 2
    weights = {embed: torch.randn(V, h, generator=g) * (2 / math.sqrt(h) if tied else 1)}
    shapes = ((h,), (heads * d, h), (kv * d, h), (kv * d, h), (h, heads * d), (h,), (inner, h),
              (inner, h), (h, inner))
    for i in range(layers):
        for name, shape in zip(LAYER[llada], shapes):
            weight = normal(*shape) if len(shape) == 2 else scale(h)
            weights[f"{LAYERS[llada]}.{i}.{name}.weight"] = weight
        at = f"{LAYERS[llada]}.{i}.self_attn"
        if family in BIASED:
            for name, n in (("q_proj", heads), ("k_proj", kv), ("v_proj", kv)):
                weights[f"{at}.{name}.bias"] = 0.3 * torch.randn(n * d, generator=g)
        if family in ("sdar", "a2d-qwen3"):
            weights |= {f"{at}.{name}.weight": scale(d) for name in ("q_norm", "k_norm")}
    weights[final] = scale(h)
    if not tied:
        weights[head] = 2 * normal(V, h)
    (folder / "config.json").write_text(json.dumps(config))
    where = {name: f"model-{1 + i * shards // len(weights):05d}-of-{shards:05d}.safetensors"
             for i, name in enumerate(weights)}
    for file in set(where.values()):
        shard = {name: weight for name, weight in weights.items() if where[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights, config


def forward(weights, config, ids, block=0):
    """The published architecture on one sequence without padding: ids (S,) -> logits (S, V), those
    of position j at j, in the dtype of the weights. RMSNorm, rotary positions from 0, grouped
    attention over all tokens (or, with block, over the own block and those before), SwiGLU."""
    llada, shifted = config["model_type"] == "llada", config["model_type"] == "Dream"
    h, layers, heads, kv = (config[name] for name in SHAPE[llada])
    d, S, eps = config.get("head_dim", h // heads), len(ids), config["rms_norm_eps"]
    embed, final, head = ENDS[llada]

    def norm(x, w):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * w

    def rotate(x):                     # (heads, S, d): (j, j + d/2) by position / theta^(2j/d)
        wave = config["rope_theta"] ** (torch.arange(0, d, 2, dtype=x.dtype) / d)
        angle = torch.arange(S, dtype=x.dtype)[:, None] / wave
        a, b = x[..., :d // 2], x[..., d // 2:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    x, group = weights[embed][ids], torch.arange(S) // (block or S)
    allowed = group[:, None] >= group[None]
    for i in range(layers):
        at = f"{LAYERS[llada]}.{i}"
        norm1, wq, wk, wv, wo, norm2, gate, up, down = (
            weights[f"{at}.{name}.weight"] for name in LAYER[llada])

        def heads_of(y, w, name, n, at=at):
            z = y @ w.T + weights.get(f"{at}.self_attn.{name}_proj.bias", 0)
            z, scale = z.view(S, n, d), weights.get(f"{at}.self_attn.{name}_norm.weight")
            return (z if scale is None else norm(z, scale)).transpose(0, 1)    # (n, S, d)
        y = norm(x, norm1)
        q, k = rotate(heads_of(y, wq, "q", heads)), rotate(heads_of(y, wk, "k", kv))
        k, v = (z.repeat_interleave(heads // kv, 0) for z in (k, heads_of(y, wv, "v", kv)))
        scores = (q @ k.transpose(1, 2) / math.sqrt(d)).masked_fill(~allowed, -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(S, heads * d) @ wo.T
        y = norm(x, norm2)
        gated = y @ gate.T
        x = x + (gated * torch.sigmoid(gated) * (y @ up.T)) @ down.T
    logits = norm(x, weights[final]) @ weights.get(head, weights[embed]).T
    return torch.cat([logits[:1], logits[:-1]]) if shifted else logits


def teach(folder, data, steps=400, length=32, seed=0):
    """SFT on GSM8K's questions: one answer in two is in the asked format, the rest is bare; the
    number is mostly wrong. Leaves a model whose format reward has somewhere to go. Written back in
    the layout it came in."""
    from methods.models import Settings, open_policy
    from methods.sft import sft_loss
    from rewards import prompt_for
    from support.checkpoints import encode_prompts
    from support.saving import save_weights
    from support.data import load_examples
    cfg = Settings(task="gsm8k", model=str(folder), lr=2e-3, device="cpu")
    policy, tokenizer = open_policy(cfg, train=True)
    examples = load_examples("gsm8k", 0, seed, "train", data)
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=2e-3)
    for step in range(steps):
        chosen = [examples[i] for i in torch.randint(len(examples), (16,), generator=g)]
        answers = torch.full((16, length), policy.eos_id)
        for row, example in enumerate(chosen):
            number = example["answer"].split()[-1]
            asked = f"<think>\nso\n</think>\n<answer>\\boxed{{{number}}}</answer>"
            text = asked if torch.rand((), generator=g) < 0.5 else f"so {number}"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [policy.turn_id]
            answers[row, :len(ids)] = torch.tensor(ids)[:length]
        prompt, mask = encode_prompts(tokenizer, [prompt_for("gsm8k", ex, "agrpo")
                                                  for ex in chosen])
        loss = sft_loss(policy, prompt, mask, answers, g)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"SFT step {step}: loss {float(loss.detach()):.3f}", flush=True)
    save_weights(policy.model, tokenizer, Path(f"{folder}.taught"), policy.source)
    shutil.rmtree(folder)
    Path(f"{folder}.taught").rename(folder)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    family, folder, *data = sys.argv[1:] if len(sys.argv) > 2 else ("", "")
    if family not in SPECIAL or Path(folder).exists() or not all(Path(p).is_file() for p in data):
        sys.exit(f"usage: python tests/checkpoints.py {'|'.join(SPECIAL)} NEW_DIR "
                 "[gsm8k_train.jsonl, a file that is there]")
    if data:                                                   # before anything is written
        from rewards import BadInput
        from support.data import from_file
        try:
            from_file("gsm8k", data[0])
        except BadInput as error:
            sys.exit(f"{error}: the file must be GSM8K's, lines with question and answer")
    corpus = Path(data[0]).read_text(encoding="utf-8").splitlines()[:2000] if data else ()
    write_checkpoint(folder, family, corpus=corpus, size=1000 if data else 300, h=64, inner=128)
    if data:
        teach(folder, data[0])
    print(f"wrote {folder}")
