"""A PEFT adapter folder: adapter_config.json, adapter_model.safetensors and, if known, trained_on.json.

An adapter is applied in full or refused: PEFT itself only warns about missing weights and drops those that match
nothing. `trained_on.json` lists the digests of the samples that the adapter was trained on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exitsafe.errors import ModelError, first_line
from exitsafe.machine.memory import is_out_of_memory
from exitsafe.untrusted import JsonObject, UnreadableError, read_json

if TYPE_CHECKING:
    from exitsafe.exits.huggingface import MultimodalModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED_ON = "trained_on.json"
NAME = "default"
"""PEFT's name for the adapter."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ELSEWHERE = ("megatron_config", "adapters", "tokenizer_name_or_path", "prompt_tuning_init_state_dict_path")
"""Fields that make PEFT import a module, or load another adapter, a tokenizer or a pickle."""
PATTERN_SECONDS = 10.0
"""Longest time to match an adapter's patterns with the model's module names; usually a hundredth of it is enough."""
_NAME = re.compile(r"[\w./: -]*")
_MATCHING = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
forms = r"(.*\.)?(PATTERN)$", r"(^|.*\.)PATTERN($|\..*)", r"(^|.*?\.)PATTERN\.(\d+)\.", r".*\.PATTERN$"
for pattern in patterns:
    for form in ("PATTERN", *forms):
        try:
            compiled = re.compile(form.replace("PATTERN", pattern))
        except Exception:
            continue
        for name in names:
            compiled.fullmatch(name) if form == "PATTERN" else compiled.match(name)
