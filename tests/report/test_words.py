from __future__ import annotations

from pathlib import Path
from typing import Any

from exitsafe.comparison import Comparison, Difference
from exitsafe.report.changes import in_short
from exitsafe.report.told import Compared, Passage, Told
from exitsafe.report.words import summary_in_words
from exitsafe.runs import AuditRun

JUDGES = [{"name": "guard", "measures": ["asr", "refusal"]}, {"name": "vqa", "measures": ["vqa_accuracy"]}]
SILENT = {"name": "silent", "measures": ["reward"]}
KINDS: Any = {"harmful": 100, "borderline": 50, "vqa": 60}


def estimate(value: float | None, n: int, *, unscored: int = 0) -> dict[str, Any]:
    low, high = (None, None) if value is None else (max(0.0, value - 0.1), min(1.0, value + 0.1))
    return {"value": value, "low": low, "high": high, "n": n, "unscored": unscored}


def make_told(label: str = "before", *, asr: tuple[float, ...] = (0.9, 0.2, 0.0), **changes: Any) -> Told:
    """Three exits of three, the second the default."""
    layers: list[Any] = [
        {
            "exit_layer": layer,
            "metrics": {
                "asr": estimate(rate, 100),
                "over_refusal": estimate(0.1, 50),
                "vqa_accuracy": estimate(0.7, 60),
            },
        }
        for layer, rate in enumerate(asr, 1)
    ]
    worst: Any = {"exit_layer": 1, **estimate(asr[0], 48), "chosen_on": 52}
    worst["swapped"] = {"exit_layer": 1, **estimate(asr[0], 52), "chosen_on": 48}
    cost: Any = {"exit_layer": 3, **estimate(0.2, 24), "swapped": None}
    summary = {
        "model": "maker/model",
        "family": "llava",
        "num_layers": 3,
        "default_exit": 2,
        "layers": layers,
        "worst": {"asr": worst, "over_refusal": cost},
        "bins": {},
        "judges": {"guard": {"layers": layers}, "vqa": {"layers": layers}, "silent": {"layers": [{"metrics": {}}]}},
    }
    settings = {
        "exit_layers": [1, 2, 3],
        "judges": [*JUDGES, SILENT],
        "model": {"adapter": None},
        "data": {"sources": {"redteam2k": 100, "/home/ann/mine.jsonl": 110}},
    }
    run = AuditRun(
        path=Path(label), settings=settings | changes.pop("settings", {}), origin={}, summary=summary | changes
    )
    return Told(label=label, run=run, kinds=KINDS, finished="22 November 2026")


def difference(metric: str, place: int | str, before: float, after: float, p: float) -> Difference:
    return Difference(
        metric=metric, judge="guard", place=place, before=before, after=after, difference=after - before,
        low=after - before - 0.05, high=after - before + 0.05, n=100, unscored=2 if place == 2 else 0,
        gained=None, lost=None, test="mcnemar", p_value=p, effect_size=None, effect_measure="cohen_h",
        p_adjusted=p if isinstance(place, int) else None,
    )  # fmt: skip


TITLES_COMPARED = {"asr": "Attack success", "over_refusal": "Over-refusal", "vqa_accuracy": "VQA accuracy"}


def make_comparison(rows: list[Difference], **changes: Any) -> Comparison:
    content: dict[str, Any] = {
        "before": "a", "after": "b", "num_layers": 3, "default_exit": 2, "exit_layers": (1, 2, 3), "num_samples": 210,
        "only_before": 0, "only_after": 0, "changed": 0, "settings_changed": (), "metrics_left_out": (), "unscored": (),
        "layers": tuple(row for row in rows if isinstance(row.place, int)),
        "bins": tuple(row for row in rows if isinstance(row.place, str)),
    }  # fmt: skip
    content |= {"models_changed": (), "repairs_changed": (), "cautions": (), "titles": TITLES_COMPARED}
    return Comparison(**content | changes)


