"""Layer, RMS, group and instance norms by the kernels of `norm_rows`: launches, checks, bytes.

Bytes of a launch on numbers of B bytes, E of them in x, γ and b of G: a part, of which there are `parts`, reads γ and b
once, and x̂ is read once for T tangents. Statistics are 4 bytes each, S of them.

    forward      2 B E + S + parts (G + G)              needed  2 B E + S + 2 G
    sweep        B E (1 + 2 T) + S + parts G            needed  B E (1 + 2 T) + S + G
    with sums    besides, 8 C parts, twice where there is more than one, for one or two sums of C float32 numbers

A part is at least four rows of one number a channel, and eight (of two bytes: sixteen) where it has sums: within 1.3 of
what is needed. Pixels of a row over a tile are read twice: x and what is swept, not what is written.

With ``replicated`` all tensors, results too, have an axis of replicas in front, R times these bytes in one launch.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ibp_triton.kernels.combine import combination
from ibp_triton.kernels.gates import same_layout
from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv, launch
from ibp_triton.kernels.norm_rows import bend, normalise, project
from ibp_triton.kernels.plans import Layout, Result, planned
from ibp_triton.kernels.replica_axis import Replicas, beside, taken_apart
from ibp_triton.kernels.tiles import Config, multiprocessors, select

LARGEST = 8192  # numbers of a tile; a pixel's channels of one group must fit it
PROGRAMS = 4  # of a multiprocessor: each walks over its part of the rows


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    centred: bool = True,
    replicated: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = γ x̂ + b, each group of channels of each sample by its own statistics, in one launch.

    Args:
        x: [N, C, ...], contiguous or channels last; float32, bfloat16 or float16.
        groups: a divisor of C, of at most 8192 channels each. Layer norm: 1, for x [rows, C]; instance norm: C.
        weight, bias: γ and b, [C], any float type; 1 and 0 without.
        eps: is added to the variance.
        centred: False divides by the root mean square alone (RMS norm).
        replicated: tensors have an axis of replicas in front, of stride 0 where these share one.

    Returns: y like x, and the statistics [2, N, groups] float32: 1/s and μ; [1, N, groups] where not centred.
    Raises: ValueError for other shapes, dtypes or strides.
    """
    x, weight, bias = beside(replicated, x, weight, bias)
    plan = planned(_norm, (groups, float(eps), centred, replicated), x, weight, bias)
    out, statistics = plan.out.empty(x), plan.statistics.empty(x)
    launch(plan.plan, x, x if weight is None else weight, x if bias is None else bias, out, statistics)
    return out, statistics


