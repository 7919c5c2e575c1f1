"""`exitsafe recommend`: a finished run -> which of its exits are safe, useful and fast enough, and which to ship."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exitsafe.cli import console
from exitsafe.cli.models import read_blueprint
from exitsafe.cli.run_model import load_model_of, loading_of, model_of, read_samples_of, remote_code_named
from exitsafe.errors import ModelError, RunError
from exitsafe.specs.inputs import FullLoading
from exitsafe.specs.verbs import RecommendSpec

if TYPE_CHECKING:
    from exitsafe.doctor.savings import Savings
    from exitsafe.engine.latency import Latency
    from exitsafe.records import Sample
    from exitsafe.results.run import AuditRun


def recommend_command(spec: RecommendSpec, show: console.Show) -> None:
    """Weigh the safety, usefulness and cost of each exit of a run, and recommend the cheapest within all limits.

    Times are measured on this machine with the run's model, one request at a time, and kept in RUN/latency.json. All
    bounds hold at once with 95% confidence, so you may try as many limits as you like.
    """
    from exitsafe.cli.recommend_tables import recommend_tables
    from exitsafe.recommend import check_limits, recommend
    from exitsafe.results.run import load_run
    from exitsafe.store.files import write_json

    run = load_run(spec.run)
    check_limits(run, spec.limits, has_latency=not spec.no_latency)
    if spec.no_latency:
        latency, savings = None, _savings_without_model(run, spec)
    else:
        asked = _read_samples(run)
        loading = loading_of(run, device=spec.device, trust_remote_code=spec.trust_remote_code)
        with remote_code_named(run, loading):
            latency = _latency(run, asked, num_samples=spec.num_samples, loading=loading)
            savings = _savings(run, asked, loading, spec.answer_tokens)
    choice = recommend(run, latency, savings, limits=spec.limits, num_answer_tokens=spec.answer_tokens)
    document = choice.to_dict()
    if spec.out is not None:
        write_json(spec.out, document)
    show(document, lambda: recommend_tables(choice))


def _read_samples(run: AuditRun) -> list[Sample]:
    if not run.origin.get("suites"):
        raise RunError(
            f"{run.path} was made in Python and does not say where its model is: give --no-latency, or call "
            "exitsafe.recommend.recommend with what exitsafe.engine.latency.measure_latency returns"
        )
    return read_samples_of(run)


def _latency(run: AuditRun, samples: list[Sample], *, num_samples: int, loading: FullLoading) -> Latency:
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
        "machine": describe_machine(find_device(loading.device)),
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


def _savings_without_model(run: AuditRun, spec: RecommendSpec) -> Savings | None:
    """Counted for an assumed prompt, if the model's config can be read; it is named if not."""
    try:
        loading = loading_of(run, trust_remote_code=spec.trust_remote_code)
        with remote_code_named(run, loading):
            return _savings(run, [], loading, spec.answer_tokens)
    except (ModelError, RunError) as error:
        console.note(f"cannot count what exits save: {error}")
        return None


def _savings(run: AuditRun, samples: list[Sample], loading: FullLoading, answer_tokens: int) -> Savings:
    """Counted on the model's config, which must be that of the run."""
    from exitsafe.doctor import count_savings, typical_prompt

    blueprint = read_blueprint(model_of(run), loading)
    model = run.settings["model"]
    was = (model["family"], model["num_layers"], model["default_exit"])
    if was != (blueprint.family, blueprint.num_layers, blueprint.default_exit):
        raise RunError(f"{model_of(run)} is not the model of {run.path}: its family or its exits differ; restore it")
    return count_savings(
        blueprint,
        typical_prompt(blueprint, samples),
        run.exit_layers,
        skip_global=bool(run.settings["skip_global"]),
        num_answer_tokens=answer_tokens,
    )
