"""The encoder and projector of a slim model in, llama.cpp's file for them out (mmproj, a GGUF file).

The language model is not written: llama.cpp's own converter makes it from the slim checkpoint. That converter's encoder
files are not used, because llama.cpp runs one block less than they contain if `clip.vision.feature_layer` is missing,
and applies a final norm that the model at this exit does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exitsafe.errors import InputError, ModelError

if TYPE_CHECKING:
    from exitsafe.exits.huggingface import MultimodalModel

MMPROJ = "mmproj.gguf"
"""The file's name in the folder of a slim checkpoint."""
_TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Encoders of LLaVA that can be written, with the features that their projector must read."""
_IDEFICS = ("idefics3", "smolvlm")
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
"""What llama.cpp calls the type of most tensors."""
_GELU = {"quick_gelu": False, "gelu_pytorch_tanh": True, "gelu": True}


def check_can_be_written(config: Any) -> None:
    """Check before the work what `write_mmproj` requires.

    Raises:
        InputError: If the package gguf is missing.
        ModelError: If llama.cpp would not compute what this model does, or the layout is not known.
    """
    _gguf()
    if problem := next(_problems(config), None):
        raise ModelError(
            f"--to gguf cannot write this {config.model_type} model: {problem}; leave --to out, and see what else can "
            "load the checkpoint"
        )


def _problems(config: Any) -> Iterator[str]:
    """Why a model cannot be written, if so."""
    if config.model_type not in ("llava", *_IDEFICS):
        yield "it can write LLaVA with a CLIP or SigLIP tower, Idefics3 and SmolVLM"
        return
    vision = config.vision_config
    if vision.hidden_act not in _GELU:
        yield f"llama.cpp has no {vision.hidden_act} activation in an encoder"
    if config.model_type in _IDEFICS:
        return
    if vision.model_type not in _TOWERS:
        yield f"its encoder is a {vision.model_type}, not CLIP or SigLIP"
    elif config.vision_feature_select_strategy != (wanted := _TOWERS[vision.model_type]):
        yield f"its projector does not read the features that llama.cpp gives it ({wanted})"
    if not isinstance(config.vision_feature_layer, int):
        yield "its projector reads several layers"
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        yield "its projector is not two linear layers with biases and a GELU between them"


def write_mmproj(slim: MultimodalModel, processor: Any, path: Path, *, facts: Mapping[str, str | int | None]) -> None:
    """Write the encoder, which ends at its last block, and the projector of a slim model.

    Args:
        slim: The model that ends at the exit.
        processor: Its processor, for the pixels' mean, standard deviation and size.
        path: The new file.
        facts: What it was made from, kept in the file as `exitsafe.NAME`; None is left out.
    """
    gguf = _gguf()
    config: Any = slim.config
    vision, images = config.vision_config, processor.image_processor
    depth = int(vision.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(_FILE_TYPES[slim.dtype])
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_block_count(depth)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_mean([float(value) for value in images.image_mean])
    writer.add_vision_image_std([float(value) for value in images.image_std])
    writer.add_vision_use_gelu(_GELU[vision.hidden_act])
    if config.model_type in _IDEFICS:
        writer.add_clip_projector_type(gguf.VisionProjectorType.IDEFICS3)
        writer.add_vision_projector_scale_factor(config.scale_factor)
        writer.add_vision_preproc_image_size(images.size["longest_edge"])
    else:
        writer.add_clip_projector_type("mlp")
        writer.add_bool("clip.has_llava_projector", True)
        writer.add_array("clip.vision.feature_layer", [depth])  # without it, it would run one block less
    for name, value in facts.items():
        if isinstance(value, int):
            writer.add_uint32(f"exitsafe.{name}", value)
        elif value is not None:
            writer.add_string(f"exitsafe.{name}", value)
    for name, tensor in _tensors(slim, gguf, depth).items():
        if tensor.dtype == torch.bfloat16:  # a type that NumPy does not have
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(slim: MultimodalModel, gguf: Any, depth: int) -> dict[str, Tensor]:
    """The tensors under llama.cpp's names: matrices in their own type, the rest in float32."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, depth)
    found = {}
    for name, tensor in slim.state_dict().items():
        known = _hub_name(name)
        written = _PROJECTOR.get(known) or names.get_name(known, try_suffixes=(".weight", ".bias"))
        is_llava = slim.config.model_type == "llava"
        if written is None or not written.startswith(("v.", "mm.")) or (is_llava and written.startswith("v.post_ln")):
            continue  # the language model; LLaVA reads a block's output, without the encoder's last norm
        is_matrix = tensor.dim() == 2 and "position" not in written
        tensor = tensor.detach().cpu()
        found[written] = (tensor if is_matrix else tensor.float()).contiguous()
    return found


_PROJECTOR = {
    f"multi_modal_projector.linear_{number}.{kind}": f"mm.{2 * (number - 1)}.{kind}"
    for number in (1, 2)
    for kind in ("weight", "bias")
}


def _hub_name(name: str) -> str:
    """A tensor's name in the Hub's checkpoints, by which the package gguf knows it."""
    name = re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def _gguf() -> Any:
    try:
        import gguf.quants
    except ImportError as error:
        raise InputError('--to gguf needs the package gguf: pip install "exitsafe[gguf]"') from error
    return gguf
