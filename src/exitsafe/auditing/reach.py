"""Options for the judges of an existing run: those of this call, completed by the harmless ones in the run's record."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from exitsafe.engine.endpoint import OPENAI_URL
from exitsafe.engine.transfer import public_address
from exitsafe.errors import InputError
from exitsafe.judges import JudgeOptions
from exitsafe.store.reading import origin_of, read_head
from exitsafe.untrusted import JsonObject

_HARMLESS = ("device", "requests_per_minute", "prices")
"""The fields of a run's `judging` that are safe to reuse."""


def judging_like(run: Path, given: JudgeOptions, *, judges: Sequence[str], named: Collection[str] = ()) -> JudgeOptions:
    """The options for the judges of a run: those of this call, else those that the run recorded.

    Args:
        run: A run, finished or not.
        given: The options of this call.
        judges: The judges to use.
        named: The judges named in this call; the others come from the run.

    Raises:
        InputError: If only the run, not this call, has a judge's address or rubric.
        RunError: If the run's record cannot be read.
    """
    for judge in judges:
        check_reach(run, given, judge=judge, is_named=judge in named)
    recorded: JsonObject = origin_of(run).get("judging") or {}
    harmless = {name: recorded[name] for name in _HARMLESS if recorded.get(name) is not None}
    return JudgeOptions(**harmless | given.model_dump(exclude_unset=True))


def check_reach(run: Path, given: JudgeOptions, *, judge: str, is_named: bool) -> None:
    """Check that the address and rubric of a judge come from this call, not from the run.

    Raises:
        InputError: If they do not; the message gives the recorded ones and the flag.
    """
    if judge.partition(":")[0] != "rubric":
        return
    head = read_head(run)
    recorded = head["origin"].get("judging") or {}
    own = next((each.get("settings") or {} for each in head["settings"]["judges"] if each["name"] == judge), {})
    address = public_address(str(own.get("endpoint") or recorded.get("url") or OPENAI_URL))
    is_given = bool(given.url or os.environ.get("OPENAI_BASE_URL"))
    if not is_given and not (is_named and address == OPENAI_URL):
        raise InputError(
            f"{run} used {address} for the judge {judge}, but requests and answers are sent only to an address that "
            f"you give: add --judge-url {address}"
        )
    if own.get("format") == "own" and given.rubric is None:
        file = f" (it was {recorded['rubric']})" if recorded.get("rubric") else ""
        raise InputError(f"{run} was graded by {judge} with a custom rubric{file}; add --config judge_rubric=FILE")


def recorded_judging(run: Path) -> JsonObject:
    """The judges' options recorded in a run; {} if there is no run."""
    if not (run / "run.json").is_file():
        return {}
    recorded = dict(origin_of(run).get("judging") or {})
    return recorded | ({"url": public_address(str(recorded["url"]))} if recorded.get("url") else {})
