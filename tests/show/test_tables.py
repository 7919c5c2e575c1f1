from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from exitsafe.results.comparison import Comparison, Difference, Unscored, compare
from exitsafe.results.run import AuditRun
from exitsafe.show.tables import (
    audit_tables,
    bin_label,
    comparison_screen,
    comparison_tables,
    default_tables,
    exit_table,
    judges_tables,
    method_table,
    series_of,
)
from exitsafe.stats import wilson_interval
from tests.show.page_runs import TWO_JUDGES, write_run


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
    assert "| AASR average | 20.0% (10.0 to 45.6%), n=77, 3 unscored | |" in lines
    assert "Judges: j. Files: runs/[x]" in lines
    assert any("(n=40 per exit)" in line for line in lines)


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
    against = []
    for layer, p_adjusted in ((1, 0.049), (3, 0.05)):
        row = vars(_difference(layer, p_adjusted=p_adjusted))
        row |= {"at_default": row.pop("before"), "at_layer": row.pop("after")}
        del row["metric"], row["judge"], row["place"]
        against.append({"exit_layer": layer, "metrics": {"asr": row}})
    lines = _print(audit_tables(_run(_layers(1, 2, 3), {}, against_default={"layers": against})))
    assert "| 1 | 25.0% (10.0 to 45.6%)* |" in lines
    assert "| 3 | 25.0% (10.0 to 45.6%) |" in lines
    assert "* differs from the default exit, 2: paired test, p (Holm over exits) < 0.05." in lines


def test_the_papers_names_are_for_whole_bins() -> None:
    names = ("early", "middle", "late", "average")
    run = _run(_layers(1, 2, 3, 5, 6), {}, num_layers=6)
    assert [bin_label(run, name, ["AASR", "ATS"]) for name in names] == [
        "AASR/ATS early",
        "middle, 1 of 2 exits",
        "AASR/ATS late",
        "mean of early, middle, late",
    ]
    assert bin_label(_run(_layers(6), {}, num_layers=6), "average", ["AASR"]) == "mean of late"
    assert bin_label(_run(_layers(1, 2), {}, num_layers=6), "early", []) == "mean early"
    # two blocks make no three bins
    assert bin_label(_run(_layers(1, 2), {}, num_layers=2), "average", ["AASR"]) == "mean of middle, late"


