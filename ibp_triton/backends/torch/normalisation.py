"""Normalisation of groups of numbers to mean 0 and variance 1 (or mean square 1), with the group's own statistics.

Over one group of m numbers x̂ = (x − μ)/s, s² = mean((x − μ)²) + ε and y = γ x̂ + b. With the symmetric projection
P(v) = v − mean(v) − x̂ mean(x̂ v), u = γ d, p = P(t) and q = P(u):

    vjp q/s        jvp γ p/s        γ's tangent term Σ r p/s        b's 0
    curvature −(x̂ mean(u p) + mean(x̂ u) p + mean(x̂ t) q)/s²

RMS normalisation has μ = 0 throughout, and P without mean(v).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ibp_triton.layer import (
    HALF,
    Layer,
    Names,
    Tangents,
    each,
    matched,
    memory_format,
    plus_product,
    product,
    wide,
    without,
    wrapped,
)


class Normalisation(Layer):
    """The formulas above in plain torch, in float32 for half precision. A subclass says what a group is.

    Values are seen as ``inner`` views in which the group is the axes ``group`` and γ has the shape ``affine``.
    """

    input: Tensor
    weight: Tensor | None
    eps: float
    centred = True
    inner: tuple[int, ...]  # the shape of the view
    group: tuple[int, ...]  # negative positions of the group's axes
    affine: tuple[int, ...]  # γ's shape in it, ones where it is constant
    shape: tuple[int, ...]  # γ's own shape

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Only the input may depend on x."""
        return kinds.get("input") == "active" and all(k != "active" for n, k in kinds.items() if n != "input")

    @cached_property
    def mean(self) -> Tensor:
        """μ of each group, broadcastable."""
        return self._view(wide(self.input)).mean(self.group, keepdim=True)

    @cached_property
    def rstd(self) -> Tensor:
        """1/s of each group, broadcastable."""
        x = self._view(wide(self.input))
        square = (x - self.mean).square() if self.centred else x.square()
        return (square.mean(self.group, keepdim=True) + self.eps).rsqrt()

    @property
    def normal(self) -> Tensor:
        """x̂, made anew each time: it is as large as the input."""
        x = self._view(wide(self.input))
        return (x - self.mean).mul_(self.rstd) if self.centred else x * self.rstd

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """P(γ d)/s for x, Σ d x̂ for γ and Σ d for b."""
        out, inner = {}, self._view(wide(d))
        if "input" in wanted:
            out["input"] = self._like(self._push(self._gain(inner)), d)
        if "weight" in wanted:
            out["weight"] = self._parameter(inner * self.normal)
        if "bias" in wanted:
            out["bias"] = self._parameter(inner)
        return out

    def jvp(self, t: Tangents) -> Tensor:
        """γ P(t)/s."""
        return self._like(self._gain(self._push(self._view(wide(t["input"])))), t["input"])

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """Σ r P(t)/s for γ, which is not g of the ordinary gradient and does not merge; b has none."""
        if "weight" not in wanted:
            return {}
        r, t = matched(r, self.input.dim(), t, {"input": self.input})
        pushed = self._push(self._view(wide(t["input"])))
        return {"weight": without(self._parameter(self._view(wide(r)) * pushed), len(self.shape))}

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """With b = mean(x̂ u), c = mean(x̂ t): −(x̂ mean(u p) + P(b t + c u))/s², and mean(u p) from the means alone."""
        d, t = matched(d, self.input.dim(), t, {"input": self.input})
        push, u, x = self._view(wide(t["input"])), self._gain(self._view(wide(d))), self.normal
        b, c = self._product(x, u), self._product(x, push)
        along = self._product(u, push) - b * c
        along = along - self._mean(u) * self._mean(push) if self.centred else along
        moved = self._push(without(plus_product(b * push, c, u), len(self.inner)))
        bent = plus_product(moved, self.rstd * without(along, len(self.inner)), x).mul_(-self.rstd)
        return {"input": self._like(bent, self.input)}

    def _push(self, v: Tensor) -> Tensor:
        """P(v)/s, as a view."""
        x = self.normal
        moved = v - self._mean(v) if self.centred else v
        return torch.addcmul(moved, x, -self._product(x, v)) * self.rstd

    def _mean(self, v: Tensor) -> Tensor:
        return v.mean(self.group, keepdim=True)

    def _product(self, u: Tensor, v: Tensor) -> Tensor:
        """mean(u v); by dot products where a group lies in one piece, without a tensor for u v."""
        joined = self.group == tuple(range(self.group[0], 0)) and not wrapped(u, v)
        if not joined or not u.is_contiguous() or not v.is_contiguous():
            return self._mean(u * v)
        u, v = (w.flatten(self.group[0]) for w in (u, v))
        dots = torch.linalg.vecdot(u, v) / u.shape[-1]
        return dots.view((*dots.shape, *[1] * len(self.group)))  # type: ignore[no-any-return]

    def _view(self, v: Tensor) -> Tensor:
        """[..., *S] as [..., *inner]."""
        return v.reshape((*v.shape[: v.dim() - self.input.dim()], *self.inner))

    def _gain(self, v: Tensor) -> Tensor:
        return v if self.weight is None else v * wide(self.weight).reshape(self.affine)

    def _like(self, v: Tensor, like: Tensor) -> Tensor:
        """[..., *inner] in the input's shape and dtype."""
        return v.reshape((*v.shape[: v.dim() - len(self.inner)], *self.input.shape)).to(like.dtype)

    def _parameter(self, v: Tensor) -> Tensor:
        """[..., *inner] summed over all but γ's axes, in γ's shape."""
        rank = len(self.affine)
        axes = [i - rank for i, n in enumerate(self.affine) if n == 1]
        axes = [*range(v.dim() - len(self.inner), v.dim() - rank), *axes]
        total = v.sum(axes, keepdim=True) if axes else v
        return total.reshape((*v.shape[: v.dim() - len(self.inner)], *self.shape))


