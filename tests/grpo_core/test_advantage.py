"""grpo_core.advantage: groups computed by hand, and properties that must hold for all rewards."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.advantage import SCALES, decoupled_advantages, group_advantages
from grpo_core.config import GRPOConfig
from grpo_core.metrics import effective_groups
from grpo_core.rollout import Sample, advantages_of

NAN = float("nan")
REWARD = st.one_of(st.floats(-10, 10), st.sampled_from([0.0, 1.0, 0.1, NAN]))
GROUPS = st.lists(st.lists(REWARD, min_size=2, max_size=6), min_size=1, max_size=5)


def flat(groups):
    return [r for group in groups for r in group], [g for g, group in enumerate(groups) for _ in group]


def test_by_hand():
    rewards, ids = [1.0, 0.0, 0.0, 1.0, 3.0, 2.0], [0, 0, 0, 7, 7, 7]
    std = math.sqrt(1 / 3)  # the std of 1, 0, 0 with Bessel's correction; that of 1, 3, 2 is 1
    group = group_advantages(rewards, ids)
    assert group.dtype == torch.float64
    assert group.tolist() == pytest.approx(
        [2 / 3 / (std + 1e-4), -1 / 3 / (std + 1e-4), -1 / 3 / (std + 1e-4), -1 / 1.0001, 1 / 1.0001, 0]
    )
    assert group_advantages(rewards, ids, "none").tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, -1, 1, 0])
    whole = np.std(rewards, ddof=1) + 1e-4
    assert group_advantages(rewards, ids, "batch").tolist() == pytest.approx(
        [2 / 3 / whole, -1 / 3 / whole, -1 / 3 / whole, -1 / whole, 1 / whole, 0]
    )


def test_unscored_rows_are_left_out_and_get_zero():
    advantages = group_advantages([NAN, 1.0, 0.0, NAN, 5.0, NAN], [0, 0, 0, 1, 1, 1], "none")
    assert advantages.tolist() == [0, 0.5, -0.5, 0, 0, 0]  # group 1 has only one scored row
    batch = group_advantages([NAN, 1.0, 0.0, NAN, 5.0, NAN], [0, 0, 0, 1, 1, 1], "batch")
    assert batch[1].item() == pytest.approx(0.5 / (np.std([1, 0, 5], ddof=1) + 1e-4))  # but it counts for the scale


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_exactly_zero(scale):
    """The mean of 0.1, 0.1, 0.1 is not 0.1 in floating point; 1e-17 / 1e-4 would be noise with a gradient."""
    rewards = [0.1] * 3 + [0.3] * 7 + [0.7] * 11
    advantages = group_advantages(rewards, [0] * 3 + [1] * 7 + [2] * 11, scale)
    assert not advantages.any()


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.sampled_from(SCALES))
def test_properties(groups, scale):
    rewards, ids = flat(groups)
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids), scale)
    assert advantages.shape == (len(rewards),) and advantages.isfinite().all()
    for g, group in enumerate(groups):
        own = advantages[[i for i, other in enumerate(ids) if other == g]].numpy()
        scored = [r for r in group if not math.isnan(r)]
        assert all(a == 0 for a, r in zip(own, group, strict=True) if math.isnan(r))
        if len(set(scored)) <= 1:
            assert not own.any()
            continue
        assert abs(own.sum()) < 1e-6  # the mean is zero
        for a, r in zip(own, group, strict=True):  # rewards above the mean get a positive advantage
            if not math.isnan(r) and abs(r - np.mean(scored)) > 1e-9:
                assert (a > 0) == (r > np.mean(scored))


@settings(max_examples=40, deadline=None)
@given(GROUPS, st.sampled_from(SCALES), st.randoms(use_true_random=False), st.floats(-5, 5))
def test_order_and_shift_do_not_matter(groups, scale, random, shift):
    rewards, ids = flat(groups)
    advantages = group_advantages(rewards, ids, scale)
    order = list(range(len(rewards)))
    random.shuffle(order)
    shuffled = group_advantages([rewards[i] for i in order], [ids[i] for i in order], scale)
    torch.testing.assert_close(shuffled, advantages[order], rtol=1e-6, atol=1e-9)
    rounded = [round(r, 3) for r in rewards]  # so that the shift cannot make different rewards equal
    torch.testing.assert_close(
        group_advantages([r + round(shift, 3) for r in rounded], ids, scale),
        group_advantages(rounded, ids, scale),
        rtol=1e-6,
        atol=1e-6,
    )


@settings(max_examples=40, deadline=None)
@given(GROUPS)
def test_group_scale_equals_numpy(groups):
    rewards, ids = flat(groups)
    want = []
    for group in groups:
        scored = [r for r in group if not math.isnan(r)]
        spread = len(set(scored)) > 1
        want += [
            (r - np.mean(scored)) / (np.std(scored, ddof=1) + 1e-4) if spread and not math.isnan(r) else 0.0
            for r in group
        ]
    np.testing.assert_allclose(group_advantages(rewards, ids).numpy(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "arguments, names",
    [
        (([1.0, 2.0, 3.0], [0, 0, 1]), "group 1"),
        (([1.0, float("inf")], [0, 0]), "infinite"),
        (([1.0, 2.0], [0, 0], "std"), "scale_rewards"),
        (([1.0, 2.0], [0, 0, 0]), "group_ids"),
    ],
)
def test_refuses(arguments, names):
    with pytest.raises(ValueError, match=names):
        group_advantages(*arguments)


DECOUPLED = st.lists(st.lists(st.tuples(REWARD, REWARD, REWARD), min_size=2, max_size=5), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(DECOUPLED)
def test_decoupled_equals_the_formula(groups):
    """GDPO in NumPy: normalise each function's values per group, sum them with weights, normalise over all rows."""
    weights, rows, ids = [1.0, 2.0, -0.5], *flat(groups)
    sums = []
    for group in groups:
        columns = np.array(group)  # [G, 3]
        for row in columns:
            z = 0.0
            for k, weight in enumerate(weights):
                known = columns[:, k][~np.isnan(columns[:, k])]
                if not math.isnan(row[k]) and len(known) > 1 and known.min() < known.max():
                    z += weight * (row[k] - known.mean()) / (known.std(ddof=1) + 1e-4)
            sums.append(NAN if np.isnan(row).all() else z)
    known = np.array(sums)[~np.isnan(sums)]
    found = decoupled_advantages(rows, ids, weights).numpy()
    if len(known) < 2 or np.ptp(known) < 1e-9:
        assert np.abs(found).max() < 1e-4
        return
    want = (np.array(sums) - known.mean()) / (known.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(found, np.where(np.isnan(sums), 0.0, want), rtol=1e-6, atol=1e-6)


def test_decoupled_sees_what_the_sum_hides():
    """The sums 10 + 0 and 9 + 1 are equal; compared separately, the rare reward counts as much as the common one. A
    sample whose check failed (its reward is NaN) is excluded, whatever its other values are."""
    config = GRPOConfig("out", multi_objective_aggregation="normalize_then_sum", reward_weights=[1.0, 3.0])
    rewards = [[10.0, 0.0], [9.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 5.0]]
    samples = [Sample(i // 2, [], [], [], "stop", 0, sum(row), row) for i, row in enumerate(rewards)]
    samples[4] = replace(samples[4], group=1, reward=NAN)
    assert not any(group_advantages([s.reward for s in samples], [0, 0, 1, 1, 1]))
    for sample, advantage in zip(samples, advantages_of(samples, config), strict=True):
        sample.advantage = advantage
    first, second, *others = [s.advantage for s in samples]
    assert first == -second < -0.5 and others == [0.0, 0.0, 0.0]
    assert effective_groups(samples) == [True, False]


def test_decoupled_leaves_groups_without_spread_at_exactly_zero():
    """The other groups have sums that add up to 0 exactly, but not in float64."""
    rng = np.random.default_rng(0)
    values = rng.random((40, 2))
    values[:20] = 0.1
    advantages = decoupled_advantages(values, np.arange(40) // 4, [0.3, 0.7])
    assert not advantages[:20].any() and advantages[20:].all()
