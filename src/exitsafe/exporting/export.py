"""`export`: a VLM and one of its exits in, a checkpoint out that stock transformers loads and that ends at that exit.

The whole flow: measure the whole model, cut, save, reload as a user would, compare, describe. The folder appears under
its name only after every step has succeeded.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from exitsafe.engine.load import as_vlm, auto_class
from exitsafe.errors import InputError, ModelError
from exitsafe.exits.adapters import TRAINED_ON, load_adapter, trained_on_record
from exitsafe.exits.finite import not_finite
from exitsafe.exporting.audited import audit_record, check_is_of
from exitsafe.exporting.checkpoint import check_can_be_cut, cut, dropped_blocks, save
from exitsafe.exporting.folder import check_empty, whole_folder
from exitsafe.exporting.manifest import ADAPTER, CARD, Base, Exported, write_manifest
from exitsafe.exporting.merging import base_weights
from exitsafe.exporting.mmproj import MMPROJ, check_can_be_written, write_mmproj
from exitsafe.exporting.model_card import is_hub_id, license_of, public_name, write_card
from exitsafe.exporting.parts import parts_of
from exitsafe.exporting.probe import Latency, encoders_ms, language_model_ms, logits_of, probe_inputs
from exitsafe.records import Progress
from exitsafe.results.run import AuditRun, load_run
from exitsafe.store.files import PUBLIC, write_whole, writing
from exitsafe.untrusted import JsonObject
from exitsafe.version import __version__

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM
    from exitsafe.exits.huggingface import MultimodalModel

_PACKAGES = ("torch", "transformers", "peft")


def export(
    vlm: VLM | str | Path,
    *,
    exit_layer: int,
    out: str | Path,
    skip_global: bool = False,
    keep_adapter: bool = False,
    audit: AuditRun | str | Path | None = None,
    to: Literal["gguf"] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint whose image encoder ends at one exit.

    `AutoModelForImageTextToText.from_pretrained(out)` loads it without exitsafe. Before returning, the checkpoint is
    loaded that way and compared with the whole model at that exit. The model itself is not changed.

    Args:
        vlm: The whole model, with or without an adapter or translators, or its name as for `load_vlm`.
        exit_layer: Encoder blocks to keep, 1 to `vlm.num_layers`.
        out: A new or empty folder.
        skip_global: Llama 3.2 Vision only: drop the global blocks as well.
        keep_adapter: Save the adapter separately, as a PEFT folder for the slim model, instead of merging it.
        audit: A finished run of the same model that covers the exit; its numbers go into the model card.
        to: "gguf" also writes mmproj.gguf, the encoder and projector for llama.cpp.
        progress: Called with the number of steps done, the number of steps, and the title of the next step.

    Returns:
        The folder: weights, configs, processor if there is one, README.md, and exitsafe.json with the sources, sizes
        and latency before and after, and a hash of every file.

    Raises:
        ExitLayerError: If the encoder has no such block.
        InputError: If a setting does not apply to this model, or a package is missing.
        ModelError: If the model is quantized, something cannot be merged, llama.cpp would not compute what the model
            does, or the checkpoint does not reproduce the exit.
        RunError: If `out` is not empty, writing fails, or the audit belongs to another model or lacks the exit.
    """
    out = Path(out)
    check_empty(out)
    vlm = as_vlm(vlm)
    check_can_be_cut(vlm)
    has_adapter = isinstance(vlm.model, PeftModel)
    if keep_adapter and not has_adapter:
        raise InputError(f"{vlm.name} has no adapter to keep: leave --keep-adapter out")
    if to == "gguf":
        if keep_adapter:
            raise InputError("--to gguf needs the adapter merged: leave --keep-adapter out")
        check_can_be_written(vlm.base_model.config)
    is_merged = (has_adapter and not keep_adapter) or bool(vlm.translation_hooks(exit_layer))
    measured = audit_hash = None
    if audit is not None:
        run = audit if isinstance(audit, AuditRun) else load_run(audit)
        check_is_of(run, vlm, exit_layer=exit_layer, skip_global=skip_global)
        measured = audit_record(run, exit_layer=exit_layer)
        audit_hash = hashlib.sha256((run.path / "run.json").read_bytes()).hexdigest()
    steps = _Steps(progress, ["measuring the whole model", "writing", "reloading", "hashing"])
    with whole_folder(out) as folder:
        steps.next()
        inputs = probe_inputs(vlm)
        with vlm.exit_at(exit_layer, skip_global=skip_global):
            wanted = logits_of(vlm.model, inputs)
            if not wanted.isfinite().all():
                raise not_finite("logits", exit_layer=exit_layer, dtype=vlm.base_model.dtype)
            # the checkpoint's logits if merging had lost the adapter
            lost = _unadapted(vlm, inputs) if has_adapter and not keep_adapter else None
        # a GPU may not hold both models; on a CPU they are timed in turns, which is more robust on a busy machine
        alone = _encoders_ms([vlm], inputs, is_merged=is_merged) if vlm.device.type != "cpu" else []
        steps.next()
        with writing(out):
            saved = _save(
                vlm,
                folder,
                name=out.resolve().name,
                exit_layer=exit_layer,
                skip_global=skip_global,
                keep_adapter=keep_adapter,
            )
            parts = parts_of(folder, saved)
            if to == "gguf":
                made_from = {
                    "exit_layer": exit_layer,
                    "base": vlm.checkpoint_hash,
                    "audit": audit_hash,
                    "encoder": parts.encoder,
                    "language_model": parts.language_model,
                }
                write_mmproj(saved, vlm.processor, folder / MMPROJ, facts=made_from)
                (folder / MMPROJ).chmod(PUBLIC)
        steps.next()
        with vlm.offloaded():
            slim = _load_again(folder, vlm, exit_layer=exit_layer)
            found = logits_of(slim.model, inputs)
            check = _compare(wanted, found, vlm, exit_layer=exit_layer, is_merged=is_merged, lost=lost)
            encoders = [*alone, *_encoders_ms([slim] if alone else [vlm, slim], inputs, is_merged=is_merged)]
            # the language model is not cut: its time is the same before and after
            language_ms = language_model_ms(slim)
        is_cut = bool(dropped_blocks(vlm, exit_layer=exit_layer, skip_global=skip_global))
        before, after = (
            Latency(encoder_ms=encoder_ms, prefill_ms=round(encoder_ms + language_ms, 3))
            for encoder_ms in (encoders if is_cut else encoders[-1:] * 2)
        )
        steps.next()
        facts = {
            "exit_layer": exit_layer,
            "skip_global": skip_global,
            "to": to,
            "adapter": None if not has_adapter else "kept" if keep_adapter else "merged",
            "check": check,
            "sizes": {"before": _sizes(vlm), "after": _sizes(slim)},
            "latency": {"before": asdict(before), "after": asdict(after)},
            "audit": measured,
            "parts": parts,
        }
        _describe(folder, vlm, facts, name=out.resolve().name)
    steps.next()
    return out


