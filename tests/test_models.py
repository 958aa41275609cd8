"""Protects loading, adapters, merging and saving: every family against its own forward in plain
PyTorch, bit-exact round trips, what must be refused. Run: pytest tests/test_models.py"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import SPECIAL, forward, write_checkpoint
from safetensors.torch import load_file

import agrpo
import eval as evaluation
from methods import caches, models, sft
from methods.dipo import BlockPolicy
from rewards import BadInput
from support import checkpoints, cost, rules, templates
from tools import Settings, load, save, train_step

CFG = Settings(task="gsm8k", completion_length=8, block_length=4, steps=4, prompts=2, completions=4)
FAMILIES = [(name, tied) for name in SPECIAL for tied in (False, True)]


@pytest.fixture(params=FAMILIES, ids=[f"{name}{'-tied' * tied}" for name, tied in FAMILIES])
def written(request, tmp_path):
    family, tied = request.param
    weights, config = write_checkpoint(tmp_path / "model", family, tied=tied)
    return tmp_path / "model", weights, config


def logp_of(policy, sequences, P=12, C=8):
    """Log-probs (N, C, V) of the completions of (prompt, state) pairs in one left-padded batch."""
    prompt, mask = (torch.zeros(len(sequences), P, dtype=torch.long),
                    torch.zeros(len(sequences), P, dtype=torch.long))
    for i, (ids, _) in enumerate(sequences):
        prompt[i, P - len(ids) :], mask[i, P - len(ids) :] = ids, 1
    state = torch.stack([state for _, state in sequences])
    with torch.no_grad():
        return (
            policy.logits(prompt, mask, state, torch.ones_like(state).bool())
            .view(len(sequences), C, -1)
            .log_softmax(-1)
        )


def sequences_for(config, n=4):
    g, V = torch.Generator().manual_seed(3), config.get("embedding_size") or config["vocab_size"]
    return [
        (torch.randint(V, (k,), generator=g), torch.randint(V, (8,), generator=g))
        for k in (12, 3, 7, 9)[:n]
    ]


def test_log_probs_equal_the_published_architecture_padded_or_not_batched_or_alone(written):
    path, weights, config = written
    policy, tokenizer = load(path)
    block, sequences = config.get("block_size", 0), sequences_for(config)
    together = logp_of(policy, sequences)
    for i, (prompt, state) in enumerate(sequences):
        exact = forward(
            {k: v.double() for k, v in weights.items()}, config, torch.cat([prompt, state]), block
        )[-8:]
        exact[:, policy.mask_id] = -torch.inf
        exact = exact.log_softmax(-1)
        alone = logp_of(policy, sequences[i : i + 1], P=len(prompt))[0]
        kept = torch.arange(exact.shape[1]) != policy.mask_id
        assert exact[:, kept].std() > 0.5  # no flat distribution, which any bug would match
        assert (alone - exact)[:, kept].abs().max() < 1e-5 and (together[i] - exact)[
            :, kept].abs().max() < 1e-5
    assert getattr(policy, "block", 0) == block and policy.shift == (
        config["model_type"] == "Dream")


def test_special_tokens_come_from_where_each_family_keeps_them(written):
    path, _, config = written
    policy, tokenizer = load(path)
    special = SPECIAL[config["model_type"]]
    assert tokenizer.convert_ids_to_tokens([policy.mask_id, policy.eos_id]) == list(special[:2])
    assert tokenizer.convert_ids_to_tokens(policy.turn_id) == (
        "<|eot_id|>" if "<|eot_id|>" in special else "<|im_end|>")
    text = "How many apples?\n\n12 + 7 = \u00bd"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    ids, mask = checkpoints.encode_prompts(tokenizer, [("1", ""), (text, "<reasoning>")])
    assert (
        (ids != policy.mask_id).all()
        and mask[0].sum() < mask[1].sum()
        and tokenizer.decode(ids[1]).endswith("<reasoning>")
    )


def files_of(path):
    weights = {k: v for f in Path(path).glob("*.safetensors") for k, v in load_file(f).items()}
    return weights, {
        f.name: f.read_bytes()
        for f in Path(path).iterdir()
        if f.suffix != ".safetensors" and "index" not in f.name
    }


def test_a_full_checkpoint_is_saved_in_the_layout_it_came_in(written, tmp_path):
    path, weights, config = written
    policy, tokenizer = load(path, dataclasses.replace(CFG, lora_rank=0), train=True)
    (path / "modeling_llada.py").write_text("raise SystemExit('remote code must never run')")
    save(policy, tokenizer, tmp_path / "saved", dataclasses.replace(CFG, model=str(path)))
    saved, files = files_of(tmp_path / "saved")
    assert saved.keys() == weights.keys() and all(
        torch.equal(saved[k], weights[k]) for k in weights)
    assert {k: v for k, v in files.items() if k != "agrpo.json"} == files_of(path)[1]
    again, _ = load(tmp_path / "saved")
    sequences = sequences_for(config)
    assert torch.equal(logp_of(again, sequences), logp_of(policy, sequences))


def of_stock(net, policy):
    """The same policy around another network."""
    known = net, policy.mask_id, policy.eos_id, policy.shift
    block = getattr(policy, "block", 0)
    return BlockPolicy(*known, block) if block else agrpo.Policy(*known)


def trained_adapter(path, config, tmp_path, rank=4):
    """An adapter after a real optimizer step, saved: policy, directory."""
    cfg = dataclasses.replace(CFG, lora_rank=rank, lora_alpha=16.0, model=str(path))
    policy, tokenizer = load(path, cfg, train=True)
    plain, _ = load(path)
    sequences = sequences_for(config)
    assert torch.equal(
        logp_of(policy, sequences), logp_of(plain, sequences))  # without effect at first
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == cost.adapter_count(policy.model.config, rank)
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(2):  # the first moves B only
        sft.sft_loss(policy, sequences[0][0][None], torch.ones(1, 12, dtype=torch.long),
                     sequences[0][1][None] % 200, agrpo.generator(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (logp_of(policy, sequences) - logp_of(plain, sequences)).abs().nan_to_num().max() > 0.1
    save(policy, tokenizer, tmp_path / "adapter", cfg)
    return policy, tmp_path / "adapter", sequences


def test_an_adapter_comes_back_to_the_bit_here_and_through_peft_on_the_stock_class(
    written, tmp_path):
    import peft

    path, _, config = written
    policy, adapter, sequences = trained_adapter(path, config, tmp_path)
    now = logp_of(policy, sequences)
    for train in (False, True):
        again, _ = load(adapter, dataclasses.replace(CFG, lora_rank=4), train=train)
        assert torch.equal(logp_of(again, sequences), now)
        assert any(p.requires_grad for p in again.parameters()) == train
    stock = checkpoints.load_model(checkpoints.read_checkpoint(path), torch.float32)
    stock = peft.PeftModel.from_pretrained(stock, adapter)
    assert torch.equal(logp_of(of_stock(stock, policy), sequences), now)
    assert json.loads((adapter / "adapter_config.json").read_text())[
        "base_model_name_or_path"] == str(path)
    assert all(
        "lora_" in k for k in load_file(adapter / "adapter_model.safetensors")
    )  # no embeddings inside
    with policy.model.disable_adapter():
        assert torch.equal(logp_of(policy, sequences), logp_of(load(path)[0], sequences))


def test_a_merged_checkpoint_has_the_published_layout_and_the_adapters_effect(
    written, tmp_path, capsys):
    path, weights, config = written
    policy, adapter, sequences = trained_adapter(path, config, tmp_path)
    assert agrpo.main(
        ["--model", str(adapter), "--merge", str(tmp_path / "merged"), "--task", "gsm8k",
         "--device", "cpu"]
    ) == 0
    saved, files = files_of(tmp_path / "merged")
    assert (
        json.loads(files.pop("agrpo.json"))["task"] == "gsm8k")  # with it the prompt is remembered
    assert saved.keys() == weights.keys() and files == files_of(path)[1]
    scale, delta = 16.0 / 4, load_file(adapter / "adapter_model.safetensors")
    for name, module in (("q_proj", "self_attn.q_proj"), ("ff_proj", "mlp.gate_proj"),
                         ("ff_out", "mlp.down_proj")):  # W + alpha/r B A, by hand
        key = (
            f"model.transformer.blocks.1.{name}.weight"
            if config["model_type"] == "llada"
            else f"model.layers.1.{module}.weight"
        )
        a, b = (delta[f"base_model.model.model.layers.1.{module}.lora_{x}.weight"] for x in "AB")
        assert torch.allclose(
            saved[key], weights[key] + scale * b @ a, atol=1e-6
        ) and not torch.equal(saved[key], weights[key])
    again, _ = load(tmp_path / "merged")
    assert (logp_of(again, sequences) - logp_of(policy, sequences)).nan_to_num().abs().max() < 1e-4
    in_memory = policy.model.merge_and_unload()
    policy.model = in_memory
    assert torch.equal(
        logp_of(again, sequences), logp_of(policy, sequences))  # the files lose nothing
    for model, out, word in ((path, "new", "no adapter"), (adapter, "merged", "exists"),
                             (adapter, "no/where", "no folder"), (adapter, "", "exists")):
        capsys.readouterr()
        assert agrpo.main(
            ["--model", str(model), "--merge", out and str(tmp_path / out), "--task", "gsm8k",
             "--device", "cpu"]
        ) == 2
        out, err = capsys.readouterr()
        assert word in err and err.count("\n") == 1


def test_bfloat16_checkpoints_are_saved_in_bfloat16(tmp_path):
    weights, config = write_checkpoint(tmp_path / "model", "llada", shards=1)
    path, name = tmp_path / "model", "model-00001-of-00001.safetensors"
    from safetensors.torch import save_file

    save_file({k: v.bfloat16() for k, v in weights.items()}, path / name, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    policy, tokenizer = load(path, dataclasses.replace(CFG, lora_rank=0), train=True)
    assert {p.dtype for p in policy.parameters()} == {
        torch.float32}  # full fine-tuning trains in float32
    save(policy, tokenizer, tmp_path / "saved", CFG)
    assert all(
        torch.equal(v, weights[k].bfloat16()) for k, v in files_of(tmp_path / "saved")[0].items())


BAD = [({"model_type": "gpt2"}, "gpt2"), ({"model_type": ["llada"]}, "supported are"),
       ({"model_type": None}, "supported are"), ({"block_type": "sequential"}, "block_type"),
       ({"layer_norm_type": "low_precision"}, "layer_norm_type"),
       ({"include_bias": True}, "include_bias"), ({"alibi": True}, "alibi"),
       ({"d_model": None}, "d_model"), ({"n_layers": "two"}, "n_layers"),
       ({"n_layers": 3}, "missing_keys"), ({"n_layers": 1}, "unexpected_keys"),
       ({"mlp_hidden_size": 64}, "mismatched_keys"), ({"mask_token_id": 10**6}, "mask_token_id"),
       ({"n_heads": 5}, "model"),
       ({"weight_tying": True}, "tied"), ({"rope_theta": -1}, "rope_theta")]


@pytest.mark.parametrize("change, word", BAD, ids=[str(b[0]) for b in BAD])
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch, change, word, capsys):
    monkeypatch.chdir(tmp_path)
    _, config = write_checkpoint(tmp_path / "model", "llada")
    (tmp_path / "model/config.json").write_text(json.dumps({**config, **change}))
    Path("sums.jsonl").write_text(
        "".join(
            json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(40)
        )
    )
    assert agrpo.main(
        ["--task", "gsm8k", "--model", "model", "--data", "sums.jsonl", "--device", "cpu",
         "--max-steps", "0", "--completion-length", "16", "--block-length", "4", "--steps",
         "16", "--eval-steps", "16", "--eval-examples", "2"]
    ) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and word in err and "Traceback" not in err


def test_other_models_of_the_same_class_are_refused(tmp_path):
    """A Qwen3 or Llama that is no diffusion model must not pass for one; a block-causal one needs
    its block size."""
    _, config = write_checkpoint(tmp_path / "model", "sdar")
    for change, word in (({"model_type": "qwen3"}, "supported are"),
                         ({"model_type": "llama"}, "supported are"),
                         ({"use_sliding_window": True}, "sliding"),
                         ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
                         ({"block_size": None}, "--model-block")):
        (tmp_path / "model/config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(BadInput, match=word):
            load(tmp_path / "model")
    policy, _ = load(tmp_path / "model", dataclasses.replace(CFG, model_block=8))
    assert policy.block == 8
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="tokenizer"):
        load(tmp_path / "model")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    _, config = write_checkpoint(tmp_path / "model", "llada")
    trained_adapter(tmp_path / "model", config, tmp_path)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(BadInput, match="model"):  # its base is gone
        load(tmp_path / "adapter")
    write_checkpoint(tmp_path / "model", "llada", layers=1)
    with pytest.raises(BadInput, match="adapter"):
        load(tmp_path / "adapter")


def test_gradient_checkpointing_changes_no_gradient_and_keeps_dropout_off(tmp_path):
    _, config = write_checkpoint(tmp_path / "model", "a2d-qwen3")
    grads, sequences = [], sequences_for(config)
    for on in ("off", "on"):
        policy, _ = load(tmp_path / "model",
                         dataclasses.replace(CFG, lora_rank=4, gradient_checkpointing=on),
                         train=True)
        again, forward_of = [], policy.model.get_decoder().layers[0].mlp.forward
        policy.model.get_decoder().layers[0].mlp.forward = lambda x: (
            again.append(1) or forward_of(x))
        sft.sft_loss(policy, sequences[0][0][None], torch.ones(1, 12, dtype=torch.long),
                     sequences[0][1][None], agrpo.generator(0)).backward()
        assert len(again) == (2 if on == "on" else 1)  # it really runs twice
        grads.append([p.grad for p in policy.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and any(
        g.abs().max() > 0 for g in grads[0])


def test_a_block_causal_rollout_scores_again_as_it_was_recorded(tmp_path):
    """Prompts of every length modulo the block: blocks are those of the attention, and what no
    whole block holds is EOS from the start."""
    weights, config = write_checkpoint(tmp_path / "model", "sdar")
    policy, _ = load(tmp_path / "model")
    policy = policy.double()
    cfg = dataclasses.replace(
        CFG, completion_length=12, block_length=4, steps=6, unmasking="low_confidence")
    prompt, mask = torch.full((4, 9), 70), torch.ones(4, 9, dtype=torch.long)
    for i in range(4):
        mask[i, :i] = 0  # lengths 9, 8, 7, 6
    traj = agrpo.rollout(policy, prompt, mask, cfg, [(i,) for i in range(4)])
    for i, over in enumerate((1, 0, 3, 2)):
        whole = 12 - over
        assert (traj.reveal_step[i, whole:] == 6).all() and (
            traj.tokens[i, whole:] == policy.eos_id).all()
        block = (torch.arange(whole) + over) // 4
        for b in range(1, int(block.max()) + 1):  # left to right, block after block
            assert (
                traj.reveal_step[i, :whole][block == b].min()
                > traj.reveal_step[i, :whole][block == b - 1].max()
            )
    views = agrpo.exact_views(traj, torch.ones(4), cfg, policy.mask_id, None)
    views = agrpo.recorded(policy, traj, views._replace(adv=torch.ones(len(views.row), 2)), cfg)
    with torch.no_grad():
        logp, order, _ = agrpo.step_logp(policy, traj, views, cfg)
    assert (logp - traj.logp[views.row][views.target]).abs().max() < 1e-10
    assert (order - traj.order_logp[views.row, views.step]).abs().max() < 1e-10
    assert int(views.target.sum()) == 4 * 12 - 6
    row, step = (
        int(views.row[-1]),
        int(views.step[-1]),
    )  # and the recorded ones are those of the architecture
    state, target = agrpo.state_at(traj, views.row[-1:], views.step[-1:], policy.mask_id)
    n = int(mask[row].sum())
    exact = forward({k: v.double() for k, v in weights.items()}, config,
                    torch.cat([prompt[row, 9 - n :], state[0]]), 4)[-12:]
    exact[:, policy.mask_id] = -torch.inf
    exact = exact.log_softmax(-1).gather(1, traj.tokens[row][:, None]).squeeze(1)[target[0]]
    assert (exact - traj.logp[row][target[0]]).abs().max() < 1e-5 and step > 0


# ----------------------------------------------------------------- the whole job on a checkpoint
JOB = ["--task", "gsm8k", "--model", "model", "--data", "sums.jsonl", "--device", "cpu",
       "--completion-length", "16", "--block-length", "8", "--steps", "8", "--eval-steps", "8,4",
       "--eval-examples", "4", "--eval-every", "2", "--prompts", "2", "--completions", "4",
       "--mc-steps", "2", "--lora-rank", "4", "--lr", "1e-2", "--rollout-batch", "3"]


@pytest.fixture
def job(here, monkeypatch):
    """An empty folder with a checkpoint, some data, and a reward that varies on random text."""
    write_checkpoint("model", "llada")
    Path("sums.jsonl").write_text(
        "".join(
            json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(40)
        )
    )
    monkeypatch.setattr(models, "reward_parts",
                        lambda task, text, ex, weights: {"correct": float(sum(map(ord, text)) % 7)})


def test_a_tiny_model_has_nothing_to_merge(here, capsys):
    assert agrpo.main(["--merge", "new", "--device", "cpu"]) == 2
    assert "tiny holds no adapter" in capsys.readouterr().err and not Path("new").exists()


@pytest.mark.whole
def test_a_run_with_adapters_resumes_to_the_bit_evaluates_merges_and_trains_on(job, capsys):
    assert agrpo.main([*JOB, "--name", "four", "--max-steps", "4"]) == 0
    assert "estimated for this CPU: 4 steps" in capsys.readouterr().out
    assert agrpo.main([*JOB, "--name", "halves", "--max-steps", "2"]) == 0
    assert agrpo.main(["--name", "halves", "--resume", "--max-steps", "4"]) == 0
    a, b = (torch.load(f"runs/{n}/checkpoint.pt", weights_only=True) for n in ("four", "halves"))
    assert (
        a["model"]
        and all("lora_" in k for k in a["model"])
        and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    )
    assert any(float(v.abs().max()) > 0 for k, v in a["model"].items() if "lora_B" in k)
    assert {f.name for f in Path("runs/four/model").iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "agrpo.json", "tokenizer.json"}
    saved = load_file("runs/four/model/adapter_model.safetensors")
    assert all(
        torch.equal(v, a["model"]["model." + k.replace(".weight", ".default.weight")])
        for k, v in saved.items()
    )
    summary = json.loads(Path("runs/four/summary.json").read_text())
    assert evaluation.main(
        ["--model", "runs/four", "--data", "sums.jsonl", "--limit", "4", "--device", "cpu",
         "--out", "e.jsonl"]
    ) == 0
    assert "trained on" in capsys.readouterr().out  # of the file, a fifth was held out
    result = json.loads(Path("e.json").read_text())
    assert (
        result["settings"]["prompt"] == "agrpo"
        and [r["steps"] for r in result["results"]] == [8, 4]
        and result["results"][0]["length"] == 16
    )
    assert len(summary["by_steps"]) == 2
    assert agrpo.main(
        ["--model", "runs/four", "--merge", "merged", "--task", "gsm8k", "--device", "cpu"]) == 0
    for model, flags, name in (("runs/four", [], "on"), ("runs/four", ["--lora-rank", "0"], "full"),
                               ("merged", [], "merged")):
        assert agrpo.main([*JOB, "--model", model, "--name", name, "--max-steps", "1", *flags]) == 0
    assert (
        Path("runs/full/model/model.safetensors.index.json").is_file()
        or Path("runs/full/model/model.safetensors").is_file()
    )
    assert not list(Path(".").rglob("*.partial"))


def test_a_run_on_a_block_causal_model_takes_its_blocks(here, monkeypatch, capsys):
    write_checkpoint("model", "sdar")
    Path("sums.jsonl").write_text(
        "".join(
            json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(40)
        )
    )
    monkeypatch.setattr(models, "reward_parts",
                        lambda task, text, ex, weights: {"correct": float(sum(map(ord, text)) % 7)})
    flags = [x for x in JOB if x not in ("--block-length", "--steps", "--eval-steps", "8", "8,4")]
    assert agrpo.main([*flags, "--max-steps", "1", "--name", "x"]) == 0
    config = json.loads(Path("runs/x/config.json").read_text())
    assert (config["block_length"], config["eval_block_length"], config["steps"],
            config["eval_steps"]) == (4, 4, 16, "16")
    with open("runs/x/log.csv") as f:
        row = dict(zip(*(line.strip().split(",") for line in f)))
    assert float(row["ratio"]) == pytest.approx(1, abs=1e-4) and float(row["grad_norm"]) > 0
    assert evaluation.main(
        ["--model", "runs/x", "--data", "sums.jsonl", "--limit", "4", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert (
        agrpo.main([*flags, "--block-length", "8", "--name", "y"]) == 2
        and "blocks of 4" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "flags", [[], ["--model", "GSAI-ML/LLaDA-8B-Instruct"], ["--device", "cpu"]])
def test_without_a_gpu_the_8b_line_says_what_it_needs_and_what_runs_here(
    here, flags, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert agrpo.main(["--task", "gsm8k", *flags]) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.count("\n") == 1
        and "24 GB" in err
        and "python agrpo.py --task sudoku" in err
        and "--device cpu" in err
    )


def test_a_large_local_checkpoint_needs_a_gpu_too(here, monkeypatch, capsys):
    _, config = write_checkpoint("model", "llada")
    Path("model/config.json").write_text(
        json.dumps(
            {**config, "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
             "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464}
        )
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # as published
    assert cost.parameter_count(checkpoints.read_checkpoint(Path("model")).config) == 8_015_581_184
    assert (
        agrpo.main(["--task", "gsm8k", "--model", "model", "--device", "cpu"]) == 2
        and "CUDA GPU" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "where, flag", [("step_logp", "--tokens-per-pass"), pytest.param(
        "rollout", "--rollout-batch 1", marks=pytest.mark.whole)])
def test_out_of_memory_is_one_line_with_the_flag_to_change(job, monkeypatch, where, flag, capsys):
    assert agrpo.main([*JOB, "--name", "x", "--max-steps", "1"]) == 0
    before, work = torch.load("runs/x/checkpoint.pt", weights_only=True), getattr(agrpo, where)

    def full(*args, **kwargs):
        work(*args, **kwargs)
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines.")

    def rollout(*args, **kwargs):
        return full(*args, **kwargs)

    monkeypatch.setattr(agrpo, where, rollout if where == "rollout" else full)
    capsys.readouterr()
    assert agrpo.main(["--name", "x", "--resume", "--max-steps", "3"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--resume with " + flag in err
    assert torch.load("runs/x/checkpoint.pt", weights_only=True)["step"] == before["step"] == 1
    monkeypatch.setattr(agrpo, where, work)
    assert agrpo.main(
        ["--name", "x", "--resume", "--max-steps", "2", "--rollout-batch", "2",
         "--tokens-per-pass", "50", "--gradient-checkpointing", "on"]
    ) == 0


def test_the_estimate_counts_what_the_model_holds(tmp_path):
    for family in SPECIAL:
        write_checkpoint(tmp_path / family, family, heads=4, kv=2)
        for rank in (0, 4):
            cfg = dataclasses.replace(CFG, lora_rank=rank, model=str(tmp_path / family))
            policy, _ = load(cfg.model, cfg, train=True)
            total, trained = (
                sum(p.numel() for p in policy.parameters() if p.requires_grad or everything)
                for everything in (True, False)
            )
            norms_and_biases = 0.02 * total  # q_norm, k_norm, biases are left out
            assert abs(
                cost.parameter_count(policy.model.config)
                + (cost.adapter_count(policy.model.config, rank) if rank else 0)
                - total
            ) < norms_and_biases
            found = cost.estimate(policy.model.config, cfg, 100, half=False)
            assert found["trained"] == pytest.approx((16 if rank else 12) * trained / 1e9, rel=0.02)


def test_report_to_hands_every_row_to_the_tracker(job, monkeypatch):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

    seen = []

    class Fake(GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None

        def __init__(self, run_name, logging_dir=None, **kwargs):
            seen.append(("start", str(logging_dir)))

        def store_init_configuration(self, values):
            seen.append(("config", values["lora_rank"]))

        def log(self, values, step=None, **kwargs):
            seen.append((step, values))

        def finish(self):
            seen.append(("end",))

    import accelerate

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    monkeypatch.setattr(rules, "find_spec", lambda name: True)
    monkeypatch.setattr(
        accelerate.accelerator, "filter_trackers",
        lambda log_with, *rest: [log_with] if isinstance(log_with, str) else log_with)
    assert agrpo.main([*JOB, "--name", "x", "--max-steps", "3", "--report-to", "tensorboard"]) == 0
    assert (
        [s for s, *_ in seen] == ["start", "config", 0, 1, 2, "end"]
        and "runs/x" in seen[0][1]
        and seen[1][1] == 4
    )
    assert (
        {"reward", "grad_norm", "skipped", "nfe"} <= set(seen[2][1])
        and "heldout" not in seen[2][1]
        and "heldout" in seen[3][1]
    )


def test_overwrite_keeps_the_old_run_until_the_new_model_is_there(job, capsys):
    assert agrpo.main([*JOB, "--name", "x", "--max-steps", "1"]) == 0
    before = {f: f.read_bytes() for f in Path("runs/x").rglob("*") if f.is_file()}
    shutil.copytree("model", "broken")
    next(Path("broken").glob("*.safetensors")).write_bytes(b"garbage")
    for model, word in (("broken", "broken"), ("runs/x", "would delete"),
                        ("runs/x/model", "would delete")):
        capsys.readouterr()
        assert agrpo.main([*JOB, "--model", model, "--name", "x", "--overwrite"]) == 2
        out, err = capsys.readouterr()
        assert word in err and err.count("\n") == 1
    assert before == {f: f.read_bytes() for f in Path("runs/x").rglob("*") if f.is_file()}
    assert (
        agrpo.main([*JOB, "--model", "broken", "--name", "y"]) == 2 and not Path("runs/y").exists())
    # nothing there to replace
    assert agrpo.main([*JOB, "--name", "new", "--overwrite", "--max-steps", "0"]) == 0


def test_an_adapter_keeps_its_rank_and_what_cannot_work_is_said_first(job, capsys):
    assert agrpo.main([*JOB, "--name", "x", "--max-steps", "1"]) == 0
    cfg, _ = evaluation.parse(
        ["--task", "gsm8k", "--model", "runs/x", "--data", "sums.jsonl", "--device", "cpu"])
    assert (cfg.lora_rank, cfg.lora_alpha) == (4, 64.0)  # the recipe's 64 does not apply
    bare, template, tied = "model/tokenizer.json", "model/chat_template.jinja", "model/config.json"
    cases = [(["--model", "runs/x", "--lora-rank", "8"], None, "", "lora_rank 4"),
             ([], bare, None, "vocab.json"), ([], template, '{{ "" }}', "chat template"),
             ([], template, "{% if messages|length > 1 %}{{ raise('x') }}{% endif %}?", "raise"),
             ([], tied, '{"model_type": "llada"', "config.json"),
             (["--model", "m" * 5000], None, "", "name"), (["--merge", ""], None, "", "exists"),
             (["--model", "unfinished"], None, "", "not finished")]
    Path("unfinished").mkdir()
    Path("unfinished/config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    for flags, file, text, word in cases:
        whole = Path(file).read_bytes() if file else b""
        if file:
            Path(file).unlink() if text is None else Path(file).write_text(text)
        capsys.readouterr()
        assert agrpo.main(
            [*JOB[:8], "--name", "new", *flags]
            if "--lora-rank" not in flags
            else ["--task", "gsm8k", "--model", "model", "--device", "cpu", *flags]
        ) == 2
        out, err = capsys.readouterr()
        assert word in err and err.count("\n") == 1 and not Path("runs/new").exists(), (flags, err)
        if file:
            Path(file).write_bytes(whole)


def test_the_precision_of_a_gpu_trains_too(job, monkeypatch):
    """The mixture that a GPU gets (bfloat16 base, float32 head and adapters, autocast), on the CPU:
    no clash of types, and the laws of float32 within the rounding of bfloat16."""
    autocast, load_model = torch.autocast, checkpoints.load_model
    exact, tokenizer = load("model")
    monkeypatch.setattr(checkpoints, "load_model",
                        lambda about, dtype, *rest: load_model(about, torch.bfloat16, *rest))
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, dtype=None, enabled=True, **more: autocast(
            kind, dtype, enabled=enabled or dtype == torch.bfloat16, **more),
    )  # ours, not those of transformers
    cfg = evaluation.parse(
        [*JOB, "--gradient-checkpointing", "on", "--temperature", "0.6", "--top-k", "50", "--top-p",
         "0.99"]
    )[0]
    policy, _ = load("model", cfg, train=True)
    policy.model.get_output_embeddings().float()
    kinds = {
        name.split(".")[-2] if "lora" not in name else "lora": p.dtype
        for name, p in policy.named_parameters()
    }
    assert (
        kinds["lora"] == kinds["lm_head"] == torch.float32
        and kinds["embed_tokens"] == torch.bfloat16
    )
    g = torch.Generator().manual_seed(0)
    prompt, state = (torch.randint(200, (3, 7), generator=g),
                     torch.randint(200, (3, 16), generator=g))
    with torch.no_grad():
        a, b = (
            p.logits(prompt, torch.ones_like(prompt), state, state >= 0)
            .log_softmax(-1)
            .nan_to_num(neginf=0)
            for p in (policy, exact)
        )
    assert a.dtype == torch.float32 and 0 < (a - b).abs().mean() < 0.05
    optimizer = agrpo.make_optimizer(policy, cfg)
    examples = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(8)]
    for step in range(2):
        row = train_step(policy, tokenizer, optimizer, examples, step, cfg)
        assert (
            row["skipped"] == 0
            and row["grad_norm"] > 0
            and row["ratio"] == pytest.approx(1, abs=0.05)
        )


@pytest.mark.parametrize("family", SPECIAL)
def test_lean_adapters_and_norms_compute_what_the_libraries_do(tmp_path, monkeypatch, family):
    """Values and gradients to 1e-5, with an adapter that has an effect, without, with another."""
    write_checkpoint(tmp_path / "m", family)
    prompt, state = torch.arange(24).view(2, 12) + 30, torch.arange(16).view(2, 8) + 60
    found = []
    for lean in (checkpoints.lean, lambda net: None):
        monkeypatch.setattr(checkpoints, "lean", lean)
        policy, _ = load(tmp_path / "m", dataclasses.replace(CFG, lora_rank=4), train=True)
        g = torch.Generator().manual_seed(0)
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.data = 0.3 * torch.randn(p.shape, generator=g)

        def logp():
            logits = policy.logits(prompt, torch.ones_like(prompt), state, state >= 0)
            return logits.log_softmax(-1)
        trained = logp()
        trained.nan_to_num(neginf=0).square().mean().backward()
        grads = [p.grad for p in policy.parameters() if p.requires_grad]
        with policy.model.disable_adapter():
            without = logp()
        checkpoints.add_adapter(policy.model, 4, 8.0, 1, "value")
        policy.model.set_adapter("value")                      # at first without effect
        assert torch.allclose(logp(), without, atol=1e-6)
        policy.model.set_adapter("default")
        found.append([trained.detach(), without.detach(), *grads])
        assert (trained - without).nan_to_num().abs().max() > 0.1
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["step", "undone", "loaded", "replaced", "interrupted"])
def test_a_rollout_sees_the_adapters_of_its_time(tmp_path, change):
    """Cast once in a rollout, not once in a run: after an optimizer step, one that was undone, a
    checkpoint, a rollout that was cut off. Some of these do not raise a parameter's version."""
    write_checkpoint(tmp_path / "m", "sdar")
    policy, tokenizer = load(tmp_path / "m", dataclasses.replace(CFG, lora_rank=4), train=True)
    for name, p in policy.named_parameters():                  # as on a GPU
        p.data = p.data if "lora" in name else p.data.bfloat16()
    weights, g = [p for p in policy.parameters() if p.requires_grad], torch.Generator()
    noise = [0.3 * torch.randn(p.shape, generator=g.manual_seed(i)) for i, p in enumerate(weights)]
    examples = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(4)]

    def rollout():
        return models.generate(policy, tokenizer, examples, list("abcd"), CFG)[0]
    before = rollout()
    if change == "step":
        optimizer = torch.optim.AdamW(weights, 0.3, fused=True)
        for p, z in zip(weights, noise):
            p.grad = z
        optimizer.step()
    elif change == "loaded":
        policy.load_state_dict({name: p + 0.3 for name, p in policy.named_parameters()
                                if p.requires_grad}, strict=False)
    elif change == "interrupted":
        with pytest.raises(KeyboardInterrupt), checkpoints.adapters_cast_once(policy.model):
            rollout()
            raise KeyboardInterrupt
    for p, z in zip(weights, noise) if change in ("undone", "replaced", "interrupted") else ():
        if change == "replaced":
            p.data = p.data + z
        else:
            p.data.copy_(p.data + z)
    after = rollout()
    assert not torch.equal(before.logp, after.logp)
    with pytest.MonkeyPatch.context() as patch:                # cast in every call
        patch.setattr(checkpoints, "adapters_cast_once", lambda net: torch.no_grad())
        plain = rollout()
    for name in ("tokens", "reveal_step", "logp", "order_logp", "gradient"):
        assert torch.equal(getattr(after, name), getattr(plain, name))


