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
    from ibp_triton.methods.passes import Step
    from ibp_triton.network import Network


class _Objective(torch.autograd.Function):
    """Loss and gradient in forward, so that the parameters may change before backward."""

    @staticmethod
    def forward(ctx: Any, step: tuple[Any, ...], names: list[str], *parameters: Tensor) -> Tensor:
        method, network, x, y, tangents, extra, own, done = step
        loss, gradients, made = method.step(network, x, y, tangents, None, extra, own)
        done.append(made)
        used = made.used  # a parameter without part in the model keeps .grad as it is
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
                "compute the loss again, method(network, x, y)"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if readable(upstream[0]) and float(upstream[0]) == 1:  # nothing to scale, and no wait for a device to know
            return None, None, *gradients
        return None, None, *(None if g is None else g * upstream[0].to(g.dtype) for g in gradients)


def objective(
    method: Method, network: Network, x: Tensor, y: Any, tangents: Tensor | None, extra: Mapping[str, Any] | None
) -> tuple[Tensor, Step]:
    """The loss, 0-d, with history where gradients are on and something is trainable, and the step that gave it."""
    own = network.parameters()
    named = {name: p for name, p in own.items() if p.requires_grad}
    if not torch.is_grad_enabled() or not named:
        return method.value_step(network, x, y, tangents, extra)
    if isinstance(x, Tensor) and x.requires_grad:
        raise InputError("the loss has no gradient with respect to x: pass x.detach()")
    done: list[Step] = []
    step = (method, network, x, y, tangents, extra, own, done)
    loss: Tensor = _Objective.apply(step, list(named), *named.values())  # type: ignore[no-untyped-call]
    return loss, done[0]
