"""The output folder of a generation run: its files, and which batches are missing. A parquet file in it is complete.

    settings.json              what the generations depend on (gen/folder.py)
    batches/000007.parquet     complete answers to the rows from 7 * input_batch_size on, with the rows' positions
    failed.jsonl               prompts that failed in this run: position, error, prompt; the same command retries them
    train.parquet              rows and answers in order as one data set, written when a run ends

After an interruption (failed prompts, Ctrl-C) the file of a batch contains the rows that are complete, and the next run
replaces it. There is no other state, so the files alone determine what is missing.
Rows are read from the memory-mapped data set and written batch by batch, so memory use does not grow with their number.
Only the answers of open batches are in memory, and the number of open batches is at most that of requests in flight.

If a server's reasoning parser has separated a model's reasoning from the text, it is put back in <think> tags.

The columns are distilabel's (TextGeneration, group_generations): the input columns, `generation`, `distilabel_metadata`
(raw output, raw input and token counts of each generation, and additionally the finish reason) and `model_name`.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from gen.client import Answer
from gen.config import IDENTITY, GenerateConfig
from gen.folder import digest, open_folder, ranges, write_tables
from gen.sampler import weights_of
from sft_core.data.conversation import text_of
from sft_core.data.rows import fingerprint, load_rows
from sft_core.run import distributed
from sft_core.run.options import require

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
BATCH = pa.schema([("position", pa.int64()), *ADDED.items()])
FORMAT = 2  # version of the files in batches/
ROW_GROUP, GROUP_BYTES = 1024, 64 << 20  # a row group of train.parquet is written at this many rows or bytes


def open_rows(config: GenerateConfig) -> Dataset:
    return load_rows(config.hf_dataset, config.hf_dataset_config, config.hf_dataset_split, option="--hf-dataset")


@dataclass
class Batch:
    """Neighbouring rows whose answers are being generated. The keys are positions in the data set."""

    path: Path
    prompts: dict[int, list[dict[str, str]]]  # the conversations of the missing rows
    kept: int  # number of rows that an earlier run has finished
    failed: dict[int, str]  # why a row has no prompt or no answer
    answers: dict[int, list[Answer | None]]  # for each prompt, its samples
    left: int  # number of unfinished requests

    @property
    def done(self) -> list[int]:
        return [row for row, group in self.answers.items() if None not in group and row not in self.failed]


class Store:
    """Batches of `rows` in a folder. Raises ValueError if the prompt template does not fit the rows."""

    def __init__(self, config: GenerateConfig, rows: Dataset) -> None:
        self.config, self.rows = config, rows.with_format("arrow")
        self.schema = _schema(rows)
        self.render = _renderer(config, rows.features.arrow_schema)
        self.num_rows = min(len(rows), config.limit or len(rows))
        weights = None if config.engine == "server" else weights_of(config.model)
        self.identity = {"format": FORMAT, "rows": fingerprint(rows), "weights": weights}
        self.identity |= {name: getattr(config, name) for name in IDENTITY}
        self.digest = digest(self.identity)
        self.folder = Path(config.output_dir or f"data/generated/{self.digest}")
        self.batch_rows = ranges(self.num_rows, config.input_batch_size)

    def open(self) -> None:
        """Lock the folder. Raises ValueError if another run has locked it, or if its results have other settings."""
        names = [name for name in ADDED if name in self.rows.column_names]
        if names:
            print(f"note: the output replaces these columns of the input: {', '.join(names)}.", file=sys.stderr)
        open_folder(self.folder, self.identity, "batches/*.parquet", option="--output-dir")
        (self.folder / "batches").mkdir(exist_ok=True)
        (self.folder / "failed.jsonl").unlink(missing_ok=True)  # all of them are retried

    def close(self) -> None:
        """Unlock the folder, for another run in this process."""
        distributed.unlock_output_dir(self.folder)

    def path(self, index: int) -> Path:
        return self.folder / "batches" / f"{index:06}.parquet"

    def batch(self, index: int) -> Batch:
        """The batch with its missing prompts."""
        path, rows, n = self.path(index), self.batch_rows[index], self.config.num_generations
        done = pq.read_table(path, columns=["position"])["position"].to_pylist() if path.exists() else []
        kept = set(rows).intersection(done)
        prompts: dict[int, list[dict[str, str]]] = {}
        failed = {}
        for row, prompt in zip(rows, self.render(self.rows[rows.start : rows.stop]), strict=True):
            if row in kept:
                continue
            if isinstance(prompt, str):
                failed[row] = prompt
            else:
                prompts[row] = prompt
        answers: dict[int, list[Answer | None]] = {row: [None] * n for row in prompts}
        return Batch(path, prompts, len(kept), failed, answers, left=n * len(prompts))

    def write(self, batch: Batch) -> None:
        """Write the batch's complete rows to its file, and its failed rows to failed.jsonl."""
        if batch.done:
            records = [self._record(batch, row) for row in batch.done]
            tables = [pa.Table.from_pylist(records, schema=BATCH)]
            if batch.path.exists():
                there = pq.read_table(batch.path)
                is_new = pc.is_in(there["position"], pa.array(batch.done, there["position"].type))
                tables.append(there.filter(pc.invert(is_new)))
            write_tables(batch.path, BATCH, [pa.concat_tables(tables).sort_by("position")], compression="zstd")
        if batch.failed:
            lines = [
                {"position": row, "error": error, "prompt": batch.prompts.get(row)}
                for row, error in sorted(batch.failed.items())
            ]
            with open(self.folder / "failed.jsonl", "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _record(self, batch: Batch, row: int) -> dict[str, Any]:
        answers = [answer for answer in batch.answers[row] if answer]
        texts = [full_text(answer) for answer in answers]
        metadata = [
            {
                "raw_output_text_generation_0": text,
                "raw_input_text_generation_0": batch.prompts[row],
                "statistics_text_generation_0": {"input_tokens": answer.prompt_tokens, "output_tokens": answer.tokens},
                "finish_reason_text_generation_0": answer.finish_reason,
            }
            for text, answer in zip(texts, answers, strict=True)
        ]
        added = {"generation": texts, "distilabel_metadata": metadata, "model_name": self.config.model}
        return {"position": row} | added

    def finish(self) -> dict[str, Any]:
        """Write train.parquet from the batches. Returns counts of its contents."""
        numbers = Counter(dict.fromkeys(("prompts", "generations", "input tokens", "output tokens"), 0))
        reasons: Counter[str] = Counter()

        def tables() -> Iterator[pa.Table]:
            waiting: list[pa.Table] = []
            for index in range(len(self.batch_rows)):
                if self.path(index).exists():
                    table = self._finished(index)
                    waiting.append(table)
                    answers = pc.list_flatten(table["distilabel_metadata"])
                    numbers.update({"prompts": len(table), "generations": len(answers)})
                    for kind in ("input", "output"):
                        tokens = pc.struct_field(answers, ["statistics_text_generation_0", f"{kind}_tokens"])
                        numbers[f"{kind} tokens"] += pc.sum(tokens).as_py() or 0
                    reasons.update(pc.struct_field(answers, "finish_reason_text_generation_0").to_pylist())
                if sum(map(len, waiting)) >= ROW_GROUP or sum(table.nbytes for table in waiting) >= GROUP_BYTES:
                    yield pa.concat_tables(waiting)
                    waiting = []
            if waiting:
                yield pa.concat_tables(waiting)

        write_tables(self.folder / "train.parquet", self.schema, tables(), compression="zstd")
        return dict(numbers) | {f"finish reason {name or 'none'}": count for name, count in sorted(reasons.items())}

    def _finished(self, index: int) -> pa.Table:
        """The finished rows of a batch that are within the limit, with the added columns."""
        done = pq.read_table(self.path(index))
        done = done.filter(pc.less(done["position"], self.num_rows))
        rows = self.rows[done["position"].to_pylist()]
        columns = [(done if name in ADDED else rows)[name] for name in self.schema.names]
        return pa.table(columns, names=self.schema.names).cast(self.schema)


def _schema(rows: Dataset) -> pa.Schema:
    """The output's columns, without the metadata of `datasets`, which describes only the input's columns."""
    columns = rows.features.arrow_schema.remove_metadata()
    kept = [field for field in columns if field.name not in ADDED]
    schema = pa.schema([*kept, *(pa.field(*item) for item in ADDED.items())])
    try:
        pq.ParquetWriter(pa.BufferOutputStream(), schema).close()
    except pa.ArrowNotImplementedError as error:
        raise ValueError(f"a column of the data cannot be written to parquet ({error}): remove it.") from error
    return schema


def full_text(answer: Answer) -> str:
    """The model's full output: the thought in <think> tags, then the text. The tag is not closed if the thought was cut
    off, and the thought is not repeated if the text contains it."""
    thought, text = answer.thought.strip(), answer.text.strip()
    if not thought or (thought in text and "</think>" in text):
        return answer.text
    if text in ("", thought) and answer.finish_reason != "stop":
        return f"<think>\n{answer.thought}"
    return answer.text if text == thought else f"<think>\n{answer.thought}\n</think>\n\n{answer.text}"


def _renderer(config: GenerateConfig, schema: pa.Schema) -> Callable[[pa.Table], list[list[dict[str, str]] | str]]:
    """A function from rows to conversations, or to texts that say why a row has none.

    Raises ValueError if the prompt template does not fit the rows.
    """
    environment = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined)
    for name in schema.names:  # a column takes precedence over a Jinja function of the same name
        environment.globals.pop(name, None)
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(config.prompt_template))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"--prompt-template is not valid Jinja ({error}): correct it.") from error
    template = environment.from_string(config.prompt_template)
    columns = {name: config.prompt_column if name == "instruction" else name for name in names}
    for name, column in columns.items():
        flag = "--prompt-column" if name == "instruction" else "--prompt-template"
        there = ", ".join(schema.names)
        require(column in schema.names, f"{flag} names a column {column!r}, but the data has {there}: use one of them.")
        kind = str(schema.field(column).type)
        text = name != "instruction" or kind in ("string", "large_string", "null")
        require(text, f"column {column!r} has type {kind}: choose a text column with --prompt-column.")
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []

    def conversation(row: dict[str, Any]) -> list[dict[str, str]] | str:
        if "instruction" in columns and row[config.prompt_column] is None:
            return f"column {config.prompt_column!r} has no text"
        values = {name: "" if row[column] is None else row[column] for name, column in columns.items()}
        try:
            text_of(values.get("instruction", ""), config.prompt_column)
            return [*system, {"role": "user", "content": template.render(values)}]
        except Exception as error:  # anything that the template's expressions raise
            return f"--prompt-template cannot render it: {error}"

    return lambda table: [conversation(row) for row in table.select([*{*columns.values()}]).to_pylist()]