@pytest.mark.parametrize("rank", [0, 4])
def test_compiled_layers_give_the_same_rollouts_from_a_few_graphs(tmp_path, rank):
    """--compile on, with and without a cache or adapters: one graph for all six layers, not six,
    and none anew for the next rollout."""
    import torch._dynamo as dynamo
    write_checkpoint(tmp_path / "m", "sdar", layers=6)
    prompt = torch.arange(36).view(3, 12) + 30
    for cache in ("none", "block"):
        cfg = dataclasses.replace(CFG, cache=cache, lora_rank=rank)
        roll = caches.cached_rollout if cache == "block" else agrpo.rollout
        found = []
        for compiled in (False, True):
            dynamo.reset()
            dynamo.utils.counters.clear()
            policy, _ = load(tmp_path / "m", cfg, train=bool(rank))
            if compiled:
                models.compile_layers(policy.model, backend="eager")
            for _ in range(3):
                with checkpoints.adapters_cast_once(policy.model):
                    traj = roll(policy, prompt, torch.ones_like(prompt), cfg, list("abc"))
            found.append(traj)
        assert torch.equal(found[0].tokens, found[1].tokens)
        assert torch.allclose(found[0].logp, found[1].logp, atol=1e-5)
        assert 1 <= dynamo.utils.counters["stats"]["unique_graphs"] <= 5


