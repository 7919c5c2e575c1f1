"""The page of a training run: its folder in, one self-contained HTML file out. Numbers by step, and the answers kept.

Everything from the folder is read as data: what is not a number is not shown as one, and every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from exitsafe import __version__
from exitsafe.errors import InputError, RunError
from exitsafe.lppo.folder import COMPLETIONS
from exitsafe.report.names import shown, without_folder
from exitsafe.report.page import check_can_render, page_environment, page_style, security_policy
from exitsafe.runs.files import PRIVATE, PUBLIC, write_whole, writing
from exitsafe.untrusted import UnreadableError, parse_json, read_json

MAX_ROWS = 100
"""Steps in the table; longer runs show this many, evenly spaced, and the last."""

_METRICS = (
    "exit_layer", "step", "reward", "final_score", "final_score_std", "share_clipped", "share_penalised", "asr", "kl",
    "kl_coef", "num_cut", "num_unscored", "skipped_minibatches", "loss",
)  # fmt: skip
_ANSWER = ("sample_id", "kind", "exit_layer", "num_tokens", "finish_reason", "score", "final_score")


def is_training_run(path: Path) -> bool:
    """Whether a folder is that of a training run, finished or not."""
    return (path / "run.json").is_file() and (path / "metrics.jsonl").is_file()


def render_training(
    path: str | Path, *, out: str | Path, include_unsafe_text: bool = False, title: str | None = None
) -> Path:
    """Write one self-contained HTML page about a training run.

    Args:
        path: The training's folder, finished or not.
        out: The file to write; replaced if it exists.
        include_unsafe_text: Put the kept answers into the page, which then only its owner can read.
        title: The page's title; names the model if left out.

    Returns:
        The page's path.

    Raises:
        RunError: If the folder is not that of a training, one of its files is damaged, or the page cannot be written.
        InputError: If `out` is a folder.
        ExitsafeError: If the extra `report` is not installed.
    """
    path, out = Path(path), Path(out)
    check_can_render()
    if not is_training_run(path):
        raise RunError(f"{path} is not a training run (no run.json with metrics.jsonl)")
    if out.is_dir():
        raise InputError(f"{out} is a folder; name the file to write, e.g. {out / 'training.html'}")
    settings = _object(path / "run.json").get("settings")
    settings = settings if isinstance(settings, dict) else {}
    result = _object(path / "result.json") if (path / "result.json").is_file() else None
    metrics = _spaced(list(_lines(path / "metrics.jsonl")))
    answers = list(_lines(path / COMPLETIONS)) if (path / COMPLETIONS).is_file() else []
    model = settings.get("model")
    name = without_folder(str(model.get("name", ""))) if isinstance(model, dict) else path.name
    heading = title or f"{name}: training by {settings.get('method', 'an unknown method')}"
    page = (
        page_environment()
        .get_template("training.html.j2")
        .render(
            title=shown(heading, max_length=200),
            policy=security_policy(styles=[page_style()], scripts=[]),
            style=_markup(page_style()),
            version=__version__,
            include_unsafe_text=include_unsafe_text,
            result=None if result is None else [(shown(str(name)), _cell(value)) for name, value in result.items()],
            metrics=_table(metrics, [name for name in _METRICS if any(name in line for line in metrics)]),
            steps=[
                (_cell(step), _table(rows, _ANSWER), [_text(row) for row in rows] if include_unsafe_text else None)
                for step, rows in (
                    (step, list(rows)) for step, rows in groupby(answers, key=lambda row: row.get("step"))
                )
            ],
        )
    )
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page.encode(), mode=PRIVATE if include_unsafe_text else PUBLIC)
    return out


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UnreadableError as error:
        raise RunError(f"{path} cannot be read ({error}); restore it from a backup") from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; an unterminated last line is still being written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error})") from error
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            yield parse_json(line)
        except UnreadableError as error:
            raise RunError(f"{path} is damaged in line {number} ({error}); remove that line") from error


def _spaced(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MAX_ROWS` of them, evenly spaced, and the last."""
    every = math.ceil(len(lines) / MAX_ROWS) or 1
    return [line for number, line in enumerate(lines) if number % every == 0 or number + 1 == len(lines)]


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    return {"columns": list(names), "rows": [[_cell(row.get(name)) for name in names] for row in rows]}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return shown(str(value), max_length=200)


def _text(row: Mapping[str, Any]) -> list[str]:
    """An answer, line by line."""
    return [shown(line, max_length=len(line)) for line in str(row.get("text", "")).splitlines()]


def _markup(style: str) -> Any:
    from markupsafe import Markup

    return Markup(style)  # noqa: S704 - the package's own style sheet
