"""How fast the update is: packed random rollouts through `grpo_core.update.update`, clipping and AdamW.

    python -m grpo_core.bench [--shape 0.5b 1.5b] [--tokens 16384] [--steps 5] [--gradient_checkpointing]
                              [--torch_compile]
    torchrun --nproc_per_node 8 -m grpo_core.bench           # sharded over all GPUs, as in training

Random weights in the shapes of Qwen2.5 and groups of 8 random rows of 2,048 tokens (fewer where --tokens has no room)
that fill --tokens on every GPU in one micro-batch. Prompts are 16 tokens of a row: nearly all tokens
reach the head, as TFLOP/s counts them. The old log-probs are the policy's own (one update a rollout), no group has
equal rewards. `--shape tiny` is for the CPU. A line is shown when it is measured.

Left out on purpose: sampling, scoring and the weights' way into the engine (`train.py` logs what they take); the 7B
shape, whose float32 masters, gradients and moments take 16 bytes a parameter, 113 GiB.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from grpo_core.batch import make_micro_batches
from grpo_core.config import GRPOConfig
from grpo_core.rollout import Sample
from grpo_core.update import update
from sft_core.bench import LONGEST, Bench, Updated, run
from sft_core.data.packing import step_counts

PROMPT, GROUP = 16, 8


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


def row_length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.completion_ids)


def step(updated: Updated, samples: list[Sample]) -> Iterator[None]:
    """`grpo_core.train`'s."""
    batches = make_micro_batches(samples, updated.config.max_tokens_per_micro_batch, updated.device)
    counts = step_counts([batch.sequences for batch in batches], updated.device)
    yield
    metrics = update(updated.policy, None, batches, counts, updated.config, first_use=True)
    yield
    updated.step(metrics["loss"])
    yield


def main(argv: list[str] | None = None, finished: Callable[[str, Any, float, float], None] | None = None) -> None:
    config = partial(GRPOConfig, "none", beta=0.0)
    run(Bench("grpo_core.bench", config, [16384], make_rollouts, row_length, step), argv, finished)


if __name__ == "__main__":
    main()
