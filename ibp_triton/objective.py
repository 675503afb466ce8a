"""A method as a loss: one autograd function whose backward hands out the gradient that the sweeps computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ibp_triton.checks import readable
from ibp_triton.errors import InputError, MethodError

if TYPE_CHECKING:
    from ibp_triton.methods.base import Method
    from ibp_triton.methods.passes import Step
    from ibp_triton.network import Network


@contextmanager
def unhooked(parameters: Iterable[Tensor]) -> Iterator[None]:
    """While a gradient is made, its parts pass no hook of a parameter: the whole does, when backward hands it out."""
    hooked = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for hooks, _ in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in hooked:
            hooks.update(before)


class _Objective(torch.autograd.Function):
    """The loss, and the gradient that was made with it, so that the parameters may change before backward."""

    @staticmethod
    def forward(ctx: Any, found: tuple[Tensor, list[Tensor | None]], *parameters: Tensor) -> Tensor:
        loss, ctx.gradients = found
        return loss

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
            return None, *gradients
        return None, *(None if g is None else g * upstream[0].to(g.dtype) for g in gradients)


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
    if torch._C._are_functorch_transforms_active():
        raise MethodError(
            "the loss has no derivative under torch.func's transforms (grad, vmap, jvp): there "
            "method.gradients(network, x, y, parameters=…) gives value and gradients"
        )
    loss, found, step = method.step(network, x, y, tangents, None, extra, own)
    part = {name: p for name, p in named.items() if name in step.used}
    kept = [_gradient_of(found.get(name), p) for name, p in part.items()]
    # one without part in the model keeps .grad as it is; a hook of its would be given None
    rest = [p for name, p in named.items() if name not in part and not p._backward_hooks]
    given: Any = (loss, [*kept, *[None] * len(rest)])
    return _Objective.apply(given, *part.values(), *rest), step  # type: ignore[no-untyped-call]


def _gradient_of(found: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros_like(p) if found is None else found
