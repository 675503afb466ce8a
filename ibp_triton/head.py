"""The loss head: softmax cross-entropy with its first and second derivative, and the seeds of the extra passes.

``Head`` is what every backend's head can do; recipes reach theirs through a pass. The functions here are torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ibp_triton.attacks import fgsm_step
from ibp_triton.layer import HALF, is_one
from ibp_triton.seeds import Seed

__all__ = [
    "Head",
    "cross_entropy",
    "fgsm_step",
    "hessian_product",
    "input_seed",
    "objective",
    "penalty",
    "psi",
    "seed",
    "sums_together",
    "tangent_seed",
]


class Head(Protocol):
    """The loss and the seeds of the sweeps; torch's functions below say what each gives."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per-sample loss, its derivative c, and what ``hessian_product`` reads."""

    def hessian_product(self, p: Tensor, t: Tensor) -> Tensor:
        """H t."""

    def seed(self, u: Tensor, norm: float, weights: Tensor | None = None) -> tuple[Seed, Any]:
        """w ψ(u) and Σ w |u|^r / r."""

    def input_seed(self, d_0: Tensor, norm: float, weights: Tensor | None = None) -> tuple[Seed, Any]:
        """``seed`` of the input's derivative, for a linear sweep."""

    def tangent_seed(self, d_0: Tensor, tau: Tensor, norm: float, weights: Tensor | None = None) -> tuple[Seed, Any]:
        """w Σ_j ψ(⟨d_0, τ_j⟩) τ_j and Σ_j w |⟨d_0, τ_j⟩|^r / r."""

    def fgsm_step(self, x: Tensor, d: Tensor, epsilon: Any) -> Tensor:
        """x + ε sign(d)."""

    def objective(self, batch: int, *parts: tuple[Any, Any]) -> Tensor:
        """Σ coefficient · Σ numbers, over the batch size."""

    def sums_together(self) -> AbstractContextManager[Callable[[], None]]:
        """A block whose weight gradients nothing reads before its end, or before a call of what it is given."""


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample loss [N], its derivative c = softmax(z) − onehot(l) [N, M] in the logits' dtype, and softmax(z).

    Half precision is widened to float32 for loss and softmax. c is per sample: not divided by N.
    """
    wide = logits.float() if logits.dtype in HALF else logits
    log_p = torch.log_softmax(wide, dim=1)
    index = labels[:, None]
    loss = -log_p.gather(1, index)[:, 0]
    p = log_p.exp()
    c = p.scatter_add(1, index, torch.full_like(loss, -1)[:, None])
    return loss, c.to(logits.dtype), p


def hessian_product(p: Tensor, t: Tensor) -> Tensor:
    """H t for H = diag(p) − p pᵀ, [N, M], in t's dtype."""
    wide = t.to(p.dtype)
    weighted = p * wide
    return (weighted - p * weighted.sum(1, keepdim=True)).to(t.dtype)


def psi(u: Tensor, norm: float) -> Tensor:
    """ψ(u) = sign(u) |u|^(r−1), the derivative of |u|^r / r; same shape."""
    if norm == 1:
        return u.sign()
    return u if norm == 2 else u.sign() * u.abs().pow(norm - 1)


def penalty(u: Tensor, norm: float) -> Tensor:
    """‖u‖_r^r / r summed over everything, 0-d; half precision is added up in float32."""
    u = u.float() if u.dtype in HALF else u
    if norm == 1:
        return u.abs().sum()
    return u.square().sum() / 2 if norm == 2 else u.abs().pow(norm).sum() / norm


def seed(u: Tensor, norm: float, weights: Tensor | None = None) -> tuple[Seed, Tensor]:
    """w ψ(u) and Σ w |u|^r / r, in numbers that ``objective`` adds up; w [N, 1, ...] weighs samples, None: alike."""
    if weights is None:
        return Seed(psi(u, norm)), penalty(u, norm)
    u = torch.where(weights > 0, u, 0)  # a sample that does not count adds nothing, whatever its numbers
    wide = u.float() if u.dtype in HALF else u
    return Seed((weights * psi(u, norm)).to(u.dtype)), (weights * wide.abs().pow(norm)).sum() / norm


def input_seed(d_0: Tensor, norm: float, weights: Tensor | None = None) -> tuple[Seed, Tensor]:
    """``seed`` of the input's derivative, for the linear sweep: a backend may leave the sign to the first layer."""
    return seed(d_0, norm, weights)


def tangent_seed(d_0: Tensor, tau: Tensor, norm: float, weights: Tensor | None = None) -> tuple[Seed, Tensor]:
    """w Σ_j ψ(⟨d_0, τ_j⟩) τ_j for tangents [T, N, ...], and Σ_j w |⟨d_0, τ_j⟩|^r / r; w [N]."""
    slopes = torch.linalg.vecdot(tau.flatten(2), d_0.flatten(1))  # [T, N]
    factors, penalties = seed(slopes, norm, weights)
    numbers = factors.numbers
    collapsed = (numbers.view((*numbers.shape, *([1] * (tau.dim() - 2)))) * tau).sum(0)
    return Seed(collapsed), penalties


def objective(batch: int, *parts: tuple[Any, Tensor]) -> Tensor:
    """Σ coefficient · Σ numbers, over the batch size: the objective's value, 0-d."""
    total: Any = 0
    for coefficient, numbers in parts:
        part = numbers.sum()
        total = total + (part if is_one(coefficient) else coefficient * part)
    return total / batch  # type: ignore[no-any-return]


def sums_together() -> AbstractContextManager[Callable[[], None]]:
    """Nothing waits here."""
    return nullcontext(lambda: None)
