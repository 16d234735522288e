"""nano.py is right, learns, and takes the same steps as the real loop.

Not tested, on purpose: sharding and ranks, which nano.py lacks (`test_invariance.py` compares the loop on several ranks
with the loop on one).
"""

import ast
import copy
import doctest
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_core import nano

CONFIG = nano.Config(beta=0.2, temperature=0.7)
EOS = 2


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def moved(model, factor=1.02):
    """A copy of the model with other weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def recorded_samples() -> tuple[list[nano.Sample], list[float]]:
    """Three groups of four completions of 1 to 20 tokens; one is cut off, and one group has equal rewards."""
    rng = random.Random(0)
    samples = []
    for length in (9, 4, 14):
        prompt = [rng.randrange(5, 200) for _ in range(length)]
        for _ in range(4):
            completion = [rng.randrange(5, 200) for _ in range(rng.randint(0, 19))]
            samples.append(nano.Sample(prompt, [*completion, EOS], "stop"))
    samples[5].completion_ids[-1:] = [7, 0]  # cut off, and its last token has the id of the padding
    samples[5].finish_reason = "length"
    rewards = [1.0, 0.0, 0.0, 1.0, 0.3, 0.3, 0.3, 0.3, 0.0, 0.5, 0.25, 1.0]
    for first in (0, 4, 8):
        for s, advantage in zip(samples[first:], nano.group_advantages(rewards[first : first + 4]), strict=False):
            s.advantage = advantage
    return samples, rewards


class RealLoop:
    """The real loop's `update` on the same rollouts, with an unsharded policy and reference."""

    def __init__(self, model, reference, samples, rewards, sampler_logps, folder):
        from grpo_core.advantage import group_advantages
        from grpo_core.batch import make_micro_batches
        from grpo_core.config import GRPOConfig
        from grpo_core.rollout import Sample
        from sft_core.data.packing import StepCounts
        from sft_core.model.policy import Policy, load_policy
        from sft_core.run.config import ModelConfig

        dtype = model.dtype
        self.policy = load_policy(ModelConfig(folder)).to(dtype)
        self.set_weights(model)
        other = load_policy(ModelConfig(folder)).to(dtype)
        other.model.load_state_dict(reference.state_dict())
        self.reference = lambda *args: Policy.__call__(other, *args)
        self.config = GRPOConfig(output_dir="unused", beta=CONFIG.beta, temperature=CONFIG.temperature)
        self.advantages = group_advantages(rewards, [i // 4 for i in range(12)]).tolist()
        rollouts = [
            Sample(i // 4, s.prompt_ids, s.completion_ids, logps, s.finish_reason, version=0, advantage=advantage)
            for i, (s, logps, advantage) in enumerate(zip(samples, sampler_logps, self.advantages, strict=True))
        ]
        self.batches = make_micro_batches(rollouts, 60, torch.device("cpu"))
        for batch in self.batches:  # these round to float32
            batch.advantages = torch.tensor([r.advantage for r in batch.samples])
        tokens = sum(len(s.completion_ids) for s in samples)
        self.counts = StepCounts(len(self.batches), tokens, len(samples), tokens, len(samples))

    def set_weights(self, model):
        self.policy.model.load_state_dict(model.state_dict())

    def update(self, first_use):
        from grpo_core.update import update

        self.policy.zero_grad()
        metrics = update(self.policy, self.reference, self.batches, self.counts, self.config, first_use)
        gradients = {name: p.grad.clone() for name, p in self.policy.model.named_parameters()}
        return {name: float(value) for name, value in metrics.items()}, gradients


def both(folder, dtype):
    """nano's model, reference and batches, and the real loop."""
    torch.manual_seed(0)
    model = load(folder, dtype)
    reference = moved(model)
    samples, rewards = recorded_samples()
    batches = nano.make_batches(samples, 5, model.device)
    nano.set_old_and_ref_logps(batches, model, reference, CONFIG.temperature)
    sampler_logps = [
        row[mask].tolist() for b in batches for row, mask in zip(b.old_logps, b.completion_mask, strict=True)
    ]
    real = RealLoop(model, reference, samples, rewards, sampler_logps, folder)
    assert real.advantages == pytest.approx([s.advantage for s in samples], abs=1e-12)
    assert real.advantages[4:8] == [s.advantage for s in samples[4:8]] == [0.0] * 4
    return model, batches, real


def test_the_update_is_that_of_the_loop(tiny_model, float64):
    """Loss and all gradients agree to 1e-10 in float64, at a ratio of 1 and at ratios that are clipped."""
    model, batches, real = both(tiny_model, torch.float64)
    for first_use in (True, False):
        metrics = nano.add_gradients(model, batches, 12, CONFIG)
        expected, gradients = real.update(first_use)
        assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-10)
        assert metrics["kl"] > 0.01, "the reference must not be the policy"
        assert first_use == (metrics["clipped"] == 0.0) and 0 <= metrics["clipped"] < 0.9
        for name, parameter in model.named_parameters():
            assert parameter.grad.abs().max() > 1e-3, f"{name} has no gradient: nothing is compared"
            assert (parameter.grad - gradients[name]).abs().max() < 1e-10, name
        with torch.no_grad():  # a step of plain gradient descent, so that the old log-probs are no longer the policy's
            for parameter in model.parameters():
                parameter -= 0.02 * parameter.grad
        model.zero_grad()
        real.set_weights(model)


def test_ten_steps_have_the_losses_of_the_loop(tiny_model):
    """The comparison is in float32, with equal weights before each step, so that rounding does not accumulate."""
    model, batches, real = both(tiny_model, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, **nano.ADAMW)
    losses = []
    for step in range(10):
        real.set_weights(model)
        metrics = nano.add_gradients(model, batches, 12, CONFIG)
        expected, _ = real.update(first_use=step == 0)
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5), step
        losses.append(metrics["loss"])
        nano.optimizer_step(model, optimizer)
    assert losses[-1] < losses[0] and metrics["clipped"] > 0


PROMPTS = [[9, 8, 7], [11], [0, 12, 13, 14, 15, 16, 17], [20, 0]]


def test_greedy_sampling_is_that_of_the_model_without_cache_or_padding(tiny_model):
    model = load(tiny_model)
    alone = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        alone.append(ids[len(prompt) :])
    eos_id = alone[1][4]  # so that one sequence ends early
    assert all(completion[0] != eos_id for completion in alone)
    samples = nano.sample(model, PROMPTS, eos_id, max_length=12, temperature=0)
    for s, prompt, completion in zip(samples, PROMPTS, alone, strict=True):
        stopped = eos_id in completion
        assert s.prompt_ids == prompt and s.finish_reason == ("stop" if stopped else "length")
        assert s.completion_ids == (completion[: completion.index(eos_id) + 1] if stopped else completion)
    assert {s.finish_reason for s in samples} == {"stop", "length"}


def test_log_probs_are_those_of_each_sequence_alone(tiny_model):
    """The EOS that ends a completion is scored, and no token sees another sequence or the padding."""
    model = load(tiny_model)
    samples = recorded_samples()[0]
    (batch,) = nano.make_batches(samples, 100, model.device)
    with torch.no_grad():
        logps = nano.completion_logps(model, batch, temperature=0.7)
        for s, row in zip(samples, logps, strict=True):
            ids = torch.tensor([s.prompt_ids + s.completion_ids])
            alone = (model(ids).logits[0, :-1] / 0.7).log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]
            length = len(s.completion_ids)
            assert torch.allclose(row[:length], alone[-length:], atol=1e-5)
            assert not row[length:].any()


