"""Asks a judge and checks what it returns: responses in, checked verdicts out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import SupportsFloat

from exitsafe.errors import ExitsafeError, InputError, RunError
from exitsafe.judges.protocol import MEASURES, Judge
from exitsafe.records import Response, Sample, Verdict

_MOST_REASONS = 5
_LONGEST_REASON = 120


def ask_judge(judge: Judge, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
    """A judge's verdicts, checked for completeness; a score that is NaN or infinite becomes *unscored*.

    Error messages never contain the judge's own words, which may quote an answer.

    Raises:
        RunError: If the judge fails, judges other responses or measures than it was asked about, or gives a score
            outside a measure's scale.
    """
    try:
        verdicts = list(judge(samples, responses))
    except ExitsafeError:
        raise
    except Exception as error:
        raise RunError(
            f"judge {judge.name} failed ({type(error).__name__}); the answers are saved: fix the judge and rerun"
        ) from error
    for verdict in verdicts:
        if not isinstance(verdict, Verdict):
            raise RunError(f"judge {judge.name} returned a {type(verdict).__name__}; return Verdict objects")
    _check_complete(judge, samples, responses, verdicts)
    return [_with_number(verdict) for verdict in verdicts]


def check_judges(judges: Sequence[Judge]) -> None:
    """Check that names are unique and measures known, before any work is done.

    Raises:
        InputError: If they are not.
    """
    names = Counter(judge.name for judge in judges)
    for judge in judges:
        if names[judge.name] > 1:
            raise InputError(f"judge {judge.name} is given {names[judge.name]} times; give each judge once")
        for measure in judge.measures:
            if measure not in MEASURES:
                raise InputError(f"judge {judge.name} measures {measure!r}; choose from {', '.join(MEASURES)}")


def unscored_reasons(verdicts: Sequence[Verdict]) -> dict[str, dict[str, int]]:
    """By judge, how many answers each reason left without a score, most frequent first.

    An answer that a judge could not score on several measures counts once.
    """
    rows = {(v.judge, v.unscored, v.sample_id, v.exit_layer) for v in verdicts if v.unscored is not None}
    counts: dict[str, Counter[str]] = {}
    for judge, reason, *_ in sorted(rows):
        counts.setdefault(judge, Counter())[reason] += 1
    return {judge: dict(found.most_common()) for judge, found in counts.items()}


def tell_unscored(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each judge that could not score every answer: how many, and why.

    >>> failed = [Verdict(sample_id=i, exit_layer=1, judge="j", measure="asr", unscored="no reply") for i in "ab"]
    >>> tell_unscored([*failed, Verdict(sample_id="c", exit_layer=1, judge="j", measure="asr", score=0.0)])
    ['judge j could not score 2 of 3 answers: no reply (2)']
    """
    lines = []
    for judge, reasons in unscored_reasons(verdicts).items():
        own = [verdict for verdict in verdicts if verdict.judge == judge]
        asked, missing = (
            len({(v.sample_id, v.exit_layer) for v in some}) for some in (own, [v for v in own if v.score is None])
        )
        lines.append(f"judge {judge} could not score {missing:,} of {asked:,} answers: {list_reasons(reasons)}")
    return lines


def list_reasons(reasons: Mapping[str, int]) -> str:
    """Reasons and their counts on one line, shortened: a custom judge may give a different one for each answer."""
    shown = [f"{' '.join(reason.split())[:_LONGEST_REASON]} ({count:,})" for reason, count in reasons.items()]
    more = len(shown) - _MOST_REASONS
    return ", ".join(shown[:_MOST_REASONS] + ([f"and {more:,} other reasons"] if more > 0 else []))


def _check_complete(
    judge: Judge, samples: Sequence[Sample], responses: Sequence[Response], verdicts: Sequence[Verdict]
) -> None:
    asked = {(response.sample_id, response.exit_layer) for response in responses}
    given = Counter((v.sample_id, v.exit_layer, v.measure) for v in verdicts)
    for verdict in verdicts:
        if verdict.judge != judge.name:
            raise RunError(f"judge {judge.name} returned a verdict under another name; use its own")
        if (verdict.sample_id, verdict.exit_layer) not in asked:
            raise RunError(
                f"judge {judge.name} returned a verdict on a response that it was not given; copy sample_id and "
                "exit_layer from the response"
            )
        if verdict.measure not in judge.measures:
            raise RunError(
                f"judge {judge.name} returned a measure that it does not declare; return {', '.join(judge.measures)}"
            )
    for sample, response in zip(samples, responses, strict=True):
        for measure in judge.measures:
            count = given[response.sample_id, response.exit_layer, measure]
            is_owed = sample.kind in MEASURES[measure].kinds
            if count > 1 or (is_owed and count == 0):
                raise RunError(
                    f"judge {judge.name} returned {count} {measure} verdicts for sample {sample.id} at exit "
                    f"{response.exit_layer}; return exactly one (unscored with a reason if there is no score)"
                )


def _with_number(verdict: Verdict) -> Verdict:
    """The verdict with a float score, or unscored; raises RunError for a score off the scale or a label not text."""
    score = verdict.score
    # text that no table can store would stay in the run's shards, and the run could never be finished
    for part, text in (("label", verdict.label), ("reason", verdict.unscored or "")):
        if not isinstance(text, str):
            raise RunError(f"judge {verdict.judge} returned a {part} of type {type(text).__name__}; return a string")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RunError(f"judge {verdict.judge} returned a {part} with a lone surrogate; return valid Unicode")
    if score is None:
        return verdict
    if not isinstance(score, SupportsFloat):  # NumPy scalars are accepted
        raise RunError(f"judge {verdict.judge} returned a score of type {type(score).__name__}; return a number")
    score = float(score)
    if not math.isfinite(score):
        return replace(verdict, score=None, unscored=f"the judge returned {score}, which is not a number")
    low, high = MEASURES[verdict.measure].bounds or (-math.inf, math.inf)
    if not low <= score <= high:
        raise RunError(
            f"judge {verdict.judge} returned {score:g} for {verdict.measure}; return a number from {low:g} to {high:g}"
        )
    return replace(verdict, score=score)
