"""An asyncio client for chat completions from one or more OpenAI-compatible servers.

    async with Client(["http://a:8000/v1", "http://b:8000/v1"], timeout=600, retries=2) as client:
        answer = await client.ask({"model": "m", "messages": [...], "seed": 7})

Each request goes to the server with the fewest requests in flight. How a failure is handled depends on its cause:

* The server is unavailable: it cannot be reached, it broke the connection and is down, or it answers 429 or 503. The
  client leaves the server alone for a while (longer each time, with jitter) and sends the request to another server, or
  waits. This uses up no retry. A server that was down must answer /v1/models before it gets requests again. When no
  server has answered a request for `patience` seconds, the client raises ServerError.
* The request may be the cause: the server answers 408, another 5xx or something that is not a chat completion, or it
  is up but breaks the connection or does not answer within `timeout`. This uses up one of the request's `retries`,
  after a wait that doubles each time. A server that has failed STREAK times in a row is left alone, too, and then gets
  one request at a time until it answers one: a crashed engine behind a running HTTP server then costs few prompts.
* The request is the cause: any other 4xx is final for this request. But 401, 403, 404, 405 and redirects would hit
  every request, so that server is not used again; when no server is left, the client raises ServerError. It also does
  so when many requests in a row have failed and any last answer is over `patience` seconds old.

Each sample is a separate request with its own seed: some servers do not support n > 1, and when one sample fails, the
other samples of its prompt need not be repeated. Set OPENAI_API_KEY if a server needs a key.

Not supported, on purpose: streaming, log-probs, proxies, other protocols.
"""

import asyncio
import json
import math
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import aiohttp

from sft_core.run.options import require

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
PROBE_TIMEOUT = 5.0
STREAK = 5
LOST = 10  # failed requests in a row before the client gives up; or twice the number in flight if that is more


class ServerError(RuntimeError):
    """No server can be used. The message is shown to the user."""


class RequestError(RuntimeError):
    """This request cannot be answered, but others may be. The message is shown to the user."""


class Stopped(RuntimeError):
    """`stopping` returned True while a request waited to be sent or to be retried."""


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    tokens: int | None  # None: the server does not report it
    prompt_tokens: int | None
    finish_reason: str
    thought: str = ""  # the reasoning, if the server's reasoning parser separated it from the text
    token_ids: Sequence[int] = ()  # of the completion; empty for a server's answer


@dataclass(frozen=True, slots=True)
class _Trouble:
    what: str
    costs: bool  # the failure uses up one of the request's retries
    final: bool = False  # the request is not retried


class _Server:
    def __init__(self, url: str) -> None:
        self.url = url.strip().rstrip("/")
        self.chat = f"{self.url}/chat/completions"
        self.in_flight = self.failures = self.rests = 0  # failures and rests since its last answer
        self.rest_until = 0.0
        self.down = False
        self.trouble = "cannot be used"  # the last failure
        self.probe: asyncio.Task[bool] | None = None

    def rest(self) -> None:
        now = time.monotonic()
        if self.rest_until <= now:  # when many requests fail together, only one counts
            self.rests += 1
            self.rest_until = now + wait_before(self.rests) / 2


def wait_before(attempt: int) -> float:
    """Seconds before the attempt-th retry: it doubles, with jitter, so that retries do not all arrive together."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(attempt - 1, 10)) * random.uniform(0.5, 1.5)


async def in_parallel(work: Callable[[T], Awaitable[None]], items: Iterable[T], at_once: int) -> None:
    """Run `work` for all items, `at_once` of them at a time. The first error cancels the others."""
    line = iter(items)

    async def draw() -> None:
        for item in line:
            await work(item)

    tasks = [asyncio.create_task(draw()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Client:
    """See the module's docstring. Use it inside `async with`, in one event loop."""

    def __init__(
        self,
        urls: list[str],
        *,
        timeout: float,
        retries: int,
        patience: float | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.servers = [_Server(url) for url in urls]
        self.timeout, self.retries = timeout, retries
        self.patience = timeout if patience is None else patience
        self.stopping = stopping
        self.last_answer = 0.0
        self.lost = 0  # failed requests since the last answer

    async def __aenter__(self) -> "Client":
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.session = aiohttp.ClientSession(
            # Idle connections close before the server closes them (uvicorn: 5 s): else a request could be lost.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
            timeout=aiohttp.ClientTimeout(total=self.timeout, sock_connect=10.0),
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self.servers:
            if server.probe is not None:
                server.probe.cancel()
        await self.session.close()

    async def ask(self, request: dict[str, Any]) -> Answer:
        """Send a chat completion request and return its answer.

        Raises RequestError if this request fails, ServerError if no server can be used, and Stopped if `stopping`
        returned True before the request was sent.
        """
        body = json.dumps(request).encode()
        failures, since, failed_on = 0, 0.0, None
        while True:
            server = await self._choose(failed_on)
            server.in_flight += 1
            try:
                outcome = await self._post(server, body)
            finally:
                server.in_flight -= 1
            if isinstance(outcome, Answer):
                server.failures = server.rests = self.lost = 0
                self.last_answer = time.monotonic()
                return outcome
            if outcome.final:
                self._lose(f"{server.chat} {outcome.what}")
            server.failures, server.trouble = server.failures + 1, outcome.what
            if not outcome.costs or server.failures >= STREAK:
                server.rest()
            costs, now = outcome.costs, time.monotonic()
            since = since or now
            if not costs and now - since > self.patience:
                self._give_up_if_idle(since, server)
                costs = self.last_answer > since  # other requests were answered meanwhile: this request is the cause
            if not costs:
                continue
            failures, since, failed_on = failures + 1, 0.0, server
            if failures > self.retries:
                tries = "" if failures == 1 else f" ({failures} attempts)"
                self._lose(f"{server.chat} {outcome.what}{tries}")
            wake = time.monotonic() + wait_before(failures)
            while not self.stopping() and (rest := wake - time.monotonic()) > 0:
                await asyncio.sleep(min(rest, 0.2))

    def _lose(self, why: str) -> NoReturn:
        """Raise RequestError; or ServerError if no request is answered any more."""
        self.lost += 1
        idle = not self.last_answer or time.monotonic() - self.last_answer > self.patience
        if idle and self.lost > max(LOST, 2 * sum(server.in_flight for server in self.servers)):
            raise ServerError(f"{self.lost} requests in a row failed: {why}")
        raise RequestError(why)

    async def _choose(self, failed_on: _Server | None) -> _Server:
        """Wait for a usable server. Return the one with the fewest requests in flight, not `failed_on` if avoidable."""
        since = 0.0
        while True:
            if self.stopping():
                raise Stopped
            now, usable = time.monotonic(), []
            for server in self.servers:
                if server.rest_until > now or (server.failures >= STREAK and server.in_flight):
                    continue
                if server.down:
                    self._start_probe(server)
                else:
                    usable.append(server)
            if usable:
                return min(usable, key=lambda server: (server is failed_on, server.in_flight))
            since = since or now
            if now - since > self.patience:
                self._give_up_if_idle(since, self.servers[0])
            await asyncio.sleep(random.uniform(0.05, 0.2))

    def _give_up_if_idle(self, since: float, server: _Server) -> None:
        if self.last_answer <= since and not any(server.in_flight for server in self.servers):
            alone = "" if len(self.servers) == 1 else f" (none of the {len(self.servers)} servers answers)"
            raise ServerError(f"{server.chat} {server.trouble}, for {self.patience:g} s now{alone}: check the server")

    async def _post(self, server: _Server, body: bytes) -> Answer | _Trouble:
        try:
            async with self.session.post(server.chat, data=body, allow_redirects=False) as reply:
                status, content = reply.status, await reply.read()
                location = reply.headers.get("Location", "")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            server.down = True
            return _Trouble(f"cannot be reached ({error})", costs=False)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            what = f"broke the connection ({error or type(error).__name__})"
            if isinstance(error, TimeoutError):
                what = f"did not answer within {self.timeout:g} s"
            return _Trouble(what, costs=await self._is_well(server))
        if status == 200:
            try:
                return read_answer(content)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                return _Trouble(f"answers with something that is not a chat completion: {_text(content)}", costs=True)
        what = f"answers {status}: {location or _text(content)}"
        if status == 400 and re.search("context|max_tokens", what):
            what += " (lower --max_new_tokens)"
        if status in (401, 403, 404, 405) or 300 <= status < 400:
            server.trouble = what + (
                ": set OPENAI_API_KEY" if status in (401, 403) else ": check the address and --model"
            )
            server.rest_until = math.inf
            if all(other.rest_until == math.inf for other in self.servers):
                raise ServerError(f"{server.chat} {server.trouble}")
            return _Trouble(server.trouble, costs=False)
        final = 400 <= status < 500 and status not in (408, 429)
        return _Trouble(what, costs=status not in (429, 503), final=final)

    def _start_probe(self, server: _Server) -> asyncio.Task[bool]:
        if server.probe is None:
            server.probe = asyncio.create_task(self._probe(server))
        return server.probe

    async def _is_well(self, server: _Server) -> bool:
        return not server.down and await asyncio.shield(self._start_probe(server))

    async def _probe(self, server: _Server) -> bool:
        try:
            async with self.session.get(f"{server.url}/models", timeout=aiohttp.ClientTimeout(PROBE_TIMEOUT)) as reply:
                well = reply.status not in (502, 503, 504)
        except (aiohttp.ClientError, TimeoutError, OSError):
            well = False
        server.down, server.probe = not well, None
        if not well:
            server.rest()
        return well

    async def models(self, server: _Server) -> list[str] | str:
        """The models that a server lists ([] if its list cannot be read), or a text that says why it cannot be used."""
        try:
            async with self.session.get(f"{server.url}/models", timeout=aiohttp.ClientTimeout(PROBE_TIMEOUT)) as reply:
                if reply.status in (401, 403):
                    return f"answers {reply.status} (set OPENAI_API_KEY to its key)"
                if reply.status == 404:
                    return "has no list of models (404; its address may lack /v1 at the end)"
                return [str(entry["id"]) for entry in (await reply.json())["data"]]
        except TimeoutError:
            return f"does not answer within {PROBE_TIMEOUT:g} s"
        except (aiohttp.ClientConnectionError, OSError, aiohttp.InvalidURL) as error:
            return f"cannot be reached ({error})"
        except (aiohttp.ClientError, ValueError, LookupError, TypeError):
            return []


def check_servers(urls: list[str], model: str, option: str) -> None:
    """Raise ValueError unless a server can be reached, and no list of models that can be read lacks `model`.

    option: the option that named the servers, for the message. The check takes a few seconds at most.
    """
    key = os.environ.get("OPENAI_API_KEY", "none")
    require(key.isprintable(), "OPENAI_API_KEY contains a line end or another control character: remove it.")

    async def ask() -> list[list[str] | str]:
        async with Client(urls, timeout=PROBE_TIMEOUT, retries=0) as client:
            return await asyncio.gather(*map(client.models, client.servers))

    found = asyncio.run(ask())
    reasons = [text for text in found if isinstance(text, str)]
    if len(reasons) == len(urls):
        raise ValueError(f"{urls[0]} {reasons[0]}: check {option} and that it runs (vllm serve {model}).")
    for url, served in zip(urls, found, strict=True):
        if isinstance(served, list) and served and model not in served:
            raise ValueError(f"{url} does not serve {model!r}: set --model to what it serves ({', '.join(served)}).")


def read_answer(content: bytes) -> Answer:
    """Parse a chat completion. Raises ValueError, LookupError, TypeError and others if it is not one."""
    found = json.loads(content)
    choice, usage = found["choices"][0], found.get("usage")
    message = choice["message"]
    thought = message.get("reasoning") or message.get("reasoning_content") or ""  # vLLM's new and old names
    text = message.get("content") if thought else message["content"]  # null: an empty answer
    tokens, prompt_tokens = (_count(usage, name) for name in ("completion_tokens", "prompt_tokens"))
    reason = choice.get("finish_reason")
    return Answer(_sound(text or ""), tokens, prompt_tokens, _sound(reason or ""), _sound(thought))


def _count(usage: Any, name: str) -> int | None:
    """A number of tokens, or None if the server reports none."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count < 1 << 40 else None


def _sound(text: str) -> str:
    """The text without lone surrogates, which cannot be written to a file. Raises AttributeError if it is no text."""
    return text.encode("utf-8", "replace").decode()


def _text(content: bytes) -> str:
    return " ".join(content.decode(errors="replace").split())[:300]
