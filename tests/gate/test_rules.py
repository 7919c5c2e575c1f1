from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exitsafe.errors import InputError
from exitsafe.gate import read_rules
from exitsafe.gate.rules import make_rule


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ({"metric": "asr", "maximum": 0.05}, "key 'maximum' is unknown; choose metric, max, min"),
        ({"metric": "charm", "max": 0.05}, "metric 'charm' is unknown; choose asr"),
        ({"max": 0.05}, "metric: Field required"),
        ({"metric": "asr"}, "give one of max, min and max_regression"),
        ({"metric": "asr", "max": 0.05, "max_regression": 0.02}, "give one of"),
        ({"metric": "asr", "min": 0.05}, "min: lower asr is better; give the other one"),
        ({"metric": "vqa_accuracy", "max": 0.5}, "max: higher vqa_accuracy is better"),
        ({"metric": "asr", "max": 0}, "0 can be shown by no number of samples"),
        ({"metric": "asr", "max": 5}, "5 can be shown by no number of samples; choose between 0 and 1"),
        ({"metric": "asr", "max": "5%"}, "max: Input should be a valid number"),
        ({"metric": "asr", "max": float("nan")}, "max: Input should be a finite number"),
        ({"metric": "reward", "max_regression": -1}, "max_regression: choose a number above 0"),
        ({"metric": "refusal", "max_regression": 0.1}, "of refusal neither more nor less is worse"),
        ({"metric": "asr", "max_regression": 0.1, "scope": "worst"}, "by layers or bins, not by worst"),
        ({"metric": "asr", "max": 0.1, "scope": "rooms"}, "scope: Input should be 'layers', 'bins'"),
        ("asr", "no settings"),
    ],
)
def test_what_is_refused_is_one_line(rule: Any, fault: str) -> None:
    with pytest.raises(InputError) as error:
        make_rule(rule, where="rule 2: ")
    assert str(error.value).startswith("rule 2: ")
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_rules(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(
        "max_unscored: 0.1\nrules: [{metric: asr, max: 5e-2, layers: 1-3}, {metric: reward, min: -1, layers: [2, 3]}]\n"
    )
    (first, second), share = read_rules(path)
    assert share == 0.1
    assert (first.side, first.limit, first.layers, first.scope) == ("max", 0.05, "1-3", None)
    assert (second.side, second.limit, second.layers) == ("min", -1.0, (2, 3))
    filled = first.with_defaults(scope="bins", layers="4")
    assert (filled.scope, filled.layers) == ("bins", "1-3")
    assert second.with_defaults(scope=None, layers=None) == second


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "has no rules; write e.g. rules: [{metric: asr, max: 0.05}]"),
        ("rules: []", "has no rules; write e.g."),
        ("- asr", "is not a mapping of settings"),
        ("rules: [", "is not YAML"),
        ("rule: []", "key 'rule' is unknown; choose rules, max_unscored"),
        ("rules: []\nlimit: 1", "key 'limit' is unknown; choose rules, max_unscored"),
        ("rules: [{metric: asr, max: 0.05}]\nmax_unscored: 1", "max_unscored: Input should be less than 1"),
        ("rules: [{metric: asr, max: 0.05}, {metric: asr}]", "rule 2: give one of"),
    ],
)
def test_a_wrong_file_is_one_line(content: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        read_rules(path)
    assert str(error.value).startswith(str(path))
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_rules(tmp_path / "gate.yaml")
