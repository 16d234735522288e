"""Worker processes that can be killed."""

import builtins
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.workers import Unscored, WorkerPool

ROOT = Path(__file__).parents[2]
run = builtins.eval  # workers import functions by name; `eval` of a string lets a test run anything in one


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2, timeout=2.0) as pool:
        yield pool


def test_what_hangs_crashes_or_raises_costs_only_itself(pool):
    tasks = {
        "6 * 7": 42,
        "[None for _ in iter(int, 1)]": "timeout",  # for ever, in Python
        "__import__('re').match('(a+)+$', 'a' * 60 + 'b')": "timeout",  # in C, holding the lock
        "3 ** (10 ** 10)": "timeout",
        "__import__('time').sleep(1000)": "timeout",
        "__import__('os')._exit(0)": "crash",
        "__import__('ctypes').string_at(0)": "crash",  # a segmentation fault
        "__import__('os').kill(__import__('os').getpid(), 9)": "crash",
        "'a' * (64 << 30)": "exception",  # memory
        "1 / 0": "exception",
        "__import__('sys').exit(3)": "exception",
        "lambda: 0": "exception",  # a result that does not pickle
        "print('noise') or __import__('os').write(1, b'noise')": 5,
    }
    results = pool.map(run, [*tasks, "7"])
    assert results.pop() == 7
    for (task, expected), result in zip(tasks.items(), results, strict=True):
        found = result.reason if isinstance(result, Unscored) else result
        assert found == expected, (task, result)
    by_task = dict(zip(tasks, results, strict=True))
    assert by_task["1 / 0"].error == "ZeroDivisionError: division by zero"
    assert "MemoryError" in by_task["'a' * (64 << 30)"].error
    assert pool.map(run, ["1", "2"]) == [1, 2]


def test_order_is_kept_with_any_number_of_workers(pool):
    with WorkerPool(1) as single:
        for count in (0, 1, 7, 300):
            items = [f"{i} * 2" for i in range(count)]
            assert pool.map(run, items) == single.map(run, items) == [2 * i for i in range(count)]


def test_an_item_may_have_its_own_limit(pool):
    naps = ["__import__('time').sleep(2) or 'slept'"] * 2
    slept, cut = pool.map(run, naps, timeouts=[60.0, 1.0])
    assert slept == "slept" and cut.reason == "timeout"


def test_jobs_go_on_while_the_caller_does(pool):
    """Several jobs run at once, and a hanging item of one does not affect the others. A check over its timeout is not a
    success even if it returns before the parent looks."""
    pool.map(run, ["0", "0"])
    slow = "exec('import time; end = time.process_time() + 0.3\\nwhile time.process_time() < end: pass')"
    jobs = [pool.submit(run, ["1"]), pool.submit(run, [slow, "2"], [0.1, 2.0]), pool.submit(run, ["3", "1 / 0", "4"])]
    time.sleep(1.5)
    assert pool.wait(jobs[2])[::2] == [3, 4] and pool.wait(jobs[0]) == [1]
    late, fine = pool.wait(jobs[1])
    assert late.reason == "timeout" and fine == 2
    with pytest.raises(ValueError, match="define it in a module"):
        pool.submit(lambda x: x, [1])
    assert pool.map(run, ["5"]) == [5]


def test_small_jobs_are_done_while_their_caller_is_busy(pool):
    pool.map(run, ["0", "0"])
    jobs = []
    for _ in range(10):
        jobs.append(pool.submit(run, [str(i) for i in range(8)]))
        time.sleep(0.2)
    assert sum(job.missing for job in jobs) <= 2 * 8
    assert [pool.wait(job) for job in jobs] == [list(range(8))] * 10


def test_a_crowded_machine_is_not_the_fault_of_a_check():
    """With eight other processes on its core, half a second of work exceeds the timeout, but must not be stopped."""
    pin = f"import os, time\nos.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"
    work = (
        pin + "start = time.monotonic()\nwhile time.process_time() < used + 0.5: pass\nwall = time.monotonic() - start"
    )
    task = f"(lambda g: (exec({pin + work!r}, g), g['wall'])[1])({{'used': __import__('time').process_time()}})"
    with WorkerPool(1, timeout=2.0) as pool:
        assert pool.map(run, ["0"]) == [0]
        crowd = [
            subprocess.Popen([sys.executable, "-c", pin + "while True: pass"], start_new_session=True) for _ in range(8)
        ]
        try:
            (wall,) = pool.map(run, [task])
            assert wall > 2.0  # else the machine was not crowded, and nothing was shown
        finally:
            for process in crowd:
                process.kill()
                process.wait()


