"""Protects caches and what they cost in correctness: a cached rollout is the stock recipe's, its bias is corrected, a step waits once for
the GPU. Run: pytest tests/test_cache.py"""
import dataclasses
import itertools
import math

import pytest
import toy
import torch
from toy import agrpo
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

CFG = agrpo.Config(completion_length=12, block_length=4, steps=6, temperature=0.9, unmasking="random", base_hidden=32, base_layers=2)
BASE = agrpo.Config(completion_length=3, block_length=3, steps=3, temperature=0.7, method="exact", cache="dual", is_cap=1e9)


def tiny(cfg=CFG):
    tokenizer = agrpo.tiny_tokenizer()
    net = agrpo.tiny_model(tokenizer, cfg, 0).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3.0)                                                                  # so that the cached law is another one
    return agrpo.Policy(net, tokenizer.mask_token_id, tokenizer.eos_token_id)


def prompts(*lengths):
    P = max(lengths)
    prompt = torch.randint(6, 100, (len(lengths), P), generator=torch.Generator().manual_seed(1))
    return prompt, (torch.arange(P) >= P - torch.tensor(lengths)[:, None]).long()


def keep(cache, which):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., which, :], layer.values[..., which, :]


@torch.no_grad()
def stock_logits(policy, prompt, before, state, start, L, kind):
    """Logits (N, C, V) of the block at `start` in `state`, by the library's own cache filled on the state `before`."""
    decoder, cache, P = policy.model.get_decoder(), DynamicCache(), prompt.shape[1]
    full, now = torch.cat([prompt, before], 1), torch.cat([prompt, state], 1)
    N, S, s, e = len(prompt), full.shape[1], P + start, P + start + L
    sees = lambda q, k: torch.ones(N, 1, q, k, dtype=torch.bool)                         # noqa: E731
    decoder(input_ids=full, attention_mask=sees(S, S), past_key_values=cache, use_cache=True)
    if kind == "prefix":
        keep(cache, slice(0, s))
        part, positions = now[:, s:], torch.arange(s, S)[None]
    else:
        keep(cache, [*range(s), *range(e, S)])
        part, positions = now[:, s:e], torch.arange(s, e)[None]
    hidden = decoder(input_ids=part, attention_mask=sees(part.shape[1], S), position_ids=positions, past_key_values=cache).last_hidden_state
    logits = torch.full((N, state.shape[1], policy.model.config.vocab_size), math.nan, dtype=hidden.dtype)
    logits[:, start:start + L] = policy.model.get_output_embeddings()(hidden[:, :L])
    logits[..., policy.mask_id] = -math.inf
    return logits


