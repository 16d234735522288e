"""The Triton kernels as the interpreter runs them on a CPU; `test_rows.py` starts this with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from kernels import rows, rows_triton
from tests.kernels.test_rows import CASES, case, expected, upstream

assert os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("entropies", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_row_pass(name, temperature, entropies):
    logits, targets, rows_triton.BLOCK = case(name)
    up = upstream(len(targets), entropies)
    *want, gradient = expected(logits, targets, temperature, *up)
    stats = rows.Stats(*rows_triton.softmax_stats(logits, targets, temperature))
    for got, exact in zip((stats.logps, stats.entropies, stats.best_logps), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 6e-3)):  # the interpreter cuts bfloat16 off
        spent = logits.clone()
        found = rows_triton.logits_gradient(spent, stats, targets, temperature, *up, dtype)
        assert found.dtype == dtype and found.data_ptr() == spent.data_ptr()
        assert (found.double() - gradient).norm() <= bound * gradient.norm()


def test_rows_beyond_the_32_bit_range_are_found_by_their_offset():
    """Two rows of a buffer 2^31 elements apart: only their own memory is touched, so the buffer is never filled."""
    stride = 2**31 + 64
    far = torch.empty(stride + 64, dtype=torch.float32)  # 8 GiB of addresses, a few pages of memory
    logits = far.as_strided((2, 64), (stride, 1))
    values, targets, rows_triton.BLOCK = case("whole blocks", minus_infinity=False)
    logits.copy_(values[:2, :64])
    stats = rows_triton.softmax_stats(logits, targets[:2] % 64, 1.0)
    want = expected(values[:2, :64], targets[:2] % 64, 1.0, torch.ones(2), None)[0]
    torch.testing.assert_close(stats[0].double(), want, rtol=0, atol=1e-5)
