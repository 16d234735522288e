"""Flags that trade memory for time change no gradient, and exported names are plain."""

import numpy as np
import pytest

from tests.processes import run_ranks

SEQUENCES = [[(7 * i + j) % 300 + 5 for i in range(length)] for j, length in enumerate((60, 31, 90))]
FLAGS = {
    "every second": {"gradient_checkpointing": True, "checkpointing_every": 2},
    "offloaded": {"gradient_checkpointing": True, "activation_offloading": True},
    "on the host": {"cpu_offload": True},
    "all": {"gradient_checkpointing": True, "activation_offloading": True, "cpu_offload": True},
}


def step(model: str, flags: dict) -> dict:
    """On each rank: one optimizer step. Returns the clipped gradient by plain name, its norm, the names and weights."""
    from sft_core.data.packing import pack_sequences
    from sft_core.model.export import full_weights, hf_name, weight_names
    from sft_core.model.optim import clip_gradients, make_optimizer
    from sft_core.model.parallel import Sharding, make_mesh, shard
    from sft_core.model.policy import load_policy
    from sft_core.run import distributed
    from sft_core.run.config import ModelConfig, TrainingConfig

    rank, world_size, _, device = distributed.init_distributed(60)
    policy = shard(load_policy(ModelConfig(model)), make_mesh(device), Sharding(**flags))
    optimizer = make_optimizer(policy, TrainingConfig(output_dir="unused", learning_rate=1e-3))
    own = SEQUENCES[rank::world_size]
    pack = pack_sequences(own, [[True] * len(sequence) for sequence in own], device)
    logps, *_ = policy(pack)
    (-logps.sum()).backward()
    norm = clip_gradients(policy.parameters(), 1.0)
    gradient = {hf_name(name): p.grad.full_tensor().numpy().copy() for name, p in policy.model.named_parameters()}
    optimizer.step()
    after = {name: tensor.numpy().copy() for name, tensor in full_weights(policy)}
    assert list(after) == weight_names(policy)
    distributed.shutdown()
    return {"gradient": gradient, "norm": float(norm), "after": after}


@pytest.fixture(scope="module")
def plain(tiny_model):
    return run_ranks(1, step, tiny_model, {})[0]


@pytest.mark.parametrize("name", FLAGS)
def test_flags_change_no_gradient(tiny_model, plain, name):
    for ranks in (1, 2):
        for found in run_ranks(ranks, step, tiny_model, FLAGS[name]):
            assert found["norm"] == pytest.approx(plain["norm"], rel=1e-5)
            for part in ("gradient", "after"):
                assert found[part].keys() == plain[part].keys()
            for key, expected in plain["gradient"].items():
                assert np.linalg.norm(found["gradient"][key] - expected) < 1e-5 * np.linalg.norm(expected), key
                if ranks == 1:
                    assert (found["gradient"][key] == expected).all() and (
                        found["after"][key] == plain["after"][key]
                    ).all()


def offloaded(model: str, compile_backend: str | None) -> list[int]:
    """Bytes offloaded in a forward pass: they must be the inputs of the checkpointed blocks, and no weights."""
    import torch

    from sft_core.data.packing import pack_sequences
    from sft_core.model.parallel import Sharding, make_mesh, shard
    from sft_core.model.policy import load_policy
    from sft_core.run import distributed
    from sft_core.run.config import ModelConfig

    moved, original = [], torch.autograd.graph.save_on_cpu.__init__

    def watched(self, *arguments, **options):
        original(self, *arguments, **options)
        pack = self.pack_hook
        self.pack_hook = lambda tensor: (moved.append(tensor.numel()), pack(tensor))[1]

    device = distributed.init_distributed(60)[3]
    policy = load_policy(ModelConfig(model))
    flags = {"gradient_checkpointing": True, "activation_offloading": True, "compile_backend": compile_backend}
    policy = shard(policy, make_mesh(device), Sharding(**flags))
    torch.autograd.graph.save_on_cpu.__init__ = watched
    policy(pack_sequences(SEQUENCES, [[True] * len(sequence) for sequence in SEQUENCES], device))
    distributed.shutdown()
    return moved


