"""Trainer weights into an engine, and the proof that they arrived.

A sampler with stale, missing or mixed-up weights still writes plausible text, and training on it fails silently. So
each sync is checked three times (`sync_weights`, then `probe`):

* the loader took all tensors, and no others;
* the engine holds them: every parameter of the engine was written, those that can be read back are what was sent or, if
  the engine keeps them in another form, have changed with it, and engines that should be equal are;
* it samples from it: the engine's log-probs of what it samples are the policy's own.

vLLM on the CPU repacks linear weights and cannot give them back: there the first and the last must do. The
difference that remains is numerics, which training follows (`grpo_core.metrics.mismatch_sums`).

Left out on purpose: any transport. Engines live in the trainer's process and take tensors; for separate servers use
vLLM's own weight-transfer engines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gen.engine.base import Checksum, Engine, Sampling, Synced

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}  # words at a time: what stays in a core's cache; few launches on a GPU


class Checksums:
    """Checksums of tensors by name, computed on their device and read all at once: one wait for the device.

    A checksum is sum_i (2 i + 1) * word_i modulo 2^64 over a tensor's bytes as 64-bit words, the same on every device,
    beside its dtype and shape: odd weights make any single changed word visible, and different weights make two words
    that change places visible. Not cryptographic.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}
        self.totals: list[Tensor] = []  # each []

    @torch.no_grad()
    def add(self, name: str, tensor: Tensor) -> None:
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
        self.kinds[name] = f"{tensor.dtype} {tuple(tensor.shape)}"
        self.totals.append(total)

    def read(self) -> dict[str, Checksum]:
        if not self.totals:
            return {}
        totals = torch.stack([total.to(self.totals[0].device) for total in self.totals]).tolist()
        return dict(zip(self.kinds, zip(self.kinds.values(), totals, strict=True), strict=True))


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, Checksum]:
    found = Checksums()
    for name, tensor in tensors.items():
        found.add(name, tensor)
    return found.read()


def sync_weights(
    engine: Engine, weights: Iterable[tuple[str, Tensor]], expected: Collection[str], version: int
) -> None:
    """Load the policy's weights into the engine as `version` and check that all of them, and only they, arrived. A
    collective, where ranks have an engine each.

    weights   (Hugging Face name, full tensor) pairs; consumed one at a time
    expected  the names of the policy's parameters

    Raises RuntimeError naming what differs: tensors missing, unexpected or sent twice; parameters of the engine that
    were not written, are not what was sent, or did not change with it; engines that differ between ranks; or the
    engine's version.
    """
    sent = Checksums()

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name not in expected:
                raise RuntimeError(f"weight sync {version}: {name!r} is not a parameter of the policy")
            if name in sent.kinds:
                raise RuntimeError(f"weight sync {version}: {name!r} was sent twice")
            sent.add(name, tensor)
            yield name, tensor

    loaded = engine.load_weights(watched(), version)
    now = (sent.read(), loaded)
    mine = Held(loaded.share, loaded.held, unchanged(engine.synced, now))
    ranks = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        ranks *= dist.get_world_size()
        dist.all_gather_object(ranks, mine)
    # A change of one share's part of a tensor may leave that of another as it was.
    unchanged_everywhere = set.intersection(*(rank.unchanged for rank in ranks))
    faults = {
        "tensors did not arrive": set(expected) - set(sent.kinds),
        "parameters of the engine are not what was sent": not_as_sent(engine.synced, now) | unchanged_everywhere,
        "parameters differ between the engines of several ranks": {
            name
            for rank in ranks
            if rank.share == mine.share
            for name, checksum in rank.held.items()
            if checksum != mine.held[name]
        },
    }
    for what, names in faults.items():
        if names:
            shown = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
            raise RuntimeError(f"weight sync {version}: {len(names)} {what}: {shown}")
    if engine.version != version:
        raise RuntimeError(f"weight sync {version}: the engine still says version {engine.version}")
    engine.synced = now


