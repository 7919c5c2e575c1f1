"""`VLM`: a vision-language model that can exit its image encoder early.

A thin shell around the Hugging Face model and processor, which stay untouched: outside `exit_at` they behave as
loaded. The parts live in the files beside this one; this file gives them one face.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import date
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from exitsafe.errors import InputError, ModelError
from exitsafe.records import Response, Sample
from exitsafe.vlm.adapters import LINEAR_LAYERS
from exitsafe.vlm.exits import ExitStack, Hook, skip_patch
from exitsafe.vlm.families import find_family
from exitsafe.vlm.features import Features, compute_features, features_by_prompt
from exitsafe.vlm.generation import Completion, Row, Sampling, answer_samples, complete_rows, end_tokens
from exitsafe.vlm.layers import check_exit_layer
from exitsafe.vlm.memory import BatchSize, ImageStates, free_memory, offloaded, rows_that_fit
from exitsafe.vlm.packing import packed_states
from exitsafe.vlm.prompts import Prompt, ReadAhead, collate, encode, read_ahead, too_long
from exitsafe.vlm.templates import check_template, tokens_after_turn
from exitsafe.vlm.translators import Translators, find_projector


class VLM:
    """A vision-language model whose image features can be read after any encoder block.

    Args:
        model: A Hugging Face model of a supported family, or a PEFT model around one.
        processor: Its processor, or None: then only what needs none works.
        name: What the model was loaded from.
        checkpoint_hash: Identifies the weights, config and processor files.
        adapter_hash: Identifies the PEFT adapter, if there is one.
        translators: One linear map per exit that features pass before the projector, if wanted.

    Attributes:
        model, processor: The Hugging Face objects.
        base_model: The model without the PEFT shell (its layers stay adapted).
        family: The model type, e.g. "llava".
        num_layers: Encoder blocks, e.g. 24.
        default_exit: Blocks behind the features that the untouched model reads, e.g. 23.
        today: The date given to chat templates, as "2026-01-31": the day of loading or, for a run that is resumed or
            repeated, the day on which it began.

    Raises:
        ModelError: If the family is not supported.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str,
        checkpoint_hash: str | None = None,
        adapter_hash: str | None = None,
        translators: Translators | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.name = name
        self.checkpoint_hash = checkpoint_hash
        self.adapter_hash = adapter_hash
        self.translators = translators
        self.trained_on: frozenset[str] = frozenset()  # digests of samples and pictures, where a repair names them
        self.today = date.today().isoformat()
        self.exits = ExitStack()
        self.family_row = find_family(self.base_model.config)
        self.num_layers = len(self.family_row.encoder_blocks(self.base_model))
        config = self.base_model.config
        self.default_exit = self.family_row.default_exit(config, self.num_layers)
        # Taken now: inside an exit the config says something else.
        self._exit_settings = {
            exit_layer: self.family_row.exit_settings(config, self.num_layers, exit_layer)
            for exit_layer in self.exit_layers
        }

    @property
    def base_model(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def family(self) -> str:
        return self.family_row.name

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Every exit: 1 to `num_layers`."""
        return tuple(range(1, self.num_layers + 1))

    def __repr__(self) -> str:
        """What it is, where it exits and where it runs."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        added = [name for name in ("adapter_hash", "translators") if getattr(self, name) is not None]
        with_them = "".join(f", with {name.removesuffix('_hash')}" for name in added)
        return (
            f"VLM {self.name} ({self.family}, {size / 1e6:,.1f}M parameters{with_them})\n"
            f"  exits 1 to {self.num_layers}, default {self.default_exit}\n"
            f"  {str(self.base_model.dtype).removeprefix('torch.')} on {self.device}"
        )

    @property
    def device(self) -> torch.device:
        return torch.device(self.base_model.device)

    @contextmanager
    def exit_at(self, exit_layer: int, *, skip_global: bool = False) -> Iterator[VLM]:
        """Run any Hugging Face code on `model` with `exit_layer` encoder blocks; the others do not compute.

        Nestable: the innermost exit acts. On leaving, also by an exception, the model is as it was. Not for two threads
        at once on one model.

        Args:
            exit_layer: Encoder blocks to run, 1 to `num_layers`.
            skip_global: Llama 3.2 Vision only: skip the global blocks as well.

        Raises:
            ExitLayerError: If the encoder has no such block.
            InputError: If `skip_global` is asked of a family without global blocks, or the translators, if there are
                any, have no map for this exit.
        """
        check_exit_layer(exit_layer, self.num_layers)
        global_blocks = self.family_row.global_blocks(self.base_model)
        if skip_global and not global_blocks:
            raise InputError(f"skip_global: {self.family} has no global blocks; leave it out")
        patch = skip_patch(
            self.family_row.encoder_blocks(self.base_model),
            global_blocks,
            self.exit_settings(exit_layer),
            exit_layer=exit_layer,
            skip_global=skip_global,
            hooks=self.translation_hooks(exit_layer),
        )
        with self.exits.enter(patch):
            yield self

    def exit_settings(self, exit_layer: int) -> list[tuple[Any, str, Any]]:
        """(config, entry, value) triples under which the model reads the features of `exit_layer`."""
        config = self.base_model.config
        return [(config, name, value) for name, value in self._exit_settings[exit_layer].items()]

    def translation_hooks(self, exit_layer: int) -> list[Hook]:
        """What carries features of `exit_layer` through its translator; nothing where there is nothing to translate."""
        if self.translators is None or self.reads_default(exit_layer):
            return []
        return [(self.projector, self.translators.hook(exit_layer))]

    def reads_default(self, exit_layer: int) -> bool:
        """Whether the model reads the very same features at `exit_layer` as at the default exit: there, and, where
        `vision_feature_layer` is a list, at deeper exits."""
        return self._exit_settings[exit_layer] == self._exit_settings[self.default_exit]

    @property
    def projector(self) -> torch.nn.Module:
        """What maps image features into the language model, token by token.

        Raises:
            ModelError: If the family's projector does not read the features of an exit as they are.
        """
        return find_projector(self.base_model, self.family_row)

    def image_features(
        self, inputs: Mapping[str, Tensor], exit_layers: Sequence[int], *, skip_global: bool = False
    ) -> dict[int, Features]:
        """Image features at several exits from one encoder pass up to the deepest.

        Args:
            inputs: What the processor returns; only its image entries are read.
            exit_layers: Exits wanted.
            skip_global: As in `exit_at`.

        Returns:
            By exit layer, a tuple of tensors: (tokens, H) per image; for Llama 3.2 Vision (images * tiles,
            patches, H) per row. Detached.

        Raises:
            ExitLayerError: If the encoder has no such block.
            InputError: If an image entry is missing from `inputs`.
        """
        return compute_features(self, inputs, tuple(exit_layers), skip_global=skip_global)

    def generate(
        self,
        samples: Sequence[Sample],
        exit_layers: int | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        skip_global: bool = False,
    ) -> list[Response]:
        """Answer every sample at one exit layer, or at its own.

        Args:
            samples: What to answer.
            exit_layers: One exit for all, or one per sample: rows of one batch may differ.
            max_new_tokens: Longest answer, in tokens. None is 256, or what the context leaves.
            temperature: 0 is greedy; above, the whole distribution is sampled.
            seed: With sample id and exit layer, the key of every draw.
            batch_size: Rows under generation at a time.
            skip_global: As in `exit_at`.

        Returns:
            One response per sample, in order.

        Raises:
            InputError: If the number of exits is not the number of samples, or a sample cannot be read or leaves no
                room for an answer.
            ExitLayerError: If the encoder has no such block.
        """
        return answer_samples(
            self,
            samples,
            exit_layers,
            max_new_tokens=read_ahead(self, samples, max_new_tokens=max_new_tokens).max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            skip_global=skip_global,
        )

    def encode_prompt(self, sample: Sample) -> Prompt:
        """Tokenise one sample and prepare its images. Raises InputError for what cannot be read."""
        return encode(sample, self.processor, self.family_row, today=self.today)

    def prompt_features(
        self,
        prompts: Sequence[Prompt],
        exit_layers: Sequence[int],
        *,
        batch_size: int | BatchSize = 16,
        skip_global: bool = False,
    ) -> list[dict[int, Features | None]]:
        """`image_features` of many prompts, split by prompt; None for prompts without images."""
        return features_by_prompt(self, prompts, tuple(exit_layers), batch_size=batch_size, skip_global=skip_global)

    def complete(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        batch_size: int | BatchSize,
        draw: int = 0,
        suppress: Sequence[int] = (),
    ) -> Iterator[tuple[int, Completion]]:
        """Answer rows; yields (index into rows, completion) in the order of finishing.

        Args:
            batch_size: Rows under generation at a time; halved when memory runs out, for good in a `BatchSize`.
            draw: Tells several answers to one (seed, sample, exit layer) apart.
            suppress: Token ids that must not be chosen.

        Raises:
            InputError: If a setting makes no sense, or a prompt leaves no room for an answer of `max_new_tokens`.
            RunError: If memory runs out while a single row is answered.
        """
        if isinstance(batch_size, int) and batch_size < 1:
            raise InputError(f"batch_size={batch_size}: choose 1 or more")
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, draw=draw, suppress=tuple(suppress)
        )
        self._check_room(rows, [max_new_tokens] * len(rows))
        return complete_rows(self, rows, sampling, batch_size=batch_size)

    def response(self, row: Row, completion: Completion) -> Response:
        """A completion as the record that judges read."""
        return Response(
            sample_id=row.prompt.sample_id,
            exit_layer=row.exit_layer,
            text=self.decode(completion.token_ids),
            num_tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            seconds=completion.seconds,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens, stripped."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def read_ahead(self, samples: Sequence[Sample], *, max_new_tokens: int | None) -> ReadAhead:
        """What the model will read for these samples, and how long an answer to each may be.

        Raises:
            InputError: If a text cannot be asked: too long, or with the image placeholder in it.
            ModelError: If there is no processor, or its chat template leaves something out.
        """
        return read_ahead(self, samples, max_new_tokens=max_new_tokens)

    @cached_property
    def is_dated(self) -> bool:
        """Whether what the chat template writes depends on the date.

        Raises:
            ModelError: If it is harmful, e.g. never finishes, or accepts no conversation.
        """
        return check_template(self.processor, today=self.today)

    def _check_room(self, rows: Sequence[Row], num_new_tokens: Sequence[int]) -> None:
        for row, num_new in zip(rows, num_new_tokens, strict=True):
            num_tokens = len(row.prompt.input_ids)
            if num_tokens + num_new > self.context_length:
                raise too_long(row.prompt.sample_id, num_tokens, num_new, context_length=self.context_length)

    def rows_that_fit(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> int:
        """How many of these prompts to answer at a time with the memory that is free now, at least 1."""
        across = len(self.family_row.image_cache_layers(self.text_config))
        states = max(self.family_row.num_image_states(self.base_model.config, each.image_inputs) for each in prompts)
        return rows_that_fit(
            self.text_config,
            num_tokens=max(len(prompt.input_ids) for prompt in prompts) + max_new_tokens,
            dtype=self.base_model.dtype,
            free=free_memory(self.device),
            images=ImageStates(num_layers=across, per_row=states),
        )

    def offloaded(self) -> AbstractContextManager[None]:
        """Keep the weights in main memory meanwhile, so that a GPU is free for something else."""
        return offloaded(self.model, self.device)

    def batch_key(self, prompt: Prompt) -> object:
        """Prompts may share a batch when their keys are equal: always, but for families with cross-attention."""
        return self.family_row.batch_key(prompt.image_inputs)

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
        self._check_room(rows, [len(response) for response in responses])
        batch = collate([row.prompt for row in rows], responses, pad_token_id=self.pad_token_id)
        num_tokens = max(len(response) for response in responses)
        tokens = batch["input_ids"][:, -num_tokens:].to(self.device)
        mask = batch["attention_mask"][:, -num_tokens:].bool().to(self.device)
        outputs = self.base_model.model(
            **{name: tensor.to(self.device) for name, tensor in batch.items()},
            **self.family_row.feature_inputs([row.features for row in rows if row.features is not None]),
            use_cache=False,
        )
        return outputs.last_hidden_state[:, -num_tokens - 1 : -1], tokens, mask

    def packed_response_states(
        self, rows: Sequence[Row], responses: Sequence[Tensor], *, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`response_states`, but responses to one prompt share a sequence: the prompt is computed once for them.

        Args:
            rows: As in `response_states`. Neighbours of one sample and exit layer are packed together.
            responses: As in `response_states`.
            group_size: Most responses in a sequence.

        Returns:
            As `response_states`, to rounding; hidden states are kept at the responses' positions only.
        """
        assert len({self.batch_key(row.prompt) for row in rows}) == 1, "group rows by batch_key first"
        return packed_states(self, rows, responses, group_size=group_size)

    @property
    def can_pack(self) -> bool:
        """Whether the attention takes a tree mask: flash attention's kernels know causal masks only, and a mask of the
        caller's would replace that of a sliding window."""
        has_window = getattr(self.text_config, "sliding_window", None) is not None  # no entry in Llama's config
        return self.text_config._attn_implementation in ("sdpa", "eager") and not has_window

    def logits(self, hidden: Tensor) -> Tensor:
        """The language-model head, float32: (..., H) -> (..., V)."""
        logits: Tensor = self.base_model.lm_head(hidden)
        return logits.float()

    @property
    def tokenizer(self) -> Any:
        if self.processor is None:
            raise ModelError("this model folder has no processor: save the processor beside the model")
        return self.processor.tokenizer

    @property
    def text_config(self) -> Any:
        return self.base_model.config.get_text_config(decoder=True)

    @property
    def context_length(self) -> int:
        """Tokens that the language model was made for: prompt, images and answer together."""
        return int(self.text_config.max_position_embeddings)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        tokenizer = None if self.processor is None else self.tokenizer
        return end_tokens(self.base_model.generation_config, self.text_config, tokenizer)

    @cached_property
    def turn_end_token_id(self) -> int:
        """The token that a trained answer ends with: what the chat template writes there, or else the tokenizer's end.

        Models may have several end tokens, and the first one listed need not be that of a turn.
        """
        ends = self.eos_token_ids
        own = (*tokens_after_turn(self.processor, today=self.today), self.tokenizer.eos_token_id)
        return next((token for token in own if token in ends), ends[0])

    @cached_property
    def pad_token_id(self) -> int:
        """Fills masked positions; never read by the model."""
        num_embeddings = self.base_model.get_input_embeddings().weight.shape[0]
        # an image token would be counted as a placeholder, and a token without an embedding cannot be looked up
        usable = (
            token
            for token in (self.tokenizer.pad_token_id, *self.eos_token_ids, 0, 1)
            if token is not None and token < num_embeddings and token != self.base_model.config.image_token_id
        )
        return int(next(usable))

    @cached_property
    def special_token_ids(self) -> tuple[int, ...]:
        """Tokens that an answer must not contain (image, pad, begin of sequence, ...); not those that end it."""
        special = {*self.tokenizer.all_special_ids, self.processor.image_token_id}
        return tuple(sorted(special - {None, *self.eos_token_ids}))

    language_model_pattern = LINEAR_LAYERS
    """Regular expression for PEFT's `target_modules`: the language model's linear layers, never the encoder's."""
