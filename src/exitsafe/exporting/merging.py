"""The plain weights of a model with or without a PEFT adapter: model in, stock names and tensors out.

The model is not changed: each adapted layer is merged in a copy. Other weights share their memory with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from exitsafe.errors import ModelError


@torch.no_grad()
def merged_weights(model: Any) -> dict[str, Tensor]:
    """The state dict that the model would have with its active adapter merged.

    Args:
        model: A Hugging Face model, or a PEFT model around one.

    Raises:
        ModelError: If the adapter's type cannot be merged.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return dict(_merged(base, ""))


@torch.no_grad()
def base_weights(model: Any) -> dict[str, Tensor]:
    """The state dict of the model without its adapter, sharing memory with it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return dict(_plain(base, ""))


def _merged(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, ModulesToSaveWrapper):
        yield from _merged(_trained_copy(module), prefix)
    elif isinstance(module, BaseTunerLayer):
        yield from _merge_copy(module, prefix)
    elif _is_adapter(module):
        raise ModelError(
            f"{prefix.rstrip('.')} has a {type(module).__name__} adapter, which cannot be merged: keep the adapter "
            "(--keep-adapter)"
        )
    else:
        yield from _own(module, prefix)
        for name, child in module.named_children():
            yield from _merged(child, f"{prefix}{name}.")


def _plain(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, ModulesToSaveWrapper):
        module = module.original_module
    elif isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    yield from _own(module, prefix)
    for name, child in module.named_children():
        yield from _plain(child, f"{prefix}{name}.")


def _own(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The entries of a state dict that belong to this module itself."""
    buffers = {
        name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
    }
    for name, tensor in {**module._parameters, **buffers}.items():
        if tensor is not None:
            yield prefix + name, tensor.detach()


def _trained_copy(module: ModulesToSaveWrapper) -> nn.Module:
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    found = module.modules_to_save[active[0]] if active else module.original_module
    assert isinstance(found, nn.Module)
    return found


def _merge_copy(layer: BaseTunerLayer, prefix: str) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(layer, nn.Module)
    try:
        merged = copy.deepcopy(layer)
        merged.merge(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(
            f"the adapter of {prefix.rstrip('.')} cannot be merged ({error}): keep the adapter (--keep-adapter)"
        ) from error
    # on the CPU: most GPUs cannot hold a merged language model beside the whole model
    for name, tensor in merged.get_base_layer().state_dict().items():
        yield prefix + name, tensor.detach().cpu()


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")
