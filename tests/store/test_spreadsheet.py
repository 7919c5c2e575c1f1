from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitsafe.errors import InputError
from exitsafe.store.spreadsheet import is_same_text, neutral, read_csv, to_csv

_TRICKY = st.text(alphabet=st.sampled_from("=+-@\uff1d'\"\t\r\n;, a3/\u202e\u05d0")) | st.text(
    alphabet=st.characters(exclude_categories=["Cs"])
)


@given(_TRICKY)
def test_no_cell_or_part_of_one_is_a_formula_and_nothing_is_lost(text: str) -> None:
    cell = neutral(text)
    for part in re.split("[\r\n\t;]", cell):
        assert part.lstrip(" ")[:1] not in tuple("=+-@\uff1d\uff0b\uff0d\uff20")
    assert cell[:1] not in ("\t", "\r", "\n")
    assert re.sub("(\\A|[\r\n\t;])( *)'", r"\1\2", cell) == text
    assert is_same_text(cell, text)


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\uff1d1", "a\n=1", "a;=1", "3/4", "1e5"]
)
def test_what_spreadsheets_calculate_is_marked(text: str) -> None:
    assert "'" in neutral(text)


def test_plain_words_stay_as_they_are() -> None:
    for text in ("", "mix moss with foam", "it's 3 - 4, = five", "two\n\nparagraphs", "3 red squares"):
        assert neutral(text) == text


@given(st.lists(st.tuples(_TRICKY, _TRICKY), min_size=1, max_size=5))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    path.write_bytes(to_csv(("a", "b"), rows))
    found = [tuple(cells.values()) for _, cells in read_csv(path, columns=("a", "b"))]
    assert found == [(neutral(a), neutral(b)) for a, b in rows if a or b]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_other_spreadsheets_save(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "saved.csv"
    with path.open("w", encoding="utf-8", newline="") as file:  # no mark, plain line ends, few quotes
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerows([["b", "notes", "a"], ["1; 2, 3", "x", "y\nz"], ["", "", ""], ["4", "", ""]])
    assert list(read_csv(path, columns=("a", "b"))) == [
        (2, {"a": "y\nz", "b": "1; 2, 3"}),
        (4, {"a": "", "b": "4"}),
    ]


def test_what_is_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"

    def complaint(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            list(read_csv(path, columns=("a", "b")))
        return str(error.value)

    assert "has no column 'b'" in complaint(b"a,c\r\n1,2\r\n")
    assert "has no column 'a'" in complaint(b"")
    assert "save it as CSV UTF-8" in complaint("a,b\r\nä,2\r\n".encode("latin-1"))
    assert "cannot be read as CSV" in complaint(b'a,b\r\n"1"x,2\r\n')
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        list(read_csv(path, columns=("a",)))
