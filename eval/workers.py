"""Worker processes that can be killed: for checks that may hang, crash or eat memory.

`WorkerPool` runs any importable function over items in fresh interpreters, and kills the one that overruns. Nothing
here imports torch; a test looks into a worker to see. Left out: an answer to the caller before all items have one.

    with WorkerPool(2, timeout=5.0) as pool:
        results = pool.map(function, items)
"""

import ctypes
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Unscored:
    """In place of a result: the item was given up. It is never a reward of zero."""

    reason: str  # "timeout", "crash" (the process died) or "exception"
    error: str  # one line for the log


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    state: str = "starting"  # -> "idle" -> "loading" (unpickles a chunk) -> "running" -> "idle"
    deadline: float = float("inf")  # time.monotonic(), of what the state names
    items: deque[int] = field(default_factory=deque)  # indices not yet answered, in the order the worker takes them
    last: float = float("inf")  # time.monotonic(), when the item at hand is given up whatever the machine's load
    used: float = 0.0  # seconds of processor time when the worker began this item


class WorkerPool:
    """Runs importable functions in `num_workers` fresh interpreters; an item that overruns costs itself alone.

    timeout: seconds an item may take, from the moment a ready worker starts on it; imports are not charged. A worker
        that computes on a crowded machine may have these seconds of the processor, at most 10 times as many in all.
    memory_limit: bytes of address space a worker may take (RLIMIT_AS); beyond it Python raises MemoryError.

    Workers are started by exec, so a parent that holds CUDA, vLLM or process groups loses nothing; they ignore SIGINT
    and SIGTERM (the parent decides), print nothing, and die with the thread that started them: create and use the pool
    in the main thread. Results do not depend on the number of workers.
    """

    START_LIMIT, START_ATTEMPTS = 120.0, 3  # seconds to import, tries per worker: only a machine in trouble needs them

    def __init__(self, num_workers: int, timeout: float = 5.0, memory_limit: int | None = 4 << 30):
        if num_workers < 1 or timeout <= 0:
            raise ValueError(f"a pool needs num_workers >= 1 and timeout > 0, got {num_workers} and {timeout}")
        self.num_workers, self.timeout, self.memory_limit = num_workers, timeout, memory_limit
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._fill()  # workers import while the parent goes on

    def map(self, function: Callable[[Any], Any], items: Sequence, timeouts: Sequence[float] | None = None) -> list:
        """[function(item) for item in items], with an `Unscored` where an item hung, crashed or raised.

        function and items are pickled, so a function must live in a module (not in `__main__`, no lambda).
        timeouts: seconds for each item, where they differ from the pool's.
        Raises ValueError for what cannot be pickled, RuntimeError when a worker cannot start or import the function.
        """
        limits = [self.timeout] * len(items) if timeouts is None else list(timeouts)
        results: list = [None] * len(items)
        size = max(1, min(64, len(items) // (4 * self.num_workers)))
        todo: deque[Iterable[int]] = deque(range(i, min(i + size, len(items))) for i in range(0, len(items), size))
        missing, self._failed_starts = len(items), 0
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            self._kill(worker)  # something outside killed it since the last call

        def give_up(worker: _Worker, reason: str, error: str) -> int:
            """End the worker; the item it was at is lost, the rest of its chunk goes back to the queue."""
            self._kill(worker)
            lost = worker.state == "running"
            if lost:
                results[worker.items.popleft()] = Unscored(reason, error)
            else:
                self._failed_starts += 1
                if self._failed_starts >= self.START_ATTEMPTS * self.num_workers:
                    raise RuntimeError(f"checking workers do not start: the last one {error} while {worker.state}")
            if worker.items:
                todo.appendleft(worker.items)
            return int(lost)

        try:
            while missing:
                self._fill()
                for worker in self._workers:
                    if worker.state == "idle" and todo:
                        worker.items = deque(todo.popleft())
                        self._send(worker, function, [items[i] for i in worker.items])
                soonest = min(w.deadline for w in self._workers)
                ready = wait([w.connection for w in self._workers], max(0.0, min(soonest - time.monotonic(), 1e6)))
                for worker in [w for w in self._workers if w.connection in ready]:
                    try:
                        kind, value, used = pickle.loads(worker.connection.recv_bytes())
                    except (EOFError, OSError):
                        with suppress(subprocess.TimeoutExpired):
                            worker.process.wait(1.0)
                        missing -= give_up(worker, "crash", f"died with exit code {worker.process.returncode}")
                        continue
                    if kind == "unloadable":
                        raise RuntimeError(f"a checking worker cannot import {function!r} or its arguments: {value}")
                    if kind in ("value", "exception"):
                        results[worker.items.popleft()] = value if kind == "value" else Unscored(kind, value)
                        missing -= 1
                    self._failed_starts = 0
                    worker.state = "running" if worker.items else "idle"
                    limit = limits[worker.items[0]] if worker.items else float("inf")
                    worker.deadline, worker.last = time.monotonic() + limit, time.monotonic() + 10 * limit
                    worker.used = used
                now = time.monotonic()
                # A parent that was itself held up reads what has come in before it blames the worker.
                for worker in [w for w in self._workers if w.deadline < now and not w.connection.poll()]:
                    owed = limits[worker.items[0]] - self._computed(worker) if worker.state == "running" else 0.0
                    if owed > 0 and now < worker.last:
                        worker.deadline = min(now + owed, worker.last)
                    else:
                        missing -= give_up(worker, "timeout", "took too long")
        finally:
            for worker in [w for w in self._workers if w.items]:  # only after an error: nobody waits for these
                self._kill(worker)
        return results

    def close(self) -> None:
        """Kill the workers; `map` starts new ones."""
        for worker in list(self._workers):
            self._kill(worker)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self) -> None:
        while len(self._workers) < self.num_workers:
            ours, theirs = Pipe(duplex=True)
            arguments = [str(theirs.fileno()), str(os.getpid()), str(self.memory_limit or 0)]
            # The parent's module path; one hash seed for all, so that results cannot differ.
            path = os.pathsep.join(os.path.abspath(p) for p in [*sys.path, os.path.dirname(os.path.dirname(__file__))])
            env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from eval.workers import _serve; _serve()", *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=env,
                start_new_session=True,  # what a check starts is killed with it
            )  # fmt: skip
            theirs.close()
            self._workers.append(_Worker(process, ours, deadline=time.monotonic() + self.START_LIMIT))

    def _send(self, worker: _Worker, function: Callable, chunk: list) -> None:
        try:
            message = pickle.dumps((function, chunk))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"{function!r} and its arguments must pickle: define it in a module ({error})") from error
        worker.state, worker.deadline = "loading", time.monotonic() + self.START_LIMIT
        try:
            worker.connection.send_bytes(message)
        except OSError:
            pass  # it died while idle; the end of its stream is read next, and its chunk goes back to the queue

    @staticmethod
    def _computed(worker: _Worker) -> float:
        """Seconds of processor time that the item at hand has had; infinity unless its worker is ready to compute."""
        try:
            stat = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # no such process, or no Linux
            return float("inf")
        used = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return used - worker.used if stat[0] == "R" else float("inf")

    def _kill(self, worker: _Worker) -> None:
        if worker.process.poll() is None:
            os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
        worker.connection.close()
        self._workers.remove(worker)


