"""Reads and checks all input of a run before any weight is loaded; errors in the input are reported here.

Both trainers call `prepare_base`. `prepare` adds what a supervised run needs; `grpo_core/prepare.py` adds GRPO's part.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed

from sft_core.data.chat_template import check_template, set_up
from sft_core.data.rows import fingerprint, first_row, load_splits, without_format
from sft_core.dataset import Examples, check_columns, encode_row, needs_template, supervised_examples, what_is_trained
from sft_core.model.adapters import check_adapters, describe
from sft_core.model.architectures import check_architecture
from sft_core.model.memory_plan import Plan, dry_run, memory_plan
from sft_core.model.optim import check_schedule
from sft_core.model.parallel import check_compile
from sft_core.model.policy import (
    architecture,
    check_positions,
    compute_in_bf16,
    count_parameters,
    load_model_info,
    load_tokenizer,
    local_copy,
    planned_dtype,
    stop_token_ids,
)
from sft_core.model.trl_names import with_init_kwargs
from sft_core.run import distributed
from sft_core.run.benchmarks import check_benchmarks
from sft_core.run.callbacks import Handed
from sft_core.run.cli import as_yaml
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig, TrainingConfig
from sft_core.run.hub import check_hub
from sft_core.run.logging import check_report_to, set_log_level
from sft_core.run.options import require
from sft_core.run.output_dir import differences, is_finished, prepare_output_dir, read_state
from sft_core.sampler import Shuffled, Streamed

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

EVAL_METRICS = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
SOME_STEPS = 1_000_000  # steps per epoch, until the length of an epoch is known


@dataclass(frozen=True)
class Base:
    """What a run of either trainer consists of."""

    algorithm: str
    model: ModelConfig
    data: ScriptArguments
    options: dict[str, Any]  # all options, for logs and checkpoints
    recipe: str  # all options as YAML
    rank: int
    world_size: int
    device: torch.device
    bf16: bool
    model_info: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    template: str  # the line to print about the chat template
    rows: Dataset | IterableDataset
    test_rows: Dataset | None  # None: the run does not evaluate
    handed: Handed | None  # the objects passed to a trainer class; None on the command line

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def only_evaluates(self) -> bool:
        return self.handed is not None and self.handed.only_evaluates


def prepare_base(
    algorithm: str, model: ModelConfig, data: ScriptArguments, config: TrainingConfig, handed: Handed | None = None
) -> Base:
    """Join the process group, then read what is cheap to read: the tokenizer and the rows. A collective.

    Raises:
        ValueError: the input is wrong; one sentence names the problem and the remedy.
    """
    set_log_level(config)
    set_seed(config.seed)
    check_schedule(config, config.total_steps(SOME_STEPS))
    check_report_to(config.report_to)
    rank, world_size, _, device = distributed.init_distributed(config.ddp_timeout)
    if handed is not None and handed.write_model is not None:
        distributed.on_first_rank(handed.write_model, patient=True)
    check_compile(config, device)
    bf16 = compute_in_bf16(config.bf16, model.dtype, device)
    distributed.on_first_rank(lambda: check_hub(config))
    distributed.on_first_rank(lambda: check_benchmarks(config))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes that tokenise are forks
    model_info = check_model(model, config)
    _, tokenizer = load_tokenizer(model, config.chat_template, handed and handed.processing_class)
    supervised = config if isinstance(config, SFTConfig) else None
    if handed is None:
        rows, test_rows = load_splits(data, config.evaluates, supervised is not None and supervised.dataset_streaming)
    else:
        rows = without_format(handed.train_dataset)
        test_rows = without_format(handed.eval_dataset) if config.evaluates else None
    conversations = supervised is None or needs_template(first_row(rows))
    eos_token = None if supervised is None else supervised.eos_token
    set_up(tokenizer, eos_token, conversations, chatml_default=supervised is not None)
    require(
        not model.use_peft or len(tokenizer) <= model_info.get_text_config().vocab_size,
        f"{model.model_name_or_path} has no chat template, and an adapter cannot hold the new tokens of the default "
        "(ChatML): give a --chat_template whose tokens the model has, or train the whole model without --use_peft.",
    )
    require(
        supervised is not None or len(tokenizer) <= model_info.get_text_config().vocab_size,
        f"the tokenizer of {model.model_name_or_path} has {len(tokenizer)} tokens, more than the model's "
        "embedding: train the model with sft_core.train first, which enlarges the embedding.",
    )
    require(
        supervised is None or tokenizer.is_fast,
        f"{model.model_name_or_path} has no fast tokenizer, which is needed to locate tokens in the text: "
        "save one in the model's folder (AutoTokenizer with use_fast=True).",
    )
    stop_ids = stop_token_ids(tokenizer, model)
    more = config.chat_template_kwargs
    template = check_template(tokenizer, stop_ids, supervised is not None, more) if conversations else ""
    return Base(
        algorithm=algorithm,
        model=model,
        data=data,
        options=asdict(model) | asdict(data) | asdict(config),
        recipe=as_yaml([model, data, config]),
        rank=rank,
        world_size=world_size,
        device=device,
        bf16=bf16,
        model_info=model_info,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        template=template,
        rows=rows,
        test_rows=test_rows,
        handed=handed,
    )


def check_model(model: ModelConfig, config: TrainingConfig) -> PretrainedConfig:
    """The model's configuration. Raises ValueError if the model cannot be trained with the options of `config`."""
    info = load_model_info(model)
    check_architecture(info, model)
    check_adapters(model, config, info)
    return info


