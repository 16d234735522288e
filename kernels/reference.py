"""Reference implementations of everything in `kernels`, in plain torch: short, slow, with full [N, V] or [T, T].

The tests compare every fast path with these functions. Run them in float64 for a reference with negligible rounding.
Not used, on purpose: chunking, custom gradients, packing optimisations. Autograd computes all gradients.

    hidden, weight = torch.randn(5, 8).double(), torch.randn(11, 8).double()
    logps, entropies, best_logps = linear_logprob(hidden, weight, torch.tensor([0, 3, 3, 10, 7]), temperature=0.7)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N] int64
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # [N], [N], [N]
    """log p(target), entropy -sum p log p (nats) and max log p of softmax(hidden @ weight.T / temperature).

    All are float32 (float64 for float64 `hidden`).
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).T / temperature  # [N, V]
    log_probs = logits.log_softmax(-1)
    logps = log_probs.gather(-1, targets[:, None])[:, 0]
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    return logps, entropies, log_probs.amax(-1).detach()


def linear_loss(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N] int64
    token_loss: Callable[[Tensor, Tensor, slice], Tensor],
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [], [N], [N], [N]
    """The sum of token_loss(logps, entropies, rows) over all rows, and the results of `linear_logprob`."""
    logps, entropies, best_logps = linear_logprob(hidden, weight, targets, temperature=temperature)
    return token_loss(logps, entropies, slice(None)).sum(), logps.detach(), entropies.detach(), best_logps


def packed_attention(
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, D]
    lengths: Sequence[int],  # sum(lengths) - sum(shared) = T
    shared: Sequence[int] | None = None,
    *,
    scaling: float,
    sliding_window: int | None = None,
) -> Tensor:  # [1, T, H, D]
    """Causal softmax attention inside each packed sequence, by one [T, T] mask.

    With a window of W a token attends to itself and the W - 1 before it. Query head h uses key head h // (H // Hkv).
    The first `shared[i]` tokens of sequence i are those of the nearest earlier one that shares none, stored only there.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    visible = torch.zeros(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)  # [T, T]
    start, first = 0, torch.arange(0)
    for length, skipped in zip(lengths, shared or [0] * len(lengths), strict=True):
        own = torch.arange(start, start + length - skipped)  # its tokens in the row
        first = first if skipped else own
        behind = torch.arange(skipped, length)[:, None] - torch.arange(length)  # how far the key lies behind the query
        seen = behind >= 0 if sliding_window is None else (behind >= 0) & (behind < sliding_window)
        visible[own[:, None], torch.cat([first[:skipped], own])] = seen.to(query.device)
        start += length - skipped
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)
