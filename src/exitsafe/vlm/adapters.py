"""PEFT adapters: one for all exits, or one per exit layer, of which the exit's own acts.

    FOLDER/adapter_config.json, adapter_model.safetensors    one adapter for all exits
    FOLDER/layer-03/, FOLDER/layer-08/, ...                  one PEFT folder for each exit that has its own
    FOLDER/trained_on.json                                   digests of the samples it was trained on, if known

An exit without an adapter of its own answers with the base model. An adapter is applied in full or refused: PEFT itself
only warns about missing weights, and drops those that match nothing. Knows nothing about how adapters are trained.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exitsafe.errors import ModelError
from exitsafe.untrusted import UnreadableError, read_json
from exitsafe.vlm.memory import is_out_of_memory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED_ON = "trained_on.json"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ELSEWHERE = ("megatron_config", "adapters", "tokenizer_name_or_path", "prompt_tuning_init_state_dict_path")
"""Fields by which PEFT imports a module, or loads another adapter, a tokenizer or a pickle."""
_SWITCHES = ("_active_adapter", "_disable_adapters")
PATTERN_SECONDS = 10.0
"""Longest time to match an adapter's patterns with the model's module names; usual ones take a hundredth of it."""
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
"""Every way in which PEFT matches a string of a config, in a process that can be stopped."""
_LAYER = re.compile(r"layer-(\d+)")
LINEAR_LAYERS = r".*(?:language_model|text_model)\..*\.(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
_EMBEDDINGS = re.compile(r"\b(embed_tokens|lm_head)\b")
_OF_LANGUAGE_MODEL = ("model.language_model.", "lm_head.")
# What all adapters of one model must share; they may differ in rank and scale.
_SHARED = ("base_model_name_or_path", "peft_type", "target_modules", "modules_to_save")


def load_adapters(model: Any, folder: Path, *, name: str, num_layers: int) -> tuple[PeftModel, ExitAdapters | None]:
    """Put an adapter folder on a model.

    Args:
        model: The Hugging Face model.
        folder: From `check_folder`.
        name: What the user calls the model.
        num_layers: Encoder blocks.

    Returns:
        The adapted model; and, where there is one adapter per exit, what makes each act at its exit.

    Raises:
        ModelError: If an adapter does not fit the model, or adapters per exit do not fit each other.
    """
    folders = exit_folders(folder)
    if not folders:
        adapted = load_adapter(model, folder)
        _note_other_model(folder, name)
        return adapted, None
    if deepest := [found for layer, found in folders.items() if not 1 <= layer <= num_layers]:
        raise ModelError(f"{deepest[-1]} belongs to no exit: this encoder has {num_layers} blocks")
    _check_alike(folders)
    by_exit = {layer: f"layer-{layer:02}" for layer in folders}
    for layer, found in folders.items():
        model = load_adapter(model, found, name=by_exit[layer])
    adapted = model
    _note_other_model(next(iter(folders.values())), name)
    _check_encoder_untouched(adapted, by_exit, folder)
    if bare := [layer for layer in range(1, num_layers + 1) if layer not in by_exit]:
        exits = "exit" if len(bare) == 1 else "exits"
        answers = "answers" if len(bare) == 1 else "answer"
        own = f"has no adapter for {exits} {as_ranges(bare)}"
        warnings.warn(f"{folder} {own}, which {answers} with the base model", stacklevel=3)
    return adapted, ExitAdapters(adapted, by_exit)


class ExitAdapters:
    """Which of a model's adapters acts.

    Args:
        model: With an adapter for each exit in `by_exit`, and no others.
        by_exit: Names of the adapters; at other exits none acts.
    """

    def __init__(self, model: PeftModel, by_exit: Mapping[int, str]) -> None:
        self.by_exit = dict(by_exit)
        self._model: Any = model
        self._layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        tuner: Any = model.base_model
        tuner.disable_adapter_layers()
        self._states: dict[str | None, list[dict[str, Any]]] = {None: self._read()}
        tuner.enable_adapter_layers()
        for name in self.by_exit.values():
            self._model.set_adapter(name, inference_mode=True)  # else PEFT would ask for gradients
            self._states[name] = self._read()
            self._active: str | None = name

    @property
    def active(self) -> str | None:
        """The adapter that acts now; None: the base model alone."""
        return self._active

    @active.setter
    def active(self, name: str | None) -> None:
        if name == self._active:
            return
        # PEFT's own way walks through every adapter of every layer: too slow for a switch at each answer
        for layer, state in zip(self._layers, self._states[name], strict=True):
            vars(layer).update(state)
        if name is not None:
            self._model.active_adapter = self._model.base_model.active_adapter = name
        self._active = name

    def _read(self) -> list[dict[str, Any]]:
        """As PEFT has left its layers: which adapter acts in each, and whether any does."""
        return [{name: getattr(layer, name) for name in _SWITCHES} for layer in self._layers]

    @contextmanager
    def acting(self, name: str | None) -> Iterator[None]:
        """Let one act meanwhile; leaving, also by an exception, puts the other back."""
        before, self.active = self.active, name
        try:
            yield
        finally:
            self.active = before


def check_folder(folder: Path, *, name: str) -> None:
    """Raise ModelError if a file is missing, or it is not clear which adapter acts where.

    Args:
        folder: Where the files are.
        name: What the user calls it.
    """
    folders = exit_folders(folder)
    if folders and (folder / CONFIG).is_file():
        raise ModelError(f"{name} holds an adapter for all exits and {next(iter(folders.values())).name} too: keep one")
    for label, place in {f"{name}/{found.name}": found for found in folders.values()}.items() or [(name, folder)]:
        for file in (CONFIG, WEIGHTS):
            if not (place / file).is_file():
                raise ModelError(f"{label} has no {file}: give a PEFT adapter folder saved as safetensors")
        if named := [field for field in _ELSEWHERE if _config(place).get(field)]:
            raise ModelError(
                f"{label}/{CONFIG} makes PEFT load code or weights from elsewhere ({', '.join(named)}): give an "
                "adapter whose files are all in its folder"
            )


def exit_folders(folder: Path) -> dict[int, Path]:
    """The folders `layer-NN` in an adapter folder by exit layer, ascending; none where one adapter serves all exits."""
    found: dict[int, Path] = {}
    for place in sorted(folder.iterdir()):
        if (match := _LAYER.fullmatch(place.name)) and place.is_dir():
            if (layer := int(match[1])) in found:
                raise ModelError(f"{place} and {found[layer].name} are for the same exit: keep one")
            found[layer] = place
    return dict(sorted(found.items()))


def trained_on_record(digests: Iterable[str]) -> bytes:
    """The content of `trained_on.json`: hashes only, no text."""
    return json.dumps({"digests": sorted(set(digests))}, indent=0).encode() + b"\n"


def read_trained_on(folder: Path) -> frozenset[str]:
    """Digests of what an adapter, or translators, or a model exported with either, were trained on.

    Returns:
        Those of the folder and of its adapters per exit; none where no training kept a record.

    Raises:
        ModelError: If a record is damaged.
    """
    found: set[str] = set()
    for place in (folder, *exit_folders(folder).values()):
        if not (place / TRAINED_ON).is_file():
            continue
        try:
            digests = read_json(place / TRAINED_ON)["digests"]
            is_sound = all(_DIGEST.fullmatch(digest) for digest in digests)
        except (UnreadableError, KeyError, TypeError):
            is_sound = False
        if not is_sound:
            raise ModelError(f"{place / TRAINED_ON} is damaged: save or download the folder again")
        found.update(digests)
    return frozenset(found)


def as_ranges(layers: Iterable[int]) -> str:
    """Ascending layers as users write them.

    >>> as_ranges([1, 2, 3, 8, 16, 17])
    '1-3,8,16,17'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def load_adapter(model: Any, folder: Path, *, name: str = "default") -> PeftModel:
    """Load one PEFT folder onto a model, in addition to any adapters that it already has.

    Args:
        model: A Hugging Face model, or the PEFT model around one.
        folder: With config and weights.
        name: What PEFT is to call the adapter.

    Raises:
        ModelError: If a weight in the file matches nothing or is not finite, or if one is missing from it.
    """
    config = _read_config(folder)
    _check_patterns(model, folder)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    try:
        _check_rank(config, shapes, folder)
        if not isinstance(model, PeftModel):
            model = PeftModel(model, config, name)
        found = model.load_adapter(str(folder), name, torch_device="cpu")
    except SafetensorError as error:
        raise _unreadable(folder, error) from error
    except (ModelError, TimeoutError):  # the latter is an alarm of the caller's
        raise
    except Exception as error:  # PEFT trusts the file: a wrong value may raise any exception
        if is_out_of_memory(error):
            raise
        raise _misfit(folder, _reason(error)) from error
    _check_complete(model, folder, name, in_file=shapes.keys(), missing=found.missing_keys, extra=found.unexpected_keys)
    _check_numbers(model, folder, name)
    adapted: PeftModel = model
    return adapted


