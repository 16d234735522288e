"""Resumable output folders: a command writes its results file by file, and the same command resumes after a kill.

`eval.run`, `eval.pass_rate`, `eval.decontaminate` and `gen.generate` split their records into batches and write one
file per batch. Each file is written under a temporary name and renamed, so a file that exists is complete; there is no
other state. `settings.json` records what the results depend on; a folder with other settings is refused.
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
    path: Path  # file of its results
    rows: range  # positions of its records in the data set


def open_folder(folder: str | Path, settings: dict[str, Any], files: str, option: str = "--output_dir") -> None:
    """Lock the folder, write settings.json, and remove temporary files that a killed run left.

    files: glob pattern of the result files.

    Raises:
        ValueError: another run has locked the folder, or its results have other settings.
    """
    folder = Path(folder)
    distributed.lock_output_dir(folder)
    used = (folder / "settings.json").exists() or any(folder.glob(files))
    keep_settings(folder, settings, used, option)
    for pattern in (".*.*.tmp", str(Path(files).with_name(".*.*.tmp"))):  # deeper ones may belong to other runs
        for leftover in folder.glob(pattern):
            leftover.unlink()


def ranges(count: int, size: int) -> list[range]:
    """Split range(count) into ranges of length `size`; the last may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def batches_by_content(folder: Path, suffix: str, rows: Dataset, columns: list[str], size: int) -> list[Batch]:
    """Batches whose file names contain a hash of their rows' `columns`, so that other data get other files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i, chunk in enumerate(rows.select_columns(columns).with_format(None).iter(size)):
        name = f"{i:05}-{digest(chunk)}{suffix}"
        found.append(Batch(folder / name, range(i * size, i * size + len(chunk[columns[0]]))))
    return found


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], **options: Any) -> None:
    """Write these tables to one parquet file."""
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]
