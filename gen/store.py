"""The folder of a generation run: what is there, what is missing, and files that are whole or not there.

    settings.json              what the generations depend on; another run's folder is refused
    batches/000007-<hash>.parquet   the finished prompts of rows 7 * input_batch_size and on, named by a hash of them
    failed.jsonl               prompts that this run gave up: position, error, prompt; the same command asks them again
    train.parquet              the batches in order as one data set, made when a run ends

A batch that is cut short (failed prompts, Ctrl-C) holds the rows that are complete and says which; when more of them
are, the file is replaced. Nothing else is remembered, so whatever kills a run, the files say what there is to do.
Rows are read from the memory-mapped data set a batch at a time and written so: memory does not grow with their number.
What is held is the answers of open batches, at most as many batches as there are requests in flight.

A reasoning model's thoughts, which a server's parser has parted from the text, go before it again, in <think> tags.

The columns are distilabel's (TextGeneration, group_generations): the input's, `generation`, `distilabel_metadata` (to
each generation its raw output, raw input, token counts and, of ours, the finish reason) and `model_name`.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from gen.client import Answer
from gen.config import IDENTITY, GenerateConfig
from sft_core.data.conversation import text_of
from sft_core.data.rows import fingerprint, load_rows
from sft_core.run import distributed
from sft_core.run.config import require
from sft_core.run.files import keep_settings, whole_file

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
STATISTICS = pa.struct([("input_tokens", pa.int64()), ("output_tokens", pa.int64())])
METADATA = pa.list_(
    pa.struct(
        [
            ("raw_output_text_generation_0", pa.string()),
            ("raw_input_text_generation_0", MESSAGES),
            ("statistics_text_generation_0", STATISTICS),
            ("finish_reason_text_generation_0", pa.string()),
        ]
    )
)
ADDED = {"generation": pa.list_(pa.string()), "distilabel_metadata": METADATA, "model_name": pa.string()}
ROW_GROUP, GROUP_BYTES = 1024, 64 << 20  # rows, and bytes, of train.parquet that are in memory together


def open_rows(config: GenerateConfig) -> Dataset:
    return load_rows(config.hf_dataset, config.hf_dataset_config, config.hf_dataset_split, option="--hf-dataset")


@dataclass
class Batch:
    """Some neighbouring rows on their way: `rows` are places in the batch, `position` is a row's in the data set."""

    start: int
    path: Path
    table: pa.Table
    prompts: list[list[dict[str, str]] | str]  # a conversation, or why there is none
    kept: pa.Table | None  # complete rows of an earlier run
    kept_rows: list[int]
    answers: dict[int, list[Answer | None]] = field(default_factory=dict)  # of the others, by row and sample
    failed: dict[int, str] = field(default_factory=dict)
    left: int = 0  # requests that have not come to an end

    @property
    def done(self) -> list[int]:
        return [row for row, group in self.answers.items() if None not in group and row not in self.failed]


