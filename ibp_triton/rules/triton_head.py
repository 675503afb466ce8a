"""The loss head on Triton kernels, with the functions of ``ibp_triton.head``: each one a launch.

Coefficients (β, ε) are numbers here, not tensors that a gradient or a vmap runs through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibp_triton import ops


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample loss [N], c = softmax(z) − onehot(l) [N, M], and the logits, which ``hessian_product`` reads."""
    logits = logits.contiguous()
    losses, c, _ = ops.cross_entropy(logits, labels.contiguous())
    return losses, c, logits


def hessian_product(logits: Tensor, t: Tensor) -> Tensor:
    """H t for H = diag(p) − p pᵀ, [N, M]."""
    return ops.hessian_product(logits, t.contiguous())  # type: ignore[no-any-return]


def seed(u: Tensor, norm: float, wanted: bool = True) -> tuple[Tensor, Tensor]:
    """ψ(u), and ‖u‖_r^r / r in parts; u [N, ...] or [T, N, ...]. For norm 2 the seed is u itself."""
    rows = _rows(u)
    if not wanted or norm == 2:
        return u, ops.norm_value(rows, norm)
    psi, penalties = ops.norm_seed(rows, norm)
    return psi.view(u.shape) if rows.dim() != u.dim() else psi, penalties


def tangent_seed(d_0: Tensor, tau: Tensor, norm: float, wanted: bool = True) -> tuple[Tensor, Tensor]:
    """Σ_j ψ(⟨d_0, τ_j⟩) τ_j and Σ_j |⟨d_0, τ_j⟩|^r / r, for tangents [T, N, ...]."""
    return ops.fast_tbp_seed(_ordered(d_0), tau.contiguous(), norm)  # type: ignore[no-any-return]


def fgsm_step(x: Tensor, d: Tensor, epsilon: float) -> Tensor:
    """x + ε sign(d)."""
    x = x.contiguous()
    return ops.fgsm_step(x, _ordered(d.to(x.dtype)), float(epsilon))  # type: ignore[no-any-return]


def objective(batch: int, *parts: tuple[Any, Tensor]) -> Tensor:
    """Σ coefficient · Σ numbers, over the batch size; one or two parts."""
    (a, losses), (b, penalties) = (*parts, (0.0, parts[0][1].new_empty((0,))))[:2]
    return ops.objective(losses, penalties, float(a) / batch, float(b) / batch)  # type: ignore[no-any-return]


def _rows(u: Tensor) -> Tensor:
    """[N, ...], or a small [T, N, M] as [T · N, M]; dense."""
    if u.dim() == 3:
        return u.contiguous().flatten(0, 1)
    return u if u.dim() != 4 or u.is_contiguous(memory_format=torch.channels_last) else u.contiguous()


def _ordered(d: Tensor) -> Tensor:
    """D in the order of its axes: a copy only for images of several channels, which the sweeps keep channels last."""
    return d.contiguous()
