"""`load_vlm`: a Hub id, a local folder or a built-in organism -> a `VLM`."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.peft_utils import find_adapter_config_file

from exitsafe.engine.checks import checks_key, keep_checks, kept_checks, run_checks
from exitsafe.engine.generation import ignored_settings
from exitsafe.engine.processor import check_processor, load_processor
from exitsafe.engine.templates import check_template, prepare
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError, first_line
from exitsafe.exits.adapters import check_folder, load_adapter, note_other_model, read_trained_on
from exitsafe.exits.model import bare_model
from exitsafe.exits.sources import check_adapter_source, check_model_source, unreachable
from exitsafe.exits.translator_files import load_translators
from exitsafe.machine.devices import check_quantization, find_device, find_dtype
from exitsafe.world import model_folder
from exitsafe.world.profile import is_organism

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, TorchAoConfig

    from exitsafe.exits.huggingface import MultimodalModel

_DECIDING = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")  # code runs with trust_remote_code
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
)
"""What the libraries raise for corrupt files, impossible configs, missing parts and missing devices."""


def load_vlm(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    translators: str | Path | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantization: str | None = None,
    encoder: str = "image",
    trust_remote_code: bool = False,
    offload_decoder: bool = False,
) -> VLM:
    """Load a vision-language model so that it can exit its encoder early.

    Args:
        name_or_path: A Hub id, a folder written by `save_pretrained`, `organism` or `organism:text`. The organisms are
            too small to gain from several threads and set torch to one.
        adapter: A PEFT adapter folder or Hub id.
        translators: A folder that `exitsafe translate` wrote for this model.
        revision: Branch, tag or commit of a Hub model; None is the main branch.
        dtype: "auto" (as saved), or e.g. "bfloat16".
        device: "auto" (this process's GPU, else the CPU), or e.g. "cuda:1".
        quantization: None, "nf4" or "int8" (bitsandbytes), or "torchao-int8"; the image encoder is not quantized.
        encoder: The encoder whose exits to use: "image", which also encodes video, or "audio".
        trust_remote_code: Whether code from the checkpoint may run. Only safetensors are loaded either way.
        offload_decoder: Leave the language model's weights on disk and read them, layer by layer, whenever it runs: for
            an audit whose answers come from a server. The check of generation, which would run it often, is left out.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: If the model cannot be loaded, it has no encoder whose exits can be proven, the processor does not
            fit the model, an adapter's weights are incomplete, or the translators belong to another model.
        InputError: If the device, number type, quantization or encoder is unknown, or this machine has no such GPU.
    """
    if encoder not in ("image", "audio"):
        raise InputError(f"encoder={encoder!r} is unknown; choose image (which video shares) or audio")
    where_to, as_type = find_device(device), find_dtype(dtype) or "auto"
    check_quantization(quantization)
    if offload_decoder and quantization is not None:
        raise InputError("a language model that stays on disk cannot be quantized; leave quantization out")
    source = str(model_folder(name_or_path)) if is_organism(name_or_path) else str(name_or_path)
    where = Path(source)
    check_model_source(source)
    if adapter is not None:
        check_adapter_source(str(adapter))
    if where.is_dir() and revision is not None:
        raise ModelError(f"{source} is a folder and has no revisions; leave revision out")
    remote: dict[str, str | bool] = {"trust_remote_code": trust_remote_code}
    if not where.is_dir():
        remote["revision"] = revision or "main"
    prepare()
    if is_organism(name_or_path):
        torch.set_num_threads(1)  # with a million parameters, threads only wait for each other
    try:
        adapter_folder = None if adapter is None else _adapter_folder(adapter)
        config = AutoConfig.from_pretrained(source, **remote)
        check_no_adapter(source, revision=None if where.is_dir() else revision or "main")
        places: dict[str, Any] | None = {"": where_to} if quantization else None
        if offload_decoder:
            places = _decoder_on_disk(_without_weights(config, **remote), where_to)
        model: Any = auto_class(config).from_pretrained(
            source,
            dtype=as_type,
            use_safetensors=True,
            quantization_config=_quantization_config(quantization, config, **remote),
            device_map=places,
            **remote,
        )
        if offload_decoder:
            del model.hf_device_map  # PEFT would place the model anew, which needs all weights
        model = model.to(where_to) if places is None else model
        processor = load_processor(source, config, **remote)
        if adapter_folder is not None:
            model = load_adapter(model, adapter_folder)
            note_other_model(adapter_folder, str(name_or_path))
    except SafetensorError as error:
        reason = f"a weights file is truncated or corrupt ({first_line(error)}); save or download it again"
        raise ModelError(f"cannot load {name_or_path!s}: {reason}") from error
    except LOADING_ERRORS as error:
        raise ModelError(unreachable(source, error) or f"cannot load {name_or_path!s}: {first_line(error)}") from error
    check_template(processor, today=date.today().isoformat())
    checkpoint_hash = hash_files(where) if where.is_dir() else getattr(config, "_commit_hash", None)
    bare = bare_model(model)
    key = checks_key(
        checkpoint_hash,
        modality=encoder,
        code=f"{type(bare).__module__}.{type(bare).__qualname__}",  # the checkpoint's own, with trust_remote_code
        attention=bare.config._attn_implementation,
        dtype=str(bare.dtype),
        device=torch.device(where_to).type,
        quantization=quantization,
    )
    # weights that nothing identifies are checked every time
    known, since = None if checkpoint_hash is None else kept_checks(key, bare), time.perf_counter()
    vlm = VLM(
        model.eval(),
        processor,
        name=str(name_or_path),
        encoder=None if known is None else known.encoder,
        modality=encoder,
        checkpoint_hash=checkpoint_hash,
        adapter_hash=None if adapter_folder is None else hash_files(adapter_folder),
    )
    for remark in check_processor(vlm):
        warnings.warn(remark, stacklevel=2)
    if known is None and not offload_decoder:
        known, vlm.is_newly_checked = run_checks(vlm, since=since), True
        if checkpoint_hash is not None:
            keep_checks(key, known)
    if known is not None:
        vlm.checks, vlm.can_pad = known, known.can_pad
    if ignored := ignored_settings(vlm.base_model.generation_config):
        warnings.warn(
            f"{name_or_path!s}: exitsafe ignores these generation settings of the checkpoint, which would change "
            f"greedy answers: {', '.join(ignored)}",
            stacklevel=2,
        )
    if translators is not None:
        vlm.translators = load_translators(vlm, translators)
    folders = [where if where.is_dir() else None, adapter_folder, None if translators is None else Path(translators)]
    vlm.adapter = adapter_folder
    vlm.trained_on = frozenset().union(*(read_trained_on(folder) for folder in folders if folder is not None))
    return vlm


def auto_class(config: PretrainedConfig) -> type[AutoModelForImageTextToText | AutoModelForMultimodalLM]:
    """The class that loads a model: most are registered as image-text-to-text, audio-only ones as multimodal."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForMultimodalLM


def as_vlm(model: VLM | str | Path) -> VLM:
    """The model itself, or the one of that name."""
    return load_vlm(model) if isinstance(model, str | Path) else model


def check_no_adapter(source: str, *, revision: str | None) -> None:
    """Refuse a model folder that contains an adapter.

    transformers would silently apply it and, for a Hub id, load whichever model the adapter's config names.

    Raises:
        ModelError: If it contains one.
    """
    if find_adapter_config_file(source, revision=revision) is not None:
        raise ModelError(
            f"{source} contains an adapter (adapter_config.json): give its base model, and {source} as --adapter"
        )


def hash_files(folder: Path) -> str:
    """SHA-256 over names and contents of the files that affect answers: weights, configs, tokenizer, templates."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _DECIDING and path.is_file()):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _adapter_folder(adapter: str | Path) -> Path:
    """The adapter's files, from the Hub if `adapter` is not a folder; safetensors only, as for models."""
    folder = Path(adapter)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(adapter), allow_patterns=["*.json", "*.safetensors"]))
        except LOADING_ERRORS as error:
            reason = f"{adapter} is not a local folder, and the Hub did not provide it: {first_line(error)}"
            raise ModelError(f"adapter {unreachable(str(adapter), error) or reason}") from error
    check_folder(folder, name=str(adapter))
    return folder


