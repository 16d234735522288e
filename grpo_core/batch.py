"""Turns samples into mini-batches, one per optimizer step, which consist of packed micro-batches.

The samples of all ranks are distributed over the ranks by compute cost, so a rank also trains on samples of other
ranks. Read `update.py` next.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_core.config import GRPOConfig
from grpo_core.loss import TokenBatch
from grpo_core.rollout import Sample
from sft_core.data.packing import PackedSequences, StepCounts, balance, idle_sequences, pack, pack_sequences
from sft_core.run.distributed import exchange

# A sequence that shares its prompt gathers the prompt's keys and values. This many need the memory of one token.
KEYS_PER_TOKEN = 16


@dataclass
class MicroBatch:
    """S completions with their prompts, packed. Log-probs are those of the N completion tokens."""

    samples: Sequence[Sample]
    sequences: PackedSequences
    advantages: Tensor  # [S]
    positions: Tensor  # [N] index of the token within its completion
    sampler_logps: Tensor  # [N] the engine's
    old_logps: Tensor | None = None  # [N] the policy's before its first update on this rollout batch
    ref_logps: Tensor | None = None  # [N] the reference model's
    active: Tensor | None = None  # [N] bool, on the CPU: the advantage is not 0
    kept: Tensor | None = None  # [N] bool: high entropy in this update; None: all are kept
    num_kept: Tensor | None = None  # kept tokens of the step, over all ranks

    def tokens(self, counts: StepCounts, old_logps: str) -> TokenBatch:
        """The input of the objective. With `old_logps` "policy" the sampler's mismatch is corrected; with "sampler" the
        sampler's log-probs are the old ones."""
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
    """The samples that count in the step's tokens and sequences: all, or with `mask_truncated` those that were not cut.

    An unscored sample counts too, with an advantage of 0. A cut sample lacks the stop token; nothing else differs.
    """
    return [sample for sample in samples if sample.finish_reason == "stop" or not mask_truncated]


