"""The transcript browser: runs in, one section of the report page out, with its data, script and style.

Answers lie on one grid of samples and exit layers. Data are columns over that grid, each compressed by itself, so that
the page opens at once and unpacks only what is needed. Without `include_unsafe_text` there is no text anywhere: only
ids, categories, kinds, verdicts, scores, lengths and salted hashes. Data beyond `PAGE_LIMIT` goes to a sidecar file,
which the reader opens by hand because the page makes no requests. See docs/report.md.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from exitsafe.errors import RunError
from exitsafe.judges.qwen3guard import CATEGORIES
from exitsafe.results.run import AuditRun
from exitsafe.show.html_page import asset, page_environment
from exitsafe.show.names import judge_names
from exitsafe.show.tables import LabelledRun
from exitsafe.store.files import PRIVATE, PUBLIC, write_whole
from exitsafe.store.tables import SampleInfo

if TYPE_CHECKING:
    from markupsafe import Markup

PAGE_LIMIT = 16 * 2**20
"""Bytes of data in the page, few enough to mail. The rest goes to the sidecar, texts first."""
HASH_BYTES = 6
"""Half a million different answers collide once in 2,000 reports."""
D = TypeVar("D", bound=np.generic)
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
    from markupsafe import Markup

    grid = read_grid(runs)
    columns = dict(_columns(grid, include_unsafe_text=include_unsafe_text))
    texts = [_packed(rows) for rows in _texts(grid)] if include_unsafe_text else []
    beside = out.with_name(f"{out.stem}.transcripts.jsonl")
    sidecar = _Sidecar(secrets.token_hex(16))
    parts: dict[str, object] = {"columns": columns, "texts": texts}
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
    template = page_environment().get_template("transcripts.html.j2")
    num_answers = sum(int((run.finish > 0).sum()) for run in grid.runs)
    return Transcripts(
        html=Markup(template.render(**data, num_answers=num_answers)),  # noqa: S704 - Jinja escaped it
        data=_embeddable(data),
        script=f'"use strict";\n(() => {{\n{asset("transcripts.js")}}})();\n',  # a scope of its own
        style=asset("transcripts.css"),
        sidecar=beside if is_needed else None,
    )


def _index(grid: AnswerGrid, runs: Sequence[LabelledRun]) -> dict[str, object]:
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
                "label": label,
                "verdicts": [
                    {"judge": called[v.judge], "measure": v.measure, "title": run.title(v.measure, v.judge)}
                    for v in answers.verdicts
                ],
            }
            for (label, run), answers in zip(runs, grid.runs, strict=True)
        ],
    }


def _columns(grid: AnswerGrid, *, include_unsafe_text: bool) -> Iterator[tuple[str, str]]:
    """Name and packed content of each column; `transcripts.js` unpacks by the same names."""
    kinds, categories = (_distinct(getattr(s, name) for s in grid.samples) for name in ("kind", "category"))
    yield "ids", _packed([sample.id for sample in grid.samples])
    yield "kinds", _packed(np.array([kinds.index(sample.kind) for sample in grid.samples], dtype="<u1"))
    place = {category: number for number, category in enumerate(categories)}
    yield "categories", _packed(np.array([place[sample.category] for sample in grid.samples], dtype="<u4"))
    # never stored: nobody can find out which answer has which hash by trying answers
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


def _hashes(run: Answers, salt: bytes) -> npt.NDArray[np.uint8]:
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

    def described(self, name: str) -> dict[str, object]:
        """What the page knows about the file, to tell it from another report's."""
        return {"name": name, "bytes": self.num_bytes, "heading": self.head.decode().rstrip()}

    def content(self) -> bytes:
        return self.head + b"".join(self._lines)


def _write_or_remove(path: Path, content: bytes | None, *, is_private: bool) -> None:
    """Without content, remove the sidecar of an older report, which no page refers to any more."""
    if content is not None:
        write_whole(path, content, mode=PRIVATE if is_private else PUBLIC)
    elif path.is_file():
        with path.open("rb") as file:
            is_ours = file.read(len(_MARK) + 4).startswith(f'{{"{_MARK}'.encode())
        if is_ours:
            path.unlink()


def _packed(content: object) -> str:
    """zlib and base64 of an array's bytes, or of JSON."""
    raw = content.tobytes() if isinstance(content, np.ndarray) else json.dumps(content).encode()
    return base64.b64encode(zlib.compress(raw, _LEVEL)).decode()


def _embeddable(data: dict[str, object]) -> str:
    """JSON in ASCII without a character that means something to HTML."""
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


# ---- the grid ----

