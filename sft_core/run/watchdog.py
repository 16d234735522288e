"""A limit on the time of each phase of a run: what hangs is ended, with the stacks of all threads on stderr."""

import faulthandler
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def watchdog(seconds: float) -> None:
    """(Re)arm: unless called again within `seconds`, all stacks go to stderr and the process exits 1; 0 disarms.

    A C thread does it, so it also ends a process that hangs inside a C call holding the interpreter's lock.
    """
    if seconds > 0:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    else:
        faulthandler.cancel_dump_traceback_later()


class Phases:
    """Seconds per named phase of a step; every phase's beginning and end re-arms the watchdog.

        phases = Phases(watchdog_s=1800)
        with phases("sample"): ...
        metrics |= phases.pop()          # {"time/sample": 1.25}, and counts anew

    Kernels that a phase only launched are counted where the host waits for them.
    """

    def __init__(self, watchdog_s: float = 0.0) -> None:
        self.watchdog_s = watchdog_s  # 0: no watchdog
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, watchdog_s: float | None = None) -> Iterator[None]:
        """`watchdog_s`: this phase's own limit, for the slow ones (an evaluation, a first compilation)."""
        watchdog(self.watchdog_s if watchdog_s is None else watchdog_s)
        start = time.perf_counter()
        yield
        watchdog(self.watchdog_s)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Seconds per phase since the last call, as `time/<name>`."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}
