from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exitsafe.data import KNOWN_SUITES, SUITE_NAMES, load_suites
from exitsafe.errors import InputError
from exitsafe.records import KINDS, Sample
from tests.data.copies import NUM_ROWS, png, rows_of, write_copy, write_files, write_picture_folder, write_pictures
from tests.data.recordings import mp4, wav

pytestmark = pytest.mark.filterwarnings("ignore:.*have no picture")


def _load(name: str, path: Path, pictures: Path) -> list[Sample]:
    return load_suites([f"{name}={path}"], images=pictures if KNOWN_SUITES[name].needs_images else None)


@pytest.mark.parametrize("name", KNOWN_SUITES)
def test_a_copy_laid_out_as_on_the_hub(name: str, tmp_path: Path) -> None:
    suite = KNOWN_SUITES[name]
    samples = _load(name, write_copy(name, tmp_path / "copy"), write_pictures(tmp_path / "mine"))
    assert len(samples) == NUM_ROWS * max(1, len(suite.configs))
    assert all(sample.id.startswith(f"{name}-") and sample.source == name for sample in samples)
    assert {sample.kind for sample in samples} == set(suite.kinds)
    assert all(bool(sample.images) == (suite.needs_images or bool(suite.image)) for sample in samples)
    assert all(bool(sample.videos) == bool(suite.video) for sample in samples)
    assert samples[1].prompt.startswith("how do i make a zorb 1")
    if suite.category and suite.category != suite.kind_column:
        assert [sample.category for sample in samples[:3]] == ["category 0", "category 1", "category 0"]
    if suite.image and not suite.is_by_path:
        assert samples[0].images == (png(),)


@pytest.mark.parametrize("name", KNOWN_SUITES)
def test_one_file_with_the_same_columns(name: str, tmp_path: Path) -> None:
    suite = KNOWN_SUITES[name]
    path = tmp_path / f"{suite.split}.parquet"
    pq.write_table(pa.Table.from_pylist(rows_of(suite)), path)
    write_files(suite, tmp_path / "figures")
    samples = _load(name, path, write_pictures(tmp_path / "figures"))
    assert [sample.id for sample in samples] == [f"{name}-{number + (10 if suite.id else 0)}" for number in range(3)]


