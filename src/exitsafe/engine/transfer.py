"""How fast requests go out, how much of an answer may come in, and what of either may be recorded."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from exitsafe.engine.completion import EVENT_STREAM
from exitsafe.errors import InputError

if TYPE_CHECKING:
    import httpx2

MAX_BYTES = 2**24  # of an answer's body, unpacked
TOO_LARGE = f"the endpoint's answer is larger than {MAX_BYTES // 2**20} MiB"


class Pace:
    """Spreads requests evenly over time.

    Args:
        per_minute: Rate limit; None for no limit.

    Raises:
        InputError: If that is not above 0.
    """

    def __init__(self, per_minute: float | None) -> None:
        if per_minute is not None and not per_minute > 0:
            raise InputError("requests per minute must be above 0")
        self._interval = 0.0 if per_minute is None else 60.0 / per_minute
        self._next = 0.0

    def delay(self) -> float:
        """Seconds to wait before the next request; every call reserves one slot."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._interval
        return start - now


class UnusableBodyError(Exception):
    """A body that is too large, or an event stream that was still open after the timeout; the message says which."""


class Body:
    """A body as it arrives, within bounds of size and time: a server may send for ever.

    Args:
        response: Whose body it is.
        timeout: Seconds in which it must arrive.
    """

    def __init__(self, response: httpx2.Response, *, timeout: float) -> None:
        self._response, self._deadline = response, time.monotonic() + timeout
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, piece: bytes) -> None:
        """Add what has arrived next.

        Raises:
            UnusableBodyError: If it is too large, or an event stream, which was not requested and may never end.
            httpx2.ReadTimeout: If it takes too long.
        """
        import httpx2

        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > MAX_BYTES:
            raise UnusableBodyError(TOO_LARGE)
        if time.monotonic() > self._deadline:
            if "event-stream" in self._response.headers.get("Content-Type", ""):
                raise UnusableBodyError(EVENT_STREAM)
            raise httpx2.ReadTimeout("the body takes too long", request=self._response.request)

    @property
    def whole(self) -> bytes:
        return b"".join(self._pieces)


def public_address(url: str) -> str:
    """A URL without the parts that may be secret, safe to record and print.

    >>> public_address("https://me:secret@host:8443/v1?api_key=secret")
    'https://host:8443/v1'
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # unbalanced brackets
        return ""
    whole = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return "".join(character for character in whole if character.isprintable() and not character.isspace())


def cleaned(text: str) -> str:
    """What a server says of itself, which is untrusted: short, and fit to record and print.

    >>> cleaned("vllm\x1b[2J")
    'vllm[2J'
    """
    return "".join(character for character in text if character.isprintable())[:80]
