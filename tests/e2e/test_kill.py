"""Invariant 6: a run that is killed at any moment and restarted ends bitwise equal to an uninterrupted run."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.commands import TORCHRUN
from tests.grpo_core.test_train import TRAIN, options, weights
from tests.launch import metrics, run, start, wait

ROOT = Path(__file__).parents[2]
STEPS = 6
# Two updates per rollout and a checkpoint every step: every other one is between two updates on the same rollout.
SETTINGS = dict(
    max_steps=STEPS,
    num_iterations=2,
    save_strategy="steps",
    save_steps=1,
    save_total_limit=3,
    prompts_per_step=4,
    beta=0.1,
)
# Two mini-batches per rollout, twice, and a reference sync in the middle: there is a checkpoint after each update.
MINI_BATCHES = dict(
    max_steps=STEPS,
    num_iterations=2,
    steps_per_generation=2,
    sync_ref_model="true",
    ref_model_sync_steps=3,
    save_strategy="steps",
    save_steps=1,
    prompts_per_step=2,
    beta=0.1,
)
TIMES = ("time/", "step_time", "tokens_per_second", "peak_memory")


def comparable(output_dir):
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in metrics(output_dir)]


def assert_same_run(expected, found):
    rows = comparable(found)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows == comparable(expected)
    first, second = weights(expected), weights(found)
    assert all((first[name] == second[name]).all() for name in first)


def wait_for_step(output_dir, step):
    """Wait until the log contains `step`; its checkpoint is then being written."""
    deadline = time.time() + 120
    while time.time() < deadline:
        path = output_dir / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, problems, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, output = run(TRAIN, options(tiny_model, problems, folder / "out", **SETTINGS), folder / "log", ranks=2)
    assert code == 0, output
    return folder / "out"


def test_killed_ranks_resume_bitwise(uninterrupted, tiny_model, problems, tmp_path):
    """First one rank is killed, then all, at random moments of a step and its save."""
    argv = options(tiny_model, problems, tmp_path / "out", **SETTINGS)
    rng = random.Random(0)
    for step, victims in ((1, [1]), (3, [0, 1])):
        processes = start(TRAIN, argv, tmp_path / "log", ranks=2)
        wait_for_step(tmp_path / "out", step)
        time.sleep(rng.uniform(0, 0.3))
        for victim in victims:
            processes[victim].kill()
        assert wait(processes) != 0
    code, output = run(TRAIN, argv, tmp_path / "log", ranks=2)
    assert code == 0, output
    assert_same_run(uninterrupted, tmp_path / "out")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_between_mini_batches(tiny_model, problems, tmp_path, ranks):
    """The kill is in the second pass over a rollout, after the reference sync."""
    argv = options(tiny_model, problems, tmp_path / "out", **MINI_BATCHES)
    processes = start(TRAIN, argv, tmp_path / "log", ranks=ranks)
    wait_for_step(tmp_path / "out", 4)
    for process in processes:
        process.kill()
    assert wait(processes) != 0
    for command in (argv, options(tiny_model, problems, tmp_path / "whole", **MINI_BATCHES)):
        code, output = run(TRAIN, command, tmp_path / "log", ranks=ranks)
        assert code == 0, output
    assert_same_run(tmp_path / "whole", tmp_path / "out")
    rows = metrics(tmp_path / "whole")
    assert [row["clip_ratio/region_mean"] > 0 for row in rows] == [False, True, True, True, False, True]
    assert len({row["reward"] for row in rows[:4]}) == 1 and rows[4]["reward"] != rows[3]["reward"]


def test_sigterm_saves_and_exits(uninterrupted, tiny_model, problems, tmp_path):
    argv = options(tiny_model, problems, tmp_path / "out", **(SETTINGS | {"save_steps": 100}))
    processes = start(TRAIN, argv, tmp_path / "log", ranks=2)
    wait_for_step(tmp_path / "out", 1)
    os.kill(processes[1].pid, signal.SIGTERM)  # one rank is enough: the ranks agree at the end of the step
    assert wait(processes) == 0
    saved = [int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*")]
    assert len(saved) == 1 and 1 <= saved[0] < STEPS and not (tmp_path / "out" / "config.json").exists()
    code, output = run(TRAIN, argv, tmp_path / "log", ranks=2)
    assert code == 0, output
    assert_same_run(uninterrupted, tmp_path / "out")


def test_resume_with_another_number_of_ranks(uninterrupted, tiny_model, problems, tmp_path):
    """The runs are equal up to float32 rounding, not bitwise, since sums have another order. The fifth step samples
    after the resume, where rounding may change a token."""
    argv = options(tiny_model, problems, tmp_path / "out", **SETTINGS)
    processes = start(TRAIN, argv, tmp_path / "log", ranks=2)
    wait_for_step(tmp_path / "out", 3)
    for process in processes:
        process.kill()
    wait(processes)
    code, output = run(TRAIN, argv, tmp_path / "log", ranks=1)
    assert code == 0, output
    losses, expected = ([row["loss"] for row in metrics(folder)] for folder in (tmp_path / "out", uninterrupted))
    assert len(losses) == STEPS and losses[:4] == pytest.approx(expected[:4], rel=1e-3, abs=1e-5)
    assert losses[4:] == pytest.approx(expected[4:], abs=2e-3)


def test_a_finished_run_goes_on_from_within_a_rollout(uninterrupted, tiny_model, problems, tmp_path):
    """Five steps end after the first of two updates on a rollout; a run of six steps then does the second update."""
    argv = options(
        tiny_model, problems, tmp_path / "out", **(SETTINGS | {"max_steps": 5, "lr_scheduler_type": "constant"})
    )
    whole = options(tiny_model, problems, tmp_path / "whole", **(SETTINGS | {"lr_scheduler_type": "constant"}))
    assert run(TRAIN, argv, tmp_path / "log")[0] == 0
    for command in (argv + ["--max_steps=6"], whole):
        code, output = run(TRAIN, command, tmp_path / "log")
        assert code == 0, output
    assert_same_run(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_ended_launcher_leaves_no_orphan(how, uninterrupted, tiny_model, problems, tmp_path):
    """If torchrun is ended, its ranks (which save if asked to) and their reward workers end; the command resumes."""
    every = 1 if how == signal.SIGKILL else 100
    argv = options(tiny_model, problems, tmp_path / "out", **(SETTINGS | {"save_steps": every}))
    command = [*TORCHRUN, "2", "-m", TRAIN, *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path / "out", 2)
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(family) >= 4  # two ranks with one reward worker each
    launcher.send_signal(how)
    launcher.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert list((tmp_path / "out").glob("checkpoint-*"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(uninterrupted, tmp_path / "out")


@pytest.mark.slow
def test_killed_twenty_times(uninterrupted, tiny_model, problems, tmp_path):
    """All processes are killed at random moments, until the run is finished."""
    argv = options(tiny_model, problems, tmp_path / "out", **SETTINGS)
    rng = random.Random(1)
    for _ in range(20):
        processes = start(TRAIN, argv, tmp_path / "log", ranks=2)
        time.sleep(rng.uniform(1.0, 8.0))
        for process in processes:
            process.kill()
        wait(processes)
    code, output = run(TRAIN, argv, tmp_path / "log", ranks=2)
    assert code == 0, output
    assert_same_run(uninterrupted, tmp_path / "out")
