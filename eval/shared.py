"""Objects that are sent to each worker only once: cloudpickle writes each to a file, which a worker reads once.

So closures, lambdas and functions of `__main__` can be sent, and large objects are not sent again with each item.
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
    """It is pickled as the name of its file and unpickled as `value`."""

    path: str
    value: Any

    def __reduce__(self) -> tuple:
        return _read, (self.path,)


class SharedObjects:
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()  # removed together with this object
        self._shared: dict[int, Shared] = {}

    def __call__(self, value: Any) -> Shared:
        """An object to send to workers in place of `value`. Raises ValueError if `value` cannot be pickled."""
        if id(value) not in self._shared:
            try:
                message = cloudpickle.dumps(value)
            except Exception as error:  # a user's object may raise anything
                raise ValueError(f"it cannot be sent to a worker ({' '.join(str(error).split())[:300]})") from error
            path = Path(self._folder.name) / str(len(self._shared))
            path.write_bytes(message)
            self._shared[id(value)] = Shared(str(path), value)  # keeps `value` alive, so that its id stays unique
        return self._shared[id(value)]


@cache
def _read(path: str) -> Any:
    return pickle.loads(Path(path).read_bytes())
