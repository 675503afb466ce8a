"""A method as a loss: one autograd function whose backward hands out the gradient that the sweeps computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ibp_triton.checks import readable
from ibp_triton.errors import InputError

if TYPE_CHECKING:
    from ibp_triton.methods.base import Method
    from ibp_triton.network import Network


class _Objective(torch.autograd.Function):
    """Loss and gradient in forward, so that the parameters may change before backward."""

    @staticmethod
    def forward(ctx: Any, step: tuple[Any, ...], names: list[str], *parameters: Tensor) -> Tensor:
        method, network, x, labels, tangents, extra = step
        loss, gradients, used = method.step(network, x, labels, tangents, None, extra)
        # a parameter without part in the model keeps .grad as it is
        zeros = {
            n: torch.zeros_like(p) for n, p in zip(names, parameters, strict=True) if n in used and n not in gradients
        }
        ctx.gradients = [gradients.get(name, zeros.get(name)) for name in names]
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this loss has no second derivative (its gradient comes from explicit sweeps): call backward or "
                "autograd.grad without create_graph=True, or use ibp_triton.reference for a differentiable oracle"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "backward was called a second time on the same loss, whose gradient has been handed out: "
                "compute the loss again, method(network, x, labels)"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if readable(upstream[0]) and float(upstream[0]) == 1:  # nothing to scale, and no wait for a device to know
            return None, None, *gradients
        return None, None, *(None if g is None else g * upstream[0].to(g.dtype) for g in gradients)


def objective(
    method: Method, network: Network, x: Tensor, labels: Any, tangents: Tensor | None, extra: Mapping[str, Any] | None
) -> Tensor:
    """The loss as a 0-d tensor with history; its value alone where gradients are off or nothing is trainable."""
    named = [(name, p) for name, p in network.parameters().items() if p.requires_grad]
    if not torch.is_grad_enabled() or not named:
        return method.value(network, x, labels, tangents, extra)
    if isinstance(x, Tensor) and x.requires_grad:
        raise InputError("the loss has no gradient with respect to x: pass x.detach()")
    names, parameters = zip(*named, strict=True)
    step = (method, network, x, labels, tangents, extra)
    loss: Tensor = _Objective.apply(step, list(names), *parameters)  # type: ignore[no-untyped-call]
    return loss
