"""Softmax y and its logarithm along an axis.

jvp = vjp: y∘(t − ⟨y, t⟩); curvature y∘(g − ⟨y, g⟩) with g = d∘t − d⟨y, t⟩ − t⟨d, y⟩.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ibp_triton.layer import Layer, Names, Tangents, each, from_end, matched, without, wrapped


class Softmax(Layer):
    """exp(a) over its sum along one axis."""

    label = "softmax"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Along an axis that is named."""
        return list(kinds) == ["input"] and isinstance(arguments.get("dim"), int)

    def forward(self, input: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
        """The same shape, in ``dtype``."""
        self.rank, self.dtype, self.axis = input.dim(), input.dtype, from_end(dim, input)
        self.output = torch.softmax(input, dim, dtype=dtype)
        return self.output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """y∘(d − ⟨y, d⟩)."""
        return {"input": self._pull(d).to(self.dtype)}

    def jvp(self, t: Tangents) -> Tensor:
        """y∘(t − ⟨y, t⟩)."""
        return self._pull(t["input"].to(self.output.dtype))

    def _pull(self, d: Tensor) -> Tensor:
        return softmax_pull(self.output, d, self.axis)

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """y∘(g − ⟨y, g⟩)."""
        d, t = matched(d, self.rank, t, {"input": self.output})
        push, y = t["input"].to(self.output.dtype), self.output
        g = d * push - d * self._along(y * push) - push * self._along(y * d)
        return {"input": self._pull(without(g, self.rank)).to(self.dtype)}

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """Nothing: one operand cannot be active and parametric."""
        return {}

    def _along(self, v: Tensor) -> Tensor:
        return v.sum(self.axis, keepdim=True)


class TorchSoftmax(Softmax):
    """torch.softmax, whose third argument is the dtype."""

    def forward(self, input: Tensor, dim: Any = None, dtype: Any = None) -> Tensor:  # type: ignore[override]
        """The same shape, in ``dtype``."""
        return super().forward(input, dim, dtype=dtype)


class LogSoftmax(Softmax):
    """y = a − ln Σ exp(a) along one axis; with p = exp(y): vjp d − p Σ d, jvp t − ⟨p, t⟩."""

    label = "log_softmax"

    def forward(self, input: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
        """The same shape, in ``dtype``."""
        self.rank, self.dtype, self.axis = input.dim(), input.dtype, from_end(dim, input)
        self.output = torch.log_softmax(input, dim, dtype=dtype)
        return self.output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d − p Σ d."""
        return {"input": (d - self.output.exp() * self._along(d)).to(self.dtype)}

    def jvp(self, t: Tangents) -> Tensor:
        """t − ⟨p, t⟩."""
        push = t["input"].to(self.output.dtype)
        return push - self._along(self.output.exp() * push)

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """−(Σ d) p∘(t − ⟨p, t⟩)."""
        d, t = matched(d, self.rank, t, {"input": self.output})
        push, p = t["input"].to(self.output.dtype), self.output.exp()
        bent = -self._along(d) * p * (push - self._along(p * push))
        return {"input": without(bent, self.rank).to(self.dtype)}


class TorchLogSoftmax(LogSoftmax):
    """torch.log_softmax, whose third argument is the dtype."""

    def forward(self, input: Tensor, dim: Any = None, dtype: Any = None) -> Tensor:  # type: ignore[override]
        """The same shape, in ``dtype``."""
        return super().forward(input, dim, dtype=dtype)


def softmax_pull(y: Tensor, d: Tensor, axis: int = -1, fresh: bool = False) -> Tensor:
    """y∘(d − ⟨y, d⟩) along ``axis``, a kernel of torch's; [T, *S] for d of [T, *S].

    In the place of d where that is ``fresh``, nobody else's: the CPU's kernel has read a row before it writes it.
    """
    plain = d.shape == y.shape and d.dtype == y.dtype and not d.is_cuda and not wrapped(y, d)
    if fresh and plain and get_proxy_mode() is None:
        return torch._softmax_backward_data(d, y, axis, y.dtype, grad_input=d)
    if wrapped(y, d) or d.shape[d.dim() - y.dim() :] != y.shape:
        return y * (d - (y * d).sum(axis, keepdim=True))
    return each(lambda one: torch._softmax_backward_data(one, y, axis, y.dtype), d, y.dim())
