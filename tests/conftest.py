"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import typer
from PIL import ImageFile


@pytest.fixture(autouse=True)
def torn_pictures_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Pillow has it by default; importing lmms-eval changes it for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session", autouse=True)
def command_tree_is_built_once() -> Iterator[None]:
    """A process runs one command line, the tests run thousands: typer reads every signature for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield
