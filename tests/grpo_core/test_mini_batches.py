"""Several optimizer steps on one rollout batch: all ratios are relative to the policy before the first of them."""

import pytest
import torch

from tests.grpo_core.test_invariance import make_rollouts
from tests.processes import run_ranks


def two_steps(model: str) -> dict[str, float]:
    """The relative difference between the second mini-batch's gradient, after a step on the first, and plain
    autograd's; how far the ratios of both are from 1; and the number of tokens in the mismatch."""
    from grpo_core.batch import deal, make_micro_batches
    from grpo_core.config import GRPOConfig
    from grpo_core.loss import policy_loss
    from grpo_core.metrics import TOKENS
    from grpo_core.update import score_ahead, update
    from sft_core.data.packing import step_counts
    from sft_core.model.parallel import Sharding, freeze, make_mesh, shard
    from sft_core.model.policy import load_policy
    from sft_core.run import distributed
    from sft_core.run.config import ModelConfig

    device = distributed.init_distributed(60)[3]
    config = GRPOConfig(output_dir="unused", beta=0.1, epsilon=10.0)
    policy, reference = (shard(load_policy(ModelConfig(model)), make_mesh(device), Sharding()) for _ in range(2))
    freeze(reference)
    rollouts = make_rollouts()
    for sample in rollouts:
        sample.old_logps = None
    first, second = (make_micro_batches(samples, 75, device) for samples in deal(rollouts, 4, 2))
    [whole] = make_micro_batches(deal(rollouts, 4, 2)[1], 10_000, device)
    with torch.no_grad():
        old, *_ = policy(whole.sequences)
    ahead = score_ahead(policy, reference, second, config.temperature)
    update(policy, reference, first, step_counts([batch.sequences for batch in first], device), config, True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 0.1 * parameter.grad
    policy.zero_grad()
    counts = step_counts([batch.sequences for batch in second], device)
    assert counts.num_sequences == 10 and len(second) > 1
    found = update(policy, reference, second, counts, config, False)
    gradients = [parameter.grad.full_tensor().clone() for parameter in policy.parameters()]
    policy.zero_grad()
    logps, *_ = policy(whole.sequences)
    loss, metrics = policy_loss(
        logps,
        old,
        whole.advantages,
        whole.sequences.sequence_ids,
        config.objective(),
        num_tokens=counts.num_tokens,
        num_sequences=counts.num_sequences,
        ref_logps=old,
        sampler_logps=whole.sampler_logps,
    )
    loss.backward()
    expected = [parameter.grad.full_tensor() for parameter in policy.parameters()]
    differences = [float((a - b).norm() / b.norm()) for a, b in zip(gradients, expected, strict=True)]
    distributed.shutdown()
    return {
        "gradient": max(differences),
        "moved": float((logps - old).abs().mean()),
        "kl": float(found["kl"] / metrics["kl"]),
        "tokens": float(ahead[TOKENS]) / sum(len(sample.completion_ids) for sample in rollouts[1::2]),
    }


def test_the_second_step_measures_itself_against_the_policy_that_sampled(tiny_model):
    [found] = run_ranks(1, two_steps, tiny_model)
    assert found.pop("moved") > 0.01
    assert found.pop("gradient") < 1e-5
    assert found == {"kl": pytest.approx(1), "tokens": 1}
