"""From rows to token ids with loss masks: conversations, prompt and completion, plain text; tokenised once and cached.

What is trained by default: in `messages` what the assistant says, with `prompt` and `completion` the completion, in
plain text everything; always with the token that ends it. Where the assistant speaks is read off the template's
generation markers, or found by comparing renderings turn by turn, row by row; a row where that is ambiguous is refused.
Left out on purpose: images, weights per message.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

import sft_core.chat
from sft_core.chat import encode, has_markers, render
from sft_core.config import SFTConfig
from sft_core.guards import on_first_rank

Example = tuple[list[int], list[bool]]  # token ids and loss mask, of one length
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
KEPT, CUT, TOO_LONG, NOTHING = range(4)  # what became of a row
ROWS_PER_PROCESS = 5_000  # fewer are not worth another process


def check_columns(columns: list[str], config: SFTConfig) -> None:
    """Raise ValueError where the columns fit no form that is known."""
    if not ({"messages", config.dataset_text_field} & set(columns) or {"prompt", "completion"} <= set(columns)):
        raise ValueError(
            f"the data needs a column `messages`, or `prompt` and `completion`, or `{config.dataset_text_field}` "
            f"(--dataset_text_field); it has {', '.join(columns)}."
        )


def needs_template(row: dict[str, Any]) -> bool:
    """Whether rows like this one are conversations."""
    return "messages" in row or isinstance(row.get("completion"), list)


def supervised_example(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], stop_ids: frozenset[int], config: SFTConfig
) -> Example:
    """Token ids and loss mask of one whole row.

    Raises:
        ValueError: the row has no text where it should, or what the assistant says cannot be told apart in it.
    """
    if "messages" in row:
        return _conversation(tokenizer, _checked(row["messages"], "messages"), 0, row.get("tools"), stop_ids, config)
    if "completion" in row and isinstance(row["completion"], list):
        given, answer = _checked(row["prompt"], "prompt"), _checked(row["completion"], "completion")
        trained_from = 0 if config.completion_only_loss is False else len(given)
        return _conversation(tokenizer, given + answer, trained_from, row.get("tools"), stop_ids, config)
    column = "completion" if "completion" in row else config.dataset_text_field
    prompt, text = row["prompt"] if column == "completion" else "", row[column]
    for name, value in (("prompt", prompt), (column, text)):
        if not isinstance(value, str):
            raise ValueError(f"`{name}` must be text and is {type(value).__name__}.")
    before = _beginning(tokenizer) + encode(tokenizer, prompt)
    ids = encode(tokenizer, text)
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    train_all = column != "completion" or config.completion_only_loss is False
    return before + ids, [train_all] * len(before) + [True] * len(ids)


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer puts before plain text, if it does."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _checked(messages: Any, column: str) -> list[dict[str, Any]]:
    """The messages without empty fields (which Arrow adds), once they are known to be messages."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"`{column}` must be a list of messages, and is {repr(messages)[:50] if messages else 'empty'}."
        )
    cleaned = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"`{column}` must hold messages with role and content; it holds {message!r}.")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r} in `{column}`: known are {', '.join(ROLES)}.")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"a message of the {role} in `{column}` is not text but {type(content).__name__}.")
        cleaned.append({key: value for key, value in message.items() if value is not None})
        cleaned[-1].setdefault("content", "")
    return cleaned


def _conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], trained_from: int, tools: Any,
    stop_ids: frozenset[int], config: SFTConfig,
) -> Example:  # fmt: skip
    """Ids and mask of a conversation; nothing before message `trained_from` is trained."""
    tools = json.loads(tools) if isinstance(tools, str) else tools or None
    if not config.assistant_only_loss:
        before = render(tokenizer, messages[:trained_from], tools, prompt=True) if trained_from else ""
        whole = render(tokenizer, messages, tools)
        _require_prefix(before, whole)
        given, ids = encode(tokenizer, before), encode(tokenizer, whole[len(before) :])
        return given + ids, [False] * len(given) + [True] * len(ids)
    spans_before = sum(message["role"] == "assistant" for message in messages[:trained_from])
    if has_markers(tokenizer):
        ids, spans = _marked_spans(tokenizer, messages, tools)
    else:
        ids, spans = _compared_spans(tokenizer, messages, tools)
    mask = [False] * len(ids)
    for start, end in spans[spans_before:]:
        while end < len(ids) and ids[end - 1] not in stop_ids and ids[end] in stop_ids:
            end += 1  # markers that leave out the end of the turn: a model must learn to stop
        ends = [t for t in range(start, end) if ids[t] in stop_ids]
        if not ends:
            raise ValueError(
                "the chat template does not end the assistant's turn with a stop token, so the model would never learn "
                f"to stop: set eos_token to the template's end of turn (stop ids are {sorted(stop_ids)})."
            )
        mask[start : ends[-1] + 1] = [True] * (ends[-1] + 1 - start)
    return ids, mask


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and begin and end of each assistant turn, by the template's generation markers."""
    encoded = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    edges = np.flatnonzero(np.diff([0, *encoded["assistant_masks"], 0])).tolist()
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    turns = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != turns:
        raise ValueError(
            f"the chat template marks {len(spans)} assistant turns of {turns}, so what is trained cannot be told: "
            "put {% generation %} around every assistant message, or leave the markers out."
        )
    return encoded["input_ids"], spans


