"""Worker processes that can be killed: for checks that may hang, crash or eat memory.

`WorkerPool` runs any importable function over items in fresh interpreters, and kills the one that overruns. Nothing
here imports torch; a test looks into a worker to see.

    with WorkerPool(2, timeout=5.0) as pool:
        results = pool.map(function, items)
        job = pool.submit(function, items)  # and go on with something else
        results = pool.wait(job)

The life of a job (the methods are `WorkerPool`'s, the worker's side is `eval/worker_process.py`):

1. `submit` puts the job's items into the queue `_todo`, and each call of the pool makes a `_turn`, which hands out
   chunks, receives messages and looks at deadlines.
2. `_load` sends a chunk to an idle worker, which unpickles it: this may import modules and is not charged to an item.
3. The worker's first message starts the clock of its first item; each later one is an answer, which `_finish_item`
   writes into `job.results` before the clock of the next item starts, until the worker is idle again.
4. `_replace` kills a worker that died or overran: the item that it ran becomes `Unscored`, the rest of its chunk goes
   back to the front of the queue, and the next turn starts a new worker.
5. `wait` makes turns until every item has a result.
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


class _State(enum.Enum):
    """What a worker is at. STARTING -> IDLE -> LOADING -> RUNNING -> IDLE; from each of them it may be killed."""

    STARTING = "starting"  # it imports; "ready" makes it IDLE
    IDLE = "idle"
    LOADING = "loading"  # it unpickles a chunk; "started" makes it RUNNING
    RUNNING = "running"  # it has an item at hand; the answer to its last one makes it IDLE


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    deadline: float  # time.monotonic(), when its state must have ended
    prints: bool  # what it prints is kept
    state: _State = _State.STARTING
    job: Job | None = None
    items: deque[int] = field(default_factory=deque)  # of the job, not yet answered, in the order the worker takes them
    last: float = FOREVER  # time.monotonic(), when the item at hand is given up whatever the machine's load
    used: float = 0.0  # seconds of processor time when the worker began this item

    @property
    def limit(self) -> float:
        """Seconds for the item at hand."""
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
        """The result of the item at hand."""
        assert self.job is not None
        self.job.results[self.items.popleft()] = value
        self.job.missing -= 1

    def owed(self) -> float:
        """Seconds of processor time that the item at hand may still have: some if it wants to compute and the machine
        has given it less than its limit, else none."""
        if self.state is not _State.RUNNING:
            return 0.0
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # no such process, or no Linux
            return 0.0
        used = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return self.limit - (used - self.used) if stat[0] == "R" else 0.0


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
        self.share = SharedObjects()
        self._output = tempfile.TemporaryFile(buffering=0) if prints else None  # no pipe, which could fill up
        self._workers: list[_Worker] = []
        self._todo: deque[tuple[Job, Sequence[int]]] = deque()
        self._failed_starts = 0
        self._start_workers()  # they import while the parent goes on

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

    def close(self) -> None:
        """Kill the workers, drop what they were at; the next call starts new ones."""
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
        """Hand out work, wait up to `patience` seconds for a message or a deadline, deal with what has come."""
        try:
            self._start_workers()
            # A caller who waits gives out small shares, for balance; one who does not may look again much later.
            self._hand_out(shares=self.num_workers * (4 if patience else 1))
            self._receive(patience)
            self._end_overruns()
        except BaseException:
            self._todo.clear()
            for worker in [w for w in self._workers if w.items]:  # nobody waits for these
                self._kill(worker)
            raise

    def _start_workers(self) -> None:
        """New workers for those that are missing."""
        while len(self._workers) < self.num_workers:
            ours, theirs = Pipe(duplex=True)
            arguments = [str(theirs.fileno()), str(os.getpid()), str(self.memory_limit or 0)]
            # The parent's module path; one hash seed for all, so that results cannot differ.
            path = os.pathsep.join(os.path.abspath(p) for p in [*sys.path, os.path.dirname(os.path.dirname(__file__))])
            env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
            prints = self._output is not None and not any(worker.prints for worker in self._workers)
            process = subprocess.Popen(
                [sys.executable, "-u", "-P", "-m", "eval.worker_process", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self._output if prints else subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=env,
                start_new_session=True,  # what a check starts is killed with it
            )
            theirs.close()
            self._workers.append(_Worker(process, ours, time.monotonic() + self.START_LIMIT, prints))

    def _hand_out(self, shares: int) -> None:
        """The queue's first items to the idle workers, a chunk for each."""
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
            raise ValueError(f"what is sent to a worker must pickle: define it in a module ({error})") from error
        worker.state, worker.deadline = _State.LOADING, time.monotonic() + self.START_LIMIT
        try:
            worker.connection.send_bytes(message)
        except OSError:
            pass  # it died while idle; the end of its stream is read next, and its chunk goes back to the queue

    def _receive(self, patience: float) -> None:
        """The workers' messages, once there is one, a deadline has come or `patience` seconds have passed."""
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
        """One message of `eval/worker_process.py`; `used` is the processor time that the worker has had in all."""
        if kind == "unloadable":
            assert worker.job is not None
            raise RuntimeError(f"a checking worker cannot import {worker.job.function!r} or its arguments: {value}")
        if kind == "ready":
            worker.rest()
        elif kind == "started":
            self._failed_starts = 0  # not before: a worker may start, and then hang as it loads its items
            worker.begin_item(used)
        else:
            self._finish_item(worker, kind, value, used)

    @staticmethod
    def _finish_item(worker: _Worker, kind: str, value: Any, used: float) -> None:
        """RUNNING -> RUNNING, or IDLE after the chunk's last item."""
        if used - worker.used > worker.limit:  # it came back before the parent looked
            kind, value = "timeout", "took too long"
        worker.answer(value if kind == "value" else Unscored(kind, value))
        if worker.items:
            worker.begin_item(used)
        else:
            worker.rest()

    def _end_overruns(self) -> None:
        """Replace the workers whose deadline has passed, but for those to which the machine owes processor time."""
        now = time.monotonic()
        # A parent that was itself held up reads what has come in before it blames the worker.
        for worker in [w for w in self._workers if w.deadline < now and not w.connection.poll()]:
            owed = worker.owed()
            if owed > 0 and now < worker.last:
                worker.deadline = min(now + owed, worker.last)
            else:
                self._replace(worker, "timeout", "took too long")

    def _replace(self, worker: _Worker, reason: str, error: str) -> None:
        """End the worker; the item that it ran is lost, the rest of its chunk goes back to the queue."""
        self._kill(worker)
        if worker.state is _State.RUNNING:
            worker.answer(Unscored(reason, error))
        else:
            self._failed_starts += 1
            if self._failed_starts >= self.START_ATTEMPTS * self.num_workers:
                raise RuntimeError(f"checking workers do not start: the last one {error} while {worker.state.value}")
        if worker.items:
            assert worker.job is not None
            self._todo.appendleft((worker.job, list(worker.items)))

    def _kill(self, worker: _Worker) -> None:
        if worker.process.poll() is None:
            os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
        worker.connection.close()
        self._workers.remove(worker)
