"""Layers that move, add or join numbers: sums, concatenation, reshapes and other linear maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.layer import Layer, Names, Tangents, broadcast, fold, from_end, lift, sum_to, unfold


class Add(Layer):
    """y = u + alpha · v with broadcasting; either side may be an activation, a parameter, a tensor or a number."""

    label, sign = "add", 1
    shapes_only = ("sides", "output")

    def forward(self, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
        """The broadcast shape."""
        self.sides, self.factors = {"input": input, "other": other}, {"input": 1, "other": self.sign * alpha}
        other = other if alpha == 1 else alpha * other
        self.output: Tensor = input + other if self.sign == 1 else input - other
        return self.output  # type: ignore[no-any-return]

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d for each side, summed where that side was broadcast."""
        return {name: self._scaled(name, sum_to(d, self.sides[name], self.output.dim())) for name in wanted}

    def jvp(self, t: Tangents) -> Tensor:
        """t_u + alpha t_v."""
        rank = self.output.dim()
        parts = [self._scaled(name, lift(part, self.sides[name], rank)) for name, part in t.items()]
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return broadcast(total, self.output)

    def _scaled(self, name: str, t: Tensor) -> Tensor:
        return t if self.factors[name] == 1 else t * self.factors[name]


class Subtract(Add):
    """y = u − alpha · v."""

    label, sign = "subtract", -1


class ReverseSubtract(Add):
    """y = v − alpha · u."""

    label = "subtract"

    def forward(self, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
        """The broadcast shape."""
        self.sides, self.factors = {"input": input, "other": other}, {"input": -alpha, "other": 1}
        self.output = torch.rsub(input, other, alpha=alpha)
        return self.output


class Concatenate(Layer):
    """Operands joined along one axis. torch skips an empty vector among them, whatever the others' shape."""

    label = "concatenate"
    shapes_only = ("tensors",)

    def forward(self, tensors: Any, dim: int = 0) -> Tensor:
        """[..., n_0 + n_1 + …, ...]."""
        output = torch.cat(tensors, dim)
        self.tensors, self.rank = tensors, output.dim()
        self.dim = from_end(dim, output)
        self.sizes = [0 if self._skipped(x) else x.shape[self.dim] for x in tensors]
        return output

    def _skipped(self, x: Tensor) -> bool:
        return x.dim() != self.rank

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """The slice of d that belongs to each operand."""
        slices = d.split(self.sizes, self.dim)
        lead = d.shape[: d.dim() - self.rank]
        positions = {name: int(name.split(".")[1]) for name in wanted}
        return {
            name: d.new_zeros((*lead, 0)) if self._skipped(self.tensors[i]) else slices[i]
            for name, i in positions.items()
        }

    def jvp(self, t: Tangents) -> Tensor:
        """The tangents joined, zeros for operands without one."""
        name, some = next(iter(t.items()))
        lead = some.shape[: some.dim() - self.tensors[int(name.split(".")[1])].dim()]
        joined = {f"tensors.{i}": x for i, x in enumerate(self.tensors) if not self._skipped(x)}
        parts = [t.get(name, x.new_zeros(()).expand((*lead, *x.shape))) for name, x in joined.items()]
        return torch.cat(parts, self.dim)


class Reshape(Layer):
    """The same numbers in the same order under another shape: view, reshape, flatten, squeeze, unsqueeze."""

    label = "reshape"
    shapes_only, follows = ("output",), True

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Whatever shape the torch function gives."""
        self.shape = input.shape
        self.output: Tensor = self.node.function(input, *args, **kwargs)
        return self.output  # type: ignore[no-any-return]

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d in the input's shape."""
        return {"input": d.reshape((*d.shape[: d.dim() - self.output.dim()], *self.shape))}

    def jvp(self, t: Tangents) -> Tensor:
        """t in the output's shape."""
        tangent = t["input"]
        return tangent.reshape((*tangent.shape[: tangent.dim() - len(self.shape)], *self.output.shape))


class LinearMap(Layer):
    """Any function that is linear in its one tensor operand and has no parameter: f~~ = f, f~ its transpose."""

    label = "linear map"
    shapes_only = ("input", "output")

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """One tensor operand, the first argument."""
        return list(kinds) == ["input"]

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Whatever the torch function gives."""
        self.input = input
        self.function: Any = lambda x: self.node.function(x, *args, **kwargs)
        self.output = self.function(input)
        return self.output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """The transpose, by torch.func.vjp (exact: the function is linear)."""
        transpose = torch.func.vjp(self.function, self.input)[1]
        batched = d.dim() > self.output.dim()
        return {"input": torch.func.vmap(transpose)(d)[0] if batched else transpose(d)[0]}

    def jvp(self, t: Tangents) -> Tensor:
        """The function itself."""
        tangent = t["input"]
        result = torch.func.vmap(self.function)(tangent) if tangent.dim() > self.input.dim() else self.function(tangent)
        return result  # type: ignore[no-any-return]


class BatchedMap(LinearMap):
    """A linear map that treats samples alike and keeps the batch axis first: tangents are further samples."""

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """The transpose at the folded batch."""
        like = self.input.new_zeros(()).expand(fold(d, self.output).shape[0], *self.input.shape[1:])
        return {"input": unfold(torch.func.vjp(self.function, like)[1](fold(d, self.output))[0], d, self.output)}

    def jvp(self, t: Tangents) -> Tensor:
        """The function at the folded batch."""
        return unfold(self.function(fold(t["input"], self.input)), t["input"], self.input)


class Pad(BatchedMap):
    """Padding by a constant, which drops out of every derivative, or by the image's own pixels."""

    label = "pad"

    def forward(self, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
        """Larger last axes (smaller where ``pad`` is negative)."""
        self.pads = list(pad) if mode == "constant" else []
        output: Tensor = super().forward(input, pad, mode, value)
        return output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d without the margin."""
        if not self.pads:
            return super().vjp(d, wanted)
        return {"input": self._padded(d, self.output, [-p for p in self.pads])}

    def jvp(self, t: Tangents) -> Tensor:
        """t with a margin of zeros."""
        if not self.pads:
            return super().jvp(t)
        return self._padded(t["input"], self.input, self.pads)

    @staticmethod
    def _padded(t: Tensor, value: Tensor, pads: list[int]) -> Tensor:
        """As images where that is possible, since these may lie channels last."""
        if len(pads) == 2 * value.dim():
            return F.pad(t, pads)
        return unfold(F.pad(fold(t, value), pads), t, value)
