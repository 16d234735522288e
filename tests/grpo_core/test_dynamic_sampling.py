"""Dynamic sampling: which groups have spread, which of them are used, and that such a run resumes."""

import math

import pytest

from grpo_core import rounds
from grpo_core.config import GRPOConfig
from grpo_core.rollout import Sample, Summary
from tests.grpo_core.test_train import TRAIN, options, weights
from tests.launch import flags, metrics, run

NAN = math.nan
TENTH = 0.1  # in floating point, the mean of three of them is another number


def a_batch(prompts, *rewards_of_rounds, **more):
    """Rounds of groups with these rewards, all of one rank, passed in the order in which they are ready."""
    batch = rounds.Rounds(prompts, GRPOConfig("unused", dynamic_sampling=True, **more))
    for groups in rewards_of_rounds:
        assert batch.go_on and len(groups) == prompts
        numbered = reversed([*enumerate(groups, batch.sampled)])
        batch.add([Sample(g, [], [], [], "stop", 0, r, [r, -r]) for g, rewards in numbered for r in rewards])
    return batch


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    def gather(samples):
        return [Summary(s.group, 1, "stop", s.reward, s.rewards) for s in samples]

    monkeypatch.setattr(rounds, "gather_summaries", gather)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize(
    ("rewards", "spread"),
    [
        ([1, 0, 0, 0], True),
        ([1, 1, 0, 1], True),
        ([0.1 + 0.2, 0.3, 0.3, 0.3], True),
        ([1e-300, 0, 0, 0], True),
        ([NAN, 1, 0, NAN], True),
        ([TENTH] * 3, False),
        ([TENTH] * 4, False),
        ([0, 0, 0, 0], False),
        ([NAN, 1, 1, 1], False),
        ([NAN, NAN, NAN, 1], False),
        ([NAN] * 4, False),
    ],
)
def test_spread_is_that_scored_rewards_are_not_exactly_equal(rewards, spread, scale_rewards):
    """Spread is that of the whole group: the zeros of [1, 0, 0, 0] are not a separate group."""
    batch = a_batch(1, [rewards], scale_rewards=scale_rewards)
    assert [s.reward for s in batch.samples] == pytest.approx(rewards, nan_ok=True)
    assert batch.used == [0] * spread and batch.go_on != spread


def test_each_reward_is_looked_at_where_each_is_compared():
    """With GDPO, [1, 0] and [0, 1] have spread although their sums are equal."""
    for aggregation, used in (("sum_then_normalize", []), ("normalize_then_sum", [0])):
        config = GRPOConfig("unused", dynamic_sampling=True, multi_objective_aggregation=aggregation)
        config.reward_weights = [2.0, 1.0]
        batch = rounds.Rounds(1, config)
        batch.add([Sample(0, [], [], [], "stop", 0, 2.0, values) for values in ([1.0, 0.0], [0.5, 1.0], [0.5, 1.0])])
        assert batch.used == used


def test_used_are_the_first_in_the_order_of_prompts():
    good, bad = [1, 0], [1, 1]
    batch = a_batch(3, [bad, bad, good], [bad, good, bad], [good, good, bad])
    assert not batch.go_on and batch.used == [2, 4, 6]
    assert sorted({s.group for s in batch.rollouts()}) == [0, 1, 2] and len(batch.rollouts()) == 6
    assert len(batch.summaries) == 18, "metrics of rewards are of all that was sampled"
    assert batch.metrics() == {
        "dynamic_sampling/rounds": 3, "dynamic_sampling/groups_sampled": 9, "dynamic_sampling/groups_used": 3,
    }  # fmt: skip


def test_after_the_last_round_fewer_groups_do_and_none_ends_the_run():
    batch = a_batch(2, [[1, 1], [0, 1]], dynamic_sampling_max_batches=1)
    assert not batch.go_on and {s.group for s in batch.rollouts()} == {0}
    batch = a_batch(2, [[1, 1], [0, 0]], [[1, 1], [NAN, 1]], dynamic_sampling_max_batches=2)
    with pytest.raises(RuntimeError, match="none of 4 groups sampled for a step has rewards that differ"):
        assert not batch.go_on and batch.rollouts()


def test_without_the_option_all_of_one_round_is_used():
    batch = rounds.Rounds(2, GRPOConfig("unused"))
    samples = [Sample(group, [], [], [], "stop", 0, 1.0, [1.0]) for group in (0, 0, 1, 1)]
    batch.add(samples)
    assert not batch.go_on and batch.rollouts() == samples


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"dynamic_sampling_max_batches": 3}, "it needs dynamic_sampling"),
        ({"dynamic_sampling": True, "dynamic_sampling_max_batches": 0}, "dynamic_sampling_max_batches"),
    ],
)
def test_what_makes_no_sense_is_refused(more, says):
    with pytest.raises(ValueError, match=says):
        GRPOConfig("unused", **more).check()


def test_a_run_resumes_from_within_a_rollout_and_does_not_depend_on_the_ranks(tiny_model, problems, tmp_path):
    """A third of the groups have spread. The resumed run is bitwise equal on the same number of ranks, and uses the
    same groups on one rank. At the end no group has spread: the run reports it and keeps its last step."""
    more = dict(dynamic_sampling="true", prompts_per_step=3, num_iterations=2, max_steps=6, beta=0)
    more |= dict(lr_scheduler_type="constant", reward_funcs=["tests.rewards_for_tests:digits_of_a_third"])
    argv = {name: options(tiny_model, problems, tmp_path / name, **more) for name in ("two", "again", "one")}
    argv["two"] += flags(save_strategy="steps", save_steps=1)
    argv["again"] += flags(resume_from_checkpoint=tmp_path / "two" / "checkpoint-1")
    for name, ranks in (("two", 2), ("again", 2), ("one", 1)):
        code, output = run(TRAIN, argv[name], tmp_path / f"{name}.log", ranks=ranks)
        assert code == 1 and "0 of 30 groups have rewards that differ" in output, output
        assert "none of 30 groups sampled for a step has rewards that differ" in output, output
    two, again, one = ([*metrics(tmp_path / name)] for name in argv)
    assert [row["step"] for row in two] == [1, 2, 3, 4] and [row["step"] for row in again] == [2, 3, 4]
    assert [row["loss"] for row in again] == [row["loss"] for row in two[1:]]
    first, second = (weights(tmp_path / name / "checkpoint-4") for name in ("two", "again"))
    assert all((first[name] == second[name]).all() for name in first)
    for a, b in zip(two, one, strict=True):
        assert a["dynamic_sampling/rounds"] > 1 and a["dynamic_sampling/groups_used"] == 3
        assert a["frac_reward_zero_std"] == 1 - a["effective_groups"] / a["dynamic_sampling/groups_sampled"] > 0
        for name in ("dynamic_sampling/groups_sampled", "epoch", "num_tokens", "effective_groups"):
            assert a[name] == b[name], name
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
