"""Benches that fail or are killed have printed everything measured until then."""

import os
import time
from functools import partial

import pytest

import grpo_core.bench
import kernels.bench
from kernels.bench_peers import FLOOR, NAIVE, OURS
from tests.launch import run, start

OTHER = "linear_logprob (here)"
HEAD = ["--tokens", "512", "--rounds", "1", "--only", FLOOR, OURS, OTHER, NAIVE]
UPDATE = ["--shape", "tiny", "--tokens", "256", "512", "--steps", "1"]


def trouble(hang):
    if hang:
        os.write(1, b"HANGS\n")
        time.sleep(600)
    raise RuntimeError("no | luck")


def in_a_candidate(hang):
    kernels.bench.CANDIDATES[OTHER] = lambda: lambda case: trouble(hang)


def in_updates(hang):
    made = grpo_core.bench.make_rollouts
    grpo_core.bench.make_rollouts = lambda rows: trouble(hang) if len(rows[0]) == 64 else made(rows)


def test_what_fails_is_a_note_and_the_rest_is_measured(tmp_path):
    code, printed = run("kernels.bench", HEAD, tmp_path / "log", fault=partial(in_a_candidate, False))
    assert code == 1, printed
    for line in (f"{FLOOR} | ", f"{OURS} | ", f"{OTHER} | failed: RuntimeError no / luck | - | ", f"{NAIVE} | "):
        assert len([row for row in printed.splitlines() if row.startswith(f"| {line}")]) == 1, (line, printed)


@pytest.mark.parametrize(
    ("module", "argv", "fault", "before"),
    [
        ("kernels.bench", HEAD, in_a_candidate, [f"| {FLOOR} | ", f"| {OURS} | "]),
        ("grpo_core.bench", UPDATE, in_updates, ["| tiny | 256 | "]),
    ],
)
def test_what_is_killed_has_shown_its_heading_and_what_it_measured(module, argv, fault, before, tmp_path):
    log = tmp_path / "log"
    [process] = start(module, argv, log, fault=partial(fault, True))
    deadline = time.time() + 120
    while "HANGS" not in (log.read_text() if log.exists() else ""):
        assert process.is_alive() and time.time() < deadline
        time.sleep(0.1)
    process.kill()
    process.join()
    printed = log.read_text().splitlines()
    heading = next(i for i, row in enumerate(printed) if "CPU, " in row and "torch 2" in row)
    for line in before:
        assert [i for i, row in enumerate(printed) if row.startswith(line)][0] > heading, line
