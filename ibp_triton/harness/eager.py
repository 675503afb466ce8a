"""The seven gradients as a PyTorch user would write them with autograd: the baseline of the kernel report.

Leaner than the oracle in `ibp_triton.reference`, and right only where that suffices: models of linear layers, ReLUs and
max-pools, whose Jacobian is constant around a point. There the paper's semantics is c, or d_0, held constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibp_triton import reference


def gradients(model: nn.Module, method: Any, x: Tensor, labels: Tensor, tangents: Tensor | None) -> dict[str, Tensor]:
    """{parameter name: gradient} of the method's objective, mean over the batch, by plain autograd."""
    if method.key == "prediction_ibp" and method.semantics == "exact":
        return reference.gradients(model, method, x, labels, tangents)[1]
    objective = {
        "bp": _bp,
        "loss_ibp": _loss_ibp,
        "fast_tbp": _loss_ibp,
        "prediction_ibp": _tangents,
        "tbp": _tangents,
        "at": _adversarial,
        "fast_at": _adversarial,
    }[method.key](model, method, x, labels, tangents)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(objective / x.shape[0], parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def _norm(u: Tensor, method: Any) -> Tensor:
    return u.abs().sum() if method.norm == 1 else u.abs().pow(method.norm).sum() / method.norm


def _bp(model: nn.Module, method: Any, x: Tensor, labels: Tensor, tangents: Tensor | None) -> Tensor:
    return _loss(model(x), labels)


def _adversarial(model: nn.Module, method: Any, x: Tensor, labels: Tensor, tangents: Tensor | None) -> Tensor:
    x = x.detach().requires_grad_()
    loss = _loss(model(x), labels)
    both = method.key == "at"
    (d,) = torch.autograd.grad(loss, x, retain_graph=both)
    star = _loss(model(x.detach() + method.epsilon * d.sign()), labels)
    return (loss + star) / 2 if both else star


def _loss_ibp(model: nn.Module, method: Any, x: Tensor, labels: Tensor, tangents: Tensor | None) -> Tensor:
    """Double backpropagation; paper: with c a constant of the second one."""
    x = x.detach().requires_grad_()
    logits = model(x)
    loss = _loss(logits, labels)
    if method.semantics == "exact":
        (d,) = torch.autograd.grad(loss, x, create_graph=True)
    else:
        (c,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (d,) = torch.autograd.grad(logits, x, c, create_graph=True)
    if method.key == "fast_tbp":
        assert tangents is not None
        d = (tangents * d).flatten(2).sum(2)
    return loss + method.beta * _norm(d, method)  # type: ignore[no-any-return]


def _tangents(model: nn.Module, method: Any, x: Tensor, labels: Tensor, tangents: Tensor | None) -> Tensor:
    """Forward-mode derivatives along the tangents, one after another, or along d_0."""
    if method.key == "tbp":
        assert tangents is not None
        loss, directions = _loss(model(x), labels), list(tangents)
    else:
        x = x.detach().requires_grad_()
        loss = _loss(model(x), labels)
        directions = [torch.autograd.grad(loss, x, retain_graph=True)[0]]
        x = x.detach()
    for direction in directions:
        loss = loss + method.beta * _norm(torch.func.jvp(model, (x,), (direction,))[1], method)
    return loss
