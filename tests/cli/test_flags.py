"""Flags, keys of --config and checks, all made from a spec's fields."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field

from exitsafe.cli import console, main
from exitsafe.cli.flags import as_command
from exitsafe.cli.main import run
from exitsafe.errors import InputError
from exitsafe.lppo.config import AlignSpec
from exitsafe.specs import verbs
from exitsafe.specs.spec import Flag, Key, Spec, read_config, settings_of


class Inner(Spec):
    revision: Annotated[str | None, Key()] = None
    suites: Annotated[tuple[str, ...], Key(name="inner-suite")] = ()
    rate: Annotated[float | None, Field(gt=0), Flag("How fast.", "RATE")] = None
    mix: dict[str, float] | None = None


class Work(Spec):
    model: Annotated[str, Flag("Which.", "MODEL", is_argument=True)]
    exit_layers: Annotated[str, Flag("Where.", "LAYERS", name="layers")] = "all"
    suites: Annotated[tuple[str, ...], Flag("What.", "NAME", name="suite")] = ()
    num_steps: Annotated[int, Field(ge=1), Flag("How long.", name="steps")] = 4
    loud: Annotated[bool, Flag("Whether.")] = False
    mode: Annotated[Literal["slow", "fast"], Key("slow or fast.")] = "slow"
    inner: Inner = Inner()


Seen = list[Work]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """A command with settings of every kind; what it got."""
    seen: Seen = []
    app = typer.Typer()

    @app.callback()
    def top() -> None: ...

    def work(spec: Work, show: console.Show) -> None:
        seen.append(spec)

    work.__annotations__["spec"] = Work
    work.__annotations__["show"] = console.Show
    app.command("work")(as_command(work))
    monkeypatch.setattr(main, "app", app)
    return seen


def _write(folder: Path, text: str) -> str:
    (folder / "settings.yaml").write_text(text)
    return str(folder / "settings.yaml")


def test_only_what_is_given_is_set(seen: Seen) -> None:
    assert run(["work", "m", "--steps", "4", "--loud"]) == 0
    assert seen == [Work(model="m", num_steps=4, loud=True)]
    assert seen[0].model_fields_set == {"model", "num_steps", "loud"}


def test_values_of_every_kind(seen: Seen, tmp_path: Path) -> None:
    text = "model: organism\nlayers: [1-3, 8]\nsuite: one.jsonl\nsteps: 7\nrate: 1e-4\nloud: true\nmode: fast\n"
    assert run(["work", "--config", _write(tmp_path, text)]) == 0
    inner = Inner(rate=1e-4)
    (spec,) = seen
    assert spec == Work(
        model="organism",
        exit_layers="1-3,8",
        suites=("one.jsonl",),
        num_steps=7,
        loud=True,
        mode="fast",
        inner=inner,
    )


def test_flags_win(seen: Seen, tmp_path: Path) -> None:
    path = _write(tmp_path, "layers: 4\nsuite: [a, b]\nnum-steps: 7\nrate: null\n")
    assert run(["work", "m", "--steps", "9", "--suite", "c", "--config", path]) == 0
    assert seen == [Work(model="m", exit_layers="4", suites=("c",), num_steps=9)]


def test_settings_one_by_one_and_in_their_section(seen: Seen, tmp_path: Path) -> None:
    path = _write(tmp_path, "inner:\n  mix: {harmful: 1}\n  rate: 1e0\n")
    assert run(["work", "m", "--config", path, "--config", "mode=fast", "--config", "steps=2"]) == 0
    assert seen == [Work(model="m", num_steps=2, mode="fast", inner=Inner(rate=1.0, mix={"harmful": 1}))]


def test_an_empty_file_changes_nothing(seen: Seen, tmp_path: Path) -> None:
    assert run(["work", "m", "--config", _write(tmp_path, "# nothing\n")]) == 0
    assert seen == [Work(model="m")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "zorb: red\n",
            "'zorb' is unknown; choose inner_suite, layers, loud, mix, mode, model, rate, revision, steps, suite",
        ),
        ("step: 3\n", "'step' is unknown (did you mean steps?)"),
        ("config: other.yaml\n", "'config' is unknown"),
        ("inner: {zorb: red}\n", "'inner.zorb' is unknown; choose mix, rate, revision, suites"),
        ("inner: 3\n", "inner is not a mapping of settings"),
        ("- 1\n- 2\n", "is not a mapping of settings"),
        ("a: [1\n", "is not YAML"),
        ("steps: many\n", "'--steps'"),
        ("steps: 0\n", "--steps 0 must be a whole number of at least 1; see exitsafe work --help"),
        ("rate: -1\n", "--rate -1.0 must be a number above 0; see exitsafe work --help"),
        ("suites: [a]\n", "'suites' is ambiguous; write suite or inner_suite"),
        ("revision: 1.10\n", "revision is text; write it in quotes"),
        ("revision: 0012345\n", "revision is text; write it in quotes"),
        ("steps: true\n", "Invalid value for '--steps'"),
        ("inner: {mix: {harmful: true, vqa: x}}\n", " must be text, each with a number"),
        ("mode: odd\n", "mode=odd must be slow or fast; see exitsafe work --help"),
    ],
)
def test_what_is_refused_in_one_line(seen: Seen, tmp_path: Path, fail: Any, text: str, reason: str) -> None:
    assert reason in fail("work", "m", "--config", _write(tmp_path, text))
    assert seen == []


def test_a_missing_file_and_a_value_that_is_not_yaml(seen: Seen, fail: Any) -> None:
    assert "nowhere.yaml cannot be read" in fail("work", "m", "--config", "nowhere.yaml")
    assert "--config mode=[ cannot be read (it is not YAML" in fail("work", "m", "--config", "mode=[")


@pytest.mark.parametrize("revision", ["1.10", "12345e7", "0012345", "1_000", "12:30", "2024-01-31", "on", "a" * 300])
def test_text_is_taken_as_it_is_written(seen: Seen, revision: str) -> None:
    assert run(["work", "m", "--config", f"revision={revision}"]) == 0
    assert run(["work", "m", "--config", f"revision='{revision}'"]) == 0
    assert [spec.inner.revision for spec in seen] == [revision, revision]


def test_one_value_is_a_list_and_numbers_may_stand_inside(seen: Seen) -> None:
    assert run(["work", "m", "--config", "inner_suite=a", "--config", "mix={harmful: 1e-1}"]) == 0
    assert seen[0].inner == Inner(suites=("a",), mix={"harmful": 0.1})


def test_true_is_not_a_number_and_long_values_are_cut() -> None:
    with pytest.raises(InputError, match="--steps True must be a whole number of at least 1"):
        Work(model="m", num_steps=True)
    with pytest.raises(InputError, match=r"^mode=z{77}\.\.\. must be slow or fast$"):
        Work(model="m", mode="z" * 1000)  # type: ignore[arg-type]


def test_every_command_has_unambiguous_keys() -> None:
    for spec in vars(verbs).values():
        if isinstance(spec, type) and issubclass(spec, Spec) and spec is not Spec:
            settings = settings_of(spec)
            assert len({setting.path for setting in settings.values()}) == len(settings)
    with pytest.raises(InputError, match="'suites' is ambiguous; write suite or eval_suite"):
        read_config(AlignSpec, "suites=[a]")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"out": "x"}, "MODEL is missing"),
        ({"model": "organism", "out": "x", "lppo": 3}, ""),
        (
            {"model": "organism", "out": "x", "samples": {"limit": 10**30}},
            "--limit 1000000000000000000000000000000 must",
        ),
    ],
)
def test_what_python_gives_is_refused_in_one_line_too(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=re.escape(reason)):
        AlignSpec(**values)
