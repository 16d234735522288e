"""Edge cases of processes and files: each ends with one sentence, and no file written before is lost."""

import os
import resource
import signal
import socket
import subprocess
import sys

import pytest

import sft_core.train
from sft_core.run import distributed
from sft_core.run.output_dir import find_checkpoint
from tests.commands import environment
from tests.launch import flags, metrics, run

STAND_IN = [sys.executable, "-m", "sft_core.run.process"]  # imports what every command imports first, and exits
ORPHAN = """
import os, subprocess, sys, time
if os.fork():
    os._exit(0)
end = time.time() + 10
while os.getppid() != 1 and time.time() < end:
    time.sleep(0.01)
if os.getppid() == 1:
    os.execv(sys.executable, sys.argv[1:])
print("adopted by another")
"""


@pytest.fixture
def options(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1?", "completion": "2"}\n' * 8)
    return flags(
        model_name_or_path=tiny_model, dataset_name=rows, output_dir=tmp_path / "out", max_steps=3, report_to=["none"]
    ) + flags(save_strategy="steps", save_steps=1)


@pytest.mark.parametrize("adopted", [True, False])
def test_a_rank_without_its_launcher_ends_before_it_imports(adopted):
    command = [sys.executable, "-c", ORPHAN] if adopted else []
    said = subprocess.run(
        [*command, *STAND_IN], env=environment(TORCHELASTIC_RUN_ID="x"), capture_output=True, text=True
    )
    if "adopted by another" in said.stdout:
        pytest.skip("process 1 does not adopt here")
    assert ("this rank's torchrun has ended" in said.stderr) == adopted, said.stderr


def test_process_1_may_be_the_launcher():
    start_it = f"import subprocess, sys; sys.exit(subprocess.call({STAND_IN}))"
    new_pids = ["unshare", "-r", "--pid", "--fork", "--mount-proc"]
    try:
        subprocess.run([*new_pids, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no process namespaces here")
    command = [*new_pids, sys.executable, "-c", start_it]
    done = subprocess.run(command, env=environment(TORCHELASTIC_RUN_ID="x"), capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


HERE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"MASTER_ADDR": ""}, "environment variable MASTER_ADDR expected, but not set"),
        ({"RANK": "x"}, "RANK=x, WORLD_SIZE=1, MASTER_ADDR=127.0.0.1, MASTER_PORT=1"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x"),
        ({"MASTER_PORT": "99999"}, "port must have value from 0 to 65535"),
        ({"MASTER_PORT": "busy"}, "address already in use"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR=no-such-host.invalid"),
    ],
)
def test_variables_of_a_launcher(change, says, options, capfd, monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE", 0.5)
    monkeypatch.setattr(distributed, "_stores", [])
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        for name, value in (HERE | change).items():
            monkeypatch.setenv(name, str(busy.getsockname()[1]) if value == "busy" else value)
        with pytest.raises(SystemExit) as stopped:
            sft_core.train.main(options)
    line = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(line) == 1 and says in line[0] and "unset RANK and WORLD_SIZE" in line[0]


@pytest.mark.parametrize("name", ["eval.py", "gen/__init__.py"])
def test_a_file_that_hides_a_package(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise RuntimeError('never run')")
    done = subprocess.run(STAND_IN, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and f"{tmp_path / name} hides this project's package" in done.stderr


def leave_little_room():
    """Limit the size of files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def hang_up_in_the_second_step():
    step_counts, steps = sft_core.train.step_counts, []

    def counted(*arguments):
        steps.append(1)
        if len(steps) == 2:
            read, write = os.pipe()
            os.dup2(write, 1)
            os.close(read)  # like a terminal that was closed
            os.kill(os.getpid(), signal.SIGHUP)
        return step_counts(*arguments)

    sft_core.train.step_counts = counted


def test_what_stops_a_run_loses_nothing_and_a_finished_run_says_so(options, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("sft_core.train", options, tmp_path / "log", fault=hang_up_in_the_second_step)[0] == 0
    assert find_checkpoint(out)[0] == out / "checkpoint-2" and not (out / "config.json").exists()

    code, output = run("sft_core.train", options, tmp_path / "full", fault=leave_little_room)
    lines = [line for line in output.splitlines() if line.startswith(("error: ", "Traceback"))]
    says = f"No space left on device: a checkpoint in {out} takes about 1.4 MB"
    assert code == 1 and len(lines) == 1 and says in lines[0], output
    assert find_checkpoint(out)[0] == out / "checkpoint-2"

    assert run("sft_core.train", options, tmp_path / "log")[0] == 0
    assert [row["step"] for row in metrics(out)] == [1, 2, 3]
    with pytest.raises(SystemExit) as stopped:
        sft_core.train.main(options)
    assert stopped.value.code == 0 and f"this run is finished and its model is in {out}" in capsys.readouterr().out
    distributed.unlock_output_dir(out)
    code, output = run("sft_core.train", options + flags(max_steps=4), tmp_path / "log2")
    assert code == 0 and "resuming from" in output


def test_ctrl_c_while_a_command_imports():
    # A shell ignores the signal in its background jobs.
    command = ["env", "--default-signal=INT", sys.executable, "-X", "importtime", "-m", "sft_core.train"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.endswith(" sft_core\n"):  # the first imports are done, torch is not imported yet
                break
        process.send_signal(signal.SIGINT)
        said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode in (130, -signal.SIGINT) and len(said) == 1 and "stopped by Ctrl-C" in said[0], said
