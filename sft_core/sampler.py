"""Chooses the rows of the next step: single rows, or bins of whole rows. A small state is enough to resume the order.

Rows are processed in windows of at most WINDOW rows (when streaming, also of about WINDOW_BYTES). Without packing a
window is shuffled. With packing its rows are put into bins of max_length tokens by best-fit decreasing, and the bins
are shuffled. The rows of a step never depend on the number of ranks.

* `Shuffled`: all rows are tokenised and memory-mapped. Each pass over them is a new shuffle, cut into windows.
  The state is the number of sequences taken.
* `Streamed`: rows are read as they are needed, in the order of the files, for data sets that do not fit the disk. The
  state is where the window began and how many of its sequences were taken. A resumed run reads that window again, so
  there is no buffer to save.

Not supported, on purpose: curricula, resampling.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from sft_core.data.packing import pack
from sft_core.data.rows import damaged_line, row_order
from sft_core.dataset import CUT, Example, Examples

if TYPE_CHECKING:
    from datasets import IterableDataset

WINDOW = 4096  # rows
WINDOW_BYTES = 64 << 20  # of raw rows in a streamed window


def sequences_of(lengths: list[int], bin_size: int | None, seed: int) -> list[list[int]]:
    """One window's sequences, shuffled, as indices of `lengths`: single rows, or bins of at most `bin_size` tokens."""
    bins = [[i] for i in range(len(lengths))] if bin_size is None else pack(lengths, bin_size)
    order = torch.randperm(len(bins), generator=torch.Generator().manual_seed(seed)).tolist()
    return [bins[i] for i in order]