"""
"""Every way in which PEFT matches a string from a config, run in a process that can be stopped."""
_EMBEDDINGS = re.compile(r"\b(embed_tokens|lm_head)\b")


def check_folder(folder: Path, *, name: str) -> None:
    """Raise ModelError if a file is missing, or the config makes PEFT load anything from elsewhere.

    Args:
        folder: Where the files are.
        name: The adapter as the user gave it, for messages.
    """
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(f"{name} has no {file}: give a PEFT adapter folder saved as safetensors")
    if named := [field for field in _ELSEWHERE if _config(folder).get(field)]:
        raise ModelError(
            f"{name}/{CONFIG} makes PEFT load code or weights from elsewhere ({', '.join(named)}): give an "
            "adapter whose files are all in its folder"
        )


def trained_on_record(digests: Iterable[str]) -> bytes:
    """The content of `trained_on.json`: hashes only, no text."""
    return json.dumps({"digests": sorted(set(digests))}, indent=0).encode() + b"\n"


def read_trained_on(folder: Path) -> frozenset[str]:
    """Digests of the samples that an adapter, translators, or a model exported with either was trained on.

    Returns:
        The digests recorded in the folder; empty if there is no record.

    Raises:
        ModelError: If the record is damaged.
    """
    file = folder / TRAINED_ON
    if not file.is_file():
        return frozenset()
    try:
        digests = read_json(file)["digests"]
        is_sound = all(_DIGEST.fullmatch(digest) for digest in digests)
    except (UnreadableError, KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise ModelError(f"{file} is damaged: save or download the folder again")
    return frozenset(digests)


def load_adapter(model: MultimodalModel, folder: Path) -> PeftModel:
    """Load a PEFT folder onto a Hugging Face model.

    Raises:
        ModelError: If a weight in the file matches nothing or is not finite, or if one is missing.
    """
    config = _read_config(folder)
    _check_patterns(model, folder)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    try:
        _check_rank(config, shapes, folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*which is a no-op")  # said of the weights that are filled below
            adapted = PeftModel(model, config, NAME)
            found = adapted.load_adapter(str(folder), NAME, torch_device="cpu")
        _fill(adapted, folder)
    except SafetensorError as error:
        raise _unreadable(folder, error) from error
    except (ModelError, TimeoutError):  # the caller may have set an alarm
        raise
    except Exception as error:  # PEFT trusts the file: a wrong value may raise any exception
        if is_out_of_memory(error):
            raise
        raise _misfit(folder, _reason(error)) from error
    _check_complete(adapted, folder, in_file=shapes.keys(), missing=found.missing_keys, extra=found.unexpected_keys)
    _check_numbers(adapted, folder)
    return adapted


def _fill(model: PeftModel, folder: Path) -> None:
    """Give an adapter its weights where PEFT made it without: beside weights that stay on disk.

    Raises:
        ValueError: If the adapter has weights there that are not in the file under its own names.
    """
    empty = {name: tensor for name, tensor in model.named_parameters() if tensor.is_meta and f".{NAME}" in name}
    if not empty:
        return
    device = next(tensor.device for tensor in model.parameters() if not tensor.is_meta)
    with safe_open(folder / WEIGHTS, "pt") as file:
        in_file = set(file.keys())
        for name, tensor in empty.items():
            key = name.replace(f".{NAME}", "")
            if key not in in_file or list(tensor.shape) != file.get_slice(key).get_shape():
                raise ValueError(f"{_inner_name(key)} cannot be read beside a language model that stays on disk")
            module, _, leaf = name.rpartition(".")
            found = file.get_tensor(key).to(device, tensor.dtype)
            setattr(model.get_submodule(module), leaf, torch.nn.Parameter(found, requires_grad=False))


def _read_config(folder: Path) -> PeftConfig:
    """The config of an adapter of a supported type.

    Raises:
        ModelError: If it is damaged or of another type.
    """
    stored = _config(folder)
    kind = stored.get("peft_type")
    if kind not in list(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ModelError(
            f"{folder / CONFIG} has peft_type {kind!r}, which this version of PEFT does not support: upgrade peft, "
            "or save or download the adapter again"
        )
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        value = stored.get(field, 1)
        numbers = value.values() if isinstance(value, dict) else [value]
        if not all(type(number) in (int, float) for number in numbers):
            raise ModelError(f"{folder / CONFIG}: {field} is not a number; save or download the adapter again")
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise ModelError(
            f"{folder / CONFIG} cannot be read ({first_line(error)}): save or download the adapter again"
        ) from error
    if config.is_prompt_learning or config.is_adaption_prompt or kind == "XLORA":
        raise ModelError(
            f"{folder} is a {kind} adapter, which changes the prompt or mixes other adapters: use one that changes "
            "weights, such as LoRA"
        )
    config.inference_mode = True
    return config


def _check_patterns(model: MultimodalModel, folder: Path) -> None:
    """Refuse patterns that take forever: PEFT matches strings from the config with the names of all modules.

    Every string may be used as a pattern, whatever its field: that depends on the type of adapter.

    Raises:
        ModelError: If matching takes too long.
    """
    patterns = [text for text in _strings(_config(folder)) if not _NAME.fullmatch(text)]
    if not patterns:
        return
    request = json.dumps([patterns, [name for name, _ in model.named_modules()]])
    try:
        subprocess.run(  # noqa: S603 - our own lines
            [sys.executable, "-I", "-S", "-c", _MATCHING],
            input=request.encode(),
            stderr=subprocess.DEVNULL,
            timeout=PATTERN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"{folder / CONFIG} contains a pattern that takes more than {PATTERN_SECONDS:g} seconds to match: replace "
            "it with plain module names, or use an adapter that you trust"
        ) from error


def _strings(value: object) -> Iterator[str]:
    """All strings in a JSON value, including the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(each)


def _check_rank(config: PeftConfig, shapes: Mapping[str, Sequence[int]], folder: Path) -> None:
    """Check the config's rank, for which PEFT allocates memory before it reads a weight: a wrong one may exhaust it."""
    if not shapes:
        raise ModelError(f"{folder / WEIGHTS} has no weights: save or download the adapter again")
    ranks = [getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()]
    largest = max(max(shape, default=1) for shape in shapes.values())
    for rank in ranks:
        if isinstance(rank, int) and rank > largest:
            raise _misfit(folder, f"{CONFIG} says rank {rank}, but no weight in the file has more than {largest} rows")


