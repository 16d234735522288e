"""Packing of rollouts: what is scored, and that nothing else is."""

import math

import pytest
import torch

from grpo_core.batch import counted, keep_old_logps, make_micro_batches
from grpo_core.config import GRPOConfig
from grpo_core.rollout import Sample

CPU = torch.device("cpu")


def rollout(group, prompt, answer, reason="stop"):
    return Sample(group, prompt, answer, [-float(token) for token in answer], reason, version=0, advantage=float(group))


def test_the_sampled_stop_token_is_scored_and_no_prompt_token_is():
    """Invariant 5: 2 is the stop token here; the completion that was cut has none."""
    rollouts = [rollout(0, [5, 6, 2, 7], [8, 2]), rollout(1, [9, 2], [3, 4, 5], "length")]
    [batch] = make_micro_batches(rollouts, 100, CPU)
    sequences = batch.sequences
    scored = {s: sequences.targets[sequences.sequence_ids == s].tolist() for s in (0, 1)}
    assert sorted(scored.values()) == [[3, 4, 5], [8, 2]]
    # Each target stands right after the position that predicts it, in the same sequence.
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


def test_old_logps_survive_a_checkpoint():
    """What one packing computed reaches the same tokens in another."""
    rollouts = [rollout(i, [1, 1], list(range(3, 5 + i))) for i in range(6)]
    batches = make_micro_batches(rollouts, 8, CPU)
    for batch in batches:
        batch.old_logps = batch.sampler_logps * 0.5
    keep_old_logps(batches)
    [batch] = make_micro_batches(rollouts, 1000, CPU)
    assert torch.equal(batch.old_logps, batch.sampler_logps * 0.5)


def test_the_largest_share_of_a_rollout():
    """Groups are never split: of 5 on two ranks, one has 3."""
    config = GRPOConfig("unused", prompts_per_step=5, num_generations=8)
    assert [config.completions_a_rank(ranks) for ranks in (1, 2, 8)] == [40, 24, 8]
