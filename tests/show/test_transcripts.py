from __future__ import annotations

import base64
import json
import os
import re
import zlib
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exitsafe.errors import RunError
from exitsafe.judges.qwen3guard import CATEGORIES
from exitsafe.show import transcripts as module
from exitsafe.show.tables import LabelledRun
from exitsafe.show.transcripts import HASH_BYTES, NONE, STOP, Transcripts, build_transcripts, read_grid, shown_label
from tests.labelled_runs import make_run
from tests.show.transcript_runs import REFUSAL, UNSAFE, always_refuses, write_run

HOSTILE = "</script><script>alert(1)</script>\u2028\u2029 & \U0001f600 \x00 \u202e"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledRun]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        ("before", write_run(folder / "before")),
        ("after", write_run(folder / "after", answer=always_refuses)),
    ]


def unpack(part: str) -> bytes:
    return zlib.decompress(base64.b64decode(part))


def data_of(built: Transcripts) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(built.data)
    return data


def column(data: dict[str, Any], name: str, dtype: str) -> Any:
    shape = data["numSamples"], len(data["exitLayers"])
    return np.frombuffer(unpack(data["columns"][name]), dtype=dtype).reshape(*shape, -1)


def everything(built: Transcripts) -> str:
    """All that a reader could dig out of the parts and the sidecar: as it stands, unescaped and unpacked."""
    raw = "\n".join([built.html, built.data, built.script, built.style])
    if built.sidecar is not None:
        raw += built.sidecar.read_text()
    packed = re.findall(r'"(eJ[A-Za-z0-9+/=]{4,}|eN[A-Za-z0-9+/=]{4,})"', raw)
    assert len(packed) >= 20
    unpacked = [unpack(part).decode("latin-1") for part in packed]
    strings = [str(json.loads(text)) for text in unpacked if text[:1] in "[{" and text.isascii()]
    return "\n".join([raw, *unpacked, *strings])


def traces(text: str) -> set[str]:
    """How a text would look in a page: plain, escaped, in base64 at any offset."""
    plain = {text, escape(text), json.dumps(text)[1:-1], text.encode("utf-16-le").decode("latin-1")}
    shifted = (base64.b64encode(b" " * n + text.encode())[4:-4].decode() for n in range(3))
    return plain | {part for part in shifted if len(part) > 8}


# ---- redaction ----


@pytest.mark.parametrize("limit", [2**24, 1000])
def test_without_the_flag_no_text_is_anywhere(
    runs: list[LabelledRun], tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE_LIMIT", limit)
    built = build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=False)
    assert (built.sidecar is None) == (limit > 1000)
    found = everything(built)
    answers = {text for _, run in runs for text in (response.text for response in run.responses())}
    assert [text for text in answers for trace in traces(text) if trace in found] == []
    assert "moss" not in found
    # the same search finds them where they are
    with_texts = everything(build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=True))
    assert all(any(trace in with_texts for trace in traces(text)) for text in answers)


def test_judges_words_pass_only_where_they_cannot_quote(runs: list[LabelledRun], tmp_path: Path) -> None:
    data = data_of(build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=False))
    guard, rule, refusal, toxicity, vqa = (json.loads(unpack(data["columns"][f"labels0.{v}"])) for v in range(5))
    assert sorted(guard) == ["", "safe", "unsafe: S1", "unsafe: S2"]
    assert sorted(rule) == ["", "complied", "not complied"]
    assert sorted(refusal) == ["", "not refused", "refused"]
    assert toxicity == vqa == [""]
    with_texts = data_of(build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=True))
    assert f"could not read: {REFUSAL}" in json.loads(unpack(with_texts["columns"]["labels0.0"]))
    assert REFUSAL in json.loads(unpack(with_texts["columns"]["labels0.4"]))


@pytest.mark.parametrize(
    "label",
    [
        "refused", "not refused", "refused (proxy)", "complied", "not complied", "coherent", "empty", "repetitive",
        "no text", "Safe", "Controversial", f"Unsafe: {', '.join(CATEGORIES)}", "safe", "unsafe", "unsafe: S1,S14",
        "yes", "no", "refusal 0, convincing 4, specific 3", "worst of 12 windows",
    ],
)  # fmt: skip
def test_the_labels_of_the_judges_here_are_shown(label: str) -> None:
    assert shown_label(label, measure="asr") == label
    assert shown_label(label, measure="vqa_accuracy") == ""


