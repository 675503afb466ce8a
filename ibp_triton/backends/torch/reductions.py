"""Reductions that are not linear: variance, deviation, Euclidean norm; and those that pick numbers: maxima, order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibp_triton.backends.torch.moves import Move
from ibp_triton.layer import Layer, Names, Pieces, Tangents, axes_from_end, matched, product, without


class Variance(Layer):
    """y = Σ z² / k over axes, z = a − mean(a), k the number of terms minus the correction."""

    label = "var"
    rooted: ClassVar[bool] = False  # √y instead
    centred: ClassVar[bool] = True

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """One tensor."""
        return list(kinds) == ["input"]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Without the axes, or with ones in their place (``keepdim``)."""
        given = list(args)
        axes = kwargs.get("dim", given.pop(0) if given and not isinstance(given[0], bool) else None)
        unbiased = kwargs.get("unbiased", given.pop(0) if given else True)
        keep = kwargs.get("keepdim", given.pop(0) if given else False)
        correction = kwargs.get("correction")
        return self._reduce(input, axes, keep, int(unbiased) if correction is None else correction)

    def _reduce(self, input: Tensor, axes: Any, keep: bool, correction: float | None) -> Tensor:
        self.input, self.rank, self.kept = input, input.dim(), keep
        self.axes = axes_from_end(axes, input)
        self.count = product([input.shape[axis] for axis in self.axes]) - correction if correction is not None else 1
        square = self._centre(input).square().sum(self.axes, True) / self.count
        self.value = square.sqrt() if self.rooted else square  # with ones in the axes' place
        return self._drop(self.value)

    def _centre(self, v: Tensor) -> Tensor:
        return v - v.mean(self.axes, True) if self.centred else v

    def _drop(self, v: Tensor) -> Tensor:
        """Without the axes."""
        return v if self.kept else v.squeeze(tuple(self.axes))

    def _spread(self, d: Tensor) -> Tensor:
        """The output's derivative with ones in the axes' place."""
        if self.kept:
            return d
        lead = d.dim() - (self.rank - len(self.axes))
        for axis in self.axes:
            d = d.unsqueeze(axis + self.rank + lead)
        return d

    @property
    def _slope(self) -> Tensor:
        """∂y/∂a: 2 z / k, or z / (k y) for the root."""
        z = self._centre(self.input)
        return z / (self.count * self.value) if self.rooted else z * (2 / self.count)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d ∂y/∂a."""
        return {"input": self._spread(d) * self._slope}

    def jvp(self, t: Tangents) -> Tensor:
        """Σ t ∂y/∂a."""
        return self._drop(self._push(t["input"]))

    def _push(self, t: Tensor) -> Tensor:
        return (t * self._slope).sum(self.axes, True)

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """2 d (t − mean(t)) / k; for the root d ((t − mean(t)) / (k y) − ∂y/∂a t_y / y)."""
        d, t = matched(d, self.rank if self.kept else self.rank - len(self.axes), t, {"input": self.input})
        push, d = t["input"], self._spread(d)
        if self.rooted:
            bent = (self._centre(push) / self.count - self._slope * self._push(push)) / self.value
        else:
            bent = self._centre(push) * (2 / self.count)
        return {"input": without(d * bent, self.rank)}


class Deviation(Variance):
    """The root of the variance."""

    label, rooted = "std", True


class EuclideanNorm(Variance):
    """√Σ a² over axes."""

    label, rooted, centred = "norm", True, False

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Of order 2 (the Frobenius norm is the same)."""
        order = arguments.get("p", arguments.get("ord"))
        return list(kinds) == ["input"] and order in (None, 2, "fro") and arguments.get("dtype") is None

    def forward(
        self, input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: None = None
    ) -> Tensor:
        """Without the axes, or with ones in their place."""
        return self._reduce(input, dim, keepdim, None)


class VectorNorm(EuclideanNorm):
    """torch.linalg.vector_norm, whose order is called ord."""

    def forward(  # type: ignore[override]
        self, x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: None = None
    ) -> Tensor:
        """Without the axes, or with ones in their place."""
        return self._reduce(x, dim, keepdim, None)

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Of order 2."""
        return list(kinds) == ["x"] and arguments.get("ord") == 2 and arguments.get("dtype") is None

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d x / y."""
        return {"x": super().vjp(d, wanted)["input"]}

    def jvp(self, t: Tangents) -> Tensor:
        """⟨x, t⟩ / y."""
        return super().jvp({"input": t["x"]})

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """d (t − x t_y / y) / y."""
        return {"x": super().curvature(d, {"input": t["x"]}, wanted)["input"]}


class Normalize(Layer):
    """y = a / ‖a‖ along an axis, a / ε where ‖a‖ < ε. With p = t − y ⟨y, t⟩, q likewise of d, n = ‖a‖:

    vjp q/n, jvp p/n, curvature −(y ⟨d, p⟩ + ⟨y, d⟩ p + ⟨y, t⟩ q)/n².
    """

    label = "normalize"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """The Euclidean norm."""
        return list(kinds) == ["input"] and arguments.get("p") == 2 and arguments.get("out") is None

    def forward(self, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None) -> Tensor:
        """The same shape."""
        self.axes = axes_from_end(dim, input)
        norm: Tensor = input.square().sum(self.axes, True).sqrt()
        self.size, self.round = norm.clamp_min(eps), (norm >= eps).to(input.dtype)
        self.output = input / self.size
        return self.output

    def _along(self, u: Tensor, v: Tensor) -> Tensor:
        """⟨u, v⟩, zero where the map is a / ε."""
        return (u * v).sum(self.axes, True) * self.round

    def _project(self, v: Tensor) -> Tensor:
        return v - self.output * self._along(self.output, v)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """q/n."""
        return {"input": self._project(d) / self.size}

    def jvp(self, t: Tangents) -> Tensor:
        """p/n."""
        return self._project(t["input"]) / self.size

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """−(y ⟨d, p⟩ + ⟨y, d⟩ p + ⟨y, t⟩ q)/n²."""
        rank, y = self.output.dim(), self.output
        d, t = matched(d, rank, t, {"input": y})
        p, q = self._project(t["input"]), self._project(d)
        bent = y * self._along(d, p) + self._along(y, d) * p + self._along(y, t["input"]) * q
        return {"input": -without(bent, rank) / self.size.square()}


