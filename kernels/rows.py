"""The row pass over a chunk of logits: statistics of softmax(logits / temperature), and the gradient of the logits.

    stats = softmax_stats(logits, targets, temperature)                      log-prob, entropy, best log-prob a row
    grad = logits_gradient(logits, stats, targets, temperature, g, g_H)      written over the logits

With p the softmax and H its entropy, dlogp/dz = 1_target - p and dH/dz = -p (log p + H), z = logits / temperature. All
sums are float32 (float64 for float64 logits), and a sum of positive numbers: logsumexp - sum(p z) would cancel where
logits are large, and the target's p - 1 is formed before it is rounded.

On CUDA a Triton kernel reads each row once for the statistics and once for the gradient (`kernels/rows_triton.py`); in
plain torch, here, it takes a pass an operation, and the logits hold log p in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Stats:
    """What a chunk of C rows says. On CUDA `normalisers` are log sum exp(logits / temperature); else unused."""

    logps: Tensor  # [C] of the targets
    entropies: Tensor  # [C] nats
    best_logps: Tensor  # [C] of the likeliest tokens
    normalisers: Tensor | None = None  # [C]


def softmax_stats(logits: Tensor, targets: Tensor, temperature: float, scratch: Tensor | None = None) -> Stats:
    """Statistics of logits [C, V] and targets [C]. The logits are spent: only `logits_gradient` may read them now.

    `scratch` [C, V] spares the plain path an allocation; a CPU pays for fresh pages more than for the sums.
    """
    if logits.is_cuda:
        from kernels.rows_triton import softmax_stats as fused

        return Stats(*fused(logits, targets, temperature))
    log_probs = logits.div_(temperature)
    log_probs.sub_(log_probs.amax(-1, keepdim=True))
    probs = torch.exp(log_probs, out=scratch)
    log_total = probs.sum(-1, keepdim=True).log_()
    log_probs.sub_(log_total)
    torch.exp(log_probs, out=probs)
    logps = log_probs.gather(-1, targets[:, None])[:, 0]
    return Stats(logps, probs.mul_(log_probs).sum(-1).neg_(), -log_total[:, 0])  # the largest was 0 before


def logits_gradient(
    logits: Tensor,  # [C, V] as softmax_stats left them
    stats: Stats,
    targets: Tensor,  # [C]
    temperature: float,
    grad_logps: Tensor,  # [C]
    grad_entropies: Tensor | None = None,  # [C]
    *,
    dtype: torch.dtype,
    scratch: Tensor | None = None,
) -> Tensor:  # [C, V] in `dtype`
    """The gradient of the logits of a function with these gradients of log-probs and entropies; spends the logits."""
    if logits.is_cuda:
        from kernels.rows_triton import logits_gradient as fused

        return fused(logits, stats, targets, temperature, grad_logps, grad_entropies, dtype)
    log_probs, grad_logp = logits, grad_logps[:, None] / temperature
    probs = torch.exp(log_probs, out=scratch)
    if grad_entropies is None:
        gradient = probs.mul_(-grad_logp)
    else:
        grad_entropy = grad_entropies[:, None] / temperature
        log_probs.add_(stats.entropies[:, None]).mul_(-grad_entropy).sub_(grad_logp)
        gradient = probs.mul_(log_probs)
    return gradient.scatter_add_(1, targets[:, None], grad_logp.to(gradient.dtype)).to(dtype)
