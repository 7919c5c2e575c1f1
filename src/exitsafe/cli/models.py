"""Loading a model, or its config, for a command: without the libraries' chatter. Warnings stay."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from exitsafe.cli import console
from exitsafe.exits.sources import check_adapter_source, check_model_source
from exitsafe.specs.inputs import Loading, QuantizedLoading

if TYPE_CHECKING:
    from exitsafe.doctor import Blueprint
    from exitsafe.engine.vlm import VLM

_DEFAULTS = Loading()


def load_model(model: str, loading: Loading = _DEFAULTS, *, offload_decoder: bool = False) -> VLM:
    """`load_vlm`; a download shows its bar, reading weights from disk shows none."""
    announce(model, adapter=getattr(loading, "adapter", None))
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    is_silent = are_progress_bars_disabled()
    disable_progress_bar()  # takes those of downloads along
    if not is_silent:
        enable_progress_bars()
    if getattr(loading, "quantization", None) is not None:
        logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    from exitsafe.engine.load import load_vlm

    vlm = load_vlm(model, **loading.model_dump(), offload_decoder=offload_decoder)
    if vlm.is_newly_checked and vlm.checks is not None:
        console.note(
            f"checked its exits and answers against transformers in {vlm.checks.seconds:.1f} s, once for this model"
        )
    return vlm


def announce(model: str, *, adapter: str | Path | None = None) -> None:
    """Refuse a wrong name at once; else say what is being loaded, before seconds of imports and minutes of reading."""
    from exitsafe.world.profile import is_organism

    if not is_organism(model):
        check_model_source(model)
    if adapter is not None:
        check_adapter_source(str(adapter))
    _say_once(f"loading {model}" + ("" if adapter is None else f" with {adapter}"))


@cache
def _say_once(message: str) -> None:
    console.note(message)


def read_blueprint(model: str, loading: QuantizedLoading) -> Blueprint:
    """`load_blueprint`, without transformers' remarks on a config: what they say stands in the tables anyway."""
    announce(model)
    from transformers.utils import logging

    from exitsafe.doctor import load_blueprint

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load_blueprint(model, **loading.model_dump(exclude={"device", "adapter", "translators"}))
    finally:
        logging.set_verbosity(before)
