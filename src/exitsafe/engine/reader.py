"""`Reader`: a model that exits early, with its processor: samples in, hidden states and logits out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

from exitsafe.engine.prompts import Prompt, Row, collate, encode, find_placeholders, given_processor, too_long
from exitsafe.engine.templates import check_template, tokens_after_turn
from exitsafe.errors import InputError, ModelError, first_line
from exitsafe.exits.checks import Checks, prove_exits
from exitsafe.exits.encoder import MAIN_INPUTS, MODALITIES, Encoder, reads_across
from exitsafe.exits.features import handed_over
from exitsafe.exits.model import ExitingModel, bare_model
from exitsafe.exits.translators import Translators
from exitsafe.records import Sample

PROBE_SIZE = (112, 84)
"""Pixels of the picture on which a model is measured, (width, height): small, and not square."""
PROBE_RATE = 16_000
"""Sampling rate in Hz of the audio on which a model is measured, which lasts one second."""

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase


class Reader(ExitingModel):
    """Reads prompts: `exitsafe.engine.vlm.VLM` without generation. Arguments as there."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str,
        encoder: Encoder | None = None,
        modality: str = "image",
        checkpoint_hash: str | None = None,
        adapter_hash: str | None = None,
        translators: Translators | None = None,
    ) -> None:
        self.processor = processor
        self.checks: Checks | None = None  # set by `load_vlm`
        self.is_newly_checked = False
        self.can_pad = True
        self.today = date.today().isoformat()
        self.name = name
        if encoder is None:
            bare = bare_model(model)
            try:
                encoder = prove_exits(bare, self.probe(modality).media, modality=modality, name=name)
            except ModelError:
                raise
            except Exception as error:
                raise ModelError(
                    f"{name} cannot be run on a prompt of its own processor ({type(error).__name__}: "
                    f"{first_line(error)}): use the processor files of the original checkpoint"
                ) from error
        super().__init__(
            model,
            encoder=encoder,
            name=name,
            checkpoint_hash=checkpoint_hash,
            adapter_hash=adapter_hash,
            translators=translators,
        )

    def probe(
        self, modality: str | None = None, *, size: tuple[int, int] = PROBE_SIZE, text: str = "a picture"
    ) -> Prompt:
        """A prompt with a picture or audio clip of noise, always the same.

        Args:
            modality: "image" or "audio"; None is the encoder's.
            size: The picture's size, (width, height) in pixels.
            text: The prompt.

        Raises:
            ModelError: If the processor is missing, or cannot make a prompt.
        """
        modality = modality or self.encoder.modality
        if modality not in self.placeholders and (others := self.placeholders.keys() & {"image", "audio"}):
            (other,) = others
            raise ModelError(f"{self.name} takes no {modality} in its prompts; add --encoder {other}")
        sample = probe_sample(modality, size=size, text=text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # issued when real prompts are made
            try:
                return self.encode_prompt(sample)
            except (InputError, ModelError) as error:  # about the chat template
                raise ModelError(f"{self.name}: {str(error).removeprefix('sample probe: ')}") from error
            except Exception as error:
                raise ModelError(
                    f"the processor of {self.name} does not fit the model: it cannot encode a prompt with media "
                    f"({first_line(error)}): use the processor files of the original checkpoint"
                ) from error

    def encode_prompt(self, sample: Sample) -> Prompt:
        """Tokenise one sample and prepare its images. Raises InputError if that fails."""
        return encode(sample, self.processor, self.placeholders, today=self.today)

    @cached_property
    def placeholders(self) -> dict[str, str]:
        """What stands for a medium in a prompt, by modality: "image", "video", "audio"."""
        return find_placeholders(self.processor, today=self.today)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens, stripped."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    @cached_property
    def is_dated(self) -> bool:
        """Whether the chat template's output depends on the date.

        Raises:
            ModelError: If the template is harmful, e.g. never finishes, or accepts no conversation.
        """
        return check_template(self.processor, today=self.today)

    def batch_key(self, prompt: Prompt) -> object:
        """Prompts may share a batch if their keys are equal: always, except

        - where the self-check found that padding changes a model's logits: there, lengths must be equal;
        - with cross-attention, the number of images: text before the first image attends evenly to all image slots,
          and an empty slot beside a row with more images would change that row's logits.
        """
        num_images = prompt.media["pixel_values"].shape[1] if reads_across(self.base_model) and prompt.media else 0
        return num_images, None if self.can_pad else len(prompt.input_ids)

    def inputs(self, rows: Sequence[Row], responses: Sequence[Tensor] | None = None) -> dict[str, Any]:
        """What `prepare_inputs_for_generation` takes for these prompts, followed by responses if there are any.

        Positions are the model's own. Everything is on the model's device; rows are padded on the left, responses on
        the right.
        """
        prompts = [row.prompt for row in rows]
        batch = collate(prompts, responses, pad_token_id=self.pad_token_id, of_next_token=self.of_next_token)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        batch["position_ids"] = self.base_model._prepare_position_ids_for_generation(
            batch["input_ids"], batch | self._sizes(prompts)
        )
        features = [row.features for row in rows if row.features is not None]
        return batch | handed_over(self.base_model, features, batch["input_ids"])

    def of_next_token(self, text_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The text inputs of the token after the last one, (B, 1, ...), as `generate` continues them."""
        if not text_inputs:
            return {}
        longer = self.base_model._update_model_kwargs_for_generation(
            ModelOutput(), dict(text_inputs), is_encoder_decoder=False
        )
        return {name: longer[name][:, -1:] for name in text_inputs}

    @cached_property
    def only_last_logits(self) -> dict[str, int]:
        """The keyword argument with which `forward` computes the last token's logits only, where the model has it."""
        return {"logits_to_keep": 1} if "logits_to_keep" in signature(self.base_model.forward).parameters else {}

    def _sizes(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What the prompts' media hold besides pixels and audio, joined: sizes, grids and masks, from which some models
        make positions."""
        found: dict[str, list[Any]] = {}
        for prompt in prompts:
            for name in prompt.media.keys() - MAIN_INPUTS:
                found.setdefault(name, []).append(prompt.media[name])
        return {name: _joined(values) for name, values in found.items()}

    def response_states(self, rows: Sequence[Row], responses: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher-forced last hidden states at the positions that predict the response tokens.

        Args:
            rows: Prompts with the features of their exit layers.
            responses: Token ids, (length,) each, at least one token.

        Returns:
            hidden (B, T, H), tokens (B, T) int64, mask (B, T) bool; T is the longest response. Gradients flow into
            the language model; the features are constants.
        """
        assert len({self.batch_key(row.prompt) for row in rows}) == 1, "group rows by batch_key first"
        self.check_room(rows, [len(response) for response in responses])
        inputs = self.inputs(rows, responses)
        num_tokens = max(len(response) for response in responses)
        tokens = inputs["input_ids"][:, -num_tokens:]
        mask = inputs["attention_mask"][:, -num_tokens:].bool()
        prepared = self.base_model.prepare_inputs_for_generation(is_first_iteration=True, use_cache=False, **inputs)
        return self._last_hidden_states(prepared)[:, -num_tokens - 1 : -1], tokens, mask

    def _last_hidden_states(self, inputs: dict[str, Any]) -> Tensor:
        """What the language model's head reads, (B, S, H)."""
        if isinstance(inner := getattr(self.base_model, "model", None), nn.Module):
            found: Tensor = inner(**inputs).last_hidden_state
            return found
        # a model without such a part: run it whole, with a head that only remembers
        head: Any = self.base_model.get_output_embeddings()
        seen: list[Tensor] = []

        def remember(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden[..., :1]

        head.forward = remember
        try:
            self.base_model(**inputs)
        finally:
            del head.forward
        return seen[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The language-model head, float32: (..., H) -> (..., V)."""
        if not self.has_plain_head:
            return self._through_own_head(hidden).float()
        logits: Tensor = self.base_model.get_output_embeddings()(hidden)
        return logits.float()

    @cached_property
    def has_plain_head(self) -> bool:
        """Whether the model's logits are its head's output; some models scale or cap them."""
        head: Any = self.base_model.get_output_embeddings()
        if not isinstance(getattr(self.base_model, "model", None), nn.Module):
            return True  # the self-check compares what it gives
        hidden = torch.linspace(-4, 4, head.weight.shape[-1], dtype=self.base_model.dtype, device=self.device)
        with torch.no_grad():
            return torch.equal(head(hidden), self._through_own_head(hidden))

    def _through_own_head(self, hidden: Tensor) -> Tensor:
        """What the model's `forward` makes of last hidden states, with a stand-in for what computes them."""
        model, inner = self.base_model, self.base_model.model
        model.model = _Ready(hidden.reshape(1, -1, hidden.shape[-1]))
        try:
            logits: Tensor = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=hidden.device)).logits
        finally:
            model.model = inner
        return logits.reshape(*hidden.shape[:-1], -1)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return given_processor(self.processor).tokenizer

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        tokenizer = None if self.processor is None else self.tokenizer
        return end_tokens(self.base_model.generation_config, self.text_config, tokenizer)

    @cached_property
    def turn_end_token_id(self) -> int:
        """The token that a trained answer ends with: the one the chat template writes there, or the tokenizer's own.

        Models may have several end tokens, and the first one listed need not be the one that ends a turn.
        """
        ends = self.eos_token_ids
        own = (*tokens_after_turn(self.processor, today=self.today), self.tokenizer.eos_token_id)
        return next((token for token in own if token in ends), ends[0])

    @cached_property
    def pad_token_id(self) -> int:
        """The token that fills masked positions, which the model never reads."""
        num_embeddings = self.base_model.get_input_embeddings().weight.shape[0]
        media = self._media_token_ids
        # a medium's token would count as a placeholder, and a token without an embedding cannot be embedded
        usable = (
            token
            for token in (self.tokenizer.pad_token_id, *self.eos_token_ids, *range(len(media) + 2))
            if token is not None and token < num_embeddings and token not in media
        )
        return int(next(usable))

    @cached_property
    def special_token_ids(self) -> tuple[int, ...]:
        """Tokens that an answer must not contain (image, padding, begin of sequence, ...), except those that end it."""
        special = {*self.tokenizer.all_special_ids, *self._media_token_ids}
        return tuple(sorted(special - {None, *self.eos_token_ids}))

    @property
    def _media_token_ids(self) -> set[int]:
        """The ids of the tokens whose embeddings the features replace."""
        config = self.base_model.config
        ids = (getattr(config, f"{modality}_token_id", None) for modality in MODALITIES)
        return {token for token in ids if isinstance(token, int)}

    def check_room(self, rows: Sequence[Row], num_new_tokens: Sequence[int]) -> None:
        """Raise InputError if a prompt and its new tokens exceed the context."""
        for row, num_new in zip(rows, num_new_tokens, strict=True):
            num_tokens = len(row.prompt.input_ids)
            if num_tokens + num_new > self.context_length:
                raise too_long(row.prompt.sample_id, num_tokens, num_new, context_length=self.context_length)


def probe_sample(modality: str = "image", *, size: tuple[int, int] = PROBE_SIZE, text: str = "a picture") -> Sample:
    """A sample with a picture or audio clip of noise, as `Reader.probe` encodes it."""
    noise = np.random.default_rng(0)
    media: dict[str, Any] = {}
    if modality == "audio":
        media["audios"] = ((noise.uniform(-0.5, 0.5, PROBE_RATE).astype(np.float32), PROBE_RATE),)
    else:
        media["images"] = (Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)),)
    return Sample(id="probe", prompt=text, kind="benign", **media)


def _joined(values: Sequence[Any]) -> Any:
    """Tensors along the batch, zero-padded on the right; lists one after the other."""
    if not isinstance(values[0], Tensor):
        return [each for value in values for each in value]
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    pads = [
        [pad for most, size in zip(shape[::-1], value.shape[:0:-1], strict=True) for pad in (0, most - size)]
        for value in values
    ]
    return torch.cat([nn.functional.pad(value, pad) for value, pad in zip(values, pads, strict=True)])


class _Ready(nn.Module):
    """Stands in for the module that computes last hidden states, which are known already."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *args: object, **kwargs: object) -> _Output:
        return _Output(last_hidden_state=self._hidden)


class _Output(BaseModelOutputWithPast):
    """Last hidden states; every other field of an architecture's own output class is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def end_tokens(
    generation_config: GenerationConfig | None, text_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """The tokens that end an answer, from the first place where the checkpoint defines them; empty if none does."""
    places = (getattr(place, "eos_token_id", None) for place in (generation_config, text_config, tokenizer))
    eos: int | Sequence[int] | None = next((found for found in places if found is not None), None)
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
