"""Protects the loop on a real (tiny, stock transformers) model: one update per rollout, padding,
determinism, resume, the run folder, help, bad input. Run: pytest tests/test_train.py"""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint

import agrpo
import eval as evaluation
from methods import models, sft
from rewards import TASKS, BadInput, gold_completion, grade, reward_parts, try_task
from support import checkpoints, files, options, puzzles, rules, runs
from support import tiny as tiny_models
from support.data import from_file, load_split
from tools import Settings, exact_loss, load, train_step

AGRPO = str(Path(agrpo.__file__).resolve())
CFG = Settings(prompts=2, completions=4, base_hidden=32, base_layers=2)


def tiny(cfg=CFG, dtype=torch.float64):
    tokenizer = tiny_models.tiny_tokenizer()
    model = tiny_models.tiny_model(tokenizer, cfg).to(dtype)
    return agrpo.Policy(model, tokenizer.mask_token_id, tokenizer.eos_token_id), tokenizer


def examples(task="sudoku", n=16):
    return TASKS[task].generate(n, 0, "train")


def rolled(cfg=CFG, task="sudoku"):
    policy, tokenizer = tiny(cfg)
    batch = [ex for ex in examples(task, cfg.prompts) for _ in range(cfg.completions)]
    traj, texts = models.generate(policy, tokenizer, batch, [(i,) for i in range(len(batch))], cfg)
    return policy, tokenizer, batch, traj, texts


class Watched(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        self.grads = [
            p.grad.clone()
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        return super().step(closure)


@pytest.fixture
def varied_reward(monkeypatch):
    """An untrained model solves nothing: what varies is rewarded, so that there is a gradient."""
    monkeypatch.setattr(models, "reward_parts",
                        lambda task, text, ex, weights: {"correct": float(sum(map(ord, text)) % 7)})


@pytest.mark.parametrize("unmasking", ["confidence", "low_confidence", "plackett_luce"])
def test_one_optimizer_step_and_one_gradient_whatever_the_tokens_per_pass(unmasking, varied_reward):
    seen = []
    for tokens in (1, 200, 100_000):
        for K in (2, 8):
            cfg = dataclasses.replace(
                CFG, tokens_per_pass=tokens, mc_steps=K, unmasking=unmasking, max_grad_norm=1e9)
            policy, tokenizer = tiny(cfg)
            optimizer = Watched(policy.model.parameters(), lr=0.1)
            train_step(policy, tokenizer, optimizer, examples(), 0, cfg)
            assert optimizer.steps == 1
            seen.append((K, torch.cat([g.flatten() for g in optimizer.grads])))
    for K in (2, 8):
        first, *others = [g for k, g in seen if k == K]
        assert first.norm() > 0 and all((g - first).norm() < 1e-9 * first.norm() for g in others)


def test_ratio_is_one_at_the_first_update_with_dropout_in_the_model():
    cfg = dataclasses.replace(CFG, top_k=20, top_p=0.95, unmasking="low_confidence")
    policy, tokenizer, batch, traj, _ = rolled(cfg)
    policy.model.config.attention_dropout = 0.5
    for layer in policy.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    _, ratio = exact_loss(policy, traj, torch.ones(8).double(), cfg)
    assert (ratio - 1).abs().max() < 1e-9


def test_a_padded_row_scores_and_samples_as_it_does_alone():
    policy, tokenizer = tiny()
    cfg = dataclasses.replace(CFG, completion_length=12, block_length=4, steps=6)
    texts = ["7", "1,2,3=9", "10,11,12=99"]
    prompt, mask = checkpoints.encode_prompts(tokenizer, [(t, "") for t in texts])
    assert (mask == 0).any(1).tolist() == [True, True, False] and (
        mask[:, -1] == 1).all()  # left padded
    together = agrpo.rollout(policy, prompt, mask, cfg, [(i,) for i in range(3)])
    for i, text in enumerate(texts):
        alone = agrpo.rollout(
            policy, *checkpoints.encode_prompts(tokenizer, [(text, "")]), cfg, [(i,)])
        assert torch.equal(alone.tokens[0], together.tokens[i]) and torch.equal(
            alone.reveal_step[0], together.reveal_step[i])
        assert torch.allclose(
            alone.logp[0], together.logp[i], atol=1e-5)  # rotary angles are float32


def test_the_denoiser_sees_both_sides():
    policy, tokenizer = tiny()
    prompt, mask = checkpoints.encode_prompts(tokenizer, [("12", "")])
    state, where = torch.full((1, 8), 30), torch.zeros(1, 8, dtype=torch.bool)
    where[0, 0] = True
    before = policy.logits(prompt, mask, state, where)
    state[0, 7] = 31  # far to the right
    assert (policy.logits(prompt, mask, state, where) - before)[
        :, : policy.mask_id].abs().max() > 1e-6
    assert float(before[0, policy.mask_id].detach()) == -float("inf") and before.shape == (
        1, len(tokenizer))


def test_rewards_meet_their_own_examples_and_texts_end_at_eos():
    policy, tokenizer, batch, traj, texts = rolled(
        task="countdown", cfg=dataclasses.replace(CFG, task="countdown"))
    cfg = dataclasses.replace(CFG, task="countdown")
    log = train_step(policy, tokenizer, torch.optim.SGD(policy.model.parameters(), lr=0.0),
                     examples("countdown"), 3, cfg)
    again = [ex for ex in agrpo.batch_of_examples(examples("countdown"), 3, cfg) for _ in range(4)]
    _, texts = models.generate(
        policy, tokenizer, again, [("rollout", 0, 3, i) for i in range(8)], cfg)
    assert log["reward"] == pytest.approx(
        np.mean([sum(reward_parts("countdown", t, ex).values()) for t, ex in zip(texts, again)]))
    policy.eos_id = int(traj.tokens[0, 3])  # as if this one ended after three
    traj, texts = models.generate(policy, tokenizer, batch, [(i,) for i in range(len(batch))], cfg)
    for row, text in zip(traj.tokens.tolist(), texts):
        assert text == tokenizer.decode(
            row[: row.index(policy.eos_id)] if policy.eos_id in row else row)
    assert any(policy.eos_id in row for row in traj.tokens.tolist())


def test_every_example_is_used_once_per_pass_over_the_data():
    cfg, data = dataclasses.replace(CFG, prompts=3), list(range(10))
    drawn = [x for step in range(10) for x in agrpo.batch_of_examples(data, step, cfg)]
    assert (
        all(sorted(drawn[i : i + 10]) == data for i in range(0, 30, 10))
        and drawn[:10] != drawn[10:20]
    )


def test_the_learning_rate_warms_up_and_decays():
    cfg = dataclasses.replace(CFG, lr=1.0, warmup=4, decay_steps=100)
    assert [
        agrpo.learning_rate(s, dataclasses.replace(cfg, decay_steps=0)) for s in (0, 1, 3, 50)
    ] == [0.25, 0.5, 1.0, 1.0]
    at = [agrpo.learning_rate(step, cfg) for step in (1, 4, 52, 76, 100, 101)]
    assert at == pytest.approx([0.5, 1.0, 0.5, 0.5 - 0.5**1.5, 0.0, 0.0])
    whole = dataclasses.replace(cfg, warmup=10, decay_steps=10)    # warm-up is all there is
    assert agrpo.learning_rate(9, whole) == 1.0 and agrpo.learning_rate(11, whole) == 0.0


def test_every_step_draws_anew(varied_reward):
    policy, tokenizer = tiny()
    same = examples()[:1] * 2  # one example: only the random numbers differ
    still, cfg = (torch.optim.SGD(policy.model.parameters(), lr=0.0),
                  dataclasses.replace(CFG, lr=0.0))
    rows = [train_step(policy, tokenizer, still, same, step, cfg) for step in (0, 1, 0)]
    assert (
        rows[0]["entropy"] == rows[2]["entropy"] != rows[1]["entropy"]
        and rows[0]["grad_norm"] == rows[2]["grad_norm"]
    )


@pytest.mark.parametrize("timesteps", ["batch_gradient", "stratified"])
def test_zero_advantage_groups_cost_no_pass_and_change_no_gradient(monkeypatch, timesteps):
    policy, tokenizer = tiny()
    cfg = dataclasses.replace(CFG, timesteps=timesteps)
    monkeypatch.setattr(models, "reward_parts", lambda task, text, ex, weights: {"correct": 1.0})
    optimizer = Watched(policy.model.parameters(), lr=1.0)
    row = train_step(policy, tokenizer, optimizer, examples(), 0, cfg)
    assert (
        row["passes"] == 0 and row["ratio"] == 1 and row["grad_norm"] == 0 and optimizer.grads == []
    )


def test_the_global_generator_is_left_alone(varied_reward):
    policy, tokenizer = tiny()
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    train_step(
        policy, tokenizer, torch.optim.SGD(policy.model.parameters(), lr=0.1), examples(), 0, CFG)
    tiny_models.tiny_model(tokenizer, CFG)
    assert (
        torch.equal(torch.random.get_rng_state(), before)
        and (np.random.get_state()[1] == numpy_before).all()
    )


def test_steps_raise_the_likelihood_of_rewarded_completions():
    """The sign of the loss: a few steps on one batch make what was rewarded likelier."""
    cfg = dataclasses.replace(CFG, mc_steps=8, timesteps="without_replacement", clip=10.0)
    policy, tokenizer, batch, traj, _ = rolled(cfg)
    adv = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)

    def score():
        return float((sum_logp(policy, traj, cfg) * adv).sum())

    before, optimizer = score(), torch.optim.SGD(policy.model.parameters(), lr=0.05)
    for _ in range(3):
        exact_loss(policy, traj, adv, cfg)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert score() > before + 1e-3


def sum_logp(policy, traj, cfg):
    with torch.no_grad():
        v = agrpo.exact_views(traj, None, cfg, policy.mask_id, None)
        logp, *_ = agrpo.step_logp(policy, traj, v, cfg)
        return torch.zeros(len(traj.tokens), dtype=logp.dtype).index_add(
            0, v.row[v.target.nonzero(as_tuple=True)[0]], logp)


def test_sft_loss_is_equation_8():
    """Against the definition, position by position, with the same noise."""
    policy, tokenizer = tiny()
    prompt, mask = checkpoints.encode_prompts(tokenizer, [("12", ""), ("34", "")])
    tokens = torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33]])
    got = sft.sft_loss(policy, prompt, mask, tokens, agrpo.generator("x"))
    g, total = agrpo.generator("x"), 0.0
    t = 1 - (torch.arange(2)[:, None] + torch.rand(2, 1, generator=g)) / 2
    is_masked = torch.rand(2, 4, generator=g) < t
    for i in range(2):
        for j in range(4):
            if is_masked[i, j]:
                state = torch.where(is_masked[i], policy.mask_id, tokens[i])[None]
                z = policy.logits(
                    prompt[i : i + 1], mask[i : i + 1], state, torch.ones(1, 4, dtype=torch.bool)
                )[j]
                total += -float(z.detach().log_softmax(-1)[tokens[i, j]]) / float(t[i])
    assert float(got.detach()) == pytest.approx(total / 8, rel=1e-6)


