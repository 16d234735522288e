"""The committed reward curves of grpo_core and TRL: complete, and equal within the spread of their seeds."""

import statistics

import pytest

from tests.beside.learning import SIDES, TASKS, curves

T_95 = 2.776  # Student's t for 95 % at 4 degrees of freedom: two sides of three seeds


@pytest.mark.parametrize("task", TASKS)
def test_both_sides_learn_alike(task):
    found = curves(task)
    assert found.keys() == {(side, seed) for side in SIDES for seed in (1, 2, 3)}
    for rows in found.values():
        assert [row["step"] for row in rows] == list(range(1, TASKS[task]["steps"] + 1))
    half = TASKS[task]["steps"] // 2
    ends = {
        side: [statistics.mean(row["reward"] for row in found[side, seed][half:]) for seed in (1, 2, 3)]
        for side in SIDES
    }
    difference = statistics.mean(ends[SIDES[0]]) - statistics.mean(ends[SIDES[1]])
    error = (sum(statistics.variance(values) for values in ends.values()) / 3) ** 0.5
    assert abs(difference) <= T_95 * error, (ends, difference, error)
