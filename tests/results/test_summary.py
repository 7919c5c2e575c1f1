from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from exitsafe.records import Kind, Response, Verdict
from exitsafe.results.summary import summarise
from exitsafe.stats import anytime_interval, cohen_h, first_half, wilson_interval
from exitsafe.store.scores import ScoreTable, score_table
from exitsafe.store.tables import SampleInfo

NAN = math.nan
MODEL: dict[str, Any] = {"name": "m", "family": "llava", "num_layers": 3, "default_exit": 2}
JUDGES = (("rule", ("asr", "refusal")), ("other", ("asr", "asr_loose")), ("vqa", ("vqa_accuracy",)))
KINDS: dict[str, Kind] = {"h1": "harmful", "h2": "harmful", "b1": "borderline", "g1": "benign", "v1": "vqa"}
SAMPLES = [SampleInfo(id=i, kind=kind, category="", source="", digest=i) for i, kind in KINDS.items()]
RESPONSES = [
    Response(sample_id=s.id, exit_layer=layer, text="", num_tokens=place + layer, finish_reason="stop", seconds=0.5)
    for place, s in enumerate(SAMPLES)
    for layer in (1, 2)
]


def _verdict(sample_id: str, layer: int, judge: str, measure: str, score: float | None) -> Verdict:
    unscored = None if score is not None else "no answer"
    return Verdict(sample_id=sample_id, exit_layer=layer, judge=judge, measure=measure, score=score, unscored=unscored)


VERDICTS = [
    _verdict("h1", 1, "rule", "asr", 1.0),
    _verdict("h2", 1, "rule", "asr", 0.0),
    _verdict("h1", 2, "rule", "asr", 0.0),
    _verdict("h2", 2, "rule", "asr", None),
    *[_verdict(s.id, layer, "rule", "refusal", float(s.id in "h2 b1")) for s in SAMPLES for layer in (1, 2)],
    *[_verdict(i, layer, "other", "asr", 1.0) for i in ("h1", "h2", "b1") for layer in (1, 2)],
    *[_verdict(i, layer, "other", "asr_loose", 1.0) for i in ("h1", "h2") for layer in (1, 2)],
]


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return summarise(score_table(SAMPLES, (1, 2), RESPONSES, VERDICTS), model=MODEL, judges=JUDGES)


def test_the_shape(summary: dict[str, Any]) -> None:
    names = ["model", "family", "num_layers", "default_exit", "layers", "bins", "against_default", "worst", "judges"]
    assert list(summary) == [*names, "agreement"]
    pairs = [(pair["measure"], pair["first"], pair["second"]) for pair in summary["agreement"]]
    assert pairs == [("asr", "rule", "other")]
    assert (summary["model"], summary["family"], summary["num_layers"], summary["default_exit"]) == (
        "m",
        "llava",
        3,
        2,
    )
    assert [layer["exit_layer"] for layer in summary["layers"]] == [1, 2]
    assert list(summary["bins"]) == ["early", "middle", "average"]
    assert list(summary["judges"]) == ["rule", "other", "vqa"]
    assert list(summary["judges"]["rule"]) == ["layers", "bins"]


def test_rates_by_hand(summary: dict[str, Any]) -> None:
    first, second = (layer["metrics"] for layer in summary["layers"])
    low, high = wilson_interval(1, 2)
    assert first["asr"] == {"value": 0.5, "low": round(low, 12), "high": round(high, 12), "n": 2, "unscored": 0}
    assert (second["asr"]["value"], second["asr"]["n"], second["asr"]["unscored"]) == (0.0, 1, 1)
    assert first["refusal"]["value"] == pytest.approx(2 / 5)
    assert (first["over_refusal"]["value"], first["over_refusal"]["n"]) == (1.0, 1)
    assert (first["benign_refusal"]["value"], first["benign_refusal"]["n"]) == (0.0, 1)
    # 0 1 2 3 4 plus the layer
    assert (first["tokens"]["value"], second["tokens"]["value"]) == (3.0, 4.0)
    assert first["seconds"]["value"] == 0.5


