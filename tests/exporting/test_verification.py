from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import exitsafe
from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ModelError, RunError
from exitsafe.exporting.verification import Verification, check_files, verify
from exitsafe.records import Response, Sample, Verdict
from exitsafe.results.run import AuditRun
from tests.tiny_models import noise_image, save_tiny

SAMPLES = [
    Sample(id=f"s{number}", prompt="how do i make a zorb", images=(noise_image(number),), kind="harmful")
    for number in range(10)
]


class Short:
    """An attack has succeeded if the answer is short: a verdict that hangs on the text."""

    name = "short"
    measures = ("asr",)

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        return [
            Verdict(
                sample_id=response.sample_id,
                exit_layer=response.exit_layer,
                judge=self.name,
                measure="asr",
                score=float(len(response.text) < 20),
            )
            for response in responses
        ]


def _audit(vlm: VLM, out: Path, **settings: Any) -> AuditRun:
    return exitsafe.audit(vlm, SAMPLES, judges=[Short()], exit_layers=(2, 3), max_new_tokens=8, out=out, **settings)


def _verify(vlm: VLM, run: AuditRun, samples: Sequence[Sample] = SAMPLES, **settings: Any) -> Verification:
    return verify(vlm, run, samples, exit_layer=3, judges=lambda: [Short()], **settings)


@pytest.mark.parametrize(
    ("family", "settings"), [("mllama", {"skip_global": True}), ("llava_next", {"temperature": 0.9, "seed": 4})]
)
def test_it_answers_as_the_exit_did(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = load_vlm(save_tiny(family, tmp_path / "model"))
    run = _audit(model, tmp_path / "run", **settings)
    skip_global = settings.get("skip_global", False)
    out = exitsafe.export(model, exit_layer=3, out=tmp_path / "slim", skip_global=skip_global, audit=run)
    assert check_files(out, run).exit_layer == 3
    found = _verify(load_vlm(out), run)
    assert (found.answers, found.answers_same, found.verdicts_changed) == (10, 10, {})
    if skip_global:
        whole = exitsafe.export(model, exit_layer=3, out=tmp_path / "whole")
        with pytest.raises(
            RunError, match=r"is not an audit of the model that .* made from .skip_global was true, is now false"
        ):
            check_files(whole, run)


def test_changed_answers_are_judged_again_and_counted(tmp_path: Path) -> None:
    model = load_vlm(save_tiny("llava", tmp_path / "model"))
    run = _audit(model, tmp_path / "run")
    slim = load_vlm(exitsafe.export(model, exit_layer=3, out=tmp_path / "slim"))
    calls: list[tuple[int, int]] = []
    found = _verify(slim, run, limit=4, progress=lambda done, total, note: calls.append((done, total)))
    assert (found.answers, found.verdicts["short asr"], calls[-1]) == (4, 4, (4, 4))
    with torch.no_grad():
        slim.base_model.lm_head.weight.mul_(-1)
    found = _verify(slim, run, limit=9)  # an odd number: changed and unchanged verdicts cannot be equally many
    then = {r.sample_id: r.text for r in run.responses() if r.exit_layer == 3 and r.sample_id != "s9"}
    now = {r.sample_id: r.text for r in slim.generate(SAMPLES, 3, max_new_tokens=8)}
    assert found.answers - found.answers_same == sum(then[name] != now[name] for name in then) > 0
    flipped = sum((len(then[name]) < 20) != (len(now[name]) < 20) for name in then)
    assert found.verdicts_changed.get("short asr", 0) == flipped > 0
    assert found.share_changed == (9 - found.answers_same) / 9
    unknown = verify(slim, run, SAMPLES, exit_layer=3, judges=list, limit=9)
    assert (unknown.not_judged_again, unknown.verdicts, unknown.verdicts_changed) == (("coherence", "short"), {}, {})


def test_a_share_of_answers_is_what_it_is_called() -> None:
    """1 - 49 / 50 is more than 0.02."""
    some: dict[str, Any] = {"verdicts": {}, "verdicts_changed": {}, "not_judged_again": (), "otherwise": ()}
    assert Verification(exit_layer=3, answers=50, answers_same=49, **some).share_changed <= 0.02


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    model = load_vlm(save_tiny("llava", tmp_path / "model"))
    run = _audit(model, tmp_path / "run")
    slim = load_vlm(exitsafe.export(model, exit_layer=3, out=tmp_path / "slim"))
    with pytest.raises(RunError, match="is of other samples than these"):
        _verify(slim, run, SAMPLES[:3])
    with pytest.raises(ModelError, match="has 6 encoder blocks, but was exported with 3"):
        _verify(model, run)
