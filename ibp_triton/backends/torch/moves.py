"""Linear maps that move, repeat, sum or select numbers, each with its transpose written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ibp_triton.layer import Layer, Names, Tangents, axes_from_end, from_end, lift, product, sum_to


class Move(Layer):
    """A linear map of its operand ``input``; other operands (indices, masks, shapes) have no derivative."""

    label = "linear map"
    shapes_only = ("input", "output")

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Whatever has an input that moves."""
        return kinds.get("input", "constant") != "constant"

    def _keep(self, input: Tensor, output: Any) -> Any:
        self.input, self.output = input, output
        self.shape, self.rank = input.shape, input.dim()
        return output

    def _call(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._keep(input, self.node.function(input, *args, **kwargs))

    def _axis(self, dim: int) -> int:
        return from_end(dim, self.input)

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

    follows = True

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
        return t.permute((*range(extra), *(extra + i for i in order)))


class Transpose(Permute):
    """Two axes exchanged; the last two where none are named."""

    def _order(self, given: list[Any]) -> list[int]:
        order = list(range(self.rank))
        if self.rank > 1:
            one, two = given if given else (-2, -1)
            order[one], order[two] = order[two], order[one]
        return order


class ReverseAxes(Permute):
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
        return lift(t, self.input, self.output.dim()).expand((*self._lead(t), *self.output.shape))


class Sum(Move):
    """Sums over axes, all if none are named."""

    mean: ClassVar[bool] = False

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Without the axes, or with ones in their place (``keepdim``)."""
        self._call(input, *args, **kwargs)
        given = list(args)
        keep = given.pop() if given and isinstance(given[-1], bool) else kwargs.get("keepdim", kwargs.get("keepdims"))
        axes = kwargs.get("dim", kwargs.get("axis", given[0] if len(given) == 1 else given or None))
        alone = axes is None and self.rank == 0  # a number's own sum
        self.axes, self.kept = [] if alone else axes_from_end(axes, input), bool(keep)
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
