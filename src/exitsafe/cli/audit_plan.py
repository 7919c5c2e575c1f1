"""What an audit is of and how it is made: flags, another run or a run's own record in, a plan out, and its run.

Flags override the run given as --like, which overrides the defaults. A run may come from a stranger: judge addresses
and rubrics are not taken from it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitsafe.cli import console, defaults, options
from exitsafe.cli.models import announce, load_model
from exitsafe.errors import InputError, RunError
from exitsafe.untrusted import UnreadableError, read_json

if TYPE_CHECKING:
    from exitsafe.engine.vlm import VLM
    from exitsafe.judges import Judge
    from exitsafe.records import Sample
    from exitsafe.results.run import AuditRun


DECODING = ("max_new_tokens", "temperature", "seed")
"""Arguments of `audit` that are taken from the `decoding` of a run."""


@dataclass(frozen=True, kw_only=True)
class AuditPlan:
    """Everything that decides an audit's numbers, the weights aside.

    `origin` is what run.json keeps to draw or read the same samples again; `judging` are the fields of `JudgeOptions`;
    `settings` are arguments of `audit`.
    """

    model: str
    origin: dict[str, Any]
    exit_layers: str | tuple[int, ...]
    judges: tuple[str, ...] | None
    judging: dict[str, Any]
    settings: dict[str, Any]
    today: str | None = None
    """The date given to chat templates; None is the day of loading."""


def make_plan(model: str, given: Mapping[str, Any], *, like: Path | None = None) -> AuditPlan:
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
        "images": None,
        "categories": None,
        "hub": None,
        "exit_layers": "all",
        "judges": None,
        "max_new_tokens": defaults.ORGANISM_TOKENS if is_organism else None,
        "temperature": 0.0,
        "skip_global": False,
        "batch_size": None,
        "judge_pass": "beside",
        "stop_when": None,
        "today": None,
    }
    inherited = {} if like is None else settings_of(like, needs_suites=given.get("suites") is None)
    if replaced := inherited.get("replaced_judges"):
        inherited["judges"] = _as_wanted(inherited["judges"], replaced)
    chosen = fallback | inherited | {name: value for name, value in given.items() if value is not None}
    judging = given.get("judging") or {}
    options.check_judging(judging, judges=chosen["judges"] or ())
    if like is not None:
        judging = judging_like(like, judging, judges=chosen["judges"] or (), named=given.get("judges") or ())
    suites = defaults.choose_suites(model, chosen["suites"], otherwise="--suite NAME_OR_FILE or --like RUN")
    drawn = {name: chosen[name] for name in ("split", "seed", "limit", "images", "categories", "hub")}
    origin = defaults.make_origin(model, suites=suites, **drawn)
    return AuditPlan(
        model=model,
        # samples of an organism's suites stay that organism's, whatever model is asked now
        origin=origin | ({"organism": inherited["organism"]} if "organism" in inherited else {}),
        exit_layers=chosen["exit_layers"],
        judges=None if chosen["judges"] is None else tuple(chosen["judges"]),
        judging=dict(judging),
        settings={name: chosen[name] for name in (*DECODING, "skip_global", "batch_size", "judge_pass", "stop_when")},
        today=chosen["today"],
    )


def _as_wanted(judges: Sequence[str], replaced: Collection[str]) -> list[str] | None:
    """A run's judges, with any stand-in replaced by the default judge, which is tried again."""
    from exitsafe.judges.registry import DEFAULT_JUDGE, FREE_JUDGES

    wanted = list(dict.fromkeys(DEFAULT_JUDGE if name in replaced else name for name in judges))
    return None if set(wanted) <= {DEFAULT_JUDGE, *FREE_JUDGES} else wanted


def settings_of(run: Path, *, needs_suites: bool) -> dict[str, Any]:
    """A finished run's settings under the names of `make_plan`."""
    from exitsafe.results.run import load_run
    from exitsafe.store.fingerprint import today_of

    found = load_run(run)
    origin, settings = dict(found.origin), found.settings
    if needs_suites and not origin.get("suites"):
        raise InputError(f"{run} does not say which suites its samples are from: give --suite NAME_OR_FILE")
    return {
        **{name: value for name, value in origin.items() if name not in ("model", "loading", "judging")},
        "exit_layers": found.exit_layers,
        "judges": [name for name, _ in found.judges],
        "skip_global": settings["skip_global"],
        "batch_size": None if settings["batch_size"] == "auto" else settings["batch_size"],
        "stop_when": settings["stop_when"],
        "today": today_of(settings),
        **{name: settings["decoding"][name] for name in DECODING},
    }


