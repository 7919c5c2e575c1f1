"""costs.json of a run: what its exits cost and save, and where that was measured. Numbers, no text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from exitsafe.engine.latency import Latency
from exitsafe.errors import RunError
from exitsafe.results.run import AuditRun
from exitsafe.store.files import write_whole
from exitsafe.untrusted import JsonObject, UnreadableError, read_json

NAME = "costs.json"
Positive = Annotated[int, Field(ge=1, le=2**62)]
Natural = Annotated[int, Field(ge=0, le=2**62)]
Short = Annotated[str, Field(max_length=200)]


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Floating-point operations of one prompt and its answer, and bytes."""

    default_encoder: Positive
    """Operations for the untouched model's image features, including the projector."""
    encoder: Mapping[int, Natural]
    """The same by exit layer."""
    prefill: Positive
    """Operations of the language model over the prompt."""
    answer: Positive
    """Operations of the language model over the answer."""
    num_answer_tokens: Annotated[int, Field(ge=1, le=2**31)]
    dropped_bytes: Mapping[int, Natural]
    """By exit layer: weights of the blocks that an export at that exit drops."""
    model_bytes: Positive
    """Bytes of all weights."""
    is_measured: bool
    """Whether the prompt is the largest of given samples; otherwise one picture and a text are assumed."""

    @property
    def encoder_share(self) -> float:
        """The encoder's share of encoder and prefill: the most that an early exit can save before the first token."""
        return self.default_encoder / (self.default_encoder + self.prefill)

    def saved(self, exit_layer: int) -> int:
        """Operations that the exit saves compared with the default exit; negative for deeper exits."""
        return self.default_encoder - self.encoder[exit_layer]

    def saved_share(self, exit_layer: int) -> float:
        """The share of the operations for a whole answer at the default exit that the exit saves."""
        return self.saved(exit_layer) / (self.default_encoder + self.prefill + self.answer)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the exits of a run cost on one machine.

    Args:
        audited: The model, exits and `skip_global` of the run.
        machine: What may affect speed; see `describe_machine`.
        latency: Measured times.
        savings: Counted operations and bytes.
    """

    format: Annotated[int, Field(ge=1, le=1)] = 1
    audited: JsonObject
    machine: dict[str, Short | int | None]
    latency: Latency
    savings: Savings


_COSTS = TypeAdapter(Costs)


def read_costs(run: AuditRun) -> Costs | None:
    """What was measured for this run; None if nothing was.

    Raises:
        RunError: If the file cannot be read or belongs to another run.
    """
    path = run.path / NAME
    if not path.exists():
        return None
    try:
        costs = _COSTS.validate_python(read_json(path))
        passes = [costs.latency.default, *costs.latency.exits.values()]
        exits = [set(found) for found in (costs.latency.exits, costs.savings.encoder, costs.savings.dropped_bytes)]
        if costs.audited != audited_in(run) or any(found != set(run.exit_layers) for found in exits):
            raise RunError(f"{path} is of another model or other exits; remove it or add --time to measure again")
        if not passes[0] or any(len(each) != len(passes[0]) for each in passes):
            raise UnreadableError("times are missing")
    except (UnreadableError, ValidationError) as error:
        reason = "it is not in this version's format" if isinstance(error, ValidationError) else error
        raise RunError(f"{path} cannot be read ({reason}); remove it or add --time to measure again") from error
    return costs


def write_costs(run: AuditRun, costs: Costs) -> None:
    """Save what was measured in place of an earlier measurement."""
    write_whole(run.path / NAME, _COSTS.dump_json(costs, indent=1) + b"\n")


def audited_in(run: AuditRun) -> JsonObject:
    """What decides the costs of a run's exits, the machine aside."""
    return {name: run.settings[name] for name in ("model", "exit_layers", "skip_global")}
