"""Measures how fast the update is: packed random rollouts through `grpo_core.update.update`, clipping and AdamW.

    python -m grpo_core.bench [--shape 0.5b 1.5b] [--tokens 16384] [--steps 5] [--gradient_checkpointing]
                              [--torch_compile]
    torchrun --nproc_per_node 8 -m grpo_core.bench           # sharded over all GPUs, as in training

The model, the rows and the table are those of `sft_core.bench`, with eight rows per group. A prompt is the first 16
tokens of a row, so nearly all tokens reach the head, as TFLOP/s assumes. The old log-probs are the policy's own (one
update per rollout batch), and rewards differ in every group.

Not measured, on purpose: sampling, scoring and the transfer of weights to the engine (`train.py` logs their times), and
the 7B shape, whose float32 masters, gradients and moments take 16 bytes per parameter, 113 GiB.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from grpo_core.batch import make_micro_batches
from grpo_core.config import GRPOConfig
from grpo_core.rollout import Sample
from grpo_core.update import update
from sft_core.bench import ROWS, Updated, run
from sft_core.data.packing import step_counts

PROMPT = 16


def make_rollouts(rows: list[list[int]]) -> list[Sample]:
    """One sample per row, in groups of `ROWS` equally long rows."""
    return [
        Sample(
            i // ROWS,
            ids[:PROMPT],
            ids[PROMPT:],
            [-5.0] * (len(ids) - PROMPT),
            "stop",
            0,
            advantage=(i % ROWS - (ROWS - 1) / 2) / ROWS,
        )
        for i, ids in enumerate(rows)
    ]


def step(updated: Updated, rows: list[list[int]]) -> Iterator[None]:
    """One step as `grpo_core.train` takes it."""
    batches = make_micro_batches(make_rollouts(rows), updated.config.max_tokens_per_micro_batch, updated.device)
    counts = step_counts([batch.sequences for batch in batches], updated.device)
    yield
    metrics = update(updated.policy, None, batches, counts, updated.config, first_use=True)
    yield
    updated.step(metrics["loss"])
    yield


def main(argv: list[str] | None = None, finished: Callable[[str, Any, float, float], None] | None = None) -> None:
    run("grpo_core.bench", partial(GRPOConfig, "none", beta=0.0), step, argv, finished)


if __name__ == "__main__":
    main()
