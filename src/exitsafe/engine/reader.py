"""`Reader`: a model that exits early, with its processor: samples in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from exitsafe.engine.prompts import Prompt, Row, collate, encode, given_processor, too_long
from exitsafe.engine.templates import check_template, tokens_after_turn
from exitsafe.exits.model import ExitingModel
from exitsafe.exits.translators import Translators
from exitsafe.records import Sample

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
        checkpoint_hash: str | None = None,
        adapter_hash: str | None = None,
        translators: Translators | None = None,
    ) -> None:
        super().__init__(
            model, name=name, checkpoint_hash=checkpoint_hash, adapter_hash=adapter_hash, translators=translators
        )
        self.processor = processor
        self.today = date.today().isoformat()

    def encode_prompt(self, sample: Sample) -> Prompt:
        """Tokenise one sample and prepare its images. Raises InputError if that fails."""
        return encode(sample, self.processor, self.family_row, today=self.today)

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
        """Prompts may share a batch if their keys are equal, which they always are without cross-attention."""
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
        self.check_room(rows, [len(response) for response in responses])
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

    def logits(self, hidden: Tensor) -> Tensor:
        """The language-model head, float32: (..., H) -> (..., V)."""
        logits: Tensor = self.base_model.lm_head(hidden)
        return logits.float()

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
        # an image token would count as a placeholder, and a token without an embedding cannot be embedded
        usable = (
            token
            for token in (self.tokenizer.pad_token_id, *self.eos_token_ids, 0, 1)
            if token is not None and token < num_embeddings and token != self.base_model.config.image_token_id
        )
        return int(next(usable))

    @cached_property
    def special_token_ids(self) -> tuple[int, ...]:
        """Tokens that an answer must not contain (image, padding, begin of sequence, ...), except those that end it."""
        special = {*self.tokenizer.all_special_ids, self.processor.image_token_id}
        return tuple(sorted(special - {None, *self.eos_token_ids}))

    def check_room(self, rows: Sequence[Row], num_new_tokens: Sequence[int]) -> None:
        """Raise InputError if a prompt and its new tokens exceed the context."""
        for row, num_new in zip(rows, num_new_tokens, strict=True):
            num_tokens = len(row.prompt.input_ids)
            if num_tokens + num_new > self.context_length:
                raise too_long(row.prompt.sample_id, num_tokens, num_new, context_length=self.context_length)


def end_tokens(
    generation_config: GenerationConfig | None, text_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """The tokens that end an answer, from the first place where the checkpoint defines them; empty if none does."""
    places = (getattr(place, "eos_token_id", None) for place in (generation_config, text_config, tokenizer))
    eos: int | Sequence[int] | None = next((found for found in places if found is not None), None)
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
