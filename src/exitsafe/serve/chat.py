"""Chat turns -> a prompt, through the model's own chat template.

A conversation has system and assistant turns and pictures between words, whereas a `Sample` is one user turn; for such
a turn the prompt is the one that `VLM.generate` makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from exitsafe.data.images import open_image
from exitsafe.engine.prompts import Prompt, given_processor, plainly, reserved_tokens, tokenise
from exitsafe.engine.templates import TemplateRefusedError, render
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError

_AS_CODE = "{'type': '"  # how a template that expects a string writes a list of parts


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A role and its text and pictures (the bytes of image files), in order."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | bytes, ...]

    @property
    def texts(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str) and part]

    @property
    def pictures(self) -> list[bytes]:
        return [part for part in self.parts if isinstance(part, bytes)]


def encode_chat(vlm: VLM, turns: Sequence[Turn], *, prompt_id: str) -> Prompt:
    """Tokenise a conversation for the model to continue.

    Args:
        vlm: The model.
        turns: The conversation; the last turn is the user's.
        prompt_id: Identifies the prompt in errors and in the key of its draws.

    Raises:
        InputError: If the chat template cannot take a turn, a picture cannot be read or a text contains the model's
            image placeholder.
        ModelError: If there is no processor.
    """
    text = render_chat(vlm, turns, prompt_id=prompt_id)
    images = [open_image(picture, prompt_id) for turn in turns for picture in turn.pictures]
    return tokenise(text, {"images": images} if images else {}, vlm.processor, sample_id=prompt_id)


def render_chat(vlm: VLM, turns: Sequence[Turn], *, prompt_id: str) -> str:
    """The conversation as rendered by the chat template, up to the start of the model's answer.

    Raises:
        InputError: If the template leaves out or refuses a turn.
    """
    processor = given_processor(vlm.processor)
    if not turns or turns[-1].role != "user":
        raise InputError(f"{prompt_id}: the last turn must be the user's, for the model to answer")
    for token in reserved_tokens(processor, vlm.placeholders):
        if any(token in text for turn in turns for text in turn.texts):
            raise InputError(f"{prompt_id}: a text contains the placeholder {token!r}; remove it")
    if processor.chat_template is None:
        return _render_plainly(vlm, turns, prompt_id)
    complaint = "it leaves out a turn, or a part of one"
    for has_plain_texts in (False, True):  # some templates take text as a list of parts, some as a string
        messages = [_message(turn, has_plain_texts=has_plain_texts) for turn in turns]
        try:
            text = render(processor, messages, today=vlm.today)
        except TemplateRefusedError as refusal:
            complaint = str(refusal)
            continue
        if _is_complete(text, turns, vlm.placeholders.get("image")):
            return text
    roles = ", ".join(turn.role + " with an image" * bool(turn.pictures) for turn in turns)
    raise InputError(
        f"{prompt_id}: this model's chat template cannot take the turns {roles} ({complaint}); change them"
    )


def _message(turn: Turn, *, has_plain_texts: bool) -> dict[str, object]:
    if has_plain_texts and not turn.pictures:
        return {"role": turn.role, "content": "".join(turn.texts)}
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in turn.parts
        if part != ""
    ]
    return {"role": turn.role, "content": content}


def _is_complete(text: str, turns: Sequence[Turn], image_token: str | None) -> bool:
    """Whether the text has every part of the turns, in order, and no list of parts was written out as code."""
    as_code = sum(part.count(_AS_CODE) for turn in turns for part in turn.texts)
    num_written = 0 if image_token is None else text.count(image_token)
    if text.count(_AS_CODE) > as_code or num_written != sum(len(turn.pictures) for turn in turns):
        return False
    place = 0
    for turn in turns:
        found = [text.find(part.strip(), place) for part in turn.texts]
        if -1 in found:
            return False
        place = max([place, *found])
    return True


def _render_plainly(vlm: VLM, turns: Sequence[Turn], prompt_id: str) -> str:
    if len(turns) > 1:
        raise InputError(f"{prompt_id}: this model has no chat template; give a single user turn")
    return plainly("".join(turns[0].texts), {"image": len(turns[0].pictures)}, vlm.placeholders)
