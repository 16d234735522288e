"""The work of a generation run: it generates the missing samples, on servers or in this process, and stores them.

With servers, the tasks that send requests draw from one queue of samples that spans the batches. So no task waits for
the slowest requests of a batch, and the number of open batches is at most the number of requests in flight. An engine
in this process finishes each batch before it starts the next one, so use a large --input-batch-size.
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

COUNTS = ("prompts", "generations", "tokens", "failed")  # what a run counts


class Work:
    """Generates the missing samples of a store, counts them, and shows the counts in a progress bar.

    Once `stop.requested` is set, it starts nothing new.
    """

    def __init__(self, store: Store, stop: Any, shown: bool) -> None:
        self.store, self.config, self.stop = store, store.config, stop
        self.bar = tqdm(total=store.num_rows, desc="generate", unit="prompt", disable=None if shown else True)
        self.begin, self.counts = time.monotonic(), Counter[str]()

    def open(self, indices: Iterable[int]) -> Iterator[Batch]:
        """Yield these batches, each read when it is needed."""
        for index in indices:
            if self.stop.requested:
                return
            batch = self.store.batch(index)
            if not self.bar.disable:
                self.bar.initial += batch.kept  # else the bar's remaining time would be too short
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
        """Generate the missing samples of these batches on the servers, `at_once` requests at a time.

        After an error or a stop, too, it writes the complete rows of unfinished batches.

        Raises ServerError if no server is left.
        """
        config, sampling, unfinished = self.config, self.config.sampling(), dict[Path, Batch]()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is an open file

        def missing() -> Iterator[tuple[Batch, int, int]]:
            """Every missing sample as (batch, row, sample)."""
            for batch in self.open(indices):
                if not batch.left:  # it is complete, or has no valid prompt
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
            if row not in batch.failed:  # else another sample of the prompt has failed
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
        """Generate the missing samples of these batches with the engine in this process.

        longest: tokens of the longest prompt that fits; 0: none fits. Prompts that leave too little room fail.
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
                batch.failed[row] = f"the prompt has {length} tokens, but only {room} fit: lower --max-new-tokens"
                del prompts[row]
            if prompts:
                groups = sampler.sample([*prompts.values()], [*prompts], config.sampling())
                for row, group in zip(prompts, groups, strict=True):
                    batch.answers[row] = [*group]
            self.close(batch)
        sampler.close()


def longest_prompt(store: Store, sampler: EngineSampler, indices: Iterable[int]) -> int:
    """Tokens of the longest unfinished prompt that fits the model's context; 0 if there is none.

    Raises ValueError if no prompt fits and none is done.
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
            f"no prompt fits: the shortest has {min(lengths)} tokens, but {store.config.max_new_tokens} new ones leave "
            f"room for {room} in the model's context of {sampler.positions}: lower --max-new-tokens."
        )
    return longest
