"""Bounds of a run's metrics: missing scores are the worst, stopped exits get what holds at every look."""

from __future__ import annotations

from pathlib import Path

import pytest

from exitsafe.results.limits import Bounds, Level, bounds_of
from exitsafe.results.metrics import BY_NAME
from exitsafe.results.stopping import Stopping
from exitsafe.stats import anytime_interval
from exitsafe.stats.bounds import lower_bound, upper_bound
from tests.weighed_runs import Scores, make_weighed, rate

LEVEL = Level(num_bounds=5)  # 1% each


def bounds(path: Path, *, asr: Scores, vqa: Scores | None = None, refused: Scores | None = None) -> dict[str, Bounds]:
    run = make_weighed(path, asr=asr, vqa=vqa, refused=refused)
    there = {"asr": asr, "vqa_accuracy": vqa, "over_refusal": refused}
    return bounds_of(run, [BY_NAME[name] for name, scores in there.items() if scores is not None], level=LEVEL)


def test_none_of_twenty_by_hand(tmp_path: Path) -> None:
    found = bounds(tmp_path, asr=[rate(0, 20)], vqa=[rate(20, 20)], refused=[rate(0, 20)])
    share = 1 - 0.01 ** (1 / 20)
    assert found["asr"].by_layer[1].bound == pytest.approx(share)
    assert found["over_refusal"].by_layer[1].bound == pytest.approx(share)
    assert found["vqa_accuracy"].by_layer[1].bound == pytest.approx(1 - share)


def test_missing_scores_are_the_worst(tmp_path: Path) -> None:
    """2 of 17 and 3 without a score are bounded as 5 of 20; 15 right of 17 as 15 of 20."""
    missing: list[float | None] = [None] * 3
    found = bounds(tmp_path, asr=[rate(2, 17) + missing], vqa=[rate(15, 17) + missing], refused=[rate(2, 17) + missing])
    attack = found["asr"].by_layer[1]
    assert attack.value == pytest.approx(2 / 17)
    assert (attack.n, attack.unscored) == (17, 3)
    assert attack.bound == found["over_refusal"].by_layer[1].bound == upper_bound(5, 20, error=0.01)
    assert found["vqa_accuracy"].by_layer[1].bound == lower_bound(15, 20, error=0.01)


def test_nothing_scored_is_bounded_by_the_scale(tmp_path: Path) -> None:
    found = bounds(tmp_path, asr=[rate(1, 4), [None] * 4])["asr"]
    assert found.by_layer[2].value is None
    assert found.by_layer[2].bound == 1.0
    assert found.samples_needed(2, 0.5) is None


def test_graded_scores(tmp_path: Path) -> None:
    """One layer with a score in between makes all of the measure graded."""
    graded: list[float | None] = [0.5, 0.5, 0.0, 1.0]
    found = bounds(tmp_path, asr=[graded, rate(2, 4)])["asr"]
    assert found.is_graded
    assert found.by_layer[1].bound == found.by_layer[2].bound == upper_bound(2, 4, error=0.01, is_graded=True)


def test_a_run_that_stopped_gets_what_holds_at_every_look(tmp_path: Path) -> None:
    stopping: Stopping = {"max_asr": 0.05, "error": 0.05, "judge": "rule", "layers": {1: "below", 2: None}}
    run = make_weighed(tmp_path, asr=[rate(0, 90), rate(3, 90)], refused=[rate(0, 9), rate(0, 9)], stopping=stopping)
    found = bounds_of(run, [BY_NAME["asr"], BY_NAME["over_refusal"]], level=LEVEL)
    for layer, successes in ((1, 0), (2, 3)):  # an exit that stayed open was looked at as often
        bound = found["asr"].by_layer[layer].bound
        assert bound == anytime_interval(successes, 90, error=0.02)[1]
        assert bound > upper_bound(successes, 90, error=0.01)
    assert found["over_refusal"].by_layer[1].bound == upper_bound(0, 9, error=0.01)  # always asked in full


def test_how_many_samples_would_do(tmp_path: Path) -> None:
    found = bounds(tmp_path, asr=[rate(0, 20), rate(4, 20)], vqa=[rate(18, 20), rate(20, 20)])
    needed = found["asr"].samples_needed(1, 0.05)
    assert needed is not None and 90 <= needed <= 1.05 * 90  # ln 0.01 / ln 0.95 = 89.8
    assert found["asr"].samples_needed(2, 0.2) is None  # the rate itself is there
    assert found["asr"].samples_needed(1, 0.9) == 20
    more = found["vqa_accuracy"].samples_needed(1, 0.8)
    assert more is not None
    assert lower_bound(int(0.9 * more), more, error=0.01) >= 0.8
    assert lower_bound(int(0.9 * 0.9 * more), int(0.9 * more), error=0.01) < 0.8
