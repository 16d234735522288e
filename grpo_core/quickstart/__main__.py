"""From nothing to a model that GRPO made better at arithmetic, on any machine, in one command.

    make quickstart                          or: python -m grpo_core.quickstart
    make quickstart-control                  the same minutes spent on more SFT instead

Builds a small Llama and a set of word problems (`task.py`), warm-starts it with
`python -m sft_core.train` on worked demonstrations, trains it with `torchrun -m grpo_core.train` on problems and
answers alone, sampling through vLLM, and scores all three on held-out problems. Every part is the one that a large
run uses; only the sizes are small. A finished part is not done again: delete the folder to start over.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from grpo_core.comparison import MODELS, Comparison
from grpo_core.quickstart.task import write_data, write_model

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
CONTROL = {  # continues the warm start until its time is over
    "max_steps": 1000000,
    "learning_rate": SFT["learning_rate"] / 10,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}
SHARED: dict[str, Any] = {"save_strategy": "no", "logging_steps": 10, "max_tokens_per_micro_batch": 8192}
SAMPLES = 4  # per held-out problem, for pass@1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default="runs/quickstart", help="where models, data and results go")
    parser.add_argument("--control", action="store_true", help="spend GRPO's minutes on more SFT instead")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and of the untrained model")
    parser.add_argument("--engine", default="vllm", help="what samples: vllm or torch")
    arguments = parser.parse_args()
    started = time.time()
    folder = Path(arguments.folder).expanduser()
    build(folder, arguments.seed)
    length, engine = GRPO["max_completion_length"], arguments.engine
    heldout = {"file": str(folder / "data" / "heldout.jsonl"), "length": length, "engine": engine}
    comparison = Comparison(
        folder,
        data={"sft": folder / "data" / "demonstrations.jsonl", "grpo": folder / "data" / "train.jsonl"},
        options={"sft": as_options(SHARED | SFT), "grpo": as_options(SHARED | GRPO | {"engine": engine})},
        heldout=heldout | {"samples": SAMPLES, "dtype": "float32"},
        # On a CPU a rank samples with one core.
        ranks={"sft": 1, "grpo": torch.cuda.device_count() or min(2, os.cpu_count() or 1)},
    )
    comparison.train("sft", "before")
    comparison.train("grpo", "sft")
    if arguments.control:
        comparison.train("control", "sft", comparison.seconds("grpo"), tuple(as_options(CONTROL)))
    names = [name for name in MODELS if name != "control" or arguments.control]
    comparison.evaluate(*names)
    comparison.report(*names)
    print(f"\n{(time.time() - started) / 60:.1f} minutes in all. Curves: tensorboard --logdir {folder}")


def build(folder: Path, seed: int) -> None:
    """The problems and the untrained model."""
    if not (folder / "before" / "config.json").exists():
        write_data(folder / "data", seed)
        write_model(folder / "before", seed)


def as_options(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


if __name__ == "__main__":
    main()