def test_even_weights_are_twice_the_cross_entropy_of_masked_tokens():
    policy, tokenizer = tiny()
    prompt, mask = checkpoints.encode_prompts(tokenizer, [("12", ""), ("34", "")])
    tokens = torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33]])
    got = sft.sft_loss(policy, prompt, mask, tokens, agrpo.generator("x"), even=True)
    is_masked, _ = sft.noise(tokens, 0, mask, agrpo.generator("x"))
    z = policy.logits(prompt, mask, tokens.masked_fill(is_masked, policy.mask_id), is_masked)
    cross = torch.nn.functional.cross_entropy(z, tokens[is_masked], reduction="sum")
    assert float(got.detach()) == pytest.approx(2 * float(cross.detach()) / 8, rel=1e-6)


def test_words_share_one_table_and_positions_rotate_as_asked():
    for task, tied, theta in (("story", True, 16.0), ("sudoku", False, 4.0)):
        cfg = models.settle({"task": task, "base_hidden": 32, "base_layers": 1})
        net = tiny_models.tiny_model(tiny_models.tiny_tokenizer(TASKS[task].words), cfg)
        assert (net.get_input_embeddings().weight is net.get_output_embeddings().weight) == tied
        assert net.config.rope_parameters["rope_theta"] == theta


def test_each_completion_has_its_own_reward(monkeypatch):
    """Graded by several threads, in the order of the completions."""
    examples = TASKS["sudoku"].generate(7, 0, "train")
    right, ends = [0, 1, 4], types.SimpleNamespace(eos_id=1, turn_id=1)
    texts = [ex["solution"] if i in right else "no" for i, ex in enumerate(examples)]
    traj = types.SimpleNamespace(tokens=torch.zeros(7, 16))
    monkeypatch.setattr(models, "generate", lambda *_: (traj, texts))
    cfg = models.checked({"task": "sudoku"})
    _, parts, solved = models.sampler(None, cfg)(ends, examples, None, cfg)
    assert [i for i, x in enumerate(solved) if x] == right
    assert [i for i, x in enumerate(parts["correct"]) if x == 3] == right


def test_mistakes_in_stories_are_told_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "measure"))
    from mistakes import KINDS, kind
    ex = {"question": "Tom has 21 eggs, finds 2, breaks 4.", "answer": "21+2=23-4=19\n#### 19"}
    written = ("21+2=23-4={}19", "21+2=24-4={}19", "21+2=23+4={}27", "21+={}20", "21+2={}23",
               "21+3=24-4={}20", "21+2=23+4={}26", "21+2=23-4={}18")
    found = [kind(text.format("<answer>") + "</answer>", ex) for text in written]
    assert tuple(found) == KINDS


# ---------------------------------------------------------------------- runs, resume, bad input
def rows_of(name):
    with open(f"runs/{name}/log.csv") as f:
        return [
            {k: v for k, v in row.items() if "seconds" not in k and "memory" not in k}
            for row in csv.DictReader(f)
        ]


