"""Protects caches and what they cost in correctness: a cached rollout is the stock recipe's, its
bias is corrected. And what steps and passes cost nothing. Run: pytest tests/test_cache.py"""
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import toy
import torch
from test_exact import change, sampled
from toy import NEUTRAL, blank, loss_of, prompts, sampling, tiny, varied
from transformers import DynamicCache

import agrpo
import eval as evaluation
import methods.models
from eval import generate, parse
from methods import caches
from rewards import BadInput
from support import options

CFG = dataclasses.replace(NEUTRAL, completion_length=12, block_length=4, steps=6, temperature=0.9,
                          unmasking="random")


def sharp(cfg=CFG):
    """A small network whose cached law is another one."""
    policy, _ = tiny(cfg)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(3.0)
    return policy


def cached_rollout(policy, cfg, *of, **settings):
    keys = [(i,) for i in range(len(of))]
    return caches.cached_rollout(policy, *prompts(*of), dataclasses.replace(cfg, **settings), keys)


def widths_of(policy):
    """A list that gathers how many columns each call of the decoder computes."""
    seen, inner = [], policy.decode

    def decode(ids, *args, **rest):
        seen.append(ids.shape[1])
        return inner(ids, *args, **rest)
    policy.decode = decode
    return seen


@torch.no_grad()
def stock_logits(policy, prompt, before, state, start, L, kind):
    """Logits (N, C, V) of the block at `start` in `state`, by the library's own cache filled on the
    state `before`."""
    decoder, cache, P = policy.model.get_decoder(), DynamicCache(), prompt.shape[1]
    full, now = torch.cat([prompt, before], 1), torch.cat([prompt, state], 1)
    N, S, s, e = len(prompt), full.shape[1], P + start, P + start + L

    def sees(q):
        return torch.ones(N, 1, q, S, dtype=torch.bool)
    decoder(input_ids=full, attention_mask=sees(S), past_key_values=cache, use_cache=True)
    end = e if kind == "dual" else S
    for layer in cache.layers:         # what is not computed anew
        layer.keys, layer.values = (x[..., [*range(s), *range(end, S)], :]
                                    for x in (layer.keys, layer.values))
    hidden = decoder(input_ids=now[:, s:end], attention_mask=sees(end - s), past_key_values=cache,
                     position_ids=torch.arange(s, end)[None]).last_hidden_state
    V = policy.model.config.vocab_size
    logits = torch.full((N, state.shape[1], V), math.nan, dtype=hidden.dtype)
    logits[:, start:start + L] = policy.model.get_output_embeddings()(hidden[:, :L])
    logits[..., policy.mask_id] = -math.inf
    return logits


