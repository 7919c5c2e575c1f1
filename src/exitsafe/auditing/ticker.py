"""Progress of a run: rows done and the running attack success rate by exit layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from exitsafe.records import Progress, Verdict
from exitsafe.results.numbers import fixed

_MOST_LAYERS = 12  # that fit on a line; of more layers, some are shown, evenly spread


class Ticker:
    """Counts the work of one process as a share of the whole.

    Args:
        progress: Called as `progress(done, total, note)`, if given.
        total: Rows to do, over all processes.
        asr_judge: The judge whose verdicts give the running rate, if any.
        rate: The title of that rate.
        num_processes: Shares are equal, so each row of this process counts once for every process.

    Attributes:
        done: Rows done so far, including those of an earlier start.
    """

    def __init__(
        self, progress: Progress | None, *, total: int, asr_judge: str | None, rate: str = "ASR", num_processes: int = 1
    ) -> None:
        self.progress = progress
        self.total = total
        self.done = 0
        self.asr_judge = asr_judge
        self.rate = rate
        self.num_processes = num_processes
        self.outcomes: dict[int, list[float]] = defaultdict(list)

    def hear(self, verdicts: Sequence[Verdict]) -> None:
        """Add verdicts to the running rate."""
        for verdict in verdicts:
            if verdict.measure == "asr" and verdict.judge == self.asr_judge and verdict.score is not None:
                self.outcomes[verdict.exit_layer].append(verdict.score)

    def tick(self, rows: int = 0) -> None:
        """Report progress after `rows` more rows of this process."""
        self.done = min(self.total, self.done + rows * self.num_processes)
        if self.progress is not None:
            self.progress(self.done, self.total, self._note())

    def complete(self, done: int) -> None:
        """Report the end, with the rows of all processes; it may come early if layers stop."""
        self.done = self.total = done
        self.tick()

    def _note(self) -> str:
        layers = sorted(self.outcomes)
        if not layers:
            return ""
        step = -(-len(layers) // _MOST_LAYERS)
        means = {layer: sum(self.outcomes[layer]) / len(self.outcomes[layer]) for layer in layers[::step]}
        rates = (f"{layer}:{fixed(100 * mean, 0)}%" for layer, mean in means.items())
        return f"{self.rate} by exit {' '.join(rates)}"
