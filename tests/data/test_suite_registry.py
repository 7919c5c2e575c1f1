from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from exitsafe.data import KNOWN_SUITES, SUITE_NAMES, absolute_names, load_suites, resolve_suites
from exitsafe.errors import InputError
from tests.data.copies import write_jsonl, write_pictures


def _file(path: Path, *rows: str | tuple[str, str]) -> str:
    """A suite of ids, or of ids with categories."""
    pairs = [(row, "") if isinstance(row, str) else row for row in rows]
    samples = [{"id": id_, "prompt": "x", "kind": "benign", "category": category} for id_, category in pairs]
    return str(write_jsonl(path.parent, *samples, name=path.name))


def test_the_organisms_suites_by_name_in_the_order_asked() -> None:
    samples = load_suites(["organism-vqa", "organism-harmful"], limit=3)
    assert [sample.source for sample in samples] == ["organism-vqa"] * 3 + ["organism-harmful"] * 3
    assert [sample.kind for sample in samples] == ["vqa"] * 3 + ["harmful"] * 3


@pytest.mark.parametrize("name", SUITE_NAMES)
def test_seed_and_split_change_the_draw(name: str) -> None:
    def prompts(**options: object) -> list[tuple[str, bytes]]:
        samples = load_suites([name], limit=12, **options)  # type: ignore[arg-type]
        return [(sample.prompt, sample.images[0].tobytes()) for sample in samples]  # type: ignore[union-attr]

    assert prompts() == prompts(seed=0, split="heldout")
    assert prompts() != prompts(seed=1)
    assert prompts() != prompts(split="train")


@pytest.mark.filterwarnings("ignore:.*have no picture")
def test_files_and_names_mix_and_limit_holds_for_each(tmp_path: Path) -> None:
    path = _file(tmp_path / "mine.jsonl", "a", "b", "c")
    samples = load_suites([path, "organism-benign"], limit=2, organism="organism:text")
    assert [sample.source for sample in samples] == ["mine", "mine", "organism-benign", "organism-benign"]


@pytest.mark.filterwarnings("ignore:.*have no picture")
def test_an_id_in_two_suites_is_refused(tmp_path: Path) -> None:
    one, two = _file(tmp_path / "one.jsonl", "a"), _file(tmp_path / "two.jsonl", "b", "a")
    with pytest.raises(InputError, match=r"sample id 'a' is in .*one\.jsonl and in .*two\.jsonl; make ids unique"):
        load_suites([one, two])


@pytest.mark.parametrize(
    ("names", "limit", "message"),
    [
        ([], None, "no suite is given; choose from organism-harmful"),
        (["redteam"], None, r"suite 'redteam' is unknown \(did you mean redteam2k\?\); choose from organism-harmful"),
        (["./redteam"], None, "suite ./redteam does not exist; give an existing file or folder"),
        (["gone.jsonl"], None, r"gone\.jsonl does not exist"),
        (["organism-vqa"], 0, "limit=0 keeps no samples; choose 1 or more"),
    ],
)
def test_bad_names(names: list[str], limit: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_suites(names, limit=limit)


@pytest.mark.filterwarnings("ignore:.*have no picture")
def test_categories_are_kept_before_the_limit_counts(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.jsonl", ("1", "x"), ("2", "y"), ("3", "x"), ("4", "z"))
    assert [sample.id for sample in load_suites([path], categories=["x"], limit=2)] == ["1", "3"]
    assert [sample.id for sample in load_suites([path], categories=["x", "z"])] == ["1", "3", "4"]
    with pytest.raises(InputError, match=r"no sample has category 'w'; choose from x, y, z$"):
        load_suites([path], categories=["w"])
    with pytest.raises(InputError, match=r"no sample has category 'w'; choose from x, y, z$"):
        load_suites([path], categories=["x", "w"])
    other = _file(tmp_path / "b.jsonl", ("5", "q"))
    with pytest.warns(UserWarning, match=r"b\.jsonl has no sample of these categories and is left out"):
        assert len(load_suites([path, other], categories=["y"])) == 1
    bare = _file(tmp_path / "c.jsonl", "6")
    with pytest.raises(InputError, match="these suites have no categories; leave the option out"):
        load_suites([bare], categories=["y"])


def test_categories_of_the_organism() -> None:
    category = load_suites(["organism-harmful"], limit=1)[0].category
    found = load_suites(["organism-harmful"], categories=[category], limit=2)
    assert [sample.category for sample in found] == [category] * 2
    assert found[0] == load_suites(["organism-harmful"], limit=1)[0]


def test_pictures_that_are_left_out_are_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"id": c, "prompt": "x", "kind": "benign", "category": c, "image": f"{c}.png"} for c in ("good", "gone")]
    write_jsonl(tmp_path, *rows, name=path.name)
    write_pictures(tmp_path, count=1)
    (tmp_path / "0.png").rename(tmp_path / "good.png")
    assert [sample.id for sample in load_suites([str(path)], categories=["good"])] == ["good"]


def test_text_only_samples_get_pictures_or_a_warning(tmp_path: Path) -> None:
    path = _file(tmp_path / "mine.jsonl", "a", "b")
    with pytest.warns(UserWarning, match="2 of 2 samples have no picture, video or audio, so that their"):
        plain = load_suites([path])
    pictures = write_pictures(tmp_path / "pictures", count=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paired = load_suites([path], images=str(pictures))
        assert paired == load_suites([path], images=pictures)
        assert paired[:1] == load_suites([path], images=pictures, limit=1)
    assert [sample.images for sample in plain] == [(), ()]
    assert all(len(sample.images) == 1 for sample in paired)


def test_names_are_made_valid_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["organism-vqa", "redteam2k", "xstest=copy/x", "mine.jsonl"]
    assert absolute_names(names) == [
        "organism-vqa",
        "redteam2k",
        f"xstest={tmp_path}/copy/x",
        f"{tmp_path}/mine.jsonl",
    ]
    assert absolute_names(absolute_names(names)) == absolute_names(names)
    assert resolve_suites(names) == {
        "redteam2k": {
            "id": "JailbreakV-28K/JailBreakV-28k",
            "configs": ["RedTeam_2K"],
            "split": "RedTeam_2K",
            "revision": KNOWN_SUITES["redteam2k"].revision,
        }
    }


@pytest.mark.filterwarnings("ignore:.*have no picture")
def test_a_path_with_a_sign_in_it_is_a_path(tmp_path: Path) -> None:
    assert len(load_suites([_file(tmp_path / "a=b.jsonl", "a")])) == 1


@pytest.mark.parametrize(
    "change",
    (
        {"id": "somebody/else"},
        {"configs": ["other"]},
        {"split": "test"},
        {"revision": "refs/pr/1"},
        {"revision": "main"},
    ),
)
def test_a_run_does_not_say_where_a_known_suite_is(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("exitsafe.data.hub.import_datasets", lambda: asked.append(1))
    suite = KNOWN_SUITES["redteam2k"]
    kept = {"id": suite.hub_id, "configs": list(suite.configs), "split": suite.split, "revision": suite.revision}
    with pytest.raises(InputError, match="audit again with --suite redteam2k"):
        load_suites(["redteam2k"], hub={"redteam2k": kept | change})
    assert asked == []
