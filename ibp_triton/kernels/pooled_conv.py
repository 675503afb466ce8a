"""A convolution of few inputs and the max-pool behind it (with its ReLU), in one launch: forward and linear sweep.

A window of the pool sees a small patch of the image: the patch is loaded once, and the convolution computed anew at
each of the window's positions, without a matrix unit. Neither the convolution's result nor its tangent is ever stored.
"""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.contract import run
from ibp_triton.kernels.geometry import Geometry, sample_stride
from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv, launch
from ibp_triton.kernels.plans import CodedResult, Layout, planned
from ibp_triton.kernels.replica_axis import taken_apart
from ibp_triton.kernels.tiles import select

MOST = 160  # multiplications for an element of the result, which the kernel's code holds one by one
FEW = 1 << 13  # windows up to which it beats matrix units that read halves


@triton.jit(do_not_specialize=["samples", "tangents", "x_r", "x_t", "code_r"])
def pooled_conv(
    x,
    w,
    bias,
    code,
    out,
    samples,
    tangents,
    x_r,
    x_t,
    code_r,
    o_t,
    o_n,
    o_h,
    o_w,
    o_c,
    x_n: tl.constexpr,
    x_h: tl.constexpr,
    x_w: tl.constexpr,
    x_c: tl.constexpr,
    w_r: tl.constexpr,
    w_j: tl.constexpr,
    w_c: tl.constexpr,
    w_h: tl.constexpr,
    w_w: tl.constexpr,
    bias_r: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    CONV: tl.constexpr,
    POOL: tl.constexpr,
    PATCH: tl.constexpr,
    REPLICATED: tl.constexpr,
    SIGN: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = max over the window of x * w + bias, or x[t] * w where chosen; grid (windows, columns, tangents * R).

    Pointers:
        x: [T, samples, C, H, W] by the strides x_*; any float type.
        w: [J, C, KH, KW] by the strides w_*; of x's type.
        bias: [J]; read when BIAS.
        code: [samples, PH, PW, J] uint8, dense: the offset in the window, row by row, or 255 where RELU clips; read
            when CHOSEN (the linear sweep, shared by the tangents), else written.
        out: [T, samples, J, PH, PW] by the strides o_*.
    If REPLICATED these lie in front of the next replica's, or are its own too: by x_r, w_r, bias_r and code_r * J,
    without gaps in out.

    CONV and POOL are the GEOMETRY of the convolution and of the pool; PATCH (height, width) is what a window sees of
    the image. The first of equal maxima counts and a NaN wins, as in torch. SIGN replaces x by its sign.
    """
    H: tl.constexpr = CONV[0]
    W: tl.constexpr = CONV[1]
    KH: tl.constexpr = CONV[4]
    KW: tl.constexpr = CONV[5]
    STEP_H: tl.constexpr = CONV[6]
    STEP_W: tl.constexpr = CONV[7]
    APART_H: tl.constexpr = CONV[10]
    APART_W: tl.constexpr = CONV[11]
    PH: tl.constexpr = POOL[2]
    PW: tl.constexpr = POOL[3]
    UP: tl.constexpr = PATCH[0]
    SIDE: tl.constexpr = PATCH[1]
    WINDOW_H: tl.constexpr = POOL[4]
    WINDOW_W: tl.constexpr = POOL[5]
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = row < samples * PH * PW
    col_ok = col < J
    keep = row_ok[:, None] & col_ok[None, :]
    n = row // (PH * PW)
    oh = row // PW % PH
    ow = row % PW
    top = oh * POOL[6] - POOL[8]  # the window's corner, a position of the convolution
    left = ow * POOL[7] - POOL[9]
    h_patch = top * STEP_H - CONV[8]
    w_patch = left * STEP_W - CONV[9]
    tangent = tl.program_id(2)
    if REPLICATED:
        replica = (tangent // tangents).to(tl.int64)
        tangent = tangent % tangents
        x += replica * x_r
        w += replica * w_r
        bias += replica * bias_r
        code += replica * code_r * J
        out += replica * (tangents * samples * (PH * PW * J))
    own = x + tangent * x_t + n * x_n
    patch = ()
    for c in tl.static_range(C):
        for ph in tl.static_range(UP):
            for pw in tl.static_range(SIDE):
                h = h_patch + ph
                v = w_patch + pw
                inside = row_ok & (h >= 0) & (h < H) & (v >= 0) & (v < W)
                pixel = tl.load(own + h * x_h + v * x_w + c * x_c, mask=inside, other=0.0).to(tl.float32)
                if SIGN:
                    pixel = (pixel > 0).to(tl.float32) - (pixel < 0).to(tl.float32)
                patch = patch + (pixel,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no unpacking
    taps = ()
    for c in tl.static_range(C):
        for kh in tl.static_range(KH):
            for kw in tl.static_range(KW):
                at = col * w_j + (c * w_c + kh * w_h + kw * w_w)
                tap = tl.load(w + at, mask=col_ok, other=0.0).to(tl.float32)
                taps = taps + (tap,)  # type: ignore[assignment]  # noqa: RUF005

    place = row[:, None] * J + col[None, :]
    shift = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BIAS:  # as a tile: its load gives each thread neighbouring columns, which share the patch
        shift += tl.load(bias + tl.zeros_like(place) + col[None, :], mask=keep, other=0.0).to(tl.float32)
    if CHOSEN:
        where = tl.load(code + place, mask=keep, other=255).to(tl.int32)
        best = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    else:
        where = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
        none = row_ok  # no position seen yet: a window of -inf still has a first maximum
    for dh in tl.static_range(WINDOW_H):
        for dw in tl.static_range(WINDOW_W):
            y = shift
            for c in tl.static_range(C):
                for kh in tl.static_range(KH):
                    for kw in tl.static_range(KW):
                        pixel = patch[(c * UP + dh * STEP_H + kh * APART_H) * SIDE + dw * STEP_W + kw * APART_W]
                        y += pixel[:, None] * taps[(c * KH + kh) * KW + kw][None, :]
            if CHOSEN:
                best = tl.where(where == dh * WINDOW_W + dw, y, best)
            else:
                real = row_ok & (top + dh >= 0) & (top + dh < POOL[0]) & (left + dw >= 0) & (left + dw < POOL[1])
                wins = real[:, None] & (none[:, None] | (y > best) | (y != y))
                best = tl.where(wins, y, best)
                where = tl.where(wins, dh * WINDOW_W + dw, where)
                none &= ~real
    if RELU:
        where = tl.where(best > 0, where, 255)
        best = tl.where(best <= 0, 0.0, best)
    if not CHOSEN:
        tl.store(code + place, where.to(tl.uint8), mask=keep)
    result = out + tangent * o_t + (n * o_n + oh * o_h + ow * o_w)[:, None] + (col * o_c)[None, :]
    tl.store(result, best, mask=keep)


def worth_it(x: Tensor, conv: Geometry, pool: Geometry) -> bool:
    """Whether one launch is to take a convolution of x [T, N, C, H, W], or [R, …], and the max-pool behind it.

    Predicted on an H100 for the paper's MNIST network, in µs, low end, two launches before and one now, the forward
    pass and the linear sweep: at batch 32 5.3 → 3.3 and 5.1 → 2.9 in float32, 4.0 → 3.6 and 3.8 → 3.3 in bfloat16; at
    1024 98 → 66 and 91 → 56 in float32, but 50 → 74 and 45 → 66 in bfloat16.
    """
    samples = x.shape[-4] * (len(x) if x.dim() == 6 else 1)
    few = x.dtype == torch.float32 or samples * pool.positions <= FEW
    return x.shape[-3] * conv.taps * pool.taps <= MOST and few


def conv_max_pool(
    x: Tensor,
    weight: Tensor,
    conv: Geometry,
    pool: Geometry,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    channels_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = max over windows of x ∗ W + b (then a ReLU if `relu`), and the byte per element that says which position.

    With an axis of replicas in front of all tensors, of stride 0 where they share one, R such layers in one launch.

    Args:
        x: [N, C, H, W], any strides; float32, bfloat16 or float16.
        weight: [O, C, KH, KW], any strides, of x's dtype.
        conv, pool: the sizes, the pool's image being the convolution's result; MOST multiplications an element at most.
        bias: [O].
        channels_first: lay y out as [N, O, PH, PW], for a flatten behind it; else channels last.

    Returns: y [N, O, PH, PW], and the code [N, PH, PW, O], uint8, as `max_pool2d` gives it. Products are exact, also
        where torch's settings allow tf32.
    Raises: ValueError for a shape or dtype other than these.
    """
    bias = run(bias)
    settings = (conv, pool, relu, False, channels_first)
    plan = planned(_plan, settings, x.unsqueeze(-5), weight, bias, None)
    out, code = plan.out.empty(x).squeeze(-5), plan.code.empty(x)
    launch(plan.plan, x, weight, x if bias is None else bias, code, out)
    return out, code


def conv_max_pool_jvp(
    t: Tensor,
    weight: Tensor,
    code: Tensor,
    conv: Geometry,
    pool: Geometry,
    *,
    sign: bool = False,
    channels_first: bool = False,
) -> Tensor:
    """The linear sweep of `conv_max_pool`: ψ(t[s]) ∗ W at the positions of `code`, ψ = sign if `sign`.

    Args: t [T, N, C, H, W], any strides; the others as for `conv_max_pool`, which gave the code.
    Returns: [T, N, O, PH, PW].
    Raises: ValueError for a shape or dtype other than these.
    """
    plan = planned(_plan, (conv, pool, False, sign, channels_first), t, weight, None, code)
    out = plan.out.empty(t)
    launch(plan.plan, t, weight, t, code, out)
    return out


def _plan(
    conv: Geometry, pool: Geometry, relu: bool, sign: bool, channels_first: bool,
    x: Tensor, weight: Tensor, bias: Tensor | None, code: Tensor | None,
) -> CodedResult:  # fmt: skip
    replicas, (x, weight, bias, code) = taken_apart(weight.dim() == 5, x, weight, bias, code)
    x_r, w_r, bias_r, code_r = replicas.strides
    tangents, samples, channels = x.shape[:3]
    outputs = weight.shape[0]
    _check(x, weight, conv, pool, bias)
    shape = (tangents, samples, outputs, *pool.out)
    out = Layout.dense(shape, x.dtype) if channels_first else Layout.channels_last(shape, x.dtype)
    picked = Layout.dense((samples, *pool.out, outputs), torch.uint8)
    if code is not None and (Layout.of(code) != picked or code_r % max(outputs, 1)):
        raise ValueError(f"the code {tuple(code.shape)} {code.dtype} is not {picked.shape} uint8, dense")
    patch = tuple(
        (window - 1) * s + (k - 1) * d + 1
        for window, s, k, d in zip(pool.kernel, conv.stride, conv.kernel, conv.dilation, strict=True)
    )
    config = select("pooled conv", "any", x)
    rows, size = samples * pool.positions, x.element_size()
    tiles = (cdiv(rows, config.block_m), cdiv(outputs, config.block_n))
    stride, padding = ([a * b for a, b in zip(conv.stride, pair, strict=True)] for pair in (pool.stride, pool.padding))
    corner = tuple(a + b for a, b in zip(padding, conv.padding, strict=True))
    seen = Geometry(conv.size, pool.out, patch, (stride[0], stride[1]), corner)  # type: ignore[arg-type]
    pointers = {
        "x": size * tiles[1] * tangents * samples * seen.inside * channels,
        "w": size * tiles[0] * tangents * weight.numel(),
        "bias": 0 if bias is None else size * rows * outputs,
    }
    if code is not None:
        pointers["code"] = tangents * picked.bytes
    constants = {
        "samples": samples,
        "tangents": tangents,
        "x_r": x_r,
        "x_t": x.stride(0),
        "code_r": rows if code is None else code_r // max(outputs, 1),
        **dict(zip(("o_t", "o_n", "o_c", "o_h", "o_w"), out.strides, strict=True)),
        "x_n": sample_stride(x, 1),
        **dict(zip(("x_c", "x_h", "x_w"), x.stride()[2:], strict=True)),
        "w_r": w_r,
        **dict(zip(("w_j", "w_c", "w_h", "w_w"), weight.stride(), strict=True)),
        "bias_r": bias_r,
        "C": channels,
        "J": outputs,
        "CONV": conv.constants,
        "POOL": pool.constants,
        "PATCH": patch,
        "REPLICATED": replicas.several,
        "SIGN": sign,
        "BIAS": bias is not None,
        "RELU": relu,
        "CHOSEN": code is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    cost = Cost(
        loaded=sum(pointers.values()),
        stored=out.bytes + (picked.bytes if code is None else 0),
        pointers=pointers,
    )
    grid = (*tiles, tangents * replicas.count)
    plan = LaunchPlan(pooled_conv, grid, constants, config, cost.times(replicas.count), replicas.count)
    return CodedResult(replicas.layout(out), plan, replicas.layout(picked))


def _check(x: Tensor, weight: Tensor, conv: Geometry, pool: Geometry, bias: Tensor | None) -> None:
    got, expected = tuple(x.shape[2:]), (weight.shape[1], *conv.size)
    if got != expected or pool.size != conv.out or tuple(weight.shape[2:]) != conv.kernel:
        raise ValueError(f"channels and image {got} do not meet {expected}, the weight's and the geometries'")
    if weight.shape[1] * conv.taps * pool.taps > MOST:
        raise ValueError(f"windows {pool.kernel} of a {tuple(weight.shape)} convolution are too much for one launch")
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtypes {x.dtype} and {weight.dtype}: both must be the same of float32, bfloat16, float16")
    if bias is not None and bias.numel() != weight.shape[0]:
        raise ValueError(f"the bias {tuple(bias.shape)} does not have {weight.shape[0]} elements")
