"""Layers that act on each element: activations, dropout, products, batch normalisation with fixed statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.layer import Layer, Names, Tangents, shell, without, wrapped
from ibp_triton.steady import dropout_mask


class Pointwise(Layer):
    """y = σ(a): f~ and f~~ multiply by σ'(a), the curvature is σ''(a) d t."""

    input: Tensor
    output: Tensor

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d σ'(a)."""
        return {"input": self._sloped(d)}

    def jvp(self, t: Tangents) -> Tensor:
        """t σ'(a)."""
        return self._sloped(t["input"])

    def _sloped(self, t: Tensor) -> Tensor:
        return times(t, self.slope)

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """d t σ''(a), summed over tangents."""
        second, rank = self.bend(), self.input.dim()
        if second is None:
            return {}
        if d.dim() != t["input"].dim():
            d, t = without(d, rank), {"input": without(t["input"], rank)}
        return {"input": without(d * t["input"], rank) * second}

    def let_go_of_bends(self) -> None:
        """σ'(a) is all that is read from now on, once it is known."""
        if "slope" in vars(self):
            self.input = self.output = shell(self.input)

    @cached_property
    def slope(self) -> Tensor:
        """σ'(a)."""
        raise NotImplementedError

    def bend(self) -> Tensor | None:
        """σ''(a); None where it is zero almost everywhere."""
        return None


