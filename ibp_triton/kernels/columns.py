"""The sweeps of a batch norm in train mode, whose groups are the channels of the whole batch: sums, then the sweep.

With P(v) = v − mean(v) − x̂ mean(x̂ v) over a channel, γ P(v)/s is the reverse and the linear sweep alike. A first launch
sums v and x̂ v of each channel for all tangents, a second adds up its parts, the last writes the sweep. x is read once
for all tangents in the first and in the last. Of E numbers of B bytes, C channels and T tangents, G bytes of γ:

    sums        B E (1 + T) + 8 C parts (1 + T)                                 needed B E (1 + T) + 8 C (1 + T)
    its parts   8 C T (parts + 1)
    sweep       B E (1 + 2 T) + (8 C + G) programs + 8 C T blocks of positions  needed B E (1 + 2 T) + 8 C (1 + T) + G

If REPLICATED the third axis of the grid is that of replicas, and with ``replicated`` all tensors have it in front, as
in `norm_rows`.
"""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.combine import combination
from ibp_triton.kernels.gates import same_layout
from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv, launch
from ibp_triton.kernels.norms import dense
from ibp_triton.kernels.plans import Layout, Result, planned
from ibp_triton.kernels.replica_axis import beside, taken_apart
from ibp_triton.kernels.tiles import multiprocessors, select


