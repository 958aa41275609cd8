"""The tiny models: a tokenizer of characters or words, a stock Llama, where its base is kept."""
import dataclasses
import hashlib
import json
import os
import random
import re
from pathlib import Path

import torch

from rewards import TASKS, gold_completion, prompt_for
from support.data import load_examples
from support.files import need, refusing
from support.saving import save_model

@dataclasses.dataclass(frozen=True)
class Settings:
    """The tiny base model."""
    train_examples: int = 4096         # generated, 4 times as many for the base; a file gives all
    base_steps: int = 1600             # steps of supervised fine-tuning
    base_batch: int = 32               # rows per step
    base_lr: float = 3e-3              # up for a tenth of the steps, then down to zero
    base_lazy: float = 0.6             # share of a batch whose answers follow the lazy rule ...
    base_lazy_from: float = 0.0        # ... after this share of the steps; before, all are right
    base_hidden: int = 64              # width; heads of 16
    base_layers: int = 4               # of the Llama
    base_even: str = "off"             # on: every masked token counts the same, not 1/t (Eq. 8)
    base_theta: float = 4.0            # of its rotary positions: fast ones, for a context of 40

SPECIAL = ["<pad>", "<unk>", "<eos>", "<mask>", "<|user|>", "<|assistant|>"]

def tiny_tokenizer(words=()):
    """One token a character (printable ASCII), or one for each of `words`, between which spaces are
    left out. With a chat template, as every other checkpoint. Raises BadInput."""
    need(isinstance(words, (tuple, list)) and all(isinstance(word, str) and word
         and " " not in word for word in words)
         and len({*words, *SPECIAL}) == len(words) + len(SPECIAL), "a task's words must be "
         f"different texts, none of them empty, with a space, or one of {' '.join(SPECIAL)}")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    known = [*words] or [chr(c) for c in [10, *range(32, 127)]]
    vocab = {token: i for i, token in enumerate(SPECIAL + known)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    whole = any(re.fullmatch("[0-9]{2,}", word) for word in words)     # then 250 is not 25 and 0
    longest = "".join(re.escape(word) + ("(?![0-9])|" if whole and word.isdigit() else "|")
                      for word in sorted(words, key=len, reverse=True))
    other = r"[0-9]+|[A-Za-z]+|[\s\S]" if words else r"[\s\S]"
    one = pre_tokenizers.Split(Regex(longest + other), behavior="isolated")
    space = pre_tokenizers.Split(" ", behavior="removed")
    core.pre_tokenizer = pre_tokenizers.Sequence([space, one]) if words else one
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>",
        mask_token="<mask>", additional_special_tokens=SPECIAL[4:], padding_side="left",
        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    return tokenizer

def tiny_config(tokenizer, cfg, block: int = 0):
    """Configuration of a stock Llama that attends in both directions, or to blocks of so many
    tokens and those before them."""
    from transformers import LlamaConfig
    tied = bool(TASKS[cfg.task].words)         # one table for input and output: easy to copy
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=cfg.base_hidden,
        intermediate_size=4 * cfg.base_hidden, num_hidden_layers=cfg.base_layers,
        num_attention_heads=cfg.base_hidden // 16, initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.base_theta},
        max_position_embeddings=256,           # (a slow rotation cannot tell neighbours apart)
        tie_word_embeddings=tied, use_cache=False, is_causal=False, pad_token_id=None,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id, **({"block_size": block} if block else {}))

def tiny_model(tokenizer, cfg, block: int = 0):
    """A stock Llama with random weights from the seed."""
    from transformers import LlamaForCausalLM
    config = tiny_config(tokenizer, cfg, block)
    with torch.random.fork_rng(devices=[]):    # initialisation draws from the global generator
        torch.manual_seed(cfg.seed)
        return LlamaForCausalLM(config)

def base_folder(cfg, block: int, make, rebuild: bool = False) -> str:
    """Directory of the tiny base model, trained on the first call and kept under $AGRPO_CACHE
    (~/.cache/agrpo). make(tokenizer) -> a trained model. Raises BadInput."""
    task, some = TASKS[cfg.task], load_examples(cfg.task, 16, cfg.seed, "train")
    corpus = [(prompt_for(cfg.task, ex, "bare"), gold_completion(cfg.task, ex, "bare"),
               task.lazy(ex, random.Random(0))) for ex in some]        # a task edited is another
    need(all(isinstance(lazy, str) for *_, lazy in corpus), f"task {cfg.task}: lazy is no text")
    knobs = {k: v for k, v in dataclasses.asdict(cfg).items() if k.startswith("base_")
             or k in ("task", "seed", "completion_length", "train_examples")}
    knobs |= {"block": block, "corpus": corpus, "words": task.words}
    key = hashlib.sha256(json.dumps(knobs, sort_keys=True).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("AGRPO_CACHE") or "~/.cache/agrpo").expanduser()
    path = cache / f"{cfg.model}-{cfg.task}-{key}"
    if not rebuild and (path / "config.json").is_file():
        return str(path)
    with refusing(f"cannot keep the base model in {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(task.words)
    model = make(tokenizer)
    if rebuild or not path.exists():                           # another may have been faster
        save_model(path, model, tokenizer, dataclasses.asdict(cfg), None, "")
    return str(path)