class InstanceNorm(Normalisation):
    """Each channel of each sample by its own statistics, [N, C, ...]."""

    label = "instance_norm"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """With the input's own statistics; with running ones it is batch normalisation's affine map."""
        return super().accepts(kinds, arguments) and arguments.get("use_input_stats") is True

    def forward(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """The same shape; running statistics move as in torch."""
        self._take(input, weight, eps)
        return F.instance_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)

    def _take(self, input: Tensor, weight: Tensor | None, eps: float) -> None:
        self.input, self.weight, self.eps, self.shape = input, weight, eps, (input.shape[1],)
        self.inner, self.group = tuple(input.shape), tuple(range(2 - input.dim(), 0))
        self.affine = (input.shape[1], *[1] * (input.dim() - 2))


class _Native(Normalisation):
    """By torch's own backward kernel, which gives P(γ v)/s, Σ v x̂ and Σ v in one pass over its two operands."""

    def _prepare(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """γ and b so that the kernels keep their statistics in float32 for half precision."""
        self.memory = WeakTensorKeyDictionary()
        if weight is None and bias is not None:  # without γ the kernels give no derivative of b
            weight = torch.ones_like(bias)
        self.weight = weight
        if self.input.dtype not in HALF or not self._native:
            return weight, bias
        one = torch.ones(self.shape, dtype=torch.float32, device=self.input.device)
        self.weight = one if weight is None else weight.float()
        return self.weight, torch.zeros_like(one) if bias is None else bias.float()

    @property
    def _native(self) -> bool:
        """Not under torch.func.vmap; in half precision on a CPU only, where kernels take parameters in float32."""
        half = self.input.dtype in HALF and self.input.is_cuda
        return not half and not wrapped(self.input, self.weight)

    def _backward(self, v: Tensor, weight: Tensor | None, parameters: bool) -> tuple[Tensor, ...]:
        """P(γ v)/s, Σ v x̂ and Σ v."""
        raise NotImplementedError

    def _push(self, v: Tensor) -> Tensor:
        """P(v)/s, as a view."""
        if not self._native or wrapped(v):
            return super()._push(v)
        v = v.reshape((*v.shape[: v.dim() - len(self.inner)], *self.input.shape)).to(self.input.dtype)
        return self._view(wide(self._pushed(v)))

    def _pushed(self, t: Tensor) -> Tensor:
        """P(t)/s."""
        one = self._one()
        return each(lambda v: self._backward(v, one, False)[0], t, self.input.dim())

    def _one(self) -> Tensor | None:
        """No γ."""
        return torch.ones_like(self.weight) if self.input.dtype in HALF and self.weight is not None else None

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """One call; what is not wanted yet is kept for the next call with the same d."""
        if not self._native or wrapped(d) or d.dim() > self.input.dim():
            return super().vjp(d, wanted)
        known = self.memory.pop(d, {})
        if not all(name in known for name in wanted):
            found = self._backward(d, self.weight, self.weight is not None)
            known = dict(zip(("input", "weight", "bias"), found, strict=True))
        out = {name: known.pop(name) for name in wanted}
        self.memory[d] = known
        return out

    def jvp(self, t: Tangents) -> Tensor:
        """γ P(t)/s."""
        tangent = t["input"]
        if not self._native or wrapped(tangent):
            return super().jvp(t)
        pushed = self.memory.pop(tangent, None)
        pushed = self._pushed(tangent) if pushed is None else pushed
        return self._like(self._gain(self._view(pushed)), tangent)

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """Σ r P(t)/s for γ; P(t)/s is kept for the jvp that follows."""
        if not self._native or wrapped(r, t["input"]):
            return super().tangent_param_vjp(t, r, wanted)
        if "weight" not in wanted:
            return {}
        pushed = self.memory[t["input"]] = self._pushed(t["input"])
        r, pushes = matched(r, self.input.dim(), {"input": pushed}, {"input": self.input})
        return {"weight": self._dot(r, pushes["input"])}

    def _dot(self, r: Tensor, p: Tensor) -> Tensor:
        """Σ r p in γ's shape."""
        return without(self._parameter(self._view(wide(r)) * self._view(p)), len(self.shape))


class GroupNorm(_Native):
    """Groups of channels of each sample, [N, C, ...]."""

    label = "group_norm"

    def forward(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """The same shape."""
        self._take(input, num_groups, weight, eps)
        self.sizes = (input.shape[0], input.shape[1], product(input.shape[2:]), num_groups)
        weight, bias = self._prepare(weight, bias)
        if not self._native:  # torch.func views the input as if it were contiguous
            return F.group_norm(input.contiguous(), num_groups, weight, bias, eps)
        self.layout = memory_format(input)
        self.input = input.contiguous(memory_format=self.layout)
        output, mean, rstd = torch.native_group_norm(self.input, weight, bias, *self.sizes, eps)
        self.statistics = (mean, rstd)
        self.mean, self.rstd = (x.view((*x.shape, *[1] * (input.dim() - 1))) for x in (mean, rstd))
        return output

    def _take(self, input: Tensor, num_groups: int, weight: Tensor | None, eps: float) -> None:
        self.input, self.weight, self.eps, self.shape = input, weight, eps, (input.shape[1],)
        split = (num_groups, input.shape[1] // num_groups)
        self.inner = (input.shape[0], *split, *input.shape[2:])
        self.group = tuple(range(1 - input.dim(), 0))
        self.affine = (*split, *[1] * (input.dim() - 2))

    def _backward(self, v: Tensor, weight: Tensor | None, parameters: bool) -> tuple[Tensor, ...]:
        """The kernel reads beyond its memory where the input's derivative is not asked for."""
        v, mask = v.contiguous(memory_format=self.layout), [True, parameters, parameters]
        mean, rstd = self.statistics
        return torch.ops.aten.native_group_norm_backward(  # type: ignore[no-any-return]
            v, self.input, mean, rstd, weight, *self.sizes, mask
        )


class RMSNorm(Normalisation):
    """The last axes divided by their root mean square, [..., *normalized_shape]."""

    label, centred = "rms_norm", False

    def forward(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        """The same shape; without ``eps`` it is the smallest step above 1 (of float32 in half precision)."""
        self._take(input, normalized_shape, weight, eps)
        return F.rms_norm(input, normalized_shape, weight, eps)

    def _take(self, input: Tensor, normalized_shape: Any, weight: Tensor | None, eps: float | None) -> None:
        self.input, self.weight, self.shape = input, weight, tuple(normalized_shape)
        self.eps = torch.finfo(wide(input).dtype).eps if eps is None else eps
        self.inner, self.group, self.affine = tuple(input.shape), tuple(range(-len(self.shape), 0)), self.shape


class LayerNorm(_Native):
    """The last axes by their own statistics, [..., *normalized_shape]."""

    label = "layer_norm"

    def forward(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """The same shape."""
        self._take(input, normalized_shape, weight, eps)
        weight, bias = self._prepare(weight, bias)
        if not self._native:
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        self.bias = bias
        output, self.mean, self.rstd = torch.native_layer_norm(input, self.shape, weight, bias, eps)
        return output

    def _take(self, input: Tensor, normalized_shape: Any, weight: Tensor | None, eps: float) -> None:
        self.input, self.weight, self.eps, self.shape = input, weight, eps, tuple(normalized_shape)
        self.inner, self.group, self.affine = tuple(input.shape), tuple(range(-len(self.shape), 0)), self.shape

    def again(self) -> Callable[[], Tensor] | None:
        """The kernel once more."""
        if not self._native:
            return None
        return lambda: torch.native_layer_norm(self.input, self.shape, self.weight, self.bias, self.eps)[0]

    def _backward(self, v: Tensor, weight: Tensor | None, parameters: bool) -> tuple[Tensor, ...]:
        """In any memory format. In half precision the kernel adds rows in half precision: 0.05 off for 256 of them."""
        half = parameters and v.dtype in HALF
        found = self._kernel(v, self.input, weight, [True, parameters and not half, parameters and not half])
        if half:
            return found[0], *self._kernel(v.float(), self.input.float(), weight, [False, True, True])[1:]
        return found

    def _kernel(self, v: Tensor, input: Tensor, weight: Tensor | None, mask: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.native_layer_norm_backward(  # type: ignore[no-any-return]
            v, input, self.shape, self.mean, self.rstd, weight, weight, mask
        )

    def _dot(self, r: Tensor, p: Tensor) -> Tensor:
        """Σ r p by the kernel for γ: that of input p, mean 0 and deviation 1; tangents are further rows."""
        r, p = wide(r), wide(p)
        shape = (*r.shape[: r.dim() - len(self.shape)], *[1] * len(self.shape))
        rstd = torch.ones(shape, dtype=self.rstd.dtype, device=r.device)
        weight = torch.ones(self.shape, dtype=self.rstd.dtype, device=r.device)
        found = torch.ops.aten.native_layer_norm_backward(
            r, p, self.shape, torch.zeros_like(rstd), rstd, weight, None, [False, True, False]
        )
        return found[1]  # type: ignore[no-any-return]
