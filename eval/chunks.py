"""A data set worked through in chunks, each finished one a file: what eval.decontaminate and eval.pass_rate share.

A folder belongs to one set of settings; what is in it is whole, and the same command goes on with what is missing.
Rows lie memory-mapped in the cache of `datasets`, and tables are written as they are made: memory does not grow with
the data.
"""

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from huggingface_hub import HfApi

from sft_core import guards
from sft_core.config import require
from sft_core.data import load_rows
from sft_core.files import flush_to_disk, write_atomically
from sft_core.hub import refusals_said

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


def chunks(folder: Path, suffix: str, rows: int, size: int) -> list[tuple[Path, range]]:
    """File and rows of every chunk."""
    return [(folder / f"{i:05}{suffix}", range(s, min(s + size, rows))) for i, s in enumerate(range(0, rows, size))]


def claim(output_dir: str, settings: dict[str, Any]) -> None:
    """Lock the folder and write down what its results depend on; refuse one whose results are of something else."""
    guards.lock_output_dir(output_dir)
    file = Path(output_dir) / "settings.json"
    theirs = json.loads(file.read_text()) if file.exists() else settings
    names = [name for name in theirs | settings if theirs.get(name) != settings.get(name)]
    changed = "; ".join(f"{name} ({theirs.get(name)}, now {settings.get(name)})" for name in names)
    require(not names, f"{output_dir} holds results of other settings: {changed}. Choose another --output_dir.")
    if not file.exists():
        write_atomically(file, json.dumps(settings))


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """A file of these tables, written aside and renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with pq.ParquetWriter(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))
    flush_to_disk(temporary)
    os.replace(temporary, path)
    flush_to_disk(path.parent)


def check_push(repo: str | None, private: bool) -> None:
    """Make sure, where a data set will be pushed, that it may be.

    Raises:
        ValueError: no Hub, no token, or one that may not write there.
    """
    if repo:
        api = HfApi()
        with refusals_said(api, "another name"):
            api.whoami()  # without a token creating would say 401, which reads like a wrong one
            api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)


def push(file: Path, repo: str | None, private: bool, config_name: str = "default") -> None:
    """The file as the data set `repo` on the Hub; a failure ends the process with 1, and the file stays."""
    if not repo:
        return
    if pq.read_metadata(file).num_rows == 0:
        return print(f"{file} has no rows and was not pushed.", file=sys.stderr)
    try:
        Dataset.from_parquet(str(file)).push_to_hub(repo, config_name=config_name, private=private or None)
    except Exception as error:  # whatever it is, the work is done and the command may be given again
        cause = " ".join(str(error).split())[:300]
        print(f"error: the Hub did not take {file}: {cause}. The same command tries again.", file=sys.stderr)
        raise SystemExit(1) from None
