"""The gradient of one optimizer step: reference -> score and loss -> metrics -> backward, a micro-batch at a time.

The mathematics is in `loss.py`; packing before it, and clipping and the step after it, are the loop's (`train.py`).
Every rank has as many micro-batches and makes the same passes. Nothing here waits for the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_core.batch import MicroBatch
from grpo_core.config import GRPOConfig
from grpo_core.loss import ALL, Objective, TokenBatch, entropy_bonus, loss_metrics, token_loss
from grpo_core.metrics import mismatch_sums
from sft_core.data.packing import StepCounts
from sft_core.model.export import reshard
from sft_core.model.policy import Policy
from sft_core.run.logging import merge_metrics

Reference = Callable[..., Any]  # a frozen Policy, or the policy without its adapters


def update(
    policy: Policy,
    reference: Reference | None,
    micro_batches: Sequence[MicroBatch],
    counts: StepCounts,
    config: GRPOConfig,
    first_use: bool,
) -> dict[str, Tensor]:
    """Add the step's gradient to the policy; returns this rank's share of the step's metrics, by name.

    Old and reference log-probs are taken at the first update on a rollout batch and kept for the later ones. With one
    update the old log-probs are the very ones that are trained, so every ratio is 1 and no extra pass is made.
    """
    objective = config.objective()
    if reference is not None:
        score_with_reference(reference, micro_batches, config.temperature)
    parts = []
    for batch in micro_batches:
        tokens = batch.tokens(counts, config.old_logps)
        loss, logps, entropies = score(policy, batch, tokens, objective, config)
        metrics = loss_metrics(logps, tokens, objective)
        metrics["loss"] = loss.detach()
        metrics["entropy"] = entropies.detach().sum() / max(1, counts.num_tokens)
        if first_use:
            metrics |= mismatch_sums(logps, batch.sampler_logps, batch.positions)
        parts.append(metrics)
        if batch.old_logps is None:
            batch.old_logps = logps.detach()
        loss.backward()
    return merge_metrics(parts)


@torch.no_grad()
def score_with_reference(reference: Reference, micro_batches: Sequence[MicroBatch], temperature: float) -> None:
    """The reference model's log-probs of those micro-batches that have none yet."""
    for batch in micro_batches:
        if batch.ref_logps is None:
            batch.ref_logps, *_ = reference(batch.sequences, temperature)
    if isinstance(reference, Policy):
        reshard(reference)


def score(
    policy: Policy, batch: MicroBatch, tokens: TokenBatch, objective: Objective, config: GRPOConfig
) -> tuple[Tensor, Tensor, Tensor]:  # [], [N], [N]
    """This micro-batch's share of the step's loss, with gradient; log-probs and entropies of its tokens."""
    coef = config.entropy_coef
    if objective.by_token:  # the head takes the loss with it, in one sweep
        # Without KL and entropy bonus, a token without advantage has no gradient.
        active = None if config.beta or coef else batch.active
        losses = token_loss(tokens, objective, coef)
        loss, logps, entropies, _ = policy(
            batch.sequences, config.temperature, losses, active=active, entropy_gradient=coef != 0
        )
        return loss, logps, entropies
    logps, entropies, _ = policy(batch.sequences, config.temperature)
    loss = token_loss(tokens, objective)(logps, entropies, ALL).sum()
    if coef:
        loss = loss + entropy_bonus(entropies, tokens.num_tokens, coef)
    return loss, logps, entropies
