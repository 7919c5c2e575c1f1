"""Where samples come from: files of the user's own and the organism's suites. Knows no model and no run."""

from exitsafe.data.local import load_suite
from exitsafe.data.registry import SUITE_NAMES, load_suites

__all__ = ["SUITE_NAMES", "load_suite", "load_suites"]
