"""The policy compared with transformers' forward pass, sharded and unsharded, in float32 and bfloat16."""

import numpy as np
import pytest
import torch
from transformers import AddedToken, AutoTokenizer

from sft_core.model.policy import load_tokenizer
from sft_core.run.config import ModelConfig
from tests.processes import run_ranks

SEQUENCES = [[(7 * i + j) % 300 + 5 for i in range(length)] for j, length in enumerate((200, 31, 90))]


def scored(model: str, bf16: bool, frozen: bool, checkpointing: bool) -> np.ndarray:
    """On each rank: the policy's log-probs of all tokens except the first of each sequence, packed into one row."""
    from sft_core.data.packing import pack_sequences
    from sft_core.model.parallel import Sharding, freeze, make_mesh, shard
    from sft_core.model.policy import load_policy
    from sft_core.run import distributed
    from sft_core.run.config import ModelConfig

    device = distributed.init_distributed(60)[3]
    policy = load_policy(ModelConfig(model))
    policy = shard(
        freeze(policy) if frozen else policy, make_mesh(device), Sharding(bf16, gradient_checkpointing=checkpointing)
    )
    batch = pack_sequences(SEQUENCES, [[True] * len(sequence) for sequence in SEQUENCES], device)
    logps = policy(batch, temperature=0.7)[0].detach().numpy().copy()
    distributed.shutdown()
    return logps


def test_policy_scores_as_transformers_does(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = []
    for sequence in SEQUENCES:
        with torch.no_grad():
            logps = (model(torch.tensor([sequence])).logits[0, :-1] / 0.7).log_softmax(-1)
        expected.append(logps.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0].numpy())
    for ranks in (1, 2):
        for found in run_ranks(ranks, scored, tiny_model, False, False, ranks == 2):
            np.testing.assert_allclose(found, np.concatenate(expected), atol=2e-5)


def test_frozen_reference_scores_as_the_policy_in_bfloat16(tiny_model):
    """Its shards are bfloat16 and the policy's are float32, but both compute with the same values and rotary tables."""
    [policy], [reference] = (run_ranks(1, scored, tiny_model, True, frozen, False) for frozen in (False, True))
    [exact] = run_ranks(1, scored, tiny_model, False, False, False)
    np.testing.assert_array_equal(policy, reference)
    assert 0 < np.abs(policy - exact).max() < 0.5


def test_an_empty_chat_template_is_refused(tiny_model, tmp_path):
    (tmp_path / "empty.jinja").write_text("\n")
    with pytest.raises(ValueError, match="empty.jinja is empty"):
        load_tokenizer(ModelConfig(tiny_model), str(tmp_path / "empty.jinja"))


def test_a_template_of_another_model_comes_with_its_tokens_and_its_eos(tiny_model, tmp_path, monkeypatch):
    other = AutoTokenizer.from_pretrained(tiny_model)
    new = AddedToken("<|turn|>", special=True)
    other.add_tokens([new])
    other.eos_token = new.content
    other.chat_template = "{% for m in messages %}{{ m['content'] }}<|turn|>{% endfor %}"
    other.save_pretrained(tmp_path / "other")
    own = AutoTokenizer.from_pretrained(tiny_model)
    _, tokenizer = load_tokenizer(ModelConfig(tiny_model), str(tmp_path / "other"))
    assert tokenizer.chat_template == other.chat_template and tokenizer.eos_token == "<|turn|>"
    assert tokenizer.convert_tokens_to_ids("<|turn|>") == len(own) == len(tokenizer) - 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries again for a minute
    with pytest.raises(ValueError, match="cannot load model 'nobody/nothing'.*check --chat_template"):
        load_tokenizer(ModelConfig(tiny_model), "nobody/nothing")
    other.chat_template = None
    other.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(ModelConfig(tiny_model), str(tmp_path / "none"))