def _describe(folder: Path, vlm: VLM, facts: JsonObject, *, name: str) -> None:
    """Write the card and the manifest of all files."""
    exported = Exported(
        exitsafe=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(vlm, facts, out=name),
        base=_base(vlm),
        dtype=str(vlm.base_model.dtype).removeprefix("torch."),
        versions={name: version(name) for name in _PACKAGES},
        **facts,
    )
    license_id = license_of(vlm.name, folder=_folder_of(vlm.name), revision=vlm.checkpoint_hash)
    card = write_card(name=name, license_id=license_id, exported=exported)
    write_whole(folder / CARD, card.encode())
    write_manifest(folder, exported)


class _Steps:
    """Reports steps to `progress`."""

    def __init__(self, progress: Progress | None, titles: list[str]) -> None:
        self._progress = progress
        self._titles = titles
        self._done = 0

    def next(self) -> None:
        if self._progress is not None:
            title = self._titles[self._done] if self._done < len(self._titles) else ""
            self._progress(self._done, len(self._titles), title)
        self._done += 1


def _save(
    vlm: VLM, folder: Path, *, name: str, exit_layer: int, skip_global: bool, keep_adapter: bool
) -> MultimodalModel:
    """Save the cut model, its processor and what belongs to them; returns the model."""
    slim = cut(vlm, exit_layer=exit_layer, skip_global=skip_global, keep_adapter=keep_adapter)
    save(slim, folder)
    vlm.processor.save_pretrained(folder)
    if keep_adapter:
        gone = dropped_blocks(vlm, exit_layer=exit_layer, skip_global=skip_global)
        _save_adapter(vlm.model, folder / ADAPTER, base_name=name, gone=gone)
    for place in [folder, *([folder / ADAPTER] if keep_adapter else [])] if vlm.trained_on else []:
        write_whole(place / TRAINED_ON, trained_on_record(vlm.trained_on))  # so that an audit of either can warn
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.chmod(PUBLIC)  # safetensors makes files readable by the owner only, but this is for everybody
    return slim


