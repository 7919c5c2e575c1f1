"""Conversations in, replies out: the client of any OpenAI-compatible chat endpoint.

The official `openai` client does retries, backoff and timeouts. A request that still fails is a `Reply` with the
reason; a failure that would hit every request (a wrong key, an unknown model, an endpoint that is down) raises an
error. Status 200 proves nothing: gateways and wrong addresses send errors, web pages and empty bodies with it, and
charge for some. So a body without a chat completion is a failure like any other, while anything around a valid
completion (token counts of odd types, a byte-order mark, a closing `[DONE]`) is read leniently.
Reasons and errors contain no text that was sent or received.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, cast

from pydantic import ValidationError

from exitsafe.engine.completion import (
    BROKEN_BODY,
    EMPTY_BODY,
    ChatReply,
    Choice,
    Completion,
    NotJSONError,
    Reply,
    as_count,
    error_in,
    logprobs_in,
    parse_body,
    token_ids_in,
)
from exitsafe.engine.transfer import Body, Pace, UnusableBodyError, cleaned, public_address
from exitsafe.errors import InputError, RunError
from exitsafe.untrusted import JsonObject, UnreadableError, parse_json, without_surrogates

if TYPE_CHECKING:
    import httpx2
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam

Conversation = Sequence[Mapping[str, object]]
"""Messages with `role` and `content`: text, or a list of parts as OpenAI's API defines them."""

OPENAI_URL = "https://api.openai.com/v1"
SEED = 0  # sent where it is accepted
MAX_FAILURES = 16  # in a row; then the endpoint is down, and continuing would only make answers unscored
MAX_BAD_BODIES = 8  # in a row; fewer, since an answer with status 200 may have been charged
BODY_RETRIES = 1  # retries after a body that may be better next time; each attempt counts as a failure
BODY_RETRY_DELAY = 0.5  # seconds

