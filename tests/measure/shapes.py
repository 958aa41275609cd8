"""The shapes of published models, as stock configurations."""
import sys
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from methods.models import settle  # noqa: E402
from support import options  # noqa: E402

# vocabulary, width, inner, layers, heads, of keys, tied; block of its attention
SHAPES = {
    "llada-8b": ((126464, 4096, 12288, 32, 32, 32, False), 0),
    "dream-7b": ((152064, 3584, 18944, 28, 28, 4, False), 0),
    "sdar-8b": ((151936, 4096, 12288, 36, 32, 8, False), 4),
    "sdar-4b": ((151936, 2560, 9728, 36, 32, 8, True), 4),
    "sdar-1.7b": ((151936, 2048, 6144, 28, 16, 8, True), 4),
    "qwen3-0.6b-bd3lm": ((151936, 1024, 3072, 28, 16, 8, True), 32),
    "qwen3-0.6b-mdlm": ((151936, 1024, 3072, 28, 16, 8, True), 0)}

def stock_config(name: str, small: bool = False):
    """The stock configuration of a model by its short name; small: of its family, tiny."""
    V, hidden, inner, layers, heads, kv_heads, tied = SHAPES[name][0]
    if small:
        V, hidden, inner, layers, heads, kv_heads = 512, 64, 128, 2, 4, 4
    kind, own = (transformers.LlamaConfig, {}) if "llada" in name else (
        transformers.Qwen2Config, {}) if "dream" in name else (
        transformers.Qwen3Config, {"head_dim": 16 if small else 128})
    return kind(vocab_size=V, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
                max_position_embeddings=4096, pad_token_id=None, use_cache=False, is_causal=False,
                **own)

def night(name: str, **given):
    """The settings of a run on it by its short name, as if its checkpoint were here."""
    given = {"task": "gsm8k", "model": name, **given}
    block = SHAPES[name][1]
    cfg = options.with_cache(settle(given), given, block, stock_config(name))
    return options.in_blocks(cfg, given, block) if block else cfg
