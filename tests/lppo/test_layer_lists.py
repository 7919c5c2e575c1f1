"""Connectors that blend several encoder layers (`vision_feature_layer` lists): align and audit at every exit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exitsafe import audit, load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.lppo import align
from exitsafe.records import Sample
from tests.lppo.conftest import count_red, make_samples, tiny_config
from tests.lppo.test_trainer import adapter_of, metrics_of
from tests.tiny_models import tiny_llava, tiny_processor

LAYERS = (1, 3, 5)  # as the config says it: [1, 3, -2] of six blocks, hidden state 0 being the embeddings


def list_vlm() -> VLM:
    return VLM(tiny_llava(vision_feature_layer=[1, 3, -2]), tiny_processor("llava"), name="tiny")


def blends(vlm: VLM, samples: list[Sample]) -> dict[tuple[str, int], Tensor]:
    """What the projector has to read, `(patches, 3 * width)`, by sample and exit: entry i of the list is min(i, l)."""
    found = {}
    for sample in samples:
        prompt = vlm.encode_prompt(sample)
        if "pixel_values" not in prompt.media:
            continue
        with torch.no_grad():
            tower = vlm.model.model.vision_tower(prompt.media["pixel_values"], output_hidden_states=True)
        for exit_layer in vlm.exit_layers:
            states = [tower.hidden_states[min(index, exit_layer)][:, 1:] for index in LAYERS]
            found[sample.id, exit_layer] = torch.cat(states, dim=-1)[0]
    return found


@contextmanager
def projector_inputs(model: Any) -> Iterator[list[Tensor]]:
    """Everything that the projector reads, image by image."""
    seen: list[Tensor] = []
    projector = model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0].detach().clone()))
    try:
        yield seen
    finally:
        hook.remove()


def matched(seen: list[Tensor], wanted: dict[tuple[str, int], Tensor]) -> set[tuple[str, int]]:
    """The samples and exits whose blend was seen; all that was seen must be one."""
    found = set()
    for image in seen:
        assert image.shape[-1] == len(LAYERS) * 32
        names = {name for name, blend in wanted.items() if torch.allclose(image, blend, atol=1e-5)}
        assert names
        found |= names
    return found


def test_align_and_audit_read_the_blend_of_each_exit(tmp_path: Path) -> None:
    vlm, samples = list_vlm(), make_samples()
    wanted = blends(vlm, samples)
    assert len(wanted) == 9 * 6  # three of the twelve samples have no picture
    assert not torch.allclose(wanted["s1", 2], wanted["s1", 3])
    assert torch.equal(wanted["s1", 5], wanted["s1", 6])  # nothing in the list is deeper than 5
    with projector_inputs(vlm.model) as seen:
        align(vlm, samples, reward=count_red, config=tiny_config(), out=tmp_path / "run")
    assert matched(seen, wanted) == set(wanted)
    exits = {layer for line in metrics_of(tmp_path / "run") for layer in line["reward_by_exit"]}
    assert exits == {"1", "2", "3", "4", "5", "6"}
    assert any(weight.abs().max() > 0 for name, weight in adapter_of(tmp_path / "run").items() if "lora_B" in name)

    model = tmp_path / "model"
    vlm.model.save_pretrained(model)
    vlm.processor.save_pretrained(model)
    aligned = load_vlm(str(model), adapter=tmp_path / "run" / "adapter")
    assert aligned.default_exit == 5
    with projector_inputs(aligned.model.get_base_model()) as seen:
        run = audit(aligned, samples, judges=["refusal-prefix"], out=tmp_path / "audit", max_new_tokens=5)
    assert matched(seen, wanted) == set(wanted)
    assert run.exit_layers == aligned.exit_layers
    texts = {(response.sample_id, response.exit_layer): response.text for response in run.responses()}
    assert len(texts) == 12 * 6
    assert all(texts[sample.id, 5] == texts[sample.id, 6] for sample in samples)
    assert any(texts[sample.id, 1] != texts[sample.id, 5] for sample in samples)