class Shuffled:
    """An endless sequence of shuffled passes over `examples`."""

    def __init__(self, examples: Examples, bin_size: int | None, seed: int) -> None:
        self.examples, self.bin_size, self.seed = examples, bin_size, seed
        self.lengths = examples.lengths
        self.taken = 0  # sequences, over all passes
        self._pass, self._first, self._sequences = -1, 0, list[list[int]]()

    def _load_pass(self, number: int) -> None:
        """The sequences of one pass, as row numbers."""
        rows = len(self.lengths)
        order = np.array(row_order(rows, self.seed, number * rows, rows))
        if self.bin_size is None:
            sequences = [[i] for i in order.tolist()]
        else:
            sequences = []
            for start in range(0, rows, WINDOW):
                window = order[start : start + WINDOW]
                seed = self.seed + 1_000_003 * number + start
                bins = sequences_of(self.lengths[window].tolist(), self.bin_size, seed)
                sequences += [window[places].tolist() for places in bins]
        self._first = 0 if number == 0 else self._first + len(self._sequences)
        self._pass, self._sequences = number, sequences

    @property
    def digest(self) -> str:
        """A digest of the lengths: with other lengths the bins differ, and a saved state would point to other rows."""
        return hashlib.sha256(np.ascontiguousarray(self.lengths, np.int64).tobytes()).hexdigest()[:16]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max()) if self.bin_size is None else self.bin_size

    @property
    def sequences_per_pass(self) -> int:
        """Sequences of the first pass; with packing later passes may have a few more or fewer."""
        if self._pass != 0:
            self._load_pass(0)
        return len(self._sequences)

    def take(self, count: int) -> list[Example]:
        """The rows of the next `count` sequences."""
        rows: list[int] = []
        if self._pass < 0 or self.taken < self._first:
            self._load_pass(0)
        for _ in range(count):
            while self.taken >= self._first + len(self._sequences):
                self._load_pass(self._pass + 1)
            rows += self._sequences[self.taken - self._first]
            self.taken += 1
        chosen = self.examples.rows[rows]
        return list(zip(chosen["input_ids"], chosen["loss_mask"], strict=True))

    def metrics(self) -> dict[str, float]:
        return {}  # rows that were cut or dropped are reported before the run

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def resume(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


class Streamed:
    """An endless sequence of passes over `rows` in their own order. `take` is a collective.

    The first rank reads a window. Each rank tokenises its share of it (`encode(row, number)`, see
    `sft_core.dataset.encode_row`) while the previous window is trained on. Then all ranks gather the whole window.
    """

    def __init__(
        self,
        rows: IterableDataset,
        encode: Callable[[dict, int], dict[str, Any]],
        bin_size: int | None,
        seed: int,
        name: str = "the data",
    ) -> None:
        self.rows, self.encode, self.bin_size, self.seed, self.name = rows, encode, bin_size, seed, name
        self._start = {"reader": rows.state_dict(), "rows": 0}  # where every pass begins
        self._next = self._start | {"outcomes": [0] * 4}  # where the next window begins
        self._begin = self._next  # where the current window began
        self._iterator: Iterator[dict] | None = None
        self._ahead: tuple[Future, int, dict[str, Any]] | None = None  # see `_look_ahead`
        self._window: list[Example] = []
        self._sequences: list[list[int]] = []
        self.taken = 0  # sequences of the current window

    digest = None  # the lengths are not known
    longest = None  # also not known

    @property
    def outcomes(self) -> list[int]:
        """Numbers of rows in all windows so far: kept, cut, too long, without trained tokens."""
        return self._next["outcomes"]

    def metrics(self) -> dict[str, float]:
        """For the log: how many rows were cut and how many were dropped, in all windows so far."""
        _, cut, too_long, nothing = self.outcomes
        return {"rows_cut": cut, "rows_dropped": too_long + nothing}

    def take(self, count: int) -> list[Example]:
        """The rows of the next `count` sequences.

        Raises:
            ValueError: a row does not fit its form, or a whole pass has no trained token.
        """
        examples: list[Example] = []
        for _ in range(count):
            empty = 0
            while self.taken >= len(self._sequences):
                self._fill()
                empty += not self._window
                if empty > 1 and self._next["rows"] == 0:
                    raise ValueError("no row of the data has a trained token: raise --max_length, or check the data.")
            examples += [self._window[place] for place in self._sequences[self.taken]]
            self.taken += 1
        return examples

    def state(self) -> dict[str, Any]:
        return {"begin": self._begin, "taken": self.taken}

    def resume(self, state: dict[str, Any]) -> None:
        self._next, self._iterator, self._ahead = state["begin"], None, None
        self._fill()
        self.taken = state["taken"]

    def _fill(self) -> None:
        future, count, following = self._ahead or self._look_ahead()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, future.result())
        if errors := [error for _, error in parts if error is not None]:
            raise ValueError(errors[0])
        encoded = [parts[i % len(parts)][0][i // len(parts)] for i in range(count)]
        self._window = [(row["input_ids"], row["loss_mask"]) for row in encoded if row["outcome"] <= CUT]
        lengths = [len(ids) for ids, _ in self._window]
        self._sequences = sequences_of(lengths, self.bin_size, self.seed + self._next["rows"])
        outcomes = self.outcomes + np.bincount([row["outcome"] for row in encoded], minlength=4)
        self._begin, self.taken = self._next, 0
        self._next = following | {"outcomes": outcomes.tolist()}
        self._ahead = self._look_ahead()

    def _look_ahead(self) -> tuple[Future, int, dict[str, Any]]:
        """Read the window that begins at `_next`. Returns this rank's share, which is tokenised in the background, the
        number of rows of the whole window, and where the window after it begins."""
        shares = self._read(dist.get_world_size()) if dist.get_rank() == 0 else None
        share: list[Any] = [None]
        dist.scatter_object_list(share, shares, src=0)
        rows, count, following = share[0]
        encoded: Future = Future()

        def encode() -> None:
            try:
                encoded.set_result(self._encode_all(rows))
            except BaseException as error:  # raised where the rows are waited for
                encoded.set_exception(error)

        # A daemon thread, so that the end of a run does not wait for rows that it will not need.
        Thread(target=encode, daemon=True).start()
        return encoded, count, following

    def _encode_all(self, rows: list[tuple[int, dict]] | str) -> tuple[list[dict], str | None]:
        """`rows`: a list of (number, row), or the error message of `_read`. Errors are returned, not raised, so that
        all ranks raise together."""
        if isinstance(rows, str):
            return [], rows
        try:
            return [self.encode(row, number) for number, row in rows], None
        except ValueError as error:
            return [], str(error)

    def _read(self, ranks: int) -> list[tuple[list[tuple[int, dict]] | str, int, dict[str, Any]]]:
        """On the first rank: for each rank its share of the next window, the window's number of rows, and where the
        window after it begins."""
        from datasets.exceptions import DatasetGenerationError  # imported only if rows are read

        window: list[tuple[int, dict]] = []
        size, number = 0, self._next["rows"]
        try:
            if self._iterator is None:
                self.rows.load_state_dict(copy.deepcopy(self._next["reader"]))
                self._iterator = iter(self.rows)
            while len(window) < WINDOW and size < WINDOW_BYTES:
                if (row := next(self._iterator, None)) is None:  # this pass is over
                    self._iterator = None
                    break
                window.append((number + len(window), row))
                size += len(repr(row))
        except (DatasetGenerationError, ValueError, EOFError, OSError) as error:
            cause = damaged_line(Path(self.name)) or f"after row {number + len(window)}: {' '.join(str(error).split())}"
            return [(f"{self.name} cannot be read: {cause}; correct the file.", 0, {})] * ranks
        following = self._start
        if self._iterator is not None:
            following = {"reader": copy.deepcopy(self.rows.state_dict()), "rows": number + len(window)}
        return [(window[rank::ranks], len(window), following) for rank in range(ranks)]
