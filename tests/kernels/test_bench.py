import math

import pytest
import torch

from kernels import bench, rows_triton
from kernels import linear_logprob as head
from kernels.bench_peers import CANDIDATES, FLOOR, NAIVE, OURS, make_case, one_sweep
from tests.launch import run


def test_the_bench_runs_on_a_cpu(tmp_path):
    argv = ["--tokens", "512", "--rounds", "1", "--chunk_elements", "200000", "--only", FLOOR, OURS, NAIVE]
    code, printed = run("kernels.bench", argv, tmp_path / "log")
    assert code == 0, printed
    rows = {cells[0]: cells[1:] for line in printed.splitlines() if len(cells := line.strip("| ").split(" | ")) == 10}
    assert list(rows)[1:] == [FLOOR, OURS, NAIVE] and "chunks of 200000 logits" in printed
    assert rows[OURS][-1] == "yes" and all(float(error) < 1e-5 for error in rows[OURS][5:8])
    assert "| met |" not in printed and "| missed |" not in printed  # the aims are a GPU's


@pytest.mark.parametrize(
    ("figures", "at_least", "shown"),
    [([1.4, 1.2], False, "met"), ([1.4, 1.3], False, "missed"), ([1.45, 1.25], True, "met"), ([1, 2], True, "missed"),
     ([0.1, math.nan], False, "not measured")],
)  # fmt: skip
def test_an_aim_is_met_by_every_figure(figures, at_least, shown):
    line = bench.verdict("time", figures, [1.45, 1.25], at_least)
    assert line.startswith(f"| {shown} | time | ") and line.endswith(f"{'>=' if at_least else '<='} 1.45 / 1.25 |")


def test_the_aims_of_all_shapes():
    def figures(name):
        return bench.Figures(30.0 if name == NAIVE else 10.0, 1.0, 1.2, (1e-5, 2e-3, 2e-3), True)

    full = {shape: {name: figures(name) for name in CANDIDATES} for shape in bench.AIMS}
    lines = bench.verdicts(full, dict.fromkeys(full, 0.5))
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [
        "met", "met", "missed", "met", "met", "met", "missed", "missed", "met"
    ]  # fmt: skip
    del full["1.5b"]["Liger GRPO"]
    assert sum("not measured" in line for line in bench.verdicts(full, {})) == 2


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
