"""Paper against exact semantics while training: cosine and norm ratio of the two penalty gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ibp_triton as ibp
from ibp_triton.harness.batches import Batch
from ibp_triton.harness.grid import MethodChoice


def semantics_gap(model: nn.Module, choice: MethodChoice, batch: Batch) -> dict[str, float]:
    """Cosine of the paper's penalty gradient with the true one, and |paper| / |exact|, on one batch in float32."""
    network = ibp.Network(model)
    model.eval()
    plain = _gradient(network, ibp.METHODS["bp"](), batch)
    paper, exact = (_gradient(network, _unit(choice, semantics), batch) - plain for semantics in ("paper", "exact"))
    model.train()
    scale = float(paper.norm() * exact.norm())
    cosine = float(paper @ exact) / scale if scale else 0.0
    return {"cosine": cosine, "norm_ratio": float(paper.norm() / exact.norm().clamp(min=1e-30))}


def _unit(choice: MethodChoice, semantics: str) -> Any:
    cls: Any = ibp.METHODS[choice.key]
    return cls(beta=1.0, norm=choice.norm, semantics=semantics)


def _gradient(network: Any, method: Any, batch: Batch) -> Tensor:
    tangents = batch.tangents if method.needs_tangents else None
    _, gradients = method.gradients(network, batch.x, batch.labels, tangents=tangents)
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).double()