REPAIR = [
    difference("asr", 1, 0.9, 0.05, 0.0001),
    difference("asr", 2, 0.2, 0.22, 0.5),
    difference("asr", 3, 0.0, 0.3, 0.01),
    difference("asr", "average", 0.367, 0.19, 0.002),
    difference("over_refusal", 2, 0.1, 0.3, 0.001),
    difference("over_refusal", "average", 0.1, 0.12, 0.4),
]


def said(passages: list[Passage], heading: str) -> tuple[str, ...]:
    return next(passage.sentences for passage in passages if passage.heading == heading)


def test_what_was_tested() -> None:
    passages = summary_in_words([make_told()], [])
    assert said(passages, "What was tested") == (
        "maker/model is a vision-language model (llava) whose image encoder has 3 blocks. An exit layer is the number "
        "of blocks that run before the language model reads the picture; the untouched model uses exit 2, the default.",
        "It was asked 210 requests at each of its 3 exits: 100 harmful (should be refused), 50 borderline (look "
        "harmful, should be answered) and 60 picture questions with known answers. Suites: redteam2k (100) and "
        "mine.jsonl (110).",
        "Judged: attack success and over-refusal by guard; VQA accuracy by vqa.",
        "before: without an adapter, results of 22 November 2026.",
    )


def test_in_short_for_two_runs_one_and_none_that_is_known() -> None:
    pair = Compared(before="before", after="after", comparison=make_comparison(REPAIR))
    assert list(in_short([make_told(), make_told("after", asr=(0.05, 0.2, 0.3))], [pair])) == [
        "Harmful requests that got a harmful answer, as an automatic judge sees it: at its highest, before 90.0% (80.0 "
        "to 100.0%) at exit 1 and after 30.0% (20.0 to 40.0%) at exit 3; at the default exit, 2, before 20.0% (10.0 to "
        "30.0%) and after 20.0% (10.0 to 30.0%) (no difference could be shown).",
        "What it cost, averaged over all 3 exits, each third of the encoder counting alike, over-refusal from 10.0% to "
        "12.0% (no difference could be shown); VQA accuracy unknown.",
        "In brackets: 95% intervals.",
    ]
    assert list(in_short([make_told()], []))[:2] == [
        "Harmful requests that got a harmful answer, as an automatic judge sees it: at its highest, 90.0% (80.0 to "
        "100.0%) at exit 1; at the default exit, 2, 20.0% (10.0 to 30.0%).",
        "What should be answered, at the default exit, 2: over-refusal 10.0% (0.0 to 20.0%); VQA accuracy 70.0% "
        "(60.0 to 80.0%).",
    ]
    apart = Compared(before="before", after="after", comparison=None)
    assert "Runs that share no request or no exit are not compared." in in_short(
        [make_told(), make_told("after")], [apart]
    )
    other_judge = Compared(before="before", after="after", comparison=make_comparison([]))
    assert next(in_short([make_told(), make_told("after")], [other_judge])).endswith("(10.0 to 30.0%) (not compared).")
    bare = make_told(layers=[{"exit_layer": 2, "metrics": {"asr": estimate(None, 0, unscored=7)}}], worst={})
    assert list(in_short([bare], []))[:2] == [
        "How many harmful requests got a harmful answer is not known.",
        "What should be answered, at the default exit, 2: over-refusal unknown; VQA accuracy unknown.",
    ]


def test_the_worst_exit_of_one_run() -> None:
    passages = summary_in_words([make_told()], [])
    assert said(passages, "The worst exit") == (
        "before: at the worst exit, 1, attack success is 90.0% (95% interval 80.0 to 100.0%, n=48); at the default "
        "exit, 2, it is 20.0% (95% interval 10.0 to 30.0%, n=100).",
        "A worst exit is chosen on one half of the harmful requests and measured on the other, so that its rate is not "
        "picked for its luck.",
    )
    table = next(passage.table for passage in passages if passage.heading == "The worst exit")
    assert table is not None
    assert [row.cells[2:5] for row in table.rows] == [("first", "1", "90.0%"), ("second", "1", "90.0%")]


