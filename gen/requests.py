"""The work of a generation run: samples that are missing, asked from servers or sampled here, into the store.

Requests are kept in flight by `max_concurrent` workers that draw from one line of samples, batch after batch. So a
batch's slow tail idles nobody, and no more batches are open than there are requests in flight.
"""

import asyncio
import resource
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from gen.client import Client, RequestError, Stopped
from gen.config import GenerateConfig
from gen.sampler import Sampler, sample_seed
from gen.store import Batch, Store


class Progress:
    """The bar, and the counts of this run behind it."""

    def __init__(self, prompts: int, shown: bool) -> None:
        self.bar = tqdm(total=prompts, desc="generate", unit="prompt", disable=None if shown else True)
        self.begin, self.prompts, self.generations, self.tokens, self.failed = time.monotonic(), 0, 0, 0, 0

    def kept(self, prompts: int) -> None:
        if not self.bar.disable:
            self.bar.initial += prompts  # or the time to go would be too short
        self.bar.update(prompts)

    def add(self, prompts: int, generations: int, tokens: int, failed: int) -> None:
        self.prompts += prompts
        self.generations += generations
        self.tokens += tokens
        self.failed += failed
        rate = self.tokens / (time.monotonic() - self.begin)
        said = f"{self.generations} generations, {rate:.0f} tokens/s, {self.failed} failed"
        self.bar.set_postfix_str(said, refresh=False)
        self.bar.update(prompts)

    def add_batch(self, batch: Batch) -> None:
        answers = [answer for row in batch.done for answer in batch.answers[row] if answer]
        self.add(len(batch.done), len(answers), sum(answer.tokens for answer in answers), len(batch.failed))

    def close(self) -> float:
        self.bar.close()
        return time.monotonic() - self.begin


async def ask_servers(store: Store, indices: Iterable[int], at_once: int, progress: Progress, stop: Any) -> None:
    """Have the servers answer what is missing of these batches, `at_once` requests at a time.

    However it ends, complete rows of batches that are not are written too. Raises ServerError if no server is left.
    """
    config, unfinished = store.config, dict[int, Batch]()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is an open file
    line = samples(store, indices, progress, unfinished, stop)

    async def work() -> None:
        for batch, row, i in line:
            if row not in batch.failed:  # else a sibling gave the prompt up
                try:
                    batch.answers[row][i] = await client.ask(request(config, batch, row, i))
                except RequestError as error:
                    batch.failed.setdefault(row, str(error))
                except Stopped:
                    return
            batch.left -= 1
            if not batch.left:
                del unfinished[batch.start]
                await asyncio.to_thread(store.write, batch)
                progress.add_batch(batch)

    async with Client(
        config.urls, timeout=config.timeout, retries=config.retries, stopping=lambda: stop.requested
    ) as client:
        tasks = [asyncio.create_task(work()) for _ in range(at_once)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for batch in unfinished.values():
                store.write(batch)
                progress.add_batch(batch)


def samples(
    store: Store, indices: Iterable[int], progress: Progress, unfinished: dict[int, Batch], stop: Any
) -> Iterator[tuple[Batch, int, int]]:
    """Every sample that is missing, as (batch, row, sample); batches are read as their turn comes."""
    for index in indices:
        if stop.requested:
            return
        batch = store.batch(index)
        progress.kept(len(batch.kept_rows))
        if not batch.left:  # whole, or without a prompt that could be asked
            store.write(batch)
            progress.add_batch(batch)
            continue
        unfinished[batch.start] = batch
        for row in batch.answers:
            for i in range(store.config.num_generations):
                if stop.requested:
                    return
                yield batch, row, i


def request(config: GenerateConfig, batch: Batch, row: int, i: int) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": config.model, "messages": batch.prompts[row], "max_tokens": config.max_new_tokens}
    asked |= {} if config.temperature is None else {"temperature": config.temperature}
    asked |= {} if config.top_p is None else {"top_p": config.top_p}
    return asked | ({} if config.seed is None else {"seed": sample_seed(config, batch.start + row) + i})


def sample_here(store: Store, sampler: Sampler, indices: Iterable[int], progress: Progress, stop: Any) -> None:
    for index in indices:
        if stop.requested:
            break
        batch = store.batch(index)
        progress.kept(len(batch.kept_rows))
        sampler.answer(batch)
        store.write(batch)
        progress.add_batch(batch)
    if sampler.engine is not None:
        sampler.engine.close()
