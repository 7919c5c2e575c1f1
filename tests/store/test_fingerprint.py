from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.exits.encoder import Encoder
from exitsafe.records import Sample
from exitsafe.store.fingerprint import (
    canonical_json,
    data_fingerprint,
    decoder_versions,
    differences,
    media_digests,
    model_fingerprint,
    pin_today,
    request_digest,
    sample_info,
    trained_on_among,
)
from tests.architectures import tiny_model
from tests.fake_vlm import FakeVLM
from tests.tiny_models import tiny_llava, tiny_processor

SAMPLE = Sample(id="a", prompt="how", kind="benign", images=(Image.new("RGB", (4, 4), "red"),), source="mine")


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": (1, 2), "a": "ü"}) == canonical_json({"a": "ü", "b": [1, 2]})
    assert canonical_json({"a": "ü"}) == '{"a":"\\u00fc"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_differences_are_readable_and_see_what_came_and_went() -> None:
    old = {"model": {"checkpoint": "aa", "adapter": None}, "exit_layers": [1, 2], "gone": 1}
    new = {"model": {"checkpoint": "bb", "adapter": None}, "exit_layers": (1, 2), "come": "x"}
    assert differences(old, new) == [
        'model.checkpoint was "aa", is now "bb"',
        "gone was 1, is now absent",
        'come was absent, is now "x"',
    ]
    assert differences(old, old) == []


@pytest.mark.parametrize(
    "changed",
    [
        replace(SAMPLE, prompt="what"),
        replace(SAMPLE, kind="borderline"),
        replace(SAMPLE, answers=("x",)),
        replace(SAMPLE, images=()),
        replace(SAMPLE, images=(Image.new("RGB", (4, 4), "blue"),)),
        replace(SAMPLE, images=(Image.new("RGB", (2, 8), "red"),)),
        replace(SAMPLE, images=SAMPLE.images * 2),
        replace(SAMPLE, system="be brief"),
        replace(SAMPLE, videos=(b"video",)),
        replace(SAMPLE, audios=(b"audio",)),
    ],
)
def test_the_digest_covers_what_is_asked(changed: Sample) -> None:
    assert sample_info(changed).digest != sample_info(SAMPLE).digest


def test_digests_of_pictures_are_those_of_older_runs() -> None:
    asked = ["how", "benign", [], [hashlib.sha256(b"bytes").hexdigest()]]
    expected = hashlib.sha256(json.dumps(asked, separators=(",", ":")).encode()).hexdigest()
    assert sample_info(replace(SAMPLE, images=(b"bytes",))).digest == expected


def test_digests_tell_apart_what_the_same_content_is() -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    tone = np.zeros(4, np.float32)
    plain = replace(SAMPLE, images=())
    asked: list[dict[str, Any]] = [
        {"images": (b"x",)},
        {"videos": (b"x",)},
        {"audios": (b"x",)},
        {"videos": ((red,),)},
        {"videos": ((red, blue),)},
        {"videos": ((red,), (blue,))},
        {"videos": ((blue, red),)},
        {"audios": ((tone, 16_000),)},
        {"audios": ((tone, 8_000),)},
        {"audios": ((tone + 1, 16_000),)},
        {"system": "x"},
    ]
    samples = [plain, *(replace(plain, **given) for given in asked)]
    for digest in (lambda sample: sample_info(sample).digest, request_digest):
        assert len({digest(sample) for sample in samples}) == len(samples)


def test_samples_with_the_video_or_recording_of_a_training_count_as_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"video")
    trained = replace(SAMPLE, videos=(tmp_path / "a.mp4",), audios=(b"audio",))
    digests = {request_digest(trained), *media_digests(trained)}
    assert len(digests) == 4
    plain = replace(SAMPLE, prompt="other", images=())
    others = [
        replace(plain, videos=(b"video",)),
        replace(plain, audios=(b"audio",)),
        replace(plain, videos=(b"audio 2",)),
        replace(trained, id="renamed"),
        plain,
    ]
    assert trained_on_among(others, digests) == {"samples": 3, "of": 5}


