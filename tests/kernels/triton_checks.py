"""Checks of the Triton kernels in the interpreter on a CPU; `test_rows.py` starts them with TRITON_INTERPRET=1."""

import os

import pytest
import torch

import kernels.linear_logprob
import kernels.linear_loss
from kernels import reference, rows, rows_triton
from kernels.linear_logprob import linear_logprob
from kernels.linear_loss import linear_loss
from tests.kernels.test_linear_logprob import inputs
from tests.kernels.test_rows import CASES, case, expected, upstream

assert os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = ((torch.float32, 2e-6), (torch.bfloat16, 6e-3))  # the interpreter truncates to bfloat16


def stats_of(logits, targets, temperature=1.0, unscaled=None):
    stats = rows.Stats.empty(len(logits), logits)
    rows_triton.softmax_stats(logits, targets, temperature, unscaled, stats)
    return stats


@pytest.mark.parametrize("entropies", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_row_pass(name, temperature, entropies):
    logits, targets, rows_triton.BLOCK = case(name)
    up = upstream(len(targets), entropies)
    *want, gradient = expected(logits, targets, temperature, *up)
    for dtype, bound in DTYPES:
        out = torch.full((len(targets), 2 * logits.shape[1]), torch.nan, dtype=dtype)[:, : logits.shape[1]]
        stats = stats_of(logits, targets, temperature, None if entropies else out)
        for got, exact in zip((stats.logps, stats.entropies, stats.best_logps), want, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
        found = out.double() * (up[0] * stats.scales / -temperature)[:, None]
        if entropies:
            rows_triton.logits_gradient(logits, stats, targets, temperature, up, out)
            found = out.double()
        assert (found - gradient).norm() <= bound * gradient.norm()


@pytest.mark.parametrize("below", [0.0, 20.0, 24.0, 100.0, 1e4])
def test_targets_that_are_unlikely(below):
    """Far targets: a row is swept again from its largest logit. The error is relative to the target's log-prob."""
    logits, targets, rows_triton.BLOCK = case("odd vocabulary, many blocks")
    logits[torch.arange(7), targets] = logits.amax(-1) - below
    *want, gradient = expected(logits, targets, 1.0, torch.ones(7), None)
    unscaled = torch.empty_like(logits)
    stats = stats_of(logits, targets, unscaled=unscaled)
    for got, exact in zip((stats.logps, stats.entropies, stats.best_logps), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-5)
    assert torch.equal(stats.logps >= stats.best_logps, torch.full((7,), below == 0.0))
    assert (unscaled.double() * -stats.scales[:, None] - gradient).norm() <= 2e-6 * gradient.norm()


def test_what_is_not_finite_shows():
    logits, targets, rows_triton.BLOCK = case("whole blocks", minus_infinity=False)
    logits[0, 3], logits[1, 200], logits[2, targets[2]] = torch.nan, torch.inf, -torch.inf
    unscaled = torch.empty_like(logits)
    stats = stats_of(logits, targets, unscaled=unscaled)
    assert not (stats.logps.isfinite() | stats.scales.isfinite())[:2].any()
    assert stats.logps[2] == -torch.inf and stats.entropies[2].isfinite() and stats.best_logps[2].isfinite()
    assert unscaled[2].isfinite().all() and unscaled[0].isnan().any()


def test_heads_on_the_kernels(monkeypatch):
    """The chunks, blocks and factors of the CUDA path, with interpreted kernels."""
    monkeypatch.setattr(rows, "_fused", lambda logits: True)
    monkeypatch.setattr(kernels.linear_loss, "can_be_deferred", lambda sweep: True)
    monkeypatch.setitem(kernels.linear_logprob.CHUNKS_IN_BLOCK, "cpu", 2)
    rows_triton.BLOCK = 64
    hidden, weight, targets = inputs(rows=11, vocab=211, dtype=torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]

    def loss(logps, entropies, rows):
        return -logps.exp() * torch.arange(11)[rows]

    for function, plain in (
        (lambda *args: linear_loss(*args, loss, chunk_size=3)[0], lambda *args: reference.linear_loss(*args, loss)[0]),
        (lambda *args: linear_logprob(*args, chunk_size=3)[1], lambda *args: reference.linear_logprob(*args)[1]),
    ):
        ours, want = function(hidden, weight, targets), plain(*exact, targets)
        torch.testing.assert_close(ours.double(), want, rtol=0, atol=1e-5)
        pairs = torch.autograd.grad(ours.sum(), (hidden, weight)), torch.autograd.grad(want.sum(), exact)
        for got, wanted in zip(*pairs, strict=True):
            assert (got.double() - wanted).norm() <= 4e-6 * wanted.norm()


def test_rows_beyond_the_32_bit_range_are_found_by_their_offset():
    """Two rows are 2^31 elements apart in a buffer. Only their memory is touched, so the buffer is never filled."""
    stride = 2**31 + 64
    far = torch.empty(stride + 64, dtype=torch.float32)  # 8 GiB of addresses, a few pages of memory
    logits = far.as_strided((2, 64), (stride, 1))
    values, targets, rows_triton.BLOCK = case("whole blocks", minus_infinity=False)
    logits.copy_(values[:2, :64])
    ones, targets = torch.ones(2), targets[:2] % 64
    want, *_, gradient = expected(values[:2, :64], targets, 1.0, ones, None)
    stats = stats_of(logits, targets)
    torch.testing.assert_close(stats.logps.double(), want, rtol=0, atol=1e-5)
    rows_triton.logits_gradient(logits, stats, targets, 1.0, (ones, None), logits)
    torch.testing.assert_close(logits.double(), gradient, rtol=0, atol=1e-5)
