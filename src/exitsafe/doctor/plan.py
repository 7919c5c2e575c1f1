"""Memory plans: what an audit or an L-PPO run will hold on the device and on the host, part by part, in bytes.

Weights, LoRA, optimiser, cache and features follow from shapes and types exactly. Activations are counted by running
the policy's own code on shapes and adding up what it keeps for the backward pass. What is left out: the CUDA context,
the allocator's rounding and the kernels' workspaces; a plan that fills more than `COMFORTABLE` of a device is tight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from exitsafe.doctor.blueprint import META, Blueprint, weights_of
from exitsafe.doctor.prompts import Typical
from exitsafe.lppo import LPPOConfig
from exitsafe.lppo.features import ENCODER_BATCH
from exitsafe.lppo.policy import Policy, attached_policy, pack_size
from exitsafe.lppo.update import Learner
from exitsafe.vlm import Row
from exitsafe.vlm.answering import BATCHES_AT_ONCE, FEATURE_BYTES
from exitsafe.vlm.memory import MOST_ROWS, SHARE, ImageStates, cache_bytes, row_bytes
from exitsafe.vlm.prompts import Prompt

COMFORTABLE = 0.9


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing that takes memory; `always` unless it is there in a phase alone."""

    name: str
    bytes: int
    phase: str = "always"
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parts on the device, and on the host; and what of it decides whether it fits."""

    device: tuple[Part, ...]
    host: tuple[Part, ...]
    cache_per_row: int
    """Key-value cache of one row at its full length."""
    rows: int
    """Under generation at a time."""
    rows_that_fit: int | None
    """With the free memory; None if that is not known."""
    free: int | None
    """Bytes free on the device."""
    is_host: bool = False
    """The device is the host, so that both kinds of parts lie in one memory."""

    @property
    def always(self) -> int:
        return sum(part.bytes for part in self.device if part.phase == "always")

    @property
    def peak(self) -> int:
        """Of the phase that takes most; phases follow one another."""
        phases = {part.phase for part in self.device} - {"always"}
        by_phase = [sum(part.bytes for part in self.device if part.phase == phase) for phase in phases]
        beside = sum(part.bytes for part in self.host) if self.is_host else 0
        return self.always + beside + max(by_phase, default=0)

    @property
    def fits(self) -> bool | None:
        return None if self.free is None else self.peak <= COMFORTABLE * self.free


def audit_plan(
    blueprint: Blueprint,
    typical: Typical,
    *,
    exit_layers: Sequence[int],
    max_new_tokens: int,
    batch_size: int | None = None,
    judge_bytes: int = 0,
    adapter_bytes: int = 0,
    free: int | None = None,
    is_host: bool = False,
) -> Plan:
    """What an audit holds on its device.

    Args:
        blueprint: The model.
        typical: Its largest prompt.
        exit_layers: Exits to be audited.
        max_new_tokens: Longest answer.
        batch_size: Rows under generation at a time; None takes what fits, as the audit does.
        judge_bytes: Weights of judges beside the model.
        adapter_bytes: Weights of the adapter that is audited.
        free: Bytes free on the device.
        is_host: Whether the device is the host.
    """
    always = [*_weights(blueprint)]
    if adapter_bytes:
        always.append(Part(name="adapter", bytes=adapter_bytes, note="as saved"))
    if judge_bytes:
        always.append(Part(name="judge beside", bytes=judge_bytes, note="weights alone"))
    num_tokens = typical.num_prompt_tokens + max_new_tokens
    per_row = _row(blueprint, typical, num_tokens)
    fitting = _rows_that_fit(free, sum(part.bytes for part in always), per_row)
    rows = batch_size or fitting or MOST_ROWS
    device = (
        *always,
        *_encoding(blueprint, typical, exit_layers),
        Part(
            name="rows under generation",
            bytes=rows * per_row,
            phase="answering",
            note=f"{rows} rows of up to {num_tokens} tokens",
        ),
        Part(name="features of waiting rows", bytes=_waiting(typical, rows, free), phase="answering"),
    )
    return Plan(
        device=device,
        host=(),
        cache_per_row=_cache(blueprint, typical, num_tokens),
        rows=rows,
        rows_that_fit=fitting,
        free=free,
        is_host=is_host,
    )


def align_plan(
    blueprint: Blueprint,
    typical: Typical,
    *,
    exit_layers: Sequence[int],
    num_samples: int,
    config: LPPOConfig,
    reward_bytes: int = 0,
    watch_bytes: int | None = None,
    free: int | None = None,
    is_host: bool = False,
) -> Plan:
    """What L-PPO holds. The reference is the model with its adapter off: no second copy.

    Args:
        blueprint: The model.
        typical: Its largest prompt.
        exit_layers: Exits that are trained; with an adapter each, one run and its features after another.
        num_samples: To train on; their features are kept if they fit.
        config: The run's.
        reward_bytes: Weights of the reward's models, which stay loaded.
        watch_bytes: Weights of the watch's judge, which is loaded for each look; None without a watch.
        free: Bytes free on the device.
        is_host: Whether the device is the host.

    Raises:
        InputError: If the model cannot be trained so.
    """
    if config.adapters == "per-layer":
        exit_layers = (max(exit_layers),)  # whose encoder pass is the longest
    weights = list(_weights(blueprint))
    num_tokens = typical.num_prompt_tokens + config.max_new_tokens
    per_row = _row(blueprint, typical, num_tokens)
    with attached_policy(blueprint, config) as policy:
        learner = Learner(policy, config)
        adapter = sum(weight.nbytes for weight in learner.weights)
        trained = [*learner.weights, *learner.head_weights]
        head = sum(weight.nbytes for weight in learner.head_weights)
        passes = _Passes.count(policy, typical, config)
    always = [
        *weights,
        Part(name="trained weights", bytes=adapter, note="LoRA, float32" if config.train == "lora" else "a copy"),
        Part(name="value head", bytes=head),
        Part(name="optimiser", bytes=optimizer_bytes(trained), note="AdamW: two float32 moments a weight"),
    ]
    if reward_bytes:
        always.append(Part(name="reward models", bytes=reward_bytes, note="weights alone"))
    update = [Part(name="gradients", bytes=adapter + head), *passes.parts(config, blueprint)]
    fitting = _rows_that_fit(free, sum(part.bytes for part in always), per_row)
    rows = min(config.rollout_batch_size, config.batch_size)
    device = (
        *always,
        *_encoding(blueprint, typical, exit_layers),
        Part(
            name="rows under generation",
            bytes=rows * per_row,
            phase="rollout",
            note=f"{rows} rows of up to {num_tokens} tokens",
        ),
        *(replace(part, phase="update") for part in update),
    )
    kept = adapter + head + optimizer_bytes(trained)
    host = [_features(typical, exit_layers, num_samples, config)]
    if watch_bytes is not None:
        device += (Part(name="the watch's judge", bytes=watch_bytes, phase="look", note="weights alone"),)
        host.append(Part(name="best weights", bytes=adapter, note="of the watch"))
        kept += adapter
    host.append(Part(name="checkpoint", bytes=2 * kept, note="while it is written"))
    return Plan(
        device=device,
        host=tuple(host),
        cache_per_row=_cache(blueprint, typical, num_tokens),
        rows=rows,
        rows_that_fit=fitting,
        free=free,
        is_host=is_host,
    )


def optimizer_bytes(weights: Sequence[Tensor]) -> int:
    """AdamW's state: two moments of a weight's shape and type, and a step count of four bytes, per tensor."""
    return sum(2 * weight.nbytes + 4 for weight in weights)


@contextmanager
def keeping_count(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Gives the distinct tensors that the passes inside keep for backward, the model's own weights aside."""
    kept: dict[int, Tensor] = {}
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """What one pass of the update keeps for backward, in bytes, with and without gradient checkpointing."""

    num_rows: int
    num_sequences: int
    whole: int
    recomputed: int
    logits: int

    @classmethod
    def count(cls, policy: Policy, typical: Typical, config: LPPOConfig) -> _Passes:
        """Run the policy's own code on shapes, both ways."""
        blueprint = policy.vlm
        assert isinstance(blueprint, Blueprint)
        num_rows, num_sequences = _microbatch(blueprint, typical, config)
        blueprint.num_prompt_tokens = typical.num_prompt_tokens
        blueprint.image_states = typical.image_states
        found = {}
        for policy.gradient_checkpointing in (False, True):
            found[policy.gradient_checkpointing] = _kept_for_backward(policy, num_rows, config.max_new_tokens)
        (whole, logits), (recomputed, _) = found[False], found[True]
        return cls(num_rows=num_rows, num_sequences=num_sequences, whole=whole, recomputed=recomputed, logits=logits)

    def parts(self, config: LPPOConfig, blueprint: Blueprint) -> Iterator[Part]:
        """As parts of a plan."""
        block = (self.whole - self.recomputed) // blueprint.text_config.num_hidden_layers
        size = f"{self.num_rows} responses in {self.num_sequences} sequences a pass"
        if config.gradient_checkpointing:
            kept, other = self.recomputed + block, f"{_readable(self.whole)} without gradient_checkpointing"
        else:
            kept, other = self.whole, f"{_readable(self.recomputed + block)} with gradient_checkpointing"
        yield Part(name="activations", bytes=kept, note=f"{size}; {other}")
        yield Part(name="logits", bytes=self.logits, note="float32, at response tokens alone")
        # the gradients of the log-probabilities and of the logits they come from
        token = 4 * int(blueprint.base_model.lm_head.out_features)
        yield Part(name="gradient of the logits", bytes=2 * self.num_rows * config.max_new_tokens * token)