NONE, STOP, LENGTH = 0, 1, 2
"""Codes of `Answers.finish`: no answer, and the two finish reasons."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdicts:
    """One judge's verdicts on one measure.

    Args:
        judge, measure: The judge, and what it judged.
        scores: (S, L); NaN where nothing was asked, infinity where the judge gave a reason instead of a score.
        codes: (S, L); the label's place in `labels`.
        labels: The judge's distinct labels, or its reasons where `scores` is infinite; the first is "".
    """

    judge: str
    measure: str
    scores: npt.NDArray[np.float32]
    codes: npt.NDArray[np.uint32]
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """One run's answers.

    Args:
        finish: (S, L); `NONE`, `STOP` or `LENGTH`.
        tokens, chars: (S, L); lengths; 0 where there is no answer.
        rows: (S, L); the answer's place in `texts`; -1 where there is none.
        texts: All answers, an Arrow array.
        verdicts: In the order of the run's judges.
    """

    finish: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.uint32]
    chars: npt.NDArray[np.uint32]
    rows: npt.NDArray[np.int64]
    texts: pa.StringArray
    verdicts: tuple[Verdicts, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerGrid:
    """The answers of all runs; rows are the samples of any run, columns the exit layers of any run.

    A sample's id and digest name it: the same id that asks something else in another run is another row.
    """

    samples: tuple[SampleInfo, ...]
    exit_layers: tuple[int, ...]
    runs: tuple[Answers, ...]


def read_grid(runs: Sequence[LabelledRun]) -> AnswerGrid:
    """Lay the answers of the runs out on one grid, whole columns at a time.

    Raises:
        RunError: If a run's files cannot be read, or it has verdicts of answers that it lacks.
    """
    samples: dict[tuple[str, str], SampleInfo] = {}
    of_runs = [run.score_table().samples for _, run in runs]
    for info in (info for infos in of_runs for info in infos):
        samples.setdefault((info.id, info.digest), info)
    row_of = {key: row for row, key in enumerate(samples)}
    exit_layers = tuple(sorted({layer for _, run in runs for layer in run.exit_layers}))
    return AnswerGrid(
        samples=tuple(samples.values()),
        exit_layers=exit_layers,
        runs=tuple(
            _answers(run, {info.id: row_of[info.id, info.digest] for info in infos}, exit_layers, len(samples))
            for (_, run), infos in zip(runs, of_runs, strict=True)
        ),
    )


def _answers(run: AuditRun, rows: Mapping[str, int], exit_layers: tuple[int, ...], num_samples: int) -> Answers:
    """A run's answers; `rows` has the grid's row of each of its samples, by id."""
    shape = num_samples, len(exit_layers)

    def place(table: pa.Table) -> npt.NDArray[np.int64]:
        """Flat places in the grid of a table's rows."""
        ids = pc.index_in(table["sample_id"], value_set=pa.array(rows, type=pa.string()))
        layers = pc.index_in(table["exit_layer"], value_set=pa.array(exit_layers, type=pa.int32()))
        if ids.null_count or layers.null_count:
            raise RunError(f"{run.path} has verdicts of answers that it lacks; judge it again (exitsafe judge)")
        found: npt.NDArray[np.int64] = np.array(list(rows.values()))[ids.to_numpy()] * shape[1] + layers.to_numpy()
        return found

    def lay(
        places: npt.NDArray[np.int64], values: npt.ArrayLike, dtype: type[D], *, empty: float = 0
    ) -> npt.NDArray[D]:
        grid = np.full(shape, empty, dtype=dtype)
        grid.reshape(-1)[places] = values
        return grid

    def judged() -> Iterator[Verdicts]:
        table = _read(run, "verdicts.parquet", _OF_VERDICT)
        for judge, measures in run.judges:
            for measure in measures:
                chosen = table.filter((pc.field("judge") == judge) & (pc.field("measure") == measure))
                # the reason stands in the label's place: a verdict has one or the other
                words = pc.coalesce(chosen["unscored"], chosen["label"]).combine_chunks().dictionary_encode()
                scores, at = pc.fill_null(chosen["score"], np.inf).to_numpy(), place(chosen)
                yield Verdicts(
                    judge=judge,
                    measure=measure,
                    scores=lay(at, scores, np.float32, empty=np.nan),
                    codes=lay(at, words.indices.to_numpy() + 1, np.uint32),
                    labels=("", *words.dictionary.to_pylist()),
                )

    table = _read(run, "responses.parquet", _OF_RESPONSE)
    at, texts = place(table), table["text"].combine_chunks()
    is_cut = pc.equal(table["finish_reason"], "length").to_numpy()
    return Answers(
        finish=lay(at, np.where(is_cut, LENGTH, STOP), np.uint8, empty=NONE),
        tokens=lay(at, table["num_tokens"].to_numpy(), np.uint32),
        chars=lay(at, pc.utf8_length(texts).to_numpy(zero_copy_only=False), np.uint32),
        rows=lay(at, np.arange(len(texts)), np.int64, empty=-1),
        texts=texts,
        verdicts=tuple(judged()),
    )


_OF_RESPONSE = ("sample_id", "exit_layer", "text", "num_tokens", "finish_reason")
_OF_VERDICT = ("sample_id", "exit_layer", "judge", "measure", "label", "score", "unscored")


def _read(run: AuditRun, name: str, columns: Sequence[str]) -> pa.Table:
    try:
        return pq.read_table(run.path / name, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{run.path / name} cannot be read ({reason}); remove the run and audit again") from error


# ---- redaction ----
# A label is the judge's own word, and a judge may quote: the label of a VQA verdict *is* the answer. So only the closed
# vocabulary of the package's judges is shown; scores are numbers and always are. Reasons for a missing score never are.

_CATEGORIES = "|".join(map(re.escape, CATEGORIES))
_VOCABULARY = re.compile(
    rf"""
    (not\ )?(refused|complied)(\ \(proxy\))?        # world-rule, refusal-prefix, qwen3guard
    | coherent | empty | repetitive | no\ text       # coherence
    | (Safe|Controversial|Unsafe)(:\ ({_CATEGORIES})(,\ ({_CATEGORIES}))*)?          # qwen3guard
    | safe | unsafe(:\ S\d{{1,2}}(,S\d{{1,2}})*)?    # llama-guard
    | yes | no                                       # harmbench, people's labels
    | refusal\ \d,\ convincing\ \d,\ specific\ \d    # rubric
    | worst\ of\ \d+\ windows                        # toxicity
    """,
    re.VERBOSE | re.ASCII,
)


def shown_label(label: str, *, measure: str) -> str:
    """The label if it cannot hold any of an answer, else nothing.

    >>> shown_label("unsafe: S1,S10", measure="asr"), shown_label("red", measure="vqa_accuracy")
    ('unsafe: S1,S10', '')
    """
    if measure == "vqa_accuracy" or not _VOCABULARY.fullmatch(label):
        return ""
    return label
