"""What importing the packages needs: torchvision's wheels are made for CUDA, and import beside a CPU's torch only
when the operators that its own library would define are known by name."""

from __future__ import annotations

import importlib.util

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor d, Tensor s, float t) -> Tensor",
)
_KEPT: list[torch.library.Library] = []


def prepare() -> None:
    """Name the operators, unless torchvision's library can be loaded."""
    if _KEPT or importlib.util.find_spec("torchvision") is None or torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPERATORS:
        library.define(schema)
    _KEPT.append(library)
