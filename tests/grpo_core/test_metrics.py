"""The mismatch between engine and policy. Log-probs that differ too much, or are not finite, end a run."""

import math

import pytest
import torch

from grpo_core.metrics import check_mismatch, mismatch_means, mismatch_sums
from sft_core.run.logging import merge_metrics

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


def test_the_mismatch_is_a_mean_over_tokens_however_they_are_split():
    policy = torch.tensor([-1.0, -2.0, -3.0, -0.5, -1.0])
    sampler = torch.tensor([-1.0, -2.5, -2.0, -0.5, -1.1])
    positions = torch.tensor([0, 31, 32, 511, 512])
    whole = mismatch_sums(policy, sampler, positions)
    found = mismatch_means({name: value.item() for name, value in whole.items()})
    d = policy.double() - sampler.double()
    assert found == pytest.approx(
        {
            NAME: d.abs().mean().item(),
            NAME.replace("mean", "max"): 1.0,
            "sampling/mismatch/k1": -d.mean().item(),
            "sampling/mismatch/k3": (d.exp() - 1 - d).mean().item(),
            "sampling/mismatch/outside": 1 / 5,  # exp(-1) < 0.5; exp(0.5) is inside
            "sampling/mismatch/mean_abs_0": 0.25,
            "sampling/mismatch/mean_abs_32": 1.0,
            "sampling/mismatch/mean_abs_128": 0.0,
            "sampling/mismatch/mean_abs_512": 0.1,
        },
        abs=1e-6,
    )

    parts = [mismatch_sums(policy[s], sampler[s], positions[s]) for s in (slice(0, 2), slice(2, 5), slice(5, 5))]
    merged = merge_metrics(parts)
    assert merged.keys() == whole.keys()
    for name, value in whole.items():
        assert merged[name].item() == pytest.approx(value.item()), name
    assert mismatch_means({name: value.item() for name, value in parts[2].items()}) == {}
