"""Tracks the best checkpoint of a run by an evaluation metric, and loads its weights at the end.

Only checkpoints are compared, so the best weights can always be loaded; an evaluation between two checkpoints does not
count. Each checkpoint is evaluated for this. A checkpoint that a signal asked for is evaluated when the run resumes
from it, if an evaluation was due at that step.
"""

import math
from pathlib import Path
from typing import Any

from sft_core.model.checkpoint import Trained, load_checkpoint
from sft_core.run.config import TrainingConfig
from sft_core.run.distributed import on_first_rank
from sft_core.run.output_dir import unreadable_reason


def compare_with_best(progress: Any, config: TrainingConfig, checkpoint: Path) -> None:
    """Record the `checkpoint` of the current step if it is the best so far. `progress`: `lifecycle.Progress`."""
    name = config.metric_for_best_model or ""
    value = progress.eval_metrics.get(name, math.nan) if progress.eval_step == progress.step else math.nan
    best = progress.best_metrics.get(name, -math.inf if config.greater_is_better else math.inf)
    if value > best if config.greater_is_better else value < best:  # False for NaN
        progress.best_checkpoint = str(checkpoint)
        progress.best_metrics = progress.eval_metrics


def load_best(progress: Any, config: TrainingConfig, trained: Trained) -> None:
    """Replace the last weights and evaluation by the best checkpoint's, if there is one. A collective.

    Raises:
        RuntimeError: its files have changed since they were written.
    """
    if not progress.best_checkpoint:
        return
    best = Path(progress.best_checkpoint)
    moved = Path(config.output_dir) / best.name  # if the whole folder was moved
    best = moved if moved.is_dir() else best
    if reason := on_first_rank(lambda: unreadable_reason(best), patient=True):
        raise RuntimeError(
            f"the best checkpoint {best} cannot be loaded ({reason}): restore its files, or run the same command "
            "without --load_best_model_at_end to export the last checkpoint's model."
        )
    load_checkpoint(best, trained)
    progress.eval_metrics = progress.best_metrics