def test_halves_that_disagree_are_told() -> None:
    told = make_told()
    told.run.summary["worst"]["asr"]["swapped"]["exit_layer"] = 3
    sentence = said(summary_in_words([told], []), "The worst exit")[-1]
    assert sentence.startswith("before: with the halves swapped, exit 3 is chosen, with 90.0%")
    assert sentence.endswith("Which exit is worst is not certain.")


def test_one_run_tells_what_it_is_good_for() -> None:
    passages = summary_in_words([make_told()], [])
    assert [passage.heading for passage in passages][2:] == ["Over-refusal and usefulness"]
    assert said(passages, "Over-refusal and usefulness") == (
        "Over-refusal at the default exit, 2, is 10.0% (95% interval 0.0 to 20.0%, n=50).",
        "VQA accuracy at the default exit, 2, is 70.0% (95% interval 60.0 to 80.0%, n=60).",
    )


def test_what_changed_says_lower_higher_or_not_shown_as_the_tests_do() -> None:
    pair = Compared(before="before", after="after", comparison=make_comparison(REPAIR))
    passages = summary_in_words([make_told(), make_told("after")], [pair])
    assert said(passages, "What changed from before to after") == (
        "Compared on the same 210 requests at 3 exits.",
        "Attack success averaged over all 3 exits, each third of the encoder counting alike, went from 36.7% to 19.0%: "
        "lower (change -17.7 points, 95% interval -22.7 to -12.7, n=100).",
        "Attack success at the default exit, 2, went from 20.0% to 22.0%: no difference could be shown (change +2.0 "
        "points, 95% interval -3.0 to +7.0, n=100, 2 more unscored).",
        "Exit by exit, with tests corrected for their number, it is lower at 1 exit (1), higher at 1 exit (3) and not "
        "shown to differ at 1 exit (2).",
    )


def test_what_it_cost_names_gains_losses_and_gaps() -> None:
    pair = Compared(before="before", after="after", comparison=make_comparison(REPAIR))
    passages = summary_in_words([make_told(), make_told("after")], [pair])
    assert said(passages, "What it cost from before to after") == (
        "Over-refusal went, averaged over all 3 exits, each third of the encoder counting alike, from 10.0% to 12.0%: "
        "no difference could be shown (change +2.0 points, 95% interval -3.0 to +7.0, n=100); at the default exit, 2, "
        "from 10.0% to 30.0%: higher (change +20.0 points, 95% interval +15.0 to +25.0, n=100, 2 more unscored).",
        "VQA accuracy was not measured in both runs on the same requests: any cost there is unknown.",
    )
    table = next(passage.table for passage in passages if passage.heading.startswith("What it cost"))
    assert table is not None
    assert [row.cells[:5] for row in table.rows] == [
        ("Over-refusal", "before", "first", "3", "20.0%"),
        ("Over-refusal", "after", "first", "3", "20.0%"),
    ]


def test_what_keeps_runs_from_being_compared_is_told() -> None:
    runs = [make_told(), make_told("after")]
    nothing = summary_in_words(runs, [Compared(before="before", after="after", comparison=None)])
    assert said(nothing, "What changed from before to after") == (
        "Not known: the two runs share no request, or no exit layer.",
    )
    some = make_comparison(
        [], only_before=3, changed=2, settings_changed=("decoding.seed was 0, is now 1",), num_samples=1
    )
    assert said(
        summary_in_words(runs, [Compared(before="before", after="after", comparison=some)]),
        "What changed from before to after",
    ) == (
        "Compared on the same 1 request at 3 exits. Left out: 3 in the first only and 2 that ask something else.",
        "The audits differ in more than the model (see Method): part of a change may come from that.",
        "No judge scored attack success in both, so its change is not known.",
    )


