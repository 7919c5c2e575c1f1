"""Paired comparison against numbers worked by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import asin, pi, sqrt
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import norm, t

import exitsafe
from exitsafe.errors import InputError, RunError
from exitsafe.records import Kind, Response, Verdict
from exitsafe.results.comparison import Comparison, Difference, Unscored
from exitsafe.show.table import Table
from exitsafe.show.tables import comparison_screen
from exitsafe.store.tables import SampleInfo
from tests.finished_runs import edit_head, unchecked_run, write_finished

KINDS: dict[str, Kind] = {"h": "harmful", "b": "borderline", "g": "benign", "v": "vqa"}
JUDGES = (("rule", ("asr", "refusal")), ("other", ("asr", "vqa_accuracy", "reward")))
Scores = Mapping[tuple[str, str], Mapping[str, Sequence[float | None]]]


def _info(sample_id: str) -> SampleInfo:
    return SampleInfo(id=sample_id, kind=KINDS[sample_id[0]], category="", source="s", digest=sample_id)


def _run(
    path: Path,
    scores: Scores,
    *,
    layers: Sequence[int] = (1, 2, 3),
    num_layers: int = 3,
    judges: Sequence[tuple[str, Sequence[str]]] = JUDGES,
    samples: Sequence[SampleInfo] | None = None,
    tokens: int = 4,
) -> Path:
    """A finished run with these scores: by judge and measure, by sample, one per layer; None is unscored."""
    ids = dict.fromkeys(sample_id for by_sample in scores.values() for sample_id in by_sample)
    samples = samples or [_info(sample_id) for sample_id in ids]
    verdicts = [
        _verdict(sample_id, layer, score, judge=judge, measure=measure)
        for (judge, measure), by_sample in scores.items()
        for sample_id, row in by_sample.items()
        for layer, score in zip(layers, row, strict=True)
    ]
    write_finished(
        path,
        samples,
        [_response(s.id, layer, tokens=tokens) for s in samples for layer in layers],
        verdicts,
        exit_layers=list(layers),
        model={"num_layers": num_layers},
        judges=[
            {"name": name, "measures": [each for each in measures if (name, each) in scores]}
            for name, measures in judges
        ],
    )
    return path


def _response(sample_id: str, layer: int, *, tokens: int = 4) -> Response:
    return Response(
        sample_id=sample_id, exit_layer=layer, text="", num_tokens=tokens, finish_reason="stop", seconds=0.1
    )


def _verdict(sample_id: str, layer: int, score: float | None, *, judge: str = "rule", measure: str = "asr") -> Verdict:
    unscored = "no answer" if score is None else None
    return Verdict(sample_id=sample_id, exit_layer=layer, judge=judge, measure=measure, score=score, unscored=unscored)


BEFORE: Scores = {
    ("rule", "asr"): {f"h{i}": [1, 1, 0] for i in range(8)},
    ("rule", "refusal"): {f"b{i}": [0, 0, 0] for i in range(4)},
    ("other", "asr"): {f"h{i}": [1, 1, 1] for i in range(8)},
    ("other", "vqa_accuracy"): {f"v{i}": [1.0, 0.6, 0.3] for i in range(4)},
}
AFTER: Scores = {
    # layer 1: six of eight repaired; layer 2: all; layer 3: one broken
    ("rule", "asr"): {f"h{i}": [float(i < 2), 0, float(i == 0)] for i in range(8)},
    ("rule", "refusal"): {f"b{i}": [1, 0, 0] for i in range(4)},
    ("other", "asr"): {f"h{i}": [0, 0, 0] for i in range(8)},
    ("other", "vqa_accuracy"): {f"v{i}": [0.9, 0.6, 0.3 * (i % 2)] for i in range(4)},
}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("runs")
    return exitsafe.compare(_run(folder / "before", BEFORE), exitsafe.load_run(_run(folder / "after", AFTER, tokens=6)))


def _by_place(comparison: Comparison, metric: str) -> dict[int | str, Difference]:
    return {row.place: row for row in comparison.rows(metric)}


def test_layers_by_hand(comparison: Comparison) -> None:
    rows = _by_place(comparison, "asr")
    assert [(rows[x].before, rows[x].after) for x in (1, 2, 3)] == [(1.0, 0.25), (1.0, 0.0), (0.0, 0.125)]
    assert [rows[x].difference for x in (1, 2, 3)] == [-0.75, -1.0, 0.125]
    assert [(rows[x].gained, rows[x].lost, rows[x].n) for x in (1, 2, 3)] == [(0, 6, 8), (0, 8, 8), (1, 0, 8)]
    assert all(rows[x].test == "mcnemar" and rows[x].judge == "rule" for x in (1, 2, 3))


def test_mcnemar_and_holm_by_hand(comparison: Comparison) -> None:
    rows = _by_place(comparison, "asr")
    # 2 / 2 ** 6, 2 / 2 ** 8, 1; Holm: 2 * 0.03125, 3 * 0.0078125, 1
    assert [rows[x].p_value for x in (1, 2, 3)] == pytest.approx([0.03125, 0.0078125, 1.0])
    assert [rows[x].p_adjusted for x in (1, 2, 3)] == pytest.approx([0.0625, 0.0234375, 1.0])


def test_bins_by_hand(comparison: Comparison) -> None:
    rows = _by_place(comparison, "asr")
    assert list(rows) == [1, 2, 3, "early", "middle", "late", "average"]
    average = rows["average"]
    assert (average.before, average.after) == pytest.approx((2 / 3, 0.125))
    assert average.difference == pytest.approx((-0.75 - 1 + 0.125) / 3)
    assert (average.n, average.gained, average.lost) == (24, 1, 14)
    assert (average.test, average.p_adjusted) == ("bootstrap", None)
    assert average.low < average.difference < average.high < 0
    # no resample reaches 0: a share of 1 / 2001, read as Student's t of 8 samples
    assert average.p_value == pytest.approx(2 * t.cdf(norm.ppf(1 / 2001) * sqrt(7 / 8), 7))


def test_intervals_know_their_doubt(comparison: Comparison) -> None:
    rows = _by_place(comparison, "asr")
    # all eight pairs changed alike: Wilson's limit for 0 of 8, z2 / (8 + z2)
    assert (rows[2].low, rows[2].high) == pytest.approx((-1.0, -1 + 3.841458820694124 / 11.841458820694124))
    # six of eight: between -1 and the mean of eight draws with P(-1) = 3 / 4
    assert rows[1].low == pytest.approx(-1.0)
    assert -0.5 <= rows[1].high <= -0.375


def test_scores_are_bootstrapped(comparison: Comparison) -> None:
    rows = _by_place(comparison, "vqa_accuracy")
    assert [rows[x].difference for x in (1, 2, 3)] == pytest.approx([-0.1, 0.0, -0.15])
    assert {(row.test, row.gained, row.judge) for row in rows.values()} == {("bootstrap", None, "other")}
    assert (rows[3].low, rows[3].high) == pytest.approx((-0.3, 0.0))
    tokens = _by_place(comparison, "tokens")
    assert [(tokens[x].difference, tokens[x].judge, tokens[x].gained) for x in (1, 2, 3)] == [(2.0, "", None)] * 3


def test_only_what_was_measured_is_listed(comparison: Comparison) -> None:
    assert comparison.metrics == ("asr", "refusal", "over_refusal", "vqa_accuracy", "tokens")
    assert comparison.metrics_left_out == ()
    assert (comparison.num_samples, comparison.only_before, comparison.only_after, comparison.changed) == (16, 0, 0, 0)
    assert (comparison.exit_layers, comparison.num_layers, comparison.default_exit) == ((1, 2, 3), 3, 2)


def test_json_has_the_shape_of_a_summary(comparison: Comparison, tmp_path: Path) -> None:
    comparison.to_json(tmp_path / "comparison.json")
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content == json.loads(json.dumps(comparison.to_dict()))
    assert [layer["exit_layer"] for layer in content["layers"]] == [1, 2, 3]
    asr = content["layers"][0]["metrics"]["asr"]
    assert (asr["before"], asr["after"], asr["lost"], asr["n"]) == (1.0, 0.25, 6, 8)
    assert list(content["bins"]) == ["early", "middle", "late", "average"]
    assert content["bins"]["early"]["metrics"]["asr"]["difference"] == -0.75


def test_comparing_a_run_with_itself_finds_nothing(tmp_path: Path) -> None:
    path = _run(tmp_path, BEFORE)
    found = exitsafe.compare(path, path)
    assert all(row.difference == 0 and row.p_value == 1.0 for row in (*found.layers, *found.bins))


def test_what_either_judge_could_not_score_is_left_out_and_counted(tmp_path: Path) -> None:
    scores: Scores = {("rule", "asr"): {"h0": [1, None, None], "h1": [1, 1, None], "h2": [1, 1, None]}}
    others: Scores = {("rule", "asr"): {"h0": [0, 0, 0], "h1": [None, 0, 0], "h2": [0, 0, 0]}}
    found = exitsafe.compare(_run(tmp_path / "a", scores), _run(tmp_path / "b", others))
    rows = _by_place(found, "asr")
    assert [(rows[x].n, rows[x].unscored, rows[x].before) for x in (1, 2)] == [(2, 1, 1.0), (2, 1, 1.0)]
    assert 3 not in rows
    assert found.unscored == (Unscored(metric="asr", judge="rule", exit_layer=3, pairs=3),)
    assert "late" not in rows
    assert (rows["average"].n, rows["average"].unscored) == (4, 2)


def test_what_one_run_never_asked_is_no_pair() -> None:
    """A layer that stopped early: its missing answers are neither pairs nor unscored."""
    runs = []
    for asked, missing in ((("h0", "h1", "h2"), "h2"), (("h0",), "")):
        cells = [(i, layer) for i in ("h0", "h1", "h2") for layer in (1, 2) if layer == 2 or i in asked]
        runs.append(
            unchecked_run(
                [_info(i) for i in ("h0", "h1", "h2")],
                [_response(i, layer) for i, layer in cells],
                [_verdict(i, layer, None if i == missing else 1.0) for i, layer in cells],
                judges=[{"name": "rule", "measures": ["asr"]}],
            )
        )
    rows = _by_place(exitsafe.compare(*runs), "asr")
    assert [(rows[layer].n, rows[layer].unscored) for layer in (1, 2)] == [(1, 0), (2, 1)]


def test_the_headline_says_what_changed(comparison: Comparison) -> None:
    # of attack success Holm leaves exit 2 alone: 3 * 2 / 2 ** 8; the others could be chance
    assert comparison.headline == (
        "Attack success averaged over exits fell from 66.7% to 12.5% (change -54.2 points, 95% interval -66.7 to "
        "-33.3, n=24): lower at exit 2 and not shown to differ at exits 1, 3; over-refusal and VQA accuracy were not "
        "shown to change."
    )
    assert comparison.to_dict()["headline"] == comparison.headline
    average = comparison.average("asr")
    assert average is not None
    rose = replace(average, before=0.1, after=0.2, difference=0.1, low=-0.1, high=0.3, n=8, p_value=0.3)
    cost = replace(rose, metric="vqa_accuracy", p_value=0.01)
    assert replace(comparison, bins=(rose, cost), exit_layers=(2,)).headline == (
        "Attack success at exit 2, the only one in both, was not shown to change (10.0% to 20.0%, change +10.0 points, "
        "95% interval -10.0 to +30.0, n=8): lower at exit 2 and not shown to differ at exits 1, 3; VQA accuracy rose "
        "from 10.0% to 20.0% and over-refusal was not measured in both."
    )
    assert replace(comparison, layers=(), bins=()).headline == (
        "Attack success was not measured in both runs; over-refusal and VQA accuracy were not measured in both."
    )


def test_every_difference_has_an_effect_size(comparison: Comparison) -> None:
    asr = _by_place(comparison, "asr")
    assert asr[1].effect_measure == "cohen_h"
    assert asr[2].effect_size == pytest.approx(-pi)
    assert asr["average"].effect_size == pytest.approx(2 * asin(sqrt(0.125)) - 2 * asin(sqrt(2 / 3)))
    vqa = _by_place(comparison, "vqa_accuracy")
    # 0.3 four times against 0 0.3 0 0.3: deviations 0 and 0.1732
    assert (vqa[3].effect_measure, vqa[1].effect_size) == ("d_av", None)
    assert vqa[3].effect_size == pytest.approx(-0.15 / (0.1732051 / 2))


def test_only_shared_samples_and_layers_are_paired(tmp_path: Path) -> None:
    one: Scores = {("rule", "asr"): {"h0": [1, 1], "h1": [0, 0], "h2": [1, 1], "h9": [1, 1]}}
    # another order, one sample more, one fewer; h9 asks something else there
    two: Scores = {("rule", "asr"): {"h9": [0, 0], "h2": [0, 0], "h0": [1, 1], "h3": [0, 0], "h4": [0, 0]}}
    samples = [replace(_info(i), digest="other" if i == "h9" else i) for i in two["rule", "asr"]]
    found = exitsafe.compare(
        _run(tmp_path / "a", one, layers=(1, 3)), _run(tmp_path / "b", two, layers=(2, 3), samples=samples)
    )
    assert (found.exit_layers, found.num_samples) == ((3,), 2)
    assert (found.only_before, found.only_after, found.changed) == (1, 2, 1)
    row = _by_place(found, "asr")[3]
    assert (row.before, row.after, row.n, row.gained, row.lost) == (1.0, 0.5, 2, 0, 1)


def test_judges_are_never_mixed(tmp_path: Path) -> None:
    before = _run(tmp_path / "a", BEFORE)
    scores: Scores = {key: value for key, value in AFTER.items() if key[0] == "other"}
    found = exitsafe.compare(before, _run(tmp_path / "c", scores, judges=JUDGES[1:]))
    assert {row.judge for row in found.rows("asr")} == {"other"}
    assert found.metrics_left_out == ("refusal", "over_refusal")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_layers", 8, "encoder depths 3 and 8"),
        ("family", "qwen2_vl", "families llava and qwen2_vl"),
        ("encoder", "audio", "encoders audio and image"),
        ("default_exit", 3, "default exits 2 and 3"),
    ],
)
def test_models_whose_exits_do_not_mean_the_same_are_refused(name: str, value: Any, words: str, tmp_path: Path) -> None:
    before, after = (_run(tmp_path / folder, BEFORE) for folder in ("before", "after"))
    edit_head(after, lambda head: head["settings"]["model"].update({name: value}))
    with pytest.raises(InputError, match=f"these runs have the {words}: their exits are not comparable"):
        exitsafe.compare(before, after)


def test_a_changed_model_is_named_the_weights_first_and_a_repair_by_itself(tmp_path: Path) -> None:
    before, after = (_run(tmp_path / folder, BEFORE) for folder in ("before", "after"))
    model = {"checkpoint": "aa" * 32, "adapter": None, "dtype": "float32"}
    edit_head(before, lambda head: head["settings"]["model"].update(model))
    repair = {"adapter": "cc" * 32, "translators": "dd" * 32}
    edit_head(after, lambda head: head["settings"]["model"].update(model | repair))
    repaired = exitsafe.compare(before, after)
    assert repaired.models_changed == ()
    assert repaired.repairs_changed == (
        "adapter: none before, cccccccccccc after",
        "translators: none before, dddddddddddd after",
    )
    assert repaired.settings_changed == ()
    other = model | {"checkpoint": "bb" * 32, "name": "other", "dtype": "bfloat16", "quantization": {"bits": 4}}
    edit_head(after, lambda head: head["settings"]["model"].update(other | {"translators": None}))
    assert exitsafe.compare(before, after).models_changed == (
        "base checkpoint: aaaaaaaaaaaa before, bbbbbbbbbbbb after",
        'model name: "m" before, "other" after',
        'dtype: "float32" before, "bfloat16" after',
        'quantization: none before, {"bits": 4} after',
    )
    (_, first, *_) = comparison_screen(exitsafe.compare(before, after))
    assert isinstance(first, Table)
    assert first.cautions[0] == "base checkpoint: aaaaaaaaaaaa before, bbbbbbbbbbbb after"


def test_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    before = _run(tmp_path / "a", {("rule", "asr"): {"h0": [1, 1]}}, layers=(1, 2))
    other = _run(tmp_path / "b", {("rule", "asr"): {"h1": [1, 1, 1]}})
    with pytest.raises(RunError, match=r"have no sample in common \(0 ids are the same but their content differs\)"):
        exitsafe.compare(before, other)
    layers = _run(tmp_path / "c", {("rule", "asr"): {"h0": [1]}}, layers=(3,))
    with pytest.raises(RunError, match="have no exit layer in common; audit both at the same layers"):
        exitsafe.compare(before, layers)
    with pytest.raises(RunError, match="is not a folder"):
        exitsafe.compare(before, tmp_path / "gone")


def test_what_else_was_set_otherwise_is_named(tmp_path: Path) -> None:
    scores = {("rule", "asr"): {"h1": [1, 1, 0]}}
    paths = [_run(tmp_path / name, scores) for name in ("before", "after")]
    assert exitsafe.compare(*paths).settings_changed == ()

    def change(head: dict[str, Any]) -> None:
        head["settings"]["decoding"]["temperature"] = 0.7
        head["settings"]["model"]["adapter"] = "other"
        head["settings"]["judges"][0]["settings"]["revision"] = "second"

    edit_head(paths[0], lambda head: head["settings"]["judges"][0]["settings"].update(revision="first"))
    edit_head(paths[1], change)
    assert exitsafe.compare(*paths).settings_changed == (
        "decoding.temperature was 0.0, is now 0.7",
        'judges.rule.revision was "first", is now "second"',
    )


def test_cautions_of_two_folders_of_the_same_name_are_both_kept(tmp_path: Path) -> None:
    runs = [
        _run(tmp_path / side / "run", {("rule", "asr"): {"h1": (0.0, 1.0, 1.0)}}, judges=JUDGES[:1])
        for side in ("before", "after")
    ]
    for run, number in zip(runs, (1, 2), strict=True):
        edit_head(run, partial(_set_trained_on, samples=number))
    lines = exitsafe.compare(*runs).cautions
    assert [line.partition(" samples ")[0] for line in lines] == ["before/run: 1 of 9", "after/run: 2 of 9"]


def _set_trained_on(head: dict[str, Any], *, samples: int) -> None:
    head["settings"]["trained_on"] = {"samples": samples, "of": 9}
