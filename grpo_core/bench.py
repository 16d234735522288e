"""How fast the update is: packed random rollouts through `grpo_core.update.update`, clipping and AdamW.

    python -m grpo_core.bench [--shape 0.5b 1.5b] [--tokens 16384] [--steps 5] [--gradient_checkpointing]
                              [--torch_compile] [--peer]
    python -m grpo_core.bench --shape 1.5b --profile         # what a step launches, and how long that takes
    torchrun --nproc_per_node 8 -m grpo_core.bench           # sharded over all GPUs, as in training; without a peer

Random weights in the shapes of Qwen2.5 and groups of 8 random rows of 2,048 tokens (fewer where --tokens has no room)
that fill the given number of tokens on every GPU in one micro-batch. Prompts are 16 tokens of a row: nearly all tokens
reach the head, as TFLOP/s counts them. The old log-probs are the policy's own (one update a rollout), no group is
without spread. `--peer` does the same step in the way of TRL 1.16's trainer: rows in a rectangle (there is nothing to
pad here), its fused head, float32 weights under autocast, this project's objective.
`--shape tiny` is for the CPU. Left out on purpose: sampling, scoring and the weights' way into the engine (`train.py`
logs what they take); the 7B shape, whose float32 masters, gradients and moments take 16 bytes a parameter, 113 GiB.
A line is shown when it is measured. What fails is a note in its line, and the exit code is then 1; out of memory or not
installed is a note alone. On several ranks a failure ends the run: they would not meet again.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo_core.batch import make_micro_batches
from grpo_core.config import GRPOConfig
from grpo_core.loss import policy_loss
from grpo_core.rollout import Sample
from grpo_core.update import update
from kernels import tables
from kernels.bench import machine, profiled, show, verdict
from sft_core.bench import SHAPES, WARM_UP, now, random_policy, shape_config, with_fresh_memory
from sft_core.data.packing import step_counts
from sft_core.model.flops import peak_flops, training_flops
from sft_core.model.optim import clip_gradients, guarded_step, make_optimizer, make_scheduler
from sft_core.run import distributed
from sft_core.run.config import require

PROMPT, GROUP, LONGEST = 16, 8, 2048
AIMS = {  # (shape, checkpointing) -> TFLOP/s of the pass and of the whole step, 16,384 tokens on one H100
    ("0.5b", False): (400.0,),
    ("1.5b", False): (500.0, 460.0),
    ("1.5b", True): (400.0,),
}
TIMED = (
    "Timed, the device synchronised before and after each phase: packing (of the peer: padding), forward and backward "
    "with the objective and its metrics (the pass), clipping, the check that all is finite, AdamW. TFLOP/s a GPU: "
    "6 N T + 6 L D T S, N with the head once, no recomputation; of the pass alone and of the whole step."
)
COLUMNS = (
    "trainer",
    "tokens",
    "s a step",
    "pack + pass + step",
    "tokens/s",
    "TFLOP/s: pass",
    "step",
    "MFU",
    "peak GiB",
)
Phases = dict[str, float]


def make_rollouts(tokens: int, vocab: int, seed: int) -> list[Sample]:
    """Whole groups of equally long rows, as many as `tokens` have room for."""
    length, generator = min(LONGEST, tokens // GROUP), torch.Generator().manual_seed(seed)
    rollouts = []
    for i in range(tokens // (GROUP * length) * GROUP):
        ids = torch.randint(vocab, (length,), generator=generator).tolist()
        advantage = (i % GROUP - (GROUP - 1) / 2) / GROUP
        sampled = [-5.0] * (length - PROMPT)
        rollouts.append(Sample(i // GROUP, ids[:PROMPT], ids[PROMPT:], sampled, "stop", 0, advantage=advantage))
    return rollouts


def this_trainer(info: Qwen2Config, config: GRPOConfig, device: torch.device) -> Callable:
    """A step of `grpo_core.train` on given rollouts."""
    policy = random_policy(info, config.gradient_checkpointing, device, config.torch_compile)
    optimizer = make_optimizer(policy, config)
    scheduler = make_scheduler(optimizer, config, 1000)
    units = sum(isinstance(module, FSDPModule) for module in policy.modules())
    masters = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in policy.parameters()}))
    if torch.distributed.get_rank() == 0:
        ranks, compute = torch.distributed.get_world_size(), "bfloat16" if device.type == "cuda" else "float32"
        show(f"{masters} masters in {units} FSDP2 units over {ranks} ranks, computing in {compute}, fused AdamW")

    def step(rollouts: list[Sample], clock: "Clock") -> None:
        batches = make_micro_batches(rollouts, config.max_tokens_per_micro_batch, device)
        counts = step_counts([batch.sequences for batch in batches], device)
        clock("pack")
        shares = update(policy, None, batches, counts, config, first_use=True)
        clock("forward, backward")
        norm = clip_gradients(policy.parameters(), config.max_grad_norm)
        guarded_step(optimizer, scheduler, shares["loss"].item(), norm.item())
        clock("clip, step")

    return step


class Clock:
    def __init__(self, device: torch.device) -> None:
        self.device, self.phases, self.last = device, Phases(), now(device)

    def __call__(self, phase: str) -> None:
        self.phases[phase], self.last = now(self.device) - self.last, now(self.device)


def timed(
    make: Callable, info: Qwen2Config, tokens: int, config: GRPOConfig, steps: int, device: torch.device
) -> list[Phases]:
    """Seconds of each phase of each step after the warm-up."""
    rank, world_size, taken = torch.distributed.get_rank(), torch.distributed.get_world_size(), []
    step = make(info, config, device)
    for i in range(WARM_UP + steps):
        rollouts = make_rollouts(tokens, info.vocab_size, seed=1 + i * world_size + rank)
        clock = Clock(device)
        step(rollouts, clock)
        taken.append(clock.phases)
    return taken[WARM_UP:]


def in_trls_way(info: Qwen2Config, config: GRPOConfig, device: torch.device) -> Callable:
    """The same step, a group of 8 at a time, as TRL takes per_device_train_batch_size=8."""
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(info, attn_implementation="sdpa", dtype=torch.float32)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")

    def step(rollouts: list[Sample], clock: Clock) -> None:
        ids = torch.tensor([r.prompt_ids + r.completion_ids for r in rollouts], device=device)  # [B, L]
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        clock("pack")
        for start in range(0, len(rollouts), GROUP):
            rows, mask = slice(start, start + GROUP), torch.ones_like(ids[:GROUP])
            with autocast():
                logps = model(ids[rows], attention_mask=mask, labels=labels[rows], fused_lm_head=True).log_probs
            logps = logps[:, PROMPT - 1 :].flatten()  # [N]
            loss, _ = policy_loss(
                logps,
                logps.detach(),
                torch.tensor([r.advantage for r in rollouts[rows]], device=device),
                (labels[rows] >= 0).nonzero()[:, 0],
                config.objective(),
                num_tokens=int((labels >= 0).sum()),
                num_sequences=len(rollouts),
            )
            loss.backward()
        clock("forward, backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock("clip, step")

    return step


def measure(
    make: Any, name: str, info: Qwen2Config, tokens: int, config: GRPOConfig, steps: int, device: torch.device
) -> tuple[str, bool, tuple[float, float]]:
    """A line of the table; whether it failed; TFLOP/s a GPU of forward and backward alone and of the whole step."""
    taken, note, failed = with_fresh_memory(timed, make, info, tokens, config, steps, device)
    if note:
        return tables.line(name, tokens, note), failed, (math.nan, math.nan)
    phases = [sum(step[phase] for step in taken) / steps for phase in taken[0]]
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in make_rollouts(tokens, info.vocab_size, 0)]
    flops, peak = training_flops(info, lengths) / 1e12, peak_flops(device)
    alone, whole = flops / phases[1], flops / sum(phases)
    mfu = f"{1e12 * whole / peak:.1%}" if peak else "-"
    seconds = " + ".join(f"{phase:.3f}" for phase in phases)
    speed = [f"{sum(lengths) / sum(phases):,.0f}", f"{alone:.1f}", f"{whole:.1f}", mfu]
    gib = f"{distributed.peak_memory_gib(device):.1f}"
    text = tables.line(name, sum(lengths), f"{sum(phases):.3f}", seconds, *speed, gib)
    return text, False, (alone, whole)


def verdicts(shape: str, checkpointing: bool, rates: tuple[float, float]) -> list[str]:
    """`rates`: what `measure` found."""
    name = f"{shape} shape{', checkpointed' if checkpointing else ''}, 16k packed tokens, TFLOP/s: "
    aims = zip(("the pass", "with clipping and AdamW"), rates, AIMS.get((shape, checkpointing), ()), strict=False)
    return [verdict(name + what, rate, aim, at_least=True) for what, rate, aim in aims]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="grpo_core.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.5b", "1.5b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--peer", action="store_true", help="the same step in TRL's way beside it")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(argv)
    with distributed.usage_errors():
        require(
            options.steps >= 1 and min(options.tokens) >= 2048, "--steps must be at least 1, --tokens at least 2048."
        )
        rank, world_size, _, device = distributed.init_distributed()
    trainers, failed, checkpointing = {"this trainer": this_trainer}, False, options.gradient_checkpointing
    if options.peer and world_size == 1:
        trainers["TRL's way"] = in_trls_way
    if rank == 0:
        show(
            f"{world_size} x {machine('torch', 'transformers', 'trl')}; mean of {options.steps} steps\ngradient "
            f"checkpointing {'on' if checkpointing else 'off'}, blocks "
            f"{'compiled' if options.torch_compile else 'eager'}. {TIMED}"
        )
        if options.peer and world_size > 1:
            show("No TRL: it gets one GPU only.")
    for shape, tokens in itertools.product(options.shape, options.tokens):
        config = GRPOConfig(
            "none",
            max_tokens_per_micro_batch=tokens,
            beta=0.0,
            gradient_checkpointing=checkpointing,
            torch_compile=options.torch_compile,
        )
        info = shape_config(shape)
        if options.profile:
            step, rollouts = this_trainer(info, config, device), make_rollouts(tokens, info.vocab_size, 1)
            show(profiled(partial(step, rollouts, Clock(device)), device))
            continue
        for name, make in trainers.items():
            text, bad, rates = measure(make, f"{shape} {name}", info, tokens, config, options.steps, device)
            failed |= bad
            if rank == 0:
                show(f"\n{tables.head(*COLUMNS)}\n{text}")
            if (make, tokens, device.type, world_size) == (this_trainer, 16384, "cuda", 1):
                show("\n".join(["", *verdicts(shape, checkpointing, rates)]))
    distributed.shutdown()
    sys.exit(failed)


if __name__ == "__main__":
    main()
