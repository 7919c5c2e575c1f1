"""Turns through chat templates: nothing is left out, and one user turn is what `VLM.generate` asks."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError
from exitsafe.records import Sample
from exitsafe.serve.chat import Turn, encode_chat, render_chat
from tests.serve.worldly import organism
from tests.tiny_models import noise_image, tiny_model, tiny_processor

ONLY_STRINGS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
ONLY_USERS = (
    "{% for m in messages if m['role'] == 'user' %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + ONLY_USERS


def picture(seed: int, size: tuple[int, int] = (28, 28)) -> bytes:
    noise_image(seed, size).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def user(*parts: str | bytes) -> Turn:
    return Turn(role="user", parts=parts)


def with_template(template: str | None) -> Any:
    """The organism with another chat template."""
    processor: Any = tiny_processor("llava")
    processor.chat_template = template
    return SimpleNamespace(processor=processor, placeholders=organism().placeholders, today="2026-01-31")


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
def test_one_user_turn_is_the_prompt_that_generate_makes(family: str) -> None:
    vlm = VLM(tiny_model(family), tiny_processor(family), name=family)
    images = (picture(1, (28, 40)), picture(2))
    sample = Sample(id="s", prompt="what is the left shape", images=images, kind="benign")
    expected = vlm.encode_prompt(sample)
    found = encode_chat(vlm, [user(*images, "what is the left shape")], prompt_id="s")
    assert torch.equal(found.input_ids, expected.input_ids)
    for one, other in ((found.media, expected.media), (found.text_inputs, expected.text_inputs)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_all_roles_are_written_in_order() -> None:
    turns = [
        Turn(role="system", parts=("not allowed :",)),
        user("what color is", picture(1), "the circle ?"),
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
        (ONLY_STRINGS, [user(picture(1), "what")], "user with an image (it leaves out"),
        (None, [user("what"), Turn(role="assistant", parts=("now",)), user("how")], "give a single user turn"),
        (ONLY_STRINGS, [user("what"), Turn(role="assistant", parts=("now",))], "the last turn must be the user's"),
        (ONLY_STRINGS, [], "the last turn must be the user's"),
        (ONLY_STRINGS, [user("what <image>")], "the placeholder '<image>'"),
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
    assert render_chat(vlm, [user(picture(1), "what")], prompt_id="s") == "<image>\nwhat"


def test_a_model_without_processor_says_so() -> None:
    vlm: Any = SimpleNamespace(processor=None)
    with pytest.raises(ModelError, match="no processor"):
        encode_chat(vlm, [user("what")], prompt_id="s")
