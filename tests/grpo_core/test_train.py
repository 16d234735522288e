"""Whole GRPO runs with the torch engine: the invariants of a training step that unit tests cannot check."""

import json
import math
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests import faults
from tests.launch import flags, metrics, run

TRAIN = "grpo_core.train"


def options(tiny_model, problems, output_dir, **more):
    base = dict(
        model_name_or_path=tiny_model,
        dataset_name=problems,
        output_dir=output_dir,
        engine="torch",
        max_steps=3,
        prompts_per_step=3,
        num_generations=4,
        max_prompt_length=100,
        max_completion_length=12,
        learning_rate=1e-3,
        max_tokens_per_micro_batch=150,
        system_prompt="",
        reward_funcs=["tests.rewards_for_tests:digits"],
        reward_num_workers=1,
        save_strategy="no",
        report_to=["none"],
    )
    return flags(**(base | more))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_every_parameter_changes_and_the_engine_follows(tiny_model, problems, tmp_path):
    """Invariants 2 and 3: engine and policy agree to float32 rounding after each sync; a step moves every tensor."""
    code, output = run(TRAIN, options(tiny_model, problems, tmp_path / "out", max_steps=2), tmp_path / "log")
    assert code == 0, output
    before, after = weights(tiny_model), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all((before[name] != after[name]).any() for name in before)
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows)
    assert all(row["effective_groups"] >= 1 and row["grad_norm"] > 0 for row in rows)


def test_logged_learning_rate_is_the_one_used(tiny_model, problems, tmp_path):
    """Invariant 8: with a warm-up of two steps the rates are 0, 1/2, 1 of the peak, and a rate of 0 moves nothing."""
    argv = options(tiny_model, problems, tmp_path / "out", lr_scheduler_type="constant_with_warmup", warmup_steps=2)
    code, output = run(TRAIN, argv, tmp_path / "log")
    assert code == 0, output
    assert [row["learning_rate"] for row in metrics(tmp_path / "out")] == [0, 5e-4, 1e-3]
    code, output = run(TRAIN, argv + flags(max_steps=1, output_dir=tmp_path / "one"), tmp_path / "log1")
    assert code == 0, output
    before, after = weights(tiny_model), weights(tmp_path / "one")
    assert all((before[name] == after[name]).all() for name in before)


def test_an_engine_that_sleeps_wakes_with_fresh_weights(tiny_model, problems, tmp_path):
    """The run is bitwise the same, with an evaluation between two updates on one rollout."""
    more = dict(max_steps=4, num_iterations=2, eval_strategy="steps", eval_steps=1, dataset_test_split=problems)
    steps = []
    for name, sleeps in (("awake", "false"), ("asleep", "true")):
        argv = options(tiny_model, problems, tmp_path / name, vllm_enable_sleep_mode=sleeps, **more)
        code, output = run(TRAIN, argv, tmp_path / f"{name}.log")
        assert code == 0, output
        keys = ("loss", "grad_norm", "kl", "eval_rewards/digits/mean", "sampling/sampling_logp_difference/max")
        steps.append([{key: row[key] for key in keys if key in row} for row in metrics(tmp_path / name)])
    assert steps[0] == steps[1] and any("eval_rewards/digits/mean" in row for row in steps[0])
    argv = options(tiny_model, problems, tmp_path / "stale", vllm_enable_sleep_mode="true")
    code, output = run(TRAIN, argv, tmp_path / "stale.log", fault=faults.wake_with_the_old_weights)
    assert code == 1 and "tensors did not arrive" in output, output


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (faults.skip_sync, "tensors did not arrive"),
        (faults.drop_a_tensor, "nothing was written to 1 of the engine's parameters (the first is 'model.norm.weight'"),
        (
            faults.write_nothing_to_the_head,
            "nothing was written to 1 of the engine's parameters (the first is 'lm_head",
        ),
        (faults.exchange_two_layers, "parameters of the engine are not what was sent"),
        (faults.swap_two_tensors, "2 parameters of the engine are not what was sent"),
        (faults.wrong_temperature, "more than 0.001"),
        (faults.targets_off_by_one, "more than 0.001"),
        (faults.mask_the_stop_token, "tokens were sampled, "),
    ],
)
def test_injected_faults_stop_the_run(tiny_model, problems, tmp_path, fault, message):
    """Invariant 4: each way of sampling from, or scoring, something other than the policy ends the run."""
    argv = options(tiny_model, problems, tmp_path / "out", max_logp_difference=1e-3)
    code, output = run(TRAIN, argv, tmp_path / "log", fault=fault)
    assert code == 1
    assert message in output, output
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_stops_every_rank_before_the_step(tiny_model, problems, tmp_path, ranks):
    """Invariant 7: the fault is only on the first rank, in the second step."""
    argv = options(tiny_model, problems, tmp_path / "out", save_strategy="steps", save_steps=1, prompts_per_step=4)
    code, output = run(TRAIN, argv, tmp_path / "log", ranks=ranks, fault=faults.nan_in_the_second_step)
    assert code == 1 and output.count("is not finite, so the step was not taken") >= ranks
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1"]


