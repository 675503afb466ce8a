"""What a user would write today: the same gradients by torch.autograd, as fast as its documentation allows.

bfloat16 means bfloat16 copies of float32 master weights, as in ``Network(model, dtype=torch.bfloat16)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ibp_triton as ibp
from ibp_triton.bench.candidates import METHODS, Case, Step

Function = Callable[[Tensor], Tensor]
Objective = Callable[[Function, Any, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ByHand:
    """An objective as one writes it, what that is called, and whether it differentiates a derivative."""

    title: str
    objective: Objective
    second: bool = True


def autograd(case: Case, method: str | ibp.Method, model: torch.nn.Module | None = None) -> Step:
    """A step of a method, or of one of ``METHODS`` by name, by autograd: objective and {name: gradient}."""
    chosen = METHODS[method] if isinstance(method, str) else method
    written, (x, labels, tau) = BY_HAND[_key(chosen)], case.data()
    model = model or case.model()
    dtype, named = case.dtype, dict(model.named_parameters())

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        function = model if dtype is None else _cast(model, named, dtype)
        inputs = x if dtype is None else x.to(dtype)
        with _twice_differentiable(written.second):
            value = written.objective(function, chosen, inputs, labels, tau.to(inputs.dtype))
            found = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
        return value.detach(), dict(zip(named, found, strict=True))

    return step


def applies(case: Case, method: ibp.Method) -> bool:
    """Whether autograd by hand finds the method's gradient: the paper's only where layers are piecewise linear."""
    return _key(method) in BY_HAND and (case.entry.flat or getattr(method, "semantics", "exact") == "exact")


def title(method: ibp.Method) -> str:
    """How the gradient is had by hand."""
    return BY_HAND[_key(method)].title


def _key(method: ibp.Method) -> str:
    """The paper's Loss IBP holds c constant, which halves the graph; Tangent BP is written alike in both semantics."""
    exact = method.key in ("loss_ibp", "prediction_ibp", "fast_tbp") and getattr(method, "semantics", "") == "exact"
    return f"{method.key}_exact" if exact else method.key


def _twice_differentiable(second: bool) -> Any:
    """Fused attention on a CPU has no second derivative and no forward mode."""
    return sdpa_kernel(SDPBackend.MATH) if second else contextlib.nullcontext()


def _cast(model: torch.nn.Module, named: dict[str, Any], dtype: torch.dtype) -> Function:
    buffers = {name: b.to(dtype) for name, b in model.named_buffers() if b.is_floating_point()}
    copies = buffers | {name: p.to(dtype) for name, p in named.items()}
    return lambda x: torch.func.functional_call(model, copies, (x,))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def _size(u: Tensor, r: float) -> Tensor:
    """‖u‖_r^r / r."""
    return u.float().abs().sum() if r == 1 else u.float().abs().pow(r).sum() / r