def weights_of(name):
    return torch.load(f"runs/{name}/checkpoint.pt", weights_only=True)


def same_state(a, b):
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and all(
        torch.equal(x, b["optimizer"]["state"][i][k])
        for i, s in a["optimizer"]["state"].items()
        for k, x in s.items()
    )


@pytest.mark.parametrize(
    "extra", [[], pytest.param(["--task", "story", "--unmasking", "random", "--eval-steps",
                                "8,4"], marks=pytest.mark.whole),
              ["--task", "sudoku", "--curriculum", "solve_rate"],
              ["--task", "sudoku", "--curriculum", "4,8,16", "--block-length", "4", "--eval-steps",
               "8,4", "--grow-at", "1", "--grow-after", "3", "--save-every", "2"]],
    ids=["sudoku", "story", "solve_rate", "lengths"])
def test_two_steps_resume_two_steps_equal_four_to_the_bit(here, quick, extra):
    assert agrpo.main([*quick, *extra, "--name", "four", "--max-steps", "4"]) == 0
    assert agrpo.main([*quick, *extra, "--name", "halves", "--max-steps", "2"]) == 0
    log = Path("runs/halves/log.csv")
    whole = log.read_text()
    assert log.write_text(
        whole.replace("\n", "\n", 1) + whole.splitlines()[1].replace("0,", "2,", 1) + "\n3,0.5,0"
    )  # what a kill leaves
    assert agrpo.main(["--name", "halves", "--resume", "--max-steps", "4", *extra[:2]]) == 0
    assert same_state(weights_of("four"), weights_of("halves"))
    a, b = (weights_of(name)["state"] for name in ("four", "halves"))
    assert a.keys() == b.keys() and all(torch.equal(*map(torch.as_tensor, (a[k], b[k]))) for k in a)
    assert len(a) == {"solve_rate": 2, "4,8,16": 1}.get(extra[3] if extra[2:] else "", 0)
    steps = [(r["step"], r["reward"], r["grad_norm"], r["entropy"]) for r in rows_of("halves")]
    assert (
        steps == [(r["step"], r["reward"], r["grad_norm"], r["entropy"]) for r in rows_of("four")]
        and len(steps) == 4
    )
    a, b = (json.loads(Path(f"runs/{n}/summary.json").read_text()) for n in ("four", "halves"))
    assert a["trained"] == b["trained"] and a["by_steps"] == b["by_steps"]
    before = Path("runs/four/config.json").read_text()
    # it has done more: nothing is touched
    assert agrpo.main(["--name", "four", "--resume", "--max-steps", "2", *extra[:2]]) == 2
    assert Path("runs/four/config.json").read_text() == before and len(rows_of("four")) == 4
    Path("runs/four/log.csv").unlink()  # the checkpoint says so, not the log
    assert agrpo.main(["--name", "four", "--resume", "--max-steps", "3", *extra[:2]]) == 2


def test_the_run_folder_holds_what_the_readme_says_and_the_model_reloads(here, quick, capsys):
    assert agrpo.main([*quick, "--name", "x", "--max-steps", "2"]) == 0
    folder = Path("runs/x")
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.json", "log.csv", "curve.png", "frontier.png", "samples.txt", "model",
                     "checkpoint.pt", "summary.json"}
    assert not [n for n in names if n.endswith(".partial")]
    samples = (folder / "samples.txt").read_text().splitlines()
    right = [line.split()[1] for line in samples if line.startswith("  right ")]
    assert right == [ex["solution"] for ex in load_split("sudoku", 1, 8, 0)[1]]
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= {"task", "model", "seed", "base", "trained", "by_steps", "seconds",
                            "peak_memory_mb", "made"}
    assert {"device", "dtype", "torch", "transformers", "commit", "command"} <= set(summary["made"])
    assert set(summary["seconds"]) == {"base_model", "rollout", "update", "eval", "total"} and set(
        summary["base"]) == {"solved", "n", "ci95"}
    assert [set(x) for x in summary["by_steps"]] == [
        {"steps", "nfe", "base", "trained", "base_nfe"}] * 2
    policy, tokenizer = load(folder / "model")
    saved = weights_of("x")["model"]
    assert all(torch.equal(v, saved[f"model.{k}"]) for k, v in policy.model.state_dict().items())
    capsys.readouterr()
    assert evaluation.main(
        ["--model", "runs/x", "--task", "sudoku", "--limit", "8", "--steps", "4,2", "--out",
         "e.jsonl", "--device", "cpu"]
    ) == 0
    result = json.loads(Path("e.json").read_text())["results"]
    assert (
        result[0]["solved"] == summary["by_steps"][0]["trained"]
        and result[0]["nfe"] == 4.0
        and Path("e.png").is_file()
    )
    assert "NFE" in capsys.readouterr().out


def test_prompt_weights_and_overlong_penalty_reach_the_rewards_and_the_evaluation(
    here, quick, checkpoint, monkeypatch):
    assert agrpo.main([*quick, "--max-steps", "0", "--name", "m"]) == 0
    asked, parts_of, encode = [], models.reward_parts, checkpoints.encode_prompts
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoints, "encode_prompts",
            lambda tokenizer, prompts: asked.extend(prompts) or encode(tokenizer, prompts))
        patch.setattr(
            models,
            "reward_parts",
            lambda task, text, ex, weights: parts_of(
                task, "</think><answer>0</answer>", ex, weights),
        )
        Path("sums.jsonl").write_text(
            "".join(
                json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n"
                for i in range(40)
            )
        )
        shape = ["--task", "gsm8k", "--model", "runs/m/model", "--data", "sums.jsonl",
                 "--completion-length", "16", "--block-length", "16", "--steps", "4"]
        assert agrpo.main(
            [*checkpoint, *shape, "--name", "x", "--max-steps", "1", "--prompt", "d1",
             "--system-prompt", "Add.", "--reward-weights", "correct=5,answer=0",
             "--overlong-penalty", "0.5", "--overlong-from", "0"]
        ) == 0
    row = rows_of("x")[0]
    parts = {k: float(row[k]) for k in row if k.startswith("reward_")}
    assert (
        set(parts) == {"reward_think", "reward_answer", "reward_correct", "reward_overlong"}
        and -0.5 <= parts["reward_overlong"] < 0
    )
    assert parts["reward_think"] == 0.5 and parts["reward_answer"] == 0 and len(asked) > 8
    assert all(
        message.startswith("Add.\n\n") and begin == "<reasoning>"
        for message, begin in asked
        if message != "1"
    )
    assert float(row["reward"]) == pytest.approx(sum(parts.values()))
    assert "Add.\n\n" in Path("runs/x/samples.txt").read_text()  # what the model was really asked
    for flags, style in (
        ([], "d1"), (["--prompt", "bare"], "bare")):  # the evaluation asks as the training did
        assert evaluation.main(
            ["--model", "runs/x", "--data", "sums.jsonl", "--steps", "4", "--out",
             f"{style}.jsonl", *flags]
        ) == 0
        settings = json.loads(Path(f"{style}.json").read_text())["settings"]
        assert (settings["prompt"], settings["system_prompt"], settings["task"]) == (
            style, "" if flags else "Add.", "gsm8k")


