"""The sample files of an evaluation: their settings, which batches are complete, and which checker gave the verdicts.

Each batch of a task is one parquet file (`gen/folder.py`). `settings.json` next to the files of a task records what the
samples depend on; samples with other settings are refused. Verdicts also depend on the metric, the checker's version
and its timeout. Each file stores a digest of these; if it has changed, the stored answers are checked again.
"""

import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from eval import report
from eval.config import NOT_IDENTITY, EvalConfig
from eval.metrics import gold_is_read, judge
from eval.tasks import Doc, LightevalTaskConfig
from eval.workers import Unscored, WorkerPool
from gen.config import TextSampling
from gen.folder import Batch, digest, write_tables
from gen.sampler import weights_of
from sft_core.run.files import keep_settings
from sft_core.run.options import require

CHECKERS = ("math-verify", "latex2sympy2_extended", "sympy")
RULES = ("verify.py", "notation.py")  # the project's own part of the checker
MISSING = "there is no text"  # starts the error of a sample without an answer


@dataclass(frozen=True)
class Work:
    """A prepared task: its questions, their prompts, the sampling options, and the files for its samples."""

    task: LightevalTaskConfig
    docs: list[Doc]
    prompts: list[Any]  # encoded by the sampler
    sampling: TextSampling
    context: int  # maximum tokens of a prompt plus its answer
    batches: list[Batch]

    @property
    def paths(self) -> list[Path]:
        return [batch.path for batch in self.batches]


class Sample(NamedTuple):
    doc: Doc
    text: str | None  # the text to check; None: no server answered
    row: dict[str, Any]  # the sample's row in the file


def task_folder(output_dir: str, task: LightevalTaskConfig) -> Path:
    """The folder of a task's sample files, different for each task name."""
    return Path(output_dir) / "details" / task.name.replace(":", "~")


def remember(config: EvalConfig, works: list[Work]) -> None:
    """Write settings.json for each task. Raises ValueError if the folder has samples with other settings."""
    identity: dict[str, Any] = {k: v for k, v in asdict(config).items() if k not in NOT_IDENTITY}
    identity["engine"] = "server" if config.base_url else config.engine
    identity["weights"] = weights_of(config.model)
    for work in works:
        settings = identity | {"max_new_tokens": work.sampling.max_tokens, "version": work.task.version}
        settings["stop_sequence"] = work.task.stop_sequence or []
        settings["prompts"] = digest([work.prompts, [doc.get_golds() for doc in work.docs]])
        folder = task_folder(config.output_dir, work.task)
        keep_settings(folder, settings, used=any(folder.glob("*.parquet")))


def verdicts_by(config: EvalConfig, task: LightevalTaskConfig) -> str:
    """A digest of what a verdict depends on besides the text: the metric, its source code, and the checker."""
    metric = task.metric[0]
    try:
        source = inspect.getsource(sys.modules[type(metric).__module__])
    except (OSError, TypeError):
        source = ""
    state = {name: getattr(value, "__qualname__", None) or str(value) for name, value in vars(metric).items()}
    versions = [importlib.metadata.version(name) for name in CHECKERS]
    rules = [Path(__file__).with_name(name).read_text() for name in RULES]
    return digest([type(metric).__qualname__, source, state, versions, rules, config.check_timeout])


def has_verdicts(path: Path, config: EvalConfig, task: LightevalTaskConfig) -> bool:
    """Whether the file exists and its verdicts are those of the current checker."""
    wanted = verdicts_by(config, task).encode()
    return path.exists() and (pq.read_schema(path).metadata or {}).get(b"verdicts") == wanted


def checkers(config: EvalConfig) -> WorkerPool:
    return WorkerPool(min(8, os.cpu_count() or 1), timeout=config.check_timeout)


def check_golds(config: EvalConfig, works: list[Work]) -> None:
    """For new tasks, print how many right answers their metric cannot read. Raises ValueError if it can read none."""
    fresh = [work for work in works if not any(path.exists() for path in work.paths)]
    asked = [(work.task.metric[0], doc) for work in fresh for doc in work.docs]
    with checkers(config) as pool:
        found = iter(pool.map(gold_is_read, asked) if asked else [])
    for work in fresh:
        unread = [i for i, _ in enumerate(work.docs) if next(found) is not True]
        if unread:
            which = f"{len(unread)} of {len(work.docs)} right answers (the first of problem {unread[0]})"
            said = f"{work.task.name}: {which} contain nothing that its metric can compare with"
            require(len(unread) < len(work.docs), f"{said}: check the data's answers, or choose another metric.")
            print(f"warning: {said}: these problems cannot be solved.", file=sys.stderr)


