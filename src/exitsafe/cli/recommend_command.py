"""`exitsafe recommend`: a finished run -> which of its exits are safe, useful and fast enough, and which to ship."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitsafe.cli import console, options
from exitsafe.cli.models import read_blueprint
from exitsafe.cli.run_model import load_model_of, loading_of, origin_of_model, read_samples_of, remote_code_named
from exitsafe.cli.settings_file import config_option
from exitsafe.errors import InputError, ModelError, RunError

if TYPE_CHECKING:
    from exitsafe.doctor.savings import Savings
    from exitsafe.engine.latency import Latency
    from exitsafe.records import Sample
    from exitsafe.results.run import AuditRun

_NUM_SAMPLES = 8
_READ_WITH = ("dtype", "quantization", "revision", "trust_remote_code")
"""What of the loading decides shapes and types."""


def recommend_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.", show_default=False)],
    max_asr: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Highest attack success allowed, 0 to 1 (upper bound).", show_default=False),
    ] = None,
    min_vqa: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Lowest VQA accuracy allowed, 0 to 1 (lower bound).", show_default=False),
    ] = None,
    max_over_refusal: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Highest over-refusal allowed, 0 to 1 (upper bound).", show_default=False),
    ] = None,
    max_ms: Annotated[
        float | None,
        typer.Option(metavar="MS", help="Longest median time of an answer (upper bound).", show_default=False),
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens in an answer whose time is weighed.", hidden=True)
    ] = 64,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Samples to time, one at a time, three times each.",
            hidden=True,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="auto, cpu or cuda:N.", show_default="as in the audit")
    ] = None,
    no_latency: Annotated[
        bool, typer.Option("--no-latency", help="Do not measure times; the model is not needed.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Also write every number to this file.", show_default=False)
    ] = None,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Weigh the safety, usefulness and cost of each exit of a run, and recommend the cheapest within all limits.

    Times are measured on this machine with the run's model, one request at a time, and kept in RUN/latency.json. All
    bounds hold at once with 95% confidence, so you may try as many limits as you like.
    """
    with console.results(as_json=json) as show:
        from exitsafe.cli.recommend_tables import recommend_tables
        from exitsafe.recommend import Limits, check_limits, recommend
        from exitsafe.results.run import load_run
        from exitsafe.store.files import write_json

        found = load_run(run)
        limits = Limits(max_asr=max_asr, min_vqa=min_vqa, max_over_refusal=max_over_refusal, max_ms=max_ms)
        if no_latency:
            _refuse_what_measures(max_ms=max_ms, samples=samples, device=device)
        check_limits(found, limits, has_latency=not no_latency)
        if no_latency:
            latency = None
            savings = _savings_without_model(found, answer_tokens, trust_remote_code=trust_remote_code)
        else:
            asked = _read_samples(found)
            loading = loading_of(found, device=device, trust_remote_code=trust_remote_code)
            with remote_code_named(found, loading):
                latency = _latency(found, asked, num_samples=samples or _NUM_SAMPLES, loading=loading)
                savings = _savings(found, asked, loading, answer_tokens)
        choice = recommend(found, latency, savings, limits=limits, num_answer_tokens=answer_tokens)
        document = choice.to_dict()
        if out is not None:
            write_json(out, document)
        show(document, lambda: recommend_tables(choice))


def _refuse_what_measures(**flags: Any) -> None:
    for name, value in flags.items():
        if value is not None:
            raise InputError(f"--{name.replace('_', '-')} needs measured times; drop it or --no-latency")


def _read_samples(run: AuditRun) -> list[Sample]:
    if not run.origin.get("suites"):
        raise RunError(
            f"{run.path} was made in Python and does not say where its model is: give --no-latency, or call "
            "exitsafe.recommend.recommend with what exitsafe.engine.latency.measure_latency returns"
        )
    return read_samples_of(run)


def _latency(run: AuditRun, samples: list[Sample], *, num_samples: int, loading: Mapping[str, Any]) -> Latency:
    """What latency.json has for this machine and these settings, else measured now and kept there."""
    from exitsafe.engine.latency import NEW_TOKENS, NUM_REPEATS, measure_latency
    from exitsafe.machine.devices import describe_machine, find_device
    from exitsafe.results.latencies import keep_latency, kept_latency

    model = {
        name: value for name, value in run.settings["model"].items() if name not in ("name", "device", "processor")
    }
    settings = {
        "model": model,
        "data": run.settings["data"]["hash"],
        "exit_layers": list(run.exit_layers),
        "skip_global": run.settings["skip_global"],
        "num_samples": num_samples,
        "repeats": NUM_REPEATS,
        "new_tokens": NEW_TOKENS,
        "machine": describe_machine(find_device(loading.get("device", "auto"))),
    }
    kept = kept_latency(run.path, settings)
    if kept is not None:
        console.note(f"using the times in {run.path}/latency.json, measured on this machine with the same settings")
        return kept
    vlm = load_model_of(run, loading)
    with console.progress_bar("Timing", unit="answer") as progress:
        latency = measure_latency(
            vlm,
            samples,
            run.exit_layers,
            num_samples=num_samples,
            skip_global=bool(run.settings["skip_global"]),
            progress=progress,
        )
    try:
        keep_latency(run.path, settings, latency)
    except RunError as error:  # a run kept where nothing can be written is weighed all the same
        console.note(f"times could not be saved for next time: {error}")
    return latency


def _savings_without_model(run: AuditRun, answer_tokens: int, *, trust_remote_code: bool) -> Savings | None:
    """Counted for an assumed prompt, if the model's config can be read; it is named if not."""
    try:
        loading = loading_of(run, trust_remote_code=trust_remote_code)
        with remote_code_named(run, loading):
            return _savings(run, [], loading, answer_tokens)
    except (ModelError, RunError) as error:
        console.note(f"cannot count what exits save: {error}")
        return None


def _savings(run: AuditRun, samples: list[Sample], loading: Mapping[str, Any], answer_tokens: int) -> Savings:
    """Counted on the model's config, which must be that of the run."""
    from exitsafe.doctor import count_savings, typical_prompt

    origin = origin_of_model(run)
    given = {name: value for name, value in loading.items() if name in _READ_WITH}
    blueprint = read_blueprint(origin["model"], **given)
    model = run.settings["model"]
    was = (model["family"], model["num_layers"], model["default_exit"])
    if was != (blueprint.family, blueprint.num_layers, blueprint.default_exit):
        raise RunError(f"{origin['model']} is not the model of {run.path}: its family or its exits differ; restore it")
    return count_savings(
        blueprint,
        typical_prompt(blueprint, samples),
        run.exit_layers,
        skip_global=bool(run.settings["skip_global"]),
        num_answer_tokens=answer_tokens,
    )
