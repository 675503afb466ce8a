"""Attention by the kernels of `attention_tiles` and `attention_sweeps`: launches, checks, bytes.

Bytes of a launch on numbers of B bytes, Q = B N H L E those of q, K = B N H S E those of k, lse of 4 N H L, for T
tangents and r tiles of queries (with a causal mask they see the keys before them alone):

    forward     2 Q + lse + 2 r K               needed  2 Q + lse + 2 K
    sweep       Q (1 + 2 T) + lse + 2 K (1 + T) where one tile holds all queries and keys, as needed; else
                Q (1 + 3 T) + lse + 4 r K T
    reverse     likewise; where there are more tiles of queries, two launches, the second by tiles of keys

A mask is read by each head of each sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ibp_triton.kernels.attention_sweeps import pull, pull_keys, push
from ibp_triton.kernels.attention_tiles import attend
from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv, launch
from ibp_triton.kernels.plans import Layout, Result, planned
from ibp_triton.kernels.tiles import precision, select

WIDEST = 128  # numbers of a head
NAMES = ("query", "key", "value")
View = tuple[int, ...]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """O = softmax(c q kᵀ + mask) v, in one launch, and ln Σ exp of each query's scores.

    Args:
        q: [N, H, L, E]; float32, bfloat16 or float16; any strides but E's, which is 1. E is at most 128.
        k, v: [N, H, S, E], likewise.
        mask: [N, H, L, S], any strides and float type; −∞ where a key is not seen.
        scale: c.
        causal: whether a query sees no key of a higher index.

    Returns: like q, without gaps, zero for queries that see nothing; lse [N, H, L] float32, +∞ for those.
    Raises: ValueError for other shapes, dtypes or strides.
    """
    plan = planned(_attend, (scale, causal), q, k, v, mask)
    out, lse = plan.out.empty(q), plan.lse.empty(q)
    launch(plan.plan, q, k, v, q if mask is None else mask, out, lse)
    return out, lse


def attention_jvp(
    t: Sequence[Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """(P∘(S' − ⟨P, S'⟩)) v + P t_v with S' = c (t_q kᵀ + q t_kᵀ), in one launch.

    Args:
        t: tangents of q, k and v, [T, *] each, at least one; None is zero.
        lse: of `attention`; q, k, v, mask, scale, causal as there.

    Returns: [T, *like q].
    Raises: ValueError for shapes, dtypes or strides that do not match.
    """
    plan = planned(_push, (scale, causal), q, k, v, out, lse, mask, *t)
    found = plan.out.empty(q)
    launch(plan.plan, q, k, v, q if mask is None else mask, lse, out, *(q if x is None else x for x in t), found)
    return found


def attention_vjp(
    d: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    wanted: Sequence[bool] = (True, True, True),
) -> list[Tensor | None]:
    """The derivatives of ⟨d, O⟩ for q, k and v, in one launch, two where there are several tiles of queries.

    Args:
        d: [T, N, H, L, E].
        out, lse: of `attention`; q, k, v, mask, scale, causal as there.
        wanted: which of the three.

    Returns: [T, *like q], [T, *like k], [T, *like v], None for what is not wanted.
    Raises: ValueError for shapes, dtypes or strides that do not match.
    """
    plan = planned(_pull, (scale, causal, *wanted), d, q, k, v, out, lse, mask)
    found = [None if layout is None else layout.empty(q) for layout in plan.outs]
    d_q, d_k, d_v = (q if x is None else x for x in found)
    shade, along = q if mask is None else mask, q if plan.along is None else plan.along.empty(q)
    if plan.first is not None:
        launch(plan.first, q, k, v, shade, lse, out, d, d_q, d_k, d_v, along)
    if plan.second is not None:
        launch(plan.second, q, k, v, shade, lse, along, d, d_k, d_v)
    return found


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take q [..., L, E], k and v [..., S, E], by dtype and sizes, alike in front."""
    known = q.dtype in (torch.float32, torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
    alike = k.shape == v.shape and q.dim() > 2 and q.shape[:-2] == k.shape[:-2] and q.shape[-1] == k.shape[-1]
    return known and alike and 0 < q.shape[-1] <= WIDEST


def like(x: Tensor, *tangents: int) -> Layout:
    """That of [*tangents, *x.shape] without gaps, with x's order of axes."""
    strides = torch.empty_like(x, device="meta").stride()
    return Layout((*tangents, *x.shape), (*[x.numel()] * len(tangents), *strides), x.dtype)


@dataclass(frozen=True)
class _Forward(Result):
    """A launch, the layout of O and that of lse."""

    lse: Layout


@dataclass(frozen=True)
class _Reverse:
    """Launches by tiles of queries and of keys, either or both; the layouts of what they make."""

    first: LaunchPlan | None
    second: LaunchPlan | None
    outs: tuple[Layout | None, ...]
    along: Layout | None


class _Call:
    """What all sweeps over one q, k, v and mask have in common; checks them."""

    def __init__(self, scale: float, causal: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        _check(q, k, v, mask)
        samples, heads, self.queries, self.width = q.shape
        self.keys, self.heads, self.causal = k.shape[2], samples * heads, causal
        self.row = self.heads * self.width * q.element_size()  # bytes of a row of every head
        self.kind = "wide" if self.width > 64 else "short" if self.queries <= 64 else None
        self.q, self.alike = q, q.new_empty(0)  # in four axes it would be an image, whose precision is set elsewhere
        seen = sum(min(self.keys, i + 1) for i in range(self.queries)) if causal else self.queries * self.keys
        self.pairs = self.heads * seen
        self.mask = 0 if mask is None else self.pairs * mask.element_size()  # bytes
        self.lse = Layout.dense((samples, heads, self.queries), torch.float32)
        self.constants = {
            "scale": scale, "Q": _view(q), "K": _view(k), "V": _view(v),
            "MASK": None if mask is None else mask.stride(),
            "SIZES": (heads, self.queries, self.keys, self.width), "CAUSAL": causal, "PRECISION": precision(self.alike),
        }  # fmt: skip

    def plan(
        self,
        kernel: Any,
        walk: "_Walk",
        constants: dict[str, Any],
        loaded: dict[str, int],
        stored: int,
        products: int,
    ) -> LaunchPlan:
        """A launch that loads so many bytes through each pointer and multiplies `products` pairs of tiles a step."""
        flops = 2 * self.pairs * self.width * products
        cost = Cost(sum(loaded.values()), stored, flops, walk.step_flops * products, loaded)
        return LaunchPlan(kernel, walk.grid, self.constants | walk.constants | constants, walk.config, cost)


class _Walk:
    """How programs hold tiles of queries and walk over those of keys, and what that moves; for "keys" the reverse.

    A bounded walk over keys ends with the tile's last query, one over queries begins with the tile's first key.
    """

    def __init__(self, call: _Call, sweep: str, bounded: bool) -> None:
        over_keys = sweep != "keys"
        held, walked = (call.queries, call.keys) if over_keys else (call.keys, call.queries)
        self.config = select("attention", call.kind or f"{sweep}, long", call.alike)
        m, n = min(self.config.block_m, block(held)), min(self.config.block_n, block(walked))
        tiles = range(cdiv(held, m))
        spans = [(0, walked) for _ in tiles]
        if bounded:
            ends = [min(walked, (r + 1) * m) for r in tiles]
            spans = [(0, end) if over_keys else (min(walked, r * m // n * n), walked) for r, end in enumerate(ends)]
        steps = [cdiv(end - start, n) for start, end in spans]
        self.rows = sum(
            min(walked - start, n * count) for count, (start, _) in zip(steps, spans, strict=True)
        )  # loaded
        self.grid = (call.heads * len(tiles), 1, 1)
        self.step_flops = 2 * call.heads * sum(steps) * m * n * block(call.width)  # of one product in each step
        self.single, self.whole = len(tiles) == 1, walked <= n
        self.constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_E": block(call.width)}


def _attend(scale: float, causal: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> _Forward:
    call = _Call(scale, causal, q, k, v, mask)
    walk, out = _Walk(call, "forward", causal), like(q)
    loaded = {"q": call.row * call.queries, "k": call.row * walk.rows, "v": call.row * walk.rows, "mask": call.mask}
    plan = call.plan(attend, walk, {"OUT": out.strides[:3]}, loaded, out.bytes + call.lse.bytes, 2)
    return _Forward(out, plan, call.lse)


def _push(
    scale: float,
    causal: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
) -> Result:
    call = _Call(scale, causal, q, k, v, mask)
    tangents = _check_sides(call, out, lse, (t_q, q), (t_k, k), (t_v, v))
    walk, like_q = _Walk(call, "sweep", causal), like(q, tangents)
    of_q, of_k, of_v = (x is not None for x in (t_q, t_k, t_v))
    moved = of_q or of_k  # the scores
    reads = moved and not walk.whole
    walks, row, walked = 1 if walk.whole else tangents, call.row * call.queries, call.row * walk.rows
    loaded = {
        "q": row, "k": walks * walked, "v": moved * walks * walked, "mask": walks * call.mask, "lse": call.lse.bytes,
        "result": reads * tangents * row, "t_q": of_q * tangents * row, "t_k": of_k * tangents * walked,
        "t_v": of_v * tangents * walked,
    }  # fmt: skip
    constants = {
        "tangents": tangents, "q_t": _step(t_q), "k_t": _step(t_k), "v_t": _step(t_v), "o_t": like_q.strides[0],
        "RESULT": _view(out) if reads else None, "T_Q": _view(t_q), "T_K": _view(t_k), "T_V": _view(t_v),
        "OUT": like_q.strides[1:4],
    }  # fmt: skip
    products = walks + tangents * (of_q + of_k + moved + of_v)
    return Result(like_q, call.plan(push, walk, constants, loaded, like_q.bytes, products))


def _pull(
    scale: float,
    causal: bool,
    query: bool,
    key: bool,
    value: bool,
    d: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
) -> _Reverse:
    call = _Call(scale, causal, q, k, v, mask)
    tangents = _check_sides(call, out, lse, (d, q))
    outs = tuple(like(x, tangents) if wanted else None for x, wanted in ((q, query), (k, key), (v, value)))
    d_q, d_k, d_v = outs
    walk = _Walk(call, "reverse", False)
    if not walk.single:
        walk = _Walk(call, "reverse", causal)
    apart = not walk.single and (key or value)  # keys by a launch of their own
    along = Layout.dense((tangents, *call.lse.shape), torch.float32) if apart and key else None
    steps = {"tangents": tangents, "d_t": _step(d), "D": _view(d)}
    first = second = None
    if query or along is not None or not apart:
        if apart:
            d_k = d_v = None
        sides, walks = d_q is not None or d_k is not None, 1 if walk.whole else tangents
        reads = along is not None or (sides and not walk.whole)
        row, walked = call.row * call.queries, walks * call.row * walk.rows
        loaded = {
            "q": row, "k": walked, "v": sides * walked, "mask": walks * call.mask, "lse": call.lse.bytes,
            "result": reads * tangents * row, "d": tangents * row,
        }  # fmt: skip
        constants = steps | {
            **{"q_t": _at(d_q, 0), "k_t": _at(d_k, 0), "v_t": _at(d_v, 0), "RESULT": _view(out) if reads else None},
            **{"D_Q": _at(d_q), "D_K": _at(d_k), "D_V": _at(d_v), "ALONG": along is not None},
        }
        stored = sum(layout.bytes for layout in (d_q, d_k, d_v, along) if layout is not None)
        products = walks + tangents * (sides + sum(layout is not None for layout in (d_q, d_k, d_v)))
        first = call.plan(pull, walk, constants, loaded, stored, products)
    if apart:
        _, d_k, d_v = outs
        walk = _Walk(call, "keys", causal)
        held, rows = call.row * call.keys, tangents * walk.rows
        loaded = {
            "q": call.row * rows, "k": held, "v": key * held, "mask": tangents * call.mask,
            "lse": 4 * call.heads * rows, "along": key * 4 * call.heads * rows, "d": call.row * rows,
        }  # fmt: skip
        constants = steps | {"k_t": _at(d_k, 0), "v_t": _at(d_v, 0), "D_K": _at(d_k), "D_V": _at(d_v)}
        stored = sum(layout.bytes for layout in (d_k, d_v) if layout is not None)
        products = tangents * (1 + value + 2 * key)
        second = call.plan(pull_keys, walk, constants, loaded, stored, products)
    return _Reverse(first, second, outs, along)


def block(n: int) -> int:
    """The power of two that holds n numbers, 16 at least, as matrix units want it."""
    return int(max(16, triton.next_power_of_2(n)))


def _view(x: Tensor | None) -> View | None:
    """Strides of sample, head and row."""
    return None if x is None else x.stride()[-4:-1]


def _step(x: Tensor | None) -> int:
    """The stride of tangents."""
    return 0 if x is None else x.stride(0)


def _at(layout: Layout | None, axis: int | None = None) -> Any:
    """The stride of tangents (axis 0) or the view of what is written."""
    if layout is None:
        return None if axis is None else 0
    return layout.strides[1:4] if axis is None else layout.strides[axis]


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if q.dim() != 4 or not fits(q, k, v):
        raise ValueError(
            f"query {tuple(q.shape)} in {q.dtype} must be [N, H, L, E] in float32, bfloat16 or float16, key "
            f"{tuple(k.shape)} and value {tuple(v.shape)} [N, H, S, E] likewise, E at most {WIDEST}"
        )
    for name, x in zip(NAMES, (q, k, v), strict=True):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(f"the numbers of a head must lie side by side, not those of the {name} by {x.stride()}")
    if mask is not None and (mask.shape != (*q.shape[:3], k.shape[2]) or not mask.is_floating_point()):
        raise ValueError(
            f"the mask {tuple(mask.shape)} in {mask.dtype} must be of floats, {(*q.shape[:3], k.shape[2])}, which may "
            "be expanded"
        )


def _check_sides(call: _Call, out: Tensor, lse: Tensor, *sides: tuple[Tensor | None, Tensor]) -> int:
    """How many tangents all sides have that are there."""
    if Layout.of(lse) != call.lse:
        raise ValueError(f"lse must be that of the forward pass, {call.lse.shape}, not {tuple(lse.shape)}")
    given = [(v, x) for v, x in sides if v is not None]
    counts = sorted({len(v) for v, _ in given})
    if len(counts) != 1:
        raise ValueError(f"a sweep needs a tangent, and as many on all sides: {counts}")
    for v, x in (*given, (out[None], call.q)):
        if v.shape[1:] != x.shape or v.dtype != x.dtype or (v.stride(-1) != 1 and call.width > 1):
            raise ValueError(
                f"derivatives and tangents {tuple(v.shape)} by {v.stride()} in {v.dtype} must be [T, *{tuple(x.shape)}]"
                f" in {x.dtype}, the numbers of a head side by side"
            )
    return counts[0]
