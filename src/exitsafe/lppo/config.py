"""Every setting of L-PPO in one frozen record, each with its range and its reason.

The defaults suit LoRA on a 7B model; `LPPOConfig.for_organism()` holds those of the built-in organism. What nobody
has a reason to change is a constant in the file that uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from exitsafe.errors import InputError
from exitsafe.records import Kind
from exitsafe.specs.inputs import DECODING, JUDGES, SAMPLES, ContinuedLoading, Count, Model, Samples
from exitsafe.specs.spec import Flag, Key, Spec, in_words
from exitsafe.specs.verbs import Out

T = TypeVar("T")
_ANSWER = Flag("Maximum answer length in tokens.", panel=DECODING, default="256; 24 for an organism")
Natural = Annotated[int, Field(ge=0, le=2**31)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Limit = Annotated[float, Field(ge=0, lt=1)]
Constraint = Literal["over_refusal", "utility"]
Method = Literal["lppo", "grpo", "sft"]
METHODS: Mapping[str, Mapping[str, Any]] = {"lppo": {}, "grpo": {"group_size": 4}, "sft": {"learning_rate": 1e-4}}
"""The defaults in which a method differs from `LPPOConfig`'s."""
UNUSED: Mapping[str, tuple[str, ...]] = {
    "lppo": ("refusal",),
    "grpo": ("refusal", "gamma", "lam", "value_learning_rate", "value_warmup_steps"),
    "sft": (
        "group_size", "num_epochs", "value_warmup_steps", "temperature", "reference", "missing_eos_penalty",
        "incoherence_penalty", "score_clip", "calibration_samples", "kl_coef", "kl_target", "constraints",
        "constraint_rate", "constraint_samples", "gamma", "lam", "clip_range", "clip_range_high",
        "value_learning_rate", "save_completions",
    ),
}  # fmt: skip
"""Settings that a method does not use."""
Layers = Annotated[
    str | tuple[int, ...],
    BeforeValidator(lambda layers: tuple(layers) if isinstance(layers, list | range) else layers),
    Field(min_length=1, description='"all", "default", at least one layer, or text such as "1-8,16"'),
]


def _one_line(cls: type[T]) -> type[T]:
    """Make the errors of a pydantic dataclass one line: field, value and allowed range.

    Raises:
        InputError: From the class, on a value outside its range.
    """
    initialise: Callable[..., None] = cls.__init__

    @wraps(initialise)
    def readable(self: T, **settings: Any) -> None:
        try:
            initialise(self, **settings)
        except ValidationError as error:
            raise InputError(_explain(cls, error, settings)) from None

    cls.__init__ = readable  # type: ignore[method-assign,assignment]
    return cls


