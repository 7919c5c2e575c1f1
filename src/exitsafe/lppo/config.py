"""Every constant of L-PPO in one frozen record, each with its reason. Knows nothing about models or tensors.

The defaults suit LoRA on a 7B model; `LPPOConfig.for_organism()` holds those of the built-in organism.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from exitsafe.errors import InputError
from exitsafe.records import KINDS, Kind


@dataclass(frozen=True, kw_only=True)
class LPPOConfig:
    """Settings of `align`. Sources: StackLLaMA (LoRA PPO on a 7B model, 2023), TRL's PPO (1.12), Ziegler et al.
    2019 (arXiv 1909.08593), Schulman et al. 2017 (arXiv 1707.06347), and the built-in organism, where measured.

    Raises:
        InputError: On a value outside its range; the message names the range.
    """

    # What is optimised
    algorithm: Literal["ppo", "grpo"] = "ppo"
    """`ppo` learns a baseline (the paper); `grpo` takes the mean of an answer's group for one, trains no value head and
    puts the KL penalty into the loss (Shao et al. 2024, arXiv 2402.03300). What a value head needs is then unused."""
    scale_by_deviation: bool = False
    """Divides GRPO's advantages by the deviation of the group's scores, as Shao et al. do. Off, as Liu et al. 2025
    (Dr. GRPO, arXiv 2503.20783) advise: groups that nearly agree are not blown up, and `kl_coef` keeps its unit."""

    # What is trained, and on which exits
    exit_layers: str | tuple[int, ...] = "all"
    """Exits that samples are drawn at, uniformly: "all", "default", layers, or text such as "1-8,16". The guarantee of
    L-PPO ends with this list."""
    include_default: bool = True
    """Adds the default exit to the list: repairing the others must not cost the one that everybody uses. Unused where
    each exit has its own adapter."""
    adapters: Literal["shared", "per-layer"] = "shared"
    """`shared` trains one adapter at all exits (the paper). `per-layer` trains one for each exit named, in a run of its
    own with all these settings: no exit can cost another, and none helps another, for as many times the steps."""
    layer_sampler: Literal["uniform", "weighted", "worst-first"] = "uniform"
    """How exits are drawn. `uniform` (the paper); `weighted` by `layer_weights`; `worst-first` in proportion to each
    exit's running attack success in the rollouts or, if no judge says that, to how far its score is below the best."""
    layer_weights: Mapping[int, float] | None = None
    """For `weighted`: how often an exit is drawn, relative to the exits not named here, which weigh 1."""
    layer_floor: float = 0.25
    """For `worst-first`: the share of draws spread evenly, so that a repaired exit is still watched."""
    layer_half_life: float = 10.0
    """For `worst-first`: steps after which an answer counts half: with 24 exits and 64 answers a step, about
    40 answers stand behind an exit's mean."""
    default_share: float = 0.0
    """The default exit gets at least this share of each batch, so that it cannot regress unseen; 0: as drawn."""
    train: Literal["lora", "full"] = "lora"
    """`full` trains a copy of the whole language model and is for tiny ones: every weight is kept twice."""
    lora_rank: int = 16
    """StackLLaMA's rank for a 7B model. Unused by `full`."""
    lora_alpha: int = 32
    """StackLLaMA's: twice the rank. Unused by `full`."""
    seed: int = 0
    """Keys every draw: samples, exits, rollouts, minibatches, LoRA's initial weights."""

    # How much
    num_steps: int = 400
    """About a dozen passes over 2,000 red-team prompts at 64 a step."""
    batch_size: int = 64
    """Responses per step; with several exits in a batch, a few per exit and kind."""
    group_size: int = 1
    """Responses to each drawn sample and exit, side by side in the batch (GRPO's G); 1 sees the most samples."""
    minibatch_size: int = 32
    """Responses per optimiser step: two updates an epoch, as measured on the organism."""
    num_epochs: int = 2
    """Passes over a batch. TRL does 4; 2 halve the cost, and were enough on the organism."""
    microbatch_tokens: int = 4096
    """Padded prompt and response tokens per forward pass: bounds memory, changes no result but rounding."""
    gradient_checkpointing: bool = False
    """Recomputes the blocks' activations in the backward pass (Chen et al. 2016, arXiv 1604.06174): far less memory for
    half as much update time more, no other result; `exitsafe doctor` says whether it is needed."""
    mix: Mapping[Kind, float] | None = None
    """Share of each kind in a batch; None takes the shares of the samples given."""
    value_warmup_steps: int = 5
    """First steps train the value head alone: an untrained head's advantages are noise (organism)."""

    # Rollouts
    max_new_tokens: int = 256
    """As in audits: the policy is trained on answers as long as those it is judged by. Every token is processed
    3 + num_epochs times."""
    temperature: float = 1.0
    """Sampling temperature; scoring divides by it too, so that what is sampled is what is scored."""
    rollout_batch_size: int = 32
    """Rows generated side by side; changes no draw."""
    feature_cache_gb: float = 8.0
    """If the image features of all samples fit, they are computed once for the run, else once per step."""
    feature_disk_gb: float = 0.0
    """Room for them in a temporary file in the run's folder, where memory does not suffice. Off: a LLaVA's encoder
    computes them about as fast as a disk reads them; Llama 3.2 Vision's needs 50 times the arithmetic."""

    # Reward
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of an answer cut at `max_new_tokens`. Off, as in TRL: a correct but truncated answer
    would score below any short one, which teaches brevity. Set it if `num_cut` rises under a reward that favours
    length."""
    min_answer_tokens: int = 0
    """Answers of fewer tokens, the end included, are short; picture questions may be. Off: "no" can be a right answer.
    4 catches most one-word answers."""
    short_answer_penalty: float = 1.0
    """Taken from the score of a short answer; as for a missing end."""
    incoherence_penalty: float = 1.0
    """Taken from the score of an answer that is empty, no text or going in circles (`judges/coherence.py`), which
    reward models and proxies may take for a good one. On: the check seldom errs on prose."""
    score_clip: float | None = 5.0
    """Scores are clipped to +-this: five standard deviations if they are normalised. None does not clip."""
    calibration_samples: int | None = None
    """Scores are shifted and scaled to mean 0, deviation 1 over this many answers of the untrained model (Ziegler et
    al.), each part of a sum by itself. None calibrates only parts that are reward models, whose scale is unknown, with
    64 answers; a number calibrates all parts; 0 calibrates none."""
    whiten_rewards: bool = False
    """Scales token rewards to variance 1 and keeps their mean (TRL, off there too)."""
    kl_coef: float = 0.05
    """First weight of the KL penalty per token (TRL)."""
    kl_target: float | None = 6.0
    """Nats per response that the adaptive coefficient holds (Ziegler et al., TRL); None keeps it fixed."""
    kl_horizon: int = 10
    """Steps in which a persistent error moves the coefficient by 20% (Ziegler et al.: 2% a step), so that it doubles
    within 35. It stays within a factor of 10 of `kl_coef`."""

    # Constraints
    constraints: Mapping[str, float] | None = None
    """Costs that may not exceed a limit, by Lagrange multipliers (Ray et al. 2019; Dai et al. 2023, arXiv 2310.12773).
    `over_refusal`: share of borderline and benign samples refused; `utility`: share of picture questions answered
    wrongly beyond the untrained model's. Such as {"over_refusal": 0.02, "utility": 0.05}."""
    constraint_rate: float = 1.0
    """Step of the dual ascent: ten steps with a cost 0.1 above its limit raise its multiplier by 1."""
    max_multiplier: float = 10.0
    """Multipliers stop here: a limit that cannot be kept leaves the score a weight of at least 1/11 (1/21 for two)."""
    constraint_samples: int = 1000
    """Answers of the untrained model that the utility limit is measured against: a standard error near 1.3 points."""

    # Advantages and losses
    gamma: float = 1.0
    """No discount: only the whole answer counts (TRL)."""
    lam: float = 0.95
    """GAE's lambda (Schulman et al., TRL)."""
    clip_range: float = 0.2
    """Schulman et al.'s epsilon."""
    value_clip_range: float = 0.2
    """As `clip_range` (TRL)."""
    value_coef: float = 0.1
    """Weight of the value loss against the policy loss (TRL); only matters if the two share weights."""
    detach_value: bool = True
    """The value loss stops at the head: with gradient into the policy, one organism run ended at ASR 100%."""
    max_ratio: float = 10.0
    """A minibatch whose mean ratio exceeds this is skipped and counted (TRL's `ratio_threshold`)."""

    # Optimisers
    learning_rate: float = 1.4e-5
    """AdamW on the policy (StackLLaMA)."""
    value_learning_rate: float = 1e-4
    """AdamW on the value head, one linear layer that starts at zero."""
    final_lr_fraction: float = 0.1
    """Both rates fall linearly to this share of themselves at the last step (organism)."""
    max_grad_norm: float = 1.0
    """Gradients of policy and head are each clipped to this norm."""

    # Checkpoints
    checkpoint_every: int = 20
    """Steps between checkpoints; an interrupted run goes on from the last one."""
    keep_checkpoints: int = 2
    """How many of the newest are kept, in case one is truncated."""
    save_completions: int = 0
    """How many answers to keep, with their scores, every `checkpoint_every` steps and at the last, in a file that only
    its owner can read: reading them reveals reward hacking. Off: no text is stored unless asked for."""

    @classmethod
    def for_organism(cls, **changes: Any) -> LPPOConfig:
        """The settings that repair the built-in organism in about two minutes on two cores."""
        settings: dict[str, Any] = {
            "train": "full",
            "num_steps": 80,
            "batch_size": 128,
            "minibatch_size": 64,
            "mix": {"harmful": 0.325, "borderline": 0.325, "benign": 0.15, "vqa": 0.2},
            "max_new_tokens": 24,
            "rollout_batch_size": 128,
            "missing_eos_penalty": 1.0,  # all answers of the world fit, so a truncated one is babble
            "incoherence_penalty": 0.0,  # the world's rule rewards no gibberish
            "learning_rate": 1.5e-4,
            "value_learning_rate": 1e-3,
        }
        return cls(**settings | changes)

    def __post_init__(self) -> None:
        if not isinstance(self.exit_layers, str):
            object.__setattr__(self, "exit_layers", tuple(self.exit_layers))
        for name in ("mix", "layer_weights", "constraints"):
            if (value := getattr(self, name)) is not None:
                if not isinstance(value, Mapping):
                    raise InputError(f"{name}={value!r} must hold names with numbers, or be none")
                object.__setattr__(self, name, dict(value))
        self._check_numbers()
        self._check_objective()
        self._check_layers()
        self._check_choices()

    def _check_objective(self) -> None:
        if self.algorithm not in ("ppo", "grpo"):
            raise InputError(f"algorithm={self.algorithm!r} is unknown; choose ppo or grpo")
        if self.algorithm == "grpo" and self.group_size < 2:
            raise InputError(
                "algorithm='grpo' compares the answers of a group: set group_size to at least 2, such as 4"
            )
        unused = {"ppo": "scale_by_deviation", "grpo": "whiten_rewards"}[self.algorithm]
        if getattr(self, unused):
            raise InputError(f"{unused} means nothing with algorithm={self.algorithm!r}: leave it out")
        if self.batch_size % self.group_size:
            raise InputError(f"batch_size={self.batch_size} is not a multiple of group_size={self.group_size}")
        for name, limit in (self.constraints or {}).items():
            if name not in CONSTRAINTS or not _is_number(limit) or not 0 <= limit < 1:
                raise InputError(
                    f"constraints has {name!r}: {limit!r}; give shares from 0 to below 1 for {', '.join(CONSTRAINTS)}"
                )

    def _check_layers(self) -> None:
        if not self.exit_layers:
            raise InputError('exit_layers is empty: give "all", "default" or at least one layer')
        if self.layer_sampler not in ("uniform", "weighted", "worst-first"):
            raise InputError(
                f"layer_sampler={self.layer_sampler!r} is unknown; choose uniform, weighted or worst-first"
            )
        if (self.layer_sampler == "weighted") != bool(self.layer_weights):
            raise InputError("layer_weights and layer_sampler='weighted' belong together: give both or neither")
        if self.adapters not in ("shared", "per-layer"):
            raise InputError(f"adapters={self.adapters!r} is unknown; choose shared or per-layer")
        for name, usual in (("layer_sampler", "uniform"), ("default_share", 0)):
            if self.adapters == "per-layer" and getattr(self, name) != usual:
                raise InputError(f"{name} means nothing with adapters='per-layer', one exit at a time: leave it out")
        for layer, weight in (self.layer_weights or {}).items():
            if not _is_whole(layer) or not _is_number(weight) or not 0 <= weight < math.inf:
                raise InputError(f"layer_weights has {layer!r}: {weight!r}; give exit layers weights of at least 0")

    def _check_choices(self) -> None:
        if self.train not in ("lora", "full"):
            raise InputError(f"train={self.train!r} is unknown; choose lora or full")
        for kind, share in (self.mix or {}).items():
            if kind not in KINDS or not share >= 0:
                raise InputError(f"mix has {kind!r}: {share}; give shares of at least 0 for {', '.join(KINDS)}")
        if self.mix is not None and not 0 < sum(self.mix.values()) < math.inf:
            raise InputError("mix has no kind with a share above 0")
        if self.minibatch_size > self.batch_size:
            raise InputError(f"minibatch_size={self.minibatch_size} exceeds batch_size={self.batch_size}")
        if self.algorithm == "ppo" and self.value_warmup_steps >= self.num_steps:
            raise InputError(
                f"value_warmup_steps={self.value_warmup_steps} leaves none of num_steps={self.num_steps} to the policy"
            )

    def _check_numbers(self) -> None:
        for name in _WHOLE_FROM_ONE:
            _check(self, name, "a whole number of at least 1", lambda x: _is_whole(x) and x >= 1)
        for name in ("value_warmup_steps", "min_answer_tokens", "save_completions", "seed"):
            _check(self, name, "a whole number of at least 0", lambda x: _is_whole(x) and x >= 0)
        if self.calibration_samples is not None:
            _check(self, "calibration_samples", "0, or a whole number of at least 2, or none", _can_calibrate)
        for name in _POSITIVE:
            _check(self, name, "a number above 0", lambda x: 0 < x < math.inf)
        for name in ("score_clip", "kl_target"):
            if getattr(self, name) is not None:
                _check(self, name, "a number above 0, or none", lambda x: 0 < x < math.inf)
        for name in (
            "missing_eos_penalty",
            "short_answer_penalty",
            "incoherence_penalty",
            "kl_coef",
            "value_coef",
            "feature_cache_gb",
            "feature_disk_gb",
        ):
            _check(self, name, "a number of at least 0", lambda x: 0 <= x < math.inf)
        for name in ("gamma", "lam", "final_lr_fraction", "default_share"):
            _check(self, name, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        _check(self, "layer_floor", "a number above 0, at most 1", lambda x: 0 < x <= 1)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r} must be true or false")


