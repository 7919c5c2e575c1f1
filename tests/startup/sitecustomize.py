"""Lets torchvision be imported beside a PyTorch that it was not compiled for.

PyPI's torchvision is compiled for CUDA, and beside a PyTorch for CPUs it stops at its own operators. Image and video
processors call none of them, so they are only declared here, when torchvision is first imported. Python runs this
file in every process that has its folder on PYTHONPATH, as the tests' processes have (tests/conftest.py).
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dil_h, SymInt dil_w, SymInt groups, SymInt offset_groups, "
    "bool use_mask) -> Tensor",
)
_declared: list[object] = []


class _BeforeTorchvision:
    """Finds no module, but sees which one is looked for."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "torchvision" and not _declared:
            found = PathFinder.find_spec(name)
            if found is not None and found.origin is not None:
                _declare(found.origin)
        return None


def _declare(origin: str) -> None:
    from contextlib import suppress
    from pathlib import Path

    import torch
    from torch import library as extensions

    for compiled in Path(origin).parent.glob("_C*.so"):
        with suppress(OSError):
            torch.ops.load_library(str(compiled))
    if not hasattr(torch.ops.torchvision, "nms"):
        operators = extensions.Library("torchvision", "DEF")
        for operator in _OPERATORS:
            operators.define(operator)
        _declared.append(operators)  # the operators live as long as it does


sys.meta_path.insert(0, _BeforeTorchvision)
