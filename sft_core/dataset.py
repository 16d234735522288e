"""From rows to token ids with loss masks: conversations, prompt and completion, plain text; tokenised once and cached.

What is trained by default: in `messages` what the assistant says, with `prompt` and `completion` the completion, in
plain text everything; always with the token that ends it. Where the assistant speaks is read off the template's
generation markers, or found by comparing renderings turn by turn, row by row; a row where that is ambiguous is refused.
Left out on purpose: images, weights per message.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

import sft_core.data.chat_template
import sft_core.data.conversation
from sft_core.data.chat_template import adds_bos, has_markers, has_prompt
from sft_core.data.conversation import COLUMNS, check_shown, messages_of, options_of, render, text_of
from sft_core.run.config import SFTConfig
from sft_core.run.distributed import on_first_rank

if TYPE_CHECKING:
    from datasets import Dataset

Example = tuple[list[int], list[bool]]  # token ids and loss mask, of one length
KEPT, CUT, TOO_LONG, NOTHING = range(4)  # what became of a row
ROWS_PER_PROCESS = 2_000  # fewer are not worth another process


def check_columns(columns: list[str], config: SFTConfig) -> list[str]:
    """The columns that are not used; raises ValueError where they fit no form that is known."""
    for form in (("messages",), ("prompt", "completion"), (config.dataset_text_field,)):
        if set(form) <= set(columns):
            return [name for name in columns if name not in form + COLUMNS]
    raise ValueError(
        f"the data needs a column `messages`, or `prompt` and `completion`, or `{config.dataset_text_field}` "
        f"(--dataset_text_field); it has {', '.join(columns)}."
    )


def needs_template(row: dict[str, Any]) -> bool:
    """Whether rows like this one are conversations."""
    return "messages" in row or ("prompt" in row and isinstance(row.get("completion"), list))


def supervised_example(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], stop_ids: frozenset[int], config: SFTConfig
) -> Example:
    """Token ids and loss mask of one row, whose text is tokenised in one piece.

    Raises:
        ValueError: the row has no text where it should, or what the assistant says cannot be told apart in it.
    """
    options = options_of(row, config.chat_template_kwargs)
    if "messages" in row:
        messages, trained_from = messages_of(row["messages"], "messages"), 0
        return _conversation(tokenizer, messages, trained_from, options, stop_ids, config)
    if needs_template(row):
        prompt, answer = (messages_of(row[name], name) for name in ("prompt", "completion"))
        trained_from = 0 if config.completion_only_loss is False else len(prompt)
        return _conversation(tokenizer, prompt + answer, trained_from, options, stop_ids, config)
    if options:
        raise ValueError(f"plain text has no place for `{next(iter(options))}`: make it messages, or take that out.")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token, so the model would never learn to stop: give --eos_token.")
    columns = ["prompt", "completion"] if {"prompt", "completion"} <= row.keys() else [config.dataset_text_field]
    *before, text = (text_of(row.get(column), column) for column in columns)
    start = 0 if config.completion_only_loss is False else len("".join(before))
    ids, mask = _encode(tokenizer, "".join([*before, text]), start)
    if ids[:1] != [bos] and adds_bos(tokenizer):
        ids, mask = [bos, *ids], [False, *mask]  # as the tokenizer begins any text
    return (ids, mask) if ids[-1:] == [eos] else ([*ids, eos], [*mask, True])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> Example:
    """Token ids of `text`, and which of them touch what comes from character `start` on."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [end > start for _, end in encoded["offset_mapping"]]