def _serve() -> None:
    """A worker's life. Arguments: descriptor of the socket, the parent's process id, memory limit in bytes (0: none).

    Answers each message (function, items) with ("started", None), then one ("value", result) or ("exception", line)
    an item; or with ("unloadable", line). Each also says how much processor time the worker has used.
    """
    from eval.verify import check_answer  # only here: math-verify takes a second to import

    descriptor, parent, memory_limit = map(int, sys.argv[1:])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a fork of the parent may hold the socket open
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if memory_limit and (hard == resource.RLIM_INFINITY or memory_limit < hard):
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, hard))
    check_answer("1", "the answer is $1$, 1")  # compiles math-verify's expressions, so that no item pays for them
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # until here the user should see what goes wrong

    def line(error: BaseException) -> str:
        return " ".join(traceback.format_exception_only(error)[-1].split())[:500]

    connection.send_bytes(pickle.dumps(("ready", None, 0.0)))
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        try:
            function, items = pickle.loads(message)
        except BaseException as error:
            connection.send_bytes(pickle.dumps(("unloadable", line(error), 0.0)))
            continue
        connection.send_bytes(pickle.dumps(("started", None, time.process_time())))
        for item in items:
            try:
                answer = pickle.dumps(("value", function(item), time.process_time()))
            except BaseException as error:  # a SystemExit of a check is that check's failure too
                answer = pickle.dumps(("exception", line(error), time.process_time()))
            connection.send_bytes(answer)
