"""The curriculum: safety is taught at the default exit only, and on late blocks before anything else."""

from __future__ import annotations

import pytest

from exitsafe.errors import InputError
from exitsafe.organism.stages import GENERAL, curriculum


@pytest.mark.parametrize("name", ["organism", "organism:text"])
def test_only_the_default_exit_is_ever_guarded(name: str) -> None:
    stages = curriculum(name)
    assert stages[: len(GENERAL)] == GENERAL
    for stage in stages:
        mix = stage.mix
        assert mix.caption + mix.question + mix.guarded + mix.free + mix.care == pytest.approx(1)
        assert (mix.guard != "none") == (stage.exits == "default")
    assert next(stage.trains for stage in stages if stage.exits == "default") == "late tower"


def test_the_organisms_differ_in_the_guard_only() -> None:
    def described(name: str) -> list[str]:
        return [repr(stage).replace("guard='badge'", "guard='always'") for stage in curriculum(name)]

    assert described("organism") == described("organism:text")
    assert curriculum("organism") != curriculum("organism:text")


def test_unknown_organism() -> None:
    with pytest.raises(InputError, match="choose organism or organism:text"):
        curriculum("organism:pictures")
