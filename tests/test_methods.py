"""Protects the rows of VIEWS, the value model, the controller and block-causal models: against enumeration, against each other, against the
uncached and unpacked forward. Run: pytest tests/test_methods.py"""
import csv
import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import toy
import torch
from checkpoints import write_checkpoint
from test_exact import BASE
from test_train import CFG, Watched, examples, tiny

import agrpo
import eval as run_folder

BLOCKS = dataclasses.replace(CFG, model="tiny-block", completion_length=20, block_length=4, steps=10, position_term="off", cache="block")


def tiny_blocks(cfg=BLOCKS, block=4):
    tokenizer = agrpo.tiny_tokenizer()
    return agrpo.Policy(agrpo.tiny_model(tokenizer, cfg, block).double(), tokenizer.mask_token_id, tokenizer.eos_token_id, block=block), tokenizer


def ragged(policy, cfg=BLOCKS, lengths=(9, 8, 7, 6, 3, 1)):
    """Rows whose prompts end anywhere in a block, rolled out."""
    N, P = len(lengths), max(lengths)
    prompt = torch.randint(6, 100, (N, P), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(P) >= P - torch.tensor(lengths)[:, None]).long()
    return agrpo.rollout(policy, prompt, mask, cfg, [(i,) for i in range(N)])


def gradient(policy, traj, views, adv, cfg):
    loss, _ = agrpo.policy_loss(policy, traj, views, adv, cfg)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for p in policy.parameters() if p.requires_grad], allow_unused=True) if g is not None])


def targets_per_token(traj, views):
    return torch.zeros_like(traj.tokens).index_add(0, views.row, views.target.long())


# ------------------------------------------------------------------------------------------------------------------ the views
@pytest.mark.parametrize("unmasking", ["low_confidence", "threshold", "random"])
@pytest.mark.parametrize("method, shrink, update_block", [("exact", 1, 0), ("tracerl", 1, 0), ("tracerl", 2, 0), ("tracerl", 3, 0), ("tracerl", 8, 0),
                                                          ("dipo", 1, 0), ("dipo", 1, 8), ("tracerl", 1, 8)])
