"""SIGINT and SIGTERM while something is under way that should end first. Knows nothing about training.

Python's main thread alone may handle signals; in any other everything is as usual.
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
    """Whether somebody wants an end, and what is saved then. Made by `noted_signals`."""

    def __init__(self) -> None:
        self.is_asked = False
        self.message = ""
        self._waits = True

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal acts at once: for what is repeated rather than waited for.

        Raises:
            KeyboardInterrupt: On a signal, also one that came before.
        """
        self._waits = False
        try:
            if self.is_asked:
                raise self.interrupt()
            yield
        finally:
            self._waits = True

    def interrupt(self) -> KeyboardInterrupt:
        """What to raise in the end."""
        return KeyboardInterrupt(self.message)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler: a second signal does not wait any more."""
        if not self._waits or self.is_asked:
            raise self.interrupt()
        self.is_asked = True
        os.write(2, b"\nexitsafe: stopping when this step is done and saved (again to quit at once)\n")


@contextmanager
def noted_signals() -> Iterator[Stop]:
    """Inside, SIGINT and SIGTERM are noted; on leaving, the handlers are those from before."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # one that Python did not install could not be put back; one that is ignored (nohup) is meant to be
    mine = [number for number, handler in before.items() if handler not in (None, signal.SIG_IGN)]
    try:
        for number in mine:
            signal.signal(number, stop.note)
        yield stop
    finally:
        for number in mine:
            signal.signal(number, before[number])
