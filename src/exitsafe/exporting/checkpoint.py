"""A model and an exit in, the stock model that ends there out: fewer blocks, the same class, nothing patched.

The smaller model shares its weights' memory with the whole one; both stay usable.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping

from exitsafe.engine.load import auto_class
from exitsafe.errors import ModelError
from exitsafe.exits.encoder import media_inputs, run_encoder
from exitsafe.exits.features import on_device
from exitsafe.exits.translators import Translator, merge_translator
from exitsafe.exporting.edits import slim_config
from exitsafe.exporting.merging import base_weights, merged_weights

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM
    from exitsafe.exits.huggingface import MultimodalModel

SHARD_SIZE = "5GB"


def cut(vlm: VLM, *, exit_layer: int, skip_global: bool, keep_adapter: bool) -> MultimodalModel:
    """The model whose encoder ends at `exit_layer`, to be saved but not run.

    Args:
        vlm: The whole model.
        exit_layer: Encoder blocks to keep.
        skip_global: Whether to drop the global blocks, too.
        keep_adapter: Whether the adapter stays separate; otherwise it is merged.

    Raises:
        ModelError: If the weights are quantized, or the adapter or the exit's translator cannot be merged.
    """
    model = vlm.base_model
    # inside the exit, so that the adapter that is active at this layer is merged
    with vlm.exit_at(exit_layer, skip_global=skip_global):
        weights = base_weights(vlm.model) if keep_adapter else merged_weights(vlm.model)
    gone = dropped_blocks(vlm, exit_layer=exit_layer, skip_global=skip_global)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(gone)}
    weights |= _translated(vlm, weights, exit_layer=exit_layer)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    config = slim_config(vlm, shapes, exit_layer=exit_layer, skip_global=skip_global)
    with torch.device("meta"):
        slim = type(model)(config)
    names = slim.state_dict().keys()
    # strict: no name may be missing or extra
    slim.load_state_dict({name: weights[name] for name in names}, assign=True)
    _check_ties(model, slim)
    slim.tie_weights()
    slim.generation_config = copy.deepcopy(model.generation_config)
    return slim


def save(slim: MultimodalModel, folder: Path) -> None:
    """Save a cut model with the tensor names of this architecture's checkpoints on the Hub.

    Every transformers version and other engines read those (`vision_tower.vision_model.embeddings...`). A model that
    `from_pretrained` did not make would be saved with only part of the reverse renaming: transformers leaves out
    prefixes that its own module tree no longer has. Where the names on the Hub are those of a larger model, as for
    Qwen2.5-Omni's thinker, the model's own are kept.
    """
    slim._weight_conversions = get_model_conversion_mapping(slim, add_legacy=False)
    slim.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    loaded: Any = auto_class(slim.config).from_pretrained(
        folder,
        output_loading_info=True,
        device_map="meta",
        trust_remote_code=False,  # otherwise transformers would ask on the terminal
    )
    if any(names for names in loaded[1].values()):
        del slim._weight_conversions
        slim.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def check_can_be_cut(vlm: VLM) -> None:
    """Check before the work what `cut` requires.

    Raises:
        ModelError: If the weights are quantized, or the model's class is not one of transformers.
    """
    if not type(vlm.base_model).__module__.startswith("transformers."):
        raise ModelError(
            f"{vlm.name} runs code from its checkpoint, and an export must load in stock transformers: audit and align "
            "work, export does not"
        )
    if getattr(vlm.base_model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{vlm.name} is quantized, but a slim checkpoint has plain weights: load it without quantization, and "
            "quantize the slim one"
        )


def dropped_blocks(vlm: VLM, *, exit_layer: int, skip_global: bool) -> tuple[str, ...]:
    """The prefixes of the names of weights that an exit does not need."""
    names = {module: name for name, module in vlm.base_model.named_modules()}
    gone = [*vlm.encoder_blocks[exit_layer:], *(vlm.global_blocks if skip_global else ())]
    return tuple(f"{names[block]}." for block in gone)


def _translated(vlm: VLM, weights: dict[str, Tensor], *, exit_layer: int) -> dict[str, Tensor]:
    """The projector's first layer with the exit's translator in it, if there is one to merge."""
    if vlm.translators is None or vlm.reads_default(exit_layer):
        return {}
    translator: Translator = vlm.translators.maps[exit_layer].to(vlm.device)
    name, linear = _first_layer(vlm)
    if linear is None:
        raise ModelError(
            f"the translator of exit {exit_layer} cannot be merged, since this projector does not begin with a linear "
            "layer: export without translators, or repair the exit with exitsafe align"
        )
    if type(linear) is not nn.Linear:
        raise ModelError(
            f"the translator of exit {exit_layer} cannot be merged into an adapted projector: merge the adapter first, "
            "or export without translators"
        )
    if linear.bias is None:
        raise ModelError(
            f"the translator of exit {exit_layer} cannot be merged, since this projector has no bias: export without "
            "translators, or repair the exit with exitsafe align"
        )
    weight, bias = merge_translator(linear, translator)
    assert {f"{name}.weight", f"{name}.bias"} <= weights.keys()
    return {f"{name}.weight": weight.detach(), f"{name}.bias": bias.detach()}


@torch.no_grad()
def _first_layer(vlm: VLM) -> tuple[str, nn.Module | None]:
    """The name and module of the linear layer that reads the projector's input as it is; None if there is none."""
    given: list[Tensor] = []
    found: list[tuple[str, nn.Module]] = []

    def look(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args and args[0] is given[-1]:
            found.append((name, module))

    model, prompt = vlm.base_model, vlm.probe()
    with ExitStack() as hooks:
        first = vlm.projector.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        hooks.callback(first.remove)
        for name, module in model.named_modules():
            is_linear = isinstance(module, nn.Linear | BaseTunerLayer)
            if is_linear and name.startswith(f"{vlm.encoder.projector}"):
                hooks.callback(module.register_forward_pre_hook(partial(look, name)).remove)
        modality = vlm.encoder.modality
        run_encoder(model, modality, on_device(model, media_inputs(model, prompt.media, modality)))
    return found[0] if found else ("", None)


def _check_ties(model: MultimodalModel, slim: MultimodalModel) -> None:
    """Check that a head that shared its weights with the embeddings still equals them: saving would lose one."""
    if _head(model) is not _embeddings(model):
        return
    head = _head(slim)
    if head is not None and not torch.equal(head, _embeddings(slim).to(head.device)):
        raise ModelError(
            "the adapter changes embeddings and head differently, but they share their weights in this model: keep the "
            "adapter (--keep-adapter)"
        )


def _head(model: MultimodalModel) -> Tensor | None:
    module = model.get_output_embeddings()
    return None if module is None else _base_weight(module)


def _embeddings(model: MultimodalModel) -> Tensor:
    return _base_weight(model.get_input_embeddings())


def _base_weight(module: nn.Module) -> Tensor:
    plain: nn.Module = getattr(module, "original_module", getattr(module, "base_layer", module))
    return plain.get_parameter("weight")
