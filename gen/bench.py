"""Benchmark of the client: requests per second per core, and memory over a long run.

    python -m gen.bench [--requests 5000] [--rows 100000]

The first part sends the same short requests through `gen/client.py` and through the openai client (if it is installed),
64 in flight, to a server in another process that answers immediately. Only the client's CPU time is counted. The second
part runs `gen.generate` over `--rows` prompts against that server and prints its resident memory during the run.
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
    """Run a server that answers every request immediately."""
    models, reply = (json.dumps(content).encode() for content in ({"data": [{"id": "m"}]}, REPLY))

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=models if request.method == "GET" else reply, content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    web.run_app(app, sock=listener, print=None)


async def rate(ask: Callable[[], Awaitable[Any]], requests: int) -> float:
    """Requests per second of CPU time, after a warm-up that is not timed."""
    await in_parallel(lambda _: ask(), range(200), AT_ONCE)
    start = time.process_time()
    await in_parallel(lambda _: ask(), range(requests), AT_ONCE)
    return requests / (time.process_time() - start)


async def clients(url: str, requests: int) -> None:
    async with Client([url], timeout=60, retries=0) as client:
        ours = await rate(lambda: client.ask(REQUEST), requests)
    print(f"gen.client: {ours:.0f} requests/s per core")
    if find_spec("openai") is not None:
        from openai import AsyncOpenAI

        plain = AsyncOpenAI(base_url=url, api_key="none")
        theirs = await rate(lambda: plain.chat.completions.create(**REQUEST), requests)
        print(f"openai: {theirs:.0f} requests/s per core: {ours / theirs:.1f} x")


def memory(url: str, rows: int) -> None:
    """Print the resident memory after each tenth of a run."""
    process, seen, written = psutil.Process(), list[str](), count(1)

    def see() -> None:
        seen.append(f"{process.memory_info().rss / 2**20:.0f}")

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"What is {i} times 7?"}) + "\n" for i in range(rows)))
        config = GenerateConfig(hf_dataset=str(data), model="m", vllm_server_url=[url], output_dir=f"{folder}/out")
        run = Run(config, open_rows(config))
        write = run.store.write

        def watch(batch: Batch) -> None:
            write(batch)
            if next(written) * config.input_batch_size * 10 // rows > len(seen):
                see()

        run.store.write = watch  # type: ignore[method-assign]
        start = time.process_time()
        run.work(SimpleNamespace(requested=False), [])
        print(f"gen.generate: {rows / (time.process_time() - start):.0f} prompts/s per core, including file writes")
        run.store.finish()
        see()
        print(f"resident MiB after each tenth of {rows} prompts, then with the data set written: {' '.join(seen)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="gen.bench", description=__doc__.split("\n")[0])
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
