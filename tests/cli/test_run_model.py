from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from exitsafe.cli.run_model import load_model_of, loading_of, model_of, read_samples_of
from exitsafe.errors import RunError
from exitsafe.results.run import AuditRun, load_run
from tests.finished_runs import edit_head


@pytest.fixture
def copied(audited: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(audited, tmp_path / "run"))


def changed(path: Path, **origin: Any) -> AuditRun:
    edit_head(path, lambda head: head["origin"].update(origin))
    return load_run(path)


def test_the_very_model_and_samples(audited: Path) -> None:
    run = load_run(audited)
    samples = read_samples_of(run)
    assert [sample.id for sample in samples] == [sample.id for sample in run.samples()]
    vlm = load_model_of(run, loading_of(run, device="cpu"))
    assert vlm.checkpoint_hash == run.settings["model"]["checkpoint"]
    assert loading_of(run).device == run.origin["loading"]["device"]
    assert loading_of(run).revision is None  # a folder has none


def test_a_model_of_the_hub_is_that_commit(copied: Path) -> None:
    run = changed(copied, model="somebody/a-model")
    assert loading_of(run).revision == run.settings["model"]["checkpoint"]


def test_other_weights_are_refused(copied: Path, tiny_llava: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llava, tmp_path / "other"))
    (other / "more.txt").write_text("a file that decides")
    run = changed(copied, model=str(other))
    with pytest.raises(RunError, match=r"this is not the model of .*: model\.checkpoint was .*; restore it"):
        load_model_of(run, loading_of(run))


def test_a_run_that_names_no_model(copied: Path) -> None:
    with pytest.raises(RunError, match="was not made by the command line"):
        model_of(changed(copied, model=None))
