"""Samples -> model inputs: the chat template, the images, and left-padded batches.

Every sample goes through the processor by itself, so that its inputs never depend on other samples in the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.video_utils import VideoMetadata

from exitsafe.data.audios import open_audios
from exitsafe.data.images import open_images
from exitsafe.data.videos import open_videos
from exitsafe.engine.templates import TemplateRefusedError, render
from exitsafe.errors import InputError, ModelError, first_line
from exitsafe.exits.encoder import MODALITIES
from exitsafe.exits.features import Features
from exitsafe.records import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from exitsafe.exits.huggingface import MultimodalProcessor


TEXT_INPUTS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "cross_attention_mask")
"""A processor's outputs with an entry for each token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One tokenised sample, on the CPU.

    `input_ids` is (P,); `text_inputs` are the processor's other tensors with an entry for each token, (P, ...);
    `media` are its tensors for pictures, videos and audio, as it makes them, empty for a sample without any.
    """

    sample_id: str
    input_ids: Tensor
    text_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    media: Mapping[str, Tensor] = field(default_factory=dict)


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


def encode(
    sample: Sample, processor: MultimodalProcessor | None, placeholders: Mapping[str, str], *, today: str
) -> Prompt:
    """Tokenise one sample.

    Raises:
        InputError: If a file cannot be read, the prompt contains one of the model's placeholders, or the chat
            template does not accept it.
        ModelError: If there is no processor, or its chat template leaves something out.
    """
    processor = given_processor(processor)
    text = written(sample, processor, placeholders, today=today)
    return tokenise(text, open_media(sample, processor), processor, sample_id=sample.id)


Media = Mapping[str, Any]
"""Keyword arguments of a processor for what a prompt holds besides text."""


def open_media(sample: Sample, processor: MultimodalProcessor) -> Media:
    """A sample's pictures, videos and audio, as the processor takes them.

    Raises:
        InputError: If one cannot be read, or the processor has no sampling rate.
    """
    media: dict[str, Any] = {}
    if sample.images:
        media["images"] = open_images(sample)
    if sample.videos:
        videos = open_videos(sample)
        media["videos"] = [video.frames for video in videos]
        media["video_metadata"] = [
            VideoMetadata(
                total_num_frames=len(video.frames), fps=video.fps, frames_indices=list(range(len(video.frames)))
            )
            for video in videos
        ]
        media["do_sample_frames"] = False  # `open_videos` has chosen them
    if sample.audios:
        rate = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", None)
        if rate is None:
            raise InputError(f"sample {sample.id}: this model's processor takes no audio; leave the sample out")
        media |= {"audio": open_audios(sample, rate), "sampling_rate": rate}
    return media


def given_processor(processor: MultimodalProcessor | None) -> MultimodalProcessor:
    """The processor; raises ModelError if there is none."""
    if processor is None:
        raise ModelError("this model folder has no processor: save the processor in the same folder")
    return processor


def written(
    sample: Sample, processor: MultimodalProcessor | None, placeholders: Mapping[str, str], *, today: str
) -> str:
    """The prompt as text: the sample in the chat template, with one placeholder per image, video and audio
    clip. Opens no file.

    Raises:
        InputError, ModelError: As `encode`.
    """
    processor = given_processor(processor)
    for token in reserved_tokens(processor, placeholders):
        if token in sample.prompt or token in sample.system:
            raise InputError(
                f"sample {sample.id}: the prompt contains the placeholder {token!r}; remove it and give images, videos "
                "and audio in their own fields"
            )
    for text in (sample.prompt, sample.system):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"sample {sample.id}: the prompt contains a lone surrogate; save it as valid Unicode"
            ) from error
    for modality, given in _counts(sample).items():
        takes_images = modality == "image" and hasattr(processor, "image_processor")  # the template decides
        if given and modality not in placeholders and not takes_images:
            raise InputError(f"sample {sample.id}: this model's prompts take no {modality}; leave the sample out")
    text = _render(sample, processor, placeholders, today=today)
    if sample.prompt.strip() not in text:
        raise ModelError(f"sample {sample.id}: the chat template leaves out the prompt; use another template")
    for modality, given in _counts(sample).items():
        num_written = text.count(placeholders[modality]) if modality in placeholders else 0
        if num_written != given:
            raise ModelError(
                f"sample {sample.id}: the chat template writes {num_written} {modality} placeholders for {given} "
                f"{modality}s; use another template"
            )
    return text


def _counts(sample: Sample) -> dict[str, int]:
    return {"image": len(sample.images), "video": len(sample.videos), "audio": len(sample.audios)}


def find_placeholders(processor: MultimodalProcessor | None, *, today: str) -> dict[str, str]:
    """What stands for a medium in a prompt before its processor expands it, by modality: the special token that the
    chat template writes once for each.

    Raises:
        ModelError: As `render`.
    """
    if processor is None:
        return {}
    found: dict[str, str] = {}
    for modality in MODALITIES:
        names = (f"{modality}_token", "boi_token", "boa_token")
        usual = [str(getattr(processor, name)) for name in names if getattr(processor, name, None)]
        if processor.chat_template is None:
            found |= {modality: usual[0]} if usual and hasattr(processor, f"{modality}_token") else {}
            continue
        try:
            texts = [render(processor, _messages("", "text", {modality: number}), today=today) for number in (0, 1)]
        except TemplateRefusedError:
            try:  # a template that insists on a picture
                texts = [render(processor, _messages("", "text", {modality: number}), today=today) for number in (1, 2)]
            except TemplateRefusedError:
                continue
        special = [*usual, *map(str, processor.tokenizer.added_tokens_decoder.values())]
        once = [token for token in dict.fromkeys(special) if texts[1].count(token) == texts[0].count(token) + 1]
        found |= {modality: once[0]} if once else {}
    return found


def tokenise(text: str, media: Media, processor: MultimodalProcessor, *, sample_id: str) -> Prompt:
    """Tokenise a rendered prompt, which has one placeholder per image, video and audio clip."""
    add_special_tokens = not opens_itself(text, processor.tokenizer)
    try:
        inputs = processor(text=[text], return_tensors="pt", add_special_tokens=add_special_tokens, **media)
    except (ValueError, TypeError) as error:  # for example a prompt without a picture, which PaliGemma cannot read
        raise InputError(
            f"sample {sample_id}: the model's processor cannot read it ({first_line(error)}); leave it out"
        ) from error
    return Prompt(
        sample_id=sample_id,
        input_ids=inputs["input_ids"][0],
        text_inputs={name: inputs[name][0] for name in TEXT_INPUTS if name in inputs},
        media={
            name: tensor
            for name, tensor in inputs.items()
            if media and name not in (*TEXT_INPUTS, "input_ids", "attention_mask", "labels")
        },
    )


def too_long(sample_id: str, num_tokens: int, max_new_tokens: int, *, context_length: int) -> InputError:
    """The error for a prompt that leaves no room for its answer."""
    return InputError(
        f"sample {sample_id}: the prompt has {num_tokens} tokens, images included, but with an answer of "
        f"{max_new_tokens} this model has room for {context_length - max_new_tokens}; shorten it or leave the sample "
        "out"
    )


def collate(
    prompts: Sequence[Prompt],
    responses: Sequence[Tensor] | None,
    *,
    pad_token_id: int,
    of_next_token: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Left-pad prompts, append the responses and right-pad them.

    Args:
        prompts: One per row.
        responses: Token ids, (length,) each; None for prompts alone.
        pad_token_id: Fills masked positions.
        of_next_token: Maps text inputs, (B, S, ...), to those of the token after them, (B, 1, ...); needed where
            prompts have text inputs and responses follow.

    Returns:
        `input_ids` and `attention_mask`, (B, P + T), and the prompts' text inputs, (B, P + T, ...).
    """
    longest = max(len(prompt.input_ids) for prompt in prompts)
    tail = 0 if responses is None else max(len(response) for response in responses)
    input_ids = torch.full((len(prompts), longest + tail), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    text_inputs = {
        name: torch.zeros(len(prompts), longest + tail, *tensor.shape[1:], dtype=tensor.dtype)
        for prompt in prompts
        for name, tensor in prompt.text_inputs.items()
    }
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        input_ids[row, start:longest] = prompt.input_ids
        end = longest
        if responses is not None:
            end += len(responses[row])
            input_ids[row, longest:end] = torch.as_tensor(responses[row])
        attention_mask[row, start:end] = 1
        for name, tensor in prompt.text_inputs.items():
            text_inputs[name][row, start:longest] = tensor
    if of_next_token is not None and text_inputs:
        for name, column in of_next_token({name: each[:, :longest] for name, each in text_inputs.items()}).items():
            text_inputs[name][:, longest:] = column
    return {"input_ids": input_ids, "attention_mask": attention_mask, **text_inputs}


def opens_itself(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template already wrote the token that the tokenizer would prepend."""
    return tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))


def reserved_tokens(processor: MultimodalProcessor, placeholders: Mapping[str, str]) -> set[str]:
    """What no text may contain: what stands for a medium, and the tokens into which the processor expands it."""
    tokens = (getattr(processor, f"{modality}_token", None) for modality in MODALITIES)
    return {*placeholders.values(), *(token for token in tokens if isinstance(token, str))}


def _messages(
    system: str, prompt: str, media: Mapping[str, int], *, is_text: bool = False
) -> list[Mapping[str, object]]:
    """A conversation of one turn, media first, with a system prompt if there is one: a list of parts, or text."""
    content = [{"type": modality} for modality in MODALITIES for _ in range(media.get(modality, 0))]
    user: Mapping[str, object] = {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}
    before: Mapping[str, object] = {
        "role": "system",
        "content": system if is_text else [{"type": "text", "text": system}],
    }
    return [before, user] if system else [user]


def _render(sample: Sample, processor: MultimodalProcessor, placeholders: Mapping[str, str], *, today: str) -> str:
    if processor.chat_template is None:
        if sample.system:
            raise InputError(
                f"sample {sample.id}: this model has no chat template, which a system prompt needs; save one with its "
                "processor"
            )
        warnings.warn("the processor has no chat template; prompts are written as pictures, then text", stacklevel=2)
        return plainly(sample.prompt, _counts(sample), placeholders)
    refusal: TemplateRefusedError | None = None
    for is_text in (False, True) if sample.system else (False,):  # some templates take a system prompt as text
        try:
            messages = _messages(sample.system, sample.prompt, _counts(sample), is_text=is_text)
            text = render(processor, messages, today=today)
        except TemplateRefusedError as error:
            refusal = error
            continue
        if sample.system.strip() in text and "{'type'" not in text.replace(sample.prompt, ""):
            return text
    complaint = refusal or "the chat template leaves out the system prompt"
    raise InputError(f"sample {sample.id}: {complaint}; use another template") from refusal


def plainly(prompt: str, counts: Mapping[str, int], placeholders: Mapping[str, str]) -> str:
    """A prompt for a model without a chat template: its pictures, videos and audio, then the text."""
    media = [placeholders.get(modality, "") + "\n" for modality, count in counts.items() for _ in range(count)]
    return "".join(media) + prompt
