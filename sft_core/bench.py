"""How fast this trainer's update is on this machine, beside what the plan predicts and, if asked, beside TRL.

    python -m sft_core.bench [--shape 0.5b 1.5b] [--tokens 8192 16384] [--steps 5] [--gradient_checkpointing]
                             [--torch_compile] [--peer]
    torchrun --nproc_per_node 8 -m sft_core.bench            # sharded over all GPUs, as in training; without a peer

Random weights in the shapes of Qwen2.5, random tokens in documents of random lengths up to 2,048 that fill the given
number of tokens exactly, one micro-batch a step, every token scored. `--peer` trains the same shape on the same
documents with TRL and Liger (`sft_core/bench_trl.py`). `--shape tiny` is for the CPU.

A line is shown when it is measured. What fails is a note in its line, and the exit code is then 1; out of memory or not
installed is a note alone. On several ranks a failure ends the run: they would not meet again.

Left out on purpose: reading and tokenising data, logging, checkpoints; several micro-batches a step.
"""

import argparse
import gc
import importlib
import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from kernels import tables
from kernels.bench import failure, machine, show
from sft_core.data.packing import pack_sequences
from sft_core.model.flops import PEAK_FLOPS, peak_flops, training_flops
from sft_core.model.memory_plan import Plan, memory, seconds
from sft_core.model.optim import clip_gradients, guarded_step, make_optimizer, make_scheduler
from sft_core.model.parallel import make_mesh, shard
from sft_core.model.policy import Policy, count_parameters
from sft_core.run import distributed
from sft_core.run.config import ModelConfig, SFTConfig, require

LONGEST = 2048
WARM_UP = 3  # steps that are not timed: compilation of kernels, the optimizer's state
SHAPES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 256),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}
TIMED = (
    "Timed, the device synchronised before and after: packing a micro-batch, forward, backward with the reduction of "
    "gradients, clipping, the check that all is finite, AdamW, the schedule; of TRL from on_step_begin to on_step_end. "
    "Predicted: by sft_core.model.memory_plan, for H100 SXM cards, without its reserve of memory."
)


def documents(tokens: int, vocab: int, seed: int) -> list[list[int]]:
    """Documents of random tokens and lengths, `tokens` in all; their number and lengths do not depend on `seed`."""
    lengths: list[int] = []
    generator = torch.Generator().manual_seed(0)
    while (left := tokens - sum(lengths)) > 0:
        drawn = int(torch.randint(min(64, LONGEST), LONGEST + 1, (), generator=generator))
        lengths.append(left if left - drawn < 2 else drawn)
    generator.manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def shape_config(name: str) -> Qwen2Config:
    hidden, ffn, layers, heads, kv_heads, vocab = SHAPES[name]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    )


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def random_policy(
    info: Qwen2Config, gradient_checkpointing: bool, device: torch.device, torch_compile: bool = False
) -> Policy:
    """Random weights of that shape, sharded as in training."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(info, attn_implementation="packed", dtype=torch.bfloat16)
    sharding = {"bf16": device.type == "cuda", "gradient_checkpointing": gradient_checkpointing}
    backend = "inductor" if torch_compile else None
    return shard(Policy(model).eval(), make_mesh(device), **sharding, compile_backend=backend)


def this_trainer(info: Qwen2Config, tokens: int, config: SFTConfig, steps: int, device: torch.device) -> list[float]:
    """Seconds of each timed step of `sft_core.train`'s update."""
    policy = random_policy(info, config.gradient_checkpointing, device, config.torch_compile)
    optimizer = make_optimizer(policy, config)
    scheduler = make_scheduler(optimizer, config, WARM_UP + steps)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    taken = []
    for i in range(WARM_UP + steps):
        rows = documents(tokens, info.vocab_size, seed=1 + i * world_size + rank)
        start = now(device)
        batch = pack_sequences(rows, [[True] * len(ids) for ids in rows], device)
        count = len(batch.targets) * world_size
        loss, *_ = policy(batch, token_loss=lambda logps, entropies, rows, count=count: -logps / count)
        loss.backward()
        norm = clip_gradients(policy.parameters(), config.max_grad_norm)
        guarded_step(optimizer, scheduler, loss.item(), norm.item())
        taken.append(now(device) - start)
    return taken[WARM_UP:]


