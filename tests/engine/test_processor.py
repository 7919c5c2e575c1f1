"""Checkpoints as people have them: each works as the sound one does, or is refused in one line, by doctor too."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from exitsafe.cli.main import FAILED, run
from exitsafe.doctor import load_blueprint
from exitsafe.engine.generation import suppress_logits
from exitsafe.engine.load import load_vlm
from exitsafe.engine.processor import check_processor
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ModelError
from exitsafe.records import Sample
from tests.any_model import StandIn
from tests.architectures import tiny
from tests.tiny_models import VOCAB, noise_image, save_tiny, tiny_model, tiny_processor

SAMPLES = [
    Sample(id="a", prompt="what colour is the left", images=(noise_image(1, (60, 41)),), kind="benign"),
    Sample(id="b", prompt="how", kind="benign"),
]
FAMILIES = ("llava", "llava-siglip", "llava_next", "mllama")
Damage = Callable[[Path], object]


def answers(vlm: VLM) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [response.text for response in vlm.generate(SAMPLES, 3, max_new_tokens=6)]


@cache
def sound(family: str) -> VLM:
    return VLM(tiny_model(family), tiny_processor(family), name="sound")


def edit(path: Path, *without: str, **changes: Any) -> None:
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if name not in without}))


def processor(folder: Path, *without: str, **changes: Any) -> None:
    edit(folder / "processor_config.json", *without, **changes)


def image_processor(folder: Path, **changes: Any) -> None:
    stored = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    processor(folder, image_processor=stored | changes)


def as_older_versions_saved_it(folder: Path) -> None:
    """Only preprocessor_config.json, and the chat template in a file of its own."""
    stored = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(stored["image_processor"]))
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()


def without_token(folder: Path, *names: str) -> None:
    for file in ("tokenizer_config.json", "config.json", "generation_config.json"):
        edit(folder / file, *names, *(f"{name}_id" for name in names))
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config=config["text_config"] | {f"{name}_id": None for name in names})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: processor(folder, "patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"),
        lambda folder: processor(
            folder, patch_size=7, vision_feature_select_strategy="none", num_additional_image_tokens=3
        ),
        lambda folder: processor(folder, processor_class="CLIPProcessor"),
        as_older_versions_saved_it,
        lambda folder: without_token(folder, "pad_token"),
    ],
    ids=["left out", "others", "another class", "older", "no pad token"],
)
def test_it_works_as_the_sound_one_does(family: str, damage: Damage, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model")
    wanted = answers(sound(family))
    damage(folder)
    assert answers(load_vlm(folder)) == wanted
    assert load_blueprint(folder).remarks == []


def test_tiles_are_those_of_the_models_config(tmp_path: Path) -> None:
    folder = save_tiny("llava_next", tmp_path)
    wanted = answers(load_vlm(folder))
    image_processor(folder, image_grid_pinpoints=[[28, 84], [84, 28]])
    assert answers(load_vlm(folder)) == wanted


def _no_image_token(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
    tokenizer["model"]["vocab"]["picture"] = tokenizer["model"]["vocab"].pop("<image>")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit(folder / "tokenizer_config.json", "image_token", "extra_special_tokens")
    processor(folder, "image_token")


def _template(text: str) -> Damage:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _larger_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["a"] = len(VOCAB) + 5
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("family", "damage", "words"),
    [
        (
            "llava",
            lambda f: image_processor(f, crop_size={"height": 42, "width": 42}),
            "makes pictures of 42x42 pixels",
        ),
        ("llava", lambda f: image_processor(f, do_center_crop=False), r"pictures of 37x28 pixels, .* reads 28x28: set"),
        ("llava-siglip", lambda f: image_processor(f, size={"height": 14, "width": 14}), "pictures of 14x14 pixels"),
        ("mllama", lambda f: image_processor(f, size={"height": 14, "width": 14}), "pictures of 14x14 pixels"),
        (
            "llava",
            lambda f: edit(f / "config.json", image_token_index=9),
            r"'<image>' with id 4, but the model's has id 9",
        ),
        (
            "llava",
            _no_image_token,
            r"/model: the model's processor cannot read it \(Mismatch in `image` token count",
        ),
        (
            "llava",
            _template("{{ messages[0]['content'][1]['text'] }}"),
            r"^\S+/model: the chat template writes 0 image placeholders for 1 images; use another template$",
        ),
        (
            "llava",
            _template("{{ messages[0]['content'] + 'x' }}"),
            r"^\S+/model: the chat template cannot render this ",
        ),
        (
            "mllama",
            _template("{{ messages[0]['content'][1]['text'] }}"),
            "^[^ ]+/model: the chat template writes 0 im",
        ),
        ("llava", _template("USER: <image>"), r"^\S+/model: the chat template leaves out the prompt; use another"),
        ("llava", _template("{{ '\\ud83d' }} hello"), "^the chat template writes a lone surrogate, .*replace its"),
        (
            "llava",
            _template("{{ '\\ud83d' if messages[0]['content'][1]['text'] == 'a picture' }} hello"),
            r"^\S+/model: the chat template writes a lone surrogate",
        ),
        ("llava", _no_tokenizer, "cannot load the processor of .* copy the processor and tokenizer files"),
        ("llava", lambda f: (f / "processor_config.json").write_text("{"), "cannot load the processor of"),
        ("llava", lambda f: processor(f, image_processor=7), "cannot load the processor of"),
        ("llava", _larger_tokenizer, r"makes token 35, but the model has 30 embeddings"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_or_it_is_refused_in_one_line_by_doctor_too(
    family: str, damage: Damage, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(family, tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=words) as error:
        load_vlm(folder)
    assert "\n" not in str(error.value)
    capsys.readouterr()
    assert run(["doctor", str(folder)]) == FAILED
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert told == [f"exitsafe: {' '.join(str(error.value).split())}"]


def test_without_an_end_token_answers_have_the_full_length_and_that_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny("llava", tmp_path)
    without_token(folder, "pad_token", "eos_token")
    with pytest.warns(UserWarning, match="has no end-of-sequence token: every answer runs to max_new_tokens"):
        vlm = load_vlm(folder)
    assert vlm.eos_token_ids == ()
    assert vlm.pad_token_id != vlm.base_model.config.image_token_id
    for response in vlm.generate(SAMPLES, 3, max_new_tokens=5, batch_size=2):
        assert (response.num_tokens, response.finish_reason) == (5, "length")
    assert run(["doctor", str(folder)]) == 0
    assert "has no end-of-sequence token" in capsys.readouterr().out


def test_the_tokenizer_may_know_the_end_token_alone(tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path)
    without_token(folder, "eos_token")
    edit(folder / "tokenizer_config.json", eos_token="</s>")
    assert load_vlm(folder).eos_token_ids == (VOCAB["</s>"],)


def test_a_pad_token_is_never_one_that_the_model_counts_or_lacks(tmp_path: Path) -> None:
    wanted = None
    for pad in ("<pad>", "<image>", "beyond"):
        folder = save_tiny("llava", tmp_path / pad.strip("<>"))
        edit(folder / "tokenizer_config.json", pad_token=pad)
        vlm = load_vlm(folder)
        assert vlm.pad_token_id in {VOCAB["<pad>"], VOCAB["</s>"], *vlm.eos_token_ids}
        found = [response.text for response in vlm.generate(SAMPLES, 3, max_new_tokens=6, batch_size=2)]
        assert found == (wanted or found)
        wanted = found


def test_special_tokens_that_the_head_has_no_logit_for_are_left_alone() -> None:
    """Llama 3.2 Vision's image token lies behind its head's last logit."""
    logits = torch.randn(2, 4)
    assert torch.equal(suppress_logits(logits, (4, 9)), logits)
    assert suppress_logits(logits, (1, 4)).isinf().sum(dim=0).tolist() == [0, 2, 0, 0]


def test_placeholders_are_counted_of_the_encoder_in_question() -> None:
    made = tiny("qwen2_5_omni_thinker", modality="audio")  # which has pictures too
    vlm = StandIn(made, name="tiny", modality="audio")
    vlm.processor.image_token_id = made.model.config.image_token_id
    (remark,) = check_processor(vlm)
    assert "no end-of-sequence token" in remark
