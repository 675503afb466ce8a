"""Attention on Triton kernels: one launch a sweep for any number of tangents, P never in memory.

What the kernels do not take (dropout, sides that broadcast, heads over 128 numbers wide, float64) is left to torch's
rule, and so are the curvature, masks that carry derivatives and weights that are shown, which compute P once more.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from ibp_triton.backends.torch.attention import Attention, ScaledDotProductAttention, Sides, added
from ibp_triton.backends.torch.multihead import MultiHeadAttention
from ibp_triton.kernels.attentions import NAMES, fits
from ibp_triton.layer import Names, Tangents, product, shell
from ibp_triton.ops import straight as ops


class KernelAttention(Attention):
    """The core by kernels, for sides that are alike in front; heads are the last of the axes there."""

    def __init__(self, sides: Sides, scale: float | None, mask: Tensor | None, p: float, causal: bool = False) -> None:
        query, key = sides["query"], sides["key"]
        self.call = (sides, scale, mask, p, causal)
        self.lead, self.rank, self.size = query.shape[:-2], query.dim(), query.shape[-2] * key.shape[-2]
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.sides = {name: shell(side) for name, side in sides.items()}
        self.inputs = [self._heads(sides[name]) for name in NAMES]
        if mask is not None:
            mask = added(mask, unseen=False, dtype=query.dtype).expand(*query.shape[:-1], key.shape[-2])
        self.settings = self.scale, None if mask is None else self._heads(mask), causal
        self.out, self.lse = ops.attention(*self.inputs, *self.settings)
        self._output = self.out.view(query.shape)

    def _heads(self, x: Tensor) -> Tensor:
        """[N, heads, L, E], with the axis of tangents if there is one."""
        extra = x.shape[: x.dim() - self.rank]
        return x.reshape(*extra, product(self.lead[:-1]), self.lead[-1], *x.shape[-2:])

    def _vectors(self, x: Tensor | None) -> Tensor | None:
        """[T, N, heads, L, E], T = 1 without tangents."""
        if x is None:
            return None
        return self._heads(x if x.dim() > self.rank else x[None])

    @cached_property
    def parts(self) -> Attention:
        """The core by torch's products, for what has no kernel."""
        return Attention(*self.call)

    @property
    def shown(self) -> Tensor:
        """P, [..., L, S]."""
        return self.parts.shown

    def push(self, t: Tangents, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """t_O and, if wanted, t_P."""
        if weights or "mask" in t:
            return self.parts.push(t, weights)
        vectors = [self._vectors(t.get(name)) for name in NAMES]
        found = ops.attention_jvp(*self.inputs, self.out, self.lse, *vectors, *self.settings)
        return found.reshape(next(iter(t.values())).shape[: -self.rank] + self.sides["query"].shape), None

    def pull(self, d: Tensor | None, w: Tensor | None, wanted: Names) -> dict[str, Tensor]:
        """The derivatives for d of O and w of P (None: zero)."""
        if d is None or w is not None or "mask" in wanted:
            return self.parts.pull(d, w, wanted)
        which = [name in wanted for name in NAMES]
        found = ops.attention_vjp(self._vectors(d), *self.inputs, self.out, self.lse, *self.settings, *which)
        lead = d.shape[: d.dim() - self.rank]
        return {
            name: v.reshape(lead + self.sides[name].shape)
            for name, v in zip(NAMES, found, strict=True)
            if name in wanted
        }

    def bend_and_push(
        self, d: Tensor | None, w: Tensor | None, t: Tangents, wanted: Names, push: bool = True
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """By torch's products."""
        return self.parts.bend_and_push(d, w, t, wanted, push)

    def multiply_adds(self) -> int:
        """Two products."""
        return 2 * product(self.sides["query"].shape[:-2]) * self.size * self.sides["query"].shape[-1]


def attention(sides: Sides, scale: float | None, mask: Tensor | None, p: float, causal: bool = False) -> Attention:
    """The core by kernels where they take it, else by torch's products."""
    q, k, v = (sides[name] for name in NAMES)
    taken = p == 0 and fits(q, k, v) and q.numel() > 0 and k.numel() > 0
    return (KernelAttention if taken else Attention)(sides, scale, mask, p, causal)


class TritonAttention(ScaledDotProductAttention):
    """F.scaled_dot_product_attention; grouped heads of keys are copied for each head of queries first."""

    core_of = staticmethod(attention)


class TritonMultiHeadAttention(MultiHeadAttention):
    """Its core by kernels unless its weights are shown, its linear maps by torch."""

    core_of = staticmethod(attention)
