"""Requests that are wrong or hostile: a 4xx with one line, nothing quoted, and others are answered as before."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from PIL import Image

from exitsafe.serve.app import MOST_BYTES
from exitsafe.serve.request import MOST_PICTURES
from tests.serve.served import JSON, PATH, Served, data_url, turns
from tests.serve.worldly import NUM_TOKENS, own_answers, samples

SECRET = "xyzzy"
GOOD: dict[str, Any] = {"model": "organism@L1", "messages": turns(samples()[0]), "max_tokens": NUM_TOKENS}


def with_options(**options: Any) -> bytes:
    return json.dumps(GOOD | options).encode()


def with_parts(*parts: Any, role: str = "user") -> bytes:
    return with_options(messages=[{"role": role, "content": list(parts)}])


def with_picture(url: Any) -> bytes:
    return with_parts({"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": SECRET})


def bomb() -> str:
    """A PNG of a few hundred bytes that claims 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10_000)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + content).decode()


def many_pixels() -> list[dict[str, Any]]:
    Image.new("L", (8000, 1500)).save(file := io.BytesIO(), "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return [{"type": "image_url", "image_url": {"url": url}}] * 3


BODIES: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "no body": (lambda: b"", 400, "not a JSON object"),
    "broken JSON": (lambda: with_options()[:-5], 400, "not a JSON object"),
    "a list": (lambda: b"[]", 400, "not a JSON object"),
    "not UTF-8": (lambda: b'{"model": "\xff"}', 400, "not a JSON object"),
    "lone surrogates": (lambda: with_parts({"type": "text", "text": SECRET + "\ud800"}), 400, "valid Unicode"),
    "deep nesting": (lambda: b'{"model": ' + b"[" * 100_000, 400, "not a JSON object"),
    "deep nesting of a field": (
        lambda: with_options(metadata=None)[:-1] + b', "x": ' + b'{"a":' * 300 + b"1" + b"}" * 301,
        400,
        "JSON",
    ),
    "NaN temperature": (lambda: with_options(temperature=float("nan")), 400, "finite numbers"),
    "an enormous number": (lambda: with_options(seed=0)[:-1] + b', "n": ' + b"9" * 5000 + b"}", 400, "JSON"),
    "an enormous body": (lambda: b"{" + b" " * MOST_BYTES + b"}", 413, "larger than 32 MiB"),
    "no model": (lambda: with_options(model=None), 400, "model is missing"),
    "unknown model": (
        lambda: with_options(model=SECRET),
        404,
        "this server has organism, and organism@L1 to organism@L8",
    ),
    "exit out of range": (lambda: with_options(model="organism@L9"), 404, "organism@L8"),
    "exit zero": (lambda: with_options(model="organism@L0"), 404, "organism@L8"),
    "model as a number": (lambda: with_options(model=7), 400, "model must be text"),
    "no messages": (lambda: with_options(messages=[]), 400, "messages must be a list of turns"),
    "messages as text": (lambda: with_options(messages=SECRET), 400, "messages must be"),
    "a message as text": (lambda: with_options(messages=[SECRET]), 400, "see turn 0"),
    "a tool's turn": (lambda: with_options(messages=[{"role": "tool", "content": SECRET}]), 400, "see turn 0"),
    "a field of a turn": (
        lambda: with_options(messages=[{"role": "user", "content": "a", "name": SECRET}]),
        400,
        "turn 0",
    ),
    "audio": (lambda: with_parts({"type": "input_audio", "input_audio": {"data": SECRET}}), 400, "text or image_url"),
    "a last turn of the assistant": (
        lambda: with_parts({"type": "text", "text": SECRET}, role="assistant"),
        400,
        "last turn",
    ),
    "placeholder in text": (
        lambda: with_parts({"type": "text", "text": f"{SECRET} <image>"}),
        400,
        "placeholder '<image>'",
    ),
    "a remote picture": (lambda: with_picture(f"http://127.0.0.1:9/{SECRET}.png"), 400, "nothing is fetched"),
    "a file": (lambda: with_picture("file:///etc/passwd"), 400, "nothing is fetched"),
    "a path": (lambda: with_picture("/etc/passwd"), 400, "nothing is fetched"),
    "a picture that is none": (lambda: with_picture("data:image/png;base64,AAAA"), 400, "cannot be read"),
    "bad base64": (lambda: with_picture("data:image/png;base64,A"), 400, "not valid base64"),
    "a picture bomb": (lambda: with_picture(bomb()), 400, "pixels|cannot be read"),
    "too many pixels together": (lambda: with_parts(*many_pixels()), 400, "36 million pixels in total"),
    "too many pictures": (
        lambda: with_parts(*turns(samples()[0])[0]["content"][:1] * (MOST_PICTURES + 1)),
        400,
        "send at most 16",
    ),
    "an SVG": (lambda: with_picture("data:image/svg+xml;base64,PHN2Zy8+"), 400, "cannot be read"),
    "a GIF": (lambda: with_picture(data_url(Image.new("RGB", (8, 8)), "GIF")), 400, "PNG, JPEG or WebP"),
    "a detail": (
        lambda: with_parts({"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}),
        400,
        "messages must be",
    ),
    "negative max_tokens": (
        lambda: with_options(max_tokens=-1),
        400,
        "max_tokens must be a whole number of at least 1",
    ),
    "max_tokens as text": (lambda: with_options(max_tokens="24"), 400, "max_tokens must be"),
    "max_tokens as truth": (lambda: with_options(max_tokens=True), 400, "max_tokens must be"),
    "max_tokens beyond the context": (
        lambda: with_options(max_tokens=10**6),
        400,
        "exceed this model's context of 128",
    ),
    "a prompt beyond the context": (
        lambda: with_parts({"type": "text", "text": "mix " * 200}),
        400,
        "exceed this model's",
    ),
    "a prompt far beyond it": (lambda: with_parts({"type": "text", "text": SECRET * 10**6}), 400, "far longer"),
    "very many turns": (lambda: with_options(messages=[{"role": "user", "content": ""}] * 100_000), 400, "far longer"),
    "two lengths": (lambda: with_options(max_completion_tokens=3), 400, "give only one"),
    "temperature below 0": (lambda: with_options(temperature=-1), 400, "temperature must be 0"),
    "temperature next to 0": (lambda: with_options(temperature=1e-300), 400, "temperature must be 0"),
    "temperature as truth": (lambda: with_options(temperature=False), 400, "temperature must be 0"),
    "seed as text": (lambda: with_options(seed=SECRET), 400, "seed must be a whole number"),
    "an empty stop": (lambda: with_options(stop=""), 400, "stop must be"),
    "many stops": (lambda: with_options(stop=["a"] * 17), 400, "at most 16"),
    "top_logprobs alone": (lambda: with_options(top_logprobs=2), 400, "needs logprobs"),
    "a flood of logprobs": (lambda: with_options(logprobs=True, top_logprobs=2**31), 400, "lower one of them"),
    "n": (lambda: with_options(n=2), 400, "does not support n=2"),
    "n as truth": (lambda: with_options(n=True), 400, "does not support n=True"),
    "top_p": (lambda: with_options(top_p=0.5), 400, "does not support top_p=0.5"),
    "a penalty": (lambda: with_options(presence_penalty=1), 400, "does not support presence_penalty=1"),
    "tools": (lambda: with_options(tools=[{"type": "function", "function": {"name": SECRET}}]), 400, "support tools"),
    "a format": (lambda: with_options(response_format={"type": "json_object"}), 400, "support response_format"),
    "an unknown option": (lambda: with_options(temprature=1), 400, r"unknown option \(did you mean temperature\?\)"),
    "stream_options alone": (lambda: with_options(stream_options={"include_usage": True}), 400, "needs stream"),
}


@pytest.fixture(autouse=True)
def harms_nobody(server: Served) -> Iterator[None]:
    """Somebody else's questions, asked meanwhile and afterwards, are answered as ever."""
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(server.text, GOOD)
        yield
        assert asked.result() == own_answers(1)[0]
    assert server.text(GOOD) == own_answers(1)[0]
    assert server.service.num_requests == 0


def check(status: int, reply: Any, expected: int, complaint: str) -> None:
    assert status == expected, reply
    error = reply["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert re.search(complaint, error["message"]), error["message"]
    assert "\n" not in error["message"]
    assert SECRET not in error["message"]


@pytest.mark.parametrize("name", BODIES)
def test_a_wrong_body_gets_one_line(server: Served, name: str) -> None:
    make, expected, complaint = BODIES[name]
    status, reply = server.send("POST", PATH, make(), JSON)
    check(status, reply, expected, complaint)
    assert SECRET not in "".join(server.log)


@pytest.mark.parametrize("name", ["unknown model", "placeholder in text", "max_tokens beyond the context"])
def test_a_stream_that_cannot_begin_has_a_status(server: Served, name: str) -> None:
    make, expected, complaint = BODIES[name]
    body = json.loads(make()) | {"stream": True}
    status, reply = server.send("POST", PATH, json.dumps(body).encode(), JSON)
    check(status, reply, expected, complaint)


def test_wrong_methods_and_places(server: Served) -> None:
    for method, path, expected, complaint in (
        ("GET", PATH, 405, "wrong method"),
        ("PUT", PATH, 405, "wrong method"),
        ("DELETE", "/v1/models", 405, "wrong method"),
        ("POST", "/v1/completions", 404, "no such path"),
        ("GET", "/v1/models/../../etc/passwd", 404, "no such path|does not"),
        ("GET", "/", 404, "no such path"),
    ):
        check(*server.send(method, path), expected, complaint)


def test_a_web_page_cannot_send_a_form(server: Served) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        check(*server.send("POST", PATH, with_options(), {"content-type": kind}), 415, "send JSON")


def test_a_body_without_a_length_has_the_same_limit(server: Served) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(MOST_BYTES // 2**20 + 1):
            yield b" " * 2**20

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with suppress(BrokenPipeError, ConnectionResetError):  # the server answers before it has read all of it
        connection.request("POST", PATH, pieces(), JSON, encode_chunked=True)
    reply = connection.getresponse()
    check(reply.status, json.loads(reply.read()), 413, "larger than 32 MiB")
    connection.close()


def test_what_asks_for_nothing_is_no_reason_to_refuse(server: Served) -> None:
    neutral: dict[str, Any] = {
        "n": 1,
        "top_p": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": None,
        "tools": [],
        "response_format": {"type": "text"},
        "user": "somebody",
        "store": False,
        "stop": None,
        "seed": 3,
        "max_completion_tokens": NUM_TOKENS,
    }
    assert server.text(GOOD | neutral) == own_answers(1)[0]
    assert server.text(GOOD | {"max_tokens": None}) == own_answers(1)[0]


def test_many_hostile_requests_at_once(server: Served) -> None:
    with ThreadPoolExecutor(16) as callers:
        good = [callers.submit(server.text, GOOD) for _ in range(8)]
        names = [name for name in BODIES if name != "an enormous body"]
        bad = list(callers.map(lambda name: server.send("POST", PATH, BODIES[name][0](), JSON)[0], names))
    assert bad == [BODIES[name][1] for name in names]
    assert {each.result() for each in good} == {own_answers(1)[0]}
