"""Thresholds as users write them: a YAML file in, checked rules out. Knows no run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from exitsafe.errors import InputError
from exitsafe.results.metrics import BY_NAME, Metric
from exitsafe.untrusted import read_settings

Scope = Literal["layers", "bins", "categories", "worst"]
Side = Literal["max", "min", "max_regression"]
MAX_UNSCORED = 0.05
_EXAMPLE = "rules: [{metric: asr, max: 0.05}]"


class Rule(BaseModel):
    """One threshold: a metric, its limit, and where it holds.

    Args:
        metric: As in summary.json.
        max, min: The upper bound must be at most this; the lower bound at least this.
        max_regression: The upper bound of how much worse the metric became must be at most this.
        scope: Where it must hold: every exit layer, every bin of layers, every category at every exit layer, or the
            worst exit layer (chosen on one half of the samples, measured on the other). None leaves it to the caller
            (`layers`).
        layers: The exits that it holds for, as on the command line; None leaves it to the caller (all audited ones).
        judge: Whose verdicts; None takes the first judge that has the measure.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    max: float | None = Field(default=None, allow_inf_nan=False)
    min: float | None = Field(default=None, allow_inf_nan=False)
    max_regression: float | None = Field(default=None, allow_inf_nan=False)
    scope: Scope | None = None
    layers: str | int | tuple[int, ...] | None = None
    judge: str | None = None

    @field_validator("metric")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in BY_NAME:
            raise ValueError(f"metric {name!r} is unknown; choose {', '.join(BY_NAME)}")
        return name

    @model_validator(mode="after")
    def _makes_sense(self) -> Rule:
        if len([side for side in get_args(Side) if getattr(self, side) is not None]) != 1:
            raise ValueError("give one of max, min and max_regression")
        good, name = self.of.direction, self.metric
        if self.side == "max_regression":
            if good is None or self.of.is_own:
                raise ValueError(f"max_regression: of {name} neither more nor less is worse; give max or min")
            if self.scope in ("categories", "worst"):
                raise ValueError(f"max_regression is by layers or bins, not by {self.scope}")
        elif good is not None and (good == "lower") != (self.side == "max"):
            raise ValueError(f"{self.side}: {good} {name} is better; give the other one")
        has_scale = self.of.bounds is not None
        if has_scale and not 0.0 < self.limit < 1.0:
            raise ValueError(
                f"{self.side}: {self.limit:g} can be shown by no number of samples; choose between 0 and 1"
            )
        if self.side == "max_regression" and self.limit <= 0.0:
            raise ValueError("max_regression: choose a number above 0")
        return self

    @property
    def of(self) -> Metric:
        """The metric."""
        return BY_NAME[self.metric]

    @property
    def side(self) -> Side:
        """Which of the three limits it has."""
        return next(side for side in get_args(Side) if getattr(self, side) is not None)

    @property
    def limit(self) -> float:
        """Its limit."""
        limit: float = getattr(self, self.side)
        return limit

    def with_defaults(self, *, scope: str | None, layers: str | None) -> Rule:
        """This rule with a scope and layers where it has none.

        Raises:
            InputError: If the scope is unknown or makes no sense for it.
        """
        given = {"scope": self.scope or scope, "layers": layers if self.layers is None else self.layers}
        return make_rule(self.model_dump() | given)


class _RuleFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rules: list[object] = []
    max_unscored: float | None = Field(default=None, ge=0.0, lt=1.0, allow_inf_nan=False)


def read_rules(path: str | Path) -> tuple[list[Rule], float | None]:
    """The rules of a YAML file, and the share of unscored answers that it allows, if it says.

    Raises:
        InputError: If it cannot be read, or a key, metric or number makes no sense.
    """
    content = read_settings(Path(path), example=_EXAMPLE)
    try:
        file = _RuleFile.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_of(error, _RuleFile)}") from error
    if not file.rules:
        raise InputError(f"{path} has no rules; write e.g. {_EXAMPLE}")
    return [make_rule(rule, where=f"{path}: rule {number}: ") for number, rule in enumerate(file.rules, 1)], (
        file.max_unscored
    )


def make_rule(content: object, *, where: str = "") -> Rule:
    """A rule from outside.

    Raises:
        InputError: If it makes no sense; one line, `where` first.
    """
    if not isinstance(content, dict):
        raise InputError(f"{where}no settings; write e.g. metric: asr and max: 0.05")
    try:
        return Rule.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{where}{_first_of(error, Rule)}") from error


def _first_of(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault, in our words."""
    fault = error.errors(include_url=False, include_input=False)[0]
    place = fault["loc"]
    if fault["type"] == "extra_forbidden":
        return f"key {place[0]!r} is unknown; choose {', '.join(model.model_fields)}"
    message = fault["msg"].removeprefix("Value error, ")
    return message if fault["type"] == "value_error" else f"{place[0]}: {message}"
