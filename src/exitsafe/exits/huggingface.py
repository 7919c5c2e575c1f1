"""Types of the Hugging Face models and processors that exitsafe works with, for the type checker only.

transformers leaves most of these attributes untyped, and torch types an unknown attribute of a module as
`Tensor | Module`. No class here exists at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import (
        GenerationConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class LanguageModel(PreTrainedModel):
        """A model that writes text."""

        config: PretrainedConfig
        generation_config: GenerationConfig
        generate: Callable[..., Any]

    class ImageTextModel(LanguageModel):
        """A model that reads images and writes text."""

        model: Any  # its submodules differ between families
        lm_head: nn.Linear
        get_input_embeddings: Callable[[], nn.Embedding]
        _weight_conversions: object
        get_image_features: Callable[..., BaseModelOutputWithPooling]

    class ImageTextProcessor(ProcessorMixin):
        """What turns text and images into inputs of such a model."""

        tokenizer: PreTrainedTokenizerBase
        chat_template: str | dict[str, str] | None
        image_token: str
        image_token_id: int
