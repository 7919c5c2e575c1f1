"""One table for every surface: rich prints it on terminals, `markdown` writes it for step summaries and model cards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Group

Tone = Literal["good", "bad", "unsure"]
_STYLES: dict[Tone, str] = {"good": "green", "bad": "bold red", "unsure": "bold yellow"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A heading, which may have line breaks, and whether numbers stand below it, aligned to the right."""

    heading: str
    is_number: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row.

    Args:
        cells: One per column.
        is_bold: Whether the row stands out.
        tone: What its last cell says of it.
        is_after_line: Whether a line separates it from the row above.
    """

    cells: tuple[str, ...]
    is_bold: bool = False
    tone: Tone | None = None
    is_after_line: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table and what is said around it.

    Args:
        title: What it shows, in a line.
        columns: Its columns.
        rows: Its rows; without any, only the lines around are shown.
        cautions: What to know before reading it, one line each.
        notes: What stands below it, one line each.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    cautions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __rich__(self) -> Group:
        """For `rich.console.Console.print`."""
        from rich.console import Group
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(title=self.title, title_justify="left")
        for column in self.columns:
            grid.add_column(column.heading, justify="right" if column.is_number else "left", overflow="fold")
        for row in self.rows:
            if row.is_after_line:
                grid.add_section()
            styles = ["bold" if row.is_bold else ""] * len(row.cells)
            if row.tone is not None:
                styles[-1] = _STYLES[row.tone]
            grid.add_row(*(Text(cell, style=style) for cell, style in zip(row.cells, styles, strict=True)))
        lines = [Text(f"{line}.", style="yellow") for line in map(_sentence, self.cautions)]
        # a note stays on one line, even if a name from a file contains line breaks
        notes = [Text(" ".join(line.splitlines()), style="dim") for line in self.notes]
        return Group(*lines, *([grid] if self.rows else []), *notes)

    def markdown(self) -> str:
        """In GitHub's Markdown, without the title; every text is shown literally."""
        headings = [markdown_text(column.heading) for column in self.columns]
        parts = [
            _list(self.cautions),
            "\n".join(
                [
                    _line(headings),
                    _line(["---:" if column.is_number else "---" for column in self.columns]),
                    *(_line([markdown_text(cell) for cell in row.cells]) for row in self.rows),
                ]
            )
            if self.rows
            else "",
            _list(self.notes),
        ]
        return "\n\n".join(filter(None, parts))


def markdown_text(text: str) -> str:
    """Text as Markdown shows it literally, in a table too: no markup, HTML, link or line break.

    >>> markdown_text("<b>a|b</b> @team")
    '&lt;b&gt;a&#124;b&lt;/b&gt; &#64;team'
    """
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0]) or f"&#{ord(found[0])};", line)


_MARKUP = re.compile(r"[&<>|@#\\`*_\[\]~!$]|:(?=//)|(?<=www)\.")  # the last two would make links
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def _sentence(line: str) -> str:
    text = " ".join(line.splitlines())
    return text[:1].upper() + text[1:]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {markdown_text(line)}" for line in lines)
