from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from exitsafe.data.pairing import list_images, pair_with_images
from exitsafe.errors import InputError
from exitsafe.records import Sample
from tests.data.copies import write_pictures


def _samples(count: int) -> list[Sample]:
    return [Sample(id=f"s{number}", prompt="zorb", kind="benign") for number in range(count)]


def _pairs(samples: list[Sample], folder: Path, *, seed: int = 0) -> dict[str, object]:
    return {sample.id: sample.images[0] for sample in pair_with_images(samples, folder, seed=seed)}


def test_pairs_depend_on_seed_and_id_and_on_nothing_else(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "mine", count=7)
    pairs = _pairs(_samples(40), folder)
    assert len(set(pairs.values())) == 7
    assert _pairs(_samples(40)[::-1], folder) == pairs
    assert _pairs(_samples(40)[10:20], folder).items() <= pairs.items()
    assert _pairs(_samples(60), folder).items() >= pairs.items()
    assert _pairs(_samples(40), folder, seed=1) != pairs
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert [path.name for path in _pairs(_samples(40), moved).values()] == [path.name for path in pairs.values()]  # type: ignore[attr-defined]


def test_these_pairs_never_change(tmp_path: Path) -> None:
    """Runs that were made can be repeated by later versions."""
    folder = write_pictures(tmp_path, count=5)
    expected = ["0.png", "0.png", "2.png", "1.png", "4.png", "2.png"]
    assert [path.name for path in _pairs(_samples(6), folder).values()] == expected  # type: ignore[attr-defined]


def test_samples_with_pictures_keep_them(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path, count=2)
    sample = replace(_samples(1)[0], images=(b"own",))
    assert pair_with_images([sample], folder, seed=0) == [sample]
    with pytest.raises(InputError, match="nowhere is not a folder"):
        pair_with_images([sample], tmp_path / "nowhere", seed=0)


def test_samples_with_videos_or_audios_get_no_picture(tmp_path: Path) -> None:
    """And a folder without pictures will do, if none are needed: it may be that of the videos."""
    samples = [replace(_samples(1)[0], videos=(b"own",)), replace(_samples(1)[0], audios=(b"own",))]
    assert pair_with_images(samples, tmp_path, seed=0) == samples


def test_only_pictures_count_in_any_depth(tmp_path: Path) -> None:
    write_pictures(tmp_path / "deep" / "er", count=1)
    write_pictures(tmp_path / "b", count=1)
    (tmp_path / "a.txt").write_text("no picture")
    (tmp_path / "c.JPG").write_bytes((tmp_path / "b" / "0.png").read_bytes())
    (tmp_path / "d.png").mkdir()
    for name in (".hidden.png", "__MACOSX/e.png", ".cache/f.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list_images(tmp_path) == ["b/0.png", "c.JPG", "deep/er/0.png"]


def test_folders_and_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a folder; give one with benign pictures"):
        pair_with_images(_samples(1), tmp_path / "nowhere", seed=0)
    with pytest.raises(InputError, match=r"contains no pictures; put \.png, \.jpg, \.jpeg, \.webp files there"):
        pair_with_images(_samples(1), tmp_path, seed=0)
    (tmp_path / "0.png").write_bytes(b"rubbish")
    with pytest.raises(InputError, match=r"--images .*: image .*0\.png cannot be read as PNG, JPEG or WebP"):
        pair_with_images(_samples(1), tmp_path, seed=0)