def _conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    trained_from: int,
    options: dict[str, Any],
    stop_ids: frozenset[int],
    config: SFTConfig,
) -> Example:
    """Ids and mask of a conversation; nothing before message `trained_from` is trained."""
    check_shown(tokenizer, messages, options)
    show = partial(render, tokenizer, more=options)
    text = show(messages)
    if not config.assistant_only_loss:
        return _encode(tokenizer, text, _start(show, messages, trained_from, text) if trained_from else 0)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, mask = encoded["input_ids"], [False] * len(encoded["input_ids"])
    starts, ends = np.array(encoded["offset_mapping"], int).reshape(-1, 2).T
    by_markers = has_markers(tokenizer)
    spans = [
        (int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left")))  # as tokens
        for start, end in _trained_text(tokenizer, messages, trained_from, options, text)
    ]
    limits = [*(start for start, _ in spans[1:]), len(ids)]  # where the next turn begins
    for (start, end), limit in zip(spans, limits, strict=False):
        inside = [t for t in range(start, end) if ids[t] in stop_ids] if by_markers else []
        after = [t for t in range(end, limit) if ids[t] in stop_ids]
        stops = inside[-1:] or after[:1]
        if not stops:
            raise ValueError(
                "the chat template does not end the assistant's turn with a stop token, so the model would never learn "
                f"to stop: set eos_token to the template's end of turn (stop ids are {sorted(stop_ids)}), or put "
                "{{ eos_token }} there."
            )
        mask[start : stops[0] + 1] = [True] * (stops[0] + 1 - start)
    return ids, mask


def _trained_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    trained_from: int,
    options: dict[str, Any],
    text: str,
) -> Iterator[tuple[int, int]]:
    """Where in `text`, the rendered conversation, each trained turn is: what the template's generation markers hold,
    whether or not the stop token is in it; without markers from where the turn begins to its last word."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    marks: list[tuple[int, int]] = []
    if has_markers(tokenizer):
        template = tokenizer.get_chat_template(tools=options.get("tools"))
        variables = tokenizer.special_tokens_map | options
        _, [found] = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **variables
        )
        marks = [(start, end) for start, end in found if start < end]
        if len(marks) != len(turns):
            raise ValueError(
                f"the chat template marks {len(marks)} assistant turns of {len(turns)}, so what is trained cannot be "
                "told: put {% generation %} around every assistant message, or leave the markers out."
            )
    show = partial(render, tokenizer, more=options)
    for i, turn in enumerate(turns):
        if turn < trained_from:
            continue
        words = messages[turn]["content"]
        if marks:
            start, end = marks[i]
            _end_of_words(words, text[start:end])
            yield start, end
        else:
            start = _start(show, messages, turn, text)
            yield start, start + _end_of_words(words, text[start:])
            if not text[start:].lstrip().startswith(words.strip()) and not has_prompt(tokenizer):
                raise ValueError(
                    "the chat template has neither {% generation %} markers nor a generation prompt, so the "
                    "assistant's words cannot be told from their heading: add one of them, or train all with "
                    "--assistant_only_loss false."
                )


def _start(show: Callable[..., str], messages: list[dict[str, Any]], turn: int, text: str) -> int:
    """Where in `text`, the rendered conversation, message `turn` begins: where the assistant would begin to speak."""
    if turn == 0:
        raise ValueError("a conversation begins with the assistant: put a message of the user or the system before.")
    before = show(messages[:turn], prompt=True)
    if text.startswith(before):
        return len(before)
    why = "earlier turns are rendered otherwise once later ones follow"
    if text.startswith(show(messages[:turn])):
        why = "a finished turn does not begin as the generation prompt does"
    raise ValueError(
        f"in the chat template {why}, so the assistant's tokens cannot be told apart: give a --chat_template with "
        "{% generation %} markers, or train all with --assistant_only_loss false."
    )


def _end_of_words(content: str, answer: str) -> int:
    """Where in `answer`, what the template made of it, `content` ends; it may have put spaces around thoughts."""
    at = 0
    for part in re.split("</?think>", content):
        found = answer.find(part.strip(), at)
        if found < 0:
            raise ValueError(
                f"the chat template leaves out a part of what the assistant says ({part.strip()[:40]!r}): give a "
                "--chat_template that keeps it."
            )
        at = found + len(part.strip())
    return at


def fit(example: Example, config: SFTConfig) -> tuple[Example, int]:
    """The example within max_length, and what became of it."""
    ids, mask = example
    outcome = KEPT
    if config.max_length is not None and len(ids) > config.max_length:
        if config.truncation_mode == "drop":
            return ([], []), TOO_LONG
        part = slice(config.max_length) if config.truncation_mode == "keep_start" else slice(-config.max_length, None)
        ids, mask, outcome = ids[part], mask[part], CUT
    return ((ids, mask), outcome) if any(mask[1:]) else (([], []), NOTHING)


def encode_row(
    row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], config: SFTConfig
) -> dict[str, Any]:
    """A row as it is stored: input_ids, loss_mask, length and outcome."""
    try:
        (ids, mask), outcome = fit(supervised_example(tokenizer, row, stop_ids, config), config)
    except ValueError as error:
        raise ValueError(f"row {index + 1} of the data: {error}") from error
    return {
        "input_ids": np.array(ids, np.int32),
        "loss_mask": np.array(mask, bool),
        "length": len(ids),
        "outcome": outcome,
    }


def what_is_trained(config: SFTConfig) -> dict[str, Any]:
    """The options that say what becomes of a row."""
    names = ("max_length", "truncation_mode", "assistant_only_loss", "completion_only_loss", "dataset_text_field")
    return {name: getattr(config, name) for name in (*names, "chat_template_kwargs")}


@dataclass(frozen=True)
class Examples:
    """Rows that teach something, memory-mapped."""

    rows: Dataset  # columns input_ids, loss_mask
    lengths: np.ndarray  # [rows] in tokens
    counts: dict[str, int]  # rows that were cut or left out, by reason

    def __str__(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in self.counts.items())


def supervised_examples(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], config: SFTConfig
) -> Examples:
    """All rows, tokenised. A collective: the first rank does it in parallel, the others read what it wrote into the
    cache of datasets.

    Raises:
        ValueError: the columns fit no form, a row is not as its form says, or no row is left.
    """
    check_columns(rows.column_names, config)
    modules = (sft_core.data.chat_template, sft_core.data.conversation, sys.modules[__name__])
    code = [Path(module.__file__ or "").read_bytes() for module in modules]
    template = str(tokenizer.chat_template)
    today = datetime.date.today() if "strftime_now" in template else None
    options = (
        code,
        today,
        what_is_trained(config),
        sorted(stop_ids),
        tokenizer.special_tokens_map,
        template,
        tokenizer.backend_tokenizer.to_str(),
        rows._fingerprint,
    )
    cores = min(16, len(os.sched_getaffinity(0)))
    processes = max(1, min(config.dataset_num_proc or cores, len(rows) // ROWS_PER_PROCESS))
    tokenise: Callable[[], Dataset] = partial(
        rows.map,
        encode_row,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "stop_ids": stop_ids, "config": config},
        remove_columns=rows.column_names,
        num_proc=processes if processes > 1 else None,
        new_fingerprint=hashlib.sha256(repr(options).encode()).hexdigest()[:32],
        desc="tokenise",
    )
    on_first_rank(lambda: len(tokenise()), patient=True)
    examples = tokenise().with_format("numpy")
    outcomes, lengths = (examples.data.column(name).to_numpy() for name in ("outcome", "length"))
    counts = {
        name: int((outcomes == code).sum())
        for name, code in (("cut", CUT), ("too long", TOO_LONG), ("nothing to learn", NOTHING))
    }
    kept = np.flatnonzero(outcomes <= CUT)
    if len(kept) == 0:
        raise ValueError(
            f"none of the {len(rows)} rows has anything to learn within max_length {config.max_length} "
            f"({counts['too long']} are too long, {counts['nothing to learn']} have no words of the "
            "assistant in it): raise --max_length, or check the data."
        )
    return Examples(examples if len(kept) == len(rows) else examples.select(kept), lengths[kept], counts)
