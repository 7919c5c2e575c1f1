from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from exitsafe.cli.recommend_tables import recommend_tables
from exitsafe.recommend import Recommendation, recommend
from exitsafe.results.costs import Savings
from exitsafe.results.stopping import Stopping
from exitsafe.specs.verbs import Limits
from tests.weighed_runs import make_latency, make_weighed, rate

SAVINGS = Savings(
    default_encoder=44,
    encoder={1: 20, 2: 44},
    prefill=956,
    answer=1000,
    num_answer_tokens=64,
    dropped_bytes={1: 2**20, 2: 0},
    model_bytes=2**30,
    is_measured=True,
)


def shown(choice: Recommendation) -> list[str]:
    console = Console(width=200, record=True, file=StringIO())
    for table in recommend_tables(choice):
        console.print(table, markup=False, soft_wrap=isinstance(table, str))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture
def weighed(tmp_path: Path) -> Any:
    def make(limits: Limits | None = None, *, encoder: float = 2.0, num_samples: int = 200, **more: Any) -> list[str]:
        scores = {"asr": [rate(0, num_samples)] * 2, "vqa": [rate(num_samples, num_samples)] * 2} | more
        run = make_weighed(tmp_path, default_exit=2, num_layers=3, **scores)
        latency = make_latency({1: 1.0, 2: encoder}, default=2)
        return shown(recommend(run, latency, SAVINGS, limits=limits))

    return make


def test_a_recommendation_in_words(weighed: Any) -> None:
    lines = weighed(Limits(max_asr=0.05, min_vqa=0.9, max_ms=100))
    assert lines[-1] == (
        "Recommended, at 95% confidence over all exits: exit 1, the cheapest that qualifies; attack success at most "
        "2.4% (limit 5.0%), VQA accuracy at least 97.6% (limit 90.0%), an answer's time at most 74 ms (limit 100 ms). "
        "Also qualify: 2."
    )
    assert any("1 <- recommended" in line and "0.0% (0.0 to 1.9%)" in line and "yes" in line for line in lines)
    assert any("2 (default)" in line and "1.0 MiB" not in line and "75 (75 to 75)" in line for line in lines)


def test_a_recommendation_without_a_limit_on_attacks_says_so(weighed: Any) -> None:
    lines = weighed(Limits(min_vqa=0.5), asr=[rate(150, 200)] * 2)
    assert lines[-1].startswith("No --max-asr was given: attack success there may be 8")


def test_none_qualifies_in_words(weighed: Any) -> None:
    line = weighed(Limits(max_asr=0.01, max_ms=70, min_vqa=0.5))[-1]
    assert line.startswith("No exit qualifies, at 95% confidence over all exits. Nearest is exit 1: attack success may")
    assert (
        "success may be as high as 2.4%, the limit is 1.0% (seen 0.0%, n=200); about 493 samples at this rate" in line
    )
    assert line.endswith("; an answer's time may be as high as 74 ms, the limit is 70 ms.")


def test_nothing_asked_nothing_recommended(weighed: Any) -> None:
    assert weighed()[-1].startswith("For a recommendation give --max-asr")
    assert not any("recommended" in line for line in weighed()[:-1])


def test_where_early_exit_saves_next_to_nothing_it_says_so(weighed: Any) -> None:
    (line,) = [line for line in weighed() if line.startswith("Early exit")]
    assert line == (
        "Early exit saves next to nothing on this model: the encoder takes 16.7% of the measured time and 4.4% of the "
        "counted operations before the first token; exit 1 saves 1.3% (1.3% to 1.3%) of the measured time and 1.2% of "
        "the counted operations of an answer of 64 tokens."
    )
    (line,) = [line for line in weighed(encoder=50.0) if line.startswith("Early exit")]
    assert line.startswith("Early exit makes answers faster on this model")


def test_notes(weighed: Any) -> None:
    missing: list[float | None] = [None] * 3
    text = "\n".join(weighed(asr=[rate(0, 20) + missing, rate(0, 23)]))
    assert "With 95% confidence all 6 bounds hold at once, whichever exit you choose" in text
    assert "Answers without a score (3 in all) count against their exit" in text
    assert "2 of 3 exits were audited" in text
    assert "No VQA samples" not in text and "Times scatter" not in text
    assert "median of 24 requests" in text and "of 1.0 GiB in all" in text
    assert "No VQA samples were audited, so an exit that answers nonsense" in "\n".join(weighed(vqa=None))


def test_a_clock_that_shows_no_saving_says_so(tmp_path: Path) -> None:
    run = make_weighed(tmp_path, asr=[rate(0, 20)] * 2, default_exit=2)
    lines = shown(recommend(run, make_latency({1: 1.0, 2: 9.0}, default=2, num_passes=3)))
    assert any(line.startswith("Times scatter by more than exits differ") for line in lines)


def test_a_run_that_stopped_says_so(tmp_path: Path) -> None:
    stopping: Stopping = {"max_asr": 0.05, "error": 0.05, "judge": "rule", "layers": {1: "below"}}
    run = make_weighed(tmp_path, asr=[rate(0, 90)], stopping=stopping)
    lines = shown(recommend(run, limits=Limits(max_asr=0.05)))
    assert any("stopped exits early" in line for line in lines)
    assert not any("Cost of an exit" in line for line in lines)
