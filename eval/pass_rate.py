r"""Measure each problem's pass rate, and select the problems that are neither too easy nor too hard to learn from.

    python -m eval.pass_rate --model M --dataset D --output_dir O [--num_generations 4 --field value ...]
    python -m eval.pass_rate --generations_column generation --dataset D --output_dir O

The first command samples answers like eval.run, with its options, batches and processes. The second checks the answers
in a column of the data set (one text or list per row, as gen.generate writes them). The verdicts are those of the
accuracy reward (`eval.verify.check_answer`), computed in workers that can be killed. It writes these files to O; the
same command resumes with the missing batches, and only filters again if the range has changed:

    scored.parquet      the rows with `correct` (one bool per generation, null if the check was given up), `pass_rate`
                        (the mean of the non-null ones; null if there are none), and the `generation`s sampled here
    filtered.parquet    the rows with pass_rate_min < pass_rate < pass_rate_max, both strict as in open-r1
    report.json         the printed numbers and histogram
    details/pass_rate/  one row per sample, one file per batch

If a gold answer cannot be parsed, all verdicts of its row are null. Such rows are counted, but are not in the filtered
set. If many generations have no answer, ask for one that the checker reads, for example with
--system_prompt 'Put your final answer within \boxed{}.'

Not supported, on purpose: rewards other than right or wrong (open-r1 averages its first reward function).
"""

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value

from eval.config import PassRateConfig
from eval.data import TEXT, TEXTS, load
from eval.folder import MISSING, Sample, Work, all_answered, fill, has_verdicts, task_folder
from eval.report import read_rows
from eval.run import run
from eval.tasks import Doc, LightevalTaskConfig
from eval.verify import AnswerMetric
from gen.folder import Batch, batches_by_content, open_folder, write_tables
from kernels.tables import table
from sft_core.run.cli import parse
from sft_core.run.distributed import usage_errors
from sft_core.run.files import disk_errors, write_atomically
from sft_core.run.hub import check_dataset_push, push_dataset
from sft_core.run.options import require

NAME = "pass_rate"  # name of the task
CHUNK = 256  # rows per file if a column is checked


@disk_errors()
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with usage_errors():
        (config,) = parse((PassRateConfig,), argv)
        columns = {"solution_column": (config.solution_column, TEXT)}
        if config.generations_column:
            columns["generations_column"] = (config.generations_column, TEXTS)
        else:
            columns["prompt_column"] = (config.prompt_column, TEXT)
        rows = load(config.dataset_name, config.dataset_config, config.dataset_split, columns, config.limit)
        folder = Path(config.output_dir)
        if not config.shard:
            other = folder / "settings.json" if config.model else folder / "details" / NAME / "settings.json"
            require(not other.exists(), f"{folder} contains results of another kind: choose another --output_dir.")
            check_dataset_push(config.output_dataset_name, config.private)
    task = make_task(config)
    if config.generations_column:
        batches = check_column(config, task, rows)
    else:
        (work,) = run(config, argv, (task,), "eval.pass_rate")
        batches = work.batches
    if config.shard:
        return
    counts = Counter[str]()
    write_tables(folder / "scored.parquet", *scored(rows, batches, bool(config.model), counts))
    write_tables(folder / "filtered.parquet", *filtered(folder / "scored.parquet", config))
    report(config, counts)
    if config.model:
        all_answered([work])
    push_dataset(folder / "scored.parquet", config.output_dataset_name, config.private, "gen")
    between = f"filt-{config.pass_rate_min}-{config.pass_rate_max}"
    push_dataset(folder / "filtered.parquet", config.output_dataset_name, config.private, between)


def make_task(config: PassRateConfig) -> LightevalTaskConfig:
    """Describe the data set as a task of eval.run."""

    def ask(row: dict[str, Any], task_name: str | None = None) -> Doc:
        query = "" if config.generations_column else row[config.prompt_column] or ""
        return Doc(query=query, choices=[row[config.solution_column] or "no answer"], task_name=task_name)

    return LightevalTaskConfig(
        name=NAME,
        prompt_function=ask,
        hf_repo=config.dataset_name,
        hf_subset=config.dataset_config or "default",
        evaluation_splits=[config.dataset_split],
        metric=[AnswerMetric()],
    )