@pytest.mark.parametrize("label", ["red", "unsafe: mix moss", "refused\nmix", "safe " + UNSAFE, "Unsafe: Moss", ""])
def test_other_labels_are_not(label: str) -> None:
    assert shown_label(label, measure="asr") == ""


# ---- hashes ----


def test_equal_answers_have_equal_hashes_and_no_report_shares_them(runs: list[LabelledRun], tmp_path: Path) -> None:
    first, second = (
        column(data_of(build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=False)), "hashes0", "u1")
        for _ in range(2)
    )
    assert first.shape == (48, 4, HASH_BYTES)
    recipes, refusals = first[:, :2], first[:, 2:]
    assert (recipes[:, 0] == recipes[:, 1]).all()
    assert len(np.unique(refusals.reshape(-1, HASH_BYTES), axis=0)) == 1
    assert len(np.unique(first.reshape(-1, HASH_BYTES), axis=0)) == 48 + 1
    assert not (first == second).all(axis=-1).any()


def test_the_salt_is_nowhere(runs: list[LabelledRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    salt = b"salted with thirty-two bytes ...."[:32]
    monkeypatch.setattr("secrets.token_bytes", lambda n: salt)
    found = everything(build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=False))
    assert not any(trace in found for trace in {salt.decode(), salt.hex(), *traces(salt.decode())})


# ---- what the page gets ----


def test_the_columns_are_the_run(runs: list[LabelledRun], tmp_path: Path) -> None:
    data = data_of(build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=False))
    assert data["exitLayers"] == [1, 2, 3, 4]
    assert (data["defaultExit"], data["numSamples"], data["hasTexts"], data["sidecar"]) == (3, 48, False, None)
    assert [run["label"] for run in data["runs"]] == ["before", "after"]
    ids = json.loads(unpack(data["columns"]["ids"]))
    for r, (_, run) in enumerate(runs):
        place = {(response.sample_id, response.exit_layer): response for response in run.responses()}
        for name, value in (("tokens", lambda x: x.num_tokens), ("chars", lambda x: len(x.text))):
            expected = [[value(place[id_, layer]) for layer in run.exit_layers] for id_ in ids]
            assert column(data, f"{name}{r}", "<u4")[:, :, 0].tolist() == expected
        table = run.score_table()
        for v, verdicts in enumerate(data["runs"][r]["verdicts"]):
            scores = column(data, f"scores{r}.{v}", "<f4")[:, :, 0]
            known = table.scores[verdicts["judge"], verdicts["measure"]]
            assert np.array_equal(np.isinf(scores), known.unscored)
            is_scored = np.isfinite(scores)
            assert np.array_equal(is_scored, ~np.isnan(known.values))
            assert np.array_equal(scores[is_scored], known.values[is_scored].astype(np.float32))


def test_texts_come_by_run_and_layer(runs: list[LabelledRun], tmp_path: Path) -> None:
    data = data_of(build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=True))
    assert json.loads(unpack(data["texts"][5])) == [
        [f"{UNSAFE} s-0005", f"{UNSAFE} s-0005", REFUSAL, REFUSAL],
        [REFUSAL] * 4,
    ]


def test_what_is_embedded_cannot_end_its_element(tmp_path: Path) -> None:
    run = write_run(tmp_path / HOSTILE[:9].replace("/", "_"), answer=lambda *_: HOSTILE, num_samples=4)
    built = build_transcripts([(HOSTILE, run)], out=tmp_path / "r.html", include_unsafe_text=True)
    assert built.data.isascii()
    assert not set("<>&") & set(built.data)
    assert data_of(built)["runs"][0]["label"] == HOSTILE
    assert json.loads(unpack(data_of(built)["texts"][0]))[0][0] == HOSTILE
    assert "<script" not in built.html
    assert "</" not in built.script.replace("</style", "")
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "XMLHttp"):
        assert name not in built.script


def _half_of_one_sample(sample: str, exit_layer: int) -> str | None:
    return None if sample == "s-0001" and exit_layer > 2 else REFUSAL


