"""A real `vllm serve` on the loopback, on the CPU."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def vllm_serve(model: str | Path, folder: Path, *, max_model_len: int) -> Iterator[str]:
    """Serve `model` in float32, with its path as its name; yield the base URL. The log is written to `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(max_model_len), "--host", "127.0.0.1"]
    # Chunked prefill breaks vLLM 0.32 on the CPU if the request has a seed.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048", "--no-enable-prefix-caching"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    log = folder / "vllm_serve.log"
    with open(log, "a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=folder)
    try:
        url = f"http://127.0.0.1:{port}"
        while not _is_up(url):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False