SIZES = (
    "microbatch_tokens", "gradient_checkpointing", "rollout_batch_size", "feature_cache_gb", "feature_disk_gb",
    "checkpoint_every", "keep_checkpoints", "save_completions",
)  # fmt: skip
"""Affect memory and disk, and results only by rounding: may change on resume, e.g. after running out of memory."""

CONSTRAINTS = ("over_refusal", "utility")
"""What can be constrained; `constraints.py` says how it is measured."""

_WHOLE_FROM_ONE = (
    "lora_rank", "lora_alpha", "num_steps", "batch_size", "group_size", "minibatch_size", "num_epochs",
    "microbatch_tokens", "max_new_tokens", "rollout_batch_size", "kl_horizon", "checkpoint_every", "keep_checkpoints",
    "constraint_samples",
)  # fmt: skip
_POSITIVE = (
    "temperature", "clip_range", "value_clip_range", "max_ratio", "learning_rate", "value_learning_rate",
    "max_grad_norm", "constraint_rate", "max_multiplier", "layer_half_life",
)  # fmt: skip
_FLAGS = ("include_default", "whiten_rewards", "detach_value", "scale_by_deviation", "gradient_checkpointing")


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _can_calibrate(x: Any) -> bool:
    """One answer has no standard deviation."""
    return _is_whole(x) and (x == 0 or x >= 2)


def _check(config: LPPOConfig, name: str, wanted: str, is_right: Any) -> None:
    value = getattr(config, name)
    if not _is_number(value) or not is_right(value):
        raise InputError(f"{name}={value!r} must be {wanted}")
