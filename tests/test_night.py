"""Protects what a user gets without flags on one GPU: model, sizes, cache, time and memory, and
what a run says after its first steps. Run: pytest tests/test_night.py"""
import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent / "measure"))
import agrpo  # noqa: E402
import eval as evaluation  # noqa: E402
from checkpoints import write_checkpoint  # noqa: E402
from methods.models import settle  # noqa: E402
from gpu import large_policy  # noqa: E402
from nights import GPUS  # noqa: E402
from rewards import BadInput  # noqa: E402
from shapes import SHAPES, night, stock_config  # noqa: E402
from support import cost, log, options, presets, runs  # noqa: E402
from support.verdict import verdict  # noqa: E402

H100, A100, RTX = GPUS["80 GB (H100)"], GPUS["40 GB (A100)"], GPUS["24 GB (RTX 4090)"]
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.fixture
def on_gpu(monkeypatch):
    """on_gpu(memory, rate, generation): as if this machine had one."""
    def there(memory, rate, generation):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(cost, "room", lambda device: memory)
        monkeypatch.setattr(cost, "matmul_rate", lambda device: rate)
    return there


# ------------------------------------------------------------------------------ names and sizes
def test_short_names_are_those_of_the_hub_and_bring_their_cards_sampling(here):
    assert settle({"task": "gsm8k", "model": "llada-8b"}).model == "GSAI-ML/LLaDA-8B-Instruct"
    for name, (hub, card) in presets.MODELS.items():
        by_name, by_hub = (settle({"task": "gsm8k", "model": model}) for model in (name, hub))
        assert by_name == by_hub and by_name.model == hub
        assert card.items() <= dataclasses.asdict(by_name).items()
    given = options.read_flags("x", "", {"run": options.Run}, ["--model", "sdar-4b"])
    assert given["model"] == "JetLM/SDAR-4B-Chat"
    Path("sdar-4b").mkdir()                                    # one's own comes first
    assert options.hub_name("sdar-4b") == "sdar-4b"
    with pytest.raises(BadInput, match="llada-8b"):
        settle({"task": "gsm8k", "model": "lada-8b"})


@pytest.mark.parametrize("gpu, cache, hours", [
    (H100, "none", 12), ((84.9, 250e12, 8), "dual", 12), (A100, "dual", 12), (RTX, "dual", 16)])
def test_one_night_is_chosen_by_the_gpu(on_gpu, gpu, cache, hours):
    on_gpu(*gpu)
    cfg = settle({"task": "gsm8k"})
    assert (cfg.model, cfg.cache, cfg.hours) == ("GSAI-ML/LLaDA-8B-Instruct", cache, hours)
    assert (cfg.prompts, cfg.completions, cfg.completion_length, cfg.block_length, cfg.steps,
            cfg.mc_steps, cfg.max_steps) == (8, 8, 256, 32, 64, 4, 300)
    assert (cfg.eval_length, cfg.eval_block_length, cfg.eval_steps) == (256, 32, "128")


@pytest.mark.parametrize("memory", [8.4, 12.6, 16.9])
def test_where_8_billion_parameters_do_not_fit_the_small_model_is_the_default(on_gpu, memory):
    on_gpu(memory, 51e12, 8)
    cfg = settle({"task": "gsm8k"})
    assert cfg.model == "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1" and cfg.model_block == 32
    config = stock_config("qwen3-0.6b-bd3lm")
    cfg = cost.fitted(config, night("qwen3-0.6b-bd3lm"), 400, "cuda:0")
    assert cost.estimate(config, cfg, 400, True)["total"] < 0.9 * memory
    assert settle({"task": "gsm8k", "model": "llada-8b"}).model == "GSAI-ML/LLaDA-8B-Instruct"


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_night_is_forecast_within_its_hours_and_fits(on_gpu, gpu, name):
    memory, rate, _ = GPUS[gpu]
    on_gpu(*GPUS[gpu])
    config, cfg = stock_config(name), night(name)
    cfg = cost.fitted(config, cfg, 400, "cuda:0")
    found = cost.memory(config, cfg, 400, True)
    if found["weights"] + found["trained"] > memory:
        with pytest.raises(BadInput, match="weights and optimizer need"):
            cost.announce(config, cfg, (400, 250), "cuda:0", 1)
        return
    run = cost.whole_run(cost.estimate(config, cfg, 250, True), cfg, rate)
    assert run["total"] <= 3600 * (16 if memory < 32 else 12) and run["steps"] <= 300
    assert run["steps"] >= 100 or memory < 24
    assert found["total"] < 0.9 * memory or cfg.rollout_batch == 1


