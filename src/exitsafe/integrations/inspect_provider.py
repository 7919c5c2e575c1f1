"""What inspect_ai finds by its entry point: the provider's name. The model itself is loaded when one is asked for."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="exitsafe")
def provider() -> type[ModelAPI]:
    """`exitsafe/MODEL@L18`: see `inspect_model.py`."""
    from exitsafe.integrations.inspect_model import ExitsafeAPI

    return ExitsafeAPI
