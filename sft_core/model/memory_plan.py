"""Plans the memory of a step before the run starts. `--dry_run` and every real start use the same count.

    python -m sft_core.train --config recipe.yaml --dry_run true   # or grpo_core.train; needs no GPU, weights or data

The bytes are counted, not fitted: what FSDP2 shards and gathers, what a block saves, and what the head's chunks take.
For a prototype's update on one H100 (bf16, no optimizer, two model sizes) the count is within 2 % of six measured
values. It was not compared with measurements of this trainer's loop, several GPUs, offloading, adapters or other cards.

Not planned, on purpose: run time, evaluation, mixtures of experts. The result is an upper bound, because every row
counts as a full document and every token as scored.
"""

import itertools
import math
import os
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import psutil
import torch
from transformers import PretrainedConfig

from kernels import tables
from sft_core.model.flops import block_weights, head_workspace, linear_sizes, saved_per_token, shape, tail_per_token
from sft_core.run.config import ModelConfig, TrainingConfig
from sft_core.run.distributed import GIB
from sft_core.run.options import require

HOST_MEMORY = 200 * GIB  # per GPU, for which offloading may be proposed; assumed (eight GPUs often come with 2 TB)
SLACK = 1.1  # a real run is refused above this multiple of the free memory: the count is an upper bound
RESERVE = 3 * GIB  # CUDA context, NCCL's buffers, fragmentation; assumed


@dataclass(frozen=True)
class Plan:
    """Everything that the memory depends on. A rank's share of a step is `rows` sequences of `longest` tokens."""

    info: PretrainedConfig
    model: ModelConfig
    config: TrainingConfig
    parameters: int
    gpus: int
    rows: int
    longest: int
    itemsize: int = 2  # of the compute dtype
    shared: int = 0  # tokens of these rows that another sequence already computes
    device: str = "cuda"
    reference_itemsize: int = 0  # bytes per parameter of the reference model; 0: there is none
    engine_share: float = 0.0  # the engine's share of device memory; 0: see engine_kv_bytes
    engine_kv_bytes: int = -1  # its KV cache if engine_share is 0 (-1: no engine)
    engine_ranks: int = 1  # ranks that share one copy of the engine's weights
    engine_sleeps: bool = False  # whether the engine sleeps during the update

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch: the budget, at least the longest sequence, at most all tokens of a step."""
        step = self.rows * self.longest - self.shared
        return min(max(self.config.max_tokens_per_micro_batch, self.longest), step)

    @property
    def checkpointed(self) -> int:
        """Blocks whose activations are recomputed."""
        c = self.config
        return math.ceil(shape(self.info).layers / c.gradient_checkpointing_every) if c.gradient_checkpointing else 0

    @property
    def engine_weights(self) -> float:
        """Bytes of the engine's weights on a rank."""
        return self.itemsize * self.parameters / self.engine_ranks

    @property
    def trained(self) -> int:
        """Parameters that get a gradient."""
        if not self.model.use_peft:
            return self.parameters
        s, extra = shape(self.info), len(self.model.lora_modules_to_save or [])  # in practice embedding and head
        return s.layers * self.model.lora_r * sum(map(sum, adapted(self).values())) + extra * s.vocab * s.hidden


def adapted(plan: Plan) -> dict[str, tuple[int, int]]:
    """The linear layers that get adapters: the named ones, or peft's default for Llama and Qwen2, q_proj and v_proj."""
    sizes, names = linear_sizes(shape(plan.info)), plan.model.lora_target_modules or ["q_proj", "v_proj"]
    return sizes if "all-linear" in names else {name: sizes[name] for name in sizes if name in names}


def saved(plan: Plan) -> int:
    """Bytes per token that a block saves; dropout before an adapter adds a copy of its input and the mask."""
    adapters = 0
    if plan.model.use_peft:
        copy = (plan.itemsize + 1) * (plan.model.lora_dropout > 0)
        adapters = sum(copy * a + plan.itemsize * plan.model.lora_r for a, _ in adapted(plan).values())
    return saved_per_token(shape(plan.info), plan.itemsize, plan.config.torch_compile) + adapters


