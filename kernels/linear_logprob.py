"""Log-prob and entropy of given tokens (and the best token's log-prob), straight from hidden states and head weight.

The logits [N, V] never exist: rows are taken in chunks, and the backward computes a chunk's logits again, so the extra
memory is two float32 [chunk, V] buffers and one [V, D] accumulator, whatever N is. Logits are float32 (float64 for
float64 input) for every caller: bfloat16 logits move log-probs by 0.02 on average, which a ratio of policies feels.
On CUDA bfloat16 operands keep their tensor cores (`torch.mm(..., out_dtype=torch.float32)`).

Left out on purpose: vocabulary sharding, biases, soft-capping, and any loss: what is done with a log-prob is the
caller's affair, and any gradient of both outputs can come back. The plain twin is `kernels.reference.linear_logprob`.

Under FSDP2 call it inside the forward of the module that owns `weight`: there the parameter is whole, its storage is
gathered again before the backward, and the gradient is returned to autograd, which adds a tied embedding's own.

    logps, entropies, best_logps = linear_logprob(hidden, head.weight, token_ids, temperature=0.9)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

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
    if isinstance(weight, DTensor):
        raise ValueError("weight is a sharded DTensor: call linear_logprob inside the FSDP module's forward")
    if hidden.ndim != 2 or weight.ndim != 2 or targets.shape != hidden.shape[:1] or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden [N, D], weight [V, D], targets [N]; got {tuple(hidden.shape)}, {tuple(weight.shape)}, "
            f"{tuple(targets.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk_size is None:
        chunk_size = CHUNK_ELEMENTS.get(hidden.device.type, 2**24) // weight.shape[0]
    chunk_size = max(int(chunk_size), 1)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        logps, entropies, best_logps = _LinearLogprob.apply(hidden, weight, targets, temperature, chunk_size)
        return logps, entropies, best_logps
    return _forward(hidden, weight, targets, temperature, chunk_size)


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    logps = torch.empty(hidden.shape[0], dtype=_accumulator_dtype(hidden), device=hidden.device)
    entropies, best_logps = torch.empty_like(logps), torch.empty_like(logps)
    operand = _operand_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        head = weight.to(operand)  # [V, D]
        workspace = _workspace(logps, weight, chunk_size)
        for rows in _chunks(hidden.shape[0], chunk_size):
            log_probs, probs, best_logps[rows] = _softmax(hidden[rows].to(operand), head, temperature, workspace)
            logps[rows] = log_probs.gather(-1, targets[rows, None])[:, 0]
            # From log-probs, all of one sign; logsumexp - sum(p z) would cancel where logits are large.
            entropies[rows] = probs.mul_(log_probs).sum(-1).neg_()
    return logps, entropies, best_logps


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk_size):
        logps, entropies, best_logps = _forward(hidden, weight, targets, temperature, chunk_size)
        ctx.save_for_backward(hidden, weight, targets, entropies)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(best_logps)
        return logps, entropies, best_logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropies, _):
        """With p = softmax(z): dlogp/dz = 1_target - p and dH/dz = -p (log p + H), where z = logits / temperature."""
        hidden, weight, targets, entropies = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_accumulator_dtype(hidden)) if need_weight else None
        if grad_logps is None:  # only the entropies were used
            grad_logps = torch.zeros_like(entropies)
        operand = _operand_dtype(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(operand)  # [V, D]
            workspace = _workspace(entropies, weight, ctx.chunk_size)
            for rows in _chunks(hidden.shape[0], ctx.chunk_size):
                chunk = hidden[rows].to(operand)  # [C, D]
                log_probs, probs, _ = _softmax(chunk, head, ctx.temperature, workspace)
                grad_logp = grad_logps[rows, None] / ctx.temperature
                if grad_entropies is None:
                    grad_logits = probs.mul_(-grad_logp)
                else:
                    grad_entropy = grad_entropies[rows, None] / ctx.temperature
                    log_probs.add_(entropies[rows, None]).mul_(-grad_entropy).sub_(grad_logp)
                    grad_logits = probs.mul_(log_probs)
                # Before any rounding: the target's entry is g (1 - p), which cancels as p nears 1.
                grad_logits.scatter_add_(1, targets[rows, None], grad_logp)
                grad_logits = grad_logits.to(operand)
                if grad_hidden is not None:
                    grad_hidden[rows] = torch.mm(grad_logits, head)
                if grad_weight is not None:
                    _add_mm(grad_weight, grad_logits.T, chunk)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _softmax(
    hidden: Tensor, head: Tensor, temperature: float, workspace: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """log p and p of one chunk, [C, V] each in the accumulator's dtype, written into the workspace; max log p [C]."""
    log_probs, probs = (buffer[: hidden.shape[0]] for buffer in workspace)
    if hidden.dtype == log_probs.dtype:
        torch.mm(hidden, head.T, out=log_probs)
    else:  # half precision in, float32 out: CUDA only
        torch.mm(hidden, head.T, out_dtype=log_probs.dtype, out=log_probs)
    log_probs.div_(temperature)
    log_probs.sub_(log_probs.amax(-1, keepdim=True))
    torch.exp(log_probs, out=probs)
    total = probs.sum(-1, keepdim=True)
    return log_probs.sub_(total.log()), probs.div_(total), -total.log()[:, 0]  # the largest was 0 before


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:  # half precision in, float32 out: CUDA only
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _workspace(like: Tensor, weight: Tensor, chunk_size: int) -> list[Tensor]:
    """Two [chunk, V] buffers for all chunks: fresh ones for each would cost a CPU more in page faults than the sums."""
    rows = min(chunk_size, like.shape[0])
    return [like.new_empty(rows, weight.shape[0]) for _ in range(2)]


def _chunks(rows: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, rows)) for start in range(0, rows, chunk_size)]


def _accumulator_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the matrix products take: half precision only where the product can come out in float32."""
    if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16):
        return hidden.dtype
    return _accumulator_dtype(hidden)
