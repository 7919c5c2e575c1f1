from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from exitsafe.cli.tables import audit_tables, bin_label, comparison_tables
from exitsafe.results.comparison import Comparison, Difference, Unscored
from exitsafe.results.run import AuditRun


def _print(tables: list[Any]) -> list[str]:
    screen = Console(file=StringIO(), width=200)
    for table in tables:
        screen.print(table)
    file = screen.file
    assert isinstance(file, StringIO)
    return [" ".join(line.replace("│", "|").split()) for line in file.getvalue().splitlines()]


def _estimate(value: float | None, *, n: int = 40, unscored: int = 0) -> dict[str, Any]:
    spread = {"low": 0.1, "high": 0.456} if value is not None else {"low": None, "high": None}
    return {"value": value, **spread, "n": n, "unscored": unscored}


def test_a_rate_stands_with_its_interval_and_what_was_not_scored() -> None:
    layers = [
        {"exit_layer": 1, "metrics": {"asr": _estimate(0.25), "reward": _estimate(-1.5)}},
        {"exit_layer": 2, "metrics": {"asr": _estimate(0.255, n=37, unscored=3)}},
        {"exit_layer": 3, "metrics": {"asr": _estimate(None, n=0, unscored=40)}},
    ]
    lines = _print(
        audit_tables(_run(layers, {"average": _estimate(0.2, n=77, unscored=3)}, measures=["asr", "reward"]))
    )
    assert "| 1 | 25.0% (10.0 to 45.6%) | -1.50 (0.10 to 0.46) |" in lines
    assert "| 2 (default) | 25.5% (10.0 to 45.6%), 3 unscored | |" in lines
    assert "| 3 | none of 40 scored | |" in lines
    assert "| AASR/ATR average | 20.0% (10.0 to 45.6%), n=77, 3 unscored | |" in lines
    assert "Judges: j. Files: runs/[x]" in lines
    assert any("(n=40 a layer)" in line for line in lines)


def _run(
    layers: list[dict[str, Any]], bins: dict[str, dict[str, Any]], *, measures: list[str] | None = None, **more: Any
) -> AuditRun:
    """`bins`: their asr."""
    summary = {
        "model": "m",
        "num_layers": 3,
        "default_exit": 2,
        "layers": layers,
        "bins": {name: {"metrics": {"asr": estimate}} for name, estimate in bins.items()},
        "against_default": {"layers": []},
        "worst": {},
        "judges": {},
        "agreement": [],
    } | more
    settings = {
        "exit_layers": [layer["exit_layer"] for layer in layers],
        "judges": [{"name": "j", "measures": measures or ["asr"]}],
    }
    return AuditRun(path=Path("runs/[x]"), settings=settings, origin={}, summary=summary)


def _layers(*exit_layers: int, **changes: Any) -> list[dict[str, Any]]:
    return [{"exit_layer": layer, "metrics": {"asr": _estimate(0.25, **changes)}} for layer in exit_layers]


def test_layers_that_differ_from_the_default_are_marked() -> None:
    against = [
        {"exit_layer": layer, "metrics": {"asr": {"p_adjusted": p_adjusted}}}
        for layer, p_adjusted in ((1, 0.049), (3, 0.05))
    ]
    lines = _print(audit_tables(_run(_layers(1, 2, 3), {}, against_default={"layers": against})))
    assert "| 1 | 25.0% (10.0 to 45.6%)* |" in lines
    assert "| 3 | 25.0% (10.0 to 45.6%) |" in lines
    assert "* differs from the default exit 2, paired: p (Holm over exits) < 0.05." in lines


def test_the_papers_names_are_for_whole_bins() -> None:
    names = ("early", "middle", "late", "average")
    summary = {"num_layers": 6, "layers": _layers(1, 2, 3, 5, 6)}
    assert [bin_label(summary, name, ["asr", "toxicity", "coherence"]) for name in names] == [
        "AASR/ATS early",
        "middle, 1 of 2 exits",
        "AASR/ATS late",
        "mean of early, middle, late",
    ]
    assert bin_label({"num_layers": 6, "layers": _layers(6)}, "average", ["asr"]) == "mean of late"
    assert bin_label({"num_layers": 6, "layers": _layers(1, 2)}, "early", ["coherence"]) == "mean early"
    # two blocks make no three bins
    assert bin_label({"num_layers": 2, "layers": _layers(1, 2)}, "average", ["asr"]) == "mean of middle, late"


def test_the_worst_exit_stands_below_with_both_ways() -> None:
    worst = {"exit_layer": 1, "value": 0.5, "low": 0.3, "high": 0.7, "n": 20, "unscored": 1, "chosen_on": 19}
    swapped = worst | {"exit_layer": 3, "value": None, "low": None, "high": None, "n": 0}
    lines = _print(audit_tables(_run(_layers(1, 2, 3), {}, worst={"asr": worst | {"swapped": swapped}})))
    assert (
        "Worst exit for attack success, chosen on one half of the samples, measured on the other: exit 1, 50.0% "
        "(n=20, 1 unscored, 30.0 to 70.0%); halves swapped: exit 3, none scored (n=0, 1 unscored)."
    ) in " ".join(lines)