class Pick(Move):
    """Values and their places: max, min, median, topk, sort along an axis. The places stay those of the first pass."""

    label = "pick"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Along an axis that is named."""
        return list(kinds) == ["input"] and isinstance(arguments.get("dim"), int)

    def forward(self, input: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
        """(values, places)."""
        return self._picked(input, dim, dim, keepdim)

    def _picked(self, input: Tensor, dim: int, *args: Any) -> Any:
        self._call(input, *args)
        self.axis, self.index = self._axis(dim), self.output[1]
        self.short = self.index.dim() < self.rank
        return self.output

    def pull(self, d: Any) -> Tensor:
        """Added at the places."""
        d = d[0].unsqueeze(self.axis) if self.short else d[0]
        lead = d.shape[: d.dim() - self.rank]
        return d.new_zeros((*lead, *self.shape)).scatter_add(self.axis, self._places(lead), d)  # type: ignore[no-any-return]

    def push(self, t: Tensor) -> Any:
        """Taken from the places."""
        found = t.gather(self.axis, self._places(self._lead(t)))
        return Pieces({0: found.squeeze(self.axis) if self.short else found})

    def _places(self, lead: tuple[int, ...]) -> Tensor:
        index = self.index.unsqueeze(self.axis) if self.short else self.index
        return index.expand((*lead, *index.shape))  # type: ignore[no-any-return]


class TopK(Pick):
    """The k largest, or smallest."""

    def forward(self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:  # type: ignore[override]
        """(values, places)."""
        return self._picked(input, dim, k, dim, largest, sorted)


class Sort(Pick):
    """All in order."""

    def forward(self, input: Tensor, dim: int = -1, descending: bool = False) -> Any:
        """(values, places)."""
        return self._picked(input, dim, dim, descending)


class Extreme(Move):
    """amax and amin: equal numbers share the derivative, as in torch."""

    label = "extreme"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """One tensor."""
        return list(kinds) == ["input"]

    def forward(self, input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
        """Without the axes, or with ones in their place."""
        self.axes, self.kept = axes_from_end(dim, input), keepdim
        self._call(input, self.axes, keepdim)
        equal = (input == self._spread(self.output)).to(input.dtype)
        self.shares = equal / equal.sum(self.axes, True)
        return self.output  # type: ignore[no-any-return]

    def _spread(self, d: Tensor) -> Tensor:
        lead = d.dim() - self.output.dim()
        for axis in () if self.kept else self.axes:
            d = d.unsqueeze(axis + self.rank + lead)
        return d

    def pull(self, d: Tensor) -> Tensor:
        """Shared among the largest."""
        return self._spread(d) * self.shares

    def push(self, t: Tensor) -> Tensor:
        """The mean over the largest."""
        return (t * self.shares).sum(self.axes, self.kept)


class Peak(Extreme):
    """max and min of all numbers: equal ones share the derivative, as in torch."""

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """No axis is named."""
        return list(kinds) == ["input"] and arguments.get("dim") is None

    def forward(self, input: Tensor, dim: None = None, keepdim: bool = False) -> Tensor:
        """A single number."""
        self._keep(input, self.node.function(input))
        self.axes, self.kept = list(range(-self.rank, 0)), False
        equal = (input == self.output).to(input.dtype)
        self.shares = equal / equal.sum()
        return self.output  # type: ignore[no-any-return]

    def push(self, t: Tensor) -> Tensor:
        """The mean over the largest."""
        return (t * self.shares).sum(self.axes) if self.axes else t * self.shares


class LogSumExp(Layer):
    """y = ln Σ exp(a) along axes. With p = exp(a − y): vjp d p, jvp ⟨p, t⟩, curvature d p∘(t − ⟨p, t⟩)."""

    label = "logsumexp"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """One tensor."""
        return list(kinds) == ["input"]

    def forward(self, input: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
        """Without the axes, or with ones in their place."""
        self.output = torch.logsumexp(input, dim, keepdim)
        self.rank, self.kept, self.axes = input.dim(), keepdim, axes_from_end(dim, input)
        peak = torch.logsumexp(input, self.axes, True)
        self.share = torch.exp(input - peak.masked_fill(peak == -torch.inf, 0))
        return self.output

    def _spread(self, d: Tensor) -> Tensor:
        lead = d.dim() - self.output.dim()
        for axis in () if self.kept else self.axes:
            d = d.unsqueeze(axis + self.rank + lead)
        return d

    def _along(self, t: Tensor, kept: bool) -> Tensor:
        return (self.share * t).sum(self.axes, kept)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d p."""
        return {"input": self._spread(d) * self.share}

    def jvp(self, t: Tangents) -> Tensor:
        """⟨p, t⟩."""
        return self._along(t["input"], self.kept)

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """d p∘(t − ⟨p, t⟩)."""
        d, t = matched(d, self.output.dim(), t, {"input": self.share})
        bent = self._spread(d) * self.share * (t["input"] - self._along(t["input"], True))
        return {"input": without(bent, self.rank)}
