"""Causal attention over packed rows: a row holds several sequences without padding, and none attends to another.

On CUDA in half precision it uses `torch.nn.attention.varlen.varlen_attn` (flash attention with cumulative lengths; its
backward is bit-repeatable only under torch.use_deterministic_algorithms).
Elsewhere sequences of similar length are gathered into right-padded batches for `scaled_dot_product_attention`. Padding
on the right needs no mask under causal attention, because no real token attends to its right. Both support grouped
queries and sliding windows, both are differentiable, and both are one node in a graph of torch.compile for any lengths.
The reference implementation is `kernels.reference.packed_attention`.

A sequence may share its first tokens with an earlier one (completions of one prompt). The row then contains them once.
The queries of the sequence's own tokens attend to gathered copies of the shared keys and values, and autograd sums the
gradients of the copies. A sliding window treats shared tokens like all others.

Not supported, on purpose: dropout, key-value caches, anything bidirectional.

    register()                                     # once, before the model is built
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="packed")
    layout = packed_layout([5, 3, 9], device)      # once per micro-batch
    model(input_ids=ids[None], position_ids=layout.position_ids[None], use_cache=False, packed=layout)
    layout = packed_layout([7, 9, 6], device, shared=[0, 4, 4])  # all begin with the same 4 tokens; the row has 14
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn.attention.varlen import varlen_attn

# The flag for grouped queries, which torch 2.11 does not have.
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
SHORTEST_IN_BATCH = 0.75  # shortest / longest length: bounds the padding, at one call per factor of 4/3


@dataclass(eq=False)
class PackedLayout:
    """The places of the sequences in a packed row, computed once per micro-batch and used by every layer."""

    cu_seqlens: Tensor  # [S + 1] int32: cumulative lengths of whole sequences, shared tokens included
    cu_queries: Tensor  # [S + 1] int32: cumulative lengths without shared tokens, as the sequences are in the row
    max_seqlen: int
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    lengths: tuple[int, ...]  # of whole sequences
    prefixes: tuple[range, ...]  # row indices of the shared tokens of each sequence
    places: Tensor  # [sum of lengths] int64: row indices of the tokens of whole sequences
    shares: bool  # whether any sequence shares tokens

    @cached_property
    def batches(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Right-padded batches of sequences of similar length, for devices and dtypes without varlen attention.

        A batch has row indices of queries [B, L] and of keys [B, P + L], both int64. P is the length of the prefix that
        all its sequences share. The second result, [T] int64, is the index of each token of the row in the flattened,
        concatenated queries. Computed on first access, once for all layers.
        """
        device = self.position_ids.device
        own = [length - len(prefix) for length, prefix in zip(self.lengths, self.prefixes, strict=True)]
        sizes = torch.tensor(own)
        starts = sizes.cumsum(0) - sizes  # [S]
        batches: list[tuple[Tensor, Tensor]] = []
        unbatch = torch.empty(sum(own), dtype=torch.int64)
        offset = 0
        for members in _by_length(own, self.prefixes):
            column = torch.arange(int(sizes[members].max()))
            real = column < sizes[members, None]  # [B, L]
            # Padding repeats a token of the same sequence: its values are finite, and from no other document.
            tokens = starts[members, None] + column * real
            unbatch[tokens[real]] = offset + real.flatten().nonzero()[:, 0]
            offset += tokens.numel()
            prefix = torch.tensor(self.prefixes[members[0]], dtype=torch.int64).expand(len(members), -1)
            batches.append((tokens.to(device), torch.cat([prefix, tokens], 1).to(device)))
        return batches, unbatch.to(device)


