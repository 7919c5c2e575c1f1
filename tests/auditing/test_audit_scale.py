"""Memory that runs out, judges in a pass of their own or later, layers that are settled early, several processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import exitsafe
from exitsafe.auditing import judging, sharing
from exitsafe.engine.prompts import Prompt
from exitsafe.errors import InputError, RunError
from exitsafe.records import Response, Sample, Verdict
from exitsafe.results.run import summarise_run
from exitsafe.results.stopping import BLOCK, blocks_of, settle
from exitsafe.specs.verbs import StopRule
from exitsafe.store.directory import RunDirectory
from exitsafe.store.shards import ShardWriter
from tests.fake_vlm import NUM_ROWS, SAMPLES, FakeVLM, audit_fake, content
from tests.forks import killed_at_sync


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("expected") / "run"
    audit_fake(out)
    return content(out)


@pytest.mark.parametrize(("wanted", "first"), [(16, 16), (100, 100)])
def test_out_of_memory_halves_the_batch_and_loses_no_answer(
    tmp_path: Path, expected: dict[str, Any], wanted: int, first: int
) -> None:
    vlm = FakeVLM(memory=3)
    audit_fake(tmp_path, vlm, batch_size=wanted)
    assert content(tmp_path) == expected
    assert vlm.num_completed == NUM_ROWS  # what had been answered when memory ran out was not answered again
    assert vlm.batch_sizes[0] == first
    assert vlm.batch_sizes[-1] <= 3


def test_half_of_the_size_that_failed_is_tried_next(tmp_path: Path, expected: dict[str, Any]) -> None:
    vlm = FakeVLM(memory=3)  # and thinks that 4 rows fit
    audit_fake(tmp_path, vlm, batch_size=None)
    assert content(tmp_path) == expected
    assert vlm.batch_sizes[:2] == [4, 2]
    assert set(vlm.batch_sizes[1:]) == {2}


@dataclass(kw_only=True, eq=False)
class ShortOfFeatures(FakeVLM):
    """A model whose features of more than so many prompts do not fit into memory together."""

    most_prompts: int
    prepared: list[int] = field(default_factory=list)

    def prompt_features(self, prompts: Sequence[Prompt], *given: Any, **options: Any) -> list[dict[int, Any]]:
        self.prepared.append(len(prompts))
        if len(prompts) > self.most_prompts:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return super().prompt_features(prompts, *given, **options)


def test_features_that_do_not_fit_are_made_for_fewer_samples(tmp_path: Path, expected: dict[str, Any]) -> None:
    vlm = ShortOfFeatures(most_prompts=2)
    audit_fake(tmp_path, vlm, batch_size=8)
    assert content(tmp_path) == expected
    assert max(vlm.prepared) > 2
    assert set(vlm.batch_sizes) == {8}  # answering had memory enough
    with pytest.raises(RunError, match="out of memory while answering a single row"):
        audit_fake(tmp_path / "none", ShortOfFeatures(most_prompts=0))


def test_memory_that_does_not_suffice_for_one_row_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="out of memory while answering a single row; finished answers are saved"):
        audit_fake(tmp_path, FakeVLM(memory=0))
    assert list((tmp_path / "shards").iterdir())
    audit_fake(tmp_path)


class Guard:
    """A judge with a model, which says when it was asked and whether the model under audit was away."""

    measures = ("asr",)

    def __init__(self, vlm: FakeVLM | None = None, *, name: str = "guard", revision: str = "1") -> None:
        self.name = name
        self.vlm = vlm
        self.settings = {"model": "made/up", "revision": revision}
        self.calls: list[tuple[int, bool]] = []
        self.num_unloaded = 0

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        self.calls.append((len(responses), self.vlm is not None and self.vlm.is_away))
        return [
            Verdict(
                sample_id=response.sample_id,
                exit_layer=response.exit_layer,
                judge=self.name,
                measure="asr",
                score=float("mix" in response.text),
            )
            for sample, response in zip(samples, responses, strict=True)
            if sample.kind == "harmful"
        ]

    def unload(self) -> None:
        self.num_unloaded += 1


def test_judges_beside_and_in_a_second_pass_say_the_same(tmp_path: Path) -> None:
    beside, second = Guard(), Guard()
    audit_fake(tmp_path / "beside", judges=[beside])
    vlm = FakeVLM()
    second.vlm = vlm
    audit_fake(tmp_path / "second", vlm, judges=[second], judge_pass="second")
    assert content(tmp_path / "beside") == content(tmp_path / "second")
    assert not vlm.is_away
    assert all(is_away for _, is_away in second.calls)
    assert sum(rows for rows, _ in second.calls) == NUM_ROWS
    assert (beside.num_unloaded, second.num_unloaded > 0) == (1, True)


def test_an_interrupted_second_pass_goes_on_without_answering_again(tmp_path: Path) -> None:
    class Breaks(Guard):
        def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit_fake(tmp_path / "torn", judges=["refusal-prefix", Breaks()], judge_pass="second")
    vlm = FakeVLM()
    audit_fake(tmp_path / "torn", vlm, judges=["refusal-prefix", Guard()], judge_pass="second")
    assert vlm.num_completed == 0
    audit_fake(tmp_path / "whole", judges=["refusal-prefix", Guard()])
    assert content(tmp_path / "torn") == content(tmp_path / "whole")


def test_a_finished_run_can_be_judged_further(tmp_path: Path) -> None:
    before = audit_fake(tmp_path / "run")
    guard = Guard()
    after = exitsafe.judge(tmp_path / "run", SAMPLES, judges=[guard])
    assert [name for name, _ in after.judges] == ["refusal-prefix", "vqa", "coherence", "guard"]
    assert after.summary["layers"] == before.summary["layers"]  # the first judge still speaks
    assert after.summary["judges"].pop("guard")["layers"][0]["metrics"]["asr"]["n"] == 3
    assert after.summary["judges"] == before.summary["judges"]
    assert sum(rows for rows, _ in guard.calls) == NUM_ROWS
    audit_fake(tmp_path / "whole", judges=["refusal-prefix", "vqa", "coherence", Guard()])
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    again = Guard()
    exitsafe.judge(tmp_path / "run", SAMPLES, judges=[again])
    assert again.calls == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_judging_further_killed_at_every_write_ends_the_same(tmp_path: Path) -> None:
    audit_fake(tmp_path / "whole", judges=["refusal-prefix", "vqa", "coherence", Guard()])
    audit_fake(tmp_path / "audited")
    number, was_killed = 0, True
    while was_killed:
        out = Path(shutil.copytree(tmp_path / "audited", tmp_path / str(number)))
        was_killed = killed_at_sync(number, partial(exitsafe.judge, out, SAMPLES, judges=[Guard()]))
        assert exitsafe.load_run(out).summary["layers"]  # readable at any time
        exitsafe.judge(out, SAMPLES, judges=[Guard()])
        assert content(out) == content(tmp_path / "whole"), f"killed at write {number}"
        number += 1
    assert number > 5


@pytest.mark.parametrize(
    ("judges", "difference"),
    [
        ([Guard(), "refusal-prefix"], "asr was judged first by refusal-prefix, is now by guard"),
        (["refusal-prefix", Guard(name="other")], None),
        (["refusal-prefix"], None),
    ],
)
def test_the_same_command_with_further_judges(tmp_path: Path, judges: list[Any], difference: str | None) -> None:
    audit_fake(tmp_path)
    if difference is None:
        audit_fake(tmp_path, judges=judges)
        return
    with pytest.raises(RunError, match=difference):
        audit_fake(tmp_path, judges=judges)


def test_a_judge_of_another_revision_is_refused(tmp_path: Path) -> None:
    audit_fake(tmp_path, judges=[Guard()])
    with pytest.raises(RunError, match=r'judges.guard.settings.revision was "1", is now "2"'):
        audit_fake(tmp_path, judges=[Guard(revision="2")])


def test_a_finished_run_does_not_take_another_judge_for_its_own(tmp_path: Path) -> None:
    audit_fake(tmp_path, judges=["refusal-prefix", Guard()])
    with pytest.raises(RunError, match=r'judges.guard.settings.revision was "1", is now "2"'):
        exitsafe.judge(tmp_path, SAMPLES, judges=[Guard(revision="2")])


class BreaksOnSecond(Guard):
    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        if self.calls:
            raise KeyboardInterrupt
        return super().__call__(samples, responses)


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run that a judge `guard` of revision 1 has judged in part."""
    monkeypatch.setattr(judging, "ROWS_AT_ONCE", 16)
    audit_fake(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        exitsafe.judge(tmp_path / "run", SAMPLES, judges=[BreaksOnSecond()])
    return tmp_path / "run"


def test_an_interrupted_judge_that_has_changed_begins_anew(interrupted: Path) -> None:
    guard = Guard(revision="2")
    exitsafe.judge(interrupted, SAMPLES, judges=[guard])
    assert sum(rows for rows, _ in guard.calls) == NUM_ROWS
    assert not (interrupted / "shards").exists()


def test_an_interrupted_judge_goes_on_after_other_commands(interrupted: Path) -> None:
    audit_fake(interrupted)
    exitsafe.judge(interrupted, SAMPLES, judges=[Guard(name="other")])
    guard = Guard()
    run = exitsafe.judge(interrupted, SAMPLES, judges=[guard])
    assert [name for name, _ in run.judges][-2:] == ["other", "guard"]
    assert sum(rows for rows, _ in guard.calls) == NUM_ROWS - 16
    assert not (interrupted / "shards").exists()


def test_a_judge_at_work_keeps_its_shards(tmp_path: Path) -> None:
    audit_fake(tmp_path)

    class Disturbed(Guard):
        def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
            with pytest.raises(RunError, match="is being written by another process"):
                audit_fake(tmp_path)
            return super().__call__(samples, responses)

    exitsafe.judge(tmp_path, SAMPLES, judges=[Disturbed()])


def test_a_judge_is_not_asked_about_nothing(tmp_path: Path) -> None:
    first, second = Guard(name="first"), Guard(name="second")
    with pytest.raises(RunError, match="out of luck"):
        audit_fake(tmp_path, judges=[first, _Fails()], judge_pass="second")
    audit_fake(tmp_path, judges=[first, _Fails(is_mended=True), second], judge_pass="second")
    assert sum(rows for rows, _ in first.calls) == NUM_ROWS
    assert all(rows for rows, _ in first.calls + second.calls)


class _Fails(Guard):
    def __init__(self, *, is_mended: bool = False) -> None:
        super().__init__(name="fails")
        self.is_mended = is_mended

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        if not self.is_mended:
            raise RunError("out of luck")
        return super().__call__(samples, responses)


def test_no_process_holds_a_shard_open_while_the_first_removes_them(tmp_path: Path) -> None:
    audit_fake(tmp_path)
    settings = exitsafe.load_run(tmp_path).settings
    further = {"name": "guard", "measures": ["asr"], "settings": {}}
    with RunDirectory(
        tmp_path, summarise=summarise_run, settings={**settings, "judges": [*settings["judges"], further]}, process=1
    ) as run:
        waited = []

        def wait() -> None:
            ShardWriter(tmp_path / "shards", process=1).close()  # refused while it is open
            waited.append(True)

        process: Any = SimpleNamespace(is_main_process=False, wait_for_everyone=wait)
        sharing.finish(run, [], process)
        assert len(waited) == 2


def test_a_pass_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="judge_pass='later' is unknown; choose beside or second"):
        audit_fake(tmp_path / "run", judge_pass="later")


