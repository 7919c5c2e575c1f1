"""What holds for every test."""

from __future__ import annotations

import pytest
from PIL import ImageFile


@pytest.fixture(autouse=True)
def torn_pictures_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Pillow has it by default; importing lmms-eval changes it for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
