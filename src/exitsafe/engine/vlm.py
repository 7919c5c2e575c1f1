"""`VLM`: a vision-language model that can exit its image encoder early, and answers.

A thin wrapper around the Hugging Face model and processor, which stay untouched: outside `exit_at` they behave as
loaded. The work is done in the other files of this package; this file is their public interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from exitsafe.engine.encoding import features_by_prompt
from exitsafe.engine.generation import Completion, Sampling, complete_rows
from exitsafe.engine.packing import packed_states
from exitsafe.engine.prompts import Prompt, Row
from exitsafe.engine.read_ahead import ReadAhead, read_ahead
from exitsafe.engine.reader import Reader
from exitsafe.errors import InputError
from exitsafe.exits.features import Features, compute_features
from exitsafe.machine.memory import BatchSize, ImageStates, free_memory, offloaded, rows_that_fit
from exitsafe.records import Response, Sample


class VLM(Reader):
    """A vision-language model whose image features can be read after any encoder block.

    Args:
        model: A Hugging Face model, or a PEFT model around one.
        processor: Its processor.
        name: What the model was loaded from.
        encoder: Where its encoder is; None finds and proves it.
        modality: "image", or "audio" for the exits of the audio encoder.
        checkpoint_hash: Identifies the weights, config and processor files.
        adapter_hash: Identifies the PEFT adapter, if there is one.
        translators: Optional linear maps, one per exit, applied to the features before the projector.

    Attributes:
        model, processor: The Hugging Face objects.
        base_model: The model without the PEFT wrapper (its layers stay adapted).
        family: The model type, e.g. "qwen2_5_vl".
        encoder: What was found about the encoder.
        num_layers: Encoder blocks, e.g. 24.
        default_exit: The exit whose features the untouched model reads, e.g. 23.
        today: The date given to chat templates, e.g. "2026-01-31": the day of loading or, for a run that is resumed or
            repeated, the day on which it began.

    Raises:
        ModelError: If the model has no encoder whose exits can be proven.
    """

    def image_features(
        self, inputs: Mapping[str, Tensor], exit_layers: Sequence[int], *, skip_global: bool = False
    ) -> dict[int, Features]:
        """Image features at several exits from one encoder pass up to the deepest.

        Args:
            inputs: The processor's output for one prompt; only its images, videos and audio are read.
            exit_layers: The exits to compute.
            skip_global: As in `exit_at`.

        Returns:
            By exit layer and modality, the object that the model's own `get_image_features` returns, whose
            `pooler_output` holds the embeddings; for Llama 3.2 Vision (images * tiles, patches, H). Detached.

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
        """Answer every sample at the same exit layer, or each at its own.

        Args:
            samples: The samples to answer.
            exit_layers: One exit for all, or one per sample.
            max_new_tokens: Longest answer, in tokens. None is 256, or less if the context leaves less.
            temperature: 0 is greedy; above 0, tokens are sampled from the full distribution.
            seed: Together with sample id and exit layer, the key of every draw.
            batch_size: Rows generated at a time.
            skip_global: As in `exit_at`.

        Returns:
            One response per sample, in order.

        Raises:
            InputError: If the number of exits differs from the number of samples, or a sample cannot be read or leaves
                no room for an answer.
            ExitLayerError: If the encoder has no such block.
        """
        max_new_tokens = self.read_ahead(samples, max_new_tokens=max_new_tokens).max_new_tokens
        if isinstance(exit_layers, int):
            exit_layers = [exit_layers] * len(samples)
        if len(exit_layers) != len(samples):
            raise InputError(f"{len(exit_layers)} exit layers for {len(samples)} samples: give one, or one per sample")
        rows = []
        for start in range(0, len(samples), batch_size):
            chunk = range(start, min(start + batch_size, len(samples)))
            prompts = [self.encode_prompt(samples[index]) for index in chunk]
            layers = sorted({exit_layers[index] for index in chunk})
            features = self.prompt_features(prompts, layers, skip_global=skip_global)
            rows += [
                Row(prompt=prompt, exit_layer=exit_layers[index], features=found[exit_layers[index]])
                for index, prompt, found in zip(chunk, prompts, features, strict=True)
            ]
        responses: dict[int, Response] = {}
        for index, completion in self.complete(
            rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size
        ):
            responses[index] = self.response(rows[index], completion)
        return [responses[index] for index in range(len(rows))]

    def prompt_features(
        self,
        prompts: Sequence[Prompt],
        exit_layers: Sequence[int],
        *,
        skip_global: bool = False,
    ) -> list[dict[int, Features | None]]:
        """`image_features` of many prompts; None for prompts without media."""
        return features_by_prompt(self, prompts, tuple(exit_layers), skip_global=skip_global)

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
            batch_size: Rows generated at a time; halved when memory runs out, permanently in a `BatchSize`.
            draw: Distinguishes several answers to one (seed, sample, exit layer).
            suppress: Token ids that must not be chosen.

        Raises:
            InputError: If a setting is invalid, or a prompt leaves no room for an answer of `max_new_tokens`.
            RunError: If memory runs out while a single row is answered.
        """
        if isinstance(batch_size, int) and batch_size < 1:
            raise InputError(f"batch_size={batch_size}: choose 1 or more")
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, draw=draw)
        self.check_room(rows, [max_new_tokens] * len(rows))
        return complete_rows(self, rows, sampling, batch_size=batch_size, suppress=suppress)

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

    def read_ahead(self, samples: Sequence[Sample], *, max_new_tokens: int | None) -> ReadAhead:
        """What the model will read for these samples, and how long an answer to each may be.

        Raises:
            InputError: If a prompt is too long or contains the image placeholder.
            ModelError: If there is no processor, or its chat template leaves something out.
        """
        return read_ahead(self, samples, max_new_tokens=max_new_tokens)

    def rows_that_fit(self, prompts: Sequence[Prompt], *, max_new_tokens: int, free: int | None = None) -> int:
        """The number of these prompts, at least 1, that can be answered at a time in `free` bytes; None is the memory
        that is free now."""
        states = max(self.num_image_states(prompt.media) for prompt in prompts)
        return rows_that_fit(
            self.text_config,
            num_tokens=max(len(prompt.input_ids) for prompt in prompts) + max_new_tokens,
            dtype=self.base_model.dtype,
            free=free_memory(self.device) if free is None else free,
            images=ImageStates(num_layers=len(self.image_cache_layers), per_row=states),
        )

    def offloaded(self) -> AbstractContextManager[None]:
        """A context in which the weights are in main memory, so that the GPU is free for something else."""
        return offloaded(self.model, self.device)

    def packed_response_states(
        self, rows: Sequence[Row], responses: Sequence[Tensor], *, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`response_states` with several responses per sequence, so that a shared prompt is computed once.

        Args:
            rows: As in `response_states`. Adjacent rows with the same sample and exit layer are packed together.
            responses: As in `response_states`.
            group_size: Most responses in a sequence.

        Returns:
            As `response_states`, up to rounding; hidden states are kept at the responses' positions only.
        """
        assert len({self.batch_key(row.prompt) for row in rows}) == 1, "group rows by batch_key first"
        return packed_states(self, rows, responses, group_size=group_size)

    @cached_property
    def can_pack(self) -> bool:
        """Whether the attention accepts a tree mask: flash attention only supports causal masks, and a custom mask
        would replace that of a sliding window, or of images that attend to themselves. Linear attention takes no mask,
        and each token must have a single position."""
        is_plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.text_config).layers)
        prompt = self.probe()
        has_one_position = self.inputs([Row(prompt=prompt, exit_layer=1, features=None)])["position_ids"].dim() == 2
        no_types = not {"token_type_ids", "mm_token_type_ids"} & set(prompt.text_inputs)
        return self.text_config._attn_implementation in ("sdpa", "eager") and is_plain and has_one_position and no_types
