"""The Python files of examples/ run, with fewer samples and steps."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from exitsafe.results.run import load_run

TRANSFER = Path(__file__).parents[2] / "examples" / "transfer.py"


def test_transfer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(TRANSFER))["main"]
    given = main.__globals__
    brief = {"num_steps": 1, "value_warmup_steps": 0, "batch_size": 8, "minibatch_size": 8}
    given |= {"TRAIN": given["TRAIN"][::16], "TEST": given["TEST"][::64], "TRAIN_EXITS": ("1", "all")}
    given |= {"CONFIG": replace(given["CONFIG"], **brief)}
    main(tmp_path)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["trained", "nothing", "1", "all"]
    assert {len(row.split()) for row in rows[1:]} == {9}
    assert load_run(tmp_path / "audit-1").settings["model"]["adapter"] is not None
