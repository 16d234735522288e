"""The processes of a run: the process group, the lock on the output folder, and the signals that stop a run.

Not supported, on purpose: restarting failed ranks (torchrun does that), elastic world sizes (a restart reshards the
checkpoint), and agreement between ranks about signals (the loop reduces `StopSignal.requested` with its other metrics).
The watchdog for hanging phases is in `watchdog.py`.
"""

import faulthandler
import fcntl
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from sft_core.run.files import is_full
from sft_core.run.parent import end_with_launcher
from sft_core.run.watchdog import watchdog

T = TypeVar("T")
GIB = 2**30
PATIENCE = 5.0  # seconds to wait for the other ranks before a line is printed
LEFT_OVER = "If no launcher started this process, unset RANK and WORLD_SIZE."
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_as_torchrun: dict[str, str] = {}  # environment variables that a single process has set for itself
_stores: list[dist.Store] = []  # the launcher's store, if there is one
_groups = count()
_locks: dict[Path, int] = {}  # folder -> the open file whose lock this process holds


# --- processes ---------------------------------------------------------------------------------------------------


def init_distributed(timeout_s: float = 600.0) -> tuple[int, int, int, torch.device]:
    """Join torchrun's process group, or make one of a single process; returns (rank, world size, local rank, device).

    The backend is gloo on the CPU and `cuda:nccl,cpu:gloo` on CUDA; every collective has a timeout of `timeout_s`
    seconds. A crash, including the abort after an NCCL timeout, prints all Python stacks. A single process sets the
    environment variables that torchrun would set, with a free port, because vLLM's `external_launcher` reads them.
    """
    faulthandler.enable(file=2, all_threads=True)
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        end_with_launcher()
        if not _stores:  # made once: a process may join several groups in turn, each with its own key prefix
            _stores.append(_meet(timeout))
        store: dist.Store = dist.PrefixStore(f"group-{next(_groups)}", _stores[0])
    else:
        store = dist.HashStore()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        _as_torchrun.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        _as_torchrun.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(_as_torchrun)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))

    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{local_world_size} processes were started for {torch.cuda.device_count()} visible GPUs: "
                f"start torchrun with --nproc_per_node {torch.cuda.device_count()}."
            )
        device, backend = torch.device("cuda", local_rank), "cuda:nccl,cpu:gloo"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        # By default torchrun sets one thread for each of several ranks; divide the cores among them instead.
        if local_world_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    return rank, world_size, local_rank, device


