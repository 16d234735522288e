"""grpo_core.loss: TRL's numbers, hand-computed cases, a loop-written NumPy transcription, gradcheck, additivity."""

import itertools
import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_core.loss import LOSS_TYPES, Objective, TokenBatch, aggregation_weights, entropy_bonus, policy_loss
from sft_core.run.logging import merge_metrics

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
        # one ratio a sequence: sqrt(0.75) = 0.866 (inside) and 0.5 (clipped to 0.8)
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


# --- the design's mathematics, written as loops ----------------------------------------------------------------


def transcription(logps, old, advantages, ids, totals, o):
    """Loss and gradient in NumPy, one token at a time; the gradient from the formula, not from autograd."""
    tokens, sequences = totals
    members = [[t for t in range(len(ids)) if ids[t] == s] for s in range(len(advantages))]
    high = o["epsilon"] if o["epsilon_high"] is None else o["epsilon_high"]
    loss, grad = 0.0, np.zeros(len(logps))
    for s, own in enumerate(members):
        for t in own:
            weight = {
                "grpo": 1 / (sequences * len(own)),
                "dr_grpo": 1 / (sequences * (o["max_completion_length"] or 1)),
            }.get(o["loss_type"], 1 / tokens)
            reach = [t] if o["importance_sampling_level"] == "token" else own  # the tokens whose log-probs make r
            r = math.exp(sum(logps[u] - old[u] for u in reach) / len(reach))
            rho = 1.0
            if o["sampler_logps"] is not None:
                rho = min(math.exp(old[t] - o["sampler_logps"][t]), o["sampler_ratio_cap"])
            a = advantages[s]
            if o["loss_type"] == "cispo":
                loss += weight * rho * -min(r, high) * a * logps[t]
                grad[t] += weight * rho * -min(r, high) * a
            else:
                capped = r if o["delta"] is None else min(r, o["delta"])
                clipped = min(max(r, 1 - o["epsilon"]), 1 + high)
                loss += weight * rho * -min(capped * a, clipped * a)
                free = capped * a < clipped * a or capped == clipped  # which of the two the minimum took
                if free and capped == r:
                    for u in reach:
                        grad[u] += weight * rho * -a * r / len(reach)
            if o["beta"]:
                d = o["ref_logps"][t] - logps[t]
                loss += weight * o["beta"] * (math.exp(d) - d - 1)
                grad[t] += weight * o["beta"] * (1 - math.exp(d))
    return loss, grad


AXES = (LOSS_TYPES, ("token", "sequence"), (None, 1.5), (0.0, 0.04), (False, True), (None, 0.28))
GRID = [point for point in itertools.product(*AXES) if point[0] != "cispo" or point[2] is None]  # cispo has no delta


