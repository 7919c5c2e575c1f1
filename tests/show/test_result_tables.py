from __future__ import annotations

import re
from pathlib import Path

import pytest

from exitsafe.results.comparison import compare
from exitsafe.results.run import AuditRun, label_runs
from exitsafe.show.names import shown
from exitsafe.show.result_tables import (
    against_default_tables,
    agreement_table,
    bin_table,
    comparison_tables,
    method_table,
    metric_table,
    worst_table,
)
from exitsafe.stats import wilson_interval
from tests.show.page_runs import TWO_JUDGES, write_run


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> AuditRun:
    """Eight harmful requests, answered at exits 1 and 2 of 4; the default is 3; the first has no verdict at exit 1."""
    path = tmp_path_factory.mktemp("runs") / "before"
    return write_run(path, harmful_until=2, judges=TWO_JUDGES, is_unscored=lambda n, layer: n == 0 and layer == 1)


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> AuditRun:
    return write_run(tmp_path_factory.mktemp("runs") / "after", harmful_until=0, judges=TWO_JUDGES)


def test_a_metric_with_all_that_it_rests_on(before: AuditRun, after: AuditRun) -> None:
    table = metric_table("Attack success", "asr", [("before", before.summary, 3), ("after", after.summary, 3)])
    low, high = wilson_interval(7, 7)
    assert table.columns == ("exit", "run", "value", "95% interval", "n", "unscored")
    assert table.rows[0].cells == ("1", "before", "100.0%", f"{100 * low:.1f} to {100 * high:.1f}%", "7", "1")
    assert [row.cells[:3] for row in table.rows if row.is_default] == [
        ("3 (default)", "before", "0.0%"),
        ("3 (default)", "after", "0.0%"),
    ]
    assert len(table.rows) == 8


def test_bins_have_the_papers_names_and_say_which_exits_are_missing(before: AuditRun, tmp_path: Path) -> None:
    some = write_run(tmp_path / "some", harmful_until=2, exit_layers=[1, 3], num_layers=6, default_exit=5)
    table = bin_table([("before", before), ("some", some)])
    assert table is not None
    assert table.columns == ("mean of", "run", "early", "middle", "late", "average")
    found = {row.cells[1]: row.cells[2:] for row in table.rows if row.cells[0] == "Attack success (AASR)"}
    cells = [re.sub(r"\(.*?%; ", "(", cell) for cell in found["before"]]
    assert cells == ["100.0% (n=7, 1 more unscored)", "100.0% (n=8)", "0.0% (n=16)", "66.7% (n=31, 1 more unscored)"]
    assert re.fullmatch(r"66.7% \([\d.]+ to [\d.]+%; n=31, 1 more unscored\)", found["before"][-1])
    cells = [re.sub(r"\(.*?%; ", "(", cell) for cell in found["some"]]
    assert cells == ["100.0% (n=8, 1 of 2 exits)", "0.0% (n=8, 1 of 2 exits)", "", "50.0% (n=16, 2 of 6 exits)"]


def test_judges_side_by_side(before: AuditRun) -> None:
    table = agreement_table([("before", before)])
    assert table is not None
    assert [row.cells for row in table.rows] == [
        ("Attack success", "before", "guard", "other", "100.0%", "1.00", "0.29 to 1.00", "31", "1")
    ]


def test_tests_count_the_exits_that_differ(before: AuditRun, after: AuditRun) -> None:
    headline, table = next(iter(against_default_tables(before)))
    assert headline == "Attack success: 2 of 3 exits differ from the default exit"
    assert table.columns[-5:] == ("change (points)", "95% interval", "Cohen's h", "p", "p (Holm)")
    exit_2 = next(row.cells for row in table.rows if row.cells[0] == "2")
    assert exit_2[1:6] == ("8", "0", "0.0%", "100.0%", "+100.0")
    assert exit_2[-2:] == ("0.008", "0.023")
    rows = dict(comparison_tables(compare(before, after), "before", "after"))[
        "Attack success: 2 of 4 exits differ"
    ].rows
    assert [(row.cells[0], row.cells[-1]) for row in rows] == [
        ("1", "lower"), ("2", "lower"), ("3 (default)", "not shown to differ"), ("4", "not shown to differ"),
        ("early", "lower"), ("middle", "lower"), ("late", "not shown to differ"), ("average", "lower"),
    ]  # fmt: skip
    assert [row.cells[0] for row in rows if row.is_default] == ["3 (default)"]
    assert rows[0].cells[1:3] == ("7", "1")
    # of the bootstrap of 8 requests, or of 7 that were scored, where all differ; McNemar's p is exact
    assert [row.cells[-3] for row in rows[4:] if row.cells[-1] == "lower"] == ["≤0.023", "≤0.018", "≤0.018"]
    assert rows[1].cells[-3] == "0.008"
    assert rows[-1].cells[-2] == ""


def test_worst_exits_of_both_halves(before: AuditRun) -> None:
    table = worst_table([("before", before)])
    assert table is not None
    worst = before.summary["worst"]["asr"]
    assert [row.cells[:4] for row in table.rows][:2] == [
        ("Attack success", "before", "first", str(worst["exit_layer"])),
        ("Attack success", "before", "second", str(worst["swapped"]["exit_layer"])),
    ]


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


def test_labels_hide_nothing(tmp_path: Path) -> None:
    folder = "/".join(tmp_path.parts[1:])
    assert label_runs([tmp_path / "run", tmp_path / "run"]) == [f"{folder}/run (1)", f"{folder}/run (2)"]
    assert shown("a" + chr(0x200B) + chr(0xD800) + "é") == "a\\u200b\\ud800é"
    assert len(shown("x" * 500)) == 80
