"""Samples -> model inputs: the chat template, the images, and left-padded batches.

Every sample goes through the processor by itself, so that nothing about its inputs depends on its neighbours in a
batch. Knows nothing about exit layers.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from exitsafe.errors import InputError, ModelError
from exitsafe.records import Sample
from exitsafe.vlm.families import Family


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


def encode(sample: Sample, processor: Any, family: Family) -> Prompt:
    """Tokenise one sample.

    Raises:
        InputError: If an image cannot be read or the prompt contains the model's image placeholder.
        ModelError: If there is no processor.
    """
    check_text(sample, processor)
    images = [open_image(image, sample.id) for image in sample.images]
    text = _render(sample.prompt, len(images), processor, family)
    return tokenise(text, images, processor, family, sample_id=sample.id)


def tokenise(text: str, images: Sequence[Image.Image], processor: Any, family: Family, *, sample_id: str) -> Prompt:
    """Tokenise what a chat template has written, with one image placeholder per image."""
    # The template already wrote what the tokenizer would add in front.
    bos = processor.tokenizer.bos_token
    has_bos = bos is not None and text.startswith(bos)
    inputs = processor(text=[text], images=list(images) or None, return_tensors="pt", add_special_tokens=not has_bos)
    mask = inputs.get("cross_attention_mask")
    return Prompt(
        sample_id=sample_id,
        input_ids=inputs["input_ids"][0],
        image_inputs={name: inputs[name] for name in family.image_inputs} if images else {},
        cross_attention_mask=None if mask is None else mask[0],
    )


def check_room(sample: Sample, processor: Any, *, context_length: int, max_new_tokens: int) -> None:
    """`check_text`, with room for an answer in a model of `context_length` tokens."""
    if max_new_tokens >= context_length:
        raise InputError(
            f"max_new_tokens={max_new_tokens}, but this model has room for {context_length} tokens, prompt "
            "and answer together: choose fewer"
        )
    check_text(sample, processor, limit=context_length - max_new_tokens)


def check_text(sample: Sample, processor: Any, *, limit: int | None = None) -> None:
    """Whether a sample's text can be asked, found out without its images.

    Args:
        sample: The sample.
        processor: The model's.
        limit: Most tokens for the text; None for any number.

    Raises:
        InputError: If the prompt contains the model's image placeholder or is longer than `limit`.
        ModelError: If there is no processor.
    """
    if processor is None:
        raise ModelError("this model folder has no processor: save the processor beside the model")
    if processor.image_token in sample.prompt:
        raise InputError(
            f"sample {sample.id}: the prompt contains the image placeholder {processor.image_token!r}; remove it, "
            "images are given in `images`"
        )
    try:
        num_bytes = len(sample.prompt.encode())
    except UnicodeEncodeError as error:
        raise InputError(
            f"sample {sample.id}: the prompt holds half a surrogate pair; save it as proper text"
        ) from error
    # no token is shorter than a byte: only what may be too long is worth counting
    if limit is not None and num_bytes > limit:
        num_tokens = len(processor.tokenizer(sample.prompt, add_special_tokens=False).input_ids)
        if num_tokens > limit:
            raise InputError(
                f"sample {sample.id}: the prompt has {num_tokens} tokens, and beside the answer this model has room "
                f"for {limit}; shorten it or leave the sample out"
            )


def open_image(source: Image.Image | Path | str | bytes, sample_id: str) -> Image.Image:
    """Open and convert to RGB.

    Raises:
        InputError: If it cannot be opened or decoded.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"sample {sample_id}: image {name} does not exist") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"sample {sample_id}: image {name} cannot be read ({error})") from error


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


def _render(prompt: str, num_images: int, processor: Any, family: Family) -> str:
    if processor.chat_template is None:
        warnings.warn(
            f"the processor has no chat template; prompts are written as {family.plain_prompt!r}",
            stacklevel=2,
        )
        return family.plain_prompt.format(images=(processor.image_token + "\n") * num_images, prompt=prompt)
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert isinstance(text, str)
    return text
