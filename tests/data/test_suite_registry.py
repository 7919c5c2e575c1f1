from __future__ import annotations

import json
from pathlib import Path

import pytest

from exitsafe.data import SUITE_NAMES, load_suites
from exitsafe.errors import InputError


def _file(path: Path, *ids: str) -> str:
    rows = [{"id": sample_id, "prompt": "x", "kind": "benign"} for sample_id in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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


def test_files_and_names_mix_and_limit_holds_for_each(tmp_path: Path) -> None:
    path = _file(tmp_path / "mine.jsonl", "a", "b", "c")
    samples = load_suites([path, "organism-benign"], limit=2, organism="organism:text")
    assert [sample.source for sample in samples] == ["mine", "mine", "organism-benign", "organism-benign"]


def test_an_id_in_two_suites_is_refused(tmp_path: Path) -> None:
    one, two = _file(tmp_path / "one.jsonl", "a"), _file(tmp_path / "two.jsonl", "b", "a")
    with pytest.raises(InputError, match=r"sample id 'a' is in .*one\.jsonl and in .*two\.jsonl; make ids unique"):
        load_suites([one, two])


@pytest.mark.parametrize(
    ("names", "limit", "message"),
    [
        ([], None, "no suite is named; choose from organism-harmful"),
        (["redteam"], None, "suite 'redteam' is unknown; choose from organism-harmful"),
        (["gone.jsonl"], None, r"gone\.jsonl does not exist"),
        (["organism-vqa"], 0, "limit=0 keeps no samples; choose 1 or more"),
    ],
)
def test_bad_names(names: list[str], limit: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_suites(names, limit=limit)
