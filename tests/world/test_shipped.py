"""The shipped folders are there, complete and small."""

from __future__ import annotations

import pytest

from exitsafe.errors import InputError
from exitsafe.world import ORGANISMS, model_folder


@pytest.mark.parametrize("name", ORGANISMS)
def test_folder_is_complete_and_small(name: str) -> None:
    folder = model_folder(name)
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "check.json"} <= files
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_600_000


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="choose organism or organism:text"):
        model_folder("llava")
