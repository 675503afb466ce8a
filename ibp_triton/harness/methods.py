"""From a method as a config names it to the library's loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import ibp_triton as ibp
from ibp_triton.harness.grid import MethodChoice
from ibp_triton.harness.models import Shape

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def build(choice: MethodChoice, factor: float = 1.0) -> Any:
    """The loss of a method; `factor` scales β (never ε)."""
    cls: Any = ibp.METHODS[choice.key]
    if choice.parameter is None:
        return cls()
    if cls.parameter == "epsilon":
        return cls(epsilon=choice.parameter)
    return cls(beta=choice.parameter * factor, norm=choice.norm, semantics=choice.semantics)


def needs_tangents(choice: MethodChoice) -> bool:
    """Whether the method takes tangent vectors."""
    return bool(ibp.METHODS[choice.key].needs_tangents)


def predicted_ratio(choice: MethodChoice, model: nn.Module, batch: int, shape: Shape) -> float:
    """Multiply-adds of one step relative to BP, as the method predicts for `batch` images of `shape`."""
    return float(build(choice).predicted_ratio(ibp.Network(model), (batch, *shape)))
