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
    7 log, evaluate, save

The same command resumes from the last complete checkpoint. The mathematics is in `loss.py` and `advantage.py`, the
engines in `gen/`. Left out on purpose: value networks, reward models, asynchronous rollouts, top-p and the like.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from eval.workers import WorkerPool
from gen.engine.weight_sync import probe, sync_weights
from grpo_core.batch import MicroBatch, idle_micro_batch, keep_old_logps, make_micro_batches
from grpo_core.evaluation import evaluate_policy
from grpo_core.metrics import (
    CONSOLE,
    check_mismatch,
    check_scores,
    completion_rows,
    reduce_step,
    rollout_metrics,
    spread,
)
from grpo_core.prepare import Run, prepare, start_engine
from grpo_core.rollout import Rollout, Scorer, check_version, read_rollouts, sample, set_advantages, write_rollouts
from grpo_core.update import update
from sft_core.data.packing import step_counts
from sft_core.data.rows import row_order
from sft_core.model.adapters import without_adapters
from sft_core.model.checkpoint import load_checkpoint, save_checkpoint
from sft_core.model.export import export_model, full_weights, reshard, weight_names
from sft_core.model.optim import clip_gradients, guarded_step, make_optimizer, make_scheduler
from sft_core.model.parallel import freeze, make_mesh, memory_options, shard
from sft_core.model.policy import load_policy
from sft_core.run import distributed
from sft_core.run.lifecycle import Errands
from sft_core.run.logging import MetricsLogger, announce
from sft_core.run.watchdog import Phases


def main(argv: list[str] | None = None) -> None:
    """Train as told by `argv` (default: the command line); exit code 2 for bad input, before weights are loaded."""
    with distributed.usage_errors():
        run = prepare(sys.argv[1:] if argv is None else argv)
    announce(run)
    train(run).finish()


