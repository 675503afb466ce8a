"""Attention as operators, with fake implementations and derivatives.

q [N, H, L, E], k and v [N, H, S, E], E at most 128; a mask [N, H, L, S] of floats, which may be expanded, is added to
the scores. ``lse`` is what ``attention`` returns beside O; it counts as a part of q and k. Both sweeps are linear in
what they carry, and have derivatives with respect to that alone. Numbers of a head that do not lie side by side are
copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ibp_triton.kernels import attentions as _kernels
from ibp_triton.ops.derivatives import keep_sparse, kept


@custom_op("ibp_triton::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(scale q kᵀ + mask) v in q's order of axes, and lse [N, H, L] float32."""
    q, k, v = (beside(x) for x in (q, k, v))
    return _kernels.attention(q, k, v, mask, scale=scale, causal=causal)


@custom_op("ibp_triton::attention_jvp", mutates_args=())
def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """O's tangents [T, N, H, L, E] for those of q, k and v, [T, *] each, at least one; None is zero."""
    t = [None if x is None else beside(x) for x in (t_q, t_k, t_v)]
    q, k, v, out = (beside(x) for x in (q, k, v, out))
    return _kernels.attention_jvp(t, q, k, v, out, lse, mask, scale=scale, causal=causal)


@custom_op("ibp_triton::attention_vjp", mutates_args=())
def attention_vjp(
    d: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    query: bool = True,
    key: bool = True,
    value: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of ⟨d, O⟩ for q, k and v, [T, *] each, for d [T, N, H, L, E]; [0] where not wanted."""
    d, q, k, v, out = (beside(x) for x in (d, q, k, v, out))
    wanted = (query, key, value)
    found = _kernels.attention_vjp(d, q, k, v, out, lse, mask, scale=scale, causal=causal, wanted=wanted)
    d_q, d_k, d_v = (q.new_empty(0) if x is None else x for x in found)
    return d_q, d_k, d_v


def beside(x: Tensor) -> Tensor:
    """x with the numbers of a head side by side, a copy where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor, *tangents: int) -> Tensor:
    layout = _kernels.like(beside(x), *tangents)
    return x.new_empty_strided(layout.shape, layout.strides)


attention.register_fake(
    lambda q, k, v, scale, mask=None, causal=False: (_like(q), q.new_empty(q.shape[:3], dtype=torch.float32))
)
attention_jvp.register_fake(
    lambda q, k, v, out, lse, t_q, t_k, t_v, scale, mask=None, causal=False: _like(
        q, next(t.shape[0] for t in (t_q, t_k, t_v) if t is not None)
    )
)
attention_vjp.register_fake(
    lambda d, q, k, v, out, lse, scale, mask=None, causal=False, query=True, key=True, value=True: tuple(
        _like(x, d.shape[0]) if wanted else x.new_empty(0) for x, wanted in ((q, query), (k, key), (v, value))
    )
)


def _attention(ctx: Any, g: Tensor | None, _: Any) -> Any:
    q, k, v, scale, mask, causal, out, lse = kept(ctx)
    if ctx.needs_input_grad[4]:
        raise NotImplementedError("attention has no derivative with respect to its mask")
    if g is None:
        return (None,) * 6
    wanted = ctx.needs_input_grad[:3]
    found = attention_vjp(g[None], q, k, v, out, lse, scale, mask, causal, *wanted)
    return *(part[0] if want else None for part, want in zip(found, wanted, strict=True)), None, None, None


def _attention_jvp(ctx: Any, g: Tensor) -> Any:
    q, k, v, out, lse, *_, scale, mask, causal, _ = kept(ctx)
    _linear(ctx.needs_input_grad[:5])
    wanted = ctx.needs_input_grad[5:8]
    found = attention_vjp(g, q, k, v, out, lse, scale, mask, causal, *wanted)
    return *(None,) * 5, *(part if want else None for part, want in zip(found, wanted, strict=True)), None, None, None


def _attention_vjp(ctx: Any, *g: Tensor | None) -> Any:
    _, q, k, v, out, lse, scale, mask, causal, *_ = kept(ctx)
    _linear(ctx.needs_input_grad[1:6])
    given = [part if part is not None and part.numel() else None for part in g]
    back = (
        None
        if not any(part is not None for part in given)
        else attention_jvp(q, k, v, out, lse, *given, scale, mask, causal)
    )
    return back, *(None,) * 11


def _linear(wanted: Any) -> None:
    if any(wanted):
        raise NotImplementedError("a sweep over attention has derivatives with respect to what it carries alone")


attention.register_autograd(_attention, setup_context=keep_sparse)
attention_jvp.register_autograd(_attention_jvp, setup_context=keep_sparse)
attention_vjp.register_autograd(_attention_vjp, setup_context=keep_sparse)