def group_norm_vjp(
    d: Tensor,
    x: Tensor,
    statistics: Tensor,
    groups: int,
    weight: Tensor | None = None,
    *,
    sums: bool = False,
    replicated: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """P(γ d)/s, and the gradients of γ and b where `sums`: Σ d x̂ and Σ d, over tangents as well.

    Args:
        d: [T, N, C, ...], each tangent with x's order of axes, of x's dtype.
        x: [N, C, ...], as `group_norm` took it.
        statistics: of `group_norm`.
        groups, weight, replicated: as for `group_norm`.

    Returns: like d; [C] float32 twice, or None. One launch, two where the sums come in parts.
    Raises: ValueError for shapes, dtypes or strides that do not match.
    """
    d, x, statistics, weight = beside(replicated, d, x, statistics, weight)
    plan = planned(_project, (groups, True, True, sums, replicated), d, None, x, statistics, weight)
    return _swept(plan, d, d, x, statistics, weight)


def group_norm_jvp(
    t: Tensor,
    x: Tensor,
    statistics: Tensor,
    groups: int,
    weight: Tensor | None = None,
    *,
    right: Tensor | None = None,
    replicated: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """γ P(t)/s, and with a right side γ's tangent term Σ r P(t)/s, over tangents as well, from the same reads.

    Args:
        t: [T, N, C, ...], as d of `group_norm_vjp`; so is right.
        x, statistics, groups, weight, replicated: as for `group_norm_vjp`.

    Returns: like t; [C] float32, or None.
    Raises: ValueError for shapes, dtypes or strides that do not match.
    """
    t, right, x, statistics, weight = beside(replicated, t, right, x, statistics, weight)
    plan = planned(_project, (groups, True, False, False, replicated), t, right, x, statistics, weight)
    out, total, _ = _swept(plan, t, t if right is None else right, x, statistics, weight)
    return out, total


def group_norm_cross(
    t: Tensor, right: Tensor, x: Tensor, statistics: Tensor, groups: int, *, replicated: bool = False
) -> Tensor:
    """γ's tangent term alone, Σ r P(t)/s: [C] float32; arguments and errors as of `group_norm_jvp`."""
    t, right, x, statistics = beside(replicated, t, right, x, statistics)
    plan = planned(_project, (groups, False, False, False, replicated), t, right, x, statistics, None)
    total = _swept(plan, t, right, x, statistics, None)[1]
    assert total is not None
    return total


def group_norm_curvature(
    d: Tensor,
    t: Tensor,
    x: Tensor,
    statistics: Tensor,
    groups: int,
    weight: Tensor | None = None,
    *,
    replicated: bool = False,
) -> Tensor:
    """The derivative of P(γ d)/s along t with d held fixed, summed over tangents.

    Args:
        d, t: [T, N, C, ...], as d of `group_norm_vjp`.
        x, statistics, groups, weight: as for `group_norm_vjp`; a row has at most 8192 numbers, each axis rounded up to
            a power of two (`whole`).
        replicated: as for `group_norm`.

    Returns: like x.
    Raises: ValueError for longer rows, and for shapes, dtypes or strides that do not match.
    """
    d, t, x, statistics, weight = beside(replicated, d, t, x, statistics, weight)
    plan = planned(_bend, (groups, replicated), d, t, x, statistics, weight)
    out = plan.out.empty(x)
    launch(plan.plan, d, t, x, statistics, x if weight is None else weight, out)
    return out


def fits(x: Tensor, groups: int) -> bool:
    """Whether the kernels take x [N, C, ...], copied if need be: by its dtype, its sizes and channels of a group."""
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.dim() > 1 and math.prod(x.shape[1:]) > 0
    return known and x.shape[1] % groups == 0 and triton.next_power_of_2(x.shape[1] // groups) <= LARGEST


def whole(x: Tensor, groups: int) -> bool:
    """Whether a row of x [N, C, ...] fits a tile, so that it is read once, and its curvature has a kernel."""
    return _row(x, groups)[0] * _row(x, groups)[1] <= LARGEST


def dense(x: Tensor) -> bool:
    """Whether x [N, C, ...] lies as the kernels want it: contiguous, or so with the channels last."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


@dataclass(frozen=True)
class _Rows:
    """How the rows of a tensor are shared out among programs."""

    grid: tuple[int, int, int]
    constants: dict[str, Any]
    config: Config
    parts: int
    reads: int  # of each number: one, or two where a row is over a tile


@dataclass(frozen=True)
class _Normalised(Result):
    """A launch, the layouts of y and of the statistics."""

    statistics: Layout


@dataclass(frozen=True)
class _Projection:
    """A launch; the layouts of the sweep and of its sums, and what adds these up where they come in parts."""

    first: LaunchPlan
    channels: int
    out: Layout | None
    total: Layout | None
    shift: Layout | None
    parts: Layout | None
    second: LaunchPlan | None


def _swept(
    plan: _Projection, v: Tensor, r: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None
) -> tuple[Any, Tensor | None, Tensor | None]:
    out = None if plan.out is None else plan.out.empty(v)
    total = None if plan.total is None else plan.total.empty(x)
    shift = None if plan.shift is None else plan.shift.empty(x)
    parts = None if plan.parts is None else plan.parts.empty(x)
    first, second = (total, shift) if parts is None else (parts, parts.view(-1)[plan.channels :])
    unused = v
    launch(
        plan.first,
        *(v, r, x, statistics),
        *[unused if pointer is None else pointer for pointer in (weight, out, first, second)],
    )
    if plan.second is not None:
        launch(plan.second, parts, *[total] * 4, total if shift is None else shift, 1.0)
    return out, total, shift


def _norm(
    groups: int, eps: float, centred: bool, axis: bool, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> _Normalised:
    replicas, (x, weight, bias) = taken_apart(axis, x, weight, bias)
    _check(x, groups, weight, bias)
    rows = _rows(x, groups, 4, replicas)
    statistics = Layout.dense((2 if centred else 1, len(x), groups), torch.float32)
    read = rows.parts * sum(_bytes(p) for p in (weight, bias) if p is not None)
    constants = {
        "eps": eps, **replicas.owned("x", "weight", "bias"), **rows.constants,
        "CENTRED": centred, "WEIGHT": weight is not None, "BIAS": bias is not None,
    }  # fmt: skip
    cost = Cost(rows.reads * _bytes(x) + read, _bytes(x) + statistics.bytes).times(replicas.count)
    plan = LaunchPlan(normalise, rows.grid, constants, rows.config, cost, replicas.count)
    return _Normalised(replicas.layout(_like(x)), plan, replicas.layout(statistics))


def _project(
    groups: int,
    store: bool,
    inner: bool,
    sums: bool,
    axis: bool,
    v: Tensor,
    right: Tensor | None,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
) -> _Projection:
    replicas, (v, right, x, statistics, weight) = taken_apart(axis, v, right, x, statistics, weight)
    _check(x, groups, weight)
    _check_sides(x, groups, statistics, v, right)
    cross, channels, tangents = right is not None, x.shape[1], len(v)
    rows = _rows(x, groups, 32 // x.element_size() if sums or cross else 4, replicas)
    width = channels * (2 if sums else 1) if sums or cross else 0
    apart = width > 0 and rows.parts != 1
    sum_layout = Layout.dense((channels,), torch.float32)
    total, shift = sum_layout if width else None, sum_layout if sums else None
    parts = Layout.dense((rows.parts, 1, width), torch.float32) if apart else None
    gain = weight if store else None
    read = rows.parts * (0 if gain is None else _bytes(gain))
    first = LaunchPlan(
        project,
        rows.grid,
        {
            **rows.constants, "tangents": tangents, "beyond": width if apart else channels,
            **replicas.owned("v", "r", "x", "statistics", "weight"),
            "CENTRED": len(statistics) == 2, "INNER": inner and gain is not None,
            "OUTER": not inner and gain is not None, "STORE": store, "SUMS": sums, "CROSS": cross,
            "LANES": 1 if rows.reads == 1 else triton.next_power_of_2(max(tangents, 1)),
        },
        rows.config,
        Cost(
            rows.reads * (_bytes(x) + _bytes(v)) + _bytes(statistics) + read + (_bytes(v) if cross else 0),
            (_bytes(v) if store else 0) + 4 * rows.parts * width,
            pointers={"x": rows.reads * _bytes(x), "statistics": _bytes(statistics)},
        ).times(replicas.count),
        replicas.count,
    )  # fmt: skip
    second = combination(x, parts, sum_layout, extra=shift, replicas=replicas.only(0, 0)) if parts else None
    out, total, shift, parts = (
        None if one is None else replicas.layout(one) for one in (_like(v) if store else None, total, shift, parts)
    )
    return _Projection(first, channels, out, total, shift, parts, second)


def _bend(
    groups: int, axis: bool, d: Tensor, t: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None
) -> Result:
    replicas, (d, t, x, statistics, weight) = taken_apart(axis, d, t, x, statistics, weight)
    _check(x, groups, weight)
    _check_sides(x, groups, statistics, d, t)
    rows = _rows(x, groups, 4, replicas)
    if rows.reads > 1:
        raise ValueError(f"the curvature's rows must fit {LARGEST} numbers, not those of {tuple(x.shape)}")
    constants = {
        **rows.constants, "tangents": len(d),
        **replicas.owned("d", "v", "x", "statistics", "weight"),
        "CENTRED": len(statistics) == 2, "WEIGHT": weight is not None,
    }  # fmt: skip
    read = rows.parts * (0 if weight is None else _bytes(weight))
    cost = Cost(_bytes(x) + 2 * _bytes(d) + _bytes(statistics) + read, _bytes(x)).times(replicas.count)
    plan = LaunchPlan(bend, rows.grid, constants, rows.config, cost, replicas.count)
    return Result(replicas.layout(_like(x)), plan)


def _like(x: Tensor) -> Layout:
    return Layout.of(torch.empty_like(x, device="meta"))


def _rows(x: Tensor, groups: int, least: int, replicas: Replicas) -> _Rows:
    """At least `least` rows a part (of one pixel each; of more pixels fewer) where there are so many."""
    block_c, block_p = _row(x, groups)
    size = block_c * block_p
    config = select("norm", "any" if size <= 1024 else "middle" if size <= 4096 else "long", x)
    block_p = min(block_p, max(1, config.block_m // block_c))
    rows = max(1, config.block_m // (block_c * block_p))
    samples, channels, pixels = len(x), x.shape[1], math.prod(x.shape[2:])
    most = cdiv(PROGRAMS * multiprocessors(x), groups * replicas.count)
    parts = min(cdiv(samples, rows), max(1, samples // cdiv(least, pixels)), most)
    strides = (pixels, 1) if x.is_contiguous() else (1, channels)
    constants = {
        "samples": samples,
        "VIEW": (groups, channels // groups, pixels, channels * pixels, *strides),
        "REPLICATED": replicas.several, "ROWS": rows, "BLOCK_P": block_p, "BLOCK_C": block_c,
    }  # fmt: skip
    return _Rows((groups * parts, replicas.count, 1), constants, config, parts, 1 if block_p >= pixels else 2)


def _row(x: Tensor, groups: int) -> tuple[int, int]:
    """Channels and pixels of a row, as powers of two."""
    return triton.next_power_of_2(x.shape[1] // groups), triton.next_power_of_2(math.prod(x.shape[2:]))


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _check(x: Tensor, groups: int, *parameters: Tensor | None) -> None:
    if not fits(x, groups) or not dense(x):
        raise ValueError(
            f"x {tuple(x.shape)} by {x.stride()} in {x.dtype} must be [N, C, ...], contiguous or channels last, in "
            f"{groups} groups of at most {LARGEST} channels"
        )
    for p in parameters:
        if p is not None and (p.shape != x.shape[1:2] or not p.is_contiguous()):
            raise ValueError(f"parameters must be [{x.shape[1]}], contiguous, not {tuple(p.shape)} by {p.stride()}")


def _check_sides(x: Tensor, groups: int, statistics: Tensor, *sides: Tensor | None) -> None:
    shapes = [(n, len(x), groups) for n in (1, 2)]
    if tuple(statistics.shape) not in shapes or not statistics.is_contiguous() or statistics.dtype != torch.float32:
        raise ValueError(f"statistics must be those of group_norm, {shapes[1]}, not {tuple(statistics.shape)}")
    for side in sides:
        if side is None:
            continue
        apart = len(side) < 2 or x.numel() == 0 or side.stride(0) == x.numel()
        alike = side.shape[1:] == x.shape and (len(side) == 0 or same_layout(side[0], x))
        if side.dtype != x.dtype or not alike or not apart:
            raise ValueError(
                f"derivatives and tangents {tuple(side.shape)} by {side.stride()} in {side.dtype} must be "
                f"[T, N, C, ...] over x {tuple(x.shape)} by {x.stride()} in {x.dtype}"
            )
        if side.shape != next(s for s in sides if s is not None).shape:
            raise ValueError("both sides must have as many tangents")
