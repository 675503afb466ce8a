"""The contraction behind linear and convolution layers: out[t, r, j] = epilogue(sum_k patch(x[t])[r, k] w[k, j]).

One kernel serves the forward pass, the reverse pass and the linear sweep of both kinds of layer. A linear layer has
one position and one tap; a convolution is the implicit matrix product over its taps, with `TRANSPOSED` for the
reverse. The T tangents of a sweep are T accumulators of one program, so that a tile of weights and a tile of the
ReLU mask are read once for all of them.
"""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.combine import NOTHING, Ending, combination
from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv, launch
from ibp_triton.kernels.plans import Layout
from ibp_triton.kernels.replica_axis import Replicas
from ibp_triton.kernels.smooth import activated
from ibp_triton.kernels.tiles import precision, select, splits

TALL = 1 << 15  # rows that are 128 tiles of 256
LARGE = 1 << 28  # products that are 512 steps of tiles of 128×128×32


# What a batch's size changes is no constant, so that an epoch's last batch finds the kernels of the others.
@triton.jit(do_not_specialize=["samples", "tangents", "steps", "splits", "x_r", "x_t", "mask_r"])
def contract(
    x,
    w,
    bias,
    mask,
    out,
    slope,
    samples,
    tangents,
    steps,
    splits,
    x_r,
    x_t,
    mask_r,
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
    UNIT: tl.constexpr,
    GEOMETRY: tl.constexpr,
    REPLICATED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SIGN: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MASK: tl.constexpr,
    FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Contract channels and taps of x with w; grid (row tiles, column tiles, splits * tangent groups * replicas).

    Pointers:
        x: [T, samples, C, H, W] by the strides x_t * UNIT, x_n, x_c, x_h, x_w; any float type.
        w: [J, C, KH, KW] by the strides w_j, w_c, w_h, w_w; of x's type.
        bias: [J]; read when BIAS.
        mask: [rows, J], contiguous, shared by the tangents; the result is kept where mask > 0, or if FACTOR multiplied
            by it; read when MASK.
        out: [T, rows, J], contiguous, rows = samples * OH * OW; if SPLIT a float32 [splits, T, rows, J]
            workspace of partial sums, and BIAS, RELU, ACTIVATION and MASK are left to `combine`.
        slope: like out; the activation's derivatives, written where there is an ACTIVATION.

    If REPLICATED all of these lie in front of those of the next replica, or are its own too: by x_r * UNIT, w_r, bias_r
    and mask_r * J, without gaps in out.

    All strides but those of tangents and replicas are constants, and those have a constant factor: so the compiler
    knows their alignment at any number of channels and samples.
    `steps` is the length of the loop over the depth, for one split; not a constant, or compilers unroll it and spill.
    GEOMETRY is (H, W, OH, OW, KH, KW, stride h, w, padding h, w, dilation h, w): H, W the extent of x, OH, OW that of
    out. SIGN replaces x by its sign on the fly (the norm-1 seed).
    COLUMN: BLOCK_N is 1, and a program adds up its products itself: a matrix unit would compute 15 columns of nothing.
    """
    H: tl.constexpr = GEOMETRY[0]
    W: tl.constexpr = GEOMETRY[1]
    OH: tl.constexpr = GEOMETRY[2]
    OW: tl.constexpr = GEOMETRY[3]
    KH: tl.constexpr = GEOMETRY[4]
    KW: tl.constexpr = GEOMETRY[5]
    TAPPED: tl.constexpr = H * W * OH * OW * KH * KW > 1
    K: tl.constexpr = C * KH * KW
    # the weight's depth lies as `k` counts it: one run of K, also where C alone is shorter than a 128-bit load
    FLAT: tl.constexpr = w_j > 1 and (w_c == 1 or C == 1) and (w_w == C or KW == 1) and (w_h == C * KW or KH == 1)

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    program = tl.program_id(2)
    rows = samples * OH * OW
    if REPLICATED:
        programs = splits * tl.cdiv(tangents, GROUP)
        replica = (program // programs).to(tl.int64)
        program = program % programs
        x += replica * x_r * UNIT
        w += replica * w_r
        out += replica * (splits * tangents * rows * J)  # without SPLIT there is one
        if BIAS:
            bias += replica * bias_r
        if MASK:
            mask += replica * mask_r * J
        if ACTIVATION:
            slope += replica * (tangents * rows * J)
    split = program % splits
    first = program // splits * GROUP  # tangent of the first accumulator
    row_ok = row < rows
    col_ok = col < J
    if TAPPED:
        sample = row // (OH * OW)
        h_row = row // OW % OH
        w_row = row % OW
        if TRANSPOSED:
            h_row += GEOMETRY[8]
            w_row += GEOMETRY[9]
        else:
            h_row = h_row * GEOMETRY[6] - GEOMETRY[8]
            w_row = w_row * GEOMETRY[7] - GEOMETRY[9]
    else:
        sample = row

    sums = ()
    for _ in tl.static_range(GROUP):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_K if COLUMN else BLOCK_N), dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no unpacking
    for step in range(steps):
        k = (split * steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        ok = row_ok[:, None] & (k < K)[None, :]
        if TAPPED:
            c = k % C
            kw = k // C % KW
            kh = k // (C * KW)
            if TRANSPOSED:
                h = h_row[:, None] - (kh * GEOMETRY[10])[None, :]
                v = w_row[:, None] - (kw * GEOMETRY[11])[None, :]
                ok &= (h >= 0) & (v >= 0)
                if GEOMETRY[6] > 1:
                    ok &= h % GEOMETRY[6] == 0
                    h = h // GEOMETRY[6]
                if GEOMETRY[7] > 1:
                    ok &= v % GEOMETRY[7] == 0
                    v = v // GEOMETRY[7]
                ok &= (h < H) & (v < W)
            else:
                h = h_row[:, None] + (kh * GEOMETRY[10])[None, :]
                v = w_row[:, None] + (kw * GEOMETRY[11])[None, :]
                ok &= (h >= 0) & (h < H) & (v >= 0) & (v < W)
            x_at = sample[:, None] * x_n + h * x_h + v * x_w + (c * x_c)[None, :]
            w_at = c * w_c + kh * w_h + kw * w_w
        else:
            x_at = sample[:, None] * x_n + (k * x_c)[None, :]
            w_at = k * w_c
        if FLAT:
            w_at = k
        if COLUMN:
            taps = tl.load(w + w_at + tl.program_id(1) * w_j, mask=k < K, other=0.0)[None, :]
        else:
            across = (col * w_j)[None, :]
            w_tile = tl.load(w + w_at[:, None] + across, mask=(k < K)[:, None] & col_ok[None, :], other=0.0)
        grown = ()
        for t in tl.static_range(GROUP):
            x_tile = tl.load(x + (first + t) * x_t * UNIT + x_at, mask=ok & (first + t < tangents), other=0.0)
            if SIGN:
                x_tile = ((x_tile > 0).to(tl.float32) - (x_tile < 0).to(tl.float32)).to(w.dtype.element_ty)
            if COLUMN:
                part = sums[t] + x_tile.to(tl.float32) * taps.to(tl.float32)
            else:
                part = tl.dot(x_tile, w_tile, sums[t], input_precision=PRECISION)
            grown = grown + (part,)  # type: ignore[assignment]  # noqa: RUF005
        sums = grown
    if COLUMN:
        added = ()
        for t in tl.static_range(GROUP):
            added = added + (tl.sum(sums[t], 1)[:, None],)  # type: ignore[assignment]  # noqa: RUF005
        sums = added

    at = row[:, None] * J + col[None, :]
    keep = row_ok[:, None] & col_ok[None, :]
    if SPLIT:
        for t in tl.static_range(GROUP):
            place = (split * tangents + first + t) * rows * J + at
            tl.store(out + place, sums[t], mask=keep & (first + t < tangents))
    else:
        if BIAS:
            shift = tl.load(bias + col, mask=col_ok, other=0.0).to(tl.float32)
        if FACTOR:
            factor = tl.load(mask + at, mask=keep, other=0.0).to(tl.float32)
        elif MASK:
            alive = tl.load(mask + at, mask=keep, other=0.0) > 0
        for t in tl.static_range(GROUP):
            y = sums[t]  # type: ignore[var-annotated]
            if BIAS:
                y += shift[None, :]
            if RELU:
                y = tl.where(y <= 0, 0.0, y)  # a NaN stays a NaN
            if ACTIVATION:
                y, steep = activated(y, ACTIVATION)
                tl.store(slope + (first + t) * rows * J + at, steep, mask=keep & (first + t < tangents))
            if FACTOR:
                y *= factor
            elif MASK:
                y = tl.where(alive, y, 0.0)
            tl.store(out + (first + t) * rows * J + at, y, mask=keep & (first + t < tangents))


def run(bias: Tensor | None) -> Tensor | None:
    """A bias whose elements lie one behind the other."""
    return bias if bias is None or bias.stride(-1) == 1 else bias.contiguous()


@dataclass(frozen=True)
class Contraction:
    """A contraction planned for operands of one layout: a launch, and where it is split a second one for the sum.

    Tensors and layouts have the replicas in front, if there is such an axis.
    """

    out: Layout
    first: LaunchPlan
    parts: Layout | None = None  # of the workspace
    second: LaunchPlan | None = None

    def __call__(
        self, x: Tensor, w: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, slope: Tensor | None = None
    ) -> Tensor:
        """Contract tensors of the layouts that it was planned for; `slope` is written where there is an activation."""
        out = self.out.empty(x)
        slope = out if slope is None else slope
        if self.parts is None or self.second is None:
            launch(self.first, x, w, x if bias is None else bias, x if mask is None else mask, out, slope)
            return out
        parts = self.parts.empty(x)
        launch(self.first, x, w, x, x, parts, parts)
        launch(self.second, parts, out if bias is None else bias, out if mask is None else mask, out, slope, out, 1.0)
        return out


def contraction(
    x: Tensor,
    out: Layout,
    geometry: tuple[int, ...],
    *,
    x_strides: tuple[int, ...],
    w_strides: tuple[int, ...],
    channels: int,
    columns: int,
    inside: int,
    replicas: Replicas,
    transposed: bool = False,
    sign: bool = False,
    ending: Ending = NOTHING,
) -> Contraction:
    """Choose tiles and splits of `contract` and, where it is split, of `combine`.

    Shapes and strides are those of one replica.

    Args:
        x: [T, samples, ...] with `channels` channels; `x_strides` are those of (t, n, h, w, c).
        out: [T, samples, ...] of columns · OH · OW elements a sample, the columns contiguous.
        w_strides: those of the weight's (column, channel, tap row, tap column).
        geometry: GEOMETRY of the kernel.
        inside: pairs of a position of `out` and a tap that meet a pixel of `x` (for the cost).
        replicas: with the strides of x, weight, bias and mask.
        ending: its bias [columns] without gaps, its mask dense [samples, ...] like one tangent of `out`.

    Raises ValueError for a bias or a mask of another size.
    """
    tangents, samples = x.shape[:2]
    positions, taps = geometry[2] * geometry[3], geometry[4] * geometry[5]
    rows, depth = samples * positions, channels * taps
    bias, mask = ending.bias, ending.mask
    for name, tensor, expected in (("bias", bias, columns), ("mask", mask, rows * columns)):
        if tensor is not None and tensor.numel() != expected:
            raise ValueError(f"the {name} {tuple(tensor.shape)} does not have {expected} elements, as the result asks")
    x_r, w_r, bias_r, mask_r = replicas.strides
    if mask_r % max(columns, 1):
        raise ValueError(f"the masks of replicas lie {mask_r} elements apart, not rows of {columns}")
    one = columns == 1
    shape = _shape_class(tangents, rows, columns, depth, w_strides[0] == 1)
    config = select("contract", shape, x, (tangents, rows, columns, depth))
    group = min(tangents, config.group)
    tiles = (cdiv(rows, config.block_m), cdiv(columns, config.block_n), cdiv(tangents, max(group, 1)))
    steps = cdiv(depth, config.block_k)
    parts = splits(x, replicas.count * math.prod(tiles), steps)
    parts = cdiv(steps, cdiv(steps, parts))  # no part is empty
    target = out if parts == 1 else Layout.dense((parts, tangents, rows * columns), torch.float32)
    size, biased, masked = x.element_size(), bias is not None and parts == 1, mask is not None and parts == 1
    x_t = x_strides[0] if tangents > 1 else 0
    unit = math.gcd(x_r, x_t, x_strides[1], 16) if x_r or x_t else 16  # 16 is what Triton looks for
    pointers = {
        "x": size * tangents * tiles[1] * samples * inside * channels,
        "w": size * tiles[0] * tiles[2] * depth * columns,
        "bias": size * tiles[2] * tiles[0] * columns if biased else 0,
        "mask": size * tiles[2] * rows * columns if masked else 0,
    }
    cost = Cost(
        loaded=sum(pointers.values()),
        stored=target.bytes * (2 if ending.activation and parts == 1 else 1),
        flops=0 if one else 2 * tangents * samples * inside * channels * columns,  # of matrix products
        padded_flops=0
        if one
        else 2
        * math.prod(tiles)
        * group
        * config.block_m
        * config.block_n
        * config.block_k
        * parts
        * cdiv(steps, parts),
        pointers=pointers,
    )
    constants = {
        "samples": samples,
        "tangents": tangents,
        "steps": cdiv(steps, parts),
        "splits": parts,
        "x_r": x_r // unit,
        "x_t": x_t // unit,
        "mask_r": mask_r // max(columns, 1),
        **dict(zip(("x_n", "x_h", "x_w", "x_c"), x_strides[1:], strict=True)),
        "w_r": w_r,
        **dict(zip(("w_j", "w_c", "w_h", "w_w"), w_strides, strict=True)),
        "bias_r": bias_r,
        "C": channels,
        "J": columns,
        "UNIT": unit,
        "GEOMETRY": geometry,
        "REPLICATED": replicas.several,
        "TRANSPOSED": transposed,
        "SIGN": sign,
        "BIAS": biased,
        "RELU": ending.relu and parts == 1,
        "ACTIVATION": ending.activation if parts == 1 else 0,
        "MASK": masked,
        "FACTOR": ending.factor and masked,
        "GROUP": group,
        "SPLIT": parts > 1,
        "COLUMN": one,
        "PRECISION": precision(x),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    grid = (tiles[0], tiles[1], tiles[2] * parts * replicas.count)
    first = LaunchPlan(contract, grid, constants, config, cost.times(replicas.count), replicas.count)
    whole = replicas.layout(out)
    if parts == 1:
        return Contraction(whole, first)
    own = replicas.only(bias_r, mask_r)
    second = combination(x, target, out, replicas=own, tangents=tangents, ending=ending)
    return Contraction(whole, first, replicas.layout(target), second)


def _shape_class(tangents: int, rows: int, columns: int, depth: int, by_columns: bool) -> str:
    """The table's name for a shape, after a comma that of its size where larger tiles leave the chip full.

    `by_columns`: the weight's columns are contiguous, as in a reverse pass.
    """
    if columns == 1:
        return "one column" if tangents == 1 else "one column, tangents"
    if tangents > 1:
        return "tangents"
    if rows <= 64:
        return "few rows"
    if depth <= 32 and not (by_columns and columns <= 32):
        return "shallow"
    kind = "narrow" if columns <= 32 else "by columns" if by_columns else "any"
    if columns <= 64:
        return f"{kind}, tall" if rows >= TALL else kind
    return f"{kind}, large" if rows * columns * depth >= LARGE else kind
