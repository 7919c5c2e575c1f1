"""What people see: results on stdout, everything else (progress, notes, errors) on stderr.

With `--json` stdout carries one JSON document and nothing else, whatever libraries print meanwhile.

Names, settings and messages may come from a file that a stranger wrote. All text for a terminal goes through
`printable` here, and lines also through `one_line`, which removes credentials from URLs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from exitsafe.records import Progress
from exitsafe.untrusted import JsonObject

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_WIDTH = 140  # of tables that go to a file or a pipe
_SECONDS_BETWEEN_LINES = 10.0  # of progress without a terminal
_SECONDS_UNTIL_ESTIMATE = 10.0
_ROWS_UNTIL_ESTIMATE = 3
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_JOINERS = "\u200c\u200d"  # invisible, and part of how many languages and emojis are written
_USER = re.compile(r"""(?<=://)[^\s/?#"'<>]*@""")
_QUERY = re.compile(r"""(https?://[^\s?#"'<>]*)\?[^\s"'<>)]*""")


@dataclass(frozen=True, kw_only=True)
class Show:
    """Prints a result: `show(document, tables)`, with the document for `--json` and what makes the tables for people.

    `tables()` makes rich renderables; it is called only if they are shown.
    """

    stdout: IO[str]
    as_json: bool

    def __call__(self, document: JsonObject, tables: Callable[[], list[Any]]) -> None:
        if process_number() > 0:  # all have the same result; one says it
            return
        if self.as_json:
            self.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
            self.stdout.flush()
            return
        console = screen(self.stdout, width=None if self.stdout.isatty() else _PLAIN_WIDTH)
        for table in tables():
            # lines of text may hold paths: no wrapping
            if isinstance(table, str):
                console.print(_without_secrets(" ".join(table.splitlines())), soft_wrap=True)
            else:
                console.print(table)


@contextmanager
def results(*, as_json: bool) -> Iterator[Show]:
    """Gives what prints the result; with `--json` everything else goes to stderr meanwhile."""
    warnings.showwarning = _show_warning
    stdout = sys.stdout
    with redirect_stdout(sys.stderr if as_json else stdout):
        yield Show(stdout=stdout, as_json=as_json)


def screen(file: IO[str], *, width: int | None = None) -> Console:
    """A rich console that shows text literally: no markup, no emoji codes, and only printable characters.

    rich removes some control characters, but lets ESC through, and reads markup in the titles of tables.
    """
    from rich.console import Console
    from rich.segment import Segment
    from rich.text import Text

    class Screen(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(printable(text), **how)

        def render(self, renderable: Any, options: Any = None) -> Any:
            if isinstance(renderable, Text):
                renderable = renderable.copy()
                renderable.plain = printable(renderable.plain)
            for segment in super().render(renderable, options):
                text, style, control = segment
                yield segment if control else Segment(printable(text), style)

    return Screen(file=file, width=width, markup=False, emoji=False, highlight=False)


def printable(text: str) -> str:
    """Text that is safe on a terminal: nothing that moves the cursor, recolours, reorders or hides text.

    Every other character takes its place as U+FFFD, so lengths stay. Joiners stay between letters of scripts that
    need them, and are replaced beside ASCII, where they only make two names look alike.

    >>> ascii(printable("a\\x1b[2Jb"))
    "'a\\\\ufffd[2Jb'"
    """
    if text.isprintable():
        return text
    return "".join(
        character if character == "\n" or character.isprintable() else _substitute(text, place)
        for place, character in enumerate(text)
    )


def _substitute(text: str, place: int) -> str:
    character = text[place]
    if character in _JOINERS:
        beside = (text[place - 1 : place], text[place + 1 : place + 2])
        return "\N{REPLACEMENT CHARACTER}" if any(each.isascii() for each in beside) else character
    is_space = character == "\t" or (character.isspace() and ord(character) > 0x9F)
    return " " if is_space else "\N{REPLACEMENT CHARACTER}"


def one_line(message: str) -> str:
    """A message as one printable line, without user, password and query of any URL in it.

    >>> one_line("cannot reach https://me:secret@host/v1?key=secret:\\n  refused")
    'cannot reach https://host/v1 refused'
    """
    return printable(_without_secrets(" ".join(message.split())))


def _without_secrets(message: str) -> str:
    """HTTP libraries quote the requested URL in their errors, secrets included."""
    return _QUERY.sub(r"\1", _USER.sub("", message))


def process_number() -> int:
    """Which of the processes of `accelerate launch` this is; 0 if alone."""
    return int(os.environ.get("RANK", "0"))


def note(message: str) -> None:
    """A line for people, beside the result; of several processes the first says it."""
    if process_number() == 0:
        _say(message)


def _say(message: str) -> None:
    _write(one_line(message))


def note_from_signal(message: str) -> None:
    """`note` for a signal handler, which may have interrupted a write to stderr itself."""
    if process_number() == 0:
        os.write(2, f"\nexitsafe: {message}\n".encode())


def show_traceback(text: str) -> None:
    """A traceback with its line breaks kept."""
    _write(printable(_without_secrets(text.rstrip())))


def _write(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def complain(message: str) -> None:
    """The one line of a failure."""
    who = f"exitsafe (process {process_number()})" if process_number() else "exitsafe"
    _say(f"{who}: {message}")


@contextmanager
def progress_bar(title: str, *, unit: str) -> Iterator[Progress]:
    """Gives a callable `progress(done, total, note)` that draws a bar, or, without a terminal, a line now and then."""
    if process_number() > 0:
        yield lambda done, total, remark: None
        return
    if not sys.stderr.isatty():
        yield _ProgressLines(title, unit)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    title_column, pace_column = (
        TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[pace]}")
    )
    with Bar(title_column, BarColumn(), MofNCompleteColumn(), pace_column, console=screen(sys.stderr)) as bar:
        task = bar.add_task(title, total=None, pace="")
        pace = _Pace(unit)

        def progress(done: int, total: int, remark: str) -> None:
            text = "  ".join(filter(None, [pace.at(done, total), remark]))
            bar.update(task, completed=done, total=total, pace=text)

        yield progress


class _ProgressLines:
    def __init__(self, title: str, unit: str) -> None:
        self.title = title
        self.pace = _Pace(unit)
        self.last_line = time.monotonic()
        self.is_over = False

    def __call__(self, done: int, total: int, remark: str) -> None:
        text = self.pace.at(done, total)
        is_due = time.monotonic() - self.last_line >= _SECONDS_BETWEEN_LINES
        if self.is_over or not (is_due or done >= total):
            return
        self.is_over = done >= total
        self.last_line = time.monotonic()
        note(f"{self.title}: " + ", ".join(filter(None, [f"{done}/{total}", text, remark])))


class _Pace:
    """Rate and time left, since the first call: what an earlier start has done does not count as speed.

    The time left goes by the later half of the work so far, and is not told before there is enough of it: the first
    rows pay for warming up, and nothing has been judged yet.
    """

    def __init__(self, unit: str, *, clock: Callable[[], float] | None = None) -> None:
        self.unit = unit
        self.clock = clock or time.monotonic
        self.seen: deque[tuple[int, float]] = deque()
        self.first: tuple[int, float] | None = None

    def at(self, done: int, total: int) -> str:
        now = self.clock()
        self.seen.append((done, now))
        self.first = self.first or (done, now)
        fresh, seconds = done - self.first[0], now - self.first[1]
        while len(self.seen) > 2 and self.seen[1][1] <= now - seconds / 2:
            self.seen.popleft()
        if fresh <= 0 or seconds <= 0:
            return ""
        pace = self._rate(fresh / seconds)
        if done >= total:
            return f"{pace}, took {_clock(seconds)}"
        recent, recent_seconds = done - self.seen[0][0], now - self.seen[0][1]
        if seconds < _SECONDS_UNTIL_ESTIMATE or fresh < _ROWS_UNTIL_ESTIMATE or recent <= 0:
            return pace
        return f"{pace}, {_clock((total - done) * recent_seconds / recent)} left"

    def _rate(self, rate: float) -> str:
        return f"{rate:.1f} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s/{self.unit}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning as one line; which line of code gave it helps nobody."""
    note(f"warning: {message}")


def readable(num_bytes: int) -> str:
    """Bytes as people read them.

    >>> readable(3 * 2**30)
    '3.0 GiB'
    """
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{num_bytes} B" if unit == "B" else f"{value:.1f} {unit}"


def quieten_libraries() -> None:
    """Silence known warnings that no user can fix; keep all others, and make them printable."""
    logging.setLogRecordFactory(_PrintableRecord)
    # PEFT reads a name that transformers has renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # PEFT imports bitsandbytes, which misses kernels that only quantised models would use
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # and torchao, which misses kernels of GPUs that are not there, and registers what torch now knows by itself
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _PrintableRecord(logging.LogRecord):
    """A library's log record: transformers quotes configs and names of weights, the Hub's client quotes URLs."""

    def getMessage(self) -> str:  # noqa: N802  # the name in logging
        return printable(_without_secrets(_COLOURS.sub("", super().getMessage())))
