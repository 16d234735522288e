"""Which rows a step takes: each row once per epoch, whole, in bins that fit; resumable; the same on all rank counts."""

import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_core import sampler as order
from sft_core.data.rows import first_row, load_rows
from sft_core.dataset import Examples
from sft_core.sampler import Shuffled, Streamed
from tests.processes import run_ranks


def examples(lengths):
    rows = [{"input_ids": [i] * n, "loss_mask": [True] * n} for i, n in enumerate(lengths)]
    return Examples(Dataset.from_list(rows).with_format("numpy"), np.array(lengths), {})


def names(taken):
    return [int(ids[0]) for ids, _ in taken]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.sampled_from([None, 20, 32]), st.integers(0, 40))
def test_passes_over_rows_that_are_all_there(lengths, bin_size, start):
    data = examples(lengths)
    source = Shuffled(data, bin_size, seed=3)
    first = source.take(source.sequences_per_pass)
    assert sorted(names(first)) == list(range(len(lengths)))
    assert all(len(ids) == lengths[int(ids[0])] for ids, _ in first)
    whole, cut = Shuffled(data, bin_size, seed=3), Shuffled(data, bin_size, seed=3)
    before = whole.take(start) if start else []
    cut.resume({"taken": start})
    assert names(whole.take(7)) == names(cut.take(7))
    assert names(Shuffled(data, bin_size, seed=3).take(start)) == names(before) if start else True


def test_windows_bound_the_packing_and_bins_are_full(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 500)
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 1000, 2000).tolist()
    source = Shuffled(examples(lengths), 2048, seed=0)
    bins = [source.take(1) for _ in range(source.sequences_per_pass)]
    assert all(sum(len(ids) for ids, _ in rows) <= 2048 for rows in bins)
    assert sum(lengths) / (len(bins) * 2048) > 0.97
    longest = [max(len(ids) for ids, _ in rows) for rows in bins[: len(bins) // 4]]
    assert abs(np.mean(longest[::2]) - np.mean(longest[1::2])) < 100 < np.ptp(longest)  # the longest do not come first
    assert names(source.take(5)) != names(Shuffled(examples(lengths), 2048, seed=0).take(5))  # the order changes


def stream(path, monkeypatch_window, bin_size=None):
    order.WINDOW = monkeypatch_window
    rows = load_rows(path, streaming=True)
    assert first_row(rows)["i"] == 0  # looking at it does not advance the stream

    def encode(row, number):
        if row["n"] < 0:
            raise ValueError(f"row {number + 1}: negative")
        outcome = 0 if row["n"] else 3
        ids = np.full(row["n"], row["i"], np.int32)
        return {"input_ids": ids, "loss_mask": ids >= 0, "length": len(ids), "outcome": outcome}

    return Streamed(rows, encode, bin_size, 1, path)


def streamed(path, bin_size, start, count):
    """On one rank: the output of a stream after `start` sequences, uninterrupted and resumed from a state in JSON."""
    from sft_core.run import distributed

    distributed.init_distributed(60)
    source = stream(path, 16, bin_size)
    if start:
        source.take(start)
    state = json.dumps(source.state())
    whole = names(source.take(count))
    resumed = stream(path, 16, bin_size)
    resumed.resume(json.loads(state))
    again = names(resumed.take(count))
    assert resumed.outcomes == source.outcomes and source.metrics()["rows_dropped"] == source.outcomes[3] > 0
    distributed.shutdown()
    return np.array([whole, again])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"i": i, "n": (i + 1) % 7}) + "\n" for i in range(50)))
    return str(path)


@pytest.mark.parametrize(("bin_size", "start"), [(None, 0), (None, 33), (8, 11), (8, 60)])
def test_streams_resume_and_do_not_depend_on_the_ranks(path, bin_size, start):
    [[whole, again]] = run_ranks(1, streamed, path, bin_size, start, 30)
    assert whole.tolist() == again.tolist() and len(whole) >= 30
    for of_two in run_ranks(2, streamed, path, bin_size, start, 30):
        assert of_two.tolist() == [whole.tolist()] * 2
    if start == 0:  # the file's first window, shuffled, without the rows that have nothing to learn
        window = whole[:14].tolist()
        assert sorted(window) == [i for i in range(16) if (i + 1) % 7] and window != sorted(window)


def faulty(path, count=40):
    from sft_core.run import distributed

    distributed.init_distributed(60)
    source = stream(path, 16)
    try:
        source.take(count)
    except ValueError as error:
        distributed.shutdown()
        return np.array([str(error)])
    return np.array(["nothing was wrong"])


@pytest.mark.slow
def test_a_line_that_is_damaged_further_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"i": i, "n": 1, "text": "x" * 1000}) for i in range(30_000)]
    path.write_text("\n".join([*rows[:29_000], rows[29_000][:20], *rows[29_001:]]) + "\n")
    for found in run_ranks(2, faulty, str(path), 29_500):
        assert "rows.jsonl cannot be read: line 29001 is not a JSON object" in str(found[0])


def test_a_window_is_bounded_in_bytes_too(path):
    [[whole, again]] = run_ranks(1, streamed_in_small_bites, path)
    assert whole.tolist() == again.tolist() and sorted(set(whole.tolist())) == [i for i in range(50) if (i + 1) % 7]


def streamed_in_small_bites(path):
    order.WINDOW_BYTES = 60
    return streamed(path, 8, 5, 200)


@pytest.mark.parametrize(("n", "says"), [(-1, "row 21: negative"), (0, "no row of the data has a trained token")])
def test_a_stream_that_cannot_be_trained_on_stops_all_ranks_alike(tmp_path, n, says):
    path = tmp_path / "rows.jsonl"
    rows = [{"i": i, "n": n if i == 20 or n == 0 else 1} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for found in run_ranks(2, faulty, str(path)):
        assert says in str(found[0])
