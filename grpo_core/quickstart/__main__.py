"""From nothing to a model that GRPO made better at arithmetic, on any machine, in one command.

    make quickstart                          or: python -m grpo_core.quickstart
    make quickstart-control                  the same minutes spent on more SFT instead

Builds a small Llama and a set of word problems (`task.py`), warm-starts it with
`python -m sft_core.train` on worked demonstrations, trains it with `torchrun -m grpo_core.train` on problems and
answers alone, sampling through vLLM, and scores all three on held-out problems. Every part is the one that a large
run uses; only the sizes are small. A finished part is not done again: delete the folder to start over.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from grpo_core.heldout import evaluate, interval, read, result_file
from kernels.tables import table
from sft_core.run.files import write_atomically

SFT: dict[str, Any] = {
    "max_steps": 200,
    "per_device_train_batch_size": 32,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "max_length": 128,
}
GRPO: dict[str, Any] = {
    "max_steps": 80,
    "prompts_per_step": 24,
    "num_generations": 8,
    "max_prompt_length": 64,
    "max_completion_length": 32,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "adam_beta2": 0.95,
    "beta": 0.0,
    "temperature": 1.0,
    "reward_funcs": "accuracy",
    "system_prompt": "",
}
SHARED: dict[str, Any] = {"save_strategy": "no", "logging_steps": 10, "max_tokens_per_micro_batch": 8192}
SAMPLES = 4  # per held-out problem, for pass@1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default="runs/quickstart", help="where models, data and results go")
    parser.add_argument("--control", action="store_true", help="spend GRPO's minutes on more SFT instead")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and of the untrained model")
    parser.add_argument("--engine", default="vllm", help="what samples: vllm or torch")
    parser.add_argument("--evaluate", nargs="*", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = Path(arguments.folder).expanduser()
    if arguments.evaluate:
        rows = [json.loads(line) for line in (folder / "data" / "heldout.jsonl").read_text().splitlines()]
        models_to_score = [Path(model) for model in arguments.evaluate]
        return evaluate(models_to_score, rows, GRPO["max_completion_length"], arguments.engine, SAMPLES, "float32")
    started = time.time()
    build(folder, arguments.seed)
    train_sft(folder / "sft", folder / "base", folder, SFT)
    train_grpo(folder, arguments.engine)
    models = {"before SFT": folder / "base", "after SFT": folder / "sft", "after GRPO": folder / "grpo"}
    if arguments.control:
        models["more SFT instead"] = train_control(folder)
    missing = [model for model in models.values() if not result_file(model).exists()]
    if missing:
        run(["-m", "grpo_core.quickstart", "--folder", folder, "--engine", arguments.engine, "--evaluate", *missing])
    print_table(models)
    print(f"\n{(time.time() - started) / 60:.1f} minutes in all. Curves: tensorboard --logdir {folder}")


def build(folder: Path, seed: int) -> None:
    """The problems and the untrained model."""
    from grpo_core.quickstart.task import write_data, write_model

    if not (folder / "base" / "config.json").exists():
        write_data(folder / "data", seed)
        write_model(folder / "base", seed)


def train_sft(output: Path, model: Path, folder: Path, settings: dict) -> None:
    data = folder / "data" / "demonstrations.jsonl"
    train(output, ["-m", "sft_core.train"], model, data, settings)


def train_grpo(folder: Path, engine: str) -> None:
    ranks = torch.cuda.device_count() or min(2, os.cpu_count() or 1)  # on a CPU a rank samples with one core
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "-m", "grpo_core.train"]
    train(folder / "grpo", launcher, folder / "sft", folder / "data" / "train.jsonl", GRPO | {"engine": engine})


def train_control(folder: Path) -> Path:
    """Continue SFT on its demonstrations for as long as GRPO took, at a tenth of its peak learning rate."""
    seconds = json.loads((folder / "grpo" / "quickstart.json").read_text())["seconds"]
    rows = [json.loads(line) for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    step_times = sorted(row["step_time"] for row in rows)
    steps = round(seconds / step_times[len(step_times) // 2])
    settings = SFT | {"max_steps": steps, "learning_rate": SFT["learning_rate"] / 10}
    train_sft(folder / "control", folder / "sft", folder, settings)
    return folder / "control"


def train(output: Path, launcher: list, model: Path, data: Path, settings: dict) -> None:
    if (output / "quickstart.json").exists():
        return
    start = time.time()
    options = {"model_name_or_path": model, "dataset_name": data, "output_dir": output} | SHARED | settings
    run([*launcher, *(f"--{name}={value}" for name, value in options.items())])
    write_atomically(output / "quickstart.json", json.dumps({"seconds": time.time() - start}))


def run(command: list) -> None:
    """Run a Python command to its end; its failure is ours."""
    command = [sys.executable, *map(str, command)]
    print("$ python", *command[1:], flush=True)
    code = subprocess.run(command).returncode
    if code != 0:
        raise SystemExit(code)


def print_table(models: dict[str, Path]) -> None:
    problems = len(read(models["before SFT"])["greedy"])
    rows = []
    for name, model in models.items():
        result = {mode: interval(shares) for mode, shares in read(model).items()}
        record = model / "quickstart.json"
        minutes = f"{json.loads(record.read_text())['seconds'] / 60:.1f}" if record.exists() else "-"
        cells = [f"{mean:.1f} % +- {half:.1f}" for mean, half in result.values()]
        rows.append([name, *cells, minutes])
    print("\n" + table([f"{problems} held-out problems", "greedy", "pass@1 at temperature 1", "minutes"], rows))


if __name__ == "__main__":
    main()
