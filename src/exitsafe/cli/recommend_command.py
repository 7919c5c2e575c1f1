"""`exitsafe recommend`: a finished run -> which of its exits are safe, useful and fast enough, and which to ship."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from exitsafe.cli import console
from exitsafe.errors import RunError
from exitsafe.specs.verbs import RecommendSpec

if TYPE_CHECKING:
    from exitsafe.results.costs import Costs
    from exitsafe.results.run import AuditRun


def recommend_command(spec: RecommendSpec, show: console.Show) -> None:
    """Weigh the safety, usefulness and cost of each exit of a run, and recommend the cheapest within all limits.

    With --time the run's model is timed on this machine, one request at a time; RUN/costs.json keeps the result for
    later calls. All bounds hold at once with 95% confidence, so you may try as many limits as you like.
    """
    from exitsafe.cli.recommend_tables import recommend_tables
    from exitsafe.recommend import check_limits, recommend
    from exitsafe.results.costs import NAME
    from exitsafe.results.run import load_run
    from exitsafe.store.files import write_json

    run = load_run(spec.run)
    costs = None if spec.time else _kept_costs(run, spec)
    check_limits(run, spec.limits, has_latency=spec.time or costs is not None)
    if spec.time:
        costs = _measure(run, spec)
    if costs is None:
        choice = recommend(run, limits=spec.limits)
    else:
        tokens = costs.savings.num_answer_tokens
        choice = recommend(run, costs.latency, costs.savings, limits=spec.limits, num_answer_tokens=tokens)
        if not spec.time:
            origin = f"times were read from {run.path / NAME}, measured on {costs.machine.get('device_name')}"
            choice = replace(choice, cautions=(*choice.cautions, f"{origin}; --time measures on this machine"))
    document = choice.to_dict()
    if spec.out is not None:
        write_json(spec.out, document)
    show(document, lambda: recommend_tables(choice))


def _kept_costs(run: AuditRun, spec: RecommendSpec) -> Costs | None:
    """What an earlier call measured; without a limit on time, a file that cannot be read is only reported."""
    from exitsafe.results.costs import read_costs

    try:
        return read_costs(run)
    except RunError as error:
        if spec.limits.max_ms is not None:
            raise
        console.note(f"going on without times: {error}")
        return None


def _measure(run: AuditRun, spec: RecommendSpec) -> Costs:
    """Times of the run's model on this machine and what its exits save, kept in the run."""
    from exitsafe.cli.models import read_blueprint
    from exitsafe.cli.run_model import load_model_of, loading_of, model_of, read_samples_of, remote_code_named
    from exitsafe.doctor import count_savings, typical_prompt
    from exitsafe.engine.latency import measure_latency
    from exitsafe.machine.devices import describe_machine, find_device
    from exitsafe.results.costs import Costs, audited_in, write_costs

    skip_global = bool(run.settings["skip_global"])
    samples = read_samples_of(run)
    loading = loading_of(run, device=spec.device, trust_remote_code=spec.trust_remote_code)
    device = find_device(loading.device)
    with remote_code_named(run, loading):
        vlm = load_model_of(run, loading)
        blueprint = read_blueprint(model_of(run), loading)
    with console.progress_bar("Timing", unit="answer") as progress:
        latency = measure_latency(
            vlm, samples, run.exit_layers, num_samples=spec.num_samples, skip_global=skip_global, progress=progress
        )
    savings = count_savings(
        blueprint,
        typical_prompt(blueprint, samples),
        run.exit_layers,
        skip_global=skip_global,
        num_answer_tokens=spec.answer_tokens,
    )
    costs = Costs(audited=audited_in(run), machine=describe_machine(device), latency=latency, savings=savings)
    try:
        write_costs(run, costs)
    except RunError as error:  # a run in a read-only folder is weighed all the same
        console.note(f"times could not be saved for next time: {error}")
    return costs
