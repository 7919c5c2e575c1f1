"""What a proxy judge counts is called the same on every surface, and so is a number."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from exitsafe.cli.main import run as main
from exitsafe.cli.recommend_tables import recommend_tables
from exitsafe.exporting.audited import audit_record
from exitsafe.exporting.model_card import _eval_results, _what_was_measured
from exitsafe.judges.refusal_prefix import RefusalPrefix
from exitsafe.recommend import recommend
from exitsafe.results.run import AuditRun
from exitsafe.show.report import render_report
from exitsafe.show.tables import audit_tables
from tests.fake_vlm import SAMPLES, FakeVLM, audit_fake
from tests.show.page_runs import write_run

PROXY = (("refusal-prefix", ("asr", "refusal")), ("vqa", ("vqa_accuracy",)), ("coherence", ("coherence",)))
CLAIMS = re.compile(r"harmful answer|attack success|\bAASR\b", re.IGNORECASE)


def _settings(run: AuditRun) -> AuditRun:
    """What audits write and these runs lack."""
    return replace(run, settings={"stop_when": None, "skip_global": False, **run.settings})


@pytest.fixture
def runs(tmp_path: Path) -> list[AuditRun]:
    soup = "\\x80\\xfe?? ~~ \\x00"
    return [
        _settings(write_run(tmp_path / name, harmful_until=until, judges=PROXY, num_samples=80, answer=soup))
        for name, until in (("before", 4), ("after", 1))
    ]


def _printed(tables: list[Any]) -> str:
    screen = Console(file=StringIO(), width=300)
    for table in tables:
        screen.print(table)
    file = screen.file
    assert isinstance(file, StringIO)
    return file.getvalue()


def _check(text: str) -> None:
    assert not CLAIMS.search(text), CLAIMS.findall(text)
    assert re.search(r"not refused|proxy", text)


def test_no_surface_calls_byte_soup_an_attack_that_succeeded(
    runs: list[AuditRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (str(run.path) for run in runs)
    assert main(["compare", before, after, "--chart", str(tmp_path / "chart.svg")]) == 0
    _check(capsys.readouterr().out)
    assert "Requests not refused (proxy)" in (tmp_path / "chart.svg").read_text()
    _check((tmp_path / "chart.svg").read_text())
    page = tmp_path / "page.html"
    assert main(["report", before, after, "--out", str(page)]) == 0
    text = page.read_text()
    _check(re.sub(r"<(style|script).*?</\1>", "", text, flags=re.DOTALL))
    assert "the rate of requests not refused (proxy) averaged over exits" in text
    capsys.readouterr()
    junit, summary = tmp_path / "gate.xml", tmp_path / "gate.md"
    files = ("--junit", str(junit), "--summary", str(summary))
    assert main(["gate", before, "--max-asr", "0.05", *files]) == 1
    output = capsys.readouterr()
    for found in (output.out, junit.read_text(), summary.read_text()):
        _check(found)
        assert "proxy: requests not refused" in found


def test_nor_do_the_tables_of_an_audit_a_recommendation_and_its_model_card(runs: list[AuditRun]) -> None:
    run = runs[0]
    _check(_printed(audit_tables(run)))
    _check(_printed(recommend_tables(recommend(run))))
    record = audit_record(run, exit_layer=2)
    card = _what_was_measured(record)
    _check(card)
    assert "| Requests not refused (proxy) | 100.0% (" in card
    names = {result.metric_type: result.metric_name for result in _eval_results(record)}
    assert (names["asr_proxy"] or "").startswith("Requests not refused (proxy) by refusal-prefix at exit 2")
    assert "asr" not in names


def test_nor_does_the_progress_of_an_audit(tmp_path: Path) -> None:
    notes: list[str] = []
    audit_fake(
        tmp_path / "run", FakeVLM(), judges=["refusal-prefix"], progress=lambda done, total, note: notes.append(note)
    )
    assert notes[-1].startswith("requests not refused (proxy) by exit 1:")


def test_a_judge_of_ones_own_may_say_that_it_is_a_proxy(tmp_path: Path) -> None:
    class Long:
        name = "long"
        measures = ("asr",)
        proxy: ClassVar[dict[str, str]] = {"asr": "answers of more than five words"}

        def __call__(self, samples: Any, responses: Any) -> Any:
            from exitsafe.records import Verdict

            return [
                Verdict(sample_id=r.sample_id, exit_layer=r.exit_layer, judge="long", measure="asr", score=0.0)
                for s, r in zip(samples, responses, strict=True)
                if s.kind == "harmful"
            ]

    run = audit_fake(tmp_path / "run", FakeVLM(), judges=[Long()])
    assert run.title("asr") == "Answers of more than five words (proxy)"
    assert run.title("asr", "vqa") == "Attack success"
    _check(_printed(audit_tables(run)).replace("Answers of more than five words", "not refused"))
    assert len(SAMPLES) == 12


@pytest.mark.parametrize("said", [{}, {"asr": "harmful answers"}, {"refusal": "refusals"}])
def test_a_run_cannot_rename_what_the_built_in_proxy_counts(said: dict[str, str], runs: list[AuditRun]) -> None:
    judges = [{**judge, "proxy": said} for judge in runs[0].settings["judges"]]
    run = replace(runs[0], settings={**runs[0].settings, "judges": judges})
    assert run.title("asr", "refusal-prefix") == "Requests not refused (proxy)"
    assert run.proxies["refusal-prefix"] == RefusalPrefix.proxy


def test_a_number_is_written_in_one_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judges = (("scorer", ("toxicity",)), ("vqa", ("vqa_accuracy",)))
    run = write_run(tmp_path / "run", harmful_until=1, judges=judges)
    metrics = run.summary["layers"][0]["metrics"]
    metrics["toxicity"] |= {"value": 0.125, "low": 0.0625, "high": 0.2}
    metrics["vqa_accuracy"] |= {"value": 0.0625, "low": 0.0001, "high": 0.2}
    run = _settings(run)
    terminal = _printed(audit_tables(run))
    card = unescape(_what_was_measured(audit_record(run, exit_layer=1)))
    page = render_report([("run", run)], out=tmp_path / "page.html").read_text()
    for said in ("0.125 (0.063 to 0.200)", "6.3% (<0.1 to 20.0%)"):
        for text in (terminal, card, unescape(page)):
            assert said in text
