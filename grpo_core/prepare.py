"""Checks the user's input and prepares a GRPO run, before any weight is loaded.

The checks that both trainers share (model, chat template, data, output folder) are in `sft_core/prepare.py`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from eval.workers import WorkerPool
from gen.engine.base import Engine, EngineConfig, check_engine_available, kv_cache_bytes, make_engine
from gen.engine.vllm import cpu_kv_bytes
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from grpo_core.metrics import rollout_metrics
from grpo_core.reward_check import check_columns, dry_call
from grpo_core.rewards import compares_with_gold, get_reward_funcs, reward_name
from grpo_core.rollout import Prompt, Summary, load_prompts
from grpo_core.scoring import gold_answers, unparseable_golds
from sft_core.model.architectures import shares_beginnings
from sft_core.model.memory_plan import Plan, dry_run, memory_plan
from sft_core.model.optim import check_schedule
from sft_core.model.policy import check_positions, count_parameters, local_copy, planned_dtype
from sft_core.model.trl_names import with_init_kwargs
from sft_core.prepare import Base, check_best_metric, check_model, open_output_dir, prepare_base
from sft_core.run import distributed
from sft_core.run.callbacks import Handed
from sft_core.run.config import ModelConfig
from sft_core.run.options import require

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run(Base):
    """A run that has been checked and may start."""

    config: GRPOConfig
    local_model: ModelConfig  # names the model's folder on this machine
    reward_funcs: list[Callable]
    prompts: list[Prompt]
    test_prompts: list[Prompt] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None  # to resume from
    summary: str = ""  # template, data, steps and memory of the run, printed before it starts

    @property
    def reward_names(self) -> list[str]:
        return [reward_name(function) for function in self.reward_funcs]

    @property
    def sampling_ends(self) -> frozenset[int]:
        """The tokens that end a completion in this run: the model's `stop_ids` and those of generation_kwargs."""
        return self.stop_ids.union(self.config.more_stop_ids)

    @property
    def prompts_per_rollout(self) -> int:
        return self.config.prompts_a_rollout(self.world_size)

    @property
    def mini_batches(self) -> int:
        return self.config.mini_batches(self.world_size)

    @property
    def max_batch(self) -> int:
        return max_batch(self.config, self.world_size)

    @property
    def steps_per_epoch(self) -> float:
        updates = self.config.num_iterations * self.mini_batches  # on each rollout
        return updates * len(self.prompts) / self.prompts_per_rollout

    @property
    def total_steps(self) -> int:
        return self.config.total_steps(self.steps_per_epoch)


