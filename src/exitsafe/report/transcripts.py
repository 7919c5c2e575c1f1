"""The transcript browser: runs in, one section of the report page out, with its data, script and style.

Data are columns over (sample, exit layer), each compressed by itself, so that the page opens at once and unpacks what
is looked at. Without `include_unsafe_text` there is no text anywhere: only ids, categories, kinds, verdicts, scores,
lengths and salted hashes. What would make the page too large lies in a sidecar file beside it, which the reader opens
in the page by hand: the page itself may ask nobody for anything. docs/report.md describes both.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from exitsafe.report.answer_grid import AnswerGrid, RunAnswers, Verdicts, read_grid
from exitsafe.report.chart import LabelledRun
from exitsafe.report.names import judge_names
from exitsafe.report.redaction import shown_label
from exitsafe.runs.files import PRIVATE, PUBLIC, write_whole

if TYPE_CHECKING:
    from markupsafe import Markup

PAGE_LIMIT = 16 * 2**20
"""Bytes of data that the page carries; a mail still takes it. What is beyond goes to the sidecar, texts first."""
HASH_BYTES = 6
"""Half a million different answers collide once in 2,000 reports."""
_MARK = "exitsafe transcripts"
_LEVEL = 6


@dataclass(frozen=True, kw_only=True)
class Transcripts:
    """The parts of the browser.

    Args:
        html: A `<section>`.
        data: The content of `<script type="application/json" id="transcripts-data">`, safe to embed.
        script, style: The contents of one script and one style element.
        sidecar: The file written beside the report; None if everything is in the page.
    """

    html: Markup
    data: str
    script: str
    style: str
    sidecar: Path | None


def build_transcripts(runs: Sequence[LabelledRun], *, out: Path, include_unsafe_text: bool) -> Transcripts:
    """Make the transcript browser of a report, and its sidecar where one is needed.

    Args:
        runs: (label, run) pairs, in the order of the columns.
        out: The report's path; the sidecar lies beside it.
        include_unsafe_text: Show what the models answered, and what the judges said in their own words.

    Raises:
        RunError: If a run cannot be read, or the sidecar cannot be written.
    """
    grid = read_grid(runs)
    columns = dict(_columns(grid, include_unsafe_text=include_unsafe_text))
    texts = [_packed(rows) for rows in _texts(grid)] if include_unsafe_text else []
    beside = out.with_name(f"{out.stem}.transcripts.jsonl")
    sidecar = _Sidecar(secrets.token_hex(16))
    parts: dict[str, Any] = {"columns": columns, "texts": texts}
    if sum(map(len, columns.values())) + sum(map(len, texts)) > PAGE_LIMIT:
        parts["texts"] = [sidecar.add(text) for text in texts]
        if sum(map(len, columns.values())) > PAGE_LIMIT:
            parts["columns"] = {name: sidecar.add(column) for name, column in columns.items()}
    is_needed = sidecar.num_bytes > len(sidecar.head)
    _write_or_remove(beside, sidecar.content() if is_needed else None, is_private=include_unsafe_text)
    data = {
        **_index(grid, runs),
        "hasTexts": include_unsafe_text,
        "sidecar": sidecar.described(beside.name) if is_needed else None,
        **parts,
    }
    return Transcripts(
        html=_section(data, num_answers=sum(int((run.finish > 0).sum()) for run in grid.runs)),
        data=_embeddable(data),
        script=_script(),
        style=_template("transcripts.css"),
        sidecar=beside if is_needed else None,
    )


def _index(grid: AnswerGrid, runs: Sequence[LabelledRun]) -> dict[str, Any]:
    """What the filters and the table's edges show; small."""
    called = judge_names(found.judge for run in grid.runs for found in run.verdicts)
    defaults = {run.summary.get("default_exit") for _, run in runs}
    return {
        "numSamples": len(grid.samples),
        "exitLayers": grid.exit_layers,
        "defaultExit": defaults.pop() if len(defaults) == 1 else None,
        "kinds": _distinct(sample.kind for sample in grid.samples),
        "categories": _distinct(sample.category for sample in grid.samples),
        "runs": [
            {
                "label": run.label,
                "verdicts": [{"judge": called[found.judge], "measure": found.measure} for found in run.verdicts],
            }
            for run in grid.runs
        ],
    }


