"""What an audit asks, and what a run records of it: a model that is loaded here, or a served one.

An engine may answer for a model that is loaded here. All that follows is the same for all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
import transformers

from exitsafe.engine.answering import Answering
from exitsafe.engine.black_box import BlackBox
from exitsafe.engine.load import load_vlm
from exitsafe.engine.vllm_server import VLLMServer
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.exits.layers import ExitLayers, resolve_layers
from exitsafe.machine.processes import this_process
from exitsafe.records import Sample
from exitsafe.specs.inputs import is_url
from exitsafe.store.fingerprint import decoder_versions, model_fingerprint, pin_today, processor_versions
from exitsafe.untrusted import JsonObject
from exitsafe.world.profile import profile_of


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What answers.

    Args:
        exit_layers: The exits to ask.
        answering: Answers tasks.
        settings: What two runs of the same model have in common: the model, its engine, its prompts.
        versions: Of the packages that decide its answers.
        vlm: The model, if it is loaded here.
    """

    exit_layers: tuple[int, ...]
    answering: Answering | BlackBox
    settings: JsonObject
    versions: dict[str, str]
    vlm: VLM | None

    @property
    def adapter(self) -> Path | None:
        """The folder of the model's adapter."""
        return None if self.vlm is None else self.vlm.adapter

    @property
    def trained_on(self) -> frozenset[str]:
        """Digests of what a repair of the model was trained on."""
        return frozenset() if self.vlm is None else self.vlm.trained_on

    def offloaded(self) -> AbstractContextManager[None]:
        """As `VLM.offloaded`."""
        return nullcontext() if self.vlm is None else self.vlm.offloaded()


def open_audited(
    model: VLM | str | Path,
    samples: Sequence[Sample],
    *,
    exit_layers: ExitLayers,
    out: str | Path,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
    batch_size: int | None,
    skip_global: bool,
    engine: str | VLLMServer | None,
) -> Audited:
    """Find invalid settings and prompts, and a server that cannot answer them, before the work starts.

    Args and errors as for `audit`.
    """
    if isinstance(model, str) and is_url(model):
        if engine is not None or skip_global:
            raise InputError("a served model answers as it is; leave engine and skip_global out")
        box = BlackBox(
            model,
            exit_layers=exit_layers,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
        )
        box.check(samples)
        return Audited(
            exit_layers=box.exit_layers,
            answering=box,
            settings={"model": box.settings},
            versions={"pillow": PIL.__version__},
            vlm=None,
        )
    server = VLLMServer(engine) if isinstance(engine, str) else engine
    vlm = load_vlm(model, offload_decoder=server is not None) if isinstance(model, str | Path) else model
    if max_new_tokens is None and (profile := profile_of(vlm.name)) is not None:
        max_new_tokens = profile.max_new_tokens
    layers = resolve_layers(exit_layers, num_layers=vlm.num_layers, default_exit=vlm.default_exit)
    pin_today(vlm, out)
    answering = Answering(
        vlm,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        skip_global=skip_global,
        engine=server,
    )
    prompts = answering.check(samples, exit_layer=layers[0])
    if this_process().is_main_process:
        _warn_of_other_media(vlm, samples)
    return Audited(
        exit_layers=layers,
        answering=answering,
        settings={
            "model": model_fingerprint(vlm),
            **({} if server is None else {"engine": server.settings}),
            "prompts": prompts.settings,
        },
        versions={
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "pillow": PIL.__version__,
            **processor_versions(vlm),
            **decoder_versions(samples),
        },
        vlm=vlm,
    )


def _warn_of_other_media(vlm: VLM, samples: Sequence[Sample]) -> None:
    """Warn of samples whose media do not pass the encoder that exits. Those without media are their suite's matter."""
    hears = vlm.encoder.modality == "audio"
    other = [each for each in samples if not (each.audios if hears else each.images or each.videos)]
    if count := sum(not each.is_text_only for each in other):
        missing = "audio" if hears else "picture or video"
        warnings.warn(
            f"{count} of {len(samples)} samples have no {missing}, so that their answers are the same at every exit of "
            f"the {vlm.encoder.modality} encoder; leave them out, or choose the other one with --encoder",
            stacklevel=4,
        )
