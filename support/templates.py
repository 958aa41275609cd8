"""From a message to the text that a model reads: its chat template, and the arguments of that.

--prompt agrpo (of checkpoints not trained here) asks for think and answer tags with \\boxed inside,
--prompt d1 for reasoning and answer tags, and the completion begins after <reasoning>: published
formats in our wording. --system-prompt TEXT replaces the instructions, --prompt bare leaves the
statement alone. --template-args enable_thinking=true passes arguments to the template in place of
the family's own (none: no arguments). What a template writes of the answer, such as a think block,
belongs to the prompt and earns nothing. A model without a template reads plain text: --prompt bare,
or --sft first. A trained model and an evaluation remember all of these."""
import inspect
import re

from rewards import BadInput
from support.families import Family
from support.files import need

def read_template_args(text: str) -> dict:
    """"enable_thinking=true" -> {"enable_thinking": True}; none: {}. Raises BadInput."""
    found, words = {}, {"true": True, "false": False}
    for item in text.split(",") if text not in ("", "none") else ():
        m = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*([^\s=]+)\s*", item)
        need(m and m[1] not in found, f"--template-args {text!r}: must be none, or each name once, "
             "NAME=VALUE,..., such as enable_thinking=true")
        number = re.fullmatch(r"-?[0-9]{1,9}", m[2])
        found[m[1]] = words.get(m[2].lower(), int(m[2]) if number else m[2])
    return found

def write_template_args(known: dict) -> str:
    """The one way to write them. {} -> none"""
    return ",".join(f"{k}={str(v).lower() if type(v) is bool else v}"
                    for k, v in known.items()) or "none"

def template_args(tokenizer, family: Family) -> str:
    """What the prompts of a tokenizer are made with, as --template-args has it."""
    known = getattr(tokenizer, "template_args", {})
    return write_template_args(known) if known or family.template else ""

def set_template_args(tokenizer, text: str):
    """--template-args in place of the family's own; "": these stay. Raises BadInput for what the
    chat template does not read."""
    template, given = tokenizer.chat_template, read_template_args(text)
    own = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in given:
        need(template, f"--template-args {name}: the model has no chat template")
        need(name in variables(str(template)) - own,
             f"--template-args {name}: the model's chat template does not read it")
    tokenizer.template_args = given if text else getattr(tokenizer, "template_args", {})

def variables(template: str) -> set:
    """The names that a chat template is given; where it cannot be parsed, all its words."""
    import jinja2.meta
    try:
        parser = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        return jinja2.meta.find_undeclared_variables(parser.parse(template))
    except jinja2.TemplateError:                               # it has tags of transformers' own
        return set(re.findall(r"[A-Za-z_]\w*", template))

def in_turns(tokenizer, turns: list[tuple[str, str]], **how) -> str:
    """(role, text) of each turn -> the text that the model reads; without a chat template, as base
    models are, what the turns say and nothing else."""
    if not tokenizer.chat_template:
        return "".join(text for _, text in turns)
    return tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], tokenize=False,
        **getattr(tokenizer, "template_args", {}), **how)

def encode_prompts(tokenizer, prompts: list[tuple[str, str]]) -> tuple:
    """(user message, what the completion is made to begin with), through the tokenizer's chat
    template -> ids and mask (N, P), left padded. Raises BadInput for what has no token."""
    texts = [in_turns(tokenizer, [("user", message)], add_generation_prompt=True) + begin
             for message, begin in prompts]
    out = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left",
                    return_tensors="pt")
    ids, mask, unknown = out["input_ids"], out["attention_mask"], tokenizer.unk_token_id
    if unknown not in (None, tokenizer.eos_token_id):          # else a template may write it
        for i in ((ids == unknown) & (mask == 1)).any(1).nonzero().flatten().tolist():
            at = tokenizer(texts[i], add_special_tokens=False, return_offsets_mapping=True)
            a, b = at["offset_mapping"][at["input_ids"].index(unknown)]
            raise BadInput(f"the model has no token for {texts[i][a:b][:40]!r} in "
                           f"{prompts[i][0][:80]!r}")
    return ids, mask

def end_of_turn(tokenizer) -> int | None:
    """The special token, other than EOS, that the chat template writes after an answer."""
    text = in_turns(tokenizer, [("user", "?"), ("assistant", "ANSWER")])
    _, found, rest = text.rpartition("ANSWER")
    after = found and tokenizer(rest, add_special_tokens=False)["input_ids"][:1]
    special = after and after[0] in tokenizer.added_tokens_decoder
    return after[0] if special and after[0] != tokenizer.eos_token_id else None