def _read_config(folder: Path) -> PeftConfig:
    """The config of one adapter, of a supported kind.

    Raises:
        ModelError: If it is damaged, or of another kind.
    """
    stored = _config(folder)
    kind = stored.get("peft_type")
    if kind not in list(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ModelError(
            f"{folder / CONFIG} names the peft_type {kind!r}, which this version of PEFT does not know: upgrade peft, "
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
            f"{folder / CONFIG} cannot be read ({_first_line(error)}): save or download the adapter again"
        ) from error
    if config.is_prompt_learning or config.is_adaption_prompt or kind == "XLORA":
        raise ModelError(
            f"{folder} is a {kind} adapter, which changes the prompt or mixes other adapters: give one that changes "
            "weights, such as LoRA"
        )
    config.inference_mode = True
    return config


def _check_patterns(model: Any, folder: Path) -> None:
    """PEFT matches strings of the config with the names of all modules: as patterns, some of which take for ever.

    Any string may be one, whatever its field, as that depends on the kind of adapter.

    Raises:
        ModelError: If it takes too long.
    """
    patterns = [text for text in _strings(_config(folder)) if not _NAME.fullmatch(text)]
    if not patterns:
        return
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    request = json.dumps([patterns, [name for name, _ in inner.named_modules()]])
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
            f"{folder / CONFIG} names modules by a pattern that takes more than {PATTERN_SECONDS:g} seconds to match: "
            "replace it by plain module names, or use an adapter that you trust"
        ) from error


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(each)