def test_sampling_follows_the_temperature(tiny_model):
    """The frequency of each first token is its probability in softmax(logits / temperature)."""
    model, prompt, count = load(tiny_model), PROMPTS[0], 4000
    torch.manual_seed(0)
    samples = nano.sample(model, [prompt] * count, EOS, max_length=1, temperature=0.5)
    shares = torch.bincount(torch.tensor([s.completion_ids[0] for s in samples]), minlength=model.vocab_size) / count
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(dim=-1)
    assert (shares - expected).abs().sum() < 0.15
    with torch.no_grad():
        assert (shares - model(torch.tensor([prompt])).logits[0, -1].softmax(dim=-1)).abs().sum() > 0.5


def test_it_learns(tiny_model):
    """Thirty steps on an untrained model; the reward is the share of digits in its text."""
    model, tokenizer = load(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    problems = [nano.Problem([1, 3, token], "") for token in range(20, 40)]
    config = nano.Config(
        max_steps=30, prompts_per_step=6, max_completion_length=8, learning_rate=5e-3, num_iterations=2
    )

    def digits(completion, answer):
        return sum(c.isdigit() for c in completion) / max(1, len(completion))

    torch.manual_seed(0)
    history = nano.train(config, model, tokenizer, problems, digits)
    assert sum(history[-5:]) / 5 > sum(history[:5]) / 5 + 0.3


@pytest.mark.slow
def test_the_command_makes_the_model_better(capsys):
    """The whole command `python -m grpo_core.nano`, with a third of its steps."""
    nano.main(["--max_steps", "20"])
    lines = capsys.readouterr().out.splitlines()
    rewards = [float(line.split()[3]) for line in lines if line.startswith("step ")]
    assert len(rewards) == 20 and sum(rewards[-5:]) > sum(rewards[:5])
    assert "right before GRPO" in lines[-2]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--num_generations", "1"], "--num_generations"),
        (["--beta", "nan"], "--beta"),
        (["--temperature", "0"], "--temperature"),
        (["--prompts_per_step", "801"], "--prompts_per_step"),
        (["--model", "no/such/folder"], "--model"),
        (["--max_completion_length", "250"], "--max_completion_length"),
    ],
)
def test_bad_input_is_one_sentence(argv, names, capsys, monkeypatch):
    """The exit code is 2, before any weights are loaded."""
    monkeypatch.setattr(nano, "AutoModelForCausalLM", None)
    with pytest.raises(SystemExit) as stopped:
        nano.main(argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith(names)


@pytest.mark.parametrize(
    ("completion", "reward"), [("7+2=9\n<answer>42</answer>", 1), ("42 or 43", 0), ("142", 0), ("none", 0), ("", 0)]
)
def test_reward_is_for_the_last_number(completion, reward):
    assert nano.last_number_reward(completion, "42") == reward


def test_the_examples_in_its_documentation_are_true():
    assert doctest.testmod(nano) == (0, 2)


def test_it_shares_no_code_with_the_loop():
    """Otherwise it could not show that the loop is right. The quickstart's problems are data, not code."""
    tree = ast.parse(Path(nano.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in imported if name.split(".")[0] in ("kernels", "sft_core", "gen", "eval", "grpo_core")}
    assert ours == {"grpo_core.quickstart.task"}
