"""Answers from any OpenAI-compatible server: conversations in, texts out, many at once, with retries.

A sample is a request of its own with a seed of its own (`seeds[p] + i`, as the engines have it), since not every
server takes n > 1. The key is OPENAI_API_KEY where a server wants one.

Left out on purpose: streaming, log-probs, servers that speak another protocol.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

TRIES, FIRST_WAIT = 5, 0.5  # the wait in seconds doubles from try to try
TIMEOUT = httpx.Timeout(10.0, read=3600.0)  # a long answer takes long
AT_ONCE = 256


class ServerError(RuntimeError):
    """The server cannot be reached, or refuses; the message is for the user."""


class Server:
    """An OpenAI-compatible server at `base_url` (".../v1") that knows `model` by that name."""

    def __init__(self, base_url: str, model: str) -> None:
        self.url, self.model = f"{base_url.rstrip('/')}/chat/completions", model
        limits = httpx.Limits(max_connections=AT_ONCE)
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = httpx.Client(timeout=TIMEOUT, limits=limits, headers={"Authorization": f"Bearer {key}"})

    def sample(
        self, conversations: list[list[dict[str, str]]], *, n: int, seeds: list[int], **options: Any
    ) -> list[list[tuple[str, int, str]]]:
        """`n` answers to each conversation: (text, tokens, finish reason). `options` go into the request as they are.

        Raises ServerError when one cannot be had.
        """
        asked = [
            {"model": self.model, "messages": messages, "seed": seed + i, **options}
            for messages, seed in zip(conversations, seeds, strict=True)
            for i in range(n)
        ]
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            answers = list(pool.map(self._post, asked))
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure nobody waits for the rest of the queue
        return [answers[i : i + n] for i in range(0, len(answers), n)]

    def _post(self, request: dict[str, Any]) -> tuple[str, int, str]:
        for attempt in range(TRIES):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                reply = self.client.post(self.url, json=request)
            except httpx.TransportError as error:
                trouble = f"cannot be reached ({error})"
                continue
            if reply.status_code == 200:
                body = reply.json()
                choice = body["choices"][0]
                length = body["usage"]["completion_tokens"]
                return choice["message"]["content"] or "", length, choice["finish_reason"]
            trouble = f"answers {reply.status_code}: {' '.join(reply.text.split())[:300]}"
            if reply.status_code < 500 and reply.status_code not in (408, 429):
                raise ServerError(f"{self.url} {trouble}. Change what is asked (see --help); what is done is kept.")
        raise ServerError(
            f"{self.url} {trouble}, also at the {TRIES}th try. See to the server (--base_url); the same command "
            "goes on with what is missing."
        )