def _check_rank(config: PeftConfig, shapes: Mapping[str, Sequence[int]], folder: Path) -> None:
    """PEFT allocates memory for the config's rank before it reads a weight: a wrong rank would exhaust it."""
    if not shapes:
        raise ModelError(f"{folder / WEIGHTS} holds no weights: save or download the adapter again")
    ranks = [getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()]
    largest = max(max(shape, default=1) for shape in shapes.values())
    for rank in ranks:
        if isinstance(rank, int) and rank > largest:
            raise _misfit(folder, f"{CONFIG} says rank {rank}, but no weight in the file has more than {largest} rows")


def _check_complete(
    model: PeftModel,
    folder: Path,
    name: str,
    *,
    in_file: Collection[str],
    missing: Sequence[str],
    extra: Sequence[str],
) -> None:
    """Check that the file has every weight of the adapter, and that the adapter uses every weight of the file."""
    wanted: Collection[str] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
    # names of older versions of the model are translated while loading, so only then do the two sets differ
    if not missing and not extra and len(in_file) != len(wanted):
        missing = sorted(set(wanted) - set(in_file))
        # PEFT saves enlarged embeddings of the base model too; adapters per exit share one base model
        may_enlarge = name == "default"
        extra = sorted(key for key in set(in_file) - set(wanted) if not (may_enlarge and _EMBEDDINGS.search(key)))
    missing = [key for key in missing if "vblora_vector_bank" not in key]  # kept once for all layers
    parts = [
        f"{len(keys)} of {count} {what} ({_first_names(keys, name)})"
        for keys, count, what in (
            (missing, len(wanted), "adapter weights are missing from the file"),
            (extra, len(in_file), "weights in the file match nothing in the model's adapter"),
        )
        if keys
    ]
    if parts:
        raise _misfit(folder, "; ".join(parts))


