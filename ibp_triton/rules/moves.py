"""Linear maps that move, repeat, sum or select numbers, each with its transpose written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibp_triton.rules.base import Layer, Names, Tangents, lift, memory_format, product, sum_to, wrapped
from ibp_triton.rules.structural import LinearMap, Pieces


class Move(Layer):
    """A linear map of its operand ``input``; other operands (indices, masks, shapes) have no derivative."""

    label = "linear map"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Whatever has an input."""
        return "input" in kinds

    def _keep(self, input: Tensor, output: Any) -> Any:
        self.input, self.output = input, output
        self.shape, self.rank = input.shape, input.dim()
        return output

    def _call(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._keep(input, self.node.function(input, *args, **kwargs))

    def _axis(self, dim: int) -> int:
        """The same axis counted from the end."""
        return dim if dim < 0 else dim - self.rank

    def _lead(self, t: Tensor) -> tuple[int, ...]:
        """The axis of tangents of a tangent of the input."""
        return tuple(t.shape[: t.dim() - self.rank])

    def vjp(self, d: Any, wanted: Names) -> dict[str, Any]:
        """The transpose."""
        return {"input": self.pull(d)}

    def jvp(self, t: Tangents) -> Any:
        """The map itself."""
        return self.push(t["input"])

    def pull(self, d: Any) -> Any:
        """The transpose of [T, *S_out]."""
        raise NotImplementedError

    def push(self, t: Tensor) -> Any:
        """The map of [T, *S]."""
        raise NotImplementedError


class Identity(Move):
    """The same numbers, in another dtype or memory format perhaps."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same shape."""
        return self._call(input, *args, **kwargs)  # type: ignore[no-any-return]

    def pull(self, d: Tensor) -> Tensor:
        """d, in the input's dtype and on its device."""
        return d.to(self.input)

    def push(self, t: Tensor) -> Tensor:
        """t, in the output's."""
        return t.to(self.output)


class Negative(Identity):
    """−a."""

    def pull(self, d: Tensor) -> Tensor:
        """−d."""
        return -d

    def push(self, t: Tensor) -> Tensor:
        """−t."""
        return -t


class Permute(Move):
    """Axes in another order: permute, transpose, movedim and their other names."""

    kind: ClassVar[str] = "permute"

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same numbers."""
        self._call(input, *args, **kwargs)
        self.order = self._order([*args, *kwargs.values()])
        return self.output  # type: ignore[no-any-return]

    def _order(self, given: list[Any]) -> list[int]:
        """For each axis of the output the input's, both counted from the front."""
        axes = given[0] if isinstance(given[0], (tuple, list)) else given
        return [axis % self.rank for axis in axes]

    def pull(self, d: Tensor) -> Tensor:
        """Back in the old order."""
        return self._moved(d, [self.order.index(i) for i in range(self.rank)])

    def push(self, t: Tensor) -> Tensor:
        """In the new order."""
        return self._moved(t, self.order)

    def _moved(self, t: Tensor, order: list[int]) -> Tensor:
        extra = t.dim() - self.rank
        return t.permute(*range(extra), *(extra + i for i in order))


class Transpose(Permute):
    """Two axes exchanged; the last two where none are named."""

    def _order(self, given: list[Any]) -> list[int]:
        order = list(range(self.rank))
        if self.rank > 1:
            one, two = given if given else (-2, -1)
            order[one], order[two] = order[two], order[one]
        return order


class Reverse(Permute):
    """All axes in reverse order: x.T."""

    def _order(self, given: list[Any]) -> list[int]:
        return list(range(self.rank))[::-1]


class MoveAxis(Permute):
    """Axes taken from some places to others."""

    def forward(self, input: Tensor, source: Any, destination: Any) -> Tensor:
        """The same numbers."""
        return super().forward(input, source, destination)

    def _order(self, given: list[Any]) -> list[int]:
        source, target = ([a % self.rank for a in (g if isinstance(g, (tuple, list)) else [g])] for g in given)
        order = [axis for axis in range(self.rank) if axis not in source]
        for place, axis in sorted(zip(target, source, strict=True)):
            order.insert(place, axis)
        return order


class Flip(Move):
    """Some axes backwards."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same shape."""
        self._call(input, *args, **kwargs)
        given = [*args, *kwargs.values()]
        axes = given[0] if isinstance(given[0], (tuple, list)) else given
        self.axes = [self._axis(axis) for axis in axes]
        return self.output  # type: ignore[no-any-return]

    def pull(self, d: Tensor) -> Tensor:
        """Backwards again."""
        return d.flip(self.axes)

    def push(self, t: Tensor) -> Tensor:
        """Backwards."""
        return t.flip(self.axes)


class Roll(Move):
    """Cyclic shifts along axes that are named."""

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Without axes the flattened numbers are shifted: left to the linear map."""
        return list(kinds) == ["input"] and arguments.get("dims") not in (None, ())

    def forward(self, input: Tensor, shifts: Any, dims: Any = None) -> Tensor:
        """The same shape."""
        self._call(input, shifts, dims)
        self.shifts, axes = ([x] if isinstance(x, int) else list(x) for x in (shifts, dims))
        self.axes = [self._axis(axis) for axis in axes]
        return self.output  # type: ignore[no-any-return]

    def pull(self, d: Tensor) -> Tensor:
        """Shifted back."""
        return d.roll([-shift for shift in self.shifts], self.axes)

    def push(self, t: Tensor) -> Tensor:
        """Shifted."""
        return t.roll(self.shifts, self.axes)


class Expand(Move):
    """Axes of one number repeated without copies: expand, expand_as, broadcast_to."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The larger shape."""
        return self._call(input, *args, **kwargs)  # type: ignore[no-any-return]

    def pull(self, d: Tensor) -> Tensor:
        """Summed over what was repeated."""
        return sum_to(d, self.input, self.output.dim())

    def push(self, t: Tensor) -> Tensor:
        """Repeated likewise."""
        return lift(t, self.input, self.output.dim()).expand(*self._lead(t), *self.output.shape)


class Sum(Move):
    """Sums over axes, all if none are named."""

    mean: ClassVar[bool] = False

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Without the axes, or with ones in their place (``keepdim``)."""
        self._call(input, *args, **kwargs)
        given = list(args)
        keep = given.pop() if given and isinstance(given[-1], bool) else kwargs.get("keepdim", kwargs.get("keepdims"))
        axes = kwargs.get("dim", kwargs.get("axis", given[0] if len(given) == 1 else given or None))
        axes = [axes] if isinstance(axes, int) else list(axes or range(self.rank))
        self.axes, self.kept = sorted(self._axis(axis) for axis in axes), bool(keep)
        self.count = product([self.shape[axis] for axis in self.axes]) if self.mean else 1
        return self.output  # type: ignore[no-any-return]

    def pull(self, d: Tensor) -> Tensor:
        """Each sum's derivative for all that entered it."""
        lead = d.shape[: d.dim() - self.output.dim()]
        d = d.to(self.input.dtype)
        if not self.kept:
            for axis in self.axes:
                d = d.unsqueeze(axis + self.rank + len(lead))
        return (d / self.count if self.mean else d).expand((*lead, *self.shape))

    def push(self, t: Tensor) -> Tensor:
        """The same sums."""
        t = t.to(self.output.dtype)
        total = t.sum(self.axes, self.kept) if self.axes else t
        return total / self.count if self.mean else total


class Mean(Sum):
    """Means over axes, all if none are named."""

    mean = True


class CumulativeSum(Move):
    """Running sums along an axis."""

    def forward(self, input: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
        """The same shape."""
        self._call(input, dim, dtype=dtype)
        self.axis = self._axis(dim)
        return self.output  # type: ignore[no-any-return]

    def pull(self, d: Tensor) -> Tensor:
        """Running sums from the other end."""
        return d.to(self.input.dtype).flip(self.axis).cumsum(self.axis).flip(self.axis)

    def push(self, t: Tensor) -> Tensor:
        """Running sums."""
        return t.to(self.output.dtype).cumsum(self.axis)


class IndexSelect(Move):
    """Slices along an axis, chosen by their numbers."""

    def forward(self, input: Tensor, dim: int, index: Tensor) -> Tensor:
        """As many slices as numbers."""
        self._call(input, dim, index)
        self.axis, self.index = self._axis(dim), index
        return self.output  # type: ignore[no-any-return]

    def pull(self, d: Tensor) -> Tensor:
        """Added at the chosen slices."""
        zeros = d.new_zeros(*d.shape[: d.dim() - self.rank], *self.shape)
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
        return d.new_zeros(*lead, *self.shape).scatter_add(self.axis, self.index.expand(*lead, *self.index.shape), d)

    def push(self, t: Tensor) -> Tensor:
        """The same places."""
        lead = self._lead(t)
        return t.gather(self.axis, self.index.expand(*lead, *self.index.shape))


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
        return torch.cat([d[i] if i in d else some.new_zeros(*lead, *s) for i, s in enumerate(shapes)], self.axis)

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
        self.tensors, self.axis = tensors, dim if dim < 0 else dim - tensors[0].dim() - 1
        return torch.stack(tuple(tensors), dim)

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
            return d.new_zeros(*lead, *self.input.shape)
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
