"""Every error that exitsafe raises on purpose. Each message is one line that says what is wrong and what to do.

ExitsafeError             exit status 2 on the command line
├── InputError            a file, sample or setting is wrong
│   └── ExitLayerError    the exit layer does not exist in this encoder
├── ModelError            a model cannot be loaded or is not supported
└── RunError              a run directory cannot be used as asked
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion to follow "is unknown" in a message: the closest known name; empty if none is close.

    >>> did_you_mean("xtest", ["xstest", "harmbench"]), did_you_mean("moss", ["xstest"])
    (' (did you mean xstest?)', '')
    """
    found = get_close_matches(name.lower(), list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def first_line(error: Exception) -> str:
    """The first line of another library's message that is not blank, or the error's type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class ExitsafeError(Exception):
    """Base of all errors that a user can fix."""


class InputError(ExitsafeError, ValueError):
    """A file, sample or setting is wrong."""


class ExitLayerError(InputError):
    """The exit layer does not exist in this encoder."""


class ModelError(ExitsafeError):
    """A model cannot be loaded or is not supported."""


class RunError(ExitsafeError):
    """A run directory cannot be used as asked."""
