"""The gradient of one optimizer step: reference -> score and loss -> metrics -> backward, a micro-batch at a time.

The mathematics is in `loss.py`; packing before it, and clipping and the step after it, are the loop's (`train.py`).
Every rank has as many micro-batches and makes the same passes. Nothing here waits for the device, but for a threshold
over the step's entropies.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_core.batch import MicroBatch
from grpo_core.config import GRPOConfig
from grpo_core.loss import Objective, loss_metrics, token_loss
from grpo_core.metrics import mismatch_sums
from grpo_core.terms import ALL, TokenBatch, entropy_quantile, mean_entropy
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
    entropy_coef: float | None = None,
) -> dict[str, Tensor]:
    """Add the step's gradient to the policy; returns this rank's share of the step's metrics, by name.

    Old and reference log-probs are taken at the first update on a rollout batch and kept for the later ones. With one
    update the old log-probs are the very ones that are trained, so every ratio is 1 and no extra pass is made.
    `entropy_coef` takes the place of the option where it adapts.
    """
    objective = config.objective()
    if entropy_coef is not None:
        objective = replace(objective, entropy_coef=entropy_coef)
    if reference is not None:
        score_with_reference(reference, micro_batches, config.temperature)
    if objective.top_entropy_quantile < 1:
        keep_high_entropies(policy, micro_batches, objective, config.temperature)
    parts = []
    for batch in micro_batches:
        tokens = batch.tokens(counts, config.old_logps)
        loss, logps, entropies = score(policy, batch, tokens, objective, config.temperature)
        # The loss is over all tokens of the step; metrics are means over those that get a pass.
        seen = replace(tokens, num_tokens=counts.trained_tokens, num_sequences=counts.trained_sequences)
        metrics = loss_metrics(logps, seen, objective)
        metrics["loss"] = loss.detach()
        metrics["entropy"] = entropies.detach().sum() / max(1, counts.trained_tokens)
        if batch.kept is not None:
            metrics["entropy_kept"] = mean_entropy(entropies.detach(), tokens)
        if config.entropy_coef or config.use_adaptive_entropy:
            bonus = objective.entropy_coef * mean_entropy(entropies.detach(), tokens)
            metrics["policy_loss"] = metrics["loss"] + bonus
        if first_use:
            metrics |= mismatch_sums(logps, batch.sampler_logps, batch.positions)
        parts.append(metrics)
        if batch.old_logps is None:
            batch.old_logps = logps.detach()
        loss.backward()
    return merge_metrics(parts)


@torch.no_grad()
def score_ahead(
    policy: Policy, reference: Reference | None, micro_batches: Sequence[MicroBatch], temperature: float
) -> dict[str, Tensor]:
    """Old and reference log-probs of those micro-batches that are trained after a step on others of their rollout
    batch; returns this rank's share of the mismatch, as `update` does of the others."""
    if reference is not None:
        score_with_reference(reference, micro_batches, temperature)
    parts = []
    for batch in micro_batches:
        batch.old_logps, *_ = policy(batch.sequences, temperature)
        parts.append(mismatch_sums(batch.old_logps, batch.sampler_logps, batch.positions))
    return merge_metrics(parts)


@torch.no_grad()
def score_with_reference(reference: Reference, micro_batches: Sequence[MicroBatch], temperature: float) -> None:
    """The reference model's log-probs of those micro-batches that have none yet."""
    for batch in micro_batches:
        if batch.ref_logps is None:
            batch.ref_logps, *_ = reference(batch.sequences, temperature)
    if isinstance(reference, Policy):
        reshard(reference)


@torch.no_grad()
def keep_high_entropies(
    policy: Policy, micro_batches: Sequence[MicroBatch], objective: Objective, temperature: float
) -> None:
    """Mark the tokens that are kept, by a threshold over the entropies of the whole step: a pass over all of it."""
    own = [policy(batch.sequences, temperature)[1] for batch in micro_batches]
    parts: list[Tensor] = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(parts, torch.cat(own).cpu())
    every = torch.cat(parts).to(own[0].device)
    threshold = entropy_quantile(every, objective)
    num_kept = (every >= threshold).sum()
    for batch, entropies in zip(micro_batches, own, strict=True):
        batch.kept, batch.num_kept = entropies >= threshold, num_kept


def score(
    policy: Policy, batch: MicroBatch, tokens: TokenBatch, objective: Objective, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:  # [], [N], [N]
    """This micro-batch's share of the step's loss, with gradient; log-probs and entropies of its tokens."""
    losses, bonus = token_loss(tokens, objective), objective.entropy_coef != 0
    if objective.by_token:  # the head takes the loss with it, in one sweep
        active = batch.active if objective.by_advantage else None
        loss, logps, entropies, _ = policy(batch.sequences, temperature, losses, active=active, entropy_gradient=bonus)
        return loss, logps, entropies
    logps, entropies, _ = policy(batch.sequences, temperature)
    return losses(logps, entropies, ALL).sum(), logps, entropies


def adapted_entropy_coef(coef: float, entropy: float, config: GRPOConfig) -> tuple[float, float]:
    """`coef` after a step in which the tokens kept had this mean entropy, and what of it applies in the next one:
    nothing while the entropy is above its target."""
    if entropy > config.entropy_target:
        return max(coef - config.entropy_coef_delta, config.entropy_coef_min), 0.0
    coef = min(coef + config.entropy_coef_delta, config.entropy_coef_max)
    return coef, coef
