"""What a run can be told: flat frozen dataclasses, one field an option, validated as they are made.

`ModelConfig` and `ScriptArguments` (model and data) are shared by both trainers; `TrainingConfig` holds the options of
any training run, `SFTConfig` adds those of supervised training (`grpo_core.config` adds those of GRPO). Names and
meanings follow Hugging Face's TrainingArguments, TRL and open-r1 wherever an option exists there; every step counted
here is an optimizer step. How they are read from YAML and the command line: `sft_core/cli.py`.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

SCHEDULES = ("linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup")


class JsonDict(dict):
    """A dict that can also be written as a JSON object on the command line."""

    def __init__(self, value: str | dict) -> None:
        parsed = json.loads(value) if isinstance(value, str) else value
        if not isinstance(parsed, dict):
            raise ValueError(f"expected a JSON object, got {value!r}")
        super().__init__(parsed)


def option(default: Any, help: str) -> Any:
    """A dataclass field with its one-line documentation (also the source of README's option tables)."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def option_table(config_type: type, base: type | None = None) -> str:
    """README's table of a configuration: a row an option, without those that `base` has in the same form."""
    inherited = {f.name: (f.default, f.metadata["help"]) for f in dataclasses.fields(base)} if base else {}
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for f in dataclasses.fields(config_type):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if inherited.get(f.name) == (f.default, f.metadata["help"]):
            continue
        shown = "required" if default == "" else " ".join(default) if isinstance(default, list) else default
        rows.append(f"| `{f.name}` | {shown} | {f.metadata['help'].replace('|', '/')} |")
    return "\n".join(rows)


@dataclass(frozen=True)
class ModelConfig:
    model_name_or_path: str = option("", "Model to start from: a Hub id or a folder.")
    model_revision: str = option("main", "Branch, tag or commit of a Hub model.")

    def __post_init__(self) -> None:
        require(self.model_name_or_path != "", "--model_name_or_path is missing: give a Hub id or a model folder.")


@dataclass(frozen=True)
class ScriptArguments:
    dataset_name: str = option("", "Data: a Hub id, a .json/.jsonl/.parquet file, or a folder from save_to_disk.")
    dataset_config: str | None = option(None, "Configuration (subset) of a Hub data set.")
    dataset_train_split: str = option("train", "Split to train on.")

    def __post_init__(self) -> None:
        require(self.dataset_name != "", "--dataset_name is missing: give a Hub id or a data file.")


@dataclass(frozen=True)
class TrainingConfig:
    output_dir: str = option("", "Folder for checkpoints, logs and the final model.")
    overwrite_output_dir: bool = option(
        False, "Move what another run left in output_dir aside instead of refusing (nothing is ever deleted)."
    )
    seed: int = option(42, "Seed of the data order and of sampling.")
    num_train_epochs: float = option(1.0, "Passes over the training rows (used where max_steps is not given).")
    max_steps: int = option(-1, "Optimizer steps; -1: as many as num_train_epochs needs.")
    per_device_train_batch_size: int = option(8, "Sequences per device and accumulation step.")
    gradient_accumulation_steps: int = option(1, "Accumulation steps; a step takes the product of the two x devices.")
    max_tokens_per_micro_batch: int = option(
        8192, "Token budget of one packed forward and backward pass; bounds memory, never changes the gradient."
    )
    learning_rate: float = option(2e-5, "Peak learning rate.")
    lr_scheduler_type: str = option("linear", f"Schedule after the warm-up: {', '.join(SCHEDULES)}.")
    lr_scheduler_kwargs: JsonDict | None = option(
        None, 'JSON; cosine_with_min_lr takes {"min_lr_rate": share of the peak} or {"min_lr": value}.'
    )
    warmup_ratio: float = option(0.0, "Share of the steps that warm up linearly.")
    warmup_steps: int = option(0, "Warm-up steps; above 0 it replaces warmup_ratio.")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay (matrices only).")
    adam_beta1: float = option(0.9, "AdamW's beta 1.")
    adam_beta2: float = option(0.999, "AdamW's beta 2.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = option(1.0, "Gradient norm clipped to this; 0: not clipped.")
    bf16: bool | None = option(None, "Compute in bfloat16 (masters stay float32); default: on CUDA yes, on CPU no.")
    fp16: bool = option(False, "Refused: float16 needs loss scaling; use bf16.")
    gradient_checkpointing: bool = option(False, "Recompute each block's activations in the backward pass.")
    logging_steps: int = option(1, "Steps between log lines.")
    report_to: list[str] = option(["tensorboard"], "Any of tensorboard, wandb; or none.")
    run_name: str | None = option(None, "Name of the run in wandb.")
    save_strategy: Literal["no", "steps"] = option("steps", "Write checkpoints every save_steps, or none.")
    save_steps: float = option(500, "Steps between checkpoints; below 1: a share of all steps.")
    save_total_limit: int | None = option(None, "Checkpoints to keep; older ones are removed.")
    ddp_timeout: int = option(
        1800, "Seconds a collective or a phase may take before all stacks are dumped and it ends."
    )

    def __post_init__(self) -> None:
        require(self.output_dir != "", "--output_dir is missing: give a folder for checkpoints, logs and the model.")
        require(not self.fp16, "fp16 is not supported (it needs loss scaling): use --bf16 true.")
        names = ", ".join(SCHEDULES)
        require(self.lr_scheduler_type in SCHEDULES, f"unknown lr_scheduler_type {self.lr_scheduler_type!r}: {names}.")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_micro_batch",
                     "logging_steps", "ddp_timeout"):  # fmt: skip
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_ratio", "warmup_steps"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}.")
        require(self.warmup_ratio <= 1, f"warmup_ratio is a share of the run (0 to 1), got {self.warmup_ratio}.")
        require(self.save_steps > 0, f"save_steps must be positive, got {self.save_steps}.")
        require(self.max_steps > 0 or self.num_train_epochs > 0, "give --max_steps or --num_train_epochs above 0.")

    def total_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps of the whole run, for a data set that takes `steps_per_epoch` of them."""
        return self.max_steps if self.max_steps > 0 else max(1, math.ceil(self.num_train_epochs * steps_per_epoch))

    def steps_between_saves(self, total: int) -> int:
        """Steps between two checkpoints; `save_steps` below 1 is a share of `total`."""
        return int(self.save_steps) if self.save_steps >= 1 else max(1, math.ceil(self.save_steps * total))


@dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    max_length: int = option(1024, "Longest sequence in tokens; longer rows keep their start.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_length >= 2, f"max_length must be at least 2, got {self.max_length}.")
