"""Chat completions from one or several OpenAI-compatible servers, over asyncio; what failed decides what is done.

    async with Client(["http://a:8000/v1", "http://b:8000/v1"], timeout=600, retries=2) as client:
        answer = await client.ask({"model": "m", "messages": [...], "seed": 7})

A request goes to the server with the fewest in flight. What becomes of a failure depends on who is to blame:

* the server's state: it cannot be reached, broke the connection and is down, or says 429 or 503. It rests (longer each
  time, with jitter), one that was down is asked for /v1/models before it gets work again, and the request goes to
  another or waits, at no cost. When no server has answered anything for `patience` seconds, the run is over;
* perhaps the request: another 5xx, no answer within `timeout` or a broken connection though the server is well, or
  garbage. That costs one of its `retries`, after a pause that doubles. A server that has failed STREAK times in a row
  rests, and gets one request at a time until it answers: a dead engine behind a living front costs few prompts;
* certainly the request: any other 4xx is final. 401, 403, 404 and redirects would meet every request: that server is
  not asked again, and with the last one the run ends. So it does when many in a row are lost and nothing was ever
  answered, or nothing for `patience` seconds.

A sample is a request of its own, with a seed of its own: not every server takes n > 1, and a sample that came back is
not asked for again when its sibling fails. The key is OPENAI_API_KEY where a server wants one.

Left out on purpose: streaming, log-probs, proxies, servers that speak another protocol.
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
LOST = 10  # requests in a row, and twice as many as are in flight


class ServerError(RuntimeError):
    """No server can be used; the message is for the user."""


class RequestError(RuntimeError):
    """This request cannot be answered, others may; the message is for the user."""


class Stopped(RuntimeError):
    """`stopping` said so while a request waited to be sent (again)."""


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    tokens: int | None  # None: the server does not say
    prompt_tokens: int | None
    finish_reason: str
    thought: str = ""  # what a server's reasoning parser has taken out of the text
    token_ids: Sequence[int] = ()  # of the completion; a server does not say


@dataclass(frozen=True, slots=True)
class _Trouble:
    what: str
    costs: bool  # one of the request's tries
    final: bool = False  # all of them


class _Server:
    def __init__(self, url: str) -> None:
        self.url = url.strip().rstrip("/")
        self.chat = f"{self.url}/chat/completions"
        self.in_flight = self.failures = self.rests = 0  # the latter two since its last answer
        self.rest_until = 0.0
        self.down = False
        self.trouble = "cannot be used"  # the last
        self.probe: asyncio.Task[bool] | None = None

    def rest(self) -> None:
        now = time.monotonic()
        if self.rest_until <= now:  # of many requests that fail together one counts
            self.rests += 1
            self.rest_until = now + wait_before(self.rests) / 2


def wait_before(attempt: int) -> float:
    """Seconds before the attempt-th retry: doubling, with jitter, so that a crowd does not come back at once."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(attempt - 1, 10)) * random.uniform(0.5, 1.5)


