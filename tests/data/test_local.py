from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from exitsafe.data import load_suite
from exitsafe.errors import InputError
from tests.data.copies import png, write_jsonl
from tests.data.recordings import mp4, wav

ROW = {"id": "a", "prompt": "what colour?", "kind": "vqa", "answers": ["red"]}


def test_jsonl_with_everything(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(png())
    row = ROW | {"images": ["pictures/one.png"], "category": "colour", "source": "mine", "else": 1}
    (sample,) = load_suite(write_jsonl(tmp_path, row))
    assert (sample.id, sample.prompt, sample.kind, sample.category) == ("a", "what colour?", "vqa", "colour")
    assert (sample.answers, sample.source) == (("red",), "mine")
    assert sample.images == (tmp_path / "pictures" / "one.png",)


def test_what_may_be_missing_has_a_default(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, {"id": 7, "prompt": "how", "kind": "benign", "category": None})
    (sample,) = load_suite(str(path))
    assert (sample.id, sample.images, sample.category, sample.answers) == ("7", (), "", ())
    assert sample.source == "suite"


def test_single_values_stand_for_lists(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    (sample,) = load_suite(write_jsonl(tmp_path, ROW | {"image": "one.png", "answers": 2}))
    assert (sample.images, sample.answers) == ((tmp_path / "one.png",), ("2",))


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text("\ufeff" + json.dumps(ROW) + "\n\n", encoding="utf-8")
    assert len(load_suite(path)) == 1


def test_csv_with_lists_in_json_or_single_values(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(png())
    path = tmp_path / "suite.csv"
    path.write_text(
        "id,prompt,kind,images,answers,category\n"
        '1,"what, please?",vqa,"[""one.png"", ""two.png""]","[""red"", ""dark red""]",\n'
        "2,how,benign,one.png,,things\n"
        "3,[sic] how,harmful,,[not json],\n",
        encoding="utf-8",
    )
    first, second, third = load_suite(path)
    assert first.prompt == "what, please?"
    assert first.images == (tmp_path / "one.png", tmp_path / "two.png")
    assert first.answers == ("red", "dark red")
    assert (second.id, second.images, second.answers, second.category) == ("2", (tmp_path / "one.png",), (), "things")
    assert (third.prompt, third.images, third.answers) == ("[sic] how", (), ("[not json]",))


def test_parquet_with_embedded_and_named_images(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    table = pa.table(
        {
            "id": ["a", "b", "c"],
            "prompt": ["x", "y", "z"],
            "kind": ["benign", "benign", "benign"],
            "image": [{"bytes": png("blue"), "path": "gone.png"}, {"bytes": None, "path": "one.png"}, None],
        }
    )
    path = tmp_path / "suite.parquet"
    pq.write_table(table, path)
    first, second, third = load_suite(path)
    assert first.images == (png("blue"),)
    assert second.images == (tmp_path / "one.png",)
    assert third.images == ()


def test_parquet_with_lists_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "suite.parquet"
    rows = [{"id": 1, "prompt": "x", "kind": "vqa", "images": [png(), png("blue")], "answers": ["red"] * 10}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    (sample,) = load_suite(path)
    assert (sample.id, len(sample.images), len(sample.answers)) == ("1", 2, 10)


def test_jsonl_with_videos_audios_and_a_system_prompt(tmp_path: Path) -> None:
    for name, content in (("a.mp4", mp4()), ("said.wav", wav()), ("0.png", png()), ("1.png", png("blue"))):
        (tmp_path / name).write_bytes(content)
    path = write_jsonl(
        tmp_path,
        ROW | {"videos": ["a.mp4", ["0.png", "1.png"]], "audios": ["said.wav"], "system": "be brief"},
        ROW | {"id": "b", "video": "a.mp4", "audio": "said.wav", "system": None},
    )
    first, second = load_suite(path)
    assert first.videos == (tmp_path / "a.mp4", (tmp_path / "0.png", tmp_path / "1.png"))
    assert (first.audios, first.system) == ((tmp_path / "said.wav",), "be brief")
    assert (second.videos, second.audios, second.system) == ((tmp_path / "a.mp4",), (tmp_path / "said.wav",), "")


def test_csv_with_frames_as_lists_in_json(tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "suite.csv").write_text('id,prompt,kind,videos\n1,x,benign,"[[""0.png"", ""1.png""]]"\n')
    (sample,) = load_suite(tmp_path / "suite.csv")
    assert sample.videos == ((tmp_path / "0.png", tmp_path / "1.png"),)


def test_parquet_with_embedded_videos_and_audios(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    row = ROW | {"video": {"bytes": mp4(), "path": "gone.mp4"}, "audios": [{"bytes": None, "path": "a.wav"}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "suite.parquet")
    (sample,) = load_suite(tmp_path / "suite.parquet")
    assert (sample.videos, sample.audios) == ((mp4(),), (tmp_path / "a.wav",))


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, ROW, ROW | {"id": "b"}, {"broken": True})
    assert [sample.id for sample in load_suite(path, limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "b", "kind": "benign"}, "row 2: field 'prompt' is missing; a sample needs id, prompt and kind"),
        ({"id": "b", "prompt": "", "kind": "benign"}, "row 2: field 'prompt' is empty"),
        (
            {"id": "b", "prompt": "x", "kind": "evil"},
            "row 2: kind 'evil' is unknown; choose harmful, borderline, benign, vqa",
        ),
        ({"id": "b", "prompt": "x", "kind": "vqa"}, "row 2: sample b: a vqa sample needs at least one entry"),
        (ROW, "row 2: id 'a' occurs twice; ids must be unique"),
        ({"id": "b", "prompt": ["x"], "kind": "benign"}, "row 2: field 'prompt' cannot be read"),
        (ROW | {"id": "b", "image": "no.png"}, r"row 2: image .*no\.png does not exist"),
        (ROW | {"id": "b", "image": "text.png"}, r"row 2: image .*text\.png cannot be read"),
        (ROW | {"id": "b", "image": "torn.png"}, r"row 2: image .*torn\.png cannot be read"),
        (ROW | {"id": "b", "image": "torn.jpg"}, r"row 2: image .*torn\.jpg cannot be read"),
        (ROW | {"id": "b", "image": "."}, "row 2: image .* cannot be read"),
        (ROW | {"id": "b", "image": "/etc/x.png"}, "row 2: image '/etc/x.png' leaves the suite's folder"),
        (ROW | {"id": "b", "image": "a/../../x.png"}, "row 2: image 'a/../../x.png' leaves the suite's folder"),
        (ROW | {"id": "b", "image": "..\\x.png"}, "leaves the suite's folder"),
        (ROW | {"id": "b", "image": "C:\\x.png"}, "leaves the suite's folder"),
        (ROW | {"id": "b", "image": "ok.png", "images": ["ok.png"]}, "row 2: both image and images are given"),
        (ROW | {"id": "b", "image": {"path": None}}, "row 2: the image has neither bytes nor path"),
        (ROW | {"id": "b", "video": "no.mp4"}, r"row 2: video .*no\.mp4 does not exist"),
        (ROW | {"id": "b", "video": "text.png"}, r"row 2: video .*text\.png cannot be read as MP4"),
        (ROW | {"id": "b", "video": "../x.mp4"}, r"row 2: video '\.\./x\.mp4' leaves the suite's folder"),
        (ROW | {"id": "b", "video": "ok.png", "videos": ["ok.png"]}, "row 2: both video and videos are given"),
        (ROW | {"id": "b", "videos": [["no.png"]]}, r"row 2: image .*no\.png does not exist"),
        (ROW | {"id": "b", "videos": [["/x.png"]]}, "row 2: frame '/x.png' leaves the suite's folder"),
        (ROW | {"id": "b", "videos": [[]]}, "row 2: sample b: videos contains an empty list"),
        (ROW | {"id": "b", "audio": "no.wav"}, r"row 2: audio .*no\.wav does not exist"),
        (ROW | {"id": "b", "audio": "text.png"}, r"row 2: audio .*text\.png cannot be read as WAV"),
        (ROW | {"id": "b", "audio": "https://x/a.wav"}, "row 2: the audio is given by https: URL; download it"),
        (ROW | {"id": "b", "audio": {"path": None}}, "row 2: the audio has neither bytes nor path"),
        (ROW | {"id": "b", "system": ["x"]}, "row 2: field 'system' cannot be read"),
        (["no", "object"], "row 2: this line is not a JSON object"),
    ],
)
def test_a_bad_row_is_named_with_the_way_out(tmp_path: Path, row: object, message: str) -> None:
    (tmp_path / "ok.png").write_bytes(png())
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "torn.png").write_bytes(png()[:45])
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(jpeg, "JPEG")
    (tmp_path / "torn.jpg").write_bytes(jpeg.getvalue()[:700])
    path = write_jsonl(tmp_path, ROW, row)
    with pytest.raises(InputError, match=message) as caught:
        load_suite(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_bad_embedded_bytes(tmp_path: Path) -> None:
    path = tmp_path / "suite.parquet"
    pq.write_table(pa.Table.from_pylist([ROW | {"image": b"rubbish"}]), path)
    with pytest.raises(InputError, match="row 1: image of 7 bytes cannot be read"):
        load_suite(path)


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="contains no samples; write one row per sample"):
        load_suite(write_jsonl(tmp_path))


def test_fields_that_a_sample_does_not_have_are_named(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text('{"id": "a", "prompt": "x", "kind": "harmful", "picture": "p.png"}\n')
    with pytest.warns(
        UserWarning, match=r"suite\.jsonl: ignored fields: picture; a sample has id, prompt, kind, images"
    ):
        load_suite(path)


def _rows(count: int) -> list[dict[str, object]]:
    return [{"id": f"r{number}", "prompt": "x", "kind": "benign"} for number in range(count)]


def test_a_folder_of_parquet_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("mine")
    pq.write_table(pa.Table.from_pylist(_rows(3)[2:]), tmp_path / "data" / "train-00001-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(_rows(2)), tmp_path / "data" / "train-00000-of-00002.parquet")
    samples = load_suite(tmp_path)
    assert [sample.id for sample in samples] == ["r0", "r1", "r2"]
    assert {sample.source for sample in samples} == {tmp_path.name}
    assert len(load_suite(tmp_path, limit=1)) == 1
    pq.write_table(pa.Table.from_pylist(_rows(1)), tmp_path / "data" / "train-00002-of-00002.parquet")
    with pytest.raises(InputError, match=r"train-00002-of-00002\.parquet, row 1: id 'r0' occurs twice"):
        load_suite(tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_folder_of_pictures_with_a_table_of_their_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.png").write_bytes(png())
    row = {"file_name": "deep/one.png", "id": "a", "prompt": "x", "kind": "benign"}
    if name.endswith("jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    elif name.endswith("csv"):
        (tmp_path / name).write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / name)
    (sample,) = load_suite(tmp_path)
    assert sample.images == (tmp_path / "deep" / "one.png",)


def test_a_folder_of_videos_and_recordings_with_a_table_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "one.mp4").write_bytes(mp4())
    (tmp_path / "two.WAV").write_bytes(wav())
    (tmp_path / "metadata.csv").write_text("file_name,id,prompt,kind\none.mp4,a,x,benign\ntwo.WAV,b,x,benign\n")
    one, two = load_suite(tmp_path)
    assert (one.videos, one.audios, one.images) == ((tmp_path / "one.mp4",), (), ())
    assert (two.videos, two.audios, two.images) == ((), (tmp_path / "two.WAV",), ())


def test_a_folder_without_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no Parquet files and no metadata\.jsonl, metadata\.csv, metadata"):
        load_suite(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"a\.parquet cannot be read as parquet"):
        load_suite(tmp_path)
    pq.write_table(pa.Table.from_pylist(_rows(1)).slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="contains no samples"):
        load_suite(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path, ROW)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"suite\.jsonl cannot be read \(Permission denied\)"):
        load_suite(path)
