"""GRPO with adapters: the engine samples from the merged policy, and the reference is the policy without them."""

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.grpo_core.test_train import TRAIN, options, weights
from tests.launch import metrics, run
from tests.processes import run_ranks

LORA = dict(use_peft="true", lora_r=4, lora_dropout=0.2, merge_adapter="true", beta=0.1, max_steps=3)


@pytest.mark.parametrize(
    "more",
    [
        {"lora_modules_to_save": ["lm_head"], "num_iterations": 2},
        {
            "load_in_4bit": "true",
            "use_dora": "true",
            "ranks": 2,
            "gradient_checkpointing": "true",
            "prompts_per_step": 4,
        },
    ],
    ids=["lora", "4bit-2-ranks"],
)
def test_policy_is_what_is_sampled_and_reference_what_it_was(tiny_model, problems, tmp_path, more):
    ranks = more.get("ranks", 1)
    argv = options(tiny_model, problems, tmp_path / "out", **(LORA | {k: v for k, v in more.items() if k != "ranks"}))
    code, output = run(TRAIN, argv, tmp_path / "log", ranks=ranks)
    assert code == 0, output
    rows = metrics(tmp_path / "out")
    assert len(rows) == 3 and all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows)
    assert abs(rows[0]["kl"]) < 1e-7 < rows[-1]["kl"] and math.isfinite(rows[-1]["loss"])
    before, merged = weights(tiny_model), weights(tmp_path / "out" / "merged")
    assert before.keys() == merged.keys() and any((before[name] != merged[name]).any() for name in before)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and tensor.abs().max() > 0 for name, tensor in adapter.items())


def reference_and_base(model: str, bf16: bool) -> list[float]:
    """On each rank, the largest log-prob differences of the reference and of the policy to the base model."""
    from sft_core.data.packing import pack_sequences
    from sft_core.model.adapters import without_adapters
    from sft_core.model.parallel import Sharding, freeze, make_mesh, shard
    from sft_core.model.policy import load_policy
    from sft_core.run import distributed
    from sft_core.run.config import ModelConfig

    device = distributed.init_distributed(60)[3]
    config = ModelConfig(model, use_peft=True, lora_r=4, lora_modules_to_save=["embed_tokens", "norm"], use_dora=True)
    layout = (make_mesh(device), Sharding(bf16))
    policy = shard(load_policy(config, dtype=torch.bfloat16 if bf16 else torch.float32), *layout)
    base = shard(freeze(load_policy(ModelConfig(model))), *layout)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    ids = [(7 * i) % 300 + 5 for i in range(30)]
    batch = pack_sequences([ids], [[True] * len(ids)], device)
    reference = without_adapters(policy)
    found = []
    for _ in range(2):  # between the policy's forward and backward, as in training
        logps = policy(batch)[0]
        with torch.no_grad():
            expected = base(batch)[0]
            found += [(reference(batch)[0] - expected).abs().max().item(), (logps - expected).abs().max().item()]
        logps.sum().backward()
    distributed.shutdown()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
    return found


@pytest.mark.parametrize("bf16", [False, True])
def test_reference_is_the_base_model(tiny_model, bf16):
    for found in [
        *run_ranks(1, reference_and_base, tiny_model, bf16),
        *run_ranks(2, reference_and_base, tiny_model, bf16),
    ]:
        assert found[0] == found[2] == 0.0 and found[1] == found[3] > 0.1
