"""Every architecture of transformers: its exits are found, proven and exported, or it is refused by the right check."""

from __future__ import annotations

import pytest

from tests.any_model import examine
from tests.architectures import NOT_RUN, model_types, parametrized

_REFUSED = {
    "blip-2": "check of generation",
    "chameleon": "no image encoder",
    "deepseek_ocr2": "check of one encoder",
    "deepseek_vl_hybrid": "check of one encoder",
    "diffusion_gemma": "no image encoder",
    "emu3": "two encoders",
    "florence2": "encoder-decoder",
    "fuyu": "no image encoder",
    "gemma4_unified": "no image encoder",
    "granite_docling": "cannot be exported",
    "hunyuan_vl": "check of mixed batches",
    "inkling_mm_model": "no image encoder",
    "instructblip": "check of generation",
    "minicpmv4_6": "no image encoder",
    "minicpmv4_7": "no image encoder",
    "nemotron_h_omni": "check of generation",
    "t5gemma2": "encoder-decoder",
    "unlimited_ocr": "check of one encoder",
    "video_llava": "two encoders",
}
"""By model type, a part of what exitsafe says. The others pass everything."""
_NO_FEATURE_PATH = "no get_image_features"


@pytest.mark.parametrize("model_type", parametrized(name for name in model_types() if name not in NOT_RUN))
def test_images(model_type: str) -> None:
    found = examine(model_type)
    if (check := _REFUSED.get(model_type)) is not None:
        assert check in found.refusal + found.export_problem
        return
    if model_type == "shieldgemma2":  # its wrapper cannot be loaded strictly by transformers itself
        assert found.alone == 0.0 and found.exported == float("inf")
        return
    assert found.refusal == found.export_problem == ""
    assert found.alone == found.exported == 0.0


@pytest.mark.parametrize("model_type", ["glmasr", "voxtral", "qwen2_5_omni_thinker"])
def test_sound(model_type: str) -> None:
    found = examine(model_type, "audio")
    assert found.refusal == found.export_problem == ""
    assert found.alone == found.exported == 0.0
    assert "audio_tower" in found.blocks


def test_connectors_that_blend_layers_read_none_behind_the_exit() -> None:
    for model_type in ("vipllava", "granite4_vision"):
        found = examine(model_type)
        assert found.exported == 0.0, found


def test_what_has_no_feature_path_is_not_examined() -> None:
    with pytest.raises(LookupError, match=_NO_FEATURE_PATH):
        examine("voxtral")
