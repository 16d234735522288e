"""Reads rows from the Hub or from local files, whole or streamed, and gives them a resumable order.

`sft_core/dataset.py` and `grpo_core/rollout.py` process the rows. `datasets` is imported inside the functions that read
rows, because the update and its benchmarks do not need it. Not supported, on purpose: other formats.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft_core.run.distributed import on_first_rank
from sft_core.run.files import check_writable
from sft_core.run.model_config import DatasetMixtureConfig, ScriptArguments
from sft_core.run.options import require

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)
FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")  # suffixes, in lower or upper case
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # the errors below are clearer


def load_splits(
    arguments: ScriptArguments, test: bool, streaming: bool = False
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """The rows to train on and, with `test`, those to evaluate on. `streaming`: stream the rows to train on.

    Raises:
        ValueError: the data, the split or rows to evaluate on do not exist; the message names the remedy.
    """
    if (mixture := arguments.mixture()) is not None:
        _warn_of_unused(arguments, "a mixture", "dataset_config", "dataset_train_split", "dataset_test_split")
        if streaming:
            raise ValueError("a mixture is shuffled as a whole and cannot be streamed: leave out --dataset_streaming.")
        return _mix(mixture, test)
    name, config, test_split = arguments.dataset_name, arguments.dataset_config, arguments.dataset_test_split
    if is_undivided(name):
        _warn_of_unused(arguments, name, "dataset_config", "dataset_train_split")
    train = load_rows(name, config, arguments.dataset_train_split, streaming=streaming)
    if not test:
        return train, None
    if is_data_file(test_split):
        return train, load_rows(test_split, option="--dataset_test_split")
    if is_undivided(name):
        raise ValueError(
            f"evaluation needs a test split, and {name} has no splits: name another file with "
            "--dataset_test_split FILE, or leave out do_eval and eval_strategy."
        )
    return train, load_rows(name, config, test_split, option="--dataset_test_split")


def is_data_file(name: str) -> bool:
    """Whether this is the name of a data file."""
    return name.lower().endswith(FILES)


def is_undivided(name: str) -> bool:
    """Whether the data has no splits: one file, or a saved `Dataset`."""
    return is_data_file(name) or (Path(name).expanduser() / "state.json").exists()


def _warn_of_unused(arguments: ScriptArguments, data: str, *options: str) -> None:
    for option in options:
        if (value := getattr(arguments, option)) not in (None, "train", "test"):  # the defaults
            logger.warning("--%s %s is not used: %s has no splits or configurations.", option, value, data)


def _mix(mixture: DatasetMixtureConfig, test: bool) -> tuple[Dataset, Dataset | None]:
    """open-r1's mixture: shuffle each set, take its share of rows, concatenate, shuffle, and split off test rows."""
    from datasets import concatenate_datasets

    parts: list[Dataset] = []
    for entry in mixture.sets():
        name, columns, weight = entry.id, entry.columns, entry.weight
        rows = load_rows(name, entry.config, entry.split, option="dataset_mixture")
        if columns:
            if missing := set(columns) - set(rows.column_names):
                raise ValueError(
                    f"{name} has no columns {sorted(missing)}; it has {rows.column_names}: correct `columns`."
                )
            rows = rows.select_columns(columns)
        count = int(len(rows) * weight)
        if count == 0:
            raise ValueError(f"weight {weight} of {name} leaves none of its {len(rows)} rows: raise the weight.")
        parts.append(rows.shuffle(seed=mixture.seed).select(range(count)))
        if set(rows.column_names) != set(parts[0].column_names):
            raise ValueError(
                f"the sets of a mixture must have the same columns: {name} has {sorted(rows.column_names)}, "
                f"the first has {sorted(parts[0].column_names)}; choose them with `columns`."
            )
    try:
        mixed = concatenate_datasets(parts).shuffle(seed=mixture.seed)
    except ValueError as error:
        raise ValueError(
            f"columns of the mixture differ in type: {' '.join(str(error).split())}; leave them out with `columns`."
        ) from error
    if size := mixture.test_split_size:
        split = mixed.train_test_split(test_size=size, seed=mixture.seed)
        return split["train"], split["test"] if test else None
    if test:
        raise ValueError(
            "evaluation needs a test split: give the mixture a test_split_size, or leave out do_eval and eval_strategy."
        )
    return mixed, None


def load_rows(
    name: str, config: str | None = None, split: str = "train", option: str = "--dataset_name", streaming: bool = False
) -> Any:
    """The rows of `split` as a Dataset. With `streaming` it is an IterableDataset, read as needed in the order of the
    files. For data without splits, `split` is ignored.

    `option`: the option that named the data, for messages.

    Raises:
        ValueError: the data or the split does not exist; the message lists the splits.
    """
    from datasets import config as library
    from datasets import load_dataset, load_from_disk

    path = Path(name).expanduser()
    saved = any((path / file).exists() for file in ("state.json", "dataset_dict.json"))
    if not saved:
        check_writable(library.HF_DATASETS_CACHE, "It is the cache of `datasets`: set HF_HOME to a folder of your own.")
    if is_data_file(name):
        data = _read_file(name, streaming, option)
    elif saved:
        try:
            data = load_from_disk(str(path)).with_format(None)  # a format may hide columns or turn values into arrays
        except IndexError as error:  # what `datasets` raises for a set without tables
            raise ValueError(f"{name} has no rows: check {option}.") from error
    elif path.is_file() or name.startswith((".", "/", "~")) and not path.is_dir():
        raise ValueError(f"there is no data set at {name} (a folder, or one of {', '.join(FILES)}): check {option}.")
    else:
        try:
            data = load_dataset(name, config, streaming=streaming)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot load data set {name!r}, which is neither a file ({', '.join(FILES)}), nor a saved set, nor "
                f"a Hub id that can be reached from here: check {option}. Cause: {str(error).splitlines()[0]}"
            ) from error
    if isinstance(data, dict):
        if split not in data:
            raise ValueError(f"{name} has no split {split!r}: it has {', '.join(data)}. Name one, or check {option}.")
        data = data[split]
    if streaming:
        return data.to_iterable_dataset() if hasattr(data, "to_iterable_dataset") else data
    if len(data) == 0:
        raise ValueError(f"{name} has no rows: check {option}.")
    return data


