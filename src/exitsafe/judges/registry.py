"""Judges by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from exitsafe.errors import InputError
from exitsafe.judges.asking import check_judges
from exitsafe.judges.coherence import Coherence
from exitsafe.judges.protocol import Judge
from exitsafe.judges.refusal_prefix import RefusalPrefix
from exitsafe.judges.vqa import VQAAccuracy
from exitsafe.judges.world_rule import WorldRule
from exitsafe.records import Sample

_JUDGES: dict[str, Callable[[], Judge]] = {
    WorldRule.name: WorldRule,
    RefusalPrefix.name: RefusalPrefix,
    VQAAccuracy.name: VQAAccuracy,
    Coherence.name: Coherence,
}
JUDGE_NAMES = tuple(_JUDGES)
FREE_JUDGES = (VQAAccuracy.name, Coherence.name)


def load_judges(names: Sequence[str]) -> list[Judge]:
    """The judges of these names, in this order.

    Raises:
        InputError: On an unknown name.

    >>> [judge.name for judge in load_judges(["refusal-prefix", "vqa"])]
    ['refusal-prefix', 'vqa']
    """
    for name in names:
        if name not in _JUDGES:
            raise InputError(f"judge {name!r} is unknown; choose {', '.join(JUDGE_NAMES)}")
    return [_JUDGES[name]() for name in names]


def choose_judges(judges: Sequence[Judge | str] | None, samples: Sequence[Sample]) -> list[Judge]:
    """The judges asked for, and behind them those that cost nothing.

    Args:
        judges: Judges or names; None takes the world's rule for samples of the organism's suites alone, and the
            proxy `refusal-prefix` otherwise.
        samples: What will be judged.

    Raises:
        InputError: On an unknown name, a judge given twice or an unknown measure.
    """
    if judges is None:
        is_world = all(sample.source.startswith("organism-") for sample in samples)
        judges = [WorldRule.name if is_world else RefusalPrefix.name]
    chosen = [load_judges([judge])[0] if isinstance(judge, str) else judge for judge in judges]
    names = {judge.name for judge in chosen}
    chosen += load_judges([name for name in FREE_JUDGES if name not in names])
    check_judges(chosen)
    return chosen
