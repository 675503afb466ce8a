"""The loss head on Triton kernels, with the functions of ``ibp_triton.head``: each one a launch.

Coefficients (β, ε) are numbers here, or 0-d tensors that kernels read where they lie; no gradient runs through them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ibp_triton import head
from ibp_triton.backends.triton.lower import reads_signs
from ibp_triton.graph import Graph
from ibp_triton.layer import wrapped
from ibp_triton.ops import straight as ops
from ibp_triton.ops.operators import apart
from ibp_triton.seeds import Absolute, Seed

ONE_PROGRAM = 1 << 16  # elements that the objective's one program adds up itself: a dozen steps


@dataclass(frozen=True)
class KernelHead:
    """The head for one lowered graph."""

    graph: Graph

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per-sample loss [N], c = softmax(z) − onehot(l) [N, M], and the logits, which ``hessian_product`` reads."""
        logits = logits.contiguous()
        losses, c, _ = ops.cross_entropy(logits, labels.contiguous())
        return losses, c, logits

    def hessian_product(self, logits: Tensor, t: Tensor) -> Tensor:
        """H t for H = diag(p) − p pᵀ, [N, M]."""
        return ops.hessian_product(logits, t.contiguous())  # type: ignore[no-any-return]

    def seed(self, u: Tensor, norm: float, weights: Tensor | None = None) -> tuple[Seed, Tensor]:
        """ψ(u), and ‖u‖_r^r / r in parts; u [N, ...] or [T, N, M]. For norm 2 the seed is u itself."""
        if weights is not None or u.dim() > 4:
            return head.seed(u, norm, weights)
        rows = _rows(u)
        if norm == 2:
            return Seed(u), ops.norm_value(rows, norm)
        psi, penalties = ops.norm_seed(rows, norm)
        return Seed(psi.view(u.shape) if rows.dim() != u.dim() else psi), penalties

    def input_seed(self, d_0: Tensor, norm: float, weights: Tensor | None = None) -> tuple[Seed, Any]:
        """``seed`` of the input's derivative; where its readers take a sign on the way in, no tensor is made for it.

        The penalty of a small batch is then d_0 itself, whose absolute values ``objective`` adds up.
        """
        if norm != 1 or weights is not None or not reads_signs(self.graph):
            return self.seed(d_0, norm, weights)
        d_0 = _rows(d_0).view(d_0.shape)
        penalty = Absolute(d_0) if d_0.numel() <= ONE_PROGRAM else ops.norm_value(_rows(d_0), norm)
        return Seed(d_0, signed=True), penalty

    def tangent_seed(self, d_0: Tensor, tau: Tensor, norm: float, weights: Tensor | None = None) -> tuple[Seed, Tensor]:
        """Σ_j ψ(⟨d_0, τ_j⟩) τ_j and Σ_j |⟨d_0, τ_j⟩|^r / r, for tangents [T, N, ...]."""
        if weights is not None:
            return head.tangent_seed(d_0, tau, norm, weights)
        seed, penalties = ops.fast_tbp_seed(d_0.contiguous(), tau.contiguous(), norm)
        return Seed(seed), penalties

    def fgsm_step(self, x: Tensor, d: Tensor, epsilon: Any) -> Tensor:
        """x + ε sign(d)."""
        x, ((number,), on_device) = x.contiguous(), apart([epsilon])
        return ops.fgsm_step(x, d.to(x.dtype).contiguous(), number, *on_device)  # type: ignore[no-any-return]

    def objective(self, batch: int, *parts: tuple[Any, Any]) -> Tensor:
        """Σ coefficient · Σ numbers, over the batch size; one or two parts, absolute values in one of them."""
        some = parts[0][1]
        none = (0.0, (some.numbers if isinstance(some, Absolute) else some).new_empty((0,)))
        (a, losses), (b, penalties) = (none, *parts)[-2:] if isinstance(some, Absolute) else (*parts, none)[:2]
        absolute = isinstance(penalties, Absolute)
        addends = (penalties.numbers if absolute else penalties).float()
        numbers, on_device = apart([a, b])
        addends = addends.reshape(-1) if addends.dim() == 0 else addends
        return ops.objective(losses, addends, *numbers, on_device, 1 / batch, absolute)  # type: ignore[no-any-return]

    def sums_together(self) -> AbstractContextManager[Callable[[], None]]:
        """Parts of weight gradients are summed several to a launch."""
        return ops.sums_together()


def _rows(u: Tensor) -> Tensor:
    """[N, ...] dense, or a small [T, N, M] as [T · N, M]."""
    if u.dim() == 3:
        return u.contiguous().flatten(0, 1)
    last = u.dim() == 4 and not wrapped(u)  # vmap knows of one memory format alone
    return u if last and u.is_contiguous(memory_format=torch.channels_last) else u.contiguous()