def test_a_mask_token_that_only_its_name_tells_is_found(tmp_path):
    """As dllm's Qwen3 models have it: mask_token_id null, the token among those added."""
    write_checkpoint(tmp_path / "m", "a2d-qwen3")
    want = checkpoints.open_checkpoint(str(tmp_path / "m"))[0].mask_id
    for name, key in (("config", "mask_token_id"), ("tokenizer_config", "mask_token")):
        path = tmp_path / "m" / f"{name}.json"
        saved = json.loads(path.read_text())
        saved.pop(key, None)
        path.write_text(json.dumps(saved))
    (tmp_path / "m" / "special_tokens_map.json").unlink(missing_ok=True)
    about, tokenizer = checkpoints.open_checkpoint(str(tmp_path / "m"))
    assert tokenizer.mask_token_id is None and about.mask_id == want
    config = tmp_path / "m" / "config.json"
    saved = json.loads(config.read_text())
    config.write_text(json.dumps({**saved, "mask_token_id": tokenizer.eos_token_id}))
    with pytest.raises(BadInput, match="is the end of a sequence"):
        checkpoints.open_checkpoint(str(tmp_path / "m"))


def test_a_weight_that_is_no_number_is_one_line_before_any_work(here, capsys):
    from safetensors.torch import load_file, save_file
    write_checkpoint(Path("m"), "llada")
    for file in Path("m").glob("*.safetensors"):
        weights = load_file(file)
        first = next(iter(weights))
        weights[first].view(-1)[3] = float("nan")
        save_file(weights, file, {"format": "pt"})
    Path("g.jsonl").write_text("".join(
        f'{{"question": "{i}+1?", "answer": "#### {i + 1}"}}\n' for i in range(40)))
    flags = ["--task", "gsm8k", "--model", "m", "--data", "g.jsonl", "--device", "cpu"]
    assert evaluation.main([*flags, "--limit", "2", "--steps", "8", "--lengths", "8",
                            "--block-length", "8"]) == 1
    shape = ["--completion-length", "8", "--block-length", "8", "--steps", "8"]
    assert agrpo.main([*flags, *shape, "--eval-steps", "8", "--name", "x"]) == 1
    err = capsys.readouterr().err
    assert err.count("not all of its weights are finite numbers") == 2 and err.count("\n") == 2
    assert not Path("runs/x").exists()


