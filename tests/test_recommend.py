"""Which exit is chosen, on runs whose numbers are known, and that choosing among many keeps its promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from exitsafe.errors import InputError, RunError
from exitsafe.recommend import recommend
from exitsafe.results.costs import Savings
from exitsafe.specs.verbs import Limits
from exitsafe.stats import wilson_interval
from exitsafe.stats.bounds import upper_bound
from tests.weighed_runs import make_latency, make_weighed, rate

N = 200


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "run"


def make_savings(**changes: object) -> Savings:
    given: dict[str, object] = {
        "default_encoder": 300,
        "encoder": {1: 100, 2: 200, 3: 300},
        "prefill": 500,
        "answer": 200,
        "num_answer_tokens": 64,
        "dropped_bytes": {1: 80, 2: 40, 3: 0},
        "model_bytes": 1000,
        "is_measured": True,
    }
    return Savings(**{**given, **changes})  # type: ignore[arg-type]


def test_the_cheapest_that_keeps_every_limit(runs: Path) -> None:
    run = make_weighed(
        runs,
        asr=[rate(60, N), rate(1, N), rate(0, N), rate(0, N)],
        vqa=[rate(N, N), rate(120, N), rate(190, N), rate(N, N)],
        refused=[rate(0, N)] * 4,
        default_exit=4,
    )
    found = recommend(run, limits=Limits(max_asr=0.05, min_vqa=0.8, max_over_refusal=0.1))
    assert (found.recommended, found.nearest, found.qualifying) == (3, None, (3, 4))
    assert [miss.limit for miss in found.at(1).misses] == ["max_asr"]
    assert [miss.limit for miss in found.at(2).misses] == ["min_vqa"]
    assert recommend(run, limits=Limits(max_asr=0.05)).recommended == 2
    assert recommend(run, limits=Limits(min_vqa=0.8)).recommended == 1


def test_bounds_by_hand_and_whatever_the_limits(runs: Path) -> None:
    """Three exits and two kinds of bound: six bounds at 0.05 / 6 each."""
    run = make_weighed(runs, asr=[rate(0, 100)] * 3, vqa=[rate(100, 100)] * 3)
    for limits in (None, Limits(max_asr=0.5), Limits(max_asr=0.5, min_vqa=0.1)):
        found = recommend(run, limits=limits)
        assert found.num_bounds == 6
        share = 1 - (0.05 / 6) ** (1 / 100)
        assert found.at(2).metrics["asr"].bound == pytest.approx(share)
        assert found.at(2).metrics["vqa_accuracy"].bound == pytest.approx(1 - share)
        assert (found.at(2).metrics["asr"].low, found.at(2).metrics["asr"].high) == pytest.approx(
            wilson_interval(0, 100)
        )
    timed = recommend(run, make_latency({1: 1.0, 2: 2.0, 3: 3.0}, default=3))
    assert timed.num_bounds == 9


def test_choosing_among_many_keeps_its_promise() -> None:
    """24 exits that all are just too unsafe: how often is one recommended?"""
    limit, n, num_exits = 0.1, 200, 24
    totals = np.arange(n + 1)
    error = 0.05 / num_exits
    passes = np.array([upper_bound(float(total), n, error=error) <= limit for total in totals])
    uncorrected = np.array([wilson_interval(int(total), n)[1] <= limit for total in totals])
    chances = binom.pmf(totals, n, limit + 1e-9)
    assert 1 - (1 - chances[passes].sum()) ** num_exits <= 0.05
    assert 1 - (1 - chances[uncorrected].sum()) ** num_exits > 0.3


def test_what_was_seen_is_not_enough(runs: Path) -> None:
    """None of 20 attacks succeeded, and 5% cannot be promised; the nearest exit says what it lacks."""
    run = make_weighed(runs, asr=[rate(9, 20), rate(0, 20), rate(0, 20)], vqa=[rate(20, 20)] * 3)
    found = recommend(run, limits=Limits(max_asr=0.05, min_vqa=0.5))
    assert (found.recommended, found.qualifying, found.nearest) == (None, (), 2)
    (miss,) = found.at(2).misses
    assert (miss.limit, miss.allowed, miss.bound) == ("max_asr", 0.05, found.at(2).metrics["asr"].bound)
    assert miss.samples_needed is not None
    enough = make_weighed(runs, asr=[rate(0, miss.samples_needed)] * 3, vqa=[rate(20, 20)] * 3)
    assert recommend(enough, limits=Limits(max_asr=0.05, min_vqa=0.5)).recommended == 1
    few = make_weighed(runs, asr=[rate(0, int(0.9 * miss.samples_needed))] * 3, vqa=[rate(20, 20)] * 3)
    assert recommend(few, limits=Limits(max_asr=0.05, min_vqa=0.5)).recommended is None


def test_the_nearest_is_the_one_whose_worst_miss_is_smallest(runs: Path) -> None:
    run = make_weighed(
        runs,
        asr=[rate(100, N), rate(30, N), rate(0, N)],
        vqa=[rate(N, N), rate(150, N), rate(10, N)],
    )
    assert recommend(run, limits=Limits(max_asr=0.1, min_vqa=0.9)).nearest == 2


def test_answers_without_a_score_can_only_hinder(runs: Path) -> None:
    limits = Limits(max_asr=0.05)
    assert recommend(make_weighed(runs, asr=[rate(0, 140)]), limits=limits).recommended == 1
    missing: list[float | None] = [None] * 7
    assert recommend(make_weighed(runs, asr=[rate(0, 133) + missing]), limits=limits).recommended is None


def test_the_pareto_set_by_hand(runs: Path) -> None:
    """Exit 2 is as good as exit 1 and dearer; 3 is safer, 4 less useful and no safer than 3, 5 more useful."""
    run = make_weighed(
        runs,
        asr=[rate(50, N), rate(50, N), rate(5, N), rate(5, N), rate(5, N)],
        vqa=[rate(150, N), rate(150, N), rate(150, N), rate(100, N), rate(190, N)],
    )
    assert recommend(run).pareto == (1, 3, 5)
    refusing = make_weighed(runs, asr=[rate(0, N)] * 2, refused=[rate(150, N), rate(0, N)])
    assert recommend(refusing).pareto == (1, 2)


def test_the_clock_limits_and_its_noise_does_not_choose(runs: Path) -> None:
    run = make_weighed(runs, asr=[rate(0, N)] * 3, default_exit=3)
    times = {1: 9.0, 2: 8.0, 3: 30.0}  # exit 1 cannot take longer than 2: noise
    found = recommend(run, make_latency(times, default=3), limits=Limits(max_asr=0.1, max_ms=82.0))
    assert found.recommended == 1
    assert found.qualifying == (1, 2)
    times_of_1 = found.at(1).times
    assert times_of_1 is not None
    assert times_of_1.answer_ms.median == times_of_1.bound == 9 + 10 + 63
    assert recommend(run, make_latency(times, default=3), num_answer_tokens=1).at(1).times != times_of_1
    assert recommend(run, make_latency(times, default=3), limits=Limits(max_ms=81.5)).recommended == 2


def test_too_few_passes_promise_no_time(runs: Path) -> None:
    run = make_weighed(runs, asr=[rate(0, N)] * 3)
    times = {1: 1.0, 2: 2.0, 3: 3.0}
    found = recommend(run, make_latency(times, default=3, num_passes=6), limits=Limits(max_ms=1000))
    assert found.recommended is None  # 0.5^6 > 0.05 / 6
    (miss,) = found.at(1).misses
    assert (miss.limit, miss.bound) == ("max_ms", None)
    assert recommend(run, make_latency(times, default=3, num_passes=7), limits=Limits(max_ms=1000)).recommended == 1


def test_savings_are_paired_so_that_a_machine_may_slow_down(runs: Path) -> None:
    run = make_weighed(runs, asr=[rate(0, N)] * 3, default_exit=3)
    latency = make_latency({1: 7.0, 2: 17.0, 3: 27.0}, default=3, drift=0.1)
    found = recommend(run, latency).at(1).times
    assert found is not None
    assert found.answer_ms.low is not None and found.answer_ms.low < 0.9 * found.answer_ms.median
    saved = found.saved_share
    assert (saved.low, saved.median, saved.high) == pytest.approx((0.2, 0.2, 0.2))


@pytest.mark.parametrize(("encoder", "hardly"), [(2.0, True), (40.0, False)])
def test_whether_early_exit_pays(runs: Path, encoder: float, hardly: bool) -> None:
    run = make_weighed(runs, asr=[rate(0, N)] * 2, default_exit=2)
    found = recommend(run, make_latency({1: 1.0, 2: encoder}, default=2), num_answer_tokens=64)
    assert found.hardly_saves is hardly
    assert found.encoder_share == {"measured": encoder / (encoder + 10)}
    assert recommend(run).hardly_saves is None


def test_an_unsure_clock_leaves_the_word_to_the_count(runs: Path) -> None:
    run = make_weighed(runs, asr=[rate(0, N)] * 3, default_exit=3)
    latency = make_latency({1: 10.0, 2: 50.0, 3: 90.0}, default=3, num_passes=3)  # too few for an interval
    assert recommend(run, latency).hardly_saves is False
    dear = make_savings()
    assert recommend(run, latency, dear).hardly_saves is False
    assert recommend(run, latency, make_savings(prefill=5000)).hardly_saves is True
    found = recommend(run, None, dear)
    assert found.most_saved == {"counted": 0.2} and found.encoder_share == {"counted": 0.375}
    assert [point.flops_saved for point in found.points] == [200, 100, 0]
    assert [point.bytes_saved for point in found.points] == [80, 40, 0]


def test_the_default_exit_alone_says_nothing_of_early_exit(runs: Path) -> None:
    run = make_weighed(runs, asr=[rate(0, N)], default_exit=1)
    assert recommend(run, make_latency({1: 2.0}, default=1), make_savings()).hardly_saves is None


def test_what_cannot_be_limited(runs: Path) -> None:
    run = make_weighed(runs, asr=[rate(0, 10)])
    with pytest.raises(InputError, match=r"min_vqa: .* has no vqa_accuracy; audit vqa samples"):
        recommend(run, limits=Limits(min_vqa=0.5))
    with pytest.raises(InputError, match=r"max_over_refusal: .* borderline samples"):
        recommend(run, limits=Limits(max_over_refusal=0.5))
    with pytest.raises(InputError, match="max_ms: no times are measured"):
        recommend(run, limits=Limits(max_ms=5))
    with pytest.raises(RunError, match="no attack success"):
        recommend(make_weighed(runs, vqa=[rate(5, 10)]))


@pytest.mark.parametrize(
    "limit",
    [{"max_asr": 1.5}, {"min_vqa": -0.1}, {"max_over_refusal": float("nan")}, {"max_ms": 0}, {"max_ms": float("inf")}],
)
def test_limits_out_of_range(limit: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(limit)).replace("_", "-")):
        Limits(**limit)


def test_a_recommendation_is_json(runs: Path) -> None:
    run = make_weighed(runs, asr=[rate(0, 20), [None] * 20], vqa=[rate(5, 20)] * 2, num_layers=6)
    found = recommend(run, make_latency({1: 1.0, 2: 2.0}, default=2, num_passes=2), limits=Limits(max_asr=0.01))
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["pareto"] == list(found.pareto)
    assert document["limits"]["max_asr"] == 0.01
    assert document["points"][1]["metrics"]["asr"]["value"] is None
    assert document["points"][0]["times"]["bound"] is None
    assert document["hardly_saves"] == found.hardly_saves
    assert document["nearest"] == 1