def test_without_a_gpu_sizes_are_those_of_one_night_without_a_cache(here):
    cfg = settle({"task": "gsm8k", "model": "llada-8b", "device": "cpu"})
    assert (cfg.cache, cfg.rollout_batch, cfg.tokens_per_pass) == ("none", 0, 0)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_the_paper_preset_is_the_published_recipe(here, preset):
    cfg = settle({"task": "gsm8k", "preset": preset, "device": "cpu"})
    assert (cfg.prompts, cfg.completions, cfg.completion_length, cfg.block_length, cfg.steps,
            cfg.mc_steps) == (16, 8, 384, 12, 128, 24)
    assert (cfg.temperature, cfg.top_k, cfg.top_p, cfg.lr, cfg.lora_rank, cfg.lora_alpha,
            cfg.weight_decay, cfg.clip) == (0.6, 150, 0.99, 5e-6, 64, 64, 0.01, 0.2)
    # five epochs, 1 % of them
    assert cfg.max_steps == cfg.decay_steps == 5 * 7473 // 16 and cfg.warmup == cfg.max_steps // 100
    assert (cfg.eval_length, cfg.eval_block_length, cfg.eval_steps, cfg.prompt) == (
        256, 32, "128", "agrpo")
    assert (cfg.unmasking, cfg.timesteps, cfg.advantage, cfg.normalizer, cfg.hours) == (
        "random", "low_discrepancy", "mean", "last_step", 0)
    at = options.for_evaluation(cfg)
    assert (at.completion_length, at.temperature, at.unmasking) == (256, 0, "low_confidence")
    assert settle({"task": "gsm8k", "preset": preset, "mc_steps": 2}).mc_steps == 2    # flags win


def test_the_justgrpo_preset_scores_every_step_of_a_left_to_right_rollout(
        here, quick, capsys):
    cfg = settle({"task": "gsm8k", "preset": "justgrpo", "device": "cpu"})
    assert (cfg.method, cfg.unmasking, cfg.advantage, cfg.prompts, cfg.completions, cfg.max_steps,
            cfg.completion_length, cfg.steps, cfg.temperature, cfg.top_k, cfg.lr) == (
        "exact", "left_to_right", "std", 64, 16, 125, 256, 256, 1.0, 0, 5e-6)
    cfg, _ = evaluation.parse(["--preset", "justgrpo"])        # the tiny model's: a token a step
    assert (cfg.method, cfg.steps, cfg.name) == ("exact", 16, "sudoku-justgrpo-seed0")
    assert agrpo.main([*quick, "--preset", "justgrpo", "--max-steps", "1"]) == 0
    row = next(csv.DictReader(open("runs/sudoku-justgrpo-seed0/log.csv")))
    assert float(row["nfe"]) == 16 and float(row["ratio"]) == pytest.approx(1, abs=1e-5)
    assert agrpo.main(["--preset", "justgrpo", "--method", "agrpo"]) == 2
    assert "its own --method" in capsys.readouterr().err


@pytest.mark.parametrize("flags, steps", [
    ("", 16), ("--steps 4", 4), ("--model tiny-block", 20), ("--task story", 16)])
def test_left_to_right_takes_a_token_a_step_unless_told(here, flags, steps):
    assert evaluation.parse(["--unmasking", "left_to_right", *flags.split()])[0].steps == steps


def test_a_shorter_completion_keeps_its_tokens_a_step(here):
    cfg = settle({"task": "gsm8k", "model": "llada-8b", "completion_length": 128})
    assert (cfg.steps, cfg.eval_steps, cfg.eval_length) == (32, "64", 0)
    cfg = settle({"task": "gsm8k", "model": "llada-8b", "completion_length": 512, "steps": 512})
    assert (cfg.steps, cfg.eval_steps) == (512, "256")
    cfg = settle({"task": "gsm8k", "model": "llada-8b", "completion_length": 64,
                  "eval_length": 256})
    assert (cfg.steps, cfg.eval_steps, cfg.eval_length) == (16, "128", 256)
    cfg = settle({"task": "gsm8k", "model": "llada-8b", "completion_length": 50,
                  "block_length": 50})
    assert (cfg.steps, cfg.eval_steps) == (10, "25")           # the nearest that divide it
    for name in ("dream-7b", "llada-8b"):                      # the usual length said aloud
        plain = {"task": "gsm8k", "model": name}
        assert settle({**plain, "completion_length": 256}) == settle(plain)


