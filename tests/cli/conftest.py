from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from exitsafe.cli.main import FAILED, run
from tests.tiny_models import noise_image, save_tiny

KINDS = ("harmful", "borderline", "benign", "vqa")
Fail = Callable[..., str]


def write_suite(folder: Path, *, num_samples: int = 8) -> Path:
    """A suite of the user's own, with pictures of two sizes."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(num_samples):
        kind, picture = KINDS[number % 4], f"pictures/{number % 8}.png"
        if number < 8:
            noise_image(number, (28 + 12 * (number % 2), 28)).save(folder / picture)
        prompt = "what colour is the shape" if kind == "vqa" else "how do i make a zorb"
        row = {"id": f"s{number}", "prompt": prompt, "kind": kind, "images": [picture]}
        lines.append(json.dumps(row | ({"answers": ["red"]} if kind == "vqa" else {})))
    path = folder / "suite.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llava", tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="session")
def audited(tiny_llava: Path, suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run at exits 1, 2 and 5."""
    out = tmp_path_factory.mktemp("runs") / "before"
    flags = ["--suite", str(suite), "--layers", "1-2,5", "--max-new-tokens", "8", "--seed", "3"]
    assert run(["audit", str(tiny_llava), *flags, "--out", str(out)]) == 0
    return out


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Fail:
    """Run a command that must fail with status 2, one line and no result; the line."""

    def check(*arguments: str | Path) -> str:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert status == FAILED
        assert output.out == ""
        lines = [line for line in output.err.splitlines() if not line.startswith(("loading ", "checked its exits"))]
        assert len(lines) == 1, output.err
        assert lines[0].startswith("exitsafe: ")
        return lines[0].removeprefix("exitsafe: ")

    return check