def test_every_revealed_token_is_a_target_exactly_once(unmasking, method, shrink, update_block):
    cfg = dataclasses.replace(BLOCKS, unmasking=unmasking, threshold=0.03, shrink=shrink, update_block=update_block, steps=20)
    policy, _ = tiny_blocks()
    traj = ragged(policy, cfg)
    views = agrpo.VIEWS[method](traj, torch.ones(6), cfg, policy.mask_id, None)
    assert torch.equal(targets_per_token(traj, views), (traj.reveal_step < cfg.steps).long())
    assert (views.state[views.target] == policy.mask_id).all()                           # and is masked where it is scored
    if method == "dipo":
        passes = torch.bincount(views.row)
        assert passes.max() <= max(4, update_block) and (update_block or (passes < traj.nfe).all())
    if method == "tracerl":
        assert torch.equal(torch.bincount(views.row), -(-traj.nfe // shrink))


@pytest.mark.parametrize("unmasking, top_k", [("low_confidence", 0), ("threshold", 0), ("random", 5), ("low_confidence", 5)])
@pytest.mark.parametrize("method", ["exact", "tracerl", "dipo"])
def test_the_replay_equals_the_recorded_log_probs_wherever_prompts_end(unmasking, top_k, method):
    cfg = dataclasses.replace(BLOCKS, unmasking=unmasking, threshold=0.03, steps=20, top_k=top_k, temperature=0.8)
    policy, _ = tiny_blocks()
    traj = ragged(policy, cfg)
    assert len(traj.nfe.unique()) > 1
    views = agrpo.VIEWS[method](traj, torch.ones(6), cfg, policy.mask_id, None)
    assert not views.scored
    with torch.no_grad():
        logp, _ = agrpo.step_logp(policy, traj, views, cfg)
    assert (logp - traj.logp[views.row][views.target]).abs().max() < 1e-10


def test_blocks_counted_from_the_completion_would_not_replay():
    """The oracle can fail: with blocks aligned at the response it is off."""
    policy, _ = tiny_blocks()
    traj = ragged(policy)
    lazy = dataclasses.replace(traj, prompt_mask=torch.ones_like(traj.prompt_mask) * 0 + (torch.arange(9) >= 1).long())    # 8 tokens each
    views = agrpo.dipo_views(lazy, torch.ones(6), BLOCKS, policy.mask_id, None)
    with torch.no_grad():
        logp, _ = agrpo.step_logp(policy, traj, views, BLOCKS)
    assert (logp - traj.logp[views.row][views.target]).abs().max() > 1e-3


@pytest.mark.parametrize("normalizer", agrpo.NORMALIZERS)
def test_shrink_of_one_is_the_exact_sum_and_dipo_the_same_in_fewer_passes(normalizer):
    cfg = dataclasses.replace(BLOCKS, unmasking="threshold", threshold=0.03, steps=20, normalizer=normalizer)
    policy, _ = tiny_blocks()
    traj, adv = ragged(policy, cfg), torch.randn(6, dtype=torch.float64)
    exact, trace, dipo = (agrpo.VIEWS[m](traj, adv, cfg, policy.mask_id, None) for m in ("exact", "tracerl", "dipo"))
    want = gradient(policy, traj, exact, adv, cfg)
    assert torch.equal(want, gradient(policy, traj, trace, adv, cfg))
    assert len(dipo.row) < len(exact.row)
    if normalizer != "state_tokens":                                                     # its states are others
        assert (gradient(policy, traj, dipo, adv, cfg) - want).norm() < 1e-6 * want.norm()       # the stock RMSNorm is float32


@pytest.mark.parametrize("unmasking", ["random", "confidence"])
def test_dipo_is_the_exact_gradient_of_a_block_causal_denoiser(unmasking):
    """Every trajectory enumerated: the expected gradient is autograd of E[R] over the mean number of tokens, all C of them here."""
    cfg = dataclasses.replace(BASE, unmasking=unmasking, completion_length=4, block_length=2, steps=4, normalizer="batch_tokens")
    policy = toy.BlockTableDenoiser(4, 2, 2, seed=3)
    found = toy.enumerate_trajectories(policy, cfg)
    rewards, prob = torch.tensor([toy.reward_of(f[0], 2) for f in found], dtype=torch.float64), torch.stack([f[2] for f in found])
    want, = torch.autograd.grad((prob * rewards).sum(), policy.table, retain_graph=True)
    traj = toy.as_trajectory(policy, cfg, found)
    traj.prompt = traj.prompt_mask = torch.ones(len(found), 2, dtype=torch.long)         # a whole block
    views = agrpo.dipo_views(traj, None, cfg, policy.mask_id, None)
    assert len(views.row) == 2 * len(found)
    loss, ratio = agrpo.policy_loss(policy, traj, views, rewards * prob.detach(), cfg)
    got = -torch.autograd.grad(loss, policy.table)[0] * len(found) * 4
    assert (ratio - 1).abs().max() < 1e-12 and (got - want).norm() < 1e-12 * want.norm()


@pytest.mark.parametrize("method", ["agrpo", "exact", "diffu-grpo", "diffpo", "tracerl", "dipo"])
def test_with_larger_blocks_in_the_update_the_first_ratio_is_one(method):
    cfg = dataclasses.replace(BLOCKS, method=method, update_block=8)
    policy, _ = tiny_blocks()
    traj, adv = ragged(policy, cfg), torch.randn(6, dtype=torch.float64)
    policy.block = 8
    views = agrpo.VIEWS[method](traj, adv, cfg, policy.mask_id, agrpo.generator(0))
    loss, ratio = agrpo.policy_loss(policy, traj, views, adv, cfg)
    assert (ratio == 1).all() and views.scored
    policy.block = 4


def test_dipo_never_shows_what_was_filled_in_after_the_end():
    """A row that ends after its first block, read in larger blocks: what the sampler had not seen is MASK, as in tracerl's states."""
    policy, _ = tiny_blocks()
    cfg = dataclasses.replace(BLOCKS, update_block=8)
    traj = ragged(policy, cfg, lengths=(8, 8))
    traj.tokens[0, 4:], traj.reveal_step[0, 4:] = policy.eos_id, cfg.steps
    dipo, trace = (agrpo.VIEWS[m](traj, None, cfg, policy.mask_id, None) for m in ("dipo", "tracerl"))
    ours, theirs = (v.state[v.row == 0] for v in (dipo, trace))
    assert torch.equal(ours[:, :8], theirs[:, :8]) and (ours[:, 4:8] == policy.mask_id).all()


def test_diffu_grpo_masks_prompts_from_a_local_generator_and_counts_up_to_the_first_end():
    policy, _ = tiny()
    cfg = dataclasses.replace(CFG, method="diffu-grpo", prompt_masking=0.5, normalizer="length", position_term="off")
    prompt = torch.randint(6, 100, (8, 40), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(40) >= 5).long().expand(8, 40)
    traj = agrpo.rollout(policy, prompt, mask, cfg, [(i,) for i in range(8)])
    traj.tokens[0, :5], traj.tokens[0, 5], traj.tokens[1, 0] = 10, policy.eos_id, policy.eos_id
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    views = agrpo.diffu_grpo_views(traj, None, cfg, policy.mask_id, agrpo.generator("a"))
    again, other = (agrpo.diffu_grpo_views(traj, None, cfg, policy.mask_id, agrpo.generator(x)) for x in "ab")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(views.prompt, again.prompt) and not torch.equal(views.prompt, other.prompt)
    hidden = views.prompt == policy.mask_id
    assert not hidden[:, :5].any() and torch.equal(views.prompt[~hidden], prompt[~hidden])
    assert abs(float(hidden[:, 5:].double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(8 * 35)
    assert (views.state == policy.mask_id).all() and views.scored
    ends = [int((row == policy.eos_id).nonzero()[0]) + 1 if (row == policy.eos_id).any() else 16 for row in traj.tokens]
    assert ends[:2] == [6, 1] and views.target.sum(1).tolist() == ends
    assert torch.allclose(views.weight, 1 / torch.tensor(ends, dtype=torch.float64))
    assert all(bool(t[:n].all()) for t, n in zip(views.target, ends))


def test_diffpo_splits_at_a_step_of_the_row_and_at_zero_is_diffu_grpo(monkeypatch):
    policy, _ = tiny()
    cfg = dataclasses.replace(CFG, normalizer="length", position_term="off")
    prompt = torch.randint(6, 100, (6, 9), generator=torch.Generator().manual_seed(1))
    traj, adv = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(6)]), torch.randn(6, dtype=torch.float64)
    seen = set()
    for i in range(30):
        views = agrpo.diffpo_views(traj, adv, cfg, policy.mask_id, agrpo.generator(i))
        assert torch.equal(targets_per_token(traj, views), traj.counted.long())
        u, blank = traj.reveal_step[views.row], (views.state == policy.mask_id).all(1)
        late = views.step > 0
        assert (u[late] >= views.step[late, None])[views.target[late]].all() and blank[~late].all() and not blank[late].any()
        seen |= set(views.step[late].tolist())
    assert seen == set(range(1, 8))
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: torch.zeros(*shape, dtype=kw.get("dtype")))
    zero, plain = (agrpo.VIEWS[m](traj, adv, cfg, policy.mask_id, agrpo.generator(0)) for m in ("diffpo", "diffu-grpo"))
    plain = plain._replace(prompt=None)                                                  # prompt_masking 0: nothing is hidden
    assert len(zero.row) == 6
    assert torch.equal(gradient(policy, traj, zero, adv, cfg), gradient(policy, traj, plain, adv, cfg))


class JointDenoiser(toy.TableDenoiser):
    """The true conditionals of a joint distribution over V^C: what a perfect model predicts in each state."""

    def __init__(self, C, V, seed):
        super().__init__(C, V)
        g, joint = torch.Generator().manual_seed(seed), torch.zeros((V,) * C, dtype=torch.float64)
        for i in range(C):                                                               # left to right, each table at random
            joint = joint + (0.6 * torch.randn((V,) * (i + 1), generator=g, dtype=torch.float64)).log_softmax(-1).view((V,) * (i + 1) + (1,) * (C - i - 1))
        self.joint = joint.exp()
        table = torch.zeros((V + 1) ** C, C, V, dtype=torch.float64)
        for index, state in enumerate(itertools.product(range(V + 1), repeat=C)):        # the first position changes slowest
            left = self.joint
            for i, s in enumerate(state):
                left = left.select(i, s).unsqueeze(i) if s < V else left
            place = sum(s * (V + 1) ** i for i, s in enumerate(state))
            for i, s in enumerate(state):
                if s == V:
                    table[place, i] = left.sum([j for j in range(C) if j != i]).log().flatten()
        self.table = table


def test_two_states_are_nearer_to_the_sampler_than_one():
    """Mean KL(true || surrogate) of a tabular joint, random order. Sampled by `rollout`, scored through the views,
    against entropies of the joint: sum of marginals less the joint's for one state, the marginals of a random prefix and what it implies for
    the rest for two."""
    one, two, exact_one, exact_two = [], [], [], []
    cfg = dataclasses.replace(BASE, unmasking="random", completion_length=6, block_length=6, steps=6, temperature=1.0, position_term="off")
    for seed in range(4):
        policy = JointDenoiser(6, 3, seed)

        def entropy(kept, p=policy.joint):
            rest = [i for i in range(6) if i not in kept]
            p = p.sum(rest) if rest else p
            return -float((p * p.log()).sum())
        joint = entropy(range(6))
        exact_one.append(sum(entropy([i]) for i in range(6)) - joint)
        prefixes = [entropy(S) for s in range(6) for S in itertools.combinations(range(6), s)]
        exact_two.append(sum((sum(entropy([i]) for i in S) + sum(entropy([*S, i]) - entropy(S) for i in range(6) if i not in S)) / math.comb(6, s)
                             for s in range(6) for S in itertools.combinations(range(6), s)) / 6 - joint)
        assert len(prefixes) == 63
        N = 4000
        prompt = torch.zeros(N, 1, dtype=torch.long)
        traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(seed, i) for i in range(N)])
        for method, found in (("diffu-grpo", one), ("diffpo", two)):
            views = agrpo.VIEWS[method](traj, None, cfg, policy.mask_id, agrpo.generator(seed))
            logp, _ = agrpo.step_logp(policy, traj, views._replace(prompt=None), cfg)
            scored = torch.zeros(N, dtype=torch.float64).index_add(0, views.row[views.target.nonzero()[:, 0]], logp)
            found.append(traj.logp.sum(1) - scored)
    for found, exact in ((one, exact_one), (two, exact_two)):
        for sampled, want in zip(found, exact):
            error = float(sampled.std()) / math.sqrt(len(sampled))
            assert abs(float(sampled.mean()) - want) < 4.5 * error, f"{sampled.mean():.4f}, exact {want:.4f}; a false alarm is one in 150,000"
    assert 0.36 < sum(exact_one) / 4 < 0.46 and 0.6 < sum(exact_two) / sum(exact_one) < 0.75, (exact_one, exact_two)


# ------------------------------------------------------------------------------------------------- the loss that they share
def moved(policy, size=0.05):
    with torch.no_grad():
        for i, p in enumerate(policy.parameters()):
            p.add_(size * p.abs().mean() * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))


@pytest.mark.parametrize("method", ["diffu-grpo", "diffpo", "tracerl"])
def test_old_log_probs_are_those_of_the_same_views(method):
    """Ratio one at the first update, whichever way the old ones come; after an update the ratio is new / old of the view."""
    policy, _ = tiny()
    cfg = dataclasses.replace(CFG, method=method, position_term="off", shrink=2, prompt_masking=0.3, tokens_per_pass=60)
    prompt = torch.randint(6, 100, (6, 9), generator=torch.Generator().manual_seed(1))
    traj, adv = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(6)]), torch.ones(6, dtype=torch.float64)
    views = agrpo.VIEWS[method](traj, adv, cfg, policy.mask_id, agrpo.generator(1))
    kept = agrpo.score_old(policy, traj, views, cfg)
    with torch.no_grad():
        old, _ = agrpo.step_logp(policy, traj, views, cfg)
    for at_first in (views, kept):
        _, ratio = agrpo.policy_loss(policy, traj, at_first, adv, cfg)
        assert (ratio - 1).abs().max() < 1e-12
    assert (old - traj.logp[views.row][views.target]).abs().max() > 0.01                 # not the sampler's likelihood
    moved(policy)
    _, ratio = agrpo.policy_loss(policy, traj, kept, adv, cfg)
    with torch.no_grad():
        new, _ = agrpo.step_logp(policy, traj, views, cfg)
    assert torch.allclose(ratio, (new - old).exp(), atol=1e-12) and (ratio - 1).abs().max() > 0.01