@pytest.mark.parametrize("given, cache", [
    ({}, "dual"), ({"method": "exact"}, "dual"), ({"method": "diffu-grpo"}, "none"),
    ({"sft": "gold"}, "none"), ({"controller": "threshold"}, "none"),
    ({"position_term": "on"}, "none"), ({"timesteps": "low_discrepancy"}, "none"),
    ({"normalizer": "last_step"}, "none"), ({"preset": "paper"}, "none"),
    ({"cache": "none"}, "none"), ({"cache": "prefix"}, "prefix")])
def test_a_cache_nobody_asked_for_gives_way_to_what_was_asked_for(on_gpu, given, cache):
    on_gpu(*RTX)
    assert night("llada-8b", **given).cache == cache
    assert night("qwen3-0.6b-mdlm").cache == "none"            # small ones need none


# -------------------------------------------------------------------------------- memory, hours
@pytest.mark.parametrize("gpu, checkpointing", [(RTX, "on"), (A100, "off"), (H100, "off")])
def test_rows_and_passes_are_as_large_as_memory_allows_and_flags_win(on_gpu, gpu, checkpointing):
    on_gpu(*gpu)
    config, cfg = stock_config("llada-8b"), night("llada-8b")
    fit = cost.fitted(config, cfg, 400, "cuda:0")
    assert fit.gradient_checkpointing == checkpointing
    assert cost.memory(config, fit, 400, True)["total"] < 0.9 * gpu[0]
    more = dataclasses.replace(fit, rollout_batch=2 * fit.rollout_batch)
    found = cost.memory(config, more, 400, True)
    assert fit.rollout_batch == 128 or found["total"] >= 0.9 * gpu[0]
    own = {"rollout_batch": 7, "tokens_per_pass": 900, "gradient_checkpointing": "off"}
    fit = cost.fitted(config, dataclasses.replace(cfg, **own), 400, "cuda:0")
    assert own.items() <= dataclasses.asdict(fit).items()


def test_evaluation_counts_where_it_takes_more_rows_than_a_rollout(on_gpu):
    on_gpu(*GPUS["12 GB (RTX 3060)"])
    config = stock_config("qwen3-0.6b-bd3lm")
    cfg = dataclasses.replace(night("qwen3-0.6b-bd3lm"), rollout_batch=128, tokens_per_pass=1024)
    found = cost.memory(config, cfg, 400, True)                # 64 rows, and 128
    assert found["evaluation"] > 1.9 * found["rollout"] > found["update"]
    assert found["total"] == found["weights"] + found["trained"] + found["evaluation"]
    assert cost.fitted(config, night("qwen3-0.6b-bd3lm"), 400, "cuda:0").rollout_batch < 128


def test_each_of_several_gpus_starts_its_own_kernels():
    config, cfg = stock_config("qwen3-0.6b-bd3lm"), night("qwen3-0.6b-bd3lm")
    cfg = dataclasses.replace(cfg, rollout_batch=64)
    one, eight = (cost.work(config, cfg, 250, n) for n in (1, 8))
    assert one["rollout_layers"] == eight["rollout_layers"] == 28 * 256    # a batch each
    assert cost.seconds(one, "rollout", 1e20) == cost.seconds(eight, "rollout", 1e20, 8)
    assert cost.seconds(one, "rollout", 1e9) == pytest.approx(
        8 * cost.seconds(eight, "rollout", 1e9, 8))


@pytest.mark.parametrize("name, cache", [
    ("llada-8b", "none"), ("llada-8b", "dual"), ("llada-8b", "prefix"), ("sdar-1.7b", "block")])
