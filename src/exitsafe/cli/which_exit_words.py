"""What `exitsafe verify URL` says of a served model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exitsafe.exporting.which_exit import Fit, WhichExit
    from exitsafe.untrusted import JsonObject


def document(found: WhichExit, *, url: str, reference: str) -> JsonObject:
    """The result for `--json`."""
    return {"url": url, "reference": reference, **asdict(found), "is_as_claimed": found.is_as_claimed}


def words(found: WhichExit, *, url: str, reference: str, default_exit: int) -> list[str]:
    """The result for people, a sentence a line."""
    lines = [f"{url} runs {headline(found)}." if found.candidates else f"{url}: {headline(found)}."]
    if found.verdict == "established" and found.claimed is None and found.exit_layer != default_exit:
        lines.append(f"The default exit of {reference} is {default_exit}.")
    if found.preparation:
        lines.append(f"Pictures that are not square are {found.preparation}, which the reference does not do.")
    lines.append(_evidence(found))
    return [*lines, *found.remarks]


def headline(found: WhichExit) -> str:
    """The verdict in one phrase."""
    others = _differing(found)
    if found.verdict == "excluded":
        near = found.nearest
        return f"no exit of this model: the nearest is {_named(near)}, {_how_far(found, near)}{others}"
    if found.verdict == "undecided":
        first, *rest = (_named(each) for each in sorted(found.candidates, key=lambda each: each.distance))
        alone = ", the only candidate left, without enough evidence that it fits"
        last = f", which cannot be distinguished from {_list(rest)}" if rest else alone
        return f"{first}{last}{others}"
    if found.fault:
        claimed = "" if found.claimed in (None, found.exit_layer) else f", not {found.claimed} as claimed"
        return f"exit {found.exit_layer} with {found.fault}{claimed}{others}"
    if found.claimed is None:
        return f"exit {found.exit_layer}"
    if found.claimed == found.exit_layer:
        return f"exit {found.exit_layer}, as claimed"
    short = " (one block short)" if found.exit_layer == found.claimed - 1 else ""
    return f"exit {found.exit_layer}, not {found.claimed} as claimed{short}{others}"


def _evidence(found: WhichExit) -> str:
    asked = f"{found.decided_after} questions at an error level of {found.error_level:.0%}"
    asked += f" ({found.requests} questions in all)" if found.requests > found.decided_after else ""
    if not found.has_logprobs:
        return f"Based on the answers to {asked}; the server gives no log-probabilities."
    distance = f"log-probabilities differ from the reference's by {found.nearest.distance:.3f} on average"
    text = "" if found.deviation is None else f", and by {found.deviation:.3f} without a picture"
    return f"Based on {asked}: {distance}{text}; a candidate fits if they differ by at most {found.limit:.3f}."


def _how_far(found: WhichExit, near: Fit) -> str:
    if found.has_logprobs:
        return f"whose log-probabilities differ by {near.distance:.2f} on average"
    return f"which answers {near.distance:.0%} of the questions differently"


def _differing(found: WhichExit) -> str:
    if found.differing is None:
        return ""
    return f": {found.differing[0]} of {found.differing[1]} answers differ from the audited model"


def _named(fit: Fit) -> str:
    return f"exit {fit.exit_layer}" + (f" with {fit.fault}" if fit.fault else "")


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
