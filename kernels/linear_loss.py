"""A loss that is a sum over tokens, computed from hidden states and head weight in one sweep of three GEMMs.

`kernels.linear_logprob.HeadSweep` computes the logits, each row's log-prob and entropy, and the gradient of the logits
in the compute dtype. In between, autograd differentiates the caller's loss w.r.t. log-probs and entropies, one value
per row, so that the objective stays a formula in plain torch. On a GPU the deferred order is used if possible.
`kernels.linear_logprob` does not know the loss and has to compute the logits again. The backward here only scales the
gradients, which are already computed. Rows that are not `active` (advantage 0) come last, and cost only their logits.

Not supported, on purpose: losses in which a token's gradient depends on another token (sequence-level ratios), which
use `linear_logprob`. The reference implementation is `kernels.reference.linear_loss`.

    loss, logps, entropies, best_logps = linear_loss(hidden, head.weight, ids, lambda logps, _, rows: -logps / count)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_logprob import HeadSweep, Rows, check, row_slices
from kernels.rows import Stats

# (log-probs [R], entropies [R], rows: an index into [N]) -> weighted losses [R]
TokenLoss = Callable[[Tensor, Tensor, Rows], Tensor]


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
    """The sum of `token_loss` over all rows, differentiable in `hidden` and `weight`, and the results of
    `linear_logprob` without gradient.

    `token_loss` must compute each row independently, and must not use other tensors that need a gradient. If it depends
    on the entropies, set `entropy_gradient`, else ValueError is raised. Rows that are not `active` add to the loss and
    get no gradient. The loss is float32 (float64 for float64 input). Accumulation, chunks and other errors are those of
    `linear_logprob`.
    """
    chunk_size = check(hidden, weight, targets, temperature, chunk_size)
    # Gradients w.r.t. hidden states and weight are computed here; the backward pass only scales them.
    needed = (hidden.requires_grad and torch.is_grad_enabled(), weight.requires_grad and torch.is_grad_enabled())

    def row_gradients(stats: Stats, rows: Rows, learns: bool) -> tuple[Tensor, Tensor | None] | None:
        with torch.enable_grad():
            logps, entropies = (x.detach().requires_grad_(learns) for x in (stats.logps, stats.entropies))
            value = token_loss(logps, entropies, rows).sum()
        total.add_(value.detach())
        if not learns:
            return None
        grad_logps, grad_entropies = torch.autograd.grad(value, (logps, entropies), allow_unused=True)
        if grad_entropies is not None and not entropy_gradient:
            raise ValueError("token_loss depends on the entropies: call linear_loss with entropy_gradient=True")
        return torch.zeros_like(logps) if grad_logps is None else grad_logps, grad_entropies

    with torch.no_grad():
        sweep = HeadSweep(hidden, weight, targets, temperature, chunk_size, needed)
        total = torch.zeros((), dtype=sweep.dtype, device=hidden.device)
        deferred = any(needed) and not entropy_gradient and can_be_deferred(sweep)
        compute = sweep.deferred if deferred else sweep.immediate
        for rows, learns in _blocks(hidden, active, sweep.block, any(needed)):
            compute(rows, learns, row_gradients)
    loss = _KnownGradients.apply(hidden, weight, total, sweep.take_gradients())
    return loss, sweep.logps, sweep.entropies, sweep.best_logps


class _KnownGradients(torch.autograd.Function):
    """A loss [] whose gradients w.r.t. hidden states and weight are computed."""

    @staticmethod
    def forward(ctx, hidden, weight, loss, gradients):
        ctx.gradients, ctx.dtypes = gradients, (hidden.dtype, weight.dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_loss can be differentiated once, as backward frees its gradients: call it again")
        scaled = [
            None if gradient is None else _times(gradient, grad_loss, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def can_be_deferred(sweep: HeadSweep) -> bool:
    """On a GPU, where it saves one of four reads of the logits, but not in float16, which the gradient may overflow."""
    return sweep.device.type == "cuda" and sweep.operand != torch.float16


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, in one pass. It may overwrite the gradient."""
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


def _blocks(hidden: Tensor, active: Tensor | None, size: int, needs_gradient: bool) -> list[tuple[Rows, bool]]:
    """Blocks of rows, and whether they get a gradient."""
    if active is None or not needs_gradient or bool(active.all()):
        return [(rows, needs_gradient) for rows in row_slices(hidden.shape[0], size)]
    active = active.cpu()
    order = torch.cat([active.nonzero(), (~active).nonzero()])[:, 0]
    if hidden.is_cuda:
        order = order.pin_memory()  # otherwise the copy may wait for the device
    order, count = order.to(hidden.device, non_blocking=True), int(active.sum())
    learning, others = order[:count].split(size), order[count:].split(size)
    blocks = [(rows, True) for rows in learning] + [(rows, False) for rows in others]
    return [(rows, learns) for rows, learns in blocks if len(rows)]
