"""Training LoRA weights on a quantised language model (QLoRA): what bitsandbytes' layers need for it.

PEFT's `prepare_model_for_kbit_training` is not used: it converts every other weight to float32, including the frozen
encoder, and requires gradients at the embeddings, which only re-entrant checkpointing needs. Only one thing remains:
gradients must flow through the quantised layers.
"""

from __future__ import annotations

from torch import nn

from exitsafe.errors import InputError


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes has replaced linear layers of a Hugging Face model."""
    return bool(getattr(model, "is_quantized", False))


def check_quantized(model: nn.Module, *, name: str, train: str) -> None:
    """Raise InputError if the model is quantised in a way that cannot be trained.

    Args:
        model: The Hugging Face model.
        name: What it was loaded from.
        train: "lora" or "full".
    """
    if not is_quantized(model):
        return
    if train == "full":
        raise InputError(f"train='full' cannot train quantised weights: load {name} unquantised, or use train='lora'")
    if any(_is_packed(module) for module in model.modules()):
        raise InputError(
            f"{name} has already generated on this CPU, for which bitsandbytes repacked its 4-bit weights: gradients "
            "cannot flow through these, so load it again before training"
        )


def let_gradients_pass(model: nn.Module) -> None:
    """Keep 4-bit layers in training mode, so that they are not repacked on a CPU; they have no dropout."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True


def _is_packed(module: nn.Module) -> bool:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))
