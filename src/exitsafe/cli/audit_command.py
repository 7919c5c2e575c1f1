"""`exitsafe audit`: what to audit and how -> a run directory and its table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from exitsafe.cli import console
from exitsafe.cli.models import announce, load_model
from exitsafe.errors import RunError
from exitsafe.specs.inputs import is_url
from exitsafe.specs.verbs import AuditSpec

if TYPE_CHECKING:
    from exitsafe.auditing.plan import Plan
    from exitsafe.engine.vllm_server import VLLMServer
    from exitsafe.engine.vlm import VLM
    from exitsafe.judges import Judge
    from exitsafe.records import Sample
    from exitsafe.results.run import AuditRun


def audit_command(spec: AuditSpec, show: console.Show) -> None:
    """Measure a model's safety and utility at every exit layer of its image encoder.

    Answers are saved as they come; rerun the same command to resume. `accelerate launch -m exitsafe audit ...` shares
    the work among GPUs and nodes.
    """
    show_results(run_audit(spec), show)


def run_audit(spec: AuditSpec, *, title: str = "Audit") -> AuditRun:
    """Read the samples and judges, which is quick and can fail, then load the model and audit it."""
    from exitsafe.auditing.plan import plan_audit

    plan = plan_audit(spec)
    samples = plan.source.read()
    plan = plan.resumed()
    judges = plan.load_judges(samples)
    if is_url(spec.model):
        return audit_as_planned(plan, spec.model, samples, judges, title=title)
    announce(spec.model, adapter=spec.loading.adapter)
    engine = reach_engine(spec.engine)
    vlm = load_model(spec.model, spec.loading, offload_decoder=engine is not None)
    vlm.today = plan.today or vlm.today
    return audit_as_planned(plan, vlm, samples, judges, title=title, engine=engine)


def reach_engine(url: str | None) -> VLLMServer | None:
    """The server at --engine, reached before a model is loaded."""
    if url is None:
        return None
    from exitsafe.engine.vllm_server import VLLMServer

    return VLLMServer(url)


def audit_as_planned(
    plan: Plan,
    vlm: VLM | str,
    samples: Sequence[Sample],
    judges: list[Judge] | None,
    *,
    title: str,
    engine: VLLMServer | None = None,
) -> AuditRun:
    """The audit itself, of a model or of a URL, with a progress bar."""
    from exitsafe.auditing.audit import audit

    spec = plan.spec
    with console.progress_bar(title, unit="answer") as progress:
        run = audit(
            vlm,
            samples,
            judges=judges,
            exit_layers=spec.exit_layers,
            out=spec.out,
            max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature,
            seed=spec.seed,
            batch_size=spec.batch_size,
            skip_global=spec.skip_global,
            engine=engine,
            judge_pass=spec.judge_pass,
            stop_when=plan.stop_when,
            progress=progress,
            origin=plan.origin,
        )
    say_costs(judges or [])
    return run


def show_results(run: AuditRun, show: console.Show, *, asked: Collection[str] | None = None) -> None:
    """Print a run's tables; then fail if a judge scored nothing at all.

    Args:
        run: A finished run.
        show: From `console.results`.
        asked: The judges that this call asked; None for all of the run's.

    Raises:
        RunError: If one of them left every answer unscored. The answers are kept.
    """
    from exitsafe.judges.asking import tell_unscored, unscored_reasons
    from exitsafe.show.tables import audit_tables

    verdicts = run.verdicts()
    unscored = unscored_reasons(verdicts)
    document = {"run": str(run.path), **run.summary, **({"unscored": unscored} if unscored else {})}
    show(document, lambda: audit_tables(run))
    scored = {verdict.judge for verdict in verdicts if verdict.score is not None}
    for judge in unscored.keys() - scored:
        if asked is None or judge in asked:
            line = tell_unscored([verdict for verdict in verdicts if verdict.judge == judge])[0]
            raise RunError(
                f"{line}; the answers are kept: mend the cause, then exitsafe judge {run.path} --judge {judge} "
                "--retry-unscored"
            )


def say_costs(judges: Sequence[Judge]) -> None:
    """What endpoints were asked for in this start, in requests, tokens and, where prices are known, dollars."""
    for judge in judges:
        endpoint = getattr(judge, "endpoint", None)
        if endpoint is not None and endpoint.usage.requests:
            used, cost = endpoint.usage, endpoint.cost
            note = f"{judge.name}: {used.requests} requests, {used.tokens_in} tokens in, {used.tokens_out} out"
            note += "" if cost is None else f", ${cost:.2f}"
            if used.uncounted:  # tokens and cost are then too low
                note += f"; {used.uncounted} replies did not report their tokens"
            console.note(note)