def refresh(config: EvalConfig, works: list[Work]) -> None:
    """Delete damaged files, and check answers again if another checker gave their verdicts."""
    stale = []
    for work in works:
        for batch in work.batches:
            if not batch.path.exists():
                continue
            try:
                ids = pq.read_table(batch.path, columns=["problem", "sample"]).to_pydict()
                whole = ids["problem"] == [p for p in batch.rows for _ in range(config.num_samples)]
            except (OSError, pa.ArrowException, KeyError):
                whole = False
            if not whole:
                print(f"warning: {batch.path} is damaged: its problems are sampled again.", file=sys.stderr)
                batch.path.unlink()
                continue
            if not has_verdicts(batch.path, config, work.task):
                stale.append((work, batch))
    if stale:
        print(f"note: the checker has changed: {len(stale)} batches are checked again.", file=sys.stderr)
        fill(config, stale, old_samples)


def old_samples(work: Work, batch: Batch) -> list[Sample]:
    rows = report.read_rows([batch.path])
    return [Sample(work.docs[row["problem"]], row["completion"], row) for row in rows]


def unanswered(paths: list[Path]) -> list[dict[str, Any]]:
    """The samples in these files that no server has answered; they have no finish reason."""
    rows = report.read_rows(paths, ["task", "problem", "sample", "finish_reason", "error"])
    return [row for row in rows if row["finish_reason"] is None]


def all_answered(works: list[Work]) -> None:
    """Exit with code 1 if samples have no answer. The answered samples of their batches are kept."""
    if lost := unanswered([path for work in works for path in work.paths]):
        first = "{task}, problem {problem}, sample {sample}: {error}".format(**lost[0])
        raise SystemExit(
            f"error: {len(lost)} samples got no answer: run the same command to retry only them. The first is {first}"
        )


def fill(
    config: EvalConfig,
    batches: list[tuple[Work, Batch]],
    samples_of: Callable[[Work, Batch], list[Sample] | None],
    shown: bool = True,
) -> None:
    """Check the samples of each batch and write its file. `samples_of` returns None if another rank does that."""
    total = sum(len(batch.rows) for _, batch in batches)
    scores: list[float] = []
    with (
        tqdm(total=total, desc="evaluate", unit="problem", disable=None if shown else True) as bar,
        checkers(config) as pool,
    ):
        for work, batch in batches:
            samples = samples_of(work, batch)
            if samples is not None:
                check(work.task, samples, pool)
                write_rows(batch.path, [sample.row for sample in samples], verdicts_by(config, work.task))
                scores += [sample.row["score"] or 0.0 for sample in samples]
                bar.set_postfix_str(f"{work.task.name} {100 * sum(scores) / max(1, len(scores)):.1f} %")
            bar.update(len(batch.rows))


def check(task: LightevalTaskConfig, samples: list[Sample], pool: WorkerPool) -> None:
    """Add `score` (None: no verdict), `extracted` ("": no answer found) and `error` to each row."""
    there = [sample for sample in samples if sample.text is not None]
    verdicts = pool.map(judge, [(task.metric[0], sample.doc, sample.text) for sample in there])
    for sample in samples:
        sample.row.update({"score": None, "extracted": None, "error": sample.row.get("error") or MISSING})
    for sample, verdict in zip(there, verdicts, strict=True):
        if isinstance(verdict, Unscored):
            sample.row["error"] = f"{verdict.reason}: {verdict.error}"
        else:
            sample.row.update({"error": None} | verdict)


def write_rows(path: Path, rows: list[dict[str, Any]], verdicts: str = "") -> None:
    """Write a file of samples. `verdicts` is the digest of `verdicts_by`."""
    schema = report.SCHEMA.with_metadata({"verdicts": verdicts})
    write_tables(path, schema, [pa.Table.from_pylist(rows, schema=schema)])
