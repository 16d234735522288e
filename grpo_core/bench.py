"""How fast the update is: packed random rollouts through `grpo_core.train.update`, clipping and AdamW.

    python -m grpo_core.bench [--shape 0.5b 1.5b] [--tokens 16384] [--steps 5] [--gradient_checkpointing] [--peer]
    torchrun --nproc_per_node 8 -m grpo_core.bench           # sharded over all GPUs, as in training; without a peer

Random weights in the shapes of Qwen2.5 and groups of 8 random completions, each with a prompt of 128 tokens, that fill
the given number of tokens on every GPU in one micro-batch. The old log-probs are the policy's own (one update a
rollout), no group is without spread. `--peer` does the same step in the way of TRL's trainer, with functions of TRL's
where it has them: padded rows, logits of the completions in bf16, float32 weights under autocast. `--shape tiny` is for
the CPU. Left out on purpose: sampling, scoring and the weights' way into the engine (`train.py` logs what they take).
"""

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo_core.batch import make_micro_batches
from grpo_core.config import GRPOConfig
from grpo_core.loss import policy_loss
from grpo_core.rollout import Rollout
from grpo_core.train import update
from sft_core import guards
from sft_core.bench import SHAPES, WARM_UP, now, random_policy, shape_config, with_fresh_memory
from sft_core.config import require
from sft_core.flops import peak_flops, training_flops
from sft_core.optim import clip_gradients, guarded_step, make_optimizer, make_scheduler
from sft_core.packing import step_counts

PROMPT, GROUP, LONGEST = 128, 8, 1024
TIMED = (
    "Timed, the device synchronised before and after each phase: packing (of the peer: padding), forward and backward "
    "with the objective and its metrics, clipping, the check that all is finite, AdamW. TFLOP/s: 6 N T + 6 L D T S, no "
    "recomputation, prompts included as tokens, none of the padding."
)
Phases = dict[str, float]


