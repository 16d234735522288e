"""Chat templates: chooses the template, finds the token that ends its turns, and checks it against tokenizer and model.

Both trainers call `set_up` once, before anything is rendered. `check_template` reports in one line that everything
fits, or lists each fault with its remedy. Not supported, on purpose: custom templates for models that have one.
"""

import re
from collections.abc import Collection
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from sft_core.data.conversation import encode, render

# The template for base models, as in open-r1: Qwen's tokens and layout, without Qwen's default system prompt.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
PROBE = [{"role": "user", "content": "Is 12 + 30 = 42?\n  Ünïcode, too."}, {"role": "assistant", "content": "Yes!"}]


def set_up(
    tokenizer: PreTrainedTokenizerBase, eos_token: str | None, conversations: bool, chatml_default: bool
) -> None:
    """Set the tokenizer's chat template and EOS. Conversations need both: the EOS becomes the token that ends a turn.

    `chatml_default`: ChatML is the default for a tokenizer without a template. Its two tokens are added if they are not
    in the vocabulary, and the model's embedding then has to grow (`sft_core.model.policy.load_policy`).
    `eos_token`: the user's choice of EOS.
    """
    if conversations and tokenizer.chat_template is None and chatml_default:
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos(tokenizer) else "") + CHATML
        tokenizer.add_tokens([AddedToken(token, special=True) for token in CHATML_TOKENS])
    before = tokenizer.eos_token
    if eos_token is not None:
        if tokenizer.convert_tokens_to_ids(eos_token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"eos_token {eos_token!r} is not in the tokenizer's vocabulary: name one of its tokens.")
        tokenizer.eos_token = eos_token
    elif conversations and tokenizer.chat_template is not None and (end := end_of_turn(tokenizer)) is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.eos_token != before and tokenizer.eos_token == tokenizer.pad_token:
        tokenizer.pad_token = before  # nothing is padded here, but other code masks the pad token


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template puts right after the assistant's message, or None."""
    text = render(tokenizer, PROBE)
    _, found, after = text.rpartition(PROBE[-1]["content"])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in encode(tokenizer, after) if found else []:
        if token in special:
            return token
        if tokenizer.decode([token]).strip():
            break
    return None


def has_markers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template marks the assistant's messages: {% generation %} ... {% endgeneration %}."""
    return re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)) is not None


def has_prompt(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template has a generation prompt, the text in front of the assistant's message."""
    return render(tokenizer, PROBE[:1], prompt=True) != render(tokenizer, PROBE[:1])


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS before plain text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def check_template(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    supervised: bool = False,
    more: dict[str, Any] | None = None,
) -> str:
    """One line if the template, rendered with the variables `more`, fits the tokenizer, the stop tokens and the
    training; else one line per fault, with its remedy."""
    if tokenizer.chat_template is None:
        return "chat template: none"
    text = render(tokenizer, PROBE[:1], more, prompt=True)
    ids, bos, end, faults = encode(tokenizer, text), tokenizer.bos_token_id, end_of_turn(tokenizer), []
    if bos is not None and ids[:2] == [bos, bos]:
        faults.append(f"a prompt begins with {tokenizer.bos_token} twice: remove one from the template.")
    if adds_bos(tokenizer) and ids[:1] != [bos]:
        faults.append(
            f"a prompt has no {tokenizer.bos_token}, which this tokenizer adds to any plain text: begin the template "
            "with {{ bos_token }}."
        )
    if end is None:
        faults.append(
            "the assistant's turn does not end with a special token: end it with {{ eos_token }} in the template."
        )
    elif end not in stop_ids:
        faults.append(
            f"the assistant's turn ends with {tokenizer.convert_ids_to_tokens(end)}, which is not a stop token: give "
            "it as --eos_token."
        )
    if supervised and not has_markers(tokenizer) and not render(tokenizer, PROBE, more).startswith(text):
        faults.append(
            "a finished turn does not begin with the generation prompt, so the assistant's message cannot be located: "
            "give a --chat_template with {% generation %} markers."
        )
    if "strftime_now" in str(tokenizer.chat_template):
        faults.append(
            "it writes today's date, so a run that resumes tomorrow gets other prompts: write a fixed date instead."
        )
    if tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) != text:
        faults.append("encoding and decoding changes a prompt, so rewards may see other text: check the tokenizer.")
    if faults:
        return "\n".join(f"chat template: {fault}" for fault in faults)
    bos_text = f"one {tokenizer.bos_token}" if ids[:1] == [bos] else "no BOS"
    think = "opened by the template" if text.rstrip().endswith("<think>") else "left to the model"
    return (
        f"chat template: OK ({bos_text}; turns end with {tokenizer.convert_ids_to_tokens(end)}, which is a stop token; "
        f"<think> {think}; decoding a prompt restores its text)"
    )
