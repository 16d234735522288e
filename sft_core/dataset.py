"""Turns rows into token ids with loss masks. Rows are conversations, prompt and completion, or plain text.

By default the loss covers the assistant's messages (`messages`), the completion (`prompt` and `completion`), or the
whole text (plain text), always including the end token. The template's generation markers locate the assistant's
messages; without markers, each row is rendered turn by turn and the renderings are compared. A row where that is
ambiguous is refused. Rows are tokenised once and cached.
Not supported, on purpose: images, weights per message.
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
KEPT, CUT, TOO_LONG, NOTHING = range(4)  # outcomes for a row
ROWS_PER_PROCESS = 2_000  # fewer rows are not worth another process


def check_columns(columns: list[str], config: SFTConfig) -> list[str]:
    """Return the columns that are not used; raise ValueError if the columns fit no known form."""
    for form in (("messages",), ("prompt", "completion"), (config.dataset_text_field,)):
        if set(form) <= set(columns):
            return [name for name in columns if name not in form + COLUMNS]
    raise ValueError(
        f"the data needs a column `messages`, or `prompt` and `completion`, or `{config.dataset_text_field}`, and it "
        f"has {', '.join(columns)}: rename its columns, or name the column of text with --dataset_text_field."
    )


def needs_template(row: dict[str, Any]) -> bool:
    """Whether rows like this one are conversations."""
    return "messages" in row or ("prompt" in row and isinstance(row.get("completion"), list))


def supervised_example(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], stop_ids: frozenset[int], config: SFTConfig
) -> Example:
    """Token ids and loss mask of one row. Its text is tokenised in one piece.

    Raises:
        ValueError: a text of the row is missing, or the assistant's messages cannot be located in it.
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
        raise ValueError(
            f"plain text has no place for `{next(iter(options))}`, used by chat templates: give `messages`, or drop it."
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token, so the model would never learn to stop: give --eos_token.")
    columns = ["prompt", "completion"] if {"prompt", "completion"} <= row.keys() else [config.dataset_text_field]
    *before, text = (text_of(row.get(column), column) for column in columns)
    start = 0 if config.completion_only_loss is False else len("".join(before))
    ids, mask = _encode(tokenizer, "".join([*before, text]), start)
    if ids[:1] != [bos] and adds_bos(tokenizer):
        ids, mask = [bos, *ids], [False, *mask]  # as the tokenizer does for any text
    return (ids, mask) if ids[-1:] == [eos] else ([*ids, eos], [*mask, True])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> Example:
    """Token ids of `text`, and a mask of those that overlap the text from character `start` on."""
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
    """Token ids and loss mask of a conversation; nothing before message `trained_from` is trained."""
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
        (int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left")))  # token indices
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
                f"to stop: set --eos_token to the template's end-of-turn token (the stop ids are {sorted(stop_ids)}), "
                "or end the turn with {{ eos_token }} in the template."
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
    """Yield the span of each trained turn in `text`, the rendered conversation. With generation markers it is the text
    between them, with or without the stop token; without markers, from the beginning of the turn to its last word."""
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
                f"the chat template marks {len(marks)} of {len(turns)} assistant turns, so the trained tokens cannot "
                "be located: put {% generation %} around every assistant message, or remove the markers."
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
                    "assistant's text cannot be separated from its header: add one of them to the template, or train "
                    "on everything with --assistant_only_loss false."
                )


def _start(show: Callable[..., str], messages: list[dict[str, Any]], turn: int, text: str) -> int:
    """Where the text of message `turn` begins in `text`, the rendered conversation: after the generation prompt."""
    if turn == 0:
        raise ValueError("a conversation begins with the assistant: put a user or system message before it.")
    before = show(messages[:turn], prompt=True)
    if text.startswith(before):
        return len(before)
    why = "earlier turns are rendered differently once later turns follow"
    if text.startswith(show(messages[:turn])):
        why = "a finished turn does not begin with the generation prompt"
    raise ValueError(
        f"in the chat template {why}, so the assistant's tokens cannot be located: give a --chat_template with "
        "{% generation %} markers, or train on everything with --assistant_only_loss false."
    )


def _end_of_words(content: str, answer: str) -> int:
    """Where `content` ends in `answer`, its rendering; the template may have put spaces around `<think>` blocks."""
    at = 0
    for part in re.split("</?think>", content):
        found = answer.find(part.strip(), at)
        if found < 0:
            raise ValueError(
                f"the chat template leaves out a part of the assistant's message ({part.strip()[:40]!r}): give a "
                "--chat_template that keeps it."
            )
        at = found + len(part.strip())
    return at


def fit(example: Example, config: SFTConfig) -> tuple[Example, int]:
    """Cut the example to max_length; returns it with its outcome."""
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
    """A row as it is stored in the cache: input_ids, loss_mask, length and outcome."""
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
    """The options that decide which tokens of a row are kept and trained."""
    names = ("max_length", "truncation_mode", "assistant_only_loss", "completion_only_loss", "dataset_text_field")
    return {name: getattr(config, name) for name in (*names, "chat_template_kwargs")}


@dataclass(frozen=True)
class Examples:
    """The rows with at least one trained token, memory-mapped."""

    rows: Dataset  # columns input_ids, loss_mask
    lengths: np.ndarray  # [rows] in tokens
    counts: dict[str, int]  # rows that were cut or left out, by reason

    def __str__(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in self.counts.items())


def supervised_examples(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], config: SFTConfig
) -> Examples:
    """Tokenise all rows. A collective: the first rank tokenises with several processes, and the other ranks read its
    result from the cache of `datasets`.

    Raises:
        ValueError: the columns fit no known form, a row does not fit its form, or no row is left.
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

    def first() -> None:
        if processes > 1:
            print(f"tokenising {len(rows)} rows, if they are not in the cache of datasets", flush=True)
        tokenise()

    on_first_rank(first, patient=True)
    examples = tokenise().with_format("numpy")
    outcomes, lengths = (examples.data.column(name).to_numpy() for name in ("outcome", "length"))
    counts = {
        name: int((outcomes == code).sum())
        for name, code in (("cut", CUT), ("too long", TOO_LONG), ("without trained tokens", NOTHING))
    }
    kept = np.flatnonzero(outcomes <= CUT)
    if len(kept) == 0:
        raise ValueError(
            f"none of the {len(rows)} rows has a trained token within max_length {config.max_length} "
            f"({counts['too long']} are too long, {counts['without trained tokens']} have no text of the assistant "
            "there): raise --max_length, or check the data."
        )
    return Examples(examples if len(kept) == len(rows) else examples.select(kept), lengths[kept], counts)
