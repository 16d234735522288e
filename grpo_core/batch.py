"""From samples to what the policy is trained on: mini-batches, one per optimizer step, of packed micro-batches.

The next file is `update.py`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_core.loss import TokenBatch
from grpo_core.rollout import Sample
from sft_core.data.packing import PackedSequences, StepCounts, idle_sequences, pack, pack_sequences

KEYS_PER_TOKEN = 16  # keys and values gathered for a sequence that take as much memory in a block as a token does


@dataclass
class MicroBatch:
    """S completions with their prompts, packed; N completion tokens. Log-probs are of those tokens."""

    samples: Sequence[Sample]
    sequences: PackedSequences
    advantages: Tensor  # [S]
    positions: Tensor  # [N] index of the token within its completion
    sampler_logps: Tensor  # [N] the engine's
    old_logps: Tensor | None = None  # [N] the policy's before its first update on this rollout batch
    ref_logps: Tensor | None = None  # [N] the reference model's
    active: Tensor | None = None  # [N] bool, on the CPU: there is an advantage
    kept: Tensor | None = None  # [N] bool: of high entropy in this update; None: all
    num_kept: Tensor | None = None  # of the step, over all ranks

    def tokens(self, counts: StepCounts, old_logps: str) -> TokenBatch:
        """What the objective is computed from. `old_logps`: "policy", which corrects the sampler's mismatch, or
        "sampler", which takes its log-probs for the old ones."""
        policy = old_logps == "policy"
        return TokenBatch(
            self.advantages,
            self.sequences.sequence_ids,
            counts.num_tokens,
            counts.num_sequences,
            old_logps=self.old_logps if policy else self.sampler_logps,
            ref_logps=self.ref_logps,
            sampler_logps=self.sampler_logps if policy else None,
            kept=self.kept,
            num_kept=self.num_kept,
        )


def counted(samples: Sequence[Sample], mask_truncated: bool) -> list[Sample]:
    """The samples that are trained and count in the step's tokens and sequences: all, or all that were not cut.

    One that was not scored counts as well; its advantage is 0. A cut one has no stop token, and is else as any other.
    """
    return [sample for sample in samples if sample.finish_reason == "stop" or not mask_truncated]


def split_by_signal(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The samples of groups in which one has an advantage, and the others."""
    groups = {sample.group for sample in samples if sample.advantage}
    return [s for s in samples if s.group in groups], [s for s in samples if s.group not in groups]


@dataclass
class MiniBatch:
    """What one optimizer step takes of a rollout batch: this rank's share."""

    samples: Sequence[Sample]  # also those that are left out of the loss
    micro_batches: list[MicroBatch]
    skipped: Sequence[Sample] = ()  # count in the step's tokens and sequences, but get no pass
    counts: StepCounts = field(init=False)  # over all ranks


def deal(samples: Sequence[Sample], num_generations: int, mini_batches: int) -> list[list[Sample]]:
    """The samples of this rank, dealt to as many mini-batches.

    Over the ranks mini-batches differ by at most one sample. Each has an equal part of every group (one sample more or
    less), so that each sees every prompt and every rank has as much to do in each. Which samples it has depends on
    their places in the rollout batch alone, not on the ranks: with the order of prompts and the seeds of sampling it
    follows from the run's seed.
    """
    dealt: list[list[Sample]] = [[] for _ in range(mini_batches)]
    seen: Counter[int] = Counter()
    for sample in samples:
        dealt[(sample.group * num_generations + seen[sample.group]) % mini_batches].append(sample)
        seen[sample.group] += 1
    return dealt


def make_micro_batches(
    samples: Sequence[Sample], max_tokens: int, device: torch.device, share_prompts: bool = False
) -> list[MicroBatch]:
    """Pack `samples` into micro-batches of at most `max_tokens` tokens, prompts included.

    Every sampled token is scored, the stop token too; no prompt token is. With `share_prompts` samples of one prompt
    stay together and the prompt stands once, in each part of a group for which there is room in a micro-batch.
    """
    groups: dict[Any, list[Sample]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(tuple(sample.prompt_ids) if share_prompts else i, []).append(sample)
    parts: list[list[Sample]] = []
    costs: list[int] = []
    for members in groups.values():
        prompt = len(members[0].prompt_ids)
        gathered = math.ceil(prompt / KEYS_PER_TOKEN) if len(members) > 1 else 0  # for each
        own = [len(sample.completion_ids) + gathered for sample in members]
        for part in pack(own, max_tokens - prompt):
            parts.append([members[i] for i in part])
            costs.append(prompt + sum(own[i] for i in part))
    return [_micro_batch([parts[i] for i in chosen], device) for chosen in pack(costs, max_tokens)]


def _micro_batch(parts: list[list[Sample]], device: torch.device) -> MicroBatch:
    samples = [sample for part in parts for sample in part]
    sequences = pack_sequences(
        [sample.prompt_ids + sample.completion_ids for sample in samples],
        [[False] * len(sample.prompt_ids) + [True] * len(sample.completion_ids) for sample in samples],
        device,
        [len(sample.prompt_ids) * (i > 0) for part in parts for i, sample in enumerate(part)],
    )

    def recorded(logps: list[list[float] | None]) -> Tensor | None:
        if None in logps:
            return None
        return torch.tensor([logp for part in logps for logp in part or []], device=device)

    batch = MicroBatch(
        samples=samples,
        sequences=sequences,
        advantages=torch.tensor([sample.advantage for sample in samples], device=device, dtype=torch.float32),
        positions=torch.cat([torch.arange(len(sample.completion_ids)) for sample in samples]).to(device),
        sampler_logps=torch.tensor([logp for sample in samples for logp in sample.sampler_logps], device=device),
        old_logps=recorded([sample.old_logps for sample in samples]),
        ref_logps=recorded([sample.ref_logps for sample in samples]),
        active=torch.tensor([sample.advantage != 0 for sample in samples for _ in sample.completion_ids]),
    )
    if len(batch.sequences.targets) != len(batch.sampler_logps):
        raise RuntimeError(
            f"{len(batch.sampler_logps)} tokens were sampled, {len(batch.sequences.targets)} are scored."
        )
    return batch


def idle_micro_batch(device: torch.device, scored: bool = False) -> MicroBatch:
    """A pass that scores nothing (N = 0), for a rank that has run out of micro-batches of its own.

    `scored`: the others' have their old and reference log-probs, of a checkpoint, so that no rank makes those passes.
    """
    nothing = torch.zeros(0, device=device)
    recorded = nothing if scored else None
    advantages = torch.zeros(1, device=device)
    return MicroBatch([], idle_sequences(device), advantages, nothing.long(), nothing, recorded, recorded)


def keep_logps(mini_batches: Sequence[MiniBatch]) -> None:
    """Hand old and reference log-probs back to the samples, so that a checkpoint between two updates has them."""
    for batch in (batch for mini_batch in mini_batches for batch in mini_batch.micro_batches):
        lengths = [len(sample.completion_ids) for sample in batch.samples]
        for name in ("old_logps", "ref_logps"):
            if (logps := getattr(batch, name)) is not None:
                for sample, part in zip(batch.samples, logps.split(lengths), strict=True):
                    setattr(sample, name, part.tolist())
