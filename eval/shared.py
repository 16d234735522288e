"""Objects that a pool's workers are given once: each lies in a file, by cloudpickle, and a worker reads it once.

So a closure, a lambda or a function of `__main__` travels, and nothing large travels with each item.
"""

import pickle
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cloudpickle


@dataclass(frozen=True)
class Shared:
    """Pickled as the name of its file, it arrives as `value`."""

    path: str
    value: Any

    def __reduce__(self) -> tuple:
        return _read, (self.path,)


class SharedObjects:
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()  # removed when nobody holds this any more
        self._shared: dict[int, Shared] = {}

    def __call__(self, value: Any) -> Shared:
        """What stands for `value` in what is sent to workers. Raises ValueError where it cannot be pickled."""
        if id(value) not in self._shared:
            try:
                message = cloudpickle.dumps(value)
            except Exception as error:  # of a user's object anything
                raise ValueError(f"it cannot be sent to a worker ({' '.join(str(error).split())[:300]})") from error
            path = Path(self._folder.name) / str(len(self._shared))
            path.write_bytes(message)
            self._shared[id(value)] = Shared(str(path), value)  # which keeps the object, and so its id, alive
        return self._shared[id(value)]


@cache
def _read(path: str) -> Any:
    return pickle.loads(Path(path).read_bytes())