def trl_and_liger(*arguments: Any) -> list[float]:
    """Loaded when its turn comes: where it cannot be, this trainer has been measured."""
    importlib.import_module("liger_kernel")
    from sft_core.bench_trl import trl

    return trl(*arguments)


def with_fresh_memory(make: Any, *arguments: Any) -> tuple[Any, str, bool]:
    """make(*arguments), the last the device, with nothing left there from before; or why there is nothing, and whether
    that makes the exit code 1."""
    device = arguments[-1]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        return make(*arguments), "", False
    except Exception as error:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise
        return None, *failure(error)


def measure(
    make: Any,
    name: str,
    info: Qwen2Config,
    tokens: int,
    config: SFTConfig,
    steps: int,
    device: torch.device,
    world_size: int,
) -> tuple[str, bool]:
    """A line of the table: one trainer at one shape; and whether it failed."""
    taken, note, failed = with_fresh_memory(make, info, tokens, config, steps, device)
    if note:
        return tables.line(name, tokens, note), failed
    flops, gib = (
        training_flops(info, [len(ids) for ids in documents(tokens, 1, 0)]),
        distributed.peak_memory_gib(device),
    )
    return line(name, tokens, sum(taken) / steps, flops, peak_flops(device), gib, world_size), False


def predict(info: Qwen2Config, tokens: int, config: SFTConfig, world_size: int) -> str:
    """The same line as the plan has it, which takes every document to be of full length."""
    longest = min(LONGEST, tokens)
    plan = Plan(info, ModelConfig("random"), config, count_parameters(info), world_size, tokens // longest, longest)
    flops, gib = training_flops(info, [longest] * plan.rows), sum(memory(plan).values()) / distributed.GIB
    return line("predicted", tokens, sum(seconds(plan).values()), flops, PEAK_FLOPS["H100"], gib, world_size)


def line(name: str, tokens: int, step: float, flops: float, peak: float | None, gib: float, world_size: int) -> str:
    mfu = f"{flops / step / peak:.1%}" if peak else "-"
    rate = f"{tokens * world_size / step:,.0f}"
    return tables.line(name, tokens, f"{step:.3f}", rate, f"{flops / step / 1e12:.1f}", mfu, f"{gib:.1f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="sft_core.bench")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.5b", "1.5b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 16384])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--peer", action="store_true", help="TRL with Liger's kernels beside it")
    options = parser.parse_args(argv)
    with distributed.usage_errors():
        require(options.steps >= 1 and min(options.tokens) >= 64, "--steps must be at least 1, --tokens at least 64.")
        rank, world_size, _, device = distributed.init_distributed()
    names = ("gradient_checkpointing", "torch_compile")
    more, failed = {name: getattr(options, name) for name in names}, False
    trainers: dict[str, Callable] = {"this trainer": this_trainer}
    if options.peer and world_size == 1:
        trainers["TRL and Liger"] = trl_and_liger
    if rank == 0:
        where = machine("torch", "transformers", "trl", "liger-kernel")
        show(
            f"{world_size} x {where}; mean of {options.steps} steps, gradient checkpointing "
            f"{'on' if options.gradient_checkpointing else 'off'}, blocks "
            f"{'compiled' if options.torch_compile else 'eager'}. {TIMED}"
        )
        if options.peer and world_size > 1:
            show("No TRL: it gets one GPU only.")
        columns = ("tokens a GPU", "s a step", "tokens/s in all", "TFLOP/s a GPU", "MFU", "peak GiB")
        show("\n" + tables.head("trainer", *columns))
    for name, make in trainers.items():
        for shape, tokens in itertools.product(options.shape, options.tokens):
            info, config = shape_config(shape), SFTConfig("none", max_tokens_per_micro_batch=tokens, **more)
            text, bad = measure(make, f"{shape} {name}", info, tokens, config, options.steps, device, world_size)
            failed |= bad
            if rank == 0:
                show(text)
                if make is this_trainer:
                    show(predict(info, tokens, config, world_size))
        distributed.shutdown()  # TRL, alone on its GPU, shall not find a process group and wrap its model in DDP
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(variable, None)
    sys.exit(failed)


if __name__ == "__main__":
    main()
