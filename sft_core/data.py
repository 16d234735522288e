"""Rows from the Hub or local files, a data order that can be resumed, and token ids with loss masks from conversations.

Left out on purpose: streaming, caching of tokenised rows.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sft_core.config import ScriptArguments

FILES = (".json", ".jsonl", ".parquet")


def load_splits(arguments: ScriptArguments, test: bool) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those to evaluate on where `test` asks for them.

    Raises:
        ValueError: nothing is there, or no such split, or no rows to evaluate on; the message names the remedy.
    """
    if arguments.dataset_mixture is not None:
        return _mix(arguments.dataset_mixture, test)
    train = load_rows(arguments.dataset_name, arguments.dataset_config, arguments.dataset_train_split)
    if not test:
        return train, None
    name = arguments.dataset_test_split
    if Path(name).suffix in FILES:
        return train, load_rows(name, None, name)
    if Path(arguments.dataset_name).suffix in FILES:
        raise ValueError(
            f"evaluation needs a test split, and {arguments.dataset_name} is one file: name another with "
            "--dataset_test_split FILE, or leave out do_eval and eval_strategy."
        )
    return train, load_rows(arguments.dataset_name, arguments.dataset_config, name)


def _mix(mixture: dict[str, Any], test: bool) -> tuple[Dataset, Dataset | None]:
    """open-r1's mixture: a share of each set's shuffled rows, put together and shuffled, and a test split of them."""
    if not mixture.get("datasets") or set(mixture) - {"datasets", "seed", "test_split_size"}:
        raise ValueError(f"dataset_mixture takes a list `datasets`, `seed` and `test_split_size`; got {mixture}.")
    seed = mixture.get("seed", 0)
    parts: list[Dataset] = []
    for entry in mixture["datasets"]:
        if not entry.get("id") or set(entry) - {"id", "config", "split", "columns", "weight"}:
            raise ValueError(f"a set of dataset_mixture takes id, config, split, columns and weight; got {entry}.")
        rows = load_rows(entry["id"], entry.get("config"), entry.get("split", "train"))
        if columns := entry.get("columns"):
            if missing := set(columns) - set(rows.column_names):
                raise ValueError(f"{entry['id']} has no columns {sorted(missing)}; it has {rows.column_names}.")
            rows = rows.select_columns(columns)
        weight = entry.get("weight", 1.0)
        if not 0 < weight <= 1:
            raise ValueError(f"weight {weight} of {entry['id']} is a share of its rows: above 0 and at most 1.")
        parts.append(rows.shuffle(seed=seed).select(range(int(len(rows) * weight))))
        if set(rows.column_names) != set(parts[0].column_names):
            raise ValueError(
                f"the sets of a mixture must have the same columns: {entry['id']} has {sorted(rows.column_names)}, "
                f"the first has {sorted(parts[0].column_names)}; choose them with `columns`."
            )
    try:
        mixed = concatenate_datasets(parts).shuffle(seed=seed)
    except ValueError as error:
        raise ValueError(f"the sets of the mixture hold different types: {' '.join(str(error).split())}") from error
    if size := mixture.get("test_split_size"):
        split = mixed.train_test_split(test_size=size, seed=seed)
        return split["train"], split["test"] if test else None
    if test:
        raise ValueError("evaluation needs a test split: give the mixture a test_split_size.")
    return mixed, None


