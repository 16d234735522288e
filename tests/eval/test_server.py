"""The runner with servers: a fake one that answers, fails and refuses on command, and a real `vllm serve`."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from eval import folder, pass_rate
from eval.compare import compare
from eval.run import main
from eval.workers import WorkerPool
from gen import client, sampler
from tests import launch
from tests.eval.helpers import called, samples, write
from tests.fake_openai import FakeServer
from tests.servers import vllm_serve

ROOT = Path(__file__).parents[2]


def number(request: dict) -> str:
    """The number in the question."""
    return f"The answer is {request['messages'][-1]['content'].split()[-1].rstrip('?')}."


@pytest.fixture
def server():
    with FakeServer() as server:
        server.say = number
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = [{"problem": f"What is {i}?", "answer": str(i if i % 4 else 1000)} for i in range(12)]
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def checkers():
    with WorkerPool(2, timeout=10.0) as pool:
        yield pool


@pytest.fixture(autouse=True)
def hurry(monkeypatch, checkers) -> None:
    """Wait less for failing servers, and do not start checkers for each run."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(sampler, "PATIENCE", 0.5)
    monkeypatch.setattr(folder, "checkers", lambda config: nullcontext(checkers))


def evaluate(url: str, data: Path, output: Path, command: Callable = main, **options) -> tuple[int, str]:
    """Run eval.run; return its exit code and its output."""
    options = {"model": "served", "tasks": "aime24", "dataset": f"aime24={data}", "num_samples": 2} | options
    options |= {"batch_size": 8, "output_dir": output, "base_url": url} | options
    return called(command, launch.flags(**{name: value for name, value in options.items() if value is not None}))


def result_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())["results"]["aime24"]


def test_answers_come_from_the_server_in_spite_of_some_errors(server, data, tmp_path):
    server.behave = lambda count, _: 503 if count % 3 == 1 else 429 if count % 10 == 0 else "ok"
    code, log = evaluate(server.url + "/", data, tmp_path, system_prompt="Think.", max_new_tokens=50)
    assert code == 0 and str(tmp_path / "report.html") in log, log
    result = result_of(tmp_path)
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


def test_what_is_done_is_kept_when_no_request_is_answered(server, data, tmp_path):
    server.behave = lambda count, _: "ok" if count <= 8 else 500
    code, log = evaluate(server.url, data, tmp_path)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "answers 500" in errors[0] and "--base_url" in errors[0], log
    assert len(list(tmp_path.glob("details/aime24/*.parquet"))) == 1
    server.behave, before = lambda count, _: "ok", len(server.requests)
    assert evaluate(server.url, data, tmp_path)[0] == 0
    again = Counter(request["messages"][0]["content"] for request in server.requests[before:])
    assert sum(again.values()) == 16 and len(again) == 8  # the first batch is not asked for again


@pytest.mark.parametrize("batch_size, lost", [(8, None), (12, 7)])  # the server dies in the first batch, or in the last
def test_a_server_killed_in_a_batch_costs_no_answer(batch_size, lost, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "AT_ONCE", 1)
    options = {"num_samples": 1, "batch_size": batch_size}
    server = FakeServer().__enter__()
    server.say, server.behave = number, lambda count, _: "ok" if count <= 5 else server.stopped.set() or "cut"
    code, log = evaluate(server.url, data, tmp_path, **options)
    server.thread.join()
    assert code == 1 and f"{server.url}/chat/completions" in log and "the same command" in log, log
    assert f"{lost} samples got no answer" in log if lost else not (tmp_path / "results.json").exists()
    assert [row["score"] for row in samples(tmp_path)] == [0, 1, 1, 1, 0] + [None] * (batch_size - 5)
    with FakeServer(server.port) as server:
        server.say = number
        code, log = evaluate(server.url, data, tmp_path, **options)
        assert code == 0 and len(server.requests) == 7, log
    assert [row["score"] for row in samples(tmp_path)] == [float(i % 4 > 0) for i in range(12)]


def test_a_server_that_does_not_know_the_model_is_asked_once(server, data, tmp_path):
    server.behave = lambda count, _: 404
    code, log = evaluate(server.url, data, tmp_path, batch_size=2)
    assert code == 1 and "no such model" in log and len(server.requests) <= 2  # no retries


