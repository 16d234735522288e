"""A folder of results that a command fills file by file: it can be killed, and the same command goes on.

`eval.run`, `eval.pass_rate`, `eval.decontaminate` and `gen.generate` cut their records into batches. The results of a
batch are one file, which is written aside and renamed: it is whole or not there, and nothing else is remembered.
`settings.json` says what the results depend on; a folder of other settings is refused.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from sft_core.run import distributed
from sft_core.run.files import keep_settings, whole_file


class Batch(NamedTuple):
    path: Path  # of its results
    rows: range  # positions of its records in the data


def open_folder(folder: str | Path, settings: dict[str, Any], files: str, option: str = "--output_dir") -> None:
    """Lock the folder, write down what its results depend on, and remove what a killed run left half written.

    files: pattern of the files of results.

    Raises:
        ValueError: another run has the folder, or its results are of other settings.
    """
    folder = Path(folder)
    distributed.lock_output_dir(folder)
    used = (folder / "settings.json").exists() or any(folder.glob(files))
    keep_settings(folder, settings, used, option)
    for pattern in (".*.*.tmp", str(Path(files).with_name(".*.*.tmp"))):  # below lie folders of other runs, perhaps
        for leftover in folder.glob(pattern):
            leftover.unlink()


def ranges(count: int, size: int) -> list[range]:
    """0 to `count` in pieces of `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def batches_by_content(folder: Path, suffix: str, rows: Dataset, columns: list[str], size: int) -> list[Batch]:
    """Batches whose files are named by what their rows have in `columns`: other data are another file."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i, chunk in enumerate(rows.select_columns(columns).with_format(None).iter(size)):
        name = f"{i:05}-{digest(chunk)}{suffix}"
        found.append(Batch(folder / name, range(i * size, i * size + len(chunk[columns[0]]))))
    return found


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], **options: Any) -> None:
    """A parquet file of these tables."""
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]
