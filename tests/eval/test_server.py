"""The runner against servers: one of ours that answers, fails and refuses on command, and a real `vllm serve`."""

import importlib.util
import json
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from eval.run import main
from gen import client, sampler
from tests import launch
from tests.eval.helpers import refused, samples, write
from tests.fake_openai import FakeServer
from tests.servers import vllm_serve

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server():
    """Says the number in the question."""
    with FakeServer() as server:
        server.say = lambda request: f"The answer is {request['messages'][-1]['content'].split()[-1].rstrip('?')}."
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = [{"problem": f"What is {i}?", "answer": str(i if i % 4 else 1000)} for i in range(12)]
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def hurry() -> None:
    """Wait less for a server that fails."""
    client.FIRST_WAIT, sampler.PATIENCE = 0.05, 3.0


def evaluate(url: str, data: Path, output: Path, log: Path, **options) -> tuple[int, str]:
    options = {"model": "served", "tasks": "aime24", "batch_size": 8, "num_samples": 2} | options
    options |= {"dataset": f"aime24={data}", "output_dir": output, "base_url": url}
    return launch.run("eval.run", launch.flags(**options), log, fault=hurry)


def test_answers_come_from_the_server_in_spite_of_some_errors(server, data, tmp_path):
    server.behave = lambda count, _: 503 if count % 3 == 1 else 429 if count % 10 == 0 else "ok"
    code, log = evaluate(
        server.url + "/", data, tmp_path / "out", tmp_path / "log", system_prompt="Think.", max_new_tokens=50
    )
    assert code == 0, log
    result = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["aime24"]
    assert result["pass@1"] == 9 / 12 and result["mean_length"] == 7 and result["samples"] == 24
    request = server.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "Think."}
    assert (request["model"], request["max_tokens"], request["temperature"], request["top_p"]) == (
        "served",
        50,
        0.6,
        0.95,
    )
    assert len({request["seed"] for request in server.requests}) == 24


def test_what_is_done_is_kept_when_the_server_fails(server, data, tmp_path):
    server.behave = lambda count, _: "ok" if count <= 8 else 500
    code, log = evaluate(server.url, data, tmp_path / "out", tmp_path / "log")
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "answers 500" in errors[0] and "Traceback" not in log, log
    assert len(list(tmp_path.glob("out/details/aime24/*.parquet"))) == 1
    server.behave, before = lambda count, _: "ok", len(server.requests)
    assert evaluate(server.url, data, tmp_path / "out", tmp_path / "log")[0] == 0
    again = Counter(request["messages"][0]["content"] for request in server.requests[before:])
    assert sum(again.values()) == 16 and len(again) == 8  # the first batch is not asked for again


def test_a_server_that_is_down_or_does_not_know_the_model(server, data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        code, log = evaluate(f"http://127.0.0.1:{free.getsockname()[1]}/v1", data, tmp_path / "out", tmp_path / "log")
    assert code == 2 and "cannot be reached" in log and "--base_url" in log and "Traceback" not in log
    server.behave = lambda count, _: 404
    code, log = evaluate(server.url, data, tmp_path / "out", tmp_path / "log", batch_size=2)
    assert code == 1 and "no such model" in log and len(server.requests) == 2  # no retries


@pytest.mark.parametrize(
    "url, key, says",
    [
        ("localhost:8000", "k", "is no address"),
        ("{bare}", "k", "its address may lack /v1"),
        ("http://me:secret@host/v1", "k", "set OPENAI_API_KEY instead"),
        ("{url}", "a\nb", "OPENAI_API_KEY holds a line end"),
        ("{url}", "k", "does not serve 'gone': it serves served; give --model"),
    ],
)
def test_a_server_that_cannot_be_asked_is_one_sentence(url, key, says, server, data, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    options = {"model": "gone", "tasks": "aime24", "dataset": f"aime24={data}", "output_dir": tmp_path / "out"}
    url = url.format(url=server.url, bare=server.url.removesuffix("/v1"))
    refused(main, launch.flags(base_url=url, **options), capfd, says)
    assert not (tmp_path / "out").exists()


def test_an_answer_that_is_not_there_costs_itself_alone(server, data, tmp_path):
    """A null answer is an empty one; a request that fails is named, and asked again alone."""
    said = {"What is 1?": {"content": None, "reasoning": None, "usage": None}, "What is 2?": 400}
    server.behave = lambda count, request: said.get(request["messages"][0]["content"], "ok")
    for asked in (12, 1):
        before = len(server.requests)
        code, log = evaluate(server.url, data, tmp_path / "out", tmp_path / "log", num_samples=1, batch_size=12)
        assert code == 1 and "1 samples got no answer" in log and "aime24, problem 2, sample 0: http" in log, log
        assert len(server.requests) - before == asked
    result = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["aime24"]
    assert (result["pass@1"], result["unparsed"], result["unscored"]) == (7 / 12, 1 / 12, 1 / 12)
    said.clear()
    code, log = evaluate(server.url, data, tmp_path / "out", tmp_path / "log2", num_samples=1, batch_size=12)
    assert code == 0 and str(tmp_path / "out" / "report.html") in log, log
    assert [row["score"] for row in samples(tmp_path / "out")] == [float(i % 4 > 0 and i != 1) for i in range(12)]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(), reason="needs vLLM's CPU build"
)
def test_vllm_serve_says_what_vllm_in_process_says(tiny_model, data, tmp_path):
    options = {"model": tiny_model, "temperature": 0, "num_samples": 1, "max_new_tokens": 40, "dtype": "float32"}
    with vllm_serve(tiny_model, tmp_path, max_model_len=128) as url:
        code, log = evaluate(url, data, tmp_path / "http", tmp_path / "log", **options)
        assert code == 0, log
    command = [sys.executable, "-m", "eval.run", "--tasks=aime24", f"--dataset=aime24={data}", "--batch_size=8"]
    command += [f"--output_dir={tmp_path / 'here'}", *(f"--{name}={value}" for name, value in options.items())]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    said = [
        [
            (row["completion"].rstrip("\ufffd"), row["length"], row["finish_reason"])  # the server drops half a letter
            for row in samples(tmp_path / name)
        ]
        for name in ("http", "here")
    ]
    assert said[0] == said[1] and len(said[0]) == 12
