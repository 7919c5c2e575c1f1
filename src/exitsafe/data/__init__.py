"""Loads samples: from your own files, Hub data sets and the organism's suites."""

from exitsafe.data.known import KNOWN_SUITES, KnownSuite
from exitsafe.data.local import load_suite
from exitsafe.data.registry import absolute_names, load_suites, resolve_suites
from exitsafe.world.profile import SUITE_NAMES

__all__ = [
    "KNOWN_SUITES",
    "SUITE_NAMES",
    "KnownSuite",
    "absolute_names",
    "load_suite",
    "load_suites",
    "resolve_suites",
]