def _meet(timeout: timedelta) -> dist.Store:
    """The rendezvous store; returns when all ranks have joined.

    Raises ValueError if not all join: an unknown host, a port in use, or a rank that is missing after `timeout`.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    variables = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
    thread = ThreadPool(1)  # a wait in C++ on the main thread would not react to Ctrl-C
    meeting = thread.apply_async(lambda: next(iter(rendezvous("env://", timeout=timeout)))[0])
    thread.close()
    meeting.wait(PATIENCE)
    try:
        if not meeting.ready():
            socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
            print(f"waiting for the other ranks: {variables}. {LEFT_OVER}", file=sys.stderr, flush=True)
        return meeting.get()
    except (ValueError, OSError, dist.DistError) as error:
        why = str(error).split("\n")[0].rstrip(".")
        raise ValueError(f"the ranks cannot meet: {variables}: {why}. {LEFT_OVER}") from error


def shutdown() -> None:
    """Disarm the watchdog and destroy the process group. Close a vLLM engine first, since its exit needs the group."""
    watchdog(0)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    while _as_torchrun:  # else a process started later would believe it is a rank
        os.environ.pop(_as_torchrun.popitem()[0], None)


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first_rank(work: Callable[[], T], patient: bool = False) -> T:
    """Run `work` on rank 0 only; every rank returns its (picklable) result. A collective.

    If `work` raises a ValueError, or an OSError because the disk is full, every rank raises it, so that none waits.

    `patient`: the other ranks wait up to a day instead of the process group's timeout.
    """
    if not dist.is_initialized():
        return work()
    group = dist.new_group(timeout=timedelta(days=1), backend="gloo") if patient else None
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            if not isinstance(error, ValueError) and not is_full(error):
                raise
            outcome[1] = (ValueError if isinstance(error, ValueError) else OSError)(str(error))
    dist.broadcast_object_list(outcome, src=0, group=group)
    if group is not None:
        dist.destroy_process_group(group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def exchange(parcels: Sequence[T]) -> list[T]:
    """Send `parcels[i]`, which is picklable, to rank i; returns what the ranks sent to this one. A collective.

    A rank receives only its own parcels; with `all_gather_object` it would receive those of all ranks.
    """
    if len(parcels) == 1:
        return [*parcels]
    sent = [torch.frombuffer(bytearray(pickle.dumps(parcel)), dtype=torch.uint8) for parcel in parcels]
    sizes = torch.tensor([len(data) for data in sent])
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes)
    found = torch.empty(int(coming.sum()), dtype=torch.uint8)
    dist.all_to_all_single(found, torch.cat(sent), coming.tolist(), sizes.tolist())
    return [pickle.loads(data.numpy().tobytes()) for data in found.split(coming.tolist())]


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError raised inside the block or the decorated function into one line on stderr and exit code 2.

    Wrap the set-up (configuration, data, checks), not the training, where a ValueError should show its traceback.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # if all ranks have the error, the first one prints it and its exit ends this process
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        shutdown()
        for folder in list(_locks):
            unlock_output_dir(folder)
        raise SystemExit(2) from None


def lock_output_dir(output_dir: str | Path, wait_s: float = 10.0) -> None:
    """Lock `output_dir`/.lock until this process ends or calls `unlock_output_dir`; on the first rank only.

    Waits `wait_s` seconds for an earlier process that is ending, then raises ValueError with the process that holds the
    lock. The kernel releases the lock when the process ends for any reason, so there is never a stale lock to remove.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        says = f"cannot write to the folder {folder}: {error.strerror}. Choose another --output_dir."
        raise ValueError(says) from error
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = os.pread(lock, 200, 0).decode() or "unknown process"
                os.close(lock)
                raise ValueError(
                    f"{folder} is in use by another run ({holder.strip()}): stop it, or choose another --output_dir."
                ) from None
            time.sleep(0.1)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _locks[folder] = lock


def unlock_output_dir(output_dir: str | Path) -> None:
    """Release the lock on the folder, if this process holds it."""
    lock = _locks.pop(Path(output_dir), None)
    if lock is not None:
        os.close(lock)


# --- stopping ----------------------------------------------------------------------------------------------------


class StopSignal:
    """SIGTERM, SIGHUP and the first Ctrl-C set `requested`; the loop reads it at the end of a step, saves and stops.

    An ignored SIGHUP (nohup) stays ignored. After a SIGHUP, output to a closed terminal is discarded. A second Ctrl-C
    raises KeyboardInterrupt. Make this object in the main thread, after the engine, which may set its own handlers; in
    another thread Python cannot set handlers, and signals keep their effect. Ranks get a signal at different times, so
    reduce the flag over all ranks before acting on it.
    """

    _before: dict[int, Any] = {}  # the handlers before a run

    def __init__(self, says: str = "stopping after this step, with a checkpoint") -> None:
        self.requested = False
        self._says = says
        self._interrupts = 0
        handlers: dict[int, Any] = dict.fromkeys(SIGNALS, self._handle)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
            del handlers[signal.SIGHUP]
        self._set(handlers)

    @staticmethod
    def _set(handlers: dict[int, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @classmethod
    def remember(cls) -> None:
        """Remember the current handlers, before an engine is made; `restore` sets them again."""
        cls._before = {number: signal.getsignal(number) for number in SIGNALS}

    @classmethod
    def restore(cls) -> None:
        """Restore the handlers from before the run."""
        cls._set(cls._before)

    def _handle(self, number: int, frame: Any) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        for output in (1, 2) if number == signal.SIGHUP else ():
            try:
                os.write(output, b"\n")
            except OSError:  # the terminal is gone
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        if not self.requested:
            os.write(2, f"{self._says}; press Ctrl-C again to stop at once\n".encode())
        self.requested = True


# --- memory ------------------------------------------------------------------------------------------------------


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on a CUDA device, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
