"""`kill -9` in the middle of the work, on the organism: answering, judging, putting the run together.

Each audit runs in a fork of a process that has everything loaded, so that the kills fall into the work.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import exitsafe
from exitsafe.data import SUITE_NAMES, load_suites
from exitsafe.engine.vlm import VLM
from exitsafe.judges import load_judges
from exitsafe.records import Response, Sample, Verdict
from exitsafe.store import directory, files
from tests.fake_vlm import content
from tests.forks import fork, killed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
PHASES = {"answering": b"a", "judging": b"j", "compacting": b"c"}


class Slow:
    """The world's rule, slowly, so that kills can fall into the judging."""

    name = "slow"
    measures = ("asr", "refusal")

    def __init__(self) -> None:
        (self.rule,) = load_judges(["world-rule"])

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        time.sleep(0.2)
        return [Verdict(**{**vars(verdict), "judge": self.name}) for verdict in self.rule(samples, responses)]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return exitsafe.load_vlm("organism")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return load_suites(SUITE_NAMES, limit=3)


def _audit(vlm: VLM, samples: Sequence[Sample], out: Path) -> None:
    judges: list[Any] = ["world-rule", Slow()]
    options: dict[str, Any] = {"exit_layers": (1, 4, 7), "max_new_tokens": 24, "batch_size": 8}
    exitsafe.audit(vlm, samples, judges=judges, out=out, judge_pass="second", **options)


def _tell_phases(pipe: int) -> None:
    """Write a letter when each phase begins, and make the last one long enough to be hit."""
    complete, judge, write = VLM.complete, Slow.__call__, files.write_whole

    def completing(self: VLM, rows: Any, **options: Any) -> Any:
        if rows:
            os.write(pipe, PHASES["answering"])
        return complete(self, rows, **options)

    def judging(self: Slow, *asked: Any) -> Any:
        os.write(pipe, PHASES["judging"])
        return judge(self, *asked)

    def writing(path: Path, *given: Any, **options: Any) -> None:
        if path.name != "run.json":
            os.write(pipe, PHASES["compacting"])
            time.sleep(0.05)
        write(path, *given, **options)
        time.sleep(0.05)

    VLM.complete = completing  # type: ignore[method-assign]
    Slow.__call__ = judging  # type: ignore[method-assign, assignment]
    vars(directory)["write_whole"] = writing


def _kill_in(phase: str, delay: float, vlm: VLM, samples: Sequence[Sample], out: Path) -> bool:
    """Audit in a fork and kill it so many seconds into a phase; whether it was still at work."""
    read, write = os.pipe()

    def work() -> None:
        os.close(read)
        _tell_phases(write)
        _audit(vlm, samples, out)

    child = fork(work)
    os.close(write)
    while (letter := os.read(read, 1)) and letter != PHASES[phase]:
        pass
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.close(read)
    return killed(child)


def test_killed_at_random_points_it_ends_with_the_same_summary(vlm: VLM, samples: list[Sample], tmp_path: Path) -> None:
    _audit(vlm, samples, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    draw = random.Random(0)
    longest = {"answering": 0.2, "judging": 0.3, "compacting": 0.25}
    hits = dict.fromkeys(PHASES, 0)
    for number in range(6):
        phase = list(PHASES)[number % 3]
        out = tmp_path / str(number)
        for _ in range(draw.choice((1, 1, 2))):  # now and then twice in a row
            hits[phase] += _kill_in(phase, draw.uniform(0, longest[phase]), vlm, samples, out)
        _audit(vlm, samples, out)
        assert content(out) == expected, f"kill {number}, {phase}"
    assert all(count >= 1 for count in hits.values()), hits
