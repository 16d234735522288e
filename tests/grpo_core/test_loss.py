"""grpo_core.loss: TRL's numbers, cases computed by hand, a NumPy version with loops, gradcheck, additivity."""

import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_core.loss import LOSS_TYPES, Objective, TokenBatch, aggregation_weights, policy_loss
from grpo_core.terms import entropy_quantile
from sft_core.run.logging import merge_metrics
from tests.grpo_core.transcription import TYPES, draw, seeds, transcription

CASES = Path(__file__).parents[3] / "shared" / "reference" / "trl_grpo_losses.json"


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.skipif(not CASES.exists(), reason="the file of TRL's losses is not beside this repository")
@pytest.mark.parametrize("index", range(26))
def test_equals_trl(index):
    recorded = json.loads(CASES.read_text())["cases"]
    assert len(recorded) == 26
    case, inputs = recorded[index]["case"], recorded[index]["inputs"]
    lengths = inputs["lengths"]

    def pack(padded):
        return double([value for row, length in zip(padded, lengths, strict=True) for value in row[:length]])

    logps = pack(inputs["logps"]).requires_grad_()
    loss, metrics = policy_loss(
        logps,
        pack(inputs["old_logps"]),
        double(inputs["advantages"]),
        torch.repeat_interleave(torch.tensor(lengths)),
        Objective(
            epsilon=case["epsilon_low"],
            **{name: case[name] for name in (field.name for field in fields(Objective)) if name in case},
        ),
        num_tokens=sum(lengths),
        num_sequences=len(lengths),
        ref_logps=pack(inputs["ref_logps"]),
    )
    loss.backward()
    assert loss.item() == pytest.approx(recorded[index]["loss"], rel=0, abs=1e-10)
    torch.testing.assert_close(logps.grad, pack(recorded[index]["grad_logps"]), rtol=0, atol=1e-10)
    wanted = {name: value for name, value in recorded[index]["metrics"].items() if name != "entropy"}
    assert set(metrics) == set(wanted)
    for name, value in wanted.items():
        assert metrics[name].item() == pytest.approx(value, rel=0, abs=1e-10), name


# --- by hand: sequence 0 has tokens 0 and 1 and A = 1, sequence 1 has token 2 and A = -2 ---------------------------

OLD = double([-1.0, -1.0, -1.0])
RATIOS = double([1.5, 0.5, 0.5])
IDS, ADVANTAGES = torch.tensor([0, 0, 1]), double([1.0, -2.0])
TOTALS = {"num_tokens": 3, "num_sequences": 2}


@pytest.mark.parametrize(
    "options, loss, grad",
    [
        # token terms -min(1.5, 1.2), -min(0.5, 0.8), -min(-1, -1.6) = -1.2, -0.5, 1.6; only token 1 is not clipped
        ({"loss_type": "grpo"}, (-1.2 - 0.5) / 4 + 1.6 / 2, [0, -0.5 / 4, 0]),
        ({"loss_type": "dapo"}, (-1.2 - 0.5 + 1.6) / 3, [0, -0.5 / 3, 0]),
        ({"loss_type": "bnpo"}, (-1.2 - 0.5 + 1.6) / 3, [0, -0.5 / 3, 0]),
        ({"loss_type": "dr_grpo", "max_completion_length": 5}, (-1.2 - 0.5 + 1.6) / 10, [0, -0.05, 0]),
        ({"loss_type": "dapo", "epsilon_high": 0.6}, (-1.5 - 0.5 + 1.6) / 3, [-1.5 / 3, -0.5 / 3, 0]),
        # -min(1.5, 1.4) logp, -0.5 logp, +2 * 0.5 logp, with logp = log r - 1
        (
            {"loss_type": "cispo", "epsilon_high": 1.4},
            (-1.4 * (math.log(1.5) - 1) - 0.5 * (math.log(0.5) - 1) + (math.log(0.5) - 1)) / 3,
            [-1.4 / 3, -0.5 / 3, 1 / 3],
        ),
        # one ratio per sequence: sqrt(0.75) = 0.866 (inside) and 0.5 (clipped to 0.8)
        (
            {"loss_type": "dapo", "importance_sampling_level": "sequence"},
            (-2 * math.sqrt(0.75) + 1.6) / 3,
            [-math.sqrt(0.75) / 3, -math.sqrt(0.75) / 3, 0],
        ),
    ],
)
def test_by_hand(options, loss, grad):
    logps = (RATIOS.log() + OLD).requires_grad_()
    got, _ = policy_loss(logps, OLD, ADVANTAGES, IDS, Objective(**options), **TOTALS)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(logps.grad, double(grad), rtol=0, atol=1e-12)


