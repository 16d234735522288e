"""A loss that is a sum over tokens, straight from hidden states and head weight, in one sweep: three GEMMs.

A chunk of rows at a time: the logits, each row's log-prob and entropy, and the gradient of the logits in the compute
dtype; a block of chunks at a time: the two GEMMs that end it. Between them autograd differentiates the caller's loss by
log-probs and entropies, one value a row, so that the objective stays one formula in plain torch. There are two orders:

    immediate   chunk by chunk: statistics, the loss and its gradient, then the gradient of the logits
    deferred    the gradient of the logits, less a factor a row, is written with the statistics; the loss is
                differentiated once a block and its factors join the GEMMs: the logits are read once less

`kernels.linear_logprob`, which does not know the loss, has to compute the logits again. The result's backward only
scales what is there. Rows that are not `active` (a zero advantage) are taken last, and cost their logits alone.

Left out on purpose: losses in which a token's gradient depends on another token (sequence-level ratios): they take
`linear_logprob`. The reference implementation is `kernels.reference.linear_loss`.

    loss, logps, entropies, best_logps = linear_loss(hidden, head.weight, ids, lambda logps, _, rows: -logps / count)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_logprob import LogitChunks, check, row_slices, subset
from kernels.rows import Stats, logits_gradient, softmax_stats

# (log-probs [R], entropies [R], which rows: an index into [N]) -> losses [R], weights and all
TokenLoss = Callable[[Tensor, Tensor, Tensor | slice], Tensor]


def linear_loss(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N] int64 in 0..V-1
    token_loss: TokenLoss,
    *,
    entropy_gradient: bool = False,
    temperature: float = 1.0,
    active: Tensor | None = None,  # [N] bool, on the CPU
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss [], logps [N], entropies [N], best_logps [N]
    """The sum of `token_loss` over all rows, differentiable in `hidden` and `weight`; the rest as `linear_logprob` has
    it, without gradient.

    `token_loss` must treat each row alone, and close over nothing that needs a gradient; where it depends on the
    entropies, `entropy_gradient` must say so. Rows that are not `active` add to the loss and get no gradient. The loss
    is float32 (float64 for float64 input); accumulation, chunks and errors are those of `linear_logprob`. ValueError
    too for a loss that depends on entropies unannounced.
    """
    chunk_size = check(hidden, weight, targets, temperature, chunk_size)
    sweep = Sweep(token_loss, entropy_gradient, temperature, chunk_size)
    return _LinearLoss.apply(hidden, weight, targets, active, sweep, torch.is_grad_enabled())


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, active, sweep, grad_enabled):
        needed = tuple(grad_enabled and need for need in ctx.needs_input_grad[:2])
        chunks = LogitChunks(hidden, weight, sweep.chunk_size, needed)
        logps, entropies, best_logps = outputs = [hidden.new_empty(len(hidden), dtype=chunks.dtype) for _ in range(3)]
        loss = torch.zeros((), dtype=chunks.dtype, device=hidden.device)
        order = sweep.deferred if any(needed) and can_be_deferred(chunks, sweep) else sweep.immediate
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, learns in _blocks(hidden, active, chunks.block, any(needed)):
                stats = Stats.empty(len(targets[rows]), loss)
                block = Block(rows, hidden[rows].to(chunks.operand), targets[rows], stats, learns)
                order(chunks, block, loss)
                for output, found in zip(outputs, (stats.logps, stats.entropies, stats.best_logps), strict=True):
                    output[rows] = found
        ctx.gradients, ctx.dtypes = chunks.gradients(), (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(logps, entropies, best_logps)
        return loss, logps, entropies, best_logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_loss can be differentiated once: its gradients are given away")
        scaled = [
            None if gradient is None else _times(gradient, grad_loss, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


@dataclass(eq=False)
class Block:
    """Rows whose gradients of the logits share one pair of GEMMs."""

    rows: Tensor | slice  # which of the N
    states: Tensor  # [B, D]
    targets: Tensor  # [B]
    stats: Stats  # of B rows, to be written
    learns: bool  # whether they get a gradient


@dataclass(frozen=True)
class Sweep:
    """The loss, and the two orders in which a block's share of it and of its gradients can be computed."""

    token_loss: TokenLoss
    entropy_gradient: bool
    temperature: float
    chunk_size: int

    def immediate(self, chunks: LogitChunks, block: Block, loss: Tensor) -> None:
        for part in row_slices(len(block.targets), self.chunk_size):
            logits, out = chunks.logits(block.states[part], part)
            targets, stats = block.targets[part], block.stats[part]
            softmax_stats(logits, targets, self.temperature, out, into=stats)
            value, *gradients = self.differentiate(stats, subset(block.rows, part), block.learns)
            loss += value
            if block.learns:
                logits_gradient(logits, stats, targets, self.temperature, *gradients, out=out)
        if block.learns:
            chunks.products(block.rows, block.states)

    def deferred(self, chunks: LogitChunks, block: Block, loss: Tensor) -> None:
        for part in row_slices(len(block.targets), self.chunk_size):
            logits, out = chunks.logits(block.states[part], part)
            targets, stats = block.targets[part], block.stats[part]
            softmax_stats(logits, targets, self.temperature, out, unscaled=out if block.learns else None, into=stats)
        value, grad_logps, _ = self.differentiate(block.stats, block.rows, block.learns)
        loss += value
        if grad_logps is not None:
            chunks.products(block.rows, block.states, grad_logps * block.stats.scales / -self.temperature)

    def differentiate(
        self, stats: Stats, rows: Tensor | slice, learns: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The rows' loss, and its gradient by log-prob and by entropy (None where there is none)."""
        with torch.enable_grad():
            logps, entropies = (x.detach().requires_grad_(learns) for x in (stats.logps, stats.entropies))
            value = self.token_loss(logps, entropies, rows).sum()
        if not learns:
            return value.detach(), None, None
        grad_logps, grad_entropies = torch.autograd.grad(value, (logps, entropies), allow_unused=True)
        if grad_entropies is not None and not self.entropy_gradient:
            raise ValueError("token_loss depends on the entropies: call linear_loss with entropy_gradient=True")
        return value.detach(), torch.zeros_like(logps) if grad_logps is None else grad_logps, grad_entropies


def can_be_deferred(chunks: LogitChunks, sweep: Sweep) -> bool:
    """On a GPU, where it saves a read of the logits in four. Not where entropies have gradients, which are no factor a
    row, nor in float16, which the unscaled gradient may overflow."""
    return chunks.device.type == "cuda" and chunks.operand != torch.float16 and not sweep.entropy_gradient


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, in one pass; the gradient is spent."""
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


def _blocks(
    hidden: Tensor, active: Tensor | None, size: int, needs_gradient: bool
) -> list[tuple[Tensor | slice, bool]]:
    """Blocks of rows, and whether they get a gradient."""
    if active is None or not needs_gradient or bool(active.all()):
        return [(rows, needs_gradient) for rows in row_slices(hidden.shape[0], size)]
    active = active.cpu()
    order = torch.cat([active.nonzero(), (~active).nonzero()])[:, 0]
    if hidden.is_cuda:
        order = order.pin_memory()  # or the copy may wait for the device
    order, count = order.to(hidden.device, non_blocking=True), int(active.sum())
    learning, others = order[:count].split(size), order[count:].split(size)
    blocks = [(rows, True) for rows in learning] + [(rows, False) for rows in others]
    return [(rows, learns) for rows, learns in blocks if len(rows)]