def load_rows(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """The rows of `split`. A local file or an undivided saved data set is one split, whatever its name.

    Raises:
        ValueError: nothing is there, or no such split; the message says what there is.
    """
    path = Path(name).expanduser()
    if path.suffix in FILES:
        if not path.is_file():
            raise ValueError(f"there is no data file at {name}: check --dataset_name and --dataset_test_split.")
        try:
            rows = load_dataset(path.suffix[1:].replace("jsonl", "json"), data_files=str(path), split="train")
        except (DatasetGenerationError, StopIteration, ValueError) as error:
            cause = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{name} cannot be read as {path.suffix}: {cause[:200]} (one row a line).") from error
        if len(rows) == 0:
            raise ValueError(f"{name} has no rows.")
        return rows
    if path.is_dir() and (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        data = load_from_disk(str(path))
    elif name.startswith((".", "/", "~")) and not path.is_dir():
        raise ValueError(f"there is no data set at {name}: check --dataset_name.")
    else:
        try:
            data = load_dataset(name, config)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no data set {name!r} to be had: it is neither a .json, .jsonl or .parquet file, a saved set, nor "
                f"a Hub id that can be reached from here (check --dataset_name). Cause: {str(error).splitlines()[0]}"
            ) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ValueError(f"{name} has no split {split!r}: it has {', '.join(data)}.")
        data = data[split]
    return data


def fingerprint(rows: Dataset) -> str:
    """Identity of a data set: its columns, its size and up to 1,000 rows spread over it."""
    step = max(1, len(rows) // 1000)
    sample = rows.select(range(0, len(rows), step))
    text = json.dumps([rows.column_names, len(rows), sample.to_list()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_order(num_rows: int, seed: int, start: int, count: int) -> list[int]:
    """Rows `start` to `start + count` of the endless sequence of shuffles, one an epoch: `start` is all of its state.

    >>> row_order(3, seed=0, start=0, count=5)[:4] == row_order(3, seed=0, start=0, count=4)
    True
    """
    order: list[int] = []
    for epoch in range(start // num_rows, (start + count - 1) // num_rows + 1):
        generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
        order += torch.randperm(num_rows, generator=generator).tolist()
    skip = start % num_rows
    return order[skip : skip + count]


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins."""
    require_chat_template(tokenizer)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: start from an instruct model, or give one with --chat_template."
        )


def supervised_example(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], stop_ids: frozenset[int]
) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask of one row: `messages`, or `prompt` and `completion` (texts or conversations).

    Only what the assistant says is trained (with prompt and completion: only the completion), up to and including the
    token that ends its turn. A conversation is cut where generation would start and each part is tokenised by itself,
    so the ids are the ones that sampling from the same prompt meets.

    Raises:
        ValueError: the template's rendering of a turn does not continue that of the turns before it, or does not end
            the assistant's turn with a stop token.
    """
    if isinstance(row.get("completion"), str):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)
    require_chat_template(tokenizer)
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    first_trained = 0 if "messages" in row else len(row["prompt"])
    ids: list[int] = []
    mask: list[bool] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < first_trained:
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError(
                "the chat template rewrites earlier turns when a later one is added, so the assistant's tokens cannot "
                "be told apart: use a template that only appends."
            )
        context = tokenizer(before[len(done) :], add_special_tokens=False)["input_ids"]
        answer = tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]
        ends = [t for t, token in enumerate(answer) if token in stop_ids]
        if not ends:
            raise ValueError(
                "the chat template does not end the assistant's turn with a stop token, so the model would never learn "
                f"to stop: set eos_token to the template's end of turn (stop ids are {sorted(stop_ids)})."
            )
        ids += context + answer
        mask += [False] * len(context) + [t <= ends[-1] for t in range(len(answer))]
        done = after
    return ids, mask


def supervised_examples(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], max_length: int
) -> tuple[list[tuple[list[int], list[bool]]], int]:
    """Token ids and loss masks of all rows, cut to their first `max_length` tokens, and how many rows were dropped.

    A row in which nothing is left to learn is dropped.

    Raises:
        ValueError: the columns fit no form that is known, or no row is left.
    """
    columns = rows.column_names
    if "messages" not in columns and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"the data needs a column `messages`, or `prompt` and `completion`; it has {', '.join(columns)}."
        )
    examples = []
    for row in tqdm(rows, desc="tokenise", disable=None, leave=False):
        ids, mask = supervised_example(tokenizer, row, stop_ids)
        ids, mask = ids[:max_length], mask[:max_length]
        if any(mask[1:]):
            examples.append((ids, mask))
    if not examples:
        raise ValueError(
            f"none of the {len(rows)} rows has anything to learn within max_length {max_length}: raise it."
        )
    return examples, len(rows) - len(examples)
