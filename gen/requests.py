"""The work of a generation run: samples that are missing, asked from servers or sampled here, into the store.

From servers, requests are kept in flight by workers that draw from one line of samples, batch after batch. So a batch's
slow tail idles nobody, and no more batches are open than there are requests in flight. An engine in this process
samples batch by batch, each drained before the next begins: give a large --input-batch-size.
"""

import asyncio
import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gen.client import Client, RequestError, Stopped, in_parallel
from gen.engine.base import EngineConfig
from gen.sampler import EngineSampler
from gen.store import Batch, Store

COUNTS = ("prompts", "generations", "tokens", "failed")  # of a run


class Work:
    """What is missing of a store, the counts of what this run has done of it, and a bar that shows them.

    Once `stop.requested`, nothing more is begun.
    """

    def __init__(self, store: Store, stop: Any, shown: bool) -> None:
        self.store, self.config, self.stop = store, store.config, stop
        self.bar = tqdm(total=store.num_rows, desc="generate", unit="prompt", disable=None if shown else True)
        self.begin, self.counts = time.monotonic(), Counter[str]()

    def open(self, indices: Iterable[int]) -> Iterator[Batch]:
        """These batches, each read as its turn comes."""
        for index in indices:
            if self.stop.requested:
                return
            batch = self.store.batch(index)
            if not self.bar.disable:
                self.bar.initial += batch.kept  # or the time to go would be too short
            self.bar.update(batch.kept)
            yield batch

    def close(self, batch: Batch) -> None:
        self.store.write(batch)
        self.count(batch)

    def count(self, batch: Batch) -> None:
        answers = [answer for row in batch.done for answer in batch.answers[row] if answer]
        tokens = sum(answer.tokens or 0 for answer in answers)
        self.add(dict(zip(COUNTS, (len(batch.done), len(answers), tokens, len(batch.failed)), strict=True)))

    def add(self, counts: dict[str, int]) -> None:
        self.counts.update(counts)
        rate = self.counts["tokens"] / (time.monotonic() - self.begin)
        said = f"{self.counts['generations']} generations, {rate:.0f} tokens/s, {self.counts['failed']} failed"
        self.bar.set_postfix_str(said, refresh=False)
        self.bar.update(counts["prompts"])

    async def ask_servers(self, indices: Iterable[int], at_once: int) -> None:
        """Have the servers answer what is missing of these batches, `at_once` requests at a time.

        However it ends, complete rows of batches that are not are written too. Raises ServerError if no server is left.
        """
        config, sampling, unfinished = self.config, self.config.sampling(), dict[Path, Batch]()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is an open file

        def missing() -> Iterator[tuple[Batch, int, int]]:
            """Every sample that is missing, as (batch, row, sample)."""
            for batch in self.open(indices):
                if not batch.left:  # complete, or without a prompt that could be asked
                    self.close(batch)
                    continue
                unfinished[batch.path] = batch
                for row in batch.prompts:
                    for i in range(sampling.n):
                        if self.stop.requested:
                            return
                        yield batch, row, i

        async def ask(sample: tuple[Batch, int, int]) -> None:
            batch, row, i = sample
            if row not in batch.failed:  # else a sibling gave the prompt up
                try:
                    request = sampling.request(config.model, batch.prompts[row], row, i)
                    batch.answers[row][i] = await client.ask(request)
                except RequestError as error:
                    batch.failed.setdefault(row, str(error))
                except Stopped:
                    return
            batch.left -= 1
            if not batch.left:
                del unfinished[batch.path]
                await asyncio.to_thread(self.store.write, batch)
                self.count(batch)

        async with Client(
            config.urls, timeout=config.timeout, retries=config.retries, stopping=lambda: self.stop.requested
        ) as client:
            try:
                await in_parallel(ask, missing(), at_once)
            finally:
                for batch in unfinished.values():
                    self.close(batch)

    def sample_here(self, sampler: EngineSampler, longest: int, indices: Iterable[int]) -> None:
        """Sample what is missing of these batches; `longest`: tokens of their longest prompt that fits, 0: none does.

        Prompts that leave no room for the answer fail.
        """
        config, room = self.config, sampler.positions - self.config.max_new_tokens
        if longest:
            sampler.start(
                EngineConfig(
                    config.model,
                    max_model_len=longest + config.max_new_tokens,
                    dtype="auto",
                    seed=config.seed or 0,
                    max_batch=min(config.at_once, 512),
                    gpu_memory_utilization=0.85,
                )
            )
        for batch in self.open(indices):
            prompts = {row: sampler.encode(messages) for row, messages in batch.prompts.items()}
            for row, length in [(row, len(prompt)) for row, prompt in prompts.items() if len(prompt) > room]:
                batch.failed[row] = f"{length} tokens, and only {room} fit before {config.max_new_tokens} new ones"
                del prompts[row]
            if prompts:
                groups = sampler.sample([*prompts.values()], [*prompts], config.sampling())
                for row, group in zip(prompts, groups, strict=True):
                    batch.answers[row] = [*group]
            self.close(batch)
        sampler.close()


def longest_prompt(store: Store, sampler: EngineSampler, indices: Iterable[int]) -> int:
    """Tokens of the longest missing prompt that fits the model's context; 0: there is none.

    Raises ValueError if nothing is done and no prompt fits.
    """
    room = sampler.positions - store.config.max_new_tokens
    lengths: list[int] = []
    kept = 0
    for index in indices:
        batch = store.batch(index)
        kept += batch.kept
        lengths += [len(sampler.encode(prompt)) for prompt in batch.prompts.values()]
    longest = max((length for length in lengths if length <= room), default=0)
    if lengths and not longest and not kept:
        raise ValueError(
            f"no prompt fits: the shortest has {min(lengths)} tokens, and {store.config.max_new_tokens} new ones leave "
            f"{room} of the model's context of {sampler.positions}: lower --max-new-tokens."
        )
    return longest
