"""What holds for every test."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import ImageFile

import tests.startup.sitecustomize  # noqa: F401  # before anything imports torchvision

# Many processors need torchvision. The Makefile installs it where only the tests and the processes that they start see
# it: beside a PyTorch for CPUs it breaks transformers for everybody else.
_TORCHVISION = [str(Path(__file__).parent / "startup"), str(Path(sys.prefix) / "torchvision")]
sys.path += _TORCHVISION
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *_TORCHVISION]))


def pytest_configure(config: pytest.Config) -> None:
    """Keep what the models' self-checks find for this session: its workers and subprocesses share it, users do not."""
    if not hasattr(config, "workerinput"):
        own = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
        os.environ.setdefault("HF_HUB_CACHE", str(own / "hub"))
        home = tempfile.TemporaryDirectory(prefix="exitsafe-tests-")
        config.add_cleanup(home.cleanup)
        os.environ["HF_HOME"] = home.name


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """Collections, which running out of memory asks for too, take long among a million imported objects: skip those."""
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    gc.enable()


@pytest.fixture(autouse=True)
def torn_pictures_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Pillow has it by default; importing lmms-eval changes it for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session", autouse=True)
def repeated_work_is_done_once() -> Iterator[None]:
    """What gives the same each time: the command tree, charts, and conversations as a chat template writes them.

    A fork of a test then renders without a process of its own; tests/engine/test_templates.py always renders.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        if "exitsafe.show.drawing" in sys.modules:
            import vl_convert

            for name in ("vegalite_to_svg", "vegalite_to_png"):
                patch.setattr(vl_convert, name, cache(getattr(vl_convert, name)))
        if "exitsafe.engine.templates" in sys.modules:
            from exitsafe.engine.templates import _Renderer

            patch.setattr(_Renderer, "ask", _remembering(_Renderer.ask))
            from transformers import PretrainedConfig

            patch.setattr(PretrainedConfig, "__repr__", object.__repr__)  # written for a log that is off
        yield


def _remembering(ask: Any) -> Any:
    replies: dict[str, dict[str, str]] = {}

    @wraps(ask)
    def remember(self: Any, request: Mapping[str, Any]) -> dict[str, str]:
        key = json.dumps(request)
        if key not in replies:
            reply = ask(self, request)
            if "text" not in reply:
                return dict(reply)
            replies[key] = reply
        return dict(replies[key])

    return remember
