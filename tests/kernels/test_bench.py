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
    ("error", "note", "failed"),
    [
        (torch.cuda.OutOfMemoryError("2 GiB"), "out of memory", False),
        (ModuleNotFoundError("no", name="liger_kernel"), "liger_kernel is not installed", False),
        (ModuleNotFoundError("no triton", name="triton"), "failed: ModuleNotFoundError no triton", True),
        (RuntimeError("a\n| b"), "failed: RuntimeError a / b", True),
    ],
)
def test_what_a_failure_is_called(error, note, failed):
    assert bench.failure(error) == (note, failed)


def test_the_sweep_begins_and_ends_with_the_constants_of_the_code(tmp_path):
    code, printed = run("kernels.bench", ["--tokens", "512", "--rounds", "1", "--sweep"], tmp_path / "log")
    assert code == 0, printed
    choices = [line.split(" | ")[0].strip("| ") for line in printed.splitlines() if " | as it is | " in line]
    today = f"{head.chunk_rows(1003, 'cpu')} x {head.CHUNKS_IN_BLOCK['cpu']}"
    assert choices == [today, *(f"{rows} x {chunks}" for rows in bench.ROWS for chunks in bench.CHUNKS), today]


def test_the_sweep_on_a_gpu_keeps_within_the_workspace_and_then_tries_widths(monkeypatch, capsys):
    """The choices of a vocabulary of 151,936, with the work left out; the least ratio is that of 768 x 4."""
    monkeypatch.setattr(bench, "make_case", lambda *shape: shape)
    monkeypatch.setattr(bench, "step", lambda run, case: None)
    monkeypatch.setattr(bench, "extra_memory", lambda run, case: (0.0, 1.0))
    monkeypatch.setattr(bench.torch, "empty", lambda *size, device: None)

    def in_turn(runs, case, cache, rounds):
        rows, chunks = head.chunk_rows(151936, "cuda"), head.CHUNKS_IN_BLOCK["cuda"]
        assert rows * (4 + 2 * chunks) * 151936 <= 1.5 * 2**30
        if (rows, chunks) == (640, 2):
            raise torch.cuda.OutOfMemoryError
        return [1.0 if (rows, chunks) == (768, 4) else 2.0, 1.0]

    monkeypatch.setattr(bench, "in_turn", in_turn)
    assert not bench.sweep("0.5b", 8192, 1, torch.device("cuda"))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    shares = [row[0] for row in rows if row[1] == "as it is"]
    assert shares == [
        "512 x 8",
        "512 x 2",
        "512 x 3",
        "512 x 4",
        "512 x 8",
        "640 x 2",
        "640 x 3",
        "640 x 4",
        "768 x 2",
        "768 x 3",
        "768 x 4",
        "1024 x 2",
        "1024 x 3",
        "1280 x 2",
        "512 x 8",
    ]
    widths = [(row[0], row[1]) for row in rows if row[1] != "as it is"]
    expected = [f"BLOCK {block}, WARPS {warps}" for block in (1024, 2048, 4096) for warps in (4, 8, 16)]
    assert widths == [("768 x 4", name) for name in expected] and rows[-1][:2] == ["512 x 8", "as it is"]
    assert rows[5][2] == "out of memory"


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
