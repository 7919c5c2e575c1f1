"""Samples -> model inputs: the chat template, the images, and left-padded batches.

Every sample goes through the processor by itself, so that nothing about its inputs depends on its neighbours in a
batch. Exit layers play no part here.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from exitsafe.data.images import num_pixels, open_image
from exitsafe.errors import InputError, ModelError
from exitsafe.records import Sample
from exitsafe.vlm.families import Family
from exitsafe.vlm.templates import TemplateRefusedError, render

if TYPE_CHECKING:
    from exitsafe.vlm.model import VLM

DEFAULT_NEW_TOKENS = 256
_FEWEST_TOKENS = 16  # of an answer without a requested limit: fewer cannot hold a refusal
_MEASURED, _MOST_ENCODED = 4, 64  # samples


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One tokenised sample, on the CPU.

    `input_ids` is (P,); `image_inputs` are the processor's tensors for the images, with their batch dimension, empty
    for a sample without images; `cross_attention_mask` is (P, images, tiles) where the family has one.
    """

    sample_id: str
    input_ids: Tensor
    image_inputs: Mapping[str, Tensor]
    cross_attention_mask: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ReadAhead:
    """What a model will read for all samples, known before it answers the first.

    `hash` is of the texts that the chat template writes and of their token ids, `today` the date that is in them, if it
    is; `max_new_tokens` fits behind the longest prompt.
    """

    hash: str
    today: str | None
    max_new_tokens: int

    @property
    def settings(self) -> dict[str, str]:
        """What must be equal for two runs to read the same, as JSON."""
        return {"hash": self.hash} | ({} if self.today is None else {"today": self.today})


def encode(sample: Sample, processor: Any, family: Family, *, today: str) -> Prompt:
    """Tokenise one sample.

    Raises:
        InputError: If an image cannot be read, the prompt contains the model's image placeholder, or the chat template
            does not accept it.
        ModelError: If there is no processor, or its chat template leaves something out.
    """
    text = written(sample, processor, family, today=today)
    images = [open_image(image, sample.id) for image in sample.images]
    return tokenise(text, images, processor, family, sample_id=sample.id)


def written(sample: Sample, processor: Any, family: Family, *, today: str) -> str:
    """The text that the chat template makes of a sample, with one image placeholder per image. Opens no image.

    Raises:
        InputError, ModelError: As `encode`.
    """
    if processor is None:
        raise ModelError("this model folder has no processor: save the processor beside the model")
    if processor.image_token in sample.prompt:
        raise InputError(
            f"sample {sample.id}: the prompt contains the image placeholder {processor.image_token!r}; remove it, "
            "images are given in `images`"
        )
    try:
        sample.prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"sample {sample.id}: the prompt holds half a surrogate pair; save it as proper text"
        ) from error
    text = _render(sample, processor, family, today=today)
    if sample.prompt.strip() not in text:
        raise ModelError(f"sample {sample.id}: the chat template leaves out the prompt; use another template")
    if (num_written := text.count(processor.image_token)) != len(sample.images):
        raise ModelError(
            f"sample {sample.id}: the chat template writes {num_written} image placeholders for "
            f"{len(sample.images)} images; use another template"
        )
    return text


def tokenise(text: str, images: Sequence[Image.Image], processor: Any, family: Family, *, sample_id: str) -> Prompt:
    """Tokenise what a chat template has written, with one image placeholder per image."""
    inputs = processor(
        text=[text],
        images=list(images) or None,
        return_tensors="pt",
        add_special_tokens=not _opens_itself(text, processor.tokenizer),
    )
    mask = inputs.get("cross_attention_mask")
    return Prompt(
        sample_id=sample_id,
        input_ids=inputs["input_ids"][0],
        image_inputs={name: inputs[name] for name in family.image_inputs} if images else {},
        cross_attention_mask=None if mask is None else mask[0],
    )


def read_ahead(vlm: VLM, samples: Sequence[Sample], *, max_new_tokens: int | None) -> ReadAhead:
    """Render and tokenise all texts, and check that they leave room for an answer.

    Image tokens are estimated from the images with the most pixels; only samples that may be too long by that estimate
    are encoded in full. One that is too long nonetheless is found when it is answered.

    Args:
        vlm: The model.
        samples: All samples of a run.
        max_new_tokens: Longest answer wanted; None takes `DEFAULT_NEW_TOKENS`, or what the context leaves.

    Raises:
        InputError: If a text cannot be asked, or a prompt leaves no room for the answer.
        ModelError: If there is no processor, or its chat template leaves something out.
    """
    wanted = DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if max_new_tokens is not None and wanted >= vlm.context_length:
        raise InputError(
            f"max_new_tokens={wanted}, but this model has room for {vlm.context_length} tokens, prompt and answer "
            "together: choose fewer"
        )
    digest, lengths = hashlib.sha256(), []
    for sample in samples:
        text = written(sample, vlm.processor, vlm.family_row, today=vlm.today)
        tokenizer = vlm.processor.tokenizer
        ids = tokenizer(text, add_special_tokens=not _opens_itself(text, tokenizer), verbose=False).input_ids
        digest.update(json.dumps([text, ids]).encode() + b"\n")
        lengths.append(len(ids))
    room = vlm.context_length - wanted
    longest, num_tokens = _longest(vlm, samples, lengths, room=room)
    if num_tokens > room:
        left = vlm.context_length - num_tokens
        if max_new_tokens is not None or left < _FEWEST_TOKENS:
            raise too_long(samples[longest].id, num_tokens, wanted, context_length=vlm.context_length)
        warnings.warn(
            f"answers have at most {left} tokens, not {wanted}: the prompt of sample {samples[longest].id} takes "
            f"{num_tokens} of the {vlm.context_length} that this model has room for",
            stacklevel=3,
        )
        wanted = left
    return ReadAhead(hash=digest.hexdigest(), today=vlm.today if vlm.is_dated else None, max_new_tokens=wanted)


