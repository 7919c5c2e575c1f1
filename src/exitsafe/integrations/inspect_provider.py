"""The entry point for inspect_ai: registers the provider's name; a model is loaded when it is first used."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="exitsafe")
def provider() -> type[ModelAPI]:
    """`exitsafe/MODEL@L18`: see `inspect_model.py`."""
    from exitsafe.integrations.inspect_model import ExitsafeAPI

    return ExitsafeAPI
