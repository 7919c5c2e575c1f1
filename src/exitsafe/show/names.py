"""Names from runs (labels, judges, categories, suites) as a page may show them. Text in, text out; escaped later.

Names come from strangers: invisible characters and those that change the reading direction are spelt out, long names
are cut. Folders of this machine are left out, because pages are shared.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PureWindowsPath

_MAX_LENGTH = 80
_PREFIX = re.compile(r"[a-z0-9-]{2,}:")  # of a judge; one letter is a drive
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_PATH = r'(?<![\w./])(?:[A-Za-z]:\\|~|\.{0,2}/(?!/))[^,;:"]*'
_MAX_LINE = 2000
_SUITES = (".jsonl", ".csv", ".parquet")
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def shown(name: str, *, max_length: int = _MAX_LENGTH) -> str:
    """A name with nothing hidden in it.

    >>> shown("a" + chr(0x202E) + "b" + chr(0))
    'a\\\\u202eb\\\\u0000'
    """
    cut = name if len(name) <= max_length else name[: max_length - 1] + "…"
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in _UNSEEN else c for c in cut)


def without_folder(name: str) -> str:
    """A model, judge or suite by its name, a file of this machine by its last part.

    >>> without_folder("llava-hf/llava-1.5-7b-hf"), without_folder("/home/ann/suite.jsonl")
    ('llava-hf/llava-1.5-7b-hf', 'suite.jsonl')
    >>> without_folder("reward:/home/ann/model"), without_folder("runs/ppo/model"), without_folder("https://a.b/c/d")
    ('reward:model', 'model', 'https://a.b/c/d')
    """
    if "://" in name:
        return name
    found = _PREFIX.match(name)
    prefix, path = (found[0], name[found.end() :]) if found else ("", name)
    # a name on the Hub has one slash at most
    is_file = path.startswith(("/", "~", ".")) or path.count("/") > 1 or path.lower().endswith(_SUITES)
    if is_file or "\\" in path or PureWindowsPath(path).drive:
        path = PureWindowsPath(path).name or path
    return prefix + path


def judge_names(judges: Iterable[str]) -> dict[str, str]:
    """What each judge is called on a page; numbers tell apart those whose folders did so.

    >>> judge_names(["vqa", "reward:/a/model", "reward:/b/model"])
    {'vqa': 'vqa', 'reward:/a/model': 'reward:model', 'reward:/b/model': 'reward:model (2)'}
    """
    different = list(dict.fromkeys(judges))
    return dict(zip(different, numbered([shown(without_folder(judge)) for judge in different]), strict=True))


def without_folders(line: str, called: Mapping[str, str] | None = None) -> str:
    """A line about judges and models without this machine's folders: of each path its last part.

    >>> without_folders('it has reward:/home/ann b/model: add one; name was "/my disk/m"')
    'it has reward:model: add one; name was m'

    Args:
        line: Values in JSON, so names in double quotes; or paths that end before a comma, semicolon or colon.
        called: From `judge_names`; what else a judge is called.
    """
    called = called or {}
    names = "|".join([_QUOTED, *map(re.escape, sorted(called, key=len, reverse=True)), _PATH])
    found = re.sub(names, lambda found: called.get(found[0]) or without_folder(found[1] or found[0]), line)
    return shown(found, max_length=_MAX_LINE)


def numbered(names: Sequence[str]) -> list[str]:
    """Names that have become the same, told apart.

    >>> numbered(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    return [name if name not in names[:i] else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]
