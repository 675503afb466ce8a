"""How tests compare gradients: relative to the largest entry of all parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ibp_triton as ibp

Gradients = Mapping[str, Tensor]


def error(found: Gradients, expected: Gradients) -> float:
    """The largest difference over the largest expected entry."""
    assert set(found) == set(expected)
    assert largest(expected) > 0
    return largest(minus(found, expected)) / largest(expected)


def largest(gradients: Gradients) -> float:
    """The largest entry of all parameters, in absolute value."""
    return max(float(g.abs().max()) for g in gradients.values())


def minus(a: Gradients, b: Gradients) -> dict[str, Tensor]:
    """a − b, parameter by parameter."""
    return {name: a[name] - b[name] for name in a}


def ours(method: ibp.Method, network: ibp.Network, *batch: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """``method.gradients`` at the random numbers that ``oracle`` uses too."""
    torch.manual_seed(5)
    return method.gradients(network, *batch)


def oracle(method: ibp.Method, model: nn.Module, *batch: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """``reference.gradients`` at the random numbers that ``ours`` uses too."""
    torch.manual_seed(5)
    return ibp.reference.gradients(model, method, *batch)


def double_backprop(model: nn.Module, x: Tensor, labels: Tensor, beta: float) -> dict[str, Tensor]:
    """Exact Loss IBP at norm 2 as one writes it by hand."""
    named = dict(model.named_parameters())
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    loss = F.cross_entropy(model(x), labels, reduction="sum")
    (d_0,) = torch.autograd.grad(loss, x, create_graph=True)
    total = (loss + beta * d_0.square().sum() / 2) / len(x)
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def variants(norms: tuple[float, ...] = (1, 2, 1.5)) -> list[ibp.Method]:
    """Every method in both semantics and these norms, with strong penalties."""
    methods: list[ibp.Method] = [ibp.BP(), ibp.AdversarialTraining(0.1), ibp.FastAdversarialTraining(0.1)]
    for kind in (ibp.LossIBP, ibp.PredictionIBP, ibp.TangentBP, ibp.FastTangentBP):
        methods += [kind(0.7, norm, semantics) for semantics in ("paper", "exact") for norm in norms]
    return methods


def example(key: str, strength: float = 0.3) -> ibp.Method:
    """A method of that key at that β, ε or λ."""
    kind = ibp.METHODS[key]
    more = {
        "pgd_training": {"step_size": 0.05, "steps": 2, "random_start": False},
        "trades": {"epsilon": 0.1, "step_size": 0.05, "steps": 2},
    }
    return kind() if kind.parameter is None else kind(**{kind.parameter: strength}, **more.get(key, {}))
