"""The peak memory of a step does not grow with vocabulary x tokens."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_core.quickstart.task import make_tokenizer
from tests.grpo_core.test_train import TRAIN, options
from tests.launch import metrics, run

VOCABULARY = 150_000


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A model with one tiny layer and a head of 150,000 tokens: 19 MB of weights."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_logits_of_a_step_are_never_whole(wide_model, problems, tmp_path):
    """Two ranks with 4 x 8 completions of 270 tokens: 8,640 rows of logits, 5.2 GB in float32, in one micro-batch."""
    more = dict(
        prompts_per_step=4,
        num_generations=8,
        max_completion_length=270,
        max_steps=1,
        seed=1,
        max_tokens_per_micro_batch=100_000,
        max_logp_difference=10,
    )
    code, output = run(
        TRAIN,
        options(wide_model, problems, tmp_path / "out", rollouts_from=record(tmp_path), **more),
        tmp_path / "log",
        ranks=2,
    )
    assert code == 0, output
    [row] = metrics(tmp_path / "out")
    assert row["num_tokens"] > 8_640
    # torch and transformers alone need about 0.6 GiB; each rank would need 2.4 GiB more for its half of the logits.
    assert row["peak_memory_gib/max"] < 1.8


def record(folder):
    """Record rollouts of random tokens without the stop token, in place of an engine's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from grpo_core.rollout import schema

    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "group": group,
            "prompt_ids": [5, 6, 7],
            "sampler_logps": [-12.0] * 270,
            "finish_reason": "length",
            "completion_ids": torch.randint(5, VOCABULARY, (270,), generator=generator).tolist(),
            "version": 0,
            "reward": float(i % 2),
            "rewards": [float(i % 2)],
            "advantage": 0.0,
            "index": i,
            "old_logps": None,
        }
        for group in range(4)
        for i in range(8)
    ]
    (folder / "rollouts").mkdir()
    table = pa.Table.from_pylist(rows, schema=schema(ranks=1))
    pq.write_table(table, folder / "rollouts" / "step-000001-rank-00000.parquet")
    return folder / "rollouts"