RECORDED = dict(max_steps=4, num_iterations=2, beta=0.1, prompts_per_step=4, epsilon=0.01)  # with KL and clipping


@pytest.fixture(scope="module")
def recorded(tiny_model, problems, tmp_path_factory):
    """The folder of a run that recorded its rollouts."""
    folder = tmp_path_factory.mktemp("recorded") / "out"
    argv = options(tiny_model, problems, folder, save_rollouts=folder.with_name("rollouts"), **RECORDED)
    code, output = run(TRAIN, argv, folder.with_name("log"))
    assert code == 0, output
    return folder


def test_a_rank_that_hangs_ends_the_job(tiny_model, problems, recorded, tmp_path):
    """Invariant 7: the watchdog of each rank prints all stacks and ends it."""
    # A replay, since sampling and scoring may start slowly on a busy machine.
    more = RECORDED | dict(rollouts_from=recorded.with_name("rollouts"), ddp_timeout=20)
    argv = options(tiny_model, problems, tmp_path / "out", **more)
    code, output = run(TRAIN, argv, tmp_path / "log", ranks=2, fault=faults.hang_on_the_last_rank, timeout=240)
    assert code != 0 and re.search(r"\bhang\b", output), output  # both ranks print at the same time


def test_replay_is_bitwise_the_recorded_run(tiny_model, problems, recorded, tmp_path):
    """Two updates per rollout: on one rank as recorded, with the default given explicitly, and on two ranks."""
    more = RECORDED | dict(rollouts_from=recorded.with_name("rollouts"), steps_per_generation=1)
    replay = options(tiny_model, problems, tmp_path / "again", **more)
    code, output = run(TRAIN, replay, tmp_path / "log2")
    assert code == 0, output
    first, second = weights(recorded), weights(tmp_path / "again")
    assert all((first[name] == second[name]).all() for name in first)
    rows, again = metrics(recorded), metrics(tmp_path / "again")
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]
    assert rows[1]["clip_ratio/region_mean"] > 0 == rows[0]["clip_ratio/region_mean"]
    assert rows[1]["kl"] > 0 and not math.isnan(rows[1]["loss"])

    code, output = run(TRAIN, replay + flags(output_dir=tmp_path / "two"), tmp_path / "log3", ranks=2)
    assert code == 0, output
    third = weights(tmp_path / "two")
    for name in first:
        assert (first[name] - third[name]).norm() < 1e-4 * first[name].norm(), name