def make_rollouts(tokens: int, vocab: int, seed: int) -> list[Rollout]:
    """Whole groups with completions of random lengths, `tokens` in all or less by up to one group; lengths do not
    depend on the seed."""
    lengths, generator = list[int](), torch.Generator().manual_seed(0)
    longest = min(LONGEST, tokens // GROUP - PROMPT)
    while True:
        group = torch.randint(longest // 4, longest + 1, (GROUP,), generator=generator).tolist()
        if sum(lengths + group) + (len(lengths) + GROUP) * PROMPT > tokens:
            break
        lengths += group
    generator.manual_seed(seed)
    rollouts = []
    for i, length in enumerate(lengths):
        ids = torch.randint(vocab, (PROMPT + length,), generator=generator).tolist()
        advantage = (i % GROUP - (GROUP - 1) / 2) / GROUP
        rollouts.append(
            Rollout(i // GROUP, ids[:PROMPT], ids[PROMPT:], [-5.0] * length, "stop", 0, advantage=advantage)
        )
    return rollouts


def this_trainer(info: Qwen2Config, tokens: int, config: GRPOConfig, steps: int, device: torch.device) -> list[Phases]:
    """Seconds of each phase of each timed step."""
    policy = random_policy(info, config.gradient_checkpointing, device)
    optimizer = make_optimizer(policy, config)
    scheduler = make_scheduler(optimizer, config, WARM_UP + steps)

    def step(rollouts: list[Rollout], clock: "Clock") -> None:
        batches = make_micro_batches(rollouts, config.max_tokens_per_micro_batch, device)
        counts = step_counts([batch.sequences for batch in batches], device)
        clock("pack")
        shares = update(policy, None, batches, counts, config, first_use=True)
        clock("forward, backward")
        norm = clip_gradients(policy.parameters(), config.max_grad_norm)
        guarded_step(optimizer, scheduler, shares["loss"].item(), norm.item())
        clock("clip, step")

    return timed(step, info, tokens, steps, device)


class Clock:
    def __init__(self, device: torch.device) -> None:
        self.device, self.phases, self.last = device, Phases(), now(device)

    def __call__(self, phase: str) -> None:
        self.phases[phase], self.last = now(self.device) - self.last, now(self.device)


def timed(step: Callable, info: Qwen2Config, tokens: int, steps: int, device: torch.device) -> list[Phases]:
    rank, world_size, taken = torch.distributed.get_rank(), torch.distributed.get_world_size(), []
    for i in range(WARM_UP + steps):
        rollouts = make_rollouts(tokens, info.vocab_size, seed=1 + i * world_size + rank)
        clock = Clock(device)
        step(rollouts, clock)
        taken.append(clock.phases)
    return taken[WARM_UP:]


def in_trls_way(info: Qwen2Config, tokens: int, config: GRPOConfig, steps: int, device: torch.device) -> list[Phases]:
    """The same step on padded rows: a group of 8 at a time, as TRL takes per_device_train_batch_size=8."""
    from trl.trainer.utils import selective_log_softmax

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(info, attn_implementation="sdpa", dtype=torch.float32)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")

    def step(rollouts: list[Rollout], clock: Clock) -> None:
        longest = max(len(r.completion_ids) for r in rollouts)  # of the whole generation batch
        padded = torch.stack([F.pad(torch.tensor(r.prompt_ids + r.completion_ids), (0, longest - len(r.completion_ids)))
                              for r in rollouts]).to(device)  # fmt: skip
        lengths = torch.tensor([len(r.completion_ids) for r in rollouts], device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]  # [B, L]
        attended = torch.cat([torch.ones_like(padded[:, :PROMPT]), mask.long()], 1)
        clock("pack")
        for start in range(0, len(rollouts), GROUP):
            rows = slice(start, start + GROUP)
            with autocast():
                logits = model(padded[rows], attention_mask=attended[rows], logits_to_keep=longest + 1).logits[:, :-1]
            logps = selective_log_softmax(logits, padded[rows, PROMPT:])[mask[rows]]  # [N]
            loss, _ = policy_loss(
                logps, logps.detach(), torch.tensor([r.advantage for r in rollouts[rows]], device=device),
                mask[rows].nonzero()[:, 0], num_tokens=int(lengths.sum()), num_sequences=len(rollouts),
                **config.objective(),
            )  # fmt: skip
            loss.backward()
        clock("forward, backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock("clip, step")

    return timed(step, info, tokens, steps, device)


def measure(make: Any, name: str, info: Qwen2Config, tokens: int, config: GRPOConfig, steps: int,
            device: torch.device) -> str:  # fmt: skip
    """A line of the table."""
    taken = with_fresh_memory(make, info, tokens, config, steps, device)
    if taken is None:
        return f"| {name} | {tokens} | out of memory | | | | | |"
    phases = [sum(step[phase] for step in taken) / steps for phase in taken[0]]
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in make_rollouts(tokens, info.vocab_size, 0)]
    rate, peak = training_flops(info, lengths) / sum(phases), peak_flops(device)
    mfu = f"{rate / peak:.1%}" if peak else "-"
    seconds = " + ".join(f"{phase:.3f}" for phase in phases)
    speed = f"{sum(lengths) / sum(phases):,.0f} | {rate / 1e12:.1f} | {mfu} | {guards.peak_memory_gib(device):.1f}"
    return f"| {name} | {sum(lengths)} | {sum(phases):.3f} | {seconds} | {speed} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="grpo_core.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.5b", "1.5b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--peer", action="store_true", help="the same step in TRL's way beside it")
    options = parser.parse_args(argv)
    with guards.usage_errors():
        require(
            options.steps >= 1 and min(options.tokens) >= 2048, "--steps must be at least 1, --tokens at least 2048."
        )
        rank, world_size, _, device = guards.init_distributed()
    trainers = {"this trainer": this_trainer}
    has_trl = importlib.util.find_spec("trl") is not None
    if options.peer and world_size == 1 and has_trl:
        trainers["TRL's way"] = in_trls_way
    lines = []
    for shape in options.shape:
        for tokens in options.tokens:
            config = GRPOConfig("none", max_tokens_per_micro_batch=tokens, beta=0.0,
                                gradient_checkpointing=options.gradient_checkpointing)  # fmt: skip
            for name, make in trainers.items():
                arguments = shape_config(shape), tokens, config, options.steps, device
                lines.append(measure(make, f"{shape} {name}", *arguments))
    guards.shutdown()
    if rank == 0:
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        checkpointing = "on" if options.gradient_checkpointing else "off"
        print(f"{world_size} x {card}, torch {torch.__version__}; mean of {options.steps} steps")
        print(f"gradient checkpointing {checkpointing}. {TIMED}")
        if options.peer and len(trainers) == 1:
            print("No TRL: it is not installed." if not has_trl else "No TRL: it gets one GPU only.")
        print("\n| trainer | tokens | s a step | pack + pass + step | tokens/s | TFLOP/s | MFU | peak GiB |")
        print("\n".join(["|---|---|---|---|---|---|---|---|", *lines]))


if __name__ == "__main__":
    main()
