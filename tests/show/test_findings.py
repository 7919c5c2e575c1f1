"""What the page says, first screen and prose, from runs and comparisons whose numbers are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exitsafe.results.comparison import Comparison, Difference
from exitsafe.results.run import AuditRun
from exitsafe.show.findings import findings, limits, settings_changed
from exitsafe.show.verdict import cautions, key_numbers, verdict

JUDGES = [{"name": "guard", "measures": ["asr", "refusal"]}, {"name": "vqa", "measures": ["vqa_accuracy"]}]
PROXY = [{"name": "refusal-prefix", "measures": ["asr", "refusal"]}]
KINDS = {"harmful": 100, "borderline": 50, "vqa": 60}
TITLES = {"asr": "Attack success", "over_refusal": "Over-refusal", "vqa_accuracy": "VQA accuracy"}


def estimate(value: float | None, n: int, *, unscored: int = 0) -> dict[str, Any]:
    low, high = (None, None) if value is None else (max(0.0, value - 0.1), min(1.0, value + 0.1))
    return {"value": value, "low": low, "high": high, "n": n, "unscored": unscored}


def make_run(
    *,
    asr: tuple[float | None, ...] = (0.9, 0.2, 0.0),
    p: float = 0.001,
    kinds: Mapping[str, int] = KINDS,
    settings: dict[str, Any] | None = None,
    **changes: Any,
) -> AuditRun:
    """Three exits of three, the second the default; the others differ from it with this p."""
    layers: list[Any] = [
        {
            "exit_layer": layer,
            "metrics": {
                "asr": estimate(rate, 0 if rate is None else 100, unscored=7 * (rate is None)),
                "over_refusal": estimate(0.1, 50),
                "vqa_accuracy": estimate(0.7, 60),
            },
        }
        for layer, rate in enumerate(asr, 1)
    ]
    worst: Any = {"exit_layer": 1, **estimate(asr[0], 48), "chosen_on": 52}
    worst["swapped"] = {"exit_layer": 1, **estimate(asr[0], 52), "chosen_on": 48}
    rows = {layer: vars(difference("asr", layer, 0.2, asr[layer - 1] or 0, p)) for layer in (1, 3)}
    for row in rows.values():
        row |= {"at_default": row.pop("before"), "at_layer": row.pop("after")}
        del row["metric"], row["judge"], row["place"]
    tests = [{"exit_layer": layer, "metrics": {"asr": row}} for layer, row in rows.items()]
    means = {"over_refusal": estimate(0.1, 150), "vqa_accuracy": estimate(0.7, 180)}
    summary: dict[str, Any] = {
        "model": "maker/model",
        "family": "llava",
        "num_layers": 3,
        "default_exit": 2,
        "layers": layers,
        "worst": {"asr": worst},
        "bins": {"average": {"metrics": means}},
        "against_default": {"layers": tests},
        "judges": {name: {"layers": layers} for name in ("guard", "vqa", "refusal-prefix")},
    }
    own: dict[str, Any] = {
        "exit_layers": [1, 2, 3],
        "judges": JUDGES,
        "model": {"adapter": None},
        "data": {"sources": {"redteam2k": 100, "/home/ann/mine.jsonl": 110}},
        "decoding": {"temperature": 0.0},
    }
    samples = [SimpleNamespace(kind=kind) for kind, n in kinds.items() for _ in range(n)]
    table: Any = SimpleNamespace(samples=samples)
    return AuditRun(
        path=Path("run"), settings=own | (settings or {}), origin={}, summary=summary | changes, table=table
    )


def difference(metric: str, place: int | str, before: float, after: float, p: float) -> Difference:
    return Difference(
        metric=metric, judge="guard", place=place, before=before, after=after, difference=after - before,
        low=after - before - 0.05, high=after - before + 0.05, n=100, unscored=2 if place == 2 else 0,
        gained=None, lost=None, test="mcnemar", p_value=p, effect_size=None, effect_measure="cohen_h",
        p_adjusted=p if isinstance(place, int) else None,
    )  # fmt: skip


def make_comparison(rows: list[Difference], **changes: Any) -> Comparison:
    content: dict[str, Any] = {
        "before": "a", "after": "b", "num_layers": 3, "default_exit": 2, "exit_layers": (1, 2, 3), "num_samples": 210,
        "only_before": 0, "only_after": 0, "changed": 0, "settings_changed": (), "metrics_left_out": (), "unscored": (),
        "layers": tuple(row for row in rows if isinstance(row.place, int)),
        "bins": tuple(row for row in rows if isinstance(row.place, str)),
        "models_changed": (), "repairs_changed": (), "cautions": (), "titles": TITLES,
    }  # fmt: skip
    return Comparison(**content | changes)


REPAIR = [
    difference("asr", 1, 0.9, 0.05, 0.0001),
    difference("asr", 2, 0.2, 0.22, 0.5),
    difference("asr", 3, 0.0, 0.3, 0.01),
    difference("asr", "average", 0.367, 0.19, 0.002),
    difference("over_refusal", 2, 0.1, 0.3, 0.001),
    difference("over_refusal", "average", 0.1, 0.12, 0.4),
]
ONE, TWO = [("run", make_run())], [("before", make_run()), ("after", make_run(asr=(0.05, 0.2, 0.3)))]


# ---- the verdict ----


def one(**changes: Any) -> str:
    return verdict([("run", make_run(**changes))], {})


def test_the_verdict_on_one_run() -> None:
    assert one() == (
        "Attack success is higher at 1 and lower at 1 of 2 other exits than at the default exit, 2: 90.0% at the worst "
        "exit, 1, against 20.0%."
    )
    assert one(p=0.2) == (
        "Attack success was not shown to differ between the default exit, 2, and any other; at the worst exit, 1, it "
        "is 90.0% (95% interval 80.0 to 100.0%, n=48)."
    )
    assert one(settings={"judges": PROXY}).startswith("The rate of requests not refused (proxy) is higher at 1")


def test_the_verdict_where_little_or_nothing_is_known() -> None:
    nothing = "Nothing is known about attack success: "
    empty: dict[str, Any] = {"layers": [{"exit_layer": 2, "metrics": {}}], "worst": {}}
    assert one(**empty, kinds={"vqa": 60}) == f"{nothing}no harmful requests were sent."
    assert one(**empty, settings={"judges": JUDGES[1:]}) == f"{nothing}no judge scored it."
    assert one(asr=(None, None, None), worst={}) == f"{nothing}not one answer to a harmful request could be scored."
    assert one(worst={}) == "There is too little evidence to name a worst exit: only 300 answers could be scored."
    single = [{"exit_layer": 3, "metrics": {"asr": estimate(0.5, 10)}}]
    assert one(layers=single, worst={}) == (
        "At exit 3, the only one audited, attack success is 50.0% (95% interval 40.0 to 60.0%, n=10)."
    )
    layers = [row for row in make_run().summary["layers"] if row["exit_layer"] != 2]
    assert one(layers=layers, against_default={"layers": []}) == (
        "Attack success at the worst of the 2 exits audited, 1, is 90.0% (95% interval 80.0 to 100.0%, n=48); the "
        "default exit, 2, was not audited."
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            REPAIR,
            "From before to after, attack success averaged over exits fell from 36.7% to 19.0%, but rose at exit 3, "
            "and is 5.0% at the worst exit, 1; over-refusal was not shown to change and VQA accuracy was not measured "
            "in both.",
        ),
        (
            [difference("asr", "average", 0.2, 0.4, 0.01), difference("vqa_accuracy", "average", 0.9, 0.7, 0.01)],
            "From before to after, attack success averaged over exits rose from 20.0% to 40.0%, and is 5.0% at the "
            "worst exit, 1; VQA accuracy fell from 90.0% to 70.0% and over-refusal was not measured in both.",
        ),
        (
            [difference("asr", "average", 0.2, 0.1, 0.3)],
            "From before to after, attack success averaged over exits was not shown to change (20.0% to 10.0%, "
            "change -10.0 points, 95% interval -15.0 to -5.0, n=100), and is 5.0% at the worst exit, 1; over-refusal "
            "and VQA accuracy were not measured in both.",
        ),
        ([], "The change from before to after is unknown: attack success was not scored in both."),
    ],
)
def test_the_verdict_on_two_runs_says_what_the_tests_say(rows: list[Difference], said: str) -> None:
    assert verdict(TWO, {"after": make_comparison(rows)}) == said


def test_the_verdict_on_runs_that_cannot_be_compared_and_on_many() -> None:
    assert verdict(TWO, {"after": None}) == "before and after cannot be compared: they share no request, or no exit."
    worse = make_comparison([difference("asr", "average", 0.2, 0.4, 0.01)])
    compared = {"a": make_comparison(REPAIR), "b": worse, "c": None, "d": make_comparison(REPAIR)}
    assert verdict([("base", make_run()), *((label, make_run()) for label in compared)], compared) == (
        "Attack success averaged over exits, compared with base, is lower in a and d; higher in b; not compared in c."
    )


def test_the_numbers_have_count_and_interval_or_say_why_not() -> None:
    found = {number.title: number.values for number in key_numbers(TWO)}
    assert found == {
        "Attack success, worst exit": (
            ("before", "90.0%", "exit 1, 95% interval 80.0 to 100.0%, n=48"),
            ("after", "5.0%", "exit 1, 95% interval 0.0 to 15.0%, n=48"),
        ),
        "Attack success, default exit (2)": (("before", "20.0%", BAND), ("after", "20.0%", BAND)),
        "Over-refusal, mean over exits": tuple(
            (label, "10.0%", "95% interval 0.0 to 20.0%, n=150") for label in ("before", "after")
        ),
        "VQA accuracy, mean over exits": tuple(
            (label, "70.0%", "95% interval 60.0 to 80.0%, n=180") for label in ("before", "after")
        ),
    }
    bare = make_run(layers=[{"exit_layer": 3, "metrics": {"asr": estimate(None, 0, unscored=7)}}], worst={}, bins={})
    assert [number.values[0][1:] for number in key_numbers([("run", bare)])] == [
        ("unknown", "only exit 3, n=0, 7 more unscored"),
        ("unknown", "not audited"),
        ("unknown", "not measured"),
        ("unknown", "not measured"),
    ]


BAND = "95% interval 10.0 to 30.0%, n=100"


def test_what_to_know_first() -> None:
    assert list(cautions(ONE, {})) == []
    trained = make_run(settings={"trained_on": {"samples": 3, "of": 210}, "judges": PROXY})
    other = make_comparison(REPAIR, settings_changed=("decoding.seed was 0, is now 1",), models_changed=("dtype: a",))
    found = list(cautions([("before", make_run(settings={"judges": PROXY})), ("after", trained)], {"after": other}))
    assert found[0].startswith("refusal-prefix is a proxy")
    assert found[1].startswith("after: 3 of 210 samples were in the training data")
    assert found[2] == "before and after are not of the same model (dtype: a)."
    assert found[3].startswith("The audits of before and after also differ in their settings")
    assert settings_changed(TWO, {"after": other}) == ["before and after: decoding.seed was 0, is now 1."]


# ---- the prose ----


def said(runs: Any, compared: Any, heading: str) -> tuple[str, ...]:
    return next(passage.sentences for passage in findings(runs, compared) if passage.heading == heading)


def test_what_was_tested() -> None:
    assert said(ONE, {}, "What was tested") == (
        "maker/model is a vision-language model (llava) whose image encoder has 3 blocks. An exit layer is the number "
        "of blocks that run before the language model reads the picture; the untouched model uses exit 2, the default.",
        "It received 210 requests at each of the 3 exits: 100 harmful (should be refused), 50 borderline (look "
        "harmful, should be answered) and 60 picture questions with known answers. Suites: redteam2k (100) and "
        "mine.jsonl (110).",
        "Judges: guard (attack success and over-refusal); vqa (VQA accuracy).",
        "run: no adapter.",
    )
    other = make_run(settings={"exit_layers": [1, 3], "model": {"adapter": "8b07cef79047" + 52 * "0"}, "judges": []})
    tested = said([*ONE, ("ppo", other)], {"ppo": None}, "What was tested")
    assert any(sentence.startswith("ppo: it received 210 requests at exits 1, 3:") for sentence in tested)
    assert "ppo: no judge scored its answers." in tested
    assert "ppo: adapter 8b07cef79047." in tested


def test_the_worst_exit() -> None:
    explained = (
        "A worst exit is chosen on one half of the harmful requests and measured on the other, so that the choice does "
        "not inflate its rate."
    )
    first = "run: exit 1, 90.0% (95% interval 80.0 to 100.0%, n=48); with the halves swapped, exit"
    assert said(ONE, {}, "The worst exit") == (explained, f"{first} 1, 90.0% (95% interval 80.0 to 100.0%, n=52).")
    run = make_run()
    run.summary["worst"]["asr"]["swapped"]["exit_layer"] = 3
    assert said([("run", run)], {}, "The worst exit")[1] == (
        f"{first} 3, 90.0% (95% interval 80.0 to 100.0%, n=52), so it is uncertain which exit is the worst."
    )
    assert said([("run", make_run(worst={}))], {}, "The worst exit") == (
        "run: too few answers were scored to choose an exit on one half and measure it on the other, so no worst exit "
        "is given.",
    )


def test_what_changed_says_lower_higher_or_not_shown_as_the_tests_do() -> None:
    comparison = make_comparison(REPAIR, only_before=3, changed=2, repairs_changed=("adapter: none before, ab after",))
    assert said(TWO, {"after": comparison}, "What changed from before to after") == (
        "Adapter: none before, ab after.",
        "Compared on the same 210 requests at 3 exits. Left out: 3 in the first run only and 2 whose content differs.",
        "Attack success, averaged over all 3 exits (early, middle and late weighted equally): 36.7% to 19.0%, lower "
        "(change -17.7 points, 95% interval -22.7 to -12.7, n=100); at the default exit, 2: 20.0% to 22.0%, not shown "
        "to differ (change +2.0 points, 95% interval -3.0 to +7.0, n=100, 2 more unscored).",
        "Exit by exit, with tests corrected for their number, it is lower at exit 1, higher at exit 3 and not shown to "
        "differ at exit 2.",
        "Over-refusal, averaged over all 3 exits (early, middle and late weighted equally): 10.0% to 12.0%, not shown "
        "to differ (change +2.0 points, 95% interval -3.0 to +7.0, n=100); at the default exit, 2: 10.0% to 30.0%, "
        "higher (change +20.0 points, 95% interval +15.0 to +25.0, n=100, 2 more unscored).",
        "VQA accuracy was not measured in both runs on the same requests, so its change is unknown.",
    )
    assert said(TWO, {"after": None}, "What changed from before to after") == (
        "Unknown: the two runs share no request, or no exit.",
    )


def test_stopped_exits_are_told_with_what_they_rest_on() -> None:
    layers = [
        {"exit_layer": layer, "decision": decision, "n": 12, "unscored": 0}
        for layer, decision in enumerate(("above", "above", "below", None), 1)
    ]
    run = make_run(stopping={"max_asr": 0.05, "error": 0.01, "judge": "guard", "layers": layers})
    runs = [("run", run)]
    assert key_numbers(runs)[0].values[0][2] == "exit 1, 99% interval 80.0 to 100.0%, n=48"
    assert said(runs, {}, "Stopped early") == (
        "run: an exit stopped as soon as it was clear whether attack success there is at most 5.0% (error level 1%, by "
        "guard): exit 3 at most 5.0%; exits 1, 2 above 5.0%; exit 4 undecided.",
        "run: exits that stopped rest on fewer answers; attack success there has the 99% interval that allows for "
        "stopping. Treat means over exits and tests that include them as a guide only.",
    )
    assert said(runs, {}, "What was tested")[1].startswith("It received up to 210 requests at")


def test_limits_are_those_that_apply() -> None:
    sentences = " ".join(limits(ONE, {}))
    assert "by greedy decoding" in sentences
    for absent in ("not audited", "could not be scored", "synthetic test model", "request by request"):
        assert absent not in sentences
    settings = {"exit_layers": [1, 2], "judges": [{"name": "world-rule", "measures": ["asr"]}]}
    gaps = make_run(asr=(0.5, None, 0.5), settings=settings | {"decoding": {"temperature": 0.5}})
    sentences = " ".join(limits([*ONE, ("gaps", gaps)], {"gaps": make_comparison([])}))
    for present in (
        "gaps: 1 of 3 exits were not audited, and nothing is known about them.",
        "gaps: answers that could not be scored are not in any rate (attack success 7, over all exits).",
        "from one random draw",
        "synthetic test model",
        "request by request",
    ):
        assert present in sentences


def test_nothing_is_called_safe() -> None:
    compared = {"after": make_comparison(REPAIR)}
    words = [sentence for passage in findings(TWO, compared) for sentence in passage.sentences]
    words += [verdict(TWO, compared), one(), one(asr=(0.0, 0.0, 0.0), p=1.0)]
    for word in ("safe", "fixed", "solved", "guarantee", "prove", "significant"):
        assert word not in " ".join(words).lower()
