"""`--config FILE.yaml`: a command's settings from a file; flags win, unknown keys are refused.

Keys are the command's long flags with underscores (`max_new_tokens: 64`) and, for commands that take a record of
settings, its fields, at the top or in a section of their own. Knows no command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from inspect import signature
from pathlib import Path
from typing import Any

import typer

from exitsafe.errors import InputError
from exitsafe.untrusted import read_settings

FIELDS = "exitsafe.fields"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def config_option(*, section: str = "", fields: Callable[[], Collection[str]] = tuple) -> Any:
    """The option `--config`.

    Args:
        section: The key under which the fields of a record may stand.
        fields: Their names; called only if a file is given. The values are left in `context.meta[FIELDS]`.
    """

    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not context.resilient_parsing:
            _apply(context, path, section=section, fields=fields())
        return path

    return typer.Option(
        "--config",
        metavar="FILE.yaml",
        help="Settings from a YAML file; flags win.",
        is_eager=True,
        callback=read,
        show_default=False,
        rich_help_panel="Output",
    )


def rare_keys(command: Callable[..., None]) -> list[str]:
    """Keys for `--config` whose flags the help of a command leaves out."""
    return [
        name
        for name, parameter in signature(command, eval_str=True).parameters.items()
        for found in getattr(parameter.annotation, "__metadata__", ())
        if getattr(found, "hidden", False)
    ]


def _apply(context: typer.Context, path: Path, *, section: str, fields: Collection[str]) -> None:
    """Make the file's values the defaults of the flags that are not given."""
    names = _flag_names(context)
    defaults: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, value in read_settings(path, example="seed: 1").items():
        key = str(name).replace("-", "_")
        if section and key == section:
            values |= _read_section(value, path, section, fields)
        elif key in names:
            parameter = names[key]
            defaults[parameter.name] = _for_flag(value, is_list=parameter.multiple)
        elif key in fields:
            values[key] = as_number(value)
        else:
            raise _unknown(path, key, [*names, *fields, *filter(None, [section])])
    context.default_map = {name: value for name, value in defaults.items() if value is not None}
    context.meta[FIELDS] = values


def _flag_names(context: typer.Context) -> dict[str, Any]:
    """Every name that a key may have: the long flag's, e.g. `layers`, and the parameter's."""
    names = {}
    for parameter in context.command.params:
        if parameter.name in ("config", "help"):
            continue
        for name in [*parameter.opts, str(parameter.name)]:
            if not name.startswith("-") or name.startswith("--"):
                names[name.lstrip("-").replace("-", "_")] = parameter
    return names


def _read_section(value: Any, path: Path, section: str, fields: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path}: {section} holds no settings; indent lines such as num_steps: 100 under it")
    for key in value:
        if key not in fields:
            raise _unknown(path, f"{section}.{key}", fields)
    return {key: as_number(entry) for key, entry in value.items()}


def _for_flag(value: Any, *, is_list: bool) -> Any:
    """As the flag would be written: lists for flags that may come several times, else text such as 1-8,16."""
    if value is None:
        return None
    if is_list:
        return [str(entry) for entry in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        return ",".join(str(entry) for entry in value)
    return value if isinstance(value, bool) else str(value)


def as_number(value: Any) -> Any:
    """YAML reads 1e-4 as text; nobody means that."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _unknown(path: Path, key: str, known: Collection[str]) -> InputError:
    return InputError(f"{path}: setting {key!r} is unknown; choose {', '.join(sorted(set(known)))}")
