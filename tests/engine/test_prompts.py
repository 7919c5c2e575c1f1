"""What a model reads of a sample: the picture as a viewer shows it, and a prompt that leaves room for the answer."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

import exitsafe
from exitsafe.doctor import load_blueprint
from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.lppo.config import LPPOConfig
from exitsafe.records import Response, Sample
from exitsafe.store.fingerprint import sample_info
from tests.tiny_models import CHAT_TEMPLATE, noise_image, save_tiny, tiny_model, tiny_processor

DATED = "{{ strftime_now('%d %b %Y') }} " + CHAT_TEMPLATE.replace("IMAGE", "<image>")


def tiny(*, context: int | None = None, template: str | None = None, family: str = "llava") -> VLM:
    vlm = VLM(tiny_model(family), tiny_processor(family), name="tiny", checkpoint_hash="abc")
    if context is not None:
        vlm.text_config.max_position_embeddings = context
    if template is not None:
        vlm.processor.chat_template = template
    return vlm


def pictured(num_images: int, *, id: str = "s", size: tuple[int, int] = (28, 28)) -> Sample:  # noqa: A002
    images = tuple(noise_image(number, size) for number in range(num_images))
    return Sample(id=id, prompt="what is", images=images, kind="harmful", source="made up")


def photo(orientation: int) -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    noise_image(1, (48, 28)).save(file, "PNG", exif=exif.tobytes())
    return file.getvalue()


_AS_TEXT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ 'RULES: ' + m['content'] }} "
    "{% else %}{{ m['content'][-1]['text'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE.replace("IMAGE", "<image>"), _AS_TEXT])
def test_a_system_prompt_comes_first(template: str) -> None:
    vlm = tiny(template=template)
    sample = Sample(id="s", prompt="what is", system="the round square", kind="benign")
    ids = vlm.encode_prompt(sample).input_ids.tolist()
    said = vlm.tokenizer.decode(ids)
    assert 0 < said.index("the round square") < said.index("what is")


@pytest.mark.parametrize("template", [None, "{{ messages[-1]['content'][-1]['text'] }}"])
def test_a_system_prompt_is_not_left_out(template: str | None) -> None:
    vlm = tiny()
    vlm.processor.chat_template = template
    with pytest.raises(InputError, match=r"sample s: .*system prompt"):
        vlm.encode_prompt(Sample(id="s", prompt="what is", system="the round square", kind="benign"))


def test_media_that_a_model_cannot_read_are_refused() -> None:
    frames, clip = (noise_image(0), noise_image(1)), (np.zeros(16_000, dtype=np.float32), 16_000)
    for medium in ({"videos": (frames,)}, {"audios": (clip,)}):
        with pytest.raises(
            InputError, match=r"sample s: this model's prompts take no (video|audio); leave the sample out"
        ):
            tiny().encode_prompt(Sample(id="s", prompt="what is", kind="benign", **medium))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_the_model_sees_a_photo_upright(orientation: int) -> None:
    vlm = tiny(family="llava_next")
    with Image.open(io.BytesIO(photo(orientation))) as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    samples = [
        Sample(id="s", prompt="what is", images=(image,), kind="benign") for image in (upright, photo(orientation))
    ]
    expected, found = (vlm.encode_prompt(sample).media for sample in samples)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_digest_of_an_image_is_of_what_is_seen() -> None:
    upright, turned = (Image.open(io.BytesIO(photo(orientation))) for orientation in (1, 6))
    digests = {
        sample_info(Sample(id="s", prompt="a", images=(image,), kind="benign")).digest for image in (upright, turned)
    }
    assert upright.tobytes() == turned.tobytes() and len(digests) == 2


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_an_audit_refuses_a_prompt_whose_pictures_leave_no_room(family: str, tmp_path: Path) -> None:
    fits = len(tiny(family=family).encode_prompt(pictured(1)).input_ids)
    vlm = tiny(context=fits + 8, family=family)
    samples = [pictured(1, id="one"), pictured(2, id="two")]
    with pytest.raises(
        InputError, match=r"sample two: the prompt has \d+ tokens, .* shorten it or leave the sample out"
    ):
        exitsafe.audit(vlm, samples, judges=["refusal-prefix"], max_new_tokens=8, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = exitsafe.audit(vlm, samples[:1], judges=["refusal-prefix"], max_new_tokens=8, out=tmp_path / "run")
    assert run.settings["decoding"]["max_new_tokens"] == 8


def test_a_long_template_counts(tmp_path: Path) -> None:
    vlm = tiny(context=40, template="what " * 30 + CHAT_TEMPLATE.replace("IMAGE", "<image>"))
    sample = Sample(id="s", prompt="what is", kind="harmful")
    with pytest.raises(InputError, match=r"sample s: the prompt has \d+ tokens"):
        exitsafe.audit(vlm, [sample], judges=["refusal-prefix"], max_new_tokens=8, out=tmp_path)


def test_training_refuses_a_prompt_that_leaves_no_room(tmp_path: Path) -> None:
    vlm, samples = tiny(context=20), [pictured(1, id="one"), pictured(4, id="four")]

    def reward(samples: Sequence[Sample], responses: Sequence[Response]) -> list[float]:
        raise AssertionError("nothing is to be answered")

    config = LPPOConfig(max_new_tokens=8, batch_size=2, minibatch_size=2)
    with pytest.raises(InputError, match="sample four: the prompt has"):
        exitsafe.align(vlm, samples, reward=reward, config=config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_prompt_becomes_is_checked_again_when_it_is_answered() -> None:
    vlm = tiny(context=20)
    rows = [exitsafe.engine.generation.Row(prompt=vlm.encode_prompt(pictured(0)), exit_layer=1, features=None)]
    with pytest.raises(InputError, match="sample s: the prompt has"):
        vlm.complete(rows, max_new_tokens=18, temperature=0.0, seed=0, batch_size=1)
    with pytest.raises(InputError, match="sample s: the prompt has"):
        vlm.response_states(rows, [torch.ones(18, dtype=torch.long)])


def test_an_answer_that_nobody_limited_takes_what_the_context_leaves(tmp_path: Path) -> None:
    vlm = tiny(context=60)
    longest = len(vlm.encode_prompt(pictured(2)).input_ids)
    with pytest.warns(
        UserWarning, match=rf"answers are limited to {60 - longest} tokens instead of 256: .* sample two"
    ):
        run = exitsafe.audit(
            vlm, [pictured(1, id="one"), pictured(2, id="two")], judges=["refusal-prefix"], out=tmp_path / "a"
        )
    assert run.settings["decoding"]["max_new_tokens"] == 60 - longest
    with pytest.raises(InputError, match="sample two: the prompt has"):
        exitsafe.audit(
            tiny(context=longest + 10), [pictured(2, id="two")], judges=["refusal-prefix"], out=tmp_path / "b"
        )
    with pytest.raises(InputError, match="max_new_tokens=256, but this model has room for 60 tokens"):
        exitsafe.audit(vlm, [pictured(1)], judges=["refusal-prefix"], max_new_tokens=256, out=tmp_path / "c")


def test_a_run_goes_on_with_the_date_it_began_with(tmp_path: Path) -> None:
    samples = [pictured(0, id=f"s{number}") for number in range(4)]

    def audit(vlm: VLM, out: Path, samples: list[Sample] = samples) -> exitsafe.AuditRun:
        return exitsafe.audit(vlm, samples, judges=["refusal-prefix"], exit_layers=[1], max_new_tokens=4, out=out)

    vlm = tiny(template=DATED)
    vlm.today = "2026-01-31"
    run = audit(vlm, tmp_path / "run")
    assert run.settings["prompts"]["today"] == "2026-01-31"
    tomorrow = tiny(template=DATED)
    tomorrow.today = "2026-02-01"
    assert audit(tomorrow, tmp_path / "run").settings["prompts"] == run.settings["prompts"]
    assert tomorrow.today == "2026-01-31"
    tomorrow.today = "2026-02-01"
    other = audit(tomorrow, tmp_path / "other").settings["prompts"]
    assert other["today"] == "2026-02-01" and other["hash"] != run.settings["prompts"]["hash"]
    assert "today" not in audit(tiny(), tmp_path / "plain").settings["prompts"]


def test_a_change_of_what_is_read_is_named_at_resume(tmp_path: Path) -> None:
    def audit(vlm: VLM) -> exitsafe.AuditRun:
        return exitsafe.audit(vlm, [pictured(0)], judges=["refusal-prefix"], max_new_tokens=4, out=tmp_path / "run")

    audit(tiny())
    changed = tiny()
    changed.processor.tokenizer.add_special_tokens({"bos_token": "zorb"})
    with pytest.raises(exitsafe.errors.RunError, match=r"prompts\.hash was"):
        audit(changed)


def test_ignored_generation_settings_are_said_once_at_load(tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*generation settings")
        load_vlm(folder)
    (folder / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.2, "min_length": 3}))
    with pytest.warns(UserWarning, match="greedy answers: repetition_penalty=1.2, min_length=3") as caught:
        load_vlm(folder)
    assert sum("generation settings" in str(each.message) for each in caught) == 1


def test_a_template_that_doubles_memory_stops_the_load(tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    )
    with pytest.raises(exitsafe.errors.ModelError, match=r"^the chat template .*replace its chat_template\.jinja"):
        load_vlm(folder)
    with pytest.raises(exitsafe.errors.ModelError, match=r"^the chat template "):
        load_blueprint(folder)