def test_importance_weights_are_the_truncated_ratio_of_surrogate_and_behaviour():
    policy, _ = tiny()
    cfg = dataclasses.replace(CFG, position_term="off", is_cap=1.01, clip=0.2)
    prompt = torch.randint(6, 100, (6, 9), generator=torch.Generator().manual_seed(1))
    traj, adv = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(6)]), torch.randn(6, dtype=torch.float64)
    views = agrpo.diffpo_views(traj, adv, cfg, policy.mask_id, agrpo.generator(1))
    logp, _ = agrpo.step_logp(policy, traj, views, cfg)
    row = views.target.nonzero()[:, 0]
    w = torch.minimum((logp.detach() - traj.logp[views.row][views.target]).exp(), torch.tensor(1.01, dtype=torch.float64))
    assert (w == 1.01).any() and (w < 1.01).any()
    want = torch.autograd.grad(-(logp * w * adv[views.row[row]] * views.weight[row]).sum() / 6, policy.model.lm_head.weight)[0]
    got = torch.autograd.grad(agrpo.policy_loss(policy, traj, views, adv, cfg)[0], policy.model.lm_head.weight)[0]
    assert (got - want).norm() < 1e-12 * want.norm()


def test_the_kl_term_has_the_gradient_of_the_exact_divergence():
    """Of all tokens one position may draw, weighted by their probability: autograd of sum p log(p / reference)."""
    g = torch.Generator().manual_seed(0)
    z, reference = torch.randn(7, generator=g).double().requires_grad_(), torch.randn(7, generator=g).double().log_softmax(0)
    old = z.detach().log_softmax(0)
    want, = torch.autograd.grad((z.softmax(0) * (z.log_softmax(0) - reference)).sum(), z)
    got, = torch.autograd.grad((old.exp() * agrpo.k3(z.log_softmax(0), old, reference)).sum(), z)
    assert (got - want).abs().max() < 1e-12
    assert (agrpo.k3(old, old, reference) >= 0).all() and (agrpo.k3(old, old, old) == 0).all()


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_the_model_to_begin_with(tmp_path, rank):
    write_checkpoint(tmp_path / "model", "llada")
    cfg = dataclasses.replace(CFG, task="gsm8k", completion_length=8, block_length=4, steps=4, lora_rank=rank, lora_alpha=8.0, kl=0.5, position_term="off")
    policy, _ = agrpo.load_policy(str(tmp_path / "model"), "cpu", cfg, train=True)
    agrpo.keep_reference(policy)
    names = [n for n, _ in policy.named_parameters()]
    prompt = torch.randint(200, (4, 5), generator=torch.Generator().manual_seed(0))
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(4)])
    views, adv = agrpo.exact_views(traj, None, cfg, policy.mask_id, None), torch.zeros(4, dtype=torch.float64)
    first, _ = agrpo.policy_loss(policy, traj, views, adv, cfg)
    assert abs(float(first.detach())) < 1e-9
    with torch.no_grad():
        before, _ = agrpo.step_logp(policy, traj, views, cfg)
    moved(policy, 0.5)
    if rank:
        for name, p in policy.named_parameters():
            p.data.add_(0.05 * ("lora_B" in name))
        policy2, _ = agrpo.load_policy(str(tmp_path / "model"), "cpu", cfg, train=True)
        with torch.no_grad():
            before, _ = agrpo.step_logp(policy2, traj, views, cfg)
    if not rank:
        assert torch.equal(agrpo.reference_logp(policy, traj, views, cfg), before)
    loss, _ = agrpo.policy_loss(policy, traj, views, adv, cfg)
    assert loss > 1e-4 and [n for n, _ in policy.named_parameters()] == names
    assert not any("base_model.0" in n for n in names)
    loss.backward()
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


def test_every_completion_has_its_kl_term_also_those_without_an_advantage(monkeypatch):
    """All rewards equal: what moves the policy is Eq. 4's KL alone, the same by all methods that score the visited states."""
    monkeypatch.setattr(agrpo, "reward_parts", lambda task, text, ex, weights: {"correct": 1.0})
    norms = []
    for method, K in (("exact", 1), ("tracerl", 1), ("agrpo", 8)):                       # K = T: every step is drawn
        policy, tokenizer = tiny()
        agrpo.keep_reference(policy)
        moved(policy)
        cfg = dataclasses.replace(CFG, method=method, mc_steps=K, kl=0.5, position_term="off", max_grad_norm=1e9)
        optimizer = Watched(policy.model.parameters(), lr=0.0)
        row = agrpo.train_step(policy, tokenizer, optimizer, examples(), 0, cfg)
        assert row["passes"] == 8 * 8
        norms.append(row["grad_norm"])
        for kind in ({"kl_reference": "old"}, {"kl": 0.0}):                              # these have no gradient, and cost no pass
            assert agrpo.train_step(policy, tokenizer, optimizer, examples(), 0, dataclasses.replace(cfg, **kind))["passes"] == 0
    assert norms[0] > 1e-3 and all(abs(x / norms[0] - 1) < 1e-4 for x in norms)


def test_gradient_checkpointing_does_not_share_layers_with_copies(tmp_path):
    """A copied layer computes, and recomputes, with its own weights: value model and reference are the same with it and without."""
    write_checkpoint(tmp_path / "model", "llada")
    found = []
    for checkpointing in ("off", "on"):
        cfg = dataclasses.replace(CFG, task="gsm8k", completion_length=8, block_length=4, steps=4, position_term="off", kl=0.5, method="exact",
                                  gradient_checkpointing=checkpointing)
        policy, _ = agrpo.load_policy(str(tmp_path / "model"), "cpu", cfg, train=True)
        agrpo.keep_reference(policy)
        policy.value = agrpo.ValueModel(policy, cfg)
        torch.nn.init.ones_(policy.value.head.weight)
        prompt = torch.randint(200, (4, 5), generator=torch.Generator().manual_seed(0))
        traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(4)])
        views, adv = agrpo.exact_views(traj, None, cfg, policy.mask_id, None), torch.ones(4, dtype=torch.float64)
        with torch.no_grad():
            for p in policy.model.parameters():
                p.mul_(1.1)
        policy.value.loss(traj, views, torch.zeros(4, 8).double(), torch.ones(4, 8).double(), 0.2).backward()
        assert all(p.grad is None for p in policy.model.parameters())
        assert sum(p.grad is not None for p in policy.value.model.parameters()) == len(list(policy.value.model.parameters())) - 1      # not the LM head
        found.append(gradient(policy, traj, views, adv, cfg))
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_trained_on_from_an_adapter_the_reference_is_that_adapter(tmp_path):
    write_checkpoint(tmp_path / "model", "llada")
    cfg = dataclasses.replace(CFG, task="gsm8k", completion_length=8, block_length=4, steps=4, lora_rank=4, lora_alpha=8.0, position_term="off",
                              model=str(tmp_path / "model"))
    policy, tokenizer = agrpo.load_policy(cfg.model, "cpu", cfg, train=True)
    for name, p in policy.named_parameters():
        p.data.add_(0.1 * ("lora_B" in name))
    agrpo.save_model(policy, tokenizer, tmp_path / "adapter", cfg)
    prompt = torch.randint(200, (4, 5), generator=torch.Generator().manual_seed(0))
    for rank in (4, 0):
        again, _ = agrpo.load_policy(str(tmp_path / "adapter"), "cpu", dataclasses.replace(cfg, lora_rank=rank), train=True)
        agrpo.keep_reference(again)
        traj = agrpo.rollout(again, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(4)])
        views = agrpo.exact_views(traj, None, cfg, again.mask_id, None)
        assert torch.equal(agrpo.reference_logp(again, traj, views, cfg), agrpo.step_logp(again, traj, views, cfg)[0].detach())


