"""Which checkpoint is the best, and that it still exists at the end."""

import math
from pathlib import Path

import pytest
import torch

from sft_core.best import compare_with_best
from sft_core.lifecycle import Progress
from sft_core.model.checkpoint import Record, Trained, save_checkpoint
from sft_core.run.config import TrainingConfig
from sft_core.run.distributed import init_distributed
from sft_core.run.output_dir import checkpoints
from tests.processes import run_ranks


def best_of(values, at=lambda step: step, **options):
    """The best checkpoint of a run that saves after every step, with the evaluations `values` at the steps `at`."""
    config = TrainingConfig("out", **options).frozen()
    progress = Progress()
    for step, value in enumerate(values, 1):
        progress.step, progress.eval_step = step, at(step)
        progress.eval_metrics = {} if value is None else {"eval_loss": value, "eval_reward": -value}
        compare_with_best(progress, config, Path(f"out/checkpoint-{step}"))
    return progress.best_checkpoint, progress.best_metrics


@pytest.mark.parametrize(
    ("values", "options", "best"),
    [
        ([2.0, 1.0, 3.0, 1.0], {"metric_for_best_model": "loss"}, 2),  # the first of two equal ones
        ([2.0, 1.0, 3.0], {"metric_for_best_model": "eval_loss", "greater_is_better": True}, 3),
        ([2.0, 1.0, 3.0], {"metric_for_best_model": "reward"}, 2),
        ([2.0, 1.0, 3.0], {"metric_for_best_model": "eval_reward", "greater_is_better": False}, 3),
        ([math.nan, None, 3.0, math.nan], {"metric_for_best_model": "loss"}, 3),
        ([math.nan, None], {"metric_for_best_model": "loss"}, 0),
        ([math.inf, 5.0], {"metric_for_best_model": "loss"}, 2),
        ([2.0, 1.0], {}, 0),
    ],
)
def test_the_best_is_by_the_metric_and_its_direction(values, options, best):
    folder, metrics = best_of(values, **options)
    assert folder == (f"out/checkpoint-{best}" if best else "")
    assert metrics == ({"eval_loss": values[best - 1], "eval_reward": -values[best - 1]} if best else {})


def test_a_checkpoint_that_was_not_evaluated_is_not_compared():
    assert best_of([3.0, 1.0, 2.0], lambda step: 3 if step == 3 else 0, metric_for_best_model="loss")[0][-1] == "3"


def save(folder, steps, limit, best):
    init_distributed(60)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    trained = Trained(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    for step in steps:
        save_checkpoint(folder, Record(step, {"best_checkpoint": best}, {}), trained, save_total_limit=limit)


@pytest.mark.parametrize(("limit", "kept"), [(1, [9, 100]), (2, [9, 100]), (3, [9, 11, 100]), (None, [9, 10, 11, 100])])
def test_save_total_limit_spares_the_best(tmp_path, limit, kept):
    """It counts like transformers: the best checkpoint is one of them, and is always kept with the newest."""
    run_ranks(1, save, tmp_path, [9, 10, 11, 100], limit, str(Path("elsewhere/checkpoint-9")))
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
