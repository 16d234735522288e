"""`--executor ray`: send the requests from the workers of a Ray cluster, that is, from several machines.

Ray Data distributes only the numbers of batches. Each worker reads the rows itself (memory-mapped, from the same Hub id
or file), sends the requests of its batches like the local executor, and writes the results into the same folder, which
must be on a file system that all nodes share. Ray restarts a worker that dies; batches that it wrote are not repeated.
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
    """A Ray actor that takes numbers of batches and returns one row of counts."""

    def __init__(self, config: GenerateConfig, folder: str, digest: str) -> None:
        self.store = Store(replace(config, output_dir=folder), open_rows(config))
        if self.store.digest != digest:
            raise RuntimeError(f"{config.hf_dataset} has other rows on this node: copy the same data to all nodes.")

    def __call__(self, numbers: dict[str, Any]) -> dict[str, list[Any]]:
        config, trouble = self.store.config, ""
        work = Work(self.store, SimpleNamespace(requested=False), shown=False)
        try:
            asyncio.run(work.ask_servers(numbers["id"].tolist(), max(1, config.at_once // config.client_replicas)))
        except ServerError as error:
            trouble = str(error)
        return {"trouble": [trouble]} | {name: [work.counts[name]] for name in COUNTS}


def ask_on_ray(work: Work) -> None:
    """Generate the missing batches with `client_replicas` workers. A stop request drops their unfinished requests.

    Raises ServerError if no server is left.
    """
    import ray.data

    store = work.store
    replicas, batches = store.config.client_replicas, len(store.batch_rows)
    together = max(1, min(16, batches // (4 * replicas)))  # several, so that a worker idles less at the end of a batch
    blocks = -(-batches // together)
    done = ray.data.range(batches, override_num_blocks=blocks).map_batches(
        Worker,
        batch_size=together,
        concurrency=replicas,
        num_cpus=0.01,  # a worker mostly waits; with 1, Ray would start few workers on few cores
        fn_constructor_args=(store.config, str(store.folder.absolute()), store.digest),
    )
    for row in done.iter_rows():
        work.add({name: row[name] for name in COUNTS})
        if row["trouble"]:
            raise ServerError(row["trouble"])
        if work.stop.requested:
            break
