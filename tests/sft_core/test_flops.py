"""Counts of bytes and FLOPs, compared with those of real models on the CPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from kernels.attention import packed_layout, register
from sft_core.model.flops import block_weights, peak_flops, saved_per_token, shape, training_flops
from sft_core.model.policy import count_parameters
from tests.sft_core.test_memory_plan import QWEN_1_5B

register()
SMALL = dict(
    hidden_size=256,
    intermediate_size=768,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=64,
    max_position_embeddings=512,
    attention_dropout=0.0,
)
TOKENS = 512


def hidden_states(config_class, layers, itemsize=2):
    """The last hidden states of a small random model over a packed row, ready for a backward pass."""
    torch.manual_seed(0)
    info = config_class(**SMALL, num_hidden_layers=layers)
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    decoder = AutoModelForCausalLM.from_config(info, attn_implementation="packed", dtype=dtype).get_decoder()
    layout = packed_layout([TOKENS // 2] * 2)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    arguments = dict(input_ids=ids, position_ids=layout.position_ids[None], use_cache=False, packed=layout)
    return lambda: decoder(**arguments).last_hidden_state, decoder, info


def saved_bytes(config_class, layers, itemsize):
    """Bytes of the storages that autograd keeps for the backward pass, without parameters."""
    forward, decoder, info = hidden_states(config_class, layers, itemsize)
    parameters = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for at, storage in kept.items() if at not in parameters), info


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_what_a_block_saves(config_class, itemsize):
    one, _ = saved_bytes(config_class, 1, itemsize)
    three, info = saved_bytes(config_class, 3, itemsize)
    s = shape(info)
    # Attention on the CPU does not repeat keys or values. It saves its output in another layout than the next layer.
    on_cpu = saved_per_token(s, itemsize) - 4 * itemsize * s.query + itemsize * (3 * s.query + 2 * s.kv)
    assert (three - one) / 2 / TOKENS == pytest.approx(on_cpu, rel=0.02)


def test_parameters_and_flops():
    info = Qwen2Config(**QWEN_1_5B)
    assert count_parameters(info) == 1_543_714_304
    s = shape(info)
    weights = block_weights(s) + s.vocab * s.hidden
    assert weights == pytest.approx(1_543_714_304, rel=1e-3)  # the rest is norms and biases
    assert training_flops(info, [2048] * 8) == 6 * weights * 16384 + 6 * 28 * 1536 * 16384 * 2048
    small, long = training_flops(info, [100] * 8), training_flops(info, [800])
    assert long - small == 6 * 28 * 1536 * 800 * 700
    untied = Qwen2Config(**QWEN_1_5B | {"tie_word_embeddings": False})
    assert training_flops(untied, [800]) == long
    pairs = 300**2 / 2 + 7 * (200 * 100 + 200**2 / 2)  # of 8 documents that begin with the same 100 tokens
    assert training_flops(info, [300] * 8, [100] * 7) == 6 * weights * 1700 + 12 * 28 * 1536 * pairs


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_peaks(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda") == peak
    assert peak_flops("cpu") is None
