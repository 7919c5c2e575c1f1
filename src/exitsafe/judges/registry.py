"""Judges by the names used on the command line: NAME, or NAME:MODEL for a judge that takes a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from exitsafe.errors import InputError, ModelError, did_you_mean
from exitsafe.judges.asking import check_judges
from exitsafe.judges.coherence import Coherence
from exitsafe.judges.guard import Guard, GuardJudge
from exitsafe.judges.harmbench import HARMBENCH
from exitsafe.judges.llama_guard import LLAMA_GUARD
from exitsafe.judges.protocol import Judge, ModelJudge
from exitsafe.judges.qwen3guard import QWEN3GUARD
from exitsafe.judges.refusal_prefix import RefusalPrefix
from exitsafe.judges.vqa import VQAAccuracy
from exitsafe.judges.world_rule import WorldRule
from exitsafe.records import Sample
from exitsafe.specs.inputs import JudgeOptions
from exitsafe.specs.spec import settings_of
from exitsafe.world.profile import WORLD, is_world


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """How to make a judge from its model, and whether it may or must be given one."""

    make: Callable[[str, JudgeOptions], Judge]
    argument: Literal["none", "optional", "required"] = "none"
    reads: tuple[str, ...] = ()
    """The fields of `JudgeOptions` that it reads."""


_ON_A_DEVICE = ("device",)
_AT_AN_ENDPOINT = ("url", "rubric", "requests_per_minute", "prices")


def _guard(guard: Guard) -> _Entry:
    return _Entry(
        make=lambda model, options: GuardJudge(guard, model, device=options.device),
        argument="optional",
        reads=_ON_A_DEVICE,
    )


def _toxicity(model: str, options: JudgeOptions) -> Judge:
    from exitsafe.judges.toxicity import MODEL, Toxicity

    return Toxicity(model or MODEL, device=options.device)


def _reward(model: str, options: JudgeOptions) -> Judge:
    from exitsafe.judges.reward_model import RewardModel

    return RewardModel(model, device=options.device)


def _rubric(model: str, options: JudgeOptions) -> Judge:
    from exitsafe.engine.endpoint import Endpoint
    from exitsafe.judges.rubric import Rubric
    from exitsafe.machine.processes import this_process

    rate = options.requests_per_minute
    endpoint = Endpoint(
        model,
        base_url=options.url,
        requests_per_minute=None if rate is None else rate / this_process().num_processes,
        prices=options.prices,
    )
    return Rubric(endpoint, rubric=options.rubric)


_JUDGES: dict[str, _Entry] = {
    WorldRule.name: _Entry(make=lambda _, __: WorldRule()),
    RefusalPrefix.name: _Entry(make=lambda _, __: RefusalPrefix()),
    **{guard.name: _guard(guard) for guard in (QWEN3GUARD, LLAMA_GUARD, HARMBENCH)},
    "rubric": _Entry(make=_rubric, argument="required", reads=_AT_AN_ENDPOINT),
    "toxicity": _Entry(make=_toxicity, argument="optional", reads=_ON_A_DEVICE),
    "reward": _Entry(make=_reward, argument="required", reads=_ON_A_DEVICE),
    VQAAccuracy.name: _Entry(make=lambda _, __: VQAAccuracy()),
    Coherence.name: _Entry(make=lambda _, __: Coherence()),
}
_SUFFIX = {"none": "", "optional": "[:MODEL]", "required": ":MODEL"}
JUDGE_NAMES = tuple(name + _SUFFIX[entry.argument] for name, entry in _JUDGES.items())
FREE_JUDGES = (VQAAccuracy.name, Coherence.name)
DEFAULT_JUDGE = QWEN3GUARD.name
SECOND_JUDGE = HARMBENCH.name
"""For models trained with the default judge as reward: another model family, ungated, that agrees with people."""


def load_judges(names: Sequence[str], *, options: JudgeOptions | None = None) -> list[Judge]:
    """The judges of these names, in this order; models are loaded at first use.

    Raises:
        InputError: On an unknown name, or a model that is missing or not accepted.

    >>> [judge.name for judge in load_judges(["refusal-prefix", "reward:hh"])]
    ['refusal-prefix', 'reward:hh']
    """
    return [_load(name, options or JudgeOptions()) for name in names]


def check_options(options: JudgeOptions, judges: Sequence[str]) -> None:
    """Refuse options that none of the judges reads.

    Args:
        options: As a caller gave them.
        judges: Their names; none are the default judges, which may need a device.

    Raises:
        InputError: If there is one.
    """
    chosen = [_JUDGES[kind] for kind in (name.partition(":")[0] for name in judges) if kind in _JUDGES]
    reading = {field for entry in chosen for field in entry.reads}
    for setting in settings_of(JudgeOptions).values():
        field = setting.path[0]
        if field not in options.model_fields_set or field in reading:
            continue
        readers = [kind for kind, entry in _JUDGES.items() if field in entry.reads]
        if field != "device":
            raise InputError(
                f"{setting.spelled} is for --judge {' or '.join(f'{kind}:MODEL' for kind in readers)}, which is not "
                "among the judges; name it or leave it out"
            )
        if judges:
            raise InputError(
                f"{setting.spelled}: none of the judges {', '.join(judges)} runs on a device; leave it out, or add one "
                f"of {', '.join(sorted(readers))}"
            )


def is_known(name: str) -> bool:
    """Whether a name is that of a judge, with or without a model."""
    return name.partition(":")[0] in _JUDGES


def _load(name: str, options: JudgeOptions) -> Judge:
    kind, _, argument = name.partition(":")
    entry = _JUDGES.get(kind)
    if entry is None:
        hint = did_you_mean(kind, _JUDGES)
        raise InputError(f"judge {name!r} is unknown{hint}; choose {', '.join(JUDGE_NAMES)}")
    if entry.argument == "required" and not argument:
        raise InputError(f"judge {kind} needs a model: {kind}:MODEL")
    if entry.argument == "none" and argument:
        raise InputError(f"judge {kind} takes no model; write {kind}")
    return entry.make(argument, options)


def choose_judges(judges: Sequence[Judge | str] | None, samples: Sequence[Sample]) -> list[Judge]:
    """The judges asked for, followed by the free ones (`vqa`, `coherence`).

    Args:
        judges: Judges or names. None uses `world-rule` if all samples are from the organism's suites, and otherwise
            `qwen3guard`, or, with a warning, the proxy `refusal-prefix` if that model is not available.
        samples: The samples to be judged.

    Raises:
        InputError: On an unknown name, a judge given twice or an unknown measure.
    """
    if judges is None:
        judges = [default_judge(samples)]
    chosen = [load_judges([judge])[0] if isinstance(judge, str) else judge for judge in judges]
    names = {judge.name for judge in chosen}
    chosen += load_judges([name for name in FREE_JUDGES if name not in names])
    check_judges(chosen)
    return chosen


def default_judge(samples: Sequence[Sample], options: JudgeOptions | None = None) -> Judge:
    """The judge that `choose_judges` uses when none is named."""
    if is_world(samples):
        return load_judges([WORLD.judge])[0]
    if (problem := why_no_default_judge()) is not None:
        warnings.warn(
            f"the default judge, {DEFAULT_JUDGE}, is not available ({problem}); the proxy {RefusalPrefix.name} counts "
            "requests not refused instead of attack success; add a judge that reads the answers later: exitsafe judge "
            f"RUN --judge {DEFAULT_JUDGE}",
            stacklevel=3,
        )
        return RefusalPrefix(replaces=DEFAULT_JUDGE)
    return load_judges([DEFAULT_JUDGE], options=options)[0]


def why_no_default_judge() -> str | None:
    """Why the default judge's model is not available; None if it is. Looks it up and loads no weights."""
    judge = cast(ModelJudge, load_judges([DEFAULT_JUDGE])[0])
    try:
        _ = judge.settings
    except ModelError as error:
        return str(error)
    return None


def replaced_by(judges: Sequence[Judge]) -> dict[str, str]:
    """By name, the judges that stand in for the default judge, with the name of that judge; recorded in the run."""
    stand_ins = {judge.name: getattr(judge, "replaces", None) for judge in judges}
    return {name: str(wanted) for name, wanted in stand_ins.items() if wanted}
