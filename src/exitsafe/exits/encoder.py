"""Finds a model's encoder by running it once. There is no table of families.

The encoder is the longest list of blocks in which each block's output *is* the next one's input. A model with a second
tower, with stages, or without such a list is refused: an exit would shorten only part of its encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from exitsafe.errors import ModelError

if TYPE_CHECKING:
    from exitsafe.exits.huggingface import MultimodalModel

MODALITIES = ("image", "video", "audio")
MAIN_INPUTS = {"pixel_values", "pixel_values_images", "pixel_values_videos", "input_features", "input_values"}


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Where a model's encoder is, and how its blocks are run.

    Args:
        modality: "image", which video shares, or "audio".
        path: From the model to the list of blocks.
        num_layers: Blocks in it.
        default_exit: The exit whose features the untouched model reads.
        num_returned: What a block returns: 0 for a tensor, n for a tuple of n whose first is the hidden state.
        projector: Path to the module that maps an exit's features into the language model, token by token or group by
            group; None if there is no single one.
        is_sliced: Whether an exit shortens the list, because mergers beside it read blocks on the way (deepstack).
        kind: The type in the encoder's own config, for display.
    """

    modality: str
    path: str
    num_layers: int
    default_exit: int
    num_returned: int = 0
    projector: str | None = None
    is_sliced: bool = False
    kind: str = ""


def reads_across(model: MultimodalModel) -> bool:
    """Whether the language model reads pictures by cross-attention, as Llama 3.2 Vision's does: its features are not
    embeddings of tokens, and it has no feature path of its own."""
    return bool(model.config.model_type == "mllama")


def media_inputs(model: MultimodalModel, inputs: Mapping[str, Tensor], modality: str) -> dict[str, Tensor]:
    """The entries of a processor's output that the model's encoder reads; empty if there is no medium of this kind."""
    if reads_across(model):
        names = ["pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"] if modality == "image" else []
    else:
        path = _feature_path(model, modality)
        names = [] if path is None else list(signature(path).parameters)
    found = {name: inputs[name] for name in names if name in inputs}
    return found if MAIN_INPUTS & set(found) else {}


def run_encoder(model: MultimodalModel, modality: str, media: Mapping[str, Tensor]) -> ModelOutput:
    """The model's own path from pixels or audio to what its language model reads."""
    if reads_across(model):
        states = model.get_submodule("model.vision_model")(**media).last_hidden_state
        projected = model.get_submodule("model.multi_modal_projector")(states)  # (B, images, tiles, patches, H)
        return BaseModelOutputWithPooling(pooler_output=projected.flatten(0, 2))  # (images * tiles, patches, H)
    path = _feature_path(model, modality)
    assert path is not None
    found: ModelOutput = path(**media, return_dict=True)
    return found


def embeddings_in(output: Mapping[str, Any]) -> Any:
    """What the language model reads of a feature path's output: a tensor or one for each picture, (..., H)."""
    for name in ("pooler_output", "last_hidden_state"):
        if output.get(name) is not None:
            return output[name]
    return output["deepstack_features"][0][1]  # Granite 4 Vision adds each tap at a layer of its own


def _feature_path(model: MultimodalModel, modality: str) -> Callable[..., ModelOutput] | None:
    """The innermost `get_image_features`, as `generate` calls it; an outer one may hide what it takes."""
    owners = (getattr(model, "model", None), model)
    paths = (getattr(owner, f"get_{modality}_features", None) for owner in owners)
    named = [path for path in paths if path is not None and MAIN_INPUTS & set(signature(path).parameters)]
    return named[0] if named else None


def block_list(model: nn.Module, path: str) -> list[nn.Module]:
    """The encoder's blocks, in order."""
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList | nn.Sequential)
    return list(blocks)


def global_blocks(model: nn.Module) -> list[nn.Module]:
    """Llama 3.2 Vision's blocks that run after the encoder at every exit unless skipped; none in other models."""
    vision = getattr(getattr(model, "model", None), "vision_model", None)
    return list(getattr(getattr(vision, "global_transformer", None), "layers", ()))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """A module's first tensor and what it returned. Kept alive, so that tensors can be compared by identity."""

    given: Tensor | None
    returned: object

    @property
    def output(self) -> Tensor | None:
        return first_tensor(self.returned)


_Calls = dict[nn.Module, list[_Call]]


@torch.no_grad()
def find_encoder(model: MultimodalModel, media: Mapping[str, Tensor], *, modality: str, name: str) -> Encoder:
    """Run the encoder once and see which blocks ran.

    Args:
        model: The model, in evaluation mode.
        media: `media_inputs` of one prompt, on the model's device.
        modality: "image" or "audio".
        name: The model, for messages.

    Returns:
        The encoder, with its last block as default exit: `exitsafe.exits.checks` measures the true one.

    Raises:
        ModelError: If there is no encoder, or it has stages or a second tower.
    """
    outputs: list[ModelOutput] = []
    calls = _watch(model, lambda: outputs.append(run_encoder(model, modality, media)))
    found = (
        {path: blocks for path, blocks in _chains(model, calls, num) if blocks != global_blocks(model)}
        for num in (2, 1)
    )
    chains = next((each for each in found if each), {})  # a checkpoint exported at its first exit has one block
    if not chains:
        raise ModelError(f"{name} has no {modality} encoder: none of its lists of blocks runs in order, block by block")
    path = max(reversed(chains), key=lambda each: len(chains[each]))  # of two in sequence the later one
    blocks = chains[path]
    returned = calls[blocks[0]][0].returned
    if not isinstance(returned, Tensor | tuple):
        raise ModelError(
            f"{name}: a block of {path} returns {type(returned).__name__}, and only blocks that return "
            "tensors can be skipped"
        )
    _refuse_second_tower(model, path, blocks, calls, name=name)
    parent = model.get_submodule(path.rpartition(".")[0])
    is_sliced = bool(getattr(parent, "deepstack_visual_indexes", None))
    return Encoder(
        modality=modality,
        path=path,
        num_layers=len(blocks),
        default_exit=len(blocks),
        num_returned=len(returned) if isinstance(returned, tuple) else 0,
        projector=None if is_sliced or reads_across(model) else _projector(model, blocks, calls, _pooled(outputs[0])),
        is_sliced=is_sliced,
        kind=_kind(model, path),
    )


