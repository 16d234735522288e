"""The best checkpoint of a run by a metric of its evaluation: which it is, and its weights at the end.

Checkpoints alone are compared, so that the best is always there to be loaded: an evaluation between two is not. Each is
evaluated for that; the one that a signal asked for when the run goes on from it, if an evaluation was due there.
"""

import math
from pathlib import Path
from typing import Any

from sft_core.model.checkpoint import Trained, load_checkpoint
from sft_core.run.config import TrainingConfig
from sft_core.run.distributed import on_first_rank
from sft_core.run.output_dir import unreadable_reason


def compare_with_best(progress: Any, config: TrainingConfig, checkpoint: Path) -> None:
    """Note the `checkpoint` of the present step if it is the best yet. `progress`: `lifecycle.Progress`."""
    name = config.metric_for_best_model or ""
    value = progress.eval_metrics.get(name, math.nan) if progress.eval_step == progress.step else math.nan
    best = progress.best_metrics.get(name, -math.inf if config.greater_is_better else math.inf)
    if value > best if config.greater_is_better else value < best:  # never of NaN
        progress.best_checkpoint = str(checkpoint)
        progress.best_metrics = progress.eval_metrics


def load_best(progress: Any, config: TrainingConfig, trained: Trained) -> None:
    """The best checkpoint's weights and evaluation in place of the last ones, if there is one. A collective.

    Raises:
        RuntimeError: its files are not as they were written.
    """
    if not progress.best_checkpoint:
        return
    best = Path(progress.best_checkpoint)
    moved = Path(config.output_dir) / best.name  # with the whole folder
    best = moved if moved.is_dir() else best
    if reason := on_first_rank(lambda: unreadable_reason(best), patient=True):
        raise RuntimeError(
            f"the best checkpoint {best} cannot be loaded ({reason}): restore it, or give the same command without "
            "--load_best_model_at_end for the last one's model."
        )
    load_checkpoint(best, trained)
    progress.eval_metrics = progress.best_metrics
