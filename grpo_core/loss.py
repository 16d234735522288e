"""The objective of GRPO and its relatives, as pure functions of packed per-token tensors.

    loss = sum over tokens of weight_t * objective_t

`aggregation_weights` are computed from the whole optimizer step before its first backward. `token_objective` depends on
one sequence at a time, and for most loss types on one token. The loss is therefore additive: any split of the sequences
over micro-batches and ranks gives the same sum and the same gradient. `token_loss` combines both for any subset of the
tokens, as the fused head needs it, and `policy_loss` for a whole micro-batch. Metrics are shares as well, which
`sft_core.run.logging.merge_metrics` adds up.

    GRPO    arXiv:2402.03300 (DeepSeekMath)    per-token ratios, clipped; mean over each sequence, then over sequences
    DAPO    arXiv:2503.14476                   one mean over all tokens; epsilon_high ("clip-higher")
    Dr.GRPO arXiv:2503.20783                   sums over a constant length: no reward for long wrong answers
    CISPO   arXiv:2506.13585 (MiniMax-M1)      the ratio as a capped, detached weight of logp: no token is clipped away
    GSPO    arXiv:2507.18071                   importance_sampling_level="sequence": one ratio per sequence
    SAPO    arXiv:2511.20347                   a smooth gate in place of the clipping, narrower where A <= 0
    LUSPO   arXiv:2602.05261                   GSPO with each sequence weighted by its length
    VESPO   arXiv:2602.10693                   the ratio of the whole sequence as a smooth, detached weight of logp
    delta   arXiv:2505.07291 (INTELLECT-2)     caps the ratio of bad tokens too ("two-sided clipping")
    80/20   arXiv:2506.01939                   top_entropy_quantile: the policy term of high-entropy tokens only
    off_policy_mask_threshold, use_bias_correction_kl    arXiv:2512.02556 (DeepSeek-V3.2)

Not in this module: padding and masks (callers pass only the tokens that count), distributed calls and the training
configuration. Not supported, on purpose: value losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.objective import CLIPPED, LOSS_TYPES, Objective, check_own_losses
from grpo_core.terms import (
    ALL,
    Rows,
    TokenBatch,
    at_least_one,
    entropy_quantile,
    kl,
    log_ratios,
    mean_entropy,
    on_policy,
    sampler_ratios,
    sequence_mean,
    vespo_weights,
)

__all__ = ["LOSS_TYPES", "Objective", "TokenBatch", "policy_loss", "token_loss"]
Metrics = dict[str, Tensor]


def policy_loss(
    logps: Tensor,  # [N] the policy's, with gradient: completion tokens of whole sequences, packed
    old_logps: Tensor,  # [N]
    advantages: Tensor,  # [S]
    sequence_ids: Tensor,  # [N] int64 in 0..S-1
    objective: Objective,
    *,
    num_tokens: int | Tensor,
    num_sequences: int | Tensor,
    ref_logps: Tensor | None = None,  # [N]
    sampler_logps: Tensor | None = None,  # [N]
    entropies: Tensor | None = None,  # [N] the policy's, with gradient for an entropy bonus
    entropy_threshold: float | Tensor | None = None,
    num_entropy_tokens: int | Tensor | None = None,
) -> tuple[Tensor, Metrics]:  # [], name -> []
    """This micro-batch's share of the step's loss and of its metrics.

    `num_tokens` and `num_sequences` are the optimizer step's totals over all ranks. `ref_logps` are needed with
    beta > 0 and unused without. `sampler_logps` turn on the correction of the sampler's mismatch. `entropies` are
    needed with entropy_coef or top_entropy_quantile < 1. With the latter, tokens whose entropy is at least
    `entropy_threshold` (`entropy_quantile` of all the step's entropies) are kept, and `num_entropy_tokens` is their
    number in the step. Without these two the given tokens count as the whole step. Sequences may be empty. Nothing here
    waits for the device.
    """
    batch = TokenBatch(advantages, sequence_ids, num_tokens, num_sequences, old_logps, ref_logps, sampler_logps)
    if objective.entropy_coef or objective.top_entropy_quantile < 1:
        if entropies is None:
            raise ValueError("entropy_coef and top_entropy_quantile < 1 need entropies: pass the policy's [N]")
        kept = None
        if objective.top_entropy_quantile < 1:
            if entropy_threshold is None:
                entropy_threshold = entropy_quantile(entropies.detach(), objective)
            kept = entropies.detach() >= entropy_threshold
            num_entropy_tokens = kept.sum() if num_entropy_tokens is None else num_entropy_tokens
        batch = replace(batch, kept=kept, num_kept=num_entropy_tokens)
    losses = token_objective(logps, batch, objective)
    loss = (aggregation_weights(batch, objective).to(losses.dtype) * losses).sum()
    metrics = loss_metrics(logps, batch, objective)
    if entropies is not None:
        metrics["entropy"] = entropies.detach().sum() / at_least_one(num_tokens)
        if objective.entropy_coef:
            metrics["policy_loss"] = loss.detach()
            metrics["entropy_coef"] = logps.new_tensor(objective.entropy_coef * len(logps)) / at_least_one(num_tokens)
            loss = loss - objective.entropy_coef * mean_entropy(entropies, batch)
    return loss, metrics


def token_loss(batch: TokenBatch, objective: Objective) -> Callable[[Tensor, Tensor, Rows], Tensor]:
    """Returns a function (logps [C], entropies [C], rows: an index into [N]) -> weighted losses [C].

    The losses of all N tokens sum to the loss of `policy_loss`. If `objective.by_token`, any subset of the rows may be
    passed, otherwise all of them at once.
    """
    weights = aggregation_weights(batch, objective)
    entropy_weight = objective.entropy_coef / batch.at_least_one_kept

    def losses(logps: Tensor, entropies: Tensor, rows: Rows) -> Tensor:
        values = token_objective(logps, batch, objective, rows)
        weighted = weights[rows].to(values.dtype) * values
        return weighted - entropy_weight * batch.only_kept(entropies, rows) if objective.entropy_coef else weighted

    return losses


def token_objective(
    logps: Tensor,  # [C] with gradient
    batch: TokenBatch,
    objective: Objective,
    rows: Rows = ALL,  # which of the N
) -> Tensor:  # [C]
    """The unweighted loss of each token, rho * policy term + beta * KL, to be minimised.

    The policy term is `policy_term`, or 0 for tokens that the off-policy mask drops or whose entropy is too low to be
    kept. rho is `sampler_ratios`, or 1 without sampler_logps. The KL is `kl`, to which neither masks nor rho apply.
    """
    losses = policy_term(logps, batch, objective, rows)
    if objective.off_policy_mask_threshold is not None:
        losses = torch.where(on_policy(logps, batch, objective)[batch.sequence_ids], losses, 0.0)
    losses = batch.only_kept(losses, rows)
    if batch.corrected(objective) and objective.loss_type != "vespo":
        losses = losses * sampler_ratios(logps, batch, objective, rows)
    if objective.beta:
        losses = losses + objective.beta * kl(logps, batch, objective, rows)
    return losses


def policy_term(logps: Tensor, batch: TokenBatch, objective: Objective, rows: Rows = ALL) -> Tensor:  # [C] -> [C]
    """The term that makes tokens with a positive advantage more likely, with r = exp(log_ratios):

    clipped types  -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
    cispo          -stop_grad(min(r, epsilon_high)) A logp
    sapo           -4 / t sigmoid(t (r - 1)) A, t = sapo_temperature_pos where A > 0, else _neg
    vespo          -phi A logp, phi = `vespo_weights`, detached
    """
    advantages = batch.advantages.to(logps.dtype)[batch.sequence_ids[rows]]
    if objective.loss_type == "vespo":
        return -vespo_weights(logps, batch, objective)[batch.sequence_ids] * advantages * logps
    differences = log_ratios(logps, batch, objective, rows)
    if objective.own is not None:
        losses = objective.own(logps, differences, advantages, objective)
        check_own_losses(losses, logps, objective.loss_type)
        return losses
    ratios = differences.exp()
    if objective.loss_type == "cispo":
        return -ratios.detach().clamp(max=objective.high) * advantages * logps
    if objective.loss_type == "sapo":
        # A float32 tensor, as in TRL, which rounds a temperature of 1.05 even if log-probs are float64.
        temperatures = torch.where(advantages > 0, objective.sapo_temperature_pos, objective.sapo_temperature_neg)
        return -torch.sigmoid(temperatures * (ratios - 1)) * 4 / temperatures * advantages
    clipped = ratios.clamp(1 - objective.epsilon, 1 + objective.high)
    unclipped = ratios if objective.delta is None else ratios.clamp(max=objective.delta)
    return -torch.min(unclipped * advantages, clipped * advantages)


def aggregation_weights(batch: TokenBatch, objective: Objective) -> Tensor:  # [N] float64
    """The weight of each token, from the totals of the whole optimizer step over all ranks.

    grpo, sapo               1 / (num_sequences * length of its sequence)
    luspo                    1 / num_sequences
    dr_grpo                  1 / (num_sequences * max_completion_length)
    all others, custom ones  1 / num_tokens
    """
    num_sequences = at_least_one(batch.num_sequences)
    if objective.loss_type in ("grpo", "sapo"):
        return 1 / (num_sequences * batch.lengths[batch.sequence_ids].double())
    if objective.loss_type == "dr_grpo":
        assert objective.max_completion_length is not None
        denominator = num_sequences * objective.max_completion_length
    elif objective.loss_type == "luspo":
        denominator = num_sequences
    else:
        denominator = at_least_one(batch.num_tokens)
    return torch.ones_like(batch.sequence_ids, dtype=torch.float64) / denominator


@torch.no_grad()
def loss_metrics(logps: Tensor, batch: TokenBatch, objective: Objective) -> Metrics:
    """Metrics with TRL's names and definitions, each already divided by the step's total, so that shares add up.

    clip_ratio/low_mean is the fraction of tokens (of sequences, with one ratio per sequence) whose gradient the lower
    bound removes: r < 1 - epsilon with A < 0. high_mean is the same for the upper bound: r > 1 + epsilon_high with
    A > 0. region_mean counts both. low_min and high_max are the smallest and largest such fraction of a sequence.
    """
    metrics: Metrics = {}
    num_tokens = at_least_one(batch.num_tokens)

    def mean(values: Tensor, by_token: bool) -> Tensor:  # [N] -> []
        if by_token:
            return values.to(logps.dtype).sum() / num_tokens
        each = sequence_mean(values.to(logps.dtype), batch)
        # TRL averages flags of sequences in float32. Doing the same reproduces its metrics to 1e-10.
        return (each.float() if values.dtype == torch.bool else each).sum() / at_least_one(batch.num_sequences)

    if objective.beta and batch.ref_logps is not None:
        metrics["kl"] = mean(kl(logps, batch, objective), True)
    if batch.corrected(objective):
        rho, cap = sampler_ratios(logps, batch, objective), objective.vllm_importance_sampling_clip_max
        name = "sampling/importance_sampling_ratio"
        metrics[f"{name}/mean"] = mean(rho, objective.correction_by_token)
        # rho lies in [0, cap]. For a micro-batch without tokens, the neutral bound is appended.
        metrics[f"{name}/min"] = torch.cat([rho, rho.new_full((1,), math.inf if cap is None else cap)]).min()
        metrics[f"{name}/max"] = torch.cat([rho, rho.new_zeros(1)]).max()
    if objective.loss_type == "vespo":
        metrics["vespo/phi_seq_mean"] = mean(vespo_weights(logps, batch, objective)[batch.sequence_ids], False)
    if objective.loss_type not in (*CLIPPED, "cispo"):
        return metrics

    ratios, by_token = log_ratios(logps, batch, objective).exp(), objective.ratio_by_token
    advantages = batch.advantages[batch.sequence_ids]
    if objective.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean((ratios > objective.high) & (advantages > 0), by_token)
        return metrics
    low = (ratios < 1 - objective.epsilon) & (advantages < 0)
    high = (ratios.clamp(max=objective.delta or math.inf) > 1 + objective.high) & (advantages > 0)
    metrics["clip_ratio/low_mean"] = mean(low, by_token)
    metrics["clip_ratio/high_mean"] = mean(high, by_token)
    metrics["clip_ratio/region_mean"] = mean(low | high, by_token)
    # Empty sequences are ignored. For a micro-batch without tokens, the neutral values 1 and 0 are appended.
    low_fractions = torch.where(batch.lengths > 0, sequence_mean(low.to(logps.dtype), batch), 1)
    metrics["clip_ratio/low_min"] = torch.cat([low_fractions, low_fractions.new_ones(1)]).min()
    high_fractions = sequence_mean(high.to(logps.dtype), batch)
    metrics["clip_ratio/high_max"] = torch.cat([high_fractions, high_fractions.new_zeros(1)]).max()
    return metrics