def other_chains(model: MultimodalModel, encoder: Encoder, run: Callable[[], object]) -> dict[str, Tensor]:
    """The last outputs of the other lists of like blocks that `run` goes through, by path."""
    calls = _watch(model, run)
    return {
        path: output
        for path, blocks in _chains(model, calls)
        if not f"{path}.".startswith(f"{encoder.path}.") and len({type(block) for block in blocks}) == 1
        if (output := calls[blocks[-1]][0].output) is not None
    }


def first_tensor(value: object) -> Tensor | None:
    """A tensor itself, or the first one inside a tuple, list or output."""
    if isinstance(value, Tensor):
        return value
    values: Sequence[object] = tuple(value.values()) if isinstance(value, dict) else ()
    values = value if isinstance(value, tuple | list) else values
    return next((found for each in values if (found := first_tensor(each)) is not None), None)


def _watch(model: nn.Module, run: Callable[[], object]) -> _Calls:
    """The calls of every module outside the blocks, and of the blocks."""
    calls: _Calls = {}

    def keep(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], returned: object) -> None:
        calls.setdefault(module, []).append(_Call(given=first_tensor((args, kwargs)), returned=returned))

    with ExitStack() as hooks:
        for module in _outside_blocks(model):
            hooks.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        run()
    return calls


def _outside_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, down to the items of its innermost lists."""
    for child in model.children():
        yield child
        is_block = isinstance(model, nn.ModuleList | nn.Sequential) and not _holds_list(child)
        if not is_block:
            yield from _outside_blocks(child)


def _holds_list(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.ModuleList | nn.Sequential) and len(inner) > 2 for inner in module.modules())


def _chains(model: nn.Module, calls: _Calls, num_blocks: int = 2) -> Iterator[tuple[str, list[nn.Module]]]:
    """The lists of at least `num_blocks` blocks that ran once each, in order, each on the output of the one before, all
    of one shape."""
    for path, module in model.named_modules():
        blocks = list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if len(blocks) < num_blocks or any(len(calls.get(block, ())) != 1 for block in blocks):
            continue
        ran = [calls[block][0] for block in blocks]
        in_order = all(one.output is not None and one.output is two.given for one, two in pairwise(ran))
        shapes = {None if each is None else each.shape for call in ran for each in (call.given, call.output)}
        if in_order and len(shapes) == 1 and all(any(True for _ in block.parameters()) for block in blocks):
            yield path, blocks


def _refuse_second_tower(model: nn.Module, path: str, blocks: Sequence[nn.Module], calls: _Calls, *, name: str) -> None:
    """Refuse a model that has blocks of the encoder's class elsewhere, which this medium did not reach."""
    kinds = {type(block) for block in blocks}
    for other, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or other == path:
            continue
        if {type(block) for block in module} & kinds and not any(block in calls for block in module):
            raise ModelError(f"{name} has two encoders, {path} and {other}, and an exit would shorten only one of them")


def _projector(model: MultimodalModel, blocks: Sequence[nn.Module], calls: _Calls, features: Tensor) -> str | None:
    """The outermost module after the blocks that maps features, by linear layers, to the language model's width."""
    width, of_encoder = features.shape[-1], _width(calls[blocks[-1]][0].output)
    finished = list(calls)  # in the order in which they finished
    found: list[nn.Module] = []
    for module in finished[finished.index(blocks[-1]) + 1 :]:
        given, output = calls[module][0].given, calls[module][0].output
        parts = set(module.modules())
        is_linear = blocks[0] not in parts and any(isinstance(part, nn.Linear) for part in parts)
        if not is_linear or len(calls[module]) > 1 or output is None or _width(output) != width:
            continue
        # a pooling head beside the projector makes one token of all
        if _width(given) % of_encoder == 0 and 2 * output.numel() >= features.numel():
            found = [each for each in found if each not in parts] + [module]
    names = {module: path for path, module in model.named_modules()}
    return names[found[0]] if found else None


def _pooled(output: ModelOutput) -> Tensor:
    """The features of all pictures, (tokens, H)."""
    pooled = embeddings_in(output)
    parts = list(pooled) if isinstance(pooled, list | tuple) else [pooled]
    return torch.cat([part.flatten(0, -2) for part in parts])


def _width(tensor: Tensor | None) -> int:
    return 0 if tensor is None or not tensor.is_floating_point() else tensor.shape[-1]


def _kind(model: MultimodalModel, path: str) -> str:
    """The model type in the config of the module that owns the blocks."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        config: object = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if found := str(getattr(config, "model_type", "")):
            return found
    return str(model.config.model_type)
