"""All that a GRPO run needs to know before it loads a weight. What is wrong with the user's input is said here."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from eval.workers import WorkerPool
from gen.engine.base import Engine, check_engine_available, kv_cache_bytes, make_engine
from gen.engine.vllm import cpu_kv_bytes
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from grpo_core.rewards import get_reward_funcs, reward_name
from grpo_core.rollout import GOLD_REWARDS, Prompt, Rollout, Scorer, load_prompts, prompt_column
from grpo_core.scoring import accepted, gold_answers, unparseable_golds
from sft_core.data.rows import damaged_line
from sft_core.model.adapters import check_adapters
from sft_core.model.architectures import check_architecture
from sft_core.model.memory_plan import Plan, dry_run, memory_plan
from sft_core.model.policy import check_positions, load_model_info, local_copy
from sft_core.prepare import Base, claim, join
from sft_core.run import distributed
from sft_core.run.cli import parse
from sft_core.run.config import ModelConfig, require
from sft_core.run.logging import start_logging

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Run(Base):
    """A run that has been checked and may start."""

    config: GRPOConfig
    local_model: ModelConfig  # the model's folder on this machine
    prompts: list[Prompt]
    test_prompts: list[Prompt]
    reward_funcs: list[Callable]
    reward_names: list[str]
    identity: dict[str, Any]
    checkpoint: Path | None  # to resume from
    prompts_per_rollout: int
    max_batch: int  # sequences that an engine samples at once: the share of the ranks that it serves
    total_steps: int
    summary: str  # what is about to happen, in a few lines

    @property
    def steps_per_epoch(self) -> float:
        return self.config.num_iterations * len(self.prompts) / self.prompts_per_rollout


def prepare(argv: list[str]) -> Run:
    """Read the options, join the process group and check everything that can be checked. A collective.

    Raises:
        ValueError: the user's input, in one sentence that names the remedy.
    """
    start_logging()
    model, data, config = parse((ModelConfig, GRPOScriptArguments, GRPOConfig), argv)
    if config.dry_run:
        plan_only(model, config)
    if config.rollouts_from is None:
        check_engine_available(config.engine or "vllm")
    elif not Path(config.rollouts_from).is_dir():
        raise ValueError(f"there is no folder of rollouts at {config.rollouts_from}: check --rollouts_from.")
    reward_funcs = get_reward_funcs(data)
    weights = config.reward_weights
    require(
        weights is None or len(weights) == len(reward_funcs) and any(weights) and all(map(math.isfinite, weights)),
        f"reward_weights {weights} for reward_funcs {data.reward_funcs}: give one weight each, finite and not all 0.",
    )
    base = join("grpo", model, data, config)
    world_size, dtype = base.world_size, base.dtype
    tensor_parallel = config.vllm_tensor_parallel_size
    require(
        not config.vllm_enable_sleep_mode or config.engine == "torch" or base.device.type == "cuda",
        "vLLM cannot sleep on the CPU: leave out --vllm_enable_sleep_mode.",
    )
    require(
        world_size % tensor_parallel == 0,
        f"vllm_tensor_parallel_size {tensor_parallel} does not divide {world_size} ranks.",
    )
    check_positions(
        base.model_info,
        config.max_prompt_length + config.max_completion_length,
        "prompt and completion",
        "lower --max_prompt_length or --max_completion_length",
    )
    distributed.on_first_rank(lambda: check_columns(base.rows, data.dataset_name, data, reward_funcs), patient=True)
    if base.test_rows is not None:
        test = (base.test_rows, data.dataset_test_split)
        distributed.on_first_rank(lambda: check_columns(*test, data, reward_funcs), patient=True)
    prompts, left_out = prompts_to_use(base, base.rows, config)
    test_prompts: list[Prompt] = []
    if base.test_rows is not None:
        require(
            config.rollouts_from is None,
            "a replay of rollouts has no engine to evaluate with: leave out do_eval and eval_strategy.",
        )
        test_prompts, test_left_out = prompts_to_use(base, base.test_rows, config)
    prompts_per_rollout = config.prompts_a_rollout(world_size)
    total_steps = config.total_steps(config.num_iterations * len(prompts) / prompts_per_rollout)
    if config.rollouts_from is None:
        distributed.on_first_rank(lambda: dry_call(base, config, prompts, reward_funcs), patient=True)
    identity, checkpoint = claim(base, config, num_iterations=config.num_iterations, prompts=len(prompts))
    rows = config.completions_a_rank(world_size)
    max_batch = min(1024, rows * tensor_parallel)
    max_model_len = config.max_prompt_length + config.max_completion_length
    if config.rollouts_from is not None:
        kv_bytes = -1  # no engine
    elif config.engine == "vllm":
        kv_bytes = cpu_kv_bytes(base.model_info, dtype, max_model_len, max_batch)
    else:
        kv_bytes = max_batch * kv_cache_bytes(base.model_info, dtype, max_model_len)
    on_gpu = base.device.type == "cuda" and config.engine == "vllm" and config.rollouts_from is None
    plan = Plan(
        base.model_info,
        model,
        config,
        base.num_parameters,
        world_size,
        rows=rows,
        longest=max_model_len,
        itemsize=dtype.itemsize,
        reference=config.beta > 0,
        engine_ranks=tensor_parallel,
        engine_kv_bytes=kv_bytes,
        engine_share=config.vllm_gpu_memory_utilization if on_gpu else 0,
        engine_sleeps=config.vllm_enable_sleep_mode,
    )
    batch = f"{prompts_per_rollout} prompts x {config.num_generations} completions"
    if config.prompts_per_step is None:
        batch += (
            f" (from {config.per_device_train_batch_size} a device x {config.gradient_accumulation_steps} accumulation "
            f"steps x {world_size} ranks, rounded up to whole groups)"
        )
    summary = [
        base.template,
        f"{len(prompts)} prompts; left out: {left_out}"
        + (f"; {len(test_prompts)} to evaluate on; left out: {test_left_out}" if test_prompts else ""),
        f"{total_steps} optimizer steps, {config.num_iterations} on each rollout of {batch}",
        memory_plan(plan, base.device),
    ]
    return Run(
        **vars(base),
        config=config,
        local_model=local_copy(model),
        prompts=prompts,
        test_prompts=test_prompts,
        reward_funcs=reward_funcs,
        reward_names=[reward_name(function) for function in reward_funcs],
        identity=identity,
        checkpoint=checkpoint,
        prompts_per_rollout=prompts_per_rollout,
        max_batch=max_batch,
        total_steps=total_steps,
        summary="\n".join(summary),
    )


def plan_only(model: ModelConfig, config: GRPOConfig) -> NoReturn:
    """Predict memory and time of a step's training, the engine's memory beside it, and end."""
    info, longest = load_model_info(model), config.max_prompt_length + config.max_completion_length
    check_architecture(info, model)
    check_positions(info, longest, "prompt and completion", "lower --max_prompt_length or --max_completion_length")
    check_adapters(model, config, info)
    rows = config.completions_a_rank(config.dry_run_gpus)
    engine = config.rollouts_from is None
    cache = min(1024, rows) * kv_cache_bytes(info, torch.bfloat16, longest)
    dry_run(
        info,
        model,
        config,
        rows=rows,
        longest=longest,
        reference=config.beta > 0,
        engine_share=config.vllm_gpu_memory_utilization if engine and config.engine == "vllm" else 0.0,
        engine_kv_bytes=cache if engine else -1,
        engine_ranks=config.vllm_tensor_parallel_size,
        engine_sleeps=config.vllm_enable_sleep_mode,
    )


def prompts_to_use(base: Base, rows: Dataset, config: GRPOConfig) -> tuple[list[Prompt], str]:
    """The prompts of `rows` that can teach something, and how many are left out and why. A collective.

    Raises:
        ValueError: no prompt column, no answers for the rewards, or no prompt is left.
    """
    data = base.data
    assert isinstance(data, GRPOScriptArguments)
    prompts, reason = load_prompts(rows, data, config, base.tokenizer)
    if not data.drop_unparseable_golds or not GOLD_REWARDS & set(data.reward_funcs):
        return prompts, reason

    def find() -> list[int]:
        with WorkerPool(min(16, len(os.sched_getaffinity(0))), config.reward_timeout) as pool:
            return unparseable_golds(gold_answers(prompts) or [], pool)

    dropped = set(distributed.on_first_rank(find, patient=True))
    kept = [prompt for i, prompt in enumerate(prompts) if i not in dropped]
    require(
        len(kept) > 0,
        f"none of the {len(prompts)} gold answers can be parsed, so the rewards "
        f"{', '.join(sorted(GOLD_REWARDS & set(data.reward_funcs)))} would have no signal: check the column "
        "`solution` (or `answer`).",
    )
    return kept, f"{reason}, {len(dropped)} whose gold answer cannot be parsed"


def check_columns(rows: Dataset, file: str | None, data: GRPOScriptArguments, functions: list[Callable]) -> None:
    """Refuse a column that a reward asks for by name where its values are of several types, or where reading the rows
    from `file` changed one: `datasets` makes 21 of "21" if another row has a number, text of a list if earlier rows are
    text, and times of text that looks like one. Only .json and .jsonl files have no types of their own. Of a column
    that a reward is only given, by `**kwargs`, it is said.

    Raises:
        ValueError: with the row and the column.
    """
    own = [function for name, function in zip(data.reward_funcs, functions, strict=True) if ":" in name]
    given = set[str]().union(*(accepted(function, [*rows.column_names, "solution"]) for function in own))
    named = set[str]().union(*(inspect.signature(function).parameters for function in own))
    if "solution" in named or GOLD_REWARDS & set(data.reward_funcs):
        named |= {"solution", "answer"}
    path = Path(file or "").expanduser()
    by_line = path.suffix in (".json", ".jsonl") and damaged_line(path) is None
    lines = path.read_text(encoding="utf-8").split("\n") if by_line else []
    for name in (given | named).intersection(rows.column_names) - {prompt_column(rows, data)}:
        feature, read = repr(rows.features[name]), rows.with_format(None)[name][:]
        written = [json.loads(line).get(name) for line in lines if line.strip()] or read
        kinds = ["number" if type(value) in (int, float) else type(value).__name__ for value in written]
        first = next((kind for kind in kinds if kind != "NoneType"), "dict")
        wrong = [i for i, kind in enumerate(kinds) if kind not in (first, "NoneType")]
        if "Json" in feature or "{" not in feature:  # a struct's fields may come as None where they are missing
            wrong += [i for i, value in enumerate(written) if value == value != read[i]]  # NaN equals nothing
        if not lines and "Json" in feature and first not in ("dict", "list"):
            wrong.append(kinds.index(first))
        for i in wrong[:1]:
            text = (
                f"row {i + 1} of the data: `{name}` is {written[i]!r:.80}, read as {read[i]!r:.80}, in a column that "
                f"begins as {first}: write one type in every row, or save the data as .parquet."
            )
            require(name not in named, text)
            print(f"warning: {text}", flush=True)


def dry_call(base: Base, config: GRPOConfig, prompts: list[Prompt], functions: list[Callable]) -> None:
    """Call each reward as training does, in a worker, on the gold answer of the first prompt that has one as its
    completion; with a whole group of these, if it sees groups. The first call takes the time it needs, for it may
    import; the second is held to reward_timeout.

    Raises:
        ValueError: a reward cannot be sent to a worker, raises, hangs, or returns something else than rewards.
    """
    golds = gold_answers(prompts) or [None]
    row = next((i for i, gold in enumerate(golds) if gold is not None), 0)
    prompt, gold = prompts[row], golds[row]
    ids = base.tokenizer(str(gold), add_special_tokens=False)["input_ids"]
    rollout = Rollout(0, prompt.ids, ids, [], "stop", 0)
    with WorkerPool(1) as pool:
        for limit in (max(pool.START_LIMIT, config.reward_timeout), config.reward_timeout):
            pool.timeout = limit
            for function in functions:
                scorer = Scorer({0: prompt}, [function], replace(config, reward_weights=None), base.tokenizer, pool)
                try:
                    scorer.begin([rollout] * (config.num_generations if getattr(function, "batch", False) else 1))
                    gaps = scorer.begun[0][1]().gaps
                except Exception as error:  # of a user's function anything
                    raise ValueError(f"{reward_name(function)} cannot be called where rewards run: {error}") from error
                for cause, text in gaps:
                    require(
                        not text,
                        f"{cause} on a real row with the completion {str(gold)!r:.50} ({text}): mend "
                        "it, or raise --reward_timeout if it is slow; it may take completions, completion_ids, "
                        f"prompts, prompt_texts, group_ids, {', '.join(prompt.columns)}.",
                    )


def start_engine(run: Run) -> Engine | None:
    """The engine that samples, with the model's initial weights; None where recorded rollouts take its place."""
    config = run.config
    if config.rollouts_from is not None:
        return None
    return make_engine(
        config.engine or "vllm",
        run.local_model.model_name_or_path,
        dtype=run.dtype,
        seed=config.seed,
        max_model_len=config.max_prompt_length + config.max_completion_length,
        max_batch=run.max_batch,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        sleep_mode=config.vllm_enable_sleep_mode,
    )
