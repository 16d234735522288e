"""The row pass over a chunk of logits: statistics of softmax(logits / temperature), and the gradient of the logits.

    stats = softmax_stats(logits, targets, temperature, scratch)             log-prob, entropy, best log-prob per row
    logits_gradient(logits, stats, targets, temperature, (g, g_H), out)      gradient of any function of the first two

With z = logits / temperature, p = softmax(z) and its entropy H: dlogp/dz = 1_target - p and dH/dz = -p (log p + H). All
sums are float32 (float64 for float64 logits), over differences to one logit of the row, because logsumexp - sum(p z)
would cancel if logits are large. The target's p - 1 is computed before it is rounded.

A function of only the log-probs needs one read of the logits. While softmax_stats sums, it also writes `unscaled`, the
gradient without one factor per row. The factor is -g / temperature * stats.scales, once g is known.

On CUDA each of the two functions is a Triton kernel (`kernels/rows_triton.py`). The plain torch version in this file
makes one pass per operation, and stores log p in the buffer of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Stats:
    """Statistics of C rows. `scales` belong to the unscaled gradient; only the Triton kernels use `normalisers`."""

    logps: Tensor  # [C] of the targets
    entropies: Tensor  # [C] nats
    best_logps: Tensor  # [C] of the likeliest tokens
    scales: Tensor  # [C]
    normalisers: Tensor  # [C]

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> Stats:
        return cls(*(torch.empty(rows, dtype=like.dtype, device=like.device) for _ in range(5)))

    def __getitem__(self, part: slice) -> Stats:
        return Stats(*(tensor[part] for tensor in vars(self).values()))


def softmax_stats(
    logits: Tensor,  # [C, V]
    targets: Tensor,  # [C]
    temperature: float,
    scratch: Tensor | None = None,  # [C, V]
    *,
    unscaled: Tensor | None = None,  # [C, V], output: the gradient without one factor per row
    into: Stats | None = None,  # output, of C rows
) -> Stats:
    """Statistics of the rows. May overwrite the logits: only `logits_gradient` can use them afterwards.

    `scratch` saves the plain torch version an allocation: on a CPU new memory pages cost more than the sums.
    """
    stats = Stats.empty(len(logits), logits) if into is None else into
    if _fused(logits):
        from kernels.rows_triton import softmax_stats as fused

        fused(logits, targets, temperature, unscaled, stats)
        return stats
    log_probs = logits.div_(temperature)
    log_probs.sub_(log_probs.amax(-1, keepdim=True))
    probs = torch.exp(log_probs, out=scratch)
    log_total = probs.sum(-1, keepdim=True).log_()
    torch.neg(log_total[:, 0], out=stats.best_logps)  # the largest shifted logit is 0
    log_probs.sub_(log_total)
    torch.exp(log_probs, out=probs)
    stats.logps.copy_(log_probs.gather(-1, targets[:, None])[:, 0])
    stats.scales.fill_(1.0)
    if unscaled is not None:
        unscaled.copy_(probs).scatter_add_(1, targets[:, None], -torch.ones_like(log_total, dtype=unscaled.dtype))
        probs = torch.exp(log_probs) if unscaled.data_ptr() == probs.data_ptr() else probs
    stats.entropies.copy_(probs.mul_(log_probs).sum(-1).neg_())
    return stats


def logits_gradient(
    logits: Tensor,  # [C, V] as softmax_stats left them
    stats: Stats,
    targets: Tensor,  # [C]
    temperature: float,
    gradients: tuple[Tensor, Tensor | None],  # by log-probs [C], by entropies [C]
    out: Tensor,  # [C, V], output
) -> None:
    """Compute the gradient w.r.t. logits from those w.r.t. log-probs and entropies. May overwrite the logits."""
    if _fused(logits):
        from kernels.rows_triton import logits_gradient as fused

        return fused(logits, stats, targets, temperature, gradients, out)
    grad_logps, grad_entropies = gradients
    log_probs, grad_logp = logits, grad_logps[:, None] / temperature
    probs = torch.exp(log_probs, out=out)
    if grad_entropies is None:
        probs.mul_(-grad_logp)
    else:
        grad_entropy = grad_entropies[:, None] / temperature
        log_probs.add_(stats.entropies[:, None]).mul_(-grad_entropy).sub_(grad_logp)
        probs.mul_(log_probs)
    probs.scatter_add_(1, targets[:, None], grad_logp.to(probs.dtype))


def _fused(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype == torch.float32
