"""Everything around the training loop, for both trainers: open, resume, log, evaluate, save, close, finish.

    with TrainingRun(run, Progress(), CONSOLE, samples) as training:
        train(run, training)  # the loop; when it returns, the weights are out of memory
        training.finish()  # results, benchmarks, model card and pushes, on the first rank

When the block ends, for any reason, the watchdog is disarmed, signal handlers are restored, engine, workers,
process group and log are closed, and the folder is unlocked.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch.distributed as dist
from torch import nn
from tqdm import tqdm
from transformers import TrainerState

from sft_core.best import compare_with_best, load_best
from sft_core.finish import finish
from sft_core.model.checkpoint import Record, Trained, load_checkpoint, save_checkpoint
from sft_core.model.export import export_model
from sft_core.model.optim import make_optimizer, make_scheduler
from sft_core.model.parallel import Sharding, make_mesh, shard
from sft_core.model.policy import Policy, load_policy
from sft_core.run import distributed
from sft_core.run.benchmarks import get_callbacks
from sft_core.run.callbacks import Callbacks
from sft_core.run.files import room_for, write_atomically
from sft_core.run.logging import MetricsLogger, announce
from sft_core.run.output_dir import read_state, step_of
from sft_core.run.watchdog import Phases, watchdog

logger = logging.getLogger(__name__)
Metrics = dict[str, float]
CLOSING_LIMIT = 300.0  # seconds, after an exception


@dataclass
class Progress:
    """How far a run is. A checkpoint keeps all fields; a trainer adds its own."""

    step: int = 0  # optimizer steps taken
    samples: int = 0  # rows (SFT) or prompts (GRPO) taken from the data
    num_tokens: int = 0
    loss_sum: float = 0.0  # over the steps
    seconds: float = 0.0  # in steps
    eval_step: int = -1  # of the last evaluation
    eval_metrics: Metrics = field(default_factory=dict)
    best_checkpoint: str = ""  # "": no checkpoint was evaluated
    best_metrics: Metrics = field(default_factory=dict)  # of the best checkpoint's evaluation


P = TypeVar("P", bound=Progress)


class TrainingRun(Generic[P]):
    """`run`: `sft_core.prepare.Base` with `config`, `total_steps` and `steps_per_epoch`; `console`: the metrics of the
    console line; `samples`: how many rows (SFT; None: not known) or prompts (GRPO) the data has."""

    def __init__(self, run: Any, progress: P, console: Sequence[str], samples: int | None) -> None:
        self.run, self.config, self.progress, self.console, self.samples = run, run.config, progress, console, samples
        self.first = run.rank == 0
        self.phases = Phases(self.config.ddp_timeout)
        self.opened = ExitStack()  # resources of the loop, closed before the process group
        self.kept = ExitStack()  # resources of the whole run: the log, the lock on the folder
        self.stopping = False  # a signal on any rank asked the run to stop
        self.complete = False
        self.failures: list[str] = []  # of pushes and benchmarks
        self.log_history: list[dict[str, Any]] = []
        handed = run.handed
        self.hooks: Callbacks | None = handed and handed.callbacks
        self.asked: set[str] = set()  # what callbacks of any rank ask for: logging, eval, save, stop
        # Bad input found during the run ends a command with one line; from Python the caller gets the ValueError.
        self.bad_input = distributed.usage_errors if handed is None else nullcontext

    def __enter__(self) -> "TrainingRun[P]":
        self.kept.callback(distributed.unlock_output_dir, self.config.output_dir)
        distributed.StopSignal.remember()
        announce(self.run)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):  # printed first: closing the resources may hang
            print(f"stopping: {error!r}", file=sys.stderr, flush=True)
            distributed.StopSignal.restore()
            watchdog(CLOSING_LIMIT)
        try:
            if error is None or self.run.world_size == 1:  # else other ranks may wait for this one, which has to end
                self.leave()
        finally:
            watchdog(0)
            distributed.StopSignal.restore()
            self.kept.__exit__(kind, error, trace)

    def leave(self) -> None:
        """Close the loop's resources, then leave the process group, which an engine needs until it is closed."""
        self.opened.close()
        distributed.shutdown()
        distributed.StopSignal.restore()

    # --- before the loop ---------------------------------------------------------------------------------------------

    def load_policy(self, vocab_size: int = 0) -> Policy:
        """Open the log first, since trackers may fail to start, then load the model, sharded over the ranks."""
        self._open_log()
        run = self.run
        with self.bad_input():  # weights that do not fit the model
            policy = load_policy(
                run.local_model,
                dtype=run.dtype,
                seed=self.config.seed,
                known_as=run.model.model_name_or_path,
                vocab_size=vocab_size,
                to_shard=True,
            )
        return self.shard(policy)

    def shard(self, policy: Policy) -> Policy:
        return shard(policy, make_mesh(self.run.device), Sharding.of(self.config, self.run.bf16))

    def resume(self, policy: Policy, reference: Policy | None = None) -> Trained:
        """Make optimizer and schedule for `policy`. If there is a checkpoint, restore all three and `progress` from it,
        and `reference`, a reference model that follows the policy."""
        optimizer = make_optimizer(policy, self.config)
        trained = Trained(policy, optimizer, make_scheduler(optimizer, self.config, self.run.total_steps), reference)
        if self.run.checkpoint is not None:
            vars(self.progress).update(load_checkpoint(self.run.checkpoint, trained))
        self.trained = trained
        return trained

    def _open_log(self) -> None:
        run = self.run
        step = 0 if run.checkpoint is None else read_state(run.checkpoint)["step"]
        self.logger = MetricsLogger(
            self.config.output_dir, self.config.report_to, step, run.options, self.console, run.total_steps
        )
        self.kept.push(lambda kind, *_: self.logger.close(failed=kind is not None))
        if step:
            log = Path(self.config.output_dir) / "metrics.jsonl"
            self.log_history = distributed.on_first_rank(lambda: list(map(json.loads, log.read_text().splitlines())))

    def start(self) -> None:
        """Make signals stop the run after a step. Call it after the engine is made, which may set its own handlers."""
        run, step = self.run, self.progress.step
        self.callbacks = get_callbacks(self.config, run.model) if self.first else []
        self.stop = distributed.StopSignal()
        self.saved_at = step
        bar = tqdm(total=run.total_steps, initial=step, desc=run.algorithm, disable=None if self.first else True)
        self.bar = self.opened.enter_context(bar)
        self._call("on_train_begin")

    def evaluate_first(self, evaluate: Callable[[], Metrics]) -> None:
        """Evaluate before the first step if the options ask for it, and after a resume if a signal skipped it."""
        progress, run = self.progress, self.run
        left_out = progress.eval_step != progress.step and self.due("eval")
        if (left_out if progress.step else self.config.eval_on_start) and not run.only_evaluates:
            self._log_evaluation(evaluate())
            if run.checkpoint is not None:
                compare_with_best(progress, self.config, run.checkpoint)

    # --- in the loop -------------------------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        ended = self.stopping or "stop" in self.asked or self.run.only_evaluates
        return self.progress.step < self.run.total_steps and not ended

    @property
    def epoch(self) -> float:
        """Passes over the rows (SFT) or prompts (GRPO) so far; the share of all steps if their number is not known."""
        if self.samples is None:
            return self.progress.step / self.run.total_steps
        return self.progress.samples / self.samples

    def due(self, what: Literal["logging", "save", "eval"]) -> bool:
        """Whether `what` is due after the last counted step; the same on every rank."""
        if what in self.asked and (what != "eval" or self.run.test_rows is not None):
            return True
        return self.config.due(what, self.progress.step, self.run.total_steps, self.run.steps_per_epoch)

    def count_step(self, start: float, tokens: int, loss: float) -> Metrics:
        """Count an optimizer step that began at `start`; returns the metrics that both trainers log for every step."""
        progress, seconds = self.progress, time.perf_counter() - start
        progress.step += 1
        progress.num_tokens += tokens
        progress.loss_sum += loss
        progress.seconds += seconds
        self._call("on_step_end")
        return self.phases.pop() | {
            "epoch": self.epoch,
            "num_tokens": progress.num_tokens,
            "step_time": seconds,
            "tokens_per_second": tokens / seconds,
        }

    def end_step(self, save: Callable[[], None], evaluate: Callable[[], Metrics]) -> None:
        """Evaluate and save if due; a run that stops always saves."""
        self.bar.update()
        compared = self.config.load_best_model_at_end and self.due("save")
        if (self.due("eval") or compared) and not self.stopping:
            self._log_evaluation(evaluate())
        if self.due("save") or self.stopping:
            save()

    def log(self, step: int, metrics: Metrics) -> None:
        """Log `metrics`. Every rank calls it, with the same metrics."""
        self.record(step, metrics)
        self._call("on_log", logs=dict(self.log_history[-1]))

    def record(self, step: int, metrics: Metrics) -> None:
        self.logger.log(step, metrics)
        finite = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self.log_history.append({"step": step, **finite})

    def _call(self, hook: str, **more: Any) -> None:
        """Call the callbacks; every rank obeys requests of any rank."""
        if self.hooks is not None:
            self.hooks(hook, self.config, self.state(), processing_class=self.run.tokenizer, **more)
            self.asked = self.hooks.asked(self.run.device)

    def save(self, trained: Trained, write_more: Callable[[Path], None] | None = None) -> None:
        """Write a checkpoint; `write_more` writes into the rank's own folder in it. A collective."""
        config, run, progress = self.config, self.run, self.progress
        compare_with_best(progress, config, Path(config.output_dir) / f"checkpoint-{progress.step}")

        def write_model(folder: Path) -> None:
            export_model(trained.model, run.tokenizer, folder, run.dtype, run.stop_ids)
            if self.first:
                self.write_state(folder)

        only_model = config.save_only_model and not self.stopping
        # Bytes per trained parameter: the exported model, then the masters and the optimizer's two moments.
        needed = (run.dtype.itemsize + 12) * _parameters(trained.model)
        with self.phases("save"), room_for("a checkpoint", config.output_dir, needed):
            folder = save_checkpoint(
                Path(config.output_dir),
                Record(progress.step, asdict(progress), run.identity),
                None if only_model else trained,
                write_model,
                write_more,
                config.save_total_limit,
            )
            if self.first:
                self._push(folder)
        self.saved_at = progress.step
        self._call("on_save")

    def end(self, policy: Policy, save: Callable[[], None], evaluate: Callable[[], Metrics]) -> None:
        """After the last step: write the last checkpoint and the model in output_dir, then evaluate."""
        config, progress, run = self.config, self.progress, self.run
        self.bar.close()
        if run.only_evaluates:
            return self._log_evaluation(evaluate())
        if self.stopping:
            if self.first:
                print(f"stopped by a signal after step {progress.step}: the same command resumes from there")
            return
        if config.load_best_model_at_end and progress.eval_step != progress.step:
            self._log_evaluation(evaluate())  # before the last checkpoint, so that it is compared too
            self.saved_at = -1  # so that a checkpoint of this step is written again
        if config.save_strategy != "no" and self.saved_at != progress.step:
            save()
        if config.load_best_model_at_end:
            load_best(progress, config, self.trained)
        needed = run.dtype.itemsize * _parameters(policy, config.merge_adapter)
        with self.phases("export"), room_for("the model", config.output_dir, needed):
            export_model(policy, run.tokenizer, config.output_dir, run.dtype, run.stop_ids, config.merge_adapter)
        if (config.do_eval or config.eval_strategy != "no") and progress.eval_step != progress.step:
            self._log_evaluation(evaluate())
        self._call("on_train_end")
        self.complete = True

    def _log_evaluation(self, metrics: Metrics) -> None:
        progress = self.progress
        progress.eval_step, progress.eval_metrics = progress.step, metrics | {"epoch": self.epoch}
        self.log(progress.step, progress.eval_metrics)
        self._call("on_evaluate", metrics=progress.eval_metrics)

    def _push(self, checkpoint: Path) -> None:
        step = self.progress.step
        try:
            for callback in self.callbacks:
                callback.on_save(step, checkpoint)
        except OSError as error:  # no room for the copy that is pushed: the training continues
            self.failures.append(f"checkpoint of step {step} was not pushed: {error}")
            logger.warning("%s", self.failures[-1])

    def state(self) -> TrainerState:
        """The run's progress as transformers' TrainerState, with every logged line so far."""
        config, total = self.config, self.run.total_steps
        return TrainerState(
            best_metric=self.progress.best_metrics.get(config.metric_for_best_model),
            best_model_checkpoint=self.progress.best_checkpoint or None,
            best_global_step=self.progress.best_checkpoint and step_of(Path(self.progress.best_checkpoint)) or None,
            epoch=self.epoch,
            global_step=self.progress.step,
            max_steps=total,
            logging_steps=config.logging_steps,
            eval_steps=config.eval_steps or config.logging_steps,
            save_steps=config.save_steps,
            num_train_epochs=math.ceil(total / self.run.steps_per_epoch),
            num_input_tokens_seen=self.progress.num_tokens,
            log_history=self.log_history,
            is_local_process_zero=self.first,
            is_world_process_zero=self.first,
        )

    def write_state(self, folder: Path) -> None:
        """Write trainer_state.json, which transformers' TrainerState loads."""
        write_atomically(folder / "trainer_state.json", json.dumps(asdict(self.state()), indent=2) + "\n")

    # --- after the loop ----------------------------------------------------------------------------------------------

    def finish(self, push: bool = True) -> None:
        """Close the loop's resources, which frees the machine; then write results, state, benchmarks and card and push,
        on the first rank. `push`: whether to push to the Hub's main branch, if the options ask for it."""
        dist.barrier()
        self.leave()
        if self.first and self.complete:
            finish(self, push)
        elif any(callback.busy for callback in self.callbacks):
            print("a push to the Hub was not finished: the same command resumes and pushes again", file=sys.stderr)

    def results(self) -> Metrics:
        """Metrics of the whole run, as open-r1's scripts log them."""
        progress = self.progress
        seconds = max(progress.seconds, 1e-9)
        return {
            "epoch": self.epoch,
            "num_tokens": progress.num_tokens,
            "train_loss": progress.loss_sum / max(1, progress.step),
            "train_runtime": progress.seconds,
            "train_samples": progress.samples if self.samples is None else self.samples,
            "train_samples_per_second": progress.samples / seconds,
            "train_steps_per_second": progress.step / seconds,
        }


def _parameters(model: nn.Module, frozen: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or frozen)