def _compared_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """The same by rendering up to each assistant turn and beyond it.

    The text is cut where generation would start and each part tokenised by itself, so the ids are the ones that
    sampling from the same prompt meets.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], tools, prompt=True)
        after = render(tokenizer, messages[: i + 1], tools)
        _require_prefix(done, before)
        _require_prefix(before, after)
        if before == render(tokenizer, messages[:i], tools) and not after[len(before) :].startswith(message["content"]):
            raise ValueError(
                "the chat template has neither {% generation %} markers nor a generation prompt, so the assistant's "
                "words cannot be told from their heading: add one of them, or train all with "
                "--assistant_only_loss false."
            )
        ids += encode(tokenizer, before[len(done) :])
        answer = encode(tokenizer, after[len(before) :])
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
        done = after
    return ids, spans


def _require_prefix(before: str, after: str) -> None:
    if not after.startswith(before):
        raise ValueError(
            "the chat template rewrites earlier turns when a later one is added, so the assistant's tokens cannot "
            "be told apart: use a template that only appends."
        )


def fit(example: Example, config: SFTConfig) -> tuple[Example, int]:
    """The example within max_length, and what became of it."""
    ids, mask = example
    outcome = KEPT
    if len(ids) > config.max_length:
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
    return {"input_ids": np.array(ids, np.int32), "loss_mask": np.array(mask, bool), "length": len(ids),
            "outcome": outcome}  # fmt: skip


@dataclass(frozen=True)
class Examples:
    """Rows that teach something, memory-mapped."""

    rows: Dataset  # columns input_ids, loss_mask
    lengths: np.ndarray  # [rows] in tokens
    counts: dict[str, int]  # rows that were cut or left out, by reason


def supervised_examples(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], config: SFTConfig
) -> Examples:
    """All rows, tokenised. A collective: the first rank does it in parallel, the others read what it wrote into the
    cache of datasets.

    Raises:
        ValueError: the columns fit no form, a row is not as its form says, or no row is left.
    """
    check_columns(rows.column_names, config)
    code = [Path(module.__file__ or "").read_bytes() for module in (sft_core.chat, sys.modules[__name__])]
    options = (code, config.max_length, config.truncation_mode, config.assistant_only_loss, config.completion_only_loss,
               config.dataset_text_field, sorted(stop_ids), sorted(tokenizer.get_added_vocab()), tokenizer.eos_token_id,
               tokenizer.chat_template, tokenizer.backend_tokenizer.to_str(), rows._fingerprint)  # fmt: skip
    cores = min(16, len(os.sched_getaffinity(0)))
    processes = config.dataset_num_proc or max(1, min(cores, len(rows) // ROWS_PER_PROCESS))
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
    on_first_rank(lambda: len(tokenise()))
    examples = tokenise().with_format("numpy")
    outcomes, lengths = (examples.data.column(name).to_numpy() for name in ("outcome", "length"))
    counts = {name: int((outcomes == code).sum())
              for name, code in (("cut", CUT), ("too long", TOO_LONG), ("nothing to learn", NOTHING))}  # fmt: skip
    kept = np.flatnonzero(outcomes <= CUT)
    if len(kept) == 0:
        raise ValueError(
            f"none of the {len(rows)} rows has anything to learn within max_length {config.max_length} "
            f"({counts['too long']} are too long, {counts['nothing to learn']} have nothing to train): raise "
            "--max_length, or check the data's columns."
        )
    return Examples(examples if len(kept) == len(rows) else examples.select(kept), lengths[kept], counts)
