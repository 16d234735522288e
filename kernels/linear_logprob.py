"""Log-prob and entropy of given tokens, and the likeliest token's log-prob, from hidden states and head weight.

The logits [N, V] never exist in full: rows are computed in chunks, and the backward computes a chunk's logits again.
For any N, the extra memory is a buffer for a chunk's logits, one for their gradient and a [V, D] accumulator. Logits
are float32 (float64 for float64 input) for every caller: bfloat16 logits change log-probs by 0.02 on average, which
distorts ratios of policies. On CUDA bfloat16 operands use tensor cores (`torch.mm(..., out_dtype=torch.float32)`).

The backward takes any gradients of log-probs and entropies. Forward and backward take four GEMMs. If the loss is a sum
over tokens, `kernels.linear_loss` takes three. The reference implementation is `kernels.reference.linear_logprob`.

Not supported, on purpose: vocabulary sharding, biases, soft-capping.

Under FSDP2 call it inside the forward of the module that owns `weight`. There the parameter is unsharded, its storage
is gathered again before the backward, and autograd receives the gradient and adds that of a tied embedding.

    logps, entropies, best_logps = linear_logprob(hidden, head.weight, token_ids, temperature=0.9)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from kernels.rows import Stats, logits_gradient, softmax_stats

# The number of chunks whose logits' gradients are kept, in the compute dtype, for one pair of GEMMs, and the number of
# float32 logits [C, V] in a chunk. On a GPU both buffers together take at most 1.5 GiB in bfloat16. A pair of GEMMs
# reads and writes the whole float32 gradient of the weight, so a few long pairs are best. 512 rows suffice for logits.
CHUNKS_IN_BLOCK = {"cpu": 1, "cuda": 8}
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 3 * 2**29 // (4 + 2 * CHUNKS_IN_BLOCK["cuda"])}
TILE = 128
Rows: TypeAlias = Tensor | slice  # an index into [N]
RowGradients = Callable[[Stats, Rows, bool], Any]


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N] int64 in 0..V-1
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # logps [N], entropies [N], best_logps [N]
    """log p(target), entropy -sum p log p (nats) and max log p of softmax(hidden @ weight.T / temperature), per row.

    All are float32 (float64 for float64 `hidden`). The first two are differentiable in `hidden` and `weight`. Gradients
    have the dtypes of these tensors; that of `weight` is accumulated in float32 over the chunks. A target is the
    likeliest token if and only if logps >= best_logps. `chunk_size` is in rows and changes only memory and speed.

    Raises ValueError for shapes that do not fit, a temperature that is not positive, or a sharded `weight`.
    """
    chunk_size = check(hidden, weight, targets, temperature, chunk_size)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        logps, entropies, best_logps = _LinearLogprob.apply(hidden, weight, targets, temperature, chunk_size)
        return logps, entropies, best_logps
    return _forward(hidden, weight, targets, temperature, chunk_size)


def check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int | None) -> int:
    """The number of rows per chunk. Raises ValueError for arguments that cannot be computed."""
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
        chunk_size = chunk_rows(weight.shape[0], hidden.device.type)
    return max(int(chunk_size), 1)


def chunk_rows(vocab: int, device: str) -> int:
    """The default number of rows per chunk; on a GPU a multiple of a GEMM's tile."""
    rows = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cpu"]) // vocab
    return max(1, rows - rows % TILE if device == "cuda" and rows > TILE else rows)


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    sweep = HeadSweep(hidden, weight, targets, temperature, chunk_size)
    for block in row_slices(hidden.shape[0], sweep.block):
        sweep.immediate(block, False, lambda *_: None)
    return sweep.logps, sweep.entropies, sweep.best_logps


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
        sweep = HeadSweep(hidden, weight, targets, ctx.temperature, ctx.chunk_size, ctx.needs_input_grad[:2])
        if grad_logps is None:  # only the entropies were used
            grad_logps = torch.zeros_like(targets, dtype=sweep.dtype)

        def row_gradients(stats: Stats, rows: Rows, learns: bool) -> tuple[Tensor, Tensor | None]:
            return grad_logps[rows], None if grad_entropies is None else grad_entropies[rows]

        for block in row_slices(hidden.shape[0], sweep.block):
            sweep.immediate(block, True, row_gradients)
        grad_hidden, grad_weight = sweep.take_gradients()
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