def _check_complete(
    model: PeftModel,
    folder: Path,
    *,
    in_file: Collection[str],
    missing: Sequence[str],
    extra: Sequence[str],
) -> None:
    """Check that the file has every weight of the adapter, and that the adapter uses every weight in the file."""
    wanted: Collection[str] = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False).keys()
    # loading translates the names of older model versions, so compare the sets only if their sizes differ
    if not missing and not extra and len(in_file) != len(wanted):
        missing = sorted(set(wanted) - set(in_file))
        # PEFT saves enlarged embeddings of the base model too
        extra = sorted(key for key in set(in_file) - set(wanted) if not _EMBEDDINGS.search(key))
    missing = [key for key in missing if "vblora_vector_bank" not in key]  # saved once for all layers
    parts = [
        f"{len(keys)} of {count} {what} ({_first_names(keys)})"
        for keys, count, what in (
            (missing, len(wanted), "adapter weights are missing from the file"),
            (extra, len(in_file), "weights in the file match nothing in the model's adapter"),
        )
        if keys
    ]
    if parts:
        raise _misfit(folder, "; ".join(parts))


def _check_numbers(model: PeftModel, folder: Path) -> None:
    """Refuse weights that are not finite; warn about an adapter that changes nothing."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    if broken := [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise ModelError(
            f"{len(broken)} of {len(weights)} weights of {folder} contain NaN or infinity "
            f"({_first_names(broken)}): use an earlier training checkpoint, or train again"
        )
    is_lora = all(".lora_" in key for key in weights)
    if is_lora and not any(tensor.any() for key, tensor in weights.items() if ".lora_A" not in key):
        warnings.warn(
            f"adapter {folder} changes nothing: every lora_B weight is zero, as before any training", stacklevel=4
        )


def note_other_model(folder: Path, name: str) -> None:
    """Warn about an adapter made for another model; its shapes may still fit, as for a fine-tuned variant."""
    made_for = _config(folder).get("base_model_name_or_path")
    if isinstance(made_for, str) and _model_name(made_for) not in ("", _model_name(name)):
        warnings.warn(
            f"adapter {folder} was made for {made_for}, but the model is {name}: unless one is a copy of the other, "
            "the adapter was trained on different weights",
            stacklevel=4,
        )


def _model_name(name: str) -> str:
    """The part of an id or a path that stays the same when a model is copied.

    >>> [_model_name(name) for name in ("some/Model-7b", "/data/model-7b", "models--some--Model-7b/snapshots/01a")]
    ['model-7b', 'model-7b', 'model-7b']
    """
    if cached := re.search(r"models--([^/\\]+)", name):  # in the Hub's cache, folders are named by commit
        return cached[1].rpartition("--")[2].lower()
    return Path(name).name.lower()


def _unreadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"cannot load {folder}: {WEIGHTS} is truncated or corrupt ({first_line(error)}); save or download it again"
    )


def _misfit(folder: Path, reason: str) -> ModelError:
    made_for = _config(folder).get("base_model_name_or_path")
    origin = f"; it was made for {made_for}" if made_for else ""
    return ModelError(
        f"adapter {folder} does not fit this model: {reason}{origin}; use the adapter's own model, or save or download "
        "the adapter again"
    )


def _reason(error: Exception) -> str:
    """PEFT's message, shortened."""
    text = str(error)
    if isinstance(error, KeyError):
        return f"the weight {_inner_name(str(error.args[0]))} is missing from the file"
    if shapes := re.findall(
        r"size mismatch for (\S+): copying a param with shape (\S+.*?) from.*? is (\S+.*?)\.", text
    ):
        key, in_file, in_model = shapes[0]
        there, wanted = (shape.removeprefix("torch.Size(").removesuffix(")") for shape in (in_file, in_model))
        return f"{len(shapes)} weights have a different shape ({_inner_name(key)}: {there} in the file, {wanted} here)"
    return first_line(error)


def _first_names(keys: Sequence[str], limit: int = 3) -> str:
    names = [_inner_name(key).replace(f".{NAME}.", ".") for key in keys[:limit]]
    return ", ".join([*names, "..."] if len(keys) > limit else names)


def _inner_name(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _config(folder: Path) -> JsonObject:
    try:
        return read_json(folder / CONFIG)
    except UnreadableError as error:
        raise ModelError(f"{folder / CONFIG} cannot be read ({error}): save or download the adapter again") from error
