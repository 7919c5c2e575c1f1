"""What stands in the project's Markdown pages: fenced blocks out, and what is asked of them by a comment before."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n+)?```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S
)
_IN_A_TABLE = re.compile(r"^\|.*\| `(?P<line>\w[^`]*)` \|$", re.M)
_NAMED = re.compile(r"# (?P<name>[\w./-]+\.ya?ml)\n")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block. One under `<!-- not run: REASON -->` is only compiled."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    return [
        Block(
            page=str(page.relative_to(ROOT)),
            line=source.count("\n", 0, match.start("language")) + 1,
            language=match["language"],
            text=match["text"],
            reason=match["reason"],
        )
        for match in _BLOCK.finditer(source)
    ]


def commands(page: Path) -> list[list[str]]:
    """The arguments of each of the page's command lines, in blocks and in the last column of tables."""
    tables = _IN_A_TABLE.findall(page.read_text(encoding="utf-8"))
    shells = [block.text for block in blocks(page) if block.language in ("", "bash", "console", "sh")]
    return [command for text in (*shells, *tables) for command in arguments(text)]


def arguments(text: str, program: str = "exitsafe") -> list[list[str]]:
    """The arguments of each command line of the program, launched by whatever launcher."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True) if program in line else []
        if words[:1] == [program]:
            found.append(words[1:])
        elif program in words and words[words.index(program) - 1] == "-m":
            found.append(words[words.index(program) + 1 :])
    return found


def files(page: Path) -> dict[str, str]:
    """The page's YAML blocks that begin with their file's name: name to text."""
    named = [(_NAMED.match(block.text), block.text) for block in blocks(page) if block.language == "yaml"]
    return {match["name"]: text for match, text in named if match}
