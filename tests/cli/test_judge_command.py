from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exitsafe.auditing.plan import plan_audit
from exitsafe.cli.main import FAILED, run
from exitsafe.results.run import load_run
from exitsafe.specs.inputs import JudgeOptions
from exitsafe.specs.verbs import AuditSpec
from tests.cli.conftest import Fail
from tests.finished_runs import edit_head
from tests.judges.chat_server import Answer, ChatServer, serving
from tests.judges.tiny_judges import rule_guard  # noqa: F401


@pytest.fixture
def copied(audited: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(audited, tmp_path / "run"))


def test_a_judge_is_added(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = (copied / "responses.parquet").read_bytes()
    assert run(["judge", str(copied), "--judge", "world-rule", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["judges"].keys() >= {"refusal-prefix", "world-rule"}
    found = load_run(copied)
    assert [name for name, _ in found.judges] == ["refusal-prefix", "vqa", "coherence", "world-rule"]
    assert (copied / "responses.parquet").read_bytes() == answers
    assert run(["judge", str(copied), "--judge", "coherence"]) == 0  # it has that already


@pytest.mark.usefixtures("rule_guard")
def test_the_device_of_a_judge_is_kept(copied: Path) -> None:
    assert run(["judge", str(copied), "--judge", "qwen3guard", "--config", "judge_device=cpu"]) == 0
    assert load_run(copied).origin["judging"] == {"device": "cpu"}
    assert run(["judge", str(copied), "--judge", "coherence"]) == 0
    assert load_run(copied).origin["judging"] == {"device": "cpu"}


def test_a_device_that_no_judge_uses_is_refused(fail: Fail, audited: Path) -> None:
    never = ["--config", "judge_device=cpu", "--out", audited.parent / "never"]
    for judges, flags in (
        (
            "coherence, vqa",
            ("judge", audited, "--judge", "coherence", "--judge", "vqa", "--config", "judge_device=cpu"),
        ),
        ("refusal-prefix", ("audit", "organism", "--judge", "refusal-prefix", *never)),
        ("world-rule", ("audit", "organism", *never)),
    ):
        expected = f"judge_device: none of the judges {judges} runs on a device; leave it out"
        assert fail(*flags).startswith(expected)
    assert not (audited.parent / "never").exists()


def test_a_run_like_another_reaches_judges_as_that_one_did_but_for_their_address(copied: Path) -> None:
    judging = {"url": "http://localhost:8000/v1", "device": "cpu"}
    edit_head(copied, lambda head: head["origin"].update(judging=judging, judge_pass="second"))
    given = AuditSpec(model="m", out=copied / "again", like=copied)
    plan = plan_audit(given)
    assert plan.spec.judging == JudgeOptions(device="cpu")
    assert plan.spec.judge_pass == "second"
    other = given.model_copy(update={"judging": JudgeOptions(device="cuda:1"), "judges": ("toxicity",)})
    assert plan_audit(other).spec.judging == JudgeOptions(device="cuda:1")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("--judge-url", ["--judge-url", "http://localhost/v1"]),
        ("judge_rubric", ["--config", "judge_rubric=mine.md"]),
        ("judge_rate", ["--config", "judge_rate=5"]),
        ("judge_prices", ["--config", "judge_prices=1,2"]),
    ],
)
def test_a_setting_that_no_judge_reads_is_refused(fail: Fail, audited: Path, name: str, flags: list[str]) -> None:
    expected = f"{name} is for --judge rubric:MODEL, which is not among the judges; name it or leave it out"
    assert fail("judge", audited, "--judge", "coherence", *flags) == expected
    assert fail("audit", "organism", *flags, "--out", audited.parent / "never") == expected
    assert not (audited.parent / "never").exists()


def test_a_suite_that_has_changed_is_refused(copied: Path, fail: Fail, tmp_path: Path) -> None:
    edit_head(copied, lambda head: head["origin"].update(limit=3))
    assert "asked other samples than these" in fail("judge", copied, "--judge", "world-rule")


def test_no_judge_is_named(fail: Fail, audited: Path) -> None:
    assert fail("judge", audited) == "no judge is named: give --judge NAME"


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("no_proxy")
def test_the_end_says_why_answers_are_unscored(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = ChatServer(lambda _, number: Answer(text="score: none", usage=None, finish_reason="stop"))
    with serving(server) as url:
        assert run(["judge", str(copied), "--judge", "rubric:m", "--judge-url", url, "--json"]) == FAILED
    output = capsys.readouterr()
    count = sum(verdict.judge == "rubric:m" for verdict in load_run(copied).verdicts())
    reason = "the reply is not in the judge's format"
    assert json.loads(output.out)["unscored"] == {"rubric:m": {reason: count}}
    assert f"judge rubric:m could not score {count} of {count} answers: {reason} ({count})" in output.err
    assert f"{len(server.requests)} replies did not report their tokens" in output.err


@pytest.mark.usefixtures("no_proxy")
def test_an_endpoint_that_sends_no_completions_ends_the_command(copied: Path, fail: Fail) -> None:
    server = ChatServer(lambda _, number: Answer(body=b'{"error": "zorb"}'))
    with serving(server) as url:
        complaint = fail("judge", copied, "--judge", "rubric:m", "--judge-url", url)
    assert "does not answer (the endpoint answered with an error (status 200)" in complaint
    assert "zorb" not in complaint
    assert [name for name, _ in load_run(copied).judges] == ["refusal-prefix", "vqa", "coherence"]
