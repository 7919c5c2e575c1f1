from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from exitsafe.cli import main
from exitsafe.cli.main import run
from exitsafe.cli.settings_file import FIELDS, config_option

Seen = dict[str, Any]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """A command with flags of every kind; what it got."""
    app = typer.Typer()
    seen: Seen = {}

    @app.callback()
    def top() -> None: ...

    @app.command("work")
    def work(
        context: typer.Context,
        model: Annotated[str, typer.Argument()],
        layers: Annotated[str, typer.Option("--layers")] = "all",
        suite: Annotated[list[str] | None, typer.Option()] = None,
        num_steps: Annotated[int | None, typer.Option("--steps")] = None,
        rate: Annotated[float | None, typer.Option()] = None,
        loud: Annotated[bool, typer.Option("--loud")] = False,
        config: Annotated[Path | None, config_option(section="lppo", fields=lambda: ["lam", "mix", "gamma"])] = None,
    ) -> None:
        seen.update(model=model, layers=layers, suite=suite, num_steps=num_steps, rate=rate, loud=loud)
        seen["fields"] = context.meta.get(FIELDS, {})

    monkeypatch.setattr(main, "app", app)
    return seen


def _write(folder: Path, text: str) -> str:
    (folder / "settings.yaml").write_text(text)
    return str(folder / "settings.yaml")


def test_values_of_every_kind(seen: Seen, tmp_path: Path) -> None:
    text = "model: organism\nlayers: [1-3, 8]\nsuite: one.jsonl\nsteps: 7\nrate: 1e-4\nloud: true\n"
    assert run(["work", "--config", _write(tmp_path, text)]) == 0
    assert seen == {
        "model": "organism",
        "layers": "1-3,8",
        "suite": ["one.jsonl"],
        "num_steps": 7,
        "rate": 1e-4,
        "loud": True,
        "fields": {},
    }


def test_flags_win(seen: Seen, tmp_path: Path) -> None:
    path = _write(tmp_path, "layers: 4\nsuite: [a, b]\nnum-steps: 7\nrate: null\n")
    assert run(["work", "m", "--steps", "9", "--suite", "c", "--config", path]) == 0
    assert (seen["layers"], seen["suite"], seen["num_steps"], seen["rate"]) == ("4", ["c"], 9, None)


def test_fields_flat_and_in_their_section(seen: Seen, tmp_path: Path) -> None:
    path = _write(tmp_path, "lam: 0.9\nlppo:\n  mix: {harmful: 1}\n  gamma: 1e0\n")
    assert run(["work", "m", "--config", path]) == 0
    assert seen["fields"] == {"lam": 0.9, "mix": {"harmful": 1}, "gamma": 1.0}


def test_an_empty_file_changes_nothing(seen: Seen, tmp_path: Path) -> None:
    assert run(["work", "m", "--config", _write(tmp_path, "# nothing\n")]) == 0
    assert seen["layers"] == "all"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("colour: red\n", "'colour' is unknown; choose gamma, lam, layers, loud, lppo, mix, model, num_steps, rate"),
        ("config: other.yaml\n", "'config' is unknown"),
        ("lppo: {colour: red}\n", "'lppo.colour' is unknown; choose gamma, lam, mix"),
        ("lppo: 3\n", "lppo holds no settings"),
        ("- 1\n- 2\n", "holds no settings"),
        ("a: [1\n", "is not YAML"),
        ("steps: many\n", "'--steps'"),
    ],
)
def test_what_is_refused_in_one_line(seen: Seen, tmp_path: Path, fail: Any, text: str, reason: str) -> None:
    assert reason in fail("work", "m", "--config", _write(tmp_path, text))
    assert seen == {}


def test_a_missing_file(seen: Seen, fail: Any) -> None:
    assert "nowhere.yaml cannot be read" in fail("work", "m", "--config", "nowhere.yaml")
