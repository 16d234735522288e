"""A loss that is a sum over tokens, straight from hidden states and head weight, in one sweep: three matrix products.

Chunk by chunk the logits, each row's log-prob and entropy, and the gradient of the logits in the compute dtype; block
by block of chunks the two products that end it. Between them the caller's own loss of log-probs and entropies is
differentiated by autograd, on a value a row: the objective stays one formula, in plain torch. On a GPU, and where
entropies have no gradient, that comes last, as a factor a row, so that the logits are read once (`_can_wait`).
`kernels.linear_logprob`, which does not know the loss, has to compute the logits again. The result's backward only
scales what is there.

Rows that cannot have a gradient (a zero advantage) are told by `active`: they are taken last, and cost their logits.

Left out on purpose: losses in which a token's gradient depends on another token (sequence-level ratios): they take
`linear_logprob`. The plain twin is `kernels.reference.linear_loss`.

    loss, logps, entropies, best_logps = linear_loss(hidden, head.weight, ids, lambda logps, _, rows: -logps / count)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_logprob import LogitChunks, check, row_slices, subset
from kernels.rows import Stats, logits_gradient, softmax_stats

# (log-probs [R], entropies [R], which rows: an index into [N]) -> losses [R], weights and all; R may be 0
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
        needed = tuple(wanted and need for need in ctx.needs_input_grad[:2])
        chunks = LogitChunks(hidden, weight, chunk_size, needed)
        logps, entropies, best_logps = outputs = [hidden.new_empty(len(hidden), dtype=chunks.dtype) for _ in range(3)]
        loss = torch.zeros((), dtype=chunks.dtype, device=hidden.device)
        late: bool | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            for block, learns in _parts(hidden, active, chunks.block, any(needed)):
                states, ids = hidden[block].to(chunks.operand), targets[block]  # [B, D], [B]
                stats = Stats.empty(len(ids), loss)
                for part in row_slices(len(ids), chunk_size):
                    logits, out = chunks.logits(states[part], part)
                    if late is None:  # asked while the device is at work
                        late = learns and _can_wait(chunks, token_loss)
                    slopes, own = out if late and learns else None, stats[part]
                    softmax_stats(logits, ids[part], temperature, out, slopes=slopes, into=own)
                    if not late:
                        value, *gradients = _differentiate(token_loss, own, subset(block, part), learns)
                        loss += value
                        if learns:
                            logits_gradient(logits, own, ids[part], temperature, *gradients, out=out)
                factors = None
                if late:
                    value, slope, _ = _differentiate(token_loss, stats, block, learns)
                    loss += value
                    factors = slope * stats.scales / -temperature if learns else None
                if learns:
                    chunks.products(block, states, factors)
                for output, found in zip(outputs, (stats.logps, stats.entropies, stats.best_logps), strict=True):
                    output[block] = found
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
        return *scaled, None, None, None, None, None, None


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, in one pass; the gradient is spent."""
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


def _can_wait(chunks: LogitChunks, token_loss: TokenLoss) -> bool:
    """Whether the gradient of the logits can be written before that of the log-probs is known, less a factor a row: it
    saves a read of the logits in four, and the loss is differentiated once a block. Not where entropies have gradients
    (the loss is asked with no rows at all), nor in float16, which slopes may overflow."""
    if chunks.device.type != "cuda" or chunks.operand == torch.float16:
        return False
    return _differentiate(token_loss, Stats.empty(0, chunks.buffer), slice(0, 0), True)[2] is None


def _parts(hidden: Tensor, active: Tensor | None, size: int, wanted: bool) -> list[tuple[Tensor | slice, bool]]:
    """Blocks of rows, and whether they get a gradient."""
    if active is None or not wanted or bool(active.all()):
        return [(rows, wanted) for rows in row_slices(hidden.shape[0], size)]
    active = active.cpu()
    order = torch.cat([active.nonzero(), (~active).nonzero()])[:, 0]
    if hidden.is_cuda:
        order = order.pin_memory()  # or the copy may wait for the device
    order, count = order.to(hidden.device, non_blocking=True), int(active.sum())
    parts = [(part, True) for part in order[:count].split(size)] + [(part, False) for part in order[count:].split(size)]
    return [(part, learns) for part, learns in parts if len(part)]


def _differentiate(
    token_loss: TokenLoss, stats: Stats, rows: Tensor | slice, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows' loss, and its gradient by log-prob and by entropy (None where entropies are not used)."""
    with torch.enable_grad():
        leaves = stats.logps.detach().requires_grad_(learns), stats.entropies.detach().requires_grad_(learns)
        value = token_loss(*leaves, rows).sum()
    if not learns:
        return value.detach(), None, None
    grad_logps, grad_entropies = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), torch.zeros_like(stats.logps) if grad_logps is None else grad_logps, grad_entropies
