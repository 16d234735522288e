"""Weights that are read in slices equal those of the whole model, and need less memory."""

import json
import threading

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sft_core.model.architectures import shrunken
from sft_core.model.policy import load_policy
from sft_core.run.config import ModelConfig
from tests.processes import run_ranks

# Tied weights; the scale of an embedding as a buffer (gemma); biases (opt); untied in several files (qwen3); weights
# whose form in the files differs from that in the model (mixtral).
ARCHITECTURES = {"gemma": 1, "opt": 1, "qwen3": 1, "mixtral": 0}


def weights_and_buffers(folder: str, to_shard: bool, cpu_offload: bool) -> dict[str, np.ndarray]:
    from sft_core.model.export import full_weights
    from sft_core.model.parallel import Sharding, make_mesh, shard
    from sft_core.run import distributed

    device = distributed.init_distributed(60)[3]
    policy = load_policy(ModelConfig(folder), to_shard=to_shard)
    assert bool(policy.files) == any(p.is_meta for p in policy.parameters())
    policy = shard(policy, make_mesh(device), Sharding(cpu_offload=cpu_offload))
    assert policy.tied == (policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight)
    tensors = [*full_weights(policy), *policy.model.named_buffers()]
    found = {f"{name} {tensor.dtype}": tensor.float().numpy().copy() for name, tensor in tensors}
    distributed.shutdown()
    return found


def tiny(name: str, folder) -> str:
    torch.manual_seed(0)
    info = shrunken(AutoConfig.for_model(name, num_hidden_layers=2))
    model = AutoModelForCausalLM.from_config(info).bfloat16()
    model.save_pretrained(folder, max_shard_size="2KB" if name == "qwen3" else "5GB")
    return str(folder)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_value_is_that_of_the_whole_model(name, tmp_path):
    folder = tiny(name, tmp_path)
    assert bool(load_policy(ModelConfig(folder), to_shard=True).files) == ARCHITECTURES[name]
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (name == "qwen3")
    [expected] = run_ranks(1, weights_and_buffers, folder, False, False)
    for found in run_ranks(2, weights_and_buffers, folder, True, name == "qwen3"):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] == value).all(), key


def test_what_no_rank_can_read_alone_is_loaded_whole_or_refused(tmp_path):
    folder = tiny("llama", tmp_path)
    model = ModelConfig(folder)
    assert load_policy(model, to_shard=True, vocab_size=10**5).files is None  # the embedding grows
    assert load_policy(ModelConfig(folder, use_peft=True), to_shard=True).files is None
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="tied but not equal"):  # the head is in the files too, and is another
        load_policy(model, to_shard=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor for name, tensor in whole.items() if "layers.1.mlp" not in name}, file)
    with pytest.raises(ValueError, match="missing"):
        load_policy(model, to_shard=True)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_policy(model, to_shard=True)


def memory_of_loading(folder: str, small: str, to_shard: bool) -> int:
    """The increase of the rank's host memory [bytes], from before to its peak; shared pages count once in total."""
    from sft_core.model.parallel import Sharding, make_mesh, shard
    from sft_core.run import distributed

    device, process = distributed.init_distributed(60)[3], psutil.Process()
    shard(load_policy(ModelConfig(small), to_shard=to_shard), make_mesh(device), Sharding())  # imports everything
    dist.barrier()
    before, peak, done = process.memory_full_info().pss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_full_info().pss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    shard(load_policy(ModelConfig(folder), to_shard=to_shard), make_mesh(device), Sharding())
    done.set()
    watcher.join()
    dist.barrier()
    distributed.shutdown()
    return peak - before


@pytest.mark.slow
def test_two_ranks_hold_the_model_once(tmp_path, tiny_model):
    """The file of the model has 494 million bfloat16 parameters; ranks hold float32 shards, and no whole copy each."""
    info = AutoConfig.for_model(
        "qwen2",
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(info, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    size = 4 * model.num_parameters()
    del model
    before, now = (sum(run_ranks(2, memory_of_loading, str(tmp_path), tiny_model, way)) / size for way in (False, True))
    print(f"peak of host memory over the float32 size: {now:.2f}, loaded whole on each rank {before:.2f}")
    assert now <= 1.2