def _save_adapter(model: PeftModel, folder: Path, *, base_name: str, gone: tuple[str, ...]) -> None:
    """Save the adapter as a PEFT folder, without weights for dropped blocks."""
    adapter = str(model.active_adapter)
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    unwanted = tuple(f"base_model.model.{prefix}" for prefix in gone)
    kept = {name: tensor.contiguous() for name, tensor in weights.items() if not name.startswith(unwanted)}
    folder.mkdir()
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[adapter]
    made_for, config.base_model_name_or_path = config.base_model_name_or_path, base_name
    try:
        config.save_pretrained(str(folder))
    finally:
        config.base_model_name_or_path = made_for


def _load_again(folder: Path, vlm: VLM, *, exit_layer: int) -> VLM:
    """Load the checkpoint as with stock transformers, on the model's device and with its attention kernels."""
    from exitsafe.engine.vlm import VLM

    whole = vlm.base_model.config
    parts = {name: part for name in whole.sub_configs if (part := getattr(whole, name)) is not None}
    kernels = {name: part._attn_implementation for name, part in parts.items()}
    loaded: Any = auto_class(whole).from_pretrained(
        folder,
        attn_implementation={"": whole._attn_implementation, **kernels},
        output_loading_info=True,
        trust_remote_code=False,  # otherwise transformers would ask on the terminal
    )
    model, found = loaded
    if wrong := {kind: names for kind, names in found.items() if names}:
        raise ModelError(
            f"the exported checkpoint does not load cleanly ({', '.join(wrong)}); nothing was written: please report it"
        )
    if (folder / ADAPTER).is_dir():
        model = load_adapter(model, folder / ADAPTER)
    encoder = replace(vlm.encoder, num_layers=exit_layer, default_exit=exit_layer)
    return VLM(model.to(vlm.device).eval(), vlm.processor, encoder=encoder, name=folder.name)


def _encoders_ms(vlms: Sequence[VLM], inputs: Mapping[str, Tensor], *, is_merged: bool) -> list[float]:
    """Encoder times; if the adapter was merged, the whole model is timed without it, as if it were merged too."""
    with ExitStack() as bare:
        for model in (vlm.model for vlm in vlms if is_merged):
            if isinstance(model, PeftModel):
                bare.enter_context(model.disable_adapter())
        return encoders_ms(vlms, inputs)


def _unadapted(vlm: VLM, inputs: Mapping[str, Tensor]) -> Tensor:
    model = vlm.model
    assert isinstance(model, PeftModel)
    with model.disable_adapter():
        return logits_of(model, inputs)


