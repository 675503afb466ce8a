"""Layer, RMS, group, instance and batch norms as operators, with fake implementations and derivatives.

x [N, C, ...] in groups of channels: 1 for a layer norm of x [rows, C], C for instance norm. ``statistics`` is what
``group_norm`` returns beside y; it counts as a part of x, whose derivatives hold its own. Second derivatives are there,
third ones are not. Derivatives and tangents in another order of axes than x's are copied.

Behind each operator is a function that also takes an axis of replicas in front of all tensors, for vmap's rules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ibp_triton.kernels import columns as _columns
from ibp_triton.kernels import norms as _norms
from ibp_triton.ops.derivatives import keep_sparse, kept


def norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    centred: bool = True,
    *,
    replicated: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of ``group_norm``."""
    return _norms.group_norm(x, groups, weight, bias, eps=eps, centred=centred, replicated=replicated)


def norm_vjp(
    d: Tensor,
    x: Tensor,
    statistics: Tensor,
    groups: int,
    weight: Tensor | None = None,
    sums: bool = False,
    *,
    replicated: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``group_norm_vjp``."""
    d = like_x(d, x, replicated)
    out, *found = _norms.group_norm_vjp(d, x, statistics, groups, weight, sums=sums, replicated=replicated)
    gain, shift = (_or_empty(one, x, replicated) for one in found)
    return out, gain, shift


def norm_jvp(
    t: Tensor,
    x: Tensor,
    statistics: Tensor,
    groups: int,
    weight: Tensor | None = None,
    right: Tensor | None = None,
    *,
    replicated: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of ``group_norm_jvp``."""
    t, right = like_x(t, x, replicated), None if right is None else like_x(right, x, replicated)
    out, cross = _norms.group_norm_jvp(t, x, statistics, groups, weight, right=right, replicated=replicated)
    return out, _or_empty(cross, x, replicated)


def norm_cross(
    t: Tensor, right: Tensor, x: Tensor, statistics: Tensor, groups: int, *, replicated: bool = False
) -> Tensor:
    """Of ``group_norm_cross``."""
    t, right = like_x(t, x, replicated), like_x(right, x, replicated)
    return _norms.group_norm_cross(t, right, x, statistics, groups, replicated=replicated)


def norm_curvature(
    d: Tensor,
    t: Tensor,
    x: Tensor,
    statistics: Tensor,
    groups: int,
    weight: Tensor | None = None,
    *,
    replicated: bool = False,
) -> Tensor:
    """Of ``group_norm_curvature``."""
    d, t = like_x(d, x, replicated), like_x(t, x, replicated)
    return _norms.group_norm_curvature(d, t, x, statistics, groups, weight, replicated=replicated)


@custom_op("ibp_triton::group_norm", mutates_args=())
def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    centred: bool = True,
) -> tuple[Tensor, Tensor]:
    """γ x̂ + b like x, and the statistics [2, N, groups] float32; without ``centred`` an RMS norm, [1, N, groups]."""
    return norm(x, groups, weight, bias, eps, centred)


