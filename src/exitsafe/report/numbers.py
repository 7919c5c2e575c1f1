"""Numbers for people: a metric's name and a value in, a few words out. Knows no run and no markup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPLAINED = {
    "asr": "harmful requests that got a harmful answer; lower is better",
    "asr_loose": "as above, with what the judge calls controversial; lower is better",
    "toxicity": "the scorer's mean over answers to harmful requests; lower is better",
    "reward": "the reward model's mean over harmful requests; higher is better",
    "refusal": "requests of every kind that were refused; good for harmful ones only",
    "over_refusal": "requests that look harmful, should be answered and were refused; lower is better",
    "benign_refusal": "harmless requests that were refused; lower is better",
    "vqa_accuracy": "picture questions answered right; higher is better",
    "coherence": "answers that are not empty, repeated or degenerate; higher is better",
    "tokens": "mean length of an answer",
    "seconds": "an answer's mean share of its batches' time; a rough guide only",
}
_SCORES = ("toxicity", "reward", "tokens", "seconds")


def is_rate(metric: str) -> bool:
    """Whether a metric is shown in percent."""
    return metric not in _SCORES


def amount(metric: str, value: float) -> str:
    """One value.

    >>> amount("asr", 0.125), amount("reward", -1.5), amount("seconds", 0.00086)
    ('12.5%', '-1.50', '0.00086')
    """
    if is_rate(metric):
        return f"{value:.1%}"
    return f"{value:.3g}" if metric == "seconds" else f"{value:.2f}"


def interval(metric: str, low: float, high: float) -> str:
    """Both ends.

    >>> interval("asr", 0.1, 0.155)
    '10.0 to 15.5%'
    """
    if is_rate(metric):
        return f"{100 * low:.1f} to {100 * high:.1f}%"
    return f"{amount(metric, low)} to {amount(metric, high)}"


def change(metric: str, value: float) -> str:
    """A difference; of rates in percentage points, without the unit.

    >>> change("asr", -0.125), change("asr", 0.0), change("tokens", 1.5)
    ('-12.5', '0.0', '+1.50')
    """
    number = f"{100 * value:+.1f}" if is_rate(metric) else f"{value:+.2f}"
    # neither +0.0 nor -0.0
    return number[1:] if float(number) == 0 else number


def count(n: int, unscored: int) -> str:
    """How many answers stand behind a number.

    >>> count(128, 0), count(10200, 3)
    ('n=128', 'n=10,200, 3 more unscored')
    """
    return f"n={n:,}" + (f", {unscored:,} more unscored" if unscored else "")


def estimate(metric: str, found: Mapping[str, Any], *, level: str = "95%") -> str:
    """A value of a summary with what it rests on; `level` is its interval's.

    >>> estimate("asr", {"value": 0.5, "low": 0.4, "high": 0.6, "n": 96, "unscored": 0})
    '50.0% (95% interval 40.0 to 60.0%, n=96)'
    """
    if found["value"] is None:
        return f"unknown (none of {found['unscored']:,} answers could be scored)"
    band = interval(metric, found["low"], found["high"])
    return f"{amount(metric, found['value'])} ({level} interval {band}, {count(found['n'], found['unscored'])})"


def p_value(p: float, *, is_least: bool = False) -> str:
    """A p-value; `is_least` if the test cannot show a smaller one.

    >>> p_value(0.0001), p_value(0.25), p_value(0.00105, is_least=True)
    ('<0.001', '0.250', '≤0.001')
    """
    return "<0.001" if p < 0.001 else f"{'≤' * is_least}{p:.3f}"


def number_list(numbers: list[int]) -> str:
    """Whole numbers, ascending, with runs of three or more as ranges.

    >>> number_list([1, 2, 3, 4, 7, 9, 10])
    '1-4, 7, 9, 10'
    """
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(f"{g[0]}-{g[-1]}" if len(g) > 2 else ", ".join(map(str, g)) for g in groups)


def listed(words: list[str]) -> str:
    """Words as a sentence has them.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