def split_by_signal(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The samples of groups in which any advantage is not 0, and the samples of all other groups."""
    groups = {sample.group for sample in samples if sample.advantage}
    return [s for s in samples if s.group in groups], [s for s in samples if s.group not in groups]


@dataclass
class MiniBatch:
    """This rank's share of a mini-batch: the samples of one optimizer step."""

    micro_batches: list[MicroBatch]
    skipped: Sequence[Sample] = ()  # counted in the step's tokens and sequences, but without forward and backward pass
    left_out: Sequence[Sample] = ()  # not counted
    counts: StepCounts = field(init=False)  # over all ranks

    @property
    def samples(self) -> list[Sample]:
        return [s for batch in self.micro_batches for s in batch.samples] + [*self.skipped, *self.left_out]


def deal(samples: Sequence[Sample], num_generations: int, mini_batches: int) -> list[list[Sample]]:
    """Distribute this rank's samples over `mini_batches` mini-batches.

    Over all ranks the mini-batches differ in size by at most one sample. Each gets an equal part of every group (plus
    or minus one sample), so each sees every prompt. The assignment depends only on a sample's place in the rollout
    batch, not on the number of ranks. It is therefore determined by the run's seed.
    """
    dealt: list[list[Sample]] = [[] for _ in range(mini_batches)]
    for sample in samples:
        dealt[(sample.group * num_generations + sample.index) % mini_batches].append(sample)
    return dealt


def make_mini_batch(samples: Sequence[Sample], config: GRPOConfig, device: torch.device, quadratic: float) -> MiniBatch:
    """This rank's share of all ranks' `samples`. Each rank passes the whole groups that it sampled. A collective."""
    taken = counted(samples, config.mask_truncated_completions)
    cut = [sample for sample in samples if sample.finish_reason != "stop" and config.mask_truncated_completions]
    trained, skipped = split_by_signal(taken) if config.skips_groups else (taken, [])
    budget = config.max_tokens_per_micro_batch
    return MiniBatch(make_micro_batches(trained, budget, device, config.share_prompts, quadratic), skipped, cut)


@dataclass(frozen=True, order=True)
class Place:
    """Where a sample is and how long it is. All ranks know the places of all samples."""

    group: int
    index: int
    rank: int
    position: int  # among the samples of that rank
    prompt: int  # tokens
    completion: int  # tokens


def make_micro_batches(
    samples: Sequence[Sample],
    max_tokens: int,
    device: torch.device,
    share_prompts: bool = False,
    quadratic: float = 0.0,
) -> list[MicroBatch]:
    """Pack all ranks' samples into micro-batches of at most `max_tokens` tokens, prompts included; returns this rank's.
    A collective, in which the ranks exchange the samples that they train on.

    All sampled tokens are scored, including stop tokens; prompt tokens are not. With `share_prompts` a group's
    prompt is packed once per part of the group. `quadratic` is `sft_core.model.flops.attention_share`.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    places = [
        Place(sample.group, sample.index, rank, i, len(sample.prompt_ids), len(sample.completion_ids))
        for i, sample in enumerate(samples)
    ]
    every = [places] * ranks
    if ranks > 1:
        dist.all_gather_object(every, places)
    shares = share_out(sorted(place for own in every for place in own), max_tokens, ranks, share_prompts, quadratic)
    wanted = [[place for parts in share for part in parts for place in part] for share in shares]
    parcels = [{place.position: samples[place.position] for place in share if place.rank == rank} for share in wanted]
    found = exchange(parcels)  # [rank that had the sample][position]
    return [
        _micro_batch([[found[place.rank][place.position] for place in part] for part in parts], device)
        for parts in shares[rank]
        if parts
    ]


def share_out(
    places: Sequence[Place], max_tokens: int, ranks: int, share_prompts: bool, quadratic: float
) -> list[list[list[list[Place]]]]:
    """The micro-batches of each rank, balanced by compute cost. All ranks get the same number, and a micro-batch
    consists of parts of groups.

    A group stays whole if the ranks then finish at nearly the same time. Otherwise large groups are split: one more
    rank then computes the prompt, but no rank waits.
    """
    groups: dict[int, list[Place]] = {}
    for i, place in enumerate(places):
        groups.setdefault(place.group if share_prompts else i, []).append(place)
    best, least = list[list[list[list[Place]]]](), math.inf
    per_rank = sum(place.completion for place in places) // ranks
    limits = [max_tokens, per_rank, per_rank // 2, per_rank // 4] if ranks > 1 and share_prompts else [max_tokens]
    for limit in limits:  # completion tokens per part
        parts, tokens, cost = list[list[Place]](), list[int](), list[float]()
        for members in groups.values():
            prompt = members[0].prompt
            gathered = math.ceil(prompt / KEYS_PER_TOKEN) if len(members) > 1 else 0  # per completion
            own = [place.completion + gathered for place in members]
            for chosen in pack(own, min(max_tokens - prompt, limit)):
                part = [members[i] for i in chosen]
                pairs = sum((prompt + p.completion) ** 2 for p in part) - (len(part) - 1) * prompt**2
                parts.append(part)
                tokens.append(prompt + sum(own[i] for i in chosen))
                cost.append(prompt + sum(p.completion for p in part) + quadratic * pairs)
        shares = balance(tokens, cost, max_tokens, ranks)
        # All ranks run their i-th micro-batches at the same time.
        slowest = sum(max(sum(cost[i] for i in chosen) for chosen in step) for step in zip(*shares, strict=True))
        if slowest < 0.98 * least:
            least = slowest
            best = [[[parts[i] for i in chosen] for chosen in share] for share in shares]
    return best


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
            f"{len(batch.sampler_logps)} tokens were sampled, but {len(batch.sequences.targets)} would be scored."
        )
    return batch


def idle_micro_batch(device: torch.device, scored: bool = False) -> MicroBatch:
    """A micro-batch that scores nothing (N = 0), for a rank with fewer micro-batches than others.

    `scored`: the other micro-batches have old and reference log-probs from a checkpoint, so no rank computes these.
    """
    nothing = torch.zeros(0, device=device)
    recorded = nothing if scored else None
    advantages = torch.zeros(1, device=device)
    return MicroBatch([], idle_sequences(device), advantages, nothing.long(), nothing, recorded, recorded)


def keep_logps(mini_batches: Sequence[MiniBatch]) -> None:
    """Copy old and reference log-probs to the samples, so that a checkpoint between two updates contains them."""
    for batch in (batch for mini_batch in mini_batches for batch in mini_batch.micro_batches):
        lengths = [len(sample.completion_ids) for sample in batch.samples]
        for name in ("old_logps", "ref_logps"):
            if (logps := getattr(batch, name)) is not None:
                for sample, part in zip(batch.samples, logps.split(lengths), strict=True):
                    setattr(sample, name, part.tolist())