@custom_op("ibp_triton::group_norm_vjp", mutates_args=())
def group_norm_vjp(
    d: Tensor, x: Tensor, statistics: Tensor, groups: int, weight: Tensor | None = None, sums: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """P(γ d)/s for d [T, N, C, ...], and with ``sums`` Σ d x̂ and Σ d, [C] float32 (else [0])."""
    return norm_vjp(d, x, statistics, groups, weight, sums)


@custom_op("ibp_triton::group_norm_jvp", mutates_args=())
def group_norm_jvp(
    t: Tensor, x: Tensor, statistics: Tensor, groups: int, weight: Tensor | None = None, right: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """γ P(t)/s for t [T, N, C, ...], and with ``right`` like t γ's tangent term Σ r P(t)/s, [C] float32 (else [0])."""
    return norm_jvp(t, x, statistics, groups, weight, right)


@custom_op("ibp_triton::group_norm_cross", mutates_args=())
def group_norm_cross(t: Tensor, right: Tensor, x: Tensor, statistics: Tensor, groups: int) -> Tensor:
    """γ's tangent term Σ r P(t)/s alone: t and right [T, N, C, ...] → [C] float32."""
    return norm_cross(t, right, x, statistics, groups)


@custom_op("ibp_triton::group_norm_curvature", mutates_args=())
def group_norm_curvature(
    d: Tensor, t: Tensor, x: Tensor, statistics: Tensor, groups: int, weight: Tensor | None = None
) -> Tensor:
    """The derivative of P(γ d)/s along t, d held fixed, summed over tangents: d and t [T, N, C, ...] → like x."""
    return norm_curvature(d, t, x, statistics, groups, weight)


def column_project(
    v: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None = None, *, replicated: bool = False
) -> tuple[Tensor, Tensor]:
    """Of ``batch_norm_project``."""
    return _columns.batch_norm_project(like_x(v, x, replicated), x, mean, rstd, weight, replicated=replicated)


def column_cross(
    v: Tensor, right: Tensor, sums: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *, replicated: bool = False
) -> Tensor:
    """Of ``batch_norm_cross``."""
    v, right = like_x(v, x, replicated), like_x(right, x, replicated)
    return _columns.batch_norm_cross(v, right, sums, x, mean, rstd, replicated=replicated)


@custom_op("ibp_triton::batch_norm_project", mutates_args=())
def batch_norm_project(
    v: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """γ P(v)/s over the batch for v [T, N, C, ...], both sweeps of a batch norm, and Σ x̂ v, Σ v: [T, 2, C] float32."""
    return column_project(v, x, mean, rstd, weight)


@custom_op("ibp_triton::batch_norm_cross", mutates_args=())
def batch_norm_cross(v: Tensor, right: Tensor, sums: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Σ r P(v) over the batch and tangents, with the sums of ``batch_norm_project``: [C] float32."""
    return column_cross(v, right, sums, x, mean, rstd)


def _or_empty(found: Tensor | None, x: Tensor, replicated: bool) -> Tensor:
    return x.new_empty((len(x), 0) if replicated else (0,), dtype=torch.float32) if found is None else found


def like_x(v: Tensor, x: Tensor, replicated: bool = False) -> Tensor:
    """v [T, N, C, ...] in x's order of axes, without gaps; a copy where it lies otherwise.

    With ``replicated`` both have an axis of replicas in front; a v that all share stays so.
    """
    if replicated and v.stride(0) == 0:
        return like_x(v[0], x[0]).expand(v.shape)
    if (x[0] if replicated else x).is_contiguous():
        return v.contiguous()
    channels = 3 if replicated else 2
    return v.movedim(channels, -1).contiguous().movedim(-1, channels)


def _sums(x: Tensor, count: int) -> Tensor:
    return x.new_empty((count,), dtype=torch.float32)


group_norm.register_fake(
    lambda x, groups, weight=None, bias=None, eps=1e-5, centred=True: (
        torch.empty_like(x),
        x.new_empty((2 if centred else 1, x.shape[0], groups), dtype=torch.float32),
    )
)
group_norm_vjp.register_fake(
    lambda d, x, statistics, groups, weight=None, sums=False: (
        torch.empty_like(like_x(d, x)),
        *(_sums(x, x.shape[1] if sums else 0) for _ in range(2)),
    )
)
group_norm_jvp.register_fake(
    lambda t, x, statistics, groups, weight=None, right=None: (
        torch.empty_like(like_x(t, x)),
        _sums(x, 0 if right is None else x.shape[1]),
    )
)
group_norm_cross.register_fake(lambda t, right, x, statistics, groups: _sums(x, x.shape[1]))
batch_norm_project.register_fake(
    lambda v, x, mean, rstd, weight=None: (
        torch.empty_like(like_x(v, x)),
        x.new_empty((v.shape[0], 2, x.shape[1]), dtype=torch.float32),
    )
)
batch_norm_cross.register_fake(lambda v, right, sums, x, mean, rstd: _sums(x, x.shape[1]))
group_norm_curvature.register_fake(lambda d, t, x, statistics, groups, weight=None: torch.empty_like(x))


def _group_norm(ctx: Any, g: Tensor | None, _: Any) -> Any:
    x, groups, weight, bias, eps, centred, _, statistics = kept(ctx)
    if g is None:
        return (None,) * 6
    again, parameters = torch.is_grad_enabled(), ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    d, gain, shift = group_norm_vjp(g[None], x, statistics, groups, weight, parameters and not again)
    if parameters and again:  # by what can be differentiated
        rows = [0, *range(2, x.dim())]
        gain, shift = (g * group_norm(x, groups, None, None, eps, centred)[0]).float().sum(rows), g.float().sum(rows)
    return d[0], None, _for(weight, gain), _for(bias, shift), None, None


def _group_norm_vjp(ctx: Any, g: Tensor | None, g_gain: Tensor | None, g_shift: Tensor | None) -> Any:
    d, x, statistics, groups, weight, _, *_ = kept(ctx)
    if g_gain is not None or g_shift is not None:
        raise NotImplementedError("the sums of a norm's reverse have no derivative: differentiate group_norm instead")
    if g is None:
        return (None,) * 6
    back, cross = group_norm_jvp(g, x, statistics, groups, weight, None if weight is None else d)
    return back, _bent(ctx, 1, d, g, x, statistics, groups, weight), None, None, _for(weight, cross), None


def _group_norm_jvp(ctx: Any, g: Tensor | None, g_cross: Tensor | None) -> Any:
    t, x, statistics, groups, weight, right, *_ = kept(ctx)
    back: list[Any] = [None] * 6
    if g is not None:
        back[0] = group_norm_vjp(g, x, statistics, groups, weight)[0]
        back[1] = _bent(ctx, 1, g, t, x, statistics, groups, weight)
        back[4] = None if weight is None else _for(weight, group_norm_cross(t, g, x, statistics, groups))
    if g_cross is not None and right is not None:
        along, back[5], bent = _of_cross(ctx, 1, t, right, x, statistics, groups, g_cross)
        back[0] = along if back[0] is None else back[0] + along
        back[1] = bent if back[1] is None else back[1] + bent
    return tuple(back)


def _group_norm_cross(ctx: Any, g: Tensor) -> Any:
    t, right, x, statistics, groups, _ = kept(ctx)
    return *_of_cross(ctx, 2, t, right, x, statistics, groups, g), None, None


def _of_cross(ctx: Any, at: int, t: Tensor, r: Tensor, x: Tensor, statistics: Tensor, groups: int, g: Tensor) -> Any:
    """The gradients of t, r and x (input ``at``): ⟨g, Σ r P(t)/s⟩ is a jvp with g for γ, seen from r."""
    g = g.contiguous()
    return (
        group_norm_vjp(r, x, statistics, groups, g)[0],
        group_norm_jvp(t, x, statistics, groups, g)[0],
        _bent(ctx, at, r, t, x, statistics, groups, g),
    )


def _group_norm_curvature(ctx: Any, g: Tensor) -> Any:
    raise NotImplementedError("a norm's curvature has no derivative")


def _batch_norm_project(ctx: Any, g: Tensor | None, g_sums: Tensor | None) -> Any:
    v, x, mean, rstd, weight, _, sums = kept(ctx)
    if g_sums is not None or any(ctx.needs_input_grad[1:4]):
        raise NotImplementedError("a batch norm's sweep has derivatives with respect to v and γ alone")
    if g is None:
        return (None,) * 5
    cross = None if weight is None else batch_norm_cross(v, g, sums, x, mean, rstd) * rstd
    back = batch_norm_project(g, x, mean, rstd, weight)[0]
    return back, None, None, None, None if cross is None else _for(weight, cross)


def _batch_norm_cross(ctx: Any, g: Tensor) -> Any:
    v, right, _, x, mean, rstd, _ = kept(ctx)
    if any(ctx.needs_input_grad[2:]):
        raise NotImplementedError("a batch norm's tangent term has derivatives with respect to its two sides alone")
    gain = g / rstd
    sides = (batch_norm_project(side, x, mean, rstd, gain)[0] for side in (right, v))
    return *sides, None, None, None, None


def _bent(ctx: Any, at: int, *arguments: Any) -> Tensor | None:
    return group_norm_curvature(*arguments) if ctx.needs_input_grad[at] else None


def _for(parameter: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if parameter is None else gradient.to(parameter.dtype)


group_norm.register_autograd(_group_norm, setup_context=keep_sparse)
group_norm_vjp.register_autograd(_group_norm_vjp, setup_context=keep_sparse)
group_norm_jvp.register_autograd(_group_norm_jvp, setup_context=keep_sparse)
group_norm_cross.register_autograd(_group_norm_cross, setup_context=keep_sparse)
batch_norm_project.register_autograd(_batch_norm_project, setup_context=keep_sparse)
batch_norm_cross.register_autograd(_batch_norm_cross, setup_context=keep_sparse)
group_norm_curvature.register_autograd(_group_norm_curvature, setup_context=keep_sparse)
