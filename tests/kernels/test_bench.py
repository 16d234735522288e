import math

import pytest
import torch

from kernels import bench, rows_triton
from kernels import linear_logprob as head
from kernels.bench_peers import FLOOR, NAIVE, OURS, make_case, one_sweep
from tests.launch import run


def test_the_bench_runs_on_a_cpu(tmp_path):
    argv = ["--tokens", "512", "--rounds", "1", "--chunk_elements", "200000", "--only", FLOOR, OURS, NAIVE]
    code, printed = run("kernels.bench", argv, tmp_path / "log")
    assert code == 0, printed
    rows = {cells[0]: cells[1:] for line in printed.splitlines() if len(cells := line.strip("| ").split(" | ")) == 10}
    assert list(rows)[1:] == [FLOOR, OURS, NAIVE] and "chunks of 200000 logits" in printed
    assert rows[OURS][-1] == "yes" and all(float(error) < 1e-5 for error in rows[OURS][5:8])


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.cuda.OutOfMemoryError("2 GiB"), "out of memory"),
        (ModuleNotFoundError("no", name="liger_kernel"), "liger_kernel is not installed"),
        (ModuleNotFoundError("no triton", name="triton"), "failed: ModuleNotFoundError no triton"),
        (RuntimeError("a\n| b"), "failed: RuntimeError a / b"),
    ],
)
def test_what_a_failure_is_called(error, note):
    assert bench.failure(error) == note


def test_a_gradient_that_is_no_number_is_the_largest_error():
    case = make_case(8, 50, 256, torch.device("cpu"))
    broken = case.first(10)

    def run(part):
        bench.step(one_sweep, part)
        part.weight.grad[3, 3] = math.nan
        return part

    logps, dx, dw = bench.errors(run, broken, bench.exactly(case.first(10)))
    assert max(logps, dx) < 1e-5 and dw == math.inf


def test_tuning_is_undone():
    before = rows_triton.BLOCK, dict(head.CHUNK_ELEMENTS)
    with bench.tuned(torch.device("cpu"), CHUNK_ELEMENTS=1000, BLOCK=64):
        assert (rows_triton.BLOCK, head.CHUNK_ELEMENTS["cpu"]) == (64, 1000)
    assert (rows_triton.BLOCK, head.CHUNK_ELEMENTS) == before
