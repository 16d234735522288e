"""Processes that end with the one that started them, so that no orphan goes on writing. Nothing heavy is imported."""

import ctypes
import os
import signal
import sys


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel SIGKILL this process when its parent dies (Linux).

    Give `parent_pid` (the parent's `os.getpid()`, passed along) to close the race of a parent that died before this
    call. The kernel watches the *thread* that started this process: start children from a thread that lasts.
    """
    parent = os.getppid() if parent_pid is None else parent_pid
    if sys.platform == "linux":
        set_parent_death_signal = 1
        failed = ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
        assert not failed, "prctl(PR_SET_PDEATHSIG) failed"
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """A rank of torchrun ends with torchrun, also with one that is gone already: process 1 has adopted it then.

    In a container the launcher may be process 1 itself: it runs the same interpreter then. Exit code 1.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    die_with_parent()
    first = "/proc/1/exe"  # not to be seen where it is another user's
    if os.getppid() == 1 and not (os.path.exists(first) and os.path.samefile(first, sys.executable)):
        raise SystemExit("error: torchrun, which started this rank, is gone; without one, unset TORCHELASTIC_RUN_ID.")