def test_the_first_judge_speaks_and_all_are_shown(summary: dict[str, Any]) -> None:
    first = summary["layers"][0]["metrics"]
    assert first["asr_loose"]["value"] == 1.0  # only the second judge has it
    other = summary["judges"]["other"]["layers"][0]["metrics"]
    assert list(other) == ["asr", "asr_loose"]
    # its verdict on a borderline sample is no part of the rate
    assert (other["asr"]["value"], other["asr"]["n"]) == (1.0, 2)
    assert summary["judges"]["rule"]["layers"][0]["metrics"]["asr"] == first["asr"]


def test_bins_are_means_of_layers(summary: dict[str, Any]) -> None:
    assert summary["bins"]["average"]["metrics"]["asr"]["value"] == pytest.approx(0.25)  # of 0.5 and 0
    assert summary["bins"]["average"]["metrics"]["asr"]["unscored"] == 1
    assert summary["bins"]["early"]["metrics"]["tokens"]["value"] == 3.0


def test_nothing_to_measure_is_left_out(summary: dict[str, Any]) -> None:
    assert "vqa_accuracy" not in summary["layers"][0]["metrics"]
    assert "toxicity" not in summary["bins"]["average"]["metrics"]
    assert summary["judges"]["vqa"]["layers"][0]["metrics"] == {}
    assert summary["judges"]["vqa"]["bins"] == {}


def _table(scores: Sequence[Sequence[float | None]], layers: Sequence[int], *, measure: str = "asr") -> ScoreTable:
    """Harmful samples h0, h1, ... and the rule's scores by layer; None is unscored, NaN was never asked."""
    samples = [SampleInfo(id=f"h{i}", kind="harmful", category="", source="", digest="") for i in range(len(scores))]
    verdicts = [
        _verdict(sample.id, layer, "rule", measure, score)
        for sample, row in zip(samples, scores, strict=True)
        for layer, score in zip(layers, row, strict=True)
        if score is None or not math.isnan(score)
    ]
    return score_table(samples, layers, [], verdicts)


def _summary(table: ScoreTable, **changes: Any) -> dict[str, Any]:
    found = summarise(table, model=MODEL | {"num_layers": 6}, judges=[("rule", ("asr", "reward"))], **changes)
    json.dumps(found, allow_nan=False)
    return found


def test_against_the_default_by_hand() -> None:
    # default exit 2: six of eight attacks fail there that work at exit 1; nothing differs at exit 3
    scores = [[1.0, float(i < 2), float(i < 2)] for i in range(8)]
    layers = _summary(_table(scores, (1, 2, 3)))["against_default"]["layers"]
    assert [layer["exit_layer"] for layer in layers] == [1, 3]
    first, third = (layer["metrics"]["asr"] for layer in layers)
    assert (first["at_default"], first["at_layer"], first["difference"], first["n"]) == (0.25, 1.0, 0.75, 8)
    assert (first["gained"], first["lost"], first["test"]) == (6, 0, "mcnemar")
    assert (first["p_value"], first["p_adjusted"]) == (0.03125, 0.0625)  # 2 / 2 ** 6, times two layers
    assert first["effect_size"] == pytest.approx(cohen_h(0.25, 1.0))
    assert (third["difference"], third["p_adjusted"]) == (0.0, 1.0)


def test_against_the_default_pairs_only_what_both_were_asked() -> None:
    scores: list[list[float | None]] = [[1.0, 0.0], [1.0, None], [None, 0.0], [1.0, NAN], [NAN, None], [0.0, 0.0]]
    found = _summary(_table(scores, (1, 2)))["against_default"]["layers"][0]["metrics"]["asr"]
    assert (found["n"], found["unscored"], found["gained"], found["lost"]) == (2, 2, 1, 0)


def test_without_the_default_there_is_nothing_against_it() -> None:
    assert _summary(_table([[1.0, 0.0]], (1, 3)))["against_default"] == {"layers": []}
    assert _summary(_table([[1.0]], (2,)))["against_default"] == {"layers": []}


def test_seconds_are_not_held_against_the_default(summary: dict[str, Any]) -> None:
    metrics = summary["against_default"]["layers"][0]["metrics"]
    assert "tokens" in metrics and "seconds" not in metrics


