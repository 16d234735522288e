"""Worker processes that can be killed, for checks that may hang, crash or use too much memory.

`WorkerPool` runs any importable function on items in fresh interpreters and kills a worker that exceeds the timeout.
This module does not import torch (tested).

    with WorkerPool(2, timeout=5.0) as pool:
        results = pool.map(function, items)
        job = pool.submit(function, items)  # do something else meanwhile
        results = pool.wait(job)

How a job is processed (by methods of `WorkerPool`; the worker's side is `eval/worker_process.py`):

1. `submit` puts the job's items into the queue `_todo`. Each call of the pool runs `_turn`, which hands out chunks,
   receives messages and checks deadlines.
2. `_load` sends a chunk to an idle worker, which unpickles it. This may import modules; the time is not charged to an
   item.
3. The worker's first message starts the clock of its first item. Each later message is a result, which `_finish_item`
   stores in `job.results` before the clock of the next item starts. After the last item the worker is idle.
4. `_replace` kills a worker that died or exceeded the timeout: the item that it ran becomes `Unscored`, the rest of its
   chunk returns to the front of the queue, and the next turn starts a new worker.
5. `wait` runs turns until every item has a result.
"""

import enum
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from eval.shared import SharedObjects

FOREVER = float("inf")


@dataclass(frozen=True)
class Unscored:
    """Replaces the result of an item whose check failed. It never counts as a reward of zero."""

    reason: str  # "timeout", "crash" (the process died) or "exception"
    error: str  # one line for the log


@dataclass
class Job:
    """Items that a pool processes."""

    function: Callable[[Any], Any]
    items: Sequence
    limits: list[float]  # seconds for each
    results: list
    missing: int


class _State(enum.Enum):
    """The state of a worker: STARTING -> IDLE -> LOADING -> RUNNING -> IDLE. It may be killed in every state."""

    STARTING = "starting"  # it imports modules; the message "ready" makes it IDLE
    IDLE = "idle"
    LOADING = "loading"  # it unpickles a chunk; the message "started" makes it RUNNING
    RUNNING = "running"  # it runs an item; the result of the last one makes it IDLE


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    deadline: float  # time.monotonic() by which its state must end
    prints: bool  # whether its output is kept
    state: _State = _State.STARTING
    job: Job | None = None
    items: deque[int] = field(default_factory=deque)  # the chunk's unfinished items, in the order of processing
    last: float = FOREVER  # time.monotonic() at which the current item times out even on a busy machine
    used: float = 0.0  # the worker's CPU seconds at the start of the current item

    @property
    def limit(self) -> float:
        """The timeout in seconds of the current item."""
        assert self.job is not None
        return self.job.limits[self.items[0]]

    def rest(self) -> None:
        """STARTING, RUNNING -> IDLE."""
        self.state, self.deadline = _State.IDLE, FOREVER

    def begin_item(self, used: float) -> None:
        """LOADING, RUNNING -> RUNNING: the clock of the next item starts."""
        now = time.monotonic()
        self.state, self.used = _State.RUNNING, used
        self.deadline, self.last = now + self.limit, now + 10 * self.limit

    def answer(self, value: Any) -> None:
        """Store the result of the current item."""
        assert self.job is not None
        self.job.results[self.items.popleft()] = value
        self.job.missing -= 1

    def owed(self) -> float:
        """Seconds of CPU time that the current item may still use: positive if it is runnable and the machine has given
        it less CPU time than its timeout, else at most 0."""
        if self.state is not _State.RUNNING:
            return 0.0
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # no such process, or not Linux
            return 0.0
        used = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return self.limit - (used - self.used) if stat[0] == "R" else 0.0


