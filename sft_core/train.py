"""Supervised fine-tuning of a causal language model on conversations, in one loop.

    torchrun --nproc_per_node 8 -m sft_core.train --config recipe.yaml [--field value ...]
    python -m sft_core.train --model_name_or_path M --dataset_name rows.jsonl --output_dir runs/sft

The loss is the mean negative log-likelihood of the step's trained tokens (what the assistant says, its end of turn
included). Rows are packed end to end without padding and without seeing each other. The mean is over the whole
optimizer step on all ranks, so how it is cut into micro-batches and ranks does not change its gradient. The same
command resumes from the last complete checkpoint. GRPO (`grpo_core/train.py`) is this loop plus rollouts.

Left out on purpose: padding, dropout other than the adapters' own, streaming data.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from sft_core import guards
from sft_core.adapters import dropout
from sft_core.checkpoint import load_checkpoint, save_checkpoint
from sft_core.data import row_order
from sft_core.errands import Errands
from sft_core.export import export_model
from sft_core.flow import announce
from sft_core.metrics import MetricsLogger, reduce_metrics
from sft_core.model import Policy, load_policy
from sft_core.optim import clip_gradients, guarded_step, make_optimizer, make_scheduler
from sft_core.packing import PackedSequences, idle_sequences, pack, pack_sequences, step_counts
from sft_core.parallel import make_mesh, memory_options, shard
from sft_core.setup import Run, prepare

CONSOLE = ("loss", "eval_loss", "entropy", "grad_norm", "learning_rate", "tokens_per_second")


def main(argv: list[str] | None = None) -> None:
    """Train as told by `argv` (default: the command line); exit code 2 for bad input, before weights are loaded."""
    with guards.usage_errors():
        run = prepare(sys.argv[1:] if argv is None else argv)
    announce(run)
    train(run).finish()


def train(run: Run) -> Errands:
    """The loop. Returns what the first rank has left to do when the weights are out of memory."""
    config, device, total_steps = run.config, run.device, run.total_steps
    policy = load_policy(run.local_model, dtype=run.dtype, seed=config.seed, known_as=run.model.model_name_or_path)
    policy = shard(policy, make_mesh(device), bf16=run.bf16, **memory_options(config))
    torch.manual_seed(config.seed + run.rank)  # the dropout of adapters, where there is one
    optimizer = make_optimizer(policy, config)
    scheduler = make_scheduler(optimizer, config, total_steps)
    progress: dict[str, Any] = {"step": 0, "rows": 0, "num_tokens": 0, "loss_sum": 0.0, "seconds": 0.0}
    if run.checkpoint is not None:
        progress |= load_checkpoint(run.checkpoint, policy, optimizer, scheduler)
    logger = MetricsLogger(config.output_dir, config.report_to, progress["step"], run.options, CONSOLE, total_steps)
    errands = Errands(run, logger, samples=len(run.examples), steps_per_epoch=run.steps_per_epoch)
    phases = guards.Phases(config.ddp_timeout)
    stop = guards.StopSignal()

    def write_model(folder: Path) -> None:
        export_model(policy, run.tokenizer, folder, run.dtype, run.stop_ids)
        errands.write_state(folder, progress)

    def save() -> None:
        folder = save_checkpoint(
            config.output_dir, progress["step"], policy, optimizer, scheduler,
            progress=progress, identity=run.identity, save_total_limit=config.save_total_limit,
            write_model=write_model, only_model=config.save_only_model and not stopping,
        )  # fmt: skip
        errands.on_save(progress["step"], folder)

    saved_at, stopping = progress["step"], False
    bar = tqdm(total=total_steps, initial=progress["step"], desc="sft", disable=None if run.rank == 0 else True)
    while progress["step"] < total_steps and not stopping:
        start = time.perf_counter()
        # 1 batch: this rank's share of the step's rows, packed
        with phases("batch"):
            chosen = row_order(len(run.examples), config.seed, progress["rows"], run.rows_per_step)
            own = [run.examples[i] for i in chosen[run.rank :: run.world_size]]
            batches = micro_batches(own, config.max_tokens_per_micro_batch, device)
        # 2 denominator: the step's trained tokens over all ranks, before the first backward
        counts = step_counts(batches, device)
        # 3 forward and backward
        with phases("train"), dropout(policy):
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
        progress["rows"] += run.rows_per_step
        progress["num_tokens"] += int(metrics["tokens"])
        progress["loss_sum"] += metrics["loss"]
        seconds, timing = time.perf_counter() - start, phases.pop()
        progress["seconds"] += seconds
        # 5 log, evaluate, save
        step = progress["step"]
        if errands.due("logging", step):
            metrics |= timing | {
                "grad_norm": float(grad_norm),
                "learning_rate": learning_rate,
                "epoch": progress["rows"] / len(run.examples),
                "num_tokens": progress["num_tokens"],
                "step_time": seconds,
                "tokens_per_second": metrics.pop("tokens") / seconds,
            }
            logger.log(step, metrics)
        errands.log_benchmarks()
        bar.update()
        if errands.due("eval", step) and not stopping:
            with phases("eval", watchdog_s=0):
                errands.log_evaluation(progress, evaluate(policy, run))
        if errands.due("save", step) or stopping:
            with phases("save"):
                save()
                saved_at = step
    bar.close()
    if not stopping:
        with phases("export"):
            if config.save_strategy != "no" and saved_at != progress["step"]:
                save()
            export_model(policy, run.tokenizer, config.output_dir, run.dtype, run.stop_ids, config.merge_adapter)
        if errands.final_evaluation_due(progress):  # when the model is safe
            with phases("eval", watchdog_s=0):
                errands.log_evaluation(progress, evaluate(policy, run))
        errands.trained(progress)
    elif run.rank == 0:
        print(f"stopped by a signal after step {progress['step']}: the same command goes on from there")
    dist.barrier()
    guards.shutdown()
    stop.restore()
    return errands


def micro_batches(
    examples: list[tuple[list[int], list[bool]]], budget: int, device: torch.device
) -> list[PackedSequences]:
    """Examples packed into micro-batches of at most `budget` tokens."""
    bins = pack([len(ids) for ids, _ in examples], budget)
    return [pack_sequences([examples[i][0] for i in b], [examples[i][1] for i in b], device) for b in bins]


@torch.no_grad()
def evaluate(policy: Policy, run: Run) -> dict[str, float]:
    """Mean loss and entropy [nats] over the trained tokens of the test rows. A collective."""
    own = run.test_examples[run.rank :: run.world_size]
    batches = micro_batches(own, run.config.max_tokens_per_micro_batch, run.device)
    counts = step_counts(batches, run.device)
    sums = {"eval_loss": torch.zeros((), device=run.device), "eval_entropy": torch.zeros((), device=run.device)}
    for i in range(counts.micro_batches):
        logps, entropies = policy(batches[i] if i < len(batches) else idle_sequences(run.device))
        if i < len(batches):
            sums["eval_loss"] -= logps.sum() / counts.num_tokens
            sums["eval_entropy"] += entropies.sum() / counts.num_tokens
    return reduce_metrics(sums, device=run.device) | {"eval_samples": float(len(run.test_examples))}


if __name__ == "__main__":
    main()
