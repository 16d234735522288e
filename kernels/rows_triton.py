"""The row pass as two Triton kernels, with one program per row. `kernels/rows.py` describes what they compute.

Row offsets are 64-bit, because rows x vocabulary exceeds 2^31 at 14,000 rows. Logits and sums are float32. Sums are
kept per lane and added up once per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from kernels.rows import Stats

# Elements of a row per iteration, and warps: 8 elements per thread, and registers for all rows of a chunk at once.
BLOCK, WARPS = 2048, 8
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(32.0)  # in powers of two


@triton.jit
def _sweep(logits, unscaled, target, base, vocab, scale, block: tl.constexpr):
    """The largest logit, and sum w and sum d w over all tokens but the target: w = 2^d, d = (logit - base) * scale.

    Writes w to `unscaled`, and 0 for the target.
    """
    best = tl.full((block,), -float("inf"), tl.float32)
    total = tl.full((block,), 0.0, tl.float32)
    moment = tl.full((block,), 0.0, tl.float32)
    lanes = tl.arange(0, block)
    following = tl.load(logits + lanes, mask=lanes < vocab, other=-float("inf"))
    for start in range(0, vocab, block):
        columns = start + lanes
        z = following  # the next block is being loaded while this one is summed
        following = tl.load(logits + columns + block, mask=columns + block < vocab, other=-float("inf"))
        best = tl.maximum(best, z)
        distance = tl.where(columns == target, -float("inf"), (z - base) * scale)
        weight = tl.exp2(distance)
        total += weight
        moment += tl.where(weight > 0.0, distance * weight, 0.0)
        if unscaled is not None:
            tl.store(unscaled + columns, weight.to(unscaled.dtype.element_ty), mask=columns < vocab)
    return tl.max(best, 0), tl.sum(total, 0), tl.sum(moment, 0)


@triton.jit
def _stats_kernel(
    logits,
    unscaled,
    targets,
    logps,
    entropies,
    bests,
    scales,
    normalisers,
    stride,
    unscaled_stride,
    vocab,
    scale,
    block: tl.constexpr,
):
    """One row, relative to the target's logit. It is read once, or twice if the target is less than 2^-32 times as
    likely as the likeliest token."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    if unscaled is not None:
        unscaled += row * unscaled_stride
    target = tl.load(targets + row).to(tl.int32)
    at_target = tl.load(logits + target)
    base = at_target
    best, others, moment = _sweep(logits, unscaled, target, base, vocab, scale, block)
    if (best - at_target) * scale > FAR:
        base = best
        tl.debug_barrier()  # the same places are written again, maybe by other threads
        _, others, moment = _sweep(logits, unscaled, target, base, vocab, scale, block)
    distance = (at_target - base) * scale
    weight = tl.exp2(distance)
    total = others + weight
    moment += tl.where(weight > 0.0, distance * weight, 0.0)
    log_total = tl.log2(total)
    logp = (distance - log_total) * LN2
    tl.store(logps + row, logp)
    tl.store(entropies + row, (log_total - moment / total) * LN2)
    # If the target is the likeliest token, best - at_target is exactly 0, and logp and best have the same bits.
    tl.store(bests + row, tl.where(base == at_target, logp + (best - at_target) * scale * LN2, -log_total * LN2))
    tl.store(scales + row, 1.0 / total)
    tl.store(normalisers + row, base * scale + log_total)
    if unscaled is not None:
        tl.debug_barrier()  # so that this overwrites the 0 of _sweep
        tl.store(unscaled + target, (-others).to(unscaled.dtype.element_ty))  # p - 1 without cancellation


@triton.jit
def _gradient_kernel(
    logits,
    gradient,
    targets,
    normalisers,
    entropies,
    grad_logps,
    grad_entropies,
    stride,
    gradient_stride,
    vocab,
    scale,
    inverse_temperature,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    gradient += row * gradient_stride
    target = tl.load(targets + row).to(tl.int32)
    normaliser = tl.load(normalisers + row)
    grad_logp = tl.load(grad_logps + row) * inverse_temperature
    grad_entropy = 0.0
    entropy = 0.0
    if grad_entropies is not None:
        grad_entropy = tl.load(grad_entropies + row) * inverse_temperature
        entropy = tl.load(entropies + row)
    for start in range(0, vocab, block):
        columns = start + tl.arange(0, block)
        z = tl.load(logits + columns, mask=columns < vocab, other=-float("inf"))
        log_prob = z * scale - normaliser  # base 2
        prob = tl.exp2(log_prob)
        pull = grad_logp
        if grad_entropies is not None:
            pull += grad_entropy * (tl.where(prob > 0.0, log_prob, 0.0) * LN2 + entropy)
        value = tl.where(columns == target, grad_logp, 0.0) - prob * pull
        tl.store(gradient + columns, value.to(gradient.dtype.element_ty), mask=columns < vocab)


def softmax_stats(logits: Tensor, targets: Tensor, temperature: float, unscaled: Tensor | None, stats: Stats) -> None:
    """Write the statistics of float32 logits [C, V] to `stats`."""
    rows, vocab = logits.shape
    if rows:
        _stats_kernel[(rows,)](
            logits,
            unscaled,
            targets,
            stats.logps,
            stats.entropies,
            stats.best_logps,
            stats.scales,
            stats.normalisers,
            logits.stride(0),
            0 if unscaled is None else unscaled.stride(0),
            vocab,
            LOG2E.value / temperature,
            block=_block(vocab),
            num_warps=WARPS,
        )


def logits_gradient(
    logits: Tensor,
    stats: Stats,
    targets: Tensor,
    temperature: float,
    gradients: tuple[Tensor, Tensor | None],
    out: Tensor,
) -> None:
    """Write the gradient [C, V] to `out`."""
    grad_logps, grad_entropies = gradients
    rows, vocab = logits.shape
    if rows:
        _gradient_kernel[(rows,)](
            logits,
            out,
            targets,
            stats.normalisers,
            stats.entropies,
            grad_logps.contiguous(),
            None if grad_entropies is None else grad_entropies.contiguous(),
            logits.stride(0),
            out.stride(0),
            vocab,
            LOG2E.value / temperature,
            1 / temperature,
            block=_block(vocab),
            num_warps=WARPS,
        )


def _block(vocab: int) -> int:
    return min(BLOCK, triton.next_power_of_2(vocab))
