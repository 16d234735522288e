"""The torch engine compared with the plain forward pass, and its guarantees on randomness, stopping and weights."""

import pytest
import torch

from gen.engine.base import EngineConfig, Sampling, check_engine_available, make_engine
from gen.engine.torch import TorchEngine, choose_tokens

PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46], [7], [100, 3, 99, 12]]
SEEDS = [11, 222, 3333, 44444]


@pytest.fixture(scope="module", params=["tied_llama", "untied_qwen"])
def engine(request):
    return TorchEngine(request.getfixturevalue(request.param), max_model_len=128)


def sample(engine, prompts=PROMPTS, seeds=SEEDS, **options):
    options = {"n": 3, "temperature": 0.8, "max_tokens": 24, "stop_ids": frozenset({20, 21, 22})} | options
    finished = options.pop("finished", None)
    return engine.sample(prompts, Sampling(**options), seeds, finished)


def forward_logps(engine, prompt, completion, temperature):
    """Log-probs [L] of the completion from one full forward pass, without cache or padding."""
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)


def test_logps_equal_the_full_forward(engine):
    for prompt, group in zip(PROMPTS, sample(engine), strict=True):
        for completion in group:
            expected = forward_logps(engine, prompt, completion.token_ids, 0.8)
            assert torch.allclose(torch.tensor(completion.logps), expected, atol=1e-5)


def test_sampling_repeats_bitwise(engine):
    assert sample(engine) == sample(engine)


def test_a_sample_does_not_depend_on_its_batch(engine):
    together = sample(engine)
    order = [2, 0, 3, 1]
    shuffled = sample(engine, [PROMPTS[p] for p in order], [SEEDS[p] for p in order])
    engine.max_batch, cut = 5, engine.max_batch  # batches that split a prompt's samples
    in_parts = sample(engine)
    engine.max_batch = cut
    for p, group in enumerate(together):
        ids = [completion.token_ids for completion in group]
        assert ids == [completion.token_ids for completion in shuffled[order.index(p)]]
        assert ids == [completion.token_ids for completion in in_parts[p]]
        for i in range(3):  # sample i equals the first sample with seed + i
            [[alone]] = sample(engine, [PROMPTS[p]], [SEEDS[p] + i], n=1)
            assert ids[i] == alone.token_ids


def test_each_prompt_is_told_when_it_is_finished(engine):
    for max_batch in (256, 5):
        told, (engine.max_batch, kept) = {}, (max_batch, engine.max_batch)
        groups = sample(engine, finished=lambda p, completions, told=told: told.setdefault(p, list(completions)))
        engine.max_batch = kept
        assert told == dict(enumerate(groups))


def test_asleep_it_holds_no_weights_and_wakes_with_the_fresh_ones(engine):
    expected = sample(engine)
    weights = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    engine.sleep()
    engine.sleep()
    assert engine.version == -1 and sum(p.numel() for p in engine.model.parameters()) == 0
    with pytest.raises(RuntimeError, match="load weights before sampling"):
        sample(engine)
    with pytest.raises(RuntimeError, match="nothing was written to 1 of"):
        engine.load_weights(list(weights.items())[1:], 1)
    engine.load_weights(weights.items(), 2)
    assert engine.version == 2 and sample(engine) == expected


def test_stopping(engine):
    stop = frozenset(range(20, 28))
    completions = [completion for group in sample(engine, n=8, stop_ids=stop) for completion in group]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert not stop & set(completion.token_ids[:-1])
        assert (completion.token_ids[-1] in stop) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 24
        assert len(completion.token_ids) == len(completion.logps)


def test_without_stop_ids_nothing_stops(engine):
    no_stop = sample(engine, n=40, stop_ids=())
    assert all(len(c.token_ids) == 24 and c.finish_reason == "length" for group in no_stop for c in group)
    assert any({2, 3} & set(c.token_ids[:-1]) for group in no_stop for c in group), "the EOS of the folder stopped it"


def test_greedy_is_the_argmax(engine):
    for prompt, [completion] in zip(PROMPTS, sample(engine, n=1, greedy=True, stop_ids=()), strict=True):
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion.token_ids
        expected = forward_logps(engine, prompt, completion.token_ids, 1.0)
        assert torch.allclose(torch.tensor(completion.logps), expected, atol=1e-5)


def test_the_sampled_distribution_is_the_models():
    logits = torch.tensor([[1.0, 0.0, -1.0, float("-inf"), 2.0, 0.5]])
    draws = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logps = choose_tokens(logits.expand(20000, -1), draws, 0.7)
    probs = (logits[0] / 0.7).softmax(-1)
    assert torch.allclose(logps, probs.log()[tokens])
    counts = torch.bincount(tokens, minlength=6).double()
    assert counts[3] == 0
    possible = probs > 0
    expected = 20000 * probs[possible].double()
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: a correct sampler exceeds it with probability 0.1 %


def test_top_p_keeps_the_fewest_tokens_that_reach_it(engine):
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    draws = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for top_p, kept in ((0.49, [1]), (0.7, [1, 3]), (0.81, [0, 1, 3])):
        tokens, logps = choose_tokens(logits.expand(2000, -1), draws, 1.0, top_p)
        assert tokens.unique().tolist() == kept
        expected = logits[0, tokens] - logits[0, kept].logsumexp(0)
        assert torch.allclose(logps, expected)
    assert sample(engine, top_p=1.0) == sample(engine) != sample(engine, top_p=0.5)


def test_a_draw_of_zero_never_takes_an_impossible_token():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    for draw in (0.0, 0.5, 1 - 2**-53):
        tokens, logps = choose_tokens(logits, torch.tensor([draw], dtype=torch.float64), 1.0)
        assert tokens.item() == 1 and logps.item() == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 2, "greedy": True}, "set n=1"),
        ({"temperature": 0.0}, "greedy=True"),
        ({"prompts": [[1] * 128, [1], [2], [3]]}, "raise max_model_len"),
        ({"seeds": [1]}, "one seed per prompt"),
        ({"prompts": [[], [1], [2], [3]]}, "without tokens"),
        ({"n": 0}, "at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
    ],
)
def test_bad_requests_name_the_remedy(engine, options, message):
    with pytest.raises(ValueError, match=message):
        sample(engine, **options)


def test_the_end_of_the_context_ends_a_completion(engine):
    """Only the context of its own prompt counts, not that of another."""
    prompts = [[9] * 120, PROMPTS[0]]
    found = sample(engine, prompts, SEEDS[:2], max_tokens=20, stop_ids=())
    assert [[(len(c.token_ids), c.finish_reason) for c in group] for group in found] == [
        [(8, "length")] * 3,
        [(20, "length")] * 3,
    ]
    [alone] = sample(engine, prompts[1:], SEEDS[1:2], max_tokens=20, stop_ids=())
    assert [c.token_ids for c in found[1]] == [c.token_ids for c in alone]


def test_no_prompts_give_no_groups(engine):
    assert sample(engine, [], []) == []


def test_engine_names(monkeypatch, tied_llama):
    with pytest.raises(ValueError, match="vllm, torch"):
        check_engine_available("vlm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--engine torch"):
        check_engine_available("vllm")
    check_engine_available("torch")
    with pytest.raises(ValueError, match="tensor_parallel_size=1"):
        make_engine("torch", EngineConfig(tied_llama, max_model_len=64, tensor_parallel_size=2))
