"""Text from an engine and from servers through one interface."""

from dataclasses import replace

import pytest

import gen.sampler
from gen.config import GenerateConfig, TextSampling
from gen.engine.base import EngineConfig
from gen.sampler import EngineSampler, ServerSampler

ASKED = [[{"role": "user", "content": text}] for text in ("Say 1.", "Say 2.")]


def test_an_engine_and_a_server_are_asked_alike(tiny_model, server):
    engine = EngineSampler("torch", tiny_model)
    engine.start(EngineConfig(tiny_model, max_model_len=128, dtype="float32"))
    for sampler in (engine, ServerSampler([server.url], "served")):
        prompts = [sampler.encode(messages) for messages in ASKED]
        sampling = TextSampling(n=2, max_tokens=8, temperature=1.0, seed=3)
        groups = sampler.sample(prompts, [0, 1], sampling)
        assert [len(group) for group in groups] == [2, 2] and len({a.text for group in groups for a in group}) == 4
        assert sampler.sample(prompts[1:], [1], sampling) == groups[1:]  # a prompt's position decides its seeds
        assert all(answer.finish_reason in ("stop", "length") for group in groups for answer in group)
        assert "Say 2." in sampler.decode(prompts[1])
        sampler.close()
    assert [len(answer.token_ids) for group in groups for answer in group] == [0] * 4  # a server does not report them
    assert {request["seed"] for request in server.requests} == {3 * 1_000_003 + i for i in range(4)}


def test_weights_and_tokenizer_are_of_the_same_revision(tiny_model, monkeypatch):
    started = []

    def copy(source):
        return replace(source, model_name_or_path=f"copy of {source.model_revision}")

    monkeypatch.setattr(gen.sampler, "local_copy", copy)
    monkeypatch.setattr(gen.sampler, "make_engine", lambda name, config: started.append(config.model_path))
    for revision in ("main", "v1"):
        EngineSampler("torch", tiny_model, revision).start(EngineConfig(tiny_model, max_model_len=8))
    assert started == [tiny_model, "copy of v1"]


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        ({"num_generations": 0}, "num_generations"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"temperature": 0, "num_generations": 2}, "--num_samples"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
    ],
)
def test_what_cannot_be_generated(wrong, option):
    with pytest.raises(ValueError, match=option):
        GenerateConfig(**({"hf_dataset": "d", "model": "m"} | wrong))
