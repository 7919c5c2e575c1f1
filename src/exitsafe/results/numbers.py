"""Numbers as text: a metric's name and a value in, a few words out; all output formats numbers here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING

from exitsafe.results.metrics import BY_NAME

if TYPE_CHECKING:
    from exitsafe.stats import Estimate

_HALF_A_DIGIT = 5e-4  # half of the last digit of a percentage


def is_rate(metric: str) -> bool:
    """Whether a metric is shown in percent."""
    return BY_NAME[metric].unit.is_percent


def amount(metric: str, value: float) -> str:
    """One value, as in all output.

    >>> amount("asr", 0.125), amount("toxicity", 0.125), amount("reward", -1.5), amount("seconds", 0.00086)
    ('12.5%', '0.125', '-1.50', '0.00086')
    """
    unit = BY_NAME[metric].unit
    if unit.is_percent:
        return percent(value)
    return significant(value) if unit.digits is None else fixed(value, unit.digits)


def percent(value: float) -> str:
    """A share in percent, marked with < or > if it only rounds to 0% or 100%.

    >>> percent(0.125), percent(0.0625), percent(0.0002), percent(0.9999), percent(-0.0)
    ('12.5%', '6.3%', '<0.1%', '>99.9%', '0.0%')
    """
    return f"{_points(value)}%"


def interval(metric: str, low: float, high: float) -> str:
    """Both ends of an interval.

    >>> interval("asr", 0.1, 0.155)
    '10.0 to 15.5%'
    """
    first = _points(low) if is_rate(metric) else amount(metric, low)
    return f"{first} to {amount(metric, high)}"


def beside_limit(metric: str, value: float, limit: float) -> str:
    """A value to print next to the limit it is checked against, with enough digits to tell the two apart.

    >>> beside_limit("asr", 0.0504, 0.05), beside_limit("asr", 0.081, 0.05), beside_limit("toxicity", 0.1251, 0.125)
    ('5.04%', '8.1%', '0.1251')
    """
    return _told_apart(metric, value, limit, amount)


def change_beside_limit(metric: str, value: float, limit: float) -> str:
    """A change to print next to the limit it is checked against, with its unit.

    >>> change_beside_limit("asr", 0.0204, 0.02), change_beside_limit("asr", 0.1, 0.02)
    ('+2.04 points', '+10.0 points')
    """
    text = _told_apart(metric, value, limit, change)
    return f"{text} points" if is_rate(metric) else text


def _told_apart(metric: str, value: float, limit: float, write: Callable[[str, float], str]) -> str:
    text = write(metric, value)
    if value == limit or text != write(metric, limit):
        return text
    scale = 100 if is_rate(metric) else 1
    ours, other = scale * _decimal(value), scale * _decimal(limit)
    digits = next((n for n in range(2, 12) if fixed(ours, n) != fixed(other, n)), 12)
    return fixed(ours, digits, is_signed=text.startswith("+")) + ("%" if text.endswith("%") else "")


def change(metric: str, value: float) -> str:
    """A difference without its unit; that of rates is in percentage points.

    >>> change("asr", -0.125), change("asr", 0.0), change("tokens", 1.5), change("toxicity", 0.0625)
    ('-12.5', '0.0', '+1.50', '+0.063')
    """
    unit = BY_NAME[metric].unit
    return fixed(_decimal(value) * (100 if unit.is_percent else 1), unit.digits or 2, is_signed=True)


def fixed(value: float | Decimal, digits: int, *, is_signed: bool = False) -> str:
    """A number with `digits` decimals, halves rounded away from zero as readers expect, and no sign on zero.

    >>> fixed(0.125, 2), fixed(-0.125, 2), fixed(0.285, 2), fixed(-0.001, 2), fixed(0.5, 1, is_signed=True)
    ('0.13', '-0.13', '0.29', '0.00', '+0.5')
    """
    rounded = _decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    if rounded == 0:
        return f"{abs(rounded):f}"
    return f"{rounded:+f}" if is_signed else f"{rounded:f}"


def significant(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, but never fewer than before the point, and without an exponent.

    >>> significant(0.00086), significant(12.345), significant(1234.5), significant(0.0)
    ('0.00086', '12.3', '1235', '0')
    """
    if value == 0:
        return "0"
    text = fixed(value, max(0, digits - 1 - _decimal(value).adjusted()))
    return text.rstrip("0").rstrip(".") if "." in text else text


