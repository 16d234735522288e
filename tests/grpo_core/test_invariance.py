"""Invariant 1: the gradient of a step does not depend on how it is split into micro-batches and ranks."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.processes import run_ranks

LOSSES = {
    "grpo": {},
    "grpo, kl": {"beta": 0.1},
    "grpo, delta": {"delta": 1.5},
    "grpo, sequence ratio": {"importance_sampling_level": "sequence"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo, entropy bonus": {"loss_type": "bnpo", "entropy_coef": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sampler's log-probs as old": {"old_logps": "sampler"},
    "sapo, unbiased kl": {"loss_type": "sapo", "beta": 0.1, "use_bias_correction_kl": True},
    "luspo, sequence_mask": {
        "loss_type": "luspo",
        "importance_sampling_level": "sequence",
        "vllm_importance_sampling_mode": "sequence_mask",
        "vllm_importance_sampling_clip_min": 0.7,
        "vllm_importance_sampling_clip_max": 1.3,
    },
    "vespo, token_mask": {
        "loss_type": "vespo",
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_max": 1.1,
    },
    "first update, sequence_truncate": {
        "vllm_importance_sampling_mode": "sequence_truncate",
        "vllm_importance_sampling_clip_min": 0.5,
    },
    "off-policy mask": {"off_policy_mask_threshold": 0.02},
    "high entropies": {"top_entropy_quantile": 0.3},
    "high entropies, sequence ratio, entropy bonus": {
        "top_entropy_quantile": 0.3,
        "entropy_coef": 0.1,
        "importance_sampling_level": "sequence",
    },
    "a function of one's own": {"loss_type": "tests.rewards_for_tests:reinforce"},
    "a function of one's own, without advantages": {"loss_type": "tests.rewards_for_tests:pull"},
    "grpo, the second of two mini-batches": {"steps_per_generation": 2},
}
# Tokens per micro-batch (sequences have about 25), and whether prompts are shared: most groups then fit, some are
# split.
BUDGETS = {"one": (1, False), "three": (75, False), "all": (10_000, False), "shared": (75, True)}
# Rounding in float32 takes this loss's gradient 6e-6 (plain) and 8e-6 (shared) away from that in float64, where the two
# are equal to 1e-10 (test_share_prompts.py).
ROUNDING = {("sapo, unbiased kl", "shared"): 2e-5}


def make_rollouts():
    """Five groups of four completions of 1 to 20 tokens, with log-probs close to the policy's."""
    from grpo_core.rollout import Sample

    rng = random.Random(0)
    rollouts = []
    for group in range(5):
        prompt = [rng.randrange(5, 200) for _ in range(rng.randint(5, 15))]
        for i in range(4):
            answer = [rng.randrange(5, 200) for _ in range(rng.randint(1, 20))]
            logps = [rng.uniform(-9, -6) for _ in answer]
            old = [logp + rng.gauss(0, 0.1) for logp in logps]
            advantage = rng.gauss(0, 1)
            rollouts.append(Sample(group, prompt, answer, logps, "stop", 0, 0, [], advantage, i, old_logps=old))
    return rollouts


def gradients(model: str) -> dict[str, dict[str, np.ndarray]]:
    """On each rank, the full gradient of the step for every loss and budget, by "loss | budget"."""
    from grpo_core.batch import deal, idle_micro_batch, make_micro_batches
    from grpo_core.config import GRPOConfig
    from grpo_core.update import update
    from sft_core.data.packing import step_counts
    from sft_core.model.parallel import Sharding, freeze, make_mesh, shard
    from sft_core.model.policy import load_policy
    from sft_core.run import distributed
    from sft_core.run.config import ModelConfig

    rank, world_size, _, device = distributed.init_distributed(60)
    policy = shard(load_policy(ModelConfig(model)), make_mesh(device), Sharding())
    reference = load_policy(ModelConfig(model))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.01)
    freeze(reference)
    reference = shard(reference, make_mesh(device), Sharding())
    result = {}
    for name, options in LOSSES.items():
        config = GRPOConfig(output_dir="unused", **({"beta": 0.0} | options))
        for budget, (tokens, share_prompts) in BUDGETS.items():
            own = [r for r in make_rollouts() if r.group % world_size == rank]
            if config.old_logps == "sampler" or "first update" in name:
                for rollout in own:
                    rollout.old_logps = None
            if "without advantages" in name:
                for rollout in own:
                    rollout.advantage = 0.0
            own = deal(own, 4, config.mini_batches(world_size))[-1]
            random.Random(budget).shuffle(own)  # another packing order, too
            batches = make_micro_batches(own, tokens, device, share_prompts)
            counts = step_counts([batch.sequences for batch in batches], device)
            idle = counts.micro_batches - len(batches)
            assert idle <= 1, "there is as much to do on each rank"
            batches += [idle_micro_batch(device)] * idle
            if budget == "one":  # together with one of the other rank
                batches.insert(rank * len(batches), idle_micro_batch(device))
            figures = update(policy, reference if config.beta else None, batches, counts, config, first_use=True)
            loss = figures["loss"].clone()
            dist.all_reduce(loss)
            result[f"{name} | {budget}"] = {
                parameter: p.grad.full_tensor().numpy().copy() for parameter, p in policy.named_parameters()
            } | {"loss": loss.numpy()}
            policy.zero_grad()
    distributed.shutdown()
    return result


@pytest.fixture(scope="module")
def by_ranks(tiny_model):
    return {ranks: run_ranks(ranks, gradients, tiny_model)[0] for ranks in (1, 2)}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_is_the_same_for_every_split(by_ranks, loss, budget, ranks):
    expected, found = by_ranks[1][f"{loss} | all"], by_ranks[ranks][f"{loss} | {budget}"]
    assert expected.keys() == found.keys()
    for name in expected:
        norm = np.linalg.norm(expected[name])
        assert norm > 0, f"{name} has no gradient: nothing is compared"
        bound = ROUNDING.get((loss, budget), 1e-5)
        assert np.linalg.norm(expected[name] - found[name]) < bound * norm, name


def test_losses_differ_from_each_other(by_ranks):
    """Otherwise the test above could compare a loss with itself; dapo and bnpo differ only in options."""
    losses = [float(by_ranks[1][f"{loss} | all"]["loss"]) for loss in LOSSES]
    assert len({round(loss, 6) for loss in losses}) == len(losses)
