"""The hostile inputs of test_hostile.py: each breaks one thing in a `Place` and gives the command line to try."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from exitsafe.records import Response, Verdict
from tests.cli.hostile_place import (
    Broken,
    Place,
    filled,
    judged_by,
    largest_file,
    mount_small_disk,
    with_mode,
)
from tests.tiny_models import noise_image, tiny_llava

ROW: dict[str, Any] = {"id": "a", "prompt": "how do i make a zorb", "kind": "harmful", "images": ["good.png"]}
SAID = "mix moss with foam then shake it"


Make = Callable[[Place], Sequence[str | Path]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A hostile input.

    Args:
        make: Breaks something and gives the command line.
        says: What the one line must name, the way out among it.
        goes_on: Whether the command gets to work before it fails: then the same one, mended, must finish.
    """

    make: Make
    says: tuple[str, ...]
    goes_on: bool = False


CASES: dict[str, Case] = {}


def _case(*says: str, goes_on: bool = False) -> Callable[[Make], None]:
    def add(make: Make) -> None:
        CASES[make.__name__.strip("_").replace("_", "-")] = Case(make=make, says=says, goes_on=goes_on)

    return add


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


@_case("bad.parquet cannot be read as parquet", "save it again")
def _torn_parquet(place: Place) -> Sequence[str | Path]:
    command = _parquet(place, {name: [value] for name, value in ROW.items()})
    place.tear("bad.parquet")
    return command


@_case("bad.parquet cannot be read as parquet", "save it again")
def _rubbish_inside_parquet(place: Place) -> Sequence[str | Path]:
    command = _parquet(place, {name: [value] * 50 for name, value in ROW.items()})
    path = place.folder / "bad.parquet"
    content = bytearray(path.read_bytes())
    content[4:80] = b"\xff" * 76  # the footer is sound, a page is not
    path.write_bytes(content)
    return command


@_case("row 1: field 'prompt' cannot be read: Input should be a valid string")
def _parquet_with_wrong_types(place: Place) -> Sequence[str | Path]:
    return _parquet(place, {name: [value] for name, value in (ROW | {"prompt": [1, 2]}).items()})


@_case("row 1: field 'images' cannot be read")
def _parquet_with_lists_for_images(place: Place) -> Sequence[str | Path]:
    return _parquet(place, {name: [value] for name, value in (ROW | {"images": [[1, 2]]}).items()})


@_case("bad.parquet: a value after row 0 cannot be represented in Python", "remove its column")
def _parquet_with_a_date_beyond_all_calendars(place: Place) -> Sequence[str | Path]:
    columns = {name: [value] for name, value in ROW.items()}
    return _parquet(place, columns | {"when": pa.array([2**63 - 1], pa.timestamp("ms"))})


@_case("bad.jsonl contains no samples; write one row per sample with id, prompt and kind")
def _empty_set(place: Place) -> Sequence[str | Path]:
    return place.audit(suite=place.file("bad.jsonl", ""))


@_case("bad.csv contains no samples; write one row per sample with id, prompt and kind")
def _csv_with_a_header_alone(place: Place) -> Sequence[str | Path]:
    return place.audit(suite=place.file("bad.csv", "id,prompt,kind\n"))


@_case("row 1: this line is not a JSON object; write one object per line")
def _json_array_instead_of_lines(place: Place) -> Sequence[str | Path]:
    return place.audit(suite=place.file("bad.jsonl", json.dumps([ROW, ROW])))


@_case("row 1: this line is not JSON", "write one object")
def _json_without_a_bottom(place: Place) -> Sequence[str | Path]:
    return place.audit(suite=place.file("bad.jsonl", "[" * 200_000))


@_case("is not UTF-8 text; save it as UTF-8")
def _wrong_encoding(place: Place) -> Sequence[str | Path]:
    return place.audit(suite=place.file("bad.jsonl", json.dumps(ROW).encode("utf-16")))


@_case("bad.jsonl has no Parquet files and no metadata.jsonl", "give a folder with one of them")
def _folder_where_a_file_is_expected(place: Place) -> Sequence[str | Path]:
    (place.folder / "bad.jsonl").mkdir()
    return place.audit(suite=place.folder / "bad.jsonl")


@_case("suite.jsonl cannot be read (Permission denied); check its permissions")
def _file_that_may_not_be_read(place: Place) -> Sequence[str | Path]:
    place.fault = with_mode(place.suite, 0)
    return place.audit()


# Suites: rows


@_case("row 2: kind 'evil' is unknown; choose harmful, borderline, benign, vqa")
def _unknown_kind(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"kind": "evil"})


@_case("row 2: sample a: a vqa sample needs at least one entry in answers")
def _vqa_without_answers(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"kind": "vqa"})