def prepare(model: ModelConfig, data: GRPOScriptArguments, config: GRPOConfig, handed: Handed | None = None) -> Run:
    """Join the process group and check everything that can be checked, on frozen copies of the options. A collective.

    Raises:
        ValueError: bad input, in one sentence that names the remedy.
    """
    model, config = with_init_kwargs(model, config)
    model, data, config = model.frozen(), data.frozen(), config.frozen()
    require(
        not (config.sync_ref_model and model.use_peft),
        "with adapters the reference is the policy without them, which never changes: leave out --sync_ref_model.",
    )
    if config.dry_run:
        info = check_model(model, config)
        check_lengths(info, config)
        dry_run(step_plan(model, config, info, config.dry_run_gpus, planned_dtype(model, config)))
    if config.rollouts_from is None:
        check_engine_available(config.engine or "vllm")
    else:
        require(
            Path(config.rollouts_from).is_dir(),
            f"there is no folder of rollouts at {config.rollouts_from}: check --rollouts_from.",
        )
        require(
            not config.evaluates,
            "a replay of rollouts has no engine to evaluate with: leave out do_eval, eval_on_start and eval_strategy.",
        )
        require(
            not config.dynamic_sampling,
            "a replay of rollouts samples nothing, and a run with dynamic_sampling records only the groups that it "
            "uses: leave out dynamic_sampling.",
        )
    reward_funcs = get_reward_funcs(data) if handed is None else list(handed.reward_funcs)
    weights = config.reward_weights
    require(
        weights is None or len(weights) == len(reward_funcs) and any(weights) and all(map(math.isfinite, weights)),
        f"reward_weights {weights} do not fit reward_funcs {data.reward_funcs}: give one weight each, "
        "finite and not all 0.",
    )
    one = Summary(0, 1, "stop", 1.0, [1.0] * len(reward_funcs))
    check_best_metric(config, rollout_metrics([one], [reward_name(function) for function in reward_funcs]))
    base = prepare_base("grpo", model, data, config, handed)
    stop_ids: list[int] = dict(config.generation_kwargs or {}).get("stop_token_ids", [])
    unknown = sorted(set(stop_ids) - set(range(len(base.tokenizer))))
    require(not unknown, f"generation_kwargs stop_token_ids {unknown} are not tokens: use ids < {len(base.tokenizer)}.")
    world_size, device = base.world_size, base.device
    require(
        not config.vllm_enable_sleep_mode or config.engine == "torch" or device.type == "cuda",
        "vLLM cannot sleep on the CPU: leave out --vllm_enable_sleep_mode.",
    )
    require(
        world_size % config.vllm_tensor_parallel_size == 0,
        f"vllm_tensor_parallel_size {config.vllm_tensor_parallel_size} must divide the number of ranks, {world_size}.",
    )
    mini_batches = config.mini_batches(world_size)
    check_lengths(base.model_info, config)
    if config.share_prompts and not shares_beginnings(base.model_info, model):
        config = replace(config, share_prompts=False).frozen()
        if base.rank == 0:
            logger.warning(
                "share_prompts is off: a shared prompt would change the output of %s.", base.model_info.model_type
            )
    prompts, left_out = prompts_to_use(base, base.rows, data.dataset_name, config, reward_funcs)
    prompts_line = f"{len(prompts)} prompts; left out: {left_out}"
    test_prompts: list[Prompt] = []
    if base.test_rows is not None:
        file = "" if data.dataset_mixture else data.dataset_test_split
        test_prompts, left_out = prompts_to_use(base, base.test_rows, file, config, reward_funcs)
        prompts_line += f"; {len(test_prompts)} for evaluation; left out: {left_out}"
    if config.rollouts_from is None:
        distributed.on_first_rank(lambda: dry_call(base, config, prompts, reward_funcs), patient=True)
    # None, as in records of earlier versions, which lack these entries
    more = {
        "mini-batches of a rollout (steps_per_generation)": mini_batches if mini_batches > 1 else None,
        "sync_ref_model": config.sync_ref_model or None,
        "order": None if config.shuffle_dataset else "of the data",
    }
    identity, checkpoint = open_output_dir(
        base, config, num_iterations=config.num_iterations, prompts=len(prompts), **more
    )
    run = Run(
        **vars(base),
        config=config,
        local_model=local_copy(model),
        reward_funcs=reward_funcs,
        prompts=prompts,
        test_prompts=test_prompts,
        identity=identity,
        checkpoint=checkpoint,
    )
    check_schedule(config, run.total_steps)
    plan = step_plan(model, config, base.model_info, world_size, base.dtype, device.type)
    batch = f"{run.prompts_per_rollout} prompts x {config.num_generations} completions"
    if config.prompts_per_step is None:
        batch += (
            f" (from {config.per_device_train_batch_size} per device x "
            f"{config.gradient_accumulation_steps * mini_batches} accumulation steps x {world_size} ranks, rounded up "
            "to whole groups)"
        )
    steps = f"{run.total_steps} optimizer steps, {config.num_iterations * mini_batches} per rollout batch of {batch}"
    return replace(run, summary="\n".join([base.template, prompts_line, steps, memory_plan(plan, device)]))


def check_lengths(info: PretrainedConfig, config: GRPOConfig) -> None:
    remedy = "lower --max_prompt_length or --max_completion_length"
    check_positions(info, longest_sequence(config), "prompt and completion", remedy)