@pytest.mark.parametrize("loss_type, level, delta, beta, corrected, high", GRID)
def test_equals_the_loop_written_transcription(loss_type, level, delta, beta, corrected, high):
    if loss_type == "cispo":
        high = 1.4 if high is None else 5.0
    rng = np.random.default_rng([LOSS_TYPES.index(loss_type), level == "token", delta is None, corrected])
    ids = rng.permutation(np.repeat(np.arange(6), [4, 1, 7, 3, 2, 5]))  # sequences need not lie together
    old = -rng.exponential(1.0, len(ids))
    logps = old + rng.normal(0, 0.5, len(ids))
    advantages = np.array([1.3, -0.4, 0.0, -1.7, 0.6, 0.9])
    options = {
        "loss_type": loss_type, "importance_sampling_level": level, "delta": delta, "beta": beta, "epsilon": 0.2,
        "epsilon_high": high, "max_completion_length": 9, "sampler_ratio_cap": 1.3,
    }  # fmt: skip
    others = {"ref_logps": logps + rng.normal(0, 0.3, len(ids)), "sampler_logps": None}
    if corrected:
        others["sampler_logps"] = old + rng.normal(0, 0.4, len(ids))
    want_loss, want_grad = transcription(logps, old, advantages, ids, (31, 8), options | others)

    ours = torch.tensor(logps, requires_grad=True)
    tensors = {name: None if value is None else torch.tensor(value) for name, value in others.items()}
    loss, _ = policy_loss(
        ours, torch.tensor(old), torch.tensor(advantages), torch.tensor(ids), Objective(**options), num_tokens=31,
        num_sequences=8, **tensors,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(want_loss, rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(ours.grad.numpy(), want_grad, rtol=1e-10, atol=1e-12)


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


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_any_split_of_the_sequences_adds_up(loss_type, level):
    """Loss, gradient and metrics of {0, 3}, {} and {4, 1, 2} are those of the whole."""
    tensors = batch()
    high = 1.2 if loss_type == "cispo" else None
    objective = Objective(
        loss_type, epsilon_high=high, beta=0.04, importance_sampling_level=level, max_completion_length=6
    )
    options = {"objective": objective, "num_tokens": torch.tensor(15), "num_sequences": torch.tensor(5)}
    whole = tensors["logps"].clone().requires_grad_()
    loss, metrics = policy_loss(**{**tensors, "logps": whole}, **options)
    loss.backward()

    parts, losses, grad = [], [], torch.zeros_like(whole)
    for chosen in ([0, 3], [], [4, 1, 2]):
        tokens = [t for s in chosen for t in (tensors["sequence_ids"] == s).nonzero()[:, 0].tolist()]
        part = {
            name: value[chosen if name == "advantages" else torch.tensor(tokens, dtype=torch.int64)]
            for name, value in tensors.items()
        }
        part["sequence_ids"] = torch.tensor([chosen.index(s) for s in part["sequence_ids"]], dtype=torch.int64)
        logps = part["logps"].requires_grad_()
        part_loss, part_metrics = policy_loss(**part, **options)
        part_loss.backward()
        grad[tokens] += logps.grad
        losses.append(part_loss.detach())
        parts.append(part_metrics)
    torch.testing.assert_close(sum(losses), loss.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, whole.grad, rtol=1e-12, atol=1e-14)
    merged = merge_metrics(parts)
    assert set(merged) == set(metrics)
    for name, value in metrics.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-12, msg=name)


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
        assert not any(value.any() for value in metrics.values())


def test_metrics_are_detached_and_float32_in_gives_float32_out():
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in batch().items()}
    tensors["advantages"] = tensors["advantages"].double()  # as group_advantages gives them
    tensors["logps"].requires_grad_()
    loss, metrics = policy_loss(**tensors, objective=Objective(beta=0.1), num_tokens=15, num_sequences=5)
    assert loss.dtype == torch.float32 and loss.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("sequences", [0, 2])
def test_no_tokens_at_all(loss_type, sequences):
    """A pass made only to keep ranks in step: a loss of 0 that can be differentiated."""
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


def test_entropy_bonus_is_additive():
    entropies = double([0.5, 1.0, 2.5])
    assert entropy_bonus(entropies, 3, 0.1).item() == pytest.approx(-0.1 * 4 / 3)
    split = entropy_bonus(entropies[:1], 3, 0.1) + entropy_bonus(entropies[1:], torch.tensor(3), 0.1)
    assert split.item() == pytest.approx(-0.1 * 4 / 3)


@pytest.mark.parametrize(
    "options, names",
    [
        ({"loss_type": "ppo"}, "loss_type"),
        ({"loss_type": "cispo"}, "epsilon_high"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "delta": 2.0}, "delta"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"delta": 0.9}, "delta"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"beta": -1.0}, "beta"),
        ({"sampler_ratio_cap": 0.0}, "sampler_ratio_cap"),
    ],
)
def test_refuses(options, names):
    with pytest.raises(ValueError, match=names):
        Objective(**options)


def test_the_kl_needs_a_reference():
    with pytest.raises(ValueError, match="ref_logps"):
        policy_loss(**batch() | {"ref_logps": None}, objective=Objective(beta=0.1), num_tokens=15, num_sequences=5)