@pytest.mark.parametrize("kind", ["dual", "prefix"])
def test_a_cached_rollout_records_the_log_probs_of_the_librarys_own_cache(kind):
    policy, (prompt, mask) = sharp(), prompts(7, 7, 7)
    traj = cached_rollout(policy, CFG, 7, 7, 7, cache=kind)
    assert (traj.nfe == 6).all() and torch.equal(traj.prompt, prompt)
    assert torch.equal(traj.prompt_mask, mask) and traj.old == "cached"
    away = []
    for t in range(6):                 # two steps a block
        row, at = torch.arange(3), torch.full((3,), t)
        state, target = agrpo.state_at(traj, row, at, policy.mask_id)
        before, _ = agrpo.state_at(traj, row, at // 2 * 2, policy.mask_id)
        logits = stock_logits(policy, prompt, before, state, t // 2 * 4, 4, kind)[target]
        token, logp = traj.tokens[target], traj.logp[target]
        assert (agrpo.Law(logits, CFG).logp(token) - logp).abs().max() < 1e-10
        plain = agrpo.Law(policy.logits(prompt, mask, state, target), CFG).logp(token).detach()
        away.append(float((plain - logp).abs().max()))
    assert max(away[0::2]) < 1e-10     # exact on coming to a block,
    assert min(away[1::2]) > 1e-3      # approximate within it


@pytest.mark.parametrize("kind", ["dual", "prefix"])
@pytest.mark.parametrize("unmasking", ["low_confidence", "threshold"])
def test_rows_that_stand_at_different_blocks_do_not_mind_one_another(kind, unmasking):
    policy, (prompt, mask) = sharp(), prompts(7, 5, 1, 6)
    policy.eos_id, policy.turn_id = 6, 7                       # some rows finish early
    cfg = dataclasses.replace(CFG, cache=kind, unmasking=unmasking, threshold=0.2, steps=12)
    traj = cached_rollout(policy, cfg, 7, 5, 1, 6)
    assert unmasking == "low_confidence" or len(traj.nfe.unique()) > 1
    for i, n in enumerate(mask.sum(1).tolist()):
        own = prompt[i:i + 1, -n:], mask[i:i + 1, -n:]
        alone = caches.cached_rollout(policy, *own, cfg, [(i,)])
        assert torch.equal(alone.tokens[0], traj.tokens[i])
        assert torch.equal(alone.reveal_step[0], traj.reveal_step[i])
        assert (alone.logp[0] - traj.logp[i]).abs().max() < 1e-9


@pytest.mark.parametrize("kind, widths", [("dual", {19, 4}), ("prefix", {19, 12, 8, 4})])
def test_a_cache_computes_what_it_says(kind, widths):
    policy = sharp()
    seen = widths_of(policy)
    cached_rollout(policy, CFG, 7, 7, cache=kind)
    assert set(seen) == widths and seen.count(19) == 3 and len(seen) == 6
    assert "hidden" not in vars(policy)                        # the policy is as it was


def test_a_model_with_shifted_logits_computes_the_column_before_the_block():
    policy = sharp()
    policy.shift = True                # a step a block: each comes to a block, exact
    cached = cached_rollout(policy, CFG, 7, 4, steps=3, cache="dual")
    plain = agrpo.rollout(policy, *prompts(7, 4), dataclasses.replace(CFG, steps=3), [(0,), (1,)])
    assert torch.equal(cached.tokens, plain.tokens)
    assert (cached.logp - plain.logp).abs().max() < 1e-10
    seen = widths_of(policy)
    cached_rollout(policy, CFG, 7, 4, cache="dual")
    assert set(seen) == {19, 5}


@pytest.mark.parametrize("cache", ["dual", "prefix", "block"])
@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
@pytest.mark.parametrize("top_k", [0, 20])
def test_every_sampler_goes_with_every_cache(unmasking, cache, top_k):
    """A step a block where the cache is not exact: then all records are those without one."""
    steps = 6 if cache == "block" else 3
    cfg = dataclasses.replace(CFG, cache=cache, unmasking=unmasking, top_k=top_k, steps=steps,
                              threshold=1.0, entropy_bound=0.0)
    policy = tiny(cfg, block=4 * (cache == "block"))[0]
    cached = cached_rollout(policy, cfg, 8, 5, 4)
    plain = agrpo.rollout(policy, *prompts(8, 5, 4), cfg, [(0,), (1,), (2,)])
    assert torch.equal(cached.tokens, plain.tokens) and torch.equal(cached.rank, plain.rank)
    for name in ("logp", "order_logp", "entropy", "gradient"):
        assert torch.allclose(getattr(cached, name), getattr(plain, name), atol=1e-9), name
    if cache == "block":               # exact: what the update would find is what there was
        assert cached.old == plain.old and (not top_k or torch.equal(cached.support, plain.support))
    else:                              # the support of another law is not the model's
        assert cached.old == "cached" and cached.support is None


# ---------------------------------------------------------- the correction, against enumeration
BASE = change(method="exact", cache="dual", importance_cap=1e9)


def case(unmasking, seed, top_k=0):
    """A denoiser, and every trajectory of a cached rollout: one whose law is some way off."""
    full, other = toy.TableDenoiser(3, seed=seed), toy.TableDenoiser(3, seed=seed)
    g = torch.Generator().manual_seed(100 + seed)
    noise = torch.randn(other.table.shape, generator=g, dtype=torch.float64)
    noise[-1] = 0.0                    # the first step is exact
    with torch.no_grad():
        other.table += 0.4 * noise
    term = "off" if unmasking == "random" else "on"
    cfg = dataclasses.replace(BASE, unmasking=unmasking, top_k=top_k, position_term=term)
    found = toy.enumerate_trajectories(other, cfg)
    traj = toy.as_trajectory(other, cfg, found)
    traj.old, traj.support = "cached", None
    return cfg, full, traj, found


def expected_gradient(cfg, policy, traj, found, draws, want):
    """Error of the expected gradient over all trajectories of the cached rollout, relative to that
    of E[R] without a cache."""
    rewards = torch.tensor([toy.reward_of(f[0], policy.V) for f in found], dtype=torch.float64)
    adv, got = rewards * torch.stack([f[2] for f in found]).detach(), 0.0
    for weight, chance in draws(len(found)):
        views = agrpo.views_where(weight, traj, cfg, policy.mask_id)
        loss, ratio = loss_of(policy, traj, views, adv, cfg)
        assert (ratio - 1).abs().max() < 1e-12
        found_now, = torch.autograd.grad(loss, policy.table)
        got = got - chance * found_now * len(found) * cfg.steps
    return float((got - want).norm() / want.norm())


def every_step(N):
    yield torch.ones(N, 3, dtype=torch.float64), 1.0


def drawn_independently(N, pi=(0.3, 0.8, 0.5)):
    """All sets of steps, with the chance that just these are drawn."""
    for hit in itertools.product([False, True], repeat=3):
        if any(hit):
            weight = torch.tensor([h / p for h, p in zip(hit, pi)], dtype=torch.float64)
            yield weight.repeat(N, 1), math.prod(p if h else 1 - p for h, p in zip(hit, pi))


@pytest.mark.parametrize("draws", [every_step, drawn_independently])
@pytest.mark.parametrize("unmasking", ["random", "low_confidence", "plackett_luce"])
@pytest.mark.parametrize("top_k", [0, 2])
def test_the_gradient_after_cached_rollouts_is_biased_and_corrected_it_is_not(
        unmasking, draws, top_k):
    """Exact over all that a cached rollout can do. By low confidence that is not all, with so few
    tokens: where every candidate of one position is surer than a candidate of another, the latter
    never wins; nor does a token outside of the cache's support."""
    for seed in range(5):
        cfg, policy, traj, found = case(unmasking, seed, top_k)
        possible = set(map(toy.key_of, found))
        every = toy.enumerate_trajectories(policy, cfg)
        exact = [f for f in every if toy.key_of(f) in possible]
        left_out = sum(float(f[2].detach()) for f in every if toy.key_of(f) not in possible)
        assert left_out < (0.7 if unmasking == "low_confidence" or top_k else 1e-12)
        rewards = torch.tensor([toy.reward_of(f[0], policy.V) for f in exact], dtype=torch.float64)
        total = (torch.stack([f[2] for f in exact]) * rewards).sum()
        want, = torch.autograd.grad(total, policy.table)
        error = {name: expected_gradient(dataclasses.replace(cfg, **settings), policy, traj, found,
                                         draws, want)
                 for name, settings in (("completion", {}), ("none", {"importance_cap": 0.0}),
                                        ("step", {"importance_level": "step"}))}
        assert error["completion"] < 1e-12 and error["none"] > 0.05 and error["step"] > 0.02, error


def test_the_weight_of_a_completion_is_truncated():
    cfg, policy, traj, _ = case("low_confidence", 0)
    views = agrpo.exact_views(traj, None, cfg, policy.mask_id, None)
    adv = torch.ones(len(traj.tokens), 1, dtype=torch.float64)
    weight = {}
    for cap in (1e9, 1.5):
        at = dataclasses.replace(cfg, importance_cap=cap)
        weight[cap] = (agrpo.prepare(policy, traj, views, adv, at).weight / views.weight)[:, 0]
    assert weight[1e9].max() > 2 and torch.equal(weight[1.5], weight[1e9].clamp(max=1.5))
    views = views._replace(weight=2 * views.weight)            # as if half of the steps were drawn
    for cap in (1e9, 1.5):
        at = dataclasses.replace(cfg, importance_cap=cap)
        weight[cap] = (agrpo.prepare(policy, traj, views, adv, at).weight / views.weight)[:, 0]
    assert weight[1e9].min() < -1.5 and torch.equal(weight[1.5], weight[1e9].clamp(-1.5, 1.5))
    weight[1e9] = (agrpo.prepare(policy, traj, views._replace(weight=views.weight / 2), adv, cfg
                                 ).weight / views.weight * 2)[:, 0]
    for i in range(5):                 # one weight a completion
        own = weight[1e9][views.row == i]
        assert own.max() - own.min() < 1e-9


def test_a_step_after_a_rollout_with_a_cache_is_corrected_and_logged():
    """Through the step that `eval` makes of the settings, views drawn as they must be."""
    policy, tokenizer = tiny()
    for cap in (2.0, 0.0):
        cfg = parse(["--cache", "dual", "--importance-cap", str(cap), "--prompts", "2",
                     "--completions", "4", "--block-length", "4", "--steps", "8",
                     "--device", "cpu"])[0]
        seen, inner = [], agrpo.OLD_LOGP["cached"]
        method, optimizer = evaluation.method_of(cfg, tokenizer), agrpo.make_optimizer(policy, cfg)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(agrpo.OLD_LOGP, "cached", lambda policy, traj, views, cfg: (
                seen.append((views, inner(policy, traj, views, cfg))) or seen[-1][1]))
            one_step = method.train_step or agrpo.train_step
            row = one_step(policy, optimizer, toy.examples(), 0, cfg, sampling(tokenizer))
        (before, after), = seen
        ratio = after.weight / before.weight
        assert row["passes"] == len(after.row) > 0 and after.logp_old is not None
        assert ratio.abs().max() <= 2.0 * (1 + 1e-9) and (cap > 0) == ("is_weight" in row)
        if cap:
            assert row["is_weight"] == pytest.approx(float(ratio.mean()))
            cut = float((ratio.abs() > 1.999999).double().mean())
            assert row["is_capped"] == pytest.approx(cut)
            assert (ratio - 1).abs().max() > 1e-6
        else:
            assert torch.equal(after.weight, before.weight)


# ----------------------------------------------------------------------------------- what is saved
def sampled_of(policy, cfg, N):
    return agrpo.rollout(policy, *blank(N), cfg, [(i,) for i in range(N)])


def test_a_negative_weight_clips_as_a_negative_advantage_does():
    policy, traj = sampled(change(unmasking="low_confidence"), N=16)
    cfg, g = change(unmasking="low_confidence"), torch.Generator().manual_seed(3)
    with torch.no_grad():              # ratios far from one
        policy.table += torch.randn(policy.table.shape, generator=g, dtype=torch.float64)
    views = agrpo.exact_views(traj, None, cfg, policy.mask_id, None)
    adv = torch.linspace(-1, 1, 16, dtype=torch.float64)
    one, other = (torch.autograd.grad(loss_of(policy, traj, v, a, cfg)[0], policy.table)[0]
                  for v, a in ((views._replace(weight=-views.weight), adv), (views, -adv)))
    assert one.norm() > 0 and (one - other).abs().max() < 1e-14


@pytest.mark.parametrize("unmasking, gap", [
    ("low_confidence", 0.0), ("low_confidence", 5.0), ("low_confidence", 10.0), ("random", 20.0)])
def test_recorded_sizes_are_right_where_a_law_is_all_but_certain(unmasking, gap):
    """float32, where 1 - 2 p + sum p^2 would be noise, against autograd in float64."""
    class Certain(toy.TableDenoiser):
        def logits(self, *args, **rest):
            return super().logits(*args, **rest).float()

    policy, cfg = Certain(3, 4), change(unmasking=unmasking, temperature=1.0)
    with torch.no_grad():
        policy.table[..., 1] += gap
    traj = sampled_of(policy, cfg, 8)
    policy.__class__ = toy.TableDenoiser
    views = agrpo.exact_views(traj, None, cfg, policy.mask_id, None)
    views = views._replace(order_logp_old=traj.order_logp[views.row, views.step])
    for i, at in enumerate(zip(views.row.tolist(), views.step.tolist())):
        of = agrpo.step_logp(policy, traj, views.select([i]), cfg)
        want = sum(float(torch.autograd.grad(x.sum(), policy.table, retain_graph=True)[0]
                         .square().sum()) for x in of if x is not None and x.requires_grad)
        assert abs(float(traj.gradient[at]) - want) < 1e-2 * want + 1e-13


@pytest.mark.parametrize("method", ["exact", "agrpo"])
def test_steps_that_were_certain_cost_no_pass_and_change_no_gradient(method):
    cfg = change(method=method, mc_steps=2, top_k=2, top_p=0.6, unmasking="random",
                 position_term="off")
    policy = toy.TableDenoiser(3, scale=2.0)
    traj = sampled_of(policy, cfg, 32)
    adv = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    adv[:8] = 0.0
    views = agrpo.METHODS[method].views(traj, adv, cfg, policy.mask_id, agrpo.generator(0))
    certain = traj.gradient[views.row, views.step] == 0
    idle = certain | (adv[views.row] == 0)
    kept = agrpo.prepare(policy, traj, views, adv[:, None], cfg)
    assert 0 < len(kept.row) < len(views.row) and (certain & (adv[views.row] != 0)).any()
    assert torch.equal(kept.row, views.row[~idle]) and torch.equal(kept.step, views.step[~idle])
    all_of = views._replace(adv=adv[views.row, None], logp_old=traj.logp[views.row])
    loss = agrpo.policy_loss(policy, traj, all_of.select(idle), cfg)[0]
    assert (torch.autograd.grad(loss, policy.table)[0] == 0).all()
    with_kl = dataclasses.replace(cfg, kl=0.1)                 # then all have a gradient
    assert len(agrpo.prepare(policy, traj, views, adv[:, None], with_kl).row) == len(views.row)


def test_passes_fill_their_tokens_with_the_longest_prompts_first():
    policy, (prompt, mask) = sharp(), prompts(9, 3, 7, 5, 8)
    policy.eos_id = policy.turn_id = -1                        # no row finishes early
    traj = agrpo.rollout(policy, prompt, mask, CFG, [(i,) for i in range(5)])
    views = agrpo.exact_views(traj, None, CFG, policy.mask_id, None)

    def parts(budget, views=views):
        return agrpo.micro_batches(views, dataclasses.replace(CFG, tokens_per_pass=budget))
    for budget, rows in ((1, 1), (2 * 21, 2), (7 * 21 + 20, 7), (10**6, 30)):  # 9 + 12 tokens each
        index = torch.cat(parts(budget))
        assert {len(p) for p in parts(budget)[:-1]} <= {rows} and len(parts(budget)[0]) == rows
        assert sorted(index.tolist()) == list(range(30))
        assert (mask.sum(1)[views.row[index]].diff() <= 0).all()
    seen = widths_of(policy)
    for part in parts(6 * 21):
        agrpo.step_logp(policy, traj, views.select(part), CFG)
    assert seen == [21, 20, 19, 17, 15]        # no column that is padding in all of them
    twice = agrpo.METHODS["dipo"].views(traj, None, CFG, policy.mask_id, None)
    assert {len(p) for p in parts(2 * 33, twice)[:-1]} == {2}  # dipo reads a completion twice
    assert agrpo.micro_batches(views.select(slice(0, 0)), CFG) == []


def test_texts_come_back_in_order_whatever_the_batches(monkeypatch):
    cfg = dataclasses.replace(CFG, task="countdown", prompt="bare", rollout_batch=3)
    policy, tokenizer = tiny(cfg)
    puzzles = [{"nums": [1] * n, "target": n} for n in (2, 9, 4, 3, 7, 5, 8)]  # of several lengths
    shapes, inner = [], agrpo.rollout

    def rollout(policy, prompt, *rest):
        shapes.append(tuple(prompt.shape))
        return inner(policy, prompt, *rest)
    monkeypatch.setattr(agrpo, "rollout", rollout)
    traj, texts = generate(policy, tokenizer, puzzles, [(i,) for i in range(7)], cfg)
    rows, widths = zip(*shapes)
    assert rows == (3, 3, 1) and widths[0] > widths[1] > widths[2]     # the longest first
    for i in range(7):
        alone, text = generate(policy, tokenizer, puzzles[i:i + 1], [(i,)], cfg)
        assert text == texts[i:i + 1] and torch.equal(alone.tokens[0], traj.tokens[i])


def test_what_a_cache_goes_with():
    def settings(words):
        return parse([*words.split(), "--device", "cpu"])[0]
    cfg = settings("--cache dual")
    assert (cfg.timesteps, cfg.position_term) == ("independent_gradient", "off")
    assert (cfg.importance_cap, cfg.importance_level) == (2.0, "completion")
    assert settings("--cache dual --position-term on").position_term == "on"
    assert options.for_evaluation(cfg).cache == "none" == settings("").cache
    assert settings("--model tiny-block").cache == "block"
    by_step = settings("--cache prefix --importance-level step --timesteps stratified")
    assert by_step.importance_cap == 2.0


@pytest.mark.parametrize("words, told", [
    ("--cache block", "--cache block"), ("--model tiny-block --cache dual", "--cache dual"),
    ("--cache dual --controller threshold", "controller"),
    ("--importance-level step", "--cache prefix or dual"), ("--importance-cap 2", "importance-cap"),
    ("--cache dual --timesteps batch", "independent"), ("--cache dual --sft gold", "--sft"),
    ("--cache dual --preset paper", "last_step"), ("--cache dual --method diffpo", "shrink 1"),
    ("--method tracerl --shrink 1 --importance-cap 2", "--importance-cap"),
    ("--cache dual --position-term on --importance-level step", "position-term off"),
    ("--cache dual --position-term on --importance-cap 0", "position-term off")])
def test_what_a_cache_does_not_go_with(words, told):
    with pytest.raises(BadInput, match=told):
        parse([*words.split(), "--device", "cpu"])


@pytest.mark.whole
def test_a_run_with_a_cache_logs_its_weights_and_resumes_to_the_bit(here, monkeypatch):
    monkeypatch.setattr(methods.models, "reward_parts",
                        lambda task, text, example, weights: {"correct": varied(text, example)})
    few = ["--device", "cpu", "--prompts", "2", "--completions", "4", "--train-examples", "16",
           "--eval-examples", "4", "--base-steps", "3", "--eval-steps", "8", "--eval-every", "0",
           "--cache", "dual", "--steps", "8", "--block-length", "4"]
    assert agrpo.main([*few, "--name", "a", "--max-steps", "3"]) == 0
    assert agrpo.main([*few, "--name", "b", "--max-steps", "1"]) == 0
    assert agrpo.main(["--name", "b", "--resume", "--max-steps", "3"]) == 0
    one, two = ([line.split(",") for line in Path(f"runs/{name}/log.csv").read_text().splitlines()]
                for name in "ab")
    same = [i for i, name in enumerate(one[0]) if "seconds" not in name and "memory" not in name]
    assert [[line[i] for i in same] for line in one] == [[line[i] for i in same] for line in two]
    assert all(float(line[one[0].index("is_weight")]) > 0 for line in one[1:])


@pytest.mark.parametrize("mask_id", [0, 5])
def test_the_block_cache_is_exact_whatever_the_id_of_the_mask(mask_id):
    policy, _ = tiny(CFG, block=4)
    policy.mask_id = mask_id
    prompt, mask = prompts(8, 5, 3)
    cfg = dataclasses.replace(CFG, steps=CFG.completion_length)
    cached, plain = (roll(policy, prompt, mask, dataclasses.replace(cfg, cache=kind), list("abc"))
                     for kind, roll in (("block", caches.cached_rollout), ("none", agrpo.rollout)))
    assert torch.equal(cached.tokens, plain.tokens)
    assert (cached.logp - plain.logp).abs().max() < 1e-9
