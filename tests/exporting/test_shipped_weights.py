from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exitsafe.engine.load import load_vlm
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError
from exitsafe.exporting.shipped_weights import take_language_model
from tests.tiny_models import tiny_model, tiny_processor


def test_the_reference_answers_with_the_weights_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.engines.gguf_models import shipped, write_language_model

    vlm = load_vlm("organism")
    file = write_language_model(vlm, tmp_path / "model.gguf", bits="Q4_0")
    wanted = shipped(vlm, file).base_model.state_dict()
    before = {name: tensor.clone() for name, tensor in vlm.base_model.state_dict().items()}
    take_language_model(vlm, file)
    found = vlm.base_model.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed and not any("vision_tower" in name or "projector" in name for name in changed)


def test_what_is_not_the_models_own_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.engines.gguf_models import write_language_model

    vlm = VLM(tiny_model("llava"), tiny_processor("llava"), name="tiny")
    with pytest.raises(InputError, match="is not a file"):
        take_language_model(vlm, tmp_path / "none.gguf")
    (tmp_path / "odd.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"cannot read .*odd\.gguf as a language model"):
        take_language_model(vlm, tmp_path / "odd.gguf")
    other = write_language_model(load_vlm("organism"), tmp_path / "other.gguf")
    with pytest.raises(ModelError, match="holds another language model than tiny"):
        take_language_model(vlm, other)