class Store:
    """Batches of `rows` in a folder. Raises ValueError for a template that does not fit them."""

    def __init__(self, config: GenerateConfig, rows: Dataset, weights: list[Any] | None = None) -> None:
        self.config, self.rows = config, rows.with_format("arrow")
        self.schema = self._schema(rows)
        self.render = _renderer(config, rows.features.arrow_schema)
        self.num_rows = min(len(rows), config.limit or len(rows))
        self.identity = {name: getattr(config, name) for name in IDENTITY}
        self.identity |= {"rows": fingerprint(rows), "weights": weights}
        self.digest = _digest(self.identity)
        self.folder = Path(config.output_dir or f"data/generated/{self.digest}")
        self.num_batches = -(-self.num_rows // config.input_batch_size)
        self.paths: dict[int, Path] = {}  # of the batches that were looked at

    def _schema(self, rows: Dataset) -> pa.Schema:
        """The output's columns; without the notes of `datasets`, which would describe the input's alone."""
        given = rows.features.arrow_schema.remove_metadata()
        schema = pa.schema([*(f for f in given if f.name not in ADDED), *(pa.field(*item) for item in ADDED.items())])
        try:
            pq.write_table(schema.empty_table(), pa.BufferOutputStream())
        except pa.ArrowNotImplementedError as error:
            raise ValueError(f"a column cannot be kept in a parquet file: {error}. Leave it out.") from error
        return schema

    def open(self) -> None:
        """Take the folder for this run. Raises ValueError if another has it, or has filled it with other things."""
        names = [name for name in ADDED if name in self.rows.column_names]
        if names:
            print(f"columns of these names are replaced: {', '.join(names)}.", file=sys.stderr)
        distributed.lock_output_dir(self.folder)
        keep_settings(self.folder, self.identity, (self.folder / "settings.json").exists(), option="--output-dir")
        (self.folder / "batches").mkdir(exist_ok=True)
        for leftover in [*self.folder.glob(".train.parquet.*.tmp"), *(self.folder / "batches").glob(".*.tmp")]:
            leftover.unlink()
        (self.folder / "failed.jsonl").unlink(missing_ok=True)  # all of them are asked again

    def close(self) -> None:
        """Let another run of this process have the folder."""
        distributed.unlock_output_dir(self.folder)

    def batch(self, index: int) -> Batch:
        """The batch with what is known of it: `answers` has a place for every sample that is missing."""
        size, n = self.config.input_batch_size, self.config.num_generations
        start = index * size
        table = self.rows[start : min(start + size, len(self.rows))]  # whole, whatever the limit: so is its name
        prompts = self.render(table)
        content = hashlib.sha256(table.combine_chunks().to_batches()[0].serialize()).hexdigest()
        path = self.folder / "batches" / f"{index:06}-{_digest([self.digest, index, prompts, content])}.parquet"
        self.paths[index] = path
        batch = Batch(start, path, table, prompts, None, [])
        if path.exists():
            batch.kept_rows = _rows_in(pq.read_schema(path), len(prompts))
        missing = set(range(min(len(prompts), self.num_rows - start))).difference(batch.kept_rows)
        if missing and batch.kept_rows:
            batch.kept = pq.read_table(path)
        batch.failed = {row: str(prompts[row]) for row in sorted(missing) if isinstance(prompts[row], str)}
        batch.answers = {row: [None] * n for row in sorted(missing.difference(batch.failed))}
        batch.left = n * len(batch.answers)
        return batch

    def write(self, batch: Batch) -> None:
        """Put the batch's complete rows where they stay, and note the failed ones."""
        if batch.done:
            table = self._table(batch, batch.done)
            rows = [*batch.kept_rows, *batch.done]
            if batch.kept is not None:
                table = pa.concat_tables([batch.kept.cast(self.schema), table])
            table = table.take(sorted(range(len(rows)), key=rows.__getitem__))
            whole = len(rows) == len(batch.prompts)
            note = None if whole else {"rows": json.dumps(sorted(rows))}
            with whole_file(batch.path) as temporary:
                pq.write_table(table.replace_schema_metadata(note), temporary, compression="zstd")
        if batch.failed:
            lines = [
                json.dumps(
                    {
                        "position": batch.start + row,
                        "error": error,
                        "prompt": None if isinstance(batch.prompts[row], str) else batch.prompts[row],
                    },
                    ensure_ascii=False,
                )
                + "\n"
                for row, error in sorted(batch.failed.items())
            ]
            with open(self.folder / "failed.jsonl", "a", encoding="utf-8") as file:
                file.write("".join(lines))

    def _table(self, batch: Batch, rows: list[int]) -> pa.Table:
        groups = [(batch.prompts[row], batch.answers[row]) for row in rows]
        metadata = [
            [
                {
                    "raw_output_text_generation_0": full_text(answer),
                    "raw_input_text_generation_0": prompt,
                    "statistics_text_generation_0": {
                        "input_tokens": answer.prompt_tokens,
                        "output_tokens": answer.tokens,
                    },
                    "finish_reason_text_generation_0": answer.finish_reason,
                }
                for answer in group
                if answer
            ]
            for prompt, group in groups
        ]
        added = {
            "generation": [[full_text(answer) for answer in group if answer] for _, group in groups],
            "distilabel_metadata": metadata,
            "model_name": [self.config.model] * len(rows),
        }
        table = batch.table.take(rows)
        columns = [
            pa.array(added[f.name], type=f.type) if f.name in ADDED else table.column(f.name).cast(f.type)
            for f in self.schema
        ]
        return pa.table(columns, schema=self.schema)

    def finish(self) -> dict[str, Any]:
        """Make train.parquet of the batches, a few in memory at a time; returns the figures of what is in it."""
        figures: dict[str, Any] = {"prompts": 0, "generations": 0, "input tokens": 0, "output tokens": 0}
        reasons: Counter[str] = Counter()
        path = self.folder / "train.parquet"
        with whole_file(path) as temporary, pq.ParquetWriter(temporary, self.schema, compression="zstd") as writer:
            waiting: list[pa.Table] = []
            for index in range(self.num_batches):
                file = self.paths.get(index) or self.batch(index).path
                if file.exists():
                    table = pq.read_table(file)
                    places = _rows_in(table.schema, len(table))
                    room = self.num_rows - index * self.config.input_batch_size
                    table = table.take([i for i, place in enumerate(places) if place < room])  # the limit was higher
                    waiting.append(table.replace_schema_metadata())
                    said = waiting[-1]["distilabel_metadata"].combine_chunks().flatten().flatten()
                    figures["prompts"] += len(waiting[-1])
                    figures["generations"] += len(said[0])
                    for name, counts in zip(("input tokens", "output tokens"), said[2].flatten(), strict=True):
                        figures[name] += sum(counts.to_pylist())
                    reasons.update(said[3].to_pylist())
                full = sum(map(len, waiting)) >= ROW_GROUP or sum(table.nbytes for table in waiting) >= GROUP_BYTES
                if full or (index == self.num_batches - 1 and waiting):
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
        return figures | {f"finish reason {reason or 'none'}": count for reason, count in sorted(reasons.items())}


def _rows_in(schema: pa.Schema, count: int) -> list[int]:
    """Which rows of its batch a file holds; all `count`, if it says nothing."""
    said = (schema.metadata or {}).get(b"rows")
    return json.loads(said) if said else list(range(count))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, default=str).encode()).hexdigest()[:16]


