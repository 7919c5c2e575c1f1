"""A finished audit and an exit in, what it measured there out: numbers, ids and names, never a text.

Refuses a run of another model: a card must not carry another model's numbers. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import PeftModel

from exitsafe.errors import RunError
from exitsafe.exporting.model_card import public_name
from exitsafe.results.metrics import METRICS, Metric, judge_of
from exitsafe.results.run import AuditRun
from exitsafe.stats import layer_estimates
from exitsafe.store.fingerprint import differences, model_fingerprint

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM

_MUST_AGREE = (
    "family",
    "num_layers",
    "default_exit",
    "checkpoint",
    "adapter",
    "translators",
    "dtype",
    "quantization",
)


def check_is_of(run: AuditRun, vlm: VLM, *, exit_layer: int, skip_global: bool) -> None:
    """Raises RunError unless the run asked this very model at this exit."""
    then, now = run.settings["model"], model_fingerprint(vlm)
    if now["checkpoint"] is None or (now["adapter"] is None and isinstance(vlm.model, PeftModel)):
        raise RunError(f"{vlm.name} was not loaded from files, so nothing shows that {run.path} is of it: leave it out")
    changed = differences({name: then.get(name) for name in _MUST_AGREE}, {name: now.get(name) for name in _MUST_AGREE})
    if changed:
        raise RunError(f"{run.path} is a run of another model ({'; '.join(changed)}): give an audit of this one")
    if bool(run.settings["skip_global"]) != skip_global:
        raise RunError(
            f"{run.path} was made {'without' if run.settings['skip_global'] else 'with'} the global blocks, and this "
            "export is otherwise: give an audit like it"
        )
    if exit_layer not in run.exit_layers:
        raise RunError(
            f"{run.path} has no exit layer {exit_layer}, only {', '.join(map(str, run.exit_layers))}: audit that exit"
        )


def audit_record(run: AuditRun, *, exit_layer: int) -> dict[str, Any]:
    """What the manifest and the card say of a run at one exit, as JSON."""
    settings = run.settings
    layers = {entry["exit_layer"]: entry["metrics"] for entry in run.summary["layers"]}
    default = int(settings["model"]["default_exit"])
    return {
        "run": run.path.resolve().name,
        "finished": datetime.fromtimestamp((run.path / "summary.json").stat().st_mtime, tz=UTC).date().isoformat(),
        "exit_layer": exit_layer,
        "metrics": _judged_only(layers[exit_layer]),
        "default_exit": default,
        "at_default": _judged_only(layers[default]) if default in layers and default != exit_layer else None,
        "data": {
            "hash": settings["data"]["hash"],
            "samples": settings["data"]["samples"],
            "suites": _suites(run),
        },
        "results": _by_suite(run, exit_layer=exit_layer),
        "judges": [_judge(judge, run.proxies.get(judge["name"])) for judge in settings["judges"]],
        "decoding": dict(settings["decoding"]),
        "cautions": [_without_folders(line, run) for line in run.cautions],
        "stopped_early": settings["stop_when"] is not None,
        "versions": dict(settings["versions"]),
    }


def _judged_only(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Without seconds: a batch holds several exits, and its time is shared out."""
    return {name: dict(found) for name, found in metrics.items() if name != "seconds"}


def _suites(run: AuditRun) -> list[dict[str, Any]]:
    """Name, number of samples and, for suites of the Hub, where they are from."""
    hub = run.origin.get("hub") or {}
    return [
        {"name": name or "unnamed", "samples": count, "hub": dict(hub[name]) if name in hub else None}
        for name, count in run.settings["data"]["sources"].items()
    ]


def _by_suite(run: AuditRun, *, exit_layer: int) -> list[dict[str, Any]]:
    """Each metric of each suite by itself, by the judge that speaks for it."""
    table = run.score_table()
    column = run.exit_layers.index(exit_layer)
    found: list[dict[str, Any]] = []
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
            estimates = layer_estimates(
                part.values[:, [column]], part.unscored[:, [column]], exit_layers=[exit_layer], bounds=metric.bounds
            )
            if exit_layer in estimates and estimates[exit_layer].value is not None:
                estimate = vars(estimates[exit_layer])
                if len(suites) == 1:  # as in the run's own table
                    layers = {entry["exit_layer"]: entry["metrics"] for entry in run.summary["layers"]}
                    estimate = layers[exit_layer][metric.name]
                found.append(
                    {"suite": suite or "unnamed", "metric": metric.name, "judge": _told(str(judge)), **estimate}
                )
    return found


def _has_stopped(run: AuditRun, metric: Metric) -> bool:
    return run.settings["stop_when"] is not None and metric.kinds == ("harmful",)


def _judge(judge: Mapping[str, Any], proxy: Mapping[str, str] | None) -> dict[str, Any]:
    """Name, measures, and which model at which commit; paths of this machine stay here."""
    settings = judge.get("settings", {})
    kept = {name: settings[name] for name in ("model", "revision") if settings.get(name) is not None}
    if "model" in kept:
        kept["model"] = public_name(str(kept["model"]))
    return {
        "name": _told(str(judge["name"])),
        "measures": list(judge["measures"]),
        **({} if proxy is None else {"proxy": dict(proxy)}),
        **kept,
    }


def _without_folders(line: str, run: AuditRun) -> str:
    """A caution with judges named as on the card."""
    for name in sorted((name for name, _ in run.judges), key=len, reverse=True):
        line = line.replace(name, _told(name))
    return line


def _told(judge: str) -> str:
    kind, colon, model = judge.partition(":")
    return f"{kind}{colon}{public_name(model)}"
