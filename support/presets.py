"""Short names of models; sizes for the tiny tasks, for one night on one GPU, and as published.

--preset paper: AGRPO's published estimator. Read against its repository (commit 98f1182), as there:
states, token law, proposal by summed entropies, weight 1/(m p), a sum over a step's tokens and a
mean over K and rows, advantage mean, clip 0.2, random order, cosine after the warm-up. Different:
its top-p drops the token that crosses p (supports of one token 7 % of the time; ours keeps it, 3
%), its top-k keeps all ties; under its DeepSpeed file each of the K backward calls steps the
engine, about 24 optimizer steps a rollout, ours makes one; its LoRA target ff_out matches the
output head, too; u is stratified per process over 8 rows, ours over the batch, and may round up to
1 and index out of range; a row that is all EOS fails an assertion; the finish test of block 0 reads
the prompt's tail; text after the first EOS is graded, too; the confidence in training is tempered
and truncated; its head computes in bfloat16, ours in float32.

--preset justgrpo (arXiv 2601.15165): its order, one token a step, all steps scored, advantage std,
64 x 16 completions of 256 tokens, temperature 1, rate 5e-6 without warm-up or decay, 125 steps.
Different: adapters (--lora-rank 0 for all weights, 145 GB for 8B); AGRPO's prompt and reward,
theirs is the bare question and +1 or -1; AdamW's second beta is 0.99, theirs 0.999; the loss is a
mean over all completions, theirs over those with an advantage; nothing behind a text's end counts.

One night: 8 prompts x 8 completions of 256 tokens in blocks of 32, 4 tokens a denoising step
(block-causal models one), K = 4 of 64, LoRA of rank 64, at most 300 training steps. Where a
full-attention model above 3 billion parameters uses the dual cache (`sizes`), the gradient is not
the exact one: Eq. 10 weights the completions, tokens alone are scored. --cache none is exact.
"""
import os

import torch

from support import cost

TINY = ("tiny", "tiny-block")          # models made here
MODELS = {                             # --model: name on the hub, and what its card says of blocks
    "llada-8b": ("GSAI-ML/LLaDA-8B-Instruct", {}),             # and steps; LLaDA as CHECKPOINT:
    "llada-1.5": ("GSAI-ML/LLaDA-1.5", {}),                    # 128 steps, as the papers evaluate
    "dream-7b": ("Dream-org/Dream-v0-Instruct-7B",             # in one block, a token a step
                 {"eval_block_length": 256, "eval_steps": "256"}),
    **{f"sdar-{size}": (f"JetLM/SDAR-{size.upper()}-Chat", {"model_block": 4})
       for size in ("1.7b", "4b", "8b")},                      # a token a step, as all in blocks
    "qwen3-0.6b-bd3lm": ("dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", {"model_block": 32}),
    "qwen3-0.6b-mdlm": ("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", {
        "block_length": 64, "eval_block_length": 64, "eval_steps": "256"})}
LLADA, SMALLEST = (MODELS[name][0] for name in ("llada-8b", "qwen3-0.6b-bd3lm"))

TASK_SHAPES = {                        # what a task needs otherwise; flags win over all of these
    "story": {"completion_length": 16, "block_length": 8, "steps": 8, "max_steps": 150, "lr": 2e-4,
              "base_steps": 3600, "base_batch": 24, "base_lazy": 0.65, "base_lazy_from": 0.78,
              "base_theta": 16.0, "base_even": "on"},
    "formula": {"completion_length": 8, "block_length": 8, "steps": 4, "eval_steps": "8,4,2",
                "max_steps": 60, "lr": 2e-4, "train_examples": 2048, "base_steps": 3600,
                "base_batch": 24, "base_lazy": 0.65, "base_lazy_from": 0.78, "base_theta": 16.0,
                "base_even": "on"}}
CHECKPOINT = {                         # of all but tiny models: AGRPO's (arXiv 2510.04019) ...
    "completions": 8, "temperature": 0.6, "top_k": 150, "top_p": 0.99, "lora_rank": 64,
    "eval_length": 256, "eval_block_length": 32, "eval_steps": "128",
    "rollout_batch": 0, "tokens_per_pass": 0, "eval_examples": 256, "eval_every": 100}   # and ours
NIGHT = {                              # what a person waits for: assets/README.md, "One night"
    "max_steps": 300, "prompts": 8, "completion_length": 256, "block_length": 32, "steps": 64,
    "mc_steps": 4, "lr": 3e-5, "warmup": 10}
PAPER = {                              # five epochs of GSM8K
    "max_steps": 2335, "prompts": 16, "completion_length": 384, "block_length": 12, "steps": 128,
    "mc_steps": 24, "lr": 5e-6, "warmup": 23, "decay_steps": 2335}
JUST = {                               # JustGRPO (arXiv 2601.15165); it trains all weights
    "max_steps": 125, "prompts": 64, "completions": 16, "completion_length": 256,
    "block_length": 32, "steps": 256, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "lr": 5e-6,
    "warmup": 0, "weight_decay": 0.0, "eval_steps": "256", "eval_every": 25}
PRESETS = {                            # --preset: what it changes for every model, then its sizes
    "": ({}, NIGHT),                   # of K: 2 of the tiny model's 8 steps, sizes give 24 of 128
    "paper": ({"unmasking": "random", "timesteps": "low_discrepancy", "mc_steps": 2,
               "normalizer": "last_step", "advantage": "mean"}, PAPER),
    "justgrpo": ({"method": "exact", "unmasking": "left_to_right", "advantage": "std"}, JUST)}
PRESETS["official"] = PRESETS["paper"]  # its first name: such runs resume
SFT = {                                # --sft: tiny models, others
    True: {"lr": 1e-3, "max_steps": 400, "prompts": 32, "warmup": 40, "decay_steps": 400},
    False: {"lr": 1e-5, "max_steps": 1000, "prompts": 16, "warmup": 20, "decay_steps": 1000,
            "hours": 0.0}}
GREEDY = {"unmasking": "low_confidence", "position_term": "off", "temperature": 0.0, "top_k": 0,
          "top_p": 1.0}                # how models are evaluated, as in the paper
APPROXIMATE = ("prefix", "dual")       # caches whose rollouts are approximate
WITH_CACHE = {"timesteps": "independent_gradient", "position_term": "off"}     # what they need
LARGE = 3e9                            # parameters above which one night may use such a cache

def hub_name(model: str) -> str:
    """--model with a short name replaced; a directory of that name comes first."""
    return model if os.path.isdir(model) else MODELS.get(model, (model,))[0]

def default_model(device: str) -> str:
    """LLaDA, or on a GPU that its 8 billion parameters do not fit the smallest of MODELS."""
    return SMALLEST if device != "cpu" and cost.room(device) < 22 else LLADA

def sizes(model: str, preset: str, device: str) -> dict:
    """Of a run on a checkpoint. One night ends after 12 hours, on a GPU below 32 GB after 16. It
    uses the dual cache where rollouts without it would take most of the night: on GPUs below 60 GB
    or of a generation (compute capability) before the H100's."""
    card = dict(MODELS.values()).get(model, {})
    if preset:
        return CHECKPOINT | card | PRESETS[preset][1]
    night = CHECKPOINT | NIGHT | card | {"hours": 12.0}
    if device != "cpu":
        memory, (generation, _) = cost.room(device), torch.cuda.get_device_capability(device)
        night |= {"cache": "dual"} if memory < 60 or generation < 9 else {}
        night |= {"hours": 16.0} if memory < 32 else {}
    return night
