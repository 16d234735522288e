"""Prompts that are computed once per group give the same gradient, loss and metrics as the plain layout, in float64."""

import random

import pytest
import torch

from grpo_core.batch import KEYS_PER_TOKEN, make_micro_batches
from grpo_core.rollout import Sample
from tests.grpo_core.test_invariance import LOSSES
from tests.processes import run_ranks

CPU = torch.device("cpu")
# Length of the prompt, lengths of the completions. Completions are empty first, last and alone; a prompt has one token;
# a group has one completion.
GROUPS = [(12, [5, 0, 9, 3]), (1, [0, 7, 2, 2]), (9, [0, 0]), (6, [4]), (12, [3, 8, 8, 1]), (20, [1, 2, 1, 30, 1, 1])]
BUDGETS = {"all": 10_000, "parts": 45}  # tokens per micro-batch: one for all; parts of groups, mixed with other groups
KINDS = ["eager", "checkpointing", "adapters"]


def make_rollouts() -> list[Sample]:
    rng = random.Random(0)
    rollouts = []
    for group, (size, lengths) in enumerate(GROUPS):
        prompt = [rng.randrange(5, 200) for _ in range(size)]
        for i, length in enumerate(lengths):
            answer = [rng.randrange(5, 200) for _ in range(length)]
            logps = [rng.uniform(-9, -6) for _ in answer]
            old = [logp + rng.gauss(0, 0.1) for logp in logps]
            advantage = rng.gauss(0, 1)
            rollouts.append(Sample(group, list(prompt), answer, logps, "stop", 0, 0, [], advantage, i, old_logps=old))
    return rollouts


def prompts_computed(samples, budget):
    """How often each group's prompt is in a row."""
    counts = [0] * len(GROUPS)
    for batch in make_micro_batches(samples, budget, CPU, share_prompts=True):
        before: list[int] = []
        for sample in batch.samples:
            counts[sample.group] += sample.prompt_ids != before
            before = sample.prompt_ids
    return counts


def build(model: str, kind: str):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    from sft_core.model.parallel import _compile
    from sft_core.model.policy import load_policy
    from sft_core.run.config import ModelConfig

    adapters = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]} if "adapters" in kind else {}
    policy = load_policy(ModelConfig(model, **adapters)).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    for i in range(len(policy.blocks)):
        if "checkpointing" in kind:
            policy.blocks[i] = checkpoint_wrapper(policy.blocks[i])
        if "compiled" in kind:
            _compile(policy.blocks[i], "aot_eager")
    return policy


def norm(self, hidden):
    return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)


def differences(model: str, kinds: list[str]) -> dict[str, dict[str, float]]:
    """By kind of policy, loss and budget: relative differences of gradients and loss, and the largest of a metric."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from grpo_core.batch import deal
    from grpo_core.config import GRPOConfig
    from grpo_core.update import update
    from sft_core.data.packing import step_counts
    from sft_core.model.parallel import freeze
    from sft_core.run import distributed

    distributed.init_distributed(60)
    torch.set_default_dtype(torch.float64)
    LlamaRMSNorm.forward = norm  # transformers' version computes in float32
    reference = build(model, "eager")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.01)
    freeze(reference)
    found = {}
    for kind in kinds:
        policy = build(model, kind)
        for loss, options in LOSSES.items() if kind == "eager" else [("grpo, kl", LOSSES["grpo, kl"])]:
            config = GRPOConfig(output_dir="unused", **({"beta": 0.0} | options))
            passes = {}
            for budget, share in (("all", False), *((budget, True) for budget in BUDGETS)):
                own = make_rollouts()
                if config.old_logps == "sampler" or "first update" in loss:
                    for sample in own:
                        sample.old_logps = None
                own = deal(own, 4, config.mini_batches(1))[-1]
                batches = make_micro_batches(own, BUDGETS[budget], CPU, share)
                counts = step_counts([batch.sequences for batch in batches], CPU)
                metrics = update(policy, reference if config.beta else None, batches, counts, config, first_use=True)
                gradients = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
                passes[budget, share] = gradients, metrics
                policy.zero_grad()
            gradients, metrics = passes.pop(("all", False))
            for (budget, _), (others, figures) in passes.items():
                assert all(gradient.norm() > 0 for gradient in gradients.values())
                found[f"{kind} | {loss} | {budget}"] = {
                    name: float((others[name] - gradient).norm() / gradient.norm())
                    for name, gradient in gradients.items()
                } | {
                    "loss": float((figures["loss"] - metrics["loss"]).abs()),
                    "metrics": max(float((figures[name] - value).abs()) for name, value in metrics.items()),
                }
    distributed.shutdown()
    return found


def check(values: dict[str, float]) -> None:
    assert values.pop("metrics") < 1e-6, "some of them are means of float32 numbers"
    assert len(values) > 15 and max(values.values()) < 1e-10, max(values, key=values.get)


@pytest.fixture(scope="module")
def found(tiny_model):
    return run_ranks(1, differences, tiny_model, KINDS)[0]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("kind", "loss"), [("eager", loss) for loss in LOSSES] + [(kind, "grpo, kl") for kind in KINDS[1:]]
)
def test_gradient_loss_and_metrics_are_those_of_the_plain_layout(found, kind, loss, budget):
    check(found[f"{kind} | {loss} | {budget}"])


@pytest.mark.slow
def test_compiled_blocks_too(tiny_model):
    for values in run_ranks(1, differences, tiny_model, ["compiled", "compiled, checkpointing, adapters"])[0].values():
        check(values)


def test_a_prompt_stands_once_in_each_part_of_a_group():
    rollouts = make_rollouts()
    assert prompts_computed(rollouts, 1) == [len(lengths) for _, lengths in GROUPS]
    assert prompts_computed(rollouts, BUDGETS["all"]) == [1] * len(GROUPS)
    assert prompts_computed(rollouts, BUDGETS["parts"]) == [1, 1, 1, 1, 1, 2]
    [batch] = make_micro_batches(rollouts, BUDGETS["all"], CPU, share_prompts=True)
    prompts, completions = sum(size for size, _ in GROUPS), sum(sum(lengths) for _, lengths in GROUPS)
    assert batch.sequences.input_ids.shape[1] == prompts + completions
    assert batch.sequences.num_sequences == len(rollouts) == len(batch.advantages)


@pytest.mark.parametrize("budget", [1, 30, 100, 300, 1000])
def test_the_budget_holds_for_what_is_shared_and_what_is_gathered(budget):
    rng = random.Random(1)
    rollouts = [
        Sample(group, [group] * (1 + 40 * (group % 3)), [5] * rng.randint(0, 60), [], "stop", 0)
        for group in range(8)
        for _ in range(6)
    ]
    for sample in rollouts:
        sample.sampler_logps = [-1.0] * len(sample.completion_ids)
    batches = make_micro_batches(rollouts, budget, CPU, share_prompts=True)
    assert sorted(id(s) for batch in batches for s in batch.samples) == sorted(map(id, rollouts))
    for batch in batches:
        tokens, keys = batch.sequences.input_ids.shape[1], len(batch.sequences.layout.places)
        assert len(batch.samples) == 1 or tokens <= budget
        shared = sum(map(len, batch.sequences.layout.prefixes))
        assert keys == tokens + shared and (len(batch.samples) == 1 or tokens + shared / KEYS_PER_TOKEN <= budget)
