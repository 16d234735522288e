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
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from kernels import tables
from kernels.bench import failure, machine, profiled, show
from sft_core.data.packing import pack_sequences
from sft_core.model.flops import PEAK_FLOPS, peak_flops, training_flops
from sft_core.model.memory_plan import Plan, memory, seconds
from sft_core.model.optim import clip_gradients, guarded_step, make_optimizer, make_scheduler
from sft_core.model.parallel import Sharding, make_mesh, shard
from sft_core.model.policy import Policy, count_parameters
from sft_core.run import distributed
from sft_core.run.config import ModelConfig, SFTConfig
from sft_core.run.options import require

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
Phases = dict[str, float]  # name -> seconds, of one step


@dataclass(frozen=True)
class Case:
    """What is measured: steps of a model of this shape on so many tokens a GPU."""

    shape: str
    tokens: int
    steps: int
    config: Any  # the trainer's
    device: torch.device
    world_size: int = 1

    @cached_property
    def info(self) -> Qwen2Config:
        return shape_config(self.shape)


Trainer = Callable[[Case], list[Phases]]  # makes itself; the phases of each timed step
Step = Callable[[Any, "Clock"], None]  # of a trainer, on data


@dataclass(frozen=True)
class Bench:
    """In what the benches of the two trainers differ."""

    program: str
    config: Callable[..., Any]
    tokens: list[int]  # by default
    least_tokens: int
    explanation: str
    columns: Sequence[str]
    cells: Callable[[Case, Phases], list[str]]  # of a line, from the mean seconds of each phase
    trainers: dict[str, Trainer]  # this one, then its peer
    prediction: Callable[[Case], list[str]] | None = None  # the cells of another line
    one_step: Callable[[Case], Callable[[], None]] | None = None  # to be profiled


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


class Clock:
    """Seconds of each phase of a step, the device synchronised before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.phases, self.last = device, Phases(), now(device)

    def __call__(self, phase: str) -> None:
        self.phases[phase], self.last = now(self.device) - self.last, now(self.device)


class Updated:
    """A policy with random weights of the case's shape, sharded as in training, and its optimizer."""

    def __init__(self, case: Case) -> None:
        config, device = case.config, case.device
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(case.info, attn_implementation="packed", dtype=torch.bfloat16)
        self.policy = shard(Policy(model).eval(), make_mesh(device), Sharding.of(config, bf16=device.type == "cuda"))
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = make_optimizer(self.policy, config)
        self.scheduler = make_scheduler(self.optimizer, config, WARM_UP + case.steps)

    def step(self, loss: Tensor) -> None:
        norm = clip_gradients(self.policy.parameters(), self.max_grad_norm)
        guarded_step(self.optimizer, self.scheduler, loss.item(), norm.item())


def timed(case: Case, step: Step, make_data: Callable[[int, int, int], Any]) -> list[Phases]:
    """Each step gets data of its own, made from tokens, vocabulary and a seed."""
    rank, taken = dist.get_rank() if dist.is_initialized() else 0, []
    for i in range(WARM_UP + case.steps):
        data = make_data(case.tokens, case.info.vocab_size, 1 + i * case.world_size + rank)
        clock = Clock(case.device)
        step(data, clock)
        taken.append(clock.phases)
    return taken[WARM_UP:]


def this_trainer(case: Case) -> list[Phases]:
    """`sft_core.train`'s update."""
    updated = Updated(case)

    def step(rows: list[list[int]], clock: Clock) -> None:
        batch = pack_sequences(rows, [[True] * len(ids) for ids in rows], case.device)
        count = len(batch.targets) * case.world_size
        loss, *_ = updated.policy(batch, token_loss=lambda logps, entropies, rows: -logps / count)
        loss.backward()
        updated.step(loss)
        clock("step")

    return timed(case, step, documents)


def trl_and_liger(case: Case) -> list[Phases]:
    """Loaded when its turn comes: where it cannot be, this trainer has been measured."""
    importlib.import_module("liger_kernel")
    from sft_core.bench_trl import trl

    return trl(case)


def measured(case: Case, phases: Phases) -> list[str]:
    lengths = [len(ids) for ids in documents(case.tokens, 1, 0)]
    gib = distributed.peak_memory_gib(case.device)
    return cells(case, phases["step"], lengths, peak_flops(case.device), gib)


