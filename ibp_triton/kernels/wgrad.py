"""Weight gradients of linear and convolution layers: G = scale · Σ_i coefficient_i · g(left_i, right_i), one launch.

A segment is one product of left activations or tangents with right derivatives. Segments follow one another in the
loop over rows, each in its own float32 accumulator that joins the total with its coefficient: no operand is rounded,
whatever its dtype. In float32 (not tf32) a left side may be a + βt, formed on the way in, which saves a read of d.
"""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.combine import PartSums, combination
from ibp_triton.kernels.gates import number, scalar, there
from ibp_triton.kernels.geometry import Geometry, sample_stride
from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv, launch
from ibp_triton.kernels.plans import Layout, planned
from ibp_triton.kernels.replica_axis import in_place, side_by_side, taken_apart
from ibp_triton.kernels.tiles import precision, select, splits

MAX_SEGMENTS = 4


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3", "splits"])  # as in `contract`
def wgrad(
    x0,
    x1,
    x2,
    x3,
    y0,
    y1,
    y2,
    y3,
    d0,
    d1,
    d2,
    d3,
    out,
    bias,
    c0,
    c1,
    c2,
    c3,
    beta,
    scale,
    n0,
    n1,
    n2,
    n3,
    splits,
    x_n: tl.constexpr,
    x_h: tl.constexpr,
    x_w: tl.constexpr,
    x_c: tl.constexpr,
    w_j: tl.constexpr,
    w_c: tl.constexpr,
    w_h: tl.constexpr,
    w_w: tl.constexpr,
    size,
    C: tl.constexpr,
    J: tl.constexpr,
    GEOMETRY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    AXPY: tl.constexpr,
    SIGN: tl.constexpr,
    BIAS: tl.constexpr,
    READ: tl.constexpr,
    REPLICATED: tl.constexpr,
    OWN: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """G[j, k] = scale * sum_i c_i sum_r d_i[r, j] patch(x_i)[r, k]; grid (tiles of j, of k, splits * replicas).

    Pointers, for the segments i < SEGMENTS (rows r = n_i samples times OH * OW positions):
        x_i: [n_i, C, H, W] by the strides x_n, x_c, x_h, x_w; any float type.
        y_i: like x_i; where bit i of AXPY is set, x_i + beta * y_i is read instead of x_i.
        d_i: [n_i, J, OH, OW], dense with the channels last.
        out: [J, C, KH, KW] by the strides w_j, w_c, w_h, w_w; if SPLIT a float32 [splits, size + J] workspace
            of unscaled parts, each laid out like the result.
        bias: [J], scale * sum_i c_i sum_r d_i over the segments in the bits of BIAS; written when BIAS.

    Bit i of READ: c_i, and with bit 4 beta, is a pointer to the float32 number.
    Bit i of SIGN: x_i (where bit i of AXPY is set, y_i instead) is read as its sign.
    If REPLICATED each replica has its own out and bias, one behind the other, and so those x_i, y_i, d_i and c_i, with
    bit 4 beta, whose bits are set in the four numbers of OWN; the others are shared.
    """
    H: tl.constexpr = GEOMETRY[0]
    W: tl.constexpr = GEOMETRY[1]
    OH: tl.constexpr = GEOMETRY[2]
    OW: tl.constexpr = GEOMETRY[3]
    KH: tl.constexpr = GEOMETRY[4]
    KW: tl.constexpr = GEOMETRY[5]
    TAPPED: tl.constexpr = H * W * OH * OW * KH * KW > 1
    K: tl.constexpr = C * KH * KW
    xs = (x0, x1, x2, x3)
    ys = (y0, y1, y2, y3)
    ds = (d0, d1, d2, d3)
    ns = (n0, n1, n2, n3)
    split = tl.program_id(2)
    replica = 0
    if REPLICATED:
        replica = (split // splits).to(tl.int64)
        split = split % splits
        bias += replica * J
        if SPLIT:
            out += replica * splits * (size + (J if BIAS > 0 else 0))
        else:
            out += replica * size
    cs = (
        number(c0, replica * (OWN[3] % 2), READ % 2),
        number(c1, replica * (OWN[3] // 2 % 2), READ // 2 % 2),
        number(c2, replica * (OWN[3] // 4 % 2), READ // 4 % 2),
        number(c3, replica * (OWN[3] // 8 % 2), READ // 8 % 2),
    )
    pushed = number(beta, replica * (OWN[3] // 16 % 2), READ // 16 % 2)

    j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j_ok = j < J
    k_ok = k < K
    c = k % C
    kw = k // C % KW
    kh = k // (C * KW)
    if TAPPED:
        h_tap = kh * GEOMETRY[10] - GEOMETRY[8]
        w_tap = kw * GEOMETRY[11] - GEOMETRY[9]

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    shift = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for i in tl.static_range(SEGMENTS):
        part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        rows = ns[i] * OH * OW
        steps = tl.cdiv(rows, BLOCK_K * splits)
        x = xs[i] + replica * (ns[i] * x_n) * ((OWN[0] >> i) % 2)
        y = ys[i] + replica * (ns[i] * x_n) * ((OWN[1] >> i) % 2)
        d = ds[i] + replica * (rows * J) * ((OWN[2] >> i) % 2)
        for step in range(steps):
            r = (split * steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
            r_ok = r < rows
            ok = r_ok[:, None] & k_ok[None, :]
            if TAPPED:
                h = (r // OW % OH * GEOMETRY[6])[:, None] + h_tap[None, :]
                v = (r % OW * GEOMETRY[7])[:, None] + w_tap[None, :]
                ok &= (h >= 0) & (h < H) & (v >= 0) & (v < W)
                at = (r // (OH * OW))[:, None] * x_n + h * x_h + v * x_w + (c * x_c)[None, :]
            else:
                at = r[:, None] * x_n + (k * x_c)[None, :]
            left = tl.load(x + at, mask=ok, other=0.0)
            # as [j, r]: tl.trans of a tile [r, j] is transposed while it is copied, in tf32 by 32-bit copies
            right = tl.load(d + j[:, None] + (r * J)[None, :], mask=j_ok[:, None] & r_ok[None, :], other=0.0)
            if (AXPY >> i) % 2 == 1:
                push = tl.load(y + at, mask=ok, other=0.0)
                if (SIGN >> i) % 2 == 1:
                    push = (push > 0).to(tl.float32) - (push < 0).to(tl.float32)
                left = left + pushed * push
            elif (SIGN >> i) % 2 == 1:
                left = ((left > 0).to(tl.float32) - (left < 0).to(tl.float32)).to(right.dtype)
            part = tl.dot(right, left, part, input_precision=PRECISION)
            if (BIAS >> i) % 2 == 1:
                shift += cs[i] * tl.sum(right.to(tl.float32), 1)
        total += cs[i] * part

    at = (j * w_j)[:, None] + (c * w_c + kh * w_h + kw * w_w)[None, :]
    ok = j_ok[:, None] & k_ok[None, :]
    own = j_ok & (tl.program_id(1) == 0)
    if SPLIT:
        place = out + split * (size + (J if BIAS > 0 else 0))
        tl.store(place + at, total, mask=ok)
        if BIAS > 0:
            tl.store(place + size + j, shift, mask=own)
    else:
        tl.store(out + at, total * scale, mask=ok)
        if BIAS > 0:
            tl.store(bias + j, shift * scale, mask=own)


@dataclass(frozen=True)
class Segment:
    """coefficient · g(ψ(left), right), or coefficient · g(left + β ψ(push), right) where there is a push.

    coefficient: a number, or a 0-d tensor of one on the device ([R] where there is an axis of replicas).
    left: [n, C, H, W], or [n, I] of a linear layer. right: [n, J, OH, OW] channels last, or [n, J]; of left's dtype.
    push: like left. sign: ψ is the sign (of `push` if there is one), else the identity. bias: right counts in the
    bias gradient.
    """

    coefficient: float | Tensor
    left: Tensor
    right: Tensor
    bias: bool = False
    push: Tensor | None = None
    sign: bool = False


def weight_gradient(
    segments: Sequence[Segment],
    weight: Tensor,
    geometry: Geometry,
    *,
    beta: float | Tensor = 1.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    later: PartSums | None = None,
) -> tuple[Tensor, Tensor | None]:
    """G = scale · Σ_i coefficient_i · g(left_i, right_i), and the bias gradient of the segments that ask for it.

    With an axis of replicas in front of all tensors, of stride 0 where they share one, R such gradients in one launch.

    Args:
        segments: one to four; the left sides have the same strides, the right sides are dense, channels last.
        weight: the weight whose gradient it is; shape, dtype and order of axes of the result, which has no gaps.
        geometry: of the convolution's forward pass; `geometry.ONE` for a linear layer.
        beta: the factor of every `push`; a number, or a 0-d tensor of one on the device.
        scale: 1 / N of the objective's mean.
        dtype: of the result, the weight's by default; float32 keeps a small penalty that bfloat16 would round away.
        later: where parts may be left to be summed; the results then hold nothing until it has made its sums.

    Returns: the gradient, and the bias gradient [J] or None when no segment has `bias`.
    Raises: ValueError for segments that do not fit each other, and for a push where operands are rounded (tf32,
        bfloat16, float16), which would round the penalty away.
    """
    if not 1 <= len(segments) <= MAX_SEGMENTS:
        raise ValueError(f"{len(segments)} segments: one launch takes 1 to {MAX_SEGMENTS}")
    if weight.dim() % 2:  # [R, O, I] or [R, O, C, KH, KW]
        segments, beta = [_side_by_side(s) for s in segments], in_place(beta)
    flags = tuple((s.bias, s.sign) for s in segments)
    numbers = [scalar(s.coefficient) for s in segments]
    pushed = scalar(beta)
    sides = [side for s, c in zip(segments, numbers, strict=True) for side in (s.left, s.right, s.push, there(c))]
    plan = planned(_plan, (geometry, dtype, flags), weight, there(pushed), *sides)
    unused = MAX_SEGMENTS - len(segments)  # pointers that are never read
    padded, numbers = [*segments, *[segments[0]] * unused], [*numbers, *[numbers[0]] * unused]
    gradient = plan.gradient.empty(weight)
    bias = None if plan.bias is None else plan.bias.empty(weight)
    target = gradient if plan.parts is None else plan.parts.empty(weight)
    launch(
        plan.first,
        *[s.left for s in padded],
        *[s.left if s.push is None else s.push for s in padded],
        *[s.right for s in padded],
        target,
        gradient if bias is None else bias,
        *numbers,
        pushed,
        float(scale),
    )
    if later is not None and plan.waits:
        later.add(target, gradient, bias, float(scale))
    elif plan.second is not None:
        launch(plan.second, target, *[gradient] * 4, gradient if bias is None else bias, float(scale))
    return gradient, bias


@dataclass(frozen=True)
class _Gradient:
    gradient: Layout
    bias: Layout | None
    first: LaunchPlan
    parts: Layout | None = None  # of the workspace
    second: LaunchPlan | None = None
    waits: bool = False  # whether the second may be made together with others


def _plan(
    geometry: Geometry,
    dtype: torch.dtype | None,
    flags: tuple[tuple[bool, bool], ...],
    *tensors: Any,
) -> _Gradient:
    """`flags`: bias and sign of each segment; `tensors`: weight, beta, each one's left, right, push and coefficient."""
    replicas, (weight, beta, *sides) = taken_apart(tensors[0].dim() % 2 == 1, *tensors)
    lefts, rights, pushes, numbers = (sides[i::4] for i in range(4))
    _check(lefts, rights, pushes, weight)
    first = lefts[0]
    outputs, channels = weight.shape[:2]
    tapped = first.dim() == 4
    _, sc, sh, sw = first.stride() if tapped else (*first.stride(), 0, 0)
    sn = sample_stride(max(lefts, key=len), 0)  # the strides of one sample alone say nothing
    depth = channels * geometry.taps
    samples = [len(left) for left in lefts]
    rows = [n * geometry.positions for n in samples]
    shape = "any" if min(outputs, depth) > 32 else "narrow, short" if depth <= 16 else "narrow"
    config = select("wgrad", shape, first, (outputs, depth, *rows))
    tiles = (cdiv(outputs, config.block_m), cdiv(depth, config.block_n))
    blocks = [cdiv(r, config.block_k) for r in rows]
    parts = splits(first, replicas.count * tiles[0] * tiles[1], sum(blocks))
    parts = max(1, min(parts, max(blocks)))
    biased, signs = zip(*flags, strict=True)
    gradient = Layout.of(torch.empty_like(weight, dtype=dtype or weight.dtype, device="meta"))
    bias = Layout.dense((outputs,), gradient.dtype) if any(biased) else None
    _, beta_r, *steps = replicas.strides
    for step, n in zip((*steps[0::4], *steps[2::4]), samples * 2, strict=True):
        if step not in (0, n * sn):
            raise ValueError("the left sides of replicas must be dense, one behind the other")
    unused = [None] * (MAX_SEGMENTS - len(samples))
    own = (*(_bits(steps[i::4]) for i in (0, 2, 1)), _bits([*steps[3::4], *unused, beta_r]))
    read = [n is not None for n in (*numbers, *unused, beta)]
    width = weight.numel() + (0 if bias is None else outputs)
    target = gradient if parts == 1 else Layout.dense((parts, 1, width), torch.float32)
    constants = {
        **{f"n{i}": samples[i if i < len(samples) else 0] for i in range(MAX_SEGMENTS)},
        "splits": parts,
        **dict(zip(("x_n", "x_h", "x_w", "x_c"), (sn, sh, sw, 1 if channels == 1 else sc), strict=True)),
        **dict(zip(("w_j", "w_c", "w_h", "w_w"), (*gradient.strides, 0, 0)[:4], strict=True)),
        "size": weight.numel(),
        "C": channels,
        "J": outputs,
        "GEOMETRY": geometry.constants,
        "SEGMENTS": len(samples),
        "AXPY": _bits([push is not None for push in pushes]),
        "SIGN": _bits(signs),
        "BIAS": _bits(biased),
        "READ": _bits(read),
        "REPLICATED": replicas.several,
        "OWN": own,
        "SPLIT": parts > 1,
        "PRECISION": precision(first),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    patches = [n * geometry.inside * channels for n in samples]
    read_left = sum(p * (1 if push is None else 2) for p, push in zip(patches, pushes, strict=True))
    read_right = sum(right.numel() for right in rights)
    padded_rows = sum(cdiv(r, config.block_k * parts) * parts * config.block_k for r in rows)
    cost = Cost(
        loaded=first.element_size() * (tiles[0] * read_left + tiles[1] * read_right)
        + 4 * sum(read) * math.prod(tiles) * parts,
        stored=target.bytes + (0 if bias is None or parts > 1 else bias.bytes),
        flops=2 * sum(patches) * outputs,
        padded_flops=2 * math.prod(tiles) * config.block_m * config.block_n * padded_rows,
    )
    grid = (*tiles, parts * replicas.count)
    launched = LaunchPlan(wgrad, grid, constants, config, cost.times(replicas.count), replicas.count)
    whole = _Gradient(replicas.layout(gradient), None if bias is None else replicas.layout(bias), launched)
    if parts == 1:
        return whole
    second = combination(first, target, gradient, replicas=replicas.only(0, 0), extra=bias)
    waits = not replicas.several and PartSums.takes(target, gradient)
    return replace(whole, parts=replicas.layout(target), second=second, waits=waits)


def _bits(flags: Sequence[Any]) -> int:
    return sum(bool(flag) << i for i, flag in enumerate(flags))


def _side_by_side(s: Segment) -> Segment:
    """Replicas' sides one behind the other, as the kernel finds them."""
    push = None if s.push is None else side_by_side(s.push)
    left, right = side_by_side(s.left), side_by_side(s.right)
    return replace(s, coefficient=in_place(s.coefficient), left=left, right=right, push=push)


def _same_strides(x: Tensor, y: Tensor) -> bool:
    """Equal strides where they matter: samples may differ in number, and an axis of length 1 has no stride."""
    return (
        x.shape[1:] == y.shape[1:]
        and (min(len(x), len(y)) <= 1 or x.stride(0) == y.stride(0))
        and all(a == b for a, b, n in zip(x.stride()[1:], y.stride()[1:], x.shape[1:], strict=True) if n > 1)
    )


def _check(lefts: Sequence[Tensor], rights: Sequence[Tensor], pushes: Sequence[Tensor | None], weight: Tensor) -> None:
    most, dtype = max(lefts, key=len), lefts[0].dtype
    for x, d, push in zip(lefts, rights, pushes, strict=True):
        left, right = tuple(x.shape), tuple(d.shape)
        if left[0] != right[0] or (right[1], left[1]) != tuple(weight.shape[:2]):
            raise ValueError(f"left {left} and right {right} do not give a weight of {tuple(weight.shape)}")
        if x.dtype != dtype or d.dtype != dtype:
            raise ValueError("all sides of a weight gradient must have one dtype")
        if not _same_strides(x, most) or (push is not None and not _same_strides(push, x)):
            raise ValueError("the left sides of one launch must have the same strides")
        flat = d if d.dim() == 2 else d.permute(0, 2, 3, 1)
        if not flat.is_contiguous():
            raise ValueError(f"the right side must be dense, channels last; its strides are {d.stride()}")
        if push is not None and (dtype != torch.float32 or precision(x) != "ieee"):
            raise ValueError("left + βt would be rounded in the product: give left and t as two segments")