def test_the_work_is_what_a_rollout_and_an_update_compute(name, cache):
    """Against the operations that torch counts, of matrix products and attention."""
    from methods import caches
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    config, prompt, block = stock_config(name, small=True), 40, SHAPES[name][1]
    if not block:                      # what the first layer is spared counts less in twelve
        config.num_hidden_layers = 12
    cfg = dataclasses.replace(
        night(name), prompts=2, completions=2, completion_length=48, block_length=block or 12,
        steps=48 if block else 24, mc_steps=2, lora_rank=4, cache=cache, tokens_per_pass=4096,
        top_k=0, top_p=1.0, method="exact", position_term="off", temperature=1.0)
    policy = large_policy(config, block, cfg, "cpu")
    policy.eos_id = policy.turn_id = 512                       # of no vocabulary: no early end
    ids = torch.randint(7, 512, (4, prompt), generator=torch.Generator().manual_seed(0))
    roll = agrpo.rollout if cache == "none" else caches.cached_rollout
    counted = FlopCounterMode(display=False)
    with counted, sdpa_kernel(SDPBackend.MATH):                # the fused kernel is not counted
        traj = roll(policy, ids, torch.ones_like(ids), cfg, [("a", i) for i in range(4)])
    work = cost.work(config, cfg, prompt)
    assert int(traj.nfe.min()) == cfg.steps
    assert work["rollout_flops"] == pytest.approx(counted.get_total_flops(), rel=0.01)
    if cache == "none":
        adv = torch.ones(4, dtype=torch.float64)
        views = agrpo.prepare(policy, traj, agrpo.exact_views(traj, adv, cfg, policy.mask_id, None),
                              adv[:, None], cfg)
        counted = FlopCounterMode(display=False)
        with counted, sdpa_kernel(SDPBackend.MATH):
            agrpo.accumulate(views, cfg, lambda part: agrpo.policy_loss(policy, traj, part, cfg))
        assert len(views.row) == cost.states_scored(cfg)
        assert work["update_flops"] == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_hours_that_cannot_be_kept_are_told(on_gpu):
    on_gpu(*RTX)
    config = stock_config("llada-8b")
    cfg = cost.fitted(config, night("llada-8b", hours=1.0), 400, "cuda:0")
    said = cost.announce(config, cfg, (400, 250), "cuda:0", 1)
    assert "warning: a step and two evaluations take" in said and ": 1 step (" in said


def test_the_announcement_is_a_sentence_with_the_numbers_of_the_forecast(on_gpu):
    on_gpu(*RTX)
    config = stock_config("llada-8b")
    cfg = cost.fitted(config, night("llada-8b"), 400, "cuda:0")
    first, *rest = cost.announce(config, cfg, (400, 250), "cuda:0", 1).splitlines()
    run = cost.whole_run(cost.estimate(config, cfg, 250, True), cfg, RTX[1])
    memory = cost.estimate(config, cfg, 400, True)["total"]
    words = f"GSAI-ML/LLaDA-8B-Instruct, estimated for a GPU: {run['steps']} steps"
    assert first.startswith(words) and "--cache none is exact" in rest[-1]
    assert "--hours 16" in first and cost.duration(run["total"]) in first
    assert f"{memory:.1f} GB" in first and "--preset paper" in first
    readme = (Path(agrpo.__file__).parent / "assets" / "README.md").read_text()
    assert first.replace("a GPU:", "NVIDIA GeForce RTX 4090:") in readme
    with pytest.raises(BadInput, match="this GPU has 13"):
        on_gpu(12.6, 51e12, 8)
        cost.announce(config, cfg, (400, 250), "cuda:0", 1)


def test_hours_and_max_steps(here):
    llada = {"task": "gsm8k", "model": "llada-8b", "device": "cpu"}
    assert (settle(llada).hours, settle(llada).max_steps) == (12, 300)
    cfg = settle({**llada, "max_steps": 500})                  # so many, however long
    assert (cfg.hours, cfg.max_steps) == (0, 500)
    cfg = settle({**llada, "hours": 30.0})                     # so long, however many
    assert (cfg.hours, cfg.max_steps) == (30, options.NO_END)
    cfg = settle({**llada, "hours": 30.0, "max_steps": 400})
    assert (cfg.hours, cfg.max_steps) == (30, 400)
    cfg = settle({**llada, "hours": 30.0, "preset": "paper"})  # its rate decays to the last step
    assert cfg.max_steps == cfg.decay_steps == 2335
    assert settle({**llada, "hours": 30.0, "decay_steps": 400}).max_steps == 300


def test_the_pace_so_far_decides_how_many_steps_the_hours_allow(tmp_path):
    cfg = settle({"hours": 1.0})
    (tmp_path / "eval_base.json").write_text(json.dumps([
        {"steps": 16, "solved": 0.0, "ci95": [0, 1], "n": 1, "nfe": 1.0, "completions": [],
         "seconds": seconds} for seconds in (100.0, 50.0)]))
    run = runs.Run(cfg, tmp_path, None, [], None, [], {}, None, None)
    run.seconds |= {"rollout": 200.0, "update": 80.0, "eval": 20.0}
    # 3600 - 2 x 150 - 300 s; 28 s a step so far, and a point of the curve (100 / 2 s) every 20
    assert run.within_hours(10) == 10 + int(3000 / (28 + 50 / 20))
    run.cfg = dataclasses.replace(cfg, max_steps=50)
    assert run.within_hours(10) == 50 and run.within_hours(0) == 50
    run.seconds["rollout"] = 9999.0
    assert run.within_hours(10) == 10                          # the time is over


