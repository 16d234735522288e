"""open-r1's callbacks, which push each checkpoint, and benchmarks of checkpoints and models in separate processes.

A callback has `on_save(step, checkpoint)` and `close()`. `close()` waits for its work and returns a list of failures;
after it, `results` holds the benchmark results. Callbacks run on the first rank only and cannot stop the training.

Not supported, on purpose: other callbacks, and jobs of a cluster's scheduler. (open-r1 submits benchmarks to Slurm and
never gets the results; here the run records them.)
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from sft_core.run.config import ModelConfig, TrainingConfig
from sft_core.run.hub import TRAINING_STATE, PushToHub, Uploader, stage
from sft_core.run.output_dir import move_aside

FAILURES = (RuntimeError, OSError, ValueError, KeyError)  # raised by `run_benchmarks`


class PushToHubRevision(Uploader):
    """Pushes each checkpoint's model to branch `<hub_model_revision>-step-<step, nine digits>`, and benchmarks it.

    Uploads run in the background, from a copy that outlives the checkpoint. Benchmarks need a free machine, so they run
    after the training; until then each waiting checkpoint keeps a copy of its model on the disk. With adapters only the
    final, merged model is benchmarked.
    """

    def __init__(self, config: TrainingConfig, model: ModelConfig) -> None:
        super().__init__(config)
        self.measures = bool(config.benchmarks) and not model.use_peft
        self._waiting: list[tuple[int, Path]] = []

    def on_save(self, step: int, checkpoint: Path) -> None:
        staged = stage(checkpoint, TRAINING_STATE)
        revision = f"{self.config.hub_model_revision}-step-{step:09d}"
        self.start(staged, f"Checkpoint of step {step}", revision, remove=not self.measures)
        if self.measures:
            self._waiting.append((step, staged))

    def close(self) -> list[str]:
        """Wait for the uploads, then run the benchmarks; returns the failures, one sentence each."""
        super().close()
        for step, staged in self._waiting:
            folder = Path(self.config.output_dir) / "benchmarks" / f"checkpoint-{step}"
            try:
                self.results.append((step, run_benchmarks(staged, self.config, folder)))
            except FAILURES as error:
                self.failures.append(f"benchmarks of checkpoint-{step}: {error}")
            shutil.rmtree(staged)
        return self.failures


def get_callbacks(config: TrainingConfig, model: ModelConfig) -> list[PushToHub | PushToHubRevision]:
    """The callbacks of a run, which are called after each checkpoint."""
    callbacks: list[PushToHub | PushToHubRevision] = []
    if config.push_to_hub and config.hub_strategy != "end":
        callbacks.append(PushToHub(config))
    if "push_to_hub_revision" in config.callbacks:
        callbacks.append(PushToHubRevision(config, model))
    return callbacks


def check_benchmarks(config: TrainingConfig) -> None:
    """Raise ValueError for benchmarks that could not run: unknown task or option, no engine. A separate process checks
    this, because sft_core does not import eval."""
    if not config.benchmarks:
        return
    if taken := {"model", "tasks", "output_dir", "shard"} & set(config.benchmark_kwargs or {}):
        raise ValueError(
            f"benchmark_kwargs may not hold {', '.join(sorted(taken))}, which the run sets itself: remove them."
        )
    command = [sys.executable, "-m", "eval.check", *_flags(config, Path("model"), Path("results"))]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode != 0:
        raise ValueError(f"benchmarks: {asked.stderr.strip().splitlines()[-1].removeprefix('error: ')}")


def _flags(config: TrainingConfig, model: Path, output_dir: Path) -> list[str]:
    """The options of eval.run."""
    options = {"model": str(model), "tasks": ",".join(config.benchmarks), "output_dir": str(output_dir)}
    options["fit_context"] = "true"  # benchmark models with a short context too
    options |= {"system_prompt": config.system_prompt} if config.system_prompt else {}
    options |= config.benchmark_kwargs or {}
    flags = []
    for name, value in options.items():
        flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def run_benchmarks(model_folder: Path, config: TrainingConfig, output_dir: Path) -> dict[str, float]:
    """Benchmark a model with `eval.run` in a separate process; returns {`benchmarks/<task>/<metric>`: value}.

    `config` gives `benchmarks`, `system_prompt` and `benchmark_kwargs` (further options of eval.run). Details, results
    and the process's output (log.txt) go to `output_dir`; earlier benchmarks of other weights are moved aside there.

    Raises:
        RuntimeError: the process failed; the message has the end of its output.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    move_aside(output_dir, "benchmarks of other weights")  # eval.run would resume from their samples
    log = output_dir / "log.txt"
    ends_with_us = [sys.executable, "-m", "sft_core.run.child", str(os.getpid())]
    command = [*ends_with_us, "eval.run", *_flags(config, model_folder, output_dir)]
    with open(log, "w") as file:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    if done.returncode != 0:
        tail = " ".join(log.read_text(errors="replace")[-600:].split())
        raise RuntimeError(f"eval.run ended with exit code {done.returncode} (see {log}): {tail}")
    results = json.loads((output_dir / "results.json").read_text())["results"]
    return {
        f"benchmarks/{task}/{metric}": value
        for task, values in results.items()
        for metric, value in values.items()
        if isinstance(value, int | float)
    }
