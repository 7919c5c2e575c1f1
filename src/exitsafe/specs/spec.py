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
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, ValidationInfo, field_validator
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

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and kind_of(cls.model_fields[str(info.field_name)].annotation) in (int, float):
            raise ValueError("true and false are not numbers")
        return value


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
    def is_text(self) -> bool:
        """Whether its value is free text."""
        annotation = self.info.annotation
        return annotation is str or (get_origin(annotation) in (Union, UnionType) and str in get_args(annotation))

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
    return f"{setting.spelled}{'=' if setting.flag.is_rare else ' '}{_shown(fault['input'])} must be {setting.range}"


def _shown(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # Python writes out no more than 4,300 digits
        return "this number"
    return text if len(text) <= 80 else text[:77] + "..."


def kind_of(annotation: Any) -> Any:
    """How text for a field is read: as a truth value, a number, a path, text, or a list of these."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(each for each in get_args(annotation) if each is not NoneType)
    if get_origin(annotation) is Annotated:
        return kind_of(get_args(annotation)[0])
    if get_origin(annotation) is tuple and get_args(annotation)[-1] is ...:
        return list[kind_of(get_args(annotation)[0])]  # type: ignore[misc]
    return annotation if annotation in (bool, int, float, Path) else str


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
        names = schema.get("propertyNames", {"type": "string"})
        return f"{in_words(names)}, each with {in_words(schema['additionalProperties'])}"
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
    key, equals, text = source.partition("=")
    if not equals or (key.replace("-", "_") not in settings_of(spec) and _exists(source)):
        return dict(_known(spec, read_settings(Path(source), example="seed: 1"), where=source))
    setting = settings_of(spec).get(key.replace("-", "_"))
    if setting is not None and setting.is_text and text and not text.startswith(("[", "{", "'", '"')):
        return {setting.key: text}  # a tag such as 1.10 is not a number
    try:
        return dict(_known(spec, {key: parse_yaml(text)}, where="--config"))
    except UnreadableError as error:
        raise InputError(f"--config {source} cannot be read ({error})") from error


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:  # too long for a path
        return False


def _known(spec: type[Spec], content: Mapping[str, Any], *, where: str) -> Iterator[tuple[str, Any]]:
    known = settings_of(spec)
    aliases = _aliases(spec)
    records = {setting.path[0] for setting in known.values() if len(setting.path) > 1}
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key in records and not isinstance(value, dict):
            raise InputError(f"{where}: {key} is not a mapping of settings; indent lines such as seed: 1 under it")
        entries = {f"{key}.{each}": value[each] for each in value} if key in records else {key: value}
        for place, entry in entries.items():
            found = [place] if place in known else aliases.get(place, [])
            if len(found) > 1:
                raise InputError(f"{where}: setting {place!r} is ambiguous; write {' or '.join(found)}")
            if not found:
                among = [each.removeprefix(f"{key}.") for each in aliases if each.startswith(f"{key}.")] or [*known]
                hint = did_you_mean(place.rpartition(".")[2], among)
                raise InputError(f"{where}: setting {place!r} is unknown{hint}; choose {', '.join(sorted(among))}")
            if entry is not None:
                yield found[0], _read(known[found[0]], entry, where=where)


def _aliases(spec: type[Spec]) -> dict[str, list[str]]:
    """Other names of settings: the field's own and its path, each with the keys that it may mean."""
    found: dict[str, list[str]] = {}
    for key, setting in settings_of(spec).items():
        for name in {setting.path[-1], ".".join(setting.path)}:
            found.setdefault(name, []).append(key)
    return found


def _read(setting: Setting, value: Any, *, where: str) -> Any:
    """A value of YAML as its setting takes it: a single one as a list, 1e-4 as a number."""
    if get_origin(kind_of(setting.info.annotation)) is list:
        return value if isinstance(value, list) else [value]
    if not setting.is_text:
        return as_number(value)
    if isinstance(value, bool | float) or (isinstance(value, int) and setting.flag.metavar != "LAYERS"):
        raise InputError(f"{where}: {setting.key} is text; write it in quotes")
    return value


def as_number(value: Any) -> Any:
    """YAML reads 1e-4 as text; nobody means that."""
    if isinstance(value, dict):
        return {name: as_number(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [as_number(entry) for entry in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
