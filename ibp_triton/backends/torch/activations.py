"""Activations and elementary functions: σ, and formulas for σ' and σ'' in the input a and the output y."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.backends.torch.pointwise import Pointwise, meeting, times
from ibp_triton.layer import Layer, Names, Tangents, from_end, matched, sum_to, wide, without

Formula = Callable[[Tensor, Tensor], Tensor]


class Unary(Pointwise):
    """σ without settings, by its torch function."""

    function: ClassVar[Callable[[Tensor], Tensor]]
    first: ClassVar[Formula]
    second: ClassVar[Formula | None]

    def forward(self, input: Tensor) -> Tensor:
        """The same shape."""
        self.input, self.output = input, type(self).function(input)
        return self.output

    @cached_property
    def slope(self) -> Tensor:
        """σ'(a)."""
        return type(self).first(self.input, self.output)

    def bend(self) -> Tensor | None:
        """σ''(a)."""
        second = type(self).second
        return None if second is None else second(self.input, self.output)


class UnaryInPlace(Unary):
    """The same for functions with an argument ``inplace``, which is not heeded: values are kept."""

    def forward(self, input: Tensor, inplace: bool = False) -> Tensor:
        """The same shape."""
        return super().forward(input)


def _between(a: Tensor, low: float, high: float) -> Tensor:
    """1 strictly between, 0 elsewhere."""
    return ((a > low) & (a < high)).to(a.dtype)


def _mish_slope(a: Tensor, _: Tensor) -> Tensor:
    w, s = torch.tanh(F.softplus(a)), torch.sigmoid(a)
    return w + a * s * (1 - w * w)


def _mish_bend(a: Tensor, _: Tensor) -> Tensor:
    w, s = torch.tanh(F.softplus(a)), torch.sigmoid(a)
    return (1 - w * w) * s * (2 + a * (1 - s - 2 * w * s))


_SELU, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


def _selu_bend(a: Tensor, y: Tensor) -> Tensor:
    return torch.where(a >= 0, 0.0, y + _SELU * _SELU_ALPHA)  # at 0 as torch has it


def _selu_slope(a: Tensor, y: Tensor) -> Tensor:
    return torch.where(a > 0, _SELU, y + _SELU * _SELU_ALPHA)


# name: (function, σ', σ'' or None where it is zero almost everywhere)
PLAIN: dict[str, tuple[Callable[[Tensor], Tensor], Formula, Formula | None]] = {
    "exp": (torch.exp, lambda a, y: y, lambda a, y: y),
    "expm1": (torch.expm1, lambda a, y: y + 1, lambda a, y: y + 1),
    "log": (torch.log, lambda a, y: 1 / a, lambda a, y: -1 / (a * a)),
    "log1p": (torch.log1p, lambda a, y: 1 / (1 + a), lambda a, y: -1 / (1 + a).square()),
    "sqrt": (torch.sqrt, lambda a, y: 0.5 / y, lambda a, y: -0.25 / (y * y * y)),
    "rsqrt": (torch.rsqrt, lambda a, y: -0.5 * y * y * y, lambda a, y: 0.75 * y.pow(5)),
    "square": (torch.square, lambda a, y: 2 * a, lambda a, y: torch.full_like(a, 2)),
    "reciprocal": (torch.reciprocal, lambda a, y: -y * y, lambda a, y: 2 * y * y * y),
    "abs": (torch.abs, lambda a, y: torch.sign(a), None),
    "sin": (torch.sin, lambda a, y: torch.cos(a), lambda a, y: -y),
    "cos": (torch.cos, lambda a, y: -torch.sin(a), lambda a, y: -y),
    "erf": (
        torch.erf,
        lambda a, y: 2 / math.sqrt(math.pi) * torch.exp(-a * a),
        lambda a, y: -4 / math.sqrt(math.pi) * a * torch.exp(-a * a),
    ),
    "logsigmoid": (
        F.logsigmoid,
        lambda a, y: torch.sigmoid(-a),
        lambda a, y: -torch.sigmoid(-a) * torch.sigmoid(a),
    ),
    "softsign": (
        F.softsign,
        lambda a, y: 1 / (1 + a.abs()).square(),
        lambda a, y: -2 * torch.sign(a) / (1 + a.abs()).pow(3),
    ),
    "tanhshrink": (F.tanhshrink, lambda a, y: torch.tanh(a).square(), lambda a, y: _tanhshrink_bend(a)),
}
IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], Formula, Formula | None]] = {
    "hardsigmoid": (F.hardsigmoid, lambda a, y: _between(a, -3, 3) / 6, None),
    "hardswish": (
        F.hardswish,
        lambda a, y: torch.where(a >= 3, 1.0, (a / 3 + 0.5) * (a > -3)),
        lambda a, y: _between(a, -3, 3) / 3,
    ),
    "mish": (F.mish, _mish_slope, _mish_bend),
    "selu": (F.selu, _selu_slope, _selu_bend),
}