@triton.jit(do_not_specialize=["samples", "tangents", "v_r", "r_r", "x_r", "mean_r", "rstd_r", "sums_r"])
def column_sums(
    v,
    r,
    x,
    mean,
    rstd,
    sums,
    partial,
    share,
    samples,
    tangents,
    v_r,
    r_r,
    x_r,
    mean_r,
    rstd_r,
    sums_r,
    IMAGE: tl.constexpr,
    REPLICATED: tl.constexpr,
    CROSS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Σ x̂ v[t] and Σ v[t] over a part of the positions, or Σ_t r[t] P(v[t]) if CROSS.

    Grid (channel blocks, parts, replicas).

    Pointers:
        v, r: [tangents, samples, C, pixels], dense in a tangent by IMAGE's strides, any float type; r if CROSS.
        x: [samples, C, pixels], read once for all tangents.
        mean, rstd: [C] float32.
        sums: [tangents, 2, C] float32, those of v over all positions; read when CROSS. `share` is 1 / positions.
        partial: [parts, tangents, 2, C] float32, [parts, C] if CROSS.

    IMAGE is (C, pixels, strides of sample, channel and pixel). LANES is a power of two, at least `tangents`.
    """
    C: tl.constexpr = IMAGE[0]
    positions = samples * IMAGE[1]
    if REPLICATED:
        replica = tl.program_id(2).to(tl.int64)
        v += replica * v_r * tangents * positions * C
        r += replica * r_r * tangents * positions * C
        x += replica * x_r * positions * C
        mean += replica * mean_r * C
        rstd += replica * rstd_r * C
        sums += replica * sums_r * tangents * (2 * C)
        partial += replica * tl.num_programs(1) * C * (1 if CROSS else 2 * tangents)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, LANES)
    inside = c < C
    live = (lane < tangents)[:, None, None] & inside[None, None, :]
    middle = tl.load(mean + c, mask=inside, other=0.0)[None, None, :]
    scale = tl.load(rstd + c, mask=inside, other=0.0)[None, None, :]
    first = tl.zeros((LANES, BLOCK_P, BLOCK_C), dtype=tl.float32)
    second = tl.zeros((LANES, BLOCK_P, BLOCK_C), dtype=tl.float32)
    if CROSS:
        own = (lane * 2 * C)[:, None, None] + c[None, None, :]
        along = tl.load(sums + own, mask=live, other=0.0) * share
        level = tl.load(sums + own + C, mask=live, other=0.0) * share
    for start in range(tl.program_id(1) * BLOCK_P, positions, tl.num_programs(1) * BLOCK_P):
        i = tl.multiple_of(start, BLOCK_P) + tl.arange(0, BLOCK_P)
        at = (i // IMAGE[1] * IMAGE[2] + i % IMAGE[1] * IMAGE[4])[None, :, None] + (c * IMAGE[3])[None, None, :]
        ok = (i < positions)[None, :, None] & inside[None, None, :]
        unit = (tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - middle) * scale
        place = (lane * (positions * C))[:, None, None] + at
        u = tl.load(v + place, mask=ok & live, other=0.0).to(tl.float32)
        if CROSS:
            first += tl.load(r + place, mask=ok & live, other=0.0).to(tl.float32) * (u - level - unit * along)
        else:
            first += u * unit
            second += u
    if CROSS:
        tl.store(partial + tl.program_id(1) * C + c, tl.sum(tl.sum(first, 1), 0), mask=inside)
    else:
        out = partial + tl.program_id(1) * (tangents * 2 * C) + (lane * 2 * C)[:, None] + c[None, :]
        kept = (lane < tangents)[:, None] & inside[None, :]
        tl.store(out, tl.sum(first, 1), mask=kept)
        tl.store(out + C, tl.sum(second, 1), mask=kept)


@triton.jit(do_not_specialize=["samples", "tangents", "v_r", "x_r", "mean_r", "rstd_r", "weight_r"])
def column_sweep(
    v,
    x,
    mean,
    rstd,
    sums,
    weight,
    out,
    share,
    samples,
    tangents,
    v_r,
    x_r,
    mean_r,
    rstd_r,
    weight_r,
    IMAGE: tl.constexpr,
    REPLICATED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[t] = γ P(v[t])/s by the sums of `column_sums`; grid (channel blocks, blocks of positions, replicas).

    Pointers as there; out is like v, weight [C] of any float type, read when WEIGHT.
    """
    C: tl.constexpr = IMAGE[0]
    positions = samples * IMAGE[1]
    if REPLICATED:
        replica = tl.program_id(2).to(tl.int64)
        v += replica * v_r * tangents * positions * C
        x += replica * x_r * positions * C
        mean += replica * mean_r * C
        rstd += replica * rstd_r * C
        sums += replica * tangents * (2 * C)
        weight += replica * weight_r * C
        out += replica * tangents * positions * C
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    middle = tl.load(mean + c, mask=inside, other=0.0)[None, :]
    scale = tl.load(rstd + c, mask=inside, other=0.0)[None, :]
    gain = scale
    if WEIGHT:
        gain *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    for start in range(tl.program_id(1) * BLOCK_P, positions, tl.num_programs(1) * BLOCK_P):
        i = tl.multiple_of(start, BLOCK_P) + tl.arange(0, BLOCK_P)
        at = (i // IMAGE[1] * IMAGE[2] + i % IMAGE[1] * IMAGE[4])[:, None] + (c * IMAGE[3])[None, :]
        ok = (i < positions)[:, None] & inside[None, :]
        unit = (tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - middle) * scale
        for t in range(tangents):
            own = sums + t * 2 * C + c
            along = tl.load(own, mask=inside, other=0.0)[None, :] * share
            level = tl.load(own + C, mask=inside, other=0.0)[None, :] * share
            u = tl.load(v + t * (positions * C) + at, mask=ok, other=0.0).to(tl.float32)
            tl.store(out + t * (positions * C) + at, (u - level - unit * along) * gain, mask=ok)


def batch_norm_project(
    v: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None = None, *, replicated: bool = False
) -> tuple[Tensor, Tensor]:
    """γ P(v)/s, a batch norm's reverse and linear sweep alike, and the sums of each channel, in two or three launches.

    Args:
        v: [T, N, C, ...], each tangent with x's order of axes, of x's dtype; T up to 64.
        x: [N, C, ...], contiguous or channels last; float32, bfloat16 or float16.
        mean, rstd: μ and 1/s of each channel over the batch, [C] float32.
        weight: γ, [C], any float type; 1 without.
        replicated: tensors have an axis of replicas in front, of stride 0 where these share one.

    Returns: like v; Σ x̂ v and Σ v, [T, 2, C] float32: the gradients of γ and b for a derivative v.
    Raises: ValueError for shapes, dtypes or strides that do not match, and for T over 64.
    """
    v, x, mean, rstd, weight = beside(replicated, v, x, mean, rstd, weight)
    sums = _summed(planned(_sums, (replicated,), v, None, x, mean, rstd, None), v, v, x, mean, rstd, mean)
    sweep = planned(_sweep, (replicated,), v, x, mean, rstd, weight)
    out = sweep.out.empty(v)
    launch(sweep.plan, v, x, mean, rstd, sums, x if weight is None else weight, out)
    return out, sums


def batch_norm_cross(
    v: Tensor, right: Tensor, sums: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *, replicated: bool = False
) -> Tensor:
    """Σ r P(v) of each channel, over tangents as well: γ's tangent term times s, [C] float32.

    Args:
        v, x, mean, rstd, replicated: as for `batch_norm_project`; right is like v.
        sums: [T, 2, C], those of v that `batch_norm_project` gives.

    Raises: ValueError for shapes, dtypes or strides that do not match, and for T over 64.
    """
    v, right, x, mean, rstd, sums = beside(replicated, v, right, x, mean, rstd, sums)
    plan = planned(_sums, (replicated,), v, right, x, mean, rstd, sums)
    return _summed(plan, v, right, x, mean, rstd, sums)


@dataclass(frozen=True)
class _Columns:
    """The launch of the sums, and what adds up its parts."""

    first: LaunchPlan
    parts: Layout
    out: Layout
    second: LaunchPlan | None


def _summed(plan: _Columns, v: Tensor, r: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, sums: Tensor) -> Tensor:
    parts, out = plan.parts.empty(x), plan.out.empty(x)
    launch(plan.first, v, r, x, mean, rstd, sums, out if plan.second is None else parts)
    if plan.second is not None:
        launch(plan.second, parts, out, out, out, out, out, 1.0)
    return out


def _sums(
    axis: bool, v: Tensor, right: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, sums: Tensor | None
) -> _Columns:
    replicas, (v, right, x, mean, rstd, sums) = taken_apart(axis, v, right, x, mean, rstd, sums)
    _check(x, mean, rstd, None, v, *([] if right is None else [right]))
    channels, tangents, cross = x.shape[1], len(v), right is not None
    if sums is not None and (sums.shape != (tangents, 2, channels) or not sums.is_contiguous()):
        raise ValueError(f"sums must be [{tangents}, 2, {channels}], contiguous, not {tuple(sums.shape)}")
    positions = x.numel() // channels
    lanes = triton.next_power_of_2(max(tangents, 1))
    config = select("columns", "sums", x)
    block_p, block_c = _tile(x, config.block_m // lanes)
    columns = cdiv(channels, block_c)
    most = cdiv(2 * multiprocessors(x), columns * replicas.count)
    parts = max(1, min(cdiv(positions, 4 * block_p), most))
    shape = (channels,) if cross else (tangents, 2, channels)
    partial = Layout.dense((parts, 1, math.prod(shape)), torch.float32)
    out = Layout.dense(shape, torch.float32)
    numbers = v.numel() * (2 if cross else 1) + x.numel()
    first = LaunchPlan(
        column_sums,
        (columns, parts, replicas.count),
        {
            "share": _share(positions), "samples": len(x), "tangents": tangents,
            **replicas.owned("v", "r", "x", "mean", "rstd", "sums"),
            "IMAGE": _view(x), "REPLICATED": replicas.several, "CROSS": cross, "LANES": lanes,
            "BLOCK_P": block_p, "BLOCK_C": block_c,
        },
        config,
        Cost(
            numbers * x.element_size() + 8 * channels * parts * (1 + (tangents if cross else 0)),
            partial.bytes,
            pointers={"x": x.numel() * x.element_size()},
        ).times(replicas.count),
        replicas.count,
    )  # fmt: skip
    second = None if parts == 1 or out.numel == 0 else combination(x, partial, out, replicas=replicas.only(0, 0))
    return _Columns(first, replicas.layout(partial), replicas.layout(out), second)


def _sweep(axis: bool, v: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Result:
    replicas, (v, x, mean, rstd, weight) = taken_apart(axis, v, x, mean, rstd, weight)
    _check(x, mean, rstd, weight, v)
    channels, tangents, positions = x.shape[1], len(v), x.numel() // x.shape[1]
    config = select("columns", "sweep", x)
    block_p, block_c = _tile(x, config.block_m)
    columns, blocks = cdiv(channels, block_c), cdiv(positions, block_p)
    rows = min(blocks, 65535)
    gain = 0 if weight is None else weight.element_size()
    plan = LaunchPlan(
        column_sweep,
        (columns, rows, replicas.count),
        {
            "share": _share(positions), "samples": len(x), "tangents": tangents,
            **replicas.owned("v", "x", "mean", "rstd", "weight"),
            "IMAGE": _view(x), "REPLICATED": replicas.several, "WEIGHT": weight is not None,
            "BLOCK_P": block_p, "BLOCK_C": block_c,
        },
        config,
        Cost(
            (x.numel() + v.numel()) * x.element_size() + channels * ((8 + gain) * rows + 8 * tangents * blocks),
            v.numel() * x.element_size(),
            pointers={"x": x.numel() * x.element_size()},
        ).times(replicas.count),
        replicas.count,
    )  # fmt: skip
    return Result(replicas.layout(Layout.of(torch.empty_like(v, device="meta"))), plan)


def _share(positions: int) -> float:
    return 1 / max(positions, 1)


def _view(x: Tensor) -> tuple[int, ...]:
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    strides = (pixels, 1) if x.is_contiguous() else (1, channels)
    return channels, pixels, channels * pixels, *strides


def _tile(x: Tensor, size: int) -> tuple[int, int]:
    """Positions and channels of a tile, the longer side along the memory."""
    channels, positions = x.shape[1], x.numel() // x.shape[1]
    if x.is_contiguous() and x.dim() > 2:
        along = min(triton.next_power_of_2(max(positions, 1)), max(1, size // 4))
        return along, size // along
    along = min(triton.next_power_of_2(channels), 64, size)
    return size // along, along


def _check(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, *sides: Tensor) -> None:
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.dim() > 1 and math.prod(x.shape[1:]) > 0
    if not known or not dense(x):
        raise ValueError(
            f"x {tuple(x.shape)} by {x.stride()} in {x.dtype} must be [N, C, ...], contiguous or channels last"
        )
    for name, p in (("mean", mean), ("rstd", rstd), ("weight", weight)):
        if p is not None and (p.shape != x.shape[1:2] or not p.is_contiguous()):
            raise ValueError(f"{name} must be [{x.shape[1]}], contiguous, not {tuple(p.shape)} by {p.stride()}")
    for side in sides:
        apart = len(side) < 2 or x.numel() == 0 or side.stride(0) == x.numel()
        alike = side.shape[1:] == x.shape and (len(side) == 0 or same_layout(side[0], x))
        if side.dtype != x.dtype or not alike or not apart or len(side) != len(sides[0]) or len(side) > 64:
            raise ValueError(
                f"derivatives and tangents {tuple(side.shape)} by {side.stride()} in {side.dtype} must be "
                f"[T, N, C, ...] over x {tuple(x.shape)} by {x.stride()} in {x.dtype}, T at most 64"
            )
