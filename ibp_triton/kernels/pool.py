"""Pooling over windows of an image: maximum (with the ReLU behind it) and mean, in all three directions.

The maximum's position is one byte an element, the offset inside its window, or `DEAD` where the ReLU is off: the
linear sweep and the reverse read that byte and no value, and the ReLU costs them nothing.
"""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.geometry import Geometry
from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv, launch
from ibp_triton.kernels.plans import CodedResult, Layout, Result, channels_last, planned
from ibp_triton.kernels.tiles import select

DEAD = 255  # the offset of a window whose maximum the ReLU has cut off


@triton.jit
def max_pool(
    x,
    out,
    code,
    size,
    x_n,
    x_h,
    x_w,
    x_c,
    o_n,
    o_h,
    o_w,
    o_c,
    C: tl.constexpr,
    GEOMETRY: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = max over the window, the first of equals (as torch does), clipped at 0 if RELU; grid (blocks of elements).

    Pointers:
        x: [N, C, H, W] by the strides x_*; any float type.
        out: [N, C, OH, OW] by the strides o_*; the same type.
        code: [N, OH, OW, C] uint8, dense: the offset in the window, row by row, or 255 where RELU clips.
    """
    OH: tl.constexpr = GEOMETRY[2]
    OW: tl.constexpr = GEOMETRY[3]
    KH: tl.constexpr = GEOMETRY[4]
    KW: tl.constexpr = GEOMETRY[5]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    c = i % C
    ow = i // C % OW
    oh = i // (C * OW) % OH
    n = i // (C * OW * OH)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    where = tl.full((BLOCK,), 0, dtype=tl.int32)
    none = ok  # no pixel seen yet: a window of -inf still has a first maximum
    for kh in tl.static_range(KH):
        for kw in tl.static_range(KW):
            h = oh * GEOMETRY[6] - GEOMETRY[8] + kh
            w = ow * GEOMETRY[7] - GEOMETRY[9] + kw
            inside = ok & (h >= 0) & (h < GEOMETRY[0]) & (w >= 0) & (w < GEOMETRY[1])
            v = tl.load(x + n * x_n + h * x_h + w * x_w + c * x_c, mask=inside, other=float("-inf")).to(tl.float32)
            wins = inside & (none | (v > best) | (v != v))  # a NaN wins, as in torch
            best = tl.where(wins, v, best)
            where = tl.where(wins, kh * GEOMETRY[5] + kw, where)
            none &= ~inside
    if RELU:
        where = tl.where(best > 0, where, 255)
        best = tl.where(best <= 0, 0.0, best)
    tl.store(out + n * o_n + oh * o_h + ow * o_w + c * o_c, best, mask=ok)
    tl.store(code + i, where.to(tl.uint8), mask=ok)


@triton.jit
def window_weight(top, left, GEOMETRY: tl.constexpr, COUNT_PADDING: tl.constexpr):
    """One over the pixels of the windows that begin at top, left: with the padding on the far side, as torch counts."""
    if COUNT_PADDING:
        high = tl.minimum(top + GEOMETRY[4], GEOMETRY[0] + GEOMETRY[8]) - top
        wide = tl.minimum(left + GEOMETRY[5], GEOMETRY[1] + GEOMETRY[9]) - left
    else:
        high = tl.minimum(top + GEOMETRY[4], GEOMETRY[0]) - tl.maximum(top, 0)
        wide = tl.minimum(left + GEOMETRY[5], GEOMETRY[1]) - tl.maximum(left, 0)
    return 1.0 / tl.maximum(high * wide, 1).to(tl.float32)


@triton.jit(do_not_specialize=["tangents"])
def pool_gather(
    t,
    code,
    out,
    size,
    tangents,
    t_t,
    t_n,
    t_h,
    t_w,
    t_c,
    o_t,
    o_n,
    o_h,
    o_w,
    o_c,
    C: tl.constexpr,
    GEOMETRY: tl.constexpr,
    MEAN: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[s] = t[s] at the stored offset (the linear sweep), or the window's mean if MEAN; grid (blocks of elements).

    Pointers:
        t: [T, N, C, H, W] by the strides t_*; any float type.
        code: [N, OH, OW, C] uint8, dense; read once for all tangents, not at all when MEAN.
        out: [T, N, C, OH, OW] by the strides o_*.
    """
    OH: tl.constexpr = GEOMETRY[2]
    OW: tl.constexpr = GEOMETRY[3]
    KH: tl.constexpr = GEOMETRY[4]
    KW: tl.constexpr = GEOMETRY[5]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    c = i % C
    ow = i // C % OW
    oh = i // (C * OW) % OH
    n = i // (C * OW * OH)
    at = n * o_n + oh * o_h + ow * o_w + c * o_c
    top = oh * GEOMETRY[6] - GEOMETRY[8]
    left = ow * GEOMETRY[7] - GEOMETRY[9]
    if MEAN:
        weight = window_weight(top, left, GEOMETRY, COUNT_PADDING)
        for s in range(tangents):
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for kh in tl.static_range(KH):
                for kw in tl.static_range(KW):
                    h = top + kh
                    w = left + kw
                    inside = ok & (h >= 0) & (h < GEOMETRY[0]) & (w >= 0) & (w < GEOMETRY[1])
                    pixel = s * t_t + n * t_n + h * t_h + w * t_w + c * t_c
                    total += tl.load(t + pixel, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + s * o_t + at, total * weight, mask=ok)
    else:
        offset = tl.load(code + i, mask=ok, other=255).to(tl.int32)
        pixel = n * t_n + (top + offset // GEOMETRY[5]) * t_h + (left + offset % GEOMETRY[5]) * t_w + c * t_c
        for s in range(tangents):
            v = tl.load(t + s * t_t + pixel, mask=ok & (offset != 255), other=0.0)
            tl.store(out + s * o_t + at, v, mask=ok)


@triton.jit(do_not_specialize=["tangents"])
def pool_scatter(
    d,
    code,
    out,
    size,
    tangents,
    d_t,
    d_n,
    d_h,
    d_w,
    d_c,
    o_t,
    C: tl.constexpr,
    GEOMETRY: tl.constexpr,
    REACH: tl.constexpr,
    MEAN: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The reverse, as a gather: a pixel sums the windows that chose it (MEAN: that hold it); grid (blocks of pixels).

    Pointers:
        d: [T, N, C, OH, OW] by the strides d_*; any float type.
        code: [N, OH, OW, C] uint8, dense; read once for all tangents, not at all when MEAN.
        out: [T, N, H, W, C], dense in a tangent; o_t elements from one to the next.

    REACH is (height, width): how many windows can hold one pixel. Sums run in a fixed order, without atomics.
    """
    H: tl.constexpr = GEOMETRY[0]
    W: tl.constexpr = GEOMETRY[1]
    OH: tl.constexpr = GEOMETRY[2]
    OW: tl.constexpr = GEOMETRY[3]
    BACK_H: tl.constexpr = REACH[0]
    BACK_W: tl.constexpr = REACH[1]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = i % C
    w = i // C % W + GEOMETRY[9]
    h = i // (C * W) % H + GEOMETRY[8]
    n = i // (C * W * H)
    chosen = ()
    weights = ()
    for back_h in tl.static_range(BACK_H):
        for back_w in tl.static_range(BACK_W):
            oh = h // GEOMETRY[6] - back_h
            ow = w // GEOMETRY[7] - back_w
            dh = h - oh * GEOMETRY[6]
            dw = w - ow * GEOMETRY[7]
            holds = (i < size) & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
            holds &= (dh < GEOMETRY[4]) & (dw < GEOMETRY[5])
            if MEAN:
                top = oh * GEOMETRY[6] - GEOMETRY[8]
                left = ow * GEOMETRY[7] - GEOMETRY[9]
                weights = weights + (window_weight(top, left, GEOMETRY, COUNT_PADDING),)  # type: ignore[assignment]  # noqa: RUF005
            else:
                offset = tl.load(code + ((n * OH + oh) * OW + ow) * C + c, mask=holds, other=255).to(tl.int32)
                holds &= offset == dh * GEOMETRY[5] + dw
            chosen = chosen + (holds,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no unpacking
    for s in range(tangents):
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for back_h in tl.static_range(BACK_H):
            for back_w in tl.static_range(BACK_W):
                window = n * d_n + (h // GEOMETRY[6] - back_h) * d_h + (w // GEOMETRY[7] - back_w) * d_w + c * d_c
                v = tl.load(d + s * d_t + window, mask=chosen[back_h * BACK_W + back_w], other=0.0).to(tl.float32)
                if MEAN:
                    v *= weights[back_h * BACK_W + back_w]
                total += v
        tl.store(out + s * o_t + i, total, mask=i < size)


def max_pool2d(
    x: Tensor, geometry: Geometry, *, relu: bool = False, channels_first: bool = False
) -> tuple[Tensor, Tensor]:
    """y = max over windows (then a ReLU if `relu`), and the byte per element that says which pixel it was.

    Args:
        x: [N, C, H, W], any strides; float32, bfloat16 or float16.
        geometry: the windows, as `Geometry.pool` gives them; at most 255 pixels each.
        channels_first: lay y out as [N, C, OH, OW], for a flatten behind it; else channels last.

    Returns: y [N, C, OH, OW], and the code [N, OH, OW, C], uint8.
    Raises: ValueError for a window of more than 255 pixels or an image of another size than the geometry's.
    """
    pooling = planned(_max, (geometry, relu, channels_first), x)
    out, code = pooling.out.empty(x), pooling.code.empty(x)
    launch(pooling.plan, x, out, code)
    return out, code


def pool2d_jvp(
    t: Tensor, code: Tensor | None, geometry: Geometry, *, count_padding: bool = True, channels_first: bool = False
) -> Tensor:
    """The linear sweep of a pooling: t at the stored offsets, or the mean of each window where `code` is None.

    Args:
        t: [T, N, C, H, W], any strides. The forward pass of mean-pool is this with T = 1.
        code: [N, OH, OW, C] from `max_pool2d`, or None for mean-pool.
        count_padding: mean-pool divides by the window's size with its padding (torch's count_include_pad).
        channels_first: the layout of the result, as for `max_pool2d`.

    Returns: [T, N, C, OH, OW].
    Raises: ValueError for an image of another size than the geometry's.
    """
    pooling = planned(_gather, (geometry, count_padding, channels_first), t, code)
    out = pooling.out.empty(t)
    launch(pooling.plan, t, t if code is None else code, out)
    return out


def pool2d_vjp(d: Tensor, code: Tensor | None, geometry: Geometry, *, count_padding: bool = True) -> Tensor:
    """The reverse of a pooling (and of the ReLU fused with it): each pixel sums the windows that chose it.

    Args:
        d: [T, N, C, OH, OW], any strides.
        code: [N, OH, OW, C] from `max_pool2d`, or None for mean-pool.
        count_padding: as for `pool2d_jvp`.

    Returns: [T, N, C, H, W], channels last.
    Raises: ValueError for an image of another size than the geometry's.
    """
    pooling = planned(_scatter, (geometry, count_padding), d, code)
    out = pooling.out.empty(d)
    launch(pooling.plan, d, d if code is None else code, out)
    return out


def _max(geometry: Geometry, relu: bool, channels_first: bool, x: Tensor) -> CodedResult:
    _check(x, geometry.size)
    if geometry.taps > DEAD:
        raise ValueError(f"a window of {geometry.kernel} has more than {DEAD} pixels: one byte cannot hold the offset")
    samples, channels = x.shape[:2]
    out = _image((1, samples, channels, *geometry.out), x.dtype, channels_first)[0]
    code = Layout.dense((samples, *geometry.out, channels), torch.uint8)
    config = select("pool", "any", x)
    plan = LaunchPlan(
        max_pool,
        (cdiv(code.numel, config.block_m), 1, 1),
        {
            "size": code.numel, **_strides("x", x), **_strides("o", out),
            "C": channels, "GEOMETRY": geometry.constants, "RELU": relu, "BLOCK": config.block_m,
        },
        config,
        Cost(samples * channels * geometry.inside * x.element_size(), code.numel * (x.element_size() + 1)),
    )  # fmt: skip
    return CodedResult(Layout.of(out), plan, code)


def _gather(geometry: Geometry, count_padding: bool, channels_first: bool, t: Tensor, code: Tensor | None) -> Result:
    _check(t, geometry.size)
    tangents, samples, channels = t.shape[:3]
    out = _image((tangents, samples, channels, *geometry.out), t.dtype, channels_first)
    config, size = select("pool", "any", t), samples * channels * geometry.positions
    loaded = samples * channels * geometry.inside if code is None else size
    plan = LaunchPlan(
        pool_gather,
        (cdiv(size, config.block_m), 1, 1),
        {
            "size": size, "tangents": tangents,
            "t_t": t.stride(0), **_strides("t", t), "o_t": out.stride(0), **_strides("o", out),
            "C": channels, "GEOMETRY": geometry.constants,
            "MEAN": code is None, "COUNT_PADDING": count_padding, "BLOCK": config.block_m,
        },
        config,
        Cost(
            tangents * loaded * t.element_size() + (0 if code is None else size),
            out.numel() * t.element_size(),
            pointers={} if code is None else {"code": size},
        ),
    )  # fmt: skip
    return Result(Layout.of(out), plan)


def _scatter(geometry: Geometry, count_padding: bool, d: Tensor, code: Tensor | None) -> Result:
    _check(d, geometry.out)
    tangents, samples, channels = d.shape[:3]
    out = Layout.channels_last((tangents, samples, channels, *geometry.size), d.dtype)
    config, size = select("pool", "any", d), samples * channels * geometry.pixels
    reach = (cdiv(geometry.kernel[0], geometry.stride[0]), cdiv(geometry.kernel[1], geometry.stride[1]))
    seen = samples * channels * geometry.inside
    plan = LaunchPlan(
        pool_scatter,
        (cdiv(size, config.block_m), 1, 1),
        {
            "size": size, "tangents": tangents, "d_t": d.stride(0), **_strides("d", d), "o_t": size,
            "C": channels, "GEOMETRY": geometry.constants, "REACH": reach,
            "MEAN": code is None, "COUNT_PADDING": count_padding, "BLOCK": config.block_m,
        },
        config,
        Cost(
            (tangents * seen * d.element_size()) if code is None else seen + d.numel() * d.element_size(),
            out.bytes,
            pointers={} if code is None else {"code": seen},
        ),
    )  # fmt: skip
    return Result(out, plan)


def _image(shape: tuple[int, ...], dtype: torch.dtype, channels_first: bool) -> Tensor:
    """An image without data."""
    like = torch.empty((), dtype=dtype, device="meta")
    return like.new_empty(shape) if channels_first else channels_last(like, shape)


def _strides(name: str, image: Tensor) -> dict[str, int]:
    n, c, h, w = image.stride()[-4:]
    return {f"{name}_n": n, f"{name}_h": h, f"{name}_w": w, f"{name}_c": c}


def _check(image: Tensor, size: tuple[int, int]) -> None:
    if tuple(image.shape[-2:]) != size:
        raise ValueError(f"an image of {tuple(image.shape[-2:])} does not meet a geometry for {size}")
