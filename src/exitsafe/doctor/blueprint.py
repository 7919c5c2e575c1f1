"""A model's blueprint: what can be known of it without its weights.

A Hub id, a folder or an organism in; a `VLM` out whose encoder and projector have random weights, so that they can be
run, and whose language model is on torch's meta device, on which every operation gives shapes instead of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from exitsafe.engine.load import LOADING_ERRORS, auto_class, outside_decoder
from exitsafe.engine.processor import check_processor, load_processor
from exitsafe.engine.templates import check_template
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ModelError, first_line
from exitsafe.exits.sources import check_model_source, unreachable
from exitsafe.machine.devices import check_quantization, find_dtype
from exitsafe.machine.memory import SHARE, free_memory
from exitsafe.world import model_folder
from exitsafe.world.profile import is_organism

if TYPE_CHECKING:
    from exitsafe.exits.huggingface import MultimodalModel

META = torch.device("meta")


class Blueprint(VLM):
    """A `VLM` without its weights. Its exits are proven with random ones; generation is not."""

    image_states: Tensor | None = None
    """(rows, tokens, H), for models that read images by cross-attention."""
    quantization: str | None = None
    remarks: Sequence[str] = ()
    """Warnings from `check_processor`."""

    def read_tokens(self, num_rows: int, num_tokens: int) -> Tensor:
        """Last hidden states of the language model, (rows, tokens, H)."""
        dtype = self.base_model.dtype
        images = {}
        if self.image_states is not None:
            images = {"cross_attention_states": self.image_states.expand(num_rows, -1, -1)}
        outputs = self.base_model.get_decoder()(
            inputs_embeds=torch.empty(num_rows, num_tokens, self.text_config.hidden_size, dtype=dtype, device=META),
            attention_mask=torch.ones(num_rows, 1, num_tokens, num_tokens, dtype=torch.bool, device=META),
            position_ids=torch.zeros(num_rows, num_tokens, dtype=torch.long, device=META),
            use_cache=False,
            **images,
        )
        hidden: Tensor = outputs.last_hidden_state
        return hidden


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of a model's weights and buffers, by part."""

    encoder: int
    language_model: int
    rest: int = field(metadata={"of": "projector, head, embeddings that are not the language model's"})

    @property
    def total(self) -> int:
        return self.encoder + self.language_model + self.rest


def load_blueprint(
    name_or_path: str | Path,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    encoder: str = "image",
    trust_remote_code: bool = False,
) -> Blueprint:
    """Read the config and the processor, but no weights.

    Args:
        name_or_path: As for `load_vlm`; a folder or repository without weights is enough.
        encoder: As for `load_vlm`.
        dtype, quantization: As for `load_vlm`.
        revision: Branch, tag or commit of a Hub model.
        trust_remote_code: Whether code from the checkpoint may run.

    Raises:
        ModelError: If there is no config or processor, or no encoder can be found in it.
        InputError: If the number type or quantization is unknown.
    """
    as_type = find_dtype(dtype)
    check_quantization(quantization)
    source = str(model_folder(name_or_path)) if is_organism(name_or_path) else str(name_or_path)
    check_model_source(source)
    remote: dict[str, str | bool] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        remote["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(source, **remote)
        wanted = as_type or getattr(config, "dtype", None) or torch.float32
        with META:
            model = auto_class(config).from_config(config, dtype=wanted, trust_remote_code=trust_remote_code).eval()
        _make_encoder(model, name=str(name_or_path))
    except LOADING_ERRORS as error:
        reason = f"cannot read the config of {name_or_path!s}: {first_line(error)}"
        raise ModelError(unreachable(source, error) or reason) from error
    processor = load_processor(source, config, **remote)
    check_template(processor, today=date.today().isoformat())
    blueprint = Blueprint(model, processor, name=str(name_or_path), modality=encoder)
    blueprint.quantization = quantization
    blueprint.remarks = check_processor(blueprint)
    return blueprint


@torch.no_grad()
def _make_encoder(model: MultimodalModel, *, name: str) -> None:
    """Give everything but the language model random weights in main memory.

    Raises:
        ModelError: If they do not fit there.
    """
    parts = [model.get_submodule(path) for path in outside_decoder(model)]
    head = model.get_output_embeddings()
    parts = [part for part in parts if part is not head]
    size = sum(tensor.nbytes for part in parts for tensor in part.parameters())
    if size > SHARE * free_memory(torch.device("cpu")):
        raise ModelError(
            f"{name}: its encoder takes {size / 1e9:.1f} GB, which does not fit in main memory; run doctor on a "
            "machine with more"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in parts:
            part.to_empty(device="cpu")
            for buffer in part.buffers():
                buffer.zero_()
            _initialise(part, model._init_weights)
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
                else:
                    parameter.fill_(0.5)

    own = [module for module in model.modules() if model.get_decoder() in set(module.children())]
    for module in own:  # weights of the model itself, outside its parts, such as a row separator
        for name, parameter in module.named_parameters(recurse=False):
            made = torch.randn(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(made, requires_grad=False))


def _initialise(module: nn.Module, initialise: Callable[[nn.Module], None]) -> None:
    """Set a module's buffers (positions, rotary frequencies) as transformers does for those that a checkpoint lacks."""
    if isinstance(module, PreTrainedModel):
        initialise = cast("Callable[[nn.Module], None]", module._init_weights)
    for child in module.children():
        _initialise(child, initialise)
    initialise(module)


def weights_of(blueprint: Blueprint) -> Weights:
    """Bytes of the weights as loaded: with quantization, the language model's linear layers are quantized."""
    model = blueprint.base_model
    parts = dict.fromkeys(("encoder", "language_model", "rest"), 0)
    decoder = set(model.get_decoder().parameters()) | set(model.get_decoder().buffers())
    tower = set(blueprint.tower.parameters()) | set(blueprint.tower.buffers())
    quantized: dict[Tensor, nn.Linear] = {}
    if blueprint.quantization is not None:
        linears = (model.get_submodule(name) for name in blueprint.linear_layers)
        quantized = {module.weight: module for module in linears if isinstance(module, nn.Linear)}
    for tensor in (*model.parameters(), *model.buffers()):
        part = "language_model" if tensor in decoder else "encoder" if tensor in tower else "rest"
        linear = quantized.get(tensor)
        parts[part] += tensor.nbytes if linear is None else quantized_bytes(linear, str(blueprint.quantization))
    return Weights(**parts)


def quantized_bytes(linear: nn.Linear, quantization: str) -> int:
    """Bytes of a quantized weight.

    bitsandbytes nf4: half a byte per number, a float32 scale per 64 numbers, and a table of 16; bitsandbytes int8: a
    byte per number and a float32 scale per row; torchao int8: the same with scales in the weight's own type.
    """
    count = linear.weight.numel()
    if quantization == "torchao-int8":
        return count + linear.weight.element_size() * linear.out_features
    if quantization == "nf4":
        return -(-count // 2) + 4 * -(-count // 64) + 16 * 4
    return count + 4 * linear.out_features
