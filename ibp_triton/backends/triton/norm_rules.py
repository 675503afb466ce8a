"""Layer, RMS, group and instance norms on Triton kernels: one launch a sweep, for any number of tangents.

What the kernels do not take (a dtype, a call without numbers, running statistics) is left to torch's rule.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ibp_triton.backends.torch.batch_norm import BatchNorm, Condensed
from ibp_triton.backends.torch.normalisation import GroupNorm, InstanceNorm, LayerNorm, Normalisation, RMSNorm
from ibp_triton.kernels.norms import dense, fits, whole
from ibp_triton.layer import Names, Tangents, matched, product
from ibp_triton.ops import straight as ops


class _OnKernels(Normalisation):
    """The rules by kernels over x as [N, C, ...] in groups of channels, where ``taken`` says so, else by torch's rule.

    What one launch gives beside what is asked for is kept for the call that asks: γ's and b's gradients of a reverse,
    the linear sweep behind γ's tangent term (``ahead``), unless it was asked for before (``passed``).
    """

    taken = False
    x: Tensor  # the input as the kernels saw it
    bias: Tensor | None = None

    def _norm(self, x: Tensor, groups: int, bias: Tensor | None) -> Tensor | None:
        """The forward pass of x [N, C, ...]; None where the kernels do not take it."""
        self.taken = fits(x, groups)
        if not self.taken:
            return None
        self.x, self.groups, self.bias = (x if dense(x) else x.contiguous()), groups, bias
        self.input = self.x.view(self.input.shape)
        self.memory = WeakTensorKeyDictionary()  # by derivative: what is known beside what was asked for
        self.ahead = WeakTensorKeyDictionary()  # by tangent: its linear sweep, not asked for yet
        self.passed = WeakTensorKeyDictionary()  # tangents whose linear sweep was asked for
        self.gain = None if self.weight is None else self.weight.reshape(-1).contiguous()
        return self._again()

    def _again(self) -> Tensor:
        shift = None if self.bias is None else self.bias.reshape(-1).contiguous()
        output, self.statistics = ops.group_norm(self.x, self.groups, self.gain, shift, self.eps, self.centred)
        return output.view(self.input.shape)  # type: ignore[no-any-return]

    def _vectors(self, v: Tensor) -> Tensor:
        """[T, N, C, ...], T = 1 without tangents."""
        count = v.shape[0] if v.dim() > self.input.dim() else 1
        return v.reshape((count, *self.x.shape)).to(self.x.dtype)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """P(γ d)/s for x, Σ d x̂ for γ and Σ d for b, all from one launch."""
        if not self.taken:
            return super().vjp(d, wanted)
        batched, names = d.dim() > self.input.dim(), [name for name in wanted if name != "input"]
        if batched and names:  # one gradient for each
            parts = [self.vjp(one, wanted) for one in d.unbind(0)]
            return {name: torch.stack([part[name] for part in parts]) for name in wanted}
        known = {} if batched else self.memory.pop(d, {})
        if not all(name in known for name in wanted):
            sums = bool(names) or (not batched and (self.gain is not None or self.bias is not None))
            found = ops.group_norm_vjp(self._vectors(d), self.x, self.statistics, self.groups, self.gain, sums)
            shapes = (d.shape, self.shape, self.shape) if sums else (d.shape,)
            known = {name: v.reshape(s) for name, v, s in zip(("input", "weight", "bias"), found, shapes, strict=False)}
        out = {name: known.pop(name) for name in wanted}
        if not batched:
            self.memory[d] = known
        return out

    def jvp(self, t: Tangents) -> Tensor:
        """γ P(t)/s."""
        if not self.taken:
            return super().jvp(t)
        tangent = t["input"]
        self.passed[tangent] = True
        if tangent in self.ahead:
            return self.ahead.pop(tangent)  # type: ignore[no-any-return]
        out, _ = ops.group_norm_jvp(self._vectors(tangent), self.x, self.statistics, self.groups, self.gain)
        return out.reshape(tangent.shape)  # type: ignore[no-any-return]

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """Σ r P(t)/s for γ, with the linear sweep of t where that has not passed yet."""
        if not self.taken:
            return super().tangent_param_vjp(t, r, wanted)
        if "weight" not in wanted:
            return {}
        r, pairs = matched(r, self.input.dim(), t, {"input": self.input})
        tangent = pairs["input"]
        sides = (self._vectors(tangent), self._vectors(r))
        if tangent is not t["input"] or tangent in self.ahead or tangent in self.passed:
            cross = ops.group_norm_cross(*sides, self.x, self.statistics, self.groups)
        else:
            out, cross = ops.group_norm_jvp(sides[0], self.x, self.statistics, self.groups, self.gain, sides[1])
            self.ahead[tangent] = out.reshape(tangent.shape)
        return {"weight": cross.reshape(self.shape)}

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """In one launch where a row fits a tile, else by the formulas in torch."""
        if not self.taken or not whole(self.x, self.groups):
            return super().curvature(d, t, wanted)
        d, t = matched(d, self.input.dim(), t, {"input": self.input})
        bent = ops.group_norm_curvature(
            self._vectors(d), self._vectors(t["input"]), self.x, self.statistics, self.groups, self.gain
        )
        return {"input": bent.reshape(self.input.shape)}

    def _push(self, v: Tensor) -> Tensor:
        return Normalisation._push(self, v) if self.taken else super()._push(v)


class TritonLayerNorm(_OnKernels, LayerNorm):
    """Rows of the last axes as one group of as many channels."""

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
        found = self._norm(_rows(input, self.shape), 1, bias)
        return super().forward(input, normalized_shape, weight, bias, eps) if found is None else found

    def again(self) -> Callable[[], Tensor] | None:
        """The kernel once more."""
        return self._again if self.taken else super().again()


class TritonRMSNorm(_OnKernels, RMSNorm):
    """Likewise, without a mean."""

    def forward(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        """The same shape."""
        self._take(input, normalized_shape, weight, eps)
        found = self._norm(_rows(input, self.shape), 1, None)
        return super().forward(input, normalized_shape, weight, eps) if found is None else found


class TritonGroupNorm(_OnKernels, GroupNorm):
    """Groups of channels, channels last or first as the input is."""

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
        found = self._norm(input, num_groups, bias)
        return super().forward(input, num_groups, weight, bias, eps) if found is None else found


class TritonBatchNorm(BatchNorm):
    """Both sweeps of all tangents over the batch's statistics, three launches each; forward and curvature by torch."""

    def _by_formulas(self, *sides: Tensor) -> bool:
        """Inside vmap, where the kernels do not take the input."""
        return super()._by_formulas(*sides) and not self._taken

    def _backward(self, v: Tensor, outer: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """γ P(v)/s, Σ x̂ v and Σ v."""
        if not self._covered(v[None]):
            return super()._backward(v, outer)
        out, sums = self._project(v[None])
        return out[0], sums[0, 0], sums[0, 1]

    @property
    def _taken(self) -> bool:
        return fits(self.input, 1) and dense(self.input) and len(self.input) > 0

    def _covered(self, v: Tensor) -> bool:
        return self._taken and 0 < len(v) <= 64

    def _project(self, v: Tensor) -> tuple[Tensor, Tensor]:
        mean, rstd = self.save_mean.float(), self.save_rstd.float()
        return ops.batch_norm_project(v.to(self.input.dtype), self.input, mean, rstd, self.weight)  # type: ignore[no-any-return]

    def _pull_each(self, v: Tensor) -> Tensor:
        """γ P(v)/s of all tangents at once; their sums stay known."""
        if v.dim() == self.input.dim() or not self._covered(v):
            return super()._pull_each(v)
        out, sums = self._joint(v)
        self.joint[v] = None, sums
        return self._project(v)[0] if out is None else out

    def _vectors(self, v: Tensor) -> list[Tensor]:
        """As of torch's rule; the sums of each, of which curvature wants the most, are known from all together."""
        fresh = v.dim() > self.input.dim() and v not in self.memory and self._covered(v)
        vectors = super()._vectors(v)
        for one, sums in zip(vectors, self._joint(v)[1], strict=True) if fresh else ():
            self.memory[one] = {"weight": sums[0], "bias": sums[1]}
        return vectors

    def _joint(self, v: Tensor) -> tuple[Tensor | None, Tensor]:
        """The sweep of all tangents, None where it was given away, and their sums."""
        if v not in self.joint:
            self.joint[v] = self._project(v)
        return self.joint[v]  # type: ignore[no-any-return]

    @cached_property
    def joint(self) -> WeakTensorKeyDictionary:
        """What is known of several tangents together."""
        return WeakTensorKeyDictionary()

    def _cross(self, r: Tensor, t: Tensor) -> Tensor:
        if not self._covered(t[None]):
            return super()._cross(r, t)
        return self._term(t[None], r[None], torch.stack(self._sums(t))[None])

    def _term(self, t: Tensor, r: Tensor, sums: Tensor) -> Tensor:
        x, sides = self.input, [side.to(self.input.dtype) for side in (t, r)]
        return ops.batch_norm_cross(*sides, sums, x, self.save_mean.float(), self.save_rstd.float())  # type: ignore[no-any-return]

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """Σ r P(t)/s for γ, all tangents in one launch where both sides have their axis."""
        tangent, rank = t["input"], self.input.dim() + 1
        if (
            "weight" not in wanted
            or isinstance(r, Condensed)
            or r.dim() != rank
            or tangent.dim() != rank
            or not self._covered(tangent)
        ):
            return super().tangent_param_vjp(t, r, wanted)
        return {"weight": self._term(tangent, r, self._joint(tangent)[1]) * self.save_rstd}


class TritonInstanceNorm(_OnKernels, InstanceNorm):
    """Groups of one channel; running statistics are torch's."""

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
        """The same shape."""
        self._take(input, weight, eps)
        plain = running_mean is None and product(input.shape[2:]) > 1  # torch refuses a single number
        found = self._norm(input, input.shape[1], bias) if plain else None
        if found is not None:
            return found
        return super().forward(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _rows(input: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[..., *shape] as [rows, numbers of a row]."""
    return input.reshape(product(input.shape[: input.dim() - len(shape)]), product(shape))
