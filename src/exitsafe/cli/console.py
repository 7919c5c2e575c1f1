"""What people see: results on stdout, everything else (progress, notes, errors) on stderr.

With `--json` stdout carries one JSON document and nothing else, whatever libraries print meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from exitsafe.records import Progress

_PLAIN_WIDTH = 140  # of tables that go to a file or a pipe
_SECONDS_BETWEEN_LINES = 10.0  # of progress without a terminal


@contextmanager
def results(*, as_json: bool) -> Iterator[Callable[[dict[str, Any], Callable[[], list[Any]]], None]]:
    """Gives `show(document, tables)`, to be called once, with the document for `--json` and what is for people.

    `tables()` makes rich renderables; it is called only if they are shown.
    """
    warnings.showwarning = _show_warning
    stdout = sys.stdout

    def show(document: dict[str, Any], tables: Callable[[], list[Any]]) -> None:
        if process_number() > 0:  # all have the same result; one says it
            return
        if as_json:
            stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
            stdout.flush()
            return
        from rich.console import Console

        screen = Console(file=stdout, width=None if stdout.isatty() else _PLAIN_WIDTH, highlight=False)
        for table in tables():
            # lines of text may hold paths: no markup, no wrapping
            screen.print(table, markup=False, soft_wrap=isinstance(table, str))

    with redirect_stdout(sys.stderr if as_json else stdout):
        yield show


def process_number() -> int:
    """Which of the processes of `accelerate launch` this is; 0 if alone."""
    return int(os.environ.get("RANK", "0"))


def note(message: str) -> None:
    """A line for people, beside the result; of several processes the first says it."""
    if process_number() == 0:
        _say(message)


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def complain(message: str) -> None:
    """The one line of a failure."""
    who = f"exitsafe (process {process_number()})" if process_number() else "exitsafe"
    _say(f"{who}: " + " ".join(message.split()))


@contextmanager
def progress_bar(title: str, *, unit: str) -> Iterator[Progress]:
    """Gives a callable `progress(done, total, note)` that draws a bar, or, without a terminal, a line now and then."""
    if process_number() > 0:
        yield lambda done, total, remark: None
        return
    if not sys.stderr.isatty():
        yield _ProgressLines(title, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Bar(*columns, console=Console(stderr=True)) as bar:
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
    """Rate and time left, since the first call: what an earlier start has done does not count as speed."""

    def __init__(self, unit: str, *, clock: Callable[[], float] | None = None) -> None:
        self.unit = unit
        self.clock = clock or time.monotonic
        self.first: tuple[int, float] | None = None

    def at(self, done: int, total: int) -> str:
        now = self.clock()
        if self.first is None:
            self.first = (done, now)
        fresh, seconds = done - self.first[0], now - self.first[1]
        if fresh <= 0 or seconds <= 0:
            return ""
        rate = fresh / seconds
        if done >= total:
            return f"{self._rate(rate)}, took {_clock(seconds)}"
        return f"{self._rate(rate)}, {_clock((total - done) / rate)} left"

    def _rate(self, rate: float) -> str:
        return f"{rate:.1f} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s/{self.unit}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning as one line; which line of code gave it helps nobody."""
    note(f"warning: {' '.join(str(message).split())}")


def quieten_libraries() -> None:
    """Silence what is known and no user can mend; every other warning stays."""
    # PEFT reads a name that transformers has renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # PEFT imports bitsandbytes, which misses kernels that only quantised models would use
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # and torchao, which misses kernels of GPUs that are not there, and registers what torch now knows by itself
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
