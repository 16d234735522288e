"""The parts of the objective: the tokens' data, ratios to the old policy and to the sampler, masks, and the KL.

They are pure functions of packed per-token tensors; `loss.py` combines them. A function that computes a value per
sequence needs all tokens of the sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from grpo_core.objective import Objective

ALL = slice(None)
Rows: TypeAlias = Tensor | slice
LOG_RATIO_LIMITS = (math.log(1e-8), 20.0)  # for vespo's sequence ratio


@dataclass(frozen=True)
class TokenBatch:
    """The objective's inputs other than the policy's log-probs: N completion tokens of S whole sequences, packed.
    Sequences may be empty."""

    advantages: Tensor  # [S]
    sequence_ids: Tensor  # [N] int64 in 0..S-1
    num_tokens: int | Tensor  # of the optimizer step, over all ranks
    num_sequences: int | Tensor  # of the optimizer step, over all ranks
    old_logps: Tensor | None = None  # [N]; None: the policy's, so that every ratio is 1
    ref_logps: Tensor | None = None  # [N] the reference model's, needed with beta > 0
    sampler_logps: Tensor | None = None  # [N]; if given, the sampler's mismatch is corrected
    kept: Tensor | None = None  # [N] bool: the high-entropy tokens; None: all
    num_kept: int | Tensor | None = None  # kept tokens of the step, over all ranks; None: num_tokens

    @cached_property
    def lengths(self) -> Tensor:  # [S] int64
        # Not torch.bincount, which waits for the device to learn the largest id.
        lengths = torch.zeros(self.advantages.shape[0], dtype=torch.int64, device=self.sequence_ids.device)
        return lengths.index_add_(0, self.sequence_ids, torch.ones_like(self.sequence_ids))

    def old(self, logps: Tensor, rows: Rows = ALL) -> Tensor:  # [C] -> [C], without gradient
        """The old log-probs of these rows; `logps` are the current ones."""
        return (logps if self.old_logps is None else self.old_logps[rows]).detach()

    def corrected(self, objective: Objective) -> bool:
        """Whether the sampler's mismatch is corrected."""
        return self.sampler_logps is not None and objective.vllm_importance_sampling_mode is not None

    def only_kept(self, values: Tensor, rows: Rows = ALL) -> Tensor:  # [C] -> [C]
        """The values, with 0 for tokens that are not kept."""
        return values if self.kept is None else torch.where(self.kept[rows], values, 0.0)

    @property
    def at_least_one_kept(self) -> int | Tensor:
        return at_least_one(self.num_tokens if self.num_kept is None else self.num_kept)


def log_ratios(logps: Tensor, batch: TokenBatch, objective: Objective, rows: Rows = ALL) -> Tensor:  # [C] -> [C]
    """logps - old_logps; with one ratio per sequence their mean over each sequence, which then must be complete."""
    differences = logps - batch.old(logps, rows)
    if objective.ratio_by_token:
        return differences
    return sequence_mean(differences, batch)[batch.sequence_ids]


@torch.no_grad()
def sampler_ratios(logps: Tensor, batch: TokenBatch, objective: Objective, rows: Rows = ALL) -> Tensor:  # [C] -> [C]
    """rho = old policy / sampler: the ratio of their probabilities of the sampled token (in sequence modes of the whole
    sequence). Truncate modes clamp rho to [clip_min, clip_max]; mask modes set it to 0 outside."""
    assert batch.sampler_logps is not None
    mode, low = str(objective.vllm_importance_sampling_mode), objective.vllm_importance_sampling_clip_min
    high = objective.vllm_importance_sampling_clip_max
    differences = batch.old(logps, rows) - batch.sampler_logps[rows]
    if not objective.correction_by_token:
        differences = sequence_sum(differences, batch)[batch.sequence_ids]
    ratios = differences.exp()
    if mode.endswith("truncate"):
        return ratios.clamp(min=low, max=high)
    outside = (ratios < (low or 0.0)) | (ratios > (math.inf if high is None else high))
    return ratios.masked_fill(outside, 0.0)


