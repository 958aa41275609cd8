"""Writes small random checkpoints in the layout of the published ones (names of weights, config.json, shards, tokenizer files), and
computes their logits in plain PyTorch from the published names. Shares no code with agrpo.py or transformers' models.
To write one, of 0.2 M parameters: python tests/checkpoints.py llada DIR [gsm8k_train.jsonl to learn a tokenizer and the format from]"""
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

LLADA_CHAT = ("{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' %}"
              "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
QWEN_CHAT = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# mask, end, start, and the rest of the special tokens
SPECIAL = {"llada": ("<|mdm_mask|>", "<|endoftext|>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
           "Dream": ("<|mask|>", "<|endoftext|>", "<|beginoftext|>", "<|im_start|>", "<|im_end|>"),
           "sdar": ("<|MASK|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
           "a2d-qwen3": ("<|mask|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")}


def write_tokenizer(folder, family, corpus=(), size=300):
    """Byte-level BPE with the family's special tokens after its vocabulary; the files that the family publishes. -> (mask_id, eos_id)"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    special, alphabet = SPECIAL[family], sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(corpus or ["how many apples are left? #### 72"] * 2,
                             trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[1], pad_token=special[1],
                                        **({"bos_token": special[2]} if family != "a2d-qwen3" else {}),
                                        **({} if family == "llada" else {"mask_token": special[0]}),     # LLaDA's tokenizer does not say which it is
                                        additional_special_tokens=list(special[2:]) + [special[0]] * (family == "llada"))
    tokenizer.chat_template = LLADA_CHAT if family == "llada" else QWEN_CHAT
    ids = tokenizer.convert_tokens_to_ids(list(special[:2]))
    tokenizer.save_pretrained(folder)
    if family == "Dream":                                            # vocab.json and merges.txt only, and a class that is not in transformers
        core.model.save(str(folder))
        (folder / "tokenizer.json").unlink()
        saved = json.loads((folder / "tokenizer_config.json").read_text())
        decoder = {str(i): {"content": t.content, "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
                   for i, t in tokenizer.added_tokens_decoder.items()}
        saved |= {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                  "added_tokens_decoder": decoder}
        (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    return ids


def config_of(family, V, mask_id, eos_id, h, layers, heads, kv, inner, length, tied):
    if family == "llada":
        return {"activation_type": "silu", "alibi": False, "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0, "attention_layer_norm": False,
                "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
                "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": h, "embedding_size": V, "eos_token_id": eos_id,
                "include_bias": False, "include_qkv_bias": False, "init_device": "meta", "input_emb_norm": False, "layer_norm_type": "rms",
                "mask_token_id": mask_id, "max_sequence_length": length, "mlp_hidden_size": inner, "mlp_ratio": 4, "model_type": "llada",
                "multi_query_attention": None, "n_heads": heads, "n_kv_heads": kv, "n_layers": layers, "pad_token_id": eos_id, "rms_norm_eps": 1e-5,
                "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "torch_dtype": "float32", "use_cache": False,
                "vocab_size": V, "weight_tying": tied}
    name = {"Dream": "DreamModel", "sdar": "SDARForCausalLM", "a2d-qwen3": "A2DQwen3LMHeadModel"}[family]
    config = {"architectures": [name], "auto_map": {"AutoModel": f"modeling.{name}"}, "attention_dropout": 0.0, "bos_token_id": eos_id,
              "eos_token_id": eos_id, "hidden_act": "silu", "hidden_size": h, "initializer_range": 0.02, "intermediate_size": inner,
              "max_position_embeddings": length, "max_window_layers": layers, "model_type": family, "num_attention_heads": heads,
              "num_hidden_layers": layers, "num_key_value_heads": kv, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0,
              "sliding_window": None, "tie_word_embeddings": tied, "torch_dtype": "float32", "use_cache": False, "use_sliding_window": False,
              "vocab_size": V}
    if family == "Dream":
        return config | {"mask_token_id": mask_id, "pad_token_id": eos_id, "use_mrope": False}
    config |= {"attention_bias": False, "head_dim": 2 * h // heads}                  # Qwen3's heads need not add up to the width
    return config | ({"attn_implementation": "flex_attention", "block_size": 4, "fuse_cross_entropy": True, "debug": False} if family == "sdar" else {})


def write_checkpoint(folder, family, seed=0, h=32, layers=2, heads=4, kv=2, inner=48, length=2048, tied=None, corpus=(), size=300, shards=2, extra=0):
    """A directory as the family publishes it, random weights from the seed; `extra` embedding rows beyond the tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    mask_id, eos_id = write_tokenizer(folder, family, corpus, size)
    V, tied = max(mask_id, eos_id) + 10 + extra, (family == "a2d-qwen3") if tied is None else tied
    config = config_of(family, V, mask_id, eos_id, h, layers, heads, kv, inner, length, tied)
    g, d = torch.Generator().manual_seed(seed), config.get("head_dim", h // heads)

    def normal(*shape):
        return torch.randn(*shape, generator=g) / math.sqrt(shape[-1])
    llada, weights = family == "llada", {}
    embed = torch.randn(V, h, generator=g) * (2 / math.sqrt(h) if tied else 1)      # logits of standard deviation 2
    weights["model.transformer.wte.weight" if llada else "model.embed_tokens.weight"] = embed
    for i in range(layers):
        at = f"model.transformer.blocks.{i}." if llada else f"model.layers.{i}."
        names = (("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out") if llada else
                 ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm",
                  "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
        shapes = ((h,), (heads * d, h), (kv * d, h), (kv * d, h), (h, heads * d), (h,), (inner, h), (inner, h), (h, inner))
        for name, shape in zip(names, shapes):
            weights[f"{at}{name}.weight"] = normal(*shape) if len(shape) == 2 else 1 + 0.2 * torch.randn(*shape, generator=g)
        if family == "Dream":
            weights |= {f"{at}self_attn.{n}.bias": 0.3 * torch.randn(k * d, generator=g) for n, k in (("q_proj", heads), ("k_proj", kv), ("v_proj", kv))}
        if family in ("sdar", "a2d-qwen3"):
            weights |= {f"{at}self_attn.{n}.weight": 1 + 0.2 * torch.randn(d, generator=g) for n in ("q_norm", "k_norm")}
    weights["model.transformer.ln_f.weight" if llada else "model.norm.weight"] = 1 + 0.2 * torch.randn(h, generator=g)
    if not tied:
        weights["model.transformer.ff_out.weight" if llada else "lm_head.weight"] = 2 * normal(V, h)
    (folder / "config.json").write_text(json.dumps(config))
    where = {name: f"model-{1 + i * shards // len(weights):05d}-of-{shards:05d}.safetensors" for i, name in enumerate(weights)}
    for file in set(where.values()):
        save_file({k: v for k, v in weights.items() if where[k] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    return weights, config


def forward(weights, config, ids, block=0):
    """The published architecture on one sequence without padding: ids (S,) -> logits (S, V), those of position j at j, in the dtype of the
    weights. RMSNorm, rotary positions from 0, grouped attention over all tokens (or, with block, over the own block and those before), SwiGLU."""
    llada, shifted = config["model_type"] == "llada", config["model_type"] == "Dream"
    h, layers, heads = (config[k] for k in (("d_model", "n_layers", "n_heads") if llada else ("hidden_size", "num_hidden_layers", "num_attention_heads")))
    kv, eps = config["n_kv_heads" if llada else "num_key_value_heads"], config["rms_norm_eps"]
    d, S = config.get("head_dim", h // heads), len(ids)

    def norm(x, w):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * w

    def rotate(x):                                                   # (heads, S, d): pairs (j, j + d/2) turn by position / theta^(2j/d)
        angle = torch.arange(S, dtype=x.dtype)[:, None] / config["rope_theta"] ** (torch.arange(0, d, 2, dtype=x.dtype) / d)
        a, b = x[..., :d // 2], x[..., d // 2:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    embed = weights["model.transformer.wte.weight" if llada else "model.embed_tokens.weight"]
    x, place = embed[ids], torch.arange(S)
    allowed = place[:, None] // block >= place[None] // block if block else torch.ones(S, S, dtype=torch.bool)
    for i in range(layers):
        def w(theirs, qwen, i=i):
            return weights[f"model.transformer.blocks.{i}.{theirs}.weight" if llada else f"model.layers.{i}.{qwen}.weight"]

        def heads_of(y, name, n, i=i):
            z = y @ w(f"{name}_proj", f"self_attn.{name}_proj").T + weights.get(f"model.layers.{i}.self_attn.{name}_proj.bias", 0)
            z = z.view(S, n, d)
            scale = weights.get(f"model.layers.{i}.self_attn.{name}_norm.weight")
            return (norm(z, scale) if scale is not None else z).transpose(0, 1)      # (n, S, d)
        y = norm(x, w("attn_norm", "input_layernorm"))
        q, k, v = rotate(heads_of(y, "q", heads)), rotate(heads_of(y, "k", kv)), heads_of(y, "v", kv)
        k, v = (z.repeat_interleave(heads // kv, 0) for z in (k, v))
        scores = (q @ k.transpose(1, 2) / math.sqrt(d)).masked_fill(~allowed, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(S, heads * d)
        x = x + mixed @ w("attn_out", "self_attn.o_proj").T
        y = norm(x, w("ff_norm", "post_attention_layernorm"))
        gate, up = y @ w("ff_proj", "mlp.gate_proj").T, y @ w("up_proj", "mlp.up_proj").T
        x = x + (gate * torch.sigmoid(gate) * up) @ w("ff_out", "mlp.down_proj").T
    x = norm(x, weights["model.transformer.ln_f.weight" if llada else "model.norm.weight"])
    logits = x @ weights.get("model.transformer.ff_out.weight" if llada else "lm_head.weight", embed).T
    return torch.cat([logits[:1], logits[:-1]]) if shifted else logits


def teach(folder, data, steps=400, length=32, seed=0):
    """SFT on GSM8K's questions: one answer in two is in the asked format, the rest is bare; the
    number is mostly wrong. Leaves a model whose format reward has somewhere to go. Written back in
    the layout it came in."""
    from methods.models import Settings, open_policy
    from methods.sft import sft_loss
    from rewards import prompt_for
    from support.checkpoints import encode_prompts, save_weights
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
    if len(sys.argv) < 3 or sys.argv[1] not in SPECIAL or Path(sys.argv[2]).exists() or not all(Path(p).is_file() for p in sys.argv[3:]):
        sys.exit(f"usage: python tests/checkpoints.py {'|'.join(SPECIAL)} NEW_DIR [gsm8k_train.jsonl, a file that is there]")
    family, folder, *data = sys.argv[1:]
    write_checkpoint(folder, family, corpus=Path(data[0]).read_text(encoding="utf-8").splitlines()[:2000] if data else (), size=1000 if data else 300,
                     h=64, inner=128)
    if data:
        teach(folder, data[0])
    print(f"wrote {folder}")
