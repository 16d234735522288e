"""What the first rank does beside the loop: results and state as files, callbacks, pushes, benchmarks, the model card.

On every other rank the same calls do nothing. `finish` comes last, when the process group is gone and the weights are
out of memory, so that the benchmarks' process finds the machine free.
"""

import dataclasses
import gc
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerState

from sft_core.run.benchmarks import FAILURES, get_callbacks, run_benchmarks
from sft_core.run.files import write_atomically
from sft_core.run.hub import Uploader, push_final
from sft_core.run.logging import MetricsLogger
from sft_core.run.model_card import write_model_card

logger = logging.getLogger(__name__)


class Errands:
    """`run`: `sft_core.prepare.Base` with `config` and `total_steps`; `samples`: rows (SFT; None: not known) or prompts
    (GRPO)."""

    def __init__(self, run: Any, metrics: MetricsLogger, *, samples: int | None, steps_per_epoch: float) -> None:
        self.run, self.config, self.metrics = run, run.config, metrics
        self.samples, self.steps_per_epoch = samples, steps_per_epoch
        self.first = run.rank == 0
        self.callbacks = get_callbacks(self.config, run.model) if self.first else []
        pushes = self.config.push_to_hub and self.config.hub_strategy != "end" and self.first
        self.uploader = Uploader(self.config) if pushes else None
        self._progress: dict[str, Any] | None = None
        self._failures: list[str] = []

    def due(self, what: Literal["logging", "save", "eval"], step: int) -> bool:
        """Whether `what` is due after this step; the same on every rank."""
        total = self.run.total_steps
        if what == "logging" and (step == total or (step == 1 and self.config.logging_first_step)):
            return self.config.logging_strategy != "no"
        return self.config.due(what, step, total, self.steps_per_epoch)

    def epoch(self, progress: dict[str, Any]) -> float:
        """Passes over the rows (SFT) or prompts (GRPO) so far; the share of the run where their number is not known."""
        if self.samples is None:
            return progress["step"] / self.run.total_steps
        return self._consumed(progress) / self.samples

    def _consumed(self, progress: dict[str, Any]) -> int:
        return progress["rows" if self.run.algorithm == "sft" else "prompts"]

    def log_evaluation(self, progress: dict[str, Any], figures: dict[str, float]) -> None:
        """Log the figures; `progress`, and so the next checkpoint, remembers them."""
        figures = figures | {"epoch": self.epoch(progress)}
        progress["evaluation"] = {"step": progress["step"], "figures": figures}
        self.metrics.log(progress["step"], figures)

    def final_evaluation_due(self, progress: dict[str, Any]) -> bool:
        """Whether the run evaluates and has not done so at its last step."""
        return self.config.evaluates and progress.get("evaluation", {}).get("step") != progress["step"]

    def log_benchmarks(self) -> None:
        """Results of checkpoints' benchmarks that have come in, at their own step."""
        for callback in self.callbacks:
            for step, figures in callback.finished():
                self.metrics.log(step, figures)

    def on_save(self, step: int, checkpoint: Path) -> None:
        if not self.first:
            return
        try:
            if self.uploader is not None and (self.config.hub_always_push or not self.uploader.busy):
                self.uploader.push_checkpoint(step, checkpoint)
            for callback in self.callbacks:
                callback.on_save(step, checkpoint)
        except OSError as error:  # no room for the copy that is pushed: the training goes on
            self._failures.append(f"checkpoint of step {step} was not pushed: {error}")
            logger.warning("%s", self._failures[-1])

    def write_state(self, folder: Path, progress: dict[str, Any]) -> None:
        """trainer_state.json as transformers' TrainerState loads it, with every logged line so far."""
        if not self.first:
            return
        log = Path(self.config.output_dir) / "metrics.jsonl"
        state = TrainerState(
            epoch=self.epoch(progress),
            global_step=progress["step"],
            max_steps=self.run.total_steps,
            logging_steps=self.config.logging_steps,
            eval_steps=self.config.eval_steps or self.config.logging_steps,
            save_steps=self.config.save_steps,
            train_batch_size=self.config.per_device_train_batch_size,
            num_train_epochs=math.ceil(self.run.total_steps / self.steps_per_epoch),
            num_input_tokens_seen=progress["num_tokens"],
            log_history=[json.loads(line) for line in log.read_text().splitlines()],
        )
        write_atomically(folder / "trainer_state.json", json.dumps(dataclasses.asdict(state), indent=2) + "\n")

    def trained(self, progress: dict[str, Any]) -> None:
        """Training has come to its end: `finish` has something to do."""
        self._progress = progress

    def finish(self) -> None:
        """Results, state, benchmarks, card, and the push of the final model."""
        if self.first and self._progress is not None:
            self._finish(self._progress)
        elif any(line.busy for line in (self.uploader, *(callback.uploader for callback in self.callbacks)) if line):
            print("stopped: what was still being pushed to the Hub is not there", file=sys.stderr)
        self.metrics.close()

    def _finish(self, progress: dict[str, Any]) -> None:
        folder, steps, seconds = Path(self.config.output_dir), progress["step"], max(progress["seconds"], 1e-9)
        results = {
            "epoch": self.epoch(progress),
            "num_tokens": progress["num_tokens"],
            "train_loss": progress["loss_sum"] / max(1, steps),
            "train_runtime": progress["seconds"],
            "train_samples": self._consumed(progress) if self.samples is None else self.samples,
            "train_samples_per_second": self._consumed(progress) / seconds,
            "train_steps_per_second": steps / seconds,
        }
        save_results(folder, "train", results)
        evaluation = progress.get("evaluation", {}).get("figures", {})
        if evaluation:
            save_results(folder, "eval", evaluation)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        benchmarks: dict[str, float] = {}
        failures: list[str] = []
        if self.config.benchmarks:
            try:
                measured = folder / "merged" if self.run.model.use_peft else folder
                benchmarks = run_benchmarks(measured, self.config, folder / "benchmarks" / f"step-{steps}")
            except FAILURES as error:  # the model is there all the same: its card and its push go on
                failures.append(f"benchmarks of the final model: {error}")
            else:
                self.metrics.log(steps, benchmarks)
                save_results(folder, "benchmarks", benchmarks)
        for callback in self.callbacks:
            failures += callback.close()
        self.log_benchmarks()
        self.write_state(folder, progress)
        if self.uploader is not None:
            failures += self.uploader.wait()
        write_model_card(folder, self.run, results | evaluation | benchmarks)
        if self.config.push_to_hub or self.config.push_to_hub_revision:
            failures += push_final(self.config, folder)
        for failure in self._failures + failures:
            print(f"failed: {failure}", file=sys.stderr)


def save_results(folder: Path, split: str, results: dict[str, float]) -> None:
    """<split>_results.json, and the same figures into all_results.json."""
    everything = folder / "all_results.json"
    known = json.loads(everything.read_text()) if everything.is_file() else {}
    for path, values in ((folder / f"{split}_results.json", results), (everything, known | results)):
        write_atomically(path, json.dumps(values, indent=4, sort_keys=True) + "\n")
