"""Packing of rollouts: exactly the right tokens are scored."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from grpo_core.batch import MiniBatch, counted, deal, idle_micro_batch, keep_logps, make_micro_batches
from grpo_core.config import GRPOConfig
from grpo_core.rollout import Sample, read_rollouts

CPU = torch.device("cpu")


def rollout(group, prompt, answer, reason="stop", index=0):
    logps, advantage = [-float(token) for token in answer], float(group)
    return Sample(group, prompt, answer, logps, reason, version=0, advantage=advantage, index=index)


def test_the_sampled_stop_token_is_scored_and_no_prompt_token_is():
    """Invariant 5: the stop token is 2 here; the completion that was cut off has none."""
    rollouts = [rollout(0, [5, 6, 2, 7], [8, 2]), rollout(1, [9, 2], [3, 4, 5], "length")]
    [batch] = make_micro_batches(rollouts, 100, CPU)
    sequences = batch.sequences
    scored = {s: sequences.targets[sequences.sequence_ids == s].tolist() for s in (0, 1)}
    assert sorted(scored.values()) == [[3, 4, 5], [8, 2]]
    # Each target is right after the position that predicts it, in the same sequence.
    assert torch.equal(sequences.input_ids[0, sequences.rows + 1], sequences.targets)
    assert torch.equal(batch.sampler_logps, -sequences.targets.float())
    assert torch.equal(batch.advantages[sequences.sequence_ids][sequences.targets == 8], torch.tensor([0.0]))
    assert sorted(batch.positions.tolist()) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(("mask_truncated", "tokens", "sequences"), [(False, 5, 2), (True, 2, 1)])
def test_what_is_cut_can_be_left_out_and_what_is_unscored_counts(mask_truncated, tokens, sequences):
    rollouts = [rollout(0, [5], [8, 2]), rollout(0, [5], [3, 4, 5], "length")]
    assert all(math.isnan(sample.reward) for sample in rollouts)
    [batch] = make_micro_batches(counted(rollouts, mask_truncated), 100, CPU)
    assert (len(batch.sequences.targets), batch.sequences.num_sequences) == (tokens, sequences)


@pytest.mark.parametrize("budget", [1, 7, 12, 1000])
def test_sequences_are_never_split_and_budgets_are_kept(budget):
    rollouts = [rollout(i, [1] * (1 + i % 4), list(range(3, 5 + i % 5))) for i in range(20)]
    batches = make_micro_batches(rollouts, budget, CPU)
    assert sorted(id(r) for b in batches for r in b.samples) == sorted(id(r) for r in rollouts)
    for batch in batches:
        tokens = batch.sequences.input_ids.shape[1]
        assert tokens <= budget or len(batch.samples) == 1
        assert tokens == sum(len(r.prompt_ids) + len(r.completion_ids) for r in batch.samples)


def test_old_and_reference_logps_survive_a_checkpoint():
    """Log-probs that one packing computed belong to the same tokens in another."""
    rollouts = [rollout(i, [1, 1], list(range(3, 5 + i))) for i in range(6)]
    batches = make_micro_batches(rollouts, 8, CPU)
    for batch in batches:
        batch.old_logps, batch.ref_logps = batch.sampler_logps * 0.5, batch.sampler_logps * 0.25
    keep_logps([MiniBatch(batches[:1]), MiniBatch(batches[1:])])
    [batch] = make_micro_batches(rollouts, 1000, CPU)
    assert torch.equal(batch.old_logps, batch.sampler_logps * 0.5)
    assert torch.equal(batch.ref_logps, batch.sampler_logps * 0.25)


def test_of_recorded_log_probs_no_rank_makes_a_pass():
    """Each pass is a collective, so after a resume even a rank that is idle or has empty completions makes none."""
    empty = rollout(0, [1], [])
    empty.old_logps, empty.ref_logps = [], []
    [batch] = make_micro_batches([empty], 100, CPU)
    for scored in (batch, idle_micro_batch(CPU, scored=True)):
        assert scored.old_logps.tolist() == scored.ref_logps.tolist() == []
    new = idle_micro_batch(CPU)
    assert new.old_logps is None and new.ref_logps is None


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("groups", "size", "mini_batches"), [(6, 4, 1), (6, 4, 2), (3, 4, 4), (5, 7, 3), (1, 8, 4)])
def test_mini_batches_are_equal_parts_of_every_group_whatever_the_ranks(groups, size, mini_batches, ranks):
    rollouts = [rollout(group, [1], [group, k], index=k) for group in range(groups) for k in range(size)]
    shares = [deal([r for r in rollouts if r.group % ranks == rank], size, mini_batches) for rank in range(ranks)]
    found = [[r for share in shares for r in share[i]] for i in range(mini_batches)]
    alone = deal(rollouts, size, mini_batches)
    assert [sorted(map(id, part)) for part in found] == [sorted(map(id, part)) for part in alone]
    assert sorted(id(r) for part in alone for r in part) == sorted(map(id, rollouts))
    counts = [[sum(r.group == group for r in part) for part in alone] for group in range(groups)]
    for numbers in (*counts, [len(part) for part in alone]):
        assert max(numbers) - min(numbers) <= 1
    assert mini_batches > 1 or alone == [rollouts]


def test_the_largest_share_of_a_rollout():
    """Groups are never split: of 5 on two ranks, one has 3."""
    config = GRPOConfig("unused", prompts_per_step=5, num_generations=8)
    assert [config.completions_a_rank(ranks) for ranks in (1, 2, 8)] == [40, 24, 8]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (2, 1)),  # 8 per device on two ranks
        ({"gradient_accumulation_steps": 4}, (8, 1)),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 4}, (8, 1)),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 12}, (24, 3)),
        ({"gradient_accumulation_steps": 4, "generation_batch_size": 192}, (24, 3)),
        ({"per_device_train_batch_size": 1, "steps_per_generation": 4}, (1, 4)),  # steps smaller than a group
        ({"per_device_train_batch_size": 3, "steps_per_generation": 3}, (3, 3)),  # 18 completions, rounded up
        ({"prompts_per_step": 5, "steps_per_generation": 2}, (10, 2)),
        ({"prompts_per_step": 5, "generation_batch_size": 80}, (10, 2)),
        ({"generation_batch_size": 24}, "must be a multiple of num_generations 8 and of the 16 completions that an"),
        ({"per_device_train_batch_size": 2, "generation_batch_size": 12}, "takes: give 8, or"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "a multiple of gradient_accumulation_steps 4"),
        ({"steps_per_generation": 2, "generation_batch_size": 16}, "set the same thing: give only one"),
    ],
)
def test_prompts_and_optimizer_steps_of_a_rollout(options, expected):
    """On two ranks, counted like TRL if TRL accepts them: B x ranks x steps_per_generation completions per rollout."""
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            GRPOConfig("unused", **options).mini_batches(2)
    else:
        config = GRPOConfig("unused", **options)
        assert (config.prompts_a_rollout(2), config.mini_batches(2)) == expected


def test_a_recording_of_another_version_is_refused(tmp_path):
    table = pa.table({"group": [0]}).replace_schema_metadata({"ranks": "1"})
    pq.write_table(table, tmp_path / "step-000001-rank-00000.parquet")
    with pytest.raises(ValueError, match="step-000001-rank-00000.parquet has another format: record it again"):
        read_rollouts(tmp_path, 1)
