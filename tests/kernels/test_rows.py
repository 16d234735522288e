"""The row pass in plain torch, and in the Triton kernels interpreted on the CPU, compared with float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import rows

ROOT = Path(__file__).parents[2]
CASES = {  # rows, vocabulary, elements per step
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
        logits[0, : vocab // 3] = -torch.inf  # impossible tokens at the beginning of a row
        logits[-1, -1] = -torch.inf
    return logits, torch.randint(vocab // 2, vocab - 1, (count,), generator=generator), block


def expected(logits, targets, temperature, grad_logps, grad_entropies):
    """Statistics and gradient in float64, by autograd."""
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
    """In a separate process: Triton reads TRITON_INTERPRET at import, and other tests have already imported it."""
    pytest.importorskip("triton")
    checks = str(Path(__file__).with_name("triton_checks.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", checks]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("vocab", ["odd", "a multiple of 16"])
@pytest.mark.parametrize("kernel", ["_stats_kernel", "_gradient_kernel"])
@pytest.mark.parametrize("whole", [False, True])
def test_compiles_for_an_h100(kernel, whole, vocab):
    """It compiles to machine code, which needs no GPU, and loads 16 bytes at once if the vocabulary allows it."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from kernels import rows_triton

    function = getattr(rows_triton, kernel)
    absent = None if whole else "unscaled" if kernel == "_stats_kernel" else "grad_entropies"
    types = dict.fromkeys(function.arg_names, "*fp32") | {"targets": "*i64", "unscaled": "*bf16", "gradient": "*bf16"}
    types |= dict.fromkeys(("stride", "unscaled_stride", "gradient_stride", "vocab"), "i32")
    types |= dict.fromkeys(("scale", "inverse_temperature"), "fp32") | dict.fromkeys((absent, "block"), "constexpr")
    names = {name: (i,) for i, name in enumerate(function.arg_names)}
    aligned = [name for name in names if types[name][0] == "*" or (types[name] == "i32" and vocab != "odd")]
    constants = {names["block"]: 2048} | ({names[absent]: None} if absent else {})
    aligned = {names[name]: [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(function, {name: types[name] for name in names}, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": rows_triton.WARPS})
    assert made.asm["cubin"] and ".local" not in made.asm["ptx"]
    assert ("ld.global.v4" in made.asm["ptx"]) == (vocab != "odd")


@pytest.mark.parametrize("entropies", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_plain(name, temperature, entropies):
    logits, targets, _ = case(name, minus_infinity=False)
    up = upstream(len(targets), entropies)
    *want, gradient = expected(logits, targets, temperature, *up)
    for scratch, apart in ((None, True), (torch.empty_like(logits), True), (torch.empty_like(logits), False)):
        spent, out = logits.clone(), torch.empty_like(logits) if apart else scratch
        stats = rows.softmax_stats(spent, targets, temperature, scratch, unscaled=None if entropies else out)
        for got, exact in zip((stats.logps, stats.entropies, stats.best_logps), want, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
        if not entropies:
            found = out.double() * (up[0] * stats.scales / -temperature)[:, None]
            assert (found - gradient).norm() <= 2e-6 * gradient.norm()
        rows.logits_gradient(spent, stats, targets, temperature, up, out)
        assert (out.double() - gradient).norm() <= 2e-6 * gradient.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocab", [151936, 3001])
def test_on_a_gpu(vocab):
    """Compiled kernels, bitwise reproducible, with rows beyond 2^31 elements, unlikely targets and -inf."""
    count = 15000 if vocab > 100_000 else 64
    generator = torch.Generator("cuda").manual_seed(0)
    logits = 4 * torch.randn(count, vocab, generator=generator, device="cuda")
    targets = torch.randint(1, vocab, (count,), generator=generator, device="cuda")
    picked = torch.tensor([0, 1, 2, 3, count - 1], device="cuda")
    logits[0, targets[0]], logits[1, targets[1]], logits[2, 0] = -50.0, 40.0, -torch.inf
    up = torch.linspace(-1, 2, count, device="cuda")
    want = expected(logits[picked], targets[picked], 0.7, up[picked], None)
    [both] = expected(logits[picked], targets[picked], 0.7, up[picked], up[picked].cos())[3:]
    found, out = [], torch.empty_like(logits, dtype=torch.bfloat16)
    for _ in range(2):
        stats = rows.softmax_stats(logits, targets, 0.7, unscaled=out.fill_(torch.nan))
        unscaled = out[picked] * (up * stats.scales / -0.7)[picked, None]
        assert torch.equal(stats.best_logps == stats.logps, logits.amax(-1) == logits.gather(1, targets[:, None])[:, 0])
        rows.logits_gradient(logits, stats, targets, 0.7, (up, up.cos()), out.fill_(torch.nan))
        found.append((stats.logps[picked], stats.entropies[picked], stats.best_logps[picked], unscaled, out[picked]))
        assert not out.isnan().any()
    assert all(map(torch.equal, *found))
    for got, exact in zip(found[0][:3], want[:3], strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-4)
    for got, exact in ((found[0][3], want[3]), (found[0][4], both)):
        assert (got.double() - exact).norm() <= 4e-3 * exact.norm()
