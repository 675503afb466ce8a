"""Layers that act on each element: activations, dropout, products, batch normalisation with fixed statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.rules.base import Layer, Names, Tangents, lift, sum_to, without_tangents


class Pointwise(Layer):
    """y = σ(a): f~ and f~~ multiply by σ'(a), the curvature is σ''(a) d t."""

    input: Tensor
    output: Tensor

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """D σ'(a)."""
        return {"input": d * self.slope}

    def jvp(self, t: Tangents) -> Tensor:
        """T σ'(a)."""
        return t["input"] * self.slope

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """d t σ''(a), summed over tangents."""
        second = self.bend()
        return {} if second is None else {"input": without_tangents(d * t["input"], self.input) * second}

    @cached_property
    def slope(self) -> Tensor:
        """σ'(a)."""
        raise NotImplementedError

    def bend(self) -> Tensor | None:
        """σ''(a); None where it is zero almost everywhere."""
        return None


class ReLU(Pointwise):
    """max(a, 0); the slope at 0 is 0."""

    label = "relu"

    def forward(self, input: Tensor, inplace: bool = False) -> Tensor:
        """Same shape."""
        self.input = self.output = torch.relu(input)  # the mask is output > 0: the input need not be kept
        return self.output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """D where the output is positive."""
        return {"input": self._masked(d)}

    def jvp(self, t: Tangents) -> Tensor:
        """T where the output is positive."""
        return self._masked(t["input"])

    def _masked(self, t: Tensor) -> Tensor:
        order = _storage_order(t, self.output)
        if order is None:
            return torch.ops.aten.threshold_backward(t, self.output, 0)  # type: ignore[no-any-return]
        masked = torch.ops.aten.threshold_backward(t.permute(0, *(1 + i for i in order)), self.output.permute(order), 0)
        return masked.permute(0, *(1 + order.index(i) for i in range(len(order))))  # type: ignore[no-any-return]


def _storage_order(t: Tensor, value: Tensor) -> list[int] | None:
    """The axes of a channels-last value as they lie in memory, where tangents [T, *S] meet it; else None.

    torch would broadcast [T, *S] with [*S] into another layout, and every later sweep would copy.
    """
    if t.dim() != 5 or value.dim() != 4 or value.stride(1) != 1 or value.shape[1] == 1:
        return None
    return [0, 2, 3, 1]


