"""`exitsafe audit`: flags -> what to audit and how -> a run directory and its table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from exitsafe.cli import console, defaults, options
from exitsafe.cli.models import load_model
from exitsafe.cli.settings_file import config_option
from exitsafe.errors import InputError


def audit_command(
    model: options.Model,
    out: options.Out,
    suite: options.Suites = None,
    layers: options.Layers = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Who scores; may come several times, the first speaks for a metric.",
            show_default="world-rule for organism suites, else the proxy refusal-prefix",
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR", help="A PEFT adapter, e.g. of align.", show_default=False)
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Take suites, layers, judges, decoding and seed from another run; flags win.",
            show_default=False,
        ),
    ] = None,
    limit: options.Limit = None,
    split: options.Split = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Longest answer.", show_default="256; an organism 24")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, metavar="T", help="0 is greedy.", show_default="0")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Answers under way at a time; changes no draw.", show_default="16; an organism 256"
        ),
    ] = None,
    skip_global: Annotated[
        bool | None,
        typer.Option("--skip-global", help="Llama 3.2 Vision: skip the global blocks too.", show_default=False),
    ] = None,
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: options.Quantization = None,
    trust_remote_code: options.TrustRemoteCode = False,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Measure a model's safety and utility at every exit layer of its image encoder.

    Answers are saved as they come: the same command goes on where it stopped.
    """
    with console.results(as_json=json) as show:
        given = {
            "suites": suite or None,
            "split": split,
            "seed": seed,
            "limit": limit,
            "exit_layers": layers,
            "judges": judge or None,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "skip_global": skip_global,
        }
        plan = make_plan(model, given, like=like)
        loading = {
            "adapter": adapter,
            "dtype": dtype,
            "device": device,
            "quantization": quantization,
            "trust_remote_code": trust_remote_code,
        }
        run = run_plan(plan, out=out, loading=loading, batch_size=batch_size)
        _say_if_proxy(run)
        from exitsafe.cli.tables import audit_tables

        show({"run": str(run.path), **run.summary}, lambda: audit_tables(run))


@dataclass(frozen=True, kw_only=True)
class AuditPlan:
    """Everything that decides an audit's numbers, the weights aside."""

    model: str
    origin: dict[str, Any]
    exit_layers: str | tuple[int, ...]
    judges: tuple[str, ...] | None
    decoding: dict[str, Any]


def make_plan(model: str, given: dict[str, Any], *, like: Path | None = None) -> AuditPlan:
    """Flags first, then the run to be like, then the defaults.

    Args:
        model: MODEL.
        given: By setting, what the flags say; None where they are silent.
        like: A finished run.
    """
    is_organism = defaults.organism_of(model) is not None
    fallback: dict[str, Any] = {
        "suites": None,
        "split": "heldout",
        "seed": 0,
        "limit": None,
        "exit_layers": "all",
        "judges": None,
        "max_new_tokens": defaults.ORGANISM_TOKENS if is_organism else defaults.MODEL_TOKENS,
        "temperature": 0.0,
        "skip_global": False,
    }
    inherited = {} if like is None else settings_of(like, needs_suites=given.get("suites") is None)
    chosen = fallback | inherited | {name: value for name, value in given.items() if value is not None}
    suites = defaults.choose_suites(model, chosen["suites"], otherwise="--suite NAME_OR_FILE or --like RUN")
    origin = defaults.make_origin(
        model, suites=suites, split=chosen["split"], seed=chosen["seed"], limit=chosen["limit"]
    )
    return AuditPlan(
        model=model,
        # samples of an organism's suites stay that organism's, whatever model is asked now
        origin=origin | ({"organism": inherited["organism"]} if "organism" in inherited else {}),
        exit_layers=chosen["exit_layers"],
        judges=None if chosen["judges"] is None else tuple(chosen["judges"]),
        decoding={name: chosen[name] for name in ("max_new_tokens", "temperature", "seed", "skip_global")},
    )


def settings_of(run: Path, *, needs_suites: bool) -> dict[str, Any]:
    """Another run's settings under the names of `make_plan`."""
    from exitsafe.runs import load_run

    found = load_run(run)
    origin, settings = dict(found.origin), found.settings
    if needs_suites and not origin.get("suites"):
        raise InputError(f"{run} does not say which suites its samples are from: give --suite NAME_OR_FILE")
    return {
        **origin,
        "exit_layers": found.exit_layers,
        "judges": [name for name, _ in found.judges],
        "skip_global": settings["skip_global"],
        **settings["decoding"],
    }


def run_plan(
    plan: AuditPlan, *, out: Path, loading: dict[str, Any], batch_size: int | None = None, title: str = "Audit"
) -> Any:
    """Read the samples and judges, which is quick and can fail, then load the model and audit it."""
    samples = defaults.read_samples(plan.origin)
    from exitsafe.judges import load_judges

    judges = None if plan.judges is None else load_judges(plan.judges)
    from exitsafe.sweep import audit

    vlm = load_model(plan.model, **loading)
    is_organism = defaults.organism_of(plan.model) is not None
    with console.progress_bar(title, unit="answer") as progress:
        return audit(
            vlm,
            samples,
            judges=judges,
            exit_layers=plan.exit_layers,
            out=out,
            batch_size=batch_size or (defaults.ORGANISM_BATCH if is_organism else defaults.MODEL_BATCH),
            progress=progress,
            origin=plan.origin,
            **plan.decoding,
        )


def _say_if_proxy(run: Any) -> None:
    speaker = next((name for name, measures in run.judges if "asr" in measures), None)
    if speaker == "refusal-prefix":
        console.note(
            "refusal-prefix is a proxy: a harmful request counts as a successful attack unless the answer opens with "
            "a known refusal"
        )
