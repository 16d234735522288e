"""Padding-free batches: whole sequences, end to end, in bins of at most a token budget."""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import PackedLayout, packed_layout


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` grouped into bins whose lengths sum to at most `budget`.

    A sequence is never split; one longer than the budget gets its own bin. The result is deterministic.

    >>> pack([5, 3, 3, 2, 9], budget=8)
    [[4], [0, 1], [2, 3]]
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[index], -1))
        if at < len(room):
            left, chosen = room.pop(at)
        else:
            left, chosen = budget, len(bins)
            bins.append([])
        bins[chosen].append(index)
        insort(room, (left - lengths[index], chosen))
    return bins


def balance(lengths: Sequence[int], cost: Sequence[float], budget: int, ranks: int) -> list[list[list[int]]]:
    """For each rank its micro-batches, as indices of `lengths`. Each has at most `budget` tokens. All ranks have the
    same number of micro-batches.

    `cost` of each sequence is proportional to its FLOPs. Ranks run their micro-batches in lockstep, so micro-batches
    that run at the same time should cost the same. Each sequence, costliest first, goes to the cheapest micro-batch
    with room; the micro-batches are then dealt to the ranks in order of cost. A sequence is never split; one longer
    than the budget gets its own micro-batch. With fewer sequences than ranks some micro-batches are empty. The result
    is deterministic.

    >>> balance([5, 3, 3, 2, 9], [5, 3, 3, 2, 9], budget=8, ranks=2)
    [[[4], [1, 3]], [[0], [2]]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-cost[i], i))
    alone = sum(2 * length > budget for length in lengths)  # no two of these fit together
    count = ranks * max(1, math.ceil(max(alone, sum(lengths) / budget) / ranks))
    while (bins := _spread(lengths, cost, order, budget, count)) is None:
        count += ranks * max(1, count // (20 * ranks))
    bins.sort(key=lambda members: -sum(cost[i] for i in members))
    return [bins[rank::ranks] for rank in range(ranks)]


def _spread(
    lengths: Sequence[int], cost: Sequence[float], order: list[int], budget: int, count: int
) -> list[list[int]] | None:
    """The sequences in exactly `count` bins, or None if they do not fit."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    cheapest = [(0.0, b) for b in range(count)]  # a heap of (cost, bin), without full bins
    smallest = lengths[order[-1]] if order else 0
    for i in order:
        passed = []
        while cheapest:
            so_far, b = heapq.heappop(cheapest)
            if not bins[b] or tokens[b] + lengths[i] <= budget:
                break
            passed.append((so_far, b))
        else:
            return None
        bins[b].append(i)
        tokens[b] += lengths[i]
        for entry in passed if tokens[b] + smallest > budget else [*passed, (so_far + cost[i], b)]:
            heapq.heappush(cheapest, entry)
    return bins


@dataclass
class PackedSequences:
    """Sequences end to end, and which of their tokens are scored. T tokens, N scored tokens, S sequences."""

    input_ids: Tensor  # [1, T]
    layout: PackedLayout  # sequence boundaries and positions
    rows: Tensor  # [N] the position whose hidden state predicts the scored token (the one before it)
    targets: Tensor  # [N] the scored token itself
    sequence_ids: Tensor  # [N] in 0..S-1
    num_sequences: int  # S


def pack_sequences(
    sequences: Sequence, masks: Sequence, device: torch.device, shared: Sequence[int] | None = None
) -> PackedSequences:
    """Lay `sequences` (lists or arrays of ids) end to end; `masks[i][t]`: token t of sequence i is scored (t > 0).

    The position before a scored token predicts it. The head runs only on these positions (`rows`), so unscored tokens
    cost nothing there, and no position of one sequence ever predicts a token of the next.

    `shared[i]`: sequence i shares its first `shared[i]` tokens with the last sequence before it whose `shared` is 0.
    These tokens are in the row only once. A sequence that shares tokens may have no others.
    """
    skipped = shared or [0] * len(sequences)
    used = [i for i, sequence in enumerate(sequences) if not skipped[i] or len(sequence) > skipped[i]]
    lengths = [len(sequences[i]) for i in used]
    layout = packed_layout(lengths, device, [skipped[i] for i in used])
    tokens = torch.from_numpy(np.concatenate([sequences[i][skipped[i] :] for i in used]).astype(np.int64)).to(device)
    flags = torch.from_numpy(np.concatenate([masks[i] for i in used]).astype(bool))
    flags[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = False
    scored = flags.nonzero().squeeze(1)
    owner = torch.repeat_interleave(torch.tensor(used), torch.tensor(lengths))
    rows, places = (layout.places[where.to(device)] for where in (scored - 1, scored))
    return PackedSequences(
        input_ids=tokens[None],
        layout=layout,
        rows=rows,
        targets=tokens[places],
        sequence_ids=owner[scored].to(device),
        num_sequences=len(sequences),
    )


def idle_sequences(device: torch.device) -> PackedSequences:
    """A sequence without scored tokens (N = 0), for a rank with fewer micro-batches than others."""
    return pack_sequences([[0, 0]], [[False, False]], device)


@dataclass(frozen=True)
class StepCounts:
    """Totals of an optimizer step over all ranks, known before its first backward pass."""

    micro_batches: int  # the largest number on any rank, at least 1; every rank makes this many passes
    num_tokens: int  # scored tokens
    num_sequences: int
    trained_tokens: int  # scored tokens that get a pass; the others have no gradient
    trained_sequences: int


def step_counts(batches: list[PackedSequences], device: torch.device, skipped: tuple[int, int] = (0, 0)) -> StepCounts:
    """Counts over all ranks, in one collective. `skipped`: this rank's tokens and sequences that are counted but get no
    pass."""
    tokens, sequences = sum(len(b.targets) for b in batches), sum(b.num_sequences for b in batches)
    numbers = [len(batches), tokens + skipped[0], sequences + skipped[1], tokens, sequences]
    counts = torch.tensor(numbers, device=device)
    parts = [torch.empty_like(counts) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, counts)
    every = torch.stack(parts)  # [ranks, 5]
    return StepCounts(max(1, int(every[:, 0].max())), *every[:, 1:].sum(0).tolist())
