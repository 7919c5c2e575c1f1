from __future__ import annotations

import base64
import hashlib
import re
import stat
from collections import Counter
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from exitsafe.errors import ExitsafeError, InputError, RunError
from exitsafe.show import html_page
from exitsafe.show.report import render_report
from tests.show.page_runs import ANSWER, write_run

HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "a" + chr(0x202E) + "b",
    "]]></svg>",
    "x" * 5000,
    "",
)
GUARD = (
    ("guard", ("asr", "refusal")),
    ("<b>second</b>", ("asr",)),
    ("toxicity", ("toxicity",)),
    ("vqa", ("vqa_accuracy",)),
)


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.contents: dict[str, list[str]] = {"style": [], "script": []}
        self.words: list[str] = []
        self.headings: list[int] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._open = tag
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag in self.contents:
            is_code = tag == "style" or ("type", "application/json") not in attrs
            self.contents[tag if is_code else "script"].append("")
            self._open = tag if is_code else "data"

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.contents:
            self.contents[self._open][-1] += data
        elif self._open != "data":
            self.words.append(data)

    def of(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Before and after, with hostile names."""
    folder = tmp_path_factory.mktemp("page")
    before = write_run(folder / "before", harmful_until=2, num_samples=56, categories=HOSTILE)
    after = write_run(folder / "after", harmful_until=0, num_samples=56, categories=HOSTILE, adapter="cd" * 32)
    return render_report([("before", before), ("<i>after</i>", after)], out=folder / "new" / "report.html")


@pytest.fixture(scope="module")
def page(rendered: Path) -> Page:
    return Page(rendered.read_text())


def test_every_section_is_there_in_its_order(rendered: Path, page: Page) -> None:
    first, *found = re.findall(r'<section id="([a-z]+)"', rendered.read_text())
    assert first == "verdict"
    assert found == ["findings", "charts", "categories", "tests", "transcripts", "limits", "method"]
    assert [link for link in page.of("href") if link.startswith("#")] == ["#main", *(f"#{name}" for name in found)]
    for words in (
        "organism: safety by exit layer",
        "From before to <i>after</i>, attack success averaged over exits fell from 66.7% to 0.0%,",
        "What changed from before to <i>after</i>",
        "it is lower at exits 1, 2 and not shown to differ at exits 3, 4",
        "AASR average",
        "Attack success: 2 of 3 exits differ from the default exit",
        f"SHA-256 {'cd' * 32}",
    ):
        assert words in page.text


def test_the_policy_forbids_all_but_what_is_inline(page: Page) -> None:
    policy = next(
        value for tag, name, value in page.attributes if tag == "meta" and name == "content" and "src" in value
    )
    rules = dict(part.split(" ", 1) for part in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        contents = [text for text in page.contents[tag] if text]
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in contents]
        assert rules[rule] == " ".join(f"'sha256-{found}'" for found in hashes)
    assert page.tags["script"] == 2


def test_nothing_is_asked_of_anybody(page: Page) -> None:
    loading = {
        value for tag, name, value in page.attributes if name in ("src", "srcset", "href", "data", "action", "poster")
    }
    assert {value for value in loading if not value.startswith("#")} == {"data:,"}
    assert not any(re.search(r"url\(|@import", style) for style in page.contents["style"])
    # the policy would forbid them
    assert not page.of("style")
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_hostile_names_stay_text(page: Page) -> None:
    assert page.tags["img"] == page.tags["i"] == 0
    assert "<script>alert(1)</script>" in page.text
    assert chr(0x202E) not in page.text
    assert "a\\u202eb" in page.text
    assert "x" * 200 not in page.text


def test_each_drawing_is_named_and_has_its_numbers(rendered: Path, page: Page) -> None:
    ids = page.of("id")
    assert not [name for name, count in Counter(ids).items() if count > 1]
    references = [name for value in (*page.of("aria-labelledby"), *page.of("for")) for name in value.split()]
    assert not set(references) - set(ids)
    figures = re.findall(r"<figure.*?</figure>", rendered.read_text(), flags=re.DOTALL)
    assert len(figures) == 8 + 2  # metrics, heat maps
    for figure in figures:
        assert re.search(r'role="img" aria-labelledby="[a-z0-9 -]+"', figure)
        assert re.search(r"<title id=[^>]*>[^<]+</title><desc id=[^>]*>[^<]+</desc>", figure)
        assert "<details>" in figure and "<th scope=" in figure and "95% interval" in figure and "(n=" in figure


def test_headings_never_skip_a_step(page: Page) -> None:
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))


def test_texts_come_only_when_asked_for_and_then_for_the_owner_only(tmp_path: Path) -> None:
    """A page is replaced, and its title is escaped."""
    run, out = write_run(tmp_path / "run", harmful_until=1), tmp_path / "report.html"
    without = render_report([("run", run)], out=out, title="First").read_text()
    assert ANSWER not in without
    assert "no requests or answers" in without
    assert stat.S_IMODE(out.stat().st_mode) == 0o644
    with_texts = render_report(
        [("run", run)], out=out, include_unsafe_text=True, title="Second </title><b>"
    ).read_text()
    assert "This page contains unfiltered model answers." in with_texts
    assert "First" not in with_texts
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    page = Page(with_texts)
    assert page.tags["b"] == 0
    assert page.text.count("Second </title><b>") == 2


def test_one_run_with_gaps_reads_well(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        harmful_until=1,
        exit_layers=[1, 4],
        judges=[("refusal-prefix", ("asr", "refusal"))],
        categories=["one"],
        is_unscored=lambda number, exit_layer: exit_layer == 4 or number == 0,
    )
    page = Page(render_report([("run", run)], out=tmp_path / "report.html").read_text())
    for absent in ("#categories", "#agreement"):
        assert absent not in page.of("href")
    for words in (
        "VQA accuracy, mean over exits unknown not measured",
        "none of 8 scored",
        "late, 1 of 2 exits",
        "run: 2 of 4 exits were not audited, and nothing is known about them.",
        "refusal-prefix is a proxy",
        "run: answers that could not be scored are not in any rate (attack success 9, refusal 33,",
    ):
        assert words in page.text


def test_several_runs_and_judges(tmp_path: Path) -> None:
    runs = [(f"run {n}", write_run(tmp_path / str(n), harmful_until=n, judges=GUARD)) for n in range(3)]
    page = Page(render_report(runs, out=tmp_path / "report.html").read_text())
    for words in (
        "What changed from run 0 to run 1",
        "What changed from run 0 to run 2",
        "Attack success, by guard",
        "Attack success, by <b>second</b>",
        "Second opinions: <b>second</b>.",
        "ATS average",
    ):
        assert words in page.text
    assert "#agreement" in page.of("href")


def test_runs_that_share_nothing_are_shown_and_not_compared(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", harmful_until=1, exit_layers=[1, 2])
    two = write_run(tmp_path / "two", harmful_until=1, exit_layers=[3, 4])
    page = Page(render_report([("one", one), ("two", two)], out=tmp_path / "report.html").read_text())
    assert "one and two cannot be compared: they share no request, or no exit." in page.text
    assert "one: each exit against the default one" not in page.text
    assert "two: each exit against the default one" in page.text


def test_folders_of_this_machine_stay_out(tmp_path: Path) -> None:
    origin = {
        "suites": ["/home/ann/secret.jsonl"],
        "images": "/home/ann/pictures",
        "loading": {"adapter": "/home/ann/lora"},
    }
    judges = [(f"reward:/home/{name}", ["reward", "asr"]) for name in ("ann/hh", "ann/other/hh", "ann/hh2")]
    runs = [
        write_run(tmp_path / name, harmful_until=1, model="/home/ann/models/llava", origin=origin, judges=judges)
        for name in ("before", "after")
    ]
    for judge in runs[1].settings["judges"]:  # what differs between the audits is told by the judge's name
        judge["settings"]["model"] = judge["name"]
    text = render_report(list(zip(("before", "after"), runs, strict=True)), out=tmp_path / "report.html").read_text()
    assert "llava: safety by exit layer" in text
    assert "ann" not in re.findall(r"[^\W_]+", text)
    assert str(tmp_path) not in text
    page = Page(text)
    for name in ("hh", "hh (2)", "hh2"):
        assert f"Reward, by reward:{name}" in page.text
    assert "judges.reward:hh (2).model was absent, is now reward:hh." in page.text
    assert '{"judge":"reward:hh (2)","measure":"reward","title":"Reward"}' in text


def test_what_makes_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path / "run", harmful_until=1), tmp_path / "report.html"
    deep = write_run(tmp_path / "deep", harmful_until=1, num_layers=6)
    late = write_run(tmp_path / "late", harmful_until=1, default_exit=4)
    with pytest.raises(InputError, match="cannot show 0 runs together; give 1 to 7"):
        render_report([], out=out)
    with pytest.raises(InputError, match="two runs are called same; label them apart"):
        render_report([("same", run), ("same", run)], out=out)
    with pytest.raises(InputError, match="encoder depths 4 and 6"):
        render_report([("a", run), ("b", deep)], out=out)
    with pytest.raises(InputError, match="default exits 3 and 4"):
        render_report([("a", run), ("b", late)], out=out)
    with pytest.raises(InputError, match="is a folder; name the file to write"):
        render_report([("a", run)], out=tmp_path)
    with pytest.raises(RunError, match="cannot be written"):
        render_report([("a", run)], out=run.path / "run.json" / "report.html")
    (deep.path / "verdicts.parquet").write_bytes(b"")
    with pytest.raises(RunError, match=r"verdicts\.parquet cannot be read"):
        render_report([("a", deep)], out=out)
    monkeypatch.setattr(html_page, "find_spec", lambda name: None if name == "altair" else find_spec(name))
    with pytest.raises(ExitsafeError, match=r'reports and charts need altair.*pip install "exitsafe\[report\]"'):
        render_report([("a", run)], out=out)
    assert not out.exists()
