"""What either trainer learns and checks before it loads a weight; wrong input is said here.

`join` is common to both; `prepare` makes a supervised run of it (`grpo_core/setup.py` makes a GRPO run).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed

from sft_core import guards
from sft_core.callbacks import check_benchmarks, get_callbacks, init_wandb_training
from sft_core.checkpoint import prepare_output_dir
from sft_core.cli import as_yaml, parse
from sft_core.config import ModelConfig, ScriptArguments, SFTConfig, TrainingConfig
from sft_core.data import fingerprint, load_splits, supervised_examples
from sft_core.flow import set_log_level, start_logging
from sft_core.hub import check_hub
from sft_core.metrics import check_report_to
from sft_core.model import (
    architecture,
    compute_in_bf16,
    count_parameters,
    load_model_info,
    load_tokenizer,
    local_copy,
    stop_token_ids,
)
from sft_core.optim import check_schedule
from sft_core.plan import Plan, dry_run, memory_plan


@dataclass(frozen=True)
class Base:
    """What both trainers know of a run."""

    algorithm: str
    model: ModelConfig
    data: ScriptArguments
    options: dict[str, Any]  # all of them, for the record
    recipe: str  # the same as YAML
    rank: int
    world_size: int
    device: torch.device
    bf16: bool
    model_info: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    rows: Dataset
    test_rows: Dataset | None  # where the run evaluates

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def num_parameters(self) -> int:
        return count_parameters(self.model_info, self.model.trust_remote_code)


def join(algorithm: str, model: ModelConfig, data: ScriptArguments, config: TrainingConfig) -> Base:
    """Join the process group, then read what is cheap: tokenizer and rows. A collective.

    Raises:
        ValueError: the user's input, in one sentence that names the remedy.
    """
    set_log_level(config)
    set_seed(config.seed)
    check_schedule(config)
    init_wandb_training(config)
    check_report_to(config.report_to)
    get_callbacks(config, model)  # refuses unknown names
    rank, world_size, _, device = guards.init_distributed(config.ddp_timeout)
    bf16 = compute_in_bf16(config.bf16, model.dtype, device)
    guards.on_first_rank(lambda: check_hub(config))
    guards.on_first_rank(lambda: check_benchmarks(config))
    model_info, tokenizer = load_tokenizer(model, config.chat_template, getattr(config, "eos_token", None))
    stop_ids = stop_token_ids(tokenizer, model)
    rows, test_rows = load_splits(data, config.evaluates)
    return Base(
        algorithm=algorithm, model=model, data=data, options=asdict(model) | asdict(data) | asdict(config),
        recipe=as_yaml([model, data, config]), rank=rank, world_size=world_size, device=device, bf16=bf16,
        model_info=model_info, tokenizer=tokenizer, stop_ids=stop_ids, rows=rows, test_rows=test_rows,
    )  # fmt: skip


def claim(base: Base, config: TrainingConfig, **more: Any) -> tuple[dict[str, Any], Path | None]:
    """Make output_dir this run's; returns what makes it this run, and the checkpoint to resume from. A collective."""
    identity = {
        "algorithm": base.algorithm,
        "model": base.model.model_name_or_path,
        "architecture": architecture(base.model_info),
        "data": fingerprint(base.rows),
        "seed": config.seed,
    } | more
    guards.on_first_rank(lambda: guards.lock_output_dir(config.output_dir))
    checkpoint = prepare_output_dir(
        config.output_dir, identity, config.overwrite_output_dir, config.resume_from_checkpoint
    )
    return identity, checkpoint


@dataclass(frozen=True)
class Run(Base):
    """A supervised run that has been checked and may start."""

    config: SFTConfig
    local_model: ModelConfig  # the model's folder on this machine
    examples: list[tuple[list[int], list[bool]]]  # token ids and loss mask
    test_examples: list[tuple[list[int], list[bool]]]
    identity: dict[str, Any]
    checkpoint: Path | None  # to resume from
    rows_per_step: int
    total_steps: int
    summary: str

    @property
    def steps_per_epoch(self) -> float:
        return len(self.examples) / self.rows_per_step


def prepare(argv: list[str]) -> Run:
    """Read the options of a supervised run and check everything that can be checked. A collective.

    Raises:
        ValueError: the user's input, in one sentence that names the remedy.
    """
    start_logging()
    model, data, config = parse((ModelConfig, ScriptArguments, SFTConfig), argv)
    if config.dry_run:
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
        dry_run(load_model_info(model), model, config, rows=rows, longest=config.max_length)
    base = join("sft", model, data, config)
    examples, dropped = supervised_examples(base.rows, base.tokenizer, base.stop_ids, config.max_length)
    test_examples: list[tuple[list[int], list[bool]]] = []
    if base.test_rows is not None:
        test_examples, _ = supervised_examples(base.test_rows, base.tokenizer, base.stop_ids, config.max_length)
    identity, checkpoint = claim(base, config, examples=len(examples))
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * base.world_size
    total_steps = config.total_steps(len(examples) / rows_per_step)
    plan = Plan(
        base.model_info, model, config, base.num_parameters, base.world_size, rows=rows_per_step // base.world_size,
        longest=max(len(ids) for ids, _ in examples), itemsize=base.dtype.itemsize,
    )  # fmt: skip
    summary = [
        f"{len(examples)} rows to train on, {dropped} dropped (nothing to learn); {total_steps} steps of "
        f"{rows_per_step} rows" + (f"; {len(test_examples)} rows to evaluate on" if test_examples else ""),
        memory_plan(plan, base.device),
    ]
    return Run(
        **vars(base), config=config, local_model=local_copy(model), examples=examples, test_examples=test_examples,
        identity=identity, checkpoint=checkpoint, rows_per_step=rows_per_step, total_steps=total_steps,
        summary="\n".join(summary),
    )  # fmt: skip
