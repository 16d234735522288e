"""The row pass over a chunk of logits: statistics of softmax(logits / temperature), and the gradient of the logits.

    stats = softmax_stats(logits, targets, temperature, scratch)             log-prob, entropy, best log-prob a row
    logits_gradient(logits, stats, targets, temperature, (g, g_H), out)      gradient of any function of the first two

With p the softmax and H its entropy, dlogp/dz = 1_target - p and dH/dz = -p (log p + H), z = logits / temperature. All
sums are float32 (float64 for float64 logits), of differences to one logit of the row: logsumexp - sum(p z) would cancel
where logits are large, and the target's p - 1 is formed before it is rounded.

A function of the log-probs alone needs one look at the logits: softmax_stats writes `unscaled`, the gradient less a
factor a row, as it sums; -g / temperature * stats.scales is the factor, once g is known.

On CUDA it is a Triton kernel for each of the two (`kernels/rows_triton.py`); in plain torch, here, it takes a pass an
operation, and the logits hold log p in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Stats:
    """What rows say. `scales` belong to the unscaled gradient; `normalisers` are the kernels' own."""

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
    unscaled: Tensor | None = None,  # [C, V], written: the gradient less a factor a row
    into: Stats | None = None,  # of C rows, written
) -> Stats:
    """Statistics of the rows. The logits are spent: only `logits_gradient` may read them now.

    `scratch` spares the plain path an allocation: a CPU pays for fresh pages more than for the sums.
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
    torch.neg(log_total[:, 0], out=stats.best_logps)  # the largest was 0 before
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
    out: Tensor,  # [C, V], written
) -> None:
    """The gradient of the logits of a function with these gradients of log-probs and entropies; spends the logits."""
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