def run_plan(plan: AuditPlan, *, out: Path, loading: Mapping[str, Any], title: str = "Audit") -> AuditRun:
    """Read the samples and judges, which is quick and can fail, then load the model and audit it."""
    samples = defaults.read_samples(plan.origin)
    if (out / "run.json").is_file():
        plan = _resumed(plan, out)
    judges = make_judges(plan.judges, plan.judging, samples=samples)
    announce(plan.model, adapter=loading.get("adapter"))
    vlm = load_model(plan.model, **loading)
    return audit_as_planned(plan, vlm, samples, judges, out=out, loading=loading, title=title)


def audit_as_planned(
    plan: AuditPlan,
    vlm: VLM,
    samples: list[Any],
    judges: list[Judge] | None,
    *,
    out: Path,
    loading: Mapping[str, Any],
    title: str = "Audit",
) -> AuditRun:
    """The audit itself, with a progress bar."""
    from exitsafe.auditing.audit import audit
    from exitsafe.results.stopping import StopRule

    stop_when = plan.settings["stop_when"]
    settings = plan.settings | {"stop_when": None if stop_when is None else StopRule(**stop_when)}
    vlm.today = plan.today or vlm.today
    warn_of_own_reward(loading.get("adapter"), judges or [])
    with console.progress_bar(title, unit="answer") as progress:
        run = audit(
            vlm,
            samples,
            judges=judges,
            exit_layers=plan.exit_layers,
            out=out,
            progress=progress,
            origin=origin_of_run(
                plan.origin,
                plan.model,
                loading,
                judging=recorded_judging(out) | plan.judging,
                judge_pass=plan.settings["judge_pass"],
            ),
            **settings,
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


def origin_of_run(
    origin: Mapping[str, Any],
    model: str,
    loading: Mapping[str, Any],
    *,
    judging: Mapping[str, Any],
    judge_pass: str = "beside",
) -> dict[str, Any]:
    """What run.json keeps to repeat an audit from any folder."""
    kept = {name: _whole(value) if name in ("adapter", "translators") else value for name, value in loading.items()}
    return {
        **origin,
        "model": _whole(model),
        "loading": kept,
        "judging": dict(judging),
        "judge_pass": judge_pass,
    }


def _resumed(plan: AuditPlan, out: Path) -> AuditPlan:
    """The plan of a run that exists already: unless judges are named, its own judges are used."""
    from exitsafe.judges import is_known
    from exitsafe.store.reading import judges_of

    named = plan.judges or ()
    judges = plan.judges or tuple(name for name in judges_of(out) if is_known(name))  # others were added in Python
    return replace(plan, judges=judges, judging=judging_like(out, plan.judging, judges=judges, named=named))


def make_judges(
    names: Sequence[str] | None, judging: Mapping[str, Any], *, samples: Sequence[Sample] = ()
) -> list[Judge] | None:
    """Judges by name, and None for a new run's defaults.

    Args:
        names: Judges.
        judging: Fields of `JudgeOptions`; see `judging_like` for those of a run.
        samples: What the default judge will judge, if a device is chosen for it.
    """
    from exitsafe.auditing.judging import judge_settings
    from exitsafe.judges import JudgeOptions, load_judges
    from exitsafe.judges.registry import default_judge
    from exitsafe.judges.world_rule import WorldRule

    rubric = judging.get("rubric")
    prices = judging.get("prices")
    given = JudgeOptions(
        **{
            **judging,
            "rubric": None if rubric is None else Path(rubric),
            "prices": None if prices is None else (prices[0], prices[1]),
        }
    )
    if names is None and given.device == "auto":
        return None
    judges = [default_judge(samples, given)] if names is None else load_judges(names, options=given)
    if names is None and judges[0].name == WorldRule.name:
        options.check_judging(judging, judges=[WorldRule.name])
    for judge in judges:
        judge_settings(judge)  # a judge that is not available says so now, not after the model has been loaded
    return judges


_HARMLESS = ("device", "requests_per_minute", "prices")
"""The fields of a run's `judging` that are safe to reuse."""


def judging_like(
    run: Path, given: Mapping[str, Any], *, judges: Sequence[str], named: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of `JudgeOptions` for judges of a run: what this call gives, else what the run recorded.

    Args:
        run: A run, finished or not.
        given: Fields set by flags.
        judges: The judges that will be used.
        named: Those of them that this call names; the others come from the run.

    Raises:
        InputError: If only the run, not this call, names a judge's address or rubric.
        RunError: If the run's record cannot be read.
    """
    from exitsafe.store.reading import origin_of

    for judge in judges:
        check_reach(run, given, judge=judge, is_named=judge in named)
    recorded = origin_of(run).get("judging") or {}
    return {name: recorded[name] for name in _HARMLESS if recorded.get(name) is not None} | dict(given)


def check_reach(run: Path, given: Mapping[str, Any], *, judge: str, is_named: bool) -> None:
    """Check that this call, not the run, says where a judge sends requests and answers, and with which rubric.

    Raises:
        InputError: If not; the message names what the run recorded, and the flag.
    """
    from exitsafe.judges.endpoint import OPENAI_URL, public_address
    from exitsafe.store.reading import read_head

    if judge.partition(":")[0] != "rubric":
        return
    head = read_head(run)
    recorded = head["origin"].get("judging") or {}
    own = next((each.get("settings") or {} for each in head["settings"]["judges"] if each["name"] == judge), {})
    address = public_address(str(own.get("endpoint") or recorded.get("url") or OPENAI_URL))
    is_given = bool(given.get("url") or os.environ.get("OPENAI_BASE_URL"))
    if not is_given and not (is_named and address == OPENAI_URL):
        raise InputError(
            f"{run} names {address} for the judge {judge}: requests and answers are sent only to an address that you "
            f"give; add --judge-url {address}"
        )
    if own.get("format") == "own" and "rubric" not in given:
        file = f" (it was {recorded['rubric']})" if recorded.get("rubric") else ""
        raise InputError(f"{run} was graded by {judge} with a custom rubric{file}; add --judge-rubric FILE")


def recorded_judging(run: Path) -> dict[str, Any]:
    """A run's record of how its judges were reached, to be kept; {} if there is no run."""
    from exitsafe.judges.endpoint import public_address
    from exitsafe.store.reading import origin_of

    if not (run / "run.json").is_file():
        return {}
    recorded = dict(origin_of(run).get("judging") or {})
    return recorded | ({"url": public_address(str(recorded["url"]))} if recorded.get("url") else {})


def say_costs(judges: list[Judge]) -> None:
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


def warn_of_own_reward(adapter: Any, judges: list[Judge]) -> None:
    """A judge that was the training's reward, or rests on the same model, measures what was optimised, not safety."""
    from exitsafe.judges.registry import FREE_JUDGES, SECOND_JUDGE

    record = Path(str(adapter)).parent / "run.json"
    if adapter is None or not record.is_file():
        return
    try:
        trained = read_json(record)["settings"]
        rewards = str(trained["reward"]).split("+")
        models = {str(settings["model"]) for settings in trained.get("reward_models", {}).values()}
    except (UnreadableError, KeyError, TypeError, AttributeError):  # some other program's run.json
        return
    for judge in judges:
        is_free = judge.name in FREE_JUDGES
        if (judge.name in rewards and not is_free) or getattr(judge, "settings", {}).get("model") in models:
            console.note(
                f"warning: judge {judge.name} was the reward that {adapter} was trained on, so its verdicts show how "
                "well that was optimised, not whether the model is safe: judge the runs before and after training with "
                f"another model too, e.g. exitsafe judge RUN --judge {SECOND_JUDGE}"
            )


def _whole(name: Any) -> Any:
    """A folder's path from the root, so that it is found from any other; names of the Hub and organisms as they are."""
    from exitsafe.world import ORGANISMS

    is_folder = name is not None and name not in ORGANISMS and Path(name).exists()
    return str(Path(name).absolute()) if is_folder else name
