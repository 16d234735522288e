"""Trainer weights into an engine, and the proof that they arrived.

A sampler with stale, missing or mixed-up weights still writes plausible text, and training on it fails silently. So
each sync is checked twice: by the bytes (`sync_weights` compares a checksum of every tensor sent with a checksum of
what the engine's loader consumed) and by the meaning (`probe` samples one prompt and compares the engine's log-probs
with the policy's own). During training `mismatch_stats` follows the difference that remains, which is numerics.

Left out on purpose: any transport. Engines live in the trainer's process and take tensors; for separate servers use
vLLM's own weight-transfer engines.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from gen.engine import Engine

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}  # words at a time: what stays in a core's cache; few launches on a GPU
BUCKETS = (0, 32, 128, 512)  # first position of each bucket of `mismatch_stats`


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of a tensor's bytes, shape and dtype; the same on every device.

    sum_i (2 i + 1) * word_i modulo 2^64 over the bytes as 64-bit words: odd weights make any single changed word
    visible, and different weights make two words that change places visible. Not cryptographic.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, 8 - flat.numel() % 8))
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words = flat.view(torch.int64)  # [W]
    size = min(CHUNK[words.device.type], max(len(words), 1))
    odd = torch.arange(1, 2 * size, 2, device=words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), size):  # integer sums wrap, so their order does not matter
        chunk = words[start : start + size]
        total += (chunk * odd[: len(chunk)]).sum() + 2 * start * chunk.sum()
    kind = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return (int(total) + kind * 0x9E3779B97F4A7C15) % (1 << 64)


def sync_weights(
    engine: Engine,
    weights: Iterable[tuple[str, Tensor]],
    expected: Collection[str] | Mapping[str, int],
    version: int,
) -> None:
    """Load the policy's weights into the engine as `version` and check that all of them, and only they, arrived.

    weights   (Hugging Face name, full tensor) pairs; consumed one at a time
    expected  the names of the policy's parameters; as a mapping, also the checksums known beforehand

    Raises RuntimeError naming what differs: tensors missing, unexpected, sent twice, exchanged or changed on the way,
    or the engine's version.
    """
    sent: dict[str, int] = {}

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name not in expected:
                raise RuntimeError(f"weight sync {version}: {name!r} is not a parameter of the policy")
            if name in sent:
                raise RuntimeError(f"weight sync {version}: {name!r} was sent twice")
            sent[name] = checksum(tensor)
            yield name, tensor

    consumed = engine.load_weights(watched(), version)
    known = expected if isinstance(expected, Mapping) else sent
    missing = sorted(set(expected) - set(consumed))
    extra = sorted(set(consumed) - set(expected))
    changed = sorted(name for name in set(consumed) & set(sent) if not consumed[name] == sent[name] == known[name])
    faults = {"did not arrive": missing, "were not asked for": extra, "differ from what was sent": changed}
    for what, names in faults.items():
        if names:
            raise RuntimeError(
                f"weight sync {version}: {len(names)} tensors {what}: {', '.join(names[:5])}"
                + (" ..." if len(names) > 5 else "")
            )
    if engine.version != version:
        raise RuntimeError(f"weight sync {version}: the engine still says version {engine.version}")


def probe(
    engine: Engine,
    policy_logps: Callable[[list[int], list[int]], Tensor],
    prompt_ids: list[int],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    tolerance: float,
) -> dict[str, float]:
    """Sample one completion and compare the engine's log-probs with the policy's.

    policy_logps(prompt, completion) -> [L] log-probs of the completion's tokens at the training temperature. It may be
    a collective call: then every rank has to probe with the same prompt, `max_tokens` (there are no stop ids, so
    lengths are equal) and seed.

    Returns `mean_abs` and `max_abs` difference and the number of `tokens`. Raises RuntimeError when the mean exceeds
    `tolerance` or is not a number: stale or mixed-up weights, another temperature, log-probs off by one token.
    """
    [[completion]] = engine.sample(
        [prompt_ids],
        n=1,
        temperature=temperature,
        max_tokens=max_tokens,
        seeds=[seed],
        stop_ids=frozenset(),
    )
    ours = policy_logps(prompt_ids, completion.token_ids).detach().double().cpu()
    theirs = torch.tensor(completion.logps, dtype=torch.float64)
    if ours.shape != theirs.shape:
        raise RuntimeError(f"probe: the policy scored {tuple(ours.shape)} tokens, the engine sampled {len(theirs)}")
    difference = (ours - theirs).abs()
    figures = {
        "mean_abs": difference.mean().item(),
        "max_abs": difference.max().item(),
        "tokens": float(len(difference)),
    }
    if not figures["mean_abs"] <= tolerance:  # so written, NaN fails too
        raise RuntimeError(
            f"probe: the engine's log-probs (weights version {engine.version}) differ from the policy's by "
            f"{figures['mean_abs']:.4g} on average and {figures['max_abs']:.4g} at most over {len(difference)} tokens, "
            f"more than {tolerance:g}: the engine does not sample from the policy"
        )
    return figures


@torch.no_grad()
def mismatch_stats(policy_logps: Tensor, sampler_logps: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """How far the policy's log-probs [N] are from the sampler's [N] on the sampler's own tokens, as float64 sums.

    positions [N] are places in the completion, from 0. With d = policy - sampler per token: sums of |d|, of the
    estimates of KL(sampler || policy) k1 = -d and k3 = exp(d) - d - 1 (Schulman, "Approximating KL divergence", 2020),
    the number of ratios exp(d) outside [0.5, 2], and sum and count of |d| for each bucket of positions. All entries
    add up over micro-batches and ranks, but `abs_max`, which takes the maximum. `mismatch_summary` divides.
    """
    d = policy_logps.detach().double() - sampler_logps.double()
    size = d.abs()
    ratio = d.exp()
    stats = {
        "count": torch.full((), float(d.numel()), dtype=torch.float64, device=d.device),
        "abs_max": size.max() if d.numel() else d.new_zeros(()),
        "sum_abs": size.sum(),
        "sum_k1": -d.sum(),
        "sum_k3": (ratio - d - 1).sum(),
        "outside": ((ratio < 0.5) | (ratio > 2)).sum().double(),
    }
    for first, end in zip(BUCKETS, (*BUCKETS[1:], None), strict=True):
        inside = (positions >= first) if end is None else (positions >= first) & (positions < end)
        stats[f"sum_abs_{first}"] = torch.where(inside, size, 0.0).sum()
        stats[f"count_{first}"] = inside.sum().double()
    return stats


def mismatch_summary(stats: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Means of the totals of `mismatch_stats`: mean_abs, abs_max, k1, k3, outside (a share), mean_abs_<first position>.

    A bucket without tokens is left out; without any token all is left out.
    """
    totals = {name: float(value) for name, value in stats.items()}
    if not totals["count"]:
        return {}
    figures = {"mean_abs": totals["sum_abs"] / totals["count"], "abs_max": totals["abs_max"]}
    for name in ("k1", "k3"):
        figures[name] = totals[f"sum_{name}"] / totals["count"]
    figures["outside"] = totals["outside"] / totals["count"]
    for first in BUCKETS:
        if totals[f"count_{first}"]:
            figures[f"mean_abs_{first}"] = totals[f"sum_abs_{first}"] / totals[f"count_{first}"]
    return figures
