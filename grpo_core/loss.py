"""The objective of GRPO and its relatives, as pure functions of packed per-token tensors.

    loss = sum over tokens of weight_t * objective_t

`aggregation_weights` are fixed before the first backward from the whole optimizer step, `token_objective` looks at one
token at a time, so the loss is additive: any split of the sequences over micro-batches and ranks sums to the same
number and the same gradient. `token_loss` composes them for any few tokens, as the head that never holds all of
them asks, `policy_loss` for a whole micro-batch. Metrics are shares too: `sft_core.run.logging.merge_metrics`.

    GRPO    arXiv:2402.03300 (DeepSeekMath)    per-token ratios, clipped; mean over each sequence, then over sequences
    DAPO    arXiv:2503.14476                   one mean over all tokens; epsilon_high ("clip-higher")
    Dr.GRPO arXiv:2503.20783                   sums over a constant length: no reward for long wrong answers
    CISPO   arXiv:2506.13585 (MiniMax-M1)      the ratio as a capped, constant weight of logp: no token is clipped away
    GSPO    arXiv:2507.18071                   importance_sampling_level="sequence": one ratio a sequence
    delta   arXiv:2505.07291 (INTELLECT-2)     caps the ratio of bad tokens too ("two-sided clipping")

Left out on purpose: padding and masks (tokens that must not count are not passed), distributed calls, the training
configuration, value losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo")
ALL = slice(None)
Rows: TypeAlias = Tensor | slice
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """Which objective, by the names of the command line. ValueError for options that contradict each other."""

    loss_type: str = "grpo"
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: epsilon; "cispo", which has no other bound, needs one
    delta: float | None = None
    beta: float = 0.0
    importance_sampling_level: str = "token"
    max_completion_length: int | None = None
    sampler_ratio_cap: float = 2.0

    def __post_init__(self) -> None:
        cispo, level, high = self.loss_type == "cispo", self.importance_sampling_level, self.epsilon_high
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {self.loss_type!r}")
        if level not in ("token", "sequence"):
            raise ValueError(f"importance_sampling_level must be token or sequence, got {level!r}")
        if not 0 <= self.epsilon < math.inf or (high is not None and not 0 <= high < math.inf):
            raise ValueError(f"epsilon and epsilon_high must be finite and >= 0, got {self.epsilon} and {high}")
        if not self.beta >= 0:
            raise ValueError(f"beta must be >= 0, got {self.beta}")
        if not self.sampler_ratio_cap > 0:
            raise ValueError(f"sampler_ratio_cap must be > 0 (inf for no cap), got {self.sampler_ratio_cap}")
        if cispo and high is None:
            raise ValueError("loss_type=cispo needs epsilon_high, its cap on the ratio (the paper's is 5.0)")
        if cispo and self.delta is not None:
            raise ValueError("delta does not apply to loss_type=cispo, whose cap is epsilon_high: leave delta out")
        if self.delta is not None and not self.delta > 1:
            raise ValueError(f"delta caps the ratio and must be > 1 (best above 1 + epsilon_high), got {self.delta}")
        if self.loss_type == "dr_grpo" and (self.max_completion_length is None or self.max_completion_length < 1):
            raise ValueError("loss_type=dr_grpo needs max_completion_length >= 1: it divides by that constant length")

    @property
    def high(self) -> float:
        """How far above 1 a ratio may go; of "cispo" the largest ratio itself."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def by_token(self) -> bool:
        """Whether each token has a ratio of its own, so that its loss depends on no other token."""
        return self.importance_sampling_level == "token"


@dataclass(frozen=True)
class TokenBatch:
    """What the objective is computed from, besides the policy's log-probs: N completion tokens of S whole sequences,
    packed. Sequences may be empty."""

    advantages: Tensor  # [S]
    sequence_ids: Tensor  # [N] int64 in 0..S-1
    num_tokens: int | Tensor  # of the optimizer step, over all ranks
    num_sequences: int | Tensor  # of the same
    old_logps: Tensor | None = None  # [N]; None: the policy's, so that every ratio is 1
    ref_logps: Tensor | None = None  # [N] the reference model's, needed with beta > 0
    sampler_logps: Tensor | None = None  # [N]; with them the sampler's mismatch is corrected

    @cached_property
    def lengths(self) -> Tensor:  # [S] int64
        # Not torch.bincount, which waits for the device to learn the largest id.
        lengths = torch.zeros(self.advantages.shape[0], dtype=torch.int64, device=self.sequence_ids.device)
        return lengths.index_add_(0, self.sequence_ids, torch.ones_like(self.sequence_ids))

    def old(self, logps: Tensor, rows: Rows = ALL) -> Tensor:  # [C] -> [C], without gradient
        """The old log-probs of these rows, of which the policy now gives `logps`."""
        return (logps if self.old_logps is None else self.old_logps[rows]).detach()


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
) -> tuple[Tensor, Metrics]:  # [], name -> []
    """This micro-batch's share of the step's loss, and of its metrics.

    `num_tokens` and `num_sequences` are the optimizer step's totals over all ranks. `ref_logps` are needed with
    beta > 0 and unused without; `sampler_logps` turn on the correction of the sampler's mismatch. Sequences may be
    empty. Nothing here waits for the device.
    """
    batch = TokenBatch(advantages, sequence_ids, num_tokens, num_sequences, old_logps, ref_logps, sampler_logps)
    losses = token_objective(logps, batch, objective)
    weights = aggregation_weights(batch, objective).to(losses.dtype)
    return (weights * losses).sum(), loss_metrics(logps, batch, objective)


