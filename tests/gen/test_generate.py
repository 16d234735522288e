"""`python -m gen.generate` as users run it: servers fail, and the run is killed, stopped, and has no disk space."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

import gen.client
from gen.config import GenerateConfig
from gen.engine.base import EngineConfig, Sampling, make_engine
from gen.generate import build_distilabel_pipeline, main
from sft_core.data.rows import load_rows
from sft_core.run.cli import parse
from tests import launch
from tests.fake_openai import FakeServer, words


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}.", "n": i, "why": [i]}) + "\n" for i in range(100)))
    return path


def options(url: str, data: Path, folder: Path, **more) -> list[str]:
    settings = {"hf_dataset": data, "model": "served", "vllm_server_url": url, "output_dir": folder, "seed": 1}
    settings |= {"num_generations": 2, "input_batch_size": 8, "temperature": 0.7}
    return launch.flags(**(settings | more))


def generate(url: str, data: Path, folder: Path, fault=None, **more) -> tuple[int, str]:
    log = folder.with_name(f"{folder.name}-{len(list(folder.parent.iterdir()))}.log")
    return launch.run("gen.generate", options(url, data, folder, **more), log, fault=fault)


def rows(folder: Path) -> list[dict]:
    return pq.read_table(folder / "train.parquet").to_pylist()


def expected(n: int = 2, count: int = 100) -> list[list[str]]:
    """The server's answers to all prompts, in order."""
    asked = [
        [{"messages": [{"role": "user", "content": f"Say {i}."}], "seed": 1_000_003 + i * n + j} for j in range(n)]
        for i in range(count)
    ]
    return [list(map(words, group)) for group in asked]


def test_nothing_is_lost_or_repeated_by_a_server_that_misbehaves(server, data, tmp_path):
    dice, ways = Random(0), ["hang", "cut", "cut body", "garbage", 429]
    server.behave = lambda number, request: (
        500 if (draw := dice.random()) < 0.1 else dice.choice(ways) if draw < 0.25 else "ok"
    )
    code, log = generate(server.url, data, tmp_path / "out", timeout=2, retries=8)
    assert code == 0, log
    assert [row["generation"] for row in rows(tmp_path / "out")] == expected()
    assert server.answered == 200 and len(server.requests) > 220  # samples are retried one by one
    assert {(r["temperature"], r["max_tokens"], "top_p" in r, "n" in r) for r in server.requests} == {
        (0.7, 8192, False, False)
    }


def test_a_server_that_is_killed_costs_nothing(server, data, tmp_path):
    server.latency = 0.05
    with FakeServer(latency=0.05) as spare:
        port = spare.port
    command = [sys.executable, "-m", "tests.fake_openai", str(port), "0.05"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as doomed:
        server.behave = lambda number, request: "ok" if number != 60 else doomed.kill() or "ok"
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)
        urls = f"{server.url},http://127.0.0.1:{port}/v1"
        code, log = generate(urls, data, tmp_path / "out", max_concurrent=8)
        doomed.kill()
    assert code == 0, log
    assert [row["generation"] for row in rows(tmp_path / "out")] == expected()
    assert not (tmp_path / "out" / "failed.jsonl").exists() and 100 < len(server.requests) < 200


def test_killed_twice_it_ends_with_what_an_unbroken_run_has(server, data, tmp_path):
    server.latency, folder = 0.05, tmp_path / "out"
    for files in (3, 7):
        [process] = launch.start(
            "gen.generate", options(server.url, data, folder, max_concurrent=6), tmp_path / f"{files}.log"
        )
        while len(list(folder.glob("batches/0*.parquet"))) < files:
            assert process.exitcode is None, (tmp_path / f"{files}.log").read_text()
            time.sleep(0.02)
        process.kill()
        process.join()
    kept = [row["position"] for path in folder.glob("batches/0*.parquet") for row in pq.read_table(path).to_pylist()]
    before = len(server.requests)
    assert generate(server.url, data, folder)[0] == 0
    assert not {f"Say {n}." for n in kept} & {r["messages"][0]["content"] for r in server.requests[before:]}
    assert generate(server.url, data, tmp_path / "unbroken")[0] == 0
    assert rows(folder) == rows(tmp_path / "unbroken")
    assert [row["generation"] for row in rows(folder)] == expected()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_keeps_what_is_in_flight_and_asks_nothing_twice(server, data, tmp_path, number):
    server.latency, folder, log = 0.2, tmp_path / "out", tmp_path / "log"
    more = {"max_concurrent": 5, "num_generations": 1}
    [process] = launch.start("gen.generate", options(server.url, data, folder, **more), log)
    while len(server.requests) < 23:
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert launch.wait([process]) == 130, log.read_text()
    assert "stopping after the requests in flight" in log.read_text()
    assert 23 <= len(rows(folder)) == server.answered == len(server.requests) < 40
    assert generate(server.url, data, folder, **more)[0] == 0
    assert len(server.requests) == 100 and [row["generation"] for row in rows(folder)] == expected(1)