class HeadSweep:
    """Computes the head's logits one chunk of rows at a time, and their gradient one block of chunks at a time, in
    buffers that are reused. The results are statistics per row, and the gradients of hidden states and weight.

    A block is computed in one of two orders:

        immediate   for each chunk, first its statistics, then the gradient of its logits
        deferred    for each chunk both at once, except for one factor per row of the gradient, which is applied in the
                    block's GEMMs. This saves one read of the logits. It is impossible if entropies have gradients.

    The caller provides `row_gradients`. It gets statistics, the rows that they belong to and whether these rows need a
    gradient, and returns the gradients of the caller's loss w.r.t. log-probs and entropies (None: none).

        chunk of `hidden`  --GEMM-->  `buffer`, the logits [C, V]  --row pass-->  `out`, their gradient [block, V]
        `out` of a block   --GEMM-->  `grad_hidden`[rows]  and, added up over the blocks,  `grad_weight`
    """

    def __init__(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        needed: tuple[bool, bool] = (False, False),  # whether to compute the gradients of hidden states and weight
    ) -> None:
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        half = hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
        # The dtype of the GEMMs' operands: half precision only where their result can be float32.
        self.operand = hidden.dtype if half else self.dtype
        self.hidden, self.targets, self.temperature, self.chunk_size = hidden, targets, temperature, chunk_size
        self.head = weight.detach().to(self.operand)  # [V, D]
        size, self.device = hidden.shape[0], hidden.device
        self.block = chunk_size * CHUNKS_IN_BLOCK.get(self.device.type, 1)
        # Rows are aligned so that GEMMs can read 16 bytes at once, for any size of the vocabulary.
        vocab = weight.shape[0]
        wide = -(-vocab // 64) * 64 if hidden.is_cuda else vocab
        empty = partial(torch.empty, device=self.device)
        self.buffer = empty(min(chunk_size, size), wide, dtype=self.dtype)[:, :vocab]
        self.out: Tensor | None = None
        if any(needed) or not hidden.is_cuda:  # on a CPU also used as scratch memory
            self.out = empty(min(self.block, size), wide, dtype=self.operand)[:, :vocab]
        self.logps, self.entropies, self.best_logps = (empty(size, dtype=self.dtype) for _ in range(3))
        self.grad_hidden = torch.zeros_like(hidden) if needed[0] else None
        self.grad_weight = torch.empty_like(weight, dtype=self.dtype) if needed[1] else None
        self.empty = True  # grad_weight is not written yet

    def immediate(self, rows: Rows, learns: bool, row_gradients: RowGradients) -> None:
        """Compute a block of at most `self.block` rows. `row_gradients` is called with each of its chunks."""
        states, targets = self.hidden[rows].to(self.operand), self.targets[rows]  # [B, D], [B]
        stats = Stats.empty(len(targets), self.buffer)
        with torch.autocast(self.device.type, enabled=False):
            for part in row_slices(len(targets), self.chunk_size):
                logits, out = self.logits(states[part], part)
                chunk = softmax_stats(logits, targets[part], self.temperature, out, into=stats[part])
                found = row_gradients(chunk, subset(rows, part), learns)
                if learns:
                    logits_gradient(logits, chunk, targets[part], self.temperature, found, out)
            if learns:
                self.products(rows, states)
        self.keep(rows, stats)

    def deferred(self, rows: Rows, learns: bool, row_gradients: RowGradients) -> None:
        """Compute a block of at most `self.block` rows. `row_gradients` is called once, with the whole block."""
        states, targets = self.hidden[rows].to(self.operand), self.targets[rows]  # [B, D], [B]
        stats = Stats.empty(len(targets), self.buffer)
        with torch.autocast(self.device.type, enabled=False):
            for part in row_slices(len(targets), self.chunk_size):
                logits, out = self.logits(states[part], part)
                unscaled = out if learns else None
                softmax_stats(logits, targets[part], self.temperature, out, unscaled=unscaled, into=stats[part])
            found = row_gradients(stats, rows, learns)
            if learns:
                self.products(rows, states, found[0] * stats.scales / -self.temperature)
        self.keep(rows, stats)

    def keep(self, rows: Rows, stats: Stats) -> None:
        self.logps[rows], self.entropies[rows], self.best_logps[rows] = stats.logps, stats.entropies, stats.best_logps

    def logits(self, states: Tensor, part: slice) -> tuple[Tensor, Tensor | None]:
        """states @ head.T [C, V], and the part of the block's buffer for their gradient."""
        logits = self.buffer[: len(states)]
        if states.dtype == logits.dtype:
            torch.mm(states, self.head.T, out=logits)
        else:  # half precision in, float32 out: CUDA only
            torch.mm(states, self.head.T, out_dtype=logits.dtype, out=logits)
        return logits, None if self.out is None else self.out[part][: len(states)]

    def products(self, rows: Rows, states: Tensor, factors: Tensor | None = None) -> None:
        """Multiply the rows of the block's gradient by their factors, then compute the gradient of hidden[rows] and add
        to that of the weight."""
        assert self.out is not None
        gradient = self.out[: len(states)]  # [B, V]
        if self.grad_hidden is not None:
            product = torch.mm(gradient, self.head)
            self.grad_hidden[rows] = product if factors is None else product.mul_(factors[:, None])
            del product
        if self.grad_weight is None:
            return
        if factors is not None:
            states = torch.mul(states, factors[:, None], out=torch.empty_like(states))
        total, half = self.grad_weight, gradient.dtype != self.dtype  # half precision in, float32 out: CUDA only
        if self.empty:
            torch.mm(gradient.T, states, out=total, **({"out_dtype": self.dtype} if half else {}))
        elif half:
            torch.addmm(total, gradient.T, states, out_dtype=self.dtype, out=total)
        else:
            total.addmm_(gradient.T, states)
        self.empty = False

    def take_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of hidden states, and of the weight in float32. Frees the buffers."""
        if self.grad_weight is not None and self.empty:
            self.grad_weight.zero_()
        del self.buffer, self.out
        return self.grad_hidden, self.grad_weight


def subset(rows: Rows, part: slice) -> Rows:
    """rows[part]."""
    return rows[part] if isinstance(rows, Tensor) else slice(rows.start + part.start, rows.start + part.stop)


def row_slices(rows: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, rows)) for start in range(0, rows, chunk_size)]