class ReLU(Pointwise):
    """max(a, 0); the slope at 0 is 0."""

    label, follows = "relu", True
    source: Callable[[], Tensor] | None = None  # what makes the input anew

    def forward(self, input: Tensor, inplace: bool = False) -> Tensor:
        """Same shape."""
        self.input = self.output = torch.relu(input)  # the mask is output > 0: the input need not be kept
        return self.output

    def after(self, source: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """max(source, 0), once for the linear sweep and the weight gradient behind it."""
        self.source = source
        return lambda: self.output

    def let_go_of_bends(self) -> None:
        """The output, where it can be made anew."""
        if self.source is not None:
            self.input = shell(self.input)
            vars(self).pop("output", None)

    @cached_property
    def output(self) -> Tensor:  # type: ignore[override]  # `forward` writes it all the same
        """Made anew, where it was let go of."""
        assert self.source is not None
        return torch.relu_(self.source())

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d where the output is positive."""
        return {"input": self._masked(d)}

    def jvp(self, t: Tangents) -> Tensor:
        """t where the output is positive."""
        return self._masked(t["input"])

    def _masked(self, t: Tensor) -> Tensor:
        return meeting(lambda d, y: torch.ops.aten.threshold_backward(d, y, 0), t, self.output)


def storage_order(t: Tensor, value: Tensor) -> list[int] | None:
    """The axes of a channels-last value as they lie in memory, where tangents [T, *S] meet it; else None.

    torch would broadcast [T, *S] with [*S] into another layout, and every later sweep would copy.
    """
    if t.dim() != 5 or value.dim() != 4 or value.stride(1) != 1 or value.shape[1] == 1:
        return None
    return [0, 2, 3, 1]


def times(t: Tensor, value: Tensor) -> Tensor:
    """t · value for t [T, *S] or [*S] and value [*S], in t's memory format."""
    return meeting(torch.mul, t, value)


def meeting(function: Callable[[Tensor, Tensor], Tensor], t: Tensor, value: Tensor) -> Tensor:
    """An elementwise function of t [T, *S] or [*S] and value [*S], in t's memory format."""
    order = storage_order(t, value)
    if order is None:
        return function(t, value)
    moved = function(t.permute(0, *(1 + i for i in order)), value.permute(order))
    return moved.permute(0, *(1 + order.index(i) for i in range(len(order))))


class LeakyReLU(Pointwise):
    """a, or negative_slope · a below zero."""

    label = "leaky_relu"

    def forward(self, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
        """Same shape."""
        self.input, self.negative_slope = input, negative_slope
        return F.leaky_relu(input, negative_slope)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d, or negative_slope · d where the input is not positive."""
        return {"input": torch.ops.aten.leaky_relu_backward(d, self.input, self.negative_slope, False)}

    def jvp(self, t: Tangents) -> Tensor:
        """t likewise."""
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
        """y (1 − y)."""
        return self.output * (1 - self.output)

    def bend(self) -> Tensor:
        """y (1 − y)(1 − 2y)."""
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
        """β s (1 − s), 0 above the threshold."""
        return self.beta * self.slope * (1 - self.slope)


class SiLU(Pointwise):
    """a · sigmoid(a)."""

    label = "silu"

    def forward(self, input: Tensor, inplace: bool = False) -> Tensor:
        """Same shape."""
        self.input = input
        return F.silu(input)

    @cached_property
    def slope(self) -> Tensor:
        """s (1 + a (1 − s))."""
        return torch.ops.aten.silu_backward(_one(self.input), self.input)  # type: ignore[no-any-return]

    def bend(self) -> Tensor:
        """s (1 − s)(2 + a (1 − 2s))."""
        gate = torch.sigmoid(self.input)
        return gate * (1 - gate) * (2 + self.input * (1 - 2 * gate))


class GELU(Pointwise):
    """a Φ(a), or its tanh approximation."""

    label, dear = "gelu", True
    kept = False  # the input, of which slope and output are made anew

    def forward(self, input: Tensor, approximate: str = "none") -> Tensor:
        """Same shape."""
        self.input, self.approximate = input, approximate
        return F.gelu(input, approximate=approximate)

    def again(self) -> Callable[[], Tensor] | None:
        """a Φ(a)."""
        self.kept = not wrapped(self.input)
        return partial(F.gelu, self.input, approximate=self.approximate) if self.kept else None

    def let_go_of_bends(self) -> None:
        """The slope, or all but the slope."""
        if self.kept:
            vars(self).pop("slope", None)
        else:
            super().let_go_of_bends()

    def _sloped(self, t: Tensor) -> Tensor:
        if not self.kept or t.dim() > self.input.dim() or wrapped(t):
            return super()._sloped(t)
        return torch.ops.aten.gelu_backward(t, self.input, approximate=self.approximate)  # type: ignore[no-any-return]

    @cached_property
    def slope(self) -> Tensor:
        """Φ(a) + a φ(a), or that of the approximation."""
        a = self.input
        one = _one(a) if a.is_cuda else torch.ones_like(a)  # oneDNN's kernel, twice as quick, takes no expanded tensor
        return torch.ops.aten.gelu_backward(one, a, approximate=self.approximate)  # type: ignore[no-any-return]

    def bend(self) -> Tensor:
        """φ(a)(2 − a²), or that of the approximation."""
        a = self.input
        if self.approximate == "none":
            square, scale = a * a, 1 / math.sqrt(2 * math.pi)
            return (square * -0.5).exp_().mul_(square.mul_(-scale).add_(2 * scale))
        th, inner1, inner2 = self._tanh_parts()
        return (1 - th * th) * (inner1 + 0.5 * a * (inner2 - 2 * th * inner1 * inner1))

    def _tanh_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """tanh(u), u', u'' for u = √(2/π)(a + 0.044715 a³)."""
        a, k, c = self.input, math.sqrt(2 / math.pi), 0.044715
        return torch.tanh(k * (a + c * a**3)), k * (1 + 3 * c * a * a), 6 * k * c * a


def _one(a: Tensor) -> Tensor:
    """The derivative for which torch's kernel returns σ'(a), in one pass instead of one for each operation."""
    return torch.ones((), dtype=a.dtype, device=a.device).expand_as(a)


class Dropout(Pointwise):
    """Multiplication by one random mask, the same in every sweep of a step."""

    label = "dropout"
    shapes_only = ("input",)
    masked_axes: ClassVar[int | None] = None  # None: every element; 2: whole channels of [N, C, ...]

    def forward(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Same shape; identity when not training."""
        self.input = input
        if not training or p == 0:
            self.mask = None
            return input
        self.mask = dropout_mask(input, p, self.masked_axes)
        return input * self.mask

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d · mask."""
        return {"input": d if self.mask is None else d * self.mask}

    def jvp(self, t: Tangents) -> Tensor:
        """t · mask."""
        return self.vjp(t["input"], ("input",))["input"]


class ChannelDropout(Dropout):
    """Dropout of whole channels (Dropout1d, Dropout2d, Dropout3d)."""

    label = "channel_dropout"
    masked_axes = 2
