"""Samples -> model inputs: the chat template, the images, and left-padded batches.

Every sample goes through the processor by itself, so that its inputs never depend on other samples in the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from exitsafe.data.images import open_image
from exitsafe.engine.templates import TemplateRefusedError, render
from exitsafe.errors import InputError, ModelError
from exitsafe.exits.families import Family
from exitsafe.exits.features import Features
from exitsafe.records import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from exitsafe.exits.huggingface import ImageTextProcessor


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A prompt to answer from the image features of one exit layer; `draw` distinguishes several answers to it."""

    prompt: Prompt
    exit_layer: int
    features: Features | None
    draw: int = 0

    def asks_the_same(self, other: Row) -> bool:
        """Whether both have the same prompt and features, so that the model needs to read them only once."""
        is_same = self.prompt is other.prompt and self.exit_layer == other.exit_layer
        return is_same and self.features is other.features


def encode(sample: Sample, processor: ImageTextProcessor | None, family: Family, *, today: str) -> Prompt:
    """Tokenise one sample.

    Raises:
        InputError: If an image cannot be read, the prompt contains the model's image placeholder, or the chat template
            does not accept it.
        ModelError: If there is no processor, or its chat template leaves something out.
    """
    processor = given_processor(processor)
    text = written(sample, processor, family, today=today)
    images = [open_image(image, sample.id) for image in sample.images]
    return tokenise(text, images, processor, family, sample_id=sample.id)


def given_processor(processor: ImageTextProcessor | None) -> ImageTextProcessor:
    """The processor; raises ModelError if there is none."""
    if processor is None:
        raise ModelError("this model folder has no processor: save the processor in the same folder")
    return processor


def written(sample: Sample, processor: ImageTextProcessor | None, family: Family, *, today: str) -> str:
    """The prompt as text: the sample in the chat template, with one placeholder per image. Opens no image.

    Raises:
        InputError, ModelError: As `encode`.
    """
    processor = given_processor(processor)
    if processor.image_token in sample.prompt:
        raise InputError(
            f"sample {sample.id}: the prompt contains the image placeholder {processor.image_token!r}; remove it and "
            "give images in `images`"
        )
    try:
        sample.prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"sample {sample.id}: the prompt contains a lone surrogate; save it as valid Unicode"
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


def tokenise(
    text: str, images: Sequence[Image.Image], processor: ImageTextProcessor, family: Family, *, sample_id: str
) -> Prompt:
    """Tokenise a rendered prompt, which has one placeholder per image."""
    inputs = processor(
        text=[text],
        images=list(images) or None,
        return_tensors="pt",
        add_special_tokens=not opens_itself(text, processor.tokenizer),
    )
    mask = inputs.get("cross_attention_mask")
    return Prompt(
        sample_id=sample_id,
        input_ids=inputs["input_ids"][0],
        image_inputs={name: inputs[name] for name in family.image_inputs} if images else {},
        cross_attention_mask=None if mask is None else mask[0],
    )


def too_long(sample_id: str, num_tokens: int, max_new_tokens: int, *, context_length: int) -> InputError:
    """The error for a prompt that leaves no room for its answer."""
    return InputError(
        f"sample {sample_id}: the prompt has {num_tokens} tokens, images included, but with an answer of "
        f"{max_new_tokens} this model has room for {context_length - max_new_tokens}; shorten it or leave the sample "
        "out"
    )


def collate(prompts: Sequence[Prompt], responses: Sequence[Tensor] | None, *, pad_token_id: int) -> dict[str, Tensor]:
    """Left-pad prompts, append the responses and right-pad them.

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


def opens_itself(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template already wrote the token that the tokenizer would prepend."""
    return tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))


def _render(sample: Sample, processor: ImageTextProcessor, family: Family, *, today: str) -> str:
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
