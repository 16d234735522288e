from grpo_core.bench import PROMPT, make_rollouts
from tests.launch import run


def test_the_bench_runs_on_a_cpu(tmp_path):
    argv = ["--shape", "tiny", "--tokens", "2048", "--steps", "1", "--gradient_checkpointing"]
    code, printed = run("grpo_core.bench", argv, tmp_path / "log")
    assert code == 0, printed
    cells = printed.splitlines()[-1].strip("| ").split(" | ")
    assert cells[:2] == ["tiny", "2048"] and len(cells) == 10
    phases = [float(phase) for phase in cells[3].split(" + ")]
    assert abs(sum(phases) - float(cells[2])) < 0.003


def test_rollouts_fill_the_tokens_and_every_group_has_spread():
    for tokens, rows, length in ((16384, 8, 2048), (32768, 16, 2048), (2048, 8, 256)):
        rollouts = make_rollouts(tokens, 100, seed=1)
        assert [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts] == [length] * rows
        assert all(len(r.prompt_ids) == PROMPT and r.advantage != 0 for r in rollouts)