def predicted(case: Case) -> list[str]:
    """The same line as the plan has it, which takes every document to be of full length."""
    longest, model = min(LONGEST, case.tokens), ModelConfig("random")
    rows = case.tokens // longest
    plan = Plan(case.info, model, case.config, count_parameters(case.info), case.world_size, rows, longest)
    gib = sum(memory(plan).values()) / distributed.GIB
    return cells(case, sum(seconds(plan).values()), [longest] * rows, PEAK_FLOPS["H100"], gib)


def cells(case: Case, step: float, lengths: list[int], peak: float | None, gib: float) -> list[str]:
    rate = training_flops(case.info, lengths) / step
    mfu = f"{rate / peak:.1%}" if peak else "-"
    in_all = case.tokens * case.world_size / step
    return [str(case.tokens), f"{step:.3f}", f"{in_all:,.0f}", f"{rate / 1e12:.1f}", mfu, f"{gib:.1f}"]


def mean(steps: list[Phases]) -> Phases:
    return {phase: sum(step[phase] for step in steps) / len(steps) for phase in steps[0]}


def measure(bench: Bench, name: str, case: Case) -> tuple[str, bool]:
    """A line of the table, of a trainer that finds the device's memory empty; whether the exit code becomes 1."""
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(case.device)
    try:
        taken = bench.trainers[name](case)
    except Exception as error:
        if case.world_size > 1:
            raise
        note, failed = failure(error)
        return tables.line(f"{case.shape} {name}", case.tokens, note), failed
    return tables.line(f"{case.shape} {name}", *bench.cells(case, mean(taken))), False


def run(bench: Bench, argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog=bench.program)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.5b", "1.5b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=bench.tokens)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--peer", action="store_true", help="TRL beside it")
    if bench.one_step is not None:
        parser.add_argument("--profile", action="store_true", help="what a step launches, in place of the table")
    options = parser.parse_args(argv)
    with distributed.usage_errors():
        require(
            options.steps >= 1 and min(options.tokens) >= bench.least_tokens,
            f"--steps must be at least 1, --tokens at least {bench.least_tokens}.",
        )
        rank, world_size, _, device = distributed.init_distributed()
    if rank == 0:
        show(
            f"{world_size} x {machine('torch', 'transformers', 'trl', 'liger-kernel')}; mean of {options.steps} steps, "
            f"gradient checkpointing {'on' if options.gradient_checkpointing else 'off'}, blocks "
            f"{'compiled' if options.torch_compile else 'eager'}. {bench.explanation}"
        )
    this, peer = bench.trainers
    if options.peer and world_size > 1 and rank == 0:
        show("No TRL: it gets one GPU only.")
    failed = False
    for name in [this, peer] if options.peer and world_size == 1 else [this]:
        for shape, tokens in itertools.product(options.shape, options.tokens):
            config = bench.config(
                max_tokens_per_micro_batch=tokens,
                gradient_checkpointing=options.gradient_checkpointing,
                torch_compile=options.torch_compile,
            )
            case = Case(shape, tokens, options.steps, config, device, world_size)
            if bench.one_step is not None and options.profile:
                show(profiled(bench.one_step(case), device))
                continue
            line, bad = measure(bench, name, case)
            failed |= bad
            if rank == 0:
                if tokens == options.tokens[0]:
                    show("\n" + tables.head("trainer", *bench.columns))
                show(line)
                if name == this and bench.prediction is not None:
                    show(tables.line("predicted", *bench.prediction(case)))
        distributed.shutdown()  # TRL, alone on its GPU, shall not find a process group and wrap its model in DDP
    sys.exit(failed)


BENCH = Bench(
    program="sft_core.bench",
    config=partial(SFTConfig, "none"),
    tokens=[8192, 16384],
    least_tokens=64,
    explanation=TIMED,
    columns=("tokens a GPU", "s a step", "tokens/s in all", "TFLOP/s a GPU", "MFU", "peak GiB"),
    cells=measured,
    trainers={"this trainer": this_trainer, "TRL and Liger": trl_and_liger},
    prediction=predicted,
)


def main(argv: list[str] | None = None) -> None:
    run(BENCH, argv)


if __name__ == "__main__":
    main()