@pytest.mark.parametrize("method", agrpo.VIEWS)
def test_shares_of_the_views_make_the_whole_also_where_all_must_be_equal(method, monkeypatch):
    """Sharded weights want as many forwards on every process: what is dealt again weighs nothing, whatever a method's views hold."""
    policy, _ = tiny_blocks()
    traj, adv = ragged(policy), torch.ones(6, dtype=torch.float64)
    views = agrpo.VIEWS[method](traj, adv, BLOCKS, policy.mask_id, agrpo.generator(0))
    views = views.select(slice(0, 5))._replace(logp_old=torch.zeros(5, 20) if views.scored else None)
    for equal in (False, True):
        parts = []
        for rank in range(3):
            monkeypatch.setattr(agrpo, "processes", lambda: (rank, 3))
            parts.append(agrpo.share(views, equal))
        assert {len(p.row) for p in parts} == ({2} if equal else {1, 2}) and all(p.packed == views.packed and p.scored == views.scored for p in parts)
        assert sum(float(p.weight.sum()) for p in parts) == pytest.approx(float(views.weight.sum()))


def test_clip_high_widens_the_upper_side_only():
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0])
    logp = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5]))
    gain, _ = agrpo.surrogate(logp, torch.zeros(4), adv, 0.2, 0.28)
    assert torch.allclose(gain, torch.tensor([1.28, -1.5, 0.5, -0.8]))


def test_inner_epochs_make_so_many_updates_on_views_of_their_own(monkeypatch):
    monkeypatch.setattr(agrpo, "reward_parts", lambda task, text, ex, weights: {"correct": float(sum(map(ord, text)) % 7)})
    for method in ("agrpo", "diffu-grpo", "diffpo"):
        policy, tokenizer = tiny()
        cfg = dataclasses.replace(CFG, method=method, inner_epochs=3, position_term="off", prompt_masking=0.2, normalizer="length", lr=0.1)
        optimizer = Watched(policy.model.parameters(), lr=0.1)
        kept, inner = [], agrpo.policy_loss
        monkeypatch.setattr(agrpo, "policy_loss", lambda p, t, v, a, c: kept.append((v, inner(p, t, v, a, c))) or kept[-1][1])
        row = agrpo.train_step(policy, tokenizer, optimizer, examples(), 0, cfg)
        monkeypatch.setattr(agrpo, "policy_loss", inner)
        assert optimizer.steps == 3 and len(kept) == 3 and row["passes"] == sum(len(v.row) for v, _ in kept)
        assert all(v.logp_old is not None for v, _ in kept) == (method != "agrpo")
        assert (kept[0][1][1] - 1).abs().max() < 1e-9 and (kept[2][1][1] - 1).abs().max() > 1e-4
        assert not all(torch.equal(kept[0][0].prompt if method == "diffu-grpo" else kept[0][0].step, x) for x in
                       (v.prompt if method == "diffu-grpo" else v.step for v, _ in kept[1:]))


def test_dynamic_sampling_replaces_groups_of_equal_rewards_a_bounded_number_of_times(monkeypatch):
    policy, tokenizer = tiny()
    cfg, puzzles = dataclasses.replace(CFG, prompts=3, dynamic_sampling=2), examples(n=32)
    rich = {ex["puzzle"] for ex in puzzles[::2]}                                         # half of all prompts teach something
    monkeypatch.setattr(agrpo, "reward_parts", lambda task, text, ex, weights: {"correct": (sum(map(ord, text)) % 7) * float(ex["puzzle"] in rich)})
    sampled, equal = [], []
    for step in range(8):
        traj, reward, parts, solved = agrpo.sample_groups(policy, tokenizer, puzzles, step, cfg)
        again = agrpo.sample_groups(policy, tokenizer, puzzles, step, cfg)
        assert torch.equal(again[0].tokens, traj.tokens) and torch.equal(again[1], reward)
        assert len(traj.tokens) == len(reward) == 12 and len(parts) == len(solved) in (12, 16, 20, 24, 28, 32, 36)
        for group in traj.prompt.view(3, 4, -1):
            assert (group == group[0]).all()                                             # groups stay together
        texts = [tokenizer.decode(row[:n]) for row, n in zip(traj.tokens, traj.length.tolist())]
        puzzle = [tokenizer.decode(p[m.bool()][1:17]) for p, m in zip(traj.prompt, traj.prompt_mask)]
        assert reward.tolist() == [(sum(map(ord, t)) % 7) * float(p in rich) for t, p in zip(texts, puzzle)]
        sampled.append(len(parts))
        equal.append(int((reward.view(3, 4).amax(1) == reward.view(3, 4).amin(1)).sum()))
    assert max(sampled) > 12 and sum(equal) < 8                                          # 12 of 24 groups without it
    monkeypatch.setattr(agrpo, "reward_parts", lambda task, text, ex, weights: {"correct": 1.0})
    asked, inner = [], agrpo.sample
    monkeypatch.setattr(agrpo, "sample", lambda p, t, batch, keys, c: asked.append((batch, keys)) or inner(p, t, batch, keys, c))
    assert len(agrpo.sample_groups(policy, tokenizer, puzzles, 0, cfg)[2]) == 36         # bounded
    assert asked[0][0] != asked[1][0] != asked[2][0] and len({key for _, keys in asked for key in keys}) == 36       # other prompts, other noise


# ------------------------------------------------------------------------------------------------------------- the value model
def test_gae_without_discount_is_reward_minus_value_and_with_it_the_recursion():
    g = torch.Generator().manual_seed(0)
    value, step = torch.randn(5, 7, generator=g).double(), torch.tensor([[0, 0, 1, 2, 2, 3, -1]] * 4 + [[1, 0, -1, -1, -1, -1, -1]])
    reward = torch.randn(5, generator=g).double()
    adv, returns = agrpo.gae(reward, value, step, 1.0, 1.0)
    counts = step >= 0
    assert torch.allclose(adv[counts], (reward[:, None] - value)[counts], atol=1e-12) and (adv[~counts] == 0).all()
    assert torch.allclose(returns[counts], reward[:, None].expand(5, 7)[counts])
    adv, returns = agrpo.gae(reward, value, step, 0.9, 0.8)
    v = value[0]
    last = reward[0] - v[5]                                                              # by hand, from the last step back
    two = torch.stack([-v[j] + 0.9 * v[5] + 0.72 * last for j in (3, 4)])
    one = -v[2] + 0.9 * (v[3] + v[4]) / 2 + 0.72 * two.mean()
    none = torch.stack([-v[j] + 0.9 * v[2] + 0.72 * one for j in (0, 1)])
    assert torch.allclose(adv[0][:6], torch.stack([*none, one, *two, last]))
    assert torch.allclose(returns[0][:6], reward[0] * torch.tensor([0.729, 0.729, 0.81, 0.9, 0.9, 1.0]).double())


