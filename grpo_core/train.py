"""GRPO: sample a group of completions per prompt, reward them, and make the better ones of a group more likely.

    torchrun --nproc_per_node 8 -m grpo_core.train --config recipe.yaml [--field value ...]
    python -m grpo_core.train --model_name_or_path M --dataset_name problems.jsonl --output_dir runs/grpo

The loop is that of `sft_core/train.py`, with rollouts and advantages before the update. One step of `train`:

    1 sync         the engine receives the policy's weights, and a probe verifies them
    2 sample       G completions per prompt, scored by the reward functions; in rounds with dynamic_sampling
    3 advantage    each completion against the others of its group
    4 pack         prompts and completions into micro-batches without padding, balanced over the ranks
    5 denominators the step's tokens and sequences over all ranks, before the first backward
    6 update       log-probs, objective, backward, clip, step
    7 log, evaluate, save

The same command resumes from the last complete checkpoint. Read `nano.py`, `loss.py` and `advantage.py` before this
file, and `update.py`, the sixth phase, after it.
Not supported, on purpose: value networks, reward models, asynchronous rollouts, top-p and similar sampling options.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

from eval.workers import WorkerPool
from gen.engine.base import Sampling
from gen.engine.weight_sync import probe, sync_weights
from grpo_core.batch import MiniBatch, deal, idle_micro_batch, keep_logps, make_mini_batch
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from grpo_core.evaluation import evaluate_policy
from grpo_core.metrics import (
    CONSOLE,
    check_mismatch,
    check_scores,
    completion_rows,
    from_different_groups,
    reduce_step,
    rollout_metrics,
)
from grpo_core.prepare import Run, prepare, start_engine
from grpo_core.rollout import (
    Sample,
    Scorer,
    check_version,
    read_rollouts,
    sample_groups,
    sample_seed,
    set_advantages,
    write_rollouts,
)
from grpo_core.rounds import Rounds
from grpo_core.update import adapted_entropy_coef, score_ahead, update
from sft_core import lifecycle
from sft_core.data.packing import step_counts
from sft_core.data.rows import row_order
from sft_core.lifecycle import TrainingRun
from sft_core.model.adapters import without_adapters
from sft_core.model.export import full_weights, reshard, weight_names
from sft_core.model.flops import attention_share
from sft_core.model.optim import clip_gradients, guarded_step
from sft_core.model.parallel import freeze, mix
from sft_core.model.policy import Policy, load_policy
from sft_core.run import distributed
from sft_core.run.callbacks import Callbacks, Handed
from sft_core.run.cli import parse
from sft_core.run.config import ModelConfig
from sft_core.run.files import disk_errors
from sft_core.run.logging import merge_metrics, start_logging

OPTIONS = (ModelConfig, GRPOScriptArguments, GRPOConfig)


@dataclass
class Progress(lifecycle.Progress):
    updates: int = 0  # optimizer steps taken on the current rollout batch; 0: the next step samples
    rollout_metrics: dict[str, float] = field(default_factory=dict)  # of the current rollout batch
    effective_groups: float = 0.0  # over all rollout batches
    steps_unscored: int = 0  # consecutive rollout batches in which nothing could be scored
    steps_skipped: int = 0  # steps without a completion to train on, which changed no weight
    entropy_coef: float = 0.0  # the current value, with use_adaptive_entropy
    applied_entropy_coef: float = 0.0  # the value that the next step applies


@disk_errors()
def main(argv: list[str] | None = None, callbacks: Sequence[Any] = ()) -> None:
    """Train with the options in `argv` (default: the command line) and transformers' TrainerCallbacks.

    Bad input exits with code 2 before weights are loaded.
    """
    start_logging()
    with distributed.usage_errors():
        run = prepare(*parse(OPTIONS, sys.argv[1:] if argv is None else argv))
    if callbacks:
        run = replace(run, handed=Handed(None, callbacks=Callbacks(callbacks)))
    with TrainingRun(run, Progress(), CONSOLE, len(run.prompts)) as training:
        train(run, training)
        training.finish()


def train(run: Run, training: TrainingRun[Progress]) -> None:
    """The loop."""
    config, rank, world_size, device = run.config, run.rank, run.world_size, run.device
    progress, phases = training.progress, training.phases
    policy = training.load_policy()
    reference: Callable[..., Any] | None = None
    following: Policy | None = None  # the reference model, if sync_ref_model updates it
    if run.only_evaluates:
        pass  # without a reference model
    elif config.sync_ref_model:  # frozen after sharding, to have float32 masters, which can take small changes
        reference = following = freeze(training.shard(load_policy(run.local_model, to_shard=True)))
    elif config.beta > 0:
        reference = (
            without_adapters(policy)
            if run.model.use_peft
            else training.shard(freeze(load_policy(run.local_model, to_shard=True)))
        )
    progress.entropy_coef, quadratic = config.entropy_coef, attention_share(run.model_info)
    trained = training.resume(policy, following)
    rollouts: list[Sample] = []  # the groups of the current rollout batch that this rank sampled
    if run.checkpoint is not None and progress.updates:
        rollouts = read_rollouts(run.checkpoint, progress.step)
    engine = start_engine(run)
    if engine is not None:
        training.opened.callback(engine.close)
    pool = WorkerPool(config.reward_num_workers, config.reward_timeout, prints=rank == 0)
    training.opened.enter_context(pool)
    training.start()

    def sync() -> None:
        """Copy the policy's weights to the engine, with the number of steps as version, and check them by a probe."""
        if engine is None or engine.version == progress.step:
            return
        with phases("sync"):
            sync_weights(engine, full_weights(policy, run.dtype), weight_names(policy), progress.step)
            probe(
                engine,
                partial(policy.score, temperature=config.temperature, device=device, share_prompt=config.share_prompts),
                run.prompts[0].ids,
                Sampling(8, max_tokens=min(16, config.max_completion_length), temperature=config.temperature),
                seed=config.seed,
                tolerance=config.max_logp_difference,
            )
            reshard(policy)

    def trainer_state() -> SimpleNamespace:
        return SimpleNamespace(global_step=progress.step, max_steps=run.total_steps, epoch=training.epoch)

    def evaluate() -> dict[str, float]:
        sync()
        with phases("eval", watchdog_s=0):  # without a timeout: an evaluation may take longer than any step
            return evaluate_policy(engine, run, pool, trainer_state())

    mini_batches: list[MiniBatch] = []  # of `rollouts`; made for each rollout batch, and on resuming within one

    def save() -> None:
        if progress.updates:
            keep_logps(mini_batches)
        used = [sample for batch in mini_batches for sample in batch.samples] or rollouts
        kept = used if progress.updates else []
        training.save(trained, lambda folder: write_rollouts(folder, progress.step, kept))

    sampling = Sampling(config.num_generations, config.max_completion_length, config.temperature, run.sampling_ends)
    training.evaluate_first(evaluate)
    while training.goes_on:
        start = time.perf_counter()
        step = progress.step + 1
        first_use = progress.updates == 0
        rounds = Rounds(run.prompts_per_rollout, config)
        if first_use and engine is not None:
            # 1 sync: copy the weights to the engine, and verify that they arrived
            sync()
            # 2 sample and score: this rank's share of a round's prompts; a group is scored while others are sampled.
            #   There is one round, or with dynamic_sampling as many as needed.
            order_seed = config.seed if config.shuffle_dataset else None
            while rounds.go_on:
                first = progress.samples + rounds.sampled
                order = row_order(len(run.prompts), order_seed, first, rounds.prompts)
                mine = range(rank, rounds.prompts, world_size)
                chosen = {rounds.sampled + i: run.prompts[order[i]] for i in mine}
                seeds = [sample_seed(config.seed, step, group) for group in chosen]
                scorer = Scorer(chosen, run.reward_funcs, config, run.tokenizer, pool, trainer_state())
                with phases("sample"):
                    samples = sample_groups(engine, chosen, sampling, seeds, scorer.begin)
                with phases("score"):
                    lines = scorer.finish()
                    rounds.add(samples)
                for line in lines:
                    tqdm.write(f"step {step}: {line}")
            if len(rounds.used) < rounds.prompts and rank == 0:
                tqdm.write(f"step {step}: {len(rounds.used)} of {rounds.sampled} groups have rewards that differ")
            if not rounds.used and training.saved_at != progress.step:
                save()  # because rounds.rollouts() below stops the run
        elif first_use:
            rounds.add(read_rollouts(Path(config.rollouts_from or ""), step))
        if first_use:
            rollouts = rounds.rollouts()
            # 3 advantage: within each group
            check_version(rollouts, progress.step)
            set_advantages(rollouts, config)
            progress.samples += rounds.sampled
            progress.rollout_metrics = rollout_metrics(rounds.summaries, run.reward_names)
            if config.dynamic_sampling:
                progress.rollout_metrics |= rounds.metrics()
            progress.effective_groups += progress.rollout_metrics["effective_groups"]
            progress.steps_unscored = check_scores(progress.rollout_metrics, progress.steps_unscored)
            if config.save_rollouts is not None:
                write_rollouts(Path(config.save_rollouts), step, rollouts)
        if first_use or not mini_batches:
            # 4 pack: without padding, balanced over the ranks, for each optimizer step on these rollouts
            with phases("pack"):
                mini_batches = []
                for samples in deal(rollouts, config.num_generations, run.mini_batches):
                    mini_batches.append(make_mini_batch(samples, config, device, quadratic))
            # 5 denominators: over all ranks, before the first backward; ranks with fewer micro-batches get idle ones
            for mini_batch in mini_batches:
                packed = mini_batch.micro_batches
                without_pass = sum(len(s.completion_ids) for s in mini_batch.skipped), len(mini_batch.skipped)
                mini_batch.counts = step_counts([batch.sequences for batch in packed], device, without_pass)
                missing = mini_batch.counts.micro_batches - len(packed)
                packed += [idle_micro_batch(device, scored=not first_use) for _ in range(missing)]
        mini_batch = mini_batches[progress.updates % len(mini_batches)]
        trains = mini_batch.counts.trained_tokens > 0
        # 6 update: if no rank has anything to train on, there is no gradient, and no weight changes
        if engine is not None and config.vllm_enable_sleep_mode:
            engine.sleep()  # the next sync wakes it
        with phases("train"):
            coef = progress.applied_entropy_coef if config.use_adaptive_entropy else config.entropy_coef
            ahead = {}
            if first_use and len(mini_batches) > 1:
                later = [batch for other in mini_batches[1:] for batch in other.micro_batches]
                ahead = score_ahead(policy, reference, later, config.temperature)
            shares: dict[str, Any] = {"loss": 0.0} | ahead
            if trains:
                shares = update(policy, reference, mini_batch.micro_batches, mini_batch.counts, config, first_use, coef)
                shares |= merge_metrics([{name: shares[name] for name in ahead}, ahead])
            grad_norm = clip_gradients(policy.parameters(), config.max_grad_norm)
            more = {
                "tokens": float(sum(len(s.prompt_ids) + len(s.completion_ids) for s in mini_batch.samples)),
                "peak_memory_gib/max": distributed.peak_memory_gib(device),
                "stop/max": float(training.stop.requested),
            }
            metrics = reduce_step(shares | more, device)
            training.stopping = bool(metrics.pop("stop/max"))
            check_mismatch(metrics, config.max_logp_difference)
            learning_rate = guarded_step(trained.optimizer, trained.scheduler, metrics["loss"], float(grad_norm))
            if following is not None and step % config.ref_model_sync_steps == 0:
                mix(following, policy, config.ref_model_mixup_alpha)
        if not trains:
            progress.steps_skipped += 1
            if rank == 0:
                tqdm.write(f"step {step}: no completion gives a gradient, so no weight is changed")
        if config.use_adaptive_entropy and trains:
            progress.entropy_coef, progress.applied_entropy_coef = adapted_entropy_coef(
                progress.entropy_coef, metrics.get("entropy_kept", metrics["entropy"]), config
            )
        if "policy_loss" in metrics:
            metrics["entropy_coef"] = progress.entropy_coef if config.use_adaptive_entropy else coef
        progress.updates = (progress.updates + 1) % (config.num_iterations * len(mini_batches))
        progress.rollout_metrics |= {name: value for name, value in metrics.items() if name.startswith("sampling/")}
        timing = training.count_step(start, int(metrics["tokens"]), metrics["loss"])
        # 7 log, evaluate, save
        if training.due("logging"):
            metrics |= timing | {"grad_norm": float(grad_norm), "learning_rate": learning_rate}
            metrics["steps_skipped"] = progress.steps_skipped
            training.log(step, progress.rollout_metrics | metrics)
            samples = from_different_groups(rollouts, config.num_completions_to_print if config.log_completions else 0)
            training.logger.log_completions(step, completion_rows(samples, run.reward_names, run.tokenizer))
        training.end_step(save, evaluate)
    training.end(policy, save, evaluate)
    if training.complete and rank == 0 and progress.effective_groups == 0:
        print(
            "warning: no group of this run had a gradient, because rewards were equal within every group, so the model "
            "learnt nothing from them: run `python -m grpo_core.audit` with the same options to find out why."
        )


if __name__ == "__main__":
    main()
