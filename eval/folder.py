"""A folder of samples: what they are of, which batches are whole, and whose verdicts they carry.

A batch of a task is one parquet file, written aside and renamed. Beside them lies `settings.json`, what the samples
depend on; samples of other settings are refused. Verdicts depend on more (the metric, the checker's version, its time
limit): a file says of which its own are, and where these have changed the same answers are checked again.
"""

import importlib.metadata
import inspect
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eval import report
from eval.config import NOT_IDENTITY, EvalConfig
from eval.metrics import gold_is_read, judge
from eval.tasks import Doc, LightevalTaskConfig
from eval.workers import Unscored, WorkerPool
from sft_core.run.config import require
from sft_core.run.files import keep_settings, whole_file

CHECKERS = ("math-verify", "latex2sympy2_extended", "sympy")


@dataclass(frozen=True)
class Work:
    """A task made ready: its questions, their prompts, and how long answers may be."""

    task: LightevalTaskConfig
    docs: list[Doc]
    prompts: list[Any]  # token ids, or conversations for a server
    max_tokens: int
    context: int  # tokens of a prompt with its answer
    folder: Path

    def batches(self, config: EvalConfig) -> list[tuple[Path, range]]:
        """File and problems of every batch."""
        size = max(1, config.batch_size // config.num_samples)
        starts = range(0, len(self.docs), size)
        return [(self.folder / f"{i:05}.parquet", range(i, min(i + size, len(self.docs)))) for i in starts]


def task_folder(output_dir: str, task: LightevalTaskConfig) -> Path:
    """Where the samples of a task lie: no two names share one."""
    return Path(output_dir) / "details" / task.name.replace(":", "~")


def remember(config: EvalConfig, works: list[Work]) -> None:
    """Write down what the samples in this folder depend on; refuse a folder whose samples are of something else."""
    weights = sorted(Path(config.model).glob("*.safetensors"))
    identity: dict[str, Any] = {k: v for k, v in asdict(config).items() if k not in NOT_IDENTITY}
    identity["engine"] = "server" if config.base_url else config.engine
    identity["weights"] = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights]
    for work in works:
        settings = identity | {"max_new_tokens": work.max_tokens, "version": work.task.version}
        settings["stop_sequence"] = work.task.stop_sequence or []
        settings["prompts"] = report.digest([work.prompts, [doc.get_golds() for doc in work.docs]])
        keep_settings(work.folder, settings, used=any(work.folder.glob("*.parquet")))


def verdicts_by(config: EvalConfig, task: LightevalTaskConfig) -> str:
    """A digest of all that a verdict depends on beside the text: the metric with the source it is from, the checker."""
    metric = task.metric[0]
    try:
        source = inspect.getsource(sys.modules[type(metric).__module__])
    except (OSError, TypeError):
        source = ""
    state = {name: getattr(value, "__qualname__", None) or str(value) for name, value in vars(metric).items()}
    versions = [importlib.metadata.version(name) for name in CHECKERS]
    return report.digest([type(metric).__qualname__, source, state, versions, config.check_timeout])


def checkers(config: EvalConfig) -> WorkerPool:
    return WorkerPool(min(8, os.cpu_count() or 1), timeout=config.check_timeout)


def check_golds(config: EvalConfig, works: list[Work]) -> None:
    """Say of new tasks how many answers their metric finds nothing in; refuse one in which it finds none at all."""
    fresh = [work for work in works if not any(path.exists() for path, _ in work.batches(config))]
    asked = [(work.task.metric[0], doc) for work in fresh for doc in work.docs]
    with checkers(config) as pool:
        found = iter(pool.map(gold_is_read, asked) if asked else [])
    for work in fresh:
        unread = [i for i, _ in enumerate(work.docs) if next(found) is not True]
        if unread:
            which = f"{len(unread)} of {len(work.docs)} right answers (the first of problem {unread[0]})"
            said = f"{work.task.name}: {which} hold nothing that its metric can compare with"
            require(len(unread) < len(work.docs), f"{said}: check the data's answers, or choose another metric.")
            print(f"{said}: those problems cannot be solved.", file=sys.stderr)


def refresh(config: EvalConfig, works: list[Work]) -> None:
    """Take away files that are not whole, and check again what was checked by something else."""
    stale = []
    for work in works:
        for path, problems in work.batches(config):
            if not path.exists():
                continue
            try:
                ids = pq.read_table(path, columns=["problem", "sample"]).to_pydict()
                whole = ids["problem"] == [p for p in problems for _ in range(config.num_samples)]
            except (OSError, pa.ArrowException, KeyError):
                whole = False
            if not whole:
                print(f"{path} is damaged: its problems are sampled again.", file=sys.stderr)
                path.unlink()
            elif (pq.read_schema(path).metadata or {}).get(b"verdicts") != verdicts_by(config, work.task).encode():
                stale.append((work, path))
    if stale:
        print(f"{len(stale)} batches were checked in another way: their answers are checked again.", file=sys.stderr)
        with checkers(config) as pool:
            for work, path in stale:
                rows = report.read_rows([path])
                check(work, rows, pool)
                write_rows(path, rows, verdicts_by(config, work.task))


def check(work: Work, rows: list[dict[str, Any]], pool: WorkerPool) -> None:
    """Add to each row `score` (None: the check was given up), `extracted` ("": no answer found) and `error`."""
    items = [(work.task.metric[0], work.docs[row["problem"]], row["completion"]) for row in rows]
    for row, verdict in zip(rows, pool.map(judge, items), strict=True):
        if isinstance(verdict, Unscored):
            verdict = {"score": None, "extracted": None, "error": f"{verdict.reason}: {verdict.error}"}
        row.update({"error": None} | verdict)


def write_rows(path: Path, rows: list[dict[str, Any]], verdicts: str = "") -> None:
    """`verdicts`: whose they are, by `verdicts_by`."""
    table = pa.Table.from_pylist(rows, schema=report.SCHEMA.with_metadata({"verdicts": verdicts}))
    with whole_file(path) as temporary:
        pq.write_table(table, temporary)
