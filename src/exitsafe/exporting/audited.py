"""A finished audit and an exit in, its results there out: numbers, ids and names, never an answer's text.

A run of another model is refused: a card must not show another model's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
from peft import PeftModel
from pydantic import ValidationError

from exitsafe.errors import RunError
from exitsafe.exporting.manifest import (
    Audited,
    AuditedData,
    AuditedJudge,
    AuditedSuite,
    Decoding,
    HubSuite,
    SuiteResult,
)
from exitsafe.exporting.model_card import public_name
from exitsafe.results.metrics import METRICS, Metric, judge_of
from exitsafe.results.run import AuditRun
from exitsafe.stats import Estimate, layer_estimates
from exitsafe.store.fingerprint import differences, model_fingerprint
from exitsafe.untrusted import JsonObject

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM

_MUST_AGREE = (
    "family",
    "encoder",
    "num_layers",
    "default_exit",
    "checkpoint",
    "adapter",
    "translators",
    "dtype",
    "quantization",
)


def check_is_of(run: AuditRun, vlm: VLM, *, exit_layer: int, skip_global: bool) -> None:
    """Raise RunError unless the run is an audit of this model at this exit."""
    then, now = run.settings["model"], model_fingerprint(vlm)
    if now["checkpoint"] is None or (now["adapter"] is None and isinstance(vlm.model, PeftModel)):
        raise RunError(
            f"{vlm.name} was not loaded from files, so {run.path} cannot be shown to be its audit: leave the audit out"
        )
    changed = differences({name: then.get(name) for name in _MUST_AGREE}, {name: now.get(name) for name in _MUST_AGREE})
    if changed:
        raise RunError(f"{run.path} is a run of another model ({'; '.join(changed)}): give an audit of this one")
    if bool(run.settings["skip_global"]) != skip_global:
        audited, exported = ("without", "with") if run.settings["skip_global"] else ("with", "without")
        raise RunError(
            f"{run.path} was audited {audited} the global blocks, but the export is {exported} them: give an audit "
            f"{exported} them"
        )
    if exit_layer not in run.exit_layers:
        raise RunError(
            f"{run.path} has no exit layer {exit_layer}, only {', '.join(map(str, run.exit_layers))}: audit that exit"
        )


def audit_record(run: AuditRun, *, exit_layer: int) -> Audited:
    """The part of a run's results that the manifest and the card contain, for one exit.

    Raises:
        RunError: If the run's settings are not what an audit writes.
    """
    try:
        return _record(run, exit_layer)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise RunError(f"{run.path}/run.json: {place}: {fault['msg']}; give an audit that was not edited") from error


def _record(run: AuditRun, exit_layer: int) -> Audited:
    settings, default = run.settings, run.default_exit
    data = AuditedData(hash=settings["data"]["hash"], samples=settings["data"]["samples"], suites=_suites(run))
    is_other = default in run.exit_layers and default != exit_layer
    return Audited(
        run=run.path.resolve().name,
        finished=datetime.fromtimestamp((run.path / "summary.json").stat().st_mtime, tz=UTC).date().isoformat(),
        exit_layer=exit_layer,
        metrics=_metrics(run, exit_layer),
        default_exit=default,
        at_default=_metrics(run, default) if is_other else None,
        data=data,
        results=tuple(_by_suite(run, exit_layer=exit_layer)),
        judges=tuple(_judge(judge, run.proxies.get(judge["name"])) for judge in settings["judges"]),
        decoding=Decoding(**settings["decoding"]),
        cautions=tuple(_without_folders(line, run) for line in run.cautions),
        stopped_early=settings["stop_when"] is not None,
        versions=settings["versions"],
    )


def _metrics(run: AuditRun, exit_layer: int) -> dict[str, Estimate]:
    """Metrics without seconds: several exits share a batch and its time."""
    names = [metric.name for metric in METRICS if metric.name != "seconds"]
    return {name: found for name in names if (found := run.at_exits(name).get(exit_layer)) is not None}


def _suites(run: AuditRun) -> tuple[AuditedSuite, ...]:
    """Name, number of samples and, for suites from the Hub, their source."""
    hub = run.origin.get("hub") or {}
    return tuple(
        AuditedSuite(name=name or "unnamed", samples=count, hub=HubSuite(**hub[name]) if name in hub else None)
        for name, count in run.settings["data"]["sources"].items()
    )


def _by_suite(run: AuditRun, *, exit_layer: int) -> Iterator[SuiteResult]:
    """Each metric for each suite separately, from the judge that reports it."""
    table = run.score_table()
    column = run.exit_layers.index(exit_layer)
    for metric in METRICS:
        judge = judge_of(metric, run.judges)
        scores = None if metric.is_own or judge is None else table.scores.get((judge, metric.measure))
        if scores is None:
            continue
        rows = table.of_kinds(metric.kinds)
        suites = sorted({table.samples[row].source for row in rows})
        if len(suites) > 1 and _has_stopped(run, metric):
            continue  # no interval for a part of what stopped as a whole
        for suite in suites:
            own = np.array([row for row in rows if table.samples[row].source == suite], dtype=np.intp)
            part = scores.of_samples(own)
            found = layer_estimates(
                part.values[:, [column]], part.unscored[:, [column]], exit_layers=[exit_layer], bounds=metric.bounds
            ).get(exit_layer)
            if found is not None and found.value is not None:
                if len(suites) == 1:  # as in the run's own table
                    found = run.at_exits(metric.name)[exit_layer]
                yield SuiteResult(
                    suite=suite or "unnamed", metric=metric.name, judge=_public(str(judge)), **vars(found)
                )


def _has_stopped(run: AuditRun, metric: Metric) -> bool:
    return run.settings["stop_when"] is not None and metric.kinds == ("harmful",)


def _judge(judge: JsonObject, proxy: Mapping[str, str] | None) -> AuditedJudge:
    """Name, measures, model and commit, without paths on this machine."""
    settings = judge.get("settings", {})
    model = settings.get("model")
    return AuditedJudge(
        name=_public(str(judge["name"])),
        measures=tuple(judge["measures"]),
        proxy=dict(proxy or {}),
        model=None if model is None else public_name(str(model)),
        revision=settings.get("revision"),
    )


def _without_folders(line: str, run: AuditRun) -> str:
    """A caution with judges' names as on the card."""
    for name in sorted((name for name, _ in run.judges), key=len, reverse=True):
        line = line.replace(name, _public(name))
    return line


def _public(judge: str) -> str:
    kind, colon, model = judge.partition(":")
    return f"{kind}{colon}{public_name(model)}"
