"""The same requests from the workers of a Ray cluster: `--executor ray`, for more than one machine's clients.

Batches are numbers to Ray Data. Each worker reads the rows itself (memory-mapped, from the same Hub id or file), asks
the servers for its batches as the local executor does, and writes them into the same folder, which therefore must be on
a file system that all nodes share. Ray starts a worker anew that dies; what it had written is not asked again.
"""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from gen.client import ServerError
from gen.config import GenerateConfig
from gen.requests import COUNTS, Work
from gen.store import Store, open_rows


class Worker:
    """An actor: numbers of batches in, one row of counts out."""

    def __init__(self, config: GenerateConfig, folder: str, digest: str) -> None:
        self.store = Store(replace(config, output_dir=folder), open_rows(config))
        if self.store.digest != digest:
            raise RuntimeError(f"{config.hf_dataset} has other rows on this node than where the run was started.")

    def __call__(self, numbers: dict[str, Any]) -> dict[str, list[Any]]:
        config, trouble = self.store.config, ""
        work = Work(self.store, SimpleNamespace(requested=False), shown=False)
        try:
            asyncio.run(work.ask_servers(numbers["id"].tolist(), max(1, config.at_once // config.client_replicas)))
        except ServerError as error:
            trouble = str(error)
        return {"trouble": [trouble]} | {name: [work.counts[name]] for name in COUNTS}


def ask_on_ray(work: Work) -> None:
    """Have `client_replicas` workers answer what is missing; once stopped they are dropped, not drained.

    Raises ServerError if no server is left.
    """
    import ray.data

    store = work.store
    replicas, batches = store.config.client_replicas, len(store.batch_rows)
    together = max(1, min(16, batches // (4 * replicas)))  # enough for a worker to have no slow tail
    blocks = -(-batches // together)
    done = ray.data.range(batches, override_num_blocks=blocks).map_batches(
        Worker,
        batch_size=together,
        concurrency=replicas,
        num_cpus=0.01,  # it waits; on few cores Ray would, for it
        fn_constructor_args=(store.config, str(store.folder.absolute()), store.digest),
    )
    for row in done.iter_rows():
        work.add({name: row[name] for name in COUNTS})
        if row["trouble"]:
            raise ServerError(row["trouble"])
        if work.stop.requested:
            break