def quantised(plan: Plan) -> float:
    """Bytes of the blocks' quantised weights, which are whole on each rank; 0 without quantisation."""
    scales = (1 if plan.model.use_bnb_nested_quant else 4) / 64  # 4 bytes per 64 weights, about 1 if quantised too
    size = 0.5 + scales if plan.model.load_in_4bit else 1.0 if plan.model.load_in_8bit else 0.0
    return size * block_weights(shape(plan.info))


def frozen(plan: Plan) -> float:
    """Bytes, over all ranks, of the parameters that are not trained and so sharded in the compute dtype."""
    if not plan.model.use_peft:
        return plan.reference_itemsize * plan.parameters
    return plan.itemsize * (plan.parameters - (block_weights(shape(plan.info)) if quantised(plan) else 0))


def memory(plan: Plan, device_bytes: float = 0.0) -> dict[str, float]:
    """Bytes on a rank by part, at the peak of a step. `device_bytes`: the device's memory, for the engine's share."""
    s, item, trained = shape(plan.info), plan.itemsize, plan.trained / plan.gpus
    full = not plan.model.use_peft  # all parameters are trained
    parts: dict[str, float] = {}
    if not plan.config.cpu_offload:
        parts = {"parameters": 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained}
        parts["reference model" if full else "frozen model"] = frozen(plan) / plan.gpus  # full: a reference
    parts["quantised weights"] = quantised(plan)
    engine: dict[str, float] = {}
    if plan.engine_share > 0 or plan.engine_kv_bytes >= 0:
        share = max(0.0, plan.engine_share * device_bytes - plan.engine_weights)
        cache = share if plan.engine_share > 0 else plan.engine_kv_bytes
        engine = {"engine weights": plan.engine_weights, "engine KV cache": cache}
    parts |= {} if plan.engine_sleeps else engine
    # The root unit (embedding and head) stays gathered during a pass. Two blocks are gathered at a time, since the next
    # one is prefetched. On one GPU all blocks stay gathered from the forward to the backward pass, unless offloaded.
    # Gradients are whole in the compute dtype, and in float32 while they are reduced; two blocks' exist at a time.
    root = s.vocab * s.hidden * (1 if s.tied else 2)
    block = (plan.parameters - root) / s.layers
    block = 0 if quantised(plan) else block
    kept_blocks = s.layers if plan.gpus == 1 and not plan.config.cpu_offload else 0
    boundaries = min(plan.checkpointed, 2) if plan.config.activation_offloading else plan.checkpointed
    kept = plan.tokens * (boundaries * item * s.hidden + (s.layers - plan.checkpointed) * saved(plan))
    recomputed = plan.tokens * saved(plan) * (plan.checkpointed > 0)
    moments: list[dict[str, float]] = [
        {  # the head's backward
            "activations": kept + plan.tokens * tail_per_token(s, item),
            "gathered units": item * (root + kept_blocks * block),
            "logits workspace": head_workspace(s, plan.tokens, item, plan.device, full),
        },
        {  # the last block's backward, with three gradients as wide as the MLP and a norm's three in float32
            "activations": kept,
            "gathered units": item * (root + max(2, kept_blocks) * block),
            "block workspace": recomputed + plan.tokens * (3 * item * s.ffn + 12 * s.hidden),
            "gradients in flight": full * ((item + 8) * block + item * s.vocab * s.hidden),
        },
        {"gathered units": item * root, "gradients in flight": full * (item + 4) * root},  # the root's reduction
        engine if plan.engine_sleeps else {},  # sampling
    ]
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    return {name: size for name, size in (parts | fullest).items() if size}


def host_memory(plan: Plan) -> float:
    """Bytes of host memory that offloading takes, over all ranks."""
    inputs = plan.gpus * plan.checkpointed * plan.tokens * plan.itemsize * shape(plan.info).hidden
    return plan.config.cpu_offload * (16 * plan.trained + frozen(plan)) + plan.config.activation_offloading * inputs


