"""All settings together; from checkpoint to policy, from examples to completions and rewards."""
import contextlib
import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import torch

import agrpo
from methods import (ROWS, caches, curriculum, diffpo, diffu_grpo, dipo, join, lengths, room,
                     rows_of, samplers, scored, sft, to, tracerl, unfinished)
from rewards import TASKS, grade, overlong, prompt_for, reward_parts
from support import checkpoints, options, rules, tiny
from support.processes import once
from support.files import need

OWNERS = {                             # whose settings they are; --help shows the first four
    "run": options.Run, "method": agrpo.Config, "evaluation": options.Evaluation,
    "actions": options.Actions, "weights": options.Weights, "reward": options.Reward,
    "tiny": tiny.Settings, "samplers": samplers.Settings, "kl": scored.Settings,
    "diffu-grpo": diffu_grpo.Settings, "diffpo": diffpo.Settings, "tracerl": tracerl.Settings,
    "dipo": dipo.Settings, "controller": diffpo.ControllerSettings, "cache": caches.Settings,
    "curriculum": curriculum.Settings}

@dataclasses.dataclass(frozen=True)
class Settings(*(owner for name, owner in OWNERS.items() if name != "actions")):
    """All of them: what `cfg` is at run time."""

def choices() -> dict:
    """The words that settings take from agrpo.py's tables."""
    tables = {"method": "METHODS", "unmasking": "UNMASK", "timesteps": "TIMESTEPS",
              "advantage": "ADVANTAGES", "normalizer": "NORMALIZERS"}
    return {knob: [*(row for row in getattr(agrpo, table) if row not in ROWS[table]), *ROWS[table]]
            for knob, table in tables.items()}

def settle(given: dict, may_be_zero=frozenset()) -> Settings:
    """The flags given, and for the rest what task, model, method and preset ask for. Raises
    BadInput for a value that none of them takes."""
    rules.check_values(Settings(**given), {**rules.CHOICES, **choices()},
                         rules.MAY_BE_ZERO | may_be_zero)
    if "model" in given:
        given = {**given, "model": options.hub_name(given["model"])}
    published = agrpo.METHODS[given.get("method", "agrpo")].settings
    settings = options.before_flags(given, published)
    cfg, found = options.hours_or_steps(Settings(**settings | given), given), None
    rewards = torch.eye(2, 3)                                  # two groups of three
    with contextlib.suppress(RuntimeError):                    # shapes that do not go together
        found = agrpo.ADVANTAGES[cfg.advantage](rewards)
    need(getattr(found, "shape", None) == rewards.shape,
         f"--advantage {cfg.advantage}: (B, G) rewards must give (B, G) advantages; is "
         "keepdim=True missing?")
    if cfg.decay_steps and "decay_steps" not in given:
        cfg = dataclasses.replace(cfg, decay_steps=max(cfg.decay_steps, cfg.max_steps))
    if cfg.kl_reference == "old" and cfg.inner_epochs == 1 and "kl" not in given:
        cfg = dataclasses.replace(cfg, kl=0.0)                 # no gradient at the first update
    return options.with_prompt(cfg)

def policy_of(net, mask_id: int, eos_id: int, shift: bool, block: int):
    """Its denoiser: block-causal if it has blocks."""
    known = net, mask_id, eos_id, shift
    return dipo.BlockPolicy(*known, block) if block else agrpo.Policy(*known)

def check(cfg, given: dict) -> Settings:
    """cfg, with sizes of 0 settled for tiny models, which fit any memory. Raises BadInput with one
    line for any setting that cannot work."""
    rules.check_values(cfg, {**rules.CHOICES, **choices()}, rules.MAY_BE_ZERO)
    order_term = agrpo.UNMASK[cfg.unmasking].order_logp is not None
    rules.validate(cfg, choices(), order_term, agrpo.METHODS[cfg.method].settings, given)
    if cfg.model in options.TINY:
        cfg = dataclasses.replace(cfg, rollout_batch=cfg.rollout_batch or 256,
                                  tokens_per_pass=cfg.tokens_per_pass or 12288)
    return cfg

