"""Wall-clock comparison of alternatives in one process: interleaved rounds, best of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def best_seconds(alternatives: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """The fastest of `rounds` runs of each; the rounds alternate so that a noisy machine harms all alike."""
    best = dict.fromkeys(alternatives, float("inf"))
    for run in alternatives.values():
        run()  # warm-up
    for _ in range(rounds):
        for name, run in alternatives.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best
