"""Causal attention over packed rows: sequences end to end in one row, none seeing another, no padding in the model.

On CUDA in half precision it is `torch.nn.attention.varlen.varlen_attn` (flash attention by cumulative lengths; its
backward is not bit-repeatable but under torch.use_deterministic_algorithms).
Elsewhere sequences of like length are gathered into right-padded batches for `scaled_dot_product_attention`: padding
at the right needs no mask under causal attention, for no real token looks right. Both take grouped queries and
sliding windows, both differentiate, and both are one node of a graph that torch.compile makes, whatever the lengths.
The reference implementation is `kernels.reference.packed_attention`.

Left out on purpose: dropout, key-value caches, anything bidirectional.

    register()                                     # once, before the model is built
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="packed")
    layout = packed_layout([5, 3, 9], device)      # once per micro-batch
    model(input_ids=ids[None], position_ids=layout.position_ids[None], use_cache=False, packed=layout)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn.attention.varlen import varlen_attn

# Grouped queries, for which torch 2.11 has no flag.
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
SHORTEST_IN_BATCH = 0.75  # of the batch's longest: bounds the padded work, costs one call per factor of 4/3 in length


@dataclass(eq=False)
class PackedLayout:
    """Where each sequence of a packed row lies, made once per micro-batch and read by every layer."""

    cu_seqlens: Tensor  # [S + 1] int32: sequence s is the tokens cu_seqlens[s] : cu_seqlens[s + 1]
    max_seqlen: int
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    lengths: tuple[int, ...]

    @cached_property
    def batches(self) -> tuple[list[Tensor], Tensor]:
        """Right-padded batches of sequences of like length, for devices and dtypes without varlen attention.

        Each batch [B, L] int64 holds packed tokens; the second tensor, [T] int64, is each packed token's place in the
        flattened, concatenated batches. Made when first asked for, once for all layers.
        """
        device, sizes = self.position_ids.device, torch.tensor(self.lengths)
        starts = sizes.cumsum(0) - sizes  # [S]
        batches: list[Tensor] = []
        unbatch = torch.empty(int(sizes.sum()), dtype=torch.int64)
        offset = 0
        for members in _by_length(self.lengths):
            column = torch.arange(int(sizes[members].max()))
            real = column < sizes[members, None]  # [B, L]
            # A pad repeats a token of its own sequence: finite values, and nothing of another document.
            tokens = starts[members, None] + column * real
            unbatch[tokens[real]] = offset + real.flatten().nonzero()[:, 0]
            offset += tokens.numel()
            batches.append(tokens.to(device))
        return batches, unbatch.to(device)


def packed_layout(lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedLayout:
    """The layout of sequences of the given lengths (all positive), in the order in which they are packed."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a packed row needs sequences of at least one token, got lengths {list(lengths)}")
    sizes = torch.tensor(list(lengths))
    cu_seqlens = F.pad(sizes.cumsum(0), (1, 0)).to(device, torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])  # [T]
    return PackedLayout(cu_seqlens, max(lengths), positions.to(device), tuple(lengths))


