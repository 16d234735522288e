"""Answers from OpenAI-compatible servers for an evaluation: conversations in, texts out, many at once, with retries.

A thin synchronous face of `gen/client.py`, which says how failures are told apart. An evaluation needs every answer, so
a request that fails five times ends it; a score over the rest would not be one.
"""

import asyncio
from typing import Any

from gen.client import Answer, Client

TRIES = 5
TIMEOUT, PATIENCE = 3600.0, 10.0  # seconds: a long answer takes long, a server that is not there does not come soon
AT_ONCE = 256


class Server:
    """OpenAI-compatible servers at `base_url` (".../v1"; several with commas between) that know `model`."""

    def __init__(self, base_url: str, model: str) -> None:
        self.urls, self.model = base_url.split(","), model

    def sample(
        self, conversations: list[list[dict[str, str]]], *, n: int, seeds: list[int], **options: Any
    ) -> list[list[tuple[str, int, str]]]:
        """`n` answers to each conversation: (text, tokens, finish reason). `options` go into the request as they are.

        Sample i of conversation p has the seed `seeds[p] + i`. Raises what `Client.ask` raises when one cannot be had.
        """
        asked = [
            {"model": self.model, "messages": messages, "seed": seed + i, **options}
            for messages, seed in zip(conversations, seeds, strict=True)
            for i in range(n)
        ]
        answers = asyncio.run(self._ask(asked))
        triples = [(answer.text, answer.tokens, answer.finish_reason) for answer in answers]
        return [triples[i : i + n] for i in range(0, len(triples), n)]

    async def _ask(self, asked: list[dict[str, Any]]) -> list[Answer]:
        free = asyncio.Semaphore(AT_ONCE)

        async def ask(request: dict[str, Any]) -> Answer:
            async with free:
                return await client.ask(request)

        async with Client(self.urls, timeout=TIMEOUT, retries=TRIES - 1, patience=PATIENCE) as client:
            tasks = [asyncio.ensure_future(ask(request)) for request in asked]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # after a failure nobody waits for the rest
                    task.cancel()
