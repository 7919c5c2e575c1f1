"""The report of a training run: its folder in, one self-contained HTML file out. Metrics by step, and the answers kept.

The folder may come from a stranger: it is read as data, and every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from exitsafe.errors import RunError
from exitsafe.lppo.folder import COMPLETIONS
from exitsafe.show.html_page import check_can_write, write_page
from exitsafe.show.names import shown, without_folder
from exitsafe.show.table import Column, Row, Table
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
        ExitsafeError: Without the extra `report`.
    """
    path, out = Path(path), Path(out)
    if not is_training_run(path):
        raise RunError(f"{path} is not a training run (no run.json with metrics.jsonl)")
    check_can_write(out)
    settings = _object(path / "run.json").get("settings")
    settings = settings if isinstance(settings, dict) else {}
    result = _object(path / "result.json") if (path / "result.json").is_file() else {}
    metrics = _spaced(list(_lines(path / "metrics.jsonl")))
    answers = _lines(path / COMPLETIONS) if (path / COMPLETIONS).is_file() else ()
    model = settings.get("model")
    name = without_folder(str(model.get("name", ""))) if isinstance(model, dict) else path.name
    facts = [{"name": shown(str(key)), "value": value} for key, value in result.items()]
    columns = (*_ANSWER, "text") if include_unsafe_text else _ANSWER
    return write_page(
        out,
        "training.html.j2",
        title=title or f"{name}: training by {settings.get('method', 'an unknown method')}",
        include_unsafe_text=include_unsafe_text,
        result=_table("Result", facts, ("name", "value"), are_numbers=False) if facts else None,
        metrics=_table("Metrics by step", metrics, [n for n in _METRICS if any(n in line for line in metrics)]),
        steps=[
            _table(f"Step {_cell(step)}: {len(own)} answers", own, columns, are_numbers=False)
            for step, rows in groupby(answers, key=lambda row: row.get("step"))
            for own in [list(rows)]
        ],
    )


def _object(path: Path) -> dict[str, object]:
    try:
        return read_json(path)
    except UnreadableError as error:
        raise RunError(f"{path} cannot be read ({error}); restore it from a backup") from error


def _lines(path: Path) -> Iterator[dict[str, object]]:
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


def _spaced(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    """At most `MAX_ROWS` of them, evenly spaced, and the last."""
    every = math.ceil(len(lines) / MAX_ROWS) or 1
    return [line for number, line in enumerate(lines) if number % every == 0 or number + 1 == len(lines)]


def _table(
    title: str, rows: Sequence[Mapping[str, object]], names: Sequence[str], *, are_numbers: bool = True
) -> Table:
    cells = (tuple(_text(row) if name == "text" else _cell(row.get(name)) for name in names) for row in rows)
    return Table(
        title=title,
        columns=tuple(Column(heading=name, is_number=are_numbers) for name in names),
        rows=tuple(Row(cells=row) for row in cells),
    )


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else shown(str(value), max_length=200)


def _text(row: Mapping[str, object]) -> str:
    """An answer; its line breaks are kept."""
    lines = str(row.get("text", "")).splitlines()
    return "\n".join(shown(line, max_length=len(line)) for line in lines)
