"""Copies of a command side by side on the GPUs of this machine, each with a part of the batches.

For commands that cut their work into files and go on with those that are missing (`eval.run`, `gen.generate`): a copy
gets its part by `--shard=i/n`; one that dies takes no finished file with it. Left out on purpose: several machines.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TypeVar

import torch

from sft_core.run.distributed import StopSignal

T = TypeVar("T")


class ShardsFailed(RuntimeError):
    """Copies ended in failure, each having said why; the message is for the user."""


def of_shard(batches: Sequence[T], shard: str | None) -> Sequence[T]:
    """The batches of --shard `shard`, as i/n; None: all."""
    first, step = map(int, (shard or "0/1").split("/"))
    return batches[first::step]


def start_shards(module: str, argv: list[str], copies: int, width: int = 1, stop: StopSignal | None = None) -> None:
    """Run `copies` of `python -m module argv`, each on `width` other GPUs, to their ends.

    A request to `stop` is passed on. Raises ShardsFailed if a copy fails (a stopped one, exit code 130, does not).
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(width)] if width > 1 else []
    children = []
    for i in range(copies):
        env = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * width : (i + 1) * width])} if gpus else os.environ
        command = [sys.executable, *launcher, "-m", module, *argv, f"--shard={i}/{copies}"]
        children.append(subprocess.Popen(command, env=env))
    while stop is not None and not stop.requested and any(child.poll() is None for child in children):
        time.sleep(0.2)
    if stop is not None and stop.requested:
        for child in children:
            child.terminate()
    codes = [child.wait() for child in children]
    failed = sum(code not in (0, 130) for code in codes)
    if failed:
        raise ShardsFailed(f"{failed} of {copies} processes failed; the same command goes on from here.")