def _check_numbers(model: PeftModel, folder: Path, name: str) -> None:
    """Refuse weights that are not finite; warn about an adapter that changes nothing."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if broken := [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise ModelError(
            f"{len(broken)} of {len(weights)} weights of {folder} hold NaN or infinite numbers "
            f"({_first_names(broken, name)}): use an earlier checkpoint of the training, or train again"
        )
    is_lora = all(".lora_" in key for key in weights)
    if is_lora and not any(tensor.any() for key, tensor in weights.items() if ".lora_A" not in key):
        warnings.warn(
            f"adapter {folder} changes nothing: every lora_B weight is zero, as before any training", stacklevel=4
        )


def _note_other_model(folder: Path, name: str) -> None:
    """Shapes may fit nonetheless: a fine-tuned sibling, or a copy under another name."""
    made_for = _config(folder).get("base_model_name_or_path")
    if isinstance(made_for, str) and _model_name(made_for) not in ("", _model_name(name)):
        warnings.warn(
            f"adapter {folder} was made for {made_for}, but the model is {name}: unless the two are copies of each "
            "other, it was trained on other weights",
            stacklevel=4,
        )


def _model_name(name: str) -> str:
    """The part of an id or a path that stays when a model is copied.

    >>> [_model_name(name) for name in ("some/Model-7b", "/data/model-7b", "models--some--Model-7b/snapshots/01a")]
    ['model-7b', 'model-7b', 'model-7b']
    """
    if cached := re.search(r"models--([^/\\]+)", name):  # of the Hub's cache, in which folders are named by commit
        return cached[1].rpartition("--")[2].lower()
    return Path(name).name.lower()


def _check_alike(folders: Mapping[int, Path]) -> None:
    """Adapters that stand side by side must sit on the same modules of the same model."""
    first: dict[str, Any] = {}
    for folder in folders.values():
        config = _config(folder)
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
            raise ModelError(f"{folder} is not a LoRA adapter with bias 'none': adapters per exit must be of that kind")
        first = first or config
        for name in _SHARED:
            if _plain(config.get(name)) != _plain(first.get(name)):
                raise ModelError(
                    f"{folder} and {next(iter(folders.values())).name} differ in {name}: adapters of one folder must "
                    "be made for the same modules of the same model"
                )


def _check_encoder_untouched(adapted: PeftModel, by_exit: Mapping[int, str], folder: Path) -> None:
    """Features of all exits come from one pass through the encoder, whichever adapter acts."""
    parts = {f".{name}." for name in by_exit.values()}
    prefix = "base_model.model."
    for name, _ in adapted.named_parameters():
        inner = name.removeprefix(prefix)
        if any(part in name for part in parts) and not inner.startswith(_OF_LANGUAGE_MODEL):
            raise ModelError(
                f"{folder} has adapters outside the language model, at {inner.split('.lora_')[0]}: "
                "one adapter per exit must leave encoder and projector alone"
            )


def _unreadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"cannot load {folder}: {WEIGHTS} is truncated or corrupt ({_first_line(error)}); save or download it again"
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
    return _first_line(error)


def _first_names(keys: Sequence[str], name: str, limit: int = 3) -> str:
    names = [_inner_name(key).replace(f".{name}.", ".") for key in keys[:limit]]
    return ", ".join([*names, "..."] if len(keys) > limit else names)


def _inner_name(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / CONFIG)
    except UnreadableError as error:
        raise ModelError(f"{folder / CONFIG} cannot be read ({error}): save or download the adapter again") from error


def _plain(value: Any) -> Any:
    """PEFT writes sets as lists in any order."""
    return sorted(map(str, value)) if isinstance(value, list) else value
