"""A timeout for each phase of a run: if it hangs, all threads' stacks go to stderr and the process ends."""

import faulthandler
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def watchdog(seconds: float) -> None:
    """(Re)arm the watchdog; 0 disarms it. After `seconds` it prints all stacks to stderr and exits with 1.

    It runs in a C thread, so it also works if a C call hangs while it holds the interpreter's lock.
    """
    if seconds > 0:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    else:
        faulthandler.cancel_dump_traceback_later()


class Phases:
    """Measures the seconds of each named phase of a step; the beginning and end of a phase re-arm the watchdog.

        phases = Phases(watchdog_s=1800)
        with phases("sample"): ...
        metrics |= phases.pop()          # {"time/sample": 1.25}; then the times start at 0 again

    A kernel's time counts in the phase in which the host waits for it, not in the phase that launched it.
    """

    def __init__(self, watchdog_s: float = 0.0) -> None:
        self.watchdog_s = watchdog_s  # 0: no watchdog
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, watchdog_s: float | None = None) -> Iterator[None]:
        """`watchdog_s`: a separate timeout for a slow phase (an evaluation, a first compilation)."""
        watchdog(self.watchdog_s if watchdog_s is None else watchdog_s)
        start = time.perf_counter()
        yield
        watchdog(self.watchdog_s)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Seconds per phase since the last call, as `time/<name>`."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}