def check_best_metric(config: TrainingConfig, names: Iterable[str]) -> None:
    """Raise ValueError if metric_for_best_model is not among `names`, the metrics of an evaluation."""
    metric, known = config.metric_for_best_model, [name.removeprefix("eval_") for name in names]
    require(
        metric is None or metric.removeprefix("eval_") in known,
        f"metric_for_best_model {metric and metric.removeprefix('eval_')} is not a metric of the evaluation: give one "
        f"of {', '.join(known)}.",
    )


def open_output_dir(base: Base, config: TrainingConfig, **more: Any) -> tuple[dict[str, Any], Path | None]:
    """Lock and prepare output_dir for this run; returns the run's identity and the checkpoint to resume from.

    A collective. Options that differ from the interrupted run's are listed in one warning line. If a part of the
    identity differs, such as model, data or seed, the run is refused.
    """
    data, test_data = distributed.on_first_rank(
        lambda: [rows and fingerprint(rows) for rows in (base.rows, base.test_rows)], patient=True
    )
    options = base.options | {"chat_template": base.tokenizer.chat_template, "test_data": test_data}
    identity = more | {
        "algorithm": base.algorithm,
        "model": base.model.model_name_or_path,
        "architecture": architecture(base.model_info),
        "data": data,
        "seed": config.seed,
        "options": options,
        **describe(base.model),
    }
    distributed.on_first_rank(lambda: distributed.lock_output_dir(config.output_dir))
    if base.handed is None and distributed.on_first_rank(lambda: is_finished(Path(config.output_dir), identity)):
        if base.rank == 0:
            print(
                f"this run is finished and its model is in {config.output_dir}: to train longer, raise --max_steps or "
                "--num_train_epochs; to start over, give another --output_dir."
            )
        distributed.shutdown()
        raise SystemExit(0)
    checkpoint = prepare_output_dir(
        config.output_dir,
        identity,
        config.overwrite_output_dir,
        config.resume_from_checkpoint,
        anew=base.handed is not None and base.handed.anew,
    )
    if checkpoint is not None and base.rank == 0:
        before = read_state(checkpoint)["identity"].get("options", options)
        if changed := differences(before, json.loads(json.dumps(options))):
            print(f"warning: options differ from those of the interrupted run: {changed}", flush=True)
    return identity, checkpoint


