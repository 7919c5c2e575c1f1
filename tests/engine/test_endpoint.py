"""The endpoint's client against a real HTTP server on this machine."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from exitsafe.engine.completion import Reply
from exitsafe.engine.endpoint import MAX_FAILURES, Endpoint
from exitsafe.engine.transfer import MAX_BYTES, Pace
from exitsafe.errors import InputError, RunError
from tests.judges.chat_server import SECRET, Answer, ChatServer, failing, serving

TALK = [{"role": "user", "content": SECRET}]


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key from outside, no proxy, and retries that wait for moments only."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("exitsafe.engine.endpoint.BODY_RETRY_DELAY", 0.01, raising=False)


def ask(script: Callable[[dict[str, Any], int], Answer], num: int = 1, **settings: Any) -> tuple[Any, Any, Any]:
    """Replies, the server and the endpoint after asking `num` times."""
    server = ChatServer(script)
    with serving(server) as url:
        endpoint = Endpoint("m", base_url=url, **settings)
        talks = [[{"role": "user", "content": f"{SECRET} {number}"}] for number in range(num)]
        return endpoint.ask(talks), server, endpoint


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_replies_come_in_order_though_answers_come_late() -> None:
    def script(body: dict[str, Any], number: int) -> Answer:
        content = body["messages"][0]["content"]
        return Answer(text=content.upper(), wait=0.1 if content.endswith("0") else 0.0)

    replies, server, endpoint = ask(script, num=12)
    assert [reply.text for reply in replies] == [f"{SECRET} {number}".upper() for number in range(12)]
    assert all((body["model"], body["temperature"], body["seed"]) == ("m", 0, 0) for body in server.requests)
    assert (endpoint.usage.requests, endpoint.usage.tokens_in, endpoint.usage.tokens_out) == (12, 84, 36)


def test_429_is_waited_for_as_the_server_says() -> None:
    def script(_: dict[str, Any], number: int) -> Answer:
        return Answer(status=429, body=b"{}", headers={"Retry-After": "0.4"}) if number == 0 else Answer()

    replies, server, endpoint = ask(script)
    assert replies == [Reply(text="fine")]
    assert server.times[1] - server.times[0] >= 0.38  # our own first wait would have been 0.01
    assert endpoint.usage.requests == 2


@pytest.mark.parametrize("status", [500, 502, 503, 529, 408])
def test_passing_faults_are_tried_again(status: int) -> None:
    replies, _, endpoint = ask(lambda _, number: failing(status) if number < 2 else Answer())
    assert replies == [Reply(text="fine")]
    assert endpoint.usage.requests == 3


def choosing(message: str) -> bytes:
    return f'{{"choices": [{{"message": {message}}}]}}'.encode()


FAILURES: dict[tuple[str, int], list[Answer | bytes]] = {  # by reason and the number of requests, retries included
    ("the endpoint's rate limit was exceeded (status 429)", 3): [failing(429)],
    ("the endpoint's rate limit was exceeded (status 429)", 2): [b'{"error": {"code": "429"}}'],
    ("the endpoint failed (status 500)", 3): [failing(500)],
    ("the endpoint failed (status 503)", 2): [b'{"error": {"code": 503}}'],
    ("the endpoint refused the request (status 400)", 1): [failing(400)],
    ("the endpoint refused the request (status 403)", 1): [failing(403)],
    ("the endpoint's content filter refused", 1): [
        failing(400, code="content_filter"),
        b'{"error": {"code": "content_filter"}}',
        Answer(finish_reason="content_filter"),
    ],
    ("the endpoint answered with a web page", 1): [b"<html>zorb-secret-text"],
    ("the endpoint answered with an empty body", 2): [b""],
    ("the endpoint answered with an event stream", 1): [b'data: {"choices": []}\n\ndata: [DONE]', b": ping\n"],
    ("the endpoint's answer has no choices", 1): [b'{"choices": []}', b'{"choices": null, "usage": null}'],
    ("the endpoint's answer is not a chat completion", 1): [
        b'{"detail": "x"}',
        b'"choices"',
        b'{"choices": {"0": 1}}',
        choosing('{"content": [1]}'),
    ],
    ("the endpoint's answer is truncated or corrupt", 2): [
        b"\xff\xfe\x00",
        b'{"choices": [{"message": {"cont',
        Answer().encoded() + b"x",
        b"[" * 5000,
    ],
    ("the endpoint answered with an error (status 200)", 2): [
        b'{"choices": null, "error": "x"}',
        b'{"object": "error", "message": "x"}',
        b'{"choices": [{"message": {"content": "fi"}, "finish_reason": "error"}]}',
    ],
    ("the model refused to reply", 1): [choosing('{"content": null, "refusal": "zorb-secret-text"}')],
    ("the reply is empty", 1): [
        choosing('{"content": "", "reasoning": "zorb-secret-text"}'),
        Answer(text=" \n"),
        choosing('{"content": null}'),
    ],
    ("the reply was cut off", 1): [Answer(finish_reason="length")],
}


@pytest.mark.parametrize(
    ("failure", "requests", "answer"),
    [(*outcome, answer) for outcome, answers in FAILURES.items() for answer in answers],
)
def test_what_fails_has_a_reason_without_any_text(failure: str, requests: int, answer: Answer | bytes) -> None:
    said = Answer(body=answer) if isinstance(answer, bytes) else answer
    replies, server, _ = ask(lambda _, number: said, max_retries=2)
    assert replies == [Reply(failure=failure)]
    assert SECRET not in failure
    assert len(server.requests) == requests


def test_a_slow_answer_times_out_and_the_others_are_kept() -> None:
    def script(body: dict[str, Any], _: int) -> Answer:
        return Answer(wait=1.5 if body["messages"][0]["content"].endswith(" 1") else 0.0)

    replies, _, endpoint = ask(script, num=3, timeout=0.3, max_retries=1)
    assert [reply.failure for reply in replies] == [None, "the endpoint timed out", None]
    assert endpoint.usage.requests == 4


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (failing(401), InputError, r"rejects the key \(status 401\): set OPENAI_API_KEY"),
        (failing(404), InputError, r"has no model m \(status 404\): check the model's name and the base URL"),
        (failing(402), RunError, "no credit left"),
        (failing(429, code="insufficient_quota"), RunError, r"no credit left \(status 429\)"),
        (Answer(body=b'{"error": {"code": 401}}'), InputError, "rejects the key"),
        (Answer(body=b'{"error": {"code": "insufficient_quota"}}'), RunError, "no credit left"),
        (
            failing(400, param="temperature", code="unsupported_value"),
            InputError,
            "m does not accept temperature 0: choose",
        ),
    ],
)
def test_what_would_fail_every_time_stops_with_one_line(
    answer: Answer, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-zorb-key")
    with pytest.raises(kind, match=message) as caught:
        ask(lambda _, number: answer, num=40, max_retries=1)
    assert SECRET not in str(caught.value)
    assert "sk-zorb-key" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__  # the client's error may quote what was sent


def test_an_error_stops_those_that_wait() -> None:
    def script(body: dict[str, Any], _: int) -> Answer:
        is_first = body["messages"][0]["content"].endswith(" 0")
        answer = Answer(status=429, body=b"{}", headers={"Retry-After": "60"})
        return Answer(status=401, body=b"{}", wait=0.2) if is_first else answer

    start = time.monotonic()
    with pytest.raises(InputError, match="rejects the key"):
        ask(script, num=8)
    assert time.monotonic() - start < 20


def test_an_endpoint_that_is_down_stops_with_one_line() -> None:
    endpoint = Endpoint("m", base_url=f"http://127.0.0.1:{free_port()}/v1", max_retries=1)
    with pytest.raises(RunError, match=r"^http://127.0.0.1:\d+/v1 does not answer \(the endpoint could not be reached"):
        endpoint.ask([TALK] * 3)


@pytest.mark.parametrize("status", [400, 403, 429, 500])
def test_failures_without_end_stop_instead_of_unscoring_everything(status: int) -> None:
    with pytest.raises(RunError, match=rf"{MAX_FAILURES} times in a row\); the responses are saved"):
        ask(lambda _, number: failing(status), num=MAX_FAILURES + 20, max_retries=0)


BAD_BODIES = {
    "error": b'{"error": {"message": "zorb-secret-text", "code": "overloaded"}}',
    "no choices": b'{"choices": null}',
    "event stream": b'data: {"choices": [{"delta": {"content": "zorb-secret-text"}}]}\n\ndata: [DONE]\n\n',
    "web page": b"<!DOCTYPE html><title>zorb-secret-text</title>",
    "empty body": b"",
    "truncated": Answer().encoded()[:-9],
    "not a chat completion": b'{"text": "zorb-secret-text"}',
}


@pytest.mark.parametrize("has_answered", [False, True])
@pytest.mark.parametrize("body", BAD_BODIES)
def test_bodies_without_a_completion_stop_before_all_is_paid_for(body: str, has_answered: bool) -> None:
    sent = 0

    def script(_: dict[str, Any], number: int) -> Answer:
        nonlocal sent
        sent += 1
        return Answer() if number == 0 and has_answered else Answer(body=BAD_BODIES[body])

    with pytest.raises(RunError, match=rf"^http://127\.0\.0\.1:\d+/v1 .*{body}.*8 times in a row") as caught:
        ask(script, num=40, max_retries=0, concurrency=1)
    assert SECRET not in str(caught.value)
    assert sent == 8 + has_answered


@pytest.mark.parametrize("answer", [Answer(text=""), Answer(text="half a", finish_reason="length")])
def test_a_model_that_says_nothing_usable_is_not_paid_for_to_the_end(answer: Answer) -> None:
    with pytest.raises(RunError, match="8 times in a row"):
        ask(lambda _, number: answer, num=40, concurrency=1)
    replies, _, _ = ask(lambda _, number: answer if number else Answer(), num=12, concurrency=1)
    assert len([reply for reply in replies if reply.failure]) == 11  # after a good one it may be these requests


@pytest.mark.parametrize("body", ["error", "empty body", "truncated"])
def test_a_body_that_may_be_better_next_time_is_asked_for_again(body: str) -> None:
    replies, _, endpoint = ask(lambda _, number: Answer() if number else Answer(body=BAD_BODIES[body]))
    assert replies == [Reply(text="fine")]
    assert (endpoint.usage.requests, endpoint.usage.uncounted) == (2, 0)


@pytest.mark.parametrize(
    ("kind", "piece", "failure"),
    [
        ("text/event-stream", b": ping\n\n", "the endpoint answered with an event stream"),
        ("application/json", b" ", "the endpoint timed out"),
    ],
)
def test_an_answer_without_end_is_left(kind: str, piece: bytes, failure: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(piece)
                    time.sleep(0.02)
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    endpoint = Endpoint("m", base_url=f"http://127.0.0.1:{http.server_port}/v1", timeout=0.3, max_retries=1)
    start = time.monotonic()
    try:
        assert endpoint.ask([TALK]) == [Reply(failure=failure)]
        with pytest.raises((InputError, RunError)):
            endpoint.post_json("/tokenize", {})
    finally:
        http.shutdown()
        http.server_close()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("status", [200, 400])
def test_a_small_body_that_unpacks_to_a_large_one_is_left(status: int) -> None:
    packed = gzip.compress(b" " * (MAX_BYTES + 1))
    said = Answer(status=status, body=packed, headers={"Content-Encoding": "gzip"})
    with serving(ChatServer(lambda *_: said), paths={"/v1/models": said}) as url:
        endpoint = Endpoint("m", base_url=url)
        assert endpoint.ask([TALK]) == [Reply(failure="the endpoint's answer is larger than 16 MiB")]
        with pytest.raises(InputError, match="does not answer with JSON at /models"):
            endpoint.get_json("/models")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_texts_and_key_go_to_no_other_address(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-zorb-key")
    other = ChatServer(lambda *_: Answer())
    with serving(other, paths={"/v1/models": Answer(body=b'{"data": []}')}) as elsewhere:
        moved = Answer(status=status, headers={"Location": f"{elsewhere}/chat/completions"})
        listed = Answer(status=status, headers={"Location": f"{elsewhere}/models"})
        with serving(ChatServer(lambda *_: moved), paths={"/v1/models": listed}) as url:
            endpoint = Endpoint("m", base_url=url)
            with pytest.raises(InputError, match=rf"redirects to another address \(status {status}\)"):
                endpoint.ask([TALK])
            with pytest.raises(InputError, match=f"answers status {status} at /models"):
                endpoint.get_json("/models")
    assert not other.requests


def completion(**changes: Any) -> bytes:
    choice = {"message": {"content": "fine"} | changes.pop("message", {}), "finish_reason": "stop"}
    return json.dumps({"choices": [choice]} | changes).encode()


COUNTED = {"prompt_tokens": 7, "completion_tokens": 3}


@pytest.mark.parametrize(
    ("body", "uncounted"),
    [
        (completion(usage=COUNTED, error=None), 0),
        (completion(usage=COUNTED, error={"message": None, "code": None}), 0),
        (completion(usage={"prompt_tokens": 7.0, "completion_tokens": "3"}), 0),
        (completion(usage=None), 1),
        (completion(), 1),
        (completion(usage={}), 1),
        (completion(usage=[]), 1),
        (completion(usage={"prompt_tokens": 7.5, "completion_tokens": -3}), 1),
        (completion(usage={"prompt_tokens": None, "completion_tokens": True}), 1),
        (completion(usage={"prompt_tokens": 10**400, "completion_tokens": "1" * 5000}), 1),
        (b"\xef\xbb\xbf" + completion(usage=COUNTED), 0),
        (completion(usage=COUNTED).decode().encode("utf-16"), 0),
        (b"\n \n" + completion(usage=COUNTED) + b"\n\n", 0),
        (completion(usage=COUNTED) + b"\n[DONE]\n", 0),
        (completion(usage=COUNTED) + b"\n\ndata: [DONE]\n\n", 0),
        (completion(usage=COUNTED, message={"content": [{"type": "text", "text": "fine"}]}), 0),
        (
            completion(
                usage=COUNTED,
                message={
                    "content": [
                        {"type": "thinking", "thinking": [{"type": "text", "text": "score: 1"}]},
                        {"type": "reasoning", "text": None},
                        {"type": "text", "text": "fi"},
                        {"type": "output_text", "text": "ne"},
                    ]
                },
            ),
            0,
        ),
        (completion(usage=COUNTED, message={"reasoning_content": "score: 1", "refusal": None, "tool_calls": []}), 0),
    ],
)
def test_a_sound_reply_is_read_whatever_surrounds_it(body: bytes, uncounted: int) -> None:
    replies, server, endpoint = ask(lambda _, number: Answer(body=body), prices=(1.0, 1.0))
    assert replies == [Reply(text="fine")]
    assert endpoint.usage.uncounted == uncounted
    assert (endpoint.usage.tokens_in, endpoint.usage.tokens_out) == ((0, 0) if uncounted else (7, 3))
    assert endpoint.cost is not None
    assert server.requests[0]["stream"] is False


def test_failures_between_answers_do_not_stop() -> None:
    replies, _, _ = ask(
        lambda _, number: failing(500) if number % 8 else Answer(), num=48, max_retries=0, concurrency=1
    )
    assert sum(reply.failure is None for reply in replies) == 6


def test_refusals_after_an_answer_are_of_single_requests() -> None:
    replies, _, _ = ask(lambda _, number: failing(403) if number else Answer(), num=MAX_FAILURES + 5, concurrency=1)
    assert [reply.failure is None for reply in replies].count(True) == 1


def test_a_seed_that_is_not_taken_is_left_out() -> None:
    def script(body: dict[str, Any], _: int) -> Answer:
        return failing(400, message="Unrecognized request argument supplied: seed") if "seed" in body else Answer()

    replies, server, _ = ask(script, num=6, concurrency=2)
    assert [reply.text for reply in replies] == ["fine"] * 6
    assert sum("seed" in body for body in server.requests) <= 2  # those on their way when it was found out


def test_temperature_none_is_not_sent() -> None:
    _, server, _ = ask(lambda _, number: Answer(), temperature=None)
    assert "temperature" not in server.requests[0]


def test_no_more_requests_at_once_than_allowed() -> None:
    _, server, _ = ask(lambda _, number: Answer(wait=0.05), num=12, concurrency=3)
    assert server.most_at_once == 3


def test_requests_keep_their_pace_retries_too() -> None:
    def script(_: dict[str, Any], number: int) -> Answer:
        return failing(500) if number == 1 else Answer()

    _, server, _ = ask(script, num=4, requests_per_minute=600)  # one in 0.1 s
    assert len(server.requests) == 5
    assert server.times[-1] - server.times[0] >= 0.35


def test_pace_counts_places(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("exitsafe.engine.transfer.time.monotonic", lambda: now[0])
    pace = Pace(30)
    assert [pace.delay() for _ in range(3)] == [0.0, 2.0, 4.0]
    now[0] = 103.0
    assert pace.delay() == 3.0
    now[0] = 500.0
    assert pace.delay() == 0.0
    assert [Pace(None).delay() for _ in range(2)] == [0.0, 0.0]


def test_cost_counts_every_reply() -> None:
    def script(_: dict[str, Any], number: int) -> Answer:
        return Answer(finish_reason="length") if number else Answer(usage=None)

    _, _, endpoint = ask(script, num=3, prices=(1000.0, 10_000.0), concurrency=1)
    # two counted replies of 7 tokens in and 3 out: 14 x 0.001 + 6 x 0.01
    assert endpoint.cost == pytest.approx(0.074)
    assert (endpoint.usage.tokens_in, endpoint.usage.tokens_out, endpoint.usage.uncounted) == (14, 6, 1)
    assert Endpoint("m", base_url="http://x/v1").cost is None


def test_the_key_goes_into_the_header_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-zorb-key")
    _, server, endpoint = ask(lambda _, number: Answer())
    assert server.keys == ["Bearer sk-zorb-key"]
    assert "sk-zorb-key" not in repr(vars(endpoint))


def test_a_local_server_needs_no_key_and_openai_does(monkeypatch: pytest.MonkeyPatch) -> None:
    Endpoint("m", base_url="http://127.0.0.1:1/v1").check()
    with pytest.raises(InputError, match="set OPENAI_API_KEY, or OPENAI_BASE_URL"):
        Endpoint("m").ask([TALK])
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1/")
    assert Endpoint("m").base_url == "http://127.0.0.1:1/v1"


@pytest.mark.parametrize(
    "url",
    ("https://me:secret@example.org/v1", "https://example.org/v1?key=secret", "http://[::1/v1#secret", "http://h\x1b/"),
)
def test_an_address_with_more_than_an_address_in_it_is_refused_unseen(url: str) -> None:
    with pytest.raises(InputError, match="must not contain a user name, password, query") as caught:
        Endpoint("m", base_url=url)
    assert "secret" not in str(caught.value)
    assert Endpoint("m", base_url="https://example.org:8443/v1/").where == "https://example.org:8443/v1"


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitsafe.engine.endpoint.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "exitsafe\[endpoint\]"'):
        Endpoint("m", base_url="http://127.0.0.1:1/v1").check()


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("m", {"base_url": "127.0.0.1:8000"}, "must begin with http"),
        ("m", {"requests_per_minute": 0}, "must be above 0"),
        ("m", {"requests_per_minute": float("nan")}, "must be above 0"),
        ("m", {"concurrency": 0}, "concurrency of at least 1"),
        ("", {}, "needs the name of a model"),
    ],
)
def test_settings_that_cannot_be_are_refused(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Endpoint(model, **settings)


def test_half_characters_are_sent_as_question_marks() -> None:
    server = ChatServer(lambda body, _: Answer(text=body["messages"][0]["content"]))
    with serving(server) as url:
        (reply,) = Endpoint("m", base_url=url).ask([[{"role": "user", "content": "a\ud800é\u4e00"}]])
    assert reply.text == "a?é\u4e00"


def test_it_works_where_a_loop_runs_already() -> None:
    server = ChatServer(lambda _, number: Answer())

    async def notebook(url: str) -> list[Reply]:
        return Endpoint("m", base_url=url).ask([TALK])

    with serving(server) as url:
        assert asyncio.run(notebook(url)) == [Reply(text="fine")]


def test_nothing_to_ask_asks_nothing() -> None:
    assert Endpoint("m", base_url=f"http://127.0.0.1:{free_port()}/v1").ask([]) == []
