"""The language model that ships, from its GGUF file: the weights a runtime answers with, de-quantised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from exitsafe.engine.load import LOADING_ERRORS
from exitsafe.errors import InputError, ModelError, first_line

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM


@torch.no_grad()
def take_language_model(vlm: VLM, file: Path) -> None:
    """Replace the weights of a model's language model by those of a GGUF file, of any number of bits.

    Args:
        vlm: The model; changed in place.
        file: A language model that transformers reads from GGUF (https://huggingface.co/docs/transformers/gguf).

    Raises:
        InputError: If there is no such file.
        ModelError: If transformers cannot read it, or it holds another model.
    """
    if not file.is_file():
        raise InputError(f"{file} is not a file; give the GGUF file of the language model")
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=vlm.base_model.dtype, trust_remote_code=False
        )
    except ImportError as error:
        raise ModelError('reading GGUF files needs a package: pip install "exitsafe[gguf]"') from error
    except LOADING_ERRORS as error:
        raise ModelError(f"cannot read {file} as a language model: {first_line(error)}") from error
    try:
        vlm.base_model.get_decoder().load_state_dict(read.get_decoder().state_dict())
        vlm.base_model.get_output_embeddings().load_state_dict(read.get_output_embeddings().state_dict())
    except RuntimeError as error:  # other names or shapes
        raise ModelError(f"{file} holds another language model than {vlm.name}") from error
