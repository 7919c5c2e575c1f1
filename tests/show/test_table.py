from __future__ import annotations

from io import StringIO

from rich.console import Console

from exitsafe.show.table import Column, Row, Table

TABLE = Table(
    title="one at the gate",
    columns=(Column(heading="exit", is_number=False), Column(heading="rate\n(n=9)")),
    rows=(Row(cells=("1 <b>", "5%"), is_bold=True), Row(cells=("early|late", "<0.1%"), tone="bad", is_after_line=True)),
    cautions=("the judge is a proxy",),
    notes=("read\nthis",),
)


def test_a_terminal_shows_cautions_title_rows_and_notes_in_this_order() -> None:
    file = StringIO()
    Console(file=file, width=80).print(TABLE)
    lines = [" ".join(line.replace("│", "|").split()) for line in file.getvalue().splitlines()]
    assert lines[:2] == ["The judge is a proxy.", "one at the gate"]
    assert lines.index("| 1 <b> | 5% |") + 2 == lines.index("| early|late | <0.1% |")
    assert lines[-1] == "read this"


def test_markdown_shows_every_text_literally() -> None:
    assert TABLE.markdown().splitlines() == [
        *("- the judge is a proxy", "", "| exit | rate (n=9) |", "| --- | ---: |"),
        *("| 1 &lt;b&gt; | 5% |", "| early&#124;late | &lt;0.1% |", "", "- read this"),
    ]


def test_without_rows_only_the_lines_around_are_shown() -> None:
    file = StringIO()
    empty = Table(title="nothing", columns=TABLE.columns, rows=(), notes=("none",))
    Console(file=file, width=80).print(empty)
    assert file.getvalue() == "none\n" and empty.markdown() == "- none"
