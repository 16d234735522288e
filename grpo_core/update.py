"""The gradient of one optimizer step: reference -> score and loss -> metrics -> backward, one micro-batch at a time.

The formulas are in `loss.py`. The loop (`train.py`) does the packing before this step, and clipping and the optimizer
step after it. All ranks have the same number of micro-batches and make the same passes. Nothing here waits for the
device, except for the threshold over the step's entropies.
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
    """Add the step's gradient to the policy. Returns this rank's share of the step's metrics, by name.

    Old and reference log-probs are computed in the first update on a rollout batch and kept for the later ones. In the
    first update the log-probs being trained are the old ones, so every ratio is 1 and no extra pass is needed.
    `entropy_coef` replaces the option's value if it is adaptive.
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
        # The loss is over all tokens of the step. Metrics are means over the tokens that get a forward pass.
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
    """Compute old and reference log-probs of the micro-batches of later optimizer steps on this rollout batch.
    Returns this rank's share of their mismatch metrics, as `update` does for the first step's."""
    if reference is not None:
        score_with_reference(reference, micro_batches, temperature)
    parts = []
    for batch in micro_batches:
        batch.old_logps, *_ = policy(batch.sequences, temperature)
        parts.append(mismatch_sums(batch.old_logps, batch.sampler_logps, batch.positions))
    return merge_metrics(parts)


@torch.no_grad()
def score_with_reference(reference: Reference, micro_batches: Sequence[MicroBatch], temperature: float) -> None:
    """Compute the reference model's log-probs of the micro-batches that have none yet."""
    for batch in micro_batches:
        if batch.ref_logps is None:
            batch.ref_logps, *_ = reference(batch.sequences, temperature)
    if isinstance(reference, Policy):
        reshard(reference)


@torch.no_grad()
def keep_high_entropies(
    policy: Policy, micro_batches: Sequence[MicroBatch], objective: Objective, temperature: float
) -> None:
    """Mark the tokens to keep, by a threshold over all entropies of the step, which take an extra forward pass."""
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
    """This micro-batch's share of the step's loss, with gradient, and the log-probs and entropies of its tokens."""
    losses, bonus = token_loss(tokens, objective), objective.entropy_coef != 0
    if objective.by_token:  # the head computes loss and gradient in one sweep
        active = batch.active if objective.by_advantage else None
        loss, logps, entropies, _ = policy(batch.sequences, temperature, losses, active=active, entropy_gradient=bonus)
        return loss, logps, entropies
    logps, entropies, _ = policy(batch.sequences, temperature)
    return losses(logps, entropies, ALL).sum(), logps, entropies


def adapted_entropy_coef(coef: float, entropy: float, config: GRPOConfig) -> tuple[float, float]:
    """The new `coef` after a step whose kept tokens had this mean entropy, and the one to apply in the next step: 0
    while the entropy is above its target."""
    if entropy > config.entropy_target:
        return max(coef - config.entropy_coef_delta, config.entropy_coef_min), 0.0
    coef = min(coef + config.entropy_coef_delta, config.entropy_coef_max)
    return coef, coef
