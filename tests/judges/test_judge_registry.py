from __future__ import annotations

import pytest

from exitsafe.errors import InputError
from exitsafe.judges import JUDGE_NAMES, MEASURES, load_judges


def test_names_load_in_their_order() -> None:
    assert [judge.name for judge in load_judges(["coherence", "world-rule"])] == ["coherence", "world-rule"]


@pytest.mark.parametrize("name", JUDGE_NAMES)
def test_every_judge_bears_its_name_and_known_measures(name: str) -> None:
    (judge,) = load_judges([name])
    assert judge.name == name
    assert set(judge.measures) <= set(MEASURES)


def test_an_unknown_judge_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"judge 'gut-feeling' is unknown; choose world-rule, refusal-prefix"):
        load_judges(["gut-feeling"])