@_case("row 3: id 'a' occurs twice; ids must be unique")
def _ids_twice_in_a_suite(place: Place) -> Sequence[str | Path]:
    return _rows(place, {}, {})


@_case("sample id 's0' is in", "make ids unique, for example with a prefix for each suite")
def _ids_in_two_suites(place: Place) -> Sequence[str | Path]:
    shutil.copytree(place.suite.parent, place.folder / "copy")
    return place.audit("--suite", place.folder / "copy" / "suite.jsonl")


@_case(r"row 2: id 'a\x1b[2J' has unprintable characters; remove them")
def _control_characters_in_an_id(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"id": "a\x1b[2J"})


@_case(r"row 2: id 'a\u202e1' has unprintable characters; remove them")
def _writing_turned_round_in_an_id(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"id": "a\u202e1"})


@_case("sample a: the prompt has 2000", "shorten it or leave the sample out")
def _huge_prompt(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"prompt": "moss " * 200_000})


@_case("sample a: the prompt contains the placeholder '<image>'; remove it")
def _image_token_in_a_prompt(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"prompt": "how <image> do i"})


@_case("row 2: field 'prompt' cannot be read", "unable to parse raw data as a unicode string")
def _half_a_surrogate_pair(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"prompt": "how \ud83d do i"})


# Suites: pictures


@_case("row 2: image", "bad.png has implausibly many pixels; scale it down")
def _bomb_image(place: Place) -> Sequence[str | Path]:
    png = bytearray(_png(noise_image(0)))
    png[16:24] = struct.pack(">II", 60_000, 60_000)  # width and height, behind signature, length and name
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return _image(place, bytes(png))


@_case("row 2: image", "bad.png is 9000 times as long as wide; crop it")
def _thread_that_scaling_turns_into_a_bomb(place: Place) -> Sequence[str | Path]:
    return _image(place, _png(Image.new("RGB", (9000, 1))))


@_case("row 2: image", "bad.png cannot be read", "replace it or remove the row")
def _torn_image(place: Place) -> Sequence[str | Path]:
    return _image(place, _png(noise_image(0))[:90])


@_case("row 2: image", "bad.png cannot be read as PNG, JPEG or WebP; convert it")
def _text_named_png(place: Place) -> Sequence[str | Path]:
    return _image(place, b"no picture")


@_case("row 2: image", "gone.png does not exist; add it or remove the row")
def _missing_image(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"images": ["gone.png"]})


@_case("row 2: image", "suite cannot be read", "Is a directory", "replace it or remove the row")
def _folder_for_an_image(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"images": ["suite"]})


@_case("row 2: image", "is not a regular file; give the path of one")
def _pipe_for_an_image(place: Place) -> Sequence[str | Path]:
    os.mkfifo(place.folder / "bad.png")  # opened, it would wait for a writer for ever
    return _rows(place, {"images": ["bad.png"]})


@_case("row 2: image '/etc/hostname' leaves the suite's folder; give a path inside it")
def _absolute_path(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"images": ["/etc/hostname"]})


@_case("row 2: image 'suite/../../x.png' leaves the suite's folder; give a path inside it")
def _path_that_climbs_out(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"images": ["suite/../../x.png"]})


@_case("row 2: image 'bad.png' links to a file outside the suite's folder; put a copy there")
def _link_that_leaves_the_folder(place: Place) -> Sequence[str | Path]:
    noise_image(0).save(place.folder.parent / "outside.png")
    (place.folder / "bad.png").symlink_to(place.folder.parent / "outside.png")
    return _rows(place, {"images": ["bad.png"]})


@_case("row 2: the image is given by http: URL; download it first and give its path")
def _address_for_an_image(place: Place) -> Sequence[str | Path]:
    return _rows(place, {"images": ["http://localhost/good.png"]})


# Models


@_case("has no processor: copy the processor and tokenizer files next to the weights")
def _model_without_processor(place: Place) -> Sequence[str | Path]:
    for path in place.model.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            path.unlink()
    return place.audit()


@_case(
    "the processor of",
    "makes pictures of 42x42 pixels, but the image encoder reads 28x28: set the image processor's size",
)
def _processor_with_another_crop(place: Place) -> Sequence[str | Path]:
    record = json.loads((place.model / "processor_config.json").read_text())
    record["image_processor"]["crop_size"] = {"height": 42, "width": 42}
    place.file("model/processor_config.json", json.dumps(record))
    return place.audit()


@_case("cannot load", "save or download it again")
def _torn_weights(place: Place) -> Sequence[str | Path]:
    place.tear("model", "model.safetensors")
    return place.audit()


def _adapter(place: Place) -> Path:
    adapter = place.folder / "adapter"
    get_peft_model(tiny_llava(), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(adapter))
    return adapter


