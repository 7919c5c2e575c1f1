"""The folder that stores exit translators.

translators.safetensors   exit.L.weight (width, width) and exit.L.bias (width,), float32
translators.json          the model they belong to, and how they were fitted; written last
trained_on.json           digests of the pictures they were fitted to
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from exitsafe.errors import ModelError
from exitsafe.exits.model import ExitingModel
from exitsafe.exits.translators import Translator, Translators
from exitsafe.untrusted import JsonObject, UnreadableError, read_json

MAPS, RECORD = "translators.safetensors", "translators.json"


def load_translators(vlm: ExitingModel, folder: str | Path) -> Translators:
    """Read the maps that were fitted for this model.

    Raises:
        ModelError: If there are none or they belong to another model, or this one cannot be translated.
    """
    _ = vlm.projector  # refuses models that cannot be translated
    record = read_record(Path(folder))
    if record is None:
        raise ModelError(f"{folder} has no {RECORD}: give a folder that exitsafe translate has finished")
    made_for, now = record["model"], model_record(vlm)
    changed = [name for name in now if name != "name" and made_for.get(name) != now[name]]
    if changed:
        raise ModelError(
            f"translators {folder} were made for {made_for.get('name')}, which differs from {vlm.name} in "
            f"{', '.join(changed)}: rerun exitsafe translate for this model"
        )
    try:
        tensors = safetensors.torch.load_file(Path(folder) / MAPS)
        maps = {
            layer: Translator(weight=tensors.pop(f"exit.{layer}.weight"), bias=tensors.pop(f"exit.{layer}.bias"))
            for layer in (int(entry["exit_layer"]) for entry in record["exits"])
        }
        if beyond := [layer for layer in maps if not 1 <= layer <= vlm.num_layers]:
            raise ValueError(f"there is no exit {beyond[0]}")
    except (OSError, OverflowError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}/{MAPS} is damaged or missing: rerun exitsafe translate") from error
    if tensors:
        names = ", ".join(sorted(tensors)[:3])
        raise ModelError(
            f"{folder}/{MAPS} has {len(tensors)} tensors that are not in {RECORD} ({names}): rerun exitsafe translate"
        )
    for layer, translator in maps.items():
        width = translator.bias.numel()
        shapes = tuple(translator.weight.shape), tuple(translator.bias.shape)
        if shapes != ((width, width), (width,)) or not _is_finite(translator):
            raise ModelError(
                f"{folder}/{MAPS}: the map of exit {layer} is not a square matrix of finite numbers; rerun exitsafe "
                "translate with --dtype float32"
            )
    translators = Translators(maps, source=str(folder))
    if translators.hash != record["hash"]:
        raise ModelError(f"{folder}/{MAPS} is not the file that {RECORD} describes: rerun exitsafe translate")
    return translators


def read_record(folder: Path) -> JsonObject | None:
    """`translators.json`, or None if there is none.

    Raises:
        ModelError: If it is not such a record.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        if isinstance(record["model"], dict) and isinstance(record["exits"], list) and isinstance(record["hash"], str):
            return record
    except (UnreadableError, KeyError):
        pass
    raise ModelError(f"{path} is not a record of translators: choose another folder")


def model_record(vlm: ExitingModel) -> JsonObject:
    """What, except for the name, must match for translators to fit a model; adapters do not touch the encoder."""
    return {
        "name": vlm.name,
        "family": vlm.family,
        "num_layers": vlm.num_layers,
        "default_exit": vlm.default_exit,
        "checkpoint": vlm.checkpoint_hash,
    }


def _is_finite(translator: Translator) -> bool:
    return bool(translator.weight.isfinite().all() and translator.bias.isfinite().all())
