from __future__ import annotations

import json
from pathlib import Path

import pytest

from exitsafe.cli.main import run
from exitsafe.results.run import load_run
from tests.cli.conftest import Fail
from tests.tiny_models import noise_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        noise_image(number, (28 + number, 30)).save(path / f"{number}.png")
    (path / "notes.txt").write_text("no picture")
    return path


def test_a_folder_of_pictures_then_audits_with_the_maps(
    tiny_llava: Path, folder: Path, audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "maps"
    translate = ["translate", str(tiny_llava), "--images", str(folder), "--layers", "1-2", "--out", str(out)]
    assert run([*translate, "--json"]) == 0
    output = capsys.readouterr()
    document = json.loads(output.out)
    assert document["translators"] == str(out)
    assert document["pictures"]["count"] == 12
    assert [entry["exit_layer"] for entry in document["exits"]] == [1, 2]
    assert "Translators: 12/12" in output.err
    assert run(translate) == 0
    output = capsys.readouterr()
    assert "Translators: 12/12" not in output.err, "what is done is not done again"
    assert "12 pictures; R² on 2 of them" in output.out
    assert f"--translators {out}" in output.out

    after = tmp_path / "after"
    audit = ["audit", str(tiny_llava), "--translators", str(out), "--like", str(audited), "--out", str(after)]
    assert run(audit) == 0
    capsys.readouterr()
    before, now = load_run(audited), load_run(after)
    assert now.settings["model"] == before.settings["model"] | {"translators": document["hash"]}
    assert now.origin["loading"]["translators"] == str(out.absolute())
    answers = [{(r.sample_id, r.exit_layer): r.text for r in each.responses()} for each in (before, now)]
    differing = {layer for (sample, layer), text in answers[0].items() if answers[1][sample, layer] != text}
    assert differing == {1, 2}, "the default exit, 5, is untouched"
    assert run(["verify", str(after), "--out", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers_same"] == 24


def test_pictures_of_a_suite_and_fewer_of_them(
    tiny_llava: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    translate = ["translate", str(tiny_llava), "--suite", str(suite), "--layers", "1", "--json"]
    assert run([*translate, "--out", str(tmp_path / "all")]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["pictures"]["count"] == 6, "two of eight samples are harmful"
    hashes: set[str] = set()
    for seed in ("0", "0", "1"):
        out = tmp_path / f"{len(hashes)}-{seed}"
        assert run([*translate, "--config", "num_images=5", "--seed", seed, "--out", str(out)]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["pictures"]["count"] == 5
        hashes.add(document["pictures"]["hash"])
    assert len(hashes) == 2
    assert whole["pictures"]["hash"] not in hashes


def test_an_organism_brings_its_training_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "num_images=40", "--layers", "6", "--out", str(tmp_path / "maps")]
    assert run(["translate", "organism", *flags, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["exits"]
    assert entry["r2"] > 0.99 > entry["r2_untranslated"]


def test_bad_settings(
    tiny_llava: Path,
    suite: Path,
    folder: Path,
    tmp_path: Path,
    fail: Fail,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "maps"
    translate = ["translate", tiny_llava, "--out", out]
    pictures = [*translate, "--images", folder]
    assert "has no suites of its own: give --images DIR" in fail(*translate)
    assert "two sources of pictures" in fail(*pictures, "--suite", suite)
    assert "is not a folder" in fail(*translate, "--images", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "contains no pictures" in fail(*translate, "--images", tmp_path / "empty")
    assert "choose 1 to 6" in fail(*pictures, "--layers", "7")
    assert "nothing to translate" in fail(*pictures, "--layers", "default")
    assert "num_images=0 must be a whole number of at least 1" in fail(*pictures, "--config", "num_images=0")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.png").write_bytes(b"no picture")
    assert "a.png cannot be read" in fail(*translate, "--images", tmp_path / "torn")
    assert "3 benign pictures are too few" in fail(*pictures, "--config", "num_images=3")
    assert not out.exists()
    assert run([str(part) for part in [*pictures, "--layers", "1"]]) == 0
    capsys.readouterr()
    assert "holds other translators" in fail(*pictures, "--layers", "2")
    audit = ["audit", tiny_llava, "--suite", suite, "--out", tmp_path / "run"]
    assert "no translator for exit layer 2 (available: 1)" in fail(*audit, "--layers", "2", "--translators", out)
    assert "has no translators.json" in fail(*audit, "--translators", folder)
    assert "which differs from organism in" in fail("audit", "organism", "--translators", out, "--out", tmp_path / "o")


def test_a_suite_of_harmful_samples_has_no_benign_pictures(tiny_llava: Path, tmp_path: Path, fail: Fail) -> None:
    noise_image(1).save(tmp_path / "a.png")
    row = {"id": "h", "prompt": "how do i make a zorb", "kind": "harmful", "images": ["a.png"]}
    (tmp_path / "harmful.jsonl").write_text(json.dumps(row) + "\n")
    line = fail("translate", tiny_llava, "--suite", tmp_path / "harmful.jsonl", "--out", tmp_path / "maps")
    assert "no sample that is not harmful has a picture" in line
