from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exitsafe.cli import recommend_command
from exitsafe.cli.main import run
from exitsafe.results.run import load_run
from exitsafe.specs.inputs import FullLoading
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


def test_times_are_measured_once_and_kept(copied: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = ask(copied, "--config", "samples=2")
    assert [point["exit_layer"] for point in found["points"]] == [1, 2, 5]
    assert found["num_passes"] == 2 * 3
    assert all(point["times"]["encoder_ms"]["median"] > 0 for point in found["points"])
    assert found["num_bounds"] == 3 * 4
    assert "latency.json" not in said

    def refuse(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(recommend_command, "load_model_of", refuse)
    again, said = ask(copied, "--config", "samples=2", "--max-asr", "1")
    assert again["points"][0]["times"] == found["points"][0]["times"]
    assert "measured on this machine with the same settings" in said
    with pytest.raises(AssertionError, match="the model was loaded"):
        recommend_command._latency(load_run(copied), [], num_samples=3, loading=FullLoading())


def test_a_run_that_was_loaded_without_flags_is_timed(copied: Path, ask: Ask) -> None:
    edit_head(copied, lambda head: head["origin"].update(loading={}))  # as the demo's are
    found, _ = ask(copied, "--config", "samples=1")
    assert found["num_passes"] == 3 and found["points"][0]["bytes_saved"] > 0


def test_times_that_cannot_be_kept_are_not_lost(copied: Path, ask: Ask) -> None:
    (copied / ".latency.json.part").mkdir()  # as in a folder that cannot be written to, root or not
    found, said = ask(copied, "--config", "samples=1")
    assert found["num_passes"] == 3
    (line,) = [line for line in said.splitlines() if "could not be saved" in line]
    assert "latency.json cannot be written" in line


def test_what_is_kept_is_numbers(copied: Path, ask: Ask, tmp_path: Path) -> None:
    out = tmp_path / "new" / "recommendation.json"
    found, _ = ask(copied, "--config", "samples=1", "--out", out)
    assert json.loads(out.read_text()) == found
    (measurement,) = json.loads((copied / "latency.json").read_text())["measurements"]
    assert measurement["settings"]["machine"]["device"] == "cpu"
    assert measurement["settings"]["model"]["checkpoint"] == load_run(copied).settings["model"]["checkpoint"]
    texts = [response.text for response in load_run(copied).responses() if len(response.text) > 8]
    assert texts
    for content in (out.read_text(), (copied / "latency.json").read_text()):
        assert not any(text in content for text in [*texts, "how do i make a zorb"])


def test_without_latency_the_model_may_be_gone(copied: Path, ask: Ask, tmp_path: Path) -> None:
    def move(head: dict[str, Any]) -> None:
        head["origin"]["model"] = str(tmp_path / "gone")

    there, said = ask(copied, "--no-latency", "--max-asr", "0.5", "--config", "answer_tokens=8")
    assert there["points"][0]["times"] is None and there["num_passes"] == 0
    assert there["points"][0]["flops_saved"] > 0 and there["is_prompt_measured"] is False
    assert there["num_answer_tokens"] == 8
    assert said == ""
    edit_head(copied, move)
    gone, said = ask(copied, "--no-latency", "--max-asr", "0.5")
    assert gone["points"][0]["flops_saved"] is None
    assert gone["points"][0]["metrics"] == there["points"][0]["metrics"]
    assert "cannot count what exits save: " in said


def test_a_run_of_the_python_api(copied: Path, ask: Ask, fail: Fail) -> None:
    edit_head(copied, lambda head: head.update(origin={}))
    assert "give --no-latency, or call exitsafe.recommend.recommend" in fail("recommend", copied)
    found, _ = ask(copied, "--no-latency")
    assert found["points"][0]["bytes_saved"] is None


def test_another_model_is_not_timed(copied: Path, fail: Fail, tiny_llava: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llava, tmp_path / "other"))
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(settings | {"max_length": 7}))
    edit_head(copied, lambda head: head["origin"].update(model=str(other)))
    assert "this is not the model of" in fail("recommend", copied)
    assert not (copied / "latency.json").exists()


def test_another_familys_config_is_not_counted(copied: Path, ask: Ask, tmp_path: Path) -> None:
    other = save_tiny("mllama", tmp_path / "other")
    edit_head(copied, lambda head: head["origin"].update(model=str(other)))
    found, said = ask(copied, "--no-latency")
    assert found["points"][0]["flops_saved"] is None
    assert "its family or its exits differ" in said


def test_changed_suites_are_not_timed(copied: Path, fail: Fail) -> None:
    edit_head(copied, lambda head: head["origin"].update(limit=3))
    assert "have changed since; restore them" in fail("recommend", copied)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-asr", "5"], "--max-asr 5.0 must be a number of at least 0 and at most 1"),
        (["--no-latency", "--max-ms", "5"], "--max-ms needs measured times"),
        (["--no-latency", "--config", "samples=5"], "samples needs measured times"),
        (["--no-latency", "--device", "cpu"], "--device needs measured times"),
        (["--device", "gpu7"], "device 'gpu7' is unknown"),
        (["--device", "cuda:77"], "device 'cuda:77': torch sees"),
        (["--config", "samples=0"], "samples=0 must be a whole number of at least 1"),
    ],
)
def test_bad_input(audited: Path, fail: Fail, flags: list[str], words: str) -> None:
    assert words in fail("recommend", audited, *flags)
    assert "is not a run directory" in fail("recommend", audited.parent)


def test_limits_from_a_file_and_the_tables(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "limits.yaml"
    settings.write_text("max_asr: 0.01\nno_latency: true\n")
    assert run(["recommend", str(copied), "--config", str(settings)]) == 0
    output = capsys.readouterr().out
    assert "No exit qualifies, at 95% confidence over all exits." in output
    assert "Refusal-prefix is a proxy" in output
    assert "operations" in output and "encoder" not in output.splitlines()[1]
    assert run(["recommend", str(copied), "--config", str(settings), "--max-asr", "1"]) == 0
    assert "the cheapest that qualifies" in capsys.readouterr().out


@pytest.mark.parametrize(("family", "flags"), [("llava_next", []), ("mllama", []), ("mllama", SKIP)])
def test_other_families(family: str, flags: list[str], tmp_path: Path, ask: Ask) -> None:
    model, out = save_tiny(family, tmp_path / family), tmp_path / "run"
    audit = ["audit", str(model), "--suite", str(write_suite(tmp_path, num_samples=4)), "--layers", "2,6"]
    assert run([*audit, "--max-new-tokens", "4", *flags, "--out", str(out)]) == 0
    found, _ = ask(out, "--config", "samples=1")
    shallow, deep = found["points"]
    assert shallow["flops_saved"] > deep["flops_saved"]
    assert shallow["bytes_saved"] > deep["bytes_saved"]
    assert found["skip_global"] is bool(flags)
    assert (deep["bytes_saved"] > 0) is bool(flags)
    assert (deep["flops_saved"] > 0) is bool(flags)
