"""Runs as a separate process: conversations as JSON lines on stdin, texts rendered by a chat template on stdout.

A chat template is a program that comes with a checkpoint. transformers' own code renders it, but here, where time and
memory are limited and the process may die without loss. The clock shows the date that the request names, and random
draws are the same each time. Imports nothing from exitsafe, which would load torch.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

MEMORY = 2**29  # bytes, on top of what the libraries take
LONGEST = 1_000_000  # characters, on top of four times the conversation's
_START_SECONDS = 120.0


def main() -> None:
    """Answer requests until stdin ends."""
    requests, replies = sys.stdin, os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # keep library output out of the replies
    _exit_in(_START_SECONDS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides when to stop
    sys.path[:] = json.loads(requests.readline())
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = Clock  # type: ignore[attr-defined]  # what `strftime_now` reads
    _limit_memory()
    _exit_in(None)
    for line in requests:
        request = json.loads(line)
        _exit_in(request["seconds"])
        try:
            text = _render(chat_template_utils, request)
            too_long = len(text) > LONGEST + 4 * len(line)
            reply = {"error": "MemoryError", "message": ""} if too_long else {"text": text}
        except Exception as error:  # noqa: BLE001 - whatever a template does is reported to the caller
            reply = {"error": type(error).__name__, "message": str(error)[:500]}
        _exit_in(None)
        replies.write(json.dumps({**reply, "number": request["number"]}) + "\n")
        replies.flush()


def _exit_in(seconds: float | None) -> None:
    """End the process after that time, whatever it is doing; None cancels."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds or 0.0)
    elif seconds is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        faulthandler.dump_traceback_later(seconds, exit=True)


class Clock(datetime):
    """The clock that templates see: midnight of one day."""

    shown: datetime

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return cls.shown


def _render(transformers: ModuleType, request: dict[str, Any]) -> str:
    Clock.shown = datetime.fromisoformat(request["today"])
    random.seed(0)
    texts, _ = transformers.render_jinja_template(
        [request["messages"]],
        chat_template=request["template"],
        add_generation_prompt=request["add_generation_prompt"],
        **request["variables"],
    )
    return str(texts[0])


def _limit_memory() -> None:
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limits; the time is limited everywhere
        import resource

        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


if __name__ == "__main__":
    main()
