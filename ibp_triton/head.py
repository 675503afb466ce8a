"""The loss head: softmax cross-entropy with its first and second derivative, and the seeds of the extra passes."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample loss [N], its derivative c = softmax(z) − onehot(l) [N, M] in the logits' dtype, and softmax(z).

    Half precision is widened to float32 for loss and softmax. c is per sample: not divided by N.
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
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
    u = u.float() if u.dtype in (torch.bfloat16, torch.float16) else u
    if norm == 1:
        return u.abs().sum()
    return u.square().sum() / 2 if norm == 2 else u.abs().pow(norm).sum() / norm