def test_the_adaptive_entropy_goes_on_as_it_was(tiny_model, problems, recorded, tmp_path):
    """A checkpoint between two updates on a rollout keeps the coefficient, its effective value and the kept tokens."""
    adaptive = dict(use_adaptive_entropy="true", entropy_coef=0.01, entropy_coef_delta=0.02, entropy_target=100)
    more = RECORDED | adaptive | dict(top_entropy_quantile=0.5, save_strategy="steps", save_steps=3)
    more |= dict(rollouts_from=recorded.with_name("rollouts"), max_logp_difference=10)
    code, output = run(TRAIN, options(tiny_model, problems, tmp_path / "whole", **more), tmp_path / "log")
    assert code == 0, output
    rows = metrics(tmp_path / "whole")
    assert [row["entropy_coef"] for row in rows] == pytest.approx([0.03, 0.05, 0.07, 0.09])
    for row, applied in zip(rows, [0.0, 0.03, 0.05, 0.07], strict=True):
        assert row["policy_loss"] - row["loss"] == pytest.approx(applied * row["entropy_kept"], abs=1e-6)
        assert row["entropy_kept"] > row["entropy"]
    more |= dict(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3")
    code, output = run(TRAIN, options(tiny_model, problems, tmp_path / "resumed", **more), tmp_path / "log2")
    assert code == 0, output
    [row] = metrics(tmp_path / "resumed")
    assert all(row[name] == rows[3][name] for name in ("step", "loss", "policy_loss", "entropy_coef", "entropy_kept"))
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all((first[name] == second[name]).all() for name in first)


def test_stale_rollouts_are_refused(tiny_model, problems, tmp_path):
    import pyarrow.parquet as pq

    stops, record = list(range(10, 100, 2)), dict(save_rollouts=tmp_path / "rollouts", max_steps=2)
    more = dict(shuffle_dataset="false", generation_kwargs=json.dumps({"stop_token_ids": stops}))
    assert run(TRAIN, options(tiny_model, problems, tmp_path / "out", **record, **more), tmp_path / "log")[0] == 0
    first, second = (tmp_path / "rollouts" / f"step-00000{i}-rank-00000.parquet" for i in (1, 2))
    samples = [sample for file in (first, second) for sample in pq.read_table(file).to_pylist()]
    for sample in samples:  # an additional stop token ends a completion and is its last token
        *before, last = sample["completion_ids"]
        assert not set(before).intersection(stops) and (sample["finish_reason"] == "stop") == (last in [*stops, 2])
    assert {sample["finish_reason"] for sample in samples} == {"stop", "length"}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    shown = dict.fromkeys(tokenizer.decode(sample["prompt_ids"]) for sample in samples)  # in the order of the data set
    rows = [json.loads(line) for line in Path(problems).read_text().splitlines()[:6]]
    assert all(row["prompt"] in text for row, text in zip(rows, shown, strict=True))
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] in (2, [2])
    second.write_bytes(first.read_bytes())
    replay = options(tiny_model, problems, tmp_path / "again", rollouts_from=tmp_path / "rollouts", max_steps=3)
    code, output = run(TRAIN, replay, tmp_path / "log2")
    assert code == 1 and "rollouts of policy version [0] cannot train version 1" in output
    second.unlink()
    code, output = run(TRAIN, replay + flags(output_dir=tmp_path / "more"), tmp_path / "log3")
    assert code == 1 and "step-000002-rank-00000.parquet is not in" in output


def test_what_more_ranks_recorded_earlier_is_not_replayed(tiny_model, problems, tmp_path):
    record = dict(save_rollouts=tmp_path / "rollouts", max_steps=1)
    for ranks in (2, 1):
        argv = options(tiny_model, problems, tmp_path / f"out{ranks}", **record)
        assert run(TRAIN, argv, tmp_path / "log", ranks=ranks)[0] == 0
    assert len(list((tmp_path / "rollouts").iterdir())) == 2
    replay = options(tiny_model, problems, tmp_path / "again", rollouts_from=tmp_path / "rollouts", max_steps=1)
    assert run(TRAIN, replay, tmp_path / "log2")[0] == 0
    assert metrics(tmp_path / "again")[0]["num_tokens"] == metrics(tmp_path / "out1")[0]["num_tokens"]
    assert metrics(tmp_path / "again")[0]["loss"] == metrics(tmp_path / "out1")[0]["loss"]


@pytest.mark.parametrize(
    "more",
    [
        {"prompts_per_step": 3, "max_tokens_per_micro_batch": 60, "top_entropy_quantile": 0.5, "loss_type": "vespo"},
        {"prompts_per_step": 1, "multi_objective_aggregation": "normalize_then_sum"},
        {
            "mask_truncated_completions": "true",
            "entropy_coef": 0.01,
            "loss_type": "dr_grpo",
            "top_entropy_quantile": 0.5,
            "use_adaptive_entropy": "true",
        },
        {"bf16": "true", "gradient_checkpointing": "true", "importance_sampling_level": "sequence"},
    ],
    ids=["uneven micro-batches", "a rank without prompts", "truncated ones masked", "bf16 and checkpointing"],
)
def test_uneven_ranks_stay_in_step(tiny_model, problems, tmp_path, more):
    """Two updates per rollout with a reference model: all ranks make the same number of passes, whatever their work."""
    base = dict(max_steps=4, num_iterations=2, beta=0.1, logging_steps=2, ddp_timeout=60, save_rollouts=tmp_path / "r")
    code, output = run(
        TRAIN, options(tiny_model, problems, tmp_path / "out", **(base | more)), tmp_path / "log", ranks=2
    )
    assert code == 0, output
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [2, 4]
    # Each log line describes its rollout, also at a later update on it.
    expected = {"reward", "completions/mean_length"}
    masked = "mask_truncated_completions" in more  # here no token is left, so nothing is trained
    if not masked:
        expected |= {"kl", "sampling/sampling_logp_difference/mean"}
    assert all(expected <= row.keys() and math.isfinite(row["loss"]) for row in rows)
    assert [row["steps_skipped"] for row in rows] == [2 * masked, 4 * masked]


