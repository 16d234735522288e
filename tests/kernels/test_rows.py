"""The row pass: plain torch against float64, and the Triton kernels, interpreted on the CPU, against the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import rows

ROOT = Path(__file__).parents[2]
CASES = {  # rows, vocabulary, elements at a time
    "odd vocabulary, many blocks": (7, 3001, 512),
    "one row, part of a block": (1, 37, 8192),
    "whole blocks": (3, 256, 64),
    "no rows": (0, 64, 64),
}


def case(name, minus_infinity=True):
    count, vocab, block = CASES[name]
    generator = torch.Generator().manual_seed(count)
    logits = 4 * torch.randn(count, vocab, generator=generator)
    if count and minus_infinity:
        logits[0, : vocab // 3] = -torch.inf  # tokens that cannot be, at the beginning of a row
        logits[-1, -1] = -torch.inf
    return logits, torch.randint(vocab // 2, vocab - 1, (count,), generator=generator), block


def expected(logits, targets, temperature, grad_logps, grad_entropies):
    """Stats and gradient in float64, by autograd."""
    exact = logits.double().requires_grad_()
    log_probs = (exact / temperature).log_softmax(-1)
    kept = torch.where(logits > -torch.inf, log_probs, 0.0)
    logps, entropies = (
        log_probs.gather(1, targets[:, None])[:, 0],
        -(kept.exp() * kept).masked_fill(kept == 0, 0).sum(-1),
    )
    total = (grad_logps.double() * logps).sum()
    if grad_entropies is not None:
        total = total + (grad_entropies.double() * entropies).sum()
    [gradient] = torch.autograd.grad(total, exact)
    return logps.detach(), entropies.detach(), log_probs.amax(-1).detach(), gradient


def upstream(count, entropies):
    up = torch.linspace(-1, 2, count)
    return up, up.cos() if entropies else None


def test_triton_in_the_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported, which others here have done."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", str(Path(__file__).with_name("triton_checks.py"))]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("entropies", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_plain(name, temperature, entropies):
    logits, targets, _ = case(name, minus_infinity=False)
    up = upstream(len(targets), entropies)
    *want, gradient = expected(logits, targets, temperature, *up)
    for scratch in (None, torch.empty_like(logits)):
        spent = logits.clone()
        stats = rows.softmax_stats(spent, targets, temperature, scratch)
        for got, exact in zip((stats.logps, stats.entropies, stats.best_logps), want, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
        options = {"dtype": torch.float32, "scratch": scratch}
        found = rows.logits_gradient(spent, stats, targets, temperature, *up, **options)
        assert (found.double() - gradient).norm() <= 2e-6 * gradient.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [151936, 3001])
def test_on_a_gpu(vocab):
    """Compiled, aliased in bfloat16, bit-repeatable; rows beyond 2^31 elements."""
    count = 15000 if vocab > 100_000 else 64
    generator = torch.Generator("cuda").manual_seed(0)
    logits = 4 * torch.randn(count, vocab, generator=generator, device="cuda")
    targets = torch.randint(vocab, (count,), generator=generator, device="cuda")
    picked = torch.tensor([0, 1, count - 1], device="cuda")
    up = torch.linspace(-1, 2, count, device="cuda")
    want = expected(logits[picked], targets[picked], 0.7, up[picked], up[picked].cos())
    found = []
    for _ in range(2):
        spent = logits.clone()
        stats = rows.softmax_stats(spent, targets, 0.7)
        gradient = rows.logits_gradient(spent, stats, targets, 0.7, up, up.cos(), dtype=torch.bfloat16)
        found.append((stats.logps[picked], stats.entropies[picked], stats.best_logps[picked], gradient[picked].clone()))
        del spent, gradient
    assert all(map(torch.equal, *found))
    for got, exact in zip(found[0][:3], want[:3], strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-4)
    assert (found[0][3].double() - want[3]).norm() <= 4e-3 * want[3].norm()