def test_no_server_any_more_keeps_what_is_done(server, data, tmp_path):
    server.behave = lambda number, request: "ok" if number <= 60 else 503
    code, log = generate(server.url, data, tmp_path / "out", timeout=1, max_concurrent=4)
    assert code == 1 and "answers 503" in log and "same command to resume" in log and "Traceback" not in log, log
    done = len(rows(tmp_path / "out"))
    assert 24 <= done <= 30
    server.behave, before = lambda number, request: "ok", server.answered
    assert generate(server.url, data, tmp_path / "out")[0] == 0
    assert server.answered - before == 200 - 2 * done
    assert [row["generation"] for row in rows(tmp_path / "out")] == expected()


def test_a_dead_engine_behind_a_living_front_costs_few_prompts(server, data, tmp_path):
    server.behave = lambda number, request: "ok" if number <= 60 else 500
    code, log = generate(server.url, data, tmp_path / "out", timeout=3, max_concurrent=4)
    assert code == 1 and "answers 500" in log and "same command to resume" in log and "Traceback" not in log, log
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert 1 <= len(failed) < 20 and len(server.requests) < 90
    server.behave = lambda number, request: "ok"
    assert generate(server.url, data, tmp_path / "out")[0] == 0
    assert [row["generation"] for row in rows(tmp_path / "out")] == expected()


def rest_shortly() -> None:
    gen.client.LONGEST_WAIT = 1.0


def test_prompts_that_keep_failing_are_asked_again_by_the_same_command(server, data, tmp_path):
    bad = {"Say 5.", "Say 6.", *(f"Say {i}." for i in range(16, 24))}
    server.behave = lambda number, request: 500 if request["messages"][0]["content"] in bad else "ok"
    code, log = generate(server.url, data, tmp_path / "out", retries=1, fault=rest_shortly)
    assert code == 0 and "failed prompts          10" in log, log
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert sorted(line["position"] for line in failed) == [5, 6, *range(16, 24)]
    assert all("answers 500" in line["error"] and line["prompt"][0]["content"] in bad for line in failed)
    assert [row["n"] for row in rows(tmp_path / "out")] == [i for i in range(100) if f"Say {i}." not in bad]
    server.behave, before = lambda number, request: "ok", len(server.requests)
    assert generate(server.url, data, tmp_path / "out", retries=1)[0] == 0
    asked = Counter(request["messages"][0]["content"] for request in server.requests[before:])
    assert asked == dict.fromkeys(bad, 2) and not (tmp_path / "out" / "failed.jsonl").exists()
    assert [row["generation"] for row in rows(tmp_path / "out")] == expected()


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_a_full_disk_stops_it_cleanly(server, data, tmp_path):
    noise = Random(0)
    long = {f"Say {i}.": noise.randbytes(40_000).hex() for i in range(40, 48)}
    server.say = lambda request: words(request) + long.get(request["messages"][0]["content"], "")
    code, log = generate(server.url, data, tmp_path / "out", fault=limit_file_size, max_concurrent=2)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert (
        code == 1
        and len(errors) == 1
        and "File too large" in errors[0]
        and "free some space" in errors[0]
        and "Traceback" not in log
    ), log
    files = sorted((tmp_path / "out" / "batches").iterdir())
    assert 5 <= len(files) < 13 and not any(file.name.startswith(("000005", ".")) for file in files)
    done, before = sum(len(pq.read_table(file)) for file in files), len(server.requests)
    assert generate(server.url, data, tmp_path / "out")[0] == 0
    assert len(rows(tmp_path / "out")) == 100 and len(server.requests) - before == 2 * (100 - done)