def full_text(answer: Answer) -> str:
    return f"<think>\n{answer.thought}\n</think>\n\n{answer.text}" if answer.thought else answer.text


def _renderer(config: GenerateConfig, schema: pa.Schema) -> Callable[[pa.Table], list[list[dict[str, str]] | str]]:
    """From rows to conversations (or why a row has none). Raises ValueError for a template that does not fit them."""
    columns = schema.names
    environment = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined)
    for name in schema.names:  # a column named like one of Jinja's own functions is the column
        environment.globals.pop(name, None)
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(config.prompt_template))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"--prompt-template is not valid Jinja: {error}.") from error
    template = environment.from_string(config.prompt_template)
    sources = {name: config.prompt_column if name == "instruction" else name for name in names}
    for name, column in sources.items():
        flag = "--prompt-column" if name == "instruction" else "--prompt-template"
        require(column in columns, f"{flag} names a column {column!r}, but the data has {', '.join(columns)}.")
        kind = str(schema.field(column).type)
        text = name != "instruction" or kind in ("string", "large_string", "null")
        require(text, f"column {column!r} holds {kind}: choose a column of texts with --prompt-column.")
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []

    def conversation(values: dict[str, Any]) -> list[dict[str, str]] | str:
        if values.get("instruction", "") is None:
            return f"no text in {config.prompt_column}"
        values = {name: "" if value is None else value for name, value in values.items()}
        try:
            text_of(values.get("instruction", ""), config.prompt_column)
            return [*system, {"role": "user", "content": template.render(values)}]
        except Exception as error:  # whatever a template's own expressions raise
            return f"no prompt can be made of it: {error}"

    def render(table: pa.Table) -> list[list[dict[str, str]] | str]:
        lists = {name: table.column(column).to_pylist() for name, column in sources.items()}
        return [conversation({name: values[i] for name, values in lists.items()}) for i in range(len(table))]

    return render
