"""latency.json of a run: measured times and the settings of each measurement. Numbers, no text.

A measurement is looked up by its settings; those with other settings (another machine, say) are kept beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

from exitsafe.engine.latency import Latency, Pass
from exitsafe.errors import RunError
from exitsafe.store.files import write_whole
from exitsafe.store.fingerprint import Settings, canonical_json
from exitsafe.untrusted import JsonObject, UnreadableError, read_json

NAME = "latency.json"
_FORMAT = 1
_FIELDS = ("encoder_ms", "prefill_ms", "decode_ms_per_token")


def kept_latency(run: Path, settings: Settings) -> Latency | None:
    """The measurement with these settings, if there is one.

    Args:
        run: The run directory.
        settings: A JSON object with everything that may change a time.

    Raises:
        RunError: If the file cannot be read.
    """
    wanted = canonical_json(settings)
    for entry in _read(run / NAME):
        if canonical_json(entry["settings"]) == wanted:
            return _from_json(entry, run / NAME)
    return None


def keep_latency(run: Path, settings: Settings, latency: Latency) -> None:
    """Save a measurement with the others, replacing one with the same settings."""
    wanted = canonical_json(settings)
    others = [entry for entry in _read(run / NAME) if canonical_json(entry["settings"]) != wanted]
    exits = [{"exit_layer": exit_layer, **_columns(passes)} for exit_layer, passes in latency.exits.items()]
    entry = {"settings": settings, "default": _columns(latency.default), "exits": exits}
    content = {"format": _FORMAT, "measurements": [*others, entry]}
    write_whole(run / NAME, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _read(path: Path) -> list[JsonObject]:
    if not path.exists():
        return []
    try:
        content = read_json(path)
        measurements: list[JsonObject] = content["measurements"]
        if content["format"] != _FORMAT or not all(isinstance(entry["settings"], dict) for entry in measurements):
            raise UnreadableError("it is not in this version's format")
    except (UnreadableError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read; remove it to measure again") from error
    return measurements


def _columns(passes: tuple[Pass, ...]) -> dict[str, list[float]]:
    return {name: [getattr(one, name) for one in passes] for name in _FIELDS}


def _from_json(entry: JsonObject, path: Path) -> Latency:
    try:
        return Latency(
            default=_passes(entry["default"]),
            exits={int(found["exit_layer"]): _passes(found) for found in entry["exits"]},
        )
    except (ValueError, OverflowError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read; remove it to measure again") from error


def _passes(columns: dict[str, list[float]]) -> tuple[Pass, ...]:
    passes = tuple(
        Pass(encoder_ms=float(encoder), prefill_ms=float(prefill), decode_ms_per_token=float(decode))
        for encoder, prefill, decode in zip(*(columns[name] for name in _FIELDS), strict=True)
    )
    if not passes or min(min(vars(each).values()) for each in passes) < 0:
        raise ValueError("times are missing or below 0")
    return passes
