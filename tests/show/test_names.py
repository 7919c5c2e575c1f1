from __future__ import annotations

from pathlib import Path

from exitsafe.results.run import label_runs
from exitsafe.show.names import shown


def test_labels_hide_nothing(tmp_path: Path) -> None:
    folder = "/".join(tmp_path.parts[1:])
    assert label_runs([tmp_path / "run", tmp_path / "run"]) == [f"{folder}/run (1)", f"{folder}/run (2)"]
    assert shown("a" + chr(0x200B) + chr(0xD800) + "é") == "a\\u200b\\ud800é"
    assert len(shown("x" * 500)) == 80
