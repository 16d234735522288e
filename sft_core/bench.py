"""Measures the speed of this trainer's update on this machine, and compares its peak memory with the plan's count.

    python -m sft_core.bench [--shape 0.5b 1.5b] [--tokens 16384] [--steps 5] [--gradient_checkpointing]
                             [--torch_compile]
    torchrun --nproc_per_node 8 -m sft_core.bench            # sharded over all GPUs, as in training

The weights are random, in the shapes of Qwen2.5. Each step is one packed micro-batch of --tokens random tokens: eight
or more rows of equal length (at most 2,048 tokens), with every token scored. `--shape tiny` is for the CPU. Each line
is printed as soon as it is measured.

Not measured, on purpose: reading and tokenising data, logging, checkpoints, several micro-batches per step.
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from kernels import tables
from kernels.bench import machine, show
from sft_core.data.packing import pack_sequences
from sft_core.model.flops import peak_flops, training_flops
from sft_core.model.memory_plan import Plan, memory
from sft_core.model.optim import clip_gradients, guarded_step, make_optimizer, make_scheduler
from sft_core.model.parallel import Sharding, make_mesh, shard
from sft_core.model.policy import Policy, count_parameters
from sft_core.run import distributed
from sft_core.run.config import ModelConfig, SFTConfig

ROWS, LONGEST, LEAST_TOKENS = 8, 2048, 256
WARM_UP = 3  # steps that are not timed: compilation of kernels, the optimizer's state
SHAPES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 256),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}
COLUMNS = (
    "shape",
    "tokens per GPU",
    "s per step",
    "pack + pass + step",
    "tokens/s, all GPUs",
    "TFLOP/s per GPU: pass",
    "whole step",
    "MFU",
    "GiB peak",
    "GiB planned",
)
EXPLANATION = (
    "Three phases are timed, with the device synchronised before and after each: packing; the pass (forward, and "
    "backward with the reduction of gradients); the step (clipping, the check that all is finite, AdamW). TFLOP/s do "
    "not count recomputation; they are given for the pass alone and for all three phases."
)


class Updated:
    """A policy with random weights of this shape, sharded as in training, and its optimizer."""

    def __init__(self, info: Qwen2Config, config: Any, device: torch.device, world_size: int) -> None:
        self.config, self.device, self.world_size = config, device, world_size
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(info, attn_implementation="packed", dtype=torch.bfloat16)
        self.policy = shard(Policy(model).eval(), make_mesh(device), Sharding.of(config, bf16=device.type == "cuda"))
        self.optimizer = make_optimizer(self.policy, config)
        self.scheduler = make_scheduler(self.optimizer, config, 1000)

    def step(self, loss: Tensor) -> None:
        norm = clip_gradients(self.policy.parameters(), self.config.max_grad_norm)
        guarded_step(self.optimizer, self.scheduler, loss.item(), norm.item())


def update(updated: Updated, rows: list[list[int]]) -> Iterator[None]:
    """The update of `sft_core.train`."""
    batch = pack_sequences(rows, [[True] * len(ids) for ids in rows], updated.device)
    yield
    count = len(batch.targets) * updated.world_size
    loss, *_ = updated.policy(batch, token_loss=lambda logps, entropies, rows: -logps / count)
    loss.backward()
    yield
    updated.step(loss)
    yield


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
    """The time in seconds, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run(
    program: str,
    make_config: Callable[..., Any],
    update: Callable[[Updated, list[list[int]]], Iterator[None]],
    argv: list[str] | None,
    finished: Callable[[str, Any, float, float], None] | None = None,
) -> None:
    """Print a trainer's table. Its `update` takes rows of token ids and yields at the end of each of its three phases.

    `finished` is called with a shape, the configuration, and the TFLOP/s per GPU of the pass and of the whole step.
    """
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.5b", "1.5b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--torch_compile", action="store_true")
    options = parser.parse_args(argv)
    if options.steps < 1 or min(options.tokens) < LEAST_TOKENS:
        parser.error(
            f"--steps must be at least 1, --tokens at least {LEAST_TOKENS}, got {options.steps} and {options.tokens}"
        )
    training = {name: getattr(options, name) for name in ("gradient_checkpointing", "torch_compile")}
    with distributed.usage_errors():
        rank, world_size, _, device = distributed.init_distributed()
    shown = show if rank == 0 else lambda text: None
    shown(
        f"{world_size} x {machine('torch', 'transformers')}; mean of {options.steps} steps, {training}. {EXPLANATION}"
    )
    shown("\n" + tables.head(*COLUMNS))
    for shape, tokens in itertools.product(options.shape, options.tokens):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        info, config = shape_config(shape), make_config(max_tokens_per_micro_batch=tokens, **training)
        length = min(LONGEST, tokens // ROWS)
        count = tokens // length
        updated, taken = Updated(info, config, device, world_size), []
        generator = torch.Generator().manual_seed(rank)
        for _ in range(WARM_UP + options.steps):
            rows = torch.randint(info.vocab_size, (count, length), generator=generator).tolist()
            ends = [now(device), *(now(device) for _ in update(updated, rows))]
            taken.append([end - start for start, end in itertools.pairwise(ends)])
        phases = [statistics.mean(phase) for phase in zip(*taken[WARM_UP:], strict=True)]
        step, peak, flops = sum(phases), peak_flops(device), training_flops(info, [length] * count)
        itemsize, parameters = 2 if device.type == "cuda" else 4, count_parameters(info)
        of_step = dict(rows=count, longest=length, itemsize=itemsize, device=device.type)
        planned = memory(Plan(info, ModelConfig("random"), config, parameters, world_size, **of_step))
        cells = [
            f"{step:.3f}",
            " + ".join(f"{phase:.3f}" for phase in phases),
            f"{count * length * world_size / step:,.0f}",
            f"{1e-12 * flops / phases[1]:.1f}",
            f"{1e-12 * flops / step:.1f}",
            f"{flops / step / peak:.1%}" if peak else "-",
            f"{distributed.peak_memory_gib(device):.1f}",
            f"{sum(planned.values()) / distributed.GIB:.1f}",
        ]
        shown(tables.line(shape, count * length, *cells))
        if finished is not None:
            finished(shape, config, 1e-12 * flops / phases[1], 1e-12 * flops / step)
        del updated
    distributed.shutdown()


def main(argv: list[str] | None = None) -> None:
    run("sft_core.bench", partial(SFTConfig, "none"), update, argv)


if __name__ == "__main__":
    main()
