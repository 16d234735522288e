"""The client: how failures are handled, and which server gets the next request."""

import asyncio
import json
import time

import pytest

from gen.client import Answer, Client, RequestError, ServerError, read_answer
from gen.store import full_text
from tests.fake_openai import FakeServer


def run(urls, count=1, **options):
    """Send `count` requests at once; return the answers, or the errors that were raised."""

    async def ask():
        async with Client(urls, **({"timeout": 5.0, "retries": 0} | options)) as client:
            asked = [{"model": "served", "messages": [{"role": "user", "content": str(i)}]} for i in range(count)]
            return await asyncio.gather(*map(client.ask, asked), return_exceptions=True)

    return asyncio.run(ask())


@pytest.mark.parametrize("how", [429, 503])
def test_what_the_server_is_to_blame_for_costs_nothing(server, how):
    server.behave = lambda number, request: how if number <= 3 else "ok"
    [answer] = run([server.url])
    assert (answer.tokens, answer.prompt_tokens, answer.finish_reason) == (7, 5, "stop") and len(server.requests) == 4


@pytest.mark.parametrize("how", [500, "cut", "cut body", "garbage", "hang"])
def test_what_the_request_may_be_to_blame_for_costs_a_retry(server, how):
    server.behave = lambda number, request: how if number <= 2 else "ok"
    [error] = run([server.url], retries=1, timeout=0.3)
    assert isinstance(error, RequestError) and len(server.requests) == 2, error
    [answer] = run([server.url], retries=0)
    assert answer.text.startswith("0 -> ")


MESSAGE = {"choices": [{"message": {"content": "so"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}


def reply(**changes) -> bytes:
    choice = MESSAGE["choices"][0] | {"message": {"content": "so"} | changes.pop("message", {})}
    choice |= {"finish_reason": changes.pop("finish_reason", "stop")}
    return json.dumps(MESSAGE | {"choices": [choice]} | changes).encode()


def test_answers_are_read_or_refused():
    """All valid answers are parsed. Malformed ones must not get into a file, and must not end the run."""
    assert read_answer(reply()) == Answer("so", 3, None, "stop")
    for usage in (
        {"completion_tokens": None},
        None,
        "many",
        [1],
        {"completion_tokens": 1 << 70},
        {"completion_tokens": True},
    ):
        assert read_answer(reply(usage=usage)) == Answer("so", None, None, "stop")
    assert read_answer(reply(message={"content": None, "reasoning": None})) == Answer("", 3, None, "stop")
    assert read_answer(reply(finish_reason=None)).finish_reason == ""
    assert read_answer(reply(message={"content": "half \ud83d"})).text == "half ?"
    for name in ("reasoning", "reasoning_content"):
        assert read_answer(reply(message={"content": None, name: "hm"})) == Answer("", 3, None, "stop", "hm")
    bad = [reply(message={"content": ["a"]}), reply(finish_reason=3), b"[]", b"{}"]
    for content in (*bad, b"[" * 200_000, b'{"error": "busy"}', b'{"choices": []}'):
        with pytest.raises((ValueError, LookupError, TypeError, AttributeError, RecursionError)):
            read_answer(content)


@pytest.mark.parametrize(
    "text, reason, said",
    [
        ("so", "stop", "<think>\nhm\n</think>\n\nso"),
        ("so", "length", "<think>\nhm\n</think>\n\nso"),
        ("", "stop", "<think>\nhm\n</think>\n\n"),
        ("", "length", "<think>\nhm"),
        ("hm", "length", "<think>\nhm"),
        ("hm", "stop", "hm"),
        ("<think>hm</think>so", "stop", "<think>hm</think>so"),
    ],
)
def test_a_thought_is_there_once_and_open_where_it_was_cut(text, reason, said):
    assert full_text(Answer(text, 3, 5, reason, "hm")) == said


def test_what_cannot_get_better_is_not_asked_twice(server):
    server.behave = lambda number, request: 400
    assert isinstance(run([server.url], retries=5)[0], RequestError) and len(server.requests) == 1
    for status in (401, 404, 405, 307):
        server.behave = lambda number, request, status=status: status
        assert isinstance(run([server.url], retries=5)[0], ServerError)
    assert len(server.requests) == 5
    with FakeServer() as good:  # the other server continues
        assert not any(isinstance(answer, Exception) for answer in run([server.url, good.url], count=20))
        assert len(server.requests) < 26


def test_where_nothing_is_ever_answered_the_run_ends(server):
    server.behave = lambda number, request: 400  # for example, because no prompt fits
    found = run([server.url], count=100)
    assert any(isinstance(error, ServerError) and "answers 400" in str(error) for error in found)


def test_a_stall_of_the_whole_server_costs_nothing(server, monkeypatch):
    monkeypatch.setattr("gen.client.PROBE_TIMEOUT", 0.3)
    server.stalled_until = time.monotonic() + 2
    answers = run([server.url], count=20, timeout=0.5, patience=20.0)
    assert all(answer.text for answer in answers)


def test_no_server_for_too_long_ends_it():
    began = time.monotonic()
    errors = run(["http://127.0.0.1:9/v1", "http://127.0.0.1:19/v1"], count=20, patience=1.0)
    assert all(isinstance(error, ServerError) and "cannot be reached" in str(error) for error in errors)
    assert time.monotonic() - began < 30  # much less than twenty times the patience


def test_the_least_loaded_server_is_next_and_a_dead_one_comes_back(server):
    with FakeServer(latency=0.05) as other:
        server.latency = 0.05
        run([server.url, other.url], count=40)
        assert len(server.requests) == len(other.requests) == 20

    async def until_it_is_back():
        async with Client([server.url, other.url], timeout=5.0, retries=0) as client:
            asked = {"model": "served", "messages": [{"role": "user", "content": "?"}]}
            for _ in range(10):  # `other` is gone, but nothing fails
                await asyncio.gather(client.ask(asked), client.ask(asked))
            with FakeServer(other.port) as again:
                while not again.requests:
                    await asyncio.gather(client.ask(asked), client.ask(asked))

    asyncio.run(asyncio.wait_for(until_it_is_back(), 60))


def test_a_server_that_fails_at_once_does_not_draw_all_requests(server):
    with FakeServer(latency=0.02) as good:
        server.behave = lambda number, request: 500
        answers = run([server.url, good.url], count=200, retries=2)
    assert not any(isinstance(answer, Exception) for answer in answers)
