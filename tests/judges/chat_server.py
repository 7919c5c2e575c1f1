"""A chat endpoint on this machine, whose answers a test writes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "zorb-secret-text"


@dataclass
class Answer:
    """What the server says next: a completion with this text, or a body as it is; after some seconds."""

    text: str = "fine"
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    finish_reason: str = "stop"
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 7, "completion_tokens": 3})

    def encoded(self) -> bytes:
        if self.body is not None:
            return self.body
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text}}
        return json.dumps(
            {"choices": [choice | {"finish_reason": self.finish_reason}], "usage": self.usage, "model": "m"}
        ).encode()


def failing(status: int, *, code: str | None = None, param: str | None = None, message: str = SECRET) -> Answer:
    error = {"error": {"message": message, "code": code, "param": param, "type": "x"}}
    return Answer(status=status, body=json.dumps(error).encode(), headers={"Retry-After": "0.01"})


class ChatServer:
    """Answers each request by a function of its body and number; keeps what it saw."""

    def __init__(self, script: Callable[[dict[str, Any], int], Answer]) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def answer(self, body: dict[str, Any], key: str | None) -> Answer:
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.keys.append(key)
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        answer = self.script(body, number)
        time.sleep(answer.wait)
        with self._lock:
            self._at_once -= 1
        return answer


@contextmanager
def serving(server: ChatServer, *, paths: Mapping[str, Answer] | None = None) -> Iterator[str]:
    """The base URL under which a chat server listens, with fixed answers at further paths."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet

        def do_GET(self) -> None:
            self._send((paths or {}).get(self.path, Answer(status=404)))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v1/chat/completions":
                self._send(server.answer(body, self.headers.get("Authorization")))
            else:
                self.do_GET()

        def _send(self, answer: Answer) -> None:
            content = answer.encoded()
            try:
                self.send_response(answer.status)
                for name, value in ({"Content-Type": "application/json"} | answer.headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client has given up
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that stops early breaks connections; that is no news."""

    http = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()
