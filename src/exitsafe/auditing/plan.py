"""The plan of an audit: its settings, completed from another run, its judges, and its record.

Settings given in the call override those of a run that it follows, which override the defaults. A run may come from a
stranger: addresses and rubrics of judges are not taken from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exitsafe.auditing.judging import available_judges
from exitsafe.auditing.reach import judging_like, recorded_judging
from exitsafe.data.source import SampleSource, find_samples, source_of
from exitsafe.errors import InputError
from exitsafe.exits.layers import AS_SERVED
from exitsafe.judges import Judge, JudgeOptions, is_known
from exitsafe.judges.registry import DEFAULT_JUDGE, FREE_JUDGES, check_options, default_judge
from exitsafe.records import Sample
from exitsafe.results.run import AuditRun, load_run
from exitsafe.specs.inputs import FullLoading, is_url
from exitsafe.specs.spec import merged
from exitsafe.specs.verbs import AuditSpec, StopRule
from exitsafe.store.fingerprint import today_of
from exitsafe.store.reading import judges_of
from exitsafe.untrusted import JsonObject
from exitsafe.world.profile import is_organism


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides an audit's numbers, except the weights.

    Args:
        spec: Its settings, complete.
        source: Its samples.
        today: The date given to chat templates; None is the day of loading.
        replaced_judges: The stand-ins for the default judge, as recorded by the run that is repeated.
    """

    spec: AuditSpec
    source: SampleSource
    today: str | None = None
    replaced_judges: Mapping[str, str] | None = None

    @property
    def stop_when(self) -> StopRule | None:
        """The rule of `stop_when`."""
        if self.spec.max_asr is None:
            return None
        return StopRule(max_asr=self.spec.max_asr, error=self.spec.error)

    @property
    def origin(self) -> JsonObject:
        """What run.json records so that the audit can be repeated from any folder."""
        given = self.spec.judging.model_dump(mode="json", exclude_unset=True)
        loading = self.spec.loading.model_dump(mode="json")
        return {
            **self.source.model_dump(mode="json"),
            "model": None if is_url(self.spec.model) else _whole(self.spec.model),
            "loading": loading | {name: _whole(loading[name]) for name in ("adapter", "translators")},
            "judging": recorded_judging(self.spec.out) | given,
            "judge_pass": self.spec.judge_pass,
            **({"replaced_judges": dict(self.replaced_judges)} if self.replaced_judges else {}),
        }

    def resumed(self) -> Plan:
        """The same plan for a new folder; otherwise with the judges of the run in it, unless judges are named."""
        if not (self.spec.out / "run.json").is_file():
            return self
        named = self.spec.judges
        # other judges are Python objects
        judges = named or tuple(name for name in judges_of(self.spec.out) if is_known(name))
        judging = judging_like(self.spec.out, self.spec.judging, judges=judges, named=named)
        return replace(self, spec=self.spec.model_copy(update={"judges": judges, "judging": judging}))

    def load_judges(self, samples: Sequence[Sample]) -> list[Judge] | None:
        """The judges; None lets `audit` choose the defaults for a new run."""
        judging = self.spec.judging
        if self.spec.judges:
            return available_judges(self.spec.judges, judging)
        if judging.device == "auto":
            return None
        judge = default_judge(samples, judging)
        check_options(judging, [judge.name])
        return [judge]


def plan_audit(spec: AuditSpec) -> Plan:
    """Complete the settings given by those of the run in `like`, and these by the defaults.

    Raises:
        InputError: If a setting is missing, or only the other run has the address of a judge.
    """
    judging, like, hub, today, organism = spec.judging, spec.like, None, None, None
    named = spec.judges
    if like is not None:
        run = load_run(like)
        if not spec.samples.suites and not run.origin.get("suites"):
            raise InputError(f"{like} does not record the suites of its samples: give --suite NAME_OR_FILE")
        source, today = source_of(run.origin), today_of(run.settings)
        hub, organism = source.hub, source.organism if "organism" in run.origin else None
        spec = merged(spec, settings_of_run(run, model=spec.model))
        if replaced := run.origin.get("replaced_judges"):
            spec = spec if named else spec.model_copy(update={"judges": _as_wanted(spec.judges, replaced)})
    check_options(judging, spec.judges)
    if like is not None:
        judging = judging_like(like, judging, judges=spec.judges, named=named)
    source = find_samples(
        spec.model,
        spec.samples,
        split=spec.split,
        seed=spec.seed,
        hub=hub,
        otherwise="--suite NAME_OR_FILE or --like RUN",
    )
    if is_url(spec.model):  # which has one exit, whatever the other run has
        spec = spec.model_copy(update={"exit_layers": str(spec.exit_layer or AS_SERVED)})
    if organism is not None:  # the samples stay those of the organism of the other run, whatever the model now
        source = source.model_copy(update={"organism": organism})
    return Plan(spec=spec.model_copy(update={"judging": judging}), source=source, today=today)


def plan_repeat(
    run: AuditRun,
    *,
    model: str,
    out: Path,
    loading: FullLoading,
    judging: JudgeOptions,
    engine: str | None = None,
) -> Plan:
    """The same audit in another folder.

    Args:
        run: The run to repeat.
        model: Its model, or the URL at which a served one is now.
        out, loading, judging, engine: As in `AuditSpec`.

    Raises:
        InputError: If only the run, not this call, has the address of a judge.
    """
    given = AuditSpec(model=model, out=out, loading=loading, engine=engine)
    spec = merged(given, settings_of_run(run, model=model))
    if is_url(model):
        spec = spec.model_copy(update={"exit_layers": str(run.exit_layers[0])})
    check_options(judging, spec.judges)
    judging = judging_like(run.path, judging, judges=spec.judges)
    spec = spec.model_copy(update={"judging": judging})
    return Plan(
        spec=spec,
        source=source_of(run.origin),
        today=today_of(run.settings),
        replaced_judges=run.origin.get("replaced_judges"),
    )


def settings_of_run(run: AuditRun, *, model: str) -> JsonObject:
    """A finished run's settings in the form of an `AuditSpec` for a model; exits only where both can have the same."""
    settings, source = run.settings, source_of(run.origin)
    stopping = {} if settings["stop_when"] is None else {"stop_when": "decided", **settings["stop_when"]}
    exits = {"exit_layers": ",".join(map(str, run.exit_layers)), "skip_global": settings["skip_global"]}
    return {
        "samples": source.model_dump(include={"suites", "images", "categories", "limit"}),
        "split": source.split,
        "judges": tuple(name for name, _ in run.judges),
        "judge_pass": run.origin.get("judge_pass", "beside"),
        "batch_size": None if settings["batch_size"] == "auto" else settings["batch_size"],
        **{name: settings["decoding"][name] for name in ("max_new_tokens", "temperature", "seed")},
        **stopping,
        **({} if run.is_served or is_url(model) else exits),
    }


def _as_wanted(judges: Sequence[str], replaced: Collection[str]) -> tuple[str, ...]:
    """A run's judges, with the default judge in place of its stand-ins, to try it again; () for the defaults."""
    wanted = tuple(dict.fromkeys(DEFAULT_JUDGE if name in replaced else name for name in judges))
    return () if set(wanted) <= {DEFAULT_JUDGE, *FREE_JUDGES} else wanted


def _whole(name: str | None) -> str | None:
    """The absolute path of a folder, so that it works from any other; Hub ids and organisms are unchanged."""
    is_folder = name is not None and not is_organism(name) and Path(name).exists()
    return str(Path(name).absolute()) if name is not None and is_folder else name
