"""The objective's options: TRL's numbers for all of them, refusals, custom functions, the quantile."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from grpo_core.config import GRPOConfig
from grpo_core.loss import LOSS_TYPES, Objective, policy_loss
from grpo_core.terms import entropy_quantile
from grpo_core.update import adapted_entropy_coef
from sft_core.run.cli import parse
from tests.grpo_core.transcription import TYPES

RATIO = "vllm_importance_sampling"


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equals_trl(shared, loss_type):
    """Loss, gradients and metrics equal those of TRL 1.16.0 in float64; the file has 126 cases."""
    recorded = json.loads((shared / "reference" / "trl_objectives.json").read_text())["cases"]
    assert len(recorded) == 126 and {r["case"]["loss_type"] for r in recorded} == set(LOSS_TYPES)
    for i, record in enumerate(recorded):
        case, inputs = record["case"], record["inputs"]
        if case["loss_type"] != loss_type:
            continue
        lengths = inputs["lengths"]

        def packed(padded, lengths=lengths):
            rows = [row[:length] for row, length in zip(padded, lengths, strict=True)]
            return torch.tensor(np.concatenate(rows), dtype=torch.float64)

        options = {field.name: case[field.name] for field in fields(Objective) if field.name in case}
        options |= {f"{RATIO}_clip_min": case["clip_min"], f"{RATIO}_clip_max": case["clip_max"]}
        if case["correction"]:
            options[f"{RATIO}_mode"] = case["correction"]
        leaves = [packed(inputs[name]).requires_grad_() for name in ("logps", "entropies")]
        loss, metrics = policy_loss(
            leaves[0],
            packed(inputs["old_logps"]),
            torch.tensor(inputs["advantages"], dtype=torch.float64),
            torch.repeat_interleave(torch.tensor(lengths)),
            Objective(**options),
            num_tokens=sum(lengths),
            num_sequences=len(lengths),
            ref_logps=packed(inputs["ref_logps"]),
            sampler_logps=packed(inputs["sampler_logps"]) if case["correction"] else None,
            entropies=leaves[1],
        )
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        assert loss.item() == pytest.approx(record["loss"], rel=0, abs=1e-9), i
        for gradient, name in zip(gradients, ("grad_logps", "grad_entropies"), strict=True):
            torch.testing.assert_close(gradient, packed(record[name]), rtol=0, atol=1e-9)
        assert set(record["metrics"]) == {name for name in metrics if not name.startswith("sampling/")}, i
        for name, value in record["metrics"].items():
            assert metrics[name].item() == pytest.approx(value, rel=0, abs=1e-9), (i, name)


def test_every_loss_type_is_drawn_at_random():
    assert sorted(TYPES) == sorted(LOSS_TYPES)


@pytest.mark.parametrize(
    ("options", "by_token"),
    [
        *(({"loss_type": name, "epsilon_high": 5.0, "max_completion_length": 9}, name != "vespo") for name in TYPES),
        ({f"{RATIO}_mode": "token_mask", "beta": 0.1, "use_bias_correction_kl": True}, True),
        ({"top_entropy_quantile": 0.2, "entropy_coef": 0.1}, True),
        ({f"{RATIO}_mode": None}, True),
        ({f"{RATIO}_mode": "sequence_mask"}, False),
        ({f"{RATIO}_mode": "sequence_truncate"}, False),
        ({"importance_sampling_level": "sequence"}, False),
        ({"off_policy_mask_threshold": 0.1}, False),
    ],
)  # fmt: skip
def test_which_head_an_objective_takes(options, by_token):
    assert Objective(**options).by_token == by_token


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"loss_type": "ppo"}, "loss_type"),
        ({"loss_type": "cispo"}, "epsilon_high"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "delta": 2.0}, "delta"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"delta": 0.9}, "delta"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"beta": -1.0}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"sampler_ratio_cap": 0.0}, "sampler_ratio_cap"),
        ({f"{RATIO}_mode": "token"}, "token_truncate"),
        ({f"{RATIO}_clip_max": None}, "give one"),
        ({f"{RATIO}_clip_min": 2.0}, "must be above 0 and vllm_importance_sampling_clip_min"),
        ({f"{RATIO}_clip_min": -1.0}, "clip_min must be at least 0"),
        ({f"{RATIO}_clip_max": 0.0}, "must be above 0 and vllm_importance_sampling_clip_min"),
        ({"top_entropy_quantile": 1.2}, "top_entropy_quantile"),
        ({"top_entropy_quantile": -0.2}, "top_entropy_quantile"),
        ({"entropy_coef": math.nan}, "entropy_coef"),
        ({"off_policy_mask_threshold": 0.0}, "off_policy_mask_threshold"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos must be above 0"),
        ({"sapo_temperature_neg": -1.0}, "sapo_temperature_neg"),
        ({"vespo_k_neg": -1.0}, "vespo_k_neg must be at least 0"),
        ({"loss_type": "vespo", f"{RATIO}_mode": "sequence_mask"}, "needs .* token_mask, not sequence_mask"),
        ({"vespo_lambda_pos": 0.0}, "vespo_lambda_pos must be at least 0.0001"),
    ],
)
def test_refuses(options, names):
    with pytest.raises(ValueError, match=names):
        Objective(**options)


def test_another_name_of_the_cap():
    assert Objective(sampler_ratio_cap=3.0) == Objective(vllm_importance_sampling_clip_max=3.0)
    assert replace(Objective(sampler_ratio_cap=3.0), beta=0.1).vllm_importance_sampling_clip_max == 3.0
    (config,) = parse((GRPOConfig,), ["--output_dir=out", "--sampler_ratio_cap=3.0"])
    assert config.objective() == Objective(beta=0.04, max_completion_length=256, sampler_ratio_cap=3.0)


# --- custom functions ----------------------------------------------------------------------------------------------


def clipped(logps, log_ratios, advantages, objective):
    ratios = log_ratios.exp()
    bounded = ratios.clamp(1 - objective.epsilon, 1 + objective.high)
    return -torch.min(ratios * advantages, bounded * advantages)


def centred(logps, log_ratios, advantages, objective):
    losses = -log_ratios.exp() * advantages
    return losses - losses.mean()


def summed(logps, log_ratios, advantages, objective):
    return (-log_ratios.exp() * advantages).sum()


def in_double(logps, log_ratios, advantages, objective):
    return -log_ratios.double().exp() * advantages


def constant(logps, log_ratios, advantages, objective):
    return -logps.detach() * advantages


def of_three(logps, log_ratios, advantages):
    return -logps * advantages


def as_list(logps, log_ratios, advantages, objective):
    return (-logps * advantages).tolist()


HERE = "tests.grpo_core.test_objective"


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_function_of_ones_own_takes_the_place_of_the_policy_term(level):
    generator = torch.Generator().manual_seed(0)
    logps, old, ref, sampler, entropies = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    options = dict(beta=0.1, importance_sampling_level=level, entropy_coef=0.1, top_entropy_quantile=0.5)
    data = dict(num_tokens=7, num_sequences=2, ref_logps=ref, sampler_logps=sampler, entropies=entropies)
    advantages, ids = torch.tensor([1.0, -2.0]), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    found = []
    for loss_type in (f"{HERE}:clipped", "dapo"):
        objective = Objective(loss_type, **options)
        leaf = logps.clone().requires_grad_()
        loss, _ = policy_loss(leaf, old, advantages, ids, objective, **data)
        found.append((loss, *torch.autograd.grad(loss, leaf)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("no_such_module:loss", "cannot import the loss_type 'no_such_module:loss'"),
        (f"{HERE}:nothing", "cannot import"),
        (f"{HERE}:HERE", "is a str, not a function"),
        (f"{HERE}:of_three", r"must accept \(logps, log_ratios, advantages, objective\)"),
        (f"{HERE}:summed", r"must return losses \(3,\) of torch.float32, not torch.float32 \(\)"),
        (f"{HERE}:in_double", "not torch.float64 .3,."),
        (f"{HERE}:as_list", "not list"),
        (f"{HERE}:constant", "must compute its losses from logps"),
        (f"{HERE}:centred", "must compute each token's loss from that token alone"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_at_once(function, says):
    with pytest.raises(ValueError, match=says):
        GRPOConfig("out", loss_type=function)


# --- options of a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.1, "loss_type": "sapo"},
        {"delta": 1.5, "loss_type": "vespo"},
        {"epsilon": 0.1, "loss_type": "cispo", "epsilon_high": 5.0},
        {"epsilon_high": 0.28, "loss_type": "sapo"},
        {"sapo_temperature_neg": 2.0},
        {"vespo_k_pos": 3.0, "loss_type": "sapo"},
        {"importance_sampling_level": "sequence", "loss_type": "vespo"},
        {f"{RATIO}_correction": False, "old_logps": "sampler"},
        {f"{RATIO}_mode": "token_mask", "old_logps": "sampler"},
        {f"{RATIO}_clip_max": 3.5, f"{RATIO}_correction": False},
        {f"{RATIO}_clip_min": 0.5, f"{RATIO}_correction": False},
        {"entropy_coef_max": 0.5},
        {"entropy_target": 0.5, "entropy_coef": 0.1},
        {"scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum"},
    ],
)
def test_an_option_without_effect_is_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"^{name} {value} would have no effect: it needs .* leave it out"):
        GRPOConfig("out", **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss_type": "vespo", f"{RATIO}_mode": "sequence_mask"}, "loss_type vespo needs .* not sequence_mask"),
        ({"use_adaptive_entropy": True, "entropy_coef": 2.0}, "must lie between entropy_coef_min"),
        ({"use_adaptive_entropy": True, "entropy_coef_min": 0.1}, "must lie between entropy_coef_min"),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.0}, "sapo_temperature_pos must be above 0"),
    ],
)
def test_options_that_contradict_each_other(options, says):
    with pytest.raises(ValueError, match=says):
        GRPOConfig("out", **options)


def test_the_defaults_are_todays():
    assert GRPOConfig("out").objective() == Objective(beta=0.04, max_completion_length=256)
    assert GRPOConfig("out", vllm_importance_sampling_correction=False).objective() == Objective(
        beta=0.04, max_completion_length=256, vllm_importance_sampling_mode=None
    )


def test_the_adaptive_coefficient():
    """It rises at or below the target, falls above it, stays in bounds, and applies after a step at or below it."""
    config = GRPOConfig(
        "out", use_adaptive_entropy=True, entropy_coef=0.1, entropy_coef_delta=0.1, entropy_coef_min=0.05,
        entropy_coef_max=0.25, entropy_target=1.0,
    )  # fmt: skip
    coef, found = config.entropy_coef, []
    for entropy in (0.9, 1.0, 0.5, 1.1, 3.0, 2.0):
        coef, applied = adapted_entropy_coef(coef, entropy, config)
        found.append((coef, applied))
    wanted = [(0.2, 0.2), (0.25, 0.25), (0.25, 0.25), (0.15, 0.0), (0.05, 0.0), (0.05, 0.0)]
    assert found == [pytest.approx(pair) for pair in wanted]


def test_the_quantile_is_that_of_torch():
    """It is bitwise equal, since it decides whether a token is kept, and works for more tokens than torch.quantile."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 36, 1001):
        values = torch.rand(size, generator=generator, dtype=torch.float64)
        for share in (0.0, 0.2, 0.4, 0.55, 0.6, 0.9, 1.0):
            found = entropy_quantile(values, Objective(top_entropy_quantile=share))
            assert found == torch.quantile(values.float(), 1 - share) and found.dtype == torch.float32
    assert entropy_quantile(values[:0], Objective(top_entropy_quantile=0.5)) == 0
    assert entropy_quantile(torch.ones(2**24 + 1), Objective(top_entropy_quantile=0.5)) == 1
