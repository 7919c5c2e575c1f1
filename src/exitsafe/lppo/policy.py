"""The policy, its frozen reference and its value head on one model.

The policy is the language model with a PEFT adapter, the reference the same model with the adapter off; encoder
and projector are frozen. All outputs are taken at the positions that predict response tokens, given the image
features of the row's exit layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from exitsafe.engine.generation import suppress_logits
from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError
from exitsafe.exits.adapters import NAME as ADAPTER
from exitsafe.lppo.config import LPPOConfig

_TUNED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
"""What PEFT puts in place of the modules that an adapter changes."""


@contextmanager
def attached_policy(vlm: VLM, config: LPPOConfig) -> Iterator[Policy]:
    """Put a fresh adapter on the language model, or train the one that it has; on leaving, everything is restored,
    torch's random state too.

    Raises:
        InputError: As `check_trainable`.
    """
    check_trainable(vlm, config)
    base = vlm.model
    requires_grad = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    was_training = {name: module.training for name, module in base.named_modules()}
    start: dict[str, Tensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if isinstance(base, PeftModel):
            base.requires_grad_(False)
            base.set_adapter(ADAPTER)  # its weights require gradients again
        else:
            vlm.model = get_peft_model(base, _adapter_config(vlm, config))
        try:
            base.eval()  # no dropout anywhere: old, new and reference log-probabilities must be of one function
            _keep_unpacked(base)
            policy = Policy(vlm, config)
            if vlm.model is base:
                start = {name: weight.detach().clone() for name, weight in policy.weights().items()}
                policy.start = start if config.reference == "start" else None
            yield policy
        finally:
            if vlm.model is base:
                policy.load_weights(start)
            else:
                _remove_adapter(vlm.model, base)
                vlm.model = base
            for name, parameter in base.named_parameters():
                parameter.requires_grad_(requires_grad[name])
            for name, module in base.named_modules():
                module.training = was_training[name]


@dataclass(frozen=True, kw_only=True)
class PolicyOutput:
    """The policy's outputs for responses, all `(B, T)` float32 and zero outside the mask."""

    logprobs: Tensor  # of the response tokens
    values: Tensor  # the value head's estimate before each token
    entropy: Tensor  # of the distribution each token was drawn from; without gradient
    mask: Tensor  # bool