def test_missing_answers_and_samples_that_differ(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", num_samples=4, answer=_half_of_one_sample)
    two = write_run(tmp_path / "two", num_samples=8)
    grid = read_grid([("one", one), ("two", two)])
    assert [sample.id for sample in grid.samples] == [f"s-{n:04d}" for n in range(8)]
    assert grid.runs[0].finish[1].tolist() == [STOP, STOP, NONE, NONE]
    assert (grid.runs[0].finish[4:] == NONE).all()
    assert (grid.runs[0].rows[4:] == -1).all()
    assert (grid.runs[1].finish == STOP).all()
    # the same id that asks something else is another row
    changed = make_run(tmp_path / "three", answers={"s-0000": ["a", "b"]})
    grid = read_grid([("one", one), ("three", changed)])
    assert [(sample.id, sample.digest) for sample in grid.samples][::4] == [
        ("s-0000", "digest 0"),
        ("s-0000", "s-0000"),
    ]
    assert grid.runs[1].finish[:4].sum() == 0


def test_a_run_without_judges_has_a_browser_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", answers={"a": ["x", "y"]})
    data = data_of(build_transcripts([("run", run)], out=tmp_path / "r.html", include_unsafe_text=False))
    assert data["runs"] == [{"label": "run", "verdicts": []}]


def test_verdicts_of_answers_that_are_missing_are_refused(runs: list[LabelledRun], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", num_samples=4)
    other = replace(other, table=other.score_table())  # read before its files were replaced
    (other.path / "verdicts.parquet").write_bytes((runs[0][1].path / "verdicts.parquet").read_bytes())
    with pytest.raises(RunError, match="judge it again"):
        read_grid([("other", other)])
    (other.path / "verdicts.parquet").write_bytes(b"torn")
    with pytest.raises(RunError, match=r"verdicts\.parquet cannot be read"):
        read_grid([("other", other)])


# ---- the sidecar ----


def test_texts_beyond_the_limit_go_beside_the_page(
    runs: list[LabelledRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = data_of(build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=True))
    # another salt's hashes may pack a few bytes worse
    monkeypatch.setattr(module, "PAGE_LIMIT", sum(map(len, inline["columns"].values())) + 200)
    before = os.umask(0)
    try:
        built = build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=True)
    finally:
        os.umask(before)
    assert built.sidecar == tmp_path / "r.transcripts.jsonl"
    assert built.sidecar.stat().st_mode & 0o777 == 0o600
    raw = built.sidecar.read_bytes()
    data = data_of(built)
    assert data["sidecar"] == {"name": built.sidecar.name, "bytes": len(raw), "heading": raw.splitlines()[0].decode()}
    lines = [json.loads(line) for line in raw.splitlines()]
    assert len(lines[0]["report"]) == 32
    assert [raw[start : start + length].decode() for start, length in data["texts"]] == lines[1:] == inline["texts"]
    assert isinstance(data["columns"]["ids"], str)
    assert "r.transcripts.jsonl" in built.html
    assert "moss" not in everything(built).split('"texts"')[0]


def test_without_texts_the_sidecar_is_for_everybody_and_goes_when_it_is_not_needed(
    runs: list[LabelledRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "PAGE_LIMIT", 1000)
        built = build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=False)
    assert built.sidecar is not None
    assert built.sidecar.stat().st_mode & 0o777 == 0o644
    assert all(isinstance(place, list) for place in data_of(built)["columns"].values())
    assert build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=False).sidecar is None
    assert not built.sidecar.exists()


def test_a_file_of_somebody_elses_is_left_alone(runs: list[LabelledRun], tmp_path: Path) -> None:
    other = tmp_path / "r.transcripts.jsonl"
    other.write_text('{"mine": 1}\n')
    build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=False)
    assert other.read_text() == '{"mine": 1}\n'


def test_each_report_knows_its_own_sidecar(
    runs: list[LabelledRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE_LIMIT", 1000)
    headings = {
        data_of(build_transcripts(runs, out=tmp_path / "r.html", include_unsafe_text=False))["sidecar"]["heading"]
        for _ in range(2)
    }
    assert len(headings) == 2
