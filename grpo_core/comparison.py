"""Trains and scores the models of one comparison: before SFT, after SFT, after GRPO, and after more SFT instead.

The flow of `grpo_core/quickstart` and of `grpo_core/score.py`. Every part is a process of its own, so that its memory
and its engine are gone when it ends. A part that was finished is not run again.
"""

import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grpo_core.heldout import MODES, difference, interval, read, result_file
from kernels.tables import table
from sft_core.run.files import write_atomically

MODELS = {"before": "before SFT", "sft": "after SFT", "grpo": "after GRPO", "control": "more SFT instead"}


@dataclass(frozen=True)
class Comparison:
    folder: Path  # has a folder of each model, named as in MODELS; `before` must be there
    data: Mapping[str, Path]  # stage (sft or grpo) -> its training data
    options: Mapping[str, list[str]]  # stage -> the other options of its command
    heldout: dict[str, Any]  # the arguments of grpo_core.heldout.evaluate but the models
    ranks: Mapping[str, int]  # stage -> its processes

    def train(self, name: str, model: str, seconds: float = math.inf, more: tuple[str, ...] = ()) -> None:
        """Make model `name` from `model`; the first step after `seconds` is the last. more: last options."""
        stage = "grpo" if name == "grpo" else "sft"
        record = self.folder / f"{name}-seconds.json"
        if record.exists():
            return
        start = time.time()
        given = {"model_name_or_path": self.folder / model, "dataset_name": self.data[stage]}
        given |= {"output_dir": self.folder / name}
        ranks = self.ranks[stage]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks] if ranks > 1 else []
        module = [f"{stage}_core.train"] if seconds == math.inf else ["grpo_core.comparison", stage, seconds]
        arguments = [f"--{option}={value}" for option, value in given.items()]
        run([*launcher, "-m", *module, *self.options[stage], *arguments, *more])
        write_atomically(record, json.dumps(time.time() - start))

    def seconds(self, name: str) -> float:
        return json.loads((self.folder / f"{name}-seconds.json").read_text())

    def evaluate(self, *names: str) -> None:
        missing = [self.folder / name for name in names if not result_file(self.folder / name).exists()]
        if missing:
            run(["-m", "grpo_core.heldout", json.dumps(self.heldout), *missing])

    def report(self, *names: str) -> dict[str, dict[str, tuple[float, float]]]:
        """Print a table of models, and of GRPO minus SFT, paired. Returns percent and half the 95 % interval."""
        models = {name: self.folder / name for name in names}
        scores = {name: {mode: interval(read(model)[mode]) for mode in MODES} for name, model in models.items()}
        paired = {
            f"grpo - {other}": {mode: difference(models[other], models["grpo"], mode) for mode in MODES}
            for other in ("sft", "control")
            if other in names
        }
        rows: list[list[Any]] = []
        for name, score in [*scores.items(), *paired.items()]:
            cells = [f"{mean:{'+' if name in paired else ''}.1f} ± {half:.1f} %" for mean, half in score.values()]
            minutes = "-" if name in paired or name == "before" else f"{self.seconds(name) / 60:.1f}"
            rows.append([MODELS.get(name, name), *cells, minutes])
        count = len(read(models["sft"])["greedy"])
        print("\n" + table([f"{count} held-out problems", *MODES, "minutes"], rows))
        return scores | paired


def run(command: list[Any]) -> None:
    """Run a Python command to its end; its failure is ours."""
    command = [sys.executable, *map(str, command)]
    print("$ python", shlex.join(command[1:]), flush=True)
    threads = {"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else {}  # torchrun's default, silently
    code = subprocess.run(command, env=threads | os.environ).returncode
    if code != 0:
        raise SystemExit(code)


def train_for(stage: str, seconds: float, argv: list[str]) -> None:
    """`python -m sft_core.train` or `grpo_core.train` with `argv`, ended by the first step after `seconds`."""
    end = time.time() + seconds

    class Deadline(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_training_stop = time.time() >= end

    importlib.import_module(f"{stage}_core.train").main(argv, [Deadline()])


if __name__ == "__main__":
    train_for(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