def test_a_run_ends_in_time_with_its_results_and_stays_ended(here, quick, capsys):
    assert agrpo.main([*quick, "--hours", "1e-9", "--name", "x"]) == 0
    assert "1 training step," in capsys.readouterr().out
    assert json.loads(Path("runs/x/summary.json").read_text())["trained"]["n"] == 8
    assert agrpo.main(["--name", "x", "--resume"]) == 0
    assert "nothing is left to do after step 0: a larger --hours 1e-09 goes on" in (
        capsys.readouterr().out)
    assert len(list(csv.DictReader(open("runs/x/log.csv")))) == 1
    assert agrpo.main(["--name", "x", "--resume", "--max-steps", "3"]) == 0    # whatever it takes
    assert len(list(csv.DictReader(open("runs/x/log.csv")))) == 3


# ------------------------------------------------------------------------- after the first steps
def rows(reward, solved=(0.5, 0.5), passes="9", **parts):
    """Twenty rows of a log, a value in the first half and another in the second."""
    noise = [0.01 * ((7 * i) % 5 - 2) for i in range(20)]
    parts = {"reward_correct": (0.2, 0.2), "reward_answer": (0.3, 0.3), **parts}
    return [{"step": str(i), "reward": str(reward[i > 9] + noise[i]), "passes": passes,
             "solved": str(solved[i > 9] and solved[i > 9] + noise[i]), "skipped": "0",
             "grad_norm": str(float(passes) / 9), "heldout": "",
             **{name: str(pair[i > 9]) for name, pair in parts.items()}} for i in range(20)]


@pytest.mark.parametrize("log, unfinished, words, lines", [
    (rows((1, 2)), 0, "the reward rises", 1), (rows((2, 1)), 0, "the reward falls", 1),
    (rows((1, 1.001)), 0, "no change beyond the noise", 1),
    (rows((0, 0), reward_answer=(0, 0), reward_correct=(0, 0)), 0.9, "--completion-length", 2),
    (rows((0, 0), reward_answer=(0, 0), reward_correct=(0, 0)), 0.1, "another --prompt", 2),
    (rows((1, 1), (0, 0)), 0, "no answer was right", 2),
    (rows((1, 1), reward_correct=(0, 0)), 0, "no change", 1),          # its weight is 0
    (rows((1, 2), (0, 0)), 0, "the reward rises", 1),          # it earns the format first
    (rows((1, 1))[:9], 0, "", 0), ([], 0, "", 0),              # the log was cut short
    ([{**row, "reward": "nan", "skipped": "1"} if i == 3 else row
      for i, row in enumerate(rows((1, 2)))], 0, "after 19 steps: the reward rises", 1),
    ([{**row, "solved": "x"} for row in rows((1, 2))], 0, "", 0),
    (rows((1, 2), reward_answer=(0, 0)), 0.9, "the reward rises", 1),
    (rows((1, 1), passes="0"), 0, "in 20 of 20 steps", 2),
    (rows((1, 1), passes="0")[:10] + rows((1, 1))[10:], 0, "in 10 of 20 steps", 2),
    (rows((1, 1), passes="0")[:9] + rows((1, 1))[9:], 0, "no change", 1),
    (rows((1, 1), (0.95, 0.95), passes="0"), 0, "no change", 1),       # most are right already
    (rows((2, 1), passes="0"), 0, "the reward falls", 1)])
def test_the_verdict_after_twenty_steps(log, unfinished, words, lines):
    said = verdict(log, [unfinished] * 20)
    assert words in said and len(said.splitlines()) == lines


def test_without_a_change_the_verdict_sees_one_in_a_twentieth_of_cases():
    g, seen, n = torch.Generator().manual_seed(0), 0, 4000
    for values in torch.randn(n, 20, generator=g, dtype=torch.float64).tolist():
        log = [{"reward": value, "solved": 0.5, "passes": 1, "reward_correct": 1, "skipped": 0}
               for value in values]
        seen += "no change" not in verdict(log, [])
    assert abs(seen / n - 0.05) < 4 * (0.05 * 0.95 / n)**0.5   # four standard errors