def too_long(sample_id: str, num_tokens: int, max_new_tokens: int, *, context_length: int) -> InputError:
    """The error for a prompt that leaves no room for its answer."""
    return InputError(
        f"sample {sample_id}: the prompt has {num_tokens} tokens, images included, but besides an answer of "
        f"{max_new_tokens} this model has room for {context_length - max_new_tokens}; shorten it or leave the sample "
        "out"
    )


def collate(prompts: Sequence[Prompt], responses: Sequence[Tensor] | None, *, pad_token_id: int) -> dict[str, Tensor]:
    """Left-pad prompts and right-pad responses behind them.

    Returns:
        `input_ids`, `attention_mask`, `position_ids`, all (B, P + T), and `cross_attention_mask`
        (B, P + T, images, tiles) where the prompts have one.
    """
    longest = max(len(prompt.input_ids) for prompt in prompts)
    tail = 0 if responses is None else max(len(response) for response in responses)
    input_ids = torch.full((len(prompts), longest + tail), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    cross_attention_mask = None
    if prompts[0].cross_attention_mask is not None:
        shape = prompts[0].cross_attention_mask.shape[1:]
        cross_attention_mask = torch.zeros(len(prompts), longest + tail, *shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        input_ids[row, start:longest] = prompt.input_ids
        end = longest
        if responses is not None:
            end += len(responses[row])
            input_ids[row, longest:end] = torch.as_tensor(responses[row])
        attention_mask[row, start:end] = 1
        if cross_attention_mask is not None:
            assert prompt.cross_attention_mask is not None
            cross_attention_mask[row, start:longest] = prompt.cross_attention_mask
            # A generated token sees the images that the prompt's last token sees.
            cross_attention_mask[row, longest:] = prompt.cross_attention_mask[-1]
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
    }
    return batch if cross_attention_mask is None else batch | {"cross_attention_mask": cross_attention_mask}


def _longest(vlm: VLM, samples: Sequence[Sample], lengths: Sequence[int], *, room: int) -> tuple[int, int]:
    """The place of the longest prompt and its tokens: exact for one that may not fit, else at least what it has."""
    per_image = _tokens_per_image(vlm, samples, lengths)
    likely = [length + per_image * len(sample.images) for sample, length in zip(samples, lengths, strict=True)]
    found = (0, 0)
    for place in sorted(range(len(samples)), key=lambda place: -likely[place])[:_MOST_ENCODED]:
        if likely[place] <= found[1]:
            break
        is_exact = likely[place] <= room or not samples[place].images
        num_tokens = likely[place] if is_exact else len(vlm.encode_prompt(samples[place]).input_ids)
        found = max(found, (place, num_tokens), key=lambda pair: pair[1])
    return found


def _tokens_per_image(vlm: VLM, samples: Sequence[Sample], lengths: Sequence[int]) -> int:
    """What an image adds to its placeholder, at most, among the samples with the largest images."""
    pictured = {
        place: max(num_pixels(image, sample.id) for image in sample.images)
        for place, sample in enumerate(samples)
        if sample.images
    }
    added = [
        -(-(len(vlm.encode_prompt(samples[place]).input_ids) - lengths[place]) // len(samples[place].images))
        for place in sorted(pictured, key=lambda place: -pictured[place])[:_MEASURED]
    ]
    return max(added, default=0)


def _opens_itself(text: str, tokenizer: Any) -> bool:
    """Whether the template already wrote what the tokenizer would add in front."""
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def _render(sample: Sample, processor: Any, family: Family, *, today: str) -> str:
    if processor.chat_template is None:
        warnings.warn(
            f"the processor has no chat template; prompts are written as {family.plain_prompt!r}",
            stacklevel=2,
        )
        images = (processor.image_token + "\n") * len(sample.images)
        return family.plain_prompt.format(images=images, prompt=sample.prompt)
    content = [{"type": "image"}] * len(sample.images) + [{"type": "text", "text": sample.prompt}]
    try:
        return render(processor, [{"role": "user", "content": content}], today=today)
    except TemplateRefusedError as refusal:
        raise InputError(f"sample {sample.id}: {refusal}; use another template") from refusal