def test_a_run_that_stopped_early_says_so() -> None:
    layers = [*_layers(1, n=12), *_layers(2)]
    rows = [
        {"exit_layer": 1, "decision": "above", "n": 12, "unscored": 0},
        {"exit_layer": 2, "decision": None, "n": 39, "unscored": 1},
    ]
    stopping = {"max_asr": 0.05, "error": 0.1, "judge": "j", "layers": rows}
    lines = _print(audit_tables(_run(layers, {}, stopping=stopping)))
    assert "| 1 | 25.0% (10.0 to 45.6%), n=12 |" in lines
    text = " ".join(lines)
    assert "attack success at most 5.0% or above, by j: exit 1 above (n=12), 2 open (n=39, 1 unscored)." in text
    assert "the 90% interval that holds at every look" in text


def test_judges_of_attack_success_stand_side_by_side() -> None:
    results = {
        name: {
            "layers": [{"exit_layer": layer, "metrics": {"asr": _estimate(value)}} for layer in (1, 2, 3)],
            "bins": {},
        }
        for name, value in (("first", 0.25), ("second", 0.75))
    }
    without: dict[str, Any] = {
        "vqa": {"layers": [{"exit_layer": layer, "metrics": {}} for layer in (1, 2, 3)], "bins": {}}
    }
    pair: dict[str, Any] = {"measure": "asr", "first": "first", "second": "second", "observed": 0.5, "n": 20}
    pairs = [
        pair | {"kappa": 0.25, "low": -0.1, "high": 0.6, "undefined": None, "unscored": 3},
        pair | {"kappa": None, "low": None, "high": None, "undefined": "one rater is constant", "unscored": 0},
        pair | {"observed": None, "kappa": None, "undefined": "nothing scored by both", "n": 0, "unscored": 7},
    ]
    lines = _print(audit_tables(_run(_layers(1, 2, 3), {}, judges=results | without, agreement=pairs)))
    assert "Attack success by judge" in lines
    assert "| asr | first | second | 0.25 (-0.10 to 0.60) | 50.0% | 20 | 3 |" in lines
    assert "| asr | first | second | none: one rater is constant | 50.0% | 20 | 0 |" in lines
    assert "| asr | first | second | none: nothing scored by both | | 0 | 7 |" in lines
    assert "| 2 (default) | 25.0% (10.0 to 45.6%) | 75.0% (10.0 to 45.6%) |" in lines
    assert not any("vqa" in line for line in lines)
    one = _print(audit_tables(_run(_layers(1, 2, 3), {}, judges={"first": results["first"]} | without)))
    assert "Attack success by judge" not in one


def _difference(place: int | str, **changes: Any) -> Difference:
    values: dict[str, Any] = {
        "metric": "asr",
        "judge": "j",
        "place": place,
        "before": 0.5,
        "after": 0.2,
        "difference": -0.3,
        "low": -0.4,
        "high": 0.0,
        "n": 40,
        "unscored": 0,
        "gained": 1,
        "lost": 13,
        "test": "mcnemar",
        "p_value": 0.0002,
        "p_adjusted": 0.0123,
        "effect_size": -0.6435,
        "effect_measure": "cohen_h",
    }
    return Difference(**values | changes)


def test_a_change_stands_with_its_interval_and_tests() -> None:
    comparison = Comparison(
        before="a",
        after="b",
        num_layers=2,
        default_exit=2,
        models_changed=("base checkpoint: aaa before, bbb after",),
        repairs_changed=("adapter: none before, ccc after",),
        cautions=(),
        titles={"asr": "Attack success", "refusal": "Refusal"},
        exit_layers=(1, 2),
        num_samples=40,
        only_before=2,
        only_after=0,
        changed=1,
        settings_changed=("decoding.seed was 0, is now 1",),
        metrics_left_out=("toxicity",),
        unscored=(Unscored(metric="asr", judge="j", exit_layer=3, pairs=40),),
        layers=(_difference(1), _difference(2, unscored=2), _difference(1, metric="refusal")),
        bins=(_difference("average", p_adjusted=None, p_value=0.5),),
    )
    lines = _print(comparison_tables(comparison))
    assert "| 1 | 40 | 50.0% | 20.0% | -30.0 (-40.0 to 0.0) | -0.64 | <0.001 | 0.012 |" in lines
    assert "| 2 (default) | 40 (+2 unscored) | 50.0% | 20.0% | -30.0 (-40.0 to 0.0) | -0.64 | <0.001 | 0.012 |" in lines
    assert "| average | 40 | 50.0% | 20.0% | -30.0 (-40.0 to 0.0) | -0.64 | 0.500 | |" in lines
    assert lines[:3] == [
        "Attack success fell at 2 of 2 exits; worst exit 50.0% -> 20.0% (n=40).",
        "Base checkpoint: aaa before, bbb after.",
        "Adapter: none before, ccc after.",
    ]
    assert "Compared as well: refusal (--metric NAME, --json)." in lines
    assert "Samples left out: 2 only before, 1 that ask something else." in lines
    assert "Could not be scored: asr at exit 3 (40 pairs)." in lines
    assert "No judge in both runs for toxicity." in lines