@pytest.mark.slow
def test_a_step_on_eight_ranks(tiny_model, problems, tmp_path):
    """There are more ranks than prompts: three of them sample nothing but still take part."""
    argv = options(tiny_model, problems, tmp_path / "out", max_steps=1, prompts_per_step=5)
    code, output = run(TRAIN, argv, tmp_path / "log", ranks=8)
    assert code == 0, output
    [row] = metrics(tmp_path / "out")
    assert (
        0 < row["effective_groups"] <= 5
        and row["grad_norm"] > 0
        and row["sampling/sampling_logp_difference/max"] < 1e-4
    )


@pytest.mark.slow
def test_evaluation_repeats_itself_on_any_number_of_ranks(tiny_model, problems, tmp_path):
    """At a learning rate of 0 the same prompts and seeds give the same metrics, and training is not affected."""
    more = dict(max_steps=2, learning_rate=0, prompts_per_step=2)
    code, output = run(TRAIN, options(tiny_model, problems, tmp_path / "plain", **more), tmp_path / "log")
    assert code == 0, output
    more |= dict(eval_strategy="steps", dataset_test_split=problems, num_generations_eval=2, eval_on_start="true")
    more |= dict(save_strategy="steps", save_steps=1, load_best_model_at_end="true", metric_for_best_model="reward")
    found = []
    for ranks in (1, 2):
        argv = options(tiny_model, problems, tmp_path / f"out{ranks}", **more)
        code, output = run(TRAIN, argv, tmp_path / f"log{ranks}", ranks=ranks)
        assert code == 0, output
        rows = metrics(tmp_path / f"out{ranks}")
        found += [row for row in rows if "eval_reward" in row]
        if ranks == 1:
            trained = [row["reward"] for row in rows if "reward" in row]
            assert trained == [row["reward"] for row in metrics(tmp_path / "plain")]
        state = json.loads((tmp_path / f"out{ranks}" / "trainer_state.json").read_text())
        best = tmp_path / f"out{ranks}" / "checkpoint-1"  # the second checkpoint is not better
        assert (state["best_metric"], state["best_model_checkpoint"]) == (found[-1]["eval_reward"], str(best))
    assert [row["step"] for row in found] == [0, 1, 2] * 2 and found[0]["eval_samples"] == 24
    names = ("eval_reward", "eval_rewards/digits/mean", "eval_completions/mean_length")
    assert len({tuple(round(row[name], 9) for name in names) for row in found}) == 1


def test_rows_whose_gold_cannot_be_parsed_are_left_out(tiny_model, tmp_path):
    golds = ["63", "It depends on the weather", r"\boxed{7}", ""]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Ben has {g}.", "solution": g}) + "\n" for g in golds))
    argv = options(tiny_model, data, tmp_path / "out", max_steps=1, reward_funcs=["accuracy"])
    code, output = run(TRAIN, argv, tmp_path / "log")
    assert code == 0 and "2 prompts; left out: 0 longer than 100 tokens, 2 whose gold answer" in output, output
    more = flags(drop_unparseable_golds="false", output_dir=tmp_path / "all", dataset_test_split=data, do_eval="true")
    code, output = run(TRAIN, argv + more, tmp_path / "log1")
    assert code == 0 and "4 prompts; left out: 0 longer than 100 tokens; 4 for evaluation" in output, output
    assert metrics(tmp_path / "all")[-1]["eval_rewards/accuracy_reward/mean"] == 0.0  # over samples with a gold


def test_a_short_run_learns(tiny_model, problems, tmp_path):
    """Invariant 12: after 20 steps a tiny model with random weights writes more digits."""
    argv = options(tiny_model, problems, tmp_path / "out", max_steps=20, num_generations=8, learning_rate=5e-3)
    code, output = run(TRAIN, argv, tmp_path / "log")
    assert code == 0, output
    rewards = [row["rewards/digits/mean"] for row in metrics(tmp_path / "out")]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5]), rewards
