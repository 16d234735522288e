"""What a run does after each checkpoint, as open-r1 names it, and benchmarks as processes of their own.

A callback has `on_save(step, checkpoint)` and `close()`, which waits and returns what failed; `results` are then its
benchmarks. First rank only; none of them can stop the training.

Left out on purpose: other callbacks, and jobs of a cluster's scheduler (open-r1 hands benchmarks to Slurm, and nothing
comes back into the run; here their results do).
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

FAILURES = (RuntimeError, OSError, ValueError, KeyError)  # of `run_benchmarks`


class PushToHubRevision(Uploader):
    """Each checkpoint's model to branch `<hub_model_revision>-step-<step, nine digits>`; benchmarks of them.

    Uploads run in the background, from a copy that outlives the checkpoint. Benchmarks, for which the machine must be
    free, wait for the end of the training, and each one waiting keeps a model on the disk. With adapters, no whole
    model, only the final, merged one is measured.
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
        """Wait for the uploads, then measure; returns what failed, a sentence each."""
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
    asked = subprocess.run(command, capture_output=True, text=True)
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
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
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
