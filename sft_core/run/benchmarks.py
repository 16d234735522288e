"""What a run does after each checkpoint, as open-r1 names it, and benchmarks as processes of their own.

A callback has `on_save(step, checkpoint)`, `finished()` for benchmark results that came in since it was last asked,
`close()`, which waits and returns what failed, and `busy`. First rank only; none of them can stop the training.

Left out on purpose: other callbacks, and jobs of a cluster's scheduler (open-r1 hands benchmarks to Slurm, and nothing
comes back into the run; here their results do).
"""

import functools
import json
import logging
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from sft_core.run.config import ModelConfig, TrainingConfig
from sft_core.run.hub import TRAINING_STATE, InOrder, PushToHub, Uploader, stage
from sft_core.run.model_card import write_checkpoint_card
from sft_core.run.output_dir import move_aside

logger = logging.getLogger(__name__)

FAILURES = (RuntimeError, OSError, ValueError, KeyError)  # of `run_benchmarks`


class PushToHubRevision(Uploader):
    """Each checkpoint's model to branch `<hub_model_revision>-step-<step, nine digits>`, then its benchmarks.

    Both happen in the background, in order, from a copy that outlives the checkpoint. Uploads slower than saves queue
    up, and each one waiting keeps a model on the disk. On GPUs, which belong to the training, benchmarks wait for its
    end. With adapters, no whole model, only the final, merged one is measured.
    """

    def __init__(self, config: TrainingConfig, model: ModelConfig) -> None:
        super().__init__(config)
        self.model = model
        self._benchmarks = InOrder()  # a line of their own: they take longer than an upload
        self._results: queue.SimpleQueue[tuple[int, dict[str, float]]] = queue.SimpleQueue()
        self._waiting: list[Callable[[], None]] = []

    def on_save(self, step: int, checkpoint: Path) -> None:
        staged = stage(checkpoint, TRAINING_STATE)
        write_checkpoint_card(staged, self.model, step)
        self.start(
            staged,
            revision=f"{self.config.hub_model_revision}-step-{step:09d}",
            message=f"Checkpoint of step {step}",
            then=functools.partial(self._uploaded, step, staged),
        )

    def _uploaded(self, step: int, staged: Path) -> None:
        if self.config.benchmarks and not self.model.use_peft:
            measure = functools.partial(self._measure, step, staged)
            if torch.cuda.is_available():
                self._waiting.append(measure)
            else:
                self._benchmarks.add(measure)
        else:
            shutil.rmtree(staged)

    def _measure(self, step: int, staged: Path) -> None:
        folder = Path(self.config.output_dir) / "benchmarks" / f"checkpoint-{step}"
        try:
            self._results.put((step, run_benchmarks(staged, self.config, folder)))
        except FAILURES as error:
            self.failures.append(f"benchmarks of checkpoint-{step}: {error}")
            logger.warning("%s", self.failures[-1])
        finally:
            shutil.rmtree(staged)

    def finished(self) -> list[tuple[int, dict[str, float]]]:
        """(step, {`benchmarks/<task>/<metric>`: value}) of benchmarks that came in since the last call."""
        return [self._results.get() for _ in range(self._results.qsize())]

    def close(self) -> list[str]:
        """Wait for uploads and benchmarks; returns what failed, a sentence each."""
        self.wait()
        for measure in self._waiting:
            self._benchmarks.add(measure)
        self._benchmarks.wait()
        return self.failures


def get_callbacks(config: TrainingConfig, model: ModelConfig) -> list[PushToHub | PushToHubRevision]:
    """What is done after each checkpoint."""
    callbacks: list[PushToHub | PushToHubRevision] = []
    if config.push_to_hub and config.hub_strategy != "end":
        callbacks.append(PushToHub(config))
    if "push_to_hub_revision" in config.callbacks:
        callbacks.append(PushToHubRevision(config, model))
    return callbacks


def check_benchmarks(config: TrainingConfig) -> None:
    """Raise ValueError for benchmarks that could not run: unknown task or option, no engine. Asked of a process, since
    sft_core does not import eval."""
    if not config.benchmarks:
        return
    if taken := {"model", "tasks", "output_dir", "shard"} & set(config.benchmark_kwargs or {}):
        raise ValueError(f"benchmark_kwargs may not hold {', '.join(sorted(taken))}: the run says these itself.")
    command = [sys.executable, "-m", "eval.check", *_flags(config, Path("model"), Path("results"))]
    asked = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if asked.returncode != 0:
        raise ValueError(f"benchmarks: {asked.stderr.strip().splitlines()[-1].removeprefix('error: ')}")


def _flags(config: TrainingConfig, model: Path, output_dir: Path) -> list[str]:
    """The options of eval.run."""
    options = {"model": str(model), "tasks": ",".join(config.benchmarks), "output_dir": str(output_dir)}
    options["fit_context"] = "true"  # a short context is no reason to measure nothing
    options |= {"system_prompt": config.system_prompt} if config.system_prompt else {}
    options |= config.benchmark_kwargs or {}
    flags = []
    for name, value in options.items():
        flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def _environment() -> dict[str, str]:
    """eval lies beside sft_core, wherever the trainer was started from."""
    places = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": places}


def run_benchmarks(model_folder: Path, config: TrainingConfig, output_dir: Path) -> dict[str, float]:
    """Measure a model with `eval.run` in a process of its own; returns {`benchmarks/<task>/<metric>`: value}.

    `config`: `benchmarks`, `system_prompt` and `benchmark_kwargs` (further options of eval.run). Details, results and
    the process's output (log.txt) go to `output_dir`; what another model's benchmarks left there is moved aside.

    Raises:
        RuntimeError: the process failed; with the end of what it wrote.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    move_aside(output_dir, "of other weights")  # eval.run would go on with their samples
    log = output_dir / "log.txt"
    ends_with_us = [sys.executable, "-m", "sft_core.run.child", str(os.getpid())]
    command = [*ends_with_us, "eval.run", *_flags(config, model_folder, output_dir)]
    with open(log, "w") as file:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=_environment())
    if done.returncode != 0:
        tail = " ".join(log.read_text(errors="replace")[-600:].split())
        raise RuntimeError(f"eval.run ended with exit code {done.returncode} (all of it in {log}): {tail}")
    results = json.loads((output_dir / "results.json").read_text())["results"]
    return {
        f"benchmarks/{task}/{metric}": value
        for task, values in results.items()
        for metric, value in values.items()
        if isinstance(value, int | float)
    }
