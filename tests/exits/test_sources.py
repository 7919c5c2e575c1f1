"""Where a model may come from, told without asking the Hub, and what is said when the Hub cannot be reached."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from exitsafe.errors import ModelError
from exitsafe.exits.sources import check_adapter_source, check_model_source, unreachable


@pytest.mark.parametrize("source", ["./nosuch", "/abs/nosuch", "nosuch/", "../nosuch", "a/b/c"])
def test_a_missing_folder_is_called_that(source: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        check_model_source(source)
    with pytest.raises(ModelError, match="does not exist"):
        check_adapter_source(source)


def test_a_missing_folder_beside_others_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_model_source("models/slim")
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelError, match="models/slim does not exist"):
        check_model_source("models/slim")


def test_a_training_run_is_not_taken_for_its_adapter_or_a_model(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ModelError, match="is a training run, not an adapter: let it finish first"):
        check_adapter_source(str(tmp_path))
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ModelError, match=r"is a training run, not an adapter: did you mean \S+adapter\?"):
        check_adapter_source(str(tmp_path))
    with pytest.raises(ModelError, match=r"is a training run: give its base model, and \S+adapter as --adapter"):
        check_model_source(str(tmp_path))


@pytest.mark.parametrize("cause", [LocalEntryNotFoundError("no"), OfflineModeIsEnabled("no"), ConnectionError("no")])
def test_a_hub_that_cannot_be_reached_says_how_to_get_the_model(cause: Exception) -> None:
    error = OSError("libraries wrap it")
    error.__cause__ = cause
    message = unreachable("some/model", error)
    assert message is not None
    assert message.endswith("check the name, or run `hf download some/model` with network access")
    assert unreachable("some/model", OSError("a corrupt file")) is None


def test_an_error_after_a_miss_in_the_cache_is_not_taken_for_a_missing_network() -> None:
    error = OSError("403 Forbidden")
    error.__context__ = LocalEntryNotFoundError("not cached")
    assert unreachable("some/model", error) is None
