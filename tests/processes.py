"""Processes for tests: ranks of a job, and children to kill. They are forked from a server that has loaded torch."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "peft",
        "torch.distributed.checkpoint",
        "transformers.models.llama.modeling_llama",
        "sft_core.model.export",
        "sft_core.run.logging",
    ]
)


def start(function: Callable[..., None], *args: Any, stderr: Path | None = None) -> BaseProcess:
    """Run `function(*args)` in a new process, with its stderr in a file if one is given."""
    process = _context.Process(target=_child, args=(function, args, stderr), daemon=True)
    process.start()
    return process


def _child(function: Callable[..., None], args: tuple[Any, ...], stderr: Path | None) -> None:
    if stderr is not None:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    function(*args)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` on each of `world_size` ranks, as torchrun would, and return the results of all ranks.

    The function joins the process group itself, with `init_distributed`. If a rank raises, the test fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [_context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        _context.Process(target=_rank, args=(sender, rank, world_size, port, function, args), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    results = []
    for receiver, sender in pipes:
        sender.close()
        assert receiver.poll(120), "a rank did not finish"
        result, error = receiver.recv()
        if error is not None:
            for rank in ranks:
                rank.kill()
            raise AssertionError(error)
        results.append(result)
    for rank in ranks:
        rank.join()
    return results


def _rank(sender: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    try:
        sender.send((function(*args), None))
    except BaseException:
        sender.send((None, f"rank {rank}:\n{traceback.format_exc()}"))