class Down(Guard):
    """A judge whose service is down at some layers."""

    def __init__(self, down: Sequence[int]) -> None:
        super().__init__()
        self.down = down

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        return [
            replace(verdict, score=None, unscored="timed out") if verdict.exit_layer in self.down else verdict
            for verdict in super().__call__(samples, responses)
        ]


def test_what_could_not_be_scored_is_judged_again_on_request(tmp_path: Path) -> None:
    audit_fake(tmp_path / "run", judges=["refusal-prefix", Down([2, 3])])
    patient = Down([2])
    run = exitsafe.judge(tmp_path / "run", SAMPLES, judges=[patient])
    assert patient.calls == []  # only on request
    run = exitsafe.judge(tmp_path / "run", SAMPLES, judges=[patient], retry_unscored=True)
    assert sum(rows for rows, _ in patient.calls) == 2 * 3  # harmful answers at two layers
    asr = {entry["exit_layer"]: entry["metrics"]["asr"] for entry in run.summary["judges"]["guard"]["layers"]}
    assert (asr[2]["n"], asr[2]["unscored"], asr[3]["n"], asr[3]["unscored"]) == (0, 3, 3, 0)
    exitsafe.judge(tmp_path / "run", SAMPLES, judges=[Down([])], retry_unscored=True)
    audit_fake(tmp_path / "whole", judges=["refusal-prefix", Down([])])
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_other_samples_are_not_judged(tmp_path: Path) -> None:
    audit_fake(tmp_path)
    with pytest.raises(RunError, match="asked other samples than these"):
        exitsafe.judge(tmp_path, SAMPLES[:-1], judges=[Guard()])
    with pytest.raises(RunError, match="asked other samples than these"):
        exitsafe.judge(tmp_path, [*SAMPLES[:-1], replace(SAMPLES[-1], prompt="else")], judges=[Guard()])


