"""Benches that fail or are killed in the middle have shown what they had measured."""

import os
import time
from functools import partial
from types import SimpleNamespace

import pytest

import gen.bench_engine
import grpo_core.bench
import kernels.bench
import sft_core.bench
from kernels.bench_peers import FLOOR, NAIVE, OURS
from tests.launch import run, start

OTHER = "linear_logprob (here)"


def trouble(hang):
    if hang:
        os.write(1, b"HANGS\n")
        time.sleep(600)
    raise RuntimeError("no | luck")


def in_a_candidate(hang):
    kernels.bench.CANDIDATES[OTHER] = lambda: lambda case: trouble(hang)


def at(tokens, module, name, hang):
    """Where that many tokens are made."""
    made = getattr(module, name)
    setattr(module, name, lambda n, *rest, **more: trouble(hang) if n == tokens else made(n, *rest, **more))


def in_updates(hang):
    at(3072, grpo_core.bench, "make_rollouts", hang)


def in_supervised_updates(hang):
    at(96, sft_core.bench, "documents", hang)


def in_an_engine(hang):
    """One without vLLM: `LLM.generate` fails; its own way hangs in the first round after the warm-up."""
    calls = []

    def sample(*arguments, **options):
        calls.append(arguments)
        if hang and len(calls) == 2:
            trouble(hang)

    gen.bench_engine.VLLMEngine = lambda *arguments, **options: SimpleNamespace(sample=sample, close=lambda: None)


CASES = {  # arguments, fault, lines: measured before it, of what failed, measured after it
    "kernels.bench": (
        ["--tokens", "512", "--rounds", "1", "--only", FLOOR, OURS, OTHER, NAIVE],
        in_a_candidate,
        [f"| {FLOOR} | ", f"| {OURS} | "],
        [f"| {OTHER} | failed: RuntimeError no / luck | - | "],
        [f"| {NAIVE} | "],
    ),
    "grpo_core.bench": (
        ["--shape", "tiny", "--tokens", "2048", "3072", "4096", "--steps", "1"],
        in_updates,
        ["| tiny this trainer | 2048 | "],
        ["| tiny this trainer | 3072 | failed: RuntimeError no / luck |"],
        ["| tiny this trainer | 4096 | "],
    ),
    "sft_core.bench": (
        ["--shape", "tiny", "--tokens", "64", "96", "128", "--steps", "1"],
        in_supervised_updates,
        ["| tiny this trainer | 64 | "],
        ["| tiny this trainer | 96 | failed: RuntimeError no / luck |"],
        ["| tiny this trainer | 128 | "],
    ),
    "gen.bench_engine": (
        ["--prompts", "2", "--n", "2", "--tokens", "4", "--rounds", "1"],
        in_an_engine,
        ["| warm-up | gen.engine.vllm | "],
        ["| warm-up | LLM.generate | failed: AttributeError "],
        ["| 1 | gen.engine.vllm | ", "| median | gen.engine.vllm | "],
    ),
}


@pytest.mark.parametrize("module", CASES)
def test_what_fails_is_a_note_and_the_rest_is_measured(module, tmp_path):
    argv, fault, *lines = CASES[module]
    code, printed = run(module, argv, tmp_path / "log", fault=partial(fault, False))
    assert code == 1, printed
    for line in sum(lines, []):
        assert len([row for row in printed.splitlines() if row.startswith(line)]) == 1, (line, printed)


@pytest.mark.parametrize("module", CASES)
def test_what_is_killed_has_shown_its_heading_and_what_it_measured(module, tmp_path):
    argv, fault, before, *_ = CASES[module]
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
