"""All that a GRPO run needs to know before it loads a weight. What is wrong with the user's input is said here."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gen.engine import Engine, check_engine_available, kv_cache_bytes, make_engine
from gen.vllm_engine import cpu_kv_bytes
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from grpo_core.rewards import get_reward_funcs, reward_name
from grpo_core.rollout import Prompt, load_prompts
from kernels.linear_logprob import CHUNK_ELEMENTS
from sft_core import guards
from sft_core.checkpoint import prepare_output_dir
from sft_core.cli import parse
from sft_core.config import ModelConfig, require
from sft_core.data import fingerprint, load_rows
from sft_core.metrics import check_report_to
from sft_core.model import (
    architecture,
    check_positions,
    compute_in_bf16,
    count_parameters,
    load_tokenizer,
    local_copy,
    stop_token_ids,
)  # fmt: skip
from sft_core.optim import check_schedule


@dataclass(frozen=True)
class Run:
    """A run that has been checked and may start."""

    config: GRPOConfig
    local_model: ModelConfig  # the model's folder on this machine
    options: dict[str, Any]  # all of them, for the record
    rank: int
    world_size: int
    device: torch.device
    bf16: bool
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    prompts: list[Prompt]
    reward_funcs: list[Callable]
    reward_names: list[str]
    identity: dict[str, Any]
    checkpoint: Path | None  # to resume from
    prompts_per_rollout: int
    max_batch: int  # sequences that an engine samples at once: the share of the ranks that it serves
    total_steps: int
    summary: str  # what is about to happen, in a few lines

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


def prepare(argv: list[str]) -> Run:
    """Read the options, join the process group and check everything that can be checked. A collective.

    Raises:
        ValueError: the user's input, in one sentence that names the remedy.
    """
    model, data, config = parse((ModelConfig, GRPOScriptArguments, GRPOConfig), argv)
    check_schedule(config)
    check_report_to(config.report_to)
    if config.rollouts_from is None:
        check_engine_available(config.engine)
    elif not Path(config.rollouts_from).is_dir():
        raise ValueError(f"there is no folder of rollouts at {config.rollouts_from}: check --rollouts_from.")
    reward_funcs = get_reward_funcs(data)
    weights = config.reward_weights
    require(weights is None or len(weights) == len(reward_funcs),
            f"reward_weights {weights} for reward_funcs {data.reward_funcs}: give one weight each.")  # fmt: skip
    rank, world_size, _, device = guards.init_distributed(config.ddp_timeout)
    tensor_parallel = config.vllm_tensor_parallel_size
    require(world_size % tensor_parallel == 0,
            f"vllm_tensor_parallel_size {tensor_parallel} does not divide {world_size} ranks.")  # fmt: skip
    bf16 = compute_in_bf16(config.bf16, device)
    model_config, tokenizer = load_tokenizer(model)
    stop_ids = stop_token_ids(tokenizer, model)
    check_positions(model_config, config.max_prompt_length + config.max_completion_length)
    rows = load_rows(data, data.dataset_train_split)
    prompts, left_out = load_prompts(rows, data, config, tokenizer)
    prompts_per_rollout = config.prompts_a_rollout(world_size)
    total_steps = config.total_steps(config.num_iterations * len(prompts) / prompts_per_rollout)

    guards.on_first_rank(lambda: guards.lock_output_dir(config.output_dir))
    identity = {
        "algorithm": "grpo",
        "model": model.model_name_or_path,
        "architecture": architecture(model_config),
        "data": fingerprint(rows),
        "seed": config.seed,
        "num_iterations": config.num_iterations,
    }
    checkpoint = prepare_output_dir(config.output_dir, identity, config.overwrite_output_dir)
    max_batch = min(1024, config.num_generations * math.ceil(prompts_per_rollout / world_size) * tensor_parallel)
    dtype = torch.bfloat16 if bf16 else torch.float32
    max_model_len = config.max_prompt_length + config.max_completion_length
    if config.rollouts_from is not None:
        kv_bytes = -1  # no engine
    elif config.engine == "vllm":
        kv_bytes = cpu_kv_bytes(model_config, dtype, max_model_len, max_batch)
    else:
        kv_bytes = max_batch * kv_cache_bytes(model_config, dtype, max_model_len)
    on_gpu = device.type == "cuda" and config.engine == "vllm" and config.rollouts_from is None
    memory = guards.memory_plan(
        device,
        num_parameters=count_parameters(model_config),
        world_size=world_size,
        vocab_size=model_config.get_text_config().vocab_size,
        chunk_tokens=CHUNK_ELEMENTS[device.type] // model_config.get_text_config().vocab_size,
        compute_dtype=dtype,
        reference=config.beta > 0,
        engine_share=config.vllm_gpu_memory_utilization if on_gpu else 0,
        engine_ranks=tensor_parallel,
        engine_kv_bytes=kv_bytes,
    )
    batch = f"{prompts_per_rollout} prompts x {config.num_generations} completions"
    if config.prompts_per_step is None:
        batch += (
            f" (from {config.per_device_train_batch_size} a device x {config.gradient_accumulation_steps} accumulation "
            f"steps x {world_size} ranks, rounded up to whole groups)"
        )
    summary = [
        f"{len(prompts)} prompts, {left_out} left out as longer than {config.max_prompt_length} tokens",
        f"{total_steps} optimizer steps, {config.num_iterations} on each rollout of {batch}",
        memory,
    ]
    return Run(
        config=config, local_model=local_copy(model), options=asdict(model) | asdict(data) | asdict(config), rank=rank,
        world_size=world_size, device=device, bf16=bf16, tokenizer=tokenizer, stop_ids=stop_ids, prompts=prompts,
        reward_funcs=reward_funcs, reward_names=[reward_name(function) for function in reward_funcs],
        identity=identity, checkpoint=checkpoint, prompts_per_rollout=prompts_per_rollout,
        max_batch=max_batch, total_steps=total_steps,
        summary="\n".join(summary),
    )  # fmt: skip


def start_engine(run: Run) -> Engine | None:
    """The engine that samples, with the model's initial weights; None where recorded rollouts take its place."""
    config = run.config
    if config.rollouts_from is not None:
        return None
    return make_engine(
        config.engine,
        run.local_model.model_name_or_path,
        dtype=run.dtype,
        seed=config.seed,
        max_model_len=config.max_prompt_length + config.max_completion_length,
        max_batch=run.max_batch,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
    )