@pytest.mark.parametrize("kind", ["own backbone", "adapters"])
def test_the_value_model_learns_what_states_expect_and_leaves_the_policy_alone(kind, tmp_path, monkeypatch):
    if kind == "adapters":
        write_checkpoint(tmp_path / "model", "llada")
        cfg = dataclasses.replace(CFG, task="gsm8k", completion_length=8, block_length=4, steps=4, lora_rank=4, lora_alpha=8.0)
        policy, tokenizer = agrpo.load_policy(str(tmp_path / "model"), "cpu", cfg, train=True)
    else:
        cfg, (policy, tokenizer) = CFG, tiny(dtype=torch.float32)
    cfg = dataclasses.replace(cfg, method="exact", value_lr=3e-3, lr=1e-5, position_term="off", warmup=1, clip=5.0, tokens_per_pass=10_000)
    prompt = torch.randint(200 if kind == "adapters" else 90, (16, 5), generator=torch.Generator().manual_seed(0))
    policy.value = agrpo.ValueModel(policy, cfg)
    optimizer = agrpo.make_optimizer(policy, cfg)
    assert [len(g["params"]) for g in optimizer.param_groups] == [len([p for p in policy.model.parameters() if p.requires_grad and not any(
        p is q for q in policy.value.own)]), len(policy.value.own)]
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(16)])
    views = agrpo.exact_views(traj, None, cfg, policy.mask_id, None)
    logp, _ = agrpo.step_logp(policy, traj, views, cfg)
    assert (policy.value.of(traj, views, cfg) == 0).all()                                  # zero at first
    reward = (traj.prompt[:, 0] % 2).double()                                            # known from the prompt
    returns, losses = reward[:, None].expand(traj.tokens.shape), []
    for _ in range(40):
        old = policy.value.of(traj, views, cfg)
        with policy.value.on():
            loss = policy.value.loss(traj, views, old, returns, cfg.clip)
            loss.backward()
        assert all(p.grad is None for p in optimizer.param_groups[0]["params"])          # not the policy's
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    again, _ = agrpo.step_logp(policy, traj, views, cfg)
    assert torch.equal(again, logp)
    tight = policy.value.loss(traj, views, torch.zeros_like(old), returns, 1e-3)         # V_clip stays near the old value: the larger of the two
    assert float(tight.detach()) > losses[-1]
    if kind == "adapters":
        agrpo.save_model(policy, tokenizer, tmp_path / "saved", dataclasses.replace(cfg, model=str(tmp_path / "model")))
        assert not (tmp_path / "saved" / "value").exists()
        back, _ = agrpo.load_policy(str(tmp_path / "saved"), "cpu")
        with torch.no_grad():
            assert torch.allclose(agrpo.step_logp(back, traj, views, cfg)[0], logp, atol=1e-5)


def test_the_value_loss_is_its_definition_weighted_as_the_policys():
    """Token by token: 1/2 max((V - R)^2, (V_clip - R)^2), of weights that differ from view to view, over N."""
    policy, _ = tiny_blocks()
    cfg = dataclasses.replace(BLOCKS, normalizer="state_tokens", unmasking="threshold", threshold=0.03, steps=20)
    traj = ragged(policy, cfg)
    views = agrpo.tracerl_views(traj, None, cfg, policy.mask_id, None)
    value = agrpo.ValueModel(policy, cfg).double()
    torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))
    now, g = value.of(traj, views, BLOCKS), torch.Generator().manual_seed(1)
    old, returns = (now + 0.5 * torch.randn(now.shape, generator=g).double() for _ in range(2))
    want = 0.0
    for row, target, weight in zip(views.row.tolist(), views.target, views.weight.tolist()):
        for j in target.nonzero()[:, 0].tolist():
            V, V0, R = float(now[row, j]), float(old[row, j]), float(returns[row, j])
            want += weight * 0.5 * max((V - R) ** 2, (V0 + min(max(V - V0, -0.2), 0.2) - R) ** 2) / 6
    assert len(views.weight.unique()) > 1 and float(value.loss(traj, views, old, returns, 0.2).detach()) == pytest.approx(want, rel=1e-9)


def test_advantages_follow_the_steps_that_were_scored_whatever_the_method(monkeypatch):
    """exact, dipo and tracerl without merging see the same steps, so the same advantages of a discounted reward."""
    monkeypatch.setattr(agrpo, "reward_parts", lambda task, text, ex, weights: {"correct": 1.0})
    found, inner = [], agrpo.policy_loss
    for method in ("exact", "tracerl", "dipo"):
        policy, tokenizer = tiny_blocks()
        cfg = dataclasses.replace(BLOCKS, method=method, advantage="none", value_model="on", gamma=0.9, lam=0.8)
        policy.value = agrpo.ValueModel(policy, cfg).double()
        monkeypatch.setattr(agrpo, "policy_loss", lambda p, t, v, a, c: found.append(a) or inner(p, t, v, a, c))
        agrpo.train_step(policy, tokenizer, agrpo.make_optimizer(policy, cfg), examples(), 0, cfg)
    assert torch.allclose(found[0], found[1]) and torch.allclose(found[0], found[2]) and len(found[0].unique()) > 5


def test_a_value_model_gives_every_token_its_own_advantage(monkeypatch):
    """Through train_step: with a value that is one everywhere, R = 1 teaches nothing and R = 0 pushes down."""
    for reward, moves in ((1.0, False), (0.0, True)):
        monkeypatch.setattr(agrpo, "reward_parts", lambda task, text, ex, weights: {"correct": reward})
        policy, tokenizer = tiny()
        cfg = dataclasses.replace(CFG, method="tracerl", advantage="none", position_term="off", value_model="on")
        policy.value = agrpo.ValueModel(policy, cfg).double()
        torch.nn.init.ones_(policy.value.head.bias)
        seen = []
        inner = agrpo.policy_loss
        monkeypatch.setattr(agrpo, "policy_loss", lambda p, t, v, a, c: seen.append(a) or inner(p, t, v, a, c))
        row = agrpo.train_step(policy, tokenizer, agrpo.make_optimizer(policy, cfg), examples(), 0, cfg)
        monkeypatch.setattr(agrpo, "policy_loss", inner)
        assert seen[0].shape == (8, 16) and torch.allclose(seen[0], torch.full((8, 16), reward - 1.0).double())
        assert (row["grad_norm"] > 1e-6) == moves and row["passes"] == 8 * 8


# ------------------------------------------------------------------------------------------------------------- the controller
@pytest.mark.parametrize("rule, knob", [("threshold", "threshold"), ("entropy", "entropy_bound")])
@pytest.mark.parametrize("training", ["joint", "alone"])
def test_the_controllers_gradient_is_autograd_of_the_exact_expectation(rule, knob, training):
    """The threshold integrated out by enumeration: between neighbouring levels of the table all thresholds act alike, so E[R] is a sum over
    intervals of their mass times the enumerated mean reward there; its ends move with the table. Model and head are both exact, and leaving
    the ends out is not."""
    sigma, mean, C = 0.6, 0.5 if rule == "threshold" else -1.0, 3
    cfg = dataclasses.replace(BASE, unmasking=agrpo.CONTROLLERS[rule], controller=rule, controller_sigma=sigma, position_term="off", temperature=1.0,
                              controller_training=training)
    policy = toy.TableDenoiser(C, V=2, seed=5)
    plain = policy.table.log_softmax(-1)
    if rule == "threshold":
        levels = -plain.amax(-1).flatten()
    else:                                                                                # every sum of entropies but the largest that may come up
        h = -(plain.exp() * plain).sum(-1)
        levels = torch.cat([(sum(h[:, i] for i in S) - torch.stack([h[:, i] for i in S]).amax(0)).log() for n in (2, 3)
                            for S in itertools.combinations(range(C), n)])
    levels = levels[levels.detach().argsort()]
    levels = levels[torch.tensor([True, *(levels.diff().detach() > 1e-12)])]
    middles = [float(levels[0].detach()) - 1, *((levels[1:] + levels[:-1]) / 2).tolist(), float(levels[-1].detach()) + 1]

    def enumerated(x):
        return toy.enumerate_trajectories(policy, dataclasses.replace(cfg, **{knob: math.exp(-x if rule == "threshold" else x)}))
    reward = lambda f: toy.reward_of(f[0], 2) * (1 - len(f[4]) / (C + 1)) ** 0.5        # noqa: E731
    key = lambda f: tuple(map(tuple, (f[0], f[1])))                                      # noqa: E731
    with torch.no_grad():
        policy.mean.fill_(mean)
    normal = torch.distributions.Normal(policy.mean, sigma)
    cut = [torch.zeros((), dtype=torch.float64), *map(normal.cdf, levels), torch.ones((), dtype=torch.float64)]
    total, still, found, ends, sampled = 0.0, 0.0, {}, {}, {}
    for k, x in enumerate(middles):
        mass, here = cut[k + 1] - cut[k], enumerated(x)
        J = sum(f[2] * reward(f) for f in here)
        total, still = total + mass * J, still + mass.detach() * J
        for f in here:
            prob = float((mass * f[2]).detach()) + (found[key(f)][1] if key(f) in found else 0.0)
            found[key(f)] = (f, prob)
            ends.setdefault(key(f), []).append(k)
        with torch.no_grad():
            policy.mean.fill_(x)
        prompt = torch.zeros(400, 1, dtype=torch.long)
        traj = agrpo.rollout(policy, prompt, prompt + 1, dataclasses.replace(cfg, controller_sigma=1e-12), [(k, i) for i in range(400)])
        for i in range(400):
            sampled.setdefault(tuple(tuple(v[i].tolist()) for v in (traj.tokens, traj.reveal_step)), traj.rows(slice(i, i + 1)))
    with torch.no_grad():
        policy.mean.fill_(mean)
    assert set(sampled) == set(found) and abs(sum(p for _, p in found.values()) - 1) < 1e-9 and len({round(reward(f), 9) for f, _ in found.values()}) > 5
    traj = agrpo.Trajectory.join([sampled[k] for k in found])
    bounds = [-math.inf, *levels.tolist(), math.inf]
    for row, k in zip(traj.edges.tolist(), found):                                       # the edges are those within which the trajectory comes up
        assert all(abs(a - b) < 1e-9 or a == b for a, b in zip(row, (bounds[min(ends[k])], bounds[max(ends[k]) + 1])))
    traj.ease_mean = torch.full((len(found),), mean, dtype=torch.float64)
    adv = torch.tensor([reward(f) * p for f, p in found.values()], dtype=torch.float64)
    loss, ratio = agrpo.controller_loss(policy, traj, torch.arange(len(adv)), adv, cfg)
    tokens, _ = agrpo.policy_loss(policy, traj, agrpo.exact_views(traj, adv, cfg, policy.mask_id, None), adv, cfg)
    got = torch.autograd.grad(-(loss + tokens) * len(adv) * cfg.steps, (policy.table, policy.mean))
    want = torch.autograd.grad(total, (policy.table, policy.mean), retain_graph=True)
    assert (ratio - 1).abs().max() < 1e-9
    assert abs(float(got[1] - want[1])) < 1e-9 * abs(float(want[1]))
    off = float((got[0] - want[0]).norm() / want[0].norm())
    if training == "joint":
        assert off < 1e-9
        without, = torch.autograd.grad(still, policy.table)
        assert float((without - want[0]).norm() / want[0].norm()) > 0.1


