"""The model and the samples of a finished run, made again from its run.json; what is not the same is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitsafe.cli import defaults
from exitsafe.cli.models import load_model
from exitsafe.errors import RunError

if TYPE_CHECKING:
    from exitsafe.records import Sample
    from exitsafe.runs import AuditRun
    from exitsafe.vlm import VLM

_MUST_AGREE = ("model.checkpoint ", "model.adapter ", "model.translators ", "model.family ", "model.num_layers ")


def origin_of_model(run: AuditRun) -> dict[str, Any]:
    """What the run's command line noted.

    Raises:
        RunError: If the run was made in Python, where model and samples are at hand.
    """
    origin = dict(run.origin)
    if not origin.get("suites") or not origin.get("model"):
        raise RunError(f"{run.path} was not made by the command line and does not say how to repeat it")
    return origin


def read_samples_of(run: AuditRun) -> list[Sample]:
    """The very samples that the run asked.

    Raises:
        RunError: If the suites have changed since, or the run does not name them.
    """
    from exitsafe.runs.fingerprint import data_fingerprint, sample_info

    origin = origin_of_model(run)
    samples = defaults.read_samples(origin)
    if data_fingerprint([sample_info(sample) for sample in samples])["hash"] != run.settings["data"]["hash"]:
        raise RunError(f"the suites of {run.path} ({', '.join(origin['suites'])}) have changed since; restore them")
    return samples


def loading_of(run: AuditRun, *, device: str | None = None) -> dict[str, Any]:
    """The arguments of `load_vlm` beside the model's name: as then, at the very commit, on another device if wanted."""
    origin = origin_of_model(run)
    loading = {**origin["loading"], **({} if device is None else {"device": device})}
    if not Path(origin["model"]).exists() and defaults.organism_of(origin["model"]) is None:
        loading["revision"] = run.settings["model"]["checkpoint"]
    return loading


def load_model_of(run: AuditRun, loading: Mapping[str, Any]) -> VLM:
    """The run's model.

    Raises:
        RunError: If weights, adapter or translators are not those of the run.
    """
    from exitsafe.runs.fingerprint import differences, model_fingerprint

    vlm = load_model(origin_of_model(run)["model"], **loading)
    changed = differences({"model": run.settings["model"]}, {"model": model_fingerprint(vlm)})
    if serious := [line for line in changed if line.startswith(_MUST_AGREE)]:
        raise RunError(f"this is not the model of {run.path}: {'; '.join(serious)}; restore it")
    return vlm
