"""A whole training step, gradient and optimizer, as one call, ``step(x, y, tangents=None, extra=None) -> Parts``.

There are three that train alike: this eager one; a compiled one, held against it before it is used; and a captured one,
which replays what an eager one launched. Shapes are learned from the batches, and whatever a step was made for may
change (β, learning rate, modes, frozen layers, the optimizer's state): the next step then runs eagerly or is made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ibp_triton.alike import kind_of, settings
from ibp_triton.errors import MethodError
from ibp_triton.methods.base import Method, Parts
from ibp_triton.network import Network, network_for

Gradients = dict[str, Tensor]
Reduce = Callable[[Gradients], Gradients]
SEEN = 64  # kinds of batches that are remembered
KEPT = 4  # compiled or captured steps that are kept, the ones last used


class EagerStep:
    """``step(x, y)`` trains on one batch and returns its ``Parts``, detached, as they were before the update.

    Assign ``step.method`` to change it: the next step follows. Gradients stay in ``.grad`` until the next step begins.

    Args:
        network: the model, wrapped or bare; move it to its device first.
        method: one of ``ibp_triton.METHODS``.
        optimizer: over the model's parameters.
        accumulate: how many batches make one update, their gradients averaged.
        clip_norm: the largest norm of all gradients together; None leaves them.
        reduce: what becomes of {parameter name: gradient} before the update, such as an average over processes.

    Raises:
        MethodError (a ValueError): for fewer than one batch, a norm that is not positive, or an optimizer of another
            model's parameters.
    """

    def __init__(
        self,
        network: Network | nn.Module,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        clip_norm: float | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        if accumulate < 1 or (clip_norm is not None and not clip_norm > 0):
            raise MethodError(
                f"{type(self).__name__}: accumulate must be at least 1 and clip_norm positive, not {accumulate} and "
                f"{clip_norm}"
            )
        self.network, self.method, self.optimizer = network_for(network), method, optimizer
        groups = getattr(optimizer, "param_groups", ())
        held = {id(p) for group in groups for p in group["params"]}
        if held and held.isdisjoint(map(id, self.network.parameters().values())):
            raise MethodError(
                f"{type(self).__name__}: the optimizer has none of the model's parameters, and would train another "
                "model (a copy?): make it of this model's parameters()"
            )
        self.accumulate, self.clip_norm, self.reduce = accumulate, clip_norm, reduce
        self._batches = 0  # since the last update
        self._begin()

    def _begin(self) -> None:
        """What a kind of step keeps besides."""

    def __call__(
        self, x: Tensor, y: Any, tangents: Tensor | None = None, extra: Mapping[str, Any] | None = None
    ) -> Parts:
        """One batch, and an update where it is the last of ``accumulate``.

        Args:
            x: [N, ...].
            y: targets, as the method takes them.
            tangents: [T, N, ...], for tangent methods only.
            extra: the model's other inputs, by name.
        """
        if self._batches == 0:
            self.optimizer.zero_grad()
        parts = self._add_gradients(x, y, tangents, extra)
        self._batches = (self._batches + 1) % self.accumulate
        if self._batches == 0:
            self._update()
        return parts

    def _add_gradients(self, x: Tensor, y: Any, tangents: Any, extra: Any) -> Parts:
        """The batch's share of the gradient is added to ``.grad``."""
        parts = self.method.parts(self.network, x, y, tangents, extra)
        if parts.loss.requires_grad:
            (parts.loss / self.accumulate if self.accumulate > 1 else parts.loss).backward()
        return parts._replace(loss=parts.loss.detach())

    def _update(self) -> None:
        self._finish_gradients()
        self.optimizer.step()

    def _finish_gradients(self) -> None:
        """What becomes of them between the last batch and the optimizer."""
        own = self.network.parameters()
        if self.reduce is not None:
            for name, g in self.reduce({n: p.grad for n, p in own.items() if p.grad is not None}).items():
                own[name].grad = g
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(own.values(), self.clip_norm)

    def _key(self, x: Tensor, y: Any, tangents: Any, extra: Any) -> tuple[Any, ...]:
        """What the tensor operations of a gradient depend on, but for the numbers that they get."""
        method = self.method.at(**strength_of(self.method, 0.0))
        inputs = tuple(kind_of(a) for a in tree_leaves((x, y, tangents, dict(extra or {}))))
        own = tuple((id(p), p.requires_grad, p.dtype, p.device) for p in self.network.model.parameters())
        return method, settings(method.criterion), inputs, own, settings(self.network.model)


def strength_of(method: Method, value: Any) -> dict[str, Any]:
    """A value for β, ε or λ, by name; {} for a method that has none."""
    return {} if method.parameter is None else {method.parameter: value}


def value_of(method: Method) -> Any:
    """β, ε or λ; None where there is none."""
    return getattr(method, method.parameter) if method.parameter else None


def strength_tensors(method: Method, x: Tensor) -> dict[str, Tensor]:
    """β, ε or λ as a tensor: a number would be part of the graph."""
    value = value_of(method)
    if value is not None and not isinstance(value, Tensor):
        value = torch.tensor(float(value), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return strength_of(method, value)
