"""Worker processes that can be killed: for checks that may hang, crash or eat memory.

`WorkerPool` runs any importable function over items in fresh interpreters, and kills the one that overruns. Nothing
here imports torch; a test looks into a worker to see.

    with WorkerPool(2, timeout=5.0) as pool:
        results = pool.map(function, items)
        job = pool.submit(function, items)  # and go on with something else
        results = pool.wait(job)
"""

import ctypes
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
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
class Job:
    """Items on their way through a pool."""

    function: Callable[[Any], Any]
    items: Sequence
    limits: list[float]  # seconds for each
    results: list
    missing: int


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    state: str = "starting"  # -> "idle" -> "loading" (unpickles a chunk) -> "running" -> "idle"
    deadline: float = float("inf")  # time.monotonic(), of what the state names
    job: Job | None = None
    items: deque[int] = field(default_factory=deque)  # of the job, not yet answered, in the order the worker takes them
    last: float = float("inf")  # time.monotonic(), when the item at hand is given up whatever the machine's load
    used: float = 0.0  # seconds of processor time when the worker began this item
    prints: bool = False  # what it prints is kept


class WorkerPool:
    """Runs importable functions in `num_workers` fresh interpreters; an item that overruns costs itself alone.

    timeout: seconds an item may take, from the moment a ready worker starts on it; imports are not charged. A worker
        that computes on a crowded machine may have these seconds of the processor, at most 10 times as many in all.
    memory_limit: bytes of address space a worker may take (RLIMIT_AS); beyond it Python raises MemoryError.
    prints: keep what one worker prints, for `printed`; all else that is printed is lost.

    Workers are started by exec, so a parent that holds CUDA, vLLM or process groups loses nothing; they ignore SIGINT
    and SIGTERM (the parent decides), and die with the thread that started them: create and use the pool in the main
    thread. Results do not depend on the number of workers.
    """

    START_LIMIT, START_ATTEMPTS = 120.0, 3  # seconds to import, tries per worker: only a machine in trouble needs them

    def __init__(
        self, num_workers: int, timeout: float = 5.0, memory_limit: int | None = 4 << 30, prints: bool = False
    ):
        if num_workers < 1 or timeout <= 0:
            raise ValueError(f"a pool needs num_workers >= 1 and timeout > 0, got {num_workers} and {timeout}")
        self.num_workers, self.timeout, self.memory_limit = num_workers, timeout, memory_limit
        self._output = tempfile.TemporaryFile(buffering=0) if prints else None  # no pipe, which could fill up
        self._workers: list[_Worker] = []
        self._todo: deque[tuple[Job, Sequence[int]]] = deque()
        self._failed_starts = 0
        self._fill()  # workers import while the parent goes on

    def map(self, function: Callable[[Any], Any], items: Sequence, timeouts: Sequence[float] | None = None) -> list:
        """[function(item) for item in items], with an `Unscored` where an item hung, crashed or raised.

        function and items are pickled, so a function must live in a module (not in `__main__`, no lambda).
        timeouts: seconds for each item, where they differ from the pool's.
        Raises ValueError for what cannot be pickled, RuntimeError when a worker cannot start or import the function;
        all that the pool was at is then given up.
        """
        return self.wait(self._queue(function, items, timeouts))

    def submit(self, function: Callable[[Any], Any], items: Sequence, timeouts: Sequence[float] | None = None) -> Job:
        """As `map`, but the workers go on while the caller does; `wait` gives the results. A worker gets its next items
        whenever the pool is called, so many small jobs keep it busier than one."""
        job = self._queue(function, items, timeouts)
        for _ in range(2):  # take in what is done, then hand out
            self._turn(0.0)
        return job

    def _queue(self, function: Callable[[Any], Any], items: Sequence, timeouts: Sequence[float] | None) -> Job:
        limits = [self.timeout] * len(items) if timeouts is None else list(timeouts)
        job = Job(function, items, limits, [None] * len(items), len(items))
        if len(items):
            self._todo.append((job, range(len(items))))
        self._failed_starts = 0
        for worker in [w for w in self._workers if w.process.poll() is not None and not w.items]:
            self._kill(worker)  # something outside killed it since the last call
        return job

    def wait(self, job: Job) -> list:
        """The job's results, in the order of its items."""
        while job.missing:
            assert self._todo or any(worker.items for worker in self._workers), "this job was given up"
            self._turn(1e6)
        return job.results

    def printed(self, limit: int = 20) -> list[str]:
        """What one worker has printed since the last call, its first `limit` lines."""
        if self._output is None:
            return []
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()
        self._output.seek(0)  # the worker shares the position
        self._output.truncate()
        return lines[:limit]

    def _turn(self, patience: float) -> None:
        """Hand out work, wait up to `patience` seconds for an answer or a deadline, take what has come in."""
        try:
            self._fill()
            # A caller who waits gives out small shares, for balance; one who does not may look again much later.
            shares = self.num_workers * (4 if patience else 1)
            size = min(64, -(-sum(len(rest) for _, rest in self._todo) // shares))
            for worker in self._workers:
                if worker.state == "idle" and self._todo:
                    worker.job, rest = self._todo.popleft()
                    worker.items = deque(rest[:size])
                    if len(rest) > size:
                        self._todo.appendleft((worker.job, rest[size:]))
                    self._send(worker, worker.job.function, [worker.job.items[i] for i in worker.items])
            soonest = min(w.deadline for w in self._workers)
            ready = wait([w.connection for w in self._workers], max(0.0, min(soonest - time.monotonic(), patience)))
            for worker in [w for w in self._workers if w.connection in ready]:
                try:
                    while worker.connection.poll():
                        self._take(worker, *pickle.loads(worker.connection.recv_bytes()))
                except (EOFError, OSError):
                    with suppress(subprocess.TimeoutExpired):
                        worker.process.wait(1.0)
                    self._give_up(worker, "crash", f"died with exit code {worker.process.returncode}")
            now = time.monotonic()
            # A parent that was itself held up reads what has come in before it blames the worker.
            for worker in [w for w in self._workers if w.deadline < now and not w.connection.poll()]:
                owed = self._limit(worker) - self._computed(worker) if worker.state == "running" else 0.0
                if owed > 0 and now < worker.last:
                    worker.deadline = min(now + owed, worker.last)
                else:
                    self._give_up(worker, "timeout", "took too long")
        except BaseException:
            self._todo.clear()
            for worker in [w for w in self._workers if w.items]:  # nobody waits for these
                self._kill(worker)
            raise

    def _take(self, worker: _Worker, kind: str, value: Any, used: float) -> None:
        """A worker's message; `used` is the processor time it has had in all."""
        if kind == "unloadable":
            assert worker.job is not None
            raise RuntimeError(f"a checking worker cannot import {worker.job.function!r} or its arguments: {value}")
        if kind in ("value", "exception"):
            if used - worker.used > self._limit(worker):  # it came back before the parent looked
                kind, value = "timeout", "took too long"
            self._answer(worker, value if kind == "value" else Unscored(kind, value))
        self._failed_starts = 0
        worker.state = "running" if worker.items else "idle"
        limit = self._limit(worker)
        worker.deadline, worker.last = time.monotonic() + limit, time.monotonic() + 10 * limit
        worker.used = used

    def _give_up(self, worker: _Worker, reason: str, error: str) -> None:
        """End the worker; the item it was at is lost, the rest of its chunk goes back to the queue."""
        self._kill(worker)
        if worker.state == "running":
            self._answer(worker, Unscored(reason, error))
        else:
            self._failed_starts += 1
            if self._failed_starts >= self.START_ATTEMPTS * self.num_workers:
                raise RuntimeError(f"checking workers do not start: the last one {error} while {worker.state}")
        if worker.items:
            assert worker.job is not None
            self._todo.appendleft((worker.job, list(worker.items)))

    @staticmethod
    def _answer(worker: _Worker, value: Any) -> None:
        assert worker.job is not None
        worker.job.results[worker.items.popleft()] = value
        worker.job.missing -= 1

    @staticmethod
    def _limit(worker: _Worker) -> float:
        """Seconds for the item at hand."""
        return worker.job.limits[worker.items[0]] if worker.job is not None and worker.items else float("inf")

    def close(self) -> None:
        """Kill the workers, drop what they were at; the next call starts new ones."""
        self._todo.clear()
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
            prints = self._output is not None and not any(worker.prints for worker in self._workers)
            process = subprocess.Popen(
                [sys.executable, "-u", "-P", "-c", "from eval.workers import _serve; _serve()", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self._output if prints else subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=env,
                start_new_session=True,  # what a check starts is killed with it
            )
            theirs.close()
            self._workers.append(_Worker(process, ours, deadline=time.monotonic() + self.START_LIMIT, prints=prints))

    def _send(self, worker: _Worker, function: Callable, chunk: list) -> None:
        try:
            message = pickle.dumps((function, chunk))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"what is sent to a worker must pickle: define it in a module ({error})") from error
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