# ------------------------------------------------ what published directories hold beside weights
def rewrite(path, **fields):
    """config.json, or another file of JSON, with other fields; None takes one out."""
    saved = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in saved.items() if v is not None}))


def sums(name="sums.jsonl", n=40):
    Path(name).write_text("".join(json.dumps(
        {"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(n)))


def refused(main, argv, capsys, *words):
    """Exit code 2, one line that holds the words, nothing begun."""
    capsys.readouterr()
    assert main(argv) == 2, argv
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words), err
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.parametrize("family, block", [
    ("sdar", 4), ("sdar", 8), ("sdar", 16), ("sdar", 32), ("sdar", 64), ("a2d-qwen3", 32),
    ("a2d-qwen2", 32), ("a2d-qwen3", 8)])
def test_block_causal_models_of_every_published_block_size(tmp_path, family, block):
    """In batches and alone, the prompt's last block shared with the completion or not."""
    weights, config = write_checkpoint(tmp_path / "m", family, block=block)
    policy, _ = load(tmp_path / "m")
    assert policy.block == block and isinstance(policy, BlockPolicy)
    g, C = torch.Generator().manual_seed(4), block + 3
    sequences = [tuple(torch.randint(config["vocab_size"], (n,), generator=g) for n in (k, C))
                 for k in (block + 5, 3, block, 2 * block - 1)]
    together = logp_of(policy, sequences, P=max(len(a) for a, _ in sequences), C=C)
    for i, pair in enumerate(sequences):
        exact = forward({k: v.double() for k, v in weights.items()}, config, torch.cat(pair), block)
        whole = forward({k: v.double() for k, v in weights.items()}, config, torch.cat(pair))
        for logits in (exact, whole):
            logits[:, policy.mask_id] = -torch.inf
        exact, whole = (x[-C:].log_softmax(-1).nan_to_num(neginf=0) for x in (exact, whole))
        assert (together[i].nan_to_num(neginf=0) - exact).abs().max() < 1e-5
        assert i == 1 or (whole - exact).abs().max() > 1e-2    # both directions would differ


def test_a_block_causal_model_whose_config_is_silent_asks_for_its_blocks_and_remembers_them(
        here, capsys):
    """dllm-hub's bd3lm models: their config.json is that of the others, their name is not."""
    sums()
    for folder in ("Qwen3-0.6B-diffusion-bd3lm-v0.1",
                   "models--dllm-hub--Qwen3-0.6B-diffusion-bd3lm-v0.1/snapshots/0f1e"):
        write_checkpoint(folder, "a2d-qwen3")
        with pytest.raises(BadInput, match="--model-block"):
            checkpoints.open_checkpoint(folder)
        assert checkpoints.open_checkpoint(folder, 8)[0].block == 8
    write_checkpoint("mdlm", "a2d-qwen3")
    assert checkpoints.open_checkpoint("mdlm")[0].block == 0
    flags = ["--task", "gsm8k", "--data", "sums.jsonl", "--device", "cpu", "--eval-examples", "2",
             "--completion-length", "16", "--max-steps", "0", "--model"]
    refused(agrpo.main, [*flags, "Qwen3-0.6B-diffusion-bd3lm-v0.1"], capsys, "bd3lm: 32")
    assert agrpo.main([*flags, "Qwen3-0.6B-diffusion-bd3lm-v0.1", "--model-block", "8",
                       "--name", "x", "--lora-rank", "4", "--eval-steps", "8"]) == 0
    assert checkpoints.open_checkpoint("runs/x")[0].block == 8
    assert agrpo.main(["--task", "gsm8k", "--device", "cpu", "--model", "runs/x", "--merge",
                       "merged"]) == 0
    assert checkpoints.open_checkpoint("merged")[0].block == 8 == load("merged")[0].block


MISFITS = [
    ("llada", {"architectures": ["LLaDAMoEModelLM"], "num_experts": 64}, "LLaDAMoEModelLM"),
    ("llada", {"architectures": ["LLaDAModelLM"], "num_experts": 64}, "mixture of experts"),
    ("sdar", {"architectures": ["SDARMoeForCausalLM"]}, "SDARMoeForCausalLM"),
    ("a2d-qwen3", {"n_routed_experts": 8}, "A2DQwen3LMHeadModel"),
    ("sdar", {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"]}, "SDARMoeFor"),
    ("llada", {"block_size": 32}, "block_size 32"), ("Dream", {"block_size": 4}, "block_size 4"),
    ("illada", {"block_size": 4}, "block_size 4"), ("a2d-qwen3", {"block_size": "32"}, "'32'"),
    ("sdar", {"block_size": 0}, "--model-block"), ("sdar", {"block_size": -4}, "block_size -4"),
    ("illada", {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
    ("illada", {"mlp_bias": True}, "mlp_bias"), ("a2d-qwen2", {"attention_bias": False}, "bias"),
    ("illada", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling")]


@pytest.mark.parametrize("family, fields, word", MISFITS, ids=[str(m[:2]) for m in MISFITS])
def test_what_a_family_cannot_be_is_refused_by_its_name(tmp_path, family, fields, word):
    write_checkpoint(tmp_path / "m", family)
    checkpoints.read_checkpoint(tmp_path / "m")
    rewrite(tmp_path / "m/config.json", **fields)
    with pytest.raises(BadInput) as error:
        checkpoints.read_checkpoint(tmp_path / "m")
    assert word in str(error.value) and "\n" not in str(error.value)


def test_words_that_change_nothing_in_config_json_are_taken(tmp_path):
    weights, config = write_checkpoint(tmp_path / "m", "illada")
    for fields in ({"rope_scaling": {"rope_type": "default", "factor": 1.0}}, {"num_experts": 0},
                   {"rope_scaling": {"type": "default"}}, {"architectures": None},
                   {"num_experts": 1, "block_size": None}):
        rewrite(tmp_path / "m/config.json", **fields)
        policy, _ = load(tmp_path / "m")
    assert policy.mask_id != policy.eos_id and policy.model.config.tie_word_embeddings


def test_tied_weights_may_be_stored_twice(tmp_path):
    """dllm-hub's directories do so: the same numbers under both names; others are refused."""
    from safetensors.torch import save_file
    weights, config = write_checkpoint(tmp_path / "m", "a2d-qwen2", shards=1)
    plain, (file,) = load(tmp_path / "m")[0], (tmp_path / "m").glob("*.safetensors")
    (tmp_path / "m/model.safetensors.index.json").unlink()
    file = file.rename(tmp_path / "m/model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, file, {"format": "pt"})
    twice, tokenizer = load(tmp_path / "m", dataclasses.replace(CFG, lora_rank=0), train=True)
    assert torch.equal(logp_of(plain, sequences_for(config)), logp_of(twice, sequences_for(config)))
    save(twice, tokenizer, tmp_path / "saved", dataclasses.replace(CFG, model=str(tmp_path / "m")))
    assert torch.equal(logp_of(load(tmp_path / "saved")[0], sequences_for(config)),
                       logp_of(plain, sequences_for(config)))
    save_file({**weights, "lm_head.weight": 2 * head}, file, {"format": "pt"})
    with pytest.raises(BadInput, match="tied"):
        load(tmp_path / "m")


@pytest.mark.parametrize("form", ["text", "token", "new", "new token"])
def test_a_mask_token_that_only_special_tokens_map_json_names_is_found(tmp_path, form):
    """transformers reads no such file beside an added_tokens_decoder. New: in no vocabulary, as
    OPDLM's Qwen3 has it; the token is then the next after them."""
    write_checkpoint(tmp_path / "m", "a2d-qwen3")
    want = checkpoints.open_checkpoint(str(tmp_path / "m"))[0].mask_id
    name = "<|mask|>" if "new" not in form else "<|blank|>"
    path = tmp_path / "m/tokenizer_config.json"
    saved = json.loads(path.read_text())
    saved.pop("mask_token")
    core = json.loads((tmp_path / "m/tokenizer.json").read_text())
    if "new" in form:
        core["added_tokens"] = [{**t, "id": t["id"] - (t["id"] > want)}    # without a gap
                                for t in core["added_tokens"] if t["id"] != want]
        (tmp_path / "m/tokenizer.json").write_text(json.dumps(core))
        saved.pop("added_tokens_decoder", None)
        want = max([*core["model"]["vocab"].values(), *(t["id"] for t in core["added_tokens"])]) + 1
    else:
        saved["added_tokens_decoder"] = {str(t.pop("id")): t for t in core["added_tokens"]}
    path.write_text(json.dumps(saved))
    token = {"content": name, "lstrip": False, "normalized": False, "rstrip": False}
    (tmp_path / "m/special_tokens_map.json").write_text(json.dumps(
        {"mask_token": token if "token" in form else name}))
    about, tokenizer = checkpoints.open_checkpoint(str(tmp_path / "m"))
    assert about.mask_id == want == tokenizer.convert_tokens_to_ids(name)
    assert tokenizer.encode(f"a{name}", add_special_tokens=False)[-1] == want
    policy, _ = load(tmp_path / "m")
    assert policy.mask_id == want


# ------------------------------------------------------------------------------- the chat template
THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def prompt_of(tokenizer, message="2+2?"):
    return tokenizer.decode(checkpoints.encode_prompts(tokenizer, [(message, "")])[0][0])


@pytest.mark.parametrize("family, end", [
    ("a2d-qwen3", THOUGHT), ("sdar", "<|im_start|>assistant\n"),
    ("a2d-qwen2", "<|im_start|>assistant\n")])
def test_prompts_end_as_each_family_was_trained(tmp_path, family, end):
    """dllm-hub's Qwen3 models are published with enable_thinking=False, SDAR without arguments."""
    write_checkpoint(tmp_path / "m", family)
    for tokenizer in (checkpoints.open_checkpoint(str(tmp_path / "m"))[1], load(tmp_path / "m")[1]):
        assert prompt_of(tokenizer).endswith("<|im_end|>\n" + end)
        assert tokenizer.convert_ids_to_tokens(checkpoints.end_of_turn(tokenizer)) == "<|im_end|>"


def test_template_args_win_and_a_trained_model_and_an_evaluation_remember_them(here, capsys):
    write_checkpoint("m", "a2d-qwen3")
    sums()
    flags = ["--task", "gsm8k", "--data", "sums.jsonl", "--device", "cpu"]
    run = [*flags, "--model", "m", "--completion-length", "8", "--block-length", "8", "--steps",
           "8", "--eval-steps", "8", "--eval-examples", "2", "--max-steps", "0", "--lora-rank", "4"]
    for i, (text, recorded, end) in enumerate((
            ("", "enable_thinking=false", THOUGHT), ("none", "none", "assistant\n"),
            ("enable_thinking=true", "enable_thinking=true", "assistant\n"))):
        name = f"x{i}"
        more = ["--template-args", text] if text else []
        assert agrpo.main([*run, "--name", name, *more]) == 0
        assert json.loads(Path(f"runs/{name}/model/agrpo.json").read_text())[
            "template_args"] == recorded
        for tokenizer in (checkpoints.open_checkpoint(f"runs/{name}")[1],
                          load(f"runs/{name}/model")[1]):
            assert prompt_of(tokenizer).endswith(end)
        look = ["--model", f"runs/{name}", *flags[2:], "--limit", "2", "--out", f"{name}.jsonl"]
        assert evaluation.main(look) == 0
        assert json.loads(Path(f"{name}.json").read_text())["settings"]["template_args"] == recorded
        code = evaluation.main([*look, "--template-args", "enable_thinking=true"])
        assert code == (0 if recorded == "enable_thinking=true" else 2)    # of another prompt
    assert agrpo.main(["--name", "x0", "--resume"]) == 0
    assert agrpo.main(["--name", "x0", "--resume", "--template-args", "none"]) == 2
    assert agrpo.main(["--name", "x2", "--resume", "--template-args", " enable_thinking=TRUE"]) == 0


def test_no_template_args_stay_none_where_the_family_has_none_of_its_own(here):
    """On a model that was trained here with some: in prompts, in agrpo.json, after a resume."""
    write_checkpoint("m", "sdar")
    sums()
    run = ["--task", "gsm8k", "--data", "sums.jsonl", "--device", "cpu", "--completion-length", "8",
           "--eval-steps", "8", "--eval-examples", "2", "--max-steps", "0", "--lora-rank", "4"]
    template = Path("m/chat_template.jinja")
    template.write_text("{% if loud %}LOUD {% endif %}" + template.read_text())
    assert agrpo.main([*run, "--model", "m", "--name", "a", "--template-args", "loud=true"]) == 0
    again = [*run, "--model", "runs/a", "--name", "b", "--template-args", "none"]
    assert agrpo.main(again) == 0 and agrpo.main([*again, "--resume"]) == 0
    assert json.loads(Path("runs/b/model/agrpo.json").read_text())["template_args"] == "none"
    for name, loud in (("a", True), ("b", False)):
        tokenizer = checkpoints.open_checkpoint(f"runs/{name}")[1]
        assert prompt_of(tokenizer).startswith("LOUD") == loud


@pytest.mark.parametrize("template, turn", [
    ("{% for m in messages %}{{ m['content']|lower }}<|im_end|>{% endfor %}", None),
    ("{% for m in messages if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}{% endfor %}",
     None),
    ("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", "<|im_end|>"),
    ("{% for m in messages %}{{ m['content'] }}{% endfor %}", None)])
def test_the_end_of_a_turn_is_what_stands_behind_an_answer(tmp_path, template, turn):
    write_checkpoint(tmp_path / "m", "sdar")
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    tokenizer = checkpoints.open_checkpoint(str(tmp_path / "m"))[1]
    found = templates.end_of_turn(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == turn
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}<|MASK|>")
    with pytest.raises(BadInput, match="mask token"):
        checkpoints.open_checkpoint(str(tmp_path / "m"))


def test_an_adapter_on_the_output_head_counts_or_is_refused(tmp_path):
    import peft
    write_checkpoint(tmp_path / "m", "llada")
    net = checkpoints.load_model(checkpoints.read_checkpoint(tmp_path / "m"), torch.float32)
    net = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=8, target_modules=[
        "q_proj", "lm_head"], task_type="CAUSAL_LM"))
    for name, p in net.named_parameters():
        p.data = torch.randn_like(p) * 0.3 if "lora_B" in name else p.data
    net.peft_config["default"].base_model_name_or_path = str(tmp_path / "m")
    net.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    policy, _ = load(tmp_path / "a")
    state = torch.arange(8)[None] + 60
    with torch.no_grad():
        ours = policy.logits(state, torch.ones_like(state), state, state >= 0)
        ids = torch.cat([state, state], 1)
        sees = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        want = net.base_model.model(ids, attention_mask=sees).logits[0, 8:]
    inside = ours.isfinite()
    assert (ours - want)[inside].abs().max() < 1e-4
    with pytest.raises(BadInput, match="head"):
        load(tmp_path / "a", dataclasses.replace(CFG, lora_rank=4), train=True)


def test_an_earlier_model_keeps_the_prompt_it_was_trained_with(tmp_path):
    """Its agrpo.json knows of no template arguments: it was trained without."""
    write_checkpoint(tmp_path / "m", "a2d-qwen3")
    (tmp_path / "m/agrpo.json").write_text(json.dumps({"task": "gsm8k", "prompt": "agrpo"}))
    tokenizer = checkpoints.open_checkpoint(str(tmp_path / "m"))[1]
    assert prompt_of(tokenizer).endswith("assistant\n")


@pytest.mark.parametrize("text", [
    "enable_thinking", "enable_thinking=", "=true", "a=1,,b=2", "enable_thinking=true,", "a b=1",
    "thinking=true", "tokenize=true", "chat_template=x", "messages=1", "{}", " ",
    "enable_thinking=true,enable_thinking=false", "add_generation_prompt=false", "role=user", "m=5",
    "content=1", "endfor=1", "im_start=3"])
def test_bad_template_args_are_one_line(here, text, capsys):
    write_checkpoint("m", "a2d-qwen3")
    sums()
    for main in (agrpo.main, evaluation.main):
        refused(main, ["--task", "gsm8k", "--data", "sums.jsonl", "--device", "cpu", "--model", "m",
                       f"--template-args={text}"], capsys, "--template-args")


def test_template_args_go_with_a_template(here, capsys):
    refused(agrpo.main, ["--template-args", "enable_thinking=true"], capsys, "--template-args")
    assert templates.read_template_args("a=1, b = x,c=FALSE,d=-2") == {
        "a": 1, "b": "x", "c": False, "d": -2}


def test_a_think_block_that_the_template_wrote_earns_nothing(tmp_path):
    from rewards import reward_parts
    example = {"question": "2+2?", "answer": "#### 4"}
    write_checkpoint(tmp_path / "m", "a2d-qwen3")
    _, tokenizer = load(tmp_path / "m")
    assert "</think>" in prompt_of(tokenizer)
    for text, think in (("<answer>4</answer>", 0), ("<think>2+2</think><answer>4</answer>", 0.5)):
        assert reward_parts("gsm8k", text, example)["think"] == think


# --------------------------------------------------------------------- base models: no template
def without_template(folder):
    (folder / "chat_template.jinja").unlink()
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    assert "chat_template" not in saved


@pytest.mark.parametrize("family", ["llada", "Dream", "a2d-qwen3", "sdar"])
def test_without_a_chat_template_prompts_are_plain_text(tmp_path, family):
    write_checkpoint(tmp_path / "m", family)
    without_template(tmp_path / "m")
    policy, tokenizer = load(tmp_path / "m")
    assert prompt_of(tokenizer, "A question?\n") == "A question?\n"
    assert policy.turn_id == policy.eos_id
    ids, _ = checkpoints.encode_prompts(tokenizer, [("A", "<reasoning>")])
    assert tokenizer.decode(ids[0]) == "A<reasoning>"


def test_a_base_model_runs_bare_and_is_fine_tuned_and_is_refused_otherwise(here, capsys):
    write_checkpoint("m", "llada")
    without_template(Path("m"))
    sums()
    Path("pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": f"{i}+1?", "completion": f" {i + 1}"}) + "\n" for i in range(8)))
    flags = ["--task", "gsm8k", "--data", "sums.jsonl", "--device", "cpu", "--model"]
    shape = ["--completion-length", "64", "--block-length", "8", "--steps", "8", "--eval-steps",
             "8", "--eval-examples", "2", "--lora-rank", "4", "--max-steps", "1", "--prompts", "2"]
    small = ["--completions", "2", "--mc-steps", "2"]
    for more in ([], ["--prompt", "d1"], ["--prompt", "agrpo"]):
        refused(agrpo.main, [*flags, "m", *shape, *more], capsys, "no chat template",
                "--prompt bare")
        refused(evaluation.main, [*flags, "m", "--limit", "2", *more], capsys, "no chat template")
    refused(agrpo.main, [*flags, "m", "--template-args", "a=1", "--prompt", "bare"], capsys,
            "no chat template")
    assert agrpo.main([*flags, "m", *shape, *small, "--prompt", "bare", "--name", "bare"]) == 0
    assert evaluation.main([*flags, "m", "--prompt", "bare", "--limit", "2", "--steps", "8",
                            "--lengths", "8", "--block-length", "8"]) == 0
    assert agrpo.main([*flags, "m", *shape, "--sft", "pairs.jsonl", "--name", "pairs"]) == 0
    assert agrpo.main([*flags, "m", *shape, "--sft", "gold", "--name", "gold"]) == 0
    assert agrpo.main([*flags, "runs/gold", *shape, *small, "--name", "on"]) == 0    # as it learned
    assert json.loads(Path("runs/on/config.json").read_text())["prompt"] == "agrpo"
    capsys.readouterr()
    assert agrpo.main([*flags, "runs/gold", *shape, "--prompt", "d1", "--name", "no"]) == 2
    assert "no chat template" in capsys.readouterr().err


# ---------------------------------------------------- adapters trained on the published LLaDA class
PUBLISHED = {"self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj",
             "self_attn.v_proj": "v_proj", "self_attn.o_proj": "attn_out",
             "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out"}
D1 = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]    # d1's list


def as_published(adapter, folder, keep=tuple(PUBLISHED), targets=None, layers=(0, 1), **config):
    """The adapter as peft writes it on the published class, of these modules only; no tokenizer."""
    from safetensors.torch import save_file
    folder.mkdir()
    found = {}
    for name, weight in load_file(adapter / "adapter_model.safetensors").items():
        layer, module = name.split("model.layers.")[1].split(".lora_")[0].split(".", 1)
        if module in keep and int(layer) in layers:
            published = f"model.transformer.blocks.{layer}.{PUBLISHED[module]}"
            found[name.replace(f"model.layers.{layer}.{module}", published)] = weight
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    saved = json.loads((adapter / "adapter_config.json").read_text())
    saved |= {"target_modules": targets or [PUBLISHED[m] for m in keep]} | config
    (folder / "adapter_config.json").write_text(json.dumps(saved))
    return folder


@pytest.mark.parametrize("how", [
    {}, {"targets": D1, "keep": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                 "mlp.up_proj")},
    {"keep": ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")},
    {"layers": (1,), "layers_to_transform": [1], "layers_pattern": "blocks"}], ids=str)
def test_an_adapter_of_the_published_class_has_its_effect_on_the_stock_class(tmp_path, how):
    weights, config = write_checkpoint(tmp_path / "model", "llada")
    _, adapter, sequences = trained_adapter(tmp_path / "model", config, tmp_path)
    folder = as_published(adapter, tmp_path / "published", **how)
    delta, left = load_file(adapter / "adapter_model.safetensors"), dict(weights)
    for module in how.get("keep", PUBLISHED):                  # W + alpha/r B A, by hand
        for i in how.get("layers", (0, 1)):
            a, b = (delta[f"base_model.model.model.layers.{i}.{module}.lora_{x}.weight"]
                    for x in "AB")
            left[f"model.transformer.blocks.{i}.{PUBLISHED[module]}.weight"] = (
                weights[f"model.transformer.blocks.{i}.{PUBLISHED[module]}.weight"] + 4 * b @ a)
    policy, tokenizer = load(folder, dataclasses.replace(CFG, lora_rank=4), train=True)
    prompt, state = sequences[0]
    exact = forward({k: v.double() for k, v in left.items()}, config, torch.cat([prompt, state]))
    exact[:, policy.mask_id] = -torch.inf
    exact = exact[-8:].log_softmax(-1).nan_to_num(neginf=0)
    assert (logp_of(policy, sequences[:1])[0].nan_to_num(neginf=0) - exact).abs().max() < 1e-4
    assert tokenizer.chat_template                             # the base's: it brought none
    save(policy, tokenizer, tmp_path / "again", dataclasses.replace(CFG, lora_rank=4))
    again, _ = load(tmp_path / "again")
    assert torch.equal(logp_of(again, sequences), logp_of(policy, sequences))
    assert agrpo.main(["--model", str(folder), "--merge", str(tmp_path / "merged"), "--task",
                       "gsm8k", "--device", "cpu"]) == 0
    merged, _ = files_of(tmp_path / "merged")
    assert all(torch.allclose(merged[k], left[k], atol=1e-6) for k in left)


def test_an_adapter_on_the_published_head_is_renamed_too(tmp_path):
    from safetensors.torch import save_file
    weights, config = write_checkpoint(tmp_path / "model", "llada")
    _, adapter, sequences = trained_adapter(tmp_path / "model", config, tmp_path)
    folder = as_published(adapter, tmp_path / "published")
    found = load_file(folder / "adapter_model.safetensors")
    V, h = weights["model.transformer.ff_out.weight"].shape
    name = "base_model.model.model.transformer.ff_out.lora_{}.weight"      # ff_out means both
    a, b = torch.randn(4, h) / 9, torch.randn(V, 4) / 9
    save_file({**found, name.format("A"): a, name.format("B"): b},
              folder / "adapter_model.safetensors", {"format": "pt"})
    plain, policy = load(adapter)[0], load(folder)[0]
    z = torch.randn(3, h)
    with torch.no_grad():
        heads = [p.model.get_output_embeddings()(z) for p in (plain, policy)]
    assert torch.allclose(heads[1], heads[0] + 4 * z @ a.T @ b.T, atol=1e-4)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}],
                         ids=str)
def test_adapters_of_other_kinds_compute_what_peft_does(tmp_path, kind):
    """DoRA's magnitudes, a bias, another scale."""
    import peft
    write_checkpoint(tmp_path / "model", "llada")
    stock = checkpoints.load_model(checkpoints.read_checkpoint(tmp_path / "model"), torch.float32)
    if "lora_bias" in kind:                                    # peft asks for biases of the layers
        for layer in stock.model.layers:
            layer.mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(48))
    known = {"target_modules": ["up_proj"] if "lora_bias" in kind else ["q_proj", "up_proj"]}
    net = peft.get_peft_model(stock, peft.LoraConfig(r=4, lora_alpha=8.0, **known, **kind))
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.data = p.data + 0.3 * torch.randn(p.shape)
    ids = torch.arange(24).view(2, 12) + 30
    with torch.no_grad():
        peft_own = net(ids).logits
        checkpoints.lean(net)
        assert torch.allclose(net(ids).logits, peft_own, atol=1e-5)