UNREACHABLE = "the endpoint could not be reached"
TIMED_OUT = "the endpoint timed out"
TOO_MANY = "the endpoint's rate limit was exceeded (status 429)"
SERVER_FAILED = "the endpoint failed"
ERROR_BODY = "the endpoint answered with an error (status 200)"
NO_COMPLETION = "the endpoint's answer is not a chat completion"
NO_CHOICES = "the endpoint's answer has no choices"
CUT_OFF = "the reply was cut off"
EMPTY = "the reply is empty"
FILTERED = "the endpoint's content filter refused"
REFUSED = "the model refused to reply"


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A conversation to continue, and how.

    Args:
        messages: The conversation.
        max_tokens: Longest answer, in tokens; None leaves it to the endpoint.
        temperature: 0 for the most likely answer; None for a model that does not accept a temperature.
        seed: Sent where it is accepted.
        top_logprobs: Most likely tokens to report at each token of the answer; None asks for no log-probabilities.
        extra: Further fields of the request, beyond OpenAI's API.
    """

    messages: Conversation
    max_tokens: int | None = None
    temperature: float | None = 0.0
    seed: int = SEED
    top_logprobs: int | None = None
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(kw_only=True)
class Usage:
    """Requests and tokens used so far.

    Args:
        requests: HTTP requests, retries included.
        tokens_in, tokens_out: As the endpoint counted them.
        uncounted: Replies without a readable token count, which make the totals too low.
    """

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0


class Endpoint:
    """A model behind an OpenAI-compatible chat endpoint.

    Args:
        model: The model's name as the endpoint knows it.
        base_url: Up to and including `/v1`, without user, password or query; None uses OPENAI_BASE_URL, or OpenAI's
            own if that is unset.
        requests_per_minute: Rate limit, evenly spread, retries included; None for no limit.
        concurrency: Requests in flight at a time.
        timeout: Seconds without a response before an attempt counts as failed.
        max_retries: Retries after status 429 (honouring `Retry-After`) or 5xx, timeouts and connection errors.
        temperature: 0 for the most likely reply; None for a model that does not accept a temperature.
        prices: US dollars per million tokens in and out, for `cost`.

    The key is read from OPENAI_API_KEY; endpoints other than OpenAI's may need none.

    Raises:
        InputError: On an invalid base URL or number.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        requests_per_minute: float | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 5,
        temperature: float | None = 0.0,
        prices: tuple[float, float] | None = None,
    ) -> None:
        self.model, self.temperature, self.prices = model, temperature, prices
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.usage = Usage()
        if not re.match(r"https?://[^/\s]", self.base_url):
            raise InputError("the endpoint's base URL must begin with http:// or https://")
        if self.base_url != self.where:  # the message must not quote it
            raise InputError(
                "the endpoint's base URL must not contain a user name, password, query or spaces, since runs record "
                "it: set the key in OPENAI_API_KEY instead"
            )
        if not model:
            raise InputError("the endpoint needs the name of a model, e.g. rubric:MODEL")
        if concurrency < 1 or timeout <= 0 or max_retries < 0:
            raise InputError(
                "an endpoint needs concurrency of at least 1, timeout above 0 and max_retries of 0 or more"
            )
        self._pace = Pace(requests_per_minute)
        self._sends_seed = True
        self._has_answered = False
        self._failures_in_a_row = 0

    def ask(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """One whole reply per conversation, in order: one that is empty or cut off is a failure.

        Raises:
            InputError: If the key is missing or refused, or the model unknown.
            RunError: If the endpoint is down, or the account has no credit left.
        """
        requests = [ChatRequest(messages=messages, temperature=self.temperature) for messages in conversations]
        replies: dict[int, Reply] = {
            index: Reply(text=reply.text, failure=reply.failure) for index, reply in self._replies(requests, whole=True)
        }
        if replies and all(reply.failure == UNREACHABLE for reply in replies.values()):
            raise RunError(self._down(UNREACHABLE))
        return [replies[index] for index in range(len(conversations))]

    def complete(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatReply]]:
        """Continue conversations; yields (index into requests, reply) in the order of finishing.

        Raises:
            InputError: If the key is missing or refused, or the model unknown.
            RunError: If the endpoint is down, or the account has no credit left.
        """
        return self._replies(requests, whole=False)

    def get_json(self, path: str) -> JsonObject:
        """The JSON object at a path below the base URL, e.g. "/models", or from the server's root: "/../version".

        Raises:
            InputError: If the endpoint has no such path, or answers with something else.
            RunError: If it cannot be reached.
        """
        return self._fetch(path, None)

    def post_json(self, path: str, body: Mapping[str, object]) -> JsonObject:
        """The answer to a JSON object posted to a path, as `get_json`."""
        return self._fetch(path, body)

    def check(self) -> None:
        """Check what can be checked without the network: that there are a client and a key.

        Raises:
            InputError: If one is missing.
        """
        if importlib.util.find_spec("openai") is None:
            raise InputError('an endpoint needs the openai client: pip install "exitsafe[endpoint]"')
        if self.base_url == OPENAI_URL and not os.environ.get("OPENAI_API_KEY"):
            raise InputError("set OPENAI_API_KEY, or OPENAI_BASE_URL for an endpoint that needs no key")

    @cached_property
    def where(self) -> str:
        """The endpoint's address, as runs record it and errors name it."""
        return public_address(self.base_url)

    @property
    def cost(self) -> float | None:
        """US dollars so far; None without prices.

        >>> endpoint = Endpoint("m", prices=(0.5, 2.0))
        >>> endpoint.usage = Usage(tokens_in=3_000_000, tokens_out=500_000)
        >>> endpoint.cost
        2.5
        """
        if self.prices is None:
            return None
        price_in, price_out = self.prices
        return (price_in * self.usage.tokens_in + price_out * self.usage.tokens_out) / 1e6

    def _replies(self, requests: Sequence[ChatRequest], *, whole: bool) -> Iterator[tuple[int, ChatReply]]:
        """Replies as they come, from an event loop in its own thread: the caller may have one, as a notebook does."""
        self.check()
        found: SimpleQueue[tuple[int, ChatReply] | BaseException | None] = SimpleQueue()
        loop, task = asyncio.new_event_loop(), None

        async def send_all() -> None:
            async with self._client() as client, asyncio.TaskGroup() as tasks:
                waiting = iter(enumerate(requests))  # shared: each worker takes the next request
                for _ in range(min(self.concurrency, len(requests))):
                    tasks.create_task(work(client, waiting))

        async def work(client: AsyncOpenAI, waiting: Iterator[tuple[int, ChatRequest]]) -> None:
            for index, request in waiting:
                found.put((index, await self._ask(client, request, whole=whole)))

        task = loop.create_task(send_all())

        def run() -> None:
            try:
                loop.run_until_complete(task)
            except BaseExceptionGroup as errors:  # the first error has cancelled the other requests
                found.put(errors.exceptions[0])
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # raised in the caller's thread
                found.put(error)
            else:
                found.put(None)
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            while (reply := found.get()) is not None:
                if isinstance(reply, BaseException):
                    raise reply
                yield reply
        finally:
            with suppress(RuntimeError):  # the loop is closed already, except after an interrupt or an early end
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

    def _fetch(self, path: str, body: Mapping[str, object] | None) -> JsonObject:
        import httpx2
        from openai import APIConnectionError, APIStatusError, DefaultHttpxClient, OpenAI

        def after_each_response(response: httpx2.Response) -> None:
            body = Body(response, timeout=self.timeout)
            for piece in response.iter_bytes():
                body.add(piece)
            response._content = body.whole

        self.check()
        root = self.base_url.rpartition("/")[0]
        url = root + path.removeprefix("/..") if path.startswith("/../") else self.base_url + path
        key = os.environ.get("OPENAI_API_KEY") or "none"
        http = DefaultHttpxClient(
            event_hooks={"response": [after_each_response]}, timeout=self.timeout, follow_redirects=False
        )
        with OpenAI(
            base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=self.max_retries, http_client=http
        ) as client:
            try:
                if body is None:
                    answer = client.get(url, cast_to=httpx2.Response)
                else:
                    answer = client.post(url, body=dict(body), cast_to=httpx2.Response)
                return parse_json(answer.content)
            except APIConnectionError:
                raise RunError(
                    f"{self.where} could not be reached: check the address and that the server is running"
                ) from None
            except APIStatusError as error:
                if error.status_code == 401:
                    raise self._bad_key() from None
                raise InputError(
                    f"{self.where} answers status {error.status_code} at {path.removeprefix('/..')}: check the address "
                    "(it must end in /v1) and what kind of server it is"
                ) from None
            except (UnreadableError, UnusableBodyError):
                raise InputError(
                    f"{self.where} does not answer with JSON at {path.removeprefix('/..')}: check that the address is "
                    "that of an OpenAI-compatible server"
                ) from None

    def _client(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        async def before_each_request(_: object) -> None:  # retries are requests too
            await asyncio.sleep(self._pace.delay())
            self.usage.requests += 1

        async def after_each_response(response: httpx2.Response) -> None:
            body = Body(response, timeout=self.timeout)
            async for piece in response.aiter_bytes():
                body.add(piece)
            response._content = body.whole

        return AsyncOpenAI(
            base_url=self.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.timeout,
            max_retries=self.max_retries,
            http_client=DefaultAsyncHttpxClient(
                event_hooks={"request": [before_each_request], "response": [after_each_response]},
                timeout=self.timeout,
                follow_redirects=False,  # neither texts nor the key go to an address that the user did not give
            ),
        )

    async def _ask(self, client: AsyncOpenAI, request: ChatRequest, *, whole: bool) -> ChatReply:
        """One reply; a bad body that may be temporary is requested again."""
        for tries_left in reversed(range(1 + min(self.max_retries, BODY_RETRIES))):
            answer = await self._send(client, request)
            reply = answer if isinstance(answer, ChatReply) else self._read(answer, request, whole=whole)
            if isinstance(answer, ChatReply) or not _may_pass(reply.failure) or not tries_left:
                break
            await asyncio.sleep(BODY_RETRY_DELAY)
        return reply

    async def _send(self, client: AsyncOpenAI, request: ChatRequest) -> bytes | ChatReply:
        """The body of an answer with status 200, or the failure after the client's retries."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError, omit

        sends_seed = self._sends_seed
        clean = _sendable(request.messages)
        try:
            answer = await client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=cast("list[ChatCompletionMessageParam]", clean),
                stream=False,
                max_tokens=omit if request.max_tokens is None else request.max_tokens,
                temperature=omit if request.temperature is None else request.temperature,
                seed=request.seed if sends_seed else omit,
                logprobs=omit if request.top_logprobs is None else True,
                top_logprobs=omit if request.top_logprobs is None else request.top_logprobs,
                extra_body=dict(request.extra) or None,
            )
        except APITimeoutError:
            return self._failed(TIMED_OUT)
        except APIConnectionError:
            return self._failed(UNREACHABLE)
        except UnusableBodyError as error:
            return self._failed(str(error), most=MAX_BAD_BODIES)
        except APIStatusError as error:
            if sends_seed and error.status_code in (400, 422) and re.search(r"\bseed\b", error.message):
                self._sends_seed = False
            else:
                return self._refused(
                    error.status_code, code=str(error.code or ""), param=error.param, temperature=request.temperature
                )
        else:
            content: bytes = answer.content
            return content
        return await self._send(client, request)

    def _read(self, body: bytes, request: ChatRequest, *, whole: bool) -> ChatReply:
        try:
            content = parse_body(body)
            if (fault := error_in(content)) is not None:
                return self._refused(fault.status, code=fault.code, param=None, temperature=request.temperature)
            if isinstance(content, dict) and "choices" in content and not content["choices"]:
                self._count(content.get("usage"), is_reply=False)
                return self._failed(NO_CHOICES, most=MAX_BAD_BODIES)
            completion = Completion.model_validate(content)
            choice = Choice.model_validate(completion.choices[0])
        except NotJSONError as error:
            return self._failed(str(error), most=MAX_BAD_BODIES)
        except ValidationError:
            return self._failed(NO_COMPLETION, most=MAX_BAD_BODIES)
        num_prompt_tokens, num_tokens = self._count(completion.usage, is_reply=True)
        if choice.finish_reason == "content_filter":
            return ChatReply(failure=FILTERED)
        text = without_surrogates(choice.message.text)
        if choice.message.refusal and not text:
            return ChatReply(failure=REFUSED)
        # a truncated reply of a judge may be a quotation, not a verdict
        if whole and (choice.finish_reason == "length" or not text):
            reason = EMPTY if not text and choice.finish_reason != "length" else CUT_OFF
            # a model that spends all its tokens on reasoning never says anything usable, but is still charged
            return ChatReply(failure=reason) if self._has_answered else self._failed(reason, most=MAX_BAD_BODIES)
        self._has_answered, self._failures_in_a_row = True, 0
        return ChatReply(
            text=text,
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            num_tokens=num_tokens,
            num_prompt_tokens=num_prompt_tokens,
            logprobs=None if request.top_logprobs is None else logprobs_in(choice.logprobs),
            model=cleaned(completion.model) if isinstance(completion.model, str) else None,
            fingerprint=(
                cleaned(completion.system_fingerprint) if isinstance(completion.system_fingerprint, str) else None
            ),
            token_ids=token_ids_in(choice.token_ids),
            prompt_token_ids=token_ids_in(completion.prompt_token_ids),
        )

    def _count(self, usage: object, *, is_reply: bool) -> tuple[int | None, int | None]:
        """Add the tokens that an answer reports, in and out; count the replies that report none."""
        usage = usage if isinstance(usage, dict) else {}
        tokens_in, tokens_out = (as_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        self.usage.tokens_in += tokens_in or 0
        self.usage.tokens_out += tokens_out or 0
        self.usage.uncounted += is_reply and None in (tokens_in, tokens_out)
        return tokens_in, tokens_out

    def _refused(self, status: int, *, code: str, param: str | None, temperature: float | None) -> ChatReply:
        """The failed reply for an HTTP status, also one inside a body; raises where every request would fail."""
        if status == 401:
            raise self._bad_key() from None
        if 300 <= status < 400:
            raise InputError(
                f"{self.where} redirects to another address (status {status}), and requests are sent only to the "
                "one given: give the new address instead"
            ) from None
        if status == 404:
            raise InputError(
                f"{self.where} has no model {self.model} (status 404): check the model's name and the base URL"
            ) from None
        if status == 402 or code == "insufficient_quota":
            raise RunError(
                f"{self.where} reports that the account has no credit left (status {status}); the responses are "
                "saved: add credit and rerun the same command"
            ) from None
        if status == 429:
            return self._failed(TOO_MANY)
        if status >= 500:
            return self._failed(f"{SERVER_FAILED} (status {status})")
        if code == "content_filter":
            return ChatReply(failure=FILTERED)
        if status == 200:  # an error that does not say which
            return self._failed(ERROR_BODY, most=MAX_BAD_BODIES)
        if param == "temperature" and temperature is not None:
            raise InputError(
                f"{self.model} does not accept temperature {temperature:g}: choose a model that does, "
                "or give the endpoint temperature=None"
            ) from None
        reason = f"the endpoint refused the request (status {status})"
        return ChatReply(failure=reason) if self._has_answered else self._failed(reason)

    def _failed(self, reason: str, *, most: int = MAX_FAILURES) -> ChatReply:
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= most:
            raise RunError(self._down(reason)) from None
        return ChatReply(failure=reason)

    def _bad_key(self) -> InputError:
        return InputError(f"{self.where} rejects the key (status 401): set OPENAI_API_KEY to a valid one")

    def _down(self, reason: str) -> str:
        return (
            f"{self.where} does not answer ({reason}, {self._failures_in_a_row} times in a row); the responses are "
            "saved: check the address and that the server is running, then rerun the same command"
        )


def _sendable(value: object) -> object:
    """Messages whose texts UTF-8 can hold."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, Mapping):
        return {name: _sendable(each) for name, each in value.items()}
    return [_sendable(each) for each in value] if isinstance(value, list | tuple) else value


def _may_pass(failure: str | None) -> bool:
    """Whether a body was bad for a reason that may be gone on the next attempt."""
    passing = (TOO_MANY, ERROR_BODY, EMPTY_BODY, BROKEN_BODY)
    return failure is not None and (failure in passing or failure.startswith(SERVER_FAILED))
