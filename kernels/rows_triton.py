"""The row pass in Triton: one program a row, two kernels. `kernels/rows.py` says what they compute.

Rows are taken by their 64-bit offset: rows x vocabulary passes 2^31 at 14,000 rows. Everything is float32 after the
load (the interpreter computes bfloat16 wrongly). The gradient is written over the logits, in half precision into the
first half of each row: a block of it overlaps only logits that are read already, but for the very first, where a
barrier stands between load and store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from kernels.rows import Stats

BLOCK = 8192  # elements of a row at a time
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _stats_kernel(logits, targets, logps, entropies, bests, normalisers, stride, vocab, scale, block: tl.constexpr):
    """One row: running maximum m, s = sum 2^(y - m) and t = sum (m - y) 2^(y - m), y = logits * scale (base 2)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    best = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    spread = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, block):
        columns = start + tl.arange(0, block)
        y = tl.load(logits + columns, mask=columns < vocab, other=-float("inf")).to(tl.float32) * scale
        higher = tl.maximum(best, tl.max(y, 0))
        # What was summed below the old maximum, below the new one. A row that begins with -inf has summed nothing.
        shift = tl.where(total > 0.0, higher - best, 0.0)
        base = tl.where(higher > -float("inf"), higher, 0.0)
        below = base - y  # >= 0; inf where the logit is -inf, which has no probability
        weight = tl.exp2(-below)
        spread = (spread + shift * total) * tl.exp2(-shift) + tl.sum(tl.where(weight > 0.0, below * weight, 0.0), 0)
        total = total * tl.exp2(-shift) + tl.sum(weight, 0)
        best = higher
    target = tl.load(targets + row)
    at_target = tl.load(logits + target).to(tl.float32) * scale
    log_total = tl.log2(total)
    tl.store(logps + row, (at_target - best - log_total) * LN2)
    tl.store(entropies + row, (log_total + spread / total) * LN2)
    tl.store(bests + row, -log_total * LN2)
    tl.store(normalisers + row, (best + log_total) * LN2)


@triton.jit
def _gradient_kernel(
    logits, gradient, targets, normalisers, entropies, grad_logps, grad_entropies,
    stride, gradient_stride, vocab, scale, inverse_temperature, block: tl.constexpr,
):  # fmt: skip
    """One row, in ascending blocks: `gradient` may be the same memory as `logits`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    gradient += row * gradient_stride
    target = tl.load(targets + row)
    normaliser = tl.load(normalisers + row) * LOG2E
    grad_logp = tl.load(grad_logps + row) * inverse_temperature
    grad_entropy = 0.0
    entropy = 0.0
    if grad_entropies is not None:
        grad_entropy = tl.load(grad_entropies + row) * inverse_temperature
        entropy = tl.load(entropies + row)
    for start in range(0, vocab, block):
        columns = start + tl.arange(0, block)
        y = tl.load(logits + columns, mask=columns < vocab, other=-float("inf")).to(tl.float32) * scale
        log_prob = y - normaliser  # base 2
        prob = tl.exp2(log_prob)
        pull = grad_logp
        if grad_entropies is not None:
            pull += grad_entropy * (tl.where(prob > 0.0, log_prob, 0.0) * LN2 + entropy)
        value = tl.where(columns == target, grad_logp, 0.0) - prob * pull
        tl.debug_barrier()
        tl.store(gradient + columns, value.to(gradient.dtype.element_ty), mask=columns < vocab)


def softmax_stats(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropies, best log-probs and normalisers [C] of float32 logits [C, V]."""
    rows, vocab = logits.shape
    logps, entropies, bests, normalisers = logits.new_empty(4, rows).unbind()
    if rows:
        _stats_kernel[(rows,)](
            logits, targets, logps, entropies, bests, normalisers, logits.stride(0), vocab,
            LOG2E.value / temperature, block=_block(vocab), num_warps=16,
        )  # fmt: skip
    return logps, entropies, bests, normalisers


def logits_gradient(
    logits: Tensor, stats: Stats, targets: Tensor, temperature: float, grad_logps: Tensor,
    grad_entropies: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The gradient [C, V] in `dtype`, in the logits' own memory."""
    rows, vocab = logits.shape
    gradient = logits.view(dtype)[:, :vocab]
    if rows:
        _gradient_kernel[(rows,)](
            logits, gradient, targets, stats.normalisers, stats.entropies, grad_logps.contiguous(),
            None if grad_entropies is None else grad_entropies.contiguous(), logits.stride(0), gradient.stride(0),
            vocab, LOG2E.value / temperature, 1 / temperature, block=_block(vocab), num_warps=16,
        )  # fmt: skip
    return gradient


def _block(vocab: int) -> int:
    return min(BLOCK, triton.next_power_of_2(vocab))