def _many(number: int) -> list[Sample]:
    harmful = [Sample(id=f"h{i}", prompt="how", kind="harmful", source="made up") for i in range(number)]
    return [*harmful, *SAMPLES]


class ByLayer(Guard):
    """Attacks succeed always at exit 1, never at exits 2 to 5, half the time at exit 6."""

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        return [
            replace(
                verdict, score={1: 1.0, 6: float(sum(map(ord, verdict.sample_id)) % 2)}.get(verdict.exit_layer, 0.0)
            )
            for verdict in super().__call__(samples, responses)
        ]


def test_settled_layers_are_asked_no_further_whatever_the_batch_size(tmp_path: Path) -> None:
    rule = StopRule(max_asr=0.5)
    options: dict[str, Any] = {"samples": _many(300), "stop_when": rule, "exit_layers": "1-3,6"}
    vlm = FakeVLM()
    run = audit_fake(tmp_path / "4", vlm, judges=[ByLayer()], **options)
    asked = {entry["exit_layer"]: entry["metrics"]["asr"]["n"] for entry in run.summary["layers"]}
    assert asked == {1: BLOCK, 2: BLOCK, 3: BLOCK, 6: 303}  # the three harmful ones of SAMPLES are among them
    assert vlm.num_completed == 3 * BLOCK + 303 + 4 * 9
    assert run.summary["layers"][0]["metrics"]["vqa_accuracy"]["n"] == 3  # the rule touches harmful samples only
    audit_fake(tmp_path / "100", judges=[ByLayer()], **options | {"batch_size": 100})
    assert content(tmp_path / "4") == content(tmp_path / "100")