@pytest.mark.parametrize(
    "url, key, says",
    [
        ("http://127.0.0.1:9/v1", "k", "cannot be reached"),
        ("localhost:8000", "k", "is not a valid address"),
        ("{bare}", "k", "its address may lack /v1"),
        ("http://me:secret@host/v1", "k", "set OPENAI_API_KEY instead"),
        ("{url}", "a\nb", "OPENAI_API_KEY contains a line end"),
        ("{url}", "k", "does not serve 'gone': set --model to what it serves (served)"),
    ],
)
def test_a_server_that_cannot_be_asked_is_one_sentence(url, key, says, server, data, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    url = url.format(url=server.url, bare=server.url.removesuffix("/v1"))
    code, log = evaluate(url, data, tmp_path, model="gone")
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and says in errors[0], log
    assert not server.requests and not list(tmp_path.glob("details/*/*.parquet"))


def test_an_answer_that_is_not_there_costs_itself_alone(server, data, tmp_path):
    """A null answer is an empty answer. A failed request is reported, and only it is retried."""
    said = {"What is 1?": {"content": None, "reasoning": None, "usage": None}, "What is 2?": 400}
    server.behave = lambda count, request: said.get(request["messages"][0]["content"], "ok")
    options = {"num_samples": 1, "batch_size": 12}
    for asked in (12, 1):
        before = len(server.requests)
        code, log = evaluate(server.url, data, tmp_path, **options)
        assert code == 1 and "1 samples got no answer" in log and "aime24, problem 2, sample 0: there is no" in log, log
        assert "1 samples are unscored and count as wrong" in log and len(server.requests) - before == asked
    result = result_of(tmp_path)
    assert (result["pass@1"], result["unparsed"], result["unscored"]) == (7 / 12, 1 / 12, 1 / 12)
    assert compare(tmp_path, tmp_path)["aime24"]["problems"] == 11
    said.clear()
    assert evaluate(server.url, data, tmp_path, **options)[0] == 0
    assert [row["score"] for row in samples(tmp_path)] == [float(i % 4 > 0 and i != 1) for i in range(12)]


def test_a_pass_rate_is_of_the_answers_that_are_there(server, data, tmp_path):
    server.behave = lambda count, request: 400 if request["seed"] in (1, 4, 5) else "ok"
    options = {"tasks": None, "dataset": data, "solution_column": "answer", "limit": 4}
    command = pass_rate.main
    code, log = evaluate(server.url, data, tmp_path, command, **options)
    assert code == 1 and "3 samples got no answer" in log and "generations missing: 3" in log, log
    assert "checks given up: 0" in log
    rows = pq.read_table(tmp_path / "scored.parquet").to_pylist()
    assert [row["correct"] for row in rows] == [[False, None], [True, True], [None, None], [True, True]]
    assert [row["pass_rate"] for row in rows] == [0, 1, None, 1] and rows[0]["generation"][1] is None
    server.behave, before = lambda count, _: "ok", len(server.requests)
    code, log = evaluate(server.url, data, tmp_path, command, **options)
    assert code == 0 and len(server.requests) - before == 3 and "generations missing: 0" in log, log


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(), reason="needs vLLM's CPU build"
)
def test_vllm_serve_says_what_vllm_in_process_says(tiny_model, data, tmp_path):
    options = {"model": tiny_model, "temperature": 0, "num_samples": 1, "max_new_tokens": 40, "dtype": "float32"}
    with vllm_serve(tiny_model, tmp_path, max_model_len=128) as url:
        code, log = evaluate(url, data, tmp_path / "http", **options)
        assert code == 0, log
    command = [sys.executable, "-m", "eval.run", "--tasks=aime24", f"--dataset=aime24={data}", "--batch_size=8"]
    command += [f"--output_dir={tmp_path / 'here'}", *(f"--{name}={value}" for name, value in options.items())]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    said = [
        [
            (row["completion"].rstrip("\ufffd"), row["length"], row["finish_reason"])  # a server drops half characters
            for row in samples(tmp_path / name)
        ]
        for name in ("http", "here")
    ]
    assert said[0] == said[1] and len(said[0]) == 12
