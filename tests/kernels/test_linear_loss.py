"""kernels.linear_loss compared with its reference implementation and linear_logprob; objectives that use it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels.linear_logprob
import kernels.linear_loss
from grpo_core.loss import Objective, TokenBatch, policy_loss, token_loss
from kernels import reference
from kernels.linear_logprob import linear_logprob
from kernels.linear_loss import linear_loss
from tests.kernels.test_linear_logprob import inputs

UP = torch.linspace(-1, 2, 13, dtype=torch.float64)


def both(logps, entropies, rows):
    """A loss that depends nonlinearly on both outputs."""
    return UP[rows] * logps.exp() + UP[rows].cos() * entropies**2


def alone(logps, entropies, rows):
    return -UP[rows] * logps


def gradients(function, args, token_loss, **options):
    loss, *figures = function(*args, token_loss, **options)
    assert not any(figure.requires_grad for figure in figures)
    return loss.detach(), *torch.autograd.grad(3.0 * loss, args[:2]), *figures


@pytest.mark.parametrize("chunk_size", [1, 5, 13, None])
@pytest.mark.parametrize("loss", [both, alone])
def test_equals_the_reference(loss, chunk_size):
    args = inputs()
    ours = gradients(linear_loss, args, loss, temperature=0.7, chunk_size=chunk_size, entropy_gradient=loss is both)
    for got, want in zip(ours, gradients(reference.linear_loss, args, loss, temperature=0.7), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Use the CUDA path in plain torch: logit gradients up to one factor per row, and GEMMs per block of chunks."""
    monkeypatch.setattr(kernels.linear_loss, "can_be_deferred", lambda sweep: True)
    monkeypatch.setitem(kernels.linear_logprob.CHUNKS_IN_BLOCK, "cpu", 2)


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 13])
@pytest.mark.parametrize("active", [None, torch.arange(13) % 3 == 1])
def test_deferred_equals_the_reference(as_on_cuda, chunk_size, active):
    def loss(logps, entropies, rows):
        return alone(logps.exp(), None, rows) * (1.0 if active is None else active[rows])

    args = inputs()
    ours = gradients(linear_loss, args, loss, temperature=0.7, chunk_size=chunk_size, active=active)
    for got, want in zip(ours, gradients(reference.linear_loss, args, loss, temperature=0.7), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_same_bits_as_by_way_of_log_probs():
    """This holds in plain torch; compiled kernels with and without the unscaled gradient may add in another order."""
    args = inputs(rows=29, dim=32, vocab=211, dtype=torch.bfloat16)
    figures = linear_loss(*args, lambda logps, _, rows: -logps, chunk_size=8)[1:]
    assert all(map(torch.equal, figures, linear_logprob(*args, chunk_size=8)))


def test_rows_that_are_not_active_count_but_do_not_learn():
    hidden, weight, targets = inputs()
    active = torch.arange(13) % 3 == 1

    def some(logps, entropies, rows):
        return both(logps, entropies, rows) * torch.where(active[rows], 1.0, 0.0) + 2.0

    args, options = (hidden, weight, targets), {"temperature": 0.7, "chunk_size": 4, "entropy_gradient": True}
    want = gradients(reference.linear_loss, args, some, temperature=0.7)
    products = []
    for mask in (active, torch.zeros(13, dtype=torch.bool), torch.ones(13, dtype=torch.bool), None):
        loss, *_ = linear_loss(*args, some, active=mask, **options)
        with FlopCounterMode(display=False) as counter:
            linear_loss(*args, some, active=mask, **options)
        products.append(counter.get_total_flops() / (2 * 8 * 37))  # rows that went through a GEMM
        torch.testing.assert_close(loss.detach(), want[0])
    # GEMMs of the logits, of the hidden states, and the first of each accumulator; later additions are not counted.
    assert products == [13 + 4 + 4, 13, 13 + 13 + 4, 13 + 13 + 4]
    ours = gradients(linear_loss, args, some, active=active, **options)
    for got, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_a_loss_that_depends_on_entropies_unannounced_is_refused():
    with pytest.raises(ValueError, match="entropy_gradient=True"):
        linear_loss(*inputs(), both)


def test_without_gradient_and_twice():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            loss, logps, *_ = linear_loss(hidden, weight, targets, alone)
    assert counter.get_total_flops() == 2 * 8 * 37 * 13 and not loss.requires_grad
    loss, *_ = linear_loss(hidden, weight, targets, alone)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
    with pytest.raises(RuntimeError, match="require grad"):  # no second derivative, rather than a wrong one
        [slope] = torch.autograd.grad(linear_loss(hidden, weight, targets, alone)[0], hidden, create_graph=True)
        slope.sum().backward()
    hidden, weight, targets = inputs(rows=0)
    loss, *_ = linear_loss(hidden, weight, targets, lambda logps, *_: logps)
    loss.backward()
    assert hidden.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_only_where_needed(as_on_cuda, wanted):
    """With adapters the head is frozen; hidden states may need no gradient; in inference mode there is none."""
    args = inputs()
    args[1 - wanted].requires_grad_(False)
    loss, *figures = linear_loss(*args, alone, chunk_size=4)
    plain = reference.linear_loss(*args, alone)[0]
    torch.testing.assert_close(*(torch.autograd.grad(value, args[wanted])[0] for value in (loss, plain)))
    with torch.inference_mode():
        assert torch.equal(linear_loss(*args, alone, chunk_size=4)[1], figures[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    """There is no device sync, a repetition is bitwise equal, and 1.5 GiB suffice for any number of rows. The gradients
    are at least as close to float64's as those of plain bfloat16."""

    def case(rows, vocab, dim=896):
        hidden, weight, targets = (x.detach().cuda() for x in inputs(rows, dim, vocab, torch.bfloat16))
        return hidden.requires_grad_(), (weight.detach() * 0.1).requires_grad_(), targets

    def loss(logps, _, rows):
        return -logps

    for rows in (8192, 20000):
        args = case(rows, 151936)
        once = gradients(linear_loss, args, loss, temperature=0.9)
        for active in (torch.arange(rows) % 7 > 0, None):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("error")
            try:
                again = gradients(linear_loss, args, loss, temperature=0.9, active=active)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        extra = torch.cuda.max_memory_allocated() - before - 2 * args[0].numel() - 4 * args[1].numel()
        assert extra <= 1.5 * 2**30
        assert all(map(torch.equal, once, again))
        del once, again
    args = case(512, 20011)
    ours = gradients(linear_loss, args, loss)
    exact = gradients(reference.linear_loss, [x.detach().double().requires_grad_() for x in args[:2]] + [args[2]], loss)
    plain = (args[0] @ args[1].T).float().log_softmax(-1).gather(1, args[2][:, None])
    plain = torch.autograd.grad(-3.0 * plain.sum(), args[:2])
    torch.testing.assert_close(ours[3].double(), exact[3], rtol=0, atol=1e-4)
    for got, other, want in zip(ours[1:3], plain, exact[1:3], strict=True):
        assert (got.double() - want).norm() <= 1.1 * (other.double() - want).norm()


OBJECTIVES = {
    "grpo": {},
    "kl and correction": {"beta": 0.1, "sampler": True},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.5},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 9},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2, "sampler": True},
    "sapo": {"loss_type": "sapo", "sampler": True, "vllm_importance_sampling_mode": "token_mask"},
    "luspo": {"loss_type": "luspo", "beta": 0.1, "use_bias_correction_kl": True},
    "entropy": {"entropy_coef": 0.3},
    "high entropies": {"top_entropy_quantile": 0.5, "beta": 0.1},
    "high entropies and bonus": {"top_entropy_quantile": 0.5, "entropy_coef": 0.3},
    "first update": {"on_policy": True, "sampler": True},
    "a function of one's own": {"loss_type": "tests.rewards_for_tests:reinforce"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_chunk_by_chunk_is_policy_loss(name):
    options = dict(OBJECTIVES[name])
    hidden, weight, targets = inputs()
    generator = torch.Generator().manual_seed(1)
    ids, advantages = torch.tensor([0] * 4 + [1] * 3 + [2] * 6), torch.tensor([0.7, -1.1, 0.0])
    base = reference.linear_logprob(hidden, weight, targets)[0].detach()
    old, ref, sampler = (base + 0.3 * torch.randn(13, generator=generator, dtype=torch.float64) for _ in range(3))
    on_policy = options.pop("on_policy", False)
    data = {"num_tokens": 40, "num_sequences": 6, "ref_logps": ref}
    data["sampler_logps"] = sampler if options.pop("sampler", False) else None
    objective = Objective(**options)
    assert objective.by_token
    logps, entropies, _ = reference.linear_logprob(hidden, weight, targets)
    threshold = entropies.detach().median()
    loss, _ = policy_loss(
        logps, logps.detach() if on_policy else old, advantages, ids, objective, **data,
        entropies=entropies, entropy_threshold=threshold, num_entropy_tokens=20,
    )  # fmt: skip
    if objective.top_entropy_quantile < 1:
        data |= {"kept": entropies.detach() >= threshold, "num_kept": 20}
    elif objective.entropy_coef:
        data |= {"num_kept": 20}
    losses = token_loss(TokenBatch(advantages, ids, old_logps=None if on_policy else old, **data), objective)
    options = {"chunk_size": 5, "entropy_gradient": objective.entropy_coef > 0}
    ours = gradients(linear_loss, (hidden, weight, targets), losses, **options)
    torch.testing.assert_close(ours[0], loss.detach(), rtol=1e-12, atol=1e-12)
    for got, want in zip(ours[1:3], torch.autograd.grad(3.0 * loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert want.norm() > 0