@_one_line
@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class LPPOConfig:
    """Settings of `align`. Sources: StackLLaMA (LoRA PPO on a 7B model, 2023), TRL's PPO (1.12), Ziegler et al.
    2019 (arXiv 1909.08593), Schulman et al. 2017 (arXiv 1707.06347), and the built-in organism, where measured.

    Raises:
        InputError: On a value outside its range; the message names field, value and range.
    """

    # What is optimised
    method: Annotated[
        Method,
        Flag("Training method: lppo (PPO), grpo (no value head) or sft (fine-tuning on given answers).", "METHOD"),
    ] = "lppo"
    """`lppo` learns a baseline with a value head (the paper). `grpo` uses the mean score of an answer's group instead,
    has no value head, and puts the KL penalty into the loss (Shao et al. 2024, arXiv 2402.03300). `sft` learns from
    given answers by cross-entropy and needs no reward. `for_model` gives the defaults of each; a setting that a method
    does not use must be left at its default."""
    refusal: str | None = None
    """`sft`: the answer to harmful samples; None is "I'm sorry, but I can't help with that.", or the organism's own
    refusal. Other samples are answered with their first reference or, without one, as the untrained model does."""

    # What is trained, and on which exits
    exit_layers: Annotated[
        Layers,
        Flag(
            "all, or e.g. 1-8,16,23; the default exit is always trained too (include_default).",
            "LAYERS",
            name="layers",
            panel=SAMPLES,
            default="all",
        ),
    ] = "all"
    """Exits that samples are drawn at, uniformly: "all", "default", layers, or text such as "1-8,16". L-PPO promises
    nothing about other exits."""
    include_default: bool = True
    """Also train at the default exit: repairing the others must not cost the one that everybody uses."""
    train: Literal["lora", "full"] = "lora"
    """Which weights to train. `full` trains a copy of the whole language model and suits tiny models only."""
    lora_rank: Count = 16
    """StackLLaMA's rank for a 7B model. Unused by `full`."""
    lora_alpha: Count = 32
    """StackLLaMA's: twice the rank. Unused by `full`."""
    reference: Literal["start", "base"] = "start"
    """The model that the KL penalty keeps the policy close to when training continues an adapter: `start` is the model
    with that adapter, `base` the one without it. Without an adapter, both are the same."""
    seed: Annotated[Natural, Flag("Seed of every random draw.", panel=DECODING)] = 0
    """Keys every draw: samples, exits, rollouts, minibatches, LoRA's initial weights."""

    # How much
    num_steps: Annotated[Count, Flag("Training steps.", name="steps", default="400; 80 for an organism")] = 400
    """About a dozen passes over 2,000 red-team prompts at 64 a step."""
    batch_size: Annotated[Count, Flag("Answers per step.", default="64; 128 for an organism")] = 64
    """Responses per step; with several exits in a batch, a few per exit and kind."""
    group_size: Count = 1
    """Responses to each drawn sample and exit (GRPO's G). 1 covers the most samples; `for_model` gives `grpo` 4."""
    minibatch_size: Count = 32
    """Responses per optimiser step: two updates an epoch, as measured on the organism."""
    num_epochs: Count = 2
    """Passes over a batch. TRL does 4; 2 halve the cost, and were enough on the organism."""
    microbatch_tokens: Count = 4096
    """Padded prompt and response tokens per forward pass: bounds memory, changes results by rounding only. Halved when
    memory runs out."""
    gradient_checkpointing: bool | None = None
    """Recomputes the blocks' activations in the backward pass (Chen et al. 2016, arXiv 1604.06174): far less memory,
    updates take half as long again, same results. None recomputes with `lora` only: 7B models almost always need it."""
    mix: Mapping[Kind, NonNegative] | None = None
    """Share of each kind in a batch; None takes the shares of the samples given."""
    value_warmup_steps: Natural = 5
    """First steps train the value head alone: an untrained head's advantages are noise (organism)."""

    # Rollouts
    max_new_tokens: Annotated[Count, _ANSWER] = 256
    """As in audits: the policy is trained on answers as long as those it is judged by."""
    temperature: Positive = 1.0
    """Sampling temperature; scoring divides by it too, so that what is sampled is what is scored."""
    rollout_batch_size: Count = 32
    """Rows generated side by side; changes no draw. Halved when memory runs out."""
    feature_cache_gb: NonNegative | None = None
    """If the image features of all samples fit, they are computed once for the run, otherwise once per step. None is a
    quarter of the free main memory, 8 GB at most."""

    # Reward
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of an answer cut at `max_new_tokens`. Off, as in TRL: a correct but truncated answer
    would score below any short one, which teaches brevity. Set it if `num_cut` rises under a reward that favours
    length."""
    incoherence_penalty: NonNegative = 1.0
    """Subtracted from the score of an answer that is empty, no text or repeats itself (`judges/coherence.py`), which
    reward models and proxies may take for a good one."""
    score_clip: Positive | None = 5.0
    """Scores are clipped to +-this: five standard deviations if they are normalised. None does not clip."""
    calibration_samples: Annotated[int, Field(ge=2)] | Literal[0] | None = None
    """Scores are shifted and scaled to mean 0, deviation 1 over this many answers of the untrained model (Ziegler et
    al.), each part of a sum by itself. None calibrates only parts that are reward models, whose scale is unknown, with
    64 answers; a number calibrates all parts; 0 calibrates none."""
    kl_coef: NonNegative = 0.05
    """Initial weight of the KL penalty per token (TRL)."""
    kl_target: Positive | None = 6.0
    """Nats per response that the adaptive coefficient holds (Ziegler et al., TRL); None keeps it fixed."""

    # Constraints
    constraints: Mapping[Constraint, Limit] | None = None
    """Costs that may not exceed a limit, by Lagrange multipliers (Ray et al. 2019; Dai et al. 2023, arXiv 2310.12773).
    `over_refusal`: share of borderline and benign samples refused; `utility`: share of picture questions answered
    wrongly beyond the untrained model's. Such as {"over_refusal": 0.02, "utility": 0.05}."""
    constraint_rate: Positive = 1.0
    """Step of the dual ascent: ten steps with a cost 0.1 above its limit raise its multiplier by 1."""
    constraint_samples: Count = 1000
    """Answers of the untrained model that the utility limit is measured against: a standard error near 1.3 points."""

    # Advantages and losses
    gamma: Fraction = 1.0
    """No discount: only the whole answer counts (TRL)."""
    lam: Fraction = 0.95
    """GAE's lambda (Schulman et al., TRL)."""
    clip_range: Positive = 0.2
    """Schulman et al.'s epsilon."""
    clip_range_high: Positive | None = None
    """A separate upper bound for the clip, such as 0.28 (clip-higher, Yu et al. 2025, arXiv 2503.14476), so that rare
    tokens may gain more. None is `clip_range`."""

    # Optimisers
    learning_rate: Positive = 1.4e-5
    """AdamW on the policy (StackLLaMA). `for_model` gives `sft` 1e-4, usual for LoRA."""
    value_learning_rate: Positive = 1e-4
    """AdamW on the value head, one linear layer that starts at zero."""
    final_lr_fraction: Fraction = 0.1
    """Both rates fall linearly to this share of themselves at the last step (organism)."""
    max_grad_norm: Positive = 1.0
    """Gradients of policy and head are each clipped to this norm."""

    # Checkpoints
    checkpoint_every: Count = 20
    """Steps between checkpoints; an interrupted run resumes from the last one."""
    save_completions: Natural = 0
    """How many answers to keep, with their scores, every `checkpoint_every` steps and at the last, in a file that only
    its owner can read: reading them reveals reward hacking. Off: no text is stored unless asked for."""

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass recomputes activations."""
        return self.train == "lora" if self.gradient_checkpointing is None else self.gradient_checkpointing

    @classmethod
    def for_organism(cls, **changes: Any) -> LPPOConfig:
        """The settings that repair the built-in organism in about two minutes on two cores."""
        from exitsafe.world.profile import WORLD

        method = changes.get("method", "lppo")
        used = {name: value for name, value in WORLD.lppo.items() if name not in UNUSED.get(method, ())}
        return cls(**{**METHODS.get(method, {}), **used, **changes})

    @classmethod
    def for_model(cls, model: str, **changes: Any) -> LPPOConfig:
        """The model's usual settings with the changes.

        A small batch or a short run takes along what hangs on its size.
        """
        from exitsafe.world.profile import profile_of

        method = changes.get("method", "lppo")
        make = cls if profile_of(model) is None else cls.for_organism
        usual = make(**METHODS.get(method, {}), method=method)
        fitting = dict(METHODS.get(method, {})) if make is cls else {}
        if isinstance(batch_size := changes.get("batch_size"), int):
            fitting["minibatch_size"] = min(usual.minibatch_size, batch_size)
        if isinstance(num_steps := changes.get("num_steps"), int) and method == "lppo":
            fitting["value_warmup_steps"] = min(usual.value_warmup_steps, num_steps - 1)
        return make(**{**fitting, **changes})

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if changed := [name for name in UNUSED[self.method] if getattr(self, name) != _default(name)]:
            raise InputError(f"method={self.method!r} does not use {', '.join(changed)}: leave it out")
        if self.method == "grpo" and self.group_size < 2:
            raise InputError("method='grpo' compares the answers of a group: set group_size to at least 2, such as 4")
        if self.batch_size % self.group_size:
            raise InputError(f"batch_size={self.batch_size} is not a multiple of group_size={self.group_size}")
        if self.minibatch_size > self.batch_size:
            raise InputError(f"minibatch_size={self.minibatch_size} exceeds batch_size={self.batch_size}")
        if self.mix is not None and not any(self.mix.values()):
            raise InputError("mix has no kind with a share above 0")
        if self.method == "lppo" and self.value_warmup_steps >= self.num_steps:
            raise InputError(
                f"value_warmup_steps={self.value_warmup_steps} leaves none of num_steps={self.num_steps} to the policy"
            )
        return self


def _default(name: str) -> object:
    return next(field.default for field in dataclasses.fields(LPPOConfig) if field.name == name)


SIZES = (
    "microbatch_tokens", "gradient_checkpointing", "rollout_batch_size", "feature_cache_gb", "checkpoint_every",
    "save_completions",
)  # fmt: skip
"""Affect memory and disk, and results only by rounding: may change on resume, e.g. after running out of memory."""


class HeldOut(Spec):
    """How `exitsafe align` evaluates on held-out samples; `patience` 0 never ends the training early."""

    panel: ClassVar[str] = JUDGES

    every: Annotated[
        Natural | None,
        Flag(
            "Evaluate on held-out samples with another judge every N steps and keep the best adapter. 0: never.",
            name="eval-every",
            default="20 if the judge's model has been downloaded already, else 0",
        ),
    ] = None
    judge: Annotated[
        str | None,
        Flag(
            "Judge for held-out evaluations; must differ from the reward.",
            "JUDGE",
            name="eval-judge",
            default="qwen3guard, or harmbench if the reward uses it; refusal-prefix for an organism",
        ),
    ] = None
    suites: Annotated[
        tuple[str, ...], Key("Suites to evaluate on (a list); by default samples are held out.", "eval-suite")
    ] = ()
    num_samples: Annotated[
        Count | None,
        Key("Hold out N samples of each kind, at most a quarter; or use the first N of each suite.", "eval-samples"),
    ] = None
    patience: Annotated[
        Natural, Key("Stop after N evaluations without improvement; 0 never stops.", "eval-patience")
    ] = 5
    max_kl: Annotated[
        float | None, Key("Weights with a higher KL per response, in nats, do not become the adapter.", "eval-max-kl")
    ] = None

    @model_validator(mode="after")
    def _has_steps(self) -> Self:
        if self.every is None and self.model_fields_set:
            raise InputError("settings of the held-out evaluation need --eval-every N, the steps between evaluations")
        return self


class AlignSpec(Spec):
    """`exitsafe align`."""

    model: Model
    out: Out
    samples: Samples = Samples()
    rewards: Annotated[
        tuple[str, ...],
        Flag(
            "Judge that scores the answers, or built-in; built-in also scores what the judge does not measure. Not for "
            "sft. Repeatable; each may have a weight and a kind of sample, e.g. reward:hh@harmful=0.5. The score is "
            "the weighted sum.",
            "JUDGE[@KIND][=WEIGHT]",
            name="reward",
            panel=JUDGES,
            default="built-in: qwen3guard; for an organism, its world's rule",
        ),
    ] = ()
    evaluation: HeldOut = HeldOut()
    lppo: LPPOConfig = LPPOConfig()
    loading: ContinuedLoading = ContinuedLoading()
    track: Annotated[
        tuple[str, ...], Key("Also log each step's numbers to tensorboard (in DIR), trackio or wandb (a list).")
    ] = ()

    @model_validator(mode="before")
    @classmethod
    def _fits_the_model(cls, given: dict[str, Any]) -> dict[str, Any]:
        lppo = given.get("lppo", {})
        if "model" not in given or not isinstance(lppo, dict):
            return given
        layers = lppo.get("exit_layers", "all")  # a YAML list may hold ranges
        layers = ",".join(map(str, layers)) if isinstance(layers, list) else str(layers)
        return {**given, "lppo": LPPOConfig.for_model(given["model"], **{**lppo, "exit_layers": layers})}


def _explain(cls: type[Any], error: ValidationError, settings: Mapping[str, Any]) -> str:
    """The first fault in one line."""
    fault = error.errors()[0]
    if not fault["loc"]:
        return str(fault["ctx"]["error"])  # the line of a check over several fields
    name = str(fault["loc"][0])
    if name not in {field.name for field in dataclasses.fields(cls)}:
        return f"{cls.__name__} has no setting {name!r}"
    schema: dict[str, Any] = TypeAdapter(cls).json_schema()["properties"][name]
    return f"{name}={settings[name]!r} must be {in_words(schema)}"
