"""DeepSpeed's ZeRO-3 for frozen weights alone: its engine cuts them up and puts a block's together while it computes.

The engine gets no optimiser. What is trained is hidden from it and stays whole in every process, so gradients,
clipping, optimisers, checkpoints and adapter are those of plain processes, as under FSDP2. Knows nothing about models
but that they are made of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import nn

from exitsafe.errors import InputError

WHOLE_BELOW = 100_000
"""Weights with fewer numbers stay whole, as DeepSpeed itself has it: norms are not worth a message."""


def check_zero() -> None:
    """Raise InputError if the processes were started with a DeepSpeed that cannot be had, or in another way."""
    if find_spec("deepspeed") is None:
        raise InputError("training under DeepSpeed needs its package: pip install deepspeed")
    plugin = DeepSpeedPlugin()
    if plugin.zero_stage != 3:
        raise InputError(
            f"ZeRO-{plugin.zero_stage} cuts up what is trained, and LoRA weights are small: set zero_stage to 3, which "
            "cuts up the model, or start with accelerate launch --multi_gpu"
        )
    if plugin.zero3_init_flag:
        raise InputError("under ZeRO-3 each process loads the weights itself: set zero3_init_flag to false")
    offloaded = (plugin.offload_param_device, plugin.offload_optimizer_device)
    if any(device not in (None, "none") for device in offloaded):
        raise InputError("training under ZeRO-3 cannot offload: set both offload devices to none")


def cut_up(language_model: nn.Module, left_whole: Sequence[nn.Module]) -> None:
    """Leave each process its part of the frozen weights of the blocks.

    There is no way back. All processes must run as many passes through the language model.

    Args:
        language_model: Its `layers` are the blocks.
        left_whole: Blocks that not every pass runs through.
    """
    import deepspeed

    layers: Any = language_model.layers
    dtype = next(weight.dtype for weight in layers.parameters() if not weight.requires_grad)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # the engine wants one; it sees no batch
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": WHOLE_BELOW},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    hidden = [module for name, module in language_model.named_children() if name != "layers"]
    hidden += [*left_whole, *(module for module in layers.modules() if _is_trained(module))]
    with _taken_out(language_model, hidden):
        deepspeed.initialize(model=language_model, config=settings)


def _is_trained(module: nn.Module) -> bool:
    """Whether all that it holds is trained: an adapter's part of a layer."""
    weights = list(module.parameters())
    return bool(weights) and all(weight.requires_grad for weight in weights)


@contextmanager
def _taken_out(root: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these modules are not part of `root`."""
    numbers = {id(module) for module in modules}
    places = [
        (parent._modules, name)
        for parent in root.modules()
        for name, child in parent._modules.items()
        if id(child) in numbers
    ]
    order = {id(children): dict(children) for children, _ in places}
    for children, name in places:
        children.pop(name, None)
    try:
        yield
    finally:
        for children, _ in places:  # in the order they had
            whole = order[id(children)]
            children.clear()
            children.update(whole)
