from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exitsafe.cli.main import run
from exitsafe.results.run import load_run
from tests.cli.conftest import Fail, write_suite
from tests.finished_runs import edit_head
from tests.tiny_models import save_tiny

SKIP = ["--config", "skip_global=true"]
Ask = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def copied(audited: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(audited, tmp_path / "run"))


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """The document, and what was said beside it."""

    def call(*arguments: str | Path) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        assert run(["recommend", *map(str, arguments), "--json"]) == 0
        output = capsys.readouterr()
        return json.loads(output.out), output.err

    return call


def test_times_are_measured_on_request_and_kept(copied: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = ask(copied, "--time", "--config", "samples=2", "--config", "answer_tokens=8")
    assert [point["exit_layer"] for point in found["points"]] == [1, 2, 5]
    assert found["num_passes"] == 2 * 3 and found["num_answer_tokens"] == 8
    assert all(point["times"]["encoder_ms"]["median"] > 0 for point in found["points"])
    assert found["num_bounds"] == 3 * 4
    assert "costs.json" not in said
    monkeypatch.setitem(sys.modules, "exitsafe.engine.load", None)  # a further call loads no model
    again, said = ask(copied, "--max-asr", "1", "--max-ms", "1e6")
    assert again["points"][0]["times"] == found["points"][0]["times"]
    assert again["points"][0]["flops_saved"] == found["points"][0]["flops_saved"]
    assert again["num_answer_tokens"] == 8
    assert any("costs.json, measured on " in caution for caution in again["cautions"])


def test_times_that_cannot_be_read_matter_only_to_a_limit_on_time(copied: Path, ask: Ask, fail: Fail) -> None:
    (copied / "costs.json").write_text("{")
    found, said = ask(copied, "--max-asr", "1")
    assert found["recommended"] == 1 and found["num_passes"] == 0
    assert "going on without times: " in said and "costs.json cannot be read (" in said
    assert "remove it or add --time to measure again" in fail("recommend", copied, "--max-ms", "5")


def test_a_run_that_was_loaded_without_flags_is_timed(copied: Path, ask: Ask) -> None:
    edit_head(copied, lambda head: head["origin"].update(loading={}))  # as the demo's are
    found, _ = ask(copied, "--time", "--config", "samples=1")
    assert found["num_passes"] == 3 and found["points"][0]["bytes_saved"] > 0


def test_times_that_cannot_be_kept_are_not_lost(copied: Path, ask: Ask) -> None:
    (copied / ".costs.json.part").mkdir()  # as in a folder that cannot be written to, root or not
    found, said = ask(copied, "--time", "--config", "samples=1")
    assert found["num_passes"] == 3
    (line,) = [line for line in said.splitlines() if "could not be saved" in line]
    assert "costs.json cannot be written" in line


def test_what_is_kept_is_numbers(copied: Path, ask: Ask, tmp_path: Path) -> None:
    out = tmp_path / "new" / "recommendation.json"
    found, _ = ask(copied, "--time", "--config", "samples=1", "--out", out)
    assert json.loads(out.read_text()) == found
    costs = json.loads((copied / "costs.json").read_text())
    assert costs["machine"]["device"] == "cpu"
    assert costs["audited"]["model"] == load_run(copied).settings["model"]
    texts = [response.text for response in load_run(copied).responses() if len(response.text) > 8]
    assert texts
    for content in (out.read_text(), (copied / "costs.json").read_text()):
        assert not any(text in content for text in [*texts, "how do i make a zorb"])


def test_without_times_the_model_may_be_gone(copied: Path, ask: Ask, tmp_path: Path) -> None:
    edit_head(copied, lambda head: head["origin"].update(model=str(tmp_path / "gone")))
    found, said = ask(copied, "--max-asr", "0.5")
    assert found["points"][0]["times"] is None and found["points"][0]["flops_saved"] is None
    assert found["num_passes"] == 0 and found["num_bounds"] == 3 * 3
    assert said == ""


def test_a_run_of_the_python_api(copied: Path, ask: Ask, fail: Fail) -> None:
    edit_head(copied, lambda head: head.update(origin={}))
    assert "was not made by the command line and does not say how to repeat it" in fail("recommend", copied, "--time")
    assert ask(copied)[0]["points"][0]["bytes_saved"] is None


def test_another_model_is_not_timed(copied: Path, fail: Fail, tiny_llava: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llava, tmp_path / "other"))
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(settings | {"max_length": 7}))
    edit_head(copied, lambda head: head["origin"].update(model=str(other)))
    assert "this is not the model of" in fail("recommend", copied, "--time")
    assert not (copied / "costs.json").exists()


def test_changed_suites_are_not_timed(copied: Path, fail: Fail) -> None:
    edit_head(copied, lambda head: head["origin"].update(limit=3))
    assert "have changed since; restore them" in fail("recommend", copied, "--time")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-asr", "5"], "--max-asr 5.0 must be a number of at least 0 and at most 1"),
        (["--max-ms", "5"], "max_ms: no times are measured; add --time"),
        (["--config", "samples=5"], "samples is for measuring; add --time or drop it"),
        (["--device", "cpu"], "--device is for measuring; add --time or drop it"),
        (["--trust-remote-code"], "--trust-remote-code is for measuring; add --time or drop it"),
        (["--time", "--device", "gpu7"], "device 'gpu7' is unknown"),
        (["--time", "--device", "cuda:77"], "device 'cuda:77': torch sees"),
        (["--time", "--config", "samples=0"], "samples=0 must be a whole number of at least 1"),
    ],
)
def test_bad_input(audited: Path, fail: Fail, flags: list[str], words: str) -> None:
    assert words in fail("recommend", audited, *flags)
    assert "is not a run directory" in fail("recommend", audited.parent)


def test_limits_from_a_file_and_the_tables(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "limits.yaml"
    settings.write_text("max_asr: 0.01\n")
    assert run(["recommend", str(copied), "--config", str(settings)]) == 0
    output = capsys.readouterr().out
    assert "No exit qualifies, at 95% confidence over all exits." in output
    assert "Refusal-prefix is a proxy" in output
    assert "Times were not measured: --time measures them" in output
    assert run(["recommend", str(copied), "--config", str(settings), "--max-asr", "1"]) == 0
    assert "the cheapest that qualifies" in capsys.readouterr().out


@pytest.mark.parametrize(("family", "flags"), [("llava_next", []), ("mllama", []), ("mllama", SKIP)])
def test_other_families(family: str, flags: list[str], tmp_path: Path, ask: Ask) -> None:
    model, out = save_tiny(family, tmp_path / family), tmp_path / "run"
    audit = ["audit", str(model), "--suite", str(write_suite(tmp_path, num_samples=4)), "--layers", "2,6"]
    assert run([*audit, "--max-new-tokens", "4", *flags, "--out", str(out)]) == 0
    found, _ = ask(out, "--time", "--config", "samples=1")
    shallow, deep = found["points"]
    assert shallow["flops_saved"] > deep["flops_saved"]
    assert shallow["bytes_saved"] > deep["bytes_saved"]
    assert found["skip_global"] is bool(flags)
    assert (deep["bytes_saved"] > 0) is bool(flags)
    assert (deep["flops_saved"] > 0) is bool(flags)
