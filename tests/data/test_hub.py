from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from exitsafe.data import KNOWN_SUITES, load_suites, resolve_suites
from exitsafe.errors import InputError
from tests.data import small_hub
from tests.data.copies import write_copy

pytestmark = pytest.mark.filterwarnings("ignore:.*have no picture")


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What a process finds that loads from a Hub over HTTP, and its Hugging Face folder."""
    root = tmp_path_factory.mktemp("hub")
    names = ("redteam2k", "vqav2", "mm-safetybench")
    copies = {name: write_copy(name, root / name) for name in names}
    scenes = [("redteam2k", "gated"), ("redteam2k", "missing"), *((name, "open") for name in names)]
    environment = os.environ | {"HF_HOME": str(root / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN", "HF_DATASETS_OFFLINE"):
        environment.pop(name, None)
    outcome = subprocess.run(
        [sys.executable, small_hub.__file__, *(f"{name},{copies[name]},{state}" for name, state in scenes)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()], root / "home"


def test_gated_and_missing_sets_say_what_to_do(visited: tuple[list[dict[str, Any]], Path]) -> None:
    gated, missing = (scene["error"] for scene in visited[0][:2])
    page = "https://huggingface.co/datasets/JailbreakV-28K/JailBreakV-28k"
    assert gated == f"redteam2k is gated: accept its terms at {page} and log in with `hf auth login`"
    assert missing.startswith("redteam2k: JailbreakV-28K/JailBreakV-28k is not on the Hub or is private: log in")


def test_sets_come_from_the_hub_at_a_commit(visited: tuple[list[dict[str, Any]], Path]) -> None:
    pinned, streamed, newest = visited[0][2:]
    assert pinned["ids"] == ["redteam2k-0", "redteam2k-1", "redteam2k-2"]
    assert pinned["hub"]["redteam2k"]["revision"] == KNOWN_SUITES["redteam2k"].revision
    assert streamed["ids"] == ["vqav2-10", "vqav2-11", "vqav2-12"]
    assert newest["ids"][2:4] == ["mm-safetybench-EconomicHarm-12", "mm-safetybench-Financial_Advice-10"]
    assert newest["hub"]["mm-safetybench"]["revision"] == small_hub.NEWEST


def test_without_a_network_the_cache_serves_the_same_commit_and_no_other(
    visited: tuple[list[dict[str, Any]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", visited[1] / "datasets")
    kept = resolve_suites(["mm-safetybench"])
    assert kept == visited[0][4]["hub"]
    assert [sample.id for sample in load_suites(["mm-safetybench"], limit=5, hub=kept)] == visited[0][4]["ids"]
    assert len(load_suites(["redteam2k"])) == 3
    kept["mm-safetybench"]["revision"] = "cd" * 20
    with pytest.raises(InputError, match=f"is commit {small_hub.NEWEST}, not cdcd"):
        load_suites(["mm-safetybench"], hub=kept)


@pytest.mark.parametrize("name", KNOWN_SUITES)
def test_what_is_neither_here_nor_reachable_names_the_way(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name} is not on this machine and the Hub cannot be reached; ") as caught:
        load_suites([name], images=tmp_path, limit=1)
    line = str(caught.value)
    assert f"`hf download {KNOWN_SUITES[name].hub_id} --repo-type dataset" in line
    assert ('--include "*validation*"' in line) == KNOWN_SUITES[name].is_large
    assert line.endswith(f"--local-dir DIR` and give --suite {name}=DIR")
    assert "\n" not in line
    assert resolve_suites([name])[name]["revision"] == KNOWN_SUITES[name].revision


def test_a_large_set_wants_a_limit() -> None:
    with pytest.raises(InputError, match="vqav2 has 214354 samples: choose how many with --limit N"):
        load_suites(["vqav2"])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", None)
    with pytest.raises(InputError, match=r'need the library datasets: pip install "exitsafe\[hub\]"$'):
        load_suites(["xstest"])
    assert resolve_suites(["mossbench"])["mossbench"]["revision"] is None


def test_a_torn_copy_is_one_line_without_text(tmp_path: Path) -> None:
    folder = write_copy("redteam2k", tmp_path / "copy")
    path = folder / "RedTeam_2K" / "RedTeam_2K.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"redteam2k: .* cannot be loaded \(\w+\); run `hf download") as caught:
        load_suites([f"redteam2k={folder}"])
    assert "zorb" not in str(caught.value)


def test_a_copy_with_other_configurations_or_splits(tmp_path: Path) -> None:
    folder = write_copy("redteam2k", tmp_path / "one")
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("split: RedTeam_2K", "split: other"))
    with pytest.raises(InputError, match="has no RedTeam_2K/RedTeam_2K; run `hf download"):
        load_suites([f"redteam2k={folder}"])
    folder = write_copy("redteam2k", tmp_path / "two")
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("name: RedTeam_2K", "name: other"))
    with pytest.raises(InputError, match="has no RedTeam_2K/RedTeam_2K; run `hf download"):
        load_suites([f"redteam2k={folder}"])


def test_a_copy_without_its_readme(tmp_path: Path) -> None:
    folder = write_copy("xstest", tmp_path / "copy")
    (folder / "README.md").unlink()
    assert len(load_suites([f"xstest={folder}"])) == 3
    (folder / "default" / "train.parquet").write_bytes((folder / "default" / "test.parquet").read_bytes())
    assert len(load_suites([f"xstest={folder}"])) == 3
    (folder / "default" / "test.parquet").rename(folder / "default" / "validation.parquet")
    with pytest.raises(InputError, match="has no split test, only train, validation; run"):
        load_suites([f"xstest={folder}"])
