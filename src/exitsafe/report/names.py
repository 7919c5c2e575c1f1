"""Names from runs (labels, judges, categories, suites) as a page may show them. Text in, text out; escaping is later.

Whoever wrote a suite chose its names: characters that nobody sees or that turn the reading direction are spelt out,
long names are cut. Folders of this machine are not shown: a page is made to be passed on.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath

_MAX_LENGTH = 80
_PREFIX = re.compile(r"[a-z0-9-]{2,}:")  # of a judge; one letter is a drive
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_MAX_LINE = 400
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


def without_folders(line: str, called: Mapping[str, str]) -> str:
    """A line about judges and models, e.g. of `Comparison.settings_changed`, with no folder of this machine in it.

    Args:
        line: Judges by their names; other values in JSON, so names in double quotes.
        called: From `judge_names`.
    """
    names = "|".join([_QUOTED, *map(re.escape, sorted(called, key=len, reverse=True))])
    found = re.sub(names, lambda match: called.get(match[0]) or without_folder(match[1]), line)
    return shown(found, max_length=_MAX_LINE)


def numbered(names: Sequence[str]) -> list[str]:
    """Names that have become the same, told apart.

    >>> numbered(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    return [name if name not in names[:i] else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def label_runs(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above them as make them unique; a number where none do.

    >>> label_runs([Path("a/before"), Path("a/after")]), label_runs([Path("a/run"), Path("b/run")])
    (['before', 'after'], ['a/run', 'b/run'])
    """
    resolved = [path.resolve() for path in paths]
    labels = [path.name or "run" for path in resolved]
    for depth in range(2, 1 + max((len(path.parts) for path in resolved), default=0)):
        if len(set(labels)) == len(labels):
            break
        labels = [
            "/".join(path.parts[1:][-depth:]) if labels.count(label) > 1 else label
            for path, label in zip(resolved, labels, strict=True)
        ]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[:i].count(label) + 1})"
        for i, label in enumerate(labels)
    ]