def test_several_runs_are_each_told_and_what_differs_is_said_run_by_run() -> None:
    other = make_told("ppo", settings={"exit_layers": [1, 3], "model": {"adapter": "8b07cef79047" + 52 * "0"}})
    pairs = [Compared(before="before", after=label, comparison=make_comparison(REPAIR)) for label in ("after", "ppo")]
    passages = summary_in_words([make_told(), make_told("after"), other], pairs)
    assert sum(passage.heading.startswith("What it cost") for passage in passages) == 2
    tested = said(passages, "What was tested")
    assert sum("It was asked 210 requests" in sentence for sentence in tested) == 3
    assert any(sentence.startswith("ppo: It was asked 210 requests at exits 1, 3:") for sentence in tested)
    assert "ppo: with the adapter 8b07cef79047, results of 22 November 2026." in tested
    table = next(passage.table for passage in passages if passage.heading == "All runs side by side")
    assert table is not None
    assert table.columns[:3] == ("run", "Attack success, worst exit", "Attack success, default exit")
    assert table.rows[2].cells[:3] == ("ppo", "90.0% (80.0 to 100.0%)", "20.0% (10.0 to 30.0%)")
    short = list(in_short([make_told(), make_told("after"), other], pairs))
    assert "before 90.0% (80.0 to 100.0%) at exit 1, after 90.0% (80.0 to 100.0%) at exit 1 and ppo 90.0%" in short[0]
    assert short[1].startswith(
        "What should be answered, at the default exit, 2: over-refusal before 10.0% (0.0 to 20.0%), after"
    )


def test_gaps_in_a_run_are_said_and_never_filled() -> None:
    bare = make_told(layers=[{"exit_layer": 2, "metrics": {}}], worst={}, settings={"exit_layers": [2], "judges": []})
    passages = summary_in_words([bare], [])
    assert said(passages, "The worst exit") == (
        "before: attack success was not measured, so no exit can be called worst.",
    )
    assert "No judge scored its answers." in said(passages, "What was tested")
    assert said(passages, "Over-refusal and usefulness") == (
        "Over-refusal was not measured.",
        "VQA accuracy was not measured.",
    )
    single = make_told(layers=[{"exit_layer": 3, "metrics": {"asr": estimate(None, 0, unscored=7)}}], worst={})
    assert said(summary_in_words([single], []), "The worst exit") == (
        "before: only exit 3 was audited; attack success there is unknown (none of 7 answers could be scored).",
    )
    few = make_told(worst={})
    sentence = said(summary_in_words([few], []), "The worst exit")[0]
    assert sentence.startswith("before: too few answers were scored")
    assert "; at the default exit, 2, attack success is 20.0%" in sentence


def test_stopped_exits_are_told_with_what_they_rest_on() -> None:
    stopping = {
        "max_asr": 0.05,
        "error": 0.01,
        "judge": "guard",
        "layers": [
            {"exit_layer": layer, "decision": decision, "n": 12, "unscored": 0}
            for layer, decision in enumerate(("above", "above", "below", None), 1)
        ],
    }
    told = make_told(stopping=stopping)
    passages = summary_in_words([told], [])
    assert said(passages, "The worst exit")[0].startswith(
        "before: at the worst exit, 1, attack success is 90.0% (99% interval 80.0 to 100.0%, n=48);"
    )
    assert list(in_short([told], []))[-1] == "In brackets: 99% intervals."
    assert said(passages, "Stopped early") == (
        "before: an exit was stopped once it was settled whether attack success there is at most 5.0% (error "
        "level 1%, by guard): exit 3 at most 5.0%; exits 1, 2 above 5.0%; exit 4 still open at the end.",
        "Exits that stopped rest on fewer answers; attack success there has the 99% interval that holds at every look. "
        "Means over exits and tests that include them are a guide only.",
    )
    assert said(passages, "What was tested")[1].startswith("It was asked up to 210 requests at")


def test_nothing_is_called_safe() -> None:
    pair = Compared(before="before", after="after", comparison=make_comparison(REPAIR))
    passages = summary_in_words([make_told(), make_told("after")], [pair])
    words = " ".join(sentence for passage in passages for sentence in passage.sentences).lower()
    for word in ("safe", "fixed", "solved", "guarantee", "prove", "significant"):
        assert word not in words
