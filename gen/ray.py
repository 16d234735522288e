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
from gen.requests import Progress, ask_servers
from gen.store import Store, open_rows


class Worker:
    """An actor: numbers of batches in, one row of counts out."""

    def __init__(self, config: GenerateConfig, folder: str, digest: str) -> None:
        self.store = Store(replace(config, output_dir=folder), open_rows(config))
        if self.store.digest != digest:
            raise RuntimeError(f"{config.hf_dataset} has other rows on this node than where the run was started.")

    def __call__(self, numbers: dict[str, Any]) -> dict[str, list[Any]]:
        progress, config = Progress(0, shown=False), self.store.config
        at_once = max(1, config.at_once // config.client_replicas)
        trouble = ""
        try:
            indices = numbers["id"].tolist()
            asyncio.run(ask_servers(self.store, indices, at_once, progress, SimpleNamespace(requested=False)))
        except ServerError as error:
            trouble = str(error)
        counts = {"generations": progress.generations, "tokens": progress.tokens, "failed": progress.failed}
        return {name: [value] for name, value in ({"prompts": progress.prompts, "trouble": trouble} | counts).items()}


def ask_on_ray(store: Store, progress: Any, stop: Any) -> None:
    """Have `client_replicas` workers answer what is missing; once `stop.requested` they are dropped, not drained.

    Raises ServerError if no server is left.
    """
    import ray.data

    replicas = store.config.client_replicas
    together = max(1, min(16, store.num_batches // (4 * replicas)))  # enough for a worker to have no slow tail
    blocks = -(-store.num_batches // together)
    done = ray.data.range(store.num_batches, override_num_blocks=blocks).map_batches(
        Worker,
        batch_size=together,
        concurrency=replicas,
        num_cpus=0.01,  # it waits; on few cores Ray would, for it
        fn_constructor_args=(store.config, str(store.folder.absolute()), store.digest),
    )
    for row in done.iter_rows():
        progress.add(row["prompts"], row["generations"], row["tokens"], row["failed"])
        if row["trouble"]:
            raise ServerError(row["trouble"])
        if stop.requested:
            break