@torch.no_grad()
def on_policy(logps: Tensor, batch: TokenBatch, objective: Objective) -> Tensor:  # [N] -> [S] bool
    """False for the sequences to leave out: those with A < 0 and a mean log(sampler / policy) above the threshold.
    Without sampler_logps the mean is that of log(old / policy)."""
    before = batch.old(logps) if batch.sampler_logps is None else batch.sampler_logps
    return (batch.advantages >= 0) | (sequence_mean(before - logps, batch) <= objective.off_policy_mask_threshold)


@torch.no_grad()
def vespo_weights(logps: Tensor, batch: TokenBatch, objective: Objective) -> Tensor:  # [N] -> [S]
    """phi(w) = w^k exp(lambda (1 - w)), which is 1 at w = 1. w is the whole sequence's ratio policy / old, times its
    `sampler_ratios` if the mismatch is corrected. k and lambda depend on the advantage's sign."""
    log_w = sequence_sum((logps - batch.old(logps)).clamp(-20.0, 20.0), batch)
    if batch.corrected(objective):
        log_w = log_w + sequence_sum(sampler_ratios(logps, batch, objective).log().clamp(*LOG_RATIO_LIMITS), batch)
    log_w = log_w.clamp(*LOG_RATIO_LIMITS)
    good = batch.advantages >= 0
    k = torch.where(good, objective.vespo_k_pos, objective.vespo_k_neg)
    decay = torch.where(good, objective.vespo_lambda_pos, objective.vespo_lambda_neg)
    return (decay + k * log_w - decay * log_w.exp()).exp()


def kl(logps: Tensor, batch: TokenBatch, objective: Objective, rows: Rows = ALL) -> Tensor:  # [C] -> [C]
    """The estimator k3 of http://joschu.net/blog/kl-approx.html, exp(ref - logp) - (ref - logp) - 1. Its value is
    unbiased for KL(policy || reference) on the policy's own samples. use_bias_correction_kl multiplies it by r, which
    makes the gradient unbiased too."""
    if batch.ref_logps is None:
        raise ValueError(f"beta={objective.beta} needs ref_logps: pass the reference model's log-probs, or beta=0")
    difference = batch.ref_logps[rows].detach() - logps
    values = difference.exp() - difference - 1
    return values * log_ratios(logps, batch, objective, rows).exp() if objective.use_bias_correction_kl else values


def mean_entropy(entropies: Tensor, batch: TokenBatch) -> Tensor:  # [N] -> []
    """This micro-batch's share of the mean entropy over the step's kept tokens."""
    return batch.only_kept(entropies).sum() / batch.at_least_one_kept


def entropy_quantile(entropies: Tensor, objective: Objective) -> Tensor:  # [any number] -> [] float32
    """The smallest entropy of a kept token: the quantile 1 - top_entropy_quantile of the step's entropies. It equals
    torch.quantile, which accepts at most 2^24 values."""
    values = entropies.float().sort().values
    if len(values) == 0:
        return values.new_zeros(())
    last = len(values) - 1
    position = min(float(torch.tensor(1 - objective.top_entropy_quantile) * last), last)  # float32, as torch.quantile
    return torch.lerp(values[math.floor(position)], values[math.ceil(position)], position % 1)


def sequence_sum(values: Tensor, batch: TokenBatch) -> Tensor:  # [N] -> [S], differentiable
    return values.new_zeros(batch.lengths.shape[0]).index_add(0, batch.sequence_ids, values)


def sequence_mean(values: Tensor, batch: TokenBatch) -> Tensor:  # [N] -> [S], differentiable
    """The mean over each sequence's tokens, or 0 if it is empty. For log-ratios it is GSPO's log s_i."""
    return sequence_sum(values, batch) / batch.lengths.clamp(min=1)


def at_least_one(count: int | Tensor) -> int | Tensor:
    """max(count, 1), so that a step without tokens has a loss of 0, not 0 / 0."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
