"""An OpenAI-compatible server that fails on command. It runs in a thread of the test, or in a process to be killed.

    with FakeServer() as server:
        server.behave = lambda number, request: 503 if number % 3 == 1 else "ok"

Its answers depend only on the question and the seed, so that runs can be compared. `behave` gets the number of the
request (from 1) and its body. It returns "ok", a status code, "hang", "cut" (no answer), "cut body", "garbage", or a
dict of fields that replace those of a good answer (`content` and other fields of the message, `finish_reason`,
`usage`). To run it as a process: `python -m tests.fake_openai PORT [LATENCY]`.
"""

import asyncio
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web


def words(request: dict[str, Any]) -> str:
    """The server's answer to a request."""
    text = json.dumps([request["messages"], request.get("seed")])
    return f"{request['messages'][-1]['content']} -> {hashlib.sha256(text.encode()).hexdigest()[:12]}"


class FakeServer:
    def __init__(self, port: int = 0, latency: float = 0.0, models: tuple[str, ...] = ("served",)) -> None:
        self.port, self.latency, self.models = port, latency, models
        self.behave: Callable[[int, dict[str, Any]], str | int | dict[str, Any]] = lambda number, request: "ok"
        self.say: Callable[[dict[str, Any]], str] = words
        self.stalled_until = 0.0  # the server answers nothing before this time.monotonic(), not even /v1/models
        self.requests: list[dict[str, Any]] = []
        self.answered = self.most_at_once = self.at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "FakeServer":
        started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self.thread.start()
        started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join()

    async def _serve(self, started: threading.Event) -> None:
        self.loop, self.stopped = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        started.set()
        await self.stopped.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        await self._stall()
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _stall(self) -> None:
        while time.monotonic() < self.stalled_until:
            await asyncio.sleep(0.05)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.requests.append(asked)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._answer(request, asked, self.behave(len(self.requests), asked))
        finally:
            self.at_once -= 1

    async def _answer(self, request: web.Request, asked: dict[str, Any], how: Any) -> web.StreamResponse:
        await self._stall()
        await asyncio.sleep(self.latency)
        if how == "hang":
            await self.stopped.wait()
        if how == "cut":
            request.transport.close()
            return web.Response()
        if how == "garbage":
            return web.Response(text='{"choices": [{"mess', content_type="application/json")
        if isinstance(how, int):
            return web.json_response({"error": "no such model" if how == 404 else "on purpose"}, status=how)
        message, n = {"role": "assistant", "content": self.say(asked)}, asked.get("n") or 1
        usage = {"prompt_tokens": 5, "completion_tokens": 7 * n, "total_tokens": 5 + 7 * n}
        other = dict(how) if isinstance(how, dict) else {}
        top = {"usage": other.pop("usage", usage)}
        reason = other.pop("finish_reason", "stop")
        choices = [{"index": i, "message": message | other, "finish_reason": reason} for i in range(n)]
        body = {"id": "x", "object": "chat.completion", "created": 1, "model": asked["model"]}
        content = json.dumps(body | {"choices": choices} | top).encode()
        if how == "cut body":
            reply = web.StreamResponse(headers={"Content-Length": str(len(content))})
            await reply.prepare(request)
            await reply.write(content[: len(content) // 2])
            request.transport.close()
            return reply
        self.answered += 1
        return web.Response(body=content, content_type="application/json")


if __name__ == "__main__":
    server = FakeServer(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    asyncio.run(server._serve(threading.Event()))