def test_the_worst_exit_stands_below_with_both_ways() -> None:
    worst = {"exit_layer": 1, "value": 0.5, "low": 0.3, "high": 0.7, "n": 20, "unscored": 1, "chosen_on": 19}
    swapped = worst | {"exit_layer": 3, "value": None, "low": None, "high": None, "n": 0}
    lines = _print(audit_tables(_run(_layers(1, 2, 3), {}, worst={"asr": worst | {"swapped": swapped}})))
    assert (
        "Worst exit for attack success, chosen on one half of the samples, measured on the other: exit 1, 50.0% "
        "(95% interval 30.0 to 70.0%, n=20, 1 more unscored); with the halves swapped, exit 3, unknown (none of 1 "
        "answers could be scored), so it is uncertain which exit is the worst."
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
    assert "is at most 5.0% (error level 10%, by j): exit 1 above 5.0%; exit 2 undecided." in text
    assert "the 90% interval that allows for stopping" in text


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
    assert "Attack success by judge, with 95% intervals" in lines
    assert "| asr | first | second | 0.25 (-0.10 to 0.60) | 50.0% | 20 | 3 |" in lines
    assert "| asr | first | second | none: one rater is constant | 50.0% | 20 | 0 |" in lines
    assert "| asr | first | second | none: nothing scored by both | | 0 | 7 |" in lines
    assert "| 2 (default) | 25.0% (10.0 to 45.6%) | 75.0% (10.0 to 45.6%) |" in lines
    assert not any("vqa" in line for line in lines)
    one = _print(audit_tables(_run(_layers(1, 2, 3), {}, judges={"first": results["first"]} | without)))
    assert not any("by judge" in line for line in one)


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
    lines = _print(comparison_screen(comparison))
    assert "| 1 | 40 | 50.0% | 20.0% | -30.0 (-40.0 to 0.0) | -0.64 | <0.001 | 0.012 | lower |" in lines
    assert any(line.startswith("| 2 (default) | 40 (+2 unscored) | 50.0% |") for line in lines)
    assert "| average | 40 | 50.0% | 20.0% | -30.0 (-40.0 to 0.0) | -0.64 | 0.500 | | not shown to differ |" in lines
    assert " ".join(lines).startswith(
        "Attack success averaged over exits was not shown to change (50.0% to 20.0%, change -30.0 points, 95% interval "
        "-40.0 to 0.0, n=40): lower at exits 1, 2; over-refusal and VQA accuracy were not measured in both. "
        "Base checkpoint: aaa before, bbb after. Adapter: none before, ccc after."
    )
    assert "Also compared: refusal (--metric NAME, --json)." in lines
    assert (
        "Compared on the same 40 requests at 2 exits. Left out: 2 in the first run only and 1 whose content differs."
    ) in lines
    assert "Could not be scored: asr at exit 3 (40 pairs)." in lines
    assert "No judge in both runs for toxicity." in lines


# ---- of runs that were written ----


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> AuditRun:
    """Eight harmful requests, answered at exits 1 and 2 of 4; the default is 3; the first has no verdict at exit 1."""
    path = tmp_path_factory.mktemp("runs") / "before"
    return write_run(path, harmful_until=2, judges=TWO_JUDGES, is_unscored=lambda n, layer: n == 0 and layer == 1)


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> AuditRun:
    return write_run(tmp_path_factory.mktemp("runs") / "after", harmful_until=0, judges=TWO_JUDGES)


def test_runs_side_by_side_with_their_bins(before: AuditRun, after: AuditRun, tmp_path: Path) -> None:
    some = write_run(tmp_path / "some", harmful_until=2, exit_layers=[1, 3])
    runs = {"before": before, "after": after, "some": some}
    table = exit_table("Attack success", [series_of(label, run, "asr") for label, run in runs.items()])
    low, high = wilson_interval(7, 7)
    assert [column.heading for column in table.columns] == [
        "exit", *(f"{label}\n(n=8 per exit)" for label in runs)
    ]  # fmt: skip
    assert table.rows[0].cells[:2] == ("1", f"100.0% ({100 * low:.1f} to {100 * high:.1f}%), 1 unscored")
    assert [row.cells[0] for row in table.rows if row.is_bold] == ["3 (default)"]
    assert [row.cells[0] for row in table.rows[4:]] == [
        "AASR early",
        "AASR middle",
        "AASR late / late, 1 of 2 exits",
        "AASR average / mean of early, late",
    ]
    assert table.rows[6].cells[3].startswith("0.0% (")
    assert table.rows[5].cells[3] == table.rows[1].cells[3] == ""


def test_judges_side_by_side(before: AuditRun) -> None:
    (table,) = judges_tables([("before", before)])
    assert table.title == "before: agreement beyond chance: Cohen's kappa with 95% intervals"
    assert [row.cells for row in table.rows] == [
        ("Attack success", "guard", "other", "1.00 (0.29 to 1.00)", "100.0%", "31", "1")
    ]


def test_tests_count_the_exits_that_differ(before: AuditRun, after: AuditRun) -> None:
    table = default_tables(before)[0]
    assert table.title == "Attack success: 2 of 3 exits differ from the default exit"
    assert [column.heading for column in table.columns[-5:]] == [
        "change (points), 95% interval", "Cohen's h", "p", "p (Holm)", "at exit is",
    ]  # fmt: skip
    exit_2 = next(row.cells for row in table.rows if row.cells[0] == "2")
    assert exit_2[1:4] == ("8", "0.0%", "100.0%") and exit_2[4].startswith("+100.0 (")
    assert exit_2[-3:] == ("0.008", "0.023", "higher")
    (table, *_) = comparison_tables(compare(before, after))
    assert table.title == "Attack success, judged by guard: 2 of 4 exits differ"
    rows = table.rows
    assert [(row.cells[0], row.cells[-1]) for row in rows] == [
        ("1", "lower"), ("2", "lower"), ("3 (default)", "not shown to differ"), ("4", "not shown to differ"),
        ("early", "lower"), ("middle", "lower"), ("late", "not shown to differ"), ("average", "lower"),
    ]  # fmt: skip
    assert [row.cells[0] for row in rows if row.is_bold] == ["3 (default)"]
    assert rows[0].cells[1] == "7 (+1 unscored)"
    # of the bootstrap of 8 requests, or of 7 that were scored, where all differ; McNemar's p is exact
    assert [row.cells[-3] for row in rows[4:] if row.cells[-1] == "lower"] == ["≤0.023", "≤0.018", "≤0.018"]
    assert rows[1].cells[-3] == "0.008"
    assert rows[-1].cells[-2] == ""


def test_the_method_names_no_folder(tmp_path: Path) -> None:
    hub = {"suite-vqa": {"id": "maker/set", "configs": [], "split": "test", "revision": "0" * 40}}
    run = write_run(
        tmp_path / "run",
        harmful_until=1,
        exit_layers=[1, 2],
        judges=[("refusal-prefix", ("asr",))],
        origin={"hub": hub, "seed": 3, "images": "/home/ann/p"},
    )
    run.settings["judges"][0]["settings"] = {"model": "/home/ann/guard", "note": '"quoted" </td><script>'}
    rows = {row.cells[0]: row.cells[1] for row in method_table([("run", run)]).rows}
    assert rows["checkpoint"] == f"SHA-256 {'ab' * 32}"
    assert rows["adapter"] == "none"
    assert rows["exits audited"] == "1, 2"
    assert rows["suite suite-vqa"] == ("8 requests, id maker/set, configs none, split test, revision 0000000000000000…")
    assert rows["suites: seed"] == "3"
    assert "ann" not in " ".join(rows.values())
    assert rows["judge refusal-prefix"].startswith('model guard, note "quoted" </td>')