async def in_parallel(work: Callable[[T], Awaitable[None]], items: Iterable[T], at_once: int) -> None:
    """Do `work` for all items, `at_once` of them at a time; the first error ends the others."""
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
        self.lost = 0  # requests given up since the last answer

    async def __aenter__(self) -> "Client":
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.session = aiohttp.ClientSession(
            # An idle connection is dropped before the server drops it (uvicorn: 5 s), or a request would meet its end.
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
        """The answer to a chat completion request.

        Raises RequestError if this one cannot be had, ServerError if none can, Stopped when it would have to wait.
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
                costs = self.last_answer > since  # others were answered all the while: this request is the cause
            if not costs:
                continue
            failures, since, failed_on = failures + 1, 0.0, server
            if failures > self.retries:
                tries = "" if failures == 1 else f", also at try {failures}"
                self._lose(f"{server.chat} {outcome.what}{tries}")
            wake = time.monotonic() + wait_before(failures)
            while not self.stopping() and (rest := wake - time.monotonic()) > 0:
                await asyncio.sleep(min(rest, 0.2))

    def _lose(self, why: str) -> NoReturn:
        """Give a request up; or all, where none is answered any more."""
        self.lost += 1
        idle = not self.last_answer or time.monotonic() - self.last_answer > self.patience
        if idle and self.lost > max(LOST, 2 * sum(server.in_flight for server in self.servers)):
            raise ServerError(f"{self.lost} requests in a row got no answer; the last: {why}")
        raise RequestError(why)

    async def _choose(self, failed_on: _Server | None) -> _Server:
        """The server with the fewest requests in flight, another than `failed_on` if there is; waits for one."""
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
            alone = "" if len(self.servers) == 1 else f" (nor have the other {len(self.servers) - 1} servers answered)"
            raise ServerError(f"{server.chat} {server.trouble}, for {self.patience:g} s by now{alone}")

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
                return _Trouble(f"answers what is no chat completion: {_text(content)}", costs=True)
        what = f"answers {status}: {location or _text(content)}"
        if status == 400 and re.search("context|max_tokens", what):
            what += " (lower --max_new_tokens)"
        if status in (401, 403, 404, 405) or 300 <= status < 400:
            server.trouble = what + (": set OPENAI_API_KEY" if status in (401, 403) else "")
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
        """What a server says it serves (nothing, if it has no such list), or why it cannot be used."""
        try:
            async with self.session.get(f"{server.url}/models", timeout=aiohttp.ClientTimeout(PROBE_TIMEOUT)) as reply:
                if reply.status in (401, 403):
                    return f"answers {reply.status}, so OPENAI_API_KEY must hold its key"
                if reply.status == 404:
                    return "has no list of models (404), so its address may lack /v1 at the end"
                return [str(entry["id"]) for entry in (await reply.json())["data"]]
        except TimeoutError:
            return f"does not answer within {PROBE_TIMEOUT:g} s"
        except (aiohttp.ClientConnectionError, OSError, aiohttp.InvalidURL) as error:
            return f"cannot be reached ({error})"
        except (aiohttp.ClientError, ValueError, LookupError, TypeError):
            return []


def check_servers(urls: list[str], model: str, option: str) -> None:
    """Raise ValueError unless a server is there, and those that are serve `model`. Takes a few seconds at most.

    option: what the servers were named by, for the message.
    """
    key = os.environ.get("OPENAI_API_KEY", "none")
    require(key.isprintable(), "OPENAI_API_KEY holds a line end or another control character: set it without.")

    async def ask() -> list[list[str] | str]:
        async with Client(urls, timeout=PROBE_TIMEOUT, retries=0) as client:
            return await asyncio.gather(*map(client.models, client.servers))

    found = asyncio.run(ask())
    reasons = [text for text in found if isinstance(text, str)]
    if len(reasons) == len(urls):
        raise ValueError(f"{urls[0]} {reasons[0]}: start it (vllm serve {model}), or check {option}.")
    for url, served in zip(urls, found, strict=True):
        if isinstance(served, list) and served and model not in served:
            raise ValueError(f"{url} does not serve {model!r}: it serves {', '.join(served)}; give --model.")


def read_answer(content: bytes) -> Answer:
    """The answer in a chat completion; raises ValueError, LookupError, TypeError and others for what is none."""
    found = json.loads(content)
    choice, usage = found["choices"][0], found.get("usage")
    message = choice["message"]
    thought = message.get("reasoning") or message.get("reasoning_content") or ""  # of vLLM now, and before
    text = message.get("content") if thought else message["content"]  # null: nothing was said
    tokens, prompt_tokens = (_count(usage, name) for name in ("completion_tokens", "prompt_tokens"))
    reason = choice.get("finish_reason")
    return Answer(_sound(text or ""), tokens, prompt_tokens, _sound(reason or ""), _sound(thought))


def _count(usage: Any, name: str) -> int | None:
    """A number of tokens, where the server gives one."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count < 1 << 40 else None


def _sound(text: str) -> str:
    """Without half characters, which no file takes. Raises AttributeError for what is no text."""
    return text.encode("utf-8", "replace").decode()


def _text(content: bytes) -> str:
    return " ".join(content.decode(errors="replace").split())[:300]
