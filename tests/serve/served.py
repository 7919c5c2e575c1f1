"""A server on the organism in this process, and requests to it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

from exitsafe.engine.vlm import VLM
from exitsafe.records import Sample
from exitsafe.serve.app import Service, fingerprint, make_server, served_models
from exitsafe.serve.worker import Worker

PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@dataclass(frozen=True, kw_only=True)
class Served:
    """Where the server is; what it logs; and the service behind it."""

    port: int
    log: list[str]
    service: Service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def send(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON of the reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {} if headers is None else headers)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    def ask(self, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
        return self.send("POST", PATH, json.dumps(body).encode(), JSON | headers)

    def answer(self, body: dict[str, Any]) -> Any:
        """The reply to a request that must succeed."""
        status, reply = self.ask(body)
        assert status == 200, reply
        return reply

    def text(self, body: dict[str, Any]) -> str:
        return str(self.answer(body)["choices"][0]["message"]["content"])

    def stream(self, body: dict[str, Any]) -> list[Any]:
        """The chunks of a streamed answer, which ends with [DONE]."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", PATH, json.dumps(body | {"stream": True}).encode(), JSON)
            reply = connection.getresponse()
            assert reply.headers["content-type"].startswith("text/event-stream")
            events = [line.removeprefix("data: ") for line in reply.read().decode().split("\n\n") if line]
        finally:
            connection.close()
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]


@contextmanager
def serving(vlm: VLM, *, key: str | None = None) -> Iterator[Served]:
    """A server on a free port, which has stopped and joined its threads afterwards."""
    listening = socket.create_server(("127.0.0.1", 0))
    log: list[str] = []
    worker = Worker(vlm)
    service = Service(
        worker=worker,
        models=served_models(vlm),
        fingerprint=fingerprint(vlm),
        key=key,
        is_local=True,
        log=log.append,
    )
    server = make_server(service)
    thread = Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    until(lambda: server.started)
    try:
        yield Served(port=listening.getsockname()[1], log=log, service=service)
    finally:
        server.should_exit = True
        thread.join()
        worker.close()


def until(is_true: Any, seconds: float = 30.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def data_url(image: Any, kind: str = "PNG") -> str:
    image.save(file := io.BytesIO(), kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def turns(sample: Sample) -> list[dict[str, Any]]:
    """The sample as messages."""
    pictures: Sequence[Any] = sample.images
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": sample.prompt}]}]
