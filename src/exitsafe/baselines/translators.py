"""Exit translators: is training needed at all? One linear map per exit, fitted to pictures alone, in closed form.

The features of an exit are outside the language model's distribution, so map them back: ridge regression from what the
projector receives at this exit to what it receives at the default exit, token by token. It uses no labels, prompts or
answers, and changes no weight of the model. `exitsafe.exits.translators` applies the maps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch

from exitsafe.baselines.ridge import RIDGES, Moments, choose_ridge, fit_map, r_squared
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, RunError
from exitsafe.exits.adapters import TRAINED_ON, trained_on_record
from exitsafe.exits.features import projector_inputs
from exitsafe.exits.finite import not_finite
from exitsafe.exits.layers import ExitLayers, resolve_layers
from exitsafe.exits.translator_files import MAPS, RECORD, model_record, read_record
from exitsafe.exits.translators import Translator, Translators, tensors_of
from exitsafe.records import Progress, Sample
from exitsafe.store.files import write_whole, writing
from exitsafe.store.fingerprint import Settings, canonical_json, differences, media_digests, sample_info
from exitsafe.version import __version__

HELD_OUT = 5  # every fifth picture is held out, to choose the ridge strength and measure R²
_LEFT_BY_A_KILL = {MAPS, TRAINED_ON, f".{MAPS}.part", f".{TRAINED_ON}.part", f".{RECORD}.part"}


def fit_translators(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    exit_layers: ExitLayers = "all",
    out: str | Path,
    progress: Progress | None = None,
) -> Path:
    """Fit one linear map per exit, from its features to those of the default exit.

    Every fifth picture is held out, to choose the ridge strength of each exit and measure R². The final map is fitted
    to all pictures with that strength. A second call with the same arguments returns at once.

    Args:
        vlm: The model; an adapter of the language model changes nothing.
        samples: Their pictures are used; prompts and answers are not. Harmful samples are left out, and duplicate
            pictures count once.
        exit_layers: Which exits to map. The default exit needs no map.
        out: Folder for the maps and their record: new, empty, or of the same maps.
        progress: Called with the number of pictures done, of all pictures, and a note.

    Returns:
        `out`, for `load_vlm(..., translators=out)`.

    Raises:
        InputError: If there are fewer than five pictures, one cannot be read, or no exit needs a map.
        ModelError: If the model cannot be translated.
        RunError: If `out` holds something else.
    """
    layers = resolve_layers(exit_layers, num_layers=vlm.num_layers, default_exit=vlm.default_exit)
    layers = tuple(layer for layer in layers if not vlm.reads_default(layer))
    _ = vlm.projector  # raises for models that cannot be translated
    if not layers:
        raise InputError(f"nothing to translate: exit {vlm.default_exit} is the default exit; choose others")
    if vlm.translators is not None:
        raise InputError("the model has translators already: load it without them")
    pictures = _distinct_pictures(samples)
    settings = {"model": model_record(vlm), "pictures": _describe(pictures)}
    folder = Path(out)
    if _is_there(folder, settings, layers):
        return folder
    fitted, held_out = _add_up(vlm, pictures, layers, progress)
    maps, exits = {}, []
    for layer in layers:
        ridge, r2 = choose_ridge(fitted[layer], held_out[layer])
        maps[layer] = _rounded(fit_map(fitted[layer] + held_out[layer], ridge=ridge))
        bare = r_squared(held_out[layer], _identity(len(maps[layer].bias)))
        num_tokens = fitted[layer].count + held_out[layer].count
        exits.append({"exit_layer": layer, "r2": r2, "r2_untranslated": bare, "ridge": ridge, "tokens": num_tokens})
    record = settings | {"exits": exits, "ridges": list(RIDGES), "hash": Translators(maps, source=str(folder)).hash}
    _save(
        folder,
        maps,
        pictures.values(),
        record | {"versions": {"exitsafe": __version__, "torch": str(torch.__version__)}},
    )
    return folder


def _distinct_pictures(samples: Sequence[Sample]) -> dict[str, Sample]:
    """One sample per picture, by the picture's digest."""
    found: dict[str, Sample] = {}
    for sample in samples:
        for image in sample.images if sample.kind != "harmful" else ():
            picture = Sample(id=sample.id, prompt="", images=(image,), kind="benign")
            found.setdefault(sample_info(picture).digest, picture)
    if len(found) < HELD_OUT:
        raise InputError(f"{len(found)} benign pictures are too few to fit translators: give at least {HELD_OUT}")
    return found


