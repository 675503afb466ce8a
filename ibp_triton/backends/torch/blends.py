"""Sums of one operand and of what others make: a + v b c, a + w (b − a), a with more added at some places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibp_triton.layer import Layer, Names, Tangents, broadcast, from_end, lift, matched, sum_to, wide, without


class Blend(Layer):
    """y of several sides with broadcasting, of degree one in each."""

    sides: dict[str, Any]
    output: Tensor

    def slope(self, name: str) -> Any:
        """∂y/∂side, a tensor or a number."""
        raise NotImplementedError

    def cross(self, one: str, other: str) -> Any:
        """∂²y/∂one∂other; None for zero."""
        raise NotImplementedError

    def _to(self, name: str, d: Tensor) -> Tensor:
        rank = self.output.dim()
        lead = d.shape[: d.dim() - rank]
        return sum_to(d.expand((*lead, *self.output.shape)), self.sides[name], rank)

    def _lift(self, t: Tangents) -> dict[str, Tensor]:
        return {name: lift(part, self.sides[name], self.output.dim()) for name, part in t.items()}

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d ∂y/∂side, summed where the side was broadcast."""
        return {name: self._to(name, d * self.slope(name)) for name in wanted}

    def jvp(self, t: Tangents) -> Tensor:
        """Σ t ∂y/∂side."""
        parts = [part * self.slope(name) for name, part in self._lift(t).items()]
        total: Tensor = sum(parts[1:], parts[0])
        return broadcast(total, self.output)

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """As for an active side, in float32 for half precision."""
        return self.curvature(wide(r), {name: wide(part) for name, part in t.items()}, wanted)

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """Σ d t ∂²y/∂side∂other over the other sides."""
        d, t = matched(d, self.output.dim(), t, self.sides)
        t, out = self._lift(t), {}
        for name in wanted:
            pairs = [(part, self.cross(name, other)) for other, part in t.items()]
            parts = [d * part * factor for part, factor in pairs if factor is not None]
            if parts:
                out[name] = without(self._to(name, sum(parts[1:], parts[0])), self.sides[name].dim())
        return out


class AddProduct(Blend):
    """y = a + v b c (addcmul)."""

    label = "addcmul"

    def forward(self, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
        """The broadcast shape."""
        self.sides, self.value = {"input": input, "tensor1": tensor1, "tensor2": tensor2}, value
        self.output = torch.addcmul(input, tensor1, tensor2, value=value)
        return self.output

    def slope(self, name: str) -> Any:
        """1 for a, v c for b, v b for c."""
        if name == "input":
            return 1
        other = self.sides[_FACTORS[name]]
        return other if self.value == 1 else other * self.value

    def cross(self, one: str, other: str) -> Any:
        """v between b and c."""
        return self.value if _FACTORS.get(one) == other else None


_FACTORS = {"tensor1": "tensor2", "tensor2": "tensor1"}


class Lerp(Blend):
    """y = a + w (b − a)."""

    label = "lerp"

    def forward(self, input: Tensor, end: Tensor, weight: Any) -> Tensor:
        """The broadcast shape."""
        self.sides = {"input": input, "end": end, "weight": weight}
        self.output = torch.lerp(input, end, weight)
        return self.output

    def slope(self, name: str) -> Any:
        """1 − w for a, w for b, b − a for w."""
        weight = self.sides["weight"]
        return {
            "input": lambda: 1 - weight,
            "end": lambda: weight,
            "weight": lambda: self.sides["end"] - self.sides["input"],
        }[name]()

    def cross(self, one: str, other: str) -> Any:
        """−1 between a and w, 1 between b and w."""
        pair = {one, other}
        return None if "weight" not in pair or len(pair) == 1 else -1 if "input" in pair else 1


class AddAt(Layer):
    """y = a with alpha times the slices of another tensor added at the numbered places of an axis (index_add)."""

    label: ClassVar[str] = "index_add"
    added: ClassVar[str] = "source"
    alpha: float = 1

    def forward(self, input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
        """a's shape."""
        self.alpha = alpha
        output: Tensor = torch.index_add(input, dim, index, source, alpha=alpha)
        return self._keep(input, dim, index, source, output)

    def _keep(self, input: Tensor, dim: int, index: Tensor, source: Tensor, output: Tensor) -> Tensor:
        self.shape, self.more = input.shape, source.shape
        self.axis, self.index = from_end(dim, output), index
        return output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d for a, alpha times its slices for what was added."""
        out = {"input": d} if "input" in wanted else {}
        return out | ({self.added: self._taken(d) * self.alpha} if self.added in wanted else {})

    def _taken(self, d: Tensor) -> Tensor:
        return d.index_select(self.axis, self.index)

    def jvp(self, t: Tangents) -> Tensor:
        """The same sum of the tangents."""
        some = next(iter(t.values()))
        lead = some.shape[: some.dim() - (len(self.shape) if "input" in t else len(self.more))]
        base = t["input"] if "input" in t else some.new_zeros((*lead, *self.shape))
        return self._add(base, t[self.added]) if self.added in t else base

    def _add(self, base: Tensor, more: Tensor) -> Tensor:
        return base.index_add(self.axis, self.index, more, alpha=self.alpha)


class ScatterAdd(AddAt):
    """y = a with numbers added one by one at places along an axis (scatter_add)."""

    label, added = "scatter_add", "src"

    def forward(self, input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:  # type: ignore[override]
        """a's shape."""
        return self._keep(input, dim, index, src, torch.scatter_add(input, dim, index, src))

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Any kinds."""
        return True

    def _places(self, t: Tensor) -> Tensor:
        return self.index.expand((*t.shape[: t.dim() - len(self.shape)], *self.index.shape))

    def _taken(self, d: Tensor) -> Tensor:
        taken = d.gather(self.axis, self._places(d))
        sizes = zip(self.more, self.index.shape, strict=True)
        margin = [(0, whole - used) for whole, used in sizes]  # an index may leave the last numbers out
        if not any(after for _, after in margin):
            return taken
        return torch.nn.functional.pad(taken, [n for pair in reversed(margin) for n in pair])

    def _add(self, base: Tensor, more: Tensor) -> Tensor:
        return base.scatter_add(self.axis, self._places(more), more)
