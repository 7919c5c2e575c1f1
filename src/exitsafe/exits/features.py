"""Image features at any set of exit layers from one encoder pass, and how the language model is given them.

The encoder runs once, up to the deepest exit wanted, and keeps each block's output. Shallower exits are *replayed*:
every block returns a kept output instead of computing, and the model's own feature path (class-token drop, tiles,
norms, mergers, global blocks, projector) runs on it. The encoder and projector are frozen here: no gradients.

Features stay the model's own objects: some language models read more of them than embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from exitsafe.errors import InputError
from exitsafe.exits.cut import replay_patch
from exitsafe.exits.encoder import MODALITIES, embeddings_in, media_inputs, reads_across, run_encoder
from exitsafe.exits.layers import check_exit_layer
from exitsafe.exits.model import ExitingModel

if TYPE_CHECKING:
    from exitsafe.exits.huggingface import MultimodalModel

T = TypeVar("T")
Features = Mapping[str, ModelOutput]
"""What the language model reads from one prompt's media at one exit, by modality: the object that the model's feature
path returned, without its hidden states. Its `pooler_output` holds the embeddings, (tokens, H) in all."""
SIZES = ("_thw", "_hws", "_sizes", "_shapes", "_sizes_videos")
_BY_LAYER = "deepstack_features"
"""The one field whose outer list is over the language model's layers, not over pictures."""


@torch.no_grad()
def compute_features(
    vlm: ExitingModel, inputs: Mapping[str, Tensor], exit_layers: Sequence[int], *, skip_global: bool
) -> dict[int, Features]:
    """Features of one prompt's media at every exit in `exit_layers`, by exit layer.

    Raises:
        ExitLayerError: If the encoder has no such block.
        InputError: If `inputs` has nothing that the model's encoders read.
    """
    model = vlm.base_model
    found: dict[int, dict[str, ModelOutput]] = {exit_layer: {} for exit_layer in exit_layers}
    for modality in MODALITIES:
        media = on_device(model, media_inputs(model, inputs, modality))
        if media:
            read = partial(run_encoder, model, modality, media)
            for exit_layer, output in _at_exits(vlm, exit_layers, read, skip_global=skip_global).items():
                found[exit_layer][modality] = _read(output)
    if not all(found.values()):
        raise InputError("inputs have no pictures, videos or audio that the model reads: pass its processor's output")
    return dict(found)


@torch.no_grad()
def projector_inputs(vlm: ExitingModel, inputs: Mapping[str, Tensor], exit_layers: Sequence[int]) -> dict[int, Tensor]:
    """The projector's inputs at every exit in `exit_layers`, translated if the model has translators:
    (tokens of all images and tiles, width)."""
    model, modality = vlm.base_model, vlm.encoder.modality
    received: list[Tensor] = []
    media = on_device(model, media_inputs(model, inputs, modality))

    def read() -> Tensor:
        # registered inside the exit, so that it runs after a translator's hook
        recorder = vlm.projector.register_forward_pre_hook(lambda module, args: received.append(args[0]))
        try:
            run_encoder(model, modality, media)
        finally:
            recorder.remove()
        parts = [each.flatten(0, -2) for each in received]
        received.clear()
        return torch.cat(parts)

    return _at_exits(vlm, exit_layers, read, skip_global=False)


def tensors_in(features: object) -> Iterator[Tensor]:
    """Every tensor of a prompt's features."""
    if isinstance(features, Tensor):
        yield features
    elif isinstance(features, Mapping | list | tuple):
        for each in features.values() if isinstance(features, Mapping) else features:
            yield from tensors_in(each)