def test_a_killed_run_stops_at_the_same_places(tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": _many(200), "stop_when": StopRule(max_asr=0.5), "judges": [ByLayer()]}
    for fails_after in (10, 60, 100):
        with pytest.raises(KeyboardInterrupt):
            audit_fake(tmp_path / "torn", FakeVLM(fails_after=fails_after), **options)
    audit_fake(tmp_path / "torn", **options)
    audit_fake(tmp_path / "whole", **options)
    assert content(tmp_path / "torn") == content(tmp_path / "whole")


def test_the_first_decision_stands_and_unscored_answers_decide_nothing() -> None:
    samples = _many(BLOCK * 4)[: BLOCK * 4]
    rule = StopRule(max_asr=0.5)
    blocks = blocks_of(samples, rule, seed=0)
    assert [len(block) for block in blocks] == [0, BLOCK, BLOCK, BLOCK, BLOCK]
    assert blocks != blocks_of(samples, rule, seed=1)

    def verdicts(scores: Sequence[float | None]) -> list[Verdict]:
        ordered = [sample for block in blocks for sample in block]
        return [
            Verdict(
                sample_id=sample.id, exit_layer=1, judge="guard", measure="asr", score=score,
                unscored="garbage" if score is None else None,
            )
            for sample, score in zip(ordered, scores, strict=False)
        ]  # fmt: skip

    turned = verdicts([0.0] * BLOCK + [1.0] * (3 * BLOCK))
    assert settle(turned, blocks, [1], rule, judge="guard") == {1: "below"}
    assert settle(turned, blocks, [1], rule, judge="other") == {1: None}
    with pytest.raises(RunError, match=r"needs a judge whose scores are 0 or 1, but guard gave 0\.25"):
        settle(verdicts([0.0, 0.25]), blocks, [1], rule, judge="guard")
    assert settle(verdicts([None] * (4 * BLOCK)), blocks, [1], rule, judge="guard") == {1: None}


@pytest.mark.parametrize(
    "options",
    [
        {"stop_when": StopRule(max_asr=0.1), "judge_pass": "second"},
        {"stop_when": StopRule(max_asr=0.1), "judges": ["coherence"]},
    ],
)
def test_a_stop_rule_needs_verdicts_as_it_goes(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="stop_when needs verdicts on attack success"):
        audit_fake(tmp_path / "run", **options)


@pytest.mark.parametrize("number", [0.0, 1.0, 5, -0.1])
def test_limits_that_are_no_rates(number: float) -> None:
    with pytest.raises(InputError, match="must be a number above 0 and below 1"):
        StopRule(max_asr=number)
