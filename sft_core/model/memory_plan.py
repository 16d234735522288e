"""How much memory and time a step takes, before it takes them: one model, for `--dry_run` and for every real start.

    python -m sft_core.train --config recipe.yaml --dry_run true        # or grpo_core.train; no GPU, weights, data

Memory is counted, not fitted: what FSDP2 shards and gathers, what a block saves, what the head's chunks take. For a
prototype's update on one H100 (bf16, no optimizer, two model sizes) it comes within 2 % of six measured figures. Time
is FLOPs and bytes over the rates below, within 10 % of that prototype's; the rates marked as assumed were chosen with
its figures at hand. Held against nothing: this trainer's loop, several GPUs, offloading, adapters, other cards.

Left out on purpose: sampling and scoring of a GRPO step, evaluation, mixtures of experts. Every row counts as a full
document, every token as scored: an upper bound.
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
from sft_core.model.flops import (
    PEAK_FLOPS,
    attention_flops,
    block_weights,
    head_workspace,
    linear_sizes,
    saved_per_token,
    shape,
    tail_per_token,
    training_flops,
)
from sft_core.run.config import ModelConfig, TrainingConfig
from sft_core.run.distributed import GIB
from sft_core.run.options import require

GEMM_EFFICIENCY = 0.70  # of an H100 SXM's peak; measured on the head's GEMMs: 690 to 727 TFLOP/s
ATTENTION_EFFICIENCY = 0.30  # of the peak, in FLOPs that do not count recomputation; assumed
BANDWIDTH = 2.5e12  # B/s in element-wise kernels; assumed, three quarters of the data sheet's
# B/s at which a rank gathers, inside a node (nominal 450e9) and over eight network cards a node of 50e9 each; assumed.
NVLINK, NETWORK = 350e9, 300e9
PCIE, HOST = 45e9, 200e9  # B/s between a GPU and the host (nominal 63), and of a node's memory; assumed
NODE = 8  # GPUs
# Bytes that kernels other than matrix products read and write, counted op by op (tests/sft_core/test_memory_plan.py).
HIDDEN_TRAFFIC, FFN_TRAFFIC, QUERY_TRAFFIC, KV_TRAFFIC = 300, 28, 91, 100  # a token, layer and element of each width
FORWARD_SHARE = 0.3  # of that; the rest is the backward
COMPILED_SHARE = 0.45  # of that where torch.compile fuses the blocks; fitted
# A logit: 4 bytes written, 4 read; 2 written for its gradient, 2 read by each product.
HEAD_TRAFFIC, HEAD_FORWARD_TRAFFIC = 14, 8
OPTIMIZER_TRAFFIC = 40  # a trained parameter: 28 AdamW, 12 the norm and the clipping
HOST_MEMORY = 200 * GIB  # a GPU, that offloading may be proposed for; assumed (eight GPUs often come with 2 TB)
SLACK = 1.1  # of free memory, before a real run is refused: the count is an upper bound, but rows are often shorter
RESERVE = 3 * GIB  # CUDA context, NCCL's buffers, fragmentation; assumed


@dataclass(frozen=True)
class Plan:
    """All that memory and time depend on. A rank's share of a step is `rows` sequences of `longest` tokens."""

    info: PretrainedConfig
    model: ModelConfig
    config: TrainingConfig
    parameters: int
    gpus: int
    rows: int
    longest: int
    itemsize: int = 2  # of the compute dtype
    device: str = "cuda"
    reference_itemsize: int = 0  # bytes a parameter of the reference model; 0: there is none
    entropy_pass: bool = False  # over the step, for a threshold
    head_twice: bool = False  # the loss needs all log-probs of a sequence, before the logits are computed again
    engine_share: float = 0.0  # of the device's whole memory; at 0 the engine's weights and
    engine_kv_bytes: int = -1  # this much for its cache (-1: there is no engine)
    engine_ranks: int = 1  # that share one copy of the engine's weights
    engine_sleeps: bool = False  # during the update

    @property
    def tokens(self) -> int:
        """Of a micro-batch: the budget, but no sequence is split and a step has no more than its rows."""
        return min(max(self.config.max_tokens_per_micro_batch, self.longest), self.rows * self.longest)

    @property
    def micro_batches(self) -> int:
        return math.ceil(self.rows / (self.tokens // self.longest))

    @property
    def checkpointed(self) -> int:
        """Blocks whose activations are recomputed."""
        c = self.config
        return math.ceil(shape(self.info).layers / c.gradient_checkpointing_every) if c.gradient_checkpointing else 0

    @property
    def engine_weights(self) -> float:
        """Bytes on a rank."""
        return self.itemsize * self.parameters / self.engine_ranks

    @property
    def trained(self) -> int:
        """Parameters that get a gradient."""
        if not self.model.use_peft:
            return self.parameters
        s, extra = shape(self.info), len(self.model.lora_modules_to_save or [])  # in practice embedding and head
        return s.layers * self.model.lora_r * sum(map(sum, adapted(self).values())) + extra * s.vocab * s.hidden


def adapted(plan: Plan) -> dict[str, tuple[int, int]]:
    """The linear layers that get adapters: those named, else peft's for Llama and Qwen2, q_proj and v_proj."""
    sizes, names = linear_sizes(shape(plan.info)), plan.model.lora_target_modules or ["q_proj", "v_proj"]
    return sizes if "all-linear" in names else {name: sizes[name] for name in sizes if name in names}


# --- memory ------------------------------------------------------------------------------------------------------


def saved(plan: Plan) -> int:
    """Bytes a token that a block saves; dropout before an adapter adds a copy of its input and the mask."""
    adapters = 0
    if plan.model.use_peft:
        copy = (plan.itemsize + 1) * (plan.model.lora_dropout > 0)
        adapters = sum(copy * a + plan.itemsize * plan.model.lora_r for a, _ in adapted(plan).values())
    return saved_per_token(shape(plan.info), plan.itemsize, plan.config.torch_compile) + adapters


def quantised(plan: Plan) -> float:
    """Bytes of the blocks' quantised weights, whole on each rank; 0 where none are."""
    scales = (1 if plan.model.use_bnb_nested_quant else 4) / 64  # 4 bytes for 64 weights, about 1 if quantised too
    size = 0.5 + scales if plan.model.load_in_4bit else 1.0 if plan.model.load_in_8bit else 0.0
    return size * block_weights(shape(plan.info))


def frozen(plan: Plan) -> float:
    """Bytes, over all ranks, of what is sharded in the compute dtype because it is not trained."""
    if not plan.model.use_peft:
        return plan.reference_itemsize * plan.parameters
    return plan.itemsize * (plan.parameters - (block_weights(shape(plan.info)) if quantised(plan) else 0))


def memory(plan: Plan, device_bytes: float = 0.0) -> dict[str, float]:
    """Bytes on a rank by part, at the fullest moment of a step; an engine's share is of `device_bytes`."""
    s, item, trained = shape(plan.info), plan.itemsize, plan.trained / plan.gpus
    full = not plan.model.use_peft  # full fine-tuning
    parts: dict[str, float] = {}
    if not plan.config.cpu_offload:
        parts = {"parameters": 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained}
        parts["reference model" if full else "frozen model"] = frozen(plan) / plan.gpus  # without adapters: reference
    parts["quantised weights"] = quantised(plan)
    engine: dict[str, float] = {}
    if plan.engine_share > 0 or plan.engine_kv_bytes >= 0:
        share = max(0.0, plan.engine_share * device_bytes - plan.engine_weights)
        cache = share if plan.engine_share > 0 else plan.engine_kv_bytes
        engine = {"engine weights": plan.engine_weights, "engine KV cache": cache}
    parts |= {} if plan.engine_sleeps else engine
    # The root unit (embedding and head) stays gathered during a pass; two blocks are while the next is prefetched, and
    # on one GPU all of them from the forward to the backward pass, unless they are offloaded.
    # Gradients are whole in the compute dtype, and in float32 while they are reduced, a block's beside the next one's.
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
    """Bytes of host memory that offloading takes, all ranks together."""
    inputs = plan.gpus * plan.checkpointed * plan.tokens * plan.itemsize * shape(plan.info).hidden
    return plan.config.cpu_offload * (16 * plan.trained + frozen(plan)) + plan.config.activation_offloading * inputs


# --- time --------------------------------------------------------------------------------------------------------


def seconds(plan: Plan) -> dict[str, float]:
    """Seconds of an optimizer step by part, in bf16 on H100 SXM cards."""
    s, peak = shape(plan.info), PEAK_FLOPS["H100"]
    full = not plan.model.use_peft  # full fine-tuning
    tokens, lengths = plan.rows * plan.longest, [plan.longest] * plan.rows
    again = plan.checkpointed / s.layers
    linear = 2 * tokens * block_weights(s) / (GEMM_EFFICIENCY * peak)  # a forward pass
    attention = attention_flops(s, lengths) / (ATTENTION_EFFICIENCY * peak)
    widths = HIDDEN_TRAFFIC * s.hidden + FFN_TRAFFIC * s.ffn + QUERY_TRAFFIC * s.query + KV_TRAFFIC * s.kv
    traffic = tokens * s.layers * widths * (COMPILED_SHARE if plan.config.torch_compile else 1) / BANDWIDTH
    logits, written = 2 * tokens * s.vocab * s.hidden / (GEMM_EFFICIENCY * peak), tokens * s.vocab / BANDWIDTH
    parts = {
        "matrix products of the blocks": linear * (2 + full + again),  # a frozen weight has no gradient
        "attention": attention * (3 + again),
        "element-wise": traffic * (1 + FORWARD_SHARE * again),
        "head": logits * (2 + full + plan.head_twice) + HEAD_TRAFFIC * written,
    }
    forward = linear + attention + FORWARD_SHARE * traffic + logits + HEAD_FORWARD_TRAFFIC * written
    passes = {"reference model": bool(plan.reference_itemsize), "threshold of entropies": plan.entropy_pass}
    parts |= {name: forward for name, made in passes.items() if made}
    moved = plan.itemsize * plan.parameters * full + frozen(plan)  # gathered for the forward and for the backward
    link = (2 * moved + 4 * plan.trained) * (1 - 1 / plan.gpus) / (NVLINK if plan.gpus <= NODE else NETWORK)
    offloaded = plan.config.cpu_offload * (12 * plan.trained + 2 * frozen(plan)) / plan.gpus
    inputs = plan.checkpointed * plan.tokens * plan.itemsize * s.hidden  # to the host and back
    offloaded += plan.config.activation_offloading * 2 * inputs
    hidden = sum(parts.values())
    parts["communication not hidden"] = max(0.0, plan.micro_batches * max(link, offloaded / PCIE) - hidden)
    optimizer = OPTIMIZER_TRAFFIC * plan.trained / plan.gpus
    parts["optimizer"] = optimizer * min(plan.gpus, NODE) / HOST if plan.config.cpu_offload else optimizer / BANDWIDTH
    return parts


# --- verdicts ----------------------------------------------------------------------------------------------------


def remedy(plan: Plan, room: float, device_bytes: float) -> str:
    """What to change so that `plan` takes at most `room` bytes a GPU: as few options as will do, the cheapest first."""
    if plan.engine_share > 0:
        trainer = sum(memory(replace(plan, engine_share=0.0, engine_kv_bytes=-1)).values())
        spare = math.floor(100 * (room - trainer) / device_bytes) / 100  # rounded down: what is said must fit
        if spare * device_bytes > plan.engine_weights:
            return f"lower vllm_gpu_memory_utilization from {plan.engine_share:.2f} to at most {spare:.2f}"

    budgets = [plan.tokens >> n for n in range(1, 20) if plan.tokens >> n >= plan.longest]
    options: list[dict[str, Any]] = [
        {"gradient_checkpointing": True, "gradient_checkpointing_every": 1},
        *({"max_tokens_per_micro_batch": budget} for budget in budgets),
        {"gradient_checkpointing": True, "activation_offloading": True},
        {"cpu_offload": True},
        *({"GPUs": plan.gpus * n} for n in (2, 3, 4, 6, 8, 16)),
        {"use_peft": True},
        {"use_peft": True, "load_in_8bit": False, "load_in_4bit": True},
    ]
    for size in range(1, 4):
        for chosen in itertools.combinations(options, size):
            changed = plan
            for option in chosen:
                changed = change(changed, option)
            host = host_memory(changed)
            if sum(memory(changed, device_bytes).values()) <= room and host <= changed.gpus * HOST_MEMORY:
                where = f" ({host / GIB:,.0f} GiB of host memory in all)" if host else ""
                return f"use {' and '.join(describe_change(plan, option) for option in chosen)}{where}"
    return "choose a smaller model or shorter sequences, for no option of memory is enough"


def change(plan: Plan, option: dict[str, Any]) -> Plan:
    """`plan` with other values of options of the training or the model, or other `GPUs`."""
    if "GPUs" in option:
        return replace(plan, gpus=option["GPUs"])
    if "use_peft" in option:
        return replace(plan, model=replace(plan.model, **option))
    return replace(plan, config=replace(plan.config, **option))


def describe_change(plan: Plan, option: dict[str, Any]) -> str:
    """What is to be said on the command line, where `plan` has another value."""
    if "GPUs" in option:
        return f"{option['GPUs']} GPUs"
    present = vars(plan.config) | vars(plan.model)
    return " ".join(f"--{name} {str(value).lower()}" for name, value in option.items() if present[name] != value)


def memory_plan(plan: Plan, device: torch.device) -> str:
    """One line: the GiB that each part of a real run will take on this rank.

    Raises:
        ValueError: on CUDA, more than is free by more than the count may be off; it names what to change.
    """
    plan = replace(plan, device=device.type)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    parts = memory(plan, total)
    line = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    line = f"memory on {device} (GiB): {line}; sum {sum(parts.values()) / GIB:.2f} of {free / GIB:.2f} free"
    if device.type == "cuda":
        check_engine(plan, total)
        if sum(parts.values()) > SLACK * free:
            raise ValueError(f"Not enough GPU memory: {remedy(plan, free, total)} ({line}).")
    return line


def check_engine(plan: Plan, device_bytes: float) -> None:
    share, weights = plan.engine_share * device_bytes, plan.engine_weights
    require(
        not 0 < share < weights,
        f"The engine's share of {share / GIB:.1f} GiB cannot hold its weights, "
        f"{weights / GIB:.1f} GiB: raise vllm_gpu_memory_utilization above {weights / device_bytes:.2f} or use a "
        "smaller model.",
    )


def dry_run(plan: Plan) -> NoReturn:
    """Print what a step takes on `dry_run_gpus` cards and end with exit code 0.

    Raises:
        ValueError: it does not fit; the sentence names what to change.
    """
    config = plan.config
    total = config.dry_run_gpu_gib * GIB
    require(total > RESERVE, f"dry_run_gpu_gib must be above {RESERVE / GIB:.0f}, got {config.dry_run_gpu_gib}.")
    check_engine(plan, total)
    planned = sum(memory(plan, total).values()) + RESERVE
    if os.environ.get("RANK", "0") == "0":
        print(table(plan, total), flush=True)
    require(
        planned <= total,
        f"This needs {planned / GIB:.1f} GiB on each GPU ({plan.gpus} of "
        f"{config.dry_run_gpu_gib:g} GiB are planned for): {remedy(plan, total - RESERVE, total)}.",
    )
    raise SystemExit(0)


def table(plan: Plan, device_bytes: float) -> str:
    """The plan as Markdown, and the predicted speed in a sentence."""
    parts = memory(plan, device_bytes) | {"reserve (CUDA, NCCL, fragmentation)": RESERVE}
    lines = [
        f"{plan.parameters / 1e9:.2f}B parameters, {plan.trained / 1e9:.2f}B trained; GPUs: {plan.gpus}; "
        f"micro-batches of {plan.tokens} tokens",
        "",
    ]
    sizes = {name: f"{size / GIB:.2f}" for name, size in parts.items()}
    sizes["sum"] = f"{sum(parts.values()) / GIB:.2f} of {device_bytes / GIB:.2f}"
    lines += [tables.table(["on each GPU", "GiB"], sizes.items()), ""]
    if host := host_memory(plan):
        lines += [f"Host memory for what is offloaded, all ranks: {host / GIB:,.0f} GiB.", ""]
    times, tokens = seconds(plan), plan.rows * plan.longest
    step = sum(times.values())
    mfu = training_flops(plan.info, [plan.longest] * plan.rows) / step / PEAK_FLOPS["H100"]
    usage = "" if plan.model.use_peft else f", MFU {mfu:.0%}"  # with adapters a third of those FLOPs is not done
    shares = ", ".join(f"{name} {value / step:.0%}" for name, value in times.items() if value >= 0.005 * step)
    lines += [
        f"Predicted for H100 SXM cards in bf16: {step:.2f} s a step of {plan.rows} x {plan.longest} tokens a GPU "
        f"({shares}), {tokens * plan.gpus / step:,.0f} tokens/s in all{usage}."
    ]
    return "\n".join(lines)
