"""Supervised fine-tuning of a causal language model on conversations, in one loop.

    torchrun --nproc_per_node 8 -m sft_core.train --config recipe.yaml [--field value ...]
    python -m sft_core.train --model_name_or_path M --dataset_name rows.jsonl --output_dir runs/sft

The loss is the mean negative log-likelihood of the step's trained tokens (what the assistant says, its end of turn
included). Rows lie end to end without padding and without seeing each other. The mean is over the whole optimizer step
on all ranks, so how it is cut into micro-batches and ranks does not change its gradient. The same command resumes from
the last complete checkpoint. GRPO (`grpo_core/train.py`) is this loop plus rollouts.

What a row becomes is in `supervised.py`, which rows a step takes in `order.py`, how they are cut in `packing.py`.
Left out on purpose: padding, NEFTune, dropout other than the adapters' own, sequences split over ranks.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from sft_core.data.packing import PackedSequences, balance, idle_sequences, pack, pack_sequences, step_counts
from sft_core.dataset import Example
from sft_core.model.adapters import dropout
from sft_core.model.checkpoint import load_checkpoint, save_checkpoint
from sft_core.model.export import export_model
from sft_core.model.flops import attention_share, peak_flops, training_flops
from sft_core.model.optim import clip_gradients, guarded_step, make_optimizer, make_scheduler
from sft_core.model.parallel import make_mesh, memory_options, shard
from sft_core.model.policy import Policy, load_policy
from sft_core.prepare import Run, prepare
from sft_core.run import distributed
from sft_core.run.lifecycle import Errands
from sft_core.run.logging import MetricsLogger, announce, reduce_metrics
from sft_core.run.watchdog import Phases

CONSOLE = ("loss", "eval_loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate", "tokens_per_second")


def main(argv: list[str] | None = None) -> None:
    """Train as told by `argv` (default: the command line); exit code 2 for bad input, before weights are loaded."""
    with distributed.usage_errors():
        run = prepare(sys.argv[1:] if argv is None else argv)
    announce(run)
    train(run).finish()


def train(run: Run) -> Errands:
    """The loop. Returns what the first rank has left to do when the weights are out of memory."""
    config, device, total_steps = run.config, run.device, run.total_steps
    with distributed.usage_errors():  # weights that are not the model's
        policy = load_policy(
            run.local_model,
            dtype=run.dtype,
            seed=config.seed,
            known_as=run.model.model_name_or_path,
            vocab_size=len(run.tokenizer),
        )
    policy = shard(policy, make_mesh(device), bf16=run.bf16, **memory_options(config))
    torch.manual_seed(config.seed + run.rank)  # the dropout of adapters, where there is one
    optimizer = make_optimizer(policy, config)
    scheduler = make_scheduler(optimizer, config, total_steps)
    progress: dict[str, Any] = {"step": 0, "rows": 0, "num_tokens": 0, "loss_sum": 0.0, "seconds": 0.0}
    if run.checkpoint is not None:
        progress |= load_checkpoint(run.checkpoint, policy, optimizer, scheduler)
        run.source.resume(progress["order"])
    logger = MetricsLogger(config.output_dir, config.report_to, progress["step"], run.options, CONSOLE, total_steps)
    errands = Errands(run, logger, samples=run.samples, steps_per_epoch=run.steps_per_epoch)
    phases = Phases(config.ddp_timeout)
    stop = distributed.StopSignal()

    def write_model(folder: Path) -> None:
        export_model(policy, run.tokenizer, folder, run.dtype, run.stop_ids)
        errands.write_state(folder, progress)

    def save() -> None:
        folder = save_checkpoint(
            config.output_dir,
            progress["step"],
            policy,
            optimizer,
            scheduler,
            progress=progress,
            identity=run.identity,
            save_total_limit=config.save_total_limit,
            write_model=write_model,
            only_model=config.save_only_model and not stopping,
        )
        errands.on_save(progress["step"], folder)

    peak_rate, quadratic = peak_flops(device), attention_share(run.model_info)
    saved_at, stopping = progress["step"], False
    bar = tqdm(total=total_steps, initial=progress["step"], desc="sft", disable=None if run.rank == 0 else True)
    while progress["step"] < total_steps and not stopping:
        start = time.perf_counter()
        # 1 batch: the step's rows, and this rank's share of them in micro-batches
        with phases("batch"):
            with distributed.usage_errors():  # streamed rows are met here for the first time
                examples = run.source.take(run.sequences_per_step)
            lengths = [len(ids) for ids, _ in examples]
            shares = balance(lengths, config.max_tokens_per_micro_batch, run.world_size, quadratic)
            batches = [pack_rows([examples[i] for i in members], device) for members in shares[run.rank] if members]
        # 2 denominator: the step's trained tokens over all ranks, before the first backward
        counts = step_counts(batches, device)
        # 3 forward and backward
        with phases("train"), dropout(policy):
            sums = {name: torch.zeros((), device=device) for name in ("loss", "entropy", "mean_token_accuracy")}
            weight = 1 / counts.num_tokens
            losses = partial(token_losses, loss_type=config.loss_type, weight=weight)
            # Every rank makes as many passes, so that the collectives match.
            for batch in batches + [idle_sequences(device)] * (counts.micro_batches - len(batches)):
                loss, logps, entropies, best_logps = policy(batch, token_loss=losses)
                loss.backward()
                sums["loss"] += loss.detach()
                sums["entropy"] += weight * entropies.sum()
                sums["mean_token_accuracy"] += weight * (logps >= best_logps).sum()
            grad_norm = clip_gradients(policy.parameters(), config.max_grad_norm)
            peak = {"peak_memory_gib/max": distributed.peak_memory_gib(device), "stop/max": float(stop.requested)}
            metrics = reduce_metrics(sums | peak, device=device)
            stopping = bool(metrics.pop("stop/max"))
            # 4 step, unless something is not finite
            learning_rate = guarded_step(optimizer, scheduler, metrics["loss"], float(grad_norm))
        progress["step"] += 1
        progress["rows"] += len(examples)
        progress["order"] = run.source.state()
        progress["num_tokens"] += sum(lengths)
        progress["loss_sum"] += metrics["loss"]
        seconds, timing = time.perf_counter() - start, phases.pop()
        progress["seconds"] += seconds
        # 5 log, evaluate, save
        step = progress["step"]
        if errands.due("logging", step):
            flops = training_flops(run.model_info, lengths) / seconds / run.world_size
            metrics |= (
                timing
                | run.source.figures()
                | {
                    "grad_norm": float(grad_norm),
                    "learning_rate": learning_rate,
                    "epoch": errands.epoch(progress),
                    "num_tokens": progress["num_tokens"],
                    "step_time": seconds,
                    "tokens_per_second": sum(lengths) / seconds,
                    "tflops": flops / 1e12,  # on each device
                }
            )
            if peak_rate is not None and not run.model.use_peft:  # adapters spare a part of those
                metrics["mfu"] = flops / peak_rate
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
    distributed.shutdown()
    stop.restore()
    return errands


def token_losses(
    logps: Tensor, entropies: Tensor | None = None, rows: Any = None, *, loss_type: str, weight: float = 1.0
) -> Tensor:  # [N], unused -> [N]
    """nll: -log p. dft: -p log p with p held constant (arXiv:2508.05629), so that unlikely tokens pull less."""
    return -weight * (logps if loss_type == "nll" else logps.detach().exp() * logps)


def pack_rows(rows: list[Example], device: torch.device) -> PackedSequences:
    return pack_sequences([ids for ids, _ in rows], [mask for _, mask in rows], device)


@torch.no_grad()
def evaluate(policy: Policy, run: Run) -> dict[str, float]:
    """Means over the trained tokens of the test rows: loss, entropy [nats] and token accuracy. A collective."""
    assert run.test_examples is not None
    bins = pack(run.test_examples.lengths.tolist(), run.config.max_tokens_per_micro_batch)
    names = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "tokens")
    sums = {name: torch.zeros((), device=run.device, dtype=torch.float64) for name in names}
    for start in range(0, len(bins), run.world_size):  # as many passes on every rank
        own = bins[start + run.rank] if start + run.rank < len(bins) else None
        rows = run.test_examples.rows[own] if own else None
        batch = pack_sequences(rows["input_ids"], rows["loss_mask"], run.device) if rows else idle_sequences(run.device)
        logps, entropies, best_logps = policy(batch)
        sums["eval_loss"] += token_losses(logps, loss_type=run.config.loss_type).sum()
        sums["eval_entropy"] += entropies.sum()
        sums["eval_mean_token_accuracy"] += (logps >= best_logps).sum()
        sums["tokens"] += len(logps)
    totals = reduce_metrics(sums, device=run.device)
    tokens = totals.pop("tokens")
    return {name: value / tokens for name, value in totals.items()} | {
        "eval_samples": float(len(run.test_examples.lengths))
    }


if __name__ == "__main__":
    main()
