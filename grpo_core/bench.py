"""How fast the update is: packed random rollouts through `grpo_core.update.update`, clipping and AdamW.

    python -m grpo_core.bench [--shape 0.5b 1.5b] [--tokens 16384] [--steps 5] [--gradient_checkpointing]
                              [--torch_compile] [--peer]
    python -m grpo_core.bench --shape 1.5b --profile         # what a step launches, and how long that takes
    torchrun --nproc_per_node 8 -m grpo_core.bench           # sharded over all GPUs, as in training; without a peer

Random weights in the shapes of Qwen2.5 and groups of 8 random rows of 2,048 tokens (fewer where --tokens has no room)
that fill --tokens on every GPU in one micro-batch. Prompts are 16 tokens of a row: nearly all tokens
reach the head, as TFLOP/s counts them. The old log-probs are the policy's own (one update a rollout), no group has
equal rewards. `--peer` does the same step in the way of TRL 1.16's trainer: rows in a rectangle (there is nothing to
pad here), its fused head, float32 weights under autocast, this project's objective.
`--shape tiny` is for the CPU. Left out on purpose: sampling, scoring and the weights' way into the engine (`train.py`
logs what they take); the 7B shape, whose float32 masters, gradients and moments take 16 bytes a parameter, 113 GiB.
A line is shown when it is measured. What fails is a note in its line, and the exit code is then 1; out of memory or not
installed is a note alone. On several ranks a failure ends the run: they would not meet again.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from grpo_core.batch import make_micro_batches
from grpo_core.config import GRPOConfig
from grpo_core.loss import policy_loss
from grpo_core.rollout import Sample
from grpo_core.update import update
from kernels.bench import show
from sft_core.bench import Bench, Case, Clock, Phases, Step, Updated, run, timed
from sft_core.data.packing import step_counts
from sft_core.model.flops import peak_flops, training_flops
from sft_core.run import distributed

PROMPT, GROUP, LONGEST = 16, 8, 2048
PASS = "forward, backward"
TIMED = (
    "Timed, the device synchronised before and after each phase: packing (of the peer: padding), forward and backward "
    "with the objective and its metrics (the pass), clipping, the check that all is finite, AdamW. TFLOP/s a GPU: "
    "6 N T + 6 L D T S, N with the head once, no recomputation; of the pass alone and of the whole step."
)


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


def update_step(case: Case) -> Step:
    """A step of `grpo_core.train` on samples."""
    updated, config, device = Updated(case), case.config, case.device
    if distributed.is_first_rank():
        units = sum(isinstance(module, FSDPModule) for module in updated.policy.modules())
        masters = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in updated.policy.parameters()}))
        where = f"in {units} FSDP2 units over {case.world_size} ranks"
        compute = "bfloat16" if device.type == "cuda" else "float32"
        show(f"{masters} masters {where}, computing in {compute}, fused AdamW")

    def step(samples: list[Sample], clock: Clock) -> None:
        batches = make_micro_batches(samples, config.max_tokens_per_micro_batch, device)
        counts = step_counts([batch.sequences for batch in batches], device)
        clock("pack")
        metrics = update(updated.policy, None, batches, counts, config, first_use=True)
        clock(PASS)
        updated.step(metrics["loss"])
        clock("clip, step")

    return step


def this_trainer(case: Case) -> list[Phases]:
    return timed(case, update_step(case), make_rollouts)


def one_step(case: Case) -> Callable[[], None]:
    samples = make_rollouts(case.tokens, case.info.vocab_size, 1)
    return partial(update_step(case), samples, Clock(case.device))


def in_trls_way(case: Case) -> list[Phases]:
    """The same step, a group of 8 at a time, as TRL takes per_device_train_batch_size=8."""
    from trl.trainer.utils import add_fused_lm_head

    config, device = case.config, case.device
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(case.info, attn_implementation="sdpa", dtype=torch.float32)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")

    def step(samples: list[Sample], clock: Clock) -> None:
        ids = torch.tensor([r.prompt_ids + r.completion_ids for r in samples], device=device)  # [B, L]
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        clock("pack")
        for start in range(0, len(samples), GROUP):
            rows, mask = slice(start, start + GROUP), torch.ones_like(ids[:GROUP])
            with autocast():
                logps = model(ids[rows], attention_mask=mask, labels=labels[rows], fused_lm_head=True).log_probs
            logps = logps[:, PROMPT - 1 :].flatten()  # [N]
            loss, _ = policy_loss(
                logps,
                logps.detach(),
                torch.tensor([r.advantage for r in samples[rows]], device=device),
                (labels[rows] >= 0).nonzero()[:, 0],
                config.objective(),
                num_tokens=int((labels >= 0).sum()),
                num_sequences=len(samples),
            )
            loss.backward()
        clock(PASS)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock("clip, step")

    return timed(case, step, make_rollouts)


def cells(case: Case, phases: Phases) -> list[str]:
    tokens, in_pass, in_step = rates(case, phases)
    seconds = sum(phases.values())
    peak = peak_flops(case.device)
    return [
        str(tokens),
        f"{seconds:.3f}",
        " + ".join(f"{phase:.3f}" for phase in phases.values()),
        f"{tokens / seconds:,.0f}",
        f"{in_pass:.1f}",
        f"{in_step:.1f}",
        f"{1e12 * in_step / peak:.1%}" if peak else "-",
        f"{distributed.peak_memory_gib(case.device):.1f}",
    ]


def rates(case: Case, phases: Phases) -> tuple[int, float, float]:
    """Tokens of a step; TFLOP/s a GPU of forward and backward alone, and of the whole step."""
    samples = make_rollouts(case.tokens, case.info.vocab_size, 0)
    lengths = [len(sample.prompt_ids) + len(sample.completion_ids) for sample in samples]
    flops = training_flops(case.info, lengths) / 1e12
    return sum(lengths), flops / phases[PASS], flops / sum(phases.values())


BENCH = Bench(
    program="grpo_core.bench",
    config=partial(GRPOConfig, "none", beta=0.0),
    tokens=[16384],
    least_tokens=2048,
    explanation=TIMED,
    columns=("tokens", "s a step", "pack + pass + step", "tokens/s", "TFLOP/s: pass", "step", "MFU", "peak GiB"),
    cells=cells,
    trainers={"this trainer": this_trainer, "TRL's way": in_trls_way},
    one_step=one_step,
)


def main(argv: list[str] | None = None) -> None:
    run(BENCH, argv)


if __name__ == "__main__":
    main()