def _tanhshrink_bend(a: Tensor) -> Tensor:
    y = torch.tanh(a)
    return 2 * y * (1 - y * y)


def _rules(base: type[Unary], table: Mapping[str, Any]) -> dict[str, type[Unary]]:
    return {
        name: type(
            name.capitalize(),
            (base,),
            {
                "__doc__": f"{name}(a).",
                "label": name,
                **{k: None if f is None else staticmethod(f) for k, f in zip(_PARTS, parts, strict=True)},
            },
        )
        for name, parts in table.items()
    }


_PARTS = ("function", "first", "second")
UNARY = _rules(Unary, PLAIN) | _rules(UnaryInPlace, IN_PLACE)


class ELU(Pointwise):
    """a, or α (exp(a) − 1) below zero."""

    label = "elu"

    def forward(self, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
        """The same shape."""
        self.input, self.scale, self.rate = input, alpha, 1.0
        self.output = F.elu(input, alpha)
        return self.output

    @cached_property
    def slope(self) -> Tensor:
        """1, or (y + α)/α · α' below zero."""
        return torch.where(self.input > 0, 1.0, (self.output + self.scale) * self.rate)

    def bend(self) -> Tensor:
        """The slope over the scale of a below zero, else 0 as torch has it."""
        return torch.where(self.input >= 0, 0.0, (self.output + self.scale) * self.rate**2)


class CELU(ELU):
    """a, or α (exp(a/α) − 1) below zero."""

    label = "celu"

    def forward(self, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
        """The same shape."""
        self.input, self.scale, self.rate = input, alpha, 1 / alpha
        self.output = F.celu(input, alpha)
        return self.output


class Hardtanh(Pointwise):
    """a between two numbers, and those outside."""

    label = "hardtanh"

    def forward(self, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
        """The same shape."""
        self.input, self.bounds = input, (min_val, max_val)
        return F.hardtanh(input, min_val, max_val)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d strictly between the numbers, else 0."""
        return {"input": self._masked(d)}

    def jvp(self, t: Tangents) -> Tensor:
        """t likewise."""
        return self._masked(t["input"])

    def _masked(self, t: Tensor) -> Tensor:
        return meeting(lambda d, a: torch.ops.aten.hardtanh_backward(d, a, *self.bounds), t, self.input)


class ReLU6(Hardtanh):
    """a between 0 and 6, and those outside."""

    label = "relu6"

    def forward(self, input: Tensor, inplace: bool = False) -> Tensor:  # type: ignore[override]
        """The same shape."""
        return super().forward(input, 0, 6)


class Clamp(Pointwise):
    """a between two numbers, of which one may be absent; at them the slope is 1."""

    label = "clamp"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Bounds that are numbers."""
        bounds = (arguments.get("min"), arguments.get("max"))
        return list(kinds) == ["input"] and all(b is None or isinstance(b, (int, float)) for b in bounds)

    def forward(self, input: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
        """The same shape."""
        self.input, self.bounds = input, (min, max)
        return torch.clamp(input, min, max)

    @cached_property
    def slope(self) -> Tensor:
        """1 from one bound to the other."""
        low, high = self.bounds
        inside = torch.ones_like(self.input, dtype=torch.bool) if low is None else self.input >= low
        return (inside if high is None else inside & (self.input <= high)).to(self.input.dtype)


class ClampMin(Clamp):
    """The larger of a and a number."""

    def forward(self, input: Tensor, min: float) -> Tensor:  # type: ignore[override]
        """The same shape."""
        return super().forward(input, min)


class ClampMax(Clamp):
    """The smaller of a and a number."""

    def forward(self, input: Tensor, max: float) -> Tensor:  # type: ignore[override]
        """The same shape."""
        return super().forward(input, None, max)


class Power(Pointwise):
    """a to the power of a number n."""

    label = "pow"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """A number as exponent."""
        return list(kinds) == ["input"] and isinstance(arguments.get("exponent"), (int, float))

    def forward(self, input: Tensor, exponent: float) -> Tensor:
        """The same shape."""
        self.input, self.exponent = input, exponent
        return input**exponent

    @cached_property
    def slope(self) -> Tensor:
        """n a^(n − 1)."""
        return self._power(1)

    def bend(self) -> Tensor:
        """n (n − 1) a^(n − 2)."""
        return self._power(2)

    def _power(self, order: int) -> Tensor:
        """The derivative of that order, zero where the factor in front is."""
        factor = math.prod(self.exponent - i for i in range(order))
        if factor == 0:
            return torch.zeros_like(self.input)
        rest = self.exponent - order
        return torch.full_like(self.input, factor) if rest == 0 else factor * self.input**rest


class GLU(Layer):
    """y = u σ(v), u and v the halves of the input along an axis, s = σ(v), s' = s (1 − s), s'' = s' (1 − 2 s)."""

    label = "glu"

    def forward(self, input: Tensor, dim: int = -1) -> Tensor:
        """[..., 2n, ...] → [..., n, ...]."""
        self.rank, self.axis = input.dim(), from_end(dim, input)
        self.value, gate = input.chunk(2, self.axis)
        self.gate = torch.sigmoid(gate)
        return self.value * self.gate

    @property
    def _slope(self) -> Tensor:
        return self.gate * (1 - self.gate)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """(d s, d u s')."""
        return {"input": torch.cat([d * self.gate, d * (self.value * self._slope)], self.axis)}

    def jvp(self, t: Tangents) -> Tensor:
        """t_u s + u s' t_v."""
        value, gate = t["input"].chunk(2, self.axis)
        return value * self.gate + gate * (self.value * self._slope)

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """(d s' t_v, d (s' t_u + u s'' t_v))."""
        d, t = matched(d, self.rank, t, {"input": self.value})
        value, gate = t["input"].chunk(2, self.axis)
        slope = self._slope
        lower = d * (slope * value + self.value * slope * (1 - 2 * self.gate) * gate)
        return {"input": without(torch.cat([d * slope * gate, lower], self.axis), self.rank)}


class PReLU(Layer):
    """a, or w a where a is not positive; w is one number or one for each channel of [N, C, ...]."""

    label = "prelu"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """w does not depend on x."""
        return kinds.get("input") == "active" and kinds.get("weight") != "active"

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """The same shape."""
        self.input, self.weight = input, weight
        self.slopes = weight.reshape([-1][: input.dim()] + [1] * (input.dim() - 2))
        return F.prelu(input, weight)

    @cached_property
    def slope(self) -> Tensor:
        """1, or w."""
        return torch.where(self.input > 0, 1.0, self.slopes)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d, or w d; Σ d a over the elements that are not positive for w."""
        out = {"input": times(d, self.slope)} if "input" in wanted else {}
        if "weight" in wanted:
            out["weight"] = self._sums(wide(d) * self.input.clamp(max=0))
        return out

    def jvp(self, t: Tangents) -> Tensor:
        """t, or w t."""
        return times(t["input"], self.slope)

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """Σ r t over the elements that are not positive."""
        if "weight" not in wanted:
            return {}
        r, t = matched(wide(r), self.input.dim(), t, {"input": self.input})
        found = self._sums(torch.where(self.input > 0, 0.0, r * t["input"]))
        return {"weight": without(found, self.weight.dim())}

    def _sums(self, v: Tensor) -> Tensor:
        found = sum_to(v, self.slopes, self.input.dim())
        return found.reshape([*found.shape[: v.dim() - self.input.dim()], *self.weight.shape])
