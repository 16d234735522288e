"""Long tests of `gen.generate`: a real server, 100,000 prompts, a stall of one minute, a Ray cluster."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.fake_openai import FakeServer
from tests.gen.test_generate import data, expected, generate, options, rows  # noqa: F401  (data is a fixture)
from tests.servers import vllm_serve

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_memory_is_flat_over_100000_prompts():
    said = subprocess.run([sys.executable, "-m", "gen.bench"], cwd=ROOT, capture_output=True, text=True, check=True)
    print(said.stdout)
    resident = [int(text) for text in re.search(r"written: (.*)", said.stdout)[1].split()]
    assert len(resident) == 11 and max(resident) < resident[0] + 60


def test_a_minute_without_an_answer_costs_nothing(data, tmp_path):  # noqa: F811
    with FakeServer(latency=0.05) as server:

        def stall(number, request):
            if number == 50:
                server.stalled_until = time.monotonic() + 60
            return "ok"

        server.behave = stall
        code, log = generate(server.url, data, tmp_path / "out", timeout=70, max_concurrent=8)
    assert code == 0 and not (tmp_path / "out" / "failed.jsonl").exists(), log
    assert [row["generation"] for row in rows(tmp_path / "out")] == expected()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[data]")
def test_two_workers_of_ray_give_the_same_rows(data, tmp_path):  # noqa: F811
    with FakeServer(latency=0.02) as server:
        assert generate(server.url, data, tmp_path / "local")[0] == 0
        server.behave = lambda number, request: 500 if number % 10 == 0 else "ok"
        before, more = server.answered, {"executor": "ray", "client_replicas": 2, "retries": 5}
        command = [sys.executable, "-m", "gen.generate", *options(server.url, data, tmp_path / "ray", **more)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.answered - before == 200
    assert rows(tmp_path / "ray") == rows(tmp_path / "local")


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(), reason="needs vLLM's CPU build"
)
def test_a_real_server_killed_twice(smollm2, shared, tmp_path):
    """Two runs over 200 GSM8K prompts x 2 are killed with SIGKILL: the 400 generations equal an uninterrupted run's."""
    with vllm_serve(smollm2, tmp_path, max_model_len=512) as url:
        kill_twice(url, str(smollm2), shared, tmp_path)


def kill_twice(url: str, model: str, shared: Path, tmp_path: Path) -> None:
    settings = {
        "model": model,
        "prompt_column": "question",
        "temperature": 0.8,
        "max_new_tokens": 16,
        "limit": 200,
        "input_batch_size": 16,
        "max_concurrent": 32,
        "timeout": 60,
    }
    questions = shared / "data" / "gsm8k_test.jsonl"
    command = [sys.executable, "-m", "gen.generate"]
    command += options(url, questions, tmp_path / "out", **settings)
    for files in (3, 7):
        with subprocess.Popen(command, cwd=ROOT) as process:
            while len(list(tmp_path.glob("out/batches/0*.parquet"))) < files:
                assert process.poll() is None
                time.sleep(0.05)
            process.kill()
    assert generate(url, questions, tmp_path / "out", **settings)[0] == 0
    code, log = generate(url, questions, tmp_path / "unbroken", **settings)
    print(log)
    assert code == 0, log
    asked = [json.loads(line)["question"] for line in questions.read_text().splitlines()[:200]]
    found = rows(tmp_path / "out")
    assert [row["question"] for row in found] == asked and sum(len(row["generation"]) for row in found) == 400
    assert len({text for row in found for text in row["generation"]}) > 390  # seeds differ
    assert sum(pq.ParquetFile(path).metadata.num_rows for path in tmp_path.glob("out/batches/*.parquet")) == 200
    assert found == rows(tmp_path / "unbroken")