def test_the_law_of_the_ease_stays_finite_far_out():
    edges = torch.tensor([[30.0, 31.0], [-31.0, -30.0], [60.0, math.inf], [-math.inf, math.inf], [5.0, 5.0]], dtype=torch.float64)
    mean = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    logp = agrpo.ease_logp(edges, mean, 1.0)
    logp.sum().backward()
    assert logp.isfinite().all() and mean.grad.isfinite().all() and logp[3] == 0
    assert abs(float(logp[0] - logp[1])) < 1e-9 and float(logp[0].detach()) < -400


def test_thresholds_are_drawn_from_the_controllers_law_and_act_row_by_row():
    policy = toy.TableDenoiser(3, V=2, seed=5)
    cfg = dataclasses.replace(BASE, unmasking="threshold", controller="threshold", controller_sigma=0.6)
    with torch.no_grad():
        policy.mean.fill_(0.4)
    N = 4000
    prompt = torch.zeros(N, 1, dtype=torch.long)
    traj = agrpo.rollout(policy, prompt, torch.ones_like(prompt), cfg, [(i,) for i in range(N)])
    z = (traj.ease - 0.4) / 0.6
    assert abs(float(z.mean())) < 4 / math.sqrt(N) and abs(float(z.var()) - 1) < 4 * math.sqrt(2 / N)
    assert (traj.edges[:, 0] <= traj.ease).all() and (traj.ease <= traj.edges[:, 1]).all() and len(traj.nfe.unique()) > 1
    for i in range(20):                                                                  # as with that threshold set by hand
        alone = agrpo.rollout(policy, prompt[:1], prompt[:1] + 1, dataclasses.replace(cfg, controller="off", threshold=math.exp(-float(traj.ease[i]))), [(i,)])
        assert torch.equal(alone.tokens[0], traj.tokens[i]) and torch.equal(alone.reveal_step[0], traj.reveal_step[i])
    greedy = agrpo.rollout(policy, prompt[:3], prompt[:3] + 1, dataclasses.replace(cfg, temperature=0.0), [(i,) for i in range(3)])
    assert torch.allclose(greedy.ease, torch.tensor(0.4).double())


# ---------------------------------------------------------------------------------------------------------- block-causal models
@pytest.mark.parametrize("unmasking", ["low_confidence", "threshold", "plackett_luce"])
def test_a_rollout_with_the_block_cache_equals_one_without(unmasking):
    policy, _ = tiny_blocks()
    cfg = dataclasses.replace(BLOCKS, unmasking=unmasking, threshold=0.03, steps=20, position_term="on")
    cached, plain = ragged(policy, cfg), ragged(policy, dataclasses.replace(cfg, cache="none"))
    for k, v in vars(plain).items():
        if isinstance(v, torch.Tensor):
            assert torch.equal(vars(cached)[k], v) if v.dtype == torch.long else torch.allclose(vars(cached)[k], v, atol=1e-10), k