def checked(given: dict) -> Settings:
    """As the command line makes them of these flags, sizes and prompt of task and model included.
    Raises BadInput."""
    given = curriculum.with_length(given)
    return check(options.with_model(settle(given), given), given)

def tiny_base(cfg, device: str, rebuild: bool = False) -> str:
    """Directory of the tiny base model, trained on the first call and kept."""
    block = options.tiny_block(cfg)

    def make(tokenizer):
        net = tiny.tiny_model(tokenizer, cfg, block).to(device)
        ids = tokenizer.mask_token_id, tokenizer.eos_token_id
        sft.train_base(policy_of(net, *ids, False, block), tokenizer, cfg)
        return net
    return tiny.base_folder(cfg, block, make, rebuild)

def compile_layers(net, backend="inductor"):
    """--compile on: one graph for all layers; the whole model's takes many minutes to make."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # a layer's number makes no new graph
    caches.CachedPolicy.update = torch.compiler.disable(caches.CachedPolicy.update)
    net.compiled = True
    for layer in net.get_decoder().layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)

def open_policy(cfg, train=False, rebuild=False) -> tuple:
    """cfg.model -> policy, tokenizer, on their device. Raises BadInput, FloatingPointError."""
    device = options.device_for(cfg)
    model = once(tiny_base, cfg, device, rebuild) if cfg.model in options.TINY else cfg.model
    net, tokenizer, about = checkpoints.load_network(model, device, cfg, train)
    if not all(bool(p.isfinite().all()) for p in net.parameters()):
        raise FloatingPointError(f"--model {cfg.model}: not all of its weights are finite numbers")
    if cfg.compile == "on":
        compile_layers(net)
    policy = policy_of(net, about.mask_id, tokenizer.eos_token_id, about.family.shift, about.block)
    turn_id = checkpoints.end_of_turn(tokenizer)
    policy.flex, policy.turn_id = device != "cpu", policy.eos_id if turn_id is None else turn_id
    policy.source, policy.base = about.folder, about.base
    if cfg.controller != "off":
        if train and cfg.controller_training == "alone":
            net.requires_grad_(False)
        diffpo.add_controller(policy, cfg, about, train)
    return policy, tokenizer

def check_prompts(cfg, examples: list) -> tuple:
    """What is known of cfg.model before it is made or loaded -> Checkpoint, tokenizer, tokens of
    the longest prompt and of a usual one. Raises BadInput if the longest and its completion do not
    fit, or there is no token for a part of a prompt."""
    if cfg.model in options.TINY:
        tokenizer = tiny.tiny_tokenizer(TASKS[cfg.task].words)
        config, mask_id = tiny.tiny_config(tokenizer, cfg), tokenizer.mask_token_id
        about = checkpoints.Checkpoint(None, None, config, mask_id, options.tiny_block(cfg))
    else:
        about, tokenizer = checkpoints.open_checkpoint(cfg.model, cfg.model_block)
        config = about.config
    checkpoints.set_template_args(tokenizer, cfg.template_args)
    ids, prompt_mask = checkpoints.encode_prompts(tokenizer, [
        prompt_for(cfg.task, ex, cfg.prompt, cfg.system_prompt) for ex in examples])
    length = ids.shape[1]
    need(int(ids.max()) < config.vocab_size, f"--model {cfg.model}: its tokenizer makes tokens up "
         f"to {int(ids.max())}, its config.json has {config.vocab_size}")
    longest, room = max(cfg.completion_length, cfg.eval_length), config.max_position_embeddings
    need(length + longest <= room, f"the longest prompt has {length} tokens, a completion "
         f"{longest}; the context is {room}: shorter completions or prompts fit")
    return about, tokenizer, (length, int(prompt_mask.sum(1).double().mean()))

def generate(policy, tokenizer, examples: list, keys: list, cfg) -> tuple:
    """One completion per example -> trajectory, texts: the one way from an example to a text. Each
    process denoises its share, rollout_batch rows at once, those with long prompts first."""
    (rank, world), found = agrpo.processes(), []
    roll = (diffpo.controlled_rollout if cfg.controller != "off" else
            caches.cached_rollout if cfg.cache != "none" else agrpo.rollout)
    ids, prompt_mask = checkpoints.encode_prompts(tokenizer, [
        prompt_for(cfg.task, ex, cfg.prompt, cfg.system_prompt) for ex in examples])
    length, device = prompt_mask.sum(1), next(policy.model.parameters()).device
    mine = torch.tensor_split(torch.arange(len(examples)), world)[rank]
    mine = mine[length[mine].argsort(descending=True, stable=True)]
    with checkpoints.adapters_cast_once(policy.model):
        for part in mine.split(cfg.rollout_batch or 64) if len(mine) else ():
            P = max(1, int(length[part].max()))
            at = ids[part, -P:].to(device), prompt_mask[part, -P:].to(device)
            traj = roll(policy, *at, cfg, [keys[i] for i in part])
            found.append((part, to(traj, "cpu") if world > 1 else traj))
    index, parts = zip(*agrpo.gather(found))
    traj = to(rows_of(join(parts), torch.cat(index).argsort()), device)    # all rows, everywhere
    n = lengths(traj, policy).tolist()
    return traj, [tokenizer.decode(row[:k]) for row, k in zip(traj.tokens.cpu(), n)]

def sampler(tokenizer, cfg, cut=None):
    """What agrpo.train_step samples and rewards with; each process grades its share. cut: a list
    that takes of each rollout the share of completions that have no end."""
    weights = rules.read_weights(cfg.task, cfg.reward_weights)

    def sample(policy, examples, keys, cfg):
        """As agrpo.sample_step asks for it."""
        traj, texts = generate(policy, tokenizer, examples, keys, cfg)
        rank, world = agrpo.processes()
        mine = torch.tensor_split(torch.arange(len(texts)), world)[rank].tolist()

        def graded(i):
            """Parts of the reward, and whether it is solved."""
            parts = reward_parts(cfg.task, texts[i], examples[i], weights)
            return parts, grade(cfg.task, texts[i], examples[i]) == 1
        with ThreadPoolExecutor(os.cpu_count()) as pool:       # tests run in other processes
            parts, solved = zip(*agrpo.gather(list(pool.map(graded, mine))))
        names = dict.fromkeys(name for part in parts for name in part)     # a missing part is 0
        parts = {name: [part.get(name, 0.0) for part in parts] for name in names}
        if cut is not None:
            cut.append(float(unfinished(traj, policy, cfg).double().mean()))
        if cfg.overlong_penalty:
            size = zip(lengths(traj, policy).tolist(), room(traj, policy, cfg).tolist())
            parts["overlong"] = [-cfg.overlong_penalty * overlong(n, most, cfg.overlong_from)
                                 for n, most in size]
        return traj, parts, solved
    return sample

def method_of(cfg, tokenizer, state=None) -> agrpo.Method:
    """The row of METHODS, with what --sft, --controller, --cache, --kl-reference and --curriculum
    put in place of its step. state: a dict in which a curriculum keeps its record."""
    method = agrpo.METHODS[cfg.method]
    if cfg.sft:
        return agrpo.Method(None, train_step=sft.step_with(tokenizer))
    if cfg.controller != "off":
        method = method._replace(train_step=diffpo.controller_step, begin=diffpo.begin)
    if cfg.cache in options.APPROXIMATE:
        method = method._replace(train_step=caches.train_step)
    one_step, state = method.train_step or agrpo.train_step, {} if state is None else state
    if cfg.kl and cfg.kl_reference == "old":
        one_step = scored.kept_each_step(one_step)
    if cfg.curriculum == "solve_rate":
        one_step = curriculum.by_solve_rate(one_step, state)
    elif cfg.curriculum:
        one_step = curriculum.by_length(one_step, state)
    return method._replace(train_step=one_step)
