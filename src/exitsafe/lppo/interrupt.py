"""SIGINT and SIGTERM during work that should be finished first.

Only Python's main thread can handle signals; in other threads nothing changes.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a signal has asked to stop, and the message for the user. Made by `noted_signals`."""

    def __init__(self) -> None:
        self.is_asked = False
        self.message = ""
        self._waits = True

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal acts at once: for work that is repeated on resume.

        Raises:
            KeyboardInterrupt: On a signal, or if one came before.
        """
        self._waits = False
        try:
            if self.is_asked:
                raise self.interrupt()
            yield
        finally:
            self._waits = True

    def interrupt(self) -> KeyboardInterrupt:
        """The exception to raise."""
        return KeyboardInterrupt(self.message)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler: a second signal acts at once."""
        if not self._waits or self.is_asked:
            raise self.interrupt()
        self.is_asked = True
        os.write(2, b"\nexitsafe: stopping after this step is done and saved (press again to quit at once)\n")


@contextmanager
def noted_signals() -> Iterator[Stop]:
    """Inside, SIGINT and SIGTERM are noted; on leaving, the previous handlers are restored."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # a handler that Python did not install cannot be restored; an ignored signal (nohup) stays ignored
    mine = [number for number, handler in before.items() if handler not in (None, signal.SIG_IGN)]
    try:
        for number in mine:
            signal.signal(number, stop.note)
        yield stop
    finally:
        for number in mine:
            signal.signal(number, before[number])
