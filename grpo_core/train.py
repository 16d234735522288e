"""GRPO: sample a group of completions for each prompt, reward them, and make the better ones of a group likelier.

    torchrun --nproc_per_node 8 -m grpo_core.train --config recipe.yaml [--field value ...]
    python -m grpo_core.train --model_name_or_path M --dataset_name problems.jsonl --output_dir runs/grpo

It is `sft_core/train.py` with rollouts and advantages in front. One step, as the loop in `main` shows it:

    1 sync         the engine gets the policy's weights, and proves it
    2 sample       G completions a prompt, scored by the reward functions
    3 advantage    each completion against the others of its group
    4 pack         prompts and completions into micro-batches without padding
    5 denominators the step's tokens and sequences over all ranks, before the first backward
    6 update       log-probs, objective, backward, clip, step
    7 log, save

The same command resumes from the last complete checkpoint. The mathematics is in `loss.py` and `advantage.py`, the
engines in `gen/`. Left out on purpose: value networks, reward models, asynchronous rollouts, top-p and the like.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from eval.verify import WorkerPool
from gen.sync import mismatch_stats, probe, sync_weights
from grpo_core.batch import MicroBatch, idle_micro_batch, keep_old_logps, make_micro_batches
from grpo_core.config import GRPOConfig
from grpo_core.loss import entropy_bonus, merge_metrics, policy_loss
from grpo_core.report import CONSOLE, check_mismatch, completion_rows, reduce_step, rollout_metrics
from grpo_core.rollout import Rollout, read_rollouts, sample, score, set_advantages, write_rollouts
from grpo_core.setup import prepare, start_engine
from sft_core import guards
from sft_core.checkpoint import load_checkpoint, save_checkpoint
from sft_core.data import row_order
from sft_core.export import export_model, full_weights, weight_names
from sft_core.metrics import MetricsLogger
from sft_core.model import Policy, load_policy
from sft_core.optim import clip_gradients, guarded_step, make_optimizer, make_scheduler
from sft_core.packing import StepCounts, step_counts
from sft_core.parallel import freeze, make_mesh, shard


def main(argv: list[str] | None = None) -> None:
    """Train as told by `argv` (default: the command line); exit code 2 for bad input, before weights are loaded."""
    with guards.usage_errors():
        run = prepare(sys.argv[1:] if argv is None else argv)
    config, rank, world_size, device = run.config, run.rank, run.world_size, run.device
    if rank == 0:
        print(run.summary)
    sharding = {"mesh": make_mesh(device), "bf16": run.bf16, "gradient_checkpointing": config.gradient_checkpointing}
    policy = shard(load_policy(run.model), **sharding)
    reference = shard(freeze(load_policy(run.model)), **sharding) if config.beta > 0 else None
    optimizer = make_optimizer(policy, config)
    scheduler = make_scheduler(optimizer, config, run.total_steps)
    progress: dict[str, Any] = {"step": 0, "prompts": 0, "num_tokens": 0, "uses": 0}
    pending: list[Rollout] = []  # this rank's rollouts; kept while they are to be used again
    if run.checkpoint is not None:
        progress = load_checkpoint(run.checkpoint, policy, optimizer, scheduler)
        if progress["uses"]:
            pending = read_rollouts(run.checkpoint, progress["step"])
    engine = start_engine(run)
    pool = WorkerPool(config.reward_num_workers, config.reward_timeout)
    logger = MetricsLogger(
        config.output_dir, config.report_to, progress["step"], run.options, CONSOLE, run.total_steps
    )  # fmt: skip
    phases = guards.Phases(config.ddp_timeout)
    stop = guards.StopSignal()

    def save() -> None:
        to_use = pending if progress["uses"] else []
        save_checkpoint(
            config.output_dir, progress["step"], policy, optimizer, scheduler,
            progress=progress, identity=run.identity, save_total_limit=config.save_total_limit,
            write_extra=lambda folder: write_rollouts(folder, progress["step"], to_use),
        )  # fmt: skip

    micro_batches: list[MicroBatch] = []
    saved_at, stopping = progress["step"], False
    bar = tqdm(total=run.total_steps, initial=progress["step"], desc="grpo", disable=None if rank == 0 else True)
    while progress["step"] < run.total_steps and not stopping:
        start = time.perf_counter()
        step = progress["step"] + 1
        if not progress["uses"]:
            if engine is not None:
                # 1 sync: the engine's weights := the policy's, version = steps behind them, checked by a probe
                with phases("sync"):
                    sync_weights(engine, full_weights(policy, run.dtype), weight_names(policy), progress["step"])
                    probe(
                        engine, partial(policy.score, temperature=config.temperature, device=device),
                        run.prompts[0].ids, temperature=config.temperature, seed=config.seed,
                        max_tokens=min(8, config.max_completion_length), tolerance=config.max_logp_difference,
                    )  # fmt: skip
                # 2 sample and score: this rank's share of the rollout's prompts
                order = row_order(len(run.prompts), config.seed, progress["prompts"], run.prompts_per_rollout)
                own = range(rank, run.prompts_per_rollout, world_size)
                chosen = {group: run.prompts[order[group]] for group in own}
                with phases("sample"):
                    pending = sample(engine, chosen, config, step, run.stop_ids)
                with phases("score"):
                    errors = score(pending, chosen, run.reward_funcs, config, run.tokenizer, pool).errors
                for text, count in errors.items():
                    tqdm.write(f"step {step}: {count} checks failed and left their completions unscored: {text}")
            else:
                pending = read_rollouts(Path(config.rollouts_from or ""), step)
            stale = {r.version for r in pending} - {progress["step"]}
            if stale:
                raise RuntimeError(f"rollouts of policy version {sorted(stale)} at version {progress['step']}: stale.")
            # 3 advantage: within each group
            summaries = set_advantages(pending, config.scale_rewards)
            if all(math.isnan(s.reward) for s in summaries):
                raise RuntimeError(f"step {step}: no completion could be scored: the reward functions are broken.")
            progress["prompts"] += run.prompts_per_rollout
            if config.save_rollouts is not None:
                write_rollouts(Path(config.save_rollouts), step, pending)
            micro_batches = []
        # 4 pack
        with phases("pack"):
            if not micro_batches:
                kept = [r for r in pending if r.finish_reason == "stop" or not config.mask_truncated_completions]
                micro_batches = make_micro_batches(kept, config.max_tokens_per_micro_batch, device)
        # 5 denominators: over all ranks, before the first backward
        counts = step_counts([b.sequences for b in micro_batches], device)
        # 6 update
        with phases("train"):
            figures = update(policy, reference, micro_batches, counts, config, device)
            grad_norm = clip_gradients(policy.parameters(), config.max_grad_norm)
            figures["tokens"] = torch.tensor(sum(len(r.prompt_ids) + len(r.completion_ids) for r in pending))
            figures["peak_memory_gib/max"] = torch.tensor(guards.peak_memory_gib(device))
            figures["stop/max"] = torch.tensor(float(stop.requested))
            metrics = reduce_step(figures, device)
            stopping = bool(metrics.pop("stop/max"))
            check_mismatch(metrics, config.max_logp_difference)
            learning_rate = guarded_step(optimizer, scheduler, metrics["loss"], float(grad_norm))
        first = progress["uses"] == 0
        progress["step"] = step
        progress["uses"] = (progress["uses"] + 1) % config.num_iterations
        progress["num_tokens"] += int(metrics["tokens"])
        # 7 log, save
        seconds, timing = time.perf_counter() - start, phases.pop()
        if step % config.logging_steps == 0 or step == run.total_steps:
            metrics |= timing | (rollout_metrics(summaries, run.reward_names) if first else {}) | {
                "grad_norm": float(grad_norm),
                "learning_rate": learning_rate,
                "epoch": progress["prompts"] / len(run.prompts),
                "num_tokens": progress["num_tokens"],
                "step_time": seconds,
                "tokens_per_second": metrics.pop("tokens") / seconds,
            }  # fmt: skip
            logger.log(step, metrics)
            logger.log_completions(
                step, completion_rows(pending, run.reward_names, run.tokenizer, config.num_completions_to_print)
            )
        bar.update()
        due = config.save_strategy == "steps" and step % config.steps_between_saves(run.total_steps) == 0
        if due or stopping:
            if progress["uses"]:
                keep_old_logps(micro_batches)
            with phases("save"):
                save()
                saved_at = step
    bar.close()
    pool.close()
    if not stopping:
        with phases("export"):
            if config.save_strategy == "steps" and saved_at != progress["step"]:
                save()
            export_model(policy, run.tokenizer, config.output_dir, run.dtype, run.stop_ids)
    elif rank == 0:
        print(f"stopped by a signal after step {progress['step']}: the same command goes on from there")
    logger.close()
    dist.barrier()
    if engine is not None:
        engine.close()
    guards.shutdown()


def update(
    policy: Policy,
    reference: Policy | None,
    micro_batches: list[MicroBatch],
    counts: StepCounts,
    config: GRPOConfig,
    device: torch.device,
) -> dict[str, Tensor]:
    """Add the step's gradient to the policy; returns this rank's share of the step's figures, by name.

    Old and reference log-probs are taken at the first update on a rollout and kept for the later ones. With one update
    `old_logps` are the very log-probs that are trained, so the ratio is 1 and no extra pass is made.
    """
    parts: list[dict[str, Tensor]] = []
    for i in range(counts.micro_batches):
        batch = micro_batches[i] if i < len(micro_batches) else idle_micro_batch(device)
        logps, entropies = policy(batch.sequences, config.temperature)
        n = len(batch.positions)  # 0 in an idle pass, which only keeps the ranks' collectives in step
        scored, gap = logps[:n], {}
        if batch.old_logps is None:
            batch.old_logps = scored.detach() if config.old_logps == "policy" else batch.sampler_logps
            gap = {
                f"gap/{name}": value
                for name, value in mismatch_stats(scored, batch.sampler_logps, batch.positions).items()
            }
        if reference is not None and batch.ref_logps is None:
            with torch.no_grad():
                batch.ref_logps = reference(batch.sequences, config.temperature)[0][:n]
        loss, metrics = policy_loss(
            scored, batch.old_logps, batch.advantages, batch.sequences.sequence_ids[:n],
            num_tokens=counts.num_tokens, num_sequences=counts.num_sequences, ref_logps=batch.ref_logps,
            sampler_logps=batch.sampler_logps if config.old_logps == "policy" else None,
            **config.objective(),
        )  # fmt: skip
        if config.entropy_coef:
            loss = loss + entropy_bonus(entropies[:n], counts.num_tokens, config.entropy_coef)
        (loss + 0.0 * logps.sum()).backward()
        entropy = entropies.detach()[:n].sum() / max(1, counts.num_tokens)
        parts.append(metrics | gap | {"loss": loss.detach(), "entropy": entropy})
    return merge_metrics(parts)


if __name__ == "__main__":
    main()