@pytest.mark.parametrize("kind", ["dual", "prefix"])
def test_a_cached_rollout_records_the_log_probs_of_the_librarys_own_cache(kind):
    policy, cfg = tiny(), dataclasses.replace(CFG, cache=kind)
    prompt, mask = prompts(7, 7, 7)
    traj = agrpo.rollout(policy, prompt, mask, cfg, [(i,) for i in range(3)])
    assert (traj.nfe == 6).all()
    away = []
    for t in range(6):
        every = torch.arange(3)
        state, target = agrpo.state_at(traj, every, torch.full((3,), t), policy.mask_id)
        before, _ = agrpo.state_at(traj, every, torch.full((3,), t // 2 * 2), policy.mask_id)     # two steps a block
        law = agrpo.Law(stock_logits(policy, prompt, before, state, t // 2 * 4, 4, kind)[target], cfg)
        assert (law.logp(traj.tokens[target]) - traj.logp[target]).abs().max() < 1e-10
        plain = agrpo.Law(policy.logits(prompt, mask, state, target), cfg).logp(traj.tokens[target]).detach()
        away.append(float((plain - traj.logp[target]).abs().max()))
    assert max(away[0::2]) < 1e-10 and min(away[1::2]) > 1e-3                             # exact on coming to a block, approximate within it


@pytest.mark.parametrize("kind", ["dual", "prefix"])
@pytest.mark.parametrize("unmasking", ["low_confidence", "threshold"])
def test_rows_that_stand_at_different_blocks_do_not_mind_one_another(kind, unmasking):
    policy, (prompt, mask) = tiny(), prompts(7, 5, 1, 6)
    policy.eos_id = 9                                                                    # some rows finish early
    cfg = dataclasses.replace(CFG, cache=kind, unmasking=unmasking, threshold=0.2, steps=12)
    traj = agrpo.rollout(policy, prompt, mask, cfg, [(i,) for i in range(4)])
    assert unmasking == "low_confidence" or len(traj.nfe.unique()) > 1
    for i in range(4):
        n = int(mask[i].sum())
        alone = agrpo.rollout(policy, prompt[i:i + 1, -n:], mask[i:i + 1, -n:], cfg, [(i,)])
        assert torch.equal(alone.tokens[0], traj.tokens[i]) and torch.equal(alone.reveal_step[0], traj.reveal_step[i])
        assert (alone.logp[0] - traj.logp[i]).abs().max() < 1e-9


@pytest.mark.parametrize("kind, widths", [("dual", {19, 4}), ("prefix", {19, 12, 8, 4})])
def test_a_cache_computes_what_it_says(kind, widths):
    policy, seen = tiny(), []
    inner = policy.decode
    policy.decode = lambda ids, *rest: seen.append(ids.shape[1]) or inner(ids, *rest)
    agrpo.rollout(policy, *prompts(7, 7), dataclasses.replace(CFG, cache=kind), [(0,), (1,)])
    assert set(seen) == widths and seen.count(19) == 3 and len(seen) == 6


def test_a_model_with_shifted_logits_computes_the_column_before_the_block():
    policy, (prompt, mask) = tiny(), prompts(7, 4)
    policy.shift = True
    cfg = dataclasses.replace(CFG, steps=3)                                              # a step a block: each comes to a block, exact
    cached, plain = (agrpo.rollout(policy, prompt, mask, dataclasses.replace(cfg, cache=c), [(0,), (1,)]) for c in ("dual", "none"))
    assert torch.equal(cached.tokens, plain.tokens) and (cached.logp - plain.logp).abs().max() < 1e-10
    seen, inner = [], policy.decode
    policy.decode = lambda ids, *rest: seen.append(ids.shape[1]) or inner(ids, *rest)
    agrpo.rollout(policy, prompt, mask, dataclasses.replace(CFG, cache="dual"), [(0,), (1,)])
    assert set(seen) == {19, 5}


# ------------------------------------------------------------------------------------------ the correction, against enumeration
def case(unmasking, seed, top_k=0):
    """A denoiser, and every trajectory of a cached rollout: one whose law is some way off."""
    full, cached = toy.TableDenoiser(3, seed=seed), toy.TableDenoiser(3, seed=seed)
    with torch.no_grad():
        noise = torch.randn(cached.table.shape, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
        noise[-1] = 0.0                                                                  # the first step is exact
        cached.table += 0.4 * noise
    cfg = dataclasses.replace(BASE, unmasking=unmasking, top_k=top_k, position_term="off" if unmasking == "random" else "on")
    return cfg, full, toy.as_trajectory(cached, cfg, found := toy.enumerate_trajectories(cached, cfg)), found


def expected_gradient(cfg, policy, traj, found, views_of, want):
    """Error of the expected gradient over all trajectories of the cached rollout, relative to that of E[R] without a cache."""
    prob = torch.tensor([float(f[2].detach()) for f in found], dtype=torch.float64)
    adv = prob * torch.tensor([toy.reward_of(f[0], policy.V) for f in found], dtype=torch.float64)
    got = 0.0
    for weight, chance in views_of(len(found)):
        views = agrpo.score_old(policy, traj, agrpo.views_where(weight, traj, cfg, policy.mask_id), cfg)
        views = agrpo.correct_for_cache(views, traj, cfg) if cfg.is_cap else views
        loss, ratio = agrpo.policy_loss(policy, traj, views, adv, cfg)
        assert (ratio - 1).abs().max() < 1e-12
        got = got - chance * torch.autograd.grad(loss, policy.table)[0] * len(found) * cfg.steps
    return float((got - want).norm() / want.norm())


def every_step(N):
    yield torch.ones(N, 3, dtype=torch.float64), 1.0


def drawn_independently(N, pi=(0.3, 0.8, 0.5)):
    """All sets of steps, with the chance that just these are drawn."""
    for hit in itertools.product([False, True], repeat=3):
        if any(hit):
            yield (torch.tensor([h / p for h, p in zip(hit, pi)], dtype=torch.float64).expand(N, 3).contiguous(),
                   math.prod(p if h else 1 - p for h, p in zip(hit, pi)))


@pytest.mark.parametrize("views_of", [every_step, drawn_independently])
@pytest.mark.parametrize("unmasking", ["random", "low_confidence", "plackett_luce"])
@pytest.mark.parametrize("top_k", [0, 2])
def test_the_gradient_after_cached_rollouts_is_biased_and_corrected_it_is_not(unmasking, views_of, top_k):
    """Exact over all that a cached rollout can do. By low confidence that is not all, with so few tokens: where every candidate of one
    position is surer than a candidate of another, the latter never wins; nor does a token outside of the cache's support."""
    for seed in range(5):
        cfg, policy, traj, found = case(unmasking, seed, top_k)
        possible, key = set(), lambda f: (tuple(f[0]), tuple(f[1]), tuple(f[5]))         # noqa: E731
        possible.update(map(key, found))
        exact = toy.enumerate_trajectories(policy, cfg)
        exact, left_out = [f for f in exact if key(f) in possible], sum(float(f[2].detach()) for f in exact if key(f) not in possible)
        assert left_out < (0.7 if unmasking == "low_confidence" or top_k else 1e-12)
        rewards = torch.tensor([toy.reward_of(f[0], policy.V) for f in exact], dtype=torch.float64)
        want, = torch.autograd.grad((torch.stack([f[2] for f in exact]) * rewards).sum(), policy.table)
        error = {name: expected_gradient(dataclasses.replace(cfg, **change), policy, traj, found, views_of, want)
                 for name, change in (("completion", {}), ("step", {"is_level": "step"}), ("none", {"is_cap": 0.0}))}
        assert error["completion"] < 1e-12 and error["none"] > 0.05 and error["step"] > 0.02, error


def test_the_weight_of_a_completion_is_truncated():
    cfg, policy, traj, _ = case("low_confidence", 0)
    views = agrpo.score_old(policy, traj, agrpo.exact_views(traj, None, cfg, policy.mask_id, None), cfg)
    weight = {cap: agrpo.correct_for_cache(views, traj, dataclasses.replace(cfg, is_cap=cap)).weight / views.weight for cap in (1e9, 1.5)}
    assert weight[1e9].max() > 2 and torch.equal(weight[1.5], weight[1e9].clamp(max=1.5))
    assert all((weight[1e9][views.row == i].max() - weight[1e9][views.row == i].min()).abs() < 1e-9 for i in range(5))    # one weight a completion


# --------------------------------------------------------------------------------------------------------------- speed kept
class Waits(TorchDispatchMode):
    """Counts what would make a CPU wait for its GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if name in ("index", "index_put", "index_put_") else []
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2") or masks:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", ["none", "dual", "prefix", "block"])
@pytest.mark.parametrize("unmasking", agrpo.UNMASK)
def test_a_step_of_a_rollout_waits_for_the_gpu_only_to_learn_what_is_open(unmasking, cache):
    tokenizer = agrpo.tiny_tokenizer()
    policy = agrpo.Policy(agrpo.tiny_model(tokenizer, CFG, 4 * (cache == "block")), tokenizer.mask_token_id, tokenizer.eos_token_id, block=4 * (cache == "block"))
    prompt, mask = prompts(8, 5, 4)
    for top_k in (0, 20):
        cfg = dataclasses.replace(CFG, cache=cache, unmasking=unmasking, top_k=top_k, position_term="on")
        with Waits() as waits:
            agrpo.rollout(policy, prompt, mask, cfg, [(i,) for i in range(3)])
        assert not waits.seen, waits.seen


def test_a_negative_weight_clips_as_a_negative_advantage_does():
    cfg = dataclasses.replace(BASE, cache="none", is_cap=0.0, unmasking="low_confidence")
    policy = toy.TableDenoiser(3)
    prompt = torch.zeros(16, 1, dtype=torch.long)
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(16)])
    with torch.no_grad():
        policy.table += torch.randn(policy.table.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)      # ratios far from one
    views, adv = agrpo.exact_views(traj, None, cfg, policy.mask_id, None), torch.linspace(-1, 1, 16, dtype=torch.float64)
    one, other = (torch.autograd.grad(agrpo.policy_loss(policy, traj, v, a, cfg)[0], policy.table)[0] for v, a in (
        (views._replace(weight=-views.weight), adv), (views, -adv)))
    assert one.norm() > 0 and (one - other).abs().max() < 1e-14


@pytest.mark.parametrize("unmasking, gap", [("low_confidence", 0.0), ("low_confidence", 5.0), ("low_confidence", 10.0), ("random", 20.0)])
def test_recorded_sizes_are_right_where_a_law_is_all_but_certain(unmasking, gap):
    """float32, where 1 - 2 p + sum p^2 would be noise, against autograd in float64."""
    class Certain(toy.TableDenoiser):
        def logits(self, *args, **rest):
            return super().logits(*args, **rest).float()

    policy = Certain(3, 4)
    with torch.no_grad():
        policy.table[..., 1] += gap
    cfg = dataclasses.replace(BASE, cache="none", is_cap=0.0, unmasking=unmasking, temperature=1.0)
    prompt = torch.zeros(8, 1, dtype=torch.long)
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(8)])
    policy.__class__ = toy.TableDenoiser
    views = agrpo.exact_views(traj, None, cfg, policy.mask_id, None)
    for i in range(len(views.row)):
        token, order = agrpo.step_logp(policy, traj, views.select(slice(i, i + 1)), cfg)
        want = sum(float(torch.autograd.grad(x.sum(), policy.table, retain_graph=True)[0].square().sum()) for x in (token, order) if x is not None and x.requires_grad)
        assert abs(float(traj.gradient[views.row[i], views.step[i]]) - want) < 1e-2 * want + 1e-13


@pytest.mark.parametrize("method", ["exact", "agrpo"])
def test_steps_that_were_certain_cost_no_pass_and_change_no_gradient(method):
    cfg = dataclasses.replace(BASE, cache="none", is_cap=0.0, method=method, mc_steps=2, top_k=2, top_p=0.6, unmasking="random", position_term="off")
    policy = toy.TableDenoiser(3, scale=2.0)
    prompt = torch.zeros(32, 1, dtype=torch.long)
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(32)])
    adv = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    adv[:8] = 0.0
    views = agrpo.VIEWS[method](traj, adv, cfg, policy.mask_id, agrpo.generator(0))
    useful = agrpo.teaches(views, traj, adv, cfg)
    certain = (traj.gradient[views.row, views.step] == 0) & (adv[views.row] != 0)
    assert 0 < int(useful.sum()) < len(useful) and bool(certain.any())
    assert torch.equal(~useful, certain | (adv[views.row] == 0))
    idle = agrpo.policy_loss(policy, traj, views.select(~useful), adv, cfg)[0]
    assert (torch.autograd.grad(idle, policy.table)[0] == 0).all()
    assert agrpo.teaches(views, traj, adv, dataclasses.replace(cfg, kl=0.1)).all()       # with a KL term all have a gradient


def test_passes_fill_their_tokens_with_the_longest_prompts_first():
    policy, (prompt, mask) = tiny(), prompts(9, 3, 7, 5, 8)
    traj = agrpo.rollout(policy, prompt, mask, CFG, [(i,) for i in range(5)])
    views = agrpo.exact_views(traj, None, CFG, policy.mask_id, None)
    for budget, rows in ((1, 1), (2 * 21, 2), (7 * 21 + 20, 7), (10**6, 30)):            # 9 + 12 tokens a view at most
        parts = agrpo.passes(traj, dataclasses.replace(CFG, tokens_per_pass=budget), views)
        assert {len(p) for p in parts[:-1]} <= {rows} and sorted(torch.cat(parts).tolist()) == list(range(30))
        length = mask.sum(1)[views.row[torch.cat(parts)]]
        assert (length.diff() <= 0).all()
    packed = agrpo.passes(traj, dataclasses.replace(CFG, tokens_per_pass=66), views._replace(packed=True))
    assert {len(p) for p in packed} == {2}                                               # dipo reads a completion twice
    seen, inner = [], policy.decode
    policy.decode = lambda ids, *rest: seen.append(ids.shape[1]) or inner(ids, *rest)
    for part in agrpo.passes(traj, dataclasses.replace(CFG, tokens_per_pass=6 * 21), views):
        agrpo.step_logp(policy, traj, views.select(part), CFG)
    assert seen == [21, 20, 19, 17, 15]                                                  # no column that is padding in all of them


def test_texts_come_back_in_order_and_each_is_handed_on_early(monkeypatch):
    cfg = dataclasses.replace(CFG, task="countdown", model="tiny", prompt="bare", rollout_batch=3)
    policy, tokenizer = tiny(cfg), agrpo.tiny_tokenizer()
    examples = [{"nums": [1] * n, "target": n} for n in (2, 9, 4, 3, 7, 5, 8)]            # prompts of several lengths
    calls, inner = [], agrpo.rollout
    monkeypatch.setattr(agrpo, "rollout", lambda policy, prompt, *rest: calls.append(prompt.shape) or inner(policy, prompt, *rest))
    handed = {}
    traj, texts = agrpo.generate(policy, tokenizer, cfg, examples, [(i,) for i in range(7)], each=lambda i, text: handed.update({i: (text, len(calls))}))
    widths = [shape[1] for shape in calls]
    assert [shape[0] for shape in calls] == [3, 3, 1] and widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    assert [handed[i][0] for i in range(7)] == texts and {handed[i][1] for i in (1, 6, 4)} == {1}
    for i in range(7):
        alone, text = agrpo.generate(policy, tokenizer, cfg, examples[i:i + 1], [(i,)])
        assert text == texts[i:i + 1] and torch.equal(alone.tokens[0], traj.tokens[i])


def test_what_a_cache_goes_with():
    parse = lambda *words: agrpo.parse([*words, "--device", "cpu"])[0]                   # noqa: E731
    cfg = parse("--cache", "dual")
    assert (cfg.is_cap, cfg.timesteps, cfg.is_level, cfg.position_term) == (agrpo.WITH_CACHE["is_cap"], "independent_gradient", "completion", "off")
    assert parse("--cache", "dual", "--position-term", "on").position_term == "on"
    assert agrpo.evaluation_config(cfg).cache == "none" and parse().cache == "none" and parse("--model", "tiny-block").cache == "block"
    assert parse("--cache", "prefix", "--is-level", "step", "--timesteps", "stratified").is_cap == agrpo.WITH_CACHE["is_cap"]
    for words, told in ((("--cache", "block"), "--cache block"), (("--model", "tiny-block", "--cache", "dual"), "--cache dual"),
                        (("--cache", "dual", "--controller", "threshold"), "controller"), (("--is-level", "step"), "--cache prefix or dual"),
                        (("--cache", "dual", "--timesteps", "batch"), "independent"), (("--cache", "dual", "--preset", "official"), "last_step"),
                        (("--cache", "dual", "--sft", "gold"), "--sft"), (("--cache", "dual", "--method", "diffpo", "--is-level", "step"), "--is-level"),
                        (("--method", "tracerl", "--shrink", "1", "--is-cap", "2"), "--is-cap"),
                        (("--cache", "dual", "--position-term", "on", "--is-level", "step"), "position-term off"),
                        (("--cache", "dual", "--position-term", "on", "--is-cap", "0"), "position-term off"), (("--is-cap", "2"), "--is-cap 2")):
        with pytest.raises(agrpo.BadInput, match=told):
            parse(*words)


def test_a_run_with_a_cache_logs_its_weights_and_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--device", "cpu", "--prompts", "2", "--completions", "4", "--train-examples", "16", "--eval-examples", "4", "--base-steps", "3", "--eval-steps",
           "8", "--eval-every", "0", "--cache", "dual", "--steps", "8"]
    assert agrpo.main([*few, "--name", "a", "--max-steps", "3"]) == 0
    assert agrpo.main([*few, "--name", "b", "--max-steps", "1"]) == 0
    assert agrpo.main(["--name", "b", "--resume", "--max-steps", "3"]) == 0
    one, two = ((tmp_path / "runs" / name / "log.csv").read_text().splitlines() for name in "ab")
    skip = [i for i, name in enumerate(one[0].split(",")) if "seconds" in name or "memory" in name]
    assert [[x for i, x in enumerate(line.split(",")) if i not in skip] for line in one] == [[x for i, x in enumerate(line.split(",")) if i not in skip] for line in two]
    assert "is_weight" in one[0].split(",")


def test_the_first_step_is_computed_once_a_prompt():
    policy, (prompt, mask) = tiny(), prompts(7, 4, 7, 4, 7, 2)
    prompt[2], prompt[3] = prompt[0], prompt[1]                                          # rows 0 and 2, 1 and 3 of one prompt; row 4 its own
    calls, inner = [], policy.logits
    policy.logits = lambda prompt, *rest, **more: calls.append(len(prompt)) or inner(prompt, *rest, **more)
    cfg = dataclasses.replace(CFG, unmasking="low_confidence")
    traj = agrpo.rollout(policy, prompt, mask, cfg, [(i,) for i in range(6)])
    assert calls == [4, 6, 6, 6, 6, 6] and not torch.equal(traj.tokens[0], traj.tokens[2])
    for i in range(6):
        alone = agrpo.rollout(policy, prompt[i:i + 1], mask[i:i + 1], cfg, [(i,)])
        assert torch.equal(alone.tokens[0], traj.tokens[i]) and (alone.logp[0] - traj.logp[i]).abs().max() < 1e-10
