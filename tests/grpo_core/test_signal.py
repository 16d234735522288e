"""Groups without signal need no pass: the gradient equals that of all groups, and a step of them changes nothing."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from grpo_core.config import GRPOConfig
from tests import faults
from tests.grpo_core.test_invariance import make_rollouts
from tests.grpo_core.test_train import TRAIN, options, weights
from tests.launch import flags, metrics, run
from tests.processes import run_ranks

SKIPPED = (1, 2, 3)  # groups; on two ranks the second has no others
LOSSES = {
    "grpo": {},
    "dapo, sequence ratio, sequence_mask": {
        "loss_type": "dapo",
        "importance_sampling_level": "sequence",
        "vllm_importance_sampling_mode": "sequence_mask",
        "vllm_importance_sampling_clip_min": 0.7,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "luspo, off-policy mask": {"loss_type": "luspo", "off_policy_mask_threshold": 0.02},
    "vespo": {"loss_type": "vespo"},
}


def updates(model: str) -> dict[str, dict]:
    """On each rank, for every loss, in float64: the updates with and without the groups that have no signal, and the
    metrics of an update that gets only the other groups."""
    from grpo_core.batch import idle_micro_batch, make_micro_batches, split_by_signal
    from grpo_core.update import update
    from sft_core.data.packing import step_counts
    from sft_core.model.policy import load_policy
    from sft_core.run import distributed
    from sft_core.run.config import ModelConfig
    from sft_core.run.logging import reduce_metrics

    torch.set_default_dtype(torch.float64)
    rank, world_size, _, device = distributed.init_distributed(60)
    policy = load_policy(ModelConfig(model)).double()  # unsharded, since sharding would make it float32
    rollouts = [sample for sample in make_rollouts() if sample.group % world_size == rank]
    for sample in rollouts:
        sample.advantage *= sample.group not in SKIPPED
    trained, skipped = split_by_signal(rollouts)
    assert {sample.group for sample in skipped} == {sample.group for sample in rollouts} & {*SKIPPED}
    without_pass = sum(len(sample.completion_ids) for sample in skipped), len(skipped)
    result = {}
    for loss, more in LOSSES.items():
        config = GRPOConfig(output_dir="unused", beta=0.0, **more)
        assert config.skips_groups
        for name, samples, uncounted in (
            ("all", rollouts, (0, 0)),
            ("skipped", trained, without_pass),
            ("alone", trained, (0, 0)),
        ):
            batches = make_micro_batches(samples, 90, device)
            counts = step_counts([batch.sequences for batch in batches], device, uncounted)
            passes = counts.micro_batches
            batches += [idle_micro_batch(device) for _ in range(passes - len(batches))]
            figures = update(policy, None, batches, counts, config, first_use=True)
            for parameter in policy.parameters():
                dist.all_reduce(parameter.grad)
            gradients = [parameter.grad.numpy().copy() for parameter in policy.parameters()]
            result[f"{loss} | {name}"] = passes, gradients, reduce_metrics(figures)
            policy.zero_grad()
    distributed.shutdown()
    return result


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_gradient_is_that_of_all_groups(tiny_model, ranks):
    """They agree to 1e-10 in float64, with fewer passes. The metrics are of the trained groups, the loss is of all."""
    found = run_ranks(ranks, updates, tiny_model)[0]
    for loss in LOSSES:
        (passes, expected, of_all), (fewer, gradients, skipped), (_, _, alone) = (
            found[f"{loss} | {name}"] for name in ("all", "skipped", "alone")
        )
        assert fewer < passes, loss
        for a, b in zip(expected, gradients, strict=True):
            assert np.linalg.norm(a - b) <= 1e-10 * np.linalg.norm(a) > 0, loss
        assert skipped.pop("loss") == pytest.approx(of_all["loss"], rel=1e-10) and of_all["loss"] != alone.pop("loss")
        assert skipped == pytest.approx(alone, rel=1e-10), loss
        assert skipped["entropy"] != pytest.approx(of_all["entropy"], rel=1e-3), "which groups it is of makes no matter"


@pytest.mark.parametrize(
    ("more", "skips"),
    [
        ({"beta": 0.0}, True),
        ({}, False),
        ({"beta": 0.0, "entropy_coef": 0.01}, False),
        ({"beta": 0.0, "use_adaptive_entropy": True}, False),
        ({"beta": 0.0, "top_entropy_quantile": 0.5}, False),
        ({"beta": 0.0, "loss_type": "tests.rewards_for_tests:pull"}, False),
    ],
)
def test_what_has_a_use_for_every_token_skips_nothing(more, skips):
    """This includes the default, which has a KL term."""
    assert GRPOConfig("unused", **more).skips_groups == skips


def test_a_step_without_signal_changes_nothing(tiny_model, problems, tmp_path):
    """It changes no weight and no moment or step count of AdamW; the schedule continues. A checkpoint after it, and a
    resume, change nothing either: the first step with signal is AdamW's first, of the size of the learning rate."""
    more = dict(beta=0, weight_decay=0.1, reward_funcs=["tests.rewards_for_tests:digits_from_the_third_step"])
    argv = options(tiny_model, problems, tmp_path / "whole", save_strategy="steps", save_steps=2, **more)
    again = flags(output_dir=tmp_path / "resumed", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    for name in (argv, argv + again):
        code, output = run(TRAIN, name, tmp_path / "log")
        assert code == 0, output
    for step in (1, 2):
        assert output.count(f"step {step}: no completion gives a gradient, so no weight is changed") == 1, output
    rows = metrics(tmp_path / "whole")
    assert [row["steps_skipped"] for row in rows] == [1, 2, 2]
    assert [row["grad_norm"] > 0 for row in rows] == ["entropy" in row for row in rows] == [False, False, True]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    folders = (tiny_model, tmp_path / "whole" / "checkpoint-2", tmp_path / "whole", tmp_path / "resumed")
    before, saved, after, resumed = map(weights, folders)
    for name, weight in before.items():
        assert (weight == saved[name]).all() and (after[name] == resumed[name]).all(), name
        if weight.ndim == 1:  # without weight decay
            assert (after[name] - weight).abs().max() == pytest.approx(1e-3 / 3, rel=1e-3), name


@pytest.mark.slow
def test_a_run_that_skips_is_the_run_that_does_not(tiny_model, problems, tmp_path):
    """Two mini-batches, twice, on two ranks; the first rank never has anything to train on."""
    more = dict(beta=0, prompts_per_step=2, num_iterations=2, steps_per_generation=2, max_steps=4)
    more |= dict(reward_funcs=["tests.rewards_for_tests:digits_of_odd_groups"])
    found = []
    for name, fault in (("skips", None), ("skips nothing", faults.skip_no_group)):
        argv = options(tiny_model, problems, tmp_path / name, **more)
        code, output = run(TRAIN, argv, tmp_path / "log", ranks=2, fault=fault)
        assert code == 0, output
        found.append(metrics(tmp_path / name))
    first, second = weights(tmp_path / "skips"), weights(tmp_path / "skips nothing")
    assert all((first[name] - second[name]).norm() < 1e-4 * second[name].norm() for name in first)
    for name in ("loss", "grad_norm", "num_tokens"):
        assert [row[name] for row in found[0]] == pytest.approx([row[name] for row in found[1]], rel=1e-3, abs=1e-6)
    assert all(a["entropy"] != pytest.approx(b["entropy"], rel=1e-4) for a, b in zip(*found, strict=True))
    assert all(row["frac_reward_zero_std"] == 0.5 and row["grad_norm"] > 0 for row in found[0])
