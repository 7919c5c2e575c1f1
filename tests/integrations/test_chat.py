"""Turns through chat templates: nothing is left out, and one user turn is what `VLM.generate` asks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError
from exitsafe.integrations.chat import Turn, digest_of, encode_chat, render_chat
from exitsafe.records import Sample
from tests.integrations.worldly import organism, png, samples
from tests.tiny_models import noise_image, tiny_model, tiny_processor

ONLY_STRINGS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
ONLY_USERS = (
    "{% for m in messages if m['role'] == 'user' %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + ONLY_USERS


def user(*parts: Any) -> Turn:
    return Turn(role="user", parts=parts)


def with_template(template: str | None) -> Any:
    """The organism with another chat template."""
    processor: Any = tiny_processor("llava")
    processor.chat_template = template
    return SimpleNamespace(processor=processor, placeholders=organism().placeholders, today="2026-01-31")


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
def test_one_user_turn_is_the_prompt_that_generate_makes(family: str) -> None:
    vlm = VLM(tiny_model(family), tiny_processor(family), name=family)
    images = (noise_image(1, (28, 40)), noise_image(2))
    sample = Sample(id="s", prompt="what is the left shape", images=images, kind="benign")
    expected = vlm.encode_prompt(sample)
    found = encode_chat(vlm, [user(*images, "what is the left shape")], prompt_id="s")
    assert torch.equal(found.input_ids, expected.input_ids)
    for one, other in ((found.media, expected.media), (found.text_inputs, expected.text_inputs)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_pictures_may_be_files_bytes_or_images(tmp_path: Path) -> None:
    sample = samples()[0]
    (tmp_path / "a.png").write_bytes(png(sample))
    pictures = (tmp_path / "a.png", png(sample), *sample.images)
    found = [encode_chat(organism(), [user(picture, sample.prompt)], prompt_id="s") for picture in pictures]
    expected = organism().encode_prompt(sample)
    assert all(torch.equal(each.media["pixel_values"], expected.media["pixel_values"]) for each in found)
    assert all(torch.equal(each.input_ids, expected.input_ids) for each in found)


def test_all_roles_are_written_in_order() -> None:
    turns = [
        Turn(role="system", parts=("not allowed :",)),
        user("what color is", noise_image(1), "the circle ?"),
        Turn(role="assistant", parts=("red .",)),
        user("are you sure ?"),
    ]
    assert render_chat(organism(), turns, prompt_id="s") == (
        "<bos>system : not allowed : user : what color is <image> the circle ? assistant : red .<eos> "
        "user : are you sure ? assistant :"
    )


def test_a_template_that_takes_strings_gets_strings() -> None:
    turns = [Turn(role="system", parts=("be brief",)), user("what ", "now")]
    assert render_chat(with_template(ONLY_STRINGS), turns, prompt_id="s") == "[system]be brief[user]what now"

    code = "what is {'type': 'text'}"
    assert render_chat(with_template(ONLY_STRINGS), [user(code)], prompt_id="s") == f"[user]{code}"


@pytest.mark.parametrize(
    ("template", "turns", "complaint"),
    [
        (ONLY_USERS, [Turn(role="system", parts=("be brief",)), user("what")], "system, user (it leaves out a turn"),
        (STRICT, [Turn(role="system", parts=("be brief",)), user("what")], "no system turn"),
        (ONLY_STRINGS, [user(noise_image(1), "what")], "user with an image (it leaves out"),
        (None, [user("what"), Turn(role="assistant", parts=("now",)), user("how")], "give a single user turn"),
        (ONLY_STRINGS, [user("what"), Turn(role="assistant", parts=("now",))], "the last turn must be the user's"),
        (ONLY_STRINGS, [], "the last turn must be the user's"),
        (ONLY_STRINGS, [user("what <image>")], "image placeholder '<image>'"),
    ],
)
def test_what_a_template_cannot_say_is_refused(template: str | None, turns: list[Turn], complaint: str) -> None:
    with pytest.raises(InputError, match=r"^s: ") as caught:
        render_chat(with_template(template), turns, prompt_id="s")
    assert complaint in str(caught.value)
    assert "brief" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_template_one_user_turn_is_written_plainly() -> None:
    vlm = with_template(None)
    assert render_chat(vlm, [user(noise_image(1), "what")], prompt_id="s") == "<image>\nwhat"


def test_a_model_without_processor_says_so() -> None:
    vlm: Any = SimpleNamespace(processor=None)
    with pytest.raises(ModelError, match="no processor"):
        encode_chat(vlm, [user("what")], prompt_id="s")


def test_digests_tell_conversations_apart(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a picture")
    different = [
        [user("ab")],
        [user("a", "b")],
        [user(b"ab")],
        [Turn(role="system", parts=("ab",))],
        [user("a"), user("b")],
        [user(noise_image(1))],
        [user(noise_image(2))],
        [user(b"a picture")],
    ]
    digests = [digest_of(turns) for turns in different]
    assert len(set(digests)) == len(different)
    assert digest_of([user(tmp_path / "a.png")]) == digests[-1]
