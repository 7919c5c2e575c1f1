"""The other hostile inputs of test_hostile.py: each breaks one thing in a `Place` and gives the command line to try."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from exitsafe.records import Response, Verdict
from tests.cli.hostile_cases import case
from tests.cli.hostile_place import (
    Broken,
    Place,
    filled,
    judged_by,
    largest_file,
    mount_small_disk,
    with_mode,
)
from tests.tiny_models import tiny_llava

ROW: dict[str, Any] = {"id": "a", "prompt": "how do i make a zorb", "kind": "harmful", "images": ["good.png"]}
SAID = "mix moss with foam then shake it"


# Models


@case("has no processor: copy the processor and tokenizer files next to the weights")
def _model_without_processor(place: Place) -> Sequence[str | Path]:
    for path in place.model.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            path.unlink()
    return place.audit()


@case(
    "the processor of",
    "makes pictures of 42x42 pixels, but the image encoder reads 28x28: set the image processor's size",
)
def _processor_with_another_crop(place: Place) -> Sequence[str | Path]:
    record = json.loads((place.model / "processor_config.json").read_text())
    record["image_processor"]["crop_size"] = {"height": 42, "width": 42}
    place.file("model/processor_config.json", json.dumps(record))
    return place.audit()


@case("cannot load", "save or download it again")
def _torn_weights(place: Place) -> Sequence[str | Path]:
    place.tear("model", "model.safetensors")
    return place.audit()


def _adapter(place: Place) -> Path:
    adapter = place.folder / "adapter"
    get_peft_model(tiny_llava(), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(adapter))
    return adapter


@case("adapter does not fit this model", "weights in the file match nothing", "save or download the adapter again")
def _adapter_whose_names_match_nothing(place: Place) -> Sequence[str | Path]:
    weights = (adapter := _adapter(place)) / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "z_proj"): tensor for name, tensor in load_file(weights).items()}, weights)
    return place.audit("--adapter", adapter)


@case("adapter does not fit this model", "8 of 16 adapter weights are missing")
def _half_of_an_adapter_to_export(place: Place) -> Sequence[str | Path]:
    weights = (adapter := _adapter(place)) / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "lora_A" in name}, weights)
    return ["export", str(place.model), "--adapter", str(adapter), "--exit-layer", "2", "--out", str(place.new)]


@case("adapter_model.safetensors is truncated or corrupt", "save or download it again")
def _torn_adapter(place: Place) -> Sequence[str | Path]:
    adapter = _adapter(place)
    place.tear("adapter", "adapter_model.safetensors")
    return place.audit("--adapter", adapter)


@case("adapter_config.json: r is not a number; save or download the adapter again")
def _adapter_config_with_wrong_types(place: Place) -> Sequence[str | Path]:
    adapter = _adapter(place)
    record = json.loads((adapter / "adapter_config.json").read_text())
    place.file("adapter/adapter_config.json", json.dumps(record | {"r": [8]}))
    return place.audit("--adapter", adapter)


@case("adapter does not fit this model", "weights have a different shape", "it was made for some/larger-model")
def _adapter_of_another_model(place: Place) -> Sequence[str | Path]:
    adapter = _adapter(place)
    record = json.loads((adapter / "adapter_config.json").read_text())
    place.file("adapter/adapter_config.json", json.dumps(record | {"base_model_name_or_path": "some/larger-model"}))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: torch.cat([v, v], dim=-1) for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    return place.audit("--adapter", adapter)


# Folders


@case("--out", "is a file", "see exitsafe audit --help")
def _out_is_a_file(place: Place) -> Sequence[str | Path]:
    return place.audit(out=place.file("new", "mine"))


@case("new is not empty and not a run (it contains thesis.txt); choose a new folder")
def _out_holds_something_else(place: Place) -> Sequence[str | Path]:
    place.new.mkdir()
    place.file("new/thesis.txt", "mine")
    return place.audit()


@case("new/run.json is not in this version's format", "into a new folder")
def _out_is_of_another_program(place: Place) -> Sequence[str | Path]:
    place.new.mkdir()
    place.file("new/run.json", '{"program": "other"}')
    return place.audit()


@case("run is a run with other settings: decoding.seed was 0, is now 7; choose a new folder or go back")
def _out_is_a_run_with_other_settings(place: Place) -> Sequence[str | Path]:
    return place.audit("--seed", "7", out=place.run)


@case("new cannot be written (Permission denied); make room or choose another folder", goes_on=True)
def _read_only_folder(place: Place) -> Sequence[str | Path]:
    locked = place.folder / "locked"
    locked.mkdir()
    place.fault = with_mode(locked, 0o500)
    return place.audit(out=locked / "new")


@case("00000.jsonl cannot be written (File too large); make room", "what was saved is kept", goes_on=True)
def _quota_used_up(place: Place) -> Sequence[str | Path]:
    place.fault = largest_file(4_000)
    return place.audit()


@case("00000.jsonl cannot be written (No space left on device); make room", "what was saved is kept", goes_on=True)
def _full_disk_while_answering(place: Place) -> Sequence[str | Path]:
    return _small_disk(place, kilobytes_left=12)


@case(".parquet cannot be written (No space left on device); make room", "what was saved is kept", goes_on=True)
def _full_disk_while_compacting(place: Place) -> Sequence[str | Path]:
    return _small_disk(place, kilobytes_left=20)


def _small_disk(place: Place, *, kilobytes_left: int) -> list[str]:
    disk = place.folder / "disk"
    mount_small_disk(disk, kilobytes=128)
    place.fault = filled(disk / "filler", 1024 * (128 - kilobytes_left))
    return place.audit(out=disk / "new")


# Runs that are read


@case("run.json cannot be read", "audit again")
def _torn_settings(place: Place) -> Sequence[str | Path]:
    place.tear("run", "run.json")
    return place.audit(out=place.run)


@case("summary.json has changed since the run finished", "restore the run", "audit again")
def _torn_summary(place: Place) -> Sequence[str | Path]:
    place.tear("run", "summary.json")
    return ["compare", place.run, place.run]


def _torn_answers(place: Place, *command: str) -> list[str | Path]:
    place.tear("run", "responses.parquet")
    return [command[0], place.run, *command[1:]]


@case("responses.parquet has changed since the run finished", "restore the run", "audit again")
def _torn_answers_compared(place: Place) -> Sequence[str | Path]:
    return _torn_answers(place, "compare", str(place.run))


@case("responses.parquet has changed since the run finished", "restore the run", "audit again")
def _torn_answers_judged(place: Place) -> Sequence[str | Path]:
    return _torn_answers(place, "judge", "--judge", "world-rule")


@case("responses.parquet has changed since the run finished", "restore the run", "audit again")
def _torn_answers_labelled(place: Place) -> Sequence[str | Path]:
    return _torn_answers(place, "label")


@case("responses.parquet has changed since the run finished", "restore the run", "audit again")
def _torn_answers_repeated(place: Place) -> Sequence[str | Path]:
    return _torn_answers(place, "verify")


@case("verdicts.parquet has changed since the run finished", "restore the run", "audit again")
def _torn_verdicts(place: Place) -> Sequence[str | Path]:
    place.tear("run", "verdicts.parquet")
    return ["compare", place.run, place.run]


@case("run is not finished; rerun its audit with the same settings to resume")
def _unfinished_run_judged(place: Place) -> Sequence[str | Path]:
    head = json.loads((place.run / "run.json").read_text())
    del head["results"]
    place.file("run/run.json", json.dumps(head))
    return ["judge", place.run, "--judge", "world-rule"]


@case("asked other samples than these; give those it asked")
def _changed_suite_judged(place: Place) -> Sequence[str | Path]:
    place.suite.write_text(place.suite.read_text().replace("colour", "shape"))
    return ["judge", place.run, "--judge", "world-rule"]


@case("have changed since; restore them")
def _changed_suite_repeated(place: Place) -> Sequence[str | Path]:
    place.suite.write_text(place.suite.read_text().replace("colour", "shape"))
    return ["verify", place.run]


@case("this is not the model of", "model.checkpoint was", "restore it")
def _changed_model_repeated(place: Place) -> Sequence[str | Path]:
    weights = load_file(place.model / "model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, place.model / "model.safetensors", {"format": "pt"})
    return ["verify", place.run]


@case("cannot be written", "choose another folder")
def _differences_into_a_file(place: Place) -> Sequence[str | Path]:
    return ["compare", place.run, place.run, "--out", place.file("file", "mine") / "differences.json"]


@case("cannot be written", "choose another folder")
def _chart_into_a_file(place: Place) -> Sequence[str | Path]:
    return ["compare", place.run, place.run, "--chart", place.file("file", "mine") / "chart.svg"]


# Judges


@case("judge broken failed (RuntimeError); the answers are saved: fix the judge and rerun", goes_on=True)
def _judge_that_raises(place: Place) -> Sequence[str | Path]:
    def fault(_: list[Verdict], responses: Sequence[Response]) -> object:
        raise RuntimeError(f"cannot judge {responses[0].text!r}")

    return judged_by(Broken(fault), place)


@case("judge broken returned a str; return Verdict objects", goes_on=True)
def _judge_that_returns_words(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda _, responses: [response.text for response in responses]), place)


@case("judge broken failed (TypeError)", "fix the judge and rerun", goes_on=True)
def _judge_that_returns_nothing(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda _, __: None), place)


@case(
    "judge broken returned a verdict on a response that it was not given; copy sample_id and exit_layer", goes_on=True
)
def _judge_with_wrong_ids(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, sample_id=SAID) for each in verdicts]), place)


@case("judge broken returned 0 refusal verdicts for sample", "return exactly one", goes_on=True)
def _judge_that_leaves_answers_out(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: verdicts[:-1]), place)


@case("judge broken returned a verdict under another name; use its own", goes_on=True)
def _judge_that_signs_otherwise(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, judge=SAID) for each in verdicts]), place)


@case("judge broken returned a score of type str; return a number", goes_on=True)
def _judge_with_a_word_for_a_score(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, score=cast(Any, SAID)) for each in verdicts]), place)


@case("judge broken returned 7 for", "return a number from 0 to 1", goes_on=True)
def _judge_off_its_scale(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, score=7.0) for each in verdicts]), place)


@case("judge broken returned a label with a lone surrogate; return valid Unicode", goes_on=True)
def _judge_with_half_a_character(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, label="\ud83d") for each in verdicts]), place)


@case("judge broken returned a reason of type int; return a string", goes_on=True)
def _judge_with_a_number_for_a_reason(place: Place) -> Sequence[str | Path]:
    reason = cast(Any, 3)
    return judged_by(
        Broken(lambda verdicts, _: [replace(each, score=None, unscored=reason) for each in verdicts]), place
    )


@case("judge broken returned a label of type NoneType; return a string", goes_on=True)
def _judge_without_a_label(place: Place) -> Sequence[str | Path]:
    return judged_by(Broken(lambda verdicts, _: [replace(each, label=cast(Any, None)) for each in verdicts]), place)
