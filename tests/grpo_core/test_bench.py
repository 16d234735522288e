from grpo_core.bench import PROMPT, make_rollouts
from tests.launch import run


def test_the_bench_runs_on_a_cpu(tmp_path):
    argv = ["--shape", "tiny", "--tokens", "2048", "--steps", "1", "--gradient_checkpointing"]
    code, printed = run("grpo_core.bench", argv, tmp_path / "log")
    assert code == 0, printed
    assert "float32 masters in 3 FSDP2 units over 1 ranks, computing in float32" in printed
    cells = printed.split("| tiny this")[1].split(" | ")
    assert cells[:2] == [" trainer", "2048"] and len(cells) == 9
    phases = [float(phase) for phase in cells[3].split(" + ")]
    assert abs(sum(phases) - float(cells[2])) < 0.003


def test_rollouts_fill_the_tokens_and_every_group_has_spread():
    for tokens, rows, length in ((16384, 8, 2048), (32768, 16, 2048), (2048, 8, 256)):
        rollouts = make_rollouts(tokens, 100, seed=1)
        assert [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts] == [length] * rows
        assert all(len(r.prompt_ids) == PROMPT and r.advantage != 0 for r in rollouts)
