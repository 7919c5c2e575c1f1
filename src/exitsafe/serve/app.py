"""The HTTP side: routes, limits, the key, errors, and a log of ids and numbers that never contains texts."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import uuid4

import PIL
import torch
import transformers

from exitsafe.engine.vlm import VLM
from exitsafe.errors import ExitsafeError, InputError
from exitsafe.serve.replies import Reply, error_object, model_list
from exitsafe.serve.request import ChatRequest, RequestError, parse_request
from exitsafe.serve.worker import Ticket, Update, Worker
from exitsafe.store.fingerprint import canonical_json, model_fingerprint
from exitsafe.untrusted import JsonObject
from exitsafe.version import __version__

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise InputError('the server needs starlette and uvicorn: pip install "exitsafe[serve]"') from error

MOST_BYTES = 32 * 2**20  # of a request's body
MOST_REQUESTS = 256  # at the same time, waiting ones included
MOST_BYTES_TOGETHER = 2**30  # of their bodies
BODY_SECONDS = 60.0  # in which a body must arrive
SECONDS_TO_FINISH = 5  # for answers in progress when the server is stopped
_GONE = 499  # logged for a client that disconnects early; it is never sent
_Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(kw_only=True)
class Service:
    """What is served.

    Args:
        models: Exit layers by name.
        fingerprint: As in `Reply`.
        key: What clients must send as `Authorization: Bearer KEY`; None accepts everyone.
        is_local: Whether only requests addressed to this machine are answered, so that no web page can reach the
            server through a name of its own.
        log: Receives a line per request.
    """

    worker: Worker
    models: dict[str, int]
    fingerprint: str
    key: str | None
    is_local: bool
    log: Callable[[str], None]
    started: int = field(default_factory=lambda: int(time.time()))
    num_requests: int = 0
    num_bytes: int = 0
    parsing: asyncio.Lock = field(default_factory=asyncio.Lock)


def served_models(vlm: VLM) -> dict[str, int]:
    """Exit layers by the names under which they are served: NAME for the default exit, and NAME@L1 to NAME@LN.

    NAME is the model as given, or the name of its folder; with an adapter, translators or quantization a digest of
    these follows, since other tools' caches tell models apart by their names.
    """
    folder = Path(vlm.name)
    name = folder.resolve().name if folder.is_dir() else vlm.name
    found = model_fingerprint(vlm)
    changes = [found["adapter"], found.get("translators"), found["quantization"]]
    if any(change is not None for change in changes):
        name += "+" + hashlib.sha256(canonical_json(changes).encode()).hexdigest()[:8]
    return {name: vlm.default_exit} | {f"{name}@L{exit_layer}": exit_layer for exit_layer in vlm.exit_layers}


def fingerprint(vlm: VLM) -> str:
    """Twelve characters that change with everything that may change an answer, except the exit layer."""
    deciding = {
        "model": {name: value for name, value in model_fingerprint(vlm).items() if name != "name"},
        "versions": [__version__, str(torch.__version__), transformers.__version__, PIL.__version__],
        "today": vlm.today if vlm.is_dated else None,
    }
    return "fp_" + hashlib.sha256(canonical_json(deciding).encode()).hexdigest()[:12]


def make_app(service: Service) -> Starlette:
    """The ASGI application."""
    context_length = service.worker.vlm.context_length

    async def models(request: Request) -> Response:
        return JSONResponse(model_list(service.models, context_length=context_length, created=service.started))

    async def model(request: Request) -> Response:
        listed = model_list(service.models, context_length=context_length, created=service.started)
        for entry in listed["data"]:
            if entry["id"] == request.path_params["name"]:
                return JSONResponse(entry)
        raise RequestError("the model does not exist", status=404, param="model", code="model_not_found")

    async def version(request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def chat(request: Request) -> Response:
        return await _chat(request, service)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        routes = "POST /v1/chat/completions, GET /v1/models, /health and /version"
        what = {404: f"no such path; this server has {routes}", 405: f"wrong method; this server has {routes}"}
        return _refusal(RequestError(what.get(error.status_code, error.detail), status=error.status_code))

    routes = [
        Route("/v1/models", _guarded(models, service)),
        Route("/v1/models/{name:path}", _guarded(model, service)),
        Route("/v1/chat/completions", _guarded(chat, service), methods=["POST"]),
        Route("/version", _guarded(version, service)),
        Route("/health", health),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse})


def make_server(service: Service) -> uvicorn.Server:
    """The HTTP server, silent: its own log would quote requests."""
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
        server_header=False,
        ws="none",
    )
    return uvicorn.Server(config)


def _guarded(endpoint: _Endpoint, service: Service) -> _Endpoint:
    """An endpoint behind the access checks, whose errors become replies: no exception reaches the server's own log."""

    async def guarded(request: Request) -> Response:
        try:
            _let_in(request, service)
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        except Exception as error:  # noqa: BLE001 - the outermost edge
            return _refusal(_as_refusal(error))

    return guarded


