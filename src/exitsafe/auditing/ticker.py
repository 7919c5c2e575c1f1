"""Progress of a run: rows done and the running rate of attack success by exit layer. Decides nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from exitsafe.records import Progress, Verdict
from exitsafe.results.numbers import fixed

_MOST_LAYERS = 12  # more do not fit a line; then some, evenly spread


class Ticker:
    """Counts what one process does, as a part of what all do.

    Args:
        progress: Called as `progress(done, total, note)`; None for nobody.
        total: Rows that all processes have to do.
        asr_judge: The judge whose verdicts give the running rate; None for none.
        rate: What that judge's rate is called.
        num_processes: Their shares are alike: a row of one stands for one of each.

    Attributes:
        done: Rows done so far; to begin with those of an earlier start.
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
        """Count verdicts; scores of attacks by the judge that speaks for them enter the note."""
        for verdict in verdicts:
            if verdict.measure == "asr" and verdict.judge == self.asr_judge and verdict.score is not None:
                self.outcomes[verdict.exit_layer].append(verdict.score)

    def tick(self, rows: int = 0) -> None:
        """Report, with so many rows more of this process."""
        self.done = min(self.total, self.done + rows * self.num_processes)
        if self.progress is not None:
            self.progress(self.done, self.total, self._note())

    def complete(self, done: int) -> None:
        """Report the end, with what all have done; that may come early when layers are settled."""
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
