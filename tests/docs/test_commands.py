"""Every command line in the pages and in the commands' own help is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from exitsafe.cli.main import app
from tests.docs.pages import PAGES, commands, files

GROUP: Any = typer.main.get_command(app)
SHOWN = [
    pytest.param(page, command, id=f"{page.name}: {' '.join(command)}"[:80])
    for page in PAGES
    for command in commands(page)
    if "..." not in command
]


def parse(arguments: list[str]) -> None:
    """Read a command line as `exitsafe` does, and run nothing."""
    command, name, context = GROUP, "exitsafe", None
    while hasattr(command, "resolve_command"):
        context = command.context_class(command, info_name=name, parent=context)
        name, command, arguments = command.resolve_command(context, arguments)
    command.make_context(name, list(arguments), parent=context)


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_commands_of_the_pages(page: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files(page).items():
        (tmp_path / name).write_text(text)
    parse(command)


def test_the_pages_have_commands() -> None:
    assert len(SHOWN) > 30
    assert {command.values[1][0] for command in SHOWN} >= set(GROUP.commands) - {"demo"}  # type: ignore[index]


def test_a_wrong_command_is_seen() -> None:
    with pytest.raises(typer.BadParameter.__mro__[2]):
        parse(["audit", "organism", "--no-such-flag"])


def examples() -> list[list[str]]:
    """The command lines in the commands' help."""
    found = []
    for command in GROUP.commands.values():
        line = command.epilog.partition("Example: exitsafe ")[2].splitlines()[0]
        found += [shlex.split(part) for part in line.split(", then exitsafe ")]
    return found


def own_model_examples() -> list[list[str]]:
    """Those for a model of one's own, which no test can run."""
    lines = [
        command.epilog.partition("With your own model: exitsafe ")[2].splitlines()[:1]
        for command in GROUP.commands.values()
    ]
    return [shlex.split(line) for found in lines for line in found]


@pytest.mark.parametrize("line", examples() + own_model_examples(), ids=" ".join)
def test_every_help_has_an_example_that_parses(line: list[str]) -> None:
    parse(line)


def test_the_constraints_are_versions_and_nothing_else() -> None:
    lines = (PAGES[0].parent / "constraints.txt").read_text().splitlines()[1:]
    assert len(lines) > 100
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