def train(run: Run) -> Errands:
    """The loop. Returns what the first rank has left to do when the weights are out of memory."""
    config, rank, world_size, device = run.config, run.rank, run.world_size, run.device
    sharding = {"mesh": make_mesh(device), "bf16": run.bf16} | memory_options(config)
    with distributed.usage_errors():  # weights that are not the model's
        policy = load_policy(run.local_model, dtype=run.dtype, seed=config.seed, known_as=run.model.model_name_or_path)
    policy = shard(policy, **sharding)
    reference: Callable[..., Any] | None = None
    if config.beta > 0:
        adapted = run.model.use_peft
        reference = without_adapters(policy) if adapted else shard(freeze(load_policy(run.local_model)), **sharding)
    optimizer = make_optimizer(policy, config)
    scheduler = make_scheduler(optimizer, config, run.total_steps)
    progress: dict[str, Any] = {
        "step": 0,
        "prompts": 0,
        "num_tokens": 0,
        "loss_sum": 0.0,
        "seconds": 0.0,
        "uses": 0,
        "figures": {},
        "effective_groups": 0.0,
    }
    rollouts: list[Rollout] = []  # this rank's
    if run.checkpoint is not None:
        progress |= load_checkpoint(run.checkpoint, policy, optimizer, scheduler)
        rollouts = read_rollouts(run.checkpoint, progress["step"]) if progress["uses"] else []
    engine = start_engine(run)
    pool = WorkerPool(config.reward_num_workers, config.reward_timeout, prints=rank == 0)
    logger = MetricsLogger(
        config.output_dir,
        config.report_to,
        progress["step"],
        run.options,
        CONSOLE,
        run.total_steps,
        max_text_samples=config.num_completions_to_print,
    )
    errands = Errands(run, logger, samples=len(run.prompts), steps_per_epoch=run.steps_per_epoch)
    phases = Phases(config.ddp_timeout)
    stop = distributed.StopSignal()

    def sync() -> None:
        """The engine's weights := the policy's, version = steps behind them, checked by a probe."""
        if engine is None or engine.version == progress["step"]:
            return
        with phases("sync"):
            sync_weights(engine, full_weights(policy, run.dtype), weight_names(policy), progress["step"])
            probe(
                engine,
                partial(policy.score, temperature=config.temperature, device=device),
                run.prompts[0].ids,
                temperature=config.temperature,
                max_tokens=min(16, config.max_completion_length),
                seed=config.seed,
                tolerance=config.max_logp_difference,
            )
            reshard(policy)

    def evaluate() -> None:
        sync()
        with phases("eval", watchdog_s=0):
            figures = evaluate_policy(engine, run, pool)
        errands.log_evaluation(progress, figures)

    def write_model(folder: Path) -> None:
        export_model(policy, run.tokenizer, folder, run.dtype, run.stop_ids)
        errands.write_state(folder, progress)

    def save() -> None:
        if progress["uses"]:
            keep_old_logps(micro_batches)
        folder = save_checkpoint(
            config.output_dir,
            progress["step"],
            policy,
            optimizer,
            scheduler,
            progress=progress,
            identity=run.identity,
            save_total_limit=config.save_total_limit,
            write_extra=lambda folder: write_rollouts(folder, progress["step"], rollouts if progress["uses"] else []),
            write_model=write_model,
            only_model=config.save_only_model and not stopping,
        )
        errands.on_save(progress["step"], folder)

    micro_batches: list[MicroBatch] = []  # of the rollouts; made anew for each rollout, and after a resume within one
    saved_at, stopping, steps_unscored = progress["step"], False, 0
    bar = tqdm(total=run.total_steps, initial=progress["step"], desc="grpo", disable=None if rank == 0 else True)
    while progress["step"] < run.total_steps and not stopping:
        start = time.perf_counter()
        step = progress["step"] + 1
        first_use = progress["uses"] == 0
        if first_use and engine is not None:
            # 1 sync: weights into the engine, and the proof that they arrived
            sync()
            # 2 sample and score: this rank's share of the rollout's prompts; a group is scored while others are sampled
            order = row_order(len(run.prompts), config.seed, progress["prompts"], run.prompts_per_rollout)
            own = range(rank, run.prompts_per_rollout, world_size)
            chosen = {group: run.prompts[order[group]] for group in own}
            scorer = Scorer(chosen, run.reward_funcs, config, run.tokenizer, pool)
            with phases("sample"):
                rollouts = sample(engine, chosen, config.num_generations, config, step, run.stop_ids, scorer.begin)
            with phases("score"):
                lines = scorer.finish()
            for line in lines:
                tqdm.write(f"step {step}: {line}")
        elif first_use:
            rollouts = read_rollouts(Path(config.rollouts_from or ""), step)
        if first_use:
            # 3 advantage: within each group
            check_version(rollouts, progress["step"])
            summaries = set_advantages(rollouts, config.scale_rewards)
            progress["prompts"] += run.prompts_per_rollout
            progress["figures"] = rollout_metrics(summaries, run.reward_names)
            progress["effective_groups"] += progress["figures"]["effective_groups"]
            steps_unscored = check_scores(progress["figures"], steps_unscored)
            if config.save_rollouts is not None:
                write_rollouts(Path(config.save_rollouts), step, rollouts)
        if first_use or not micro_batches:
            # 4 pack: without padding
            with phases("pack"):
                kept = [r for r in rollouts if r.finish_reason == "stop" or not config.mask_truncated_completions]
                micro_batches = make_micro_batches(kept, config.max_tokens_per_micro_batch, device)
            # 5 denominators: over all ranks, before the first backward; ranks with fewer micro-batches idle along
            counts = step_counts([batch.sequences for batch in micro_batches], device)
            micro_batches += [idle_micro_batch(device) for _ in range(counts.micro_batches - len(micro_batches))]
        # 6 update
        if engine is not None and config.vllm_enable_sleep_mode:
            engine.sleep()  # the next sync wakes it
        with phases("train"):
            shares = update(policy, reference, micro_batches, counts, config, first_use)
            grad_norm = clip_gradients(policy.parameters(), config.max_grad_norm)
            more = {
                "tokens": float(sum(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)),
                "peak_memory_gib/max": distributed.peak_memory_gib(device),
                "stop/max": float(stop.requested),
            }
            metrics = reduce_step(shares | more, device)
            stopping = bool(metrics.pop("stop/max"))
            check_mismatch(metrics, config.max_logp_difference)
            learning_rate = guarded_step(optimizer, scheduler, metrics["loss"], float(grad_norm))
        progress["step"] = step
        progress["uses"] = (progress["uses"] + 1) % config.num_iterations
        progress["num_tokens"] += int(metrics["tokens"])
        # 7 log, evaluate, save
        seconds, timing = time.perf_counter() - start, phases.pop()
        progress["loss_sum"] += metrics["loss"]
        progress["seconds"] += seconds
        progress["figures"] |= {name: value for name, value in metrics.items() if name.startswith("sampling/")}
        if errands.due("logging", step):
            logger.log(
                step,
                progress["figures"]
                | metrics
                | timing
                | {
                    "grad_norm": float(grad_norm),
                    "learning_rate": learning_rate,
                    "epoch": progress["prompts"] / len(run.prompts),
                    "num_tokens": progress["num_tokens"],
                    "step_time": seconds,
                    "tokens_per_second": metrics["tokens"] / seconds,
                },
            )
            samples = spread(rollouts, config.num_completions_to_print if config.log_completions else 0)
            logger.log_completions(step, completion_rows(samples, run.reward_names, run.tokenizer))
        errands.log_benchmarks()
        bar.update()
        if errands.due("eval", step) and not stopping:
            evaluate()
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
            evaluate()
        errands.trained(progress)
        if rank == 0 and progress["effective_groups"] == 0:
            print(
                "no group of this run had a gradient: the rewards of each were all equal, so nothing was learnt from "
                "them. `python -m grpo_core.audit` with the same options says why."
            )
    elif rank == 0:
        print(f"stopped by a signal after step {progress['step']}: the same command goes on from there")
    pool.close()
    dist.barrier()
    if engine is not None:
        engine.close()
    distributed.shutdown()
    stop.restore()
    return errands


if __name__ == "__main__":
    main()