class LeakyReLU(Pointwise):
    """a, or negative_slope · a below zero."""

    label = "leaky_relu"

    def forward(self, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
        """Same shape."""
        self.input, self.negative_slope = input, negative_slope
        return F.leaky_relu(input, negative_slope)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """D, or negative_slope · d where the input is not positive."""
        return {"input": torch.ops.aten.leaky_relu_backward(d, self.input, self.negative_slope, False)}

    def jvp(self, t: Tangents) -> Tensor:
        """T likewise."""
        return self.vjp(t["input"], ("input",))["input"]


class Sigmoid(Pointwise):
    """1 / (1 + exp(−a))."""

    label = "sigmoid"

    def forward(self, input: Tensor) -> Tensor:
        """Same shape."""
        self.input, self.output = input, torch.sigmoid(input)
        return self.output

    @cached_property
    def slope(self) -> Tensor:
        """Y (1 − y)."""
        return self.output * (1 - self.output)

    def bend(self) -> Tensor:
        """Y (1 − y)(1 − 2y)."""
        return self.slope * (1 - 2 * self.output)


class Tanh(Pointwise):
    """tanh(a)."""

    label = "tanh"

    def forward(self, input: Tensor) -> Tensor:
        """Same shape."""
        self.input, self.output = input, torch.tanh(input)
        return self.output

    @cached_property
    def slope(self) -> Tensor:
        """1 − y²."""
        return 1 - self.output.square()

    def bend(self) -> Tensor:
        """−2y (1 − y²)."""
        return -2 * self.output * self.slope


class Softplus(Pointwise):
    """ln(1 + exp(βa)) / β, linear above the threshold."""

    label = "softplus"

    def forward(self, input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
        """Same shape."""
        self.input, self.beta, self.curved = input, beta, input * beta <= threshold
        return F.softplus(input, beta, threshold)

    @cached_property
    def slope(self) -> Tensor:
        """sigmoid(βa), 1 above the threshold."""
        return torch.where(self.curved, torch.sigmoid(self.beta * self.input), 1.0)

    def bend(self) -> Tensor:
        """Β s (1 − s), 0 above the threshold."""
        return self.beta * self.slope * (1 - self.slope)


class SiLU(Pointwise):
    """a · sigmoid(a)."""

    label = "silu"

    def forward(self, input: Tensor, inplace: bool = False) -> Tensor:
        """Same shape."""
        self.input, self.gate = input, torch.sigmoid(input)
        return input * self.gate

    @cached_property
    def slope(self) -> Tensor:
        """S (1 + a (1 − s))."""
        return self.gate * (1 + self.input * (1 - self.gate))

    def bend(self) -> Tensor:
        """S (1 − s)(2 + a (1 − 2s))."""
        return self.gate * (1 - self.gate) * (2 + self.input * (1 - 2 * self.gate))


class GELU(Pointwise):
    """a Φ(a), or its tanh approximation."""

    label = "gelu"

    def forward(self, input: Tensor, approximate: str = "none") -> Tensor:
        """Same shape."""
        self.input, self.approximate = input, approximate
        return F.gelu(input, approximate=approximate)

    @cached_property
    def slope(self) -> Tensor:
        """Φ(a) + a φ(a), or that of the approximation."""
        a = self.input
        if self.approximate == "none":
            return torch.special.ndtr(a) + a * self._density()  # type: ignore[no-any-return]
        th, inner1, _ = self._tanh_parts()
        return 0.5 * (1 + th) + 0.5 * a * (1 - th * th) * inner1

    def bend(self) -> Tensor:
        """Φ(a)(2 − a²), or that of the approximation."""
        a = self.input
        if self.approximate == "none":
            return self._density() * (2 - a * a)
        th, inner1, inner2 = self._tanh_parts()
        return (1 - th * th) * (inner1 + 0.5 * a * (inner2 - 2 * th * inner1 * inner1))

    def _density(self) -> Tensor:
        return torch.exp(-0.5 * self.input.square()) / math.sqrt(2 * math.pi)

    def _tanh_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """tanh(u), u', u'' for u = √(2/π)(a + 0.044715 a³)."""
        a, k, c = self.input, math.sqrt(2 / math.pi), 0.044715
        return torch.tanh(k * (a + c * a**3)), k * (1 + 3 * c * a * a), 6 * k * c * a


class Dropout(Pointwise):
    """Multiplication by one random mask, the same in every sweep of a step."""

    label = "dropout"
    masked_axes: ClassVar[int | None] = None  # None: every element; 2: whole channels of [N, C, ...]

    def forward(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Same shape; identity when not training."""
        self.input = input
        if not training or p == 0:
            self.mask = None
            return input
        shape = (
            input.shape if self.masked_axes is None else [*input.shape[: self.masked_axes], *[1] * (input.dim() - 2)]
        )
        mask = input.new_empty(shape).bernoulli_(1 - p)  # as torch draws it for a contiguous input
        self.mask = mask.div_(1 - p) if p < 1 else mask
        return input * self.mask

    def replay(self, first: Layer, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The mask of the first evaluation."""
        assert isinstance(first, Dropout)
        self.input, self.mask = input, first.mask
        return input if self.mask is None else input * self.mask

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """D · mask."""
        return {"input": d if self.mask is None else d * self.mask}

    def jvp(self, t: Tangents) -> Tensor:
        """T · mask."""
        return self.vjp(t["input"], ("input",))["input"]


class ChannelDropout(Dropout):
    """Dropout of whole channels (Dropout1d, Dropout2d, Dropout3d)."""

    label = "channel_dropout"
    masked_axes = 2


class Multiply(Layer):
    """y = u · v with broadcasting; either side may be an activation, a parameter, a tensor or a number."""

    label = "multiply"

    def forward(self, input: Any, other: Any) -> Tensor:
        """The broadcast shape."""
        self.sides = {"input": input, "other": other}
        self.output: Tensor = input * other
        return self.output  # type: ignore[no-any-return]

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """D v for u, d u for v, summed where they were broadcast."""
        return {name: self._to(name, d * self.sides[_other(name)]) for name in wanted}

    def jvp(self, t: Tangents) -> Tensor:
        """t_u v + u t_v."""
        parts = [self._lift(name, tangent) * self.sides[_other(name)] for name, tangent in t.items()]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]  # type: ignore[no-any-return]

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names, exact: bool = False) -> dict[str, Tensor]:
        """R t_u for v, r t_v for u."""
        out = {}
        for name in wanted:
            if _other(name) in t:
                back = self._to(name, r * self._lift(_other(name), t[_other(name)]))
                out[name] = without_tangents(back, self.sides[name])
        return out

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """The same for an active side."""
        return self.tangent_param_vjp(t, d, wanted)

    def _lift(self, name: str, t: Tensor) -> Tensor:
        return lift(t, self.sides[name], self.output.dim())

    def _to(self, name: str, d: Tensor) -> Tensor:
        return sum_to(d, self.sides[name], self.output.dim())

    def multiply_adds(self) -> int:
        """None counted: a product for each element is not matrix work."""
        return 0


def _other(name: str) -> str:
    return "other" if name == "input" else "input"


class Divide(Layer):
    """y = u / c for a constant or a number c."""

    label = "divide"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """The divisor must not depend on x or on parameters."""
        plain = kinds.get("other", "constant") == "constant" and "input" in kinds
        return plain and arguments.get("rounding_mode") is None

    def forward(self, input: Tensor, other: Any, *, rounding_mode: None = None) -> Tensor:
        """The broadcast shape."""
        self.input, self.other = input, other
        self.output: Tensor = input / other
        return self.output  # type: ignore[no-any-return]

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """D / c."""
        return {"input": sum_to(d / self.other, self.input, self.output.dim())}

    def jvp(self, t: Tangents) -> Tensor:
        """T / c."""
        return lift(t["input"], self.input, self.output.dim()) / self.other  # type: ignore[no-any-return]
