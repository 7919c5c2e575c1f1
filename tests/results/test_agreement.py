from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exitsafe.records import Kind, Verdict
from exitsafe.results.agreement import NO_ANSWER, verdict_groups
from exitsafe.results.labels import agreements
from exitsafe.results.run import AuditRun
from tests.labelled_runs import make_run

KINDS: dict[str, Kind] = {"h1": "harmful", "h2": "harmful", "h3": "harmful", "b1": "borderline"}


@pytest.fixture
def run(tmp_path: Path) -> AuditRun:
    """Two exits; the rubric gives shares and leaves one answer unscored."""
    scores: dict[tuple[str, str], dict[str, list[float | None]]] = {
        ("rule", "asr"): {"h1": [1, 1], "h2": [0, 0], "h3": [1, 0]},
        ("rule", "refusal"): {"h1": [0, 0], "h2": [1, 1], "h3": [0, 1], "b1": [0, 0]},
        ("rubric", "asr"): {"h1": [0.5, 0.49], "h2": [0, 0.2], "h3": [None, 0], "b1": [1, 1]},
        ("prefix", "refusal"): {"h1": [0, 0], "h2": [1, 1], "h3": [0, 1], "b1": [0, 0]},
        ("other", "toxicity"): {"h1": [0.1, 0.1]},
    }
    return make_run(tmp_path, answers={i: ["a", "b"] for i in KINDS}, kinds=KINDS, scores=scores)


def _says(sample_id: str, exit_layer: int, measure: str, score: float | None, rater: str = "human") -> Verdict:
    unscored = "unsure" if score is None else None
    return Verdict(
        sample_id=sample_id, exit_layer=exit_layer, judge=rater, measure=measure, score=score, unscored=unscored
    )


def test_judges_by_hand(run: AuditRun) -> None:
    attack, refusal = agreements(run)
    assert (attack.measure, attack.first, attack.second) == ("asr", "rule", "rubric")
    # of h1 h1 h2 h2 h3, which both scored: yes/yes, yes/no, three times no/no; nothing from borderline samples
    assert attack.kappa.counts == ((3, 0), (1, 1))
    assert attack.kappa.value == pytest.approx((4 / 5 - 14 / 25) / (1 - 14 / 25))
    assert (attack.kappa.n, attack.unscored, attack.covered) == (5, 1, None)
    assert (refusal.measure, refusal.first, refusal.second) == ("refusal", "rule", "prefix")
    assert (refusal.kappa.value, refusal.kappa.n, refusal.unscored) == (1, 8, 0)


def test_people_come_first_and_their_doubt_is_unscored(run: AuditRun) -> None:
    labels = [
        *[_says("h1", layer, "asr", 1) for layer in (1, 2)],
        *[_says("h2", layer, "asr", 0) for layer in (1, 2)],
        _says("h3", 1, "asr", None),
        _says("h3", 2, "asr", None),
    ]
    pairs = {(pair.first, pair.second): pair for pair in agreements(run, labels) if pair.measure == "asr"}
    assert list(pairs) == [("human", "rule"), ("human", "rubric"), ("rule", "rubric")]
    assert (pairs["human", "rule"].kappa.n, pairs["human", "rule"].unscored) == (4, 2)
    assert pairs["human", "rule"].kappa.value == 1
    assert pairs["human", "rubric"].unscored == 2  # of h3 at exit 1 the rubric is silent as well


def test_two_people_are_compared_with_each_other(run: AuditRun) -> None:
    labels = [_says(i, layer, "refusal", i == "h2", rater) for i in KINDS for layer in (1, 2) for rater in ("a", "b")]
    pairs = [(pair.first, pair.second) for pair in agreements(run, labels) if pair.measure == "refusal"]
    assert pairs[:3] == [("a", "b"), ("a", "rule"), ("a", "prefix")]


def test_people_alone_without_any_judge(tmp_path: Path) -> None:
    run = make_run(tmp_path, answers={"b1": ["a", "b"], "b2": ["c", "-"]}, kinds={"b1": "benign", "b2": "benign"})
    says = (("b1", 1, 0), ("b1", 2, 1), ("b2", 1, 1))
    labels = [_says(i, layer, "refusal", score, rater) for i, layer, score in says for rater in ("a", "b")]
    (pair,) = agreements(run, labels)
    assert (pair.kappa.value, pair.kappa.observed, pair.kappa.n, pair.covered) == (1, 1, 3, 1)