@dataclass(frozen=True)
class Held:
    """What an engine holds after a sync, for the other ranks to compare."""

    share: int  # which part of the model
    held: Mapping[str, Checksum | None]
    unchanged: set[str]


def is_held_as_sent(name: str, before: Synced | None, now: Synced) -> bool:
    """Whether the engine holds this parameter in the form in which it is sent: it says so, or it once was so."""
    (sent, loaded), (old_sent, old) = now, before or ({}, now[1])
    return name in sent and (loaded.as_sent or old.held.get(name) == old_sent.get(name))


def not_as_sent(before: Synced | None, now: Synced) -> set[str]:
    """The engine's own parameters that are held as they are sent and yet are not what was sent."""
    sent, loaded = now
    return {
        name
        for name, held in loaded.held.items()
        if held is not None and is_held_as_sent(name, before, now) and held != sent[name]
    }


def unchanged(before: Synced | None, now: Synced) -> set[str]:
    """The engine's own parameters that are held in another form (several tensors in one, a share of one, another dtype,
    transposed) and are what they were, though all that they may be made of has changed: the tensor of their name, else
    its neighbours (q_proj, k_proj and v_proj for qkv_proj). Where there are none, it is left to the probe.
    """
    if before is None:
        return set()
    (sent, loaded), (old_sent, old) = now, before
    changed = {name for name in sent if old_sent.get(name) != sent[name]}
    found = set()
    for name, held in loaded.held.items():
        if held is None or held != old.held.get(name) or is_held_as_sent(name, before, now):
            continue
        *module, _, leaf = ["", *name.split(".")]
        neighbours = {n for n in sent if f".{n}".startswith(".".join(module)) and n.endswith(f".{leaf}")}
        sources = {name} & sent.keys() or neighbours
        if sources and sources <= changed:
            found.add(name)
    return found


def probe(
    engine: Engine,
    policy_logps: Callable[[list[int], list[list[int]]], Tensor],
    prompt_ids: list[int],
    sampling: Sampling,
    *,
    seed: int,
    tolerance: float,
) -> dict[str, float]:
    """Sample some completions of one prompt and compare the engine's log-probs with the policy's.

    Sample eight, since the tokens of one may all be likely ones, whatever the weights. Where two neighbouring layers of
    SmolLM2-135M change places, the mean is 0.06 to 5 over 8 tokens of one completion, 0.21 or more over 16 of eight.

    policy_logps(prompt, completions) -> [N] log-probs of all completions' tokens, one after the other, at the training
    temperature. It may be a collective call: then every rank has to probe with the same prompt, sampling (without
    stop ids, so that lengths are equal) and seed.

    Returns `mean_abs` and `max_abs` difference and the number of `tokens`. Raises RuntimeError when the mean exceeds
    `tolerance` or is not a number: stale or mixed-up weights, another temperature, log-probs off by one token.
    """
    [completions] = engine.sample([prompt_ids], sampling, [seed])
    ours = policy_logps(prompt_ids, [completion.token_ids for completion in completions]).detach().double().cpu()
    theirs = torch.tensor([logp for completion in completions for logp in completion.logps], dtype=torch.float64)
    if ours.shape != theirs.shape:
        raise RuntimeError(f"probe: the policy scored {tuple(ours.shape)} tokens, the engine sampled {len(theirs)}")
    for whose, logps in (("the engine's", theirs), ("the policy's", ours)):
        if not logps.isfinite().all():
            raise RuntimeError(f"probe: {whose} log-probs (weights version {engine.version}) are not finite")
    difference = (ours - theirs).abs()
    figures = {
        "mean_abs": difference.mean().item(),
        "max_abs": difference.max().item(),
        "tokens": float(len(difference)),
    }
    if figures["mean_abs"] > tolerance:
        raise RuntimeError(
            f"probe: the engine's log-probs (weights version {engine.version}) differ from the policy's by "
            f"{figures['mean_abs']:.4g} on average and {figures['max_abs']:.4g} at most over {len(difference)} tokens, "
            f"more than {tolerance:g}: the engine does not sample from the policy"
        )
    return figures