class Policy:
    """The adapted model of a `VLM` with a linear value head. Made by `attached_policy`."""

    def __init__(self, vlm: VLM, config: LPPOConfig) -> None:
        self.vlm = vlm
        self.pack_size = pack_size(vlm, config)
        self.temperature = config.temperature
        self.start: Mapping[str, Tensor] | None = None  # the adapter's weights in the reference; None: it has none
        self.gradient_checkpointing = config.recomputes
        self.value_head = nn.Linear(vlm.text_config.hidden_size, 1, device=vlm.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def evaluate(self, rows: Sequence[Row], responses: Sequence[Tensor]) -> PolicyOutput:
        """Log-probabilities under the distribution that rollouts sample from, values and entropy.

        Args:
            rows: Prompts with the features of their exit layers. With `pack_size` above 1, adjacent equal rows share a
                sequence.
            responses: Token ids, `(length,)` each, at least one token.
        """
        with self._checkpointing():
            if self.pack_size == 1:
                hidden, tokens, mask = self.vlm.response_states(rows, responses)  # (B, T, H), (B, T), (B, T)
            else:
                hidden, tokens, mask = self.vlm.packed_response_states(rows, responses, group_size=self.pack_size)
        logits = suppress_logits(self.vlm.logits(hidden), self.vlm.special_token_ids) / self.temperature
        all_logprobs = logits.log_softmax(dim=-1)  # (B, T, V)
        logprobs = all_logprobs.gather(-1, tokens[..., None]).squeeze(-1)
        with torch.no_grad():
            entropy = torch.special.entr(all_logprobs.exp()).sum(dim=-1)
        # the value loss stops at the head: with gradient into the policy, one organism run ended at ASR 100%
        values = self.value_head(hidden.detach().float()).squeeze(-1)
        return PolicyOutput(
            logprobs=torch.where(mask, logprobs, 0.0),
            values=torch.where(mask, values, 0.0),
            entropy=torch.where(mask, entropy, 0.0),
            mask=mask,
        )

    def _checkpointing(self) -> AbstractContextManager[None]:
        is_wanted = self.gradient_checkpointing and torch.is_grad_enabled()
        return recomputed_blocks(self.vlm.base_model.get_decoder()) if is_wanted else nullcontext()

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the model is the one before training; with `reference: base`, the one without the adapter."""
        if self.start is not None:
            now = {name: weight.detach().clone() for name, weight in self.weights().items()}
            self.load_weights(self.start)
            try:
                yield
            finally:
                self.load_weights(now)
            return
        layers = self.vlm.model.base_model  # PEFT's `disable_adapter` also reads every module's state, three times
        layers.disable_adapter_layers()
        try:
            yield
        finally:
            layers.enable_adapter_layers()

    def weights(self) -> dict[str, Tensor]:
        """The adapter's weights by name: everything that the policy loss trains."""
        named: Iterator[tuple[str, Tensor]] = self.vlm.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights that `weights` returned.

        Raises:
            ModelError: If they are not the weights of this adapter, with the same shapes.
        """
        own = self.weights()
        if strange := sorted(
            name
            for name in own.keys() | weights.keys()
            if name not in own or name not in weights or own[name].shape != weights[name].shape
        ):
            raise ModelError(
                f"{len(strange)} weights of the checkpoint do not belong to this adapter ({strange[0]}, ...): train "
                "into a new folder"
            )
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder."""
        self.vlm.model.peft_config[ADAPTER].base_model_name_or_path = self.vlm.name
        # False: otherwise PEFT asks the Hub whether the vocabulary has grown.
        self.vlm.model.save_pretrained(str(folder), save_embedding_layers=False)


@contextmanager
def recomputed_blocks(language_model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing: passes inside keep only the blocks' inputs; the backward pass recomputes the rest.

    transformers' own switch acts only on models in training mode, where dropout is on.

    Args:
        language_model: Its blocks are the modules that transformers itself can checkpoint.
    """
    blocks = [module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert blocks and not any("forward" in block.__dict__ for block in blocks)
    for block in blocks:
        # not re-entrant: a block's input may have no gradient; no random state to preserve: there is no dropout
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        object.__setattr__(block, "forward", again)
    try:
        yield
    finally:
        for block in blocks:
            object.__delattr__(block, "forward")


def pack_size(vlm: VLM, config: LPPOConfig) -> int:
    """How many responses to one sample at one exit share a sequence: a whole group, if the attention supports it."""
    return config.group_size if vlm.can_pack else 1


def check_trainable(vlm: VLM, config: LPPOConfig) -> None:
    """Raise InputError if the model, or the adapter that it has, cannot be trained with these settings."""
    if isinstance(vlm.model, PeftModel):
        _check_adapter(vlm, vlm.model, config)
    if not vlm.eos_token_ids:
        raise InputError(
            f"{vlm.name} has no end-of-sequence token, so it cannot learn to end: set eos_token_id in its "
            "generation_config.json"
        )
    if vlm.base_model.dtype == torch.float16:  # gradients are not scaled here
        raise InputError(
            f"{vlm.name} has float16 weights, in which small gradients vanish: load with dtype='bfloat16' "
            "(--dtype bfloat16)"
        )
    if is_quantized(vlm.model):
        _check_quantized(vlm, config)
    kind = _kind_of(vlm.model) or config.train
    if kind == "lora":
        return
    if vlm.model.dtype != torch.float32:
        raise InputError(f"train='full' needs float32 weights, not {vlm.model.dtype}: load with dtype='float32'")
    if not isinstance(vlm.model, PeftModel) and vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight:
        raise InputError("train='full' cannot train a head tied to the embeddings: use train='lora'")


def _check_adapter(vlm: VLM, model: PeftModel, config: LPPOConfig) -> None:
    """Check that training can continue this adapter: it must leave the encoder alone, whose features are constants."""
    decoder, head = vlm.base_model.get_decoder(), vlm.base_model.get_output_embeddings()
    inside = {*decoder.modules(), head}
    for name, module in vlm.base_model.named_modules():
        if isinstance(module, _TUNED) and module not in inside:
            raise InputError(
                f"the adapter of {vlm.name} changes {name}, but align trains the language model only: merge the "
                "adapter first"
            )
    kind = _kind_of(model)
    if config.train not in (kind, LPPOConfig.for_model(vlm.name).train):
        raise InputError(f"train={config.train!r}, but the adapter to continue is of kind {kind!r}: leave train out")
    layers = [module for module in inside if isinstance(module, LoraLayer)]
    for name, found in (
        ("lora_rank", {rank for layer in layers for rank in layer.r.values()}),
        ("lora_alpha", {alpha for layer in layers for alpha in layer.lora_alpha.values()}),
    ):
        if found and (given := getattr(config, name)) not in found | {getattr(LPPOConfig(), name)}:
            raise InputError(
                f"{name}={given}, but the adapter to continue has {name.removeprefix('lora_')} {min(found)}: leave "
                f"{name} out"
            )


def _kind_of(model: nn.Module) -> str | None:
    """What an adapter trains, as in `LPPOConfig.train`; None without one."""
    if not isinstance(model, PeftModel):
        return None
    return "full" if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()) else "lora"


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes has replaced linear layers of a Hugging Face model.

    LoRA is trained on these as they are (QLoRA). PEFT's `prepare_model_for_kbit_training` would convert every other
    weight to float32, the frozen encoder too, and require gradients at the embeddings, which only re-entrant
    checkpointing needs.
    """
    return bool(getattr(model, "is_quantized", False))


def _check_quantized(vlm: VLM, config: LPPOConfig) -> None:
    if config.train == "full":
        raise InputError(
            f"train='full' cannot train quantised weights: load {vlm.name} unquantised, or use train='lora'"
        )
    states = (getattr(getattr(module, "weight", None), "quant_state", None) for module in vlm.model.modules())
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise InputError(
            f"{vlm.name} has already generated on this CPU, for which bitsandbytes repacked its 4-bit weights: "
            "gradients cannot flow through these, so load it again before training"
        )


def _keep_unpacked(model: nn.Module) -> None:
    """Keep 4-bit layers in training mode, so that a CPU does not repack them; they have no dropout."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True


def _adapter_config(vlm: VLM, config: LPPOConfig) -> LoraConfig:
    if config.train == "full":
        # PEFT requires a target for LoRA; this name of its own means none
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=_whole_language_model(vlm))
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=vlm.linear_layers,
    )


def _whole_language_model(vlm: VLM) -> list[str]:
    """The names of the language model's decoder and head."""
    wanted = (vlm.base_model.get_decoder(), vlm.base_model.get_output_embeddings())
    return [name for name, module in vlm.base_model.named_modules() if any(module is each for each in wanted)]


def _remove_adapter(adapted: PeftModel, base: nn.Module) -> None:
    """Undo `get_peft_model`. PEFT's own `unload` would leave the trained copies of whole modules in place."""
    for name, module in list(base.named_modules()):
        if isinstance(getattr(module, "original_module", None), nn.Module):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.original_module)
    adapted.unload()