@dataclass(frozen=True)
class Run(Base):
    """A supervised run that has been checked and may start."""

    config: SFTConfig
    local_model: ModelConfig  # the model's folder on this machine
    source: Shuffled | Streamed  # gives the rows to train on
    samples: int | None  # how many rows there are to train on; None: streamed
    test_examples: Examples | None
    identity: dict[str, Any]
    checkpoint: Path | None  # to resume from
    sequences_per_step: int  # rows, or bins with packing
    total_steps: int
    summary: str

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps per epoch. The number of streamed rows is not known, so their whole run is one epoch."""
        if isinstance(self.source, Streamed):
            return self.total_steps
        return self.source.sequences_per_pass / self.sequences_per_step


def prepare(model: ModelConfig, data: ScriptArguments, config: SFTConfig, handed: Handed | None = None) -> Run:
    """Check all input of a supervised run and return the run, which has its own copies of the options. A collective.

    Raises:
        ValueError: the input is wrong; one sentence names the problem and the remedy.
    """
    model, config = with_init_kwargs(model, config)
    model, data, config = model.frozen(), data.frozen(), config.frozen()
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps  # per rank and step
    if config.dry_run:
        info = check_model(model, config)
        assert config.max_length is not None
        check_lengths(info, config.max_length)
        itemsize, parameters = planned_dtype(model, config).itemsize, count_parameters(info, model.trust_remote_code)
        dry_run(Plan(info, model, config, parameters, config.dry_run_gpus, rows, config.max_length, itemsize))
    check_best_metric(config, EVAL_METRICS)
    base = prepare_base("sft", model, data, config, handed)
    source, rows_line = training_rows(base, config)
    test_examples = None
    if base.test_rows is not None:
        test_examples = supervised_examples(base.test_rows, base.tokenizer, base.stop_ids, config)
        check_lengths(base.model_info, int(test_examples.lengths.max()))
        rows_line += f"; {len(test_examples.lengths)} rows to evaluate on; {test_examples}"
    samples = None if isinstance(source, Streamed) else len(source.lengths)
    of_rows = {"examples": samples, "packing": config.packing, "row_lengths": source.digest}
    identity, checkpoint = open_output_dir(base, config, **of_rows, **what_is_trained(config))
    sequences_per_step = rows * base.world_size
    per_pass = source.sequences_per_pass if isinstance(source, Shuffled) else 0
    total_steps = config.total_steps(per_pass / sequences_per_step)
    check_schedule(config, total_steps)
    longest = source.longest or config.max_length or 0
    parameters = count_parameters(base.model_info, model.trust_remote_code)
    plan = Plan(base.model_info, model, config, parameters, base.world_size, rows, longest, base.dtype.itemsize)
    what = f"bins of at most {config.max_length} tokens" if config.packing else "rows"
    steps_line = f"{total_steps} steps of {sequences_per_step} {what}"
    summary = [base.template, rows_line, steps_line, memory_plan(plan, base.device)]
    return Run(
        **vars(base),
        config=config,
        local_model=local_copy(model),
        source=source,
        samples=samples,
        test_examples=test_examples,
        identity=identity,
        checkpoint=checkpoint,
        sequences_per_step=sequences_per_step,
        total_steps=total_steps,
        summary="\n".join(line for line in summary if line),
    )


def training_rows(base: Base, config: SFTConfig) -> tuple[Shuffled | Streamed, str]:
    """The rows to train on, in the order of training, and a line to print about them. A collective.

    Raises:
        ValueError: a row (streamed: one of the first rows) does not fit its form, or is too long for the model.
    """
    from datasets import IterableDataset

    bin_size = config.max_length if config.packing else None
    unused = check_columns(list(first_row(base.rows)), config)
    note = f"; columns not used: {', '.join(unused)}" if unused else ""
    if isinstance(base.rows, IterableDataset):
        tokenizer = copy.deepcopy(base.tokenizer)  # for the thread that tokenises
        encode = partial(encode_row, tokenizer=tokenizer, stop_ids=base.stop_ids, config=config)
        for i, row in enumerate(base.rows.take(8)):
            encode(row, i)
        assert config.max_length is not None
        check_lengths(base.model_info, config.max_length)
        source = Streamed(base.rows, encode, bin_size, config.seed, base.data.dataset_name)
        return source, f"rows are streamed in the order of their files{note}"
    examples = supervised_examples(base.rows, base.tokenizer, base.stop_ids, config)
    check_lengths(base.model_info, int(examples.lengths.max()))
    shuffled = Shuffled(examples, bin_size, config.seed)
    line = f"{len(examples.lengths)} rows to train on"
    if bin_size is not None:
        fill = examples.lengths.sum() / (shuffled.sequences_per_pass * bin_size)
        line += f" in {shuffled.sequences_per_pass} bins, {100 * fill:.1f} % full"
    return shuffled, f"{line}; {examples}{note}"


def check_lengths(info: PretrainedConfig, longest: int) -> None:
    check_positions(info, longest, "a row", "lower --max_length to {limit}")
