"""Hostile inputs through the real command: one clear line each, nothing lost, no wrong row.

What is refused must leave every file as it was. What fails in the middle must keep what was saved, hold no row that an
undisturbed run would not hold, and end as that one does once the fault is mended.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exitsafe.cli.main import DONE, FAILED, run
from exitsafe.records import Response, Verdict
from exitsafe.results.run import load_run
from exitsafe.store.directory import saved_in
from tests.cli import hostile_suites  # noqa: F401 - registers its cases
from tests.cli.conftest import write_suite
from tests.cli.hostile_cases import CASES
from tests.cli.hostile_inputs import SAID
from tests.cli.hostile_place import Broken, Place, judged_by
from tests.fake_vlm import content
from tests.finished_runs import edit_head
from tests.tiny_models import noise_image, save_tiny


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a suite, a picture and a finished run."""
    folder = tmp_path_factory.mktemp("sound")
    save_tiny("llava", folder / "model")
    write_suite(folder / "suite")
    noise_image(9).save(folder / "good.png")
    place = Place(folder=folder, patch=pytest.MonkeyPatch())
    assert run(place.audit(out=place.run)) == DONE
    return folder


@pytest.fixture
def place(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder = tmp_path / "place"
    shutil.copytree(sound, folder)
    head = folder / "run" / "run.json"
    head.write_text(head.read_text().replace(str(sound), str(folder)))  # where its suite and model are
    edit_head(folder / "run", lambda head: None)
    yield Place(folder=folder, patch=monkeypatch)
    if (folder / "disk").is_mount():
        subprocess.run(["umount", str(folder / "disk")], check=True)


def test_there_are_enough() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_input_is_one_clear_line_and_nothing_is_lost(
    name: str, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    command = [str(word) for word in case.make(place)]
    before = _files(place.folder)
    capfd.readouterr()

    with place.fault:
        status = run(command)

    printed, complaint = capfd.readouterr()
    assert status == FAILED
    assert printed == ""
    *before_it, line = complaint.splitlines()
    before_it = [other for other in before_it if not other.startswith(("loading ", "checked its "))]
    assert not [other for other in before_it if not (case.goes_on and other.startswith("Audit: "))]
    assert line.startswith("exitsafe: ")
    for words in case.says:
        assert words in line
    assert SAID not in line
    assert len(line) < 1000
    out = Path(command[-1])
    if not case.goes_on:
        assert _files(place.folder) == before
        return
    saved = saved_in(out)
    whole = out.with_name("whole")
    assert run([*command[:-1], str(whole)]) == DONE
    undisturbed = load_run(whole)
    rows = {(r.sample_id, r.exit_layer): (r.text, r.num_tokens) for r in undisturbed.responses()}
    assert all(rows[row] == (found.text, found.num_tokens) for row, found in saved.responses.items())
    assert set(saved.verdicts) <= set(undisturbed.verdicts())
    assert saved.responses or not out.exists()
    assert not (out / "summary.json").exists()
    assert run(command) == DONE
    assert content(out) == content(whole)


def _files(folder: Path) -> dict[str, bytes]:
    """Every file with its content, and every folder; shards are locks too, and an empty one may stay."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if "shards" not in path.parts or (path.is_file() and path.stat().st_size)
    }


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_judge_that_returns_no_number_is_unscored_and_counted(
    score: float, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    def fault(verdicts: list[Verdict], _: Sequence[Response]) -> list[Verdict]:
        return [replace(each, score=score) for each in verdicts]

    broken = Broken(fault, sound_calls=0)
    assert run([*judged_by(broken, place), "--json"]) == FAILED
    document: dict[str, Any] = json.loads(capfd.readouterr().out)
    for layer in document["layers"]:
        assert (layer["metrics"]["asr"]["value"], layer["metrics"]["asr"]["n"]) == (None, 0)
        assert layer["metrics"]["asr"]["unscored"] == 2
