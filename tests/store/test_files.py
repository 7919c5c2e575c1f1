from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from exitsafe.errors import RunError
from exitsafe.store.files import PRIVATE, write_whole


def test_writes_with_the_mode_whatever_lay_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.part").write_text("left by a killed run")
    write_whole(path, b"one", mode=PRIVATE)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"one", 0o600)
    write_whole(path, b"two", mode=PRIVATE)
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=r"cannot be written .*No space left on device"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_folder_is_made_and_one_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "file", b"a")
    assert (tmp_path / "new" / "file").read_bytes() == b"a"
    with pytest.raises(RunError, match="cannot be written"):
        write_whole(tmp_path / "new" / "file" / "below", b"a")
