"""Types of the Hugging Face models and processors that exitsafe works with, for the type checker only.

transformers leaves most of these attributes untyped, and torch types an unknown attribute of a module as
`Tensor | Module`. No class here exists at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import (
        GenerationConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )

    class LanguageModel(PreTrainedModel):
        """A model that writes text."""

        config: PretrainedConfig
        generation_config: GenerationConfig
        generate: Callable[..., Any]

    class MultimodalModel(LanguageModel):
        """A model that reads images or audio and writes text."""

        model: Any  # its submodules differ between architectures
        lm_head: nn.Linear
        get_input_embeddings: Callable[[], nn.Embedding]
        get_decoder: Callable[[], nn.Module]
        _weight_conversions: object
        _init_weights: Callable[[nn.Module], None]
        prepare_inputs_for_generation: Callable[..., dict[str, Any]]
        _prepare_position_ids_for_generation: Callable[..., Tensor]
        _update_model_kwargs_for_generation: Callable[..., dict[str, Any]]

    class MultimodalProcessor(ProcessorMixin):
        """What turns text and media into inputs of such a model."""

        tokenizer: PreTrainedTokenizerBase
        chat_template: str | dict[str, str] | None
        image_token: str
        image_token_id: int
