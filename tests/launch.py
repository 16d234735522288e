"""Start trainers as real processes, one per rank, without importing everything again each time.

A fork server imports the trainers once. Every rank is a fork of it with its own environment, output file and, if the
test needs one, a fault that is injected before `main` runs. Ranks find each other by `env://`, as under torchrun.
"""

import importlib
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sft_core.run import distributed

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["grpo_core.train", "sft_core.train", "peft"])


def start(
    module: str, argv: list[str], log: Path, *, ranks: int = 1, fault: Callable[[], None] | None = None
) -> list[Any]:
    """Start processes that run `module`.main(argv) and write their output to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        _context.Process(target=_rank, args=(module, argv, str(log), rank, ranks, port, fault)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def run(module: str, argv: list[str], log: Path, timeout: float = 300, **options: Any) -> tuple[int, str]:
    """Run to the end. Returns the largest exit code of a rank (128 + number for a signal) and the output."""
    processes = start(module, argv, log, **options)
    return wait(processes, timeout), log.read_text()


def refusal(main: Callable[[list[str]], Any], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Call `main` with bad input and return its error: one line, with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    bars = ("%|", "examples/s]")
    lines = [line for line in printed if line.strip() and not any(mark in line for mark in bars)]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def wait(processes: list[Any], timeout: float = 300) -> int:
    for process in processes:
        process.join(timeout)
    hung = [process for process in processes if process.exitcode is None]
    for process in hung:
        process.kill()
    assert not hung, f"{len(hung)} ranks did not end within {timeout} s"
    return max(code if code >= 0 else 128 - code for code in (process.exitcode for process in processes))


def _rank(
    module: str, argv: list[str], log: str, rank: int, ranks: int, port: int, fault: Callable[[], None] | None
) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if fault is not None:
        fault()
    importlib.import_module(module).main(argv)


@contextmanager
def locks_released() -> Iterator[None]:
    """At the end, unlock the folders that a `main` has locked until its process ends, which is this one."""
    try:
        yield
    finally:
        for folder in list(distributed._locks):
            distributed.unlock_output_dir(folder)


def flags(**options: Any) -> list[str]:
    """{"max_steps": 3, "reward_funcs": ["a", "b"]} as command-line tokens."""
    tokens = []
    for name, value in options.items():
        tokens += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return tokens


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
