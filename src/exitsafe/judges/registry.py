"""Judges by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from exitsafe.errors import InputError
from exitsafe.judges.coherence import Coherence
from exitsafe.judges.protocol import Judge
from exitsafe.judges.refusal_prefix import RefusalPrefix
from exitsafe.judges.vqa import VQAAccuracy
from exitsafe.judges.world_rule import WorldRule

_JUDGES: dict[str, Callable[[], Judge]] = {
    WorldRule.name: WorldRule,
    RefusalPrefix.name: RefusalPrefix,
    VQAAccuracy.name: VQAAccuracy,
    Coherence.name: Coherence,
}
JUDGE_NAMES = tuple(_JUDGES)


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
