import ctypes
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sft_core.run import distributed, parent, watchdog
from tests.processes import run_ranks, start


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def hold_lock(folder):
    distributed.lock_output_dir(folder)
    (folder / "held").touch()
    time.sleep(600)


def test_lock_names_the_living_holder_and_is_free_after_kill(tmp_path):
    holder = start(hold_lock, tmp_path)
    wait_for((tmp_path / "held").exists)
    with pytest.raises(ValueError, match=rf"{tmp_path} is in use by another run \(pid {holder.pid} on .*--output_dir"):
        distributed.lock_output_dir(tmp_path, wait_s=0.3)
    os.kill(holder.pid, signal.SIGKILL)
    distributed.lock_output_dir(tmp_path, wait_s=30)  # waits for the dying process that holds the lock
    assert f"pid {os.getpid()} " in (tmp_path / ".lock").read_text()


def hang(how):
    phases = watchdog.Phases(watchdog_s=0.5)
    with phases("step"):
        pass
    with phases("sample"):
        if how == "c":
            ctypes.PyDLL(None).sleep(600)  # a PyDLL call keeps the interpreter's lock
        time.sleep(600)


@pytest.mark.parametrize("how", ["python", "c"])
def test_watchdog_kills_a_hung_process_and_shows_its_stack(tmp_path, how):
    process = start(hang, how, stderr=tmp_path / "stderr")
    process.join(60)
    assert process.exitcode == 1
    text = (tmp_path / "stderr").read_text()
    assert "Timeout" in text and "in hang" in text


def test_phases_rearm_and_collect(monkeypatch):
    armed = []
    monkeypatch.setattr(watchdog, "watchdog", armed.append)
    phases = watchdog.Phases(watchdog_s=30)
    for _ in range(2):
        with phases("score"):
            time.sleep(0.01)
    with phases("save", watchdog_s=90):
        pass
    seconds = phases.pop()
    assert armed == [30, 30, 30, 30, 90, 30]
    assert list(seconds) == ["time/score", "time/save"] and seconds["time/score"] >= 0.02
    assert phases.pop() == {}


def be_orphaned(folder):
    pid = os.getpid()
    if os.fork() == 0:
        parent.die_with_parent(pid)
        (folder / "child").write_text(str(os.getpid()))
        time.sleep(600)
    time.sleep(600)


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")")[-1].split()[0] != "Z"


def test_children_die_with_their_parent(tmp_path):
    mother = start(be_orphaned, tmp_path)
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    child = int((tmp_path / "child").read_text())
    assert alive(child)
    os.kill(mother.pid, signal.SIGKILL)
    wait_for(lambda: not alive(child))


def come_too_late():
    parent.die_with_parent(parent_pid=2**22 + 1)  # this parent no longer exists
    os._exit(0)


def test_a_child_whose_parent_is_gone_already_dies():
    process = start(come_too_late)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def stop_signals():
    stop = distributed.StopSignal()
    before = stop.requested
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    after = stop.requested
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        return before, after, "interrupted"


def test_stop_signal_asks_first_and_interrupts_at_the_second_ctrl_c():
    assert run_ranks(1, stop_signals) == [(False, True, "interrupted")]


def hang_up(before):
    signal.signal(signal.SIGHUP, before)
    stop = distributed.StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    return stop.requested


@pytest.mark.parametrize(("before", "stops"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_hang_up_stops_a_run_unless_nohup_started_it(before, stops):
    assert run_ranks(1, hang_up, before) == [stops]


def write_to_a_full_disk():
    distributed.init_distributed(timeout_s=30)

    def work():
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device"):
        distributed.on_first_rank(work)
    distributed.shutdown()


def test_a_full_disk_of_the_first_rank_ends_all():
    run_ranks(2, write_to_a_full_disk)


def misuse(error):
    distributed.init_distributed(timeout_s=30)
    with distributed.usage_errors():
        raise error


def test_usage_errors_are_one_line_and_exit_code_2(tmp_path):
    process = start(misuse, ValueError("no such\n  thing; use another"), stderr=tmp_path / "stderr")
    process.join(60)
    assert process.exitcode == 2
    assert (tmp_path / "stderr").read_text() == "error: no such thing; use another\n"


def test_other_errors_keep_their_traceback(tmp_path):
    process = start(misuse, RuntimeError("broken"), stderr=tmp_path / "stderr")
    process.join(60)
    assert process.exitcode == 1
    assert "Traceback" in (tmp_path / "stderr").read_text()


def one_rank_decides(fail):
    rank, world_size, local_rank, device = distributed.init_distributed(timeout_s=30)

    def work():
        assert dist.get_rank() == 0
        if fail:
            raise ValueError("the first rank's mistake")
        return {"from": "the first"}

    try:
        result = distributed.on_first_rank(work)
    except ValueError as error:
        result = str(error)
    total = torch.ones(())
    dist.all_reduce(total)
    facts = (rank, world_size, local_rank, device.type, total.item(), result, torch.get_num_threads())
    has_port = "MASTER_PORT" in os.environ
    distributed.shutdown()
    assert ("RANK" in os.environ) == (world_size == 2)  # only torchrun's variables stay
    return facts, has_port


@pytest.mark.parametrize("world_size", [1, 2])
def test_process_group_of_one_and_of_two(world_size):
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank, (facts, has_port) in enumerate(run_ranks(world_size, one_rank_decides, False)):
        assert facts[:6] == (rank, world_size, rank, "cpu", world_size, {"from": "the first"}) and has_port
        assert world_size == 1 or facts[6] == share


def test_all_ranks_raise_the_first_ranks_usage_error():
    results = run_ranks(2, one_rank_decides, True)
    assert [facts[5] for facts, _ in results] == ["the first rank's mistake"] * 2


def lose_a_peer():
    rank, *_ = distributed.init_distributed(timeout_s=2)
    if rank == 1:
        time.sleep(4)
        return "hung"
    try:
        dist.all_reduce(torch.ones(()))
    except RuntimeError:
        return "timed out"


def test_a_collective_gives_up_on_a_hung_rank():
    assert run_ranks(2, lose_a_peer)[0] == "timed out"
