"""The map in CONTRIBUTING.md names every module of the package and nothing else."""

from __future__ import annotations

from tests.docs.pages import ROOT, blocks

PACKAGE = ROOT / "src" / "exitsafe"


def mapped(text: str) -> list[str]:
    """Paths of the modules in a drawn tree."""
    paths, room = [], ""
    for line in text.partition("src/exitsafe/\n")[2].splitlines():
        name, depth = line.split()[0], len(line) - len(line.lstrip())
        if depth == 0:
            break
        if name.endswith("/"):
            room = name
        else:
            paths.append(name if depth == 2 else room + name)
    return paths


def test_the_map_is_the_source() -> None:
    (drawn,) = [block.text for block in blocks(ROOT / "CONTRIBUTING.md") if "src/exitsafe/\n" in block.text]
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__")}
    paths = mapped(drawn)
    assert sorted(modules.symmetric_difference(paths)) == []
    assert len(paths) == len(modules)