def packed_layout(
    lengths: Sequence[int], device: torch.device | str = "cpu", shared: Sequence[int] | None = None
) -> PackedLayout:
    """The layout of sequences of the given lengths (all positive), in the order in which they are packed.

    The first `shared[i]` tokens of sequence i are those of the nearest earlier sequence that shares none (0), and the
    row contains them only there. Each sequence has at least one token of its own.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a packed row needs sequences of at least one token, got lengths {list(lengths)}")
    skipped = list(shared or [0] * len(lengths))
    ends = list(accumulate(length - n for length, n in zip(lengths, skipped, strict=True)))
    prefixes, places = [], []
    first = nothing = range(0)
    for start, end, n in zip([0, *ends], ends, skipped, strict=False):
        first = first if n else range(start, end)
        assert start < end and n <= len(first), (lengths, shared)
        prefixes.append(first[:n] if n else nothing)
        places += [*prefixes[-1], *range(start, end)]
    positions = [torch.arange(n, length) for length, n in zip(lengths, skipped, strict=True)]
    return PackedLayout(
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device),
        cu_queries=torch.tensor([0, *ends], dtype=torch.int32).to(device),
        max_seqlen=max(lengths),
        position_ids=torch.cat(positions).to(device),
        lengths=tuple(lengths),
        prefixes=tuple(prefixes),
        places=torch.tensor(places).to(device),
        shares=any(skipped),
    )


def _by_length(lengths: Sequence[int], prefixes: Sequence[range]) -> list[list[int]]:
    """Indices of sequences in groups of the same prefix and similar length: a group's shortest has at least
    SHORTEST_IN_BATCH of the length of its longest."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (prefixes[i].start, len(prefixes[i]), -lengths[i])):
        first = groups[-1][0] if groups else -1
        if groups and prefixes[index] == prefixes[first] and lengths[index] >= SHORTEST_IN_BATCH * lengths[first]:
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
    """Attention with the signature of transformers' `AttentionInterface`; `packed` comes through the model's kwargs.

    With a window of W a token attends to itself and the W - 1 tokens before it, as in transformers. `position_ids` are
    the layout's and are ignored. Raises ValueError for what the kernels do not support: no layout, dropout, a batch of
    rows, a mask, attention that is not causal, and any other argument of a model that would be dropped here (Gemma 2's
    `softcap`, gpt-oss's sinks `s_aux`).
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
        raise ValueError("packed attention is causal: use another attn_implementation for this model, which is not")
    for name, setting in kwargs.items():
        if setting is not None and setting is not False:
            raise ValueError(f"packed attention has no {name}: use another attn_implementation for this model")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if query.is_cuda and flash_takes(query.dtype, query.shape[-1]) and value.shape[-1] == query.shape[-1]:
        out = _varlen(q, k, v, packed, scaling, sliding_window)
    elif torch.compiler.is_compiling():
        out = _opaque(q, k, v, packed.cu_queries, packed.cu_seqlens, scaling, sliding_window)
    else:
        out = _padded(q, k, v, packed, scaling, sliding_window)
    return out[None], None


def flash_takes(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and head_dim <= 256 and head_dim % 8 == 0


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:  # [T, H, D], [T, Hkv, D], [T, Hkv, D] -> [T, H, D]
    if packed.shares:  # through float32, so that the backward sums the gradients of a shared token in float32
        key, value = (x.float().index_select(0, packed.places).to(x.dtype) for x in (key, value))
    if not GROUPED:
        key, value = _repeat(query, key, value)
    left = -1 if window is None else window - 1  # the number of tokens to the left, without the token itself
    # If there are fewer queries than keys, flash attention aligns both at their ends.
    cu_queries, cu_keys, longest = packed.cu_queries, packed.cu_seqlens, packed.max_seqlen
    return varlen_attn(
        query, key, value, cu_queries, cu_keys, longest, longest, scale=scaling, window_size=(left, 0), **GROUPED
    )


def _repeat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat key and value heads to the number of query heads. All are [T, heads, D]."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


def _padded(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:  # [T, H, D], [T, Hkv, D], [T, Hkv, Dv] -> [T, H, Dv]
    if query.is_cuda:  # with grouped queries SDPA would not choose its kernels with linear memory
        key, value = _repeat(query, key, value)
    batches, unbatch = packed.batches
    outputs = []
    for tokens, seen in batches:
        q, k, v = (
            x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)  # [B, heads, L or P + L, D]
            for x, rows in ((query, tokens), (key, seen), (value, seen))
        )
        mask, prefix = None, seen.shape[1] - tokens.shape[1]
        if prefix or window is not None and window < tokens.shape[1]:
            position = torch.arange(seen.shape[1], device=query.device)
            behind = position[prefix:, None] - position[None, :]  # is_causal=True would align both at their starts
            mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B * L, H, Dv]
    return torch.cat(outputs).index_select(0, unbatch)


# `_padded` as a custom op for torch.compile, which would otherwise compile a graph per number of batches. Its backward
# computes the forward again.


LAYOUT = "Tensor cu_queries, Tensor cu_seqlens, float? scaling, int? window"


@library.custom_op(
    "kernels::padded_attention", mutates_args=(), schema=f"(Tensor query, Tensor key, Tensor value, {LAYOUT}) -> Tensor"
)
def _opaque(query, key, value, cu_queries, cu_seqlens, scaling, window):
    return _padded(query, key, value, _layout_of(cu_queries, cu_seqlens), scaling, window)


@library.custom_op(
    "kernels::padded_attention_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor query, Tensor key, Tensor value, {LAYOUT}) -> (Tensor, Tensor, Tensor)",
)
def _opaque_backward(gradient, query, key, value, cu_queries, cu_seqlens, scaling, window):
    layout = _layout_of(cu_queries, cu_seqlens)
    _, pull = torch.func.vjp(lambda q, k, v: _padded(q, k, v, layout, scaling, window), query, key, value)
    return tuple(x.contiguous() for x in pull(gradient))


def _layout_of(cu_queries: Tensor, cu_seqlens: Tensor) -> PackedLayout:
    return _layout(tuple(cu_queries.diff().tolist()), tuple(cu_seqlens.diff().tolist()), cu_seqlens.device)


@lru_cache(maxsize=2)  # all layers have the same layout
def _layout(own: tuple[int, ...], lengths: tuple[int, ...], device: torch.device) -> PackedLayout:
    return packed_layout(lengths, device, [length - n for length, n in zip(lengths, own, strict=True)])


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple:
    return *_opaque_backward(gradient, *ctx.saved_tensors, ctx.scaling, ctx.window), *[None] * 4


_opaque.register_fake(lambda query, key, value, *_: query.new_empty(*query.shape[:-1], value.shape[-1]))
_opaque_backward.register_fake(lambda gradient, *rest: tuple(x.new_empty(x.shape) for x in rest[:3]))
_opaque.register_autograd(_differentiate, setup_context=_keep)


def register() -> None:
    """Register `attn_implementation="packed"` with transformers. Calling it again changes nothing.

    No mask function is registered, on purpose: transformers then passes no mask, and does not search position_ids for
    packed sequences, which would wait for the device in every forward.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("packed", packed_attention)
