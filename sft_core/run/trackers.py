"""The trackers of `report_to` other than TensorBoard, through transformers' integrations.

transformers' callbacks are called as its Trainer calls them, with the run's options as arguments, so metrics have the
same names as with TRL (`train/reward` in wandb). Trackers are configured by their own environment variables
(MLFLOW_TRACKING_URI, SWANLAB_MODE, ...). After a resume, wandb continues its earlier run; other trackers do so only if
their variables name it. Not supported, on purpose: uploading checkpoints, and watching the model.
"""

import importlib
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from sft_core.run.files import write_atomically
from sft_core.run.logging import OWN, init_wandb_training

# Module and function that end a tracker's run, and their argument after success (None: the callback ends it) or failure
END = {
    "mlflow": ("mlflow", "end_run", None, "FAILED"),
    "dagshub": ("mlflow", "end_run", None, "FAILED"),
    "wandb": ("wandb", "finish", 0, 1),
    "swanlab": ("swanlab", "finish", "success", "crashed"),
}


def named(report_to: Sequence[str]) -> list[str]:
    """The trackers to report to, with `all` expanded.

    Raises:
        ValueError: transformers does not know the tracker, or its package is not installed.
    """
    names = get_available_reporting_integrations() if "all" in report_to else list(report_to)
    try:
        _callbacks(names)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(
            f"report_to {' '.join(names)} cannot be used ({error}): install its package, or leave it out."
        ) from error
    return names


def _callbacks(names: Sequence[str]) -> list[Any]:
    return [kind() for kind in get_reporting_integration_callbacks([name for name in names if name not in OWN])]


class Trackers:
    """The trackers `names` of a run. On the first rank only."""

    def __init__(
        self, names: Sequence[str], folder: Path, options: Mapping[str, Any], step: int, total_steps: int
    ) -> None:
        self.names = names
        # Made without __init__, which needs accelerate and a device; its defaults are class attributes.
        self.arguments = object.__new__(TrainingArguments)
        vars(self.arguments).update(options, include_for_metrics=[], to_dict=lambda: dict(options))
        if "wandb" in names:
            init_wandb_training(self.arguments)
            identity = folder / "wandb_id"  # in output_dir, so that a restart continues the same wandb run
            if not identity.is_file():
                write_atomically(identity, uuid.uuid4().hex)
            os.environ |= {"WANDB_RUN_ID": identity.read_text(), "WANDB_RESUME": "allow", "WANDB_DIR": str(folder)}
            os.environ |= {"WANDB_LOG_MODEL": "false", "WANDB_WATCH": "false"}  # the callback gets no model
        self.state = TrainerState(global_step=step, max_steps=total_steps)
        self.state.is_world_process_zero = self.state.is_local_process_zero = True
        self.callbacks = _callbacks(names)
        self._call("on_init_end")
        self._call("on_train_begin")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.state.global_step, self.state.epoch = step, metrics.get("epoch", self.state.epoch)
        self._call("on_log", logs={name: value for name, value in metrics.items() if math.isfinite(value)})
        self._call("on_step_end")

    def close(self, failed: bool) -> None:
        """End the trackers' runs, marked as failed if the tracker supports that."""
        for module, function, *statuses in (END[name] for name in self.names if name in END):
            if (status := statuses[failed]) is not None:
                getattr(importlib.import_module(module), function)(status)
        self._call("on_train_end")

    def _call(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(
                self.arguments, self.state, TrainerControl(), model=None, processing_class=None, **more
            )