def test_by_hand_delta_caps_bad_tokens():
    """A ratio of 3 on a bad token costs 3 without delta and 1.5, without gradient, with delta 1.5."""
    for delta, cost, slope in ((None, 3.0, 3.0), (1.5, 1.5, 0.0)):
        logps = double([math.log(3.0)]).requires_grad_()
        loss, _ = policy_loss(logps, double([0.0]), double([-1.0]), torch.tensor([0]), Objective(delta=delta),
                              num_tokens=1, num_sequences=1)  # fmt: skip
        loss.backward()
        assert loss.item() == pytest.approx(cost) and logps.grad.item() == pytest.approx(slope)


def test_by_hand_sampler_ratio_and_kl():
    """rho = e^0.5 and (capped) 2 on the policy term; KL = e^d - d - 1 with d = ref - logp = -0.5, untouched by rho."""
    logps = double([-1.0, -1.0]).requires_grad_()
    loss, metrics = policy_loss(
        logps, logps.detach(), double([1.0]), torch.tensor([0, 0]), Objective(beta=0.1), num_tokens=2, num_sequences=1,
        ref_logps=double([-1.5, -1.5]), sampler_logps=double([-1.5, -9.0]),
    )  # fmt: skip
    loss.backward()
    kl = math.exp(-0.5) + 0.5 - 1
    assert loss.item() == pytest.approx(-(math.exp(0.5) + 2) / 2 + 0.1 * kl)
    slope = 0.1 * (1 - math.exp(-0.5))
    torch.testing.assert_close(logps.grad, (double([-math.exp(0.5), -2.0]) + slope) / 2)
    assert metrics["kl"].item() == pytest.approx(kl)
    assert metrics["sampling/importance_sampling_ratio/mean"].item() == pytest.approx((math.exp(0.5) + 2) / 2)
    assert metrics["sampling/importance_sampling_ratio/min"].item() == pytest.approx(math.exp(0.5))
    assert metrics["sampling/importance_sampling_ratio/max"].item() == 2


def test_by_hand_clip_metrics():
    _, metrics = policy_loss(RATIOS.log() + OLD, OLD, ADVANTAGES, IDS, Objective(), **TOTALS)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "clip_ratio/low_mean": 1 / 3,  # token 2: r 0.5, A < 0; token 1 has r 0.5 too, but A > 0
            "clip_ratio/high_mean": 1 / 3,  # token 0: r 1.5, A > 0
            "clip_ratio/region_mean": 2 / 3,
            "clip_ratio/low_min": 0.0,
            "clip_ratio/high_max": 0.5,
        }
    )
    cispo = Objective(loss_type="cispo", epsilon_high=1.4)
    _, metrics = policy_loss(RATIOS.log() + OLD, OLD, ADVANTAGES, IDS, cispo, **TOTALS)
    assert metrics["cispo_clip_ratio"].item() == pytest.approx(1 / 3)