@pytest.mark.parametrize("compile_backend", [None, "aot_eager"])
def test_offloading_moves_the_inputs_of_blocks_and_no_weight(tiny_model, compile_backend):
    [moved] = run_ranks(1, offloaded, tiny_model, compile_backend)
    inputs = [size for size in moved if size > 1]
    assert inputs == [64 * sum(map(len, SEQUENCES))] * 2, moved  # two blocks


def gathered(model: str, flags: dict) -> tuple[list[bool], float]:
    """Whether a block is unsharded after a pass without gradients, after `reshard`, before a backward and after it.
    Also, the difference between the scores after an optimizer step and those of a new policy with the same weights."""
    import torch
    from torch.distributed.tensor import DTensor

    from sft_core.data.packing import pack_sequences
    from sft_core.model.export import full_weights, reshard
    from sft_core.model.optim import make_optimizer
    from sft_core.model.parallel import Sharding, make_mesh, shard
    from sft_core.model.policy import load_policy
    from sft_core.run import distributed
    from sft_core.run.config import ModelConfig, TrainingConfig

    device = distributed.init_distributed(60)[3]
    policy = shard(load_policy(ModelConfig(model)), make_mesh(device), Sharding(**flags))
    optimizer = make_optimizer(policy, TrainingConfig(output_dir="unused", learning_rate=1e-2))
    found = []

    def look() -> None:
        found.append(not isinstance(next(policy.blocks[0].parameters()), DTensor))

    def score(scored, share_prompt=True) -> torch.Tensor:
        return scored.score(SEQUENCES[0][:20], [SEQUENCES[0][20:], SEQUENCES[1]], 1.0, device, share_prompt)

    before = score(policy)
    look()
    reshard(policy)
    look()
    score(policy)
    pack = pack_sequences(SEQUENCES, [[True] * len(sequence) for sequence in SEQUENCES], device)
    loss = -policy(pack)[0].sum()
    look()
    loss.backward()
    look()
    optimizer.step()
    fresh = load_policy(ModelConfig(model))
    after, weights = score(policy), dict(full_weights(policy))
    fresh.model.load_state_dict(weights, strict=False)
    assert (after - before).abs().max() > 0.1
    distributed.shutdown()
    return found, (after - score(fresh, share_prompt=False)).abs().max().item()


@pytest.mark.parametrize(
    ("ranks", "flags", "expected"),
    [(1, {}, [True, False, True, False]), (1, {"cpu_offload": True}, [False] * 4), (2, {}, [False] * 4)],
)
def test_blocks_stay_gathered_for_the_backward_on_one_rank_alone(tiny_model, ranks, flags, expected):
    for found, difference in run_ranks(ranks, gathered, tiny_model, flags):
        assert found == expected and difference < 1e-5


def follow(model: str) -> tuple[float, float]:
    """A frozen bfloat16 policy moves towards another one by a thousandth, after a pass that gathered both. Returns its
    largest difference to the formula, and to its old weights."""
    import torch

    from sft_core.data.packing import pack_sequences
    from sft_core.model.export import full_weights
    from sft_core.model.parallel import Sharding, freeze, make_mesh, mix, shard
    from sft_core.model.policy import load_policy
    from sft_core.run import distributed
    from sft_core.run.config import ModelConfig

    device = distributed.init_distributed(60)[3]
    source, target = (shard(load_policy(ModelConfig(model)), make_mesh(device), Sharding(bf16=True)) for _ in range(2))
    freeze(target)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
        before = {name: tensor.clone() for name, tensor in full_weights(target)}
        for policy in (source, target):
            policy(pack_sequences([[5, 6, 7]], [[True] * 3], device))
    mix(target, source, 1e-3)
    after = dict(full_weights(target))
    wrong = max(float((after[name] - 1.0005 * before[name]).abs().max()) for name in before)
    moved = min(float((after[name] - before[name]).abs().max()) for name in before)
    distributed.shutdown()
    return wrong, moved


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reference_follows_in_float32_and_in_place(tiny_model, ranks):
    for wrong, moved in run_ranks(ranks, follow, tiny_model):
        assert wrong < 1e-6 and moved > 1e-4
