"""The model and the samples of a finished run, rebuilt from its run.json; whatever differs is refused.

A run may come from a stranger. Its model, adapter and suites are taken from it as data; whether a checkpoint's code may
run is decided by the caller alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitsafe.cli import console, defaults
from exitsafe.cli.models import load_model
from exitsafe.errors import ModelError, RunError

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM
    from exitsafe.records import Sample
    from exitsafe.results.run import AuditRun

_RECORDED = ("adapter", "translators", "revision", "dtype", "device", "quantization")
"""Arguments of `load_vlm` that are taken from a run."""
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
    from exitsafe.store.fingerprint import data_fingerprint, sample_info

    origin = origin_of_model(run)
    samples = defaults.read_samples(origin)
    if data_fingerprint([sample_info(sample) for sample in samples])["hash"] != run.settings["data"]["hash"]:
        raise RunError(f"the suites of {run.path} ({', '.join(origin['suites'])}) have changed since; restore them")
    return samples


def loading_of(run: AuditRun, *, device: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """The arguments of `load_vlm` other than the model's name: as recorded, at the recorded commit.

    Args:
        run: A finished run.
        device: Another device than the recorded one.
        trust_remote_code: Whether code from the checkpoint may run, whatever the run says.
    """
    origin = origin_of_model(run)
    recorded = origin.get("loading") or {}
    loading = {name: recorded[name] for name in _RECORDED if name in recorded}
    if not Path(origin["model"]).exists() and defaults.organism_of(origin["model"]) is None:
        loading["revision"] = run.settings["model"]["checkpoint"]
    return loading | ({} if device is None else {"device": device}) | {"trust_remote_code": trust_remote_code}


@contextmanager
def remote_code_named(run: AuditRun, loading: Mapping[str, Any]) -> Iterator[None]:
    """While a run's model is loaded: report that the run was made with code that this call does not allow."""
    origin = origin_of_model(run)
    if not (origin.get("loading") or {}).get("trust_remote_code") or loading.get("trust_remote_code"):
        yield
        return
    hint = f"{run.path} was made with code from {origin['model']}; add --trust-remote-code to run it"
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{hint} ({error})") from error
    console.note(hint)


def load_model_of(run: AuditRun, loading: Mapping[str, Any]) -> VLM:
    """The run's model.

    Raises:
        RunError: If weights, adapter or translators are not those of the run.
    """
    from exitsafe.store.fingerprint import differences, model_fingerprint

    vlm = load_model(origin_of_model(run)["model"], **loading)
    changed = differences({"model": run.settings["model"]}, {"model": model_fingerprint(vlm)})
    if serious := [line for line in changed if line.startswith(_MUST_AGREE)]:
        raise RunError(f"this is not the model of {run.path}: {'; '.join(serious)}; restore it")
    return vlm