def test_by_hand_metrics_of_sequences_and_entropies():
    """Sequence 0 has w = 1.5 * 0.5 and rho = e^0.2, sequence 1 w = 0.5 and rho = e^-0.4; each counts once. Tokens 0 and
    2, with entropies 1 and 2, are kept."""
    data = {"sampler_logps": OLD - double([0.1, 0.1, -0.4]), "entropies": double([1.0, 0.5, 2.0])} | TOTALS
    ratios = [math.exp(0.2), math.exp(-0.4)]
    objective = Objective(vllm_importance_sampling_mode="sequence_truncate", vllm_importance_sampling_clip_max=1.1)
    _, metrics = policy_loss(RATIOS.log() + OLD, OLD, ADVANTAGES, IDS, objective, **data)
    found = [metrics[f"sampling/importance_sampling_ratio/{name}"].item() for name in ("mean", "min", "max")]
    assert found == pytest.approx([(1.1 + ratios[1]) / 2, ratios[1], 1.1])
    assert metrics["entropy"].item() == pytest.approx(3.5 / 3)

    objective = Objective("vespo", top_entropy_quantile=0.5, entropy_coef=0.1, vllm_importance_sampling_mode=None)
    loss, metrics = policy_loss(RATIOS.log() + OLD, OLD, ADVANTAGES, IDS, objective, **data)
    phi = [0.75**2 * math.exp(3 * 0.25), 0.5**3 * math.exp(2 * 0.5)]
    assert metrics["vespo/phi_seq_mean"].item() == pytest.approx(sum(phi) / 2)
    want = (-phi[0] * (math.log(1.5) - 1) + 2 * phi[1] * (math.log(0.5) - 1)) / 3  # token 1 is not kept
    assert metrics["policy_loss"].item() == pytest.approx(want)
    assert loss.item() == pytest.approx(want - 0.1 * 1.5) and metrics["entropy_coef"].item() == pytest.approx(0.1)
    assert not any(name.startswith(("sampling/", "clip_ratio/")) for name in metrics)


# --- every option, against loops --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", TYPES)
def test_equals_the_loop_written_transcription(loss_type):
    for seed in seeds(loss_type, 240):
        options, data = draw(seed)
        kept = data["entropies"] >= 0.8 if options["top_entropy_quantile"] < 1 else None
        given = options | {"kept": kept} | {name: data[name] for name in ("ref_logps", "sampler_logps")}
        ids, entropies = data["sequence_ids"], data["entropies"]
        want_loss, *want = transcription(
            data["logps"], data["old_logps"], data["advantages"], ids, (31, 8, 12), given, entropies
        )
        totals = {"num_tokens": 31, "num_sequences": 8, "entropy_threshold": 0.8, "num_entropy_tokens": 12}
        loss, _, gradients = with_gradients(as_tensors(data), objective=Objective(**options), **totals)
        assert loss.item() == pytest.approx(want_loss, rel=1e-12, abs=1e-12), seed
        for found, gradient in zip(gradients.values(), want, strict=True):
            np.testing.assert_allclose(found.numpy(), gradient, rtol=1e-10, atol=1e-12, err_msg=str(seed))


def as_tensors(data):
    return {name: None if value is None else torch.tensor(value) for name, value in data.items()}


def with_gradients(tensors, **options):
    leaves = {name: tensors[name].clone().requires_grad_() for name in ("logps", "entropies")}
    loss, metrics = policy_loss(**tensors | leaves, **options)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), metrics, dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("loss_type", TYPES)
def test_any_split_of_the_sequences_adds_up(loss_type):
    """Loss, gradients and metrics of {0, 3}, {} and {4, 1, 2, 5} add up to those of all sequences."""
    for seed in seeds(loss_type, 96):
        options, data = draw(seed)
        objective, tensors = Objective(**options), as_tensors(data)
        ids, entropies = tensors["sequence_ids"], tensors["entropies"]
        totals = {"objective": objective, "num_tokens": torch.tensor(len(ids)), "num_sequences": torch.tensor(6)}
        loss, metrics, whole = with_gradients(tensors, **totals)  # the threshold is computed from the given tokens
        if objective.top_entropy_quantile < 1:
            threshold = entropy_quantile(entropies, objective)
            totals |= {"entropy_threshold": threshold, "num_entropy_tokens": (entropies >= threshold).sum()}

        parts, losses, summed = [], [], {name: torch.zeros_like(ids, dtype=torch.float64) for name in whole}
        for chosen in ([0, 3], [], [4, 1, 2, 5]):
            tokens = torch.tensor([t for s in chosen for t in (ids == s).nonzero()[:, 0].tolist()], dtype=torch.int64)
            part = {
                name: value if value is None else value[chosen if name == "advantages" else tokens]
                for name, value in tensors.items()
            }
            part["sequence_ids"] = torch.tensor([chosen.index(s) for s in part["sequence_ids"]], dtype=torch.int64)
            part_loss, part_metrics, gradients = with_gradients(part, **totals)
            for name, gradient in gradients.items():
                summed[name][tokens] += gradient
            losses.append(part_loss)
            parts.append(part_metrics)
        torch.testing.assert_close(sum(losses), loss, rtol=1e-12, atol=1e-14)
        for name, gradient in whole.items():
            torch.testing.assert_close(summed[name], gradient, rtol=1e-12, atol=1e-14)
        merged = merge_metrics(parts)
        assert set(merged) == set(metrics)
        for name, value in metrics.items():
            torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-12, msg=f"{name}, seed {seed}")


