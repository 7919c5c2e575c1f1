from __future__ import annotations

import json
import sys

import pytest
import typer
from typer.testing import CliRunner

from exitsafe.cli.flags import as_command
from exitsafe.cli.suites_command import describe, organism_entries, suites_command
from exitsafe.data import KNOWN_SUITES, SUITE_NAMES
from exitsafe.errors import InputError


def _run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(as_command(suites_command))
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0
    return outcome.stdout


def test_the_table_has_every_suite_and_what_it_needs() -> None:
    lines = _run().splitlines()
    for name in [*SUITE_NAMES, *KNOWN_SUITES]:
        assert sum(f" {name} " in line for line in lines) == 1
    assert max(map(len, lines)) <= 140
    row = next(line for line in lines if " xstest " in line)
    for word in ("borderline, harmful", "450", "CC-BY-4.0", "yes", "hf auth login"):
        assert word in row


def test_json_has_the_same_and_more() -> None:
    entries = {entry["name"]: entry for entry in json.loads(_run("--json"))["suites"]}
    assert list(entries) == [*SUITE_NAMES, *KNOWN_SUITES]
    assert entries["vqav2"]["needs"] == ["--limit N"]
    assert entries["advbench-coco"]["needs"] == ["hf auth login", "--images DIR"]
    assert entries["xstest"]["kinds"] == ["borderline", "harmful"]
    assert entries["mossbench"]["source"]["revision"] is None
    assert entries["organism-vqa"]["samples"] == 160


@pytest.mark.parametrize("name", KNOWN_SUITES)
def test_one_entry_in_full(name: str) -> None:
    entry, output = json.loads(_run(name, "--json")), " ".join(_run(name).split())
    assert entry == describe(KNOWN_SUITES[name])
    for text in (entry["citation"], entry["page"], entry["licence"], entry["note"], entry["source"]["id"]):
        assert text in output
    assert (entry["source"]["revision"] or "the newest; its commit is kept with the run") in output


def test_organism_suites_have_their_kind() -> None:
    assert {entry["name"]: entry["kinds"] for entry in organism_entries()} == {
        name: [name.removeprefix("organism-")] for name in SUITE_NAMES
    }


def test_an_unknown_name() -> None:
    with pytest.raises(
        InputError, match=r"suite 'advbench' is unknown \(did you mean advbench-coco\?\); choose from redteam2k, "
    ):
        _run("advbench")


def test_nothing_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "redteam2k" in _run()


def test_the_organisms_suites_can_be_asked_for_by_name() -> None:
    entry = json.loads(_run("organism-vqa", "--json"))
    assert (entry["name"], entry["kinds"]) == ("organism-vqa", ["vqa"])
    assert "organism-vqa" in _run("organism-vqa")
