"""The second half of a convolution's reverse with few input channels: products by tap, summed where they meet.

d[n, p, ·] times the whole weight gives, for each position p, the J · KH · KW numbers that it adds to the image: no
multiplication that is not needed. Each pixel of the image then sums those that fall on it.
"""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.geometry import Geometry
from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv
from ibp_triton.kernels.plans import Layout
from ibp_triton.kernels.replica_axis import Replicas
from ibp_triton.kernels.tiles import select


@triton.jit(do_not_specialize=["size", "shared", "p_r", "mask_r"])
def fold(
    p,
    mask,
    out,
    size,
    shared,
    p_r,
    mask_r,
    J: tl.constexpr,
    q_j: tl.constexpr,
    q_h: tl.constexpr,
    q_w: tl.constexpr,
    GEOMETRY: tl.constexpr,
    REPLICATED: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n, h, w, j] = sum over taps of p[n, (h + P - kh D) / S, (w + P - kw D) / S, (j, kh, kw)]; grid (blocks, R).

    Pointers:
        p: [n, OH, OW, J * KH * KW] float32, the last axis by the strides q_j, q_h, q_w.
        mask: [shared], shared by the tangents; the result is kept where mask > 0; read when MASK.
        out: [size], of n * H * W * J elements, any float type.
    If REPLICATED each replica has all of these, by the steps p_r and mask_r, out without gaps.

    GEOMETRY is that of the forward convolution: (H, W, OH, OW, KH, KW, stride, padding, dilation).
    """
    H: tl.constexpr = GEOMETRY[0]
    W: tl.constexpr = GEOMETRY[1]
    OH: tl.constexpr = GEOMETRY[2]
    OW: tl.constexpr = GEOMETRY[3]
    KH: tl.constexpr = GEOMETRY[4]
    KW: tl.constexpr = GEOMETRY[5]
    Q: tl.constexpr = J * KH * KW
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    if REPLICATED:
        replica = tl.program_id(1).to(tl.int64)
        p += replica * p_r
        mask += replica * mask_r
        out += replica * size
    h_pixel = i // (J * W) % H + GEOMETRY[8]
    w_pixel = i // J % W + GEOMETRY[9]
    start = i // (J * W * H) * (OH * OW * Q) + i % J * q_j
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for kh in tl.static_range(KH):
        h = h_pixel - kh * GEOMETRY[10]
        meets = ok & (h >= 0) & (h % GEOMETRY[6] == 0) & (h // GEOMETRY[6] < OH)
        row = start + h // GEOMETRY[6] * (OW * Q) + kh * q_h
        for kw in tl.static_range(KW):
            w = w_pixel - kw * GEOMETRY[11]
            inside = meets & (w >= 0) & (w % GEOMETRY[7] == 0) & (w // GEOMETRY[7] < OW)
            total += tl.load(p + row + w // GEOMETRY[7] * Q + kw * q_w, mask=inside, other=0.0)
    if MASK:
        total = tl.where(tl.load(mask + i % shared, mask=ok, other=0.0) > 0, total, 0.0)
    tl.store(out + i, total, mask=ok)


def folding(
    like: Tensor,
    out: Layout,
    geometry: Geometry,
    taps: tuple[int, ...],
    replicas: Replicas,
    mask: Tensor | None = None,
) -> LaunchPlan:
    """Sum the products of each position; what changes are p, mask (p where there is none) and out.

    Shapes are those of one replica.

    Args:
        like: of out's dtype, on its device. p is [rows, J · KH · KW] float32, rows = T · N · OH · OW.
        out: [T, N, J, H, W], channels last.
        geometry: of the forward convolution.
        taps: the strides of (j, kh, kw) along p's last axis.
        replicas: with the stride of masks.
        mask: [N, J, H, W], channels last.
    """
    tangents, samples, channels = out.shape[:3]
    config = select("pointwise", "any", like)
    loaded = 4 * tangents * samples * geometry.inside * channels
    masked = 0 if mask is None else out.numel * mask.element_size()
    cost = Cost(loaded=loaded + masked, stored=out.bytes, pointers={"p": loaded, "mask": masked})
    (mask_r,) = replicas.strides
    return LaunchPlan(
        fold,
        (cdiv(out.numel, config.block_m), replicas.count, 1),
        {
            "size": out.numel,
            "shared": out.numel // max(tangents, 1),
            "p_r": tangents * samples * geometry.positions * channels * geometry.taps,
            "mask_r": mask_r,
            "J": channels,
            **dict(zip(("q_j", "q_h", "q_w"), taps, strict=True)),
            "GEOMETRY": geometry.constants,
            "REPLICATED": replicas.several,
            "MASK": mask is not None,
            "BLOCK": config.block_m,
        },
        config,
        cost.times(replicas.count),
        replicas.count,
    )