def _compare(
    wanted: Tensor, found: Tensor, vlm: VLM, *, exit_layer: int, is_merged: bool, lost: Tensor | None
) -> dict[str, float]:
    """The difference between the exported model and the exit; ModelError if it is more than rounding.

    If nothing was merged, the same operations run on the same numbers, and every bit must be equal. If something was,
    products are rounded in another order: half of the number type's digits must agree, which a wrong block is far from.
    In bfloat16 the adapter's effect may be smaller than that, so at least half of it must remain, compared with the
    logits without the adapter (`lost`).
    """
    most = torch.finfo(vlm.base_model.dtype).eps ** 0.5 if is_merged else 0.0
    relative = float((found - wanted).norm() / wanted.norm())
    effect = 0.0 if lost is None else float((lost - wanted).norm() / wanted.norm())
    if lost is not None and effect / 2 < relative <= most:
        raise ModelError(
            f"merging the adapter in {str(vlm.base_model.dtype).removeprefix('torch.')} loses it to rounding (an error "
            f"of {relative:.2g} of the logits, of which the adapter changes {effect:.2g}); nothing was written: give "
            "--dtype float32 or --keep-adapter"
        )
    if not relative <= most:
        raise ModelError(
            f"the exported checkpoint does not reproduce exit {exit_layer}: its logits differ by {relative:.2g} of "
            f"their size, where {most:.2g} is rounding; nothing was written: please report it"
        )
    return {
        "largest_difference": float((found - wanted).abs().max()),
        "relative_difference": relative,
        "allowed": most,
    }


def _sizes(vlm: VLM) -> dict[str, int]:
    """Sizes of the model without its adapter; shared weights count once."""
    weights = {tensor.data_ptr(): tensor for tensor in base_weights(vlm.model).values()}.values()
    return {
        "encoder_blocks": vlm.num_layers,
        "global_blocks": len(vlm.global_blocks),
        "parameters": sum(tensor.numel() for tensor in weights),
        "weight_bytes": sum(tensor.nbytes for tensor in weights),
    }


def _base(vlm: VLM) -> Base:
    return Base(
        name=public_name(vlm.name),
        family=vlm.family,
        encoder=vlm.encoder.modality,
        num_layers=vlm.num_layers,
        default_exit=vlm.default_exit,
        checkpoint=vlm.checkpoint_hash,
        adapter=vlm.adapter_hash or ("in memory" if isinstance(vlm.model, PeftModel) else None),
        translators=None if vlm.translators is None else vlm.translators.hash,
    )


def _command(vlm: VLM, facts: JsonObject, *, out: str) -> str:
    """The command line for this export, with placeholders for paths on this machine."""
    parts = ["exitsafe", "export", shlex.quote(public_name(vlm.name))]
    if is_hub_id(vlm.name) and _folder_of(vlm.name) is None and vlm.checkpoint_hash is not None:
        parts += ["--config", f"revision={vlm.checkpoint_hash}"]
    parts += ["--encoder", vlm.encoder.modality] if vlm.encoder.modality != "image" else []
    parts += ["--dtype", str(vlm.base_model.dtype).removeprefix("torch.")]
    parts += ["--adapter", "ADAPTER"] if isinstance(vlm.model, PeftModel) else []
    parts += ["--keep-adapter"] if facts["adapter"] == "kept" else []
    parts += ["--translators", "TRANSLATORS"] if vlm.translators is not None else []
    parts += ["--exit-layer", str(facts["exit_layer"])]
    parts += ["--config", "skip_global=true"] if facts["skip_global"] else []
    parts += ["--audit", "RUN"] if facts["audit"] is not None else []
    parts += ["--to", "gguf"] if facts["to"] is not None else []
    return " ".join([*parts, "--out", shlex.quote(out)])


def _folder_of(name: str) -> Path | None:
    return Path(name) if Path(name).is_dir() else None
