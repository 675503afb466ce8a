"""Paper against exact semantics while training: cosine and norm ratio of the two penalty gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import ibp_triton as ibp
from ibp_triton.checks import SEMANTICS
from ibp_triton.harness.batches import Batch
from ibp_triton.randomness import RandomState


def semantics_gap(model: nn.Module, method: Any, batch: Batch) -> dict[str, float]:
    """Cosine of the paper's penalty gradient with the true one, and |paper| / |exact|, on one batch in float32."""
    network = ibp.Network(model)
    model.eval()
    plain, random = _gradient(network, ibp.BP(), batch), RandomState.now([batch.x])
    penalties = []
    for semantics in SEMANTICS:
        with random.again():  # a method's own random numbers are the same for both
            penalties.append(_gradient(network, replace(method, beta=1.0, semantics=semantics), batch) - plain)
    paper, exact = penalties
    model.train()
    scale = float(paper.norm() * exact.norm())
    cosine = float(paper @ exact) / scale if scale else 0.0
    return {"cosine": cosine, "norm_ratio": float(paper.norm() / exact.norm().clamp(min=1e-30))}


def _gradient(network: Any, method: Any, batch: Batch) -> Tensor:
    tangents = batch.tangents if method.needs_tangents else None
    _, gradients = method.gradients(network, batch.x, batch.labels, tangents=tangents)
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).double()