@pytest.mark.parametrize("config", [{"rank_pattern": {"ff_out": 2}}, {"alpha_pattern": {"x": 2}},
                                    {"modules_to_save": ["wte"]}], ids=str)
def test_what_cannot_be_renamed_in_an_adapter_is_one_line(here, config, capsys):
    _, shape = write_checkpoint("model", "llada")
    trained_adapter(here / "model", shape, here)
    as_published(here / "adapter", here / "published", **config)
    sums()
    refused(evaluation.main, ["--task", "gsm8k", "--model", "published", "--data", "sums.jsonl",
                              "--device", "cpu", "--limit", "2"], capsys, "merge", *config)


def test_an_adapter_takes_its_own_tokenizer_where_it_has_one(tmp_path):
    _, config = write_checkpoint(tmp_path / "model", "llada")
    _, adapter, _ = trained_adapter(tmp_path / "model", config, tmp_path)
    (adapter / "chat_template.jinja").write_text("{{ 'own ' + messages[0]['content'] }}")
    assert prompt_of(checkpoints.open_checkpoint(str(adapter))[1]) == "own 2+2?"
    (adapter / "tokenizer.json").unlink()                      # its settings alone make none
    about, tokenizer = checkpoints.open_checkpoint(str(adapter))
    assert prompt_of(tokenizer).startswith("<|startoftext|>") and about.adapter == adapter