def token_loss(
    batch: TokenBatch, objective: Objective, entropy_coef: float = 0.0
) -> Callable[[Tensor, Tensor, Rows], Tensor]:
    """(logps [C], entropies [C], which of the N) -> losses [C], weights and all. Their sum over all N is the loss of
    `policy_loss`, plus `entropy_bonus`. Any few rows will do where the objective is by token, else all at once.
    """
    weights = aggregation_weights(batch, objective)
    entropy_weight = entropy_coef / _at_least_one(batch.num_tokens)

    def losses(logps: Tensor, entropies: Tensor, rows: Rows) -> Tensor:
        values = token_objective(logps, batch, objective, rows)
        weighted = weights[rows].to(values.dtype) * values
        return weighted - entropy_weight * entropies if entropy_coef else weighted

    return losses


def token_objective(
    logps: Tensor,  # [C] with gradient
    batch: TokenBatch,
    objective: Objective,
    rows: Rows = ALL,  # which of the N
) -> Tensor:  # [C]
    """What each token adds to the loss before its weight: rho * policy term + beta * KL. To be minimised.

    policy term    -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A), r = exp(log_ratios)
    cispo          -stop_grad(min(r, epsilon_high)) A logp
    rho            stop_grad(min(exp(old - sampler), sampler_ratio_cap)); 1 without sampler_logps
    KL             exp(ref - logp) - (ref - logp) - 1, never multiplied by rho
    """
    advantages = batch.advantages.to(logps.dtype)[batch.sequence_ids[rows]]
    ratios = log_ratios(logps, batch, objective, rows).exp()
    if objective.loss_type == "cispo":
        losses = -ratios.detach().clamp(max=objective.high) * advantages * logps
    else:
        clipped = ratios.clamp(1 - objective.epsilon, 1 + objective.high)
        unclipped = ratios if objective.delta is None else ratios.clamp(max=objective.delta)
        losses = -torch.min(unclipped * advantages, clipped * advantages)
    if batch.sampler_logps is not None:
        old_logps, sampler_logps = batch.old(logps, rows), batch.sampler_logps[rows]
        losses = losses * sampler_ratios(old_logps, sampler_logps, objective.sampler_ratio_cap)
    if objective.beta:
        if batch.ref_logps is None:
            raise ValueError(f"beta={objective.beta} needs ref_logps, the reference model's log-probs")
        losses = losses + objective.beta * kl_divergence(logps, batch.ref_logps[rows])
    return losses


def log_ratios(logps: Tensor, batch: TokenBatch, objective: Objective, rows: Rows = ALL) -> Tensor:  # [C] -> [C]
    """logps - old_logps; with one ratio a sequence its mean over each sequence, of which all tokens must be there."""
    differences = logps - batch.old(logps, rows)
    if objective.by_token:
        return differences
    return sequence_mean(differences, batch)[batch.sequence_ids]


def aggregation_weights(batch: TokenBatch, objective: Objective) -> Tensor:  # [N] float64
    """What each token counts, from the totals of the whole optimizer step over all ranks.

    grpo               1 / (num_sequences * length of its sequence)
    dapo, bnpo, cispo  1 / num_tokens
    dr_grpo            1 / (num_sequences * max_completion_length)
    """
    num_sequences = _at_least_one(batch.num_sequences)
    if objective.loss_type == "grpo":
        return 1 / (num_sequences * batch.lengths[batch.sequence_ids].double())
    if objective.loss_type == "dr_grpo":
        assert objective.max_completion_length is not None
        denominator = num_sequences * objective.max_completion_length
    else:
        assert objective.loss_type in ("dapo", "bnpo", "cispo"), objective.loss_type
        denominator = _at_least_one(batch.num_tokens)
    return torch.ones_like(batch.sequence_ids, dtype=torch.float64) / denominator


