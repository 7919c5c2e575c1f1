"""Completions, log-probabilities and other paths of an endpoint, against a real HTTP server on this machine."""

from __future__ import annotations

import json
import time

import pytest

from exitsafe.engine.completion import ChatReply, TokenLogprobs
from exitsafe.engine.endpoint import ChatRequest, Endpoint
from exitsafe.errors import InputError, RunError
from tests.engine.test_endpoint import TALK, free_port, quick_and_clean  # noqa: F401
from tests.judges.chat_server import SECRET, Answer, ChatServer, serving


def test_complete_takes_cut_off_replies_and_reads_what_the_endpoint_says() -> None:
    top = [{"token": "fi", "logprob": -0.1}, {"token": "x", "id": 9, "logprob": -2}]
    token = {"token": "fi", "id": 4, "logprob": -0.1, "top_logprobs": top}
    choice = {"message": {"content": ""}, "finish_reason": "length", "logprobs": {"content": [token]}}
    body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}, "model": "m-1"})
    server = ChatServer(lambda _, number: Answer(body=body.encode()))
    parts = [{"type": "text", "text": SECRET}]
    with serving(server) as url:
        request = ChatRequest(
            messages=[{"role": "user", "content": parts}],
            max_tokens=1,
            temperature=0.5,
            seed=3,
            top_logprobs=2,
            extra={"cache_prompt": False},
        )
        ((index, reply),) = Endpoint("m", base_url=url).complete([request])
    logprobs = (TokenLogprobs(text="fi", token_id=4, logprob=-0.1, top=(("fi", None, -0.1), ("x", 9, -2.0))),)
    assert (index, reply) == (
        0,
        ChatReply(text="", finish_reason="length", num_tokens=1, num_prompt_tokens=7, logprobs=logprobs, model="m-1"),
    )
    (sent,) = server.requests
    assert sent["messages"] == [{"role": "user", "content": parts}]
    assert {name: sent[name] for name in ("max_tokens", "temperature", "seed", "top_logprobs", "cache_prompt")} == {
        "max_tokens": 1,
        "temperature": 0.5,
        "seed": 3,
        "top_logprobs": 2,
        "cache_prompt": False,
    }


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": [{"token": 1}]}, [], "x"])
def test_unreadable_logprobs_count_as_none(logprobs: object) -> None:
    body = json.dumps({"choices": [{"message": {"content": "fine"}, "logprobs": logprobs}]}).encode()
    with serving(ChatServer(lambda *_: Answer(body=body))) as url:
        ((_, reply),) = Endpoint("m", base_url=url).complete([ChatRequest(messages=TALK, top_logprobs=2)])
    assert (reply.text, reply.logprobs, reply.finish_reason) == ("fine", None, "stop")


def test_replies_come_as_they_finish_and_the_rest_is_dropped_when_no_more_are_wanted() -> None:
    server = ChatServer(lambda _, number: Answer(text=str(number), wait=0.0 if number else 0.3))
    with serving(server) as url:
        replies = Endpoint("m", base_url=url, concurrency=2).complete([ChatRequest(messages=TALK)] * 50)
        assert next(replies)[0] != 0 or server.requests
        assert next(replies)[1].text != ""
        replies.close()  # type: ignore[attr-defined]
        seen = len(server.requests)
        time.sleep(0.2)
        assert len(server.requests) == seen < 50


@pytest.mark.parametrize(
    ("status", "body", "error", "line"),
    [
        (404, b"{}", InputError, "status 404 at /version"),
        (401, b"{}", InputError, "rejects the key"),
        (200, b"<html>", InputError, "does not answer with JSON at /version"),
        (200, b"[]", InputError, "does not answer with JSON"),
    ],
)
def test_other_paths_are_json_or_one_line(status: int, body: bytes, error: type[Exception], line: str) -> None:
    with serving(ChatServer(lambda *_: Answer()), paths={"/version": Answer(status=status, body=body)}) as url:
        with pytest.raises(error, match=line) as raised:
            Endpoint("m", base_url=url, max_retries=0).get_json("/../version")
        assert SECRET not in str(raised.value)


def test_other_paths_lie_beside_or_below_the_base_url() -> None:
    paths = {"/version": Answer(body=b'{"version": "1"}'), "/v1/models": Answer(body=b'{"data": []}')}
    with serving(ChatServer(lambda *_: Answer()), paths=paths) as url:
        endpoint = Endpoint("m", base_url=url)
        assert endpoint.get_json("/../version") == {"version": "1"}
        assert endpoint.post_json("/models", {"a": 1}) == {"data": []}
    with pytest.raises(RunError, match="could not be reached"):
        Endpoint("m", base_url=f"http://127.0.0.1:{free_port()}/v1", max_retries=0).get_json("/models")
