"""The model and the samples of a finished run, rebuilt from its run.json; whatever differs is refused.

A run may come from a stranger. Its model, adapter and suites are taken from it as data; whether a checkpoint's code may
run is decided by the caller alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from exitsafe.cli import console
from exitsafe.cli.models import load_model
from exitsafe.errors import ModelError, RunError
from exitsafe.specs.inputs import FullLoading

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM
    from exitsafe.records import Sample
    from exitsafe.results.run import AuditRun

_MUST_AGREE = tuple(
    f"model.{name} " for name in ("checkpoint", "adapter", "translators", "family", "encoder", "num_layers")
)


def model_of(run: AuditRun) -> str:
    """The name of the run's model.

    Raises:
        RunError: If the run was made in Python, where model and samples are at hand.
    """
    if run.is_served:
        raise RunError(
            f"{run.path} is the run of a served model ({run.summary['model']}), and its weights are not available here"
        )
    if not run.origin.get("suites") or not run.origin.get("model"):
        raise _not_repeatable(run)
    return str(run.origin["model"])


def _not_repeatable(run: AuditRun) -> RunError:
    return RunError(f"{run.path} was not made by the command line and does not say how to repeat it")


def read_samples_of(run: AuditRun) -> list[Sample]:
    """The very samples that the run asked.

    Raises:
        RunError: If the suites have changed since, or the run does not name them.
    """
    from exitsafe.data.source import source_of
    from exitsafe.store.fingerprint import data_fingerprint, sample_info

    if not run.origin.get("suites"):
        raise _not_repeatable(run)
    source = source_of(run.origin)
    samples = source.read()
    if data_fingerprint([sample_info(sample) for sample in samples])["hash"] != run.settings["data"]["hash"]:
        raise RunError(f"the suites of {run.path} ({', '.join(source.suites)}) have changed since; restore them")
    return samples


def loading_of(run: AuditRun, *, device: str | None = None, trust_remote_code: bool = False) -> FullLoading:
    """How to load the run's model: as recorded, at the recorded commit.

    Args:
        run: A finished run.
        device: Another device than the recorded one.
        trust_remote_code: Whether code from the checkpoint may run, whatever the run says.
    """
    from exitsafe.world.profile import profile_of

    model = model_of(run)
    changes: dict[str, object] = {"trust_remote_code": trust_remote_code}
    if not Path(model).exists() and profile_of(model) is None:
        changes["revision"] = run.settings["model"]["checkpoint"]
    if device is not None:
        changes["device"] = device
    return FullLoading(**{**(run.origin.get("loading") or {}), **changes})


@contextmanager
def remote_code_named(run: AuditRun, loading: FullLoading) -> Iterator[None]:
    """While a run's model is loaded: report that the run was made with code that this call does not allow."""
    if not (run.origin.get("loading") or {}).get("trust_remote_code") or loading.trust_remote_code:
        yield
        return
    hint = f"{run.path} was made with code from {model_of(run)}; add --trust-remote-code to run it"
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{hint} ({error})") from error
    console.note(hint)


def load_model_of(run: AuditRun, loading: FullLoading, *, offload_decoder: bool = False) -> VLM:
    """The run's model.

    Raises:
        RunError: If weights, adapter or translators are not those of the run.
    """
    from exitsafe.store.fingerprint import differences, model_fingerprint

    vlm = load_model(model_of(run), loading, offload_decoder=offload_decoder)
    changed = differences({"model": run.settings["model"]}, {"model": model_fingerprint(vlm)})
    if serious := [line for line in changed if line.startswith(_MUST_AGREE)]:
        raise RunError(f"this is not the model of {run.path}: {'; '.join(serious)}; restore it")
    return vlm
