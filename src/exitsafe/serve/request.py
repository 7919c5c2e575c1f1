"""The body of a chat completion request -> a checked `ChatRequest`, or a `RequestError` with one line.

What would change the answer and is not supported is refused, never ignored. Nothing is fetched: pictures come as data
URLs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from exitsafe.data.images import check_image, num_pixels
from exitsafe.errors import InputError, did_you_mean
from exitsafe.serve.chat import Turn
from exitsafe.specs.spec import in_words
from exitsafe.untrusted import JsonObject, UnreadableError, parse_json

MOST_PICTURES = 16
MOST_PIXELS = 32 * 2**20  # of all pictures of a request together
MOST_LOGPROBS = 2**20  # tokens in the lists of an answer, all positions together
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
"""Options that are not supported, with the values that ask for nothing."""
_WITHOUT_EFFECT = ("user", "metadata", "parallel_tool_calls", "service_tier", "safety_identifier", "cache_prompt")


class RequestError(InputError):
    """A request that is refused: an HTTP status, and what OpenAI's error object holds besides the message."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What is asked, of which exit, and how the answer is wanted.

    `max_new_tokens` None is 256, or less if the context leaves less; `seed` None draws anew each time;
    `top_logprobs` None asks for no log-probabilities.
    """

    model: str
    exit_layer: int
    turns: tuple[Turn, ...]
    max_new_tokens: int | None
    temperature: float
    seed: int | None
    stop: tuple[str, ...]
    top_logprobs: int | None
    is_streamed: bool
    includes_usage: bool

    @property
    def conversation(self) -> str:
        """A hash of the turns: with seed and exit, the key of the answer's draws."""
        digest = hashlib.sha256()
        for turn in self.turns:
            for part in turn.parts:
                content = part.encode() if isinstance(part, str) else part
                digest.update(f"{turn.role} {type(part).__name__} {len(content)} ".encode() + content)
        return digest.hexdigest()


def parse_request(content: bytes, models: Mapping[str, int]) -> ChatRequest:
    """Read and check a request body.

    Args:
        content: The body, JSON.
        models: Exit layers by the names of the models served.

    Raises:
        RequestError: If it cannot be read, asks for something that is not supported, or names another model.
    """
    try:
        found = parse_json(content)
    except UnreadableError:
        raise RequestError("the body is not a JSON object with finite numbers and valid Unicode") from None
    body = _body({name: value for name, value in found.items() if value is not None})
    if (exit_layer := models.get(body.model)) is None:
        default, *exits = models
        message = f"no such model; this server has {default}, and {exits[0]} to {exits[-1]}"
        raise RequestError(message, status=404, param="model", code="model_not_found")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise RequestError("max_tokens and max_completion_tokens mean the same: give only one", param="max_tokens")
    return ChatRequest(
        model=body.model,
        exit_layer=exit_layer,
        turns=_turns(body.messages),
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=body.temperature,
        seed=body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        is_streamed=body.stream,
        includes_usage=body.stream_options is not None and body.stream_options.include_usage,
    )


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _ImageUrl(_Strict):
    url: str
    detail: Literal["auto"] = "auto"


class _Image(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[_Text | _Image, Field(discriminator="type")]]


class _StreamOptions(_Strict):
    include_usage: bool = False


def _temperature(value: float) -> float:
    if value != 0 and not 0.01 <= value <= 100:
        raise ValueError
    return value


_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Count = Annotated[int, Field(ge=1, le=2**31)]


class _Body(_Strict):
    model: str
    messages: list[_Message] = Field(
        min_length=1,
        description="a list of turns, each with a role (system, user or assistant) and content: text, or a list of "
        "parts of type text or image_url",
    )
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: Annotated[float, AfterValidator(_temperature)] = Field(
        default=0, description="0 (greedy), or a number from 0.01 to 100"
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] = Field(
        default=[], description="a text, or a list of at most 16 texts, each of 1 to 1000 characters"
    )
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=2**31)] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = Field(default=None, description="an object with include_usage")


def _body(found: JsonObject) -> _Body:
    values = {}
    for name, value in found.items():
        if name in _Body.model_fields:
            values[name] = value
        elif name not in _WITHOUT_EFFECT and not _is_neutral(name, value):
            known = [*_Body.model_fields, *_NEUTRAL]
            message = f"exitsafe does not support {name}={_shown(value)}; leave it out"
            if name not in _NEUTRAL:
                message = f"unknown option{did_you_mean(name, known)}; leave it out"
            raise RequestError(message, param=name[:64], code="unsupported_parameter")
    if isinstance(values.get("messages"), list):
        values["messages"] = [_without_nulls(message) for message in values["messages"]]
    try:
        return _Body(**values)
    except ValidationError as error:
        place = error.errors(include_url=False, include_input=False)[0]["loc"]
        name = str(place[0])
        if name not in found:
            raise RequestError(f"{name} is missing", param=name) from None
        wanted = in_words(_Body.model_json_schema()["properties"][name]).removesuffix(", or none")
        where = f" (see turn {place[1]})" if name == "messages" and len(place) > 1 else ""
        raise RequestError(f"{name} must be {wanted}{where}", param=name) from None


def _is_neutral(name: str, value: object) -> bool:
    return any((type(value) is bool) == (type(each) is bool) and value == each for each in _NEUTRAL.get(name, ()))


def _without_nulls(message: Any) -> Any:
    """A turn without the fields that clients send empty, such as `tool_calls: null`."""
    return (
        {name: value for name, value in message.items() if value is not None} if isinstance(message, dict) else message
    )


def _shown(value: object) -> str:
    return str(value) if isinstance(value, bool | int | float) else "..."


def _turns(messages: list[_Message]) -> tuple[Turn, ...]:
    """The conversation, its pictures decoded and checked."""
    turns = []
    for message in messages:
        content = [message.content] if isinstance(message.content, str) else message.content
        parts = [
            part if isinstance(part, str) else part.text if isinstance(part, _Text) else _picture(part.image_url.url)
            for part in content
        ]
        turns.append(Turn(role=message.role, parts=tuple(parts)))
    _check_pictures([picture for turn in turns for picture in turn.pictures])
    return tuple(turns)


def _picture(url: str) -> bytes:
    head, _, content = url.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64")):
        raise RequestError(
            "nothing is fetched: send a picture as a data URL, data:image/png;base64,...",
            param="messages",
            code="invalid_image_url",
        )
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            "a picture's data URL is not valid base64; encode the file again", param="messages", code="invalid_base64"
        ) from None


def _check_pictures(pictures: list[bytes]) -> None:
    if len(pictures) > MOST_PICTURES:
        raise RequestError(f"{len(pictures)} pictures: send at most {MOST_PICTURES}", param="messages")
    try:
        pixels = sum(num_pixels(picture, "request") for picture in pictures)
        if pixels > MOST_PIXELS:
            raise RequestError(
                f"the pictures have {pixels / 1e6:.0f} million pixels in total: scale them down to "
                f"{MOST_PIXELS / 1e6:.0f} million",
                param="messages",
            )
        for picture in pictures:
            check_image(picture, where="request")
    except RequestError:
        raise
    except InputError as error:
        raise RequestError(str(error).partition(": ")[2], param="messages", code="invalid_image") from None
