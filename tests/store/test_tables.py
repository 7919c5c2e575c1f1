from __future__ import annotations

from pathlib import Path

import pytest

from exitsafe.errors import RunError
from exitsafe.records import Response, Verdict
from exitsafe.store.tables import (
    SampleInfo,
    read_responses,
    read_samples,
    read_verdicts,
    responses_in_table,
    to_parquet,
    verdicts_in_table,
)

SAMPLES = [
    SampleInfo(id="b", kind="harmful", category="x", source="s", digest="1"),
    SampleInfo(id="a", kind="vqa", category="", source="t", digest="2"),
]
RESPONSES = [
    Response(sample_id=i, exit_layer=layer, text=f"ü\n{i}", num_tokens=3, finish_reason="length", seconds=0.5)
    for i in ("b", "a")
    for layer in (1, 2)
]
VERDICTS = [
    Verdict(sample_id="b", exit_layer=1, judge="j", measure="asr", label="l", score=0.3),
    Verdict(sample_id="b", exit_layer=2, judge="j", measure="asr", unscored="no answer"),
]


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    path.write_bytes(to_parquet(responses_in_table(SAMPLES, RESPONSES)))
    assert read_responses(path) == RESPONSES
    assert read_samples(path) == SAMPLES
    path.write_bytes(to_parquet(verdicts_in_table(VERDICTS)))
    assert read_verdicts(path) == VERDICTS


def test_no_verdicts_are_a_table_too(tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    path.write_bytes(to_parquet(verdicts_in_table([])))
    assert read_verdicts(path) == []


def test_the_same_records_give_the_same_bytes() -> None:
    assert to_parquet(verdicts_in_table(VERDICTS)) == to_parquet(verdicts_in_table(list(VERDICTS)))
    assert to_parquet(responses_in_table(SAMPLES, RESPONSES)) == to_parquet(
        responses_in_table(SAMPLES, list(RESPONSES))
    )


def test_a_damaged_table_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    path.write_bytes(to_parquet(verdicts_in_table(VERDICTS))[:-20])
    with pytest.raises(RunError, match=r"v\.parquet cannot be read") as caught:
        read_verdicts(path)
    assert "\n" not in str(caught.value)
