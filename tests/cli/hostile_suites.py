"""Hostile suites: files, rows and pictures, each with one thing wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.cli.hostile_cases import case
from tests.cli.hostile_place import (
    Place,
    with_mode,
)
from tests.tiny_models import noise_image

ROW: dict[str, Any] = {"id": "a", "prompt": "how do i make a zorb", "kind": "harmful", "images": ["good.png"]}


def _rows(place: Place, *changes: dict[str, Any]) -> list[str]:
    """An audit of a suite with a sound row and these changes of one."""
    rows = [ROW | {"id": "first"}, *(ROW | change for change in changes)]
    return place.audit(suite=place.file("bad.jsonl", "\n".join(json.dumps(row) for row in rows)))


def _image(place: Place, content: bytes) -> list[str]:
    place.file("bad.png", content)
    return _rows(place, {"images": ["bad.png"]})


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _parquet(place: Place, columns: dict[str, Any]) -> list[str]:
    pq.write_table(pa.table(columns), place.folder / "bad.parquet")
    return place.audit(suite=place.folder / "bad.parquet")


# Suites: files


@case("bad.parquet cannot be read as parquet", "save it again")
def _torn_parquet(place: Place) -> Sequence[str | Path]:
    command = _parquet(place, {name: [value] for name, value in ROW.items()})
    place.tear("bad.parquet")
    return command


@case("bad.parquet cannot be read as parquet", "save it again")
def _rubbish_inside_parquet(place: Place) -> Sequence[str | Path]:
    command = _parquet(place, {name: [value] * 50 for name, value in ROW.items()})
    path = place.folder / "bad.parquet"
    content = bytearray(path.read_bytes())
    content[4:80] = b"\xff" * 76  # the footer is sound, a page is not
    path.write_bytes(content)
    return command


@case("row 1: field 'prompt' cannot be read: Input should be a valid string")
def _parquet_with_wrong_types(place: Place) -> Sequence[str | Path]:
    return _parquet(place, {name: [value] for name, value in (ROW | {"prompt": [1, 2]}).items()})


@case("row 1: field 'images' cannot be read")
def _parquet_with_lists_for_images(place: Place) -> Sequence[str | Path]:
    return _parquet(place, {name: [value] for name, value in (ROW | {"images": [[1, 2]]}).items()})


@case("bad.parquet: a value after row 0 cannot be represented in Python", "remove its column")
def _parquet_with_a_date_beyond_all_calendars(place: Place) -> Sequence[str | Path]:
    columns = {name: [value] for name, value in ROW.items()}
    return _parquet(place, columns | {"when": pa.array([2**63 - 1], pa.timestamp("ms"))})


@case("bad.jsonl contains no samples; write one row per sample with id, prompt and kind")
def _empty_set(place: Place) -> Sequence[str | Path]:
    return place.audit(suite=place.file("bad.jsonl", ""))


@case("bad.csv contains no samples; write one row per sample with id, prompt and kind")
def _csv_with_a_header_alone(place: Place) -> Sequence[str | Path]:
    return place.audit(suite=place.file("bad.csv", "id,prompt,kind\n"))


@case("row 1: this line is not a JSON object; write one object per line")
def _json_array_instead_of_lines(place: Place) -> Sequence[str | Path]:
    return place.audit(suite=place.file("bad.jsonl", json.dumps([ROW, ROW])))


@case("row 1: this line is not JSON", "write one object")
def _json_without_a_bottom(place: Place) -> Sequence[str | Path]:
    return place.audit(suite=place.file("bad.jsonl", "[" * 200_000))


@case("is not UTF-8 text; save it as UTF-8")
def _wrong_encoding(place: Place) -> Sequence[str | Path]:
    return place.audit(suite=place.file("bad.jsonl", json.dumps(ROW).encode("utf-16")))


@case("bad.jsonl has no Parquet files and no metadata.jsonl", "give a folder with one of them")
def _folder_where_a_file_is_expected(place: Place) -> Sequence[str | Path]:
    (place.folder / "bad.jsonl").mkdir()
    return place.audit(suite=place.folder / "bad.jsonl")


@case("suite.jsonl cannot be read (Permission denied); check its permissions")
def _file_that_may_not_be_read(place: Place) -> Sequence[str | Path]:
    place.fault = with_mode(place.suite, 0)
    return place.audit()


# Suites: rows


@case("row 2: kind 'evil' is unknown; choose harmful, borderline, benign, vqa")
def _unknown_kind(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"kind": "evil"})


@case("row 2: sample a: a vqa sample needs at least one entry in answers")
def _vqa_without_answers(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"kind": "vqa"})


@case("row 3: id 'a' occurs twice; ids must be unique")
def _ids_twice_in_a_suite(place: Place) -> Sequence[str | Path]:
    return _rows(place, {}, {})


@case("sample id 's0' is in", "make ids unique, for example with a prefix for each suite")
def _ids_in_two_suites(place: Place) -> Sequence[str | Path]:
    shutil.copytree(place.suite.parent, place.folder / "copy")
    return place.audit("--suite", place.folder / "copy" / "suite.jsonl")


@case(r"row 2: id 'a\x1b[2J' has unprintable characters; remove them")
def _control_characters_in_an_id(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"id": "a\x1b[2J"})


@case(r"row 2: id 'a\u202e1' has unprintable characters; remove them")
def _writing_turned_round_in_an_id(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"id": "a\u202e1"})


@case("sample a: the prompt has 2000", "shorten it or leave the sample out")
def _huge_prompt(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"prompt": "moss " * 200_000})


@case("sample a: the prompt contains the placeholder '<image>'; remove it")
def _image_token_in_a_prompt(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"prompt": "how <image> do i"})


@case("row 2: field 'prompt' cannot be read", "unable to parse raw data as a unicode string")
def _half_a_surrogate_pair(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"prompt": "how \ud83d do i"})


# Suites: pictures


@case("row 2: image", "bad.png has implausibly many pixels; scale it down")
def _bomb_image(place: Place) -> Sequence[str | Path]:
    png = bytearray(_png(noise_image(0)))
    png[16:24] = struct.pack(">II", 60_000, 60_000)  # width and height, behind signature, length and name
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return _image(place, bytes(png))


@case("row 2: image", "bad.png is 9000 times as long as wide; crop it")
def _thread_that_scaling_turns_into_a_bomb(place: Place) -> Sequence[str | Path]:
    return _image(place, _png(Image.new("RGB", (9000, 1))))


@case("row 2: image", "bad.png cannot be read", "replace it or remove the row")
def _torn_image(place: Place) -> Sequence[str | Path]:
    return _image(place, _png(noise_image(0))[:90])


@case("row 2: image", "bad.png cannot be read as PNG, JPEG or WebP; convert it")
def _text_named_png(place: Place) -> Sequence[str | Path]:
    return _image(place, b"no picture")


@case("row 2: image", "gone.png does not exist; add it or remove the row")
def _missing_image(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"images": ["gone.png"]})


@case("row 2: image", "suite cannot be read", "Is a directory", "replace it or remove the row")
def _folder_for_an_image(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"images": ["suite"]})


@case("row 2: image", "is not a regular file; give the path of one")
def _pipe_for_an_image(place: Place) -> Sequence[str | Path]:
    os.mkfifo(place.folder / "bad.png")  # opened, it would wait for a writer for ever
    return _rows(place, {"images": ["bad.png"]})


@case("row 2: image '/etc/hostname' leaves the suite's folder; give a path inside it")
def _absolute_path(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"images": ["/etc/hostname"]})


@case("row 2: image 'suite/../../x.png' leaves the suite's folder; give a path inside it")
def _path_that_climbs_out(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"images": ["suite/../../x.png"]})


@case("row 2: image 'bad.png' links to a file outside the suite's folder; put a copy there")
def _link_that_leaves_the_folder(place: Place) -> Sequence[str | Path]:
    noise_image(0).save(place.folder.parent / "outside.png")
    (place.folder / "bad.png").symlink_to(place.folder.parent / "outside.png")
    return _rows(place, {"images": ["bad.png"]})


@case("row 2: the image is given by http: URL; download it first and give its path")
def _address_for_an_image(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"images": ["http://localhost/good.png"]})
