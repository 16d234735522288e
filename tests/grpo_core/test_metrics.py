"""What ends a run: log-probs that differ, or are no numbers."""

import math

import pytest

from grpo_core.metrics import check_mismatch

NAME = "sampling/sampling_logp_difference/mean"


@pytest.mark.parametrize(
    ("mean", "says"),
    [(0.2, "differ from the policy's by 0.2 on average"), (math.nan, "are not finite"), (math.inf, "are not finite")],
)
def test_a_mismatch_ends_the_run_by_its_name(mean, says):
    with pytest.raises(RuntimeError, match=says):
        check_mismatch({NAME: mean}, 0.1)


@pytest.mark.parametrize("metrics", [{NAME: 0.1}, {}])
def test_within_the_limit_nothing_is_said(metrics):
    check_mismatch(metrics, 0.1)