def test_workers_import_nothing_heavy_and_have_one_hash_seed(pool):
    heavy = "[m for m in ('torch', 'vllm', 'transformers') if m in __import__('sys').modules]"
    task = f"(__import__('grpo_core.rewards'), {heavy})[1]"
    assert pool.map(run, [task] * 8) == [[]] * 8
    assert len(set(pool.map(run, ["hash('a')"] * 8))) == 1


def test_imports_are_not_charged_and_their_failure_is_an_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "slow_import.py").write_text(
        "import os, time\nnap = os.environ['NAP']\nif nap == 'exit': os._exit(3)\n"
        "time.sleep(float(nap))\ndef f(x): return x"
    )
    monkeypatch.setenv("NAP", "0")
    import slow_import

    monkeypatch.setenv("NAP", "2")
    with WorkerPool(1, timeout=1.0) as pool:
        assert pool.map(slow_import.f, [1, 2]) == [1, 2]
    monkeypatch.setenv("NAP", "not a number")
    with WorkerPool(1) as pool:
        with pytest.raises(RuntimeError, match="cannot import.*could not convert"):
            pool.map(slow_import.f, [1])
        assert pool.map(abs, [-1]) == [1]
        with pytest.raises(ValueError, match="define it in a module"):
            pool.map(lambda x: x, [1])
    # A worker that starts, but dies or hangs whenever it loads its items, is not restarted for ever.
    monkeypatch.setenv("NAP", "exit")
    monkeypatch.setattr(WorkerPool, "START_ATTEMPTS", 2)
    with WorkerPool(1) as pool, pytest.raises(RuntimeError, match="exit code 3 while loading"):
        pool.map(slow_import.f, [1])


def test_workers_ignore_the_signals_of_the_terminal_and_are_replaced_when_killed(pool):
    first = pool.map(run, ["__import__('os').getpid()"] * 40)
    for worker in set(first):
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
    assert set(pool.map(run, ["__import__('os').getpid()"] * 40)) <= {w.process.pid for w in pool._workers}
    survivors = {w.process.pid for w in pool._workers}
    assert set(first) <= survivors
    for worker in survivors:
        os.kill(worker, signal.SIGKILL)
    assert pool.map(run, ["1"] * 5) == [1] * 5
    assert survivors.isdisjoint(w.process.pid for w in pool._workers)


def heard(talking, task):
    """The kept output. The worker whose output is kept may not be ready at first, so this repeats the items."""
    for _ in range(600):
        talking.map(run, [task] * 6)
        if lines := talking.printed(limit=10):
            return lines
        time.sleep(0.1)


def test_what_one_worker_prints_is_kept_until_it_is_asked_for(pool):
    """This includes the output of checks that are killed or fail. The output does not affect results."""
    say = "print('says', __import__('os').getpid()) or __import__('os').write(1, b'raw\\n')"
    with WorkerPool(2, timeout=0.1, prints=True) as talking:
        assert talking.printed() == []
        lines = heard(talking, say)
        assert len(set(lines[::2])) == 1 and set(lines[1::2]) == {"raw"}
        assert heard(talking, "print('line\\n' * 50, end='')") == ["line"] * 10
        assert talking.printed() == []
        ends = [
            "print('last words') or 1 / 0",
            "print('last words') or __import__('os')._exit(1)",
            "print('last words') or exec('while True: pass')",
        ]
        for task in [*ends, "print('last words')"]:
            assert set(heard(talking, task)) == {"last words"}
        assert set(heard(talking, "print('x' * 10**6)")) == {"x" * 10**6}  # much more than a pipe can buffer
    pool.map(run, [say] * 4)
    assert pool.printed() == []


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_parent_leaves_no_worker():
    code = (
        "import builtins, os, time; from eval.workers import WorkerPool\n"
        "pool = WorkerPool(2, timeout=1000)\n"
        "pool.map(abs, [1])\n"
        "fork = os.fork()\n"  # keeps the sockets open, as child processes of a library may
        "while not fork: time.sleep(1)\n"
        "print(fork, *[w.process.pid for w in pool._workers], flush=True)\n"
        "pool.map(builtins.eval, ['1', '__import__(\"time\").sleep(1000)', '2'])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    fork, *workers = map(int, parent.stdout.readline().split())
    try:
        assert len(workers) == 2 and all(running(worker) for worker in workers)
        parent.kill()
        parent.wait()
        give_up = time.monotonic() + 60  # so that a failing test ends
        while any(running(worker) for worker in workers) and time.monotonic() < give_up:
            time.sleep(0.05)
        assert not any(running(worker) for worker in workers)
    finally:
        os.kill(fork, signal.SIGKILL)