@pytest.mark.whole
def test_stop_signals_leave_a_checkpoint_and_resume(here, quick):
    env = {**os.environ, "AGRPO_CACHE": os.environ["AGRPO_CACHE"]}
    for number in (signal.SIGINT, signal.SIGTERM):
        name = f"stop-{int(number)}"
        process = subprocess.Popen(
            [sys.executable, AGRPO, *quick, "--name", name, "--max-steps", "100000"], env=env,
            stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 120
        while not Path(f"runs/{name}/checkpoint.pt").is_file() and time.time() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert (
            process.returncode == 130
            and "stopping after this step" in err
            and "Traceback" not in err
        )
        done = weights_of(name)["step"]
        assert done >= 1 and len(rows_of(name)) == done
        assert agrpo.main(["--name", name, "--resume", "--max-steps", str(done + 1)]) == 0
        assert weights_of(name)["step"] == done + 1


def test_the_paper_preset_is_the_published_estimator_and_flags_win(here, quick):
    cfg, _ = evaluation.parse(["--preset", "paper", "--mc-steps", "3"])
    assert (cfg.unmasking, cfg.timesteps, cfg.normalizer, cfg.advantage, cfg.mc_steps) == (
        "random", "low_discrepancy", "last_step", "mean", 3)
    assert cfg.name == "sudoku-paper-seed0"
    assert agrpo.main([*quick, "--preset", "paper", "--max-steps", "2"]) == 0
    # the preset is remembered
    assert agrpo.main(["--name", "sudoku-paper-seed0", "--resume", "--max-steps", "3"]) == 0
    assert (
        files.read_json(Path("runs/sudoku-paper-seed0/config.json"))["timesteps"]
        == "low_discrepancy"
    )


@pytest.mark.parametrize("unmasking", [
    rule if rule in ("random", "threshold") else pytest.param(rule, marks=pytest.mark.whole)
    for rule in models.choices()["unmasking"]])
def test_every_rule_of_unmasking_trains_and_evaluates(here, quick, unmasking, capsys):
    more = {"threshold": ["--threshold", "0.02"], "entropy_bound": ["--entropy-bound", "99"]}.get(
        unmasking, [])
    assert (
        agrpo.main([*quick, "--unmasking", unmasking, "--max-steps", "2", *more, "--name", "x"])
        == 0
    )
    nfe = [float(row["nfe"]) for row in rows_of("x")]
    assert (
        all(x < 8 for x in nfe)
        if unmasking in ("threshold", "entropy_bound")
        else all(x == (16 if unmasking == "left_to_right" else 8) for x in nfe)
    )
    assert evaluation.main(
        ["--model", "runs/x", "--limit", "4", "--steps", "16", "--unmasking", unmasking]) == 0


def test_half_precision_weights_give_float32_laws():
    cfg = dataclasses.replace(CFG, unmasking="low_confidence", temperature=0.7)
    policy, tokenizer = tiny(cfg, torch.bfloat16)
    batch = [ex for ex in examples() for _ in range(4)][:8]
    traj, _ = models.generate(policy, tokenizer, batch, [(i,) for i in range(8)], cfg)
    assert bool(torch.isfinite(traj.order_logp).all()) and bool(torch.isfinite(traj.logp).all())
    loss, ratio = exact_loss(policy, traj, torch.ones(8).double(), cfg)
    loss.backward()
    assert (
        ratio.dtype == torch.float64
        and (ratio[: 8 * 16] - 1).abs().max() < 1e-5
        and ratio.numel() == 8 * 16 + 8 * 8
    )
    assert all(
        bool(torch.isfinite(p.grad).all()) for p in policy.model.parameters() if p.grad is not None)


BAD = [(["--preset", "best"], "best"), (["--decay-steps", "50"], "--decay-steps"),
       (["--position-term", "maybe"], "maybe"),
       (["--order-score", "luck"], "luck"),
       (["--unmasking", "threshold", "--threshold", "1.5"], "threshold"),
       (["--completion-length", "256", "--block-length", "256", "--eval-steps", "8"], "256"),
       (["--task", "story", "--train-examples", "500000"], "train-examples"),
       (["--entropy-bound", "-1"], "entropy-bound"),
       (["--unmasking", "plackett_luce", "--tau-pos", "0"], "tau-pos"),
       (["--task", "chess"], "chess"), (["--model", "nowhere"], "nowhere"),
       (["--unmasking", "luck"], "luck"), (["--timesteps", "weekly"], "weekly"),
       (["--method", "ppo"], "ppo"), (["--max-steps", "many"], "many"),
       (["--no-such-flag"], "no-such-flag"),
       (["--completion-length", "16", "--block-length", "5"], "block-length"),
       (["--steps", "5"], "--steps 5"), (["--steps", "0"], "steps"), (["--lr", "nan"], "lr"),
       (["--temperature", "0"], "temperature"), (["--prompts", "-1"], "prompts"),
       (["--completions", "1"], "completions"), (["--eval-steps", "16,x"], "eval-steps"),
       (["--top-p", "0.9"], "top-k"), (["--device", "tpu"], "tpu"), (["--task", "gsm8k"], "gsm8k"),
       (["--resume"], "resume"), (["--data", "missing.csv"], "missing.csv"),
       (["--data", "bad.csv"], "bad.csv:3"), (["--data", "columns.csv"], "columns.csv:2"),
       (["--data", "empty.csv"], "empty.csv"),
       (["--task", "story", "--data", "bad.jsonl"], "bad.jsonl:2"),
       (["--task", "gsm8k", "--model", "llama", "--data", "good.jsonl"], "mask_token_id"),
       (["--name", "../up"], "name"), (["--name", "..", "--overwrite"], "name"),
       (["--seed", "9" * 30], "seed"), (["--max-steps", "9" * 500], "max-steps"),
       (["--temperature", "1e-50"], "temperature"), (["--resume", "--overwrite"], "overwrite"),
       (["--data", "invalid.csv"], "invalid.csv:2"), (["--data", "."], "--data"),
       (["--mc-steps", "9"], "there are 8 steps"), (["--clip", "0.3"], "--inner-epochs"),
       (["--tau-pos", "2"], "plackett_luce"), (["--threshold", "0.5"], "--unmasking threshold"),
       (["--fsdp", "on"], "--fsdp"), (["--importance-cap", "1"], "--cache"), (["stray"], "stray"),
       ([""], "Unrecognized"), (["--lr"], "--lr"), (["--lr", "--steps"], "--lr"),
       (["--lr=abc"], "abc"), (["--lr", "inf"], "--lr"), (["--steps", "4.5"], "4.5"),
       (["--steps", "8", "9"], "9"), (["--max-steps", ""], "--max-steps"), (["-x"], "-x"),
       (["--resume", "maybe"], "maybe"), (["--no-resume"], "--no-resume"),
       (["--system-prompt"], "--system-prompt"), (["--task=chess"], "chess"),
       (["--method.lr", "3"], "--method.lr"), (["x" * 300], "xxx"), (["--lr", "x" * 300], "--lr"),
       (["--lr", "a\nb"], "--lr"), (["--name", "a\nb"], "--name"), (["--model", "a\nb"], "--model"),
       (["--data", "a\nb.csv"], "--data"), (["--quantize", "4bit"], "--quantize"),
       (["--reward-weights", "correct=nan"], "--reward-weights"), (["--lr", "-.5"], "--lr")]


@pytest.mark.parametrize("flags, word", BAD, ids=[" ".join(b[0])[:60] for b in BAD])
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(here, flags, word, capsys):
    Path("bad.csv").write_text(
        "Puzzle,Solution\n3102200002100320,3142243142131324\n310220000210032,3142243142131324\n")
    Path("columns.csv").write_text("Question,Answer\n1,2\n")
    Path("invalid.csv").write_text("Puzzle,Solution\n3102200002100320,1111111111111111\n")
    Path("empty.csv").write_text("Puzzle,Solution\n")
    Path("bad.jsonl").write_text(
            '{"question": "a", "answer": "5+2=7\\n#### 7"}\n{"question": "a\n')
    Path("good.jsonl").write_text(
        "".join(f'{{"question": "{i}+1?", "answer": "#### {i + 1}"}}\n' for i in range(40)))
    Path("llama").mkdir()
    Path("llama/config.json").write_text('{"model_type": "llama"}')
    assert agrpo.main(flags) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and word in err and out == "" and not Path("runs").exists()


def test_a_run_folder_belongs_to_one_process_at_a_time(here, capsys):
    folder = Path("runs/one")
    with runs.begun(folder, {"a": 1}, False):
        (folder / "log.csv").write_text("")
        with pytest.raises(BadInput, match="another process is writing runs/one"):
            with runs.begun(folder, {"a": 1}, True):
                pass
        assert (folder / "log.csv").exists()
    with runs.begun(folder, {"a": 2}, True):                   # and free again, emptied
        assert [p.name for p in folder.iterdir()] == ["config.json"]


def test_ones_own_rows_are_not_replaced_by_those_of_methods():
    code = """
import agrpo
mine = agrpo.Method(agrpo.exact_views)
rule, draw, reward = agrpo.Unmask(lambda *_: None), lambda *_: None, lambda r: r
agrpo.METHODS["tracerl"], agrpo.UNMASK["confidence"], agrpo.TIMESTEPS["iid"] = mine, rule, draw
agrpo.ADVANTAGES["none"] = reward
import methods.models
assert agrpo.METHODS["tracerl"] is mine and agrpo.UNMASK["confidence"] is rule
assert agrpo.TIMESTEPS["iid"] is draw and agrpo.ADVANTAGES["none"] is reward
assert {"dipo", "diffpo"} <= set(agrpo.METHODS) and "sobol" in agrpo.TIMESTEPS
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(AGRPO).parent)


def test_a_run_does_not_go_on_with_other_examples(here, quick, capsys):
    flags = [*quick, "--task", "story", "--data", "stories.jsonl", "--name", "a"]
    del flags[flags.index("--train-examples"):flags.index("--train-examples") + 2]
    lines = [json.dumps(ex) + "\n" for ex in TASKS["story"].generate(40, 0, "train")]
    lines += [json.dumps(ex) + "\n" for ex in TASKS["story"].generate(10, 0, "test")]
    Path("stories.jsonl").write_text("".join(lines))
    assert agrpo.main([*flags, "--max-steps", "1"]) == 0
    Path("stories.jsonl").write_text("".join(lines[10:]))
    assert agrpo.main([*flags, "--max-steps", "2", "--resume"]) == 2
    assert "was run with examples=" in capsys.readouterr().err
    Path("stories.jsonl").write_text("".join(lines))
    Path("runs/a").rename("runs/b")                            # a folder may be called anything
    assert agrpo.main([*flags, "--max-steps", "2", "--resume", "--name", "b"]) == 0


def test_what_a_run_was_made_with_and_is_not_here_is_named(here, capsys):
    settings = dataclasses.asdict(evaluation.parse([])[0])
    for name, value, told in (("method", "mine", "unknown --method 'mine'"),
                              ("unmasking", "mine", "unknown --unmasking 'mine'"),
                              ("task", "sort", "no task is called 'sort'")):
        Path("runs/mine").mkdir(parents=True, exist_ok=True)
        Path("runs/mine/config.json").write_text(json.dumps({**settings, name: value}))
        assert agrpo.main(["--resume", "--name", "mine"]) == 2
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1


def test_the_rate_decays_until_the_last_step_and_no_earlier():
    def decay(*flags):
        cfg = evaluation.parse([*flags])[0]
        return cfg.decay_steps, cfg.max_steps
    assert decay("--sft", "gold") == (400, 400) and decay() == (0, 100)
    assert decay("--sft", "gold", "--max-steps", "1000") == (1000, 1000)
    assert decay("--sft", "gold", "--max-steps", "20") == (400, 20)    # a beginning
    assert decay("--max-steps", "20", "--decay-steps", "30") == (30, 20)


def test_a_full_disk_is_one_line(here, quick, monkeypatch, capsys):
    def full(state, f):
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")
    monkeypatch.setattr(torch, "save", full)
    assert agrpo.main([*quick, "--max-steps", "1", "--name", "full"]) == 1
    err = capsys.readouterr().err
    assert "cannot write runs/full/checkpoint.pt" in err and "Traceback" not in err


def test_a_part_of_the_reward_that_a_text_does_not_have_is_zero(monkeypatch):
    task = dataclasses.replace(TASKS["sudoku"], weights={"x": 2.0, "y": 1.0}, parts=(
        lambda text, ex: {"x": 1.0} if "1" in text else {"y": 0.5}))
    monkeypatch.setitem(TASKS, "sudoku", task)
    assert reward_parts("sudoku", "1", {}) == {"x": 2.0, "y": 0.0}
    assert reward_parts("sudoku", "2", {}) == {"x": 0.0, "y": 0.5}
    monkeypatch.setitem(TASKS, "sudoku", dataclasses.replace(task, weights={"x": 1.0}))
    with pytest.raises(ValueError, match="no weight for the parts y"):
        reward_parts("sudoku", "2", {})


def test_examples_of_ones_own_task_are_checked(monkeypatch):
    pair = {"pair": (1, 2)}
    task = dataclasses.replace(TASKS["sudoku"], question=str, gold=lambda ex: "1", canonical=None,
                               parts=lambda text, ex: {}, grade=lambda text, ex: 1.0, bare=None,
                               generate=lambda n, seed, split: [{"d": i % 5} for i in range(n)])
    monkeypatch.setitem(TASKS, "sudoku", task)
    try_task("sudoku", {"pair": [1, 2]})
    with pytest.raises(BadInput, match="JSON"):
        try_task("sudoku", pair)
    with pytest.raises(BadInput, match="to train on and to hold out"):
        load_split("sudoku", 8, 4, 0)


def test_help_shows_the_defaults_of_what_is_asked_for(capsys):
    def shown(*flags):
        with pytest.raises(SystemExit):
            evaluation.parse([*flags, "--help"])
        words = capsys.readouterr().out.split()
        return {k: " ".join(words[words.index(k):]).split("(default: ")[1].split(")")[0]
                for k in ("--advantage", "--position-term", "--completion-length")}
    assert shown() == {"--advantage": Settings().advantage, "--position-term": "on",
                       "--completion-length": "16"}
    assert shown("--method", "diffpo")["--advantage"] == "mean"
    assert shown("--method", "diffpo")["--position-term"] == "off"
    assert shown("--task", "gsm8k")["--completion-length"] == "256"
    assert shown("--task", "gsm8k", "--preset", "paper")["--completion-length"] == "384"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("flags, told", [
    (["--task", "gsm8k", "--model", "./missing"], "there is no such folder"),
    (["--task", "gsm8k", "--data", "nothing.jsonl"], "cannot read --data nothing.jsonl"),
    (["--task", "gsm8k", "--data", "there.jsonl", "--test-data", "no.jsonl"], "no.jsonl")])
def test_what_is_not_there_is_named_before_a_gpu_is_asked_for(here, no_gpu, flags, told, capsys):
    Path("there.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    assert agrpo.main(flags) == 2
    err = capsys.readouterr().err
    assert told in err and "GPU" not in err and err.count("\n") == 1


IDLE = {                               # under which flags a setting does not act; else by default
    "mc_steps": ["--method", "exact"], "timesteps": ["--method", "exact"],
    "preset": ["--method", "exact"], "kl": ["--kl-reference", "old"],
    "kl_reference": ["--inner-epochs", "2"],
    "--model tiny or tiny-block": ["--model", "small"],        # or of a whole row
    "RL, not with --sft": ["--sft", "gold"],
    "--controller-training joint": ["--controller", "threshold", "--controller-training", "alone"],
    "generated examples, not with --data": ["--task", "gsm8k", "--model", "small", "--data",
                                            "gsm8k.jsonl"]}
VALUES = {"preset": "paper", "kl": "0.1", "system_prompt": "x", "reward_weights": "correct=1"}
ACT = [["--mc-steps", "8"], ["--method", "exact", "--inner-epochs", "2", "--clip", "0.3"],
       ["--unmasking", "plackett_luce", "--tau-pos", "2", "--order-score", "neg_entropy"],
       ["--unmasking", "threshold", "--threshold", "0.5"], ["--kl", "0.1"],
       ["--kl", "0.1", "--kl-reference", "old", "--inner-epochs", "2"],
       ["--shrink", "2", "--method", "tracerl"], ["--lora-rank", "4", "--lora-alpha", "8"],
       ["--unmasking", "entropy_bound", "--entropy-bound", "1"],
       ["--overlong-penalty", "1", "--overlong-from", "0.5"],
       ["--cache", "dual", "--importance-cap", "3"], ["--alpha", "1", "--controller", "entropy"]]
ACTING_WITH = [(name, words) for names, words, *_ in rules.GOES_WITH for name in names.split()]


@pytest.mark.parametrize("name, words", ACTING_WITH)
def test_a_setting_that_would_not_act_is_refused_in_one_line(here, name, words, capsys):
    defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
    value, flags = VALUES.get(name, str(defaults[name])), IDLE.get(words, IDLE.get(name, []))
    if "small" in flags:
        write_checkpoint(Path("small"), "llada")
        Path("gsm8k.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n' * 9)
    if options.flag(name) in flags:
        flags = [word for word in flags if word not in ("--method", "exact")]
    assert agrpo.main([options.flag(name), value, *flags, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert f"{options.flag(name)} {value} goes with {words}" in err
    assert err.count("\n") == 1 and not out


@pytest.mark.parametrize("flags", ACT, ids=" ".join)
def test_a_setting_that_acts_is_taken(here, flags):
    cfg, _ = evaluation.parse(flags)
    for name, value in zip(flags[::2], flags[1::2]):
        found = getattr(cfg, name[2:].replace("-", "_"))
        assert found == type(found)(value)


def test_help_is_short_and_help_all_shows_every_setting(here, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)               # of pytest's workers

    def shown(*flags):
        with pytest.raises(SystemExit) as stop:
            agrpo.main(flags)
        out, err = capsys.readouterr()
        assert stop.value.code == 0 and err == ""
        return out, {word.strip("-,").replace("-", "_") for word in out.split()
                     if word.startswith("--")}
    out, names = shown("--help")
    first = [f.name for owner in list(models.OWNERS)[:4]
             for f in dataclasses.fields(models.OWNERS[owner])]
    assert len(out.splitlines()) <= 100 and names >= set(first) and "shrink" not in names
    assert all(word in out for rows in models.choices().values() for word in rows)
    of_tracerl = {f.name for f in dataclasses.fields(models.OWNERS["tracerl"])}
    assert shown("--help", "--method", "tracerl")[1] == names | of_tracerl
    every = {f.name for owner in models.OWNERS.values() for f in dataclasses.fields(owner)}
    assert shown("--help-all")[1] >= every


def test_the_log_has_its_columns_in_their_order(here, quick):
    assert agrpo.main([*quick, "--name", "x", "--max-steps", "1", "--eval-every", "1"]) == 0
    header, row = Path("runs/x/log.csv").read_text().splitlines()
    assert header.split(",") == [
        "step", "reward", "reward_format", "reward_correct", "solved", "ratio", "clip_fraction",
        "grad_norm", "entropy", "nfe", "ease", "is_weight", "is_capped", "sampled", "passes",
        "passes_saved", "skipped", "lr", "heldout", "peak_memory_mb", "rollout_seconds",
        "update_seconds"]
    row = dict(zip(header.split(","), row.split(",")))
    assert {k for k, v in row.items() if not v} == {"ease", "is_weight", "is_capped"}
    assert row["step"] == "0" and row["sampled"] == "8" and float(row["nfe"]) == 8


def test_a_prompt_longer_than_the_context_is_refused(here, quick, checkpoint, capsys):
    assert agrpo.main([*quick, "--max-steps", "0", "--name", "m"]) == 0
    capsys.readouterr()
    Path("long.jsonl").write_text(
        "".join(
            json.dumps({"question": "x" * 300 + str(i), "answer": "#### 1"}) + "\n"
            for i in range(40)
        )
    )
    assert agrpo.main(
        [*checkpoint, "--task", "gsm8k", "--model", "runs/m/model", "--data", "long.jsonl",
         "--completion-length", "16", "--block-length", "16", "--steps", "4"]
    ) == 2
    assert "context" in capsys.readouterr().err and not Path("runs/gsm8k-agrpo-seed0").exists()


def test_a_folder_with_another_configuration_is_refused(here, quick, capsys):
    assert agrpo.main([*quick, "--max-steps", "1", "--name", "x"]) == 0
    before = {p: p.stat().st_mtime_ns for p in Path("runs/x").rglob("*")}
    for flags, word in ((["--name", "x"], "--resume"),
                        (["--name", "x", "--resume", "--lr", "0.5"], "lr=0.5"),
                        (["--name", "x", "--resume", "--task", "story"], "task")):
        capsys.readouterr()
        assert agrpo.main(flags) == 2 and word in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in Path("runs/x").rglob("*")} == before


def test_train_and_held_out_examples_share_no_statement():
    for task in ("sudoku", "countdown", "story"):
        for seed in range(2):
            train = {TASKS[task].key(ex) for ex in TASKS[task].generate(400, seed, "train")}
            test = {TASKS[task].key(ex) for ex in TASKS[task].generate(200, 0, "test")}
            assert not train & test and len(train) > 50 and len(test) > 50


def test_gold_answers_are_right_and_lazy_ones_mostly_wrong():
    import random

    for task, most in (("sudoku", 0.15), ("story", 0.25)):
        data, rng = TASKS[task].generate(200, 5, "train"), random.Random(0)
        assert all(grade(task, gold_completion(task, ex, "bare"), ex) == 1 for ex in data)
        assert np.mean([grade(task, TASKS[task].lazy(ex, rng), ex) == 1 for ex in data]) < most


def test_stories_and_their_chains_are_what_they_say():
    """Every story read again with its own words: numbers, verbs, chain; nothing left out."""
    lengths = {1: 0, 2: 0, 3: 0}
    for ex in TASKS["story"].generate(500, 3, "test"):
        chain, answer = ex["answer"].split("\n#### ")
        head, *events = ex["question"].removesuffix(".").split(", ")
        total, steps = int(head.split()[2]), head.split()[2]
        for verb, n in map(str.split, events):
            total += int(n) if verb in puzzles.GAINS else -int(n)
            steps += f"{'+' if verb in puzzles.GAINS else '-'}{n}={total}"
            assert 10 <= total < 40 and (verb in puzzles.GAINS) != (verb in puzzles.LOSSES)
        assert (steps, str(total)) == (chain, answer)
        lengths[len(events)] += 1
        wrong = ex | {"answer": f"#### {total + 1}"}
        assert grade("story", gold_completion("story", ex, "bare"), wrong) == 0
    assert min(lengths.values()) > 100


def test_a_task_may_name_its_words():
    words = TASKS["story"].words
    tokenizer = tiny_models.tiny_tokenizer(words)
    assert len(tokenizer) == 6 + len(words) == 6 + len(set(words))
    for ex in TASKS["story"].generate(100, 0, "train"):
        for text in (ex["question"], gold_completion("story", ex, "bare"),
                     TASKS["story"].lazy(ex, None)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids and len(ids) <= 16
            assert tokenizer.decode(ids) == text.replace(" ", "")
    assert len(tokenizer("27+5=32-3=<answer>29</answer>")["input_ids"]) == 11     # one a number
    assert tokenizer.unk_token_id in tokenizer("Ann has 270 pens!")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("Ann has 60 pens.")["input_ids"]  # not 6 and 0
    digits = tiny_models.tiny_tokenizer(("1", "2"))            # here they are digits
    assert digits.convert_ids_to_tokens(digits("12 2")["input_ids"]) == ["1", "2", "2"]
    longest = tiny_models.tiny_tokenizer(("a", "ab", "b"))
    assert longest.convert_ids_to_tokens(longest("abb a b")["input_ids"]) == ["ab", "b", "a", "b"]


@pytest.mark.parametrize("words", [
    ("1", "2", "1"), ("<eos>", "1"), {"1", "2"}, (1, 2), ("1 2", "1"), ("", "1")],
    ids=["twice", "special", "set", "numbers", "space", "empty"])
def test_words_that_cannot_be_tokens_are_one_line(words, here, monkeypatch, quick, capsys):
    monkeypatch.setitem(TASKS, "mine", dataclasses.replace(TASKS["sudoku"], words=words))
    assert agrpo.main([*quick, "--task", "mine"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "words must be" in err and "making" not in out


@pytest.mark.parametrize("flags", [
    ["--data", "xavier.jsonl"], ["--prompt", "d1"], ["--prompt", "agrpo", "--sft", "gold"]])
def test_prompts_that_the_model_has_no_token_for_are_refused(flags, here, quick, capsys):
    """Before work starts, in training and evaluation, by the tiny model and by one trained."""
    said = ["Ann", "Ben", "Xavier", "Max", "Tom", "Zoe"]
    Path("xavier.jsonl").write_text("".join(json.dumps({
        "question": f"{name} has {20 + i} cups, buys 3.",
        "answer": f"{20 + i}+3={23 + i}\n#### {23 + i}"}) + "\n"
        for i in range(4) for name in said))
    small = ["--base-steps", "2", "--train-examples", "32", "--eval-examples", "8"]
    assert agrpo.main(["--task", "story", *small, "--max-steps", "0", "--name", "was"]) == 0
    whole = sorted(Path("runs").rglob("*"))
    commands = [(agrpo.main, [*small, "--model", "tiny"]), (agrpo.main, ["--model", "runs/was"])]
    if flags[0] == "--data":
        commands += [(evaluation.main, ["--model", model]) for model in ("tiny", "runs/was")]
    for command, model in commands:
        capsys.readouterr()
        assert command(["--task", "story", *model, *flags]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "has no token for '" in err
        assert ("'Xavier' in 'Xavier has" in err) == (flags[0] == "--data")
    assert sorted(Path("runs").rglob("*")) == whole


def test_a_task_of_words_alone_is_trained_and_its_model_opened(here, quick, monkeypatch):
    """No digit among its words."""
    colours = dataclasses.replace(
        TASKS["story"], words=("red", "blue", ";"), question=lambda ex: ex["colour"],
        gold=lambda ex: ex["colour"], bare_gold=lambda ex: f"{ex['colour']};",
        lazy=lambda ex, rng: "red;", parts=lambda text, ex: {}, weights={"correct": 1},
        row=dict, canonical=None, grade=lambda text, ex: float(text == f"{ex['colour']};"),
        generate=lambda n, seed, split: [
            {"colour": ("red" if split == "test" else "blue") * (i + 1)} for i in range(n)])
    monkeypatch.setitem(TASKS, "mine", colours)
    shape = ["--completion-length", "40", "--block-length", "40", "--steps", "4", "--eval-steps",
             "4", "--train-examples", "4", "--eval-examples", "4", "--prompts", "2"]
    assert agrpo.main([*quick, "--task", "mine", *shape, "--name", "m", "--max-steps", "1"]) == 0
    assert evaluation.main(["--task", "mine", "--model", "runs/m", "--limit", "4"]) == 0


def test_a_right_answer_that_its_words_cannot_say_is_refused(here, quick, monkeypatch, capsys):
    """Spaces between words are left out: an answer that needs one could never be solved."""
    told = dataclasses.replace(
        TASKS["story"], bare_gold=lambda ex: "Ann has", lazy=lambda ex, rng: "has",
        parts=lambda text, ex: {"correct": 0.0}, weights={"correct": 1.0},
        grade=lambda text, ex: float(text == "Ann has"))
    monkeypatch.setitem(TASKS, "story", told)
    assert agrpo.main([*quick, "--task", "story"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "'Annhas', which is graded wrong" in err


def test_a_story_without_its_chain_is_refused_with_its_line():
    for answer in ("#### 13", "27+5=33\n#### 32", "Tom has 13.\n#### 13", "13\n#### 13"):
        with pytest.raises(ValueError, match="must be a right chain"):
            TASKS["story"].key({"question": "Tom has 13 cups.", "answer": answer})


def test_bad_stories_are_left_out_and_counted(tmp_path, capsys):
    rows = [("Tom has 21 cups, buys 3.", answer) for answer in (
        "21+3=24\n#### 24", "21*3=63\n#### 63", "21+3=24\n#### 25", "21+3=25\n#### 25")]
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    with pytest.raises(BadInput, match="stories.jsonl:2: the answer must be a right chain"):
        load_split("story", 0, 8, 0, str(path))
    assert len(from_file("story", str(path), skip=True)) == 1
    assert "left out 3 of 4 examples" in capsys.readouterr().out


def test_lazy_answers_begin_after_their_share_of_the_steps(monkeypatch):
    """What the base model is shown: right answers alone, then lazy ones."""
    story, seen = dataclasses.replace(TASKS["story"], lazy=lambda ex, rng: "Ann"), []
    monkeypatch.setitem(TASKS, "story", story)
    tokenizer = tiny_models.tiny_tokenizer(story.words)

    def loss(policy, prompt, prompt_mask, tokens, g, even):
        seen.append((even, float((tokens[:, 0] == tokenizer.vocab["Ann"]).double().mean())))
        return next(policy.parameters()).sum() * 0
    monkeypatch.setattr(sft, "sft_loss", loss)
    cfg = models.settle({"task": "story", "base_steps": 20, "base_lazy_from": 0.5, "base_lazy": 1.0,
                         "base_hidden": 16, "base_layers": 1, "train_examples": 16})
    net = tiny_models.tiny_model(tokenizer, cfg)
    sft.train_base(agrpo.Policy(net, tokenizer.mask_token_id, tokenizer.eos_token_id), tokenizer,
                   cfg)
    assert seen == [(True, 0.0)] * 10 + [(True, 1.0)] * 10


def test_what_is_not_a_run_is_neither_resumed_nor_overwritten(here, quick, capsys):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/thesis.txt").write_text("years of work")
    for flags in (["--overwrite"], ["--resume"], []):
        assert agrpo.main([*quick, "--name", "mine", *flags]) == 2
    assert Path("runs/mine/thesis.txt").read_text() == "years of work"
    Path("runs/born").mkdir()  # killed before its first file: free to use
    Path("runs/born/config.json.partial").write_text("{")
    assert agrpo.main([*quick, "--name", "born", "--max-steps", "0"]) == 0


def test_broken_files_of_a_run_are_one_line(here, quick, capsys):
    assert agrpo.main([*quick, "--max-steps", "1", "--name", "x"]) == 0
    for name, text in (("checkpoint.pt", "garbage"), ("config.json", "{bad"),
                       ("config.json", "[1]"), ("config.json", '{"task": "chess"}'),
                       ("checkpoint.pt", ""), ("eval_base.json", "[]")):
        whole = Path("runs/x", name).read_bytes()
        Path("runs/x", name).write_text(text)
        capsys.readouterr()
        assert (
            agrpo.main(["--name", "x", "--resume", "--max-steps", "2"]) == 2
            and name in capsys.readouterr().err
        )
        Path("runs/x", name).write_bytes(whole)
    for name, text in (("config.json", "{bad"), ("tokenizer.json", "{"),
                       ("model.safetensors", "garbage"), ("agrpo.json", "[]")):
        whole = Path("runs/x/model", name).read_bytes()
        Path("runs/x/model", name).write_text(text)
        capsys.readouterr()
        assert (
            evaluation.main(["--model", "runs/x", "--limit", "4", "--steps", "4"]) == 2
            and capsys.readouterr().err.count("\n") == 1
        )
        Path("runs/x/model", name).write_bytes(whole)
    assert (
        evaluation.main(["--model", "runs/x", "--limit", "4", "--steps", "4", "--out", "x.json"])
        == 2
    )
    assert evaluation.main(["--model", "runs/x", "--limit", "4", "--steps", "4"]) == 0


@pytest.mark.parametrize("timesteps", models.choices()["timesteps"])
def test_a_step_on_weights_that_are_not_finite_is_skipped(timesteps):
    policy, tokenizer = tiny()
    with torch.no_grad():
        policy.model.lm_head.weight[40] = float("nan")
    optimizer = Watched(policy.model.parameters(), lr=0.1)
    row = train_step(
        policy, tokenizer, optimizer, examples(), 0, dataclasses.replace(CFG, timesteps=timesteps))
    assert row["skipped"] == 1 and row["passes"] == 0 and optimizer.steps == 0


@pytest.mark.parametrize("where", [
    "gradient", *(pytest.param(where, marks=pytest.mark.whole) for where in ("reward", "loss"))])
def test_what_is_not_finite_is_skipped_counted_and_stops_the_run_after_three_in_a_row(
    here, quick, monkeypatch, where, varied_reward, capsys):
    loss_of, parts_of, calls = agrpo.policy_loss, models.reward_parts, []

    def broken(policy, *args):  # steps 1, 3, 4, 5 of 0..5, a pass each
        loss, ratio = loss_of(policy, *args)
        calls.append(1)
        bad = len(calls) - 1 in (1, 3, 4, 5)
        weight = policy.model.get_input_embeddings().weight
        if where == "gradient" and bad:  # finite loss, infinite slope
            loss = loss + ((weight - weight.detach()).abs().sum()).sqrt()
        return (loss * float("nan") if where == "loss" and bad else loss), ratio

    def no_number(task, text, ex, weights):
        calls.append(1)
        return {
            "correct": float("nan")
            if (len(calls) - 1) // 8 in (1, 3, 4, 5)
            else parts_of(task, text, ex, weights)["correct"]
        }

    monkeypatch.setattr(
        *(
            (models, "reward_parts", no_number)
            if where == "reward"
            else (agrpo, "policy_loss", broken)
        )
    )
    assert agrpo.main([*quick, "--eval-every", "0", "--max-steps", "9", "--name", "x"]) == 1
    assert "3 times in a row" in capsys.readouterr().err and [
        row["skipped"] for row in rows_of("x")] == ["0", "1", "0", "1", "1", "1"]
    saved = weights_of("x")
    assert all(bool(v.isfinite().all()) for v in saved["model"].values()) and saved["step"] == 6
    assert saved["optimizer"]["state"][0]["step"] == 2  # two of the six changed the weights
    monkeypatch.setattr(agrpo, "policy_loss", loss_of)
    monkeypatch.setattr(models, "reward_parts", parts_of)
    assert agrpo.main(["--name", "x", "--resume", "--max-steps", "7"]) == 0
