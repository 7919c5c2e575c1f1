from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

import exitsafe
from exitsafe.errors import RunError
from exitsafe.records import Response, Verdict
from exitsafe.results.run import load_run, summarise_run
from exitsafe.store.directory import RunDirectory
from exitsafe.store.tables import SampleInfo
from tests.finished_runs import run_settings

SAMPLES = [SampleInfo(id=i, kind="harmful", category="c", source="s", digest=i) for i in ("b", "a")]
SETTINGS = run_settings(SAMPLES, judges=[{"name": "j", "measures": ["asr", "refusal"]}])


def _response(sample_id: str, layer: int) -> Response:
    return Response(
        sample_id=sample_id, exit_layer=layer, text=f"{sample_id}{layer}", num_tokens=1, finish_reason="stop", seconds=1
    )


def _verdicts(sample_id: str, layer: int) -> list[Verdict]:
    return [
        Verdict(sample_id=sample_id, exit_layer=layer, judge="j", measure=measure, score=float(layer == 1))
        for measure in ("refusal", "asr")
    ]


ROWS = [("a", 2), ("b", 1), ("a", 1), ("b", 2)]


def _complete(path: Path, rows: list[tuple[str, int]] = ROWS) -> None:
    with RunDirectory(path, summarise=summarise_run, settings=SETTINGS, origin={"suites": ["s"]}) as run:
        for row in rows:
            if row not in run.saved.responses:
                run.save_responses([_response(*row)])
                run.save_judgement("j", [row], _verdicts(*row))
        run.finish(SAMPLES)


def test_a_finished_run_is_compact_ordered_and_private(tmp_path: Path) -> None:
    _complete(tmp_path / "run")
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == [
        "responses.parquet",
        "run.json",
        "summary.json",
        "verdicts.parquet",
    ]
    for name in ("responses.parquet", "verdicts.parquet"):
        assert stat.S_IMODE((tmp_path / "run" / name).stat().st_mode) == 0o600
    run = exitsafe.load_run(str(tmp_path / "run"))
    canonical = [("b", 1), ("b", 2), ("a", 1), ("a", 2)]
    assert run.responses() == [_response(*row) for row in canonical]
    assert run.verdicts() == [verdict for row in canonical for verdict in reversed(_verdicts(*row))]
    assert run.samples() == SAMPLES
    assert (run.exit_layers, run.judges) == ((1, 2), (("j", ("asr", "refusal")),))
    assert (run.settings, run.origin) == (SETTINGS, {"suites": ["s"]})
    assert run.summary["layers"][0]["metrics"]["asr"]["value"] == 1.0


def test_the_order_of_finishing_changes_no_byte(tmp_path: Path) -> None:
    _complete(tmp_path / "one")
    _complete(tmp_path / "two", ROWS[::-1])
    for name in ("summary.json", "verdicts.parquet", "responses.parquet", "run.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_unfinished_run_goes_on(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS) as run:
        run.save_responses([_response("a", 2)])
    with RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS) as run:
        assert list(run.saved.responses) == [("a", 2)]
        assert run.saved.judged == {}
        run.save_judgement("j", [("a", 2)], _verdicts("a", 2))
    _complete(tmp_path)
    assert len(load_run(tmp_path).verdicts()) == 8


def test_a_finished_run_is_left_alone_but_for_forgotten_shards(tmp_path: Path) -> None:
    _complete(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.jsonl").touch()
    with RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS) as run:
        assert run.is_finished
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_changed_setting_is_refused_with_the_difference(tmp_path: Path, is_finished: bool) -> None:
    if is_finished:
        _complete(tmp_path)
    else:
        with RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS) as run:
            run.save_responses([_response("a", 2)])
    with pytest.raises(RunError, match=r"other settings: decoding\.seed was 0, is now 1; choose a new folder"):
        RunDirectory(
            tmp_path, summarise=summarise_run, settings=SETTINGS | {"decoding": {**SETTINGS["decoding"], "seed": 1}}
        )
    RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS).__exit__(
        None, None, None
    )  # the refusal let go of the lock


def test_a_process_with_another_model_than_the_first_is_refused(tmp_path: Path) -> None:
    with (
        RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS),
        pytest.raises(RunError, match=r'model.name was "m", is now "n"'),
    ):
        RunDirectory(
            tmp_path,
            summarise=summarise_run,
            settings=SETTINGS | {"model": SETTINGS["model"] | {"name": "n"}},
            process=1,
        )


def test_settings_may_change_while_nothing_is_saved(tmp_path: Path) -> None:
    RunDirectory(
        tmp_path, summarise=summarise_run, settings=SETTINGS | {"decoding": {**SETTINGS["decoding"], "seed": 1}}
    ).__exit__(None, None, None)
    _complete(tmp_path)
    assert load_run(tmp_path).settings == SETTINGS


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    with (
        RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS),
        pytest.raises(RunError, match="is being written by another process"),
    ):
        RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match=r"is not empty and not a run \(it contains thesis\.txt\); choose a new folder"):
        RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS)
    assert os.listdir(tmp_path) == ["thesis.txt"]  # noqa: PTH208


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"is a file; choose a new folder"):
        RunDirectory(tmp_path / "file", summarise=summarise_run, settings=SETTINGS)


def test_a_read_only_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **options: object) -> None:  # root may write everywhere, so the system's word is made up
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError, match=r"cannot be written .*Permission denied"):
        RunDirectory(tmp_path / "run", summarise=summarise_run, settings=SETTINGS)


def test_loading_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="gone is not a folder; give the --out of an audit"):
        load_run(tmp_path / "gone")
    with pytest.raises(RunError, match=r"is not a run directory"):
        load_run(tmp_path)
    RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS).__exit__(None, None, None)
    with pytest.raises(RunError, match="is not finished; rerun its audit with the same settings to resume"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"run\.json cannot be read"),
        ("[]", r"run\.json cannot be read \(it is not a JSON object\)"),
        (json.dumps({"format": 99, "settings": {}}), r"run\.json is not in this version's format \(4\)"),
    ],
)
def test_a_damaged_head_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    _complete(tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=message) as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_programs_run_json_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"settings": {"method": "lppo"}}\n')
    (tmp_path / "adapter").mkdir()
    with pytest.raises(RunError, match="not in this version's format"):
        RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS)
    assert (tmp_path / "run.json").read_text() == '{"settings": {"method": "lppo"}}\n'
    assert not (tmp_path / "shards").exists()


def test_somebodys_shards_are_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.jsonl").write_text("not ours")
    with pytest.raises(RunError, match="is not empty and not a run"):
        RunDirectory(tmp_path, summarise=summarise_run, settings=SETTINGS)
    assert (tmp_path / "shards" / "00000.jsonl").read_text() == "not ours"


def test_a_mean_over_layers(tmp_path: Path) -> None:
    _complete(tmp_path / "run")
    run = exitsafe.load_run(tmp_path / "run")
    asr = [layer["metrics"]["asr"]["value"] for layer in run.summary["layers"]]
    estimate = run.mean_over_layers("asr", [1, 2])
    assert estimate.value == pytest.approx(sum(asr) / 2)
    assert estimate.low is not None and estimate.high is not None
    assert 0 <= estimate.low <= sum(asr) / 2 <= estimate.high <= 1
    with pytest.raises(RunError, match="no metric 'wit'"):
        run.mean_over_layers("wit", [1])
    with pytest.raises(RunError, match="no exit layer 9; it has 1, 2"):
        run.mean_over_layers("asr", [9])