def batch(seed=0, lengths=(3, 1, 4, 2, 5)):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    old = -torch.rand(n, generator=generator, dtype=torch.float64) - 0.1

    def near(x):
        return x + 0.4 * torch.randn(n, generator=generator, dtype=torch.float64)

    return {
        "logps": near(old), "old_logps": old, "ref_logps": near(old), "sampler_logps": near(old),
        "advantages": torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        "sequence_ids": torch.repeat_interleave(torch.tensor(lengths)),
    }  # fmt: skip


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_gradcheck(loss_type, level):
    tensors = batch()
    logps = tensors.pop("logps").requires_grad_()
    objective = Objective(loss_type, delta=1.6, beta=0.1, importance_sampling_level=level, max_completion_length=6)

    def loss(logps):
        return policy_loss(logps, **tensors, objective=objective, num_tokens=15, num_sequences=5)[0]

    assert torch.autograd.gradcheck(loss, logps)


def test_on_policy_the_gradient_is_the_policy_gradient():
    """r = 1 by construction: nothing clips, and dloss/dlogp = -weight * A for every loss type."""
    tensors = batch()
    advantages, ids = tensors["advantages"], tensors["sequence_ids"]
    for loss_type in LOSS_TYPES:
        logps = tensors["logps"].clone().requires_grad_()
        objective = Objective(loss_type, epsilon_high=5.0, max_completion_length=6)
        totals = {"num_tokens": 15, "num_sequences": 5}
        loss, metrics = policy_loss(logps, logps.detach(), advantages, ids, objective, **totals)
        loss.backward()
        weights = aggregation_weights(TokenBatch(advantages, ids, **totals), objective)
        torch.testing.assert_close(logps.grad, -weights * advantages[ids])
        assert metrics.pop("vespo/phi_seq_mean", 1) == 1
        assert not any(value.any() for value in metrics.values())


def test_metrics_are_detached_and_float32_in_gives_float32_out():
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in batch().items()}
    tensors["advantages"] = tensors["advantages"].double()  # like the result of group_advantages
    tensors["logps"].requires_grad_()
    loss, metrics = policy_loss(**tensors, objective=Objective(beta=0.1), num_tokens=15, num_sequences=5)
    assert loss.dtype == torch.float32 and loss.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("sequences", [0, 2])
def test_no_tokens_at_all(loss_type, sequences):
    """A pass that only keeps ranks in lockstep has a differentiable loss of 0."""
    logps = torch.zeros(0, requires_grad=True)
    loss, _ = policy_loss(
        logps, torch.zeros(0), torch.ones(sequences), torch.zeros(0, dtype=torch.int64),
        Objective(loss_type, epsilon_high=1.0, max_completion_length=4), num_tokens=0, num_sequences=sequences,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0 and logps.grad.shape == (0,)


def test_an_empty_sequence_counts_only_in_num_sequences():
    tensors = batch()
    with_empty = {**tensors, "advantages": torch.cat([tensors["advantages"], double([3.0])])}
    options = {"objective": Objective(), "num_tokens": 15, "num_sequences": 6}
    loss, metrics = policy_loss(**tensors, **options)
    loss_empty, metrics_empty = policy_loss(**with_empty, **options)
    assert loss == loss_empty and metrics == metrics_empty


@pytest.mark.parametrize(
    ("options", "missing"),
    [({"beta": 0.1}, "ref_logps"), ({"entropy_coef": 0.1}, "entropies"), ({"top_entropy_quantile": 0.5}, "entropies")],
)
def test_what_an_option_needs_is_named(options, missing):
    with pytest.raises(ValueError, match=missing):
        policy_loss(**batch() | {"ref_logps": None}, objective=Objective(**options), num_tokens=15, num_sequences=5)
