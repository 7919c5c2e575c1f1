"""A record of settings whose fields hold everything there is to say about them: type, range, default and help text.

The command line makes its flags from the fields, a settings file its keys; pydantic checks the values, and every fault
is one line that names the flag or key and what it may be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from exitsafe.errors import InputError, did_you_mean
from exitsafe.untrusted import UnreadableError, parse_yaml, read_settings

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


@dataclass(frozen=True)
class Flag:
    """How people give a field.

    Args:
        help: What it is, in a phrase or two.
        metavar: What stands for its value in the help; DIR and FILE also say what a path must not be.
        name: The long flag without its dashes; by default the field's name.
        panel: The group of the help that it stands in; by default its record's.
        default: Its default in words, where that is not simply the field's.
        is_argument: Given by its place, without a flag.
        is_rare: A key of --config without a flag.
    """

    help: str
    metavar: str = "N"
    _: KW_ONLY
    name: str = ""
    panel: str = ""
    default: str = ""
    is_argument: bool = False
    is_rare: bool = False


def Key(help: str = "", name: str = "") -> Flag:  # noqa: A002, N802  # reads like Flag, and like pydantic's Field
    """A setting that is rare: a key of --config without a flag."""
    return Flag(help, name=name, is_rare=True)


class Spec(BaseModel):
    """Base of all records of settings. A field of another record stands for all fields of that one.

    Raises:
        InputError: On a value outside its range; the message names the flag or key and the range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    panel: ClassVar[str] = ""
    """The group of the help that its flags stand in."""
    is_configured: ClassVar[bool] = True
    """Whether the command takes --config."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_explain(type(self), error)) from None


S = TypeVar("S", bound=Spec)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of a spec or of a record within it; `path` has the names that lead there."""

    path: tuple[str, ...]
    flag: Flag
    info: FieldInfo

    @property
    def key(self) -> str:
        """Its key in a settings file."""
        return (self.flag.name or self.path[-1]).replace("-", "_")

    @property
    def spelled(self) -> str:
        """As an error names it."""
        if self.flag.is_argument:
            return self.flag.metavar
        return self.key if self.flag.is_rare else f"--{self.key.replace('_', '-')}"

    @property
    def range(self) -> str:
        """The values that it allows, in words."""
        whole: Any = Annotated[self.info.annotation, self.info]
        return in_words(TypeAdapter(whole).json_schema()).removesuffix(", or none")


@cache
def settings_of(spec: type[Any]) -> dict[str, Setting]:
    """By key, every setting of a spec."""
    return {setting.key: setting for setting in _settings(spec)}


def _settings(spec: type[Any]) -> Iterator[Setting]:
    for name, info in spec.__pydantic_fields__.items():
        if hasattr(info.annotation, "__pydantic_fields__"):
            for setting in settings_of(info.annotation).values():
                yield replace(setting, path=(name, *setting.path))
        else:
            flag = next((each for each in info.metadata if isinstance(each, Flag)), Key())
            flag = replace(flag, panel=flag.panel or getattr(spec, "panel", ""))
            yield Setting(path=(name,), flag=flag, info=info)


def make_spec(spec: type[S], values: Mapping[str, object]) -> S:
    """The record of values by key.

    Raises:
        InputError: On a value outside its range; the message names the flag or key and the range.
    """
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *outer, name = settings_of(spec)[key].path
        record = nested
        for each in outer:
            record = record.setdefault(each, {})
        record[name] = value
    return spec(**nested)


def merged(spec: S, under: Mapping[str, Any]) -> S:
    """A spec whose fields that were not given are those of `under`, shaped like its dump.

    Raises:
        InputError: If a value makes no sense.
    """
    values = dict(under)
    for name, value in spec.model_dump(exclude_unset=True).items():
        values[name] = {**under.get(name, {}), **value} if isinstance(value, dict) else value
    return type(spec)(**values)


def _explain(spec: type[Spec], error: ValidationError) -> str:
    """The first fault in one line."""
    fault = error.errors(include_url=False)[0]
    place = tuple(map(str, fault["loc"]))
    setting = next((each for each in settings_of(spec).values() if each.path == place[: len(each.path)]), None)
    if setting is None:  # a check over several fields
        reason = fault.get("ctx", {}).get("error", fault["msg"])
        return f"{'.'.join(place)}: {reason}" if fault["type"] == "extra_forbidden" else str(reason)
    if fault["type"] == "missing" and place == setting.path:
        return f"{setting.spelled} is missing"
    return f"{setting.spelled}{'=' if setting.flag.is_rare else ' '}{fault['input']} must be {setting.range}"


def in_words(schema: Mapping[str, Any]) -> str:
    """The values that a JSON schema allows, in words.

    >>> in_words({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
    'a whole number of at least 1, or none'
    """
    if "description" in schema:
        return str(schema["description"])
    if "anyOf" in schema:
        return ", or ".join(map(in_words, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "object":
        return f"{in_words(schema['propertyNames'])}, each with {in_words(schema['additionalProperties'])}"
    if schema["type"] not in ("integer", "number"):
        return {"boolean": "true or false", "null": "none", "array": "a list"}.get(schema["type"], "text")
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = " and ".join(f"{word} {schema[bound]}" for bound, word in words.items() if bound in schema)
    return f"a {'whole ' if schema['type'] == 'integer' else ''}number {bounds}".rstrip()


def read_config(spec: type[Spec], source: str) -> dict[str, Any]:
    """Values by key, from a YAML file or from text such as `seed=1`.

    The keys are those of `settings_of`; the fields of a record within the spec may also stand under its name.

    Raises:
        InputError: If it cannot be read, or a key is unknown.
    """
    path = Path(source)
    key, equals, text = source.partition("=")
    if not equals or path.exists():
        return dict(_known(spec, read_settings(path, example="seed: 1"), where=source))
    try:
        return dict(_known(spec, {key: parse_yaml(text)}, where="--config"))
    except UnreadableError as error:
        raise InputError(f"--config {source} cannot be read ({error})") from error


def _known(spec: type[Spec], content: Mapping[str, Any], *, where: str) -> Iterator[tuple[str, Any]]:
    known = settings_of(spec)
    by_path = {name: key for key, each in known.items() for name in (each.path[-1], ".".join(each.path))}
    records = {setting.path[0] for setting in known.values() if len(setting.path) > 1}
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key in records and not isinstance(value, dict):
            raise InputError(f"{where}: {key} is not a mapping of settings; indent lines such as seed: 1 under it")
        entries = {f"{key}.{each}": value[each] for each in value} if key in records else {key: value}
        for place, entry in entries.items():
            found = place if place in known else by_path.get(place, place)
            if found not in known:
                among = [each.removeprefix(f"{key}.") for each in by_path if each.startswith(f"{key}.")] or [*known]
                hint = did_you_mean(place.rpartition(".")[2], among)
                raise InputError(f"{where}: setting {place!r} is unknown{hint}; choose {', '.join(sorted(among))}")
            if entry is not None:
                yield found, as_number(entry)


def as_number(value: Any) -> Any:
    """YAML reads 1e-4 as text; nobody means that."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
