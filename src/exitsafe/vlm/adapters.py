"""PEFT adapters: one for all exits, or one per exit layer, of which the exit's own acts.

    FOLDER/adapter_config.json, adapter_model.safetensors    one adapter for all exits
    FOLDER/layer-03/, FOLDER/layer-08/, ...                  one PEFT folder for each exit that has its own

An exit without an adapter of its own answers with the base model. Knows nothing about how adapters are trained.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError

from exitsafe.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SWITCHES = ("_active_adapter", "_disable_adapters")
_LAYER = re.compile(r"layer-(\d+)")
LINEAR_LAYERS = r".*(?:language_model|text_model)\..*\.(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
_OF_LANGUAGE_MODEL = ("model.language_model.", "lm_head.")
# What all adapters of one model must share; they may differ in rank and scale.
_SHARED = ("base_model_name_or_path", "peft_type", "target_modules", "modules_to_save")


def load_adapters(model: Any, folder: Path, *, num_layers: int) -> tuple[PeftModel, ExitAdapters | None]:
    """Put an adapter folder on a model.

    Args:
        model: The Hugging Face model.
        folder: From `check_folder`.
        num_layers: Encoder blocks.

    Returns:
        The adapted model; and, where there is one adapter per exit, what makes each act at its exit.

    Raises:
        ModelError: If an adapter does not fit the model, or adapters per exit do not fit each other.
    """
    folders = exit_folders(folder)
    if not folders:
        return _load(model, folder), None
    if deepest := [found for layer, found in folders.items() if not 1 <= layer <= num_layers]:
        raise ModelError(f"{deepest[-1]} is of no exit: this encoder has {num_layers} blocks")
    _check_alike(folders)
    by_exit = {layer: f"layer-{layer:02}" for layer in folders}
    adapted: PeftModel | None = None
    for layer, found in folders.items():
        if adapted is None:
            adapted = _load(model, found, name=by_exit[layer])
        else:
            _load_beside(adapted, found, name=by_exit[layer])
    assert adapted is not None
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


def exit_folders(folder: Path) -> dict[int, Path]:
    """The folders `layer-NN` in an adapter folder by exit layer, ascending; none where one adapter serves all exits."""
    found: dict[int, Path] = {}
    for place in sorted(folder.iterdir()):
        if (match := _LAYER.fullmatch(place.name)) and place.is_dir():
            if (layer := int(match[1])) in found:
                raise ModelError(f"{place} and {found[layer].name} are of one exit: keep one")
            found[layer] = place
    return dict(sorted(found.items()))


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


def _load(model: Any, folder: Path, *, name: str = "default") -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    except (RuntimeError, ValueError) as error:
        raise _misfit(folder) from error
    except SafetensorError as error:
        raise _torn(folder, error) from error


def _load_beside(adapted: PeftModel, folder: Path, *, name: str) -> None:
    try:
        missing = adapted.load_adapter(str(folder), adapter_name=name, torch_device="cpu").missing_keys
    except (RuntimeError, ValueError) as error:
        raise _misfit(folder) from error
    except SafetensorError as error:
        raise _torn(folder, error) from error
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of the weights that its {CONFIG} names: make it again")


def _check_alike(folders: Mapping[int, Path]) -> None:
    """Adapters that stand side by side must sit on the same modules of the same model."""
    first: dict[str, Any] = {}
    for folder in folders.values():
        config = _config(folder)
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
            raise ModelError(f"{folder} is no LoRA adapter with bias 'none', which one adapter per exit must be")
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


def _misfit(folder: Path) -> ModelError:
    made_for = _config(folder).get("base_model_name_or_path")
    return ModelError(f"adapter {folder} does not fit this model; it was made for {made_for}")


def _torn(folder: Path, error: SafetensorError) -> ModelError:
    reason = next(iter(str(error).splitlines()), "")
    return ModelError(f"cannot load {folder}: a file of weights is torn ({reason}); save or download it again")


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG} is no JSON: save or download the adapter again") from error
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:
    """PEFT writes sets as lists in any order."""
    return sorted(map(str, value)) if isinstance(value, list) else value