def test_bad_input_is_one_sentence(server, data, tmp_path, capsys):
    cases = {
        "set --model to what it serves (served, other)": {"model": "gone"},
        "cannot be reached": {"vllm_server_url": "http://127.0.0.1:9/v1"},
        "'topic', but the data has prompt, n, why": {"prompt_template": "{{ instruction }} on {{ topic }}"},
        "--prompt-column names a column 'problem', but the data has prompt, n, why": {"prompt_column": "problem"},
        "not valid Jinja": {"prompt_template": "{{ instruction"},
        "(or --num_generations) to 1, or use a temperature above 0": {"temperature": 0},
        "write it as http://host:8000/v1": {"vllm_server_url": "localhost:8000"},
        "set OPENAI_API_KEY instead": {"vllm_server_url": "http://me:secret@host/v1"},
        "--vllm-server-url is empty": {"vllm_server_url": ","},
        "its address may lack /v1": {"vllm_server_url": server.url.removesuffix("/v1")},
        "has type int64: choose a text column": {"prompt_column": "n"},
        "no data file": {"hf_dataset": tmp_path / "absent.jsonl"},
    }
    server.models = ("served", "other")
    for i, (text, wrong) in enumerate(cases.items()):
        assert text in launch.refusal(main, options(server.url, data, tmp_path / str(i), **wrong), capsys)
        assert not (tmp_path / str(i)).exists()
    assert generate(server.url, data, tmp_path / "out", limit=8)[0] == 0
    code, log = generate(server.url, data, tmp_path / "out", limit=8, temperature=0.8, num_generations=1)
    assert code == 2 and "temperature (0.7, now 0.8); num_generations (2, now 1). Choose another --output-dir" in log
    settings = tmp_path / "out" / "settings.json"
    before = json.loads(settings.read_text())
    del before["format"]
    settings.write_text(json.dumps(before))  # as if written by a version with other files
    says = launch.refusal(main, options(server.url, data, tmp_path / "out", limit=8), capsys)
    assert "format (None, now 2)" in says


def test_what_may_differ_in_a_restart(server, data, tmp_path):
    assert generate(server.url, data, tmp_path / "out", limit=13)[0] == 0  # in the middle of a batch
    assert len(rows(tmp_path / "out")) == 13
    more = {"client_replicas": 3, "max_concurrent": 7, "timeout": 50, "retries": 2}
    assert generate(server.url.replace("127.0.0.1", "localhost"), data, tmp_path / "out", **more)[0] == 0
    assert len(server.requests) == 200 and [row["generation"] for row in rows(tmp_path / "out")] == expected()
    assert server.most_at_once <= 16 and len(list((tmp_path / "out" / "batches").iterdir())) == 13
    assert generate(server.url, data, tmp_path / "out", limit=20, **more)[0] == 0
    assert len(server.requests) == 200 and [row["n"] for row in rows(tmp_path / "out")] == list(range(20))


def test_rows_that_change_where_the_prompt_does_not(server, tmp_path):
    """If one row of many changes, the data are refused. It also tests the names that a template may use."""
    lines = [{"prompt": f"Say {i}.", "range": "x", "hint": None if i % 2 else "!", "old": i} for i in range(1500)]
    file = tmp_path / "rows.jsonl"
    more = {"num_generations": 1, "input_batch_size": 500, "prompt_template": "{{ range }}{{ hint }} {{ instruction }}"}
    for change, code in ((1, 0), (7, 2), (1, 0)):
        lines[1]["old"] = change
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found, log = generate(server.url, file, tmp_path / "out", **more)
        assert found == code and (code == 0 or "holds results of other settings: rows" in log), log
        assert rows(tmp_path / "out")[1]["old"] == 1 and len(rows(tmp_path / "out")) == 1500
    assert len(server.requests) == 1500  # no request is repeated
    assert [r["messages"][0]["content"] for r in server.requests[:2]] == ["x! Say 0.", "x Say 1."]


