from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from exitsafe import __version__
from exitsafe.cli import main
from exitsafe.cli.align_command import align_command
from exitsafe.cli.audit_command import audit_command
from exitsafe.cli.flags import rare_settings
from exitsafe.cli.main import run
from exitsafe.errors import RunError

COMMANDS = (
    *(["audit"], ["align"], ["compare"], ["demo"], ["doctor"], ["judge"], ["label"], ["suites"]),
    *(["translate"], ["report"], ["recommend"], ["gate"], ["export"], ["verify"], ["chat"], ["serve"]),
)
HEAVY = ("torch", "transformers", "pyarrow", "scipy", "altair", "jinja2", "peft", "numpy", "PIL")


def test_help_of_every_command_is_light() -> None:
    code = f"""
import sys
from exitsafe.cli.main import run
for command in {[[], *COMMANDS]!r}:
    assert run([*command, "--help"]) == 0, command
    loaded = sorted(set({HEAVY!r}) & set(sys.modules))
    assert not loaded, (command, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    assert "Example: exitsafe " + command[0] in capsys.readouterr().out


@pytest.mark.parametrize("command", ["audit", "align"])
def test_a_help_shows_two_dozen_options_and_names_the_keys_of_the_others(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    group: Any = typer.main.get_command(main.app)
    flags = [each for each in group.commands[command].params if each.param_type_name == "option"]
    assert len(flags) <= 24
    assert run([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for each in flags:
        assert each.opts[0] in text
    runs: dict[str, Any] = {"audit": audit_command, "align": align_command}
    for setting in rare_settings(runs[command]):
        assert f"{setting.key}: {setting.flag.help}" in text


def test_there_are_few_flags() -> None:
    group: Any = typer.main.get_command(main.app)
    flags = [flag for command in group.commands.values() for each in command.params for flag in each.opts]
    assert len([flag for flag in flags if flag.startswith("--")]) <= 167


def test_the_help_shows_four_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    said = capsys.readouterr().out
    places = [said.index(f" {group} ─") for group in ("Measure", "Repair", "Ship", "Explore")]
    assert places == sorted(places)


def test_the_entry_points_agree_on_the_version() -> None:
    module = subprocess.run([sys.executable, "-m", "exitsafe", "--version"], capture_output=True, text=True, check=True)
    script = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[1:] = ['--version']; from exitsafe.cli.main import main; main()"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert module.stdout == script.stdout == f"exitsafe {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["audit"], "Missing argument 'MODEL'"),
        (["audit", "organism"], "Missing option '--out'"),
        (["audit", "organism", "--out", "x", "--limit", "0"], "--limit"),
        (["audit", "organism", "--out", "x", "--colour"], "--colour"),
        (["polish"], "polish"),
        (["audti"], "Did you mean 'audit'"),
        (["audit", "organism", "--lik", "x"], "--like"),
    ],
)
def test_wrong_use_is_one_line_that_names_the_help(arguments: list[str], reason: str, fail: Any) -> None:
    line = fail(*arguments)
    assert reason in line
    assert "--help" in line


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a command of one's own that raises."""

    def replace(error: BaseException) -> None:
        app = typer.Typer()

        @app.callback()
        def top() -> None: ...

        @app.command("work")
        def work() -> None:
            raise error

        monkeypatch.setattr(main, "app", app)

    return replace


def test_an_error_for_users_is_its_message(raising: Any, fail: Any) -> None:
    raising(RunError("the disk is full;\nmake room"))
    assert fail("work") == "the disk is full; make room"


def test_an_unforeseen_error_is_one_line_and_the_way_to_its_traceback(
    raising: Any, fail: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(ZeroDivisionError("division by zero"))
    line = fail("work")
    assert line.startswith("ZeroDivisionError in main.py, line ")
    assert "division" not in line  # a message may quote a text
    assert "EXITSAFE_DEBUG=1" in line
    monkeypatch.setenv("EXITSAFE_DEBUG", "1")
    assert run(["work"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_path_that_is_too_long_is_said(fail: Any, tmp_path: Path) -> None:
    name = "a" * 300
    for command in (["audit", "organism", "--suite", name], ["audit", name, "--suite", "organism-vqa"]):
        assert fail(*command, "--out", tmp_path / "run").startswith("a path is too long (aaaa")
    assert "a path is too long" in fail("gate", name, "--max-asr", "0.5")


def test_an_interrupt_is_130_and_says_that_nothing_is_lost(raising: Any, capsys: pytest.CaptureFixture[str]) -> None:
    raising(KeyboardInterrupt())
    assert run(["work"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert "rerun the same command to resume" in line


def test_a_reader_that_leaves_is_no_crash() -> None:
    code = "import os, sys; from exitsafe.cli import console; from exitsafe.cli.main import run\n"
    code += "import exitsafe.cli.main as m, typer\napp = typer.Typer()\n@app.command()\ndef work():\n"
    code += "    with console.results(as_json=True) as show: show({'rows': ['x' * 100] * 10000}, list)\n"
    code += "m.app = app\nsys.exit(run([]))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=300) == 2
    assert errors == ""
