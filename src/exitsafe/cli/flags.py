"""A command from a function and the spec that it takes: typer's options are made from the spec's fields.

`--config` takes the same settings by key, from a file or one by one; flags win.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from exitsafe.cli import console
from exitsafe.errors import InputError
from exitsafe.specs.inputs import OUTPUT
from exitsafe.specs.spec import Setting, Spec, kind_of, make_spec, read_config, settings_of

_RARE = "exitsafe.rare"


def as_command(run: Callable[[Any, console.Show], None]) -> Callable[..., None]:
    """What typer calls for `run(spec, show)`."""
    spec = spec_of(run)

    def command(context: typer.Context, json: bool = False, config: None = None, **flags: Any) -> None:
        given = {key: value for key, value in flags.items() if _is_given(context, key)}
        with console.results(as_json=json) as show:
            try:
                settings = make_spec(spec, context.meta.get(_RARE, {}) | given)
            except InputError as error:
                raise InputError(f"{error}; see {context.command_path} --help") from None
            run(settings, show)

    parameters = [_parameter(setting) for setting in settings_of(spec).values() if not setting.flag.is_rare]
    parameters.sort(key=lambda each: each.annotation.__metadata__[0].rich_help_panel == OUTPUT)  # the last group
    signature = Signature([_keyword("context", typer.Context), *parameters, *_of_every_command(spec)])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {}
    command.__doc__ = run.__doc__
    return command


def _is_given(context: typer.Context, key: str) -> bool:
    source = context.get_parameter_source(key)
    return source is not None and source.name != "DEFAULT"


def spec_of(run: Callable[[Any, console.Show], None]) -> type[Spec]:
    """What a command takes."""
    found: type[Spec] = get_type_hints(run)["spec"]
    return found


def rare_settings(run: Callable[[Any, console.Show], None]) -> list[Setting]:
    """Those with a help text but no flag: keys of --config."""
    return [each for each in settings_of(spec_of(run)).values() if each.flag.is_rare and each.flag.help]


def _parameter(setting: Setting) -> Parameter:
    flag, info = setting.flag, setting.info
    kind = kind_of(info.annotation)
    how: dict[str, Any] = {
        "help": flag.help,
        "metavar": None if kind is bool else flag.metavar,
        "show_default": flag.default or (kind is not bool and info.default not in (None, ())),
        "rich_help_panel": flag.panel or None,
        "file_okay": flag.metavar != "DIR",
        "dir_okay": not flag.metavar.startswith("FILE"),
    }
    option = typer.Argument(**how) if flag.is_argument else typer.Option(setting.spelled, **how)
    if info.is_required():
        return _keyword(setting.key, Annotated[kind, option])
    default = None if flag.default or info.default == () else info.default
    return _keyword(setting.key, Annotated[kind if kind is bool else kind | None, option], default)


def _keyword(name: str, annotation: Any, default: Any = Parameter.empty) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _of_every_command(spec: type[Spec]) -> list[Parameter]:
    """`--json`, and `--config` where there is anything to configure."""

    def read(context: typer.Context, sources: list[str] | None) -> None:
        for source in sources or () if not context.resilient_parsing else ():
            _apply(context, spec, read_config(spec, source))

    config = typer.Option(
        "--config",
        metavar="FILE.yaml|KEY=VALUE",
        help="Settings from a YAML file, or one of them; repeatable, and flags win.",
        is_eager=True,
        callback=read,
        show_default=False,
        rich_help_panel=OUTPUT,
    )
    json = typer.Option(
        "--json", help="Print one JSON document on stdout; the rest goes to stderr.", rich_help_panel=OUTPUT
    )
    found = [_keyword("json", Annotated[bool, json], False)]
    return [_keyword("config", Annotated[list[str] | None, config], None), *found] if spec.is_configured else found


def _apply(context: typer.Context, spec: type[Spec], values: dict[str, Any]) -> None:
    """Make values the defaults of the flags that are not given; keep those of settings without a flag."""
    defaults = dict(context.default_map or {})
    rare = context.meta.setdefault(_RARE, {})
    for key, value in values.items():
        setting = settings_of(spec)[key]
        kind = kind_of(setting.info.annotation)
        if setting.flag.is_rare:
            rare[key] = value
        elif get_origin(kind) is list:
            defaults[key] = [str(each) for each in value]
        elif isinstance(value, list):  # e.g. layers
            defaults[key] = ",".join(map(str, value))
        else:
            defaults[key] = value if kind is bool else str(value)
    context.default_map = defaults
