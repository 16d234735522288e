"""Log-prob and entropy of given tokens (and the best token's log-prob), straight from hidden states and head weight.

The logits [N, V] never exist: rows are taken in chunks, and the backward computes a chunk's logits again, so the extra
memory is a float32 [chunk, V] buffer (two on a CPU) and one [V, D] accumulator, whatever N is. Logits are float32
(float64 for float64 input) for every caller: bfloat16 logits move log-probs by 0.02 on average, which a ratio of
policies feels. On CUDA bfloat16 operands keep their tensor cores (`torch.mm(..., out_dtype=torch.float32)`).

Any gradient of both outputs can come back, at four matrix products in all. Where the loss is a sum over tokens,
`kernels.linear_loss` takes three. The plain twin is `kernels.reference.linear_logprob`.

Left out on purpose: vocabulary sharding, biases, soft-capping.

Under FSDP2 call it inside the forward of the module that owns `weight`: there the parameter is whole, its storage is
gathered again before the backward, and the gradient is returned to autograd, which adds a tied embedding's own.

    logps, entropies, best_logps = linear_logprob(hidden, head.weight, token_ids, temperature=0.9)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from kernels.rows import logits_gradient, softmax_stats

# Elements of one [chunk, V] buffer: 64 MiB of float32 on a CPU; 1 GiB on a GPU, where short chunks would spend their
# time reading the weight and adding to its gradient.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N] int64 in 0..V-1
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # logps [N], entropies [N], best_logps [N]
    """log p(target), entropy -sum p log p (nats) and max log p of softmax(hidden @ weight.T / temperature), row by row.

    All are float32 (float64 for float64 `hidden`). The first two are differentiable in `hidden` and `weight`; gradients
    come back in those tensors' own dtypes, that of `weight` accumulated in float32 over the chunks. A target is the
    likeliest token where logps >= best_logps, exactly. `chunk_size` is in rows and changes memory and speed only.

    Raises ValueError for shapes that do not fit, a temperature that is not positive, a sharded `weight`.
    """
    chunk_size = check(hidden, weight, targets, temperature, chunk_size)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        logps, entropies, best_logps = _LinearLogprob.apply(hidden, weight, targets, temperature, chunk_size)
        return logps, entropies, best_logps
    return _forward(hidden, weight, targets, temperature, chunk_size)


def check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int | None) -> int:
    """Rows in a chunk; ValueError for what cannot be computed."""
    if isinstance(weight, DTensor):
        raise ValueError("weight is a sharded DTensor: call this inside the FSDP module's forward")
    if hidden.ndim != 2 or weight.ndim != 2 or targets.shape != hidden.shape[:1] or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden [N, D], weight [V, D], targets [N]; got {tuple(hidden.shape)}, {tuple(weight.shape)}, "
            f"{tuple(targets.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk_size is None:
        chunk_size = CHUNK_ELEMENTS.get(hidden.device.type, 2**24) // weight.shape[0]
    return max(int(chunk_size), 1)


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = LogitChunks(hidden, weight, chunk_size)
    logps, entropies, best_logps = chunks.outputs()
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in row_slices(hidden.shape[0], chunk_size):
            logits, scratch = chunks.logits(hidden[rows].to(chunks.operand))
            stats = softmax_stats(logits, targets[rows], temperature, scratch)
            logps[rows], entropies[rows], best_logps[rows] = stats.logps, stats.entropies, stats.best_logps
    return logps, entropies, best_logps


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk_size):
        logps, entropies, best_logps = _forward(hidden, weight, targets, temperature, chunk_size)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(best_logps)
        return logps, entropies, best_logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropies, _):
        hidden, weight, targets = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        chunks = LogitChunks(hidden, weight, ctx.chunk_size)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=chunks.dtype) if need_weight else None
        if grad_logps is None:  # only the entropies were used
            grad_logps = torch.zeros_like(targets, dtype=chunks.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in row_slices(hidden.shape[0], ctx.chunk_size):
                chunk = hidden[rows].to(chunks.operand)  # [C, D]
                logits, scratch = chunks.logits(chunk)
                stats = softmax_stats(logits, targets[rows], ctx.temperature, scratch)
                grad_logits = logits_gradient(
                    logits, stats, targets[rows], ctx.temperature, grad_logps[rows],
                    None if grad_entropies is None else grad_entropies[rows], dtype=chunks.operand, scratch=scratch,
                )  # fmt: skip
                if grad_hidden is not None:
                    grad_hidden[rows] = torch.mm(grad_logits, chunks.head)
                if grad_weight is not None:
                    add_mm(grad_weight, grad_logits.T, chunk)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


class LogitChunks:
    """Logits of a few rows at a time, in buffers that are used again for the next ones."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk_size: int) -> None:
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        half = hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
        # What the matrix products take: half precision only where the product can come out in float32.
        self.operand = hidden.dtype if half else self.dtype
        self.head = weight.detach().to(self.operand)  # [V, D]
        self.size, self.device = hidden.shape[0], hidden.device
        shape = (min(chunk_size, self.size), weight.shape[0])
        self.buffers = [
            torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(1 + (not hidden.is_cuda))
        ]

    def outputs(self) -> Iterator[Tensor]:
        """Three tensors [N] to be filled."""
        return (torch.empty(self.size, dtype=self.dtype, device=self.device) for _ in range(3))

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden @ head.T [C, V], and scratch memory of its shape for plain torch."""
        logits, *scratch = (buffer[: hidden.shape[0]] for buffer in self.buffers)
        if hidden.dtype == logits.dtype:
            torch.mm(hidden, self.head.T, out=logits)
        else:  # half precision in, float32 out: CUDA only
            torch.mm(hidden, self.head.T, out_dtype=logits.dtype, out=logits)
        return logits, scratch[0] if scratch else None


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:  # half precision in, float32 out: CUDA only
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def row_slices(rows: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, rows)) for start in range(0, rows, chunk_size)]