def test_resuming_settles_sizes_and_ends_as_a_new_run_does(here, quick, capsys):
    assert agrpo.main([*quick, "--max-steps", "1", "--name", "x"]) == 0
    assert agrpo.main(["--name", "x", "--resume", "--rollout-batch", "0", "--max-steps", "2"]) == 0
    assert json.loads(Path("runs/x/config.json").read_text())["rollout_batch"] == 256
    capsys.readouterr()
    assert agrpo.main([*quick, "--hours", "1e-9", "--name", "y"]) == 0
    assert agrpo.main(["--name", "y", "--resume", "--hours", "0"]) == 2
    assert "--max-steps" in capsys.readouterr().err
    assert agrpo.main(["--preset", "justgrpo", "--controller", "threshold"]) == 2


def test_out_of_memory_advice_starts_from_the_sizes_that_memory_decided(here, monkeypatch, capsys):
    write_checkpoint("model", "llada", heads=4, kv=4, length=2048)
    Path("sums.jsonl").write_text("".join(
        json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(40)))

    def rollout(*given, **rest):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(agrpo, "rollout", rollout)
    assert agrpo.main(["--task", "gsm8k", "--data", "sums.jsonl", "--model", "model", "--device",
                       "cpu", "--eval-examples", "4"]) == 1
    assert "--rollout-batch 64 " in capsys.readouterr().err


def test_a_part_with_a_comma_in_its_name_keeps_its_column(here):
    row = {"step": 0, "reward": 1.0, "reward_a,b": 0.5, "rollout_seconds": 1.0,
           "update_seconds": 1.0}
    log.append_log(Path("log.csv"), row)
    log.write_log(Path("log.csv"), log.read_log(Path("log.csv")))
    log.append_log(Path("log.csv"), {**row, "step": 1})
    assert [r["reward_a,b"] for r in log.read_log(Path("log.csv"))] == ["0.5", "0.5"]


def test_a_run_says_after_twenty_steps_whether_it_learns(here, quick, capsys):
    assert agrpo.main([*quick, "--max-steps", "21", "--eval-every", "0", "--name", "x"]) == 0
    assert capsys.readouterr().out.count("after 20 steps: ") == 1


# ------------------------------------------------------------------------ the whole night, small
@pytest.mark.whole
@pytest.mark.parametrize("name, family, block", [
    ("llada-8b", "llada", 0), ("sdar-1.7b", "sdar", 4), ("qwen3-0.6b-mdlm", "a2d-qwen3", 0)])
def test_the_whole_night_in_small(here, monkeypatch, capsys, name, family, block):
    if not DATA.is_file():
        pytest.skip("needs GSM8K's train.jsonl")
    lines = DATA.read_text().splitlines()[:60]
    Path("gsm8k.jsonl").write_text("\n".join(lines))
    write_checkpoint("model", family, heads=4, kv=4, length=2048)
    monkeypatch.setitem(presets.MODELS, name, ("./model", presets.MODELS[name][1]))
    flags = ["--task", "gsm8k", "--data", "gsm8k.jsonl", "--model", name, "--eval-examples", "4",
             "--prompts", "1", "--completions", "4"]           # all 64: minutes a step
    assert agrpo.main([*flags, "--max-steps", "2", "--name", "x"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("./model, estimated for this CPU: 2 steps,")
    cfg = json.loads(Path("runs/x/config.json").read_text())
    assert (cfg["completion_length"], cfg["cache"]) == (256, "block" if block else "none")
    assert (cfg["block_length"], cfg["steps"]) == {
        "llada": (32, 64), "sdar": (4, 256), "a2d-qwen3": (64, 64)}[family]
    assert cfg["rollout_batch"] == 128 and cfg["tokens_per_pass"] == 4096
    assert agrpo.main(["--name", "x", "--resume", "--max-steps", "3"]) == 0
    assert len(list(csv.DictReader(open("runs/x/log.csv")))) == 3
    assert evaluation.main(["--model", "runs/x", "--data", "gsm8k.jsonl", "--limit", "2"]) == 0
    assert agrpo.main(["--model", "runs/x", "--merge", "merged"]) == 0
    assert evaluation.main(["--model", "merged", "--task", "gsm8k", "--data", "gsm8k.jsonl",
                            "--limit", "2", "--lengths", "64", "--steps", "16"]) == 0
