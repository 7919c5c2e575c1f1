from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from exitsafe.errors import RunError
from exitsafe.exporting.folder import whole_folder


def test_it_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with whole_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["a"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError), whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_call_left_is_removed_by_the_next(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_fill_slowly, args=(tmp_path / "out",))
    child.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.part" / "deep").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(RunError, match="is being written by another process"), whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.part" / "half").exists(), "a second call took the first one's folder away"
    child.kill()
    child.join()
    assert not (tmp_path / "out").exists()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(RunError, match="already exists and is not empty"), whole_folder(tmp_path / name):
            pass
    assert (tmp_path / "full" / "a").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"), whole_folder(tmp_path / "file" / "out"):
        pass


def _fill_slowly(out: Path) -> None:
    with whole_folder(out) as folder:
        (folder / "half").write_text("1")
        (folder / "deep").mkdir()
        time.sleep(60)