def _quantization_config(
    quantization: str | None, config: PretrainedConfig, **remote: str | bool
) -> BitsAndBytesConfig | TorchAoConfig | None:
    if quantization is None:
        return None
    from transformers import BitsAndBytesConfig, TorchAoConfig

    # The encoder's features must not change, so whatever is not the language model stays as it is.
    model = _without_weights(config, **remote)
    head = model.get_output_embeddings()  # which some decoders contain
    whole = [*outside_decoder(model), *(name for name, module in model.named_modules() if module is head)]
    if quantization == "torchao-int8":
        try:
            from torchao.quantization import Int8WeightOnlyConfig
        except ImportError as error:
            raise ModelError('torchao-int8 needs torchao: pip install "exitsafe[quantization]"') from error
        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=whole)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=whole,
    )


def _without_weights(config: PretrainedConfig, **remote: str | bool) -> MultimodalModel:
    with torch.device("meta"):
        model: MultimodalModel = auto_class(config).from_config(config, trust_remote_code=remote["trust_remote_code"])
    return model


def _decoder_on_disk(model: MultimodalModel, device: torch.device | str) -> dict[str, str]:
    """A device map: the language model and its head stay on disk, everything else goes to the device."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    around = [module for module in names if module is not decoder and decoder in set(module.modules())]
    own = [f"{names[each]}.{name}".lstrip(".") for each in around for name, _ in each.named_parameters(recurse=False)]
    parts = [*own, *outside_decoder(model)]
    return dict.fromkeys(parts, str(device)) | {names[decoder]: "disk", names[head]: "disk"}


def outside_decoder(model: MultimodalModel) -> list[str]:
    """The names of the largest modules outside the language model's decoder: encoder, projector, head."""
    decoder = model.get_decoder()

    def names(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if child is decoder:
                continue
            if decoder in set(child.modules()):
                yield from names(child, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    return list(names(model, ""))
