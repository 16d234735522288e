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


def test_every_group_of_the_rollouts_has_spread():
    rollouts = make_rollouts([[i] * 20 for i in range(16)])
    assert [sample.group for sample in rollouts] == [0] * 8 + [1] * 8
    assert all(len(sample.prompt_ids) == PROMPT and len(sample.completion_ids) == 4 for sample in rollouts)
    assert len({sample.advantage for sample in rollouts[:8]}) == 8
