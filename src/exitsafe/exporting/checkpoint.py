"""A model and an exit in, the stock model that stops there out: fewer blocks, the same class, nothing to patch.

The smaller model shares its weights' memory with the whole one; both stay usable. Knows nothing about files.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping

from exitsafe.errors import ModelError
from exitsafe.exits.translators import Translator, merge_translator
from exitsafe.exporting.merging import base_weights, merged_weights

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM

_FIRST_LINEAR = "linear_1"  # of LLaVA's and LLaVA-NeXT's projectors, the only ones that translators fit


def cut(vlm: VLM, *, exit_layer: int, skip_global: bool, keep_adapter: bool) -> Any:
    """The model that ends its encoder at `exit_layer`, ready to be saved; not to be run.

    Args:
        vlm: The whole model.
        exit_layer: Encoder blocks to keep.
        skip_global: Whether the global blocks go too.
        keep_adapter: Whether the adapter stays apart; otherwise it is merged.

    Raises:
        ModelError: If the weights are quantised, or the adapter or the exit's translator cannot be merged.
    """
    model = vlm.base_model
    # inside the exit, whichever adapter acts at this layer is the one to merge
    with vlm.exit_at(exit_layer, skip_global=skip_global):
        weights = base_weights(vlm.model) if keep_adapter else merged_weights(vlm.model)
    gone = dropped_blocks(vlm, exit_layer=exit_layer, skip_global=skip_global)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(gone)}
    weights |= _translated(vlm, weights, exit_layer=exit_layer)
    with torch.device("meta"):
        slim = type(model)(slim_config(vlm, exit_layer=exit_layer, skip_global=skip_global))
    slim.load_state_dict(weights, assign=True)  # strict: not a name too many, not a name too few
    _check_ties(model, slim)
    slim.tie_weights()
    slim.generation_config = copy.deepcopy(model.generation_config)
    return slim


def name_as_on_the_hub(model: Any) -> None:
    """Let `save_pretrained` write the tensor names of the Hub's checkpoints of this architecture.

    Every transformers version and other engines read those (`vision_tower.vision_model.embeddings...`). A model that
    was not made by `from_pretrained` would be saved with only part of the reverse renaming: transformers leaves out
    prefixes that its own module tree no longer has.
    """
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)


def check_can_be_cut(vlm: VLM) -> None:
    """Raise what `cut` would find only later.

    Raises:
        ModelError: If the weights are quantised.
    """
    if getattr(vlm.base_model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{vlm.name} is quantised, and a slim checkpoint has plain weights: load it without quantization, and "
            "quantise the slim one"
        )


def slim_config(vlm: VLM, *, exit_layer: int, skip_global: bool) -> Any:
    """The config under which the stock class is the model at this exit."""
    whole = vlm.base_model.config
    config = copy.deepcopy(whole)
    vision = config.vision_config
    vision.num_hidden_layers = exit_layer
    for _, name, value in vlm.exit_settings(exit_layer):
        # an index from the end would be the same as -1; a list keeps its shallower entries
        setattr(config, name, -1 if isinstance(value, int) else list(value))
    if vlm.family_row.global_blocks(vlm.base_model):
        # states wanted from blocks that are gone are the exit's own
        vision.intermediate_layers_indices = [
            min(index, exit_layer - 1) for index in whole.vision_config.intermediate_layers_indices
        ]
        vision.num_global_layers = 0 if skip_global else whole.vision_config.num_global_layers
    return config


def dropped_blocks(vlm: VLM, *, exit_layer: int, skip_global: bool) -> tuple[str, ...]:
    """How the names of weights begin that an exit does not need."""
    names = {module: name for name, module in vlm.base_model.named_modules()}
    gone = vlm.family_row.encoder_blocks(vlm.base_model)[exit_layer:]
    gone += vlm.family_row.global_blocks(vlm.base_model) if skip_global else []
    return tuple(f"{names[block]}." for block in gone)


def _translated(vlm: VLM, weights: dict[str, Tensor], *, exit_layer: int) -> dict[str, Tensor]:
    """The projector's first layer with the exit's translator in it, if there is one to merge."""
    if vlm.translators is None or vlm.reads_default(exit_layer):
        return {}
    translator: Translator = vlm.translators.maps[exit_layer].to(vlm.device)
    linear = vlm.projector.get_submodule(_FIRST_LINEAR)
    if type(linear) is not nn.Linear:
        raise ModelError(
            f"the translator of exit {exit_layer} cannot be merged into an adapted projector: merge the adapter first, "
            "or export without translators"
        )
    if linear.bias is None:
        raise ModelError(
            f"the translator of exit {exit_layer} cannot be merged: this projector has no bias to hold its shift; "
            "export without translators, or repair the exit by exitsafe align"
        )
    prefix = f"{vlm.family_row.projector}.{_FIRST_LINEAR}"
    weight, bias = merge_translator(linear, translator)
    assert {f"{prefix}.weight", f"{prefix}.bias"} <= weights.keys()
    return {f"{prefix}.weight": weight.detach(), f"{prefix}.bias": bias.detach()}


def _check_ties(model: Any, slim: Any) -> None:
    """A head that shared its weights with the embeddings must still be equal to them, or saving would lose one."""
    is_tied = _head(model) is not None and _head(model) is _embeddings(model)
    if is_tied and not torch.equal(_head(slim), _embeddings(slim).to(_head(slim).device)):
        raise ModelError(
            "the adapter changes embeddings and head apart, which share their weights in this model: export with the "
            "adapter kept (--keep-adapter)"
        )


def _head(model: Any) -> Any:
    return _base_weight(model.get_output_embeddings())


def _embeddings(model: Any) -> Any:
    return _base_weight(model.get_input_embeddings())


def _base_weight(module: Any) -> Any:
    if module is None:
        return None
    return getattr(module, "original_module", getattr(module, "base_layer", module)).weight
