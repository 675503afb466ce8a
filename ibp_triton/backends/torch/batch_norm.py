"""Batch normalisation: by the batch's own statistics, through torch's kernels, and by running ones, an affine map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ibp_triton.backends.torch.normalisation import Normalisation
from ibp_triton.checks import readable
from ibp_triton.layer import (
    HALF,
    Layer,
    Names,
    Tangents,
    memory_format,
    plus_product,
    wide,
    without,
    without_tangents,
    wrapped,
)


class BatchNorm(Normalisation):
    """Each channel by the statistics of the batch, [N, C, ...], by torch's own kernels; running statistics move once.

    γ is constant over a group, so one kernel computes γ P(v)/s, Σ x̂ v and Σ v, for derivatives and tangents alike.
    """

    label, dear = "batch_norm (train)", True
    save_mean: Tensor  # μ and 1/s of each channel, [C]
    save_rstd: Tensor

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """With the batch's statistics."""
        return super().accepts(kinds, arguments) and arguments.get("training") is True

    def forward(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """The same shape; ValueError for a single number a channel, as in torch."""
        if input.numel() == input.shape[1]:
            raise ValueError(
                f"{self.node.where}: expected more than 1 value per channel when training, got {input.shape}"
            )
        self.input, self.eps, self.shape = _dense(input), eps, (input.shape[1],)
        self.inner, self.group = tuple(input.shape), (-input.dim(), *range(2 - input.dim(), 0))
        self.affine = (input.shape[1], *[1] * (input.dim() - 2))
        self.count, self.memory = input.numel() // input.shape[1], WeakTensorKeyDictionary()
        self.weight = wide(weight) if weight is not None else self._ones()
        self.bias = wide(bias) if bias is not None else None
        found = self._statistics(running_mean, running_var, momentum)
        output, self.save_mean, self.save_rstd = found
        return output  # type: ignore[no-any-return]

    def _ones(self) -> Tensor | None:
        """A γ that tells torch's kernel to compute half precision in float32."""
        half = self.input.dtype in HALF
        return torch.ones(self.shape, dtype=torch.float32, device=self.input.device) if half else None

    def again(self) -> Callable[[], Tensor] | None:
        """The kernel once more, the same bits; running statistics stay."""
        return None if self._by_formulas() else lambda: self._statistics(None, None, 0.0)[0]

    def _statistics(self, mean: Tensor | None, var: Tensor | None, momentum: float) -> Any:
        settings, bias = (True, momentum, self.eps), self.bias
        if self.input.dtype in HALF and bias is None:
            bias = torch.zeros_like(self.weight)  # type: ignore[arg-type]
        if mean is None or var is None:
            return torch.ops.aten._native_batch_norm_legit.no_stats(self.input, self.weight, bias, *settings)
        moved = [wide(mean), wide(var)]
        found = torch.ops.aten._native_batch_norm_legit(self.input, self.weight, bias, *moved, *settings)
        for running, now in zip((mean, var), moved, strict=True):
            if now is not running:
                running.copy_(now)
        return found

    @cached_property
    def mean(self) -> Tensor:
        """μ, [C, 1, ...]."""
        return self.save_mean.reshape(self.affine)

    @cached_property
    def rstd(self) -> Tensor:
        """1/s, [C, 1, ...]."""
        return self.save_rstd.reshape(self.affine)

    def _by_formulas(self, *sides: Tensor) -> bool:
        """Whether the formulas in plain torch serve: inside vmap, where torch's kernel has no batching rule."""
        return wrapped(*sides, self.input, self.weight)

    def _backward(self, v: Tensor, outer: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """γ P(v)/s, Σ x̂ v and Σ v."""
        return self._kernel(v, self.input, self.weight, self.save_mean, self.save_rstd, outer)

    def _kernel(
        self, v: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, outer: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        v = _alike(v, x)
        return torch.ops.aten.native_batch_norm_backward(  # type: ignore[no-any-return]
            v, x, weight, None, None, mean, rstd, True, self.eps, [outer, True, True]
        )

    def _sums(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Σ x̂ v and Σ v."""
        known = self.memory.get(v)
        if known is None:
            known = self.memory[v] = dict(zip(_NAMES, self._backward(v), strict=True))
        return known["weight"], known["bias"]

    def _pull(self, v: Tensor) -> Tensor:
        """γ P(v)/s, once for each v; its sums stay known."""
        known = self.memory.get(v)
        if known is not None and "input" in known:
            return known.pop("input")  # type: ignore[no-any-return]
        found = dict(zip(_NAMES, self._backward(v), strict=True))
        pulled = found.pop("input")
        self.memory[v] = found
        return pulled

    def _pull_each(self, v: Tensor) -> Tensor:
        parts = [self._pull(one) for one in self._vectors(v)]
        return parts[0] if v.dim() == self.input.dim() else torch.cat(parts).unflatten(0, v.shape[:2])

    def _vectors(self, v: Tensor) -> list[Tensor]:
        """The tangent vectors in v, the same tensors each time, so that what is known of them stays known."""
        if v.dim() == self.input.dim():
            return [v]
        if v not in self.memory:
            self.memory[v] = list(v.unbind(0))
        return self.memory[v]  # type: ignore[no-any-return]

    def _pairs(self, d: Tensor, t: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Derivative and tangent of each tangent vector; one side without such an axis meets the other's sum."""
        rank = self.input.dim()
        if d.dim() != t.dim():
            d, t = without(d, rank), without(t, rank)
        return list(zip(self._vectors(d), self._vectors(t), strict=True))

    def _cross(self, r: Tensor, t: Tensor) -> Tensor:
        """Σ r P(t) = Σ r (t − mean(t)) − mean(x̂ t) Σ x̂ r, in one pass over both."""
        (along_t, sum_t), (along_r, _) = self._sums(t), self._sums(r)
        one = torch.ones_like(sum_t)
        centred = self._kernel(r, _alike(t, self.input), self._ones(), sum_t / self.count, one, False)[1]
        return centred - along_t * along_r / self.count

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """γ P(d)/s for x, Σ d x̂ for γ and Σ d for b, all by one call."""
        if isinstance(d, Condensed):
            return {name: d.along if name == "weight" else d.total for name in wanted}
        if self._by_formulas(d):
            return super().vjp(d, wanted)
        if d.dim() == self.input.dim():
            sums = self._sums(d) if set(wanted) - {"input"} else ()
            out = dict(zip(_NAMES[1:], sums, strict=False))
            return {name: self._pull(d) if name == "input" else out[name] for name in wanted}
        if set(wanted) == {"input"}:
            return {"input": self._pull_each(d)}
        return super().vjp(d, wanted)

    def condensed(self, d: Tensor, pulled: Mapping[str, Any]) -> Any:
        """Its sums and its pull: ⟨d, P(t)⟩/s = ⟨γ P(d)/s, t⟩/γ, and the layer before keeps that derivative anyway."""
        known = None if wrapped(d) or d.dim() != self.input.dim() else self.memory.get(d)
        if known is None or "input" not in pulled or self.input.dtype in HALF or not _divides(self.weight):
            return d
        return Condensed(known["weight"], known["bias"], pulled["input"])

    def jvp(self, t: Tangents) -> Tensor:
        """γ P(t)/s, the same map: γ is constant over a group."""
        if self._by_formulas(t["input"]):
            return super().jvp(t)
        return self._pull_each(t["input"])

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """Σ r P(t)/s for γ."""
        if isinstance(r, Condensed):
            return {"weight": self._condensed_cross(r.pulled, t["input"])} if "weight" in wanted else {}
        if self._by_formulas(r, t["input"]):
            return super().tangent_param_vjp(t, r, wanted)
        if "weight" not in wanted:
            return {}
        pairs = self._pairs(r, t["input"])
        total = sum((self._cross(r, t) for r, t in pairs[1:]), self._cross(*pairs[0]))
        return {"weight": total * self.save_rstd}

    def _condensed_cross(self, pulled: Tensor, t: Tensor) -> Tensor:
        """Σ ⟨γ P(r)/s, t⟩/γ of each channel, by the kernel that sums products."""
        still, one = torch.zeros_like(self.save_mean), torch.ones_like(self.save_mean)
        t = without(t, self.input.dim())
        total = self._kernel(_alike(pulled, self.input), _alike(t, self.input), self._ones(), still, one, False)[1]
        return total / self.weight  # type: ignore[operator]

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """−(x̂ mean(u p) + mean(x̂ u) p + mean(x̂ t) q)/s², gathered into one factor a channel for each of d, t and x."""
        if self._by_formulas(d, t["input"]):
            return super().curvature(d, t, wanted)
        parts = [self._bend(d, t) for d, t in self._pairs(d, t["input"])]
        return {"input": sum(parts[1:], parts[0]).to(self.input.dtype)}

    def _bend(self, d: Tensor, t: Tensor) -> Tensor:
        """With b = mean(x̂ d), c = mean(x̂ t), k = mean(d p): −γ (b t + c d + (k − 2bc) x̂ − b mean(t) − c mean(d))/s²."""
        (along_t, sum_t), (along_d, sum_d) = self._sums(t), self._sums(d)
        b, c, m = along_d / self.count, along_t / self.count, self.count
        outer = -self.save_rstd.square() * (1 if self.weight is None else self.weight)
        slope = (self._cross(d, t) / m - 2 * b * c) * self.save_rstd
        shift = -(b * sum_t + c * sum_d) / m - slope * self.save_mean
        shift, b, c, slope = ((outer * part).reshape(self.affine) for part in (shift, b, c, slope))
        return plus_product(plus_product(torch.addcmul(shift, b, wide(t)), c, wide(d)), slope, wide(self.input))


@dataclass(frozen=True, eq=False)
class Condensed:
    """What γ's and b's gradients need of a derivative d: Σ x̂ d and Σ d, [C], and γ P(d)/s."""

    along: Tensor
    total: Tensor
    pulled: Tensor


class BatchNormEval(Layer):
    """Batch normalisation with fixed statistics: y = γ (a − μ)/√(σ² + ε) + b, affine in a."""

    label = "batch_norm (eval)"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """With running statistics, which are buffers; only the input may depend on x."""
        if arguments.get("training") is not False or "running_mean" not in kinds or "running_var" not in kinds:
            return False
        return kinds.get("input") == "active" and all(k != "active" for n, k in kinds.items() if n != "input")

    def forward(
        self,
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """[N, C, ...] → the same shape."""
        self.shape = [1, -1] + [1] * (input.dim() - 2)
        self.input, self.mean = input, wide(running_mean).view(self.shape)
        self.scale = (wide(running_var) + eps).rsqrt().view(self.shape)
        self.gain = (self.scale if weight is None else self.scale * weight.view(self.shape)).to(input.dtype)
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d γ/√(σ² + ε); the usual sums for γ and b, in float32 for half precision."""
        out = {}
        if "input" in wanted:
            out["input"] = d * self.gain
        if "weight" in wanted:
            out["weight"] = self._channels(wide(d) * (self.input - self.mean) * self.scale)
        if "bias" in wanted:
            out["bias"] = self._channels(wide(d))
        return out

    def jvp(self, t: Tangents) -> Tensor:
        """t γ/√(σ² + ε)."""
        return t["input"] * self.gain

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """Σ r t/√(σ² + ε) for γ: not g of the ordinary gradient, so it does not merge."""
        if "weight" not in wanted:
            return {}
        return {"weight": self._channels(without_tangents(wide(r) * t["input"], self.input) * self.scale)}

    def _channels(self, d: Tensor) -> Tensor:
        rank = self.input.dim()
        return d.sum([-rank, *range(2 - rank, 0)])


class InstanceNormEval(BatchNormEval):
    """Instance normalisation by running statistics, the same affine map."""

    label = "instance_norm (eval)"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """With running statistics."""
        return super().accepts(kinds, {"training": arguments.get("use_input_stats")})

    def forward(
        self,
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """[N, C, ...] → the same shape."""
        return super().forward(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _divides(weight: Tensor | None) -> bool:
    """Whether all of γ can be divided by; not asked on a device, or while operations are recorded."""
    return weight is not None and readable(weight) and bool(weight.all())


_NAMES = ("input", "weight", "bias")


def _dense(x: Tensor) -> Tensor:
    """In one of the memory formats that torch's kernels are written for."""
    if wrapped(x):  # vmap knows of one memory format alone
        return x if x.movedim(1, -1).is_contiguous() else x.contiguous()
    return x.contiguous(memory_format=memory_format(x))


def _alike(v: Tensor, x: Tensor) -> Tensor:
    """v in the memory format of x; others take torch's slow path."""
    return v.contiguous(memory_format=memory_format(x))
