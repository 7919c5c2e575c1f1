"""The Python of the pages runs, page by page, each page's blocks in order and in one namespace."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import exitsafe
from exitsafe.data.images import open_image
from exitsafe.engine import latency
from exitsafe.lppo import LPPOConfig
from exitsafe.records import KINDS
from exitsafe.world import organism_suites, suites
from tests.docs.pages import PAGES, Block, blocks
from tests.judges.tiny_judges import rule_guard  # noqa: F401

WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
FOR_ORGANISM = LPPOConfig.for_organism


def brief(**settings: Any) -> LPPOConfig:
    """The organism's settings with two steps: what a page shows must run, not repair."""
    return FOR_ORGANISM(**{**settings, "num_steps": 2, "value_warmup_steps": 1, "batch_size": 16, "minibatch_size": 16})


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a page may take for granted: a model, samples, a file of samples, and a folder to write into."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LPPOConfig, "for_organism", staticmethod(brief))
    monkeypatch.setitem(suites.DEFAULT_SIZES, "train", dict.fromkeys(KINDS, 8))
    monkeypatch.setattr(latency, "measure_latency", partial(latency.measure_latency, num_samples=1))
    few = organism_suites(split="train", sizes=dict.fromkeys(KINDS, 4))
    with Path("my.jsonl").open("w") as file:
        for sample in few:
            open_image(sample.images[0], sample.id).save(f"{sample.id}.png")
            row = {"id": sample.id, "prompt": sample.prompt, "kind": sample.kind, "images": [f"{sample.id}.png"]}
            file.write(json.dumps(row | {"answers": list(sample.answers)}) + "\n")
    yield {"exitsafe": exitsafe, "vlm": exitsafe.load_vlm("organism"), "samples": few}


@pytest.mark.usefixtures("rule_guard")  # the user's own samples are rewarded by the default guard model
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_snippets(page: Path, namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(page):
        if block.language == "python":
            capsys.readouterr()
            run(block, namespace)
        elif block.language == "text":  # what the code above it prints
            assert capsys.readouterr().out == block.text


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block, or compile the one that the page says cannot run here."""
    code = compile("\n" * block.line + block.text, block.where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if block.reason is None:
        exec(code, namespace)  # our own pages


def test_the_worked_examples_are_short() -> None:
    lengths = [len(block.text.splitlines()) for block in blocks(PAGES[0].parent / "docs" / "extend.md")]
    assert len(lengths) == 4
    assert max(lengths) < 40