def _let_in(request: Request, service: Service) -> None:
    if service.is_local and not _is_loopback(request.url.hostname or ""):
        raise RequestError(
            "this server answers requests to localhost only; start it with --host to change that", status=403
        )
    if service.key is not None:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, f"Bearer {service.key}".encode()):
            message = "missing or wrong API key: send the server's EXITSAFE_API_KEY as Authorization: Bearer KEY"
            raise RequestError(message, status=401, code="invalid_api_key")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _as_refusal(error: BaseException) -> RequestError:
    """What the client is told: of an unexpected error only type and place, since its message may quote texts."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ExitsafeError):
        return RequestError(str(error), status=400 if isinstance(error, InputError) else 500)
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = f"unexpected {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
    return RequestError(message, status=500)


def _refusal(error: RequestError) -> Response:
    return JSONResponse(error_object(error), status_code=error.status)


async def _chat(request: Request, service: Service) -> Response:
    exchange = _Exchange(service)
    try:
        content = await _body(request, exchange)
        async with service.parsing:  # one at a time: bodies unpack to more than their size
            asked = await asyncio.to_thread(parse_request, content, service.models)
        exchange.ask(asked)
        first = await _unless_gone(request, exchange.next())
        if asked.is_streamed:
            return _Stream(exchange, first)
        response = JSONResponse(exchange.reply.whole(first))
    except BaseException as error:
        is_gone = isinstance(error, ClientDisconnect) or not isinstance(error, Exception)
        exchange.end(_GONE if is_gone else _as_refusal(error).status)
        raise
    exchange.end(200)
    return response


class _Exchange:
    """One request from its arrival to its end, which is logged.

    Raises:
        RequestError: If too many are in progress.
    """

    def __init__(self, service: Service) -> None:
        if service.num_requests >= MOST_REQUESTS:
            raise RequestError(
                f"{MOST_REQUESTS} requests are already in progress; try again later", status=429, code="busy"
            )
        service.num_requests += 1
        self.service, self._num_bytes = service, 0
        self.reply_id = f"chatcmpl-{uuid4().hex[:24]}"
        self.last: Update | None = None
        self._started, self._is_over = time.monotonic(), False
        self._ticket: Ticket | None = None
        self._told: asyncio.Queue[Update | Exception] = asyncio.Queue()

    def hold(self, num_bytes: int) -> None:
        """Count bytes of the body, whose pictures are kept until the end.

        Raises:
            RequestError: If all requests together have too many.
        """
        self._num_bytes += num_bytes
        self.service.num_bytes += num_bytes
        if self.service.num_bytes > MOST_BYTES_TOGETHER:
            raise RequestError("too many large requests are in progress; try again later", status=429, code="busy")

    def ask(self, request: ChatRequest) -> None:
        """Hand the request to the model."""
        loop = asyncio.get_running_loop()

        def tell(update: Update | Exception) -> None:
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(self._told.put_nowait, update)

        self.reply = Reply(request=request, reply_id=self.reply_id, fingerprint=self.service.fingerprint)
        self._ticket = self.service.worker.ask(request, tell)

    async def next(self) -> Update:
        """The next update, or the error that ends the answer."""
        told = await self._told.get()
        if isinstance(told, Exception):
            raise told
        self.last = told
        return told

    def end(self, status: int) -> None:
        """Count it as over, and log it; only the first call counts."""
        if self._is_over:
            return
        self._is_over = True
        self.service.num_requests -= 1
        self.service.num_bytes -= self._num_bytes
        model, tokens = "-", ""
        if self._ticket is not None:
            self._ticket.cancel()
            model = self._ticket.request.model
        if self.last is not None:
            tokens = f" {self.last.num_prompt_tokens}+{self.last.num_tokens} tokens"
        self.service.log(f"{self.reply_id} {model} {status}{tokens} {time.monotonic() - self._started:.2f} s")


class _Stream(StreamingResponse):
    """Server-sent events: a chunk for each update, the usage if asked for, and `[DONE]`."""

    def __init__(self, exchange: _Exchange, first: Update) -> None:
        super().__init__(self._events(first), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)
        finally:
            self._exchange.end(_GONE)  # unless it has ended before

    async def _events(self, update: Update) -> AsyncIterator[str]:
        exchange, is_first = self._exchange, True
        try:
            while True:
                yield _event(exchange.reply.chunk(update, is_first=is_first))
                if update.finish_reason is not None:
                    break
                update, is_first = await exchange.next(), False
        except Exception as error:  # noqa: BLE001 - the status has been sent; the client is told in an event
            refusal = _as_refusal(error)
            yield _event(error_object(refusal))
            exchange.end(refusal.status)
            return
        if exchange.reply.request.includes_usage:
            yield _event(exchange.reply.usage_chunk(update))
        yield "data: [DONE]\n\n"
        exchange.end(200)


def _event(document: JsonObject) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, allow_nan=False)}\n\n"


async def _body(request: Request, exchange: _Exchange) -> bytes:
    """The body, within bounds of type, size and time."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("send JSON, with Content-Type: application/json", status=415)
    too_large = RequestError(f"the body is larger than {MOST_BYTES // 2**20} MiB", status=413)
    if int(request.headers.get("content-length", "0")) > MOST_BYTES:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                content += piece
                exchange.hold(len(piece))
                if len(content) > MOST_BYTES:
                    raise too_large
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_SECONDS:.0f} s", status=408) from None
    return bytes(content)


async def _unless_gone(request: Request, update: Coroutine[Any, Any, Update]) -> Update:
    """Wait for an update, or until the client has left."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(update), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()
