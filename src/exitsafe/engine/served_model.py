"""`http://host:port/v1#NAME` -> a model behind an OpenAI-compatible server, and what the server says of itself.

The address comes from the call alone: an address that a run or a server names is never used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from exitsafe.engine.endpoint import ChatRequest, Endpoint
from exitsafe.engine.transfer import cleaned
from exitsafe.errors import InputError

TIMEOUT = 600.0
"""Seconds for an answer: a busy server keeps requests waiting; one that has stopped refuses connections at once."""
BYTES_IN_FLIGHT = 2**28
"""Total size of the requests in flight."""
_MOST_NAMES, _LONGEST_NAME = 8, 1000


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model behind a server.

    Args:
        endpoint: Where requests are sent.
        name: The model's name there.
        owner: Who serves it in the server's own words, e.g. "vllm"; "" if it does not say.
        version: The server's version; None if it does not say.
        context_length: Tokens of prompt and answer together; None if it does not say.
    """

    endpoint: Endpoint
    name: str
    owner: str = ""
    version: str | None = None
    context_length: int | None = None


def find_served(url: str, *, what: str) -> ServedModel:
    """Ask a server for its models.

    Args:
        url: The server's address, with "#NAME" for one of its models; without, it must serve a single one.
        what: The option or argument that holds the URL, for messages.

    Raises:
        InputError: If the URL is not one, or the server has no such model, or several and none is named.
        RunError: If the server cannot be reached.
    """
    base, _, name = url.partition("#")
    if not base.rstrip("/").endswith("/v1") and not urlsplit(base).path.strip("/"):
        base = base.rstrip("/") + "/v1"
    asking = Endpoint(name or "any", base_url=base, timeout=TIMEOUT, max_retries=1)
    try:
        models = _Models.model_validate(asking.get_json("/models")).data
    except ValidationError as error:
        raise InputError(
            f"{asking.where} does not list its models: {what} must be the URL of an OpenAI-compatible server"
        ) from error
    known = {model.id: model for model in models}
    if not name and len(known) != 1:
        raise InputError(f"{asking.where} serves {len(known)} models{_named(known)}: add #NAME to the URL")
    if name and name not in known:
        raise InputError(f"{asking.where} serves no such model{_named(known)}: check the #NAME of {what}")
    found = known[name or next(iter(known))]
    if not found.id.isprintable() or len(found.id) > _LONGEST_NAME:
        raise InputError(
            f"{asking.where} names its model in a way that no run can record: serve it under a name of at most "
            f"{_LONGEST_NAME} printable characters"
        )
    return ServedModel(
        endpoint=Endpoint(found.id, base_url=base, timeout=TIMEOUT),
        name=found.id,
        owner=cleaned(found.owned_by) if isinstance(found.owned_by, str) else "",
        version=_version(asking),
        context_length=found.max_model_len if isinstance(found.max_model_len, int) else None,
    )


class LazyRequests(Sequence[ChatRequest]):
    """Requests that are made when they are sent: together, their pictures may take more memory than there is."""

    def __init__(self, count: int, make: Callable[[int], ChatRequest]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> ChatRequest: ...
    @overload
    def __getitem__(self, index: slice) -> list[ChatRequest]: ...
    def __getitem__(self, index: int | slice) -> ChatRequest | list[ChatRequest]:
        if isinstance(index, slice):
            return [self._make(each) for each in range(*index.indices(self._count))]
        if index >= self._count:
            raise IndexError(index)
        return self._make(index)


class _Model(BaseModel):
    id: str
    owned_by: object = None
    max_model_len: object = None


class _Models(BaseModel):
    data: list[_Model]


def _version(endpoint: Endpoint) -> str | None:
    try:
        version = endpoint.get_json("/../version").get("version")
    except InputError:  # not every server has one
        return None
    return cleaned(version) if isinstance(version, str) else None


def _named(names: dict[str, _Model]) -> str:
    """The server's names of its models, which are untrusted: short, and without control characters."""
    shown = [cleaned(name) for name in list(names)[:_MOST_NAMES]]
    return f" ({', '.join(shown)}{', ...' if len(names) > _MOST_NAMES else ''})" if shown else ""
