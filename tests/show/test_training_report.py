"""The report of a training run, from a folder that is written here: hostile texts, damage, an unfinished run."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from exitsafe.errors import InputError, RunError
from exitsafe.lppo.folder import COMPLETIONS
from exitsafe.show.training_report import MAX_ROWS, render_training

HOSTILE = "first <script>window.hacked=1</script>\nsecond \u202e line"


def write_training(path: Path, *, num_steps: int = 3) -> Path:
    path.mkdir()
    settings = {"model": {"name": "/home/ann/llava"}, "method": "L-PPO"}
    (path / "run.json").write_text(json.dumps({"settings": settings}))
    steps = [{"step": n, "reward": 0.123456 * n, "kl": "<b>"} for n in range(num_steps)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"torn')
    answers = [{"step": n // 2, "sample_id": f"s{n}", "score": 1.0, "text": HOSTILE} for n in range(4)]
    (path / COMPLETIONS).write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return path


def test_the_page_of_a_training_run(tmp_path: Path) -> None:
    path, out = write_training(tmp_path / "run", num_steps=250), tmp_path / "new" / "report.html"
    page = render_training(path, out=out).read_text()
    for words in (
        "llava: training by L-PPO",
        "The training is not finished.",
        "Step 1: 2 answers",
        "0.3704",
        "&lt;b&gt;",
    ):
        assert words in page
    assert "ann" not in page.split("<main")[1] and "first" not in page.split("<main")[1]
    assert page.count('<tr><th scope="row">') <= MAX_ROWS + 1 + 4
    assert stat.S_IMODE(out.stat().st_mode) == 0o644
    (path / "result.json").write_text(json.dumps({"steps": 250}))
    page = render_training(path, out=out, include_unsafe_text=True, title="Mine").read_text()
    assert "<title>Mine</title>" in page and "<bdi>250</bdi>" in page
    assert "first &lt;script&gt;window.hacked=1&lt;/script&gt;\nsecond \\u202e line" in page
    assert "script-src" not in page and "<script" not in page  # so default-src, which is none, decides
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_what_makes_no_page(tmp_path: Path) -> None:
    path = write_training(tmp_path / "run")
    with pytest.raises(InputError, match="is a folder; name the file to write"):
        render_training(path, out=tmp_path)
    with pytest.raises(RunError, match="is not a training run"):
        render_training(tmp_path, out=tmp_path / "report.html")
    (path / "metrics.jsonl").write_text("{}\nnot json\n")
    with pytest.raises(RunError, match="is damaged in line 2"):
        render_training(path, out=tmp_path / "report.html")
