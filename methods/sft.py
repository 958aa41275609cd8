"""Supervised fine-tuning: the first stage of d1 and DiRL, and how the tiny base model is made.

    (8)  L = sum over masked tokens of cross-entropy / t, per token;  t ~ U(0, 1], each completion
         token masked with probability t.
"""
import math
import random
import time

import torch
from torch import Tensor
from tqdm import tqdm

import agrpo
from methods.dipo import packed
from rewards import TASKS, gold_completion, grade, prompt_for
from support.checkpoints import encode_prompts, end_of_turn
from support.data import load_examples, read_pairs
from support.processes import say
from support.files import need

def encode_answers(tokenizer, texts: list[str], C: int, policy) -> Tensor:
    """(n, C): each answer, the end of its turn where there is one, then EOS to the end. Raises
    BadInput if one is longer."""
    tokens, unknown = torch.full((len(texts), C), policy.eos_id), tokenizer.unk_token_id
    for i, text in enumerate(texts):
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer += [policy.turn_id] if policy.turn_id != policy.eos_id else []
        need(unknown not in answer, f"the model has no token for a part of {text[:60]!r}")
        need(len(answer) <= C,
             f"--completion-length {C}: an answer has {len(answer)} tokens, {text[:60]!r}")
        tokens[i, :len(answer)] = torch.tensor(answer)
    return tokens

def noise(tokens, block: int, prompt_mask, g) -> tuple[Tensor, Tensor]:
    """Eq. 8 -> is_masked, 1 / t, both (N, C). One t a row, stratified over the batch; for
    block-causal models one a block, as each block is denoised by itself."""
    N, C = tokens.shape
    if block:
        of = (torch.arange(C) + prompt_mask.sum(1, keepdim=True).cpu() % block) // block   # (N, C)
        n = int(of.max()) + 1
        cell = torch.randperm(N * n, generator=g).view(N, n)
        t = (1 - (cell + torch.rand(N, n, generator=g)) / (N * n)).gather(1, of)
    else:
        t = 1 - (torch.arange(N)[:, None] + torch.rand(N, 1, generator=g)) / N
    return torch.rand(N, C, generator=g) < t, (1 / t).expand(N, C)

def denoising_loss(policy, prompt, prompt_mask, tokens, is_masked, weight) -> Tensor:
    """Eq. 8: cross-entropy of the masked tokens / t, a mean over all tokens (N, C)."""
    state, sees = tokens.masked_fill(is_masked, policy.mask_id), (prompt, prompt_mask)
    if getattr(policy, "block", 0):
        sees = packed(prompt, prompt_mask, tokens).values()
    logits = policy.logits(*sees, state, is_masked)
    loss = torch.nn.functional.cross_entropy(logits, tokens[is_masked], reduction="none")
    return (loss * weight[is_masked]).sum() / tokens.numel()

def sft_loss(policy, prompt, prompt_mask, tokens, g, even=False) -> Tensor:
    """Eq. 8 with noise drawn from g; `even`: with weight 2 in place of 1/t, which has the same
    optimum, where the model can represent every law."""
    is_masked, weight = noise(tokens, getattr(policy, "block", 0), prompt_mask, g)
    weight = torch.full_like(weight, 2.0) if even else weight
    drawn = (x.to(tokens.device) for x in (is_masked, weight))
    return denoising_loss(policy, prompt, prompt_mask, tokens, *drawn)

def train_base(policy, tokenizer, cfg):
    """SFT on right answers and, from base_lazy_from of the steps on, a share of base_lazy that
    follow a lazy rule: one sample is seldom right, one of many often is."""
    task, device = TASKS[cfg.task], next(policy.parameters()).device
    g = agrpo.generator("sft", cfg.seed)
    examples = load_examples(cfg.task, 4 * cfg.train_examples, cfg.seed, "train")
    ids, prompt_mask = encode_prompts(tokenizer, [prompt_for(cfg.task, ex, "bare")
                                                  for ex in examples])
    rng = random.Random(cfg.seed)
    texts = zip(*[(gold_completion(cfg.task, ex, "bare"), task.lazy(ex, rng)) for ex in examples])
    answers = torch.stack([encode_answers(tokenizer, kind, cfg.completion_length, policy)
                           for kind in texts])                 # 0 right, 1 lazy
    for ex, ids_of in zip(examples[:64], answers[0]):          # without spaces, still right?
        said = tokenizer.decode(ids_of[ids_of != policy.eos_id])
        need(grade(cfg.task, said, ex) == 1, f"task {cfg.task}: the tiny model says its right "
             f"answer as {said[:60]!r}, which is graded wrong")
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=cfg.base_lr, betas=(0.9, 0.95),
                                  weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(
        1.0, 10 * (s + 1) / cfg.base_steps, (1 - s / cfg.base_steps) / 0.9))
    print(f"making the tiny base model: {cfg.base_steps} steps of supervised fine-tuning, once; "
          "one to three minutes on an idle core",
          flush=True)
    progress = tqdm(range(cfg.base_steps), "base model", unit="step", mininterval=1, disable=None)
    for step in progress:
        index = torch.randint(len(examples), (cfg.base_batch,), generator=g)
        share = cfg.base_lazy * (step >= cfg.base_lazy_from * cfg.base_steps)
        lazy = (torch.rand(cfg.base_batch, generator=g) < share).long()
        rows = ids[index], prompt_mask[index], answers[lazy, index]
        loss = sft_loss(policy, *(x.to(device) for x in rows), g, cfg.base_even == "on")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")

