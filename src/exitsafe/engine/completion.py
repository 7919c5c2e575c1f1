"""The body of a chat completion in, what it says out: reply, finish reason, log-probabilities, counts, or an error.

Knows nothing about requests. Reasons contain no text that was received.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ValidationError

MAX_TOKENS = 10**9  # per reply; larger counts are ignored
EMPTY_BODY = "the endpoint answered with an empty body"
EVENT_STREAM = "the endpoint answered with an event stream"
WEB_PAGE = "the endpoint answered with a web page"
BROKEN_BODY = "the endpoint's answer is truncated or corrupt"


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """A token of an answer: its text, its id if the endpoint gives one, its log-probability, and the most likely tokens
    in its place as (text, id, log-probability)."""

    text: str
    token_id: int | None
    logprob: float
    top: tuple[tuple[str, int | None, float], ...]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model wrote, or why there is no reply; exactly one of the two is None."""

    text: str | None = None
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class ChatReply(Reply):
    """A reply, which may be empty or cut off, with what the endpoint says about it; None for what it does not say.

    vLLM returns the ids of its tokens and of the prompt's if a request has `return_token_ids`.
    """

    finish_reason: Literal["stop", "length"] | None = None
    num_tokens: int | None = None
    num_prompt_tokens: int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    model: str | None = None
    fingerprint: str | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None


class NotJSONError(Exception):
    """A body that is not JSON; the message says what it appears to be instead."""


class _Part(BaseModel):
    type: str = "text"
    text: str | None = None


class _Message(BaseModel):
    content: str | list[str | _Part] | None = None
    refusal: object = None

    @property
    def text(self) -> str:
        """The model's text, without reasoning and pictures; empty if blank."""
        parts = [self.content] if isinstance(self.content, str) else self.content or []
        said = (part if isinstance(part, str) else part.text or "" for part in parts if _is_text(part))
        text = "".join(said)
        return text if text.strip() else ""


class _TopLogprob(BaseModel):
    token: str
    id: int | None = None
    logprob: float


class _TokenLogprobs(_TopLogprob):
    top_logprobs: list[_TopLogprob] = []


class _Logprobs(BaseModel):
    content: list[_TokenLogprobs]


class Choice(BaseModel):
    message: _Message
    finish_reason: object = None
    logprobs: object = None
    token_ids: object = None


class Completion(BaseModel):
    """The part of a chat completion that is read."""

    choices: list[object]
    """Only the first is read."""
    usage: object = None
    model: object = None
    system_fingerprint: object = None
    prompt_token_ids: object = None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An error in a body: the HTTP status it corresponds to (200 if unknown) and its code."""

    status: int
    code: str


# Error codes of OpenAI's API, for gateways that put them into a body with status 200.
_STATUS_OF = {"invalid_api_key": 401, "insufficient_quota": 402, "model_not_found": 404, "rate_limit_exceeded": 429}


def parse_body(body: bytes) -> object:
    """The JSON in a body, with or without a byte-order mark or the `[DONE]` that ends an event stream.

    Raises:
        NotJSONError: If it is anything else.
    """
    try:
        text = body.decode(json.detect_encoding(body)).lstrip("\ufeff").strip()
    except UnicodeDecodeError:
        raise NotJSONError(BROKEN_BODY) from None
    if not text:
        raise NotJSONError(EMPTY_BODY)
    if text.startswith("<"):
        raise NotJSONError(WEB_PAGE)
    if re.match(r"(data|event|id|retry)?:", text):
        raise NotJSONError(EVENT_STREAM)
    try:
        content: object
        content, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # the latter on deeply nested lists
        raise NotJSONError(BROKEN_BODY) from None
    if not re.fullmatch(r"\s*((data:\s*)?\[DONE\])?", text[end:]):
        raise NotJSONError(BROKEN_BODY)
    return content


def error_in(content: object) -> Fault | None:
    """The error in a body, or in its first choice next to a partial reply; None for a completion."""
    if not isinstance(content, dict):
        return None
    choices = content.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = content.get("error") or choice.get("error")
    if not error or (isinstance(error, dict) and not any(error.values())):
        if content.get("object") != "error" and choice.get("finish_reason") != "error":
            return None
        error = content
    code = str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""
    status = int(code) if re.fullmatch("[45][0-9][0-9]", code) else _STATUS_OF.get(code, 200)
    return Fault(status=status, code=code)


def logprobs_in(given: object) -> tuple[TokenLogprobs, ...] | None:
    """The log-probabilities of a choice; None where there are none, or none that can be read."""
    try:
        tokens = _Logprobs.model_validate(given).content
    except ValidationError:
        return None
    return tuple(
        TokenLogprobs(
            text=token.token,
            token_id=token.id,
            logprob=token.logprob,
            top=tuple((each.token, each.id, each.logprob) for each in token.top_logprobs),
        )
        for token in tokens
    )


def token_ids_in(given: object) -> tuple[int, ...] | None:
    """Token ids; None where there are none, or none that can be read."""
    if not isinstance(given, list) or not all(type(each) is int and 0 <= each < 2**31 for each in given):
        return None
    return tuple(given)


def _is_text(part: str | _Part) -> bool:
    return isinstance(part, str) or part.type in ("text", "output_text")


def as_count(value: object) -> int | None:
    """A number of tokens, also written as `7.0` or `"7"`; None if it is not one.

    >>> [as_count(value) for value in (7, 7.0, "7", 7.5, -1, None, True)]
    [7, 7, 7, None, None, None, None]
    """
    if isinstance(value, str) and re.fullmatch("[0-9]{1,10}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_TOKENS:
        return None
    return int(value) if value == int(value) else None