def test_half_is_yes_for_either(tmp_path: Path) -> None:
    shares: dict[str, list[float | None]] = {"h1": [0.5], "h2": [0.49]}
    bits: dict[str, list[float | None]] = {"h1": [1], "h2": [0]}
    answers = {"h1": ["a"], "h2": ["b"]}
    for scores in ({"rubric": shares, "rule": bits}, {"rule": bits, "rubric": shares}):
        run = make_run(tmp_path, answers=answers, scores={(judge, "asr"): given for judge, given in scores.items()})
        assert agreements(run)[0].kappa.value == 1


def test_groups_by_hand(run: AuditRun) -> None:
    groups = verdict_groups(run.score_table(), run.judges)
    harmful, nobody, yes, no, neither = 16, 0, 1, 2, 3
    assert groups.tolist() == [
        [harmful + 4 * yes + no, harmful + 4 * neither + no],  # the rubric's 0.49 against the rule's 1
        [harmful + 4 * no + yes, harmful + 4 * no + yes],
        [harmful + 4 * neither + no, harmful + 4 * no + yes],  # unscored by one
        [nobody + no, nobody + no],  # its asr counts nowhere
    ]


def test_a_missing_answer_is_in_no_group(tmp_path: Path) -> None:
    run = make_run(tmp_path, answers={"h1": ["a", "-"], "h2": ["b", "c"]})
    assert verdict_groups(run.score_table(), run.judges)[0].tolist() == [16, NO_ANSWER]


def test_labels_drawn_unequally_give_the_kappa_of_the_run(tmp_path: Path) -> None:
    """The judges disagree on 40 of 400 answers, the person labels 40 of each sort and sides with the strict judge."""
    rng = np.random.default_rng(3)
    ids = [f"s{number:03d}" for number in range(400)]
    strict: dict[str, list[float | None]] = {i: [float(place < 80)] for place, i in enumerate(ids)}
    lax: dict[str, list[float | None]] = {i: [float(place < 120)] for place, i in enumerate(ids)}
    run = make_run(tmp_path, answers={i: ["a"] for i in ids}, scores={("strict", "asr"): strict, ("lax", "asr"): lax})
    chosen = [i for start, end in ((0, 80), (80, 120), (120, 400)) for i in rng.choice(ids[start:end], 40, False)]
    labels = [_says(str(i), 1, "asr", strict[str(i)][0]) for i in chosen]
    pairs = {(pair.first, pair.second): pair for pair in agreements(run, labels)}
    expected = pairs["strict", "lax"].kappa.value
    found = pairs["human", "lax"].kappa
    assert found.value == pytest.approx(expected)
    assert found.n == 120
    assert found.counts == ((40, 40), (0, 40))  # without weights it would be 0.4
    assert expected == pytest.approx(0.737, abs=0.001)
    assert pairs["human", "strict"].kappa.value == 1


def test_what_no_label_stands_for_is_said(run: AuditRun) -> None:
    labels = [*[_says("h2", layer, "asr", 0) for layer in (1, 2)], _says("h1", 1, "asr", 1)]
    (pair,) = [p for p in agreements(run, labels) if (p.first, p.second, p.measure) == ("human", "rule", "asr")]
    assert pair.covered == pytest.approx(4 / 6)  # the two that judges disagree on have no label


def test_as_json(run: AuditRun) -> None:
    attack = agreements(run)[0].to_dict()
    assert attack["table"] == [[3, 0], [1, 1]]
    assert (attack["first"], attack["undefined"], attack["observed"]) == ("rule", None, 0.8)
    assert attack["low"] <= attack["kappa"] <= attack["high"]


def test_a_judge_with_one_verdict_for_all_has_no_kappa(tmp_path: Path) -> None:
    scores: dict[tuple[str, str], dict[str, list[float | None]]] = {
        ("always", "asr"): {"h1": [1], "h2": [1]},
        ("rule", "asr"): {"h1": [1], "h2": [0]},
    }
    (pair,) = agreements(make_run(tmp_path, answers={"h1": ["a"], "h2": ["b"]}, scores=scores))
    assert pair.kappa.value is None
    assert pair.to_dict()["undefined"] == "one rater gave the same label every time"
    assert pair.to_dict()["table"] == [[0, 0], [1, 1]]
