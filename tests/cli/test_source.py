from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exitsafe.data import KNOWN_SUITES
from exitsafe.data.source import find_samples, source_of
from exitsafe.records import Sample
from exitsafe.specs.inputs import Samples
from tests.cli.conftest import Fail
from tests.tiny_models import noise_image

pytestmark = pytest.mark.filterwarnings("ignore:.*have no picture")


def _origin(suites: list[str], *, hub: Any = None, **options: Any) -> dict[str, Any]:
    wanted = Samples(suites=tuple(suites), **options)
    source = find_samples("some/model", wanted, split="heldout", seed=3, hub=hub)
    return dict(json.loads(source.model_dump_json()))  # as run.json keeps it


def read(origin: dict[str, Any]) -> list[Sample]:
    return source_of(origin).read()


def test_an_origin_gives_the_same_samples_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        noise_image(number).save(tmp_path / "pictures" / f"{number}.png")
    rows = [{"id": f"s{n}", "prompt": "zorb", "kind": "benign", "category": f"c{n % 2}"} for n in range(6)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "copy.csv").write_text("prompt,type,label\nzorb,c0,safe\nzorb,c1,unsafe\n")
    monkeypatch.chdir(tmp_path)
    suites = ["mine.jsonl", "xstest=copy.csv", "organism-vqa"]
    options: dict[str, Any] = {"images": Path("pictures"), "categories": ["c0"], "limit": 2}
    origin = _origin(suites[:2], **options)
    samples = read(origin)
    assert [sample.id for sample in samples] == ["s0", "s2", "xstest-0"]
    assert all(str(sample.images[0]).startswith(str(tmp_path)) for sample in samples)
    monkeypatch.chdir("/")
    assert read(origin) == samples
    assert read(_origin(["organism-vqa"], limit=2)) == read(
        {"suites": ["organism-vqa"], "split": "heldout", "seed": 3, "limit": 2, "organism": "organism"}  # an older run
    )


def test_an_origin_keeps_commits_and_takes_them_from_another_run() -> None:
    kept = _origin(["redteam2k", "organism-vqa"])["hub"]
    assert kept["redteam2k"]["revision"] == KNOWN_SUITES["redteam2k"].revision
    assert list(kept) == ["redteam2k"]
    older = {"redteam2k": kept["redteam2k"] | {"revision": "cd" * 20}, "xstest": {}}
    again = _origin(["redteam2k", "jbb-benign"], hub=older)["hub"]
    assert again["redteam2k"]["revision"] == "cd" * 20
    assert again["jbb-benign"]["revision"] == KNOWN_SUITES["jbb-benign"].revision
    assert list(again) == ["redteam2k", "jbb-benign"]


def test_align_reads_the_samples_that_its_flags_name(tmp_path: Path, fail: Fail) -> None:
    out = tmp_path / "out"
    assert "no sample has category 'q'; choose from " in fail(
        "align", "organism", "--config", "category=q", "--out", out
    )
    (tmp_path / "mine.jsonl").write_text('{"id": "a", "prompt": "zorb", "kind": "benign"}\n')
    flags = ["--suite", tmp_path / "mine.jsonl", "--images", tmp_path / "nowhere", "--out", out]
    assert "nowhere is not a folder; give one with benign pictures" in fail("align", "organism", *flags)