def kl_divergence(logps: Tensor, ref_logps: Tensor) -> Tensor:  # [C], [C] -> [C]
    """k3 of http://joschu.net/blog/kl-approx.html: unbiased for KL(policy || reference) on the policy's own samples."""
    difference = ref_logps.detach() - logps
    return difference.exp() - difference - 1


def sampler_ratios(old_logps: Tensor, sampler_logps: Tensor, cap: float) -> Tensor:  # [C], [C] -> [C]
    """rho: how much likelier a sampled token is under the policy than under the sampler that drew it, truncated."""
    return (old_logps - sampler_logps).detach().exp().clamp(max=cap)


def sequence_mean(values: Tensor, batch: TokenBatch) -> Tensor:  # [N] -> [S], differentiable
    """The mean over each sequence's tokens (0 where it has none); of log-ratios, GSPO's log s_i."""
    sums = values.new_zeros(batch.lengths.shape[0]).index_add(0, batch.sequence_ids, values)
    return sums / batch.lengths.clamp(min=1)


def entropy_bonus(entropies: Tensor, num_tokens: int | Tensor, coef: float) -> Tensor:  # [N] -> []
    """-coef * mean entropy over the step's tokens: this micro-batch's share, to be added to the loss."""
    return -coef * entropies.sum() / _at_least_one(num_tokens)


@torch.no_grad()
def loss_metrics(logps: Tensor, batch: TokenBatch, objective: Objective) -> Metrics:
    """TRL's names and definitions, each already divided by the step's total, so that shares add up.

    clip_ratio/low_mean is the fraction of tokens (of sequences, with one ratio a sequence) that the lower bound takes
    out of the gradient: r < 1 - epsilon with A < 0; high: r > 1 + epsilon_high with A > 0; region: either. low_min and
    high_max are the least and greatest such fraction within one sequence.
    """
    metrics: Metrics = {}
    num_tokens = _at_least_one(batch.num_tokens)
    if objective.beta and batch.ref_logps is not None:
        metrics["kl"] = kl_divergence(logps, batch.ref_logps).sum() / num_tokens
    if batch.sampler_logps is not None:
        cap = objective.sampler_ratio_cap
        rho = sampler_ratios(batch.old(logps), batch.sampler_logps, cap)
        name = "sampling/importance_sampling_ratio"
        metrics[f"{name}/mean"] = rho.sum() / num_tokens
        # With a neutral element, for a micro-batch without tokens: rho lies in [0, cap].
        metrics[f"{name}/min"] = torch.cat([rho, rho.new_full((1,), cap)]).min()
        metrics[f"{name}/max"] = torch.cat([rho, rho.new_zeros(1)]).max()

    def per_sequence(flags: Tensor) -> Tensor:  # [N] bool -> [S]
        return sequence_mean(flags.to(logps.dtype), batch)

    def mean(flags: Tensor) -> Tensor:  # [N] bool -> []
        if objective.by_token:
            return flags.to(logps.dtype).sum() / num_tokens
        # In float32 as TRL counts sequences, else its metrics would not be met to 1e-10.
        return per_sequence(flags).float().sum() / _at_least_one(batch.num_sequences)

    ratios = log_ratios(logps, batch, objective).exp()
    advantages = batch.advantages[batch.sequence_ids]
    if objective.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean((ratios > objective.high) & (advantages > 0))
        return metrics
    low = (ratios < 1 - objective.epsilon) & (advantages < 0)
    high = (ratios > 1 + objective.high) & (advantages > 0)
    metrics["clip_ratio/low_mean"] = mean(low)
    metrics["clip_ratio/high_mean"] = mean(high)
    metrics["clip_ratio/region_mean"] = mean(low | high)
    # Empty sequences take no part; the 1 and 0 added are neutral, for a micro-batch without tokens.
    low_fractions = torch.where(batch.lengths > 0, per_sequence(low), 1)
    metrics["clip_ratio/low_min"] = torch.cat([low_fractions, low_fractions.new_ones(1)]).min()
    high_fractions = per_sequence(high)
    metrics["clip_ratio/high_max"] = torch.cat([high_fractions, high_fractions.new_zeros(1)]).max()
    return metrics


def _at_least_one(count: int | Tensor) -> int | Tensor:
    """A step without tokens has a loss of 0, not of 0 / 0."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
