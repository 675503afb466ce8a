"""Attention O = P V with P = M∘softmax(c Q Kᵀ + mask), M a dropout mask: a softmax's derivatives, between products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ibp_triton.backends.torch.softmax import softmax_pull
from ibp_triton.layer import Layer, Names, Tangents, matched, plus_product, product, shell, sum_to, wrapped

Sides = Mapping[str, Tensor]
_NOWHERE: Mapping[str, Tensor] = MappingProxyType({})
_CACHED = 1 << 17  # of numbers as many as P are, some stay in a core's cache


def _plus(fresh: Tensor, other: Tensor) -> Tensor:
    """The sum, in the place of the first where that is allowed."""
    same = fresh.shape == other.shape and not wrapped(fresh, other)
    return fresh.add_(other) if same else fresh + other


def _less(x: Tensor, other: Tensor, fresh: bool) -> Tensor:
    """x − other, which broadcasts, in the place of x where that is ``fresh`` and it is allowed."""
    return x.sub_(other) if fresh and not wrapped(x, other) else x - other


def _by(fresh: Tensor, other: Tensor) -> Tensor:
    """The product, in the place of the first where that is allowed."""
    return fresh.mul_(other) if fresh.shape == other.shape and not wrapped(fresh, other) else fresh * other


def _plus_product(total: Tensor | None, u: Tensor, v: Tensor) -> Tensor:
    """total + u v, in the place of the first where that is allowed; a number for each row broadcasts."""
    if total is None:
        return u * v
    fits = all(x.shape in (total.shape, (*total.shape[:-1], 1)) for x in (u, v))
    return plus_product(total, u, v) if fits else total + u * v


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _times(a: Tensor, b: Tensor, fresh: Tensor | None = None, place: Tensor | None = None) -> Tensor:
    """a b + ``fresh``, in the place of that where it is allowed; a b in a ``place`` that is given."""
    if fresh is None and place is not None:
        return torch.bmm(a, b, out=place)
    if a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] and not wrapped(a, b):
        if fresh is None:
            return torch.bmm(a, b)
        if fresh.shape == (*a.shape[:2], b.shape[2]) and not wrapped(fresh):
            return fresh.baddbmm_(a, b)
    found = a @ b
    return found if fresh is None else _plus(found, fresh)


def _scaled(fresh: Tensor, by: float) -> Tensor:
    return fresh * by if wrapped(fresh) else fresh.mul_(by)


def _scaled_copy(x: Tensor, by: float) -> Tensor:
    """Contiguous: the copy is scaled in its place where one is made."""
    copy = x.contiguous()
    return x * by if copy is x else _scaled(copy, by)


def _each(parts: Tangents) -> list[dict[str, Tensor]]:
    """One tangent vector after the other."""
    return [dict(zip(parts, one, strict=True)) for one in zip(*parts.values(), strict=True)]


def _alike(sides: Sides) -> bool:
    """Whether the sides have the same axes in front, and no mask takes derivatives that has others."""
    first, *rest = (sides[name] for name in ("query", "key", "value"))
    plain = "mask" not in sides or sides["mask"].dtype == torch.bool
    same = all(x.shape[:-2] == first.shape[:-2] and x.numel() for x in rest)
    return plain and same and first.numel() > 0 and not wrapped(*sides.values())


class Attention:
    """The core: O = P V, P = M∘softmax(c Q Kᵀ + mask), for q [..., L, E], k [..., S, E], v [..., S, F].

    All broadcast in front. Both outputs, O and P, may have derivatives. Tangent vectors go one by one, and samples a
    few at a time: what is as large as P stays in the cache, and no side is copied for each tangent. Inside, what has
    the same axes in front on every side has one there: products of matrices are a kernel each then.
    """

    runs: list[slice]

    def __init__(self, sides: Sides, scale: float | None, mask: Tensor | None, p: float, causal: bool = False) -> None:
        query, self.lead = sides["query"], sides["query"].shape[:-2]
        if causal:
            mask = torch.ones(query.shape[-2], sides["key"].shape[-2], dtype=torch.bool, device=query.device).tril()
        self.flat = _alike(sides) and len(self.lead) > 1
        self.scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        self.q = self._inside(_scaled_copy(query, self.scale))  # c Q: products copy what is not contiguous, each anew
        self.k, self.v = self._inside(sides["key"]), self._inside(sides["value"])
        self.soft = self._softmax(mask)  # [..., L, S]
        self.drop = None if p == 0 else torch.empty_like(self.soft).bernoulli_(1 - p).div_(1 - p if p < 1 else 1)
        self.weights = self._dropped(self.soft)
        self._output: Tensor | None = self._outside(_times(self.weights, self.v))
        self.rank = self._output.dim()
        self.sides = {name: shell(side) for name, side in sides.items()}  # for their shapes
        self.runs = self._runs()

    def _inside(self, x: Tensor) -> Tensor:
        """Contiguous, with one axis in front of the matrices."""
        x = x.contiguous()
        return x.view((-1, *x.shape[-2:])) if self.flat else x

    def _outside(self, x: Tensor) -> Tensor:
        """With the axes in front that the sides have, of as many samples as there are."""
        return x.view((-1, *self.lead[1:], *x.shape[-2:])) if self.flat else x

    @property
    def shown(self) -> Tensor:
        """P, [..., L, S]."""
        return self._outside(self.weights)

    def _runs(self) -> list[slice]:
        """The samples in runs, one of all where they share a side."""
        first = {x.shape[: x.dim() - 2] for x in (self.q, self.k, self.v)}
        if len(first) > 1 or self.rank < 3 or self.soft.is_cuda or wrapped(self.soft) or not self.soft.numel():
            return [slice(None)]
        samples = self.lead[0] if self.flat else len(self.soft)
        count = max(1, _CACHED // (self.soft.numel() // samples))
        return [slice(i, i + count) for i in range(0, samples, count)]

    def _by_runs(self, call: Callable[[Attention, dict[str, Tensor]], Any], sides: Sides) -> list[Any]:
        """``call`` of the core and of the sides of each run."""
        if len(self.runs) == 1:
            return [call(self, dict(sides))]
        return [call(self._of(run), {name: x[run] for name, x in sides.items()}) for run in self.runs]

    def _of(self, run: slice) -> Attention:
        part, inside = copy(self), run
        if self.flat:
            each = product(self.lead[1:])
            inside = slice(run.start * each, run.stop * each)
        part.q, part.k, part.v, part.soft, part.weights = (
            x[inside] for x in (self.q, self.k, self.v, self.soft, self.weights)
        )
        part.drop = None if self.drop is None else self.drop[inside]
        part.sides = {name: self.sides[name][run] for name in ("query", "key", "value")}
        return part

    def _has_places(self, given: Tangents) -> bool:
        """Whether each tangent's products may be written where those of all lie: not where a graph is traced."""
        return self.flat and get_proxy_mode() is None and not wrapped(*given.values())

    def _places(self, count: int, shape: Sequence[int]) -> Tensor:
        return self.q.new_empty((count, *shape))

    def take_output(self) -> Tensor:
        """O, once: no derivative reads it."""
        output, self._output = self._output, None
        assert output is not None
        return output

    def _softmax(self, mask: Tensor | None) -> Tensor:
        scores = _times(self.q, self.k.mT)
        if mask is None:
            return torch.softmax(scores, -1)
        scores = self._outside(scores)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        blind = (scores == -torch.inf).all(-1, keepdim=True)  # rows that see nothing: torch gives them zeros
        return self._inside(torch.softmax(scores, -1).masked_fill(blind, 0))

    def _dropped(self, v: Tensor) -> Tensor:
        return v if self.drop is None else v * self.drop

    def push(self, t: Tangents, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """t_O and, if wanted, t_P."""
        if any(part.dim() == self.sides[name].dim() for name, part in t.items()):
            return self._push(t, weights)
        if not weights and self._has_places(t):
            places = self._places(len(next(iter(t.values()))), (*self.lead, self.q.shape[-2], self.v.shape[-1]))
            for one, place in zip(_each(t), places, strict=True):
                self._by_runs(lambda core, own: core._push_run(own, own.pop("place")), {**one, "place": place})
            return places, None
        found = [self._push(one, weights) for one in _each(t)]
        shown = torch.stack([w for _, w in found if w is not None]) if weights else None
        return torch.stack([output for output, _ in found]), shown

    def _push(self, t: Tangents, weights: bool) -> tuple[Tensor, Tensor | None]:
        if weights or "mask" in t:
            return self._push_run(t)
        return _joined(self._by_runs(lambda core, own: core._push_run(own)[0], t)), None

    def _push_run(self, t: Tangents, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t = {name: self._inside(part) for name, part in t.items()}
        output, weights = self._moved(t, self._soft_tangent(t), None if place is None else self._inside(place))
        return self._outside(output), self._outside(weights)

    def _moved(self, t: Tangents, soft: Tensor | None, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """t_O, in its place if it has one, and t_P for the softmax's tangent."""
        weights = None if soft is None else self._dropped(soft)
        output = None if weights is None else _times(weights, self.v, place=place)
        if "value" in t:
            output = _times(self.weights, t["value"], output, place)
        assert output is not None
        return output, torch.zeros_like(self.weights) if weights is None else weights

    def _soft_tangent(self, t: Tangents) -> Tensor | None:
        """P∘(t_S − ⟨P, t_S⟩), before dropout, with t_S = c (t_Q Kᵀ + Q t_Kᵀ) + t_mask."""
        scores = _times(_scaled_copy(t["query"], self.scale), self.k.mT) if "query" in t else None
        if "key" in t:
            scores = _times(self.q, t["key"].mT, scores)
        fresh = scores is not None
        if "mask" in t:
            mask = t["mask"].expand(self.soft.shape)
            scores = mask if scores is None else _plus(scores, mask)
        return None if scores is None else softmax_pull(self.soft, scores, fresh=fresh)

    def _soft_derivative(self, d: Tensor | None, w: Tensor | None) -> Tensor:
        """d_softmax = M∘(d Vᵀ + w)."""
        found = w if d is None else _times(d, self.v.mT)
        assert found is not None
        return self._dropped(found if d is None or w is None else found + w)

    def pull(self, d: Tensor | None, w: Tensor | None, wanted: Names) -> dict[str, Tensor]:
        """The derivatives for d of O and w of P (None: zero)."""
        given = {name: part for name, part in (("d", d), ("w", w)) if part is not None}
        ranks = {"d": self.rank, "w": self.shown.dim()}
        if any(part.dim() == ranks[name] for name, part in given.items()):
            return self._pull(d, w, wanted)
        if d is not None and self._has_places(given):
            names = [name for name in ("value", "query", "key") if name in wanted]
            places = {name: self._places(len(d), self.sides[name].shape) for name in names}
            for i, one in enumerate(_each(given)):
                self._pull(one["d"], one.get("w"), wanted, {name: self._inside(x[i]) for name, x in places.items()})
            return places
        found = [self._pull(one.get("d"), one.get("w"), wanted) for one in _each(given)]
        return {name: torch.stack([part[name] for part in found]) for name in found[0]}

    def _pull(
        self, d: Tensor | None, w: Tensor | None, wanted: Names, places: Mapping[str, Tensor] = _NOWHERE
    ) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        d, w = (None if x is None else self._inside(x) for x in (d, w))
        if "value" in wanted and d is not None:
            out["value"] = _times(self.weights.mT, d, place=places.get("value"))
        if not {"query", "key", "mask"}.isdisjoint(wanted):
            scores = softmax_pull(self.soft, self._soft_derivative(d, w), fresh=d is not None)
            if "query" in wanted:
                out["query"] = _scaled(_times(scores, self.k, place=places.get("query")), self.scale)
            if "key" in wanted:
                out["key"] = _times(scores.mT, self.q, place=places.get("key"))
            if "mask" in wanted:
                out["mask"] = scores
        return self._fitting(out)

    def bend(self, d: Tensor | None, w: Tensor | None, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """The derivatives' derivatives along t, summed over tangents."""
        return self.bend_and_push(d, w, t, wanted, push=False)[0]

    def bend_and_push(
        self, d: Tensor | None, w: Tensor | None, t: Tangents, wanted: Names, push: bool = True
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """``bend`` and, of each tangent, t_O.

        With d' = d_P − ⟨P, d_P⟩, t' = t_S − ⟨P, t_S⟩ and g = d t_Vᵀ + d'∘t', the scores' is P∘(g − ⟨P, g⟩).
        """
        if any(part.dim() == self.sides[name].dim() for name, part in t.items()):
            return self._bend(d, w, t, wanted, push)
        given = {name: part for name, part in (("d", d), ("w", w), *t.items()) if part is not None}
        total: dict[str, Tensor] = {}
        pushed: list[Any] = []
        for one in _each(given):
            found, moved = self._bend(one.pop("d", None), one.pop("w", None), one, wanted, push)
            total = {name: _plus(total[name], part) if name in total else part for name, part in found.items()}
            pushed.append(moved)
        return total, torch.stack(pushed) if push else None

    def _bend(
        self, d: Tensor | None, w: Tensor | None, t: Tangents, wanted: Names, push: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        if d is None or w is not None or "mask" in wanted or "mask" in t:
            return self._bend_run(d, w, t, wanted, push)
        found = self._by_runs(lambda core, own: core._bend_run(own.pop("d"), None, own, wanted, push), {"d": d, **t})
        parts = {name: _joined([part[name] for part, _ in found]) for name in found[0][0]}
        return parts, _joined([moved for _, moved in found]) if push else None

    def _bend_run(
        self, d: Tensor | None, w: Tensor | None, t: Tangents, wanted: Names, push: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        d, w = (None if x is None else self._inside(x) for x in (d, w))
        t = {name: self._inside(part) for name, part in t.items()}
        out: dict[str, Tensor] = {}
        soft_t = self._soft_tangent(t)
        if "value" in wanted and soft_t is not None and d is not None:
            out["value"] = _times(self._dropped(soft_t).mT, d)
        pushed = self._moved(t, soft_t)[0] if push else None
        bent, scores_d = self._bent_scores(d, w, t.get("value"), soft_t)
        if "query" in wanted:
            found = None if bent is None else _times(bent, self.k)
            found = _times(scores_d, t["key"], found) if "key" in t else found
            out |= {} if found is None else {"query": _scaled(found, self.scale)}
        if "key" in wanted:
            found = None if bent is None else _times(bent.mT, self.q)
            found = _times(scores_d.mT, _scaled_copy(t["query"], self.scale), found) if "query" in t else found
            out |= {} if found is None else {"key": found}
        if "mask" in wanted and bent is not None:
            out["mask"] = bent
        return self._fitting(out), None if pushed is None else self._outside(pushed)

    def _bent_scores(
        self, d: Tensor | None, w: Tensor | None, t_v: Tensor | None, soft_t: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """P∘(g − ⟨P, g⟩) and P∘d', from P∘t'."""
        y, soft_d = self.soft, self._soft_derivative(d, w)
        moved = _less(soft_d, (y * soft_d).sum(-1, keepdim=True), fresh=d is not None)
        scores_d = y * moved
        found = None if t_v is None or d is None else _by(self._dropped(_times(d, t_v.mT)), y)
        if soft_t is not None:
            found = _plus_product(found, soft_t, moved)
        return None if found is None else _plus_product(found, y, -found.sum(-1, keepdim=True)), scores_d

    def _fitting(self, parts: Sides) -> dict[str, Tensor]:
        """Summed over the axes along which a side was broadcast."""
        if self.flat:
            return {name: part.view(self.sides[name].shape) for name, part in parts.items()}
        return {name: sum_to(part, self.sides[name], self.rank) for name, part in parts.items()}

    def multiply_adds(self) -> int:
        """Two products."""
        return product(self.weights.shape) * (self.q.shape[-1] + self.v.shape[-1])


class ScaledDotProductAttention(Layer):
    """F.scaled_dot_product_attention: each operand an activation, a parameter or a constant."""

    label, heavy = "scaled_dot_product_attention", True
    core_of: Callable[..., Attention] = Attention

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
        sides = {"query": query, "key": self._spread(key), "value": self._spread(value)}
        if attn_mask is not None:
            sides["mask"] = attn_mask
        self.core = self.core_of(sides, scale, attn_mask, dropout_p, is_causal)
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


def added(mask: Tensor, unseen: bool, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores: −∞ where one of booleans is ``unseen``."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask if unseen else ~mask, -torch.inf)


def _core_names(wanted: Names) -> list[str]:
    """The core calls the mask no ``attn_mask``."""
    return [name.removeprefix("attn_") for name in wanted]