def test_versions_of_decoders_are_part_of_a_run_where_they_decode() -> None:
    plain = replace(SAMPLE, videos=((Image.new("RGB", (4, 4)),),))
    heard = replace(SAMPLE, audios=((np.zeros(4, np.float32), 16_000),))
    assert decoder_versions([SAMPLE, plain]) == {}
    assert list(decoder_versions([plain, heard])) == ["scipy"]
    assert list(decoder_versions([SAMPLE, replace(SAMPLE, videos=(b"v",), audios=(b"a",))])) == [
        "av",
        "soundfile",
        "scipy",
    ]


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sample a: video .*gone\.mp4 cannot be read .*; check the path"):
        sample_info(replace(SAMPLE, videos=(tmp_path / "gone.mp4",)))
    with pytest.raises(InputError, match=r"sample a: audio .*gone\.wav cannot be read .*; check the path"):
        sample_info(replace(SAMPLE, audios=(tmp_path / "gone.wav",)))


def test_the_digest_leaves_names_aside_but_the_data_hash_does_not() -> None:
    for renamed in (replace(SAMPLE, category="c"), replace(SAMPLE, source="s"), replace(SAMPLE, id="b")):
        assert sample_info(renamed).digest == sample_info(SAMPLE).digest
        assert data_fingerprint([sample_info(renamed)])["hash"] != data_fingerprint([sample_info(SAMPLE)])["hash"]


def test_image_bytes_are_hashed_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"bytes")
    on_disk, in_memory = replace(SAMPLE, images=(tmp_path / "one.png",)), replace(SAMPLE, images=(b"bytes",))
    assert sample_info(on_disk) == sample_info(in_memory)
    with pytest.raises(InputError, match=r"sample a: image .*gone\.png cannot be read"):
        sample_info(replace(SAMPLE, images=(tmp_path / "gone.png",)))


def test_pixels_of_a_palette_are_told_apart_by_their_colours() -> None:
    digests = set()
    for colour in ((255, 0, 0), (0, 0, 255)):
        image = Image.new("P", (4, 4))
        image.putpalette(colour)
        digests.add(sample_info(replace(SAMPLE, images=(image,))).digest)
    assert len(digests) == 2


def test_an_opened_image_that_is_torn_is_said(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "torn.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:500])
    with (
        Image.open(tmp_path / "torn.png") as image,
        pytest.raises(InputError, match=r"sample a: image .* cannot be read \(.*truncated"),
    ):
        sample_info(replace(SAMPLE, images=(image,)))


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"settings": 7}', '{"settings": {"prompts": {"today": 7}}}'])
def test_a_date_that_cannot_be_read_is_left_to_the_one_who_opens_the_run(content: str, tmp_path: Path) -> None:
    vlm = FakeVLM()
    (tmp_path / "run.json").write_text(content)
    pin_today(cast(VLM, vlm), tmp_path)
    assert vlm.today == FakeVLM.today


def test_a_model_may_lack_an_encoder_that_its_class_has() -> None:
    model = tiny_model("gemma4")
    assert model.config.audio_config is None
    encoder = Encoder(modality="image", path="model.vision_tower.encoder.layers", num_layers=6, default_exit=6)
    attention = model_fingerprint(VLM(model, None, encoder=encoder, name="tiny"))["attention"]
    assert attention.keys() == {"model", "text_config", "vision_config"}


def test_a_processor_may_read_sound_only(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = VLM(tiny_llava(), tiny_processor("llava"), name="tiny")
    plain = model_fingerprint(vlm)["processor"]
    monkeypatch.delattr(vlm.processor, "image_processor")
    assert model_fingerprint(vlm)["processor"]["image_processor"] is None
    assert plain["image_processor"].startswith("CLIP")


def test_the_data_fingerprint_counts_and_sees_the_order() -> None:
    infos = [sample_info(SAMPLE), sample_info(replace(SAMPLE, id="b", source="other"))]
    found = data_fingerprint(infos)
    assert (found["samples"], found["sources"]) == (2, {"mine": 1, "other": 1})
    assert data_fingerprint(infos[::-1])["hash"] != found["hash"]
