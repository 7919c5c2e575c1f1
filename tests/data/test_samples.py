from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exitsafe.data import load_suite
from exitsafe.errors import InputError
from exitsafe.judges.vqa import VQAAccuracy
from exitsafe.records import Response, Sample
from tests.data.copies import png, write_jsonl, write_pictures

ROW = {"id": "a", "prompt": "what colour?", "kind": "benign"}


@pytest.mark.parametrize("field", ["id", "category", "source"])
@pytest.mark.parametrize("character", ["\0", "\n", "\x1b", "\u202e", "\u200b", "\u2028", "\u2066"])
def test_what_would_falsify_a_printed_table_is_refused(tmp_path: Path, field: str, character: str) -> None:
    path = write_jsonl(tmp_path, ROW | {field: f"x{character}y"})
    with pytest.raises(InputError, match=f"row 1: {field} 'x.*y' has unprintable characters") as caught:
        load_suite(path)
    assert str(caught.value).isprintable()
    assert str(caught.value).isascii()


def test_letters_of_every_script_are_fine(tmp_path: Path) -> None:
    ids = ["gruen-ü", "数-1", "א", "é́", "🟥"]
    assert [sample.id for sample in load_suite(write_jsonl(tmp_path, *(ROW | {"id": name} for name in ids)))] == ids


def test_prompts_may_hold_anything_that_is_text(tmp_path: Path) -> None:
    prompts = ["\u202ezorb\0", "z" * 1_000_000, "<image>", "[/red]", "line\r\nbreak"]
    rows = [ROW | {"id": number, "prompt": prompt} for number, prompt in enumerate(prompts)]
    assert [sample.prompt for sample in load_suite(write_jsonl(tmp_path, *rows))] == prompts


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text('{"id": "a", "prompt": "zorb \\ud800", "kind": "benign"}\n')
    with pytest.raises(InputError, match=r"row 1: field 'prompt' cannot be read: .*unicode") as caught:
        load_suite(path)
    assert "zorb" not in str(caught.value)


@pytest.mark.parametrize("field", ["id", "prompt", "kind"])
def test_nan_is_no_value(tmp_path: Path, field: str) -> None:
    (sample,) = load_suite(write_jsonl(tmp_path, ROW | {"category": math.nan, "image": math.nan, "answers": math.nan}))
    assert (sample.category, sample.images, sample.answers) == ("", (), ())
    with pytest.raises(InputError, match=f"row 1: field '{field}' is missing; a sample needs id, prompt and kind"):
        load_suite(write_jsonl(tmp_path, ROW | {field: math.nan}))


def test_a_prompt_in_the_wrong_column_is_not_printed(tmp_path: Path) -> None:
    for text in ("mix moss with foam then shake it", "mix moss"):
        with pytest.raises(InputError, match="row 1: this kind is unknown; choose harmful"):
            load_suite(write_jsonl(tmp_path, ROW | {"kind": text}))


def test_one_bad_picture_in_a_list_is_found(tmp_path: Path) -> None:
    write_pictures(tmp_path, count=2)
    with pytest.raises(InputError, match=r"row 1: image .*9\.png does not exist"):
        load_suite(write_jsonl(tmp_path, ROW | {"images": ["0.png", "9.png"]}))


def test_thousands_of_rows_take_seconds(tmp_path: Path) -> None:
    write_pictures(tmp_path, count=1)
    rows = [ROW | {"id": number, "images": ["0.png"], "category": f"c{number % 7}"} for number in range(5000)]
    embedded = [ROW | {"id": number, "image": {"bytes": png(), "path": None}} for number in range(5000)]
    pq.write_table(pa.Table.from_pylist(embedded), tmp_path / "suite.parquet")
    start = time.process_time()
    assert len(load_suite(write_jsonl(tmp_path, *rows))) == 5000
    assert len(load_suite(tmp_path / "suite.parquet")) == 5000
    assert time.process_time() - start < 10


def test_a_cell_of_brackets_without_end_is_a_text(tmp_path: Path) -> None:
    (sample,) = load_suite(write_jsonl(tmp_path, ROW | {"answers": "[" * 100_000}))
    assert sample.answers == ("[" * 100_000,)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_integers_that_pandas_made_floats_stay_integers(tmp_path: Path, ending: str) -> None:
    pandas = pytest.importorskip("pandas")
    path = tmp_path / f"suite.{ending}"
    table = pandas.DataFrame(
        {
            "id": [7.0, 8.0],
            "prompt": ["how many?", "which version?"],
            "kind": ["vqa", "benign"],
            "category": [3.0, None],
            "answers": [2.0, None],
        }
    )
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_dict("records")))  # to_json writes 7
    elif ending == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    samples = load_suite(path)
    assert [(sample.id, sample.category, sample.answers) for sample in samples] == [("7", "3", ("2",)), ("8", "", ())]
    response = Response(sample_id="7", exit_layer=1, text="2", num_tokens=1, finish_reason="stop", seconds=0.0)
    assert VQAAccuracy()(samples[:1], [response])[0].score == 1.0


def test_texts_that_look_like_numbers_stay_texts(tmp_path: Path) -> None:
    names = ["7.0", "1e3", "007", "nan", "1.50"]
    rows = [ROW | {"id": name, "kind": "vqa", "answers": [name]} for name in names]
    assert [(sample.id, *sample.answers) for sample in load_suite(write_jsonl(tmp_path, *rows))] == [
        (x, x) for x in names
    ]
    path = tmp_path / "suite.csv"
    path.write_text("id,prompt,kind,answers\n" + "".join(f"{name},x,vqa,{name}\n" for name in names))
    assert [(sample.id, *sample.answers) for sample in load_suite(path)] == [(x, x) for x in names]


@pytest.mark.parametrize("answers", [[2.0, math.nan, "two", None, 2], '[2.0, NaN, "two", null, 2]'])
def test_missing_references_are_none(tmp_path: Path, answers: object) -> None:
    (sample,) = load_suite(write_jsonl(tmp_path, ROW | {"kind": "vqa", "answers": answers}))
    assert sample.answers == ("2", "two", "2")


def test_an_id_that_lost_digits_as_a_float_is_refused(tmp_path: Path) -> None:
    assert [sample.id for sample in load_suite(write_jsonl(tmp_path, ROW | {"id": 2**53 + 1}))] == [str(2**53 + 1)]
    with pytest.raises(InputError, match=r"row 1: field 'id' cannot be read: .* lost digits as a float; save the colu"):
        load_suite(write_jsonl(tmp_path, ROW | {"id": float(2**53 + 1)}))


def test_samples_in_python_hold_text() -> None:
    with pytest.raises(InputError, match="sample 7: answers contains a float; give strings only"):
        Sample(id="7", prompt="x", kind="vqa", answers=(2.0,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sample 7: answers is a single string; give a list of strings"):
        Sample(id="7", prompt="x", kind="vqa", answers="red")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"sample 7\.0: id contains a float; give strings only"):
        Sample(id=7.0, prompt="x", kind="benign")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sample 7: system contains a NoneType; give strings only"):
        Sample(id="7", prompt="x", kind="benign", system=None)  # type: ignore[arg-type]
