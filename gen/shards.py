"""Run copies of a command in parallel on the GPUs of this machine, each with a part of the batches.

This works for commands that write their work file by file and resume with the missing files (`eval.run` and
`gen.generate`). Each copy gets its part by `--shard=i/n`. If a copy dies, its finished files remain.

Not supported, on purpose: several machines.
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
    """Some copies failed and have printed why. The message is shown to the user."""


def of_shard(batches: Sequence[T], shard: str | None) -> Sequence[T]:
    """The batches of part i of n, where `shard` is "i/n"; None: all batches."""
    first, step = map(int, (shard or "0/1").split("/"))
    return batches[first::step]


def start_shards(module: str, argv: list[str], copies: int, width: int = 1, stop: StopSignal | None = None) -> None:
    """Run `copies` of `python -m module argv`, each on its own `width` GPUs, and wait for them.

    A request to `stop` is passed on. Raises ShardsFailed if a copy fails (exit code 130, stopped, is not a failure).
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
        raise ShardsFailed(f"{failed} of {copies} processes failed (see above): run the same command to resume.")