def _read_file(name: str, streaming: bool, option: str) -> Any:
    """The rows of a data file. If it cannot be read, ValueError names the first damaged line."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no data file at {name}: check {option}.")
    kind = "json" if _is_json(path) else "parquet"
    try:
        rows = load_dataset(kind, data_files=str(path), split="train", streaming=streaming)
        first_row(rows)  # a stream is first read here
    except (DatasetGenerationError, StopIteration, ValueError, EOFError, OSError) as error:
        cause = damaged_line(path) or " ".join(str(error.__cause__ or error).split())[:200] or "no rows"
        raise ValueError(f"{name} cannot be read as {kind}: {cause} (one row per line); correct the file.") from error
    if not streaming:
        columns = [column for column, feature in rows.features.items() if "Json" not in repr(feature)]
        fault = on_first_rank(lambda: damaged_line(path, columns), patient=True)
        require(fault is None, f"{name} cannot be read: {fault}; correct the file.")
    return rows


def _is_json(path: Path) -> bool:
    return path.name.lower().endswith(FILES[:4])


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def damaged_line(path: Path, columns: Sequence[str] | None = None) -> str | None:
    """Describe the first line of a JSON-lines file that is not a JSON object in UTF-8; None if there is none.

    `columns`: for a file that `datasets` has read, its columns of one type. A line with a value of another type there
    is damaged too: `datasets` takes the types from the first 10 MiB and converts later values, numbers to text or text
    to numbers. `datasets` also reads a file in another JSON form, for which the result is None.
    """
    if not _is_json(path):
        return None
    kinds: dict[str, str] = {}
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line) if line.strip() else {}
                    if not isinstance(row, dict):
                        raise ValueError(f"it is a {type(row).__name__}")
                except ValueError as error:
                    if columns is not None and not isinstance(error, UnicodeDecodeError):
                        return None
                    end = str(error) if line.endswith(b"\n") else "the file ends in the middle of it"
                    return f"line {number} is not a JSON object: {end}"
                for name in columns or ():
                    kind = kind_of(row.get(name))
                    if kind != "NoneType" and kinds.setdefault(name, kind) != kind:
                        return (
                            f"in line {number} `{name}` is {row[name]!r:.80}, above a {kinds[name]}, but a column has "
                            "one type"
                        )
    except (EOFError, OSError) as error:  # of a gzip file
        return str(error)
    return None


def kind_of(value: Any) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


def json_lines(name: str) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file as they are written; an empty list for a file in another form."""
    path = Path(name).expanduser()
    if not _is_json(path) or damaged_line(path) is not None:
        return []
    with _open(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def first_row(rows: Dataset | IterableDataset) -> dict[str, Any]:
    """The first row; a stream is not advanced.

    Raises:
        ValueError: there are no rows.
    """
    first = next(iter(rows.take(1)), None)
    if first is None:
        raise ValueError("the data has no rows: check --dataset_name.")
    return first


def without_format(rows: Any) -> Any:
    """The columns that the format of a data set selects (all, unless `set_format(columns=...)` was called), as Python
    values. A stream or None is returned as it is."""
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        return rows
    return rows.select_columns(rows.format["columns"]).with_format(None)


def fingerprint(rows: Dataset | IterableDataset) -> str:
    """A digest of a data set: its columns and every value of every row, in order (streamed: of the first 100 rows)."""
    from datasets import IterableDataset

    if isinstance(rows, IterableDataset):
        text = json.dumps(list(rows.take(100)), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    digest = hashlib.sha256(str(rows.features).encode())
    for table in rows.with_format("arrow").iter(1000):
        copy = table.take([*range(len(table))])  # drops other rows of the same buffers
        for batch in copy.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()[:16]


def row_order(num_rows: int, seed: int | None, start: int, count: int) -> list[int]:
    """Rows `start` to `start + count` of an endless sequence of shuffles, one per epoch; `start` is its whole state.
    Without a seed every epoch has the order of the rows.

    >>> row_order(3, seed=0, start=0, count=5)[:4] == row_order(3, seed=0, start=0, count=4)
    True
    """
    if seed is None:
        return [row % num_rows for row in range(start, start + count)]
    order: list[int] = []
    for epoch in range(start // num_rows, (start + count - 1) // num_rows + 1):
        generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
        order += torch.randperm(num_rows, generator=generator).tolist()
    skip = start % num_rows
    return order[skip : skip + count]
