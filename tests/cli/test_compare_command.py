from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exitsafe.cli.main import run


def test_tables_files_and_chart(audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, chart = tmp_path / "new" / "comparison.json", tmp_path / "new" / "chart.svg"
    assert run(["compare", str(audited), str(audited), "--out", str(out), "--chart", str(chart)]) == 0
    output = capsys.readouterr().out
    for word in (
        "Requests not refused (proxy), judged by refusal-prefix",
        "5 (default)",
        "early",
        "average",
        "p (Holm)",
    ):
        assert word in output
    assert "Also compared: refusal, tokens" in output
    assert json.loads(out.read_text())["num_samples"] == 8
    assert chart.read_text().startswith("<svg")


def test_json_is_the_comparison(audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "comparison.json"
    assert run(["compare", str(audited), str(audited), "--json", "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text())
    assert document["layers"][0]["metrics"]["asr"]["difference"] == 0


def test_one_metric_on_a_scale_of_its_own(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(audited), str(audited), "--metric", "tokens"]) == 0
    output = capsys.readouterr().out
    assert "Tokens" in output
    assert "(points)" not in output  # of a column
    assert "Attack success" not in output


def test_what_is_refused(audited: Path, tmp_path: Path, fail: Any) -> None:
    assert "is not a folder" in fail("compare", audited, tmp_path / "nowhere")
    assert "is not a run directory" in fail("compare", tmp_path, audited)
    assert "metric 'charm' is not in both runs; choose asr" in fail("compare", audited, audited, "--metric", "charm")
    gif = tmp_path / "chart.gif"
    assert ".svg or .png" in fail("compare", "never", "read", "--chart", gif)
