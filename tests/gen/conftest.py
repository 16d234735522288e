"""A fake server, and tiny random models in ordinary Hugging Face folders. Their distributions are peaked enough for
meaningful log-probs.
"""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SHAPE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def server():
    from tests.fake_openai import FakeServer  # needs aiohttp, which the GPU tests do not need

    with FakeServer() as server:
        yield server


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory) -> str:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=32, tie_word_embeddings=True))
    return save(model, tmp_path_factory.mktemp("tied_llama"))


@pytest.fixture(scope="session")
def untied_qwen(tmp_path_factory) -> str:
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False))
    return save(model, tmp_path_factory.mktemp("untied_qwen"))


def save(model, folder: Path) -> str:
    model.generation_config.update(eos_token_id=[2, 3], temperature=0.3, top_k=2, do_sample=True)  # must be ignored
    model.save_pretrained(folder)
    return str(folder)
