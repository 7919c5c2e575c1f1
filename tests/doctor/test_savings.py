"""What exits save: operations against the formulas of matrix products, bytes against models that lack the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from exitsafe.doctor import Blueprint, count_savings, load_blueprint, typical_prompt
from exitsafe.doctor.savings import _CPU_ATTENTION, NUM_ANSWER_TOKENS
from exitsafe.engine.load import load_vlm
from exitsafe.exits.encoder import run_encoder
from tests.tiny_models import save_tiny

LAYERS = (1, 3, 5, 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, path / family) for family in ("llava", "llava_next", "mllama")}


@pytest.fixture(scope="module")
def blueprints(folders: dict[str, Path]) -> dict[str, Blueprint]:
    return {family: load_blueprint(folder) for family, folder in folders.items()}


def bytes_of(model: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    return sum(tensor.nbytes for tensor in tensors.values())


def without_blocks(model: Any, exit_layer: int, *, skip_global: bool) -> Any:
    """A new model of the same class that was never given the blocks."""
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.vision_config.num_hidden_layers = exit_layer
    if config.model_type == "mllama":
        config.vision_config.intermediate_layers_indices = [
            min(index, exit_layer - 1) for index in model.config.vision_config.intermediate_layers_indices
        ]
        if skip_global:
            config.vision_config.num_global_layers = 0
    else:
        config.vision_feature_layer = -1
    return model.__class__(config).to(model.dtype)


@pytest.mark.parametrize(
    ("family", "skip_global"), [("llava", False), ("llava_next", False), ("mllama", False), ("mllama", True)]
)
def test_bytes_are_the_true_difference(
    folders: dict[str, Path], blueprints: dict[str, Blueprint], family: str, skip_global: bool
) -> None:
    blueprint = blueprints[family]
    savings = count_savings(blueprint, typical_prompt(blueprint), LAYERS, skip_global=skip_global)
    model = load_vlm(folders[family], device="cpu").model
    assert savings.model_bytes == bytes_of(model)
    for layer in LAYERS:
        smaller = bytes_of(without_blocks(model, layer, skip_global=skip_global))
        assert savings.dropped_bytes[layer] == bytes_of(model) - smaller
    assert (savings.dropped_bytes[6] > 0) == skip_global


def test_operations_by_hand(tmp_path: Path) -> None:
    """Two operations a weight and token, and attention over the square of the length."""
    blueprint = load_blueprint(save_tiny("llava", tmp_path))  # widths 32 and 48, 2 layers, heads 4 of 8, 2 shared
    typical = typical_prompt(blueprint)
    tokens = typical.num_prompt_tokens
    assert tokens == 4 + 64 + 3  # with the template's
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)

    def prefill(length: int) -> int:
        return 2 * (length * linear + 2 * 2 * length * length * 32)

    savings = count_savings(blueprint, typical, LAYERS)
    assert savings.prefill == prefill(tokens)
    assert savings.answer == prefill(tokens + NUM_ANSWER_TOKENS) - prefill(tokens)
    patches = 5  # 4 and the class token
    block = 2 * patches * (4 * 32 * 32 + 2 * 32 * 48) + 2 * 2 * patches * patches * 32
    projector = 2 * 4 * (32 * 32 + 32 * 32)
    embedding = 2 * 4 * (3 * 14 * 14) * 32
    assert savings.default_encoder == 5 * block + projector + embedding
    assert [savings.saved(layer) for layer in LAYERS] == [4 * block, 2 * block, 0, -block]
    both = savings.default_encoder + savings.prefill
    assert savings.encoder_share == pytest.approx(savings.default_encoder / both)
    assert savings.saved_share(1) == pytest.approx(4 * block / (both + savings.answer))


@pytest.mark.parametrize(("family", "skip_global"), [("llava_next", False), ("mllama", True)])
def test_every_exit_is_as_if_counted_by_itself(
    blueprints: dict[str, Blueprint], family: str, skip_global: bool
) -> None:
    blueprint = blueprints[family]
    typical = typical_prompt(blueprint)
    savings = count_savings(blueprint, typical, LAYERS, skip_global=skip_global)
    for layer in LAYERS:
        counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
        with counter, blueprint.exit_at(layer, skip_global=skip_global):
            run_encoder(blueprint.base_model, "image", typical.media)
        assert savings.encoder[layer] == counter.get_total_flops()


def test_global_blocks_are_operations_too(blueprints: dict[str, Blueprint]) -> None:
    blueprint = blueprints["mllama"]
    typical = typical_prompt(blueprint)
    kept, skipped = (count_savings(blueprint, typical, LAYERS, skip_global=skip) for skip in (False, True))
    assert kept.saved(6) == 0 < skipped.saved(6)
    assert {skipped.saved(layer) - kept.saved(layer) for layer in LAYERS} == {skipped.saved(6)}
    assert skipped.encoder_share == kept.encoder_share  # the default exit stays the untouched model


def test_a_longer_answer_dilutes_what_is_saved(blueprints: dict[str, Blueprint]) -> None:
    blueprint = blueprints["llava"]
    typical = typical_prompt(blueprint)
    short, long = (count_savings(blueprint, typical, (1,), num_answer_tokens=n) for n in (1, 256))
    assert short.saved(1) == long.saved(1)
    assert short.saved_share(1) > 2 * long.saved_share(1)
