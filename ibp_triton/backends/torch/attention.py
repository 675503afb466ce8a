"""Softmax and attention.

Softmax y: jvp = vjp: y∘(t − ⟨y, t⟩); curvature y∘(g − ⟨y, g⟩) with g = d∘t − d⟨y, t⟩ − t⟨d, y⟩.
Attention O = P V with P = M∘softmax(c Q Kᵀ + mask), M a dropout mask: the same, between products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ibp_triton.layer import Layer, Names, Tangents, each, matched, product, shell, sum_to, without, wrapped

Sides = Mapping[str, Tensor]


class Softmax(Layer):
    """exp(a) over its sum along one axis."""

    label = "softmax"

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Along an axis that is named."""
        return list(kinds) == ["input"] and isinstance(arguments.get("dim"), int)

    def forward(self, input: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
        """The same shape, in ``dtype``."""
        self.rank, self.dtype = input.dim(), input.dtype
        self.axis = dim if dim < 0 else dim - self.rank
        self.output = torch.softmax(input, dim, dtype=dtype)
        return self.output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """y∘(d − ⟨y, d⟩)."""
        return {"input": self._pull(d).to(self.dtype)}

    def jvp(self, t: Tangents) -> Tensor:
        """y∘(t − ⟨y, t⟩)."""
        return self._pull(t["input"].to(self.output.dtype))

    def _pull(self, d: Tensor) -> Tensor:
        return softmax_pull(self.output, d, self.axis)

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """y∘(g − ⟨y, g⟩)."""
        d, t = matched(d, self.rank, t, {"input": self.output})
        push, y = t["input"].to(self.output.dtype), self.output
        g = d * push - d * self._along(y * push) - push * self._along(y * d)
        return {"input": self._pull(without(g, self.rank)).to(self.dtype)}

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """Nothing: one operand cannot be active and parametric."""
        return {}

    def _along(self, v: Tensor) -> Tensor:
        return v.sum(self.axis, keepdim=True)


class TorchSoftmax(Softmax):
    """torch.softmax, whose third argument is the dtype."""

    def forward(self, input: Tensor, dim: Any = None, dtype: Any = None) -> Tensor:  # type: ignore[override]
        """The same shape, in ``dtype``."""
        return super().forward(input, dim, dtype=dtype)


class LogSoftmax(Softmax):
    """y = a − ln Σ exp(a) along one axis; with p = exp(y): vjp d − p Σ d, jvp t − ⟨p, t⟩."""

    label = "log_softmax"

    def forward(self, input: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
        """The same shape, in ``dtype``."""
        self.rank, self.dtype = input.dim(), input.dtype
        self.axis = dim if dim < 0 else dim - self.rank
        self.output = torch.log_softmax(input, dim, dtype=dtype)
        return self.output

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d − p Σ d."""
        return {"input": (d - self.output.exp() * self._along(d)).to(self.dtype)}

    def jvp(self, t: Tangents) -> Tensor:
        """t − ⟨p, t⟩."""
        push = t["input"].to(self.output.dtype)
        return push - self._along(self.output.exp() * push)

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """−(Σ d) p∘(t − ⟨p, t⟩)."""
        d, t = matched(d, self.rank, t, {"input": self.output})
        push, p = t["input"].to(self.output.dtype), self.output.exp()
        bent = -self._along(d) * p * (push - self._along(p * push))
        return {"input": without(bent, self.rank).to(self.dtype)}


class TorchLogSoftmax(LogSoftmax):
    """torch.log_softmax, whose third argument is the dtype."""

    def forward(self, input: Tensor, dim: Any = None, dtype: Any = None) -> Tensor:  # type: ignore[override]
        """The same shape, in ``dtype``."""
        return super().forward(input, dim, dtype=dtype)


def softmax_pull(y: Tensor, d: Tensor, axis: int = -1) -> Tensor:
    """y∘(d − ⟨y, d⟩) along ``axis``, a kernel of torch's; [T, *S] for d of [T, *S]."""
    if wrapped(y, d) or d.shape[d.dim() - y.dim() :] != y.shape:
        return y * (d - (y * d).sum(axis, keepdim=True))
    return each(lambda one: torch._softmax_backward_data(one, y, axis, y.dtype), d, y.dim())


def _plus(fresh: Tensor, other: Tensor) -> Tensor:
    """The sum, in the place of the first where that is allowed."""
    same = fresh.shape == other.shape and not wrapped(fresh, other)
    return fresh.add_(other) if same else fresh + other


def _each(parts: Tangents) -> list[dict[str, Tensor]]:
    """One tangent vector after the other."""
    return [dict(zip(parts, one, strict=True)) for one in zip(*parts.values(), strict=True)]


class Attention:
    """The core: O = P V, P = M∘softmax(c Q Kᵀ + mask), for q [..., L, E], k [..., S, E], v [..., S, F].

    All broadcast in front. Both outputs, O and P, may have derivatives. Tangent vectors go one by one: what is as large
    as P stays in the cache, and no side is copied for each of them.
    """

    def __init__(self, sides: Sides, scale: float | None, mask: Tensor | None, p: float) -> None:
        query = sides["query"]
        self.scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        self.q = (query * self.scale).contiguous()  # c Q: batched products copy what is not contiguous, each anew
        self.k, self.v = sides["key"].contiguous(), sides["value"].contiguous()
        self.soft = self._softmax(mask)  # [..., L, S]
        self.drop = None if p == 0 else torch.empty_like(self.soft).bernoulli_(1 - p).div_(1 - p if p < 1 else 1)
        self.weights = self._dropped(self.soft)
        self._output: Tensor | None = self.weights @ self.v
        self.rank = self._output.dim()
        self.sides = {name: shell(side) for name, side in sides.items()}  # for their shapes

    def take_output(self) -> Tensor:
        """O, once: no derivative reads it."""
        output, self._output = self._output, None
        assert output is not None
        return output

    def _softmax(self, mask: Tensor | None) -> Tensor:
        scores = self.q @ self.k.mT
        if mask is None:
            return torch.softmax(scores, -1)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        blind = (scores == -torch.inf).all(-1, keepdim=True)  # rows that see nothing: torch gives them zeros
        return torch.softmax(scores, -1).masked_fill(blind, 0)

    def _dropped(self, v: Tensor) -> Tensor:
        return v if self.drop is None else v * self.drop

    def push(self, t: Tangents, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """t_O and, if wanted, t_P."""
        if any(part.dim() == self.sides[name].dim() for name, part in t.items()):
            return self._push(t)
        found = [self._push(one) for one in _each(t)]
        shown = torch.stack([w for _, w in found]) if weights else None
        return torch.stack([output for output, _ in found]), shown

    def _push(self, t: Tangents) -> tuple[Tensor, Tensor]:
        scores = self._scores(t)
        weights = None if scores is None else self._dropped(softmax_pull(self.soft, scores))
        output = None if weights is None else weights @ self.v
        if "value" in t:
            moved = self.weights @ t["value"]
            output = moved if output is None else _plus(moved, output)
        assert output is not None
        return output, torch.zeros_like(self.weights) if weights is None else weights

    def _scores(self, t: Tangents) -> Tensor | None:
        """t_S = c (t_Q Kᵀ + Q t_Kᵀ) + t_mask."""
        parts = [(t["query"] * self.scale) @ self.k.mT] if "query" in t else []
        parts += [self.q @ t["key"].mT] if "key" in t else []
        parts += [t["mask"].expand(self.soft.shape)] if "mask" in t else []
        return None if not parts else parts[0] if len(parts) == 1 else _plus(parts[0], sum(parts[2:], parts[1]))

    def _soft_derivative(self, d: Tensor | None, w: Tensor | None) -> Tensor:
        """d_softmax = M∘(d Vᵀ + w)."""
        found = w if d is None else d @ self.v.mT if w is None else d @ self.v.mT + w
        assert found is not None
        return self._dropped(found)

    def pull(self, d: Tensor | None, w: Tensor | None, wanted: Names) -> dict[str, Tensor]:
        """The derivatives for d of O and w of P (None: zero)."""
        given = {name: part for name, part in (("d", d), ("w", w)) if part is not None}
        ranks = {"d": self.rank, "w": self.weights.dim()}
        if any(part.dim() == ranks[name] for name, part in given.items()):
            return self._pull(d, w, wanted)
        found = [self._pull(one.get("d"), one.get("w"), wanted) for one in _each(given)]
        return {name: torch.stack([part[name] for part in found]) for name in found[0]}

    def _pull(self, d: Tensor | None, w: Tensor | None, wanted: Names) -> dict[str, Tensor]:
        out = {}
        if "value" in wanted and d is not None:
            out["value"] = self.weights.mT @ d
        if not {"query", "key", "mask"}.isdisjoint(wanted):
            scores = softmax_pull(self.soft, self._soft_derivative(d, w))
            if "query" in wanted:
                out["query"] = (scores @ self.k) * self.scale
            if "key" in wanted:
                out["key"] = scores.mT @ self.q
            if "mask" in wanted:
                out["mask"] = scores
        return self._fitting(out)

    def bend(self, d: Tensor | None, w: Tensor | None, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """The derivatives' derivatives along t, summed over tangents.

        With d' = d_P − ⟨P, d_P⟩, t' = t_S − ⟨P, t_S⟩ and g = d t_Vᵀ + d'∘t', the scores' is P∘(g − ⟨P, g⟩).
        """
        if any(part.dim() == self.sides[name].dim() for name, part in t.items()):
            return self._bend(d, w, t, wanted)
        given = {name: part for name, part in (("d", d), ("w", w), *t.items()) if part is not None}
        total: dict[str, Tensor] = {}
        for one in _each(given):
            found = self._bend(one.pop("d", None), one.pop("w", None), one, wanted)
            total = {name: _plus(total[name], part) if name in total else part for name, part in found.items()}
        return total

    def _bend(self, d: Tensor | None, w: Tensor | None, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        y = self.soft
        soft_d, scores_t = self._centred(self._soft_derivative(d, w)), self._scores(t)
        soft_t = None if scores_t is None else self._centred(scores_t)
        out: dict[str, Tensor] = {}
        if "value" in wanted and soft_t is not None and d is not None:
            out["value"] = self._dropped(y * soft_t).mT @ d
        parts = [self._dropped(d @ t["value"].mT)] if "value" in t and d is not None else []
        parts += [] if soft_t is None else [soft_t * soft_d]
        bent = softmax_pull(y, parts[0] if len(parts) == 1 else _plus(*parts)) if parts else None
        scores_d = y * soft_d
        if "query" in wanted:
            terms = [] if bent is None else [bent @ self.k]
            terms += [scores_d @ t["key"]] if "key" in t else []
            out |= {"query": sum(terms[1:], terms[0]) * self.scale} if terms else {}
        if "key" in wanted:
            terms = [] if bent is None else [bent.mT @ self.q]
            terms += [scores_d.mT @ (t["query"] * self.scale)] if "query" in t else []
            out |= {"key": sum(terms[1:], terms[0])} if terms else {}
        if "mask" in wanted and bent is not None:
            out["mask"] = bent
        return self._fitting(out)

    def _centred(self, v: Tensor) -> Tensor:
        """v − ⟨P, v⟩ of each row (before dropout); P∘ that is the softmax's derivative."""
        return v - (self.soft * v).sum(-1, keepdim=True)

    def _fitting(self, parts: Sides) -> dict[str, Tensor]:
        """Summed over the axes along which a side was broadcast."""
        return {name: sum_to(part, self.sides[name], self.rank) for name, part in parts.items()}

    def multiply_adds(self) -> int:
        """Two products."""
        return product(self.weights.shape) * (self.q.shape[-1] + self.v.shape[-1])


class ScaledDotProductAttention(Layer):
    """F.scaled_dot_product_attention: each operand an activation, a parameter or a constant."""

    label = "scaled_dot_product_attention"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """[..., L, F]. ``attn_mask`` is True where a position is seen, or is added to the scores."""
        self.groups = 1
        if enable_gqa:
            self.groups = query.shape[-3] // key.shape[-3]
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        sides = {"query": query, "key": self._spread(key), "value": self._spread(value)}
        if attn_mask is not None:
            sides["mask"] = attn_mask
        self.core = Attention(sides, scale, attn_mask, dropout_p)
        return self.core.take_output()

    def _spread(self, x: Tensor) -> Tensor:
        """A head of keys for each head of queries."""
        return x if self.groups == 1 else x.repeat_interleave(self.groups, -3)

    def _tangents(self, t: Tangents) -> dict[str, Tensor]:
        return {
            name.removeprefix("attn_"): self._spread(part) if name in ("key", "value") else part
            for name, part in t.items()
        }

    def _gathered(self, parts: Sides) -> dict[str, Tensor]:
        return {"attn_mask" if name == "mask" else name: self._joined(name, part) for name, part in parts.items()}

    def _joined(self, name: str, part: Tensor) -> Tensor:
        spread = self.groups > 1 and name in ("key", "value")
        return part.unflatten(-3, (-1, self.groups)).sum(-3) if spread else part

    def vjp(self, d: Tensor, wanted: Names) -> dict[str, Tensor]:
        """d_V = Pᵀ d; d_P = d Vᵀ, d_S = P∘(d_P − ⟨P, d_P⟩), d_Q = c d_S K, d_K = c d_Sᵀ Q."""
        return self._gathered(self.core.pull(d, None, _core_names(wanted)))

    def jvp(self, t: Tangents) -> Tensor:
        """t_P V + P t_V."""
        return self.core.push(self._tangents(t))[0]

    def tangent_param_vjp(self, t: Tangents, r: Tensor, wanted: Names) -> dict[str, Tensor]:
        """As for an active operand."""
        return self.curvature(r, t, wanted)

    def curvature(self, d: Tensor, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """The three products' derivatives along t."""
        spread = self._tangents(t)
        d, spread = matched(d, self.core.rank, spread, self.core.sides)
        return self._gathered(self.core.bend(d, None, spread, _core_names(wanted)))

    def multiply_adds(self) -> int:
        """Two products."""
        return self.core.multiply_adds()


def _core_names(wanted: Names) -> list[str]:
    """The core calls the mask no ``attn_mask``."""
    return [name.removeprefix("attn_") for name in wanted]