def step_with(tokenizer):
    """A step like agrpo.train_step, on rows {"prompt": (message, beginning), "answer": text}."""
    def sft_step(policy, optimizer, examples, step: int, cfg, sample=None) -> dict:
        """Eq. 8 on a batch, one optimizer step; returns what is logged."""
        clock, total = time.perf_counter(), 0.0
        (rank, world), device = agrpo.processes(), next(policy.model.parameters()).device
        batch = agrpo.batch_of_examples(examples, step, cfg)
        prompts, texts = zip(*[(row["prompt"], row["answer"]) for row in batch])
        ids, prompt_mask = encode_prompts(tokenizer, prompts)
        tokens = encode_answers(tokenizer, texts, cfg.completion_length, policy)
        block, g = getattr(policy, "block", 0), agrpo.generator("sft", cfg.seed, step)
        rows = ids, prompt_mask, tokens, *noise(tokens, block, prompt_mask, g)
        width = ids.shape[1] + cfg.completion_length * (1 + bool(block))
        mine = torch.tensor_split(torch.arange(len(batch)), world)[rank]
        for part in mine.split(max(1, cfg.tokens_per_pass // width)) if len(mine) else ():
            loss = denoising_loss(policy, *(x[part].to(device) for x in rows))
            loss = loss * len(part) / len(batch)
            loss.backward()
            total += float(loss.detach())
        norm, applied = agrpo.optimizer_step(optimizer, step, cfg, math.isfinite(total))
        return {"step": step, "loss": sum(agrpo.gather([total])), "grad_norm": norm,
                "skipped": int(not applied), "lr": agrpo.learning_rate(step, cfg),
                "rollout_seconds": 0.0, "update_seconds": time.perf_counter() - clock}
    return sft_step

def sft_examples(tokenizer, cfg, examples: list, context: int, mask_id: int) -> list:
    """What to fine-tune on: the task's right answers to its examples, in the prompt's format, or
    the rows of a file. Says how many are too long for --completion-length, and leaves them out.
    Raises BadInput if none is left, or a row cannot be learned."""
    if cfg.sft == "gold":
        rows = [{"prompt": prompt_for(cfg.task, ex, cfg.prompt, cfg.system_prompt),
                 "answer": gold_completion(cfg.task, ex, cfg.prompt)} for ex in examples]
    else:
        rows = [{"prompt": (row["prompt"], ""), "answer": row["completion"]}
                for row in read_pairs(cfg.sft)]
    ended = end_of_turn(tokenizer) is not None
    answers = tokenizer([row["answer"] for row in rows], add_special_tokens=False)["input_ids"]
    never = {mask_id, tokenizer.eos_token_id, tokenizer.unk_token_id, end_of_turn(tokenizer)}
    for number, (row, ids) in enumerate(zip(rows, answers), start=1):
        need(never.isdisjoint(ids),
             f"--sft {cfg.sft}, answer {number}: it holds the token of MASK or of the end, or what "
             f"the model has no token for, {row['answer'][:60]!r}: leave it out")
    C = cfg.completion_length
    short = [row for row, ids in zip(rows, answers) if len(ids) + ended <= C]
    if len(short) < len(rows):
        say(f"left out: {len(rows) - len(short)} of {len(rows)} answers, of more than {C} tokens")
    need(short, f"--completion-length {C}: all answers of --sft {cfg.sft} are longer, the shortest "
         f"has {min(map(len, answers)) + ended} tokens")
    longest = encode_prompts(tokenizer, [row["prompt"] for row in short])[0].shape[1]
    need(longest + C <= context, f"--sft {cfg.sft}: the longest prompt has {longest} tokens, a "
         f"completion {C}; the context is {context}: a smaller --completion-length fits")
    return short
