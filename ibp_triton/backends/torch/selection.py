"""Linear maps that select numbers or join them: indices, masks, tuples of pieces, stacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ibp_triton.backends.torch.moves import Move
from ibp_triton.backends.torch.structural import LinearMap
from ibp_triton.layer import Layer, Names, Pieces, Tangents, from_end, lift, memory_format, sum_to, wrapped


class IndexSelect(Move):
    """Slices along an axis, chosen by their numbers."""

    def forward(self, input: Tensor, dim: int, index: Tensor) -> Tensor:
        """As many slices as numbers."""
        self._call(input, dim, index)
        self.axis, self.index = self._axis(dim), index
        return self.output  # type: ignore[no-any-return]

    def pull(self, d: Tensor) -> Tensor:
        """Added at the chosen slices."""
        zeros = d.new_zeros((*d.shape[: d.dim() - self.rank], *self.shape))
        return zeros.index_add(self.axis, self.index, d)

    def push(self, t: Tensor) -> Tensor:
        """The same slices."""
        return t.index_select(self.axis, self.index)


class Gather(Move):
    """Numbers along an axis, chosen one by one."""

    def forward(self, input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
        """The index's shape."""
        self._call(input, dim, index)
        self.axis, self.index = self._axis(dim), index
        return self.output  # type: ignore[no-any-return]

    def pull(self, d: Tensor) -> Tensor:
        """Added at the chosen places."""
        lead = d.shape[: d.dim() - self.rank]
        return d.new_zeros((*lead, *self.shape)).scatter_add(
            self.axis, self.index.expand((*lead, *self.index.shape)), d
        )

    def push(self, t: Tensor) -> Tensor:
        """The same places."""
        lead = self._lead(t)
        return t.gather(self.axis, self.index.expand((*lead, *self.index.shape)))


class MaskedFill(Move):
    """A constant where a mask is set: no derivative there."""

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """A number, or a constant tensor."""
        return kinds.get("input") in ("active", "parametric") and kinds.get("value", "constant") == "constant"

    def forward(self, input: Tensor, mask: Tensor, value: Any) -> Tensor:
        """The broadcast shape."""
        self.mask = mask
        return self._call(input, mask, value)  # type: ignore[no-any-return]

    def pull(self, d: Tensor) -> Tensor:
        """Zero under the mask."""
        return sum_to(d.masked_fill(self.mask, 0), self.input, self.output.dim())

    def push(self, t: Tensor) -> Tensor:
        """Zero under the mask."""
        return lift(t, self.input, self.output.dim()).masked_fill(self.mask, 0)


class Triangle(Move):
    """tril and triu: zeros on one side of a diagonal."""

    def forward(self, input: Tensor, diagonal: int = 0) -> Tensor:
        """The same shape."""
        self.diagonal = diagonal
        return self._call(input, diagonal)  # type: ignore[no-any-return]

    def pull(self, d: Tensor) -> Tensor:
        """The same zeros."""
        return self.node.function(d, self.diagonal)  # type: ignore[no-any-return]

    def push(self, t: Tensor) -> Tensor:
        """The same zeros."""
        return self.node.function(t, self.diagonal)  # type: ignore[no-any-return]


class Split(Move):
    """Pieces along an axis: chunk, split, tensor_split."""

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """One tensor."""
        return list(kinds) == ["input"]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A tuple of views."""
        pieces = tuple(self._call(input, *args, **kwargs))
        self.axis = self._axis(kwargs.get("dim", args[1] if len(args) > 1 else 0))
        self.sizes = [piece.shape[self.axis] for piece in pieces]
        return pieces

    def pull(self, d: Any) -> Tensor:
        """The pieces joined, zeros where one has no derivative."""
        some = next(iter(d.values()))
        lead, shapes = some.shape[: some.dim() - self.rank], [piece.shape for piece in self.output]
        return torch.cat([d[i] if i in d else some.new_zeros((*lead, *s)) for i, s in enumerate(shapes)], self.axis)

    def push(self, t: Tensor) -> Any:
        """The tangent's pieces."""
        return Pieces(enumerate(t.split(self.sizes, self.axis)))


class Unbind(Split):
    """Slices along an axis, without it."""

    def forward(self, input: Tensor, dim: int = 0) -> Any:
        """A tuple of views."""
        self._call(input, dim)
        self.axis = self._axis(dim)
        return tuple(self.output)

    def pull(self, d: Any) -> Tensor:
        """The slices stacked, zeros where one has no derivative."""
        some = next(iter(d.values()))
        parts = [d.get(i, torch.zeros_like(some)) for i in range(len(self.output))]
        return torch.stack(parts, self.axis)

    def push(self, t: Tensor) -> Any:
        """The tangent's slices."""
        return Pieces(enumerate(t.unbind(self.axis)))


class Stack(Layer):
    """Operands along an axis of their own."""

    label = "stack"

    def forward(self, tensors: Any, dim: int = 0) -> Tensor:
        """[..., n, ...]."""
        output = torch.stack(tuple(tensors), dim)
        self.tensors, self.axis = tensors, from_end(dim, output)
        return output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """The slice that belongs to each operand."""
        slices = d.unbind(self.axis)
        return {name: slices[int(name.split(".")[1])] for name in wanted}

    def jvp(self, t: Tangents) -> Tensor:
        """The tangents stacked, zeros for operands without one."""
        zero = torch.zeros_like(next(iter(t.values())))
        return torch.stack([t.get(f"tensors.{i}", zero) for i in range(len(self.tensors))], self.axis)


class Item(LinearMap):
    """Indexing: of a tensor by constants, or of the tuple that a layer with several outputs returned."""

    label = "item"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Indices have no derivative."""
        return "input" in kinds

    def forward(self, input: Any, index: Any) -> Any:
        """The element or slice."""
        self.index = index
        parts = index if isinstance(index, tuple) else (index,)
        self.basic = all(
            part is None or part is Ellipsis or (isinstance(part, (int, slice)) and not isinstance(part, bool))
            for part in parts
        )
        self.parts = parts
        return super().forward(input, index)

    def vjp(self, d: Any, wanted: Names) -> dict[str, Any]:
        """d at the index, zero elsewhere."""
        if not isinstance(self.input, Tensor):
            return {"input": Pieces({self.index % len(self.input): d})}
        if not self.basic:
            return super().vjp(d, wanted)
        lead = d.shape[: d.dim() - self.output.dim()]
        zeros = self._zeros(d, lead)
        zeros[(slice(None),) * len(lead) + self.parts] = d
        return {"input": zeros}

    def _zeros(self, d: Tensor, lead: tuple[int, ...]) -> Tensor:
        layout = memory_format(self.input)
        if lead or wrapped(d) or layout is torch.contiguous_format:
            return d.new_zeros((*lead, *self.input.shape))
        return torch.empty(self.input.shape, dtype=d.dtype, device=d.device, memory_format=layout).zero_()

    def jvp(self, t: Tangents) -> Any:
        """The tangent's element."""
        if not isinstance(self.input, Tensor):
            pieces: Any = t["input"]
            return pieces.get(self.index % len(self.input))
        if not self.basic:
            return super().jvp(t)
        tangent = t["input"]
        return tangent[(slice(None),) * (tangent.dim() - self.input.dim()) + self.parts]
