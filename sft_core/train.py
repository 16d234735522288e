"""Supervised fine-tuning of a causal language model on conversations, in one loop.

    torchrun --nproc_per_node 8 -m sft_core.train --config recipe.yaml [--field value ...]
    python -m sft_core.train --model_name_or_path M --dataset_name rows.jsonl --output_dir runs/sft

The loss is the mean negative log-likelihood of the step's trained tokens (what the assistant says, its end of turn
included). Rows are packed end to end without padding and without seeing each other. The mean is over the whole
optimizer step on all ranks, so how it is cut into micro-batches and ranks does not change its gradient. The same
command resumes from the last complete checkpoint. GRPO (`grpo_core/train.py`) is this loop plus rollouts.

Left out on purpose: padding, dropout, adapters, evaluation during training, streaming data.
"""

import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from tqdm import tqdm

from kernels.linear_logprob import CHUNK_ELEMENTS
from sft_core import guards
from sft_core.checkpoint import load_checkpoint, prepare_output_dir, save_checkpoint
from sft_core.cli import parse
from sft_core.config import ModelConfig, ScriptArguments, SFTConfig
from sft_core.data import fingerprint, load_rows, row_order, supervised_examples
from sft_core.export import export_model
from sft_core.metrics import MetricsLogger, check_report_to, reduce_metrics
from sft_core.model import (
    architecture,
    compute_in_bf16,
    count_parameters,
    load_policy,
    load_tokenizer,
    local_copy,
    stop_token_ids,
)
from sft_core.optim import check_schedule, clip_gradients, guarded_step, make_optimizer, make_scheduler
from sft_core.packing import idle_sequences, pack, pack_sequences, step_counts
from sft_core.parallel import make_mesh, shard

CONSOLE = ("loss", "entropy", "grad_norm", "learning_rate", "tokens_per_second")


def main(argv: list[str] | None = None) -> None:
    """Train as told by `argv` (default: the command line); exit code 2 for bad input, before weights are loaded."""
    with guards.usage_errors():
        model_config, data, config = parse(
            (ModelConfig, ScriptArguments, SFTConfig), sys.argv[1:] if argv is None else argv
        )
        check_schedule(config)
        check_report_to(config.report_to)
        rank, world_size, _, device = guards.init_distributed(config.ddp_timeout)
        bf16 = compute_in_bf16(config.bf16, device)
        dtype = torch.bfloat16 if bf16 else torch.float32
        model_info, tokenizer = load_tokenizer(model_config)
        stop_ids = stop_token_ids(tokenizer, model_config)
        rows = load_rows(data, data.dataset_train_split)
        examples, dropped = supervised_examples(rows, tokenizer, stop_ids, config.max_length)
        identity = {
            "algorithm": "sft",
            "model": model_config.model_name_or_path,
            "architecture": architecture(model_info),
            "data": fingerprint(rows),
            "seed": config.seed,
        }
        guards.on_first_rank(lambda: guards.lock_output_dir(config.output_dir))
        checkpoint = prepare_output_dir(config.output_dir, identity, config.overwrite_output_dir)
        rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
        total_steps = config.total_steps(len(examples) / rows_per_step)
        plan = guards.memory_plan(
            device,
            num_parameters=count_parameters(model_info),
            world_size=world_size,
            vocab_size=model_info.vocab_size,
            chunk_tokens=CHUNK_ELEMENTS[device.type] // model_info.vocab_size,
            compute_dtype=dtype,
            engine_kv_bytes=-1,
        )
    if rank == 0:
        print(f"{len(examples)} rows to train on, {dropped} dropped (nothing to learn); {total_steps} steps of "
              f"{rows_per_step} rows\n{plan}")  # fmt: skip
    policy = shard(
        load_policy(local_copy(model_config)),
        make_mesh(device),
        bf16=bf16,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    optimizer = make_optimizer(policy, config)
    scheduler = make_scheduler(optimizer, config, total_steps)
    progress = {"step": 0, "rows": 0, "num_tokens": 0}
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, policy, optimizer, scheduler)
    logger = MetricsLogger(
        config.output_dir, config.report_to, progress["step"], asdict(model_config) | asdict(data) | asdict(config),
        CONSOLE, total_steps,
    )  # fmt: skip
    phases = guards.Phases(config.ddp_timeout)
    stop = guards.StopSignal()

    def save() -> None:
        save_checkpoint(
            config.output_dir, progress["step"], policy, optimizer, scheduler,
            progress=progress, identity=identity, save_total_limit=config.save_total_limit,
        )  # fmt: skip

    saved_at, stopping = progress["step"], False
    bar = tqdm(total=total_steps, initial=progress["step"], desc="sft", disable=None if rank == 0 else True)
    while progress["step"] < total_steps and not stopping:
        start = time.perf_counter()
        # 1 batch: this rank's share of the step's rows, packed
        with phases("batch"):
            chosen = row_order(len(examples), config.seed, progress["rows"], rows_per_step)[rank::world_size]
            own = [examples[i] for i in chosen]
            bins = pack([len(ids) for ids, _ in own], config.max_tokens_per_micro_batch)
            batches = [pack_sequences([own[i][0] for i in b], [own[i][1] for i in b], device) for b in bins]
        # 2 denominator: the step's trained tokens over all ranks, before the first backward
        counts = step_counts(batches, device)
        # 3 forward and backward
        with phases("train"):
            sums = {"loss": torch.zeros((), device=device), "entropy": torch.zeros((), device=device)}
            for i in range(counts.micro_batches):
                weight = 1.0 if i < len(batches) else 0.0
                logps, entropies = policy(batches[i] if weight else idle_sequences(device))
                loss = -weight * logps.sum() / counts.num_tokens
                loss.backward()
                sums["loss"] += loss.detach()
                sums["entropy"] += weight * entropies.detach().sum() / counts.num_tokens
            grad_norm = clip_gradients(policy.parameters(), config.max_grad_norm)
            own_tokens = sum(len(ids) for ids, _ in own)
            peak = {"peak_memory_gib": guards.peak_memory_gib(device), "stop": float(stop.requested)}
            metrics = reduce_metrics(sums | {"tokens": own_tokens}, peak, device=device)
            stopping = bool(metrics.pop("stop"))
            # 4 step, unless something is not finite
            learning_rate = guarded_step(optimizer, scheduler, metrics["loss"], float(grad_norm))
        progress["step"] += 1
        progress["rows"] += rows_per_step
        progress["num_tokens"] += int(metrics["tokens"])
        # 5 log, save
        seconds, timing = time.perf_counter() - start, phases.pop()
        if progress["step"] % config.logging_steps == 0 or progress["step"] == total_steps:
            metrics |= timing | {
                "grad_norm": float(grad_norm),
                "learning_rate": learning_rate,
                "epoch": progress["rows"] / len(examples),
                "num_tokens": progress["num_tokens"],
                "step_time": seconds,
                "tokens_per_second": metrics.pop("tokens") / seconds,
            }
            logger.log(progress["step"], metrics)
        bar.update()
        due = config.save_strategy == "steps" and progress["step"] % config.steps_between_saves(total_steps) == 0
        if due or stopping:
            with phases("save"):
                save()
                saved_at = progress["step"]
    bar.close()
    if not stopping:
        with phases("export"):
            if config.save_strategy == "steps" and saved_at != progress["step"]:
                save()
            export_model(policy, tokenizer, config.output_dir, dtype, stop_ids)
    elif rank == 0:
        print(f"stopped by a signal after step {progress['step']}: the same command goes on from there")
    logger.close()
    dist.barrier()
    guards.shutdown()


if __name__ == "__main__":
    main()