@pytest.mark.parametrize("name", [name for name, suite in KNOWN_SUITES.items() if suite.id])
def test_ids_that_a_table_library_made_floats_stay_the_same(name: str, tmp_path: Path) -> None:
    suite = KNOWN_SUITES[name]
    path = tmp_path / f"{suite.split}.parquet"
    rows = [row | {suite.id: float(row[suite.id])} for row in rows_of(suite)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    write_files(suite, tmp_path / "figures")
    samples = _load(name, path, write_pictures(tmp_path / "figures"))
    assert [sample.id for sample in samples] == [f"{name}-{number + 10}" for number in range(3)]


@pytest.mark.parametrize("name", KNOWN_SUITES)
def test_a_copy_without_a_column_names_it(name: str, tmp_path: Path) -> None:
    suite = KNOWN_SUITES[name]
    folder, file = write_copy(name, tmp_path / "copy"), tmp_path / "file.parquet"
    rows = [{key: value for key, value in row.items() if key != suite.prompt} for row in rows_of(suite)]
    for path in [*folder.rglob("*.parquet"), file]:
        pq.write_table(pa.Table.from_pylist(rows), path)
    for path in (folder, file):
        with pytest.raises(
            InputError, match=f"{name}: .*{path.name}.* has no column '{suite.prompt}', only "
        ) as caught:
            _load(name, path, write_pictures(tmp_path / "mine"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suite", KNOWN_SUITES.values(), ids=list(KNOWN_SUITES))
def test_entries_hold_what_a_run_needs(suite: object) -> None:
    assert isinstance(suite, type(KNOWN_SUITES["xstest"]))
    assert re.fullmatch(r"[\w-]+/[\w-]+", suite.hub_id, re.ASCII)
    assert suite.revision is None or re.fullmatch(r"[0-9a-f]{40}", suite.revision)
    assert suite.licence
    assert re.search(r"(19|20)\d\d", suite.citation)
    assert set(suite.kinds) <= set(KINDS)
    assert bool(suite.kind_column) == (not isinstance(suite.kind, str))
    assert suite.name not in SUITE_NAMES
    assert "=" not in suite.name
    assert not Path(suite.name).suffix


def test_the_contexts_of_harmbench_stand_before_the_prompt(tmp_path: Path) -> None:
    samples = load_suites([f"harmbench={write_copy('harmbench', tmp_path)}"])
    assert samples[0].id == "harmbench-standard-0"
    assert samples[0].prompt == "how do i make a zorb 0"
    assert samples[3].id == "harmbench-contextual-0"
    assert samples[3].prompt == "once upon a time\n\n---\n\nhow do i make a zorb 0"


def test_labels_decide_the_kind_of_xstest(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text("prompt,type,label\nzorb,figurative,safe\nfrob,contrast,unsafe\n")
    assert [sample.kind for sample in load_suites([f"xstest={path}"])] == ["borderline", "harmful"]
    path.write_text("prompt,type,label\nzorb,figurative,maybe\n")
    with pytest.raises(InputError, match="xstest, row 1: column 'label' must be one of safe, unsafe"):
        load_suites([f"xstest={path}"])


def test_vqav2_asks_for_a_short_answer_and_keeps_all_references(tmp_path: Path) -> None:
    suite = KNOWN_SUITES["vqav2"]
    path = tmp_path / "validation.parquet"
    lists = {"answer": ["red", "dark red"], "answer_id": [1, 2]}  # how older tables keep lists of records
    for answers in (rows_of(suite)[0]["answers"], lists, ["red", "dark red"]):
        pq.write_table(pa.Table.from_pylist([rows_of(suite)[0] | {"answers": answers}]), path)
        (sample,) = load_suites([f"vqav2={path}"])
        assert sample.answers == ("red", "dark red")
        assert sample.prompt == "how do i make a zorb 0\nAnswer the question using a single word or phrase."


def test_scenarios_of_mm_safetybench_are_its_categories(tmp_path: Path) -> None:
    folder = write_copy("mm-safetybench", tmp_path)
    (sample,) = load_suites([f"mm-safetybench={folder}"], categories=["Illegal_Activitiy"], limit=1)
    assert (sample.id, sample.category) == ("mm-safetybench-Illegal_Activitiy-10", "Illegal_Activitiy")
    one = folder / "Fraud" / "SD_TYPO.parquet"
    assert {sample.category for sample in load_suites([f"mm-safetybench={one}"])} == {"Fraud"}
    (folder / "README.md").unlink()
    with pytest.raises(InputError, match=r"has no README\.md to describe its files; run `hf download PKU-Align"):
        load_suites([f"mm-safetybench={folder}"])


def test_mossbench_as_pictures_with_a_table(tmp_path: Path) -> None:
    folder = write_picture_folder("mossbench", tmp_path / "copy", config="oversensitivity")
    samples = load_suites([f"mossbench={folder}"])
    assert {sample.id for sample in samples} == {"mossbench-10", "mossbench-11", "mossbench-12"}
    assert all(isinstance(sample.images[0], Path) and sample.images[0].is_file() for sample in samples)


def test_pictures_by_path(tmp_path: Path) -> None:
    folder = write_copy("minijailbreakv", tmp_path / "copy")
    first = load_suites([f"minijailbreakv={folder}"])[0]
    assert first.images == (folder / "JailBreakV_28K" / "figures" / "0.png",)
    table = folder / "JailBreakV_28K" / "mini_JailBreakV_28K.parquet"
    assert load_suites([f"minijailbreakv={table}"])[0].images == first.images
    elsewhere = tmp_path / "elsewhere"
    (folder / "JailBreakV_28K" / "figures").rename(elsewhere.parent / "figures")
    for images, where in ((None, "missing from"), (elsewhere, "missing from")):
        with pytest.raises(InputError, match=rf"row 1: image figures/0\.png is {where}.*with --images DIR$"):
            load_suites([f"minijailbreakv={table}"], images=images)
    assert load_suites([f"minijailbreakv={table}"], images=tmp_path)[0].images == (tmp_path / "figures" / "0.png",)


def test_the_combinations_of_holisafe_are_its_categories_and_decide_the_kind(tmp_path: Path) -> None:
    row, path = rows_of(KNOWN_SUITES["holisafe"])[0], tmp_path / "test.parquet"
    types = ["SSS", "SSU", "SUU", "USU", "UUU"]
    pq.write_table(
        pa.Table.from_pylist([row | {"id": number, "type": name} for number, name in enumerate(types)]), path
    )
    samples = load_suites([f"holisafe={path}"])
    assert [(sample.category, sample.kind) for sample in samples] == [
        (name, "borderline" if name == "SSS" else "harmful") for name in types
    ]


@pytest.mark.parametrize("name", ["video-safetybench", "video-safetybench-benign"])
def test_videos_by_path_from_the_copy_or_a_folder_of_yours(name: str, tmp_path: Path) -> None:
    suite = KNOWN_SUITES[name]
    first, *_ = load_suites([f"{name}={write_copy(name, tmp_path / 'copy')}"])
    assert first.videos == (tmp_path / "copy" / "figures" / "0.mp4",)
    assert (first.kind, first.images) == ("harmful", ())
    path = tmp_path / "rows" / "rows.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows_of(suite)), path)
    with pytest.raises(InputError, match=r"row 1: video figures/0\.mp4 is missing from .*; get the videos as https"):
        load_suites([f"{name}={path}"])
    unpacked = write_files(suite, tmp_path / "unpacked" / "figures").parent
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the folder has no pictures, and none are needed
        first, *_ = load_suites([f"{name}={path}"], images=unpacked)
    assert first.videos == (unpacked / "figures" / "0.mp4",)


def test_embedded_videos_and_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(KNOWN_SUITES["mossbench"], name="heard", configs=(), image="", video="clip", audio="said")
    monkeypatch.setitem(KNOWN_SUITES, "heard", entry)
    folder = write_copy("heard", tmp_path / "copy")
    for path in (folder, next(folder.rglob("*.parquet"))):
        first, *_ = load_suites([f"heard={path}"])
        assert (first.images, first.videos, first.audios) == ((), (mp4(),), (wav(),))


def test_a_path_of_a_picture_that_leaves_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "mini.csv"
    path.write_text("id,jailbreak_query,policy,image_path\n1,zorb,x,../secret.png\n")
    with pytest.raises(InputError, match=r"minijailbreakv, row 1: image '\.\./secret\.png' leaves the suite's folder"):
        load_suites([f"minijailbreakv={path}"])


def test_missing_prompts_and_pictures_are_named_by_row(tmp_path: Path) -> None:
    suite = KNOWN_SUITES["mm-safetybench"]
    path = tmp_path / "SD_TYPO.parquet"
    rows = rows_of(suite)
    pq.write_table(pa.Table.from_pylist([rows[0], rows[1] | {"question": None}]), path)
    with pytest.raises(InputError, match="row 2: field 'prompt' is missing"):
        load_suites([f"mm-safetybench={path}"])
    pq.write_table(pa.Table.from_pylist([rows[0], rows[1] | {"image": None}]), path)
    with pytest.raises(InputError, match="row 2: the image is missing; give a copy"):
        load_suites([f"mm-safetybench={path}"])


def test_every_row_of_a_file_must_have_the_columns_and_an_id(tmp_path: Path) -> None:
    path = tmp_path / "red.jsonl"
    path.write_text('{"id": 1, "question": "zorb", "policy": null}\n{"id": 2, "question": "zorb"}\n')
    with pytest.raises(InputError, match=r"red\.jsonl, row 2 has no column 'policy', only 'id', 'question'"):
        load_suites([f"redteam2k={path}"])
    assert [sample.category for sample in load_suites([f"redteam2k={path}"], limit=1)] == [""]
    path.write_text('{"Index": null, "Goal": "zorb", "Category": "x"}\n')
    with pytest.raises(InputError, match="row 1: field 'id' is missing"):
        load_suites([f"jbb-behaviors={path}"])


def test_advbench_coco_needs_pictures(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("prompt,target\nzorb,sure\n")
    with pytest.raises(
        InputError, match=r"advbench-coco needs your own pictures: give --images DIR\. Give your copy of"
    ):
        load_suites([f"advbench-coco={path}"])
    (sample,) = load_suites([f"advbench-coco={path}"], images=write_pictures(tmp_path / "val2017", count=1))
    assert sample.images == (tmp_path / "val2017" / "0.png",)


def test_copies_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="does not exist; redteam2k=PATH takes a copy of JailbreakV-28K/JailBreakV-28k"
    ):
        load_suites([f"redteam2k={tmp_path / 'nowhere'}"])
    with pytest.raises(InputError, match="suite 'redteam2k=' has no path after the equals sign"):
        load_suites(["redteam2k="])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"redteam2k: .*empty cannot be loaded \(\w+\); run `hf download Jailbreak"):
        load_suites([f"redteam2k={tmp_path / 'empty'}"])


def test_pictures_that_were_given_count_as_pictures(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_suites([f"vqav2={write_copy('vqav2', tmp_path)}"])


DOCS = Path(__file__).parents[2] / "docs" / "suites.md"


@pytest.mark.parametrize("name", KNOWN_SUITES)
def test_the_documentation_has_the_same_facts(name: str) -> None:
    suite, text = KNOWN_SUITES[name], DOCS.read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:7] == [str(suite.size), suite.pictures, suite.licence, "yes" if suite.is_gated else ""]
    assert cells[7] == (suite.revision[:7] if suite.revision else "newest")
    assert f"({suite.page})" in row or "the same, " in row
    assert f". {suite.citation}\n" in text


def test_an_entry_as_the_documentation_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"^(KnownSuite\(.*?\n\))\n```", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.M)
    entry = eval(source, {"KnownSuite": type(KNOWN_SUITES["xstest"])})
    assert len(source.splitlines()) - 2 == 10
    monkeypatch.setitem(KNOWN_SUITES, entry.name, entry)
    samples = load_suites([f"my-suite={write_copy('my-suite', tmp_path / 'copy')}"])
    assert [sample.id for sample in samples] == ["my-suite-0", "my-suite-1", "my-suite-2"]
