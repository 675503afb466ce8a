"""Multi-head attention as one layer: three linear maps, the attention core of each head, a linear map.

In the paper's semantics too it is one operation: the tangent term of its weights is the true ∇_w ⟨r, Df(a; w)[t]⟩.
With Q = q W_qᵀ + b_q and so on, the tangents t_Q of the core's operands, its derivatives r_Q for r W_o, and their
derivatives c_Q along (t_Q, t_K, t_V):

    W_o: g(t_O, r)      W_q: g(t_q, r_Q) + g(q, c_Q)      b_q: Σ c_Q      curvature for q: c_Q W_q
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.backends.torch.attention import Attention, added
from ibp_triton.layer import (
    HALF,
    Layer,
    Names,
    Pieces,
    Share,
    Tangents,
    divides,
    over,
    plus,
    product,
    scaled,
    shell,
    wide,
    wrapped,
)

_INPUTS = ("query", "key", "value")
_WEIGHTS = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_ALL = "query, key and value"
_MASKS = ("attn_mask", "key_padding_mask")


class MultiHeadAttention(Layer):
    """F.multi_head_attention_forward without extra keys (bias_k, bias_v, add_zero_attn, static_k, static_v)."""

    label, heavy = "multi_head_attention", True
    core_of: Callable[..., Attention] = Attention  # where the weights are not shown
    packed: Any  # [3E, E] or None
    weights: dict[str, Any]  # its three parts, or three separate weights
    _source: Callable[[], Tensor] | None = None  # makes the inputs anew where they are not kept
    _last_pull: tuple[dict[Any, Tensor], dict[str, Tensor]] | None = None
    _last_push: tuple[dict[Any, Tensor], Tensor] | None = None

    @classmethod
    def accepts(cls, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        """Weights do not depend on x, masks on nothing; no extra keys."""
        extra = ("bias_k", "bias_v", "static_k", "static_v")
        plain = all(arguments.get(name) is None for name in extra) and not arguments.get("add_zero_attn")
        weights = all(kinds.get(name, "constant") != "active" for name in (*_WEIGHTS, *_SEPARATE))
        return plain and weights and all(kinds.get(name, "constant") == "constant" for name in _MASKS)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: None,
        bias_v: None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None,
        static_k: None = None,
        static_v: None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[L, N, E], [S, N, ·], [S, N, ·] → [L, N, E] and the weights [N, L, S] ([N, heads, L, S]) or None."""
        self.unbatched, self.heads, self.averaged = query.dim() == 2, num_heads, average_attn_weights
        self.need_weights = need_weights
        self.inputs = dict(zip(_INPUTS, map(self._batched, (query, key, value)), strict=True))
        self.orders = {name: _in_order(x) for name, x in self.inputs.items()}
        nodes = [self.node.operands.get(name, name) for name in _INPUTS]
        self.packed = None if use_separate_proj_weight else in_proj_weight
        self.shared = self.packed is not None and len(set(nodes)) == 1
        self.spared = "query" if self.shared else None
        weights = (q_proj_weight, k_proj_weight, v_proj_weight) if self.packed is None else self.packed.chunk(3)
        self.weights = dict(zip(_INPUTS, weights, strict=True))
        self.out_weight = out_proj_weight
        self.core = self._attend(in_proj_bias, self._mask(attn_mask, key_padding_mask), dropout_p if training else 0.0)
        self.joined = self._join(self.core.take_output())
        output = _linear(self.joined, out_proj_weight, out_proj_bias)
        return self._unbatched(output), self._shown(self.core.shown) if need_weights else None

    def _attend(self, bias: Tensor | None, mask: Tensor | None, p: float) -> Attention:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        if self.shared:
            parts = _linear(self.inputs["query"], self.packed, bias).chunk(3, -1)
        else:
            parts = tuple(_linear(self.inputs[n], self.weights[n], b) for n, b in zip(_INPUTS, biases, strict=True))
        sides = {name: self._split(part) for name, part in zip(_INPUTS, parts, strict=True)}
        core = Attention if self.need_weights else self.core_of
        return core(sides, None, mask, p)

    def _mask(self, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """What is added to the scores [N, heads, L, S]: True means unseen here."""
        dtype = self.inputs["query"].dtype
        parts = [added(m, unseen=True, dtype=dtype) for m in (mask, padding) if m is not None]
        if mask is not None and mask.dim() == 3:
            parts[0] = parts[0].unflatten(0, (-1, self.heads))
        if padding is not None:
            parts[-1] = parts[-1].reshape(-1, 1, 1, padding.shape[-1])
        total: Tensor | None = sum(parts[1:], start=parts[0]) if parts else None
        return total

    def _split(self, x: Tensor) -> Tensor:
        """[..., L, N, E] → [..., N, heads, L, E / heads]."""
        return x.unflatten(-1, (self.heads, -1)).movedim(-4, -2)  # type: ignore[no-any-return]

    def spare(self, source: Callable[[], Tensor]) -> None:
        """Of query, key and value, which are one."""
        self.inputs, self._source = {name: shell(x) for name, x in self.inputs.items()}, source

    @property
    def _lefts(self) -> Mapping[str, Tensor]:
        """The inputs' numbers."""
        return self.inputs if self._source is None else dict.fromkeys(_INPUTS, self._batched(self._source()))

    def _join(self, x: Tensor, name: str = "query") -> Tensor:
        """[..., N, heads, L, E / heads] → [..., L, N, E], its rows in the order of the operand's."""
        if self.orders[name]:
            return x.movedim(-2, -4).flatten(-2)
        return x.transpose(-2, -3).flatten(-2).transpose(-2, -3)

    def _pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Three of [..., N, heads, L, E / heads] → [..., L, N, 3E], likewise."""
        stacked = [parts[name].transpose(-2, -3) for name in _INPUTS]
        if self.orders["query"]:
            return torch.stack([part.transpose(-3, -4) for part in stacked], -3).flatten(-3)
        return torch.stack(stacked, -3).flatten(-3).transpose(-2, -3)

    def _batched(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2) if self.unbatched else x

    def _unbatched(self, x: Tensor) -> Tensor:
        return x.squeeze(-2) if self.unbatched else x

    def _shown(self, weights: Tensor) -> Tensor:
        """The weights as the caller sees them."""
        weights = weights.mean(-3) if self.averaged else weights
        return weights.squeeze(-3 if self.averaged else -4) if self.unbatched else weights

    def _shown_vjp(self, w: Tensor | None) -> Tensor | None:
        if w is None:
            return None
        w = w.unsqueeze(-3 if self.averaged else -4) if self.unbatched else w
        return (w / self.heads).unsqueeze(-3).expand((*w.shape[:-2], self.heads, *w.shape[-2:])) if self.averaged else w

    def _outer(self, d: Any) -> Tensor | None:
        return self._batched(d[0]) if d.get(0) is not None else None

    def _pulled(self, d: Any) -> dict[str, Tensor]:
        """The derivatives behind the first linear maps, kept for the next call with the same d."""
        if self._last_pull is None or not _same(self._last_pull[0], d):
            _, heads, shown = self._sides(d)
            self._last_pull = dict(d), self._inner(self.core.pull(heads, shown, _INPUTS))
        return self._last_pull[1]

    def _sides(self, d: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The output's derivative, the same for the heads' outputs, and the weights' derivative."""
        outer = self._outer(d)
        heads = None if outer is None else self._split(_linear(outer, self.out_weight.mT))
        return outer, heads, self._shown_vjp(d.get(1))

    def vjp(self, d: Any, wanted: Names) -> dict[str, Tensor]:
        """Through the last linear map, the core and the first linear maps."""
        inner, outer = self._pulled(d), self._outer(d)
        out = self._through(inner, wanted) | self._weights_of(inner, self._lefts, wanted)
        return out | self._last(outer, wanted, self.joined)

    def _inner(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Derivatives in front of the core as those behind the first linear maps; all in one where these are one."""
        if self.shared and len(parts) == len(_INPUTS):
            return {_ALL: self._pack(parts)}
        return {name: self._join(part, name) for name, part in parts.items()}

    def _through(self, inner: Mapping[str, Tensor], wanted: Names) -> dict[str, Tensor]:
        """Through the first linear maps; one product where their operand is the same."""
        if _ALL in inner:
            names = [name for name in _INPUTS if name in wanted][:1]
            return {name: self._unbatched(_linear(inner[_ALL], self.packed.mT)) for name in names}
        return {n: self._unbatched(_linear(part, self.weights[n].mT)) for n, part in inner.items() if n in wanted}

    def _weights_of(
        self, inner: Mapping[str, Tensor], left: Mapping[str, Tensor], wanted: Names, bias: bool = True
    ) -> dict[str, Tensor]:
        """g(left, inner) of the first linear maps and, with ``bias``, Σ inner."""
        out: dict[str, Tensor] = {}
        if not inner:
            return out
        if _ALL in inner:
            return self._packed_weights_of(inner[_ALL], left["query"], wanted, bias)
        if any(name in wanted for name in ("in_proj_weight", *_SEPARATE)):
            parts = {n: _gradient(left[n], inner[n]) for n in _INPUTS if n in left and n in inner}
            if self.packed is None:
                named = dict(zip(_INPUTS, _SEPARATE, strict=True))
                out = {named[n]: part for n, part in parts.items() if named[n] in wanted}
            elif parts:
                out["in_proj_weight"] = self._rows(parts)
        if bias and "in_proj_bias" in wanted:
            sums = {n: wide(part).sum((-3, -2)) for n, part in inner.items()}
            lead = next(iter(sums.values())).shape[:-1]
            width = self.out_weight.shape[1]
            out["in_proj_bias"] = torch.cat(
                [sums.get(n, self.out_weight.new_zeros((*lead, width))) for n in _INPUTS], -1
            )
        return out

    @staticmethod
    def _packed_weights_of(inner: Tensor, left: Tensor, wanted: Names, bias: bool) -> dict[str, Tensor]:
        out = {"in_proj_weight": _gradient(left, inner)} if "in_proj_weight" in wanted else {}
        return out | ({"in_proj_bias": wide(inner).sum((-3, -2))} if bias and "in_proj_bias" in wanted else {})

    @staticmethod
    def _rows(parts: Mapping[str, Tensor]) -> Tensor:
        """The packed weight's gradient, zeros where a part has none."""
        some = next(iter(parts.values()))
        return torch.cat([parts[n] if n in parts else torch.zeros_like(some) for n in _INPUTS], -2)

    def _last(self, outer: Tensor | None, wanted: Names, left: Tensor) -> dict[str, Tensor]:
        out = {}
        if outer is not None and "out_proj_weight" in wanted:
            out["out_proj_weight"] = _gradient(left, outer)
        if outer is not None and "out_proj_bias" in wanted:
            out["out_proj_bias"] = wide(outer).sum((-3, -2))
        return out

    def jvp(self, t: Tangents) -> Any:
        """Through the same maps without their biases."""
        weights = None
        if self._last_push is None or self.need_weights or not _same(self._last_push[0], t):
            output, weights = self.core.push(self._pushed(t), self.need_weights)
            self._last_push = dict(t), self._join(output)
        pushed = self._unbatched(_linear(self._last_push[1], self.out_weight))
        shown = {1: self._shown(weights)} if self.need_weights and weights is not None else {}
        return Pieces({0: pushed, **shown})

    def _pushed(self, t: Tangents) -> dict[str, Tensor]:
        """The tangents of the core's operands."""
        if self.shared:
            tangent = self._batched(next(iter(t.values())))
            parts = _linear(tangent, self.packed).chunk(3, -1)
            return {name: self._split(part) for name, part in zip(_INPUTS, parts, strict=True)}
        return {n: self._split(_linear(self._batched(t[n]), self.weights[n])) for n in _INPUTS if n in t}

    def curvature(self, d: Any, t: Tangents, wanted: Names) -> dict[str, Tensor]:
        """The core's, through the first linear maps."""
        d, t = self._matched(d, t)
        _, heads, shown = self._sides(d)
        bent = self._inner(self.core.bend(heads, shown, self._pushed(t), _INPUTS))
        return self._through(bent, wanted)

    def tangent_param_vjp(self, t: Tangents, r: Any, wanted: Names) -> dict[str, Tensor]:
        """The formulas above; parametric operands in the place of activations likewise."""
        r, t = self._matched(r, t)
        outer, bent, pulled = self._outer(r), self._bent(r, t), self._pulled(r)
        left = {name: self._batched(part) for name, part in t.items()}
        if self.shared:
            left = dict.fromkeys(_INPUTS, next(iter(left.values())))
        out = self._through(bent, wanted)
        parts = [self._weights_of(bent, self._lefts, wanted), self._weights_of(pulled, left, wanted, bias=False)]
        if outer is not None and "out_proj_weight" in wanted:
            assert self._last_push is not None
            parts.append({"out_proj_weight": _gradient(self._last_push[1], outer)})
        shapes = self._shapes
        for part in parts:
            for name, found in part.items():
                found = found.sum(0) if found.dim() > shapes[name] else found
                out[name] = out[name] + found if name in out else found
        return out

    def _bent(self, r: Any, t: Tangents) -> dict[str, Tensor]:
        """c_Q, c_K and c_V; t_O stays known."""
        _, heads, shown = self._sides(r)
        fresh = self._last_push is None or not _same(self._last_push[0], t)
        bends, moved = self.core.bend_and_push(heads, shown, self._pushed(t), _INPUTS, fresh)
        if moved is not None:  # for the linear sweep, which comes after this or has been here
            self._last_push = dict(t), self._join(moved)
        return self._inner(bends)

    def weight_gradient(self, shares: Sequence[Share], wanted: Names, batch: int) -> dict[str, Any]:
        """With a part of the activations, and one of a tangent beside the same derivative, these share products."""
        plain, *others = sorted(shares, key=lambda share: share.tangents is not None)
        tangents = others[0].tangents if len(others) == 1 else None
        if tangents is None or not self._may_share(plain, others[0], tangents, wanted):
            return super().weight_gradient(shares, wanted, batch)
        factor = over(others[0].coefficient, plain.coefficient)
        found = self._shared_gradient(plain.right, tangents, factor, wanted)
        return {name: scaled(part, plain.coefficient / batch) for name, part in found.items()}

    def _may_share(self, plain: Share, pushed: Share, t: Tangents, wanted: Names) -> bool:
        """Not in half precision, where β would round away, nor beside derivatives of attention weights."""
        same = plain.tangents is None and plain.layer is pushed.layer and plain.right is pushed.right
        if not (same and self.shared and divides(plain.coefficient)) or [*plain.right] != [0]:
            return False
        if self.out_weight.dtype in HALF or not set(wanted) <= set(_WEIGHTS):
            return False
        rank = 2 if self.unbatched else 3
        return all(part.dim() == rank for part in (plain.right[0], *t.values()))

    def _shared_gradient(self, r: Any, t: Tangents, factor: Any, wanted: Names) -> dict[str, Tensor]:
        """g(q, r_Q) + factor (g(t_q, r_Q) + g(q, c_Q)) as g(q, r_Q + factor c_Q) + factor g(t_q, r_Q), and so on."""
        bent, pulled = self._bent(r, t)[_ALL], self._pulled(r)[_ALL]
        out = self._packed_weights_of(plus(pulled, bent, factor), self._lefts["query"], wanted, True)
        if "in_proj_weight" in wanted:
            push = self._batched(next(iter(t.values())))
            out["in_proj_weight"] = plus(out["in_proj_weight"], _gradient(push, pulled), factor)
        assert self._last_push is not None
        return out | self._last(self._outer(r), wanted, plus(self.joined, self._last_push[1], factor))

    @property
    def _shapes(self) -> dict[str, int]:
        """The number of axes of each weight."""
        return {**dict.fromkeys((*_WEIGHTS, *_SEPARATE), 2), "in_proj_bias": 1, "out_proj_bias": 1}

    def _matched(self, d: Any, t: Tangents) -> tuple[Any, Tangents]:
        """Derivatives and tangents with an axis of tangents on both sides or on neither."""
        rank = 2 if self.unbatched else 3
        ranks: dict[int, int] = {0: rank, 1: rank if self.averaged else rank + 1}
        batched = all(d[i].dim() > ranks[i] for i in d) and all(part.dim() > rank for part in t.values())
        if not batched:
            d = {i: part.sum(0) if part.dim() > ranks[i] else part for i, part in d.items()}
            t = {name: part.sum(0) if part.dim() > rank else part for name, part in t.items()}
        return d, t

    def multiply_adds(self) -> int:
        """The linear maps and the core."""
        maps = sum(product(self.inputs[n].shape[:-1]) * product(self.weights[n].shape) for n in _INPUTS)
        last = product(self.joined.shape[:-1]) * product(self.out_weight.shape)
        return maps + last + self.core.multiply_adds()


def _same(kept: Mapping[Any, Any], given: Mapping[Any, Any]) -> bool:
    """Whether these are the very same tensors."""
    return kept.keys() == given.keys() and all(kept[name] is given[name] for name in kept)


def _in_order(x: Tensor) -> bool:
    """Whether the rows of [..., L, N, E] lie in this order in memory, and not as [..., N, L, E]."""
    return wrapped(x) or x.is_contiguous() or not x.transpose(-3, -2).is_contiguous()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x [..., L, N, E], the rows as they lie: of others torch takes a product for each of L."""
    if _in_order(x):
        return F.linear(x if wrapped(x) else x.contiguous(), weight, bias)
    return F.linear(x.transpose(-3, -2), weight, bias).transpose(-3, -2)


def _gradient(left: Tensor, d: Tensor) -> Tensor:
    """dᵀ left over all positions, [..., out, in], in float32 for half precision; summed over tangents in both."""
    if not _in_order(d):
        left, d = left.transpose(-3, -2), d.transpose(-3, -2)
    if left.dim() == d.dim():
        return _rows_of(d, 0).mT @ _rows_of(left, 0)
    lead = abs(left.dim() - d.dim())
    return _rows_of(d, lead if d.dim() > left.dim() else 0).mT @ _rows_of(left, lead if left.dim() > d.dim() else 0)


def _rows_of(x: Tensor, lead: int) -> Tensor:
    x = x.float() if x.dtype in HALF else x
    return x.reshape((*x.shape[:lead], -1, x.shape[-1]))
