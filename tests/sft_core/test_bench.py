from tests.launch import run


def test_the_bench_runs_on_a_cpu(tmp_path):
    argv = ["--shape", "tiny", "--tokens", "256", "2064", "--steps", "1", "--gradient_checkpointing"]
    code, printed = run("sft_core.bench", argv, tmp_path / "log")
    assert code == 0, printed
    head, _, *lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert [cells[:2] for cells in lines] == [["tiny", "256"], ["tiny", "2064"]]
    assert all(len(cells) == len(head) and float(cells[2]) > 0 for cells in lines)
    assert "1 x CPU, torch" in printed and "AdamW" in printed


def test_bad_numbers_are_refused(tmp_path):
    code, printed = run("sft_core.bench", ["--shape", "tiny", "--tokens", "8"], tmp_path / "log")
    assert code == 2 and "error: --steps must be at least 1, --tokens at least 256" in printed