def longest_sequence(config: GRPOConfig) -> int:
    return config.max_prompt_length + config.max_completion_length


def max_batch(config: GRPOConfig, world_size: int) -> int:
    """Sequences that one engine samples at once, for all ranks that share it."""
    return min(1024, config.completions_a_rank(world_size) * config.vllm_tensor_parallel_size)


def step_plan(
    model: ModelConfig, config: GRPOConfig, info: PretrainedConfig, gpus: int, dtype: torch.dtype, device: str = "cuda"
) -> Plan:
    """The inputs of the memory plan of a step, with the engine next to the trainer."""
    batch, longest = max_batch(config, gpus), longest_sequence(config)
    rows = math.ceil(config.completions_a_rank(gpus) / config.mini_batches(gpus))
    group = math.ceil(config.num_generations / config.mini_batches(gpus))  # rows of a group in one step
    engine_share, engine_kv_bytes = 0.0, -1  # no engine
    if config.rollouts_from is None:
        if config.engine == "torch":
            engine_kv_bytes = batch * kv_cache_bytes(info, dtype, longest)
        elif device == "cuda":
            engine_share = config.vllm_gpu_memory_utilization
        else:
            engine_kv_bytes = cpu_kv_bytes(info, dtype, longest, batch)
    return Plan(
        info,
        model,
        config,
        count_parameters(info, model.trust_remote_code),
        gpus,
        rows=rows,
        longest=longest,
        itemsize=dtype.itemsize,
        device=device,
        reference_itemsize=0 if config.beta == 0 else 4 if config.sync_ref_model else dtype.itemsize,
        shared=config.share_prompts * config.max_prompt_length * (rows - math.ceil(rows / group)),
        engine_share=engine_share,
        engine_kv_bytes=engine_kv_bytes,
        engine_ranks=config.vllm_tensor_parallel_size,
        engine_sleeps=config.vllm_enable_sleep_mode,
    )


def prompts_to_use(
    base: Base, rows: Dataset, file: str, config: GRPOConfig, functions: list[Callable]
) -> tuple[list[Prompt], str]:
    """The prompts of `rows` to use, and a text on how many are left out and why. A collective.

    Raises:
        ValueError: the prompt column or the answers that rewards need are missing, a row or an answer cannot be used,
            or no prompt is left.
    """
    data = base.data
    assert isinstance(data, GRPOScriptArguments)
    distributed.on_first_rank(lambda: check_columns(rows, file, data, functions), patient=True)
    as_given = base.handed is not None
    needy = sorted(reward_name(function) for function in functions if compares_with_gold(function))
    prompts, reason = load_prompts(rows, data, config, base.tokenizer, file, needy=needy, as_given=as_given)
    if not data.drop_unparseable_golds or not needy:
        return prompts, reason

    def find() -> list[int]:
        with WorkerPool(min(16, len(os.sched_getaffinity(0))), config.reward_timeout) as pool:
            return unparseable_golds(gold_answers(prompts) or [], pool)

    dropped = set(distributed.on_first_rank(find, patient=True))
    kept = [prompt for i, prompt in enumerate(prompts) if i not in dropped]
    require(
        len(kept) > 0,
        f"none of the {len(prompts)} gold answers can be parsed, so the rewards {', '.join(needy)} would have no "
        "signal: check the column `solution` (or `answer`).",
    )
    return kept, f"{reason}, {len(dropped)} whose gold answer cannot be parsed"


def start_engine(run: Run) -> Engine | None:
    """The engine that samples, with the model's initial weights; None if recorded rollouts are replayed."""
    config = run.config
    if config.rollouts_from is not None:
        return None
    engine = EngineConfig(
        run.local_model.model_name_or_path,
        max_model_len=longest_sequence(config),
        dtype=run.dtype,
        seed=config.seed,
        max_batch=run.max_batch,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        sleep_mode=config.vllm_enable_sleep_mode,
    )
    return make_engine(config.engine or "vllm", engine)
