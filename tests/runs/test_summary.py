from __future__ import annotations

from typing import Any

import pytest

from exitsafe.records import Kind, Response, Verdict
from exitsafe.runs.scores import score_table
from exitsafe.runs.summary import summarise
from exitsafe.runs.tables import SampleInfo
from exitsafe.stats import wilson_interval

MODEL = {"name": "m", "family": "llava", "num_layers": 3, "default_exit": 2}
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
    assert list(summary) == ["model", "family", "num_layers", "default_exit", "layers", "bins", "judges"]
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