class WorkerPool:
    """Runs importable functions in `num_workers` fresh interpreters. A timeout affects only the item that exceeds it.

    timeout: seconds per item, from its start in a ready worker; imports are not charged. On a busy machine, a computing
        worker may use this many seconds of CPU time, but at most 10 times as many seconds of wall time.
    memory_limit: bytes of address space per worker (RLIMIT_AS); beyond it Python raises MemoryError.
    prints: keep what one worker prints, for `printed`; all other output is discarded.

    Workers are started by exec, so the parent may use CUDA, vLLM or process groups. They ignore SIGINT and SIGTERM,
    since the parent decides when they stop, and they die with the thread that started them: create and use the pool in
    the main thread. Results do not depend on the number of workers.
    """

    START_LIMIT, START_ATTEMPTS = 120.0, 3  # seconds to start or load, attempts per worker; rarely reached

    def __init__(
        self, num_workers: int, timeout: float = 5.0, memory_limit: int | None = 4 << 30, prints: bool = False
    ):
        if num_workers < 1 or timeout <= 0:
            raise ValueError(f"a pool needs num_workers >= 1 and timeout > 0, got {num_workers} and {timeout}")
        self.num_workers, self.timeout, self.memory_limit = num_workers, timeout, memory_limit
        self.share = SharedObjects()
        self._output = tempfile.TemporaryFile(buffering=0) if prints else None  # not a pipe, which could fill up
        self._workers: list[_Worker] = []
        self._todo: deque[tuple[Job, Sequence[int]]] = deque()
        self._failed_starts = 0
        self._start_workers()  # they import while the parent continues

    def map(self, function: Callable[[Any], Any], items: Sequence, timeouts: Sequence[float] | None = None) -> list:
        """[function(item) for item in items], with `Unscored` for each item that timed out, crashed or raised.

        function and items are pickled, so the function must be defined in a module (not in `__main__`, no lambda).
        timeouts: seconds for each item, if they differ from the pool's.
        Raises ValueError if something cannot be pickled, RuntimeError if a worker cannot start or import the function.
        In both cases, all jobs of the pool are dropped.
        """
        return self.wait(self._queue(function, items, timeouts))

    def submit(self, function: Callable[[Any], Any], items: Sequence, timeouts: Sequence[float] | None = None) -> Job:
        """Like `map`, but it returns at once, and `wait` returns the results. A worker gets new items only when the
        pool is called, so many small jobs keep it busier than one large job."""
        job = self._queue(function, items, timeouts)
        for _ in range(2):  # the first turn receives results, the second hands out new chunks
            self._turn(0.0)
        return job

    def wait(self, job: Job) -> list:
        """The job's results, in the order of its items."""
        while job.missing:
            assert self._todo or any(worker.items for worker in self._workers), "this job was dropped"
            self._turn(1e6)
        return job.results

    def printed(self, limit: int = 20) -> list[str]:
        """The first `limit` lines that one worker has printed since the last call."""
        if self._output is None:
            return []
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()
        self._output.seek(0)  # the worker shares the position
        self._output.truncate()
        return lines[:limit]

    def close(self) -> None:
        """Kill the workers and drop all jobs. The next call starts new workers."""
        self._todo.clear()
        for worker in list(self._workers):
            self._kill(worker)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _queue(self, function: Callable[[Any], Any], items: Sequence, timeouts: Sequence[float] | None) -> Job:
        limits = [self.timeout] * len(items) if timeouts is None else list(timeouts)
        job = Job(function, items, limits, [None] * len(items), len(items))
        if len(items):
            self._todo.append((job, range(len(items))))
        self._failed_starts = 0
        for worker in [w for w in self._workers if w.process.poll() is not None and not w.items]:
            self._kill(worker)  # something outside killed it since the last call
        return job

    def _turn(self, patience: float) -> None:
        """Hand out chunks, wait up to `patience` seconds for a message or a deadline, and process it."""
        try:
            self._start_workers()
            # If the caller waits, chunks are small, for balance; if not, the next turn may be much later.
            self._hand_out(shares=self.num_workers * (4 if patience else 1))
            self._receive(patience)
            self._end_overruns()
        except BaseException:
            self._todo.clear()
            for worker in [w for w in self._workers if w.items]:  # their jobs are dropped
                self._kill(worker)
            raise

    def _start_workers(self) -> None:
        """Start the missing workers."""
        while len(self._workers) < self.num_workers:
            ours, theirs = Pipe(duplex=True)
            arguments = [str(theirs.fileno()), str(os.getpid()), str(self.memory_limit or 0)]
            # Workers get the parent's module path, and all the same hash seed, so that results cannot differ.
            path = os.pathsep.join(os.path.abspath(p) for p in [*sys.path, os.path.dirname(os.path.dirname(__file__))])
            env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
            prints = self._output is not None and not any(worker.prints for worker in self._workers)
            process = subprocess.Popen(
                [sys.executable, "-u", "-P", "-m", "eval.worker_process", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self._output if prints else subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=env,
                start_new_session=True,  # processes that a check starts are killed with it
            )
            theirs.close()
            self._workers.append(_Worker(process, ours, time.monotonic() + self.START_LIMIT, prints))

    def _hand_out(self, shares: int) -> None:
        """Send a chunk of the queue's first items to each idle worker."""
        size = min(64, -(-sum(len(rest) for _, rest in self._todo) // shares))
        for worker in self._workers:
            if worker.state is _State.IDLE and self._todo:
                job, rest = self._todo.popleft()
                if len(rest) > size:
                    self._todo.appendleft((job, rest[size:]))
                self._load(worker, job, rest[:size])

    def _load(self, worker: _Worker, job: Job, chunk: Sequence[int]) -> None:
        """IDLE -> LOADING."""
        worker.job, worker.items = job, deque(chunk)
        try:
            message = pickle.dumps((job.function, [job.items[i] for i in chunk]))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"a worker's function and items must pickle: define it in a module ({error})") from error
        worker.state, worker.deadline = _State.LOADING, time.monotonic() + self.START_LIMIT
        try:
            worker.connection.send_bytes(message)
        except OSError:
            pass  # the worker died while idle; `_receive` reads the end of its stream and requeues its chunk

    def _receive(self, patience: float) -> None:
        """Wait for messages, a deadline, or `patience` seconds, and process the messages."""
        soonest = min(worker.deadline for worker in self._workers)
        ready = wait([w.connection for w in self._workers], max(0.0, min(soonest - time.monotonic(), patience)))
        for worker in [w for w in self._workers if w.connection in ready]:
            try:
                while worker.connection.poll():
                    self._take(worker, *pickle.loads(worker.connection.recv_bytes()))
            except (EOFError, OSError):
                with suppress(subprocess.TimeoutExpired):
                    worker.process.wait(1.0)
                self._replace(worker, "crash", f"died with exit code {worker.process.returncode}")

    def _take(self, worker: _Worker, kind: str, value: Any, used: float) -> None:
        """Process one message of `eval/worker_process.py`; `used` is the worker's total CPU time."""
        if kind == "unloadable":
            assert worker.job is not None
            raise RuntimeError(f"a worker cannot import {worker.job.function!r} or its items ({value}): correct them")
        if kind == "ready":
            worker.rest()
        elif kind == "started":
            self._failed_starts = 0  # not earlier: a worker may start and then hang while it loads its items
            worker.begin_item(used)
        else:
            self._finish_item(worker, kind, value, used)

    @staticmethod
    def _finish_item(worker: _Worker, kind: str, value: Any, used: float) -> None:
        """RUNNING -> RUNNING, or IDLE after the chunk's last item."""
        if used - worker.used > worker.limit:  # the item finished late, but before the parent checked
            kind, value = "timeout", "took too long"
        worker.answer(value if kind == "value" else Unscored(kind, value))
        if worker.items:
            worker.begin_item(used)
        else:
            worker.rest()

    def _end_overruns(self) -> None:
        """Replace workers whose deadline has passed, except those that are still owed CPU time."""
        now = time.monotonic()
        # If the parent itself was delayed, it first reads the messages that have arrived.
        for worker in [w for w in self._workers if w.deadline < now and not w.connection.poll()]:
            owed = worker.owed()
            if owed > 0 and now < worker.last:
                worker.deadline = min(now + owed, worker.last)
            else:
                self._replace(worker, "timeout", "took too long")

    def _replace(self, worker: _Worker, reason: str, error: str) -> None:
        """Kill the worker. The item that it ran is `Unscored`, the rest of its chunk returns to the queue."""
        self._kill(worker)
        if worker.state is _State.RUNNING:
            worker.answer(Unscored(reason, error))
        else:
            self._failed_starts += 1
            if self._failed_starts >= self.START_ATTEMPTS * self.num_workers:
                raise RuntimeError(f"checking workers do not start: one {error} while {worker.state.value} (see above)")
        if worker.items:
            assert worker.job is not None
            self._todo.appendleft((worker.job, list(worker.items)))

    def _kill(self, worker: _Worker) -> None:
        if worker.process.poll() is None:
            os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
        worker.connection.close()
        self._workers.remove(worker)
