"""kernels.linear_logprob compared with its reference implementation: values, gradients, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kernels import reference
from kernels.linear_logprob import linear_logprob
from tests.commands import ROOT, environment


def inputs(rows=13, dim=8, vocab=37, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=generator)


def gradients(function, hidden, weight, targets, **kwargs):
    """Values and gradients of a sum in which every row of both outputs has a different upstream gradient."""
    logps, entropies, best_logps = function(hidden, weight, targets, **kwargs)
    up = torch.linspace(-1, 2, len(targets), dtype=logps.dtype)
    grads = torch.autograd.grad((up * logps).sum() + (up.cos() * entropies).sum(), (hidden, weight))
    assert not best_logps.requires_grad
    return logps.detach(), entropies.detach(), *grads, best_logps


@pytest.mark.parametrize("chunk_size", [1, 5, 13, 1000, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_reference(chunk_size, temperature):
    args = inputs()
    ours = gradients(linear_logprob, *args, temperature=temperature, chunk_size=chunk_size)
    for got, want in zip(ours, gradients(reference.linear_logprob, *args, temperature=temperature), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    hidden, weight, targets = inputs(rows=5, dim=3, vocab=7)

    def function(hidden, weight):
        return linear_logprob(hidden, weight, targets, temperature=0.8, chunk_size=2)

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_used_alone(output):
    hidden, weight, targets = inputs()
    ours = torch.autograd.grad(linear_logprob(hidden, weight, targets)[output].sum(), (hidden, weight))
    plain = torch.autograd.grad(reference.linear_logprob(hidden, weight, targets)[output].sum(), (hidden, weight))
    for got, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_get_float32_logits(dtype):
    """Compared with float64 on the same numbers, only the rounding of float32 and of the gradients' dtype remains."""
    hidden, weight, targets = inputs(rows=29, dim=32, vocab=211, dtype=dtype)
    exact = gradients(
        reference.linear_logprob,
        hidden.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
        targets,
    )
    logps, entropies, grad_hidden, grad_weight, _ = gradients(linear_logprob, hidden, weight, targets, chunk_size=4)
    assert logps.dtype == entropies.dtype == torch.float32
    assert grad_hidden.dtype == grad_weight.dtype == dtype
    torch.testing.assert_close(logps.double(), exact[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(entropies.double(), exact[1], rtol=0, atol=2e-5)
    for got, want in zip((grad_hidden, grad_weight), exact[2:4], strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < (2e-6 if dtype == torch.float32 else 3e-3)


def test_entropy_is_exact_for_large_logits():
    """logsumexp - sum(p z) in float32 would have errors of 1e-4 and more for logits in the thousands."""
    hidden, weight, targets = inputs(rows=64, dtype=torch.float32, scale=1.0)
    shift = torch.full((1, 8), 1000.0)
    hidden, weight = hidden.detach(), weight.detach()
    wide_hidden, wide_weight = torch.cat([hidden, torch.ones(64, 8)], 1), torch.cat([weight, shift.expand(37, 8)], 1)
    logps, entropies, _ = linear_logprob(wide_hidden, wide_weight, targets)  # every logit is 8000 higher
    logits = (wide_hidden @ wide_weight.T).double()  # rounded like ours
    log_probs = logits.log_softmax(-1)
    torch.testing.assert_close(entropies.double(), -(log_probs.exp() * log_probs).sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(logps.double(), log_probs[torch.arange(64), targets], rtol=0, atol=1e-5)


def test_near_certain_tokens_keep_their_small_gradient():
    hidden = torch.tensor([[14.0, 0.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    logps, entropies, _ = linear_logprob(hidden, weight, torch.tensor([0]))
    logps.sum().backward()
    assert -1e-6 < logps.item() < 0 and entropies.item() > 0
    assert hidden.grad[0, 1].item() == pytest.approx(-8.315e-7, rel=1e-3)


def test_no_rows():
    hidden, weight, targets = inputs(rows=0)
    logps, entropies, grad_hidden, grad_weight, _ = gradients(linear_logprob, hidden, weight, targets)
    assert logps.shape == entropies.shape == (0,)
    assert grad_hidden.shape == (0, 8)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_gradient_only_where_needed(wanted):
    hidden, weight, targets = inputs()
    other = weight if wanted == "hidden" else hidden
    leaf = hidden if wanted == "hidden" else weight
    other.requires_grad_(False)
    linear_logprob(hidden, weight, targets)[0].sum().backward()
    assert other.grad is None
    want = torch.autograd.grad(reference.linear_logprob(hidden, weight, targets)[0].sum(), leaf)[0]
    torch.testing.assert_close(leaf.grad, want)


def test_without_gradient_nothing_is_saved():
    hidden, weight, targets = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        with torch.no_grad():
            logps, entropies, _ = linear_logprob(hidden, weight, targets)
        assert not saved and logps.grad_fn is None and entropies.grad_fn is None
        with_gradient = linear_logprob(hidden, weight, targets)
        assert sum(tensor.numel() for tensor in saved) <= hidden.numel() + weight.numel() + 2 * len(targets)
    assert torch.equal(logps, with_gradient[0]) and torch.equal(entropies, with_gradient[1])


def test_autocast_does_not_lower_the_logits():
    hidden, weight, targets = inputs(dtype=torch.float32)
    plain = gradients(linear_logprob, hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(linear_logprob, hidden, weight, targets)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize(
    "change", [{"temperature": 0.0}, {"temperature": float("nan")}, {"targets": torch.zeros(4).long()}]
)
def test_refuses(change):
    hidden, weight, targets = inputs()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(ValueError):
        linear_logprob(**arguments)


MEMORY = """
import resource, torch
from kernels.linear_logprob import linear_logprob
rows, dim, vocab = 2048, 16, 150_000
hidden, weight = torch.randn(rows, dim, requires_grad=True), torch.randn(vocab, dim, requires_grad=True)
targets = torch.randint(0, vocab, (rows,))
def step(n):
    logps, entropies, _ = linear_logprob(hidden[:n], weight, targets[:n])
    (logps.sum() + entropies.sum()).backward()
step(1)  # what the first call costs for good
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_rows_times_vocabulary():
    """The logits alone would need 1.2 GB, their softmax and gradient another 2.4 GB."""
    command = [sys.executable, "-c", MEMORY]
    env = environment(OMP_NUM_THREADS="1")
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    grown = int(result.stdout) / 1024  # MiB
    assert grown < 400
