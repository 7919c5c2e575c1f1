"""The audit on a made-up model that answers by rule, and on a tiny real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

import exitsafe
from exitsafe.engine.prompts import Prompt
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ExitLayerError, InputError, RunError
from exitsafe.exits.layers import resolve_layers
from exitsafe.judges import Judge, choose_judges, load_judges, registry
from exitsafe.records import KINDS, Response, Sample, Verdict
from exitsafe.store import directory, shards
from exitsafe.store.files import write_whole
from exitsafe.store.fingerprint import request_digest
from exitsafe.store.shards import ShardWriter
from tests.fake_vlm import NUM_ROWS, PHRASES, SAMPLES, FakeVLM, audit_fake, content
from tests.forks import fork, killed, killed_at_sync
from tests.tiny_models import noise_image, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("expected") / "run"
    audit_fake(out)
    return content(out)


def test_videos_and_recordings_are_part_of_what_makes_a_run(tmp_path: Path) -> None:
    def audit(content: bytes) -> dict[str, Any]:
        sample = replace(SAMPLES[0], videos=(content,), audios=(b"recording",))
        return dict(audit_fake(tmp_path / "run", samples=[sample]).settings)

    first = audit(b"video")
    assert {"av", "soundfile", "scipy", "pillow"} <= first["versions"].keys()
    assert audit(b"video") == first
    with pytest.raises(RunError, match=r"data\.hash was .*, is now"):
        audit(b"other")


@pytest.mark.parametrize(("modality", "missing"), [("audio", "audio"), ("image", None)])
def test_samples_that_do_not_pass_the_encoder_are_warned_of(tmp_path: Path, modality: str, missing: str | None) -> None:
    vlm = FakeVLM()
    vlm.encoder = replace(vlm.encoder, modality=modality)
    samples = [replace(SAMPLES[0], images=(noise_image(0),))]
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        audit_fake(tmp_path, vlm, samples=samples)
    said = [str(each.message) for each in raised if "at every exit" in str(each.message)]
    assert bool(said) == (missing is not None)
    assert not said or said[0].startswith(f"1 of 1 samples have no {missing}, so")


def test_numbers_by_hand(tmp_path: Path) -> None:
    vlm = FakeVLM()
    run = audit_fake(tmp_path, vlm)
    texts = {(r.sample_id, r.exit_layer): r.text for r in run.responses()}
    assert [(r.sample_id, r.exit_layer) for r in run.responses()] == [
        (s.id, layer) for s in SAMPLES for layer in range(1, 7)
    ]
    for layer in run.summary["layers"]:
        exit_layer, metrics = layer["exit_layer"], layer["metrics"]

        def share(right: Callable[[str], bool], *kinds: str, at: int = exit_layer) -> float:
            chosen = [texts[s.id, at] for s in SAMPLES if s.kind in (kinds or KINDS)]
            return sum(map(right, chosen)) / len(chosen)

        assert metrics["asr"]["value"] == pytest.approx(share(lambda text: text != PHRASES[0], "harmful"))
        assert metrics["refusal"]["value"] == pytest.approx(share(lambda text: text == PHRASES[0]))
        assert metrics["over_refusal"]["value"] == pytest.approx(share(lambda t: t == PHRASES[0], "borderline"))
        assert metrics["vqa_accuracy"]["value"] == pytest.approx(share(lambda text: text == "red", "vqa"))
        assert metrics["coherence"]["value"] == pytest.approx(share(lambda text: text in PHRASES[:3]))
        assert (metrics["asr"]["n"], metrics["refusal"]["n"]) == (3, 12)
    assert list(run.summary["judges"]) == ["refusal-prefix", "vqa", "coherence"]
    assert (vlm.num_encoded, vlm.num_completed) == (12, NUM_ROWS)


@pytest.mark.parametrize("batch_size", [1, 7, 100, None])
def test_batch_size_and_order_of_finishing_change_nothing(
    tmp_path: Path, expected: dict[str, Any], batch_size: int
) -> None:
    audit_fake(tmp_path, batch_size=batch_size)
    assert content(tmp_path) == expected


def test_progress_counts_rows_and_notes_the_running_asr(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    run = audit_fake(tmp_path, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert (done[0], done[-1]) == (0, NUM_ROWS)
    assert done == sorted(done)
    asr = [v.score or 0.0 for v in run.verdicts() if v.measure == "asr"]
    assert calls[0] == (0, NUM_ROWS, "")
    rates = " ".join(f"{layer}:{sum(asr[layer - 1 :: 6]) / 3:.0%}" for layer in range(1, 7))
    assert calls[-1][1:] == (NUM_ROWS, f"requests not refused (proxy) by exit {rates}")


def test_an_interrupt_loses_nothing_that_was_finished(tmp_path: Path, expected: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        audit_fake(tmp_path, FakeVLM(fails_after=23))
    vlm = FakeVLM()
    audit_fake(tmp_path, vlm)
    assert vlm.num_completed == NUM_ROWS - 23
    assert content(tmp_path) == expected


def _killed(out: Path, sabotage: Callable[[], None]) -> bool:
    """Whether an audit in a child process was killed by what the sabotage set up."""

    def work() -> None:
        sabotage()
        audit_fake(out)

    return killed(fork(work))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_write_it_ends_with_the_same_bytes(tmp_path: Path, expected: dict[str, Any]) -> None:
    number = 0
    while killed_at_sync(number, partial(audit_fake, tmp_path / str(number))):
        audit_fake(tmp_path / str(number))
        assert content(tmp_path / str(number)) == expected, f"killed at write {number}"
        number += 1
    assert number > 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", [0, 1, 5, 12])
def test_killed_in_the_middle_of_a_line_again_and_again(tmp_path: Path, expected: dict[str, Any], number: int) -> None:
    def tear() -> None:
        real, left = ShardWriter._append, number

        def append(self: ShardWriter, records: list[dict[str, Any]]) -> None:
            nonlocal left
            if left == 0:
                lines = b"".join(shards._line_of(record, self.run_key) for record in records)
                os.write(self._file.fileno(), lines[: len(lines) - 9])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            real(self, records)

        ShardWriter._append = append  # type: ignore[method-assign]

    attempts = 0
    while _killed(tmp_path, tear) and attempts < 4:
        attempts += 1
    assert attempts > 0
    audit_fake(tmp_path)
    assert content(tmp_path) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_the_shards_are_dropped_it_is_finished(tmp_path: Path, expected: dict[str, Any]) -> None:
    def kill_at_drop() -> None:
        def rmtree(folder: Path) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        exitsafe.store.directory.shutil.rmtree = rmtree  # type: ignore[attr-defined]

    assert _killed(tmp_path, kill_at_drop)
    vlm = FakeVLM()
    audit_fake(tmp_path, vlm)
    assert vlm.num_completed == 0
    assert content(tmp_path) == expected


def test_a_finished_audit_started_again_is_done_at_once(tmp_path: Path) -> None:
    audit_fake(tmp_path)
    before = (tmp_path / "summary.json").read_bytes()
    vlm = FakeVLM()
    run = audit_fake(tmp_path, vlm)
    assert (vlm.num_encoded, (tmp_path / "summary.json").read_bytes()) == (0, before)
    assert run.path == tmp_path


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"max_new_tokens": 8}, "decoding.max_new_tokens was 256, is now 8"),
        ({"temperature": 1}, "decoding.temperature was 0.0, is now 1.0"),
        ({"seed": 1}, "decoding.seed was 0, is now 1"),
        ({"exit_layers": "1,3"}, r"exit_layers was \[1,2,3,4,5,6\], is now \[1,3\]"),
        ({"samples": SAMPLES[:-1]}, "data.samples was 12, is now 11"),
        ({"samples": SAMPLES[::-1]}, "data.hash was"),
        ({"judges": load_judges(["world-rule"])}, "judge refusal-prefix was used, is now left out"),
        ({"batch_size": 5}, "batch_size was 4, is now 5"),
        ({"batch_size": None}, 'batch_size was 4, is now "auto"'),
        ({"vlm": FakeVLM(attention="eager")}, 'model.attention.model was "sdpa", is now "eager"'),
        ({"vlm": FakeVLM(device=torch.device("meta"))}, 'model.device was "cpu", is now "meta"'),
        ({"vlm": FakeVLM(checkpoint_hash="bad")}, 'model.checkpoint was "c0ffee", is now "bad"'),
        ({"vlm": FakeVLM(adapter_hash="a1")}, 'model.adapter was null, is now "a1"'),
        ({"vlm": FakeVLM(dtype=torch.bfloat16)}, 'model.dtype was "float32", is now "bfloat16"'),
        (
            {"vlm": FakeVLM(config={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)})},
            "model.quantization.load_in_8bit was absent, is now true",
        ),
    ],
)
def test_a_changed_setting_is_refused(tmp_path: Path, options: dict[str, Any], difference: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        audit_fake(tmp_path, FakeVLM(fails_after=5))
    with pytest.raises(RunError, match=difference):
        audit_fake(tmp_path, **options)


class Moody:
    """A judge that scores some, cannot score some, and may break down."""

    name = "moody"
    measures = ("asr",)

    def __init__(self, *, breaks: bool = False) -> None:
        self.breaks = breaks

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        if self.breaks:
            raise ValueError("no memory left")
        return [
            Verdict(
                sample_id=response.sample_id,
                exit_layer=response.exit_layer,
                judge=self.name,
                measure="asr",
                score={1: None, 2: float("nan")}.get(response.exit_layer, 1.0),
                unscored="no answer" if response.exit_layer == 1 else None,
            )
            for sample, response in zip(samples, responses, strict=True)
            if sample.kind == "harmful"
        ]


def test_what_cannot_be_scored_is_counted_and_never_dropped(tmp_path: Path) -> None:
    run = audit_fake(tmp_path, judges=[Moody()])
    found = [layer["metrics"]["asr"] for layer in run.summary["layers"]]
    for metric in found[:2]:
        assert metric == {"value": None, "low": None, "high": None, "n": 0, "unscored": 3}
    assert [(metric["value"], metric["n"], metric["unscored"]) for metric in found[2:]] == [(1.0, 3, 0)] * 4
    early = run.summary["bins"]["early"]["metrics"]["asr"]
    assert (early["value"], early["n"], early["unscored"]) == (None, 0, 6)
    average = run.summary["bins"]["average"]["metrics"]["asr"]
    assert (average["value"], average["n"], average["unscored"]) == (1.0, 12, 6)
    reasons = {v.unscored for v in run.verdicts() if v.judge == "moody" and v.score is None}
    assert reasons == {"no answer", "the judge returned nan, which is not a number"}


def test_a_judge_that_fails_costs_no_answer(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"judge moody failed \(ValueError\); the answers are saved"):
        audit_fake(tmp_path / "run", judges=[Moody(breaks=True)], batch_size=100)
    vlm = FakeVLM()
    audit_fake(tmp_path / "run", vlm, judges=[Moody()], batch_size=100)
    audit_fake(tmp_path / "whole", judges=[Moody()])
    assert vlm.num_completed < NUM_ROWS
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": []}, "no samples to audit"),
        ({"samples": SAMPLES[:1] * 2}, "sample id 's0' comes twice"),
        ({"exit_layers": 7}, "exit_layer=7, but this encoder has 6 blocks: choose 1 to 6"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"skip_global": True}, "llava has no global blocks"),
        ({"judges": [Moody(), Moody()]}, "judge moody is given 2 times"),
    ],
)
def test_a_senseless_setting_is_refused_before_the_folder_is_made(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        audit_fake(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_features_of_a_chunk_stay_within_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counting(FakeVLM):
        def prompt_features(self, prompts: Sequence[Prompt], *args: Any, **options: Any) -> list[dict[int, Any]]:
            sizes.append(len(prompts))
            return super().prompt_features(prompts, *args, **options)

    audit_fake(tmp_path / "free", Counting())
    assert sizes == [1, 10, 1]  # one to measure, then 16 batches of 4 rows are 10 samples x 6 layers
    sizes.clear()
    monkeypatch.setattr("exitsafe.engine.answering.FEATURE_BYTES", 2 * 6 * 16 + 5)  # 16 bytes per layer
    audit_fake(tmp_path / "tight", Counting())
    assert sizes == [1, 2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("spec", "expected_layers"),
    [
        ("all", (1, 2, 3, 4, 5, 6)),
        ("default", (5,)),
        (3, (3,)),
        ("3", (3,)),
        ([6, 2, 2], (2, 6)),
        (range(1, 3), (1, 2)),
        ("1-3, 6", (1, 2, 3, 6)),
        ("2 - 4,3-5,", (2, 3, 4, 5)),
    ],
)
def test_layers(spec: Any, expected_layers: tuple[int, ...]) -> None:
    assert resolve_layers(spec, num_layers=6, default_exit=5) == expected_layers


@pytest.mark.parametrize("spec", [30, 0, -1, "0-2", "30", [1, 30], "1-30"])
def test_layers_that_do_not_exist(spec: Any) -> None:
    with pytest.raises(
        ExitLayerError, match=r"exit_layer=(30|0|-1|25), but this encoder has 24 blocks: choose 1 to 24"
    ):
        resolve_layers(spec, num_layers=24, default_exit=23)


@pytest.mark.parametrize("spec", ["", ",", [], "every", "3-1", "1..4", "-2", "1.5"])
def test_layers_that_cannot_be_read(spec: Any) -> None:
    with pytest.raises(InputError, match='"1-8,16"'):
        resolve_layers(spec, num_layers=24, default_exit=23)


def test_default_judges() -> None:
    def names(judges: Sequence[Judge | str] | None, samples: Sequence[Sample]) -> list[str]:
        return [judge.name for judge in choose_judges(judges, samples)]

    organism_samples = [replace(sample, source="organism-harmful") for sample in SAMPLES]
    assert names(None, SAMPLES) == ["refusal-prefix", "vqa", "coherence"]
    assert names(None, organism_samples) == ["world-rule", "vqa", "coherence"]
    assert names(["coherence", *load_judges(["refusal-prefix"])], SAMPLES) == ["coherence", "refusal-prefix", "vqa"]


def test_a_tiny_real_model_gives_what_generate_gives_and_resumes(tmp_path: Path) -> None:
    vlm = VLM(tiny_model("llava"), tiny_processor("llava"), name="tiny")
    samples = [
        replace(sample, prompt="what colour is the left shape", images=(noise_image(number, (28, 30)),) * (number % 3))
        for number, sample in enumerate(SAMPLES[:4])
    ]
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3}

    def stop(done: int, total: int, note: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exitsafe.audit(vlm, samples, out=tmp_path / "torn", batch_size=3, progress=stop, **options)
    exitsafe.audit(vlm, samples, out=tmp_path / "torn", batch_size=3, **options)
    run = exitsafe.audit(vlm, samples, out=tmp_path / "whole", exit_layers="all", **options)
    assert content(tmp_path / "torn") == content(tmp_path / "whole")
    for layer in run.exit_layers:
        generated = vlm.generate(samples, layer, **options)
        assert [r.text for r in run.responses() if r.exit_layer == layer] == [r.text for r in generated]


class _Killed(BaseException):
    """Nothing catches it."""


class _Dies:
    """Writes files until it is killed in front of, or half-way through, write number `last`."""

    def __init__(self, last: int) -> None:
        self.left = last
        self.num_written = 0

    def __call__(self, path: Path, content: bytes, **options: Any) -> None:
        if self.left == 0:
            path.with_name(f".{path.name}.part").write_bytes(content[:10])
            raise _Killed
        self.left -= 1
        self.num_written += 1
        write_whole(path, content, **options)


def test_killed_between_any_two_writes_a_run_is_unfinished_or_whole(expected: dict[str, Any], tmp_path: Path) -> None:
    for last in range(9):
        out, dies = tmp_path / str(last), _Dies(last)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(directory, "write_whole", dies)
            try:
                audit_fake(out)
            except _Killed:
                with pytest.raises(RunError, match=r"rerun its audit with the same settings|not a run directory"):
                    exitsafe.load_run(out)
        if dies.left:
            assert last > 4
            return
        audit_fake(out)
        assert content(out) == expected
    raise AssertionError("an audit writes more files than were tried")


def test_killed_between_any_two_writes_a_further_judge_leaves_a_run_that_reads(tmp_path: Path) -> None:
    audit_fake(tmp_path / "whole", judges=["coherence"])
    add = partial(exitsafe.judge, samples=SAMPLES, judges=["refusal-prefix"])
    before = exitsafe.load_run(tmp_path / "whole").summary
    for last in range(9):
        out, dies = tmp_path / str(last), _Dies(last)
        shutil.copytree(tmp_path / "whole", out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(directory, "write_whole", dies)
            try:
                add(out)
            except _Killed:
                assert ("refusal-prefix" in exitsafe.load_run(out).summary["judges"]) == (last > 2)
                if last <= 2:
                    assert exitsafe.load_run(out).summary == before
        if dies.left:
            assert last > 4
            return
        audit_fake(out, judges=["coherence"])  # which is finished, with that judge or without
        after = add(out)
        assert list(after.summary["judges"]) == ["coherence", "vqa", "refusal-prefix"]
        assert json.loads((out / "summary.json").read_text()) == after.summary
        assert json.loads((out / "run.json").read_text()).keys() == {"format", "settings", "origin", "results"}
        assert not (out / "shards").exists()
    raise AssertionError("a further judge writes more files than were tried")


def test_a_judge_that_stands_in_for_the_default_is_recorded_and_kept_when_the_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(registry, "why_no_default_judge", lambda: "no such model here")
    with pytest.warns(UserWarning, match="qwen3guard, is not available"), pytest.raises(KeyboardInterrupt):
        audit_fake(tmp_path, FakeVLM(fails_after=20))
    monkeypatch.setattr(registry, "why_no_default_judge", lambda: None)  # by now it is there: the run keeps its judge
    run = audit_fake(tmp_path)
    assert [name for name, _ in run.judges] == ["refusal-prefix", "vqa", "coherence"]
    assert run.origin["replaced_judges"] == {"refusal-prefix": "qwen3guard"}
    assert any("qwen3guard, was not available" in line for line in run.cautions)
    named = audit_fake(tmp_path / "named", judges=["refusal-prefix"])
    assert "replaced_judges" not in named.origin
    assert not any("not available" in line for line in named.cautions)


def test_a_stand_in_is_still_known_when_the_first_start_saved_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "why_no_default_judge", lambda: "no such model here")
    with pytest.warns(UserWarning, match="qwen3guard, is not available"), pytest.raises(KeyboardInterrupt):
        audit_fake(tmp_path / "run", FakeVLM(fails_after=0))
    run = audit_fake(tmp_path / "run", batch_size=2)  # which may be what it takes to get further
    assert run.origin["replaced_judges"] == {"refusal-prefix": "qwen3guard"}
    assert any("qwen3guard, was not available" in line for line in run.cautions)
    with pytest.warns(UserWarning, match="qwen3guard, is not available"), pytest.raises(KeyboardInterrupt):
        audit_fake(tmp_path / "other", FakeVLM(fails_after=0))
    other = audit_fake(tmp_path / "other", judges=["vqa"])
    assert not any("not available" in line for line in other.cautions)


def test_samples_that_were_trained_on_are_counted_whatever_they_are_called(tmp_path: Path) -> None:
    trained = frozenset(request_digest(sample) for sample in SAMPLES[:4])
    renamed = [replace(sample, id=f"new-{sample.id}", kind="harmful", source="other") for sample in SAMPLES]
    with pytest.warns(UserWarning, match=r"10 of 12 samples were in the training data"):
        run = audit_fake(tmp_path / "seen", FakeVLM(trained_on=trained), samples=renamed, judges=["refusal-prefix"])
    assert run.settings["trained_on"] == {"samples": 10, "of": 12}
