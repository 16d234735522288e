from sft_core.bench import LONGEST, documents
from tests.launch import run


def test_the_bench_runs_on_a_cpu(tmp_path):
    argv = ["--shape", "tiny", "--tokens", "256", "300", "--steps", "1", "--gradient_checkpointing"]
    code, printed = run("sft_core.bench", argv, tmp_path / "log")
    assert code == 0, printed
    head, _, *lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert [cells[:2] for cells in lines] == [["tiny", "256"], ["tiny", "300"]]
    assert all(len(cells) == len(head) and float(cells[2]) > 0 for cells in lines)
    assert "1 x CPU, torch" in printed and "AdamW" in printed


def test_bad_numbers_are_refused(tmp_path):
    code, printed = run("sft_core.bench", ["--shape", "tiny", "--tokens", "8"], tmp_path / "log")
    assert code == 2 and "error: --steps must be at least 1, --tokens at least 256" in printed


def test_documents_fill_the_tokens_exactly():
    for tokens in (64, 5000, 16384):
        rows, others = documents(tokens, 100, seed=1), documents(tokens, 100, seed=2)
        lengths = [len(ids) for ids in rows]
        assert sum(lengths) == tokens and 2 <= min(lengths) and max(lengths) <= LONGEST + 1
        assert lengths == [len(ids) for ids in others] and rows != others
