"""What the client costs: requests per second of a core, and memory over a long run.

    python -m gen.bench [--requests 5000] [--rows 100000]

First the same short requests through `gen/client.py` and through the plain openai client (if it is installed), 64 in
flight, against a server in another process that answers at once; CPU time is that of the client's process alone. Then
`gen.generate` over so many prompts against that server, with its resident memory on the way.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from aiohttp import web

from gen.client import Client, in_parallel
from gen.config import GenerateConfig
from gen.generate import Run
from gen.store import Batch, open_rows

AT_ONCE = 64
REQUEST: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "What is 6 times 7?"}], "seed": 1}
REPLY = {
    "choices": [{"message": {"content": "42"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 2},
}


def serve(listener: socket.socket) -> None:
    """A server that answers every request at once."""

    def answering(content: Any) -> Any:
        body = json.dumps(content).encode()

        async def answer(_: web.Request) -> web.Response:
            return web.Response(body=body, content_type="application/json")

        return answer

    app = web.Application()
    app.router.add_get("/v1/models", answering({"data": [{"id": "m"}]}))
    app.router.add_post("/v1/chat/completions", answering(REPLY))
    web.run_app(app, sock=listener, print=None)


async def rate(ask: Callable[[], Awaitable[Any]], requests: int) -> tuple[float, float]:
    """Requests per second of CPU time and of wall time."""
    cpu, wall = time.process_time(), time.perf_counter()
    await in_parallel(lambda _: ask(), range(requests), AT_ONCE)
    return requests / (time.process_time() - cpu), requests / (time.perf_counter() - wall)


async def clients(url: str, requests: int) -> None:
    async with Client([url], timeout=60, retries=0) as client:
        await rate(lambda: client.ask(REQUEST), 200)
        ours = await rate(lambda: client.ask(REQUEST), requests)
    print(f"gen.client: {ours[0]:.0f} requests/s per core, {ours[1]:.0f} by the clock")
    if find_spec("openai") is not None:
        from openai import AsyncOpenAI

        plain = AsyncOpenAI(base_url=url, api_key="none")
        await rate(lambda: plain.chat.completions.create(**REQUEST), 200)
        theirs = await rate(lambda: plain.chat.completions.create(**REQUEST), requests)
        print(f"openai: {theirs[0]:.0f} requests/s per core, {theirs[1]:.0f} by the clock: {ours[0] / theirs[0]:.1f} x")


def memory(url: str, rows: int) -> None:
    """Resident memory at every tenth of a run."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"What is {i} times 7?"}) + "\n" for i in range(rows)))
        config = GenerateConfig(hf_dataset=str(data), model="m", vllm_server_url=[url], output_dir=f"{folder}/out")
        run, process, seen = Run(config, open_rows(config)), psutil.Process(), list[str]()
        write, written = run.store.write, count(1)

        def watch(batch: Batch) -> None:
            write(batch)
            if next(written) * config.input_batch_size * 10 // rows > len(seen):
                seen.append(f"{process.memory_info().rss / 2**20:.0f}")

        run.store.write = watch  # type: ignore[method-assign]
        cpu, wall = time.process_time(), time.perf_counter()
        run.work(SimpleNamespace(requested=False), [])
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(f"gen.generate: {rows / cpu:.0f} prompts/s per core, {rows / wall:.0f} by the clock, files and all")
        run.store.finish()
        seen.append(f"{process.memory_info().rss / 2**20:.0f}")
        print(f"resident MiB at each tenth of {rows} prompts, and with the data set written: {' '.join(seen)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    server = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    listener.close()
    asyncio.run(clients(url, options.requests))
    memory(url, options.rows)
    server.kill()


if __name__ == "__main__":
    main()