@_case("adapter does not fit this model", "weights in the file match nothing", "save or download the adapter again")
def _adapter_whose_names_match_nothing(place: Place) -> Sequence[str | Path]:
    weights = (adapter := _adapter(place)) / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "z_proj"): tensor for name, tensor in load_file(weights).items()}, weights)
    return place.audit("--adapter", adapter)


@_case("adapter does not fit this model", "8 of 16 adapter weights are missing")
def _half_of_an_adapter_to_export(place: Place) -> Sequence[str | Path]:
    weights = (adapter := _adapter(place)) / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "lora_A" in name}, weights)
    return ["export", str(place.model), "--adapter", str(adapter), "--exit-layer", "2", "--out", str(place.new)]


@_case("adapter_model.safetensors is truncated or corrupt", "save or download it again")
def _torn_adapter(place: Place) -> Sequence[str | Path]:
    adapter = _adapter(place)
    place.tear("adapter", "adapter_model.safetensors")
    return place.audit("--adapter", adapter)


@_case("adapter_config.json: r is not a number; save or download the adapter again")
def _adapter_config_with_wrong_types(place: Place) -> Sequence[str | Path]:
    adapter = _adapter(place)
    record = json.loads((adapter / "adapter_config.json").read_text())
    place.file("adapter/adapter_config.json", json.dumps(record | {"r": [8]}))
    return place.audit("--adapter", adapter)


@_case("adapter does not fit this model", "weights have a different shape", "it was made for some/larger-model")
def _adapter_of_another_model(place: Place) -> Sequence[str | Path]:
    adapter = _adapter(place)
    record = json.loads((adapter / "adapter_config.json").read_text())
    place.file("adapter/adapter_config.json", json.dumps(record | {"base_model_name_or_path": "some/larger-model"}))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: torch.cat([v, v], dim=-1) for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    return place.audit("--adapter", adapter)


# Folders


@_case("--out", "is a file", "see exitsafe audit --help")
def _out_is_a_file(place: Place) -> Sequence[str | Path]:
    return place.audit(out=place.file("new", "mine"))


@_case("new is not empty and not a run (it contains thesis.txt); choose a new folder")
def _out_holds_something_else(place: Place) -> Sequence[str | Path]:
    place.new.mkdir()
    place.file("new/thesis.txt", "mine")
    return place.audit()


@_case("new/run.json is not in this version's format", "into a new folder")
def _out_is_of_another_program(place: Place) -> Sequence[str | Path]:
    place.new.mkdir()
    place.file("new/run.json", '{"program": "other"}')
    return place.audit()


@_case("run is a run with other settings: decoding.seed was 0, is now 7; choose a new folder or go back")
def _out_is_a_run_with_other_settings(place: Place) -> Sequence[str | Path]:
    return place.audit("--seed", "7", out=place.run)


@_case("new cannot be written (Permission denied); make room or choose another folder", goes_on=True)
def _read_only_folder(place: Place) -> Sequence[str | Path]:
    locked = place.folder / "locked"
    locked.mkdir()
    place.fault = with_mode(locked, 0o500)
    return place.audit(out=locked / "new")


@_case("00000.jsonl cannot be written (File too large); make room", "what was saved is kept", goes_on=True)
def _quota_used_up(place: Place) -> Sequence[str | Path]:
    place.fault = largest_file(4_000)
    return place.audit()


@_case("00000.jsonl cannot be written (No space left on device); make room", "what was saved is kept", goes_on=True)
def _full_disk_while_answering(place: Place) -> Sequence[str | Path]:
    return _small_disk(place, kilobytes_left=12)


@_case(".parquet cannot be written (No space left on device); make room", "what was saved is kept", goes_on=True)
def _full_disk_while_compacting(place: Place) -> Sequence[str | Path]:
    return _small_disk(place, kilobytes_left=20)


def _small_disk(place: Place, *, kilobytes_left: int) -> list[str]:
    disk = place.folder / "disk"
    mount_small_disk(disk, kilobytes=128)
    place.fault = filled(disk / "filler", 1024 * (128 - kilobytes_left))
    return place.audit(out=disk / "new")


# Runs that are read


@_case("run.json cannot be read", "audit again")
def _torn_settings(place: Place) -> Sequence[str | Path]:
    place.tear("run", "run.json")
    return place.audit(out=place.run)


@_case("summary.json has changed since the run finished", "restore the run", "audit again")
def _torn_summary(place: Place) -> Sequence[str | Path]:
    place.tear("run", "summary.json")
    return ["compare", place.run, place.run]


def _torn_answers(place: Place, *command: str) -> list[str | Path]:
    place.tear("run", "responses.parquet")
    return [command[0], place.run, *command[1:]]


@_case("responses.parquet has changed since the run finished", "restore the run", "audit again")
def _torn_answers_compared(place: Place) -> Sequence[str | Path]:
    return _torn_answers(place, "compare", str(place.run))


