from __future__ import annotations

import json
from pathlib import Path

import pytest

from exitsafe.engine.latency import Latency, Pass
from exitsafe.errors import RunError
from exitsafe.results.latencies import NAME, keep_latency, kept_latency


def latency(start: float) -> Latency:
    passes = tuple(Pass(encoder_ms=start + n, prefill_ms=2.5, decode_ms_per_token=0.125) for n in range(3))
    return Latency(default=passes, exits={1: passes[:2], 4: passes})


def test_found_again_by_its_settings(tmp_path: Path) -> None:
    assert kept_latency(tmp_path, {"device": "cpu"}) is None
    keep_latency(tmp_path, {"device": "cpu", "threads": 1}, latency(1.0))
    keep_latency(tmp_path, {"device": "cuda", "threads": 1}, latency(5.0))
    assert kept_latency(tmp_path, {"threads": 1, "device": "cpu"}) == latency(1.0)
    assert kept_latency(tmp_path, {"threads": 1, "device": "cuda"}) == latency(5.0)
    assert kept_latency(tmp_path, {"threads": 2, "device": "cpu"}) is None
    keep_latency(tmp_path, {"device": "cpu", "threads": 1}, latency(9.0))
    assert kept_latency(tmp_path, {"device": "cpu", "threads": 1}) == latency(9.0)
    assert len(json.loads((tmp_path / NAME).read_text())["measurements"]) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": 2, "measurements": []}',
        '{"format": 1, "measurements": [{"exits": []}]}',
        '{"format": 1, "measurements": [{"settings": {}, "exits": []}]}',
        '{"format": 1, "measurements": [{"settings": {}, "default": {"encoder_ms": [1.0]}, "exits": []}]}',
    ],
)
def test_a_torn_file_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    with pytest.raises(RunError, match=r"latency\.json cannot be read; remove it to measure again"):
        kept_latency(tmp_path, {})