def _by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Sequence numbers in groups of like length, each group's shortest at least SHORTEST_IN_BATCH of its longest."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[index] >= SHORTEST_IN_BATCH * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def packed_attention(
    module: torch.nn.Module | None,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: Tensor | None = None,
    *,
    packed: PackedLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:  # [1, T, H, Dv]
    """Attention in the form transformers' `AttentionInterface` calls, `packed` having come through the model's kwargs.

    With a window of W a token sees itself and the W - 1 before it, as in transformers. Raises ValueError for what the
    kernels cannot do: no layout, dropout, a batch of rows, a mask, anything but causal attention, and whatever else a
    model asks for that would be dropped here (Gemma 2's `softcap`, gpt-oss's sinks `s_aux`). `position_ids` are the
    layout's.
    """
    if packed is None:
        raise ValueError("attn_implementation='packed' needs packed=packed_layout(lengths, device) in the forward call")
    if dropout:
        raise ValueError(f"packed attention has no dropout: set attention_dropout to 0 (it is {dropout})")
    tokens = packed.position_ids.shape[0]
    if attention_mask is not None or query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        raise ValueError(
            f"packed attention takes one row of the layout's {tokens} tokens and no mask, got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)} and "
            f"mask {None if attention_mask is None else tuple(attention_mask.shape)}"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("packed attention is causal, and this model's is not")
    for name, setting in kwargs.items():
        if setting is not None and setting is not False:
            raise ValueError(f"packed attention has no {name}: use another attn_implementation for this model")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if query.is_cuda and flash_takes(query.dtype, query.shape[-1]) and value.shape[-1] == query.shape[-1]:
        out = _varlen(q, k, v, packed, scaling, sliding_window)
    elif torch.compiler.is_compiling():
        out = _opaque(q, k, v, packed.cu_seqlens, scaling, sliding_window)
    else:
        out = _padded(q, k, v, packed, scaling, sliding_window)
    return out[None], None


def flash_takes(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and head_dim <= 256 and head_dim % 8 == 0


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:  # [T, H, D], [T, Hkv, D], [T, Hkv, D] -> [T, H, D]
    if not GROUPED:
        key, value = _repeat(query, key, value)
    left = -1 if window is None else window - 1  # it counts the tokens to the left, not the token itself
    cu_seqlens, longest = packed.cu_seqlens, packed.max_seqlen
    return varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=(left, 0), **GROUPED
    )


def _repeat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value heads as many as query heads; [T, heads, D]."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


def _padded(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:  # [T, H, D], [T, Hkv, D], [T, Hkv, Dv] -> [T, H, Dv]
    if query.is_cuda:  # with grouped queries its kernels of linear memory would not be taken
        key, value = _repeat(query, key, value)
    batches, unbatch = packed.batches
    outputs = []
    for tokens in batches:
        q, k, v = (
            x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)  # [B, heads, L, D]
            for x in (query, key, value)
        )
        mask = None
        if window is not None and window < tokens.shape[1]:
            position = torch.arange(tokens.shape[1], device=query.device)
            behind = position[:, None] - position[None, :]
            mask = (behind >= 0) & (behind < window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B * L, H, Dv]
    return torch.cat(outputs).index_select(0, unbatch)


# `_padded` for torch.compile, which would make a graph of its own for each number of batches. Its backward computes the
# forward again.


@library.custom_op(
    "kernels::padded_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, float? scaling, int? window) -> Tensor",
)
def _opaque(query, key, value, cu_seqlens, scaling, window):
    return _padded(query, key, value, _layout(tuple(cu_seqlens.tolist()), query.device), scaling, window)


@library.custom_op(
    "kernels::padded_attention_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, float? scaling, int? window) "
    "-> (Tensor, Tensor, Tensor)",
)
def _opaque_backward(gradient, query, key, value, cu_seqlens, scaling, window):
    layout = _layout(tuple(cu_seqlens.tolist()), query.device)
    _, pull = torch.func.vjp(lambda q, k, v: _padded(q, k, v, layout, scaling, window), query, key, value)
    return tuple(x.contiguous() for x in pull(gradient))


@lru_cache(maxsize=2)  # all layers ask for the same
def _layout(cu_seqlens: tuple[int, ...], device: torch.device) -> PackedLayout:
    return packed_layout([end - start for start, end in pairwise(cu_seqlens)], device)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple:
    return *_opaque_backward(gradient, *ctx.saved_tensors, ctx.scaling, ctx.window), None, None, None


_opaque.register_fake(lambda query, key, value, *_: query.new_empty(*query.shape[:-1], value.shape[-1]))
_opaque_backward.register_fake(lambda gradient, *rest: tuple(x.new_empty(x.shape) for x in rest[:3]))
_opaque.register_autograd(_differentiate, setup_context=_keep)


def register() -> None:
    """Make `attn_implementation="packed"` known to transformers. Calling it again changes nothing.

    No mask function goes with it, on purpose: transformers then hands the attention no mask at all, and spares itself
    the search of position_ids for packed sequences, which would wait for the device in every forward.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("packed", packed_attention)
