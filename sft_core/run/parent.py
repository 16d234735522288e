"""Ends a process when the process that started it ends, so that no orphan keeps writing. Imports nothing heavy."""

import ctypes
import os
import signal
import sys


def die_with_parent(parent_pid: int | None = None) -> None:
    """Make the kernel send SIGKILL to this process when its parent dies (Linux).

    The parent may die before this call: pass its `os.getpid()` as `parent_pid` so that this is detected. The kernel
    watches the *thread* that started this process, so start children from a thread that lives long enough.
    """
    parent = os.getppid() if parent_pid is None else parent_pid
    if sys.platform == "linux":
        set_parent_death_signal = 1
        failed = ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
        assert not failed, "prctl(PR_SET_PDEATHSIG) failed"
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """Make a rank of torchrun end when torchrun ends; exit with code 1 if torchrun is gone already.

    torchrun is gone if process 1 is the parent. In a container process 1 may be torchrun itself, which then runs the
    same Python interpreter.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    die_with_parent()
    first = "/proc/1/exe"  # not readable if another user owns process 1
    if os.getppid() == 1 and not (os.path.exists(first) and os.path.samefile(first, sys.executable)):
        raise SystemExit("error: this rank's torchrun has ended: start it again, or unset TORCHELASTIC_RUN_ID.")