def _with_slope(f: Function, x: Tensor, labels: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    """The loss, its graph kept, and d_0."""
    leaf = x.clone().requires_grad_()
    loss = _loss(f(leaf), labels)
    return loss, torch.autograd.grad(loss, leaf, retain_graph=True, create_graph=create_graph)[0]


def _bp(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    value: Tensor = _loss(f(x), labels) / len(x)
    return value


def _c(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.float().softmax(1) - F.one_hot(labels, logits.shape[1])).to(logits.dtype)


def _loss_ibp(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    """Paper: c held constant, which on ReLU networks is all that Algorithm 1 asks; then double backward."""
    x = x.clone().requires_grad_()
    logits = f(x)
    d_0 = torch.autograd.grad((logits * _c(logits.detach(), labels)).sum(), x, create_graph=True)[0]
    value: Tensor = (_loss(logits, labels) + method.beta * _size(d_0, method.norm)) / len(x)
    return value


def _loss_ibp_exact(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    loss, d_0 = _with_slope(f, x, labels, create_graph=True)
    value: Tensor = (loss + method.beta * _size(d_0, method.norm)) / len(x)
    return value


def _fast_tbp(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    """As the paper ran it: the derivative along each tangent by a forward pass of its own."""
    plain = f(x)
    c = _c(plain.detach(), labels)
    slopes = torch.stack([(c * _along(f, x, t)).float().sum(1) for t in tau])
    value: Tensor = (_loss(plain, labels) + method.beta * _size(slopes, method.norm)) / len(x)
    return value


def _fast_tbp_exact(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    """The slopes ⟨d_0, τ_j⟩ of one d_0."""
    loss, d_0 = _with_slope(f, x, labels, create_graph=True)
    slopes = (d_0 * tau).float().flatten(2).sum(2)
    value: Tensor = (loss + method.beta * _size(slopes, method.norm)) / len(x)
    return value


def _fast_at(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    value: Tensor = _loss(f(_star(f, method, x, labels)), labels) / len(x)
    return value


def _at(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    """One graph for loss and d_0, and another at x*."""
    loss, d_0 = _with_slope(f, x, labels, create_graph=False)
    star = x + method.epsilon * d_0.sign()
    value: Tensor = (loss + _loss(f(star), labels)) / 2 / len(x)
    return value


def _star(f: Function, method: Any, x: Tensor, labels: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    star: Tensor = x + method.epsilon * torch.autograd.grad(_loss(f(leaf), labels), leaf)[0].sign()
    return star


def _prediction_ibp(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    """Paper: the direction d_0 held constant."""
    return _along_gradient(f, method, x, labels, create_graph=False)


def _prediction_ibp_exact(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    return _along_gradient(f, method, x, labels, create_graph=True)


def _along_gradient(f: Function, method: Any, x: Tensor, labels: Tensor, create_graph: bool) -> Tensor:
    loss, d_0 = _with_slope(f, x, labels, create_graph)
    value: Tensor = (loss + method.beta * _size(_along(f, x, d_0), method.norm)) / len(x)
    return value


def _tbp(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    penalty = sum(_size(_along(f, x, t), method.norm) for t in tau)
    value: Tensor = (_loss(f(x), labels) + method.beta * penalty) / len(x)
    return value


def _along(f: Function, x: Tensor, t: Tensor) -> Tensor:
    """J t by forward-mode automatic differentiation, itself differentiable in the weights."""
    with forward_ad.dual_level():
        tangent: Tensor = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent
        return tangent


def _jacobian(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    """The estimate of Hoffman et al.: one backward pass with create_graph for each direction."""
    leaf = x.clone().requires_grad_()
    state = torch.get_rng_state()
    logits = f(leaf)
    classes = logits.shape[1]
    torch.set_rng_state(state)
    if method.projections == "all":
        directions = torch.eye(classes, dtype=x.dtype, device=x.device)[:, None].expand(-1, len(x), -1)
    else:
        drawn = torch.randn(method.projections, len(x), classes, dtype=x.dtype, device=x.device)
        directions = F.normalize(drawn, dim=2)
    rows = [torch.autograd.grad(logits, leaf, v, create_graph=True)[0] for v in directions]
    penalty = sum(_size(row, 2) for row in rows) * (classes / len(directions))
    value: Tensor = (_loss(logits, labels) + method.beta * penalty) / len(x)
    return value


BY_HAND: dict[str, ByHand] = {
    "bp": ByHand("eager backward", _bp, second=False),
    "loss_ibp": ByHand("create_graph", _loss_ibp),
    "loss_ibp_exact": ByHand("create_graph", _loss_ibp_exact),
    "fast_tbp": ByHand("jvp + backward", _fast_tbp),
    "fast_tbp_exact": ByHand("create_graph", _fast_tbp_exact),
    "fast_at": ByHand("FGSM by hand", _fast_at, second=False),
    "at": ByHand("FGSM by hand", _at, second=False),
    "prediction_ibp": ByHand("jvp + backward", _prediction_ibp),
    "prediction_ibp_exact": ByHand("jvp + backward", _prediction_ibp_exact),
    "tbp": ByHand("jvp + backward", _tbp),
    "jacobian": ByHand("create_graph", _jacobian),
}


def eager_bp_nchw(case: Case) -> Step:
    """What users run today: BP in float32, contiguous."""
    return autograd(replace(case, precision="fp32", channels_last=False), "bp")
