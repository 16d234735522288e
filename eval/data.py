"""Loading of rows: the questions of a benchmark, and the text columns that the data tools read."""

import re

from datasets import Dataset

from eval.tasks import Doc, LightevalTaskConfig, find_tasks
from sft_core.data.rows import load_rows
from sft_core.run.options import require

TEXT = re.compile(r"(large_)?string")
TEXTS = re.compile(r"(large_)?(string|list<\w+: (large_)?string>)")  # a text, or a list of texts


def load(
    name: str, config: str | None, split: str, columns: dict[str, tuple[str, re.Pattern]], limit: int | None = None
) -> Dataset:
    """Load the rows. Raises ValueError if they lack one of the `columns`: {flag: (column, TEXT or TEXTS)}."""
    rows = load_rows(name, config, split, option="--dataset")
    for flag, (column, wanted) in columns.items():
        there = f"it has {', '.join(rows.column_names)}"
        require(column in rows.column_names, f"{name} has no column {column!r}: {there}. Choose one with --{flag}.")
        kind = str(rows.features.arrow_schema.field(column).type)
        remedy = f"choose a text column with --{flag}"
        require(bool(wanted.fullmatch(kind)), f"column {column!r} of {name} has type {kind}: {remedy}.")
    return rows.select(range(min(len(rows), limit or len(rows))))


def places_of(tasks: list[LightevalTaskConfig], entries: list[str], option: str) -> dict[str, str]:
    """{task name: location of its rows}: from the `entries` (task=place) of `option`, else from the task."""
    places = {task.name: task.hf_repo for task in tasks}
    for entry in entries:
        name, _, place = entry.partition("=")
        require(bool(place), f"{option} takes task=file or task=Hub id, got {entry!r}.")
        places[find_tasks(name, tasks)[0].name] = place
    return places


def load_docs(task: LightevalTaskConfig, place: str, limit: int | None = None, option: str = "--dataset") -> list[Doc]:
    """The questions of a task from `place`, a Hub id or a local file, which `option` can name."""
    subset = None if task.hf_subset == "default" else task.hf_subset
    rows = load_rows(place, subset, task.evaluation_splits[0], option=f"{option} {task.name}=file")
    rows = rows.select(range(min(len(rows), limit or len(rows))))
    docs = []
    for i, row in enumerate(rows):
        try:
            doc = task.prompt_function(row, task.name)
            golds = doc.get_golds()
        except KeyError as error:
            columns = ", ".join(rows.column_names)
            remedy = "rename its columns, or write a custom task for it (--custom_tasks)"
            raise ValueError(
                f"{place} has no column {error} that {task.name} needs, only {columns}: {remedy}."
            ) from error
        except Exception as error:  # a custom task may raise anything
            said = f"task {task.name} fails on row {i + 1} of {place} ({type(error).__name__}: {error})"
            raise ValueError(f"{said}: correct the row or the task's prompt_function.") from error
        texts = [doc.query, *golds]
        sound = len(texts) > 1 and all(isinstance(text, str) and text.strip() for text in texts)
        require(sound, f"row {i + 1} of {place} has no problem or no right answer: remove it.")
        docs.append(doc)
    return docs