def _describe(pictures: dict[str, Sample]) -> dict[str, object]:
    whole = hashlib.sha256(canonical_json(list(pictures)).encode())
    return {"count": len(pictures), "held_out": len(pictures) // HELD_OUT, "hash": whole.hexdigest()}


def _is_there(folder: Path, settings: Settings, layers: Sequence[int]) -> bool:
    """Whether the folder has these maps already.

    Raises:
        RunError: If the folder holds others, or something else.
    """
    record = read_record(folder)
    if record is None:
        if folder.exists() and (not folder.is_dir() or {entry.name for entry in folder.iterdir()} - _LEFT_BY_A_KILL):
            raise RunError(f"{folder} is not a folder of translators: choose a new or empty one")
        return False
    there = {**settings, "exits": [entry["exit_layer"] for entry in record["exits"]]}
    old = {name: record.get(name) for name in settings} | {"exits": there["exits"]}
    changed = differences(old, {**settings, "exits": list(layers)})
    if changed:
        raise RunError(f"{folder} holds other translators ({'; '.join(changed)}): choose another folder")
    return True


def _add_up(
    vlm: VLM, pictures: dict[str, Sample], layers: Sequence[int], progress: Progress | None
) -> tuple[dict[int, Moments], dict[int, Moments]]:
    """Sums by exit, over the pictures to fit and over those held out."""
    samples = list(pictures.values())
    held_out = samples[HELD_OUT - 1 :: HELD_OUT]
    fitted = [sample for number, sample in enumerate(samples) if number % HELD_OUT != HELD_OUT - 1]
    sums: tuple[dict[int, Moments], dict[int, Moments]] = ({}, {})
    done = 0
    for part, by_layer in zip((fitted, held_out), sums, strict=True):
        for sample in part:
            found = _encode(vlm, sample, (*layers, vlm.default_exit))
            target = found[vlm.default_exit]
            for layer in layers:
                moments = by_layer.setdefault(layer, Moments(target.shape[-1], device=_sums_device(target)))
                moments.add(found[layer], target)
            done += 1
            if progress is not None:
                progress(done, len(samples), "")
    return sums


def _encode(vlm: VLM, sample: Sample, exit_layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """The projector's input for a picture, (tokens, width), by exit."""
    found = projector_inputs(vlm, vlm.encode_prompt(sample).media, exit_layers)
    for exit_layer, features in found.items():
        if not features.isfinite().all():
            raise not_finite("image features", exit_layer=exit_layer, dtype=vlm.base_model.dtype)
    return found


def _sums_device(features: torch.Tensor) -> torch.device:
    """The features' device, if it supports float64."""
    return torch.device("cpu") if features.device.type == "mps" else features.device


def _identity(width: int) -> Translator:
    return Translator(weight=torch.eye(width), bias=torch.zeros(width))


def _rounded(translator: Translator) -> Translator:
    return Translator(weight=translator.weight.float().cpu(), bias=translator.bias.float().cpu())


def _save(folder: Path, maps: dict[int, Translator], pictures: Iterable[Sample], record: Mapping[str, object]) -> None:
    """Write everything, the record last: it marks the folder as complete."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MAPS, safetensors.torch.save(tensors_of(maps)))
    digests = (digest for picture in pictures for digest in media_digests(picture))
    write_whole(folder / TRAINED_ON, trained_on_record(digests))
    write_whole(folder / RECORD, json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