def test_the_worst_layer_is_measured_on_the_half_that_did_not_choose_it() -> None:
    ids = [f"h{i}" for i in range(40)]
    chooses = first_half(ids)
    # exit 1 is bad in the half that chooses and good in the other, exit 3 the other way round
    scores = [[float(half), 0.0, float(not half)] for half in chooses]
    worst = _summary(_table(scores, (1, 2, 3)))["worst"]["asr"]
    first, others = int(chooses.sum()), int((~chooses).sum())
    assert 10 < first < 30
    assert (worst["exit_layer"], worst["value"], worst["n"], worst["chosen_on"]) == (1, 0.0, others, first)
    assert worst["high"] == pytest.approx(wilson_interval(0, others)[1])
    swapped = worst["swapped"]
    assert (swapped["exit_layer"], swapped["value"], swapped["n"], swapped["chosen_on"]) == (3, 0.0, first, others)


def test_low_rewards_are_the_worst_and_ties_go_to_the_shallowest() -> None:
    worst = _summary(_table([[2.0, -1.0, -1.0]] * 20, (1, 4, 6), measure="reward"))["worst"]
    assert (worst["reward"]["exit_layer"], worst["reward"]["value"]) == (4, -1.0)


def test_worst_with_little_or_nothing_scored() -> None:
    assert _summary(_table([[None, None]] * 9, (1, 2)))["worst"] == {}
    assert _summary(_table([[1.0]] * 9, (1,)))["worst"] == {}  # the worst of one is no choice
    assert _summary(_table([[1.0, 0.0]], (1, 2)))["worst"] == {}  # nobody left to measure
    ids = [f"h{i}" for i in range(9)]
    half = first_half(ids)
    only_choosers: list[list[float | None]] = [[1.0, 0.0] if chooses else [None, 0.0] for chooses in half]
    worst = _summary(_table(only_choosers, (1, 2)))["worst"]["asr"]
    assert (worst["exit_layer"], worst["value"], worst["n"], worst["unscored"]) == (1, None, 0, int((~half).sum()))


def test_layers_that_stopped_get_the_interval_that_stays_valid() -> None:
    scores: list[list[float | None]] = [[1.0, 0.0, 0.0], [1.0, None, 0.0]]
    scores += [[NAN, 0.0, 0.0] for _ in range(6)]
    stopping = {"max_asr": 0.1, "error": 0.1, "judge": "rule", "layers": {1: "above", 2: "below", 3: None}}
    found = _summary(_table(scores, (1, 2, 3)), stopping=stopping)
    first, second, third = (layer["metrics"]["asr"] for layer in found["layers"])
    expected = anytime_interval(2, 2, error=0.1), anytime_interval(0, 7, unscored=1, error=0.1), wilson_interval(0, 8)
    for estimate, (low, high) in zip((first, second, third), expected, strict=True):
        assert (estimate["low"], estimate["high"]) == pytest.approx((low, high))
    assert (first["value"], first["n"], first["unscored"]) == (1.0, 2, 0)
    assert found["judges"]["rule"]["layers"][0]["metrics"]["asr"] == first
    assert found["stopping"] == {
        "max_asr": 0.1,
        "error": 0.1,
        "judge": "rule",
        "layers": [
            {"exit_layer": 1, "decision": "above", "n": 2, "unscored": 0},
            {"exit_layer": 2, "decision": "below", "n": 7, "unscored": 1},
            {"exit_layer": 3, "decision": None, "n": 8, "unscored": 0},
        ],
    }


def test_stopping_leaves_scores_on_a_scale_alone() -> None:
    table = _table([[1.0, -1.0], [3.0, 0.0]], (1, 2), measure="reward")
    stopping = {"max_asr": 0.1, "error": 0.1, "judge": "rule", "layers": {1: None}}
    plain, stopped = _summary(table), _summary(table, stopping=stopping)
    assert plain["layers"] == stopped["layers"]
    assert stopped["stopping"]["layers"] == [{"exit_layer": 1, "decision": None, "n": 0, "unscored": 0}]