def _columns(grid: AnswerGrid, *, include_unsafe_text: bool) -> Iterator[tuple[str, str]]:
    """Name and packed content of each column; `transcripts.js` unpacks by the same names."""
    kinds, categories = (_distinct(getattr(s, name) for s in grid.samples) for name in ("kind", "category"))
    yield "ids", _packed([sample.id for sample in grid.samples])
    yield "kinds", _packed(np.array([kinds.index(sample.kind) for sample in grid.samples], dtype="<u1"))
    place = {category: number for number, category in enumerate(categories)}
    yield "categories", _packed(np.array([place[sample.category] for sample in grid.samples], dtype="<u4"))
    # thrown away with this function: nobody can try out which answer has which hash
    salt = secrets.token_bytes(32)
    for r, run in enumerate(grid.runs):
        yield f"finish{r}", _packed(run.finish)
        yield f"tokens{r}", _packed(run.tokens.astype("<u4"))
        yield f"chars{r}", _packed(run.chars.astype("<u4"))
        yield f"hashes{r}", _packed(_hashes(run, salt))
        for v, verdicts in enumerate(run.verdicts):
            codes, labels = _shown(verdicts, include_unsafe_text=include_unsafe_text)
            yield f"scores{r}.{v}", _packed(verdicts.scores.astype("<f4"))
            yield f"codes{r}.{v}", _packed(codes.astype("<u4"))
            yield f"labels{r}.{v}", _packed(labels)


def _shown(verdicts: Verdicts, *, include_unsafe_text: bool) -> tuple[npt.NDArray[np.uint32], list[str]]:
    """Codes and labels, without what may quote an answer."""
    if include_unsafe_text:
        return verdicts.codes, list(verdicts.labels)
    is_scored = np.isfinite(verdicts.scores)
    labels = [shown_label(label, measure=verdicts.measure) for label in verdicts.labels]
    shown = [""] + [label for label in dict.fromkeys(labels) if label]
    codes = np.array([shown.index(label) for label in labels], dtype=np.uint32)[verdicts.codes]
    return np.where(is_scored, codes, 0), shown


def _hashes(run: RunAnswers, salt: bytes) -> npt.NDArray[np.uint8]:
    """(S, L, HASH_BYTES) bytes; zero where there is no answer."""
    raw = b"".join(
        hashlib.blake2b(text.encode(), key=salt, digest_size=HASH_BYTES).digest()
        for chunk in range(0, len(run.texts), 4096)
        for text in run.texts[chunk : chunk + 4096].to_pylist()
    )
    of_rows = np.frombuffer(raw + bytes(HASH_BYTES), dtype=np.uint8).reshape(-1, HASH_BYTES)
    hashes: npt.NDArray[np.uint8] = of_rows[run.rows]  # row -1, no answer, is the zeros at the end
    return hashes


def _texts(grid: AnswerGrid) -> Iterator[list[list[str | None]]]:
    """Sample by sample: per run, per exit layer; None where there is no answer."""
    for s in range(len(grid.samples)):
        yield [[run.texts[int(row)].as_py() if row >= 0 else None for row in run.rows[s]] for run in grid.runs]


class _Sidecar:
    """A file of lines: a heading, then parts that the page finds by their place."""

    def __init__(self, report: str) -> None:
        self.head = json.dumps({_MARK: 1, "report": report}).encode() + b"\n"
        self.num_bytes = len(self.head)
        self._lines: list[bytes] = []

    def add(self, part: str) -> list[int]:
        """Append a part as a JSON string; returns where it starts and how long it is, without the quotes."""
        line = b'"' + part.encode() + b'"\n'
        self._lines.append(line)
        start = self.num_bytes + 1
        self.num_bytes += len(line)
        return [start, len(part)]

    def described(self, name: str) -> dict[str, Any]:
        """What the page knows of the file: enough to tell it from another report's."""
        return {"name": name, "bytes": self.num_bytes, "heading": self.head.decode().rstrip()}

    def content(self) -> bytes:
        return self.head + b"".join(self._lines)


def _write_or_remove(path: Path, content: bytes | None, *, is_private: bool) -> None:
    """Without content, an older report's sidecar goes: nothing may be left that no page speaks of."""
    if content is not None:
        write_whole(path, content, mode=PRIVATE if is_private else PUBLIC)
    elif path.is_file():
        with path.open("rb") as file:
            is_ours = file.read(len(_MARK) + 4).startswith(f'{{"{_MARK}'.encode())
        if is_ours:
            path.unlink()


def _packed(content: Any) -> str:
    """zlib and base64 of an array's bytes, or of JSON."""
    raw = content.tobytes() if isinstance(content, np.ndarray) else json.dumps(content).encode()
    return base64.b64encode(zlib.compress(raw, _LEVEL)).decode()


def _embeddable(data: dict[str, Any]) -> str:
    """JSON in ASCII without a character that means something to HTML."""
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _section(data: dict[str, Any], *, num_answers: int) -> Markup:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_template("transcripts.html.j2"))
    return Markup(template.render(**data, num_answers=num_answers))  # noqa: S704 - jinja escaped it


def _script() -> str:
    """One script, with a scope of its own."""
    sources = "\n".join(map(_template, ("transcripts_words.js", "transcripts_data.js", "transcripts.js")))
    return f'"use strict";\n(() => {{\n{sources}}})();\n'


@cache
def _template(name: str) -> str:
    return files("exitsafe.report").joinpath("templates", name).read_text(encoding="utf-8")


def _distinct(texts: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(texts))
