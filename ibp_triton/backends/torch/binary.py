"""Layers of two sides with broadcasting: products, quotients, maxima, choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibp_triton.graph import Constant
from ibp_triton.layer import Layer, Names, Tangents, broadcast, lift, matched, sum_to, wide, without


class Binary(Layer):
    """An operation of two sides with broadcasting; either may be an activation, a parameter, a tensor or a number."""

    output: Tensor

    def _keep(self, input: Any, other: Any, output: Any) -> Tensor:
        self.sides, self.output = {"input": input, "other": other}, output
        return output  # type: ignore[no-any-return]

    def _lift(self, t: Tangents) -> dict[str, Tensor]:
        """Tangents that broadcast as their sides do."""
        return {name: lift(part, self.sides[name], self.output.dim()) for name, part in t.items()}

    def _to(self, name: str, d: Tensor) -> Tensor:
        """Summed over the axes along which the side was broadcast."""
        lead = d.shape[: d.dim() - self.output.dim()]
        return sum_to(d.expand((*lead, *self.output.shape)), self.sides[name], self.output.dim())

    def _matched(self, d: Tensor, t: Tangents) -> tuple[Tensor, dict[str, Tensor]]:
        d, t = matched(d, self.output.dim(), t, self.sides)
        return d, self._lift(t)

    def _gathered(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the sides' shapes, summed over tangents."""
        return {name: without(self._to(name, part), self.sides[name].dim()) for name, part in parts.items()}

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """As for an active side, in float32 for half precision."""
        return self.curvature(wide(r), {name: wide(part) for name, part in t.items()}, wanted)


class Multiply(Binary):
    """y = u · v."""

    label = "multiply"

    def forward(self, input: Any, other: Any) -> Tensor:
        """The broadcast shape."""
        return self._keep(input, other, input * other)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d v for u, d u for v, summed where they were broadcast."""
        return {name: self._to(name, d * self.sides[_other(name)]) for name in wanted}

    def jvp(self, t: Tangents) -> Tensor:
        """t_u v + u t_v."""
        parts = [tangent * self.sides[_other(name)] for name, tangent in self._lift(t).items()]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]  # type: ignore[no-any-return]

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """d t_v for u, d t_u for v."""
        d, t = self._matched(d, t)
        return self._gathered({name: d * t[_other(name)] for name in wanted if _other(name) in t})


def _other(name: str) -> str:
    return "other" if name == "input" else "input"


class Divide(Binary):
    """y = u / v."""

    label = "divide"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Without rounding."""
        return arguments.get("rounding_mode") is None

    def forward(self, input: Any, other: Any, *, rounding_mode: None = None) -> Tensor:
        """The broadcast shape."""
        return self._keep(input, other, input / other)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d / v for u, −d y / v for v."""
        found = d / self.sides["other"]
        return {name: self._to(name, found if name == "input" else -found * self.output) for name in wanted}

    def jvp(self, t: Tangents) -> Tensor:
        """(t_u − y t_v) / v."""
        t = self._lift(t)
        parts = [t["input"]] if "input" in t else []
        parts += [-self.output * t["other"]] if "other" in t else []
        return (parts[0] if len(parts) == 1 else parts[0] + parts[1]) / self.sides["other"]  # type: ignore[no-any-return]

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """−d t_v / v² for u, d (2 y t_v − t_u) / v² for v."""
        d, t = self._matched(d, t)
        d = d / self.sides["other"] / self.sides["other"]
        out = {}
        if "input" in wanted and "other" in t:
            out["input"] = -d * t["other"]
        if "other" in wanted:
            parts = [-t["input"]] if "input" in t else []
            parts += [2 * self.output * t["other"]] if "other" in t else []
            out["other"] = d * (parts[0] if len(parts) == 1 else parts[0] + parts[1])
        return self._gathered(out)


class ReverseDivide(Divide):
    """y = other / input."""

    def forward(self, input: Any, other: Any, *, rounding_mode: None = None) -> Tensor:
        """The broadcast shape."""
        result = super().forward(other, input)
        return result

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """The quotient's, by the sides' places in it."""
        return _swapped(super().vjp(d, _swapped(dict.fromkeys(wanted))))

    def jvp(self, t: Tangents) -> Tensor:
        """Likewise."""
        return super().jvp(_swapped(t))

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """Likewise."""
        return _swapped(super().curvature(d, _swapped(t), _swapped(dict.fromkeys(wanted))))


def _swapped(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {_other(name): part for name, part in parts.items()}


class Maximum(Binary):
    """The larger of two; where they are equal, half of each, as in torch."""

    label, sign = "maximum", 1

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """The broadcast shape."""
        first = torch.sign(input - other) * self.sign
        share = 0.5 * (1 + first)
        self.shares = {"input": share, "other": 1 - share}
        return self._keep(input, other, torch.maximum(input, other) if self.sign == 1 else torch.minimum(input, other))

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d where the side is the larger."""
        return {name: self._to(name, d * self.shares[name]) for name in wanted}

    def jvp(self, t: Tangents) -> Tensor:
        """Each tangent where its side is the larger."""
        parts = [part * self.shares[name] for name, part in self._lift(t).items()]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class Minimum(Maximum):
    """The smaller of two; where they are equal, half of each."""

    label, sign = "minimum", -1


class MaximumOf(Maximum):
    """max(u, v) of two tensors by the function that also takes a maximum along an axis."""

    names: ClassVar[Mapping[str, str]] = {"input": "input", "dim": "other"}

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """The second argument is a tensor."""
        return "dim" in kinds or isinstance(arguments.get("dim"), Constant)

    def forward(self, input: Tensor, dim: Tensor, keepdim: bool = False) -> Tensor:
        """The broadcast shape."""
        return super().forward(input, dim)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d where the side is the larger."""
        found = super().vjp(d, [self.names[name] for name in wanted])
        return {name: found[self.names[name]] for name in wanted}

    def jvp(self, t: Tangents) -> Tensor:
        """Each tangent where its side is the larger."""
        return super().jvp({self.names[name]: part for name, part in t.items()})


class MinimumOf(MaximumOf):
    """min(u, v) likewise."""

    label, sign = "minimum", -1


class Where(Binary):
    """input where the condition holds, other elsewhere; the condition has no derivative."""

    label = "where"

    def forward(self, condition: Tensor, input: Any, other: Any) -> Tensor:
        """The broadcast shape."""
        self.condition = condition
        return self._keep(input, other, torch.where(condition, input, other))

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d where the side was taken."""
        zero = d.new_zeros(())
        pairs = {"input": (d, zero), "other": (zero, d)}
        return {name: self._to(name, torch.where(self.condition, *pairs[name])) for name in wanted}

    def jvp(self, t: Tangents) -> Tensor:
        """Each tangent where its side was taken."""
        t = self._lift(t)
        zero = next(iter(t.values())).new_zeros(())
        pushed = torch.where(self.condition, t.get("input", zero), t.get("other", zero))
        return broadcast(pushed, self.output)