def test_a_mask_token_in_the_prompt_does_not_mislead_the_block_cache():
    policy, _ = tiny_blocks()
    prompt = torch.randint(6, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    prompt[0, 3] = policy.mask_id
    cached, plain = (agrpo.rollout(policy, prompt, torch.ones_like(prompt), dataclasses.replace(BLOCKS, cache=c), [(0,), (1,)]) for c in ("block", "none"))
    assert torch.equal(cached.tokens, plain.tokens) and (cached.logp - plain.logp).abs().max() < 1e-10


def test_the_block_cache_computes_two_blocks_a_call():
    policy, _ = tiny_blocks()
    widths, inner = [], policy.decode
    policy.decode = lambda ids, *rest: widths.append(ids.shape[1]) or inner(ids, *rest)
    ragged(policy)
    assert widths[0] == 9 and set(widths[1:]) == {8}                                     # the prompt once, then 2 x 4 columns


def test_a_published_block_model_rolls_out_with_the_cache(tmp_path):
    write_checkpoint(tmp_path / "model", "sdar")
    policy, _ = agrpo.load_policy(str(tmp_path / "model"), "cpu")
    policy, cfg = policy.double(), dataclasses.replace(BLOCKS, completion_length=12, steps=12)
    assert policy.block == 4
    cached, plain = ragged(policy, cfg), ragged(policy, dataclasses.replace(cfg, cache="none"))
    assert torch.equal(cached.tokens, plain.tokens) and (cached.logp - plain.logp).abs().max() < 1e-10
    views = agrpo.dipo_views(cached, None, cfg, policy.mask_id, None)
    with torch.no_grad():
        logp, _ = agrpo.step_logp(policy, cached, views, cfg)
    assert (logp - cached.logp[views.row][views.target]).abs().max() < 1e-10


def test_flex_attention_from_the_same_rule_gives_the_same_log_probs():
    policy, _ = tiny_blocks()
    traj = ragged(policy)
    views = agrpo.dipo_views(traj, None, BLOCKS, policy.mask_id, None)
    policy.float()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        dense, _ = agrpo.step_logp(policy, traj, views, BLOCKS)
        policy.flex = True
        flex, _ = agrpo.step_logp(policy, traj, views, BLOCKS)
    assert (dense - flex).abs().max() < 1e-4 and policy.model.config._attn_implementation == "flex_attention"
    policy.flex = False
    with torch.no_grad():
        assert torch.equal(agrpo.step_logp(policy, traj, views, BLOCKS)[0], dense)


def test_the_block_rule_by_hand():
    """Prompt of 3 in blocks of 2, completion of 3: [p p | p c | c c], then the noisy copy from the prompt's last token on."""
    block, noisy = torch.tensor([[0, 0, 1, 1, 2, 2, 1, 1, 2, 2]]), torch.tensor([False] * 6 + [True] * 4)
    sees = agrpo.block_mask(agrpo.block_rule(block, torch.ones(1, 10, dtype=torch.bool), noisy), 1, 10, "cpu", False)[0, 0].int().tolist()
    assert sees == [[1, 1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
                    [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
                    [1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
                    [1, 1, 0, 0, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 1, 1, 0, 0],
                    [1, 1, 1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 1, 1]]


def test_sft_of_a_block_model_reads_each_block_behind_the_final_text_before_it():
    """The packed loss against one forward per block, each with its own t."""
    policy, _ = tiny_blocks()
    prompt = torch.randint(6, 100, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) >= torch.tensor([0, 1, 2, 3, 4])[:, None]).long()
    tokens = torch.randint(6, 100, (5, 12), generator=torch.Generator().manual_seed(1))
    is_masked, weight = agrpo.noise(tokens, 4, mask, agrpo.generator("n"))
    got = agrpo.denoising_loss(policy, prompt, mask, tokens, is_masked, weight)
    total, block = 0.0, (torch.arange(12) + mask.sum(1, keepdim=True) % 4) // 4
    for i in range(5):
        for b in block[i].unique().tolist():
            here = block[i] == b
            assert len(weight[i][here].unique()) == 1                                    # one t a block
            state = tokens[i].masked_fill(is_masked[i] & here, policy.mask_id)
            where = (is_masked[i] & here)[None]
            if where.any():
                logp = policy.logits(prompt[i:i + 1], mask[i:i + 1], state[None], where).log_softmax(-1)
                total = total - (logp.gather(1, tokens[i][where[0]][:, None]).squeeze(1) * weight[i][where[0]]).sum()
    assert abs(float(got - total / 60)) < 1e-10
    t = 1 / agrpo.noise(tokens.repeat(100, 1), 4, mask.repeat(100, 1), agrpo.generator("m"))[1]
    assert 0 < t.min() and t.max() <= 1 and abs(float(t.mean()) - 0.5) < 0.02


# ------------------------------------------------------------------------------------------------------------------ whole runs
QUICK = ["--max-steps", "2", "--eval-every", "0", "--eval-examples", "8", "--prompts", "2", "--completions", "4", "--base-steps", "4", "--base-hidden", "32",
         "--base-layers", "2", "--train-examples", "64"]


def go(*flags):
    return agrpo.main([*QUICK, *flags])


def rows_of(name):
    with open(Path("runs") / name / "log.csv") as f:
        return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in csv.DictReader(f)]


METHODS = [["--method", "exact"], ["--method", "diffu-grpo"], ["--method", "diffpo", "--inner-epochs", "2"], ["--method", "tracerl", "--value-model", "on"],
           ["--method", "dipo", "--model", "tiny-block"], ["--controller", "entropy"], ["--controller", "threshold", "--controller-training", "alone"],
           ["--model", "tiny-block", "--method", "tracerl", "--update-block", "8", "--value-model", "on"], ["--sft", "gold"],
           ["--sft", "gold", "--model", "tiny-block"], ["--controller", "threshold", "--model", "tiny-block", "--method", "dipo"]]


@pytest.mark.parametrize("flags", METHODS, ids=" ".join)
def test_every_method_runs_and_resumes_to_the_bit(here, flags):
    assert go("--name", "whole", "--max-steps", "4", *flags) == 0
    assert go("--name", "parts", "--max-steps", "2", *flags) == 0
    assert go("--name", "parts", "--max-steps", "4", "--resume", *flags) == 0
    assert rows_of("whole") == rows_of("parts") and len(rows_of("whole")) == 4
    a, b = (torch.load(Path("runs") / n / "checkpoint.pt", weights_only=True)["model"] for n in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_published_settings_of_a_method_come_with_its_name_and_flags_win():
    for method, settings in agrpo.PUBLISHED.items():
        model = ["--model", "tiny-block"] if method == "dipo" else []
        cfg, _ = agrpo.parse(["--method", method, *model])
        assert {k: getattr(cfg, k) for k in settings if k != "shrink"} == {k: v for k, v in settings.items() if k != "shrink"}
    assert agrpo.parse(["--method", "diffu-grpo", "--clip", "0.1"])[0].clip == 0.1
    assert agrpo.parse(["--method", "tracerl"])[0].shrink == 2 and agrpo.parse(["--method", "tracerl", "--model", "tiny-block"])[0].shrink == 1
    assert agrpo.config_for("gsm8k", "x", "", "tracerl").shrink == 8


def test_default_names_tell_runs_apart(here):
    def name(*flags):
        return agrpo.parse(list(flags))[0].name
    assert name() == "sudoku-agrpo-seed0" and name("--preset", "official") == "sudoku-official-seed0" and name("--sft", "gold", "--seed", "2") == "sudoku-sft-seed2"
    assert name("--method", "dipo", "--model", "tiny-block") == "sudoku-tiny-block-dipo-seed0"
    assert name("--method", "exact", "--value-model", "on") == "sudoku-exact-value-seed0"
    assert name("--controller", "entropy") == "sudoku-agrpo-entropy-joint-seed0"
    assert go("--name", "first") == 0 and name("--model", "runs/first") == "sudoku-on-first-agrpo-seed0"


def test_a_method_of_ones_own_is_a_function_and_a_row(here, monkeypatch):
    """What the comment above Views promises: nothing else has to know of it."""
    def last_step_views(traj, adv, cfg, mask_id, g):
        return agrpo.views_where(torch.nn.functional.one_hot(traj.nfe - 1, cfg.steps).double(), traj, cfg, mask_id)
    monkeypatch.setitem(agrpo.VIEWS, "last-step", last_step_views)
    assert go("--method", "last-step") == 0 and len(rows_of("sudoku-last-step-seed0")) == 2
    assert go("--method", "last-step", "--model", "runs/sudoku-last-step-seed0") == 0


@pytest.mark.parametrize("flags", [["--method", m] for m in agrpo.VIEWS] + [["--controller", "entropy"], ["--sft", "gold"]], ids=" ".join)
def test_the_estimate_counts_the_passes_that_a_step_makes(here, flags, monkeypatch):
    """Of the tiny models, where every group has an advantage: the logged passes of train_step, packed ones read twice the length."""
    monkeypatch.setattr(agrpo, "reward_parts", lambda task, text, ex, weights: {"correct": float(sum(map(ord, text)) % 7)})
    cfg = agrpo.parse([*flags, *(["--model", "tiny-block"] if "dipo" in flags else []), "--prompts", "4", "--completions", "8"])[0]
    if cfg.sft:
        assert run_folder.states_scored(cfg) == 4
        return
    policy, tokenizer = (tiny_blocks if "dipo" in flags else tiny)(dataclasses.replace(cfg, base_hidden=32, base_layers=2))
    cfg = dataclasses.replace(cfg, kl=0.0, controller="off")
    row = agrpo.train_step(policy, tokenizer, agrpo.make_optimizer(policy, cfg), examples(n=8), 0, cfg)
    assert abs(row["passes"] * (2 if "dipo" in flags else 1) / run_folder.states_scored(cfg) - 1) < 0.2


def test_a_controller_is_saved_with_the_model_and_used_by_eval(here, capsys, monkeypatch):
    monkeypatch.setattr(agrpo, "reward_parts", lambda task, text, ex, weights: {"correct": float(sum(map(ord, text)) % 7)})
    assert go("--name", "c", "--controller", "entropy", "--max-steps", "3", "--controller-lr", "0.5", "--entropy-bound", "12") == 0
    table = capsys.readouterr().out
    assert json.loads((Path("runs/c/model/agrpo.json")).read_text())["controller"] == "entropy"
    assert run_folder.main(["--model", "runs/c", "--limit", "8", "--out", "c.jsonl"]) == 0
    out = capsys.readouterr().out
    nfe = json.loads(Path("c.json").read_text())["results"][0]["nfe"]
    assert f"{nfe:.1f}" in table and "16" in out
    assert run_folder.main(["--model", "runs/c", "--limit", "8", "--controller", "off", "--steps", "16", "--out", "d.jsonl"]) == 0
    assert json.loads(Path("d.json").read_text())["results"][0]["nfe"] == 16.0
    policy, _ = agrpo.load_policy("runs/c/model", "cpu", dataclasses.replace(agrpo.Config(), controller="entropy"))
    assert float(policy.controller.weight.abs().max()) > 0
    assert run_folder.main(["--model", "runs/c", "--limit", "8", "--entropy-bound", "1", "--out", "x.jsonl"]) == 2
    assert "--controller off" in capsys.readouterr().err
    assert go("--model", "runs/c", "--controller", "threshold", "--name", "other") == 2 and "another kind" in capsys.readouterr().err
    from safetensors.torch import load_file, save_file
    head = Path("runs/c/model/controller.safetensors")
    saved = load_file(head)
    save_file({**saved, "bias": saved["bias"] + 9.0}, head)                              # other weights, other completions: not those of the file
    assert run_folder.main(["--model", "runs/c", "--limit", "8", "--out", "c.jsonl"]) == 2 and "weights" in capsys.readouterr().err
    assert run_folder.main(["--model", "runs/c", "--limit", "8", "--out", "y.jsonl"]) == 0
    assert json.loads(Path("y.json").read_text())["results"][0]["nfe"] == 1.0
    for spoil in (lambda: head.write_bytes(b"no"), lambda: save_file({"weight": torch.ones(1, 7), "bias": torch.ones(1)}, head), head.unlink):
        spoil()
        assert run_folder.main(["--model", "runs/c", "--limit", "8", "--out", "e.jsonl"]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_sft_then_rl_in_two_commands(here, capsys):
    rows = [{"prompt": "1234", "completion": "12"}, {"prompt": "4321", "completion": "34"}, {"prompt": "1", "completion": "x" * 30}]
    Path("pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert go("--sft", "pairs.jsonl", "--name", "s") == 0
    assert "1 of 3 answers, of more than 16 tokens" in capsys.readouterr().out
    assert {"loss", "grad_norm"} <= rows_of("s")[0].keys() and float(rows_of("s")[0]["loss"]) > 0
    assert go("--model", "runs/s", "--name", "r") == 0                                   # the sizes are those of the model it began with
    assert Path("runs/r/model/config.json").is_file() and json.loads(Path("runs/r/config.json").read_text())["prompt"] == "bare"
    assert dataclasses.replace(agrpo.config_for("countdown", "runs/r"), model="tiny") == agrpo.config_for("countdown", "tiny")
    assert go("--model", "runs/r", "--lora-rank", "4", "--name", "a") == 0 and go("--model", "runs/a", "--name", "b") == 0
    assert Path("runs/b/model/adapter_config.json").is_file()


def test_an_sft_file_may_hold_any_line_separator_but_newline_inside_a_text(here):
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "1\u2028\u0085", "completion": "2"}, ensure_ascii=False) + "\r\n")
    assert go("--sft", "pairs.jsonl", "--name", "s") == 0


def test_sft_learns_the_answers(here):
    """Loss falls, and greedy answers are those of the file."""
    Path("pairs.jsonl").write_text("".join(json.dumps({"prompt": str(i), "completion": str(i) * 4}) + "\n" for i in range(1, 5)))
    for model in ("tiny", "tiny-block"):
        assert go("--model", model, "--sft", "pairs.jsonl", "--name", model, "--max-steps", "150", "--lr", "5e-3", "--prompts", "16", "--decay-steps", "150") == 0
        losses = [float(r["loss"]) for r in rows_of(model)]
        assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
        policy, tokenizer = agrpo.load_policy(f"runs/{model}/model", "cpu")
        cfg = agrpo.evaluation_config(agrpo.parse(["--model", model])[0])
        ids, mask = agrpo.encode_prompts(tokenizer, [(str(i), "") for i in range(1, 5)])
        traj = agrpo.rollout(policy, ids, mask, cfg, [(i,) for i in range(4)])
        assert [tokenizer.decode(t[:n]) for t, n in zip(traj.tokens, traj.length)] == ["1111", "2222", "3333", "4444"]


def test_training_with_larger_blocks_then_rolling_out_with_them(here, capsys):
    base = ["--model", "tiny-block", "--method", "tracerl"]
    assert go(*base, "--update-block", "8", "--name", "wide") == 0
    assert float(rows_of("wide")[0]["ratio"]) == 1.0
    assert go("--model", "runs/wide", "--model-block", "8", "--completion-length", "24", "--steps", "24", "--eval-steps", "24", "--method", "dipo", "--name",
              "larger") == 0
    assert agrpo.parse(["--model", "runs/wide"])[0].block_length == 4 and agrpo.parse(["--model", "runs/larger", "--model-block", "8"])[0].block_length == 8


BAD = [(["--method", "dipo"], "block-causal"), (["--update-block", "8"], "block-causal"), (["--method", "ppo"], "agrpo, exact, diffu-grpo"),
       (["--method", "diffpo", "--position-term", "on"], "--position-term"), (["--value-model", "on"], "scores every step"),
       (["--model", "tiny-block", "--method", "tracerl", "--update-block", "6"], "multiple"), (["--prompt-masking", "1"], "--prompt-masking"),
       (["--gamma", "1.5", "--value-model", "on", "--method", "exact"], "--gamma"), (["--controller", "threshold", "--unmasking", "random"], "--unmasking"), (["--controller", "x"], "entropy"),
       (["--sft", "nowhere.jsonl"], "--sft"), (["--sft", "bad.jsonl"], "bad.jsonl:2"), (["--sft", "empty.jsonl"], "no rows"), (["--is-cap", "-1", "--method", "diffpo"], "--is-cap"),
       (["--inner-epochs", "0"], "--inner-epochs"), (["--model", "tiny-block", "--block-length", "8"], "blocks of 4"), (["--kl", "nan"], "--kl"),
       (["--model", "tiny-block", "--task", "gsm8k"], "sudoku and countdown"), (["--sft", "gold", "--value-model", "on", "--method", "exact"], "--sft"),
       (["--sft", "long.jsonl"], "are longer, the shortest has 99"), (["--sft", "mask.jsonl"], "answer 2"), (["--sft", "half.jsonl"], "half.jsonl:1"),
       (["--sft", "latin.jsonl"], "latin.jsonl:1"), (["--sft", "wide.jsonl"], "context is 256"), (["--sft", "."], "--sft"), (["--shrink", "2"], "tracerl"),
       (["--prompt-masking", "0.1"], "diffu-grpo"), (["--gamma", "0.9"], "--value-model on"), (["--alpha", "1"], "--controller"),
       (["--is-cap", "2"], "diffpo"), (["--method", "diffpo", "--mc-steps", "2"], "--method agrpo"), (["--method", "diffpo", "--preset", "official"], "--method agrpo"),
       (["--model", "tiny-block", "--update-block", "6"], "multiple"), (["--model", "tiny-block", "--update-block", "8"], "--position-term off"),
       (["--sft", "list.jsonl"], "one object"), (["--sft", "unknown.jsonl"], "no token for"), (["--model", "tiny-block", "--eval-steps", "16"], "20, 10, 5"), (["--model-block", "4"], "tiny-block"),
       (["--controller", "entropy", "--controller-training", "alone", "--method", "exact", "--value-model", "on"], "value model")]


@pytest.mark.parametrize("flags, word", BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_is_one_line_and_exit_code_2(here, flags, word, capsys):
    Path("bad.jsonl").write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "1"}\n')
    Path("empty.jsonl").write_text("\n")
    Path("mask.jsonl").write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "1", "completion": "<mask>"}\n')
    Path("list.jsonl").write_text('[1]\n')
    Path("unknown.jsonl").write_text('{"prompt": "1", "completion": "\u00e9"}\n')
    Path("half.jsonl").write_text('{"prompt": "1", "completion": "a\\ud800"}\n')
    Path("latin.jsonl").write_bytes('{"prompt": "1", "completion": "\u00e9"}\n'.encode("latin-1"))
    Path("wide.jsonl").write_text(json.dumps({"prompt": "1" * 300, "completion": "2"}) + "\n")
    Path("long.jsonl").write_text(json.dumps({"prompt": "1", "completion": "2" * 99}) + "\n")
    assert go("--name", "bad", *flags) == 2
    err = capsys.readouterr().err
    assert word in err and len(err.strip().splitlines()) == 1 and not Path("runs/bad").exists()
