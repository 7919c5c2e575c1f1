from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from exitsafe.cli.main import run


def test_a_page_of_a_run(audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report.html"
    assert run(["report", str(audited), str(audited), "--out", str(out), "--title", "Mine", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["report"] == str(out)
    assert document["has_texts"] is False
    assert list(document["runs"].values()) == [str(audited)] * 2
    assert document["bytes"] == out.stat().st_size
    text = out.read_text()
    assert "<title>Mine</title>" in text
    assert "Compared on the same 8 requests at 3 exits." in text
    assert stat.S_IMODE(out.stat().st_mode) == 0o644


def test_a_page_with_texts(audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert run(["report", str(audited), "--out", str(out), "--include-unsafe-text"]) == 0
    assert capsys.readouterr().out.endswith("report.html: open it in a browser\n")
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_what_is_refused(audited: Path, tmp_path: Path, fail: Any) -> None:
    out = tmp_path / "report.html"
    assert "is not a folder" in fail("report", tmp_path / "nowhere", "--out", out)
    assert "is not a run directory" in fail("report", tmp_path, "--out", out)
    assert "is a directory" in fail("report", audited, "--out", tmp_path)
    assert "Missing option '--out'" in fail("report", audited)
    assert not out.exists()