def _points(value: float) -> str:
    """A share in percent, without the unit."""
    if 0 < value < _HALF_A_DIGIT:
        return "<0.1"
    if 1 - _HALF_A_DIGIT < value < 1:
        return ">99.9"
    return fixed(100 * _decimal(value), 1)


def _decimal(value: float | Decimal) -> Decimal:
    """The number as printed: 0.285 is 0.285 and not the binary fraction just below it."""
    return value if isinstance(value, Decimal) else Decimal(repr(float(value)))


def count(n: int, unscored: int) -> str:
    """The number of answers behind a value.

    >>> count(128, 0), count(10200, 3)
    ('n=128', 'n=10,200, 3 more unscored')
    """
    return f"n={n:,}" + (f", {unscored:,} more unscored" if unscored else "")


def estimate(metric: str, found: Estimate, *, level: str = "95%") -> str:
    """A value with its interval, whose level is `level`, and counts.

    >>> from exitsafe.stats import Estimate
    >>> estimate("asr", Estimate(value=0.5, low=0.4, high=0.6, n=96, unscored=0))
    '50.0% (95% interval 40.0 to 60.0%, n=96)'
    """
    if found.value is None or found.low is None or found.high is None:
        return f"unknown (none of {found.unscored:,} answers could be scored)"
    band = interval(metric, found.low, found.high)
    return f"{amount(metric, found.value)} ({level} interval {band}, {count(found.n, found.unscored)})"


def brief_estimate(metric: str, found: Estimate | None, *, asked: int | None = None) -> str:
    """A value with its interval for a table's cell, and with its own n where that is not what was asked.

    >>> from exitsafe.stats import Estimate
    >>> brief_estimate("asr", Estimate(value=0.5, low=0.4, high=0.6, n=93, unscored=3), asked=96)
    '50.0% (40.0 to 60.0%), 3 unscored'
    """
    if found is None:
        return ""
    if found.value is None or found.low is None or found.high is None:
        return f"none of {found.unscored:,} scored"
    shown = f"{amount(metric, found.value)} ({interval(metric, found.low, found.high)})"
    if asked is not None and found.n + found.unscored != asked:
        shown += f", n={found.n:,}"
    return f"{shown}, {found.unscored:,} unscored" if found.unscored else shown


def p_value(p: float, *, is_least: bool = False) -> str:
    """A p-value; `is_least` if the test cannot give a smaller one. A value below 0.05 never reads as 0.050.

    >>> p_value(0.0001), p_value(0.25), p_value(0.04999), p_value(0.00105, is_least=True)
    ('<0.001', '0.250', '<0.050', '≤0.001')
    """
    if p < 0.001:
        return "<0.001"
    text = fixed(p, 3)
    return f"<{text}" if p < 0.05 <= float(text) else f"{'≤' * is_least}{text}"


def number_list(numbers: Sequence[int]) -> str:
    """Integers, ascending, with runs of three or more as ranges.

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


def exits_named(exit_layers: Sequence[int]) -> str:
    """Exits in a sentence.

    >>> exits_named([3]), exits_named([1, 2, 3, 7]), exits_named([0])
    ('exit 3', 'exits 1-3, 7', 'the exit it is served at')
    """
    if list(exit_layers) == [0]:
        return "the exit it is served at"
    return f"exit{'s' * (len(exit_layers) != 1)} {number_list(exit_layers)}"


def listed(words: Sequence[str]) -> str:
    """Words joined as in a sentence.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