def _kept_for_backward(policy: Policy, num_rows: int, num_tokens: int) -> tuple[int, int]:
    """Bytes of activations, and of logits."""
    prompt = Prompt(sample_id="", input_ids=torch.empty(0), image_inputs={})
    rows = [Row(prompt=prompt, exit_layer=policy.vlm.default_exit, features=None)] * num_rows
    with keeping_count(policy.vlm.model) as kept:
        policy.evaluate(rows, [torch.empty(num_tokens, dtype=torch.long, device=META)] * num_rows)
    vocabulary = policy.vlm.base_model.lm_head.out_features
    sizes = [(tensor.shape[-1:] == (vocabulary,), tensor.untyped_storage().nbytes()) for tensor in kept.values()]
    logits = sum(size for is_logits, size in sizes if is_logits)
    return sum(size for _, size in sizes) - logits, logits


def _microbatch(blueprint: Blueprint, typical: Typical, config: LPPOConfig) -> tuple[int, int]:
    """Responses and sequences of a forward pass of the update, all at full length."""
    group = pack_size(blueprint, config)
    room = max(1, (config.microbatch_tokens - typical.num_prompt_tokens) // config.max_new_tokens)
    group = min(group, room)  # a longer group is cut
    length = typical.num_prompt_tokens + group * config.max_new_tokens
    most = -(-config.minibatch_size // group)
    num_sequences = max(1, min(most, config.microbatch_tokens // length))
    return group * num_sequences, num_sequences


def _weights(blueprint: Blueprint) -> Iterator[Part]:
    weights = weights_of(blueprint)
    dtype = str(blueprint.base_model.dtype).removeprefix("torch.")
    yield Part(name="image encoder", bytes=weights.encoder, note=dtype)
    yield Part(name="language model", bytes=weights.language_model, note=blueprint.quantization or dtype)
    yield Part(name="projector and head", bytes=weights.rest, note=dtype)


def _encoding(blueprint: Blueprint, typical: Typical, exit_layers: Sequence[int]) -> Iterator[Part]:
    """An encoder pass that gives all exits keeps every block's output, and the features of every exit."""
    if not typical.image_inputs:
        return
    outputs: list[int] = []
    blocks = blueprint.family_row.encoder_blocks(blueprint.base_model)[: max(exit_layers)]
    hooks = [block.register_forward_hook(lambda *call: outputs.append(call[2].nbytes)) for block in blocks]
    try:
        with torch.no_grad():
            blueprint.family_row.features(blueprint.base_model, typical.image_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    per_picture = sum(outputs) + len(exit_layers) * typical.feature_bytes
    note = f"{ENCODER_BATCH} prompts, {len(exit_layers)} exits"
    yield Part(name="encoder pass", bytes=ENCODER_BATCH * per_picture, phase="encoding", note=note)


def _features(typical: Typical, exit_layers: Sequence[int], num_samples: int, config: LPPOConfig) -> Part:
    size = num_samples * (len(exit_layers) * typical.feature_bytes + typical.input_bytes)
    if size <= config.feature_cache_gb * 1e9:
        return Part(name="feature cache", bytes=size, note=f"{num_samples} samples x {len(exit_layers)} exits, once")
    if size <= config.feature_disk_gb * 1e9:
        return Part(name="feature cache", bytes=0, note=f"{size / 1e9:.1f} GB on disk (feature_disk_gb)")
    note = f"all would take {size / 1e9:.1f} GB, more than feature_cache_gb: computed again in every step"
    return Part(name="feature cache", bytes=0, note=note)


def _waiting(typical: Typical, rows: int, free: int | None) -> int:
    """Features of the rows that an audit has encoded and not yet answered."""
    most = FEATURE_BYTES if free is None else min(FEATURE_BYTES, free // 4)
    return min(most, BATCHES_AT_ONCE * rows * typical.feature_bytes)


def _cache(blueprint: Blueprint, typical: Typical, num_tokens: int) -> int:
    """Bytes of a row's cache."""
    dtype, images = blueprint.base_model.dtype, _images(blueprint, typical)
    return cache_bytes(blueprint.text_config, num_tokens=num_tokens, dtype=dtype, images=images)


def _row(blueprint: Blueprint, typical: Typical, num_tokens: int) -> int:
    """Bytes of a row under generation."""
    dtype, images = blueprint.base_model.dtype, _images(blueprint, typical)
    return row_bytes(blueprint.text_config, num_tokens=num_tokens, dtype=dtype, images=images)


def _images(blueprint: Blueprint, typical: Typical) -> ImageStates:
    return ImageStates(
        num_layers=len(blueprint.family_row.image_cache_layers(blueprint.text_config)),
        per_row=0 if typical.image_states is None else typical.image_states.shape[1],
    )


def _rows_that_fit(free: int | None, taken: int, per_row: int) -> int | None:
    """As `exitsafe.vlm.memory.rows_that_fit` will find it once the weights are there; 0 if they do not fit."""
    if free is None:
        return None
    left = free - taken
    return 0 if left <= 0 else int(max(1, min(MOST_ROWS, SHARE * left // per_row)))


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
