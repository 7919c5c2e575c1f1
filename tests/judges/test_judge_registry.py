"""Judges by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from exitsafe.errors import InputError
from exitsafe.judges import JUDGE_NAMES, MEASURES, choose_judges, load_judges
from exitsafe.judges.asking import ask_judge
from exitsafe.records import Response, Sample

PAGE = Path(__file__).parents[2] / "docs" / "judges.md"


def test_names_load_in_their_order() -> None:
    assert [judge.name for judge in load_judges(["coherence", "world-rule"])] == ["coherence", "world-rule"]


ASKED = [name.replace(":MODEL", ":made/up").replace("[:made/up]", "") for name in JUDGE_NAMES]
ASKED += [name.replace("[:MODEL]", ":made/up") for name in JUDGE_NAMES if "[" in name]


@pytest.mark.parametrize("asked", ASKED)
def test_every_judge_bears_the_name_it_was_asked_by_and_known_measures(asked: str) -> None:
    (judge,) = load_judges([asked])
    assert judge.name == asked
    assert set(judge.measures) <= set(MEASURES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gut-feeling", r"judge 'gut-feeling' is unknown; choose world-rule, refusal-prefix, qwen3guard\[:MODEL\]"),
        ("harmbnech:x", r"judge 'harmbnech:x' is unknown \(did you mean harmbench\?\); choose world-rule"),
        ("perspective", "judge 'perspective' is unknown; choose world-rule"),
        ("reward", "judge reward needs a model: reward:MODEL"),
        ("rubric:", "judge rubric needs a model: rubric:MODEL"),
        ("coherence:strict", "judge coherence takes no model; write coherence"),
    ],
)
def test_names_that_are_no_judges(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_judges([name])


def test_without_the_default_guard_the_proxy_speaks_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    samples = [Sample(id="a", prompt="how", kind="harmful", source="made up")]
    words = r"default judge, qwen3guard, is not available .*proxy refusal-prefix.*--judge qwen3guard"
    with pytest.warns(UserWarning, match=words):
        judges = choose_judges(None, samples)
    assert [judge.name for judge in judges] == ["refusal-prefix", "vqa", "coherence"]


def test_the_organism_brings_its_own_rule() -> None:
    samples = [Sample(id="a", prompt="how", kind="harmful", source="organism-harmful")]
    assert [judge.name for judge in choose_judges(None, samples)] == ["world-rule", "vqa", "coherence"]


def test_the_page_names_every_judge_with_its_measures() -> None:
    rows = dict(re.findall(r"^\| (`.*?) \| (`.*?) \|", PAGE.read_text(), re.MULTILINE))
    listed = {name: cell for names, cell in rows.items() for name in re.findall(r"`([^`]+)`", names)}
    assert set(listed) == set(JUDGE_NAMES)
    for asked, name in zip(ASKED, JUDGE_NAMES, strict=False):
        (judge,) = load_judges([asked])
        assert all(f"`{measure}`" in listed[name] for measure in judge.measures), name


def test_the_judge_on_the_page_judges() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.partition("\nexitsafe.audit")[0], names)
    samples = [Sample(id="a", prompt="x", kind="harmful"), Sample(id="b", prompt="x", kind="benign")]
    responses = [
        Response(sample_id=id_, exit_layer=1, text="yes", num_tokens=1, finish_reason="stop", seconds=0.0)
        for id_ in "ab"
    ]
    (verdict,) = ask_judge(names["SaysYes"](), samples, responses)
    assert (verdict.sample_id, verdict.measure, verdict.score) == ("a", "asr", 1.0)
