"""Methods of a trainer class for use after `train()`: logs, results, model, card and push (`sft_core/trainer.py`)."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState

from sft_core.finish import save_results
from sft_core.lifecycle import TrainingRun
from sft_core.run.config import TrainingConfig
from sft_core.run.hub import NOT_PUSHED, push_final
from sft_core.run.model_card import write_model_card
from sft_core.run.options import require

OF_THE_RUN = ("metrics.jsonl", "run.json", "*_results.json", "trainer_state.json", "README.md")  # in output_dir


class Results:
    """Methods of TRL's trainers that use a run's files in output_dir; only the first rank writes."""

    args: TrainingConfig
    state: TrainerState
    _trained: TrainingRun | None  # the last complete run; `_model` resets it if the model object was changed
    _model: Callable[[], Any]

    def is_world_process_zero(self) -> bool:
        return self.args.process_index == 0

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print the metrics, on the first rank."""
        if self.is_world_process_zero():
            lines = [f"  {name} = {value}" for name, value in sorted(metrics.items())]
            print(f"***** {split} metrics *****", *lines, sep="\n", flush=True)

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Write <split>_results.json, and with `combined` also all_results.json."""
        if self.is_world_process_zero():
            save_results(Path(self.args.output_dir), split, dict(metrics), combined)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            self.state.save_to_json(os.path.join(self.args.output_dir, "trainer_state.json"))

    def save_model(self, output_dir: str | os.PathLike | None = None) -> None:
        """Copy the trained model and its tokenizer to `output_dir`; the run's own output_dir has them already."""
        source, target = Path(self._complete().config.output_dir), Path(output_dir or self.args.output_dir)
        if not self.is_world_process_zero() or target.resolve() == source.resolve():
            return
        target.mkdir(parents=True, exist_ok=True)
        ignored = shutil.ignore_patterns(*NOT_PUSHED, *OF_THE_RUN)
        for path in source.iterdir():
            if path.is_file() and not ignored("", [path.name]):
                shutil.copy2(path, target / path.name)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] | None = None
    ) -> None:
        """Write README.md to the run's output_dir."""
        training = self._complete()
        run = training.run
        if not self.is_world_process_zero():
            return
        data = dataclasses.replace(run.data, dataset_name=dataset_name or run.data.dataset_name)
        more = [tags] if isinstance(tags, str) else list(tags or [])
        metrics = training.results() | training.progress.eval_metrics
        write_model_card(
            Path(training.config.output_dir), dataclasses.replace(run, data=data), metrics, model_name, more
        )

    def push_to_hub(self, commit_message: str = "End of training", **card: Any) -> None:
        """Push card and model to the main branch. `card`: arguments of `create_model_card`.

        Raises:
            ValueError: the Hub did not accept them; the message gives the reason.
        """
        self.create_model_card(**card)
        if self.is_world_process_zero():
            config = dataclasses.replace(self.args, push_to_hub=True, push_to_hub_revision=False)
            failures = push_final(config, Path(self._complete().config.output_dir), commit_message)
            require(not failures, "; ".join(failures))

    def _complete(self) -> TrainingRun:
        """The complete run whose model is in output_dir."""
        self._model()
        if self._trained is None:
            raise ValueError(
                "output_dir does not hold the model: call train() first, or if you changed the model object, write it "
                "with its save_pretrained."
            )
        return self._trained