@_case("responses.parquet has changed since the run finished", "restore the run", "audit again")
def _torn_answers_judged(place: Place) -> Sequence[str | Path]:
    return _torn_answers(place, "judge", "--judge", "world-rule")


@_case("responses.parquet has changed since the run finished", "restore the run", "audit again")
def _torn_answers_labelled(place: Place) -> Sequence[str | Path]:
    return _torn_answers(place, "label")


@_case("responses.parquet has changed since the run finished", "restore the run", "audit again")
def _torn_answers_repeated(place: Place) -> Sequence[str | Path]:
    return _torn_answers(place, "verify")


@_case("verdicts.parquet has changed since the run finished", "restore the run", "audit again")
def _torn_verdicts(place: Place) -> Sequence[str | Path]:
    place.tear("run", "verdicts.parquet")
    return ["compare", place.run, place.run]


@_case("run is not finished; rerun its audit with the same settings to resume")
def _unfinished_run_judged(place: Place) -> Sequence[str | Path]:
    head = json.loads((place.run / "run.json").read_text())
    del head["results"]
    place.file("run/run.json", json.dumps(head))
    return ["judge", place.run, "--judge", "world-rule"]


@_case("asked other samples than these; give those it asked")
def _changed_suite_judged(place: Place) -> Sequence[str | Path]:
    place.suite.write_text(place.suite.read_text().replace("colour", "shape"))
    return ["judge", place.run, "--judge", "world-rule"]


@_case("have changed since; restore them")
def _changed_suite_repeated(place: Place) -> Sequence[str | Path]:
    place.suite.write_text(place.suite.read_text().replace("colour", "shape"))
    return ["verify", place.run]


@_case("this is not the model of", "model.checkpoint was", "restore it")
def _changed_model_repeated(place: Place) -> Sequence[str | Path]:
    weights = load_file(place.model / "model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, place.model / "model.safetensors", {"format": "pt"})
    return ["verify", place.run]


@_case("cannot be written", "choose another folder")
def _differences_into_a_file(place: Place) -> Sequence[str | Path]:
    return ["compare", place.run, place.run, "--out", place.file("file", "mine") / "differences.json"]


@_case("cannot be written", "choose another folder")
def _chart_into_a_file(place: Place) -> Sequence[str | Path]:
    return ["compare", place.run, place.run, "--chart", place.file("file", "mine") / "chart.svg"]


# Judges


@_case("judge broken failed (RuntimeError); the answers are saved: fix the judge and rerun", goes_on=True)
def _judge_that_raises(place: Place) -> Sequence[str | Path]:
    def fault(_: list[Verdict], responses: Sequence[Response]) -> object:
        raise RuntimeError(f"cannot judge {responses[0].text!r}")

    return judged_by(Broken(fault), place)


@_case("judge broken returned a str; return Verdict objects", goes_on=True)
def _judge_that_returns_words(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda _, responses: [response.text for response in responses]), place)


@_case("judge broken failed (TypeError)", "fix the judge and rerun", goes_on=True)
def _judge_that_returns_nothing(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda _, __: None), place)


@_case(
    "judge broken returned a verdict on a response that it was not given; copy sample_id and exit_layer", goes_on=True
)
def _judge_with_wrong_ids(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, sample_id=SAID) for each in verdicts]), place)


@_case("judge broken returned 0 refusal verdicts for sample", "return exactly one", goes_on=True)
def _judge_that_leaves_answers_out(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: verdicts[:-1]), place)


@_case("judge broken returned a verdict under another name; use its own", goes_on=True)
def _judge_that_signs_otherwise(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, judge=SAID) for each in verdicts]), place)


@_case("judge broken returned a score of type str; return a number", goes_on=True)
def _judge_with_a_word_for_a_score(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, score=cast(Any, SAID)) for each in verdicts]), place)


@_case("judge broken returned 7 for", "return a number from 0 to 1", goes_on=True)
def _judge_off_its_scale(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, score=7.0) for each in verdicts]), place)


@_case("judge broken returned a label with a lone surrogate; return valid Unicode", goes_on=True)
def _judge_with_half_a_character(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, label="\ud83d") for each in verdicts]), place)


@_case("judge broken returned a reason of type int; return a string", goes_on=True)
def _judge_with_a_number_for_a_reason(place: Place) -> Sequence[str | Path]:
    reason = cast(Any, 3)
    return judged_by(
        Broken(lambda verdicts, _: [replace(each, score=None, unscored=reason) for each in verdicts]), place
    )


@_case("judge broken returned a label of type NoneType; return a string", goes_on=True)
def _judge_without_a_label(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, label=cast(Any, None)) for each in verdicts]), place)
