"""A data set worked through in chunks, each finished one a file: what eval.decontaminate and eval.pass_rate share.

A folder belongs to one set of settings; what is in it is whole, and the same command goes on with what is missing.
Rows lie memory-mapped in the cache of `datasets`, and tables are written as they are made: memory does not grow with
the data.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from sft_core.data.rows import load_rows
from sft_core.run import distributed
from sft_core.run.config import require
from sft_core.run.files import keep_settings, whole_file

TEXT = re.compile(r"(large_)?string")
TEXTS = re.compile(r"(large_)?(string|list<\w+: (large_)?string>)")  # or a list of them


def load(
    name: str, config: str | None, split: str, columns: dict[str, tuple[str, re.Pattern]], limit: int | None = None
) -> Dataset:
    """The rows, once they are seen to have the columns that these flags name: {flag: (column, TEXT or TEXTS)}."""
    rows = load_rows(name, config, split, option="--dataset")
    for flag, (column, wanted) in columns.items():
        there = f"it has {', '.join(rows.column_names)}"
        require(column in rows.column_names, f"{name} has no column {column!r}: {there}. Choose one with --{flag}.")
        kind = str(rows.features.arrow_schema.field(column).type)
        remedy = f"choose a column of texts with --{flag}"
        require(bool(wanted.fullmatch(kind)), f"column {column!r} of {name} holds {kind}: {remedy}.")
    return rows.select(range(min(len(rows), limit or len(rows))))


def chunks(folder: Path, suffix: str, rows: Dataset, columns: list[str], size: int) -> list[tuple[Path, range]]:
    """File and rows of every chunk. A file is named by what its rows have in `columns`: other data, another file."""
    parts = []
    for i, chunk in enumerate(rows.select_columns(columns).with_format(None).iter(size)):
        count = len(chunk[columns[0]])
        name = f"{i:05}-{hashlib.sha256(json.dumps(chunk).encode()).hexdigest()[:16]}{suffix}"
        parts.append((folder / name, range(i * size, i * size + count)))
    return parts


def claim(output_dir: str, settings: dict[str, Any]) -> None:
    """Lock the folder and write down what its results depend on; refuse one whose results are of something else."""
    distributed.lock_output_dir(output_dir)
    folder = Path(output_dir)
    keep_settings(folder, settings, used=(folder / "settings.json").exists())


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """A file of these tables, written aside and renamed."""
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))