def test_columns_of_any_type_come_out_as_they_went_in(server, tmp_path):
    file = tmp_path / "rows.jsonl"
    columns = {"mixed": [1, "a"], "ragged": [{"a": 1}, {"b": 2}], "tools": [[{"f": 1}], [{"g": "x"}]]}
    columns |= {"deep": [{"a": [{"x": 1}, {"y": [2]}]}, {"a": []}], "list": [[1, "a"], [2]], "none": [None, {"a": 1}]}
    given = [{"prompt": f"Say {i}."} | {column: cells[i] for column, cells in columns.items()} for i in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    code, log = generate(server.url, file, tmp_path / "out", input_batch_size=1)
    assert code == 0, log
    found = load_rows(str(tmp_path / "out" / "train.parquet"))
    assert [{column: row[column] for column in given[0]} for row in found] == given


def test_an_engine_in_process_needs_no_server(tiny_model, data, tmp_path):
    more = {"model": tiny_model, "engine": "torch", "max_new_tokens": 12, "limit": 10, "system_prompt": "Add."}
    code, log = generate("http://127.0.0.1:9/v1", data, tmp_path / "out", **more)
    assert code == 0, log
    found = rows(tmp_path / "out")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "Say 9."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    engine = make_engine("torch", EngineConfig(tiny_model, max_model_len=200, dtype="float32"))
    sampling = Sampling(2, 12, temperature=0.7, stop_ids={tokenizer.eos_token_id})
    [group] = engine.sample([prompt], sampling, seeds=[1_000_003 + 18])
    assert found[9]["generation"] == [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in group]
    said = found[9]["distilabel_metadata"]
    assert [m["finish_reason_text_generation_0"] for m in said] == [c.finish_reason for c in group]
    assert said[0]["statistics_text_generation_0"] == {
        "input_tokens": len(prompt),
        "output_tokens": len(group[0].token_ids),
    }
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Say 1.", "Say 2. " * 60)))
    for _ in range(2):  # no missing prompt fits, but the finished ones must not be refused
        code, log = generate("http://127.0.0.1:9/v1", file, tmp_path / "some", **(more | {"limit": 2}))
        assert code == 0 and "failed prompts          1" in log and len(rows(tmp_path / "some")) == 1, log
    code, log = generate("http://127.0.0.1:9/v1", data, tmp_path / "long", **(more | {"max_new_tokens": 250}))
    assert code == 2 and "lower --max-new-tokens" in log, log


def test_the_pipeline_has_the_face_of_distilabels(server, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = build_distilabel_pipeline("served", server.url, "prompt", num_generations=3, timeout=5)
    given = [json.loads(line) for line in data.read_text().splitlines()[:20]]
    result = pipeline.run(dataset=given, dataset_batch_size=64_000, use_cache=False)
    train = result["default"]["train"]
    assert train.column_names == ["prompt", "n", "why", "generation", "distilabel_metadata", "model_name"]
    assert train[3]["model_name"] == "served" and len(train[3]["generation"]) == 3 and len(train) == 20
    said = train[3]["distilabel_metadata"]
    assert len(said) == 3 and list(said[0]) == [
        "raw_output_text_generation_0",
        "raw_input_text_generation_0",
        "statistics_text_generation_0",
        "finish_reason_text_generation_0",
    ]
    assert said[0]["raw_input_text_generation_0"] == [{"content": "Say 3.", "role": "user"}]
    assert said[0]["statistics_text_generation_0"] == {"input_tokens": 5, "output_tokens": 7}
    assert "seed" not in server.requests[0] and len(server.requests) == 60
    for _ in range(2):
        assert pipeline.run(dataset=given)["default"]["train"].to_list() == train.to_list()
    assert len(server.requests) == 120  # the second run with the cache sends no request
    pushed = []
    monkeypatch.setattr("datasets.DatasetDict.push_to_hub", lambda self, *a, **k: pushed.append((list(self), a, k)))
    result.push_to_hub("me/mine", private=True)
    assert pushed == [(["train"], ("me/mine",), {"config_name": "default", "private": True})]


def test_flags_are_open_r1s(tmp_path):
    argv = "--hf-dataset D --model M --vllm-server-url http://a/v1,http://b/v1 --private --prompt-column p"
    argv += " --vllm_server_url=http://c/v1 --input_batch_size 5 --client-replicas 2 --hf-output-dataset me/x"
    (config,) = parse((GenerateConfig,), argv.split())
    assert config.urls == ["http://a/v1", "http://b/v1", "http://c/v1"] and config.private and config.at_once == 10
    (config,) = parse((GenerateConfig,), ["--hf-dataset", "D", "--model", "M"])
    assert (config.hf_dataset_split, config.prompt_column, config.prompt_template) == (
        "train",
        "prompt",
        "{{ instruction }}",
    )
    assert (config.max_new_tokens, config.num_generations, config.timeout, config.retries, config.temperature) == (
        8192,
        1,
        600,
        0,
        None,
    )
    assert config.urls == ["http://localhost:8000/v1"] and config.at_once == 64
