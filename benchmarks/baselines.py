"""What a user would write today: the same gradients by torch.autograd, as fast as its documentation allows.

bfloat16 means bfloat16 copies of float32 master weights, as in ``Network(model, dtype=torch.bfloat16)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

import ibp_triton as ibp
from benchmarks import cases
from benchmarks.cases import METHODS, PRECISIONS, Case, Step

Function = Callable[[Tensor], Tensor]


def autograd(case: Case, key: str, method: Any = None, model: torch.nn.Module | None = None) -> Step:
    """A step of one of ``METHODS`` (or of ``method``, of the same kind) by autograd: objective and {name: gradient}."""
    model, (x, labels, tau) = model or case.model(), case.data()
    method = METHODS[key] if method is None else method
    dtype, named = PRECISIONS[case.precision], dict(model.named_parameters())

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        function = model if dtype is None else _cast(model, named, dtype)
        inputs = x if dtype is None else x.to(dtype)
        value = _OBJECTIVES[key](function, method, inputs, labels, tau.to(inputs.dtype))
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
        return value.detach(), dict(zip(named, found, strict=True))

    return step


def _cast(model: torch.nn.Module, named: dict[str, Any], dtype: torch.dtype) -> Function:
    copies = {name: p.to(dtype) for name, p in named.items()}
    return lambda x: torch.func.functional_call(model, copies, (x,))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def _bp(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    return _loss(f(x), labels) / len(x)


def _c(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().float().softmax(1) - F.one_hot(labels, logits.shape[1])).to(logits.dtype)


def _loss_ibp(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    """Paper: c held constant, which on ReLU networks is all that Algorithm 1 asks; then double backward."""
    x = x.clone().requires_grad_()
    logits = f(x)
    d_0 = torch.autograd.grad((logits * _c(logits, labels)).sum(), x, create_graph=True)[0]
    return (_loss(logits, labels) + method.beta * d_0.float().abs().sum()) / len(x)


def _loss_ibp_exact(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    loss = _loss(f(x), labels)
    d_0 = torch.autograd.grad(loss, x, create_graph=True)[0]
    return (loss + method.beta * d_0.float().abs().sum()) / len(x)


def _fast_tbp(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    """As the paper ran it: the derivative along each tangent by a forward pass of its own."""
    plain = f(x)
    c, penalty = _c(plain, labels), torch.zeros(())
    for t in tau:
        penalty = penalty + (c * _along(f, x, t)).float().sum(1).abs().sum()
    return (_loss(plain, labels) + method.beta * penalty) / len(x)


def _fast_at(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    return _loss(f(_star(f, method, x, labels)), labels) / len(x)


def _at(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    """One graph for loss and d_0, and another at x*."""
    leaf = x.clone().requires_grad_()
    loss = _loss(f(leaf), labels)
    star = x + method.epsilon * torch.autograd.grad(loss, leaf, retain_graph=True)[0].sign()
    return (loss + _loss(f(star), labels)) / 2 / len(x)


def _star(f: Function, method: Any, x: Tensor, labels: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return x + method.epsilon * torch.autograd.grad(_loss(f(leaf), labels), leaf)[0].sign()


def _prediction_ibp(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    loss = _loss(f(leaf), labels)
    d_0 = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    return (loss + method.beta * _along(f, x, d_0).float().abs().sum()) / len(x)


def _tbp(f: Function, method: Any, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    penalty = sum(_along(f, x, t).float().abs().sum() for t in tau)
    return (_loss(f(x), labels) + method.beta * penalty) / len(x)


def _along(f: Function, x: Tensor, t: Tensor) -> Tensor:
    """J t by forward-mode automatic differentiation, itself differentiable in the weights (ReLU networks)."""
    with forward_ad.dual_level():
        tangent: Tensor = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent
        return tangent


_OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "bp": _bp,
    "loss_ibp": _loss_ibp,
    "loss_ibp_exact": _loss_ibp_exact,
    "fast_tbp": _fast_tbp,
    "fast_at": _fast_at,
    "at": _at,
    "prediction_ibp": _prediction_ibp,
    "tbp": _tbp,
}


def eager_bp_nchw(case: Case) -> Step:
    """What users run today: BP in float32, contiguous."""
    return autograd(Case(case.network, case.batch, "fp32", channels_last=False, device=case.device), "bp")


Gradients = dict[str, Tensor]


def largest(gradients: Gradients) -> float:
    """The largest entry of all parameters, in absolute value."""
    return max(float(g.abs().max()) for g in gradients.values())


def minus(a: Gradients, b: Gradients) -> Gradients:
    """a − b in float64."""
    return {name: a[name].double() - b[name].double() for name in b}


def parity(case: Case, key: str, backend: str = "torch") -> float:
    """How far our gradient is off autograd's, relative to its largest entry.

    A penalty is compared on its own, at a strength that makes it as large as the loss's gradient: at the strengths
    that are trained with, an error in it would vanish beside the loss.
    """
    method = METHODS[key]
    if method.parameter != "beta":
        found, expected = cases.ours(case, key, backend=backend)()[1], autograd(case, key)()[1]
        return largest(minus(found, expected)) / largest(expected)
    plain, plain_expected = cases.ours(case, "bp", backend=backend)()[1], autograd(case, "bp")()[1]
    unit = largest(minus(autograd(case, key, replace(method, beta=1.0))()[1], plain_expected))
    strong = replace(method, beta=largest(plain_expected) / unit)
    found = minus(cases.ours(case, key, strong, backend)()[1], plain)
    expected = minus(autograd(case, key, strong)()[1], plain_expected)
    return largest(minus(found, expected)) / largest(expected)


def truth(case: Case, key: str) -> Gradients:
    """The same gradient in float64 by the oracle."""
    x, labels, tau = (part.cpu() for part in case.data())
    method = METHODS[key]
    tangents = tau.double() if method.needs_tangents else None
    return ibp.reference.gradients(case.model().cpu().double(), method, x.double(), labels, tangents)[1]


# float32 differs by rounding; bfloat16 keeps 8 bits, and a sign of d_0 or t_K near zero may flip
PARITY = {"fp32": 1e-4, "bf16": 0.2}
