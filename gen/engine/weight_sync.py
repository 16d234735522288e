"""Weight sync: load the policy's weights into an engine and check that they arrived.

A sampler with stale, missing or mixed-up weights still writes plausible text, and training on it fails silently. So
each sync is checked in three ways, the first two by `sync_weights` and the third by `probe`:

* The loader took all tensors of the policy, and no others.
* The engine holds them: every parameter of the engine was written. Parameters that can be read back equal what was
  sent, or have changed if the engine keeps them in another form. Engines on different ranks are equal.
* The engine samples from them: its log-probs of the tokens that it samples equal the policy's.

vLLM on the CPU repacks linear weights, which then cannot be read back; only the first and third checks cover these.
The remaining differences are numerical, and training logs them (`grpo_core.metrics.mismatch_sums`).

Not supported, on purpose: any transport. Engines run in the trainer's process and take tensors. For separate servers,
use vLLM's own weight-transfer engines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gen.engine.base import Checksum, Engine, Sampling, Synced

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}  # words per chunk: one that fits a core's cache; few launches on a GPU


class Checksums:
    """Checksums of tensors by name. They are computed on the tensors' device and read together, with one device sync.

    A checksum consists of the tensor's dtype and shape, and of sum_i (2 i + 1) * word_i modulo 2^64 over its bytes as
    64-bit words, which is the same on every device. Since the factors are odd, it detects any single changed word;
    since they differ, it detects two swapped words. It is not cryptographic.
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
    """Load the policy's weights into the engine as `version` and check that exactly these arrived. All ranks call this
    together if each has an engine.

    weights   (Hugging Face name, full tensor) pairs; consumed one at a time
    expected  the names of the policy's parameters

    Raises RuntimeError naming what differs: tensors that are missing, unexpected or sent twice; parameters of the
    engine that were not written, differ from what was sent, or did not change although they should have; parameters
    that differ between ranks; or the engine's version.
    """
    sent = Checksums()

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name not in expected:
                raise RuntimeError(f"weight sync {version}: {name!r} is not in the policy: send only its parameters")
            if name in sent.kinds:
                raise RuntimeError(f"weight sync {version}: {name!r} was sent twice: send it once")
            sent.add(name, tensor)
            yield name, tensor

    loaded = engine.load_weights(watched(), version)
    now = (sent.read(), loaded)
    mine = Held(loaded.share, loaded.held, unchanged(engine.synced, now))
    ranks = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        ranks *= dist.get_world_size()
        dist.all_gather_object(ranks, mine)
    # A tensor may change in one tensor-parallel rank's part and not in another's.
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
            raise RuntimeError(f"weight sync {version}: {len(names)} {what}: {shown} (try another --engine)")
    if engine.version != version:
        raise RuntimeError(f"weight sync {version}: load_weights must set it, but version is still {engine.version}")
    engine.synced = now


@dataclass(frozen=True)
class Held:
    """What an engine holds after a sync. The ranks exchange and compare it."""

    share: int  # which part of the model (the tensor-parallel rank)
    held: Mapping[str, Checksum | None]  # as in `Loaded`
    unchanged: set[str]  # the result of the function `unchanged`


def is_held_as_sent(name: str, before: Synced | None, now: Synced) -> bool:
    """Whether the engine holds this parameter in the form in which it is sent: because the engine says so, or because
    the checksums were equal after the previous sync."""
    (sent, loaded), (old_sent, old) = now, before or ({}, now[1])
    return name in sent and (loaded.as_sent or old.held.get(name) == old_sent.get(name))


def not_as_sent(before: Synced | None, now: Synced) -> set[str]:
    """The engine's parameters that should equal what was sent (`is_held_as_sent`) but do not."""
    sent, loaded = now
    return {
        name
        for name, held in loaded.held.items()
        if held is not None and is_held_as_sent(name, before, now) and held != sent[name]
    }


def unchanged(before: Synced | None, now: Synced) -> set[str]:
    """The engine's parameters that should have changed in this sync but did not. It covers parameters that the engine
    keeps in another form: several tensors fused, a part of a tensor, another dtype, transposed. Such a parameter should
    change if all its sources have changed: the sent tensor with its name, else the neighbouring ones (q_proj, k_proj
    and v_proj for qkv_proj). Only the probe checks parameters without a source.
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
    """Sample completions of one prompt and compare the engine's log-probs with the policy's.

    Use eight completions: the tokens of a single one may all be likely under any weights. With two neighbouring layers
    of SmolLM2-135M swapped, the mean difference was 0.06 to 5 over one completion of 8 tokens, and at least 0.21 over
    eight completions of 16 tokens.

    policy_logps(prompt, completions) -> [N] log-probs of the tokens of all completions, concatenated, at the training
    temperature. It may be a collective call. Then every rank must probe with the same prompt, sampling options and
    seed, and without stop ids, so that lengths are equal.

    Returns `mean_abs` and `max_abs`, the mean and maximum difference, and the number of `tokens`. Raises RuntimeError
    if the mean exceeds `tolerance` or a log-prob is not finite. Causes are stale or mixed-up weights, a different
    temperature, or log-probs shifted by one token.
    """
    [completions] = engine.sample([prompt_ids], sampling, [seed])
    ours = policy_logps(prompt_ids, [completion.token_ids for completion in completions]).detach().double().cpu()
    theirs = torch.tensor([logp for completion in completions for logp in completion.logps], dtype=torch.float64)
    if ours.shape != theirs.shape:
        raise RuntimeError(f"probe: policy_logps scored {tuple(ours.shape)} of {len(theirs)} tokens: it must score all")
    for whose, logps in (("the engine's", theirs), ("the policy's", ours)):
        if not logps.isfinite().all():
            raise RuntimeError(
                f"probe: {whose} log-probs (weights version {engine.version}) are not finite: check the weights, or "
                "use another --engine"
            )
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
            f"more than {tolerance:g} (max_logp_difference): the engine does not sample from the policy; use "
            "another --engine"
        )
    return figures