def remedy(plan: Plan, room: float, device_bytes: float) -> str:
    """What to change so that `plan` takes at most `room` bytes per GPU, with as few options as possible, the cheapest
    first."""
    if plan.engine_share > 0:
        trainer = sum(memory(replace(plan, engine_share=0.0, engine_kv_bytes=-1)).values())
        spare = math.floor(100 * (room - trainer) / device_bytes) / 100  # rounded down, so that it fits
        if spare * device_bytes > plan.engine_weights:
            return f"lower vllm_gpu_memory_utilization from {plan.engine_share:.2f} to at most {spare:.2f}"

    budgets = [plan.tokens >> n for n in range(1, 20) if plan.tokens >> n >= plan.longest]
    options: list[dict[str, Any]] = [
        {"gradient_checkpointing": True, "gradient_checkpointing_every": 1},
        *({"max_tokens_per_micro_batch": budget} for budget in budgets),
        {"gradient_checkpointing": True, "activation_offloading": True},
        {"cpu_offload": True},
        {"use_peft": True},
        {"use_peft": True, "load_in_8bit": False, "load_in_4bit": True},
    ]
    present = vars(plan.config) | vars(plan.model)
    for size in range(1, 4):
        for chosen in itertools.combinations(options, size):
            values = {name: value for option in chosen for name, value in option.items() if present[name] != value}
            of_model = {name: values[name] for name in values if hasattr(plan.model, name)}
            of_config = {name: values[name] for name in values if name not in of_model}
            changed = replace(plan, model=replace(plan.model, **of_model), config=replace(plan.config, **of_config))
            host = host_memory(changed)
            if sum(memory(changed, device_bytes).values()) <= room and host <= plan.gpus * HOST_MEMORY:
                where = f" (takes {host / GIB:,.0f} GiB of host memory over all ranks)" if host else ""
                return f"use {' '.join(f'--{name} {str(value).lower()}' for name, value in values.items())}{where}"
    return "use more GPUs, a smaller model or shorter sequences, since no memory option is enough"


def memory_plan(plan: Plan, device: torch.device) -> str:
    """One line: the GiB that each part of a real run will take on this rank.

    Raises:
        ValueError: on CUDA, the sum is above SLACK times the free memory; the message names what to change.
    """
    plan = replace(plan, device=device.type)
    host = psutil.virtual_memory()
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (host.available, host.total)
    parts = memory(plan, total)
    line = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    line = f"memory on {device} (GiB): {line}; sum {sum(parts.values()) / GIB:.2f} of {free / GIB:.2f} free"
    if device.type == "cuda":
        check_engine(plan, total)
        if sum(parts.values()) > SLACK * free:
            raise ValueError(f"not enough GPU memory: {remedy(plan, free, total)} ({line}).")
    return line


def check_engine(plan: Plan, device_bytes: float) -> None:
    share, weights = plan.engine_share * device_bytes, plan.engine_weights
    require(
        not 0 < share < weights,
        f"the engine's share of {share / GIB:.1f} GiB cannot hold its weights of "
        f"{weights / GIB:.1f} GiB: raise vllm_gpu_memory_utilization above {weights / device_bytes:.2f}, or use a "
        "smaller model.",
    )


def dry_run(plan: Plan) -> NoReturn:
    """Print the memory of a step on `dry_run_gpus` GPUs and exit with code 0.

    Raises:
        ValueError: the step does not fit; the sentence names what to change.
    """
    config = plan.config
    total = config.dry_run_gpu_gib * GIB
    require(total > RESERVE, f"dry_run_gpu_gib must be above {RESERVE / GIB:.0f}, got {config.dry_run_gpu_gib}.")
    check_engine(plan, total)
    parts = memory(plan, total) | {"reserve (CUDA, NCCL, fragmentation)": RESERVE}
    planned, host = sum(parts.values()), host_memory(plan)
    sizes = {name: f"{size / GIB:.2f}" for name, size in parts.items()}
    sizes["sum"] = f"{planned / GIB:.2f} of {total / GIB:.2f}"
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{plan.parameters / 1e9:.2f}B parameters, {plan.trained / 1e9:.2f}B trained; GPUs: {plan.gpus}; "
            f"micro-batches of {plan.tokens} tokens; host memory for offloading, over all ranks: "
            f"{host / GIB:,.0f} GiB\n\n{tables.table(['on each GPU', 'GiB'], sizes.items())}",
            flush=True,
        )
    require(
        planned <= total,
        f"the run needs {planned / GIB:.1f} GiB on each GPU and does not fit {plan.gpus} GPUs of "
        f"{config.dry_run_gpu_gib:g} GiB: {remedy(plan, total - RESERVE, total)}.",
    )
    raise SystemExit(0)
