"""Samples are distributed over the ranks by their cost, and arrive unchanged."""

import random

import pytest
import torch

from grpo_core.batch import Place, share_out
from grpo_core.rollout import Sample
from tests.processes import run_ranks

RANKS, BUDGET, PROMPT, QUADRATIC = 8, 16384, 180, 1e-5


def lengths_of(groups: int, same: bool, seed: int) -> list[list[int]]:
    """Lengths of groups of 8 completions, lognormal with sigma 1; `same`: a group's completions are equally long."""
    rng = random.Random(seed)
    draws = [[rng.lognormvariate(5.3, 1) for _ in range(8)] for _ in range(groups)]
    return [[1 + min(4095, int(draw[0] if same else each)) for each in draw] for draw in draws]


def cost(part: list[Place]) -> float:
    tokens = PROMPT + sum(place.completion for place in part)
    return tokens + QUADRATIC * (sum((PROMPT + p.completion) ** 2 for p in part) - (len(part) - 1) * PROMPT**2)


def slowest_over_mean(shares: list[list[list[list[Place]]]]) -> float:
    """Time of the slowest rank over the mean, for ranks that do their micro-batches in lockstep."""
    costs = [[sum(map(cost, parts)) for parts in share] for share in shares]
    steps = range(max(map(len, costs)))
    return sum(max(own[k] if k < len(own) else 0 for own in costs) for k in steps) / (sum(map(sum, costs)) / RANKS)


@pytest.mark.parametrize(("groups", "same", "bound"), [(64, False, 1.1), (64, True, 1.1), (8, False, 1.6)])
def test_ranks_have_as_much_to_do(groups, same, bound):
    """The worst of 20 draws, compared with ranks that train on their own samples. With one group per rank, a completion
    may be longer than a rank's share."""
    before, after = [], []
    for seed in range(20):
        lengths = lengths_of(groups, same, seed)
        places = [
            Place(g, i, g % RANKS, i, PROMPT, length) for g, own in enumerate(lengths) for i, length in enumerate(own)
        ]
        shares = share_out(places, BUDGET, RANKS, True, QUADRATIC)
        assert sorted(p for share in shares for parts in share for part in parts for p in part) == places
        for parts in (parts for share in shares for parts in share):
            assert sum(PROMPT + sum(p.completion for p in part) for part in parts) <= BUDGET
            assert all(len({place.group for place in part}) == 1 for part in parts)
        own = [[place for place in places if place.rank == rank] for rank in range(RANKS)]
        before.append(slowest_over_mean([share_out(mine, BUDGET, 1, True, QUADRATIC)[0] for mine in own]))
        after.append(slowest_over_mean(shares))
    print(f"slowest over mean, {groups} groups: {sum(before) / 20:.2f} -> {sum(after) / 20:.2f}, ", end="")
    print(f"worst {max(before):.2f} -> {max(after):.2f}")
    assert max(after) <= bound < max(before)


def exchanged(samples: list[Sample]) -> list[list[Sample]]:
    """The samples in this rank's micro-batches. The first rank sampled all but one group, the last rank none."""
    from grpo_core.batch import make_micro_batches
    from sft_core.run import distributed

    rank, _, _, device = distributed.init_distributed(60)
    own = [sample for sample in samples if min(sample.group, 1) == rank]
    batches = make_micro_batches(own, 60, device, share_prompts=True)
    distributed.shutdown()
    return [[*batch.samples] for batch in batches]


def test_a_sample_arrives_as_it_was_sampled():
    """It arrives once, with all its fields, also on a rank that sampled nothing."""
    rng = random.Random(0)
    samples = [
        Sample(group, [group] * 9, [5] * n, [rng.random()] * n, "stop", 3, 0.5, [0.5], rng.random(), i, [-1.0] * n)
        for group in range(4)
        for i, n in enumerate(rng.randint(0, 12) for _ in range(6))
    ]
    found = run_ranks(3, exchanged, samples)
    arrived = [sample for share in found for batch in share for sample in batch]
    assert sorted(arrived, key=lambda sample: (sample.group, sample.index)) == samples
    assert {len(share) for share in found} <= {len(found[0]), len(found[0]) - 1} and all(found)


def test_nothing_to_train_on():
    for ranks in (1, 3):
        assert share_out([], 100, ranks, True, 0.0) == [[[]]] * ranks


def test_what_is_shared_out_does_not_depend_on_who_sampled_it():
    """Otherwise a resumed run would pack differently."""
    places = [Place(g, i, 0, i, 50, 1 + 37 * (g * 8 + i) % 101) for g in range(6) for i in range(8)]
    others = [Place(p.group, p.index, p.group % 2, p.position, p.prompt, p.completion) for p in places]
    found = [
        [[[(p.group, p.index) for p in part] for part in parts] for parts in share]
        for own in (places, others)
        for share in share_out(own, 500, 2, True, QUADRATIC)
    ]
    assert found[:2] == found[2:] and torch.tensor([len(share) for share in found]).unique().numel() == 1