def num_tokens(features: Features) -> int:
    """Tokens that the features take among the prompt's."""
    pooled = (tensor for output in features.values() for tensor in tensors_in(embeddings_in(output)))
    return sum(tensor.numel() // tensor.shape[-1] for tensor in pooled)


def moved(features: Features, device: torch.device) -> Features:
    """The features on a device."""
    return {modality: _mapped(output, lambda tensor: tensor.to(device)) for modality, output in features.items()}


def handed_over(model: MultimodalModel, features: Sequence[Features], input_ids: Tensor) -> dict[str, Any]:
    """Keyword arguments that pass the features of a batch's rows to the model's `forward`.

    Always new objects: `generate` with several return sequences changes them in place. Audio, which no model takes as
    an encoder's output, is handed over as the prompt's embeddings with the features in them.

    Args:
        model: The model.
        features: Of the rows that have any, in order.
        input_ids: (B, S), of all rows.
    """
    # a model that joins pictures' and videos' features by layer stops at the last layer that both have
    depth = max((len(output.get(_BY_LAYER) or ()) for row in features for output in row.values()), default=0)
    joined: dict[str, ModelOutput] = {}
    for modality in MODALITIES:
        outputs = [row[modality] for row in features if modality in row]
        if outputs:
            joined[modality] = _joined(outputs, depth=depth)
    if not joined:
        return {}
    if reads_across(model):
        return {"cross_attention_states": joined["image"]["pooler_output"]}
    takes_outputs = "mm_encoder_outputs" in signature(model.forward).parameters
    seen = {modality: output for modality, output in joined.items() if takes_outputs and modality != "audio"}
    given: dict[str, Any] = {"mm_encoder_outputs": seen} if seen else {}
    if len(seen) < len(joined):
        embeds = model.get_input_embeddings()(input_ids)
        for modality in joined.keys() - seen.keys():
            pooled = torch.cat([tensor.flatten(0, -2) for tensor in tensors_in(embeddings_in(joined[modality]))])
            places = input_ids == getattr(model.config, f"{modality}_token_id")
            embeds = embeds.masked_scatter(places[..., None], pooled.to(embeds.dtype))
        given["inputs_embeds"] = embeds
    return given


def _joined(outputs: Sequence[ModelOutput], *, depth: int) -> ModelOutput:
    """The outputs of several prompts as one, as if their media had been encoded together."""
    first = outputs[0]
    fields = {name: [output.get(name) for output in outputs] for name in {key: None for out in outputs for key in out}}
    joined = {
        name: _joined_layers(values, outputs, depth=depth) if name == _BY_LAYER else _joined_pictures(values)
        for name, values in fields.items()
    }
    return type(first)(**joined)


def _joined_pictures(values: Sequence[Any]) -> Any:
    present = [value for value in values if value is not None]
    if isinstance(present[0], Tensor):
        if len({value.shape[1:] for value in present}) > 1:  # videos of different lengths
            return torch.cat([value.flatten(0, -2) for value in present])[None]
        return torch.cat(present)
    if isinstance(present[0], list | tuple):
        return [each for value in present for each in value]
    return present[0]


def _joined_layers(values: Sequence[Any], outputs: Sequence[ModelOutput], *, depth: int) -> Any:
    """Deepstack features by layer. A shallow exit has fewer: its tokens get zeros, which add nothing."""
    layers = []
    for level in range(depth):
        parts: list[Any] = []
        for value, output in zip(values, outputs, strict=True):
            if value is not None and level < len(value):
                parts.append(value[level])
            else:
                parts.append(_mapped(embeddings_in(output), torch.zeros_like))
        layers.append(_joined_level(parts))
    return layers


def _joined_level(parts: Sequence[Any]) -> Any:
    """One layer's features: a tensor over all tokens, one tensor a picture, or either with the layer's number."""
    shape = next(part for part in parts)
    if isinstance(shape, tuple) and isinstance(shape[0], int):
        return shape[0], _joined_level([part[1] for part in parts])
    if any(isinstance(part, Tensor) for part in parts):
        flat = [part if isinstance(part, Tensor) else torch.cat(list(part)) for part in parts]
        return torch.cat(flat)
    return [each for part in parts for each in part]


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _mapped(each, function) for name, each in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_mapped(each, function) for each in value)
    return value


def _read(output: ModelOutput) -> ModelOutput:
    """The output without what the language model does not read: the encoder's hidden states, most of its size."""
    unread = {"hidden_states", "attentions"} | (
        {"last_hidden_state"} if output.get("pooler_output") is not None else set()
    )
    return type(output)(**{name: value for name, value in output.items() if name not in unread})


def on_device(model: MultimodalModel, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Media on the model's device, pixels and audio in its number type. Grids and sizes stay on the CPU: the model
    reads their values to choose shapes."""
    moved: dict[str, Tensor] = {}
    # a model without weights has only its encoder on a device
    device = next((each.device for each in model.parameters() if not each.is_meta), torch.device("meta"))
    for name, tensor in media.items():
        is_size = not tensor.is_floating_point() and name.endswith(SIZES)
        dtype = model.dtype if tensor.is_floating_point() else tensor.dtype
        moved[name] = tensor if is_size else tensor.to(device, dtype)
    return moved


def _at_exits(
    vlm: ExitingModel, exit_layers: Sequence[int], read: Callable[[], T], *, skip_global: bool
) -> dict[int, T]:
    """The result of `read` inside every exit, from one encoder pass."""
    for exit_layer in exit_layers:
        check_exit_layer(exit_layer, vlm.num_layers)
    if not exit_layers:
        return {}
    deepest, *shallower = sorted(set(exit_layers), reverse=True)
    stored: list[object] = []
    recorded = vlm.encoder_blocks[:deepest] if shallower else ()
    recorders = [block.register_forward_hook(_recorder(stored)) for block in recorded]
    try:
        with vlm.exit_at(deepest, skip_global=skip_global):
            found = {deepest: read()}
    finally:
        for recorder in recorders:
            recorder.remove()
    for exit_layer in shallower:
        if len(stored) != deepest:  # the medium is another encoder's, or passes in parts: nothing to replay
            with vlm.exit_at(exit_layer, skip_global=skip_global):
                found[exit_layer] = read()
            continue
        patch = replay_patch(
            vlm.base_model,
            vlm.encoder,
            vlm.encoder_blocks,
            vlm.exit_settings(exit_layer),
            stored + [stored[-1]] * (vlm.num_layers - deepest),
            exit_layer=exit_layer,
            skip_global=skip_global,
            hooks=vlm.translation_hooks(exit_layer),
        )
        with vlm.exits.enter(patch):
            found[exit_layer] = read()
    return {exit_layer: found[exit_layer] for exit_layer in exit_layers}


def _recorder(stored: list[object]) -> Callable[[nn.Module, tuple[object, ...], object], None]:
    def keep(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        stored.append(output)

    return keep