def check_column(config: PassRateConfig, task: LightevalTaskConfig, rows: Dataset) -> list[Batch]:
    """Check the generations in the rows. The files are like those of eval.run, but without the texts."""
    assert config.generations_column is not None
    columns = [config.solution_column, config.generations_column]
    with usage_errors():
        names = ("solution_column", "generations_column", "check_timeout")
        open_folder(config.output_dir, {name: getattr(config, name) for name in names}, f"details/{NAME}/*.parquet")
    batches = batches_by_content(task_folder(config.output_dir, task), ".parquet", rows, columns, CHUNK)
    work = Work(task, [], [], config.sampling(1), 0, batches)
    asked = rows.select_columns(columns)

    def samples_of(work: Work, batch: Batch) -> list[Sample]:
        samples = []
        for problem in batch.rows:
            row = asked[problem]
            found = row[config.generations_column]
            texts = [found] if isinstance(found, str) else found or []
            doc = task.prompt_function(row)
            for i, text in enumerate(texts):
                samples.append(Sample(doc, text, {"task": NAME, "problem": problem, "sample": i}))
        return samples

    fill(config, [(work, batch) for batch in batches if not has_verdicts(batch.path, config, task)], samples_of)
    return batches


def scored(
    rows: Dataset, batches: list[Batch], sampled: bool, counts: Counter[str]
) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """Schema and tables of the rows with their verdicts. Iterating over the tables fills `counts`."""
    new: dict[str, Any] = {"generation": List(Value("string"))} if sampled else {}
    new |= {"correct": List(Value("bool")), "pass_rate": Value("float64")}
    if old := [name for name in new if name in rows.column_names]:
        print(f"note: the output replaces these columns of the input: {', '.join(old)}.", file=sys.stderr)
    kept = rows.remove_columns(old).with_format("arrow")
    schema = Features(kept.features | new).arrow_schema

    def tables() -> Iterator[pa.Table]:
        for batch in batches:
            samples: dict[int, list[dict]] = defaultdict(list)
            for sample in read_rows([batch.path]):
                samples[sample["problem"]].append(sample)
            columns: dict[str, list] = {"generation": [], "correct": [], "pass_rate": []}
            for problem in batch.rows:
                group = samples[problem]
                scores = [sample["score"] for sample in group]
                sound = [score for score in scores if score is not None]
                columns["generation"].append([sample["completion"] for sample in group])
                columns["correct"].append([None if score is None else score > 0 for score in scores])
                columns["pass_rate"].append(sum(sound) / len(sound) if sound else None)
                count(group, sound)
            table = kept[batch.rows.start : batch.rows.stop]
            for name in new:
                table = table.append_column(name, pa.array(columns[name], schema.field(name).type))
            yield table

    def count(group: list[dict], sound: list[float]) -> None:
        errors = [sample["error"] for sample in group if sample["error"] is not None]
        missing = sum(error.startswith(MISSING) for error in errors)
        counts.update(
            rows=1,
            generations=len(group),
            correct=int(sum(sound)),
            without_an_answer=sum(sample["extracted"] == "" for sample in group),
            generations_missing=missing,
            checks_given_up=len(errors) - missing,
            rows_with_unparseable_gold=not sound and len(errors) < len(group),
            rows_without_generations=not group,
        )

    return schema, tables()


def filtered(file: Path, config: PassRateConfig) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """Schema and tables of the rows whose pass rate is strictly inside the range."""

    def tables() -> Iterator[pa.Table]:
        for batch in pq.ParquetFile(file).iter_batches(CHUNK):
            rate = batch.column("pass_rate")
            inside = pc.and_(pc.greater(rate, config.pass_rate_min), pc.less(rate, config.pass_rate_max))
            yield pa.Table.from_batches([batch.filter(inside)])  # rows with null are not inside

    return pq.read_schema(file), tables()


def report(config: PassRateConfig, counts: Counter[str]) -> None:
    """Write report.json and print its contents."""
    folder = Path(config.output_dir)
    column = pq.read_table(folder / "scored.parquet", columns=["pass_rate"])[0]
    rates = column.drop_null().to_pylist()
    numbers = dict(counts) | {"rows_with_pass_rate": len(rates)}
    numbers["mean_pass_rate"] = sum(rates) / max(1, len(rates))
    numbers["rows_in_filtered_set"] = pq.read_metadata(folder / "filtered.parquet").num_rows
    tenths = Counter(-1 if rate == 0 else math.floor(10 * rate + 1e-9) for rate in rates)
    names = {-1: "0"} | {i: f"{i / 10} to {(i + 1) / 10}" for i in range(10)} | {10: "1"}
    histogram = {name: tenths[i] for i, name in names.items()}
    options = {name: getattr(config, name) for name in ("pass_rate_min", "pass_rate_max", "dataset_name", "model")}
    write_atomically(folder / "report.json", json.dumps(options | numbers | {"histogram": histogram}, indent=1))
    most = max(1, *histogram.values())
    bars = [[name, count, "#" * math.ceil(50 * count / most)] for name, count in histogram.items()]
    print(table(["pass rate", "rows", ""], bars))
    for name, value in numbers.items():
        print(f"{name.replace('_', ' ')}: {round(value, 4)}")


if __name__ == "__main__":
    main()
