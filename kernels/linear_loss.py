"""A loss that is a sum over tokens, straight from hidden states and head weight, in one sweep: three matrix products.

Chunk by chunk: the logits, each row's log-prob and entropy, the caller's own loss of these and its derivative by
autograd (on [C] values: the objective stays one formula, in plain torch), from that the gradient of the logits, written
over them, and the two products that end it. `kernels.linear_logprob`, which does not know the loss, has to compute the
logits again. The result's backward only scales what is there.

Rows that cannot have a gradient (a zero advantage) are told by `active`: they are taken last, and cost their logits.

Left out on purpose: losses in which a token's gradient depends on another token (sequence-level ratios): they take
`linear_logprob`. The plain twin is `kernels.reference.linear_loss`.

    loss, logps, entropies, best_logps = linear_loss(hidden, head.weight, ids, lambda logps, _, rows: -logps / count)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.linear_logprob import LogitChunks, add_mm, check, row_slices
from kernels.rows import logits_gradient, softmax_stats

# (log-probs [C], entropies [C], which rows: an index into [N]) -> losses [C], weights and all
TokenLoss = Callable[[Tensor, Tensor, Tensor | slice], Tensor]


def linear_loss(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N] int64 in 0..V-1
    token_loss: TokenLoss,
    *,
    temperature: float = 1.0,
    active: Tensor | None = None,  # [N] bool, on the CPU
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss [], logps [N], entropies [N], best_logps [N]
    """The sum of `token_loss` over all rows, differentiable in `hidden` and `weight`; the rest as `linear_logprob` has
    it, without gradient.

    `token_loss` must treat rows alone, and close over nothing that wants a gradient. Rows that are not `active` add to
    the loss and get no gradient. The loss is float32 (float64 for float64 input); accumulation, chunks and errors are
    those of `linear_logprob`.
    """
    chunk_size = check(hidden, weight, targets, temperature, chunk_size)
    wanted = torch.is_grad_enabled()
    return _LinearLoss.apply(hidden, weight, targets, token_loss, temperature, active, chunk_size, wanted)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_loss, temperature, active, chunk_size, wanted):
        need_hidden, need_weight = (wanted and needed for needed in ctx.needs_input_grad[:2])
        chunks = LogitChunks(hidden, weight, chunk_size)
        logps, entropies, best_logps = chunks.outputs()
        loss = torch.zeros((), dtype=chunks.dtype, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=chunks.dtype) if need_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, learns in _parts(hidden, active, chunk_size, need_hidden or need_weight):
                chunk = hidden[rows].to(chunks.operand)  # [C, D]
                logits, scratch = chunks.logits(chunk)
                stats = softmax_stats(logits, targets[rows], temperature, scratch)
                logps[rows], entropies[rows], best_logps[rows] = stats.logps, stats.entropies, stats.best_logps
                value, *gradients = _differentiate(token_loss, stats.logps, stats.entropies, rows, learns)
                loss += value
                if learns:
                    grad_logits = logits_gradient(
                        logits, stats, targets[rows], temperature, *gradients, dtype=chunks.operand, scratch=scratch
                    )
                    if grad_hidden is not None:
                        grad_hidden[rows] = torch.mm(grad_logits, chunks.head)
                    if grad_weight is not None:
                        add_mm(grad_weight, grad_logits.T, chunk)
        ctx.gradients, ctx.dtypes = (grad_hidden, grad_weight), (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(logps, entropies, best_logps)
        return loss, logps, entropies, best_logps

    @staticmethod
    def backward(ctx, grad_loss, *_):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_loss can be differentiated once: its gradients are given away")
        scaled = [
            None if gradient is None else gradient.mul_(grad_loss).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None, None


def _parts(hidden: Tensor, active: Tensor | None, chunk_size: int, wanted: bool) -> list[tuple[Tensor | slice, bool]]:
    """Chunks of rows, and whether they get a gradient."""
    if active is None or not wanted or bool(active.all()):
        return [(rows, wanted) for rows in row_slices(hidden.shape[0], chunk_size)]
    parts: list[tuple[Tensor | slice, bool]] = []
    for learns in (True, False):
        indices = (active == learns).nonzero()[:, 0]
        parts += [
            (part.to(hidden.device, non_blocking=True), learns) for part in indices.split(chunk_size) if len(part)
        ]
    return parts


def _differentiate(
    token_loss: TokenLoss, logps: Tensor, entropies: Tensor, rows: Tensor | slice, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The chunk's loss, and its gradient by log-prob and by entropy (None where entropies are not used)."""
    with torch.enable_grad():
        leaves = logps.detach().requires_grad_(learns), entropies.detach().requires_grad_(learns)
        value = token_loss(*leaves, rows).sum()
    if not learns:
        return value.detach(), None, None
    grad_logps, grad_entropies = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), torch.zeros_like(logps) if grad_logps is None else grad_logps, grad_entropies
