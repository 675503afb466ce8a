"""Second stage of a split reduction: the sum of the parts, in a fixed order, and the epilogue that they left out."""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv
from ibp_triton.kernels.plans import Layout
from ibp_triton.kernels.replica_axis import Replicas
from ibp_triton.kernels.tiles import select

ALONE = Replicas(1, False, (0, 0))
MANY = 64  # parts from which a program takes few numbers and many parts at a time


@triton.jit(do_not_specialize=["tangents", "splits", "bias_r", "mask_r"])
def combine(
    partial,
    bias,
    mask,
    out,
    extra,
    scale,
    tangents,
    size,
    extra_size,
    columns,
    splits,
    bias_r,
    mask_r,
    REPLICATED: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    MASK: tl.constexpr,
    EXTRA: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t, i] = epilogue(scale * sum_s partial[s, t, i]); grid (blocks of i, replicas).

    Pointers:
        partial: [splits, tangents, size + extra_size] float32.
        bias: [columns], added to element i as bias[i % columns]; read when BIAS.
        mask: [size], shared by the tangents; the result is kept where mask > 0; read when MASK.
        out: [tangents, size], any float type.
        extra: [extra_size], the elements beyond `size` (a bias gradient); written when EXTRA, tangents = 1.

    If REPLICATED each replica has all of these, without gaps but for the steps bias_r and mask_r.
    The loads of ROUND parts are under way together.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width = size + extra_size
    ok = i < width
    if REPLICATED:
        replica = tl.program_id(1).to(tl.int64)
        partial += replica * (splits * tangents * width)
        bias += replica * bias_r
        mask += replica * mask_r
        out += replica * (tangents * size)
        extra += replica * extra_size
    if BIAS:
        shift = tl.load(bias + i % columns, mask=ok, other=0.0).to(tl.float32)
    if MASK:
        alive = tl.load(mask + i, mask=ok, other=0.0) > 0
    for t in range(tangents):
        y = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, splits, ROUND):
            s = start + tl.arange(0, ROUND)
            at = (s * tangents + t)[:, None] * width + i[None, :]
            y += tl.sum(tl.load(partial + at, mask=(s < splits)[:, None] & ok[None, :], other=0.0), 0)
        y *= scale
        if BIAS:
            y += shift
        if RELU:
            y = tl.where(y <= 0, 0.0, y)
        if MASK:
            y = tl.where(alive, y, 0.0)
        tl.store(out + t * size + i, y, mask=i < size)
        if EXTRA:
            tl.store(extra + i - size, y, mask=ok & (i >= size))


def combination(
    like: Tensor,
    partial: Layout,
    out: Layout,
    *,
    replicas: Replicas = ALONE,
    tangents: int = 1,
    extra: Layout | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    mask: Tensor | None = None,
) -> LaunchPlan:
    """Sum `partial` [S, tangents, size + extra] over S into `out` (size · tangents elements, dense) and `extra`.

    These are one replica's; `replicas` has the strides of bias and mask.

    On the device of `like`. What changes are partial, bias, mask, out, extra and the scale; `out` stands for those that
    are not there.
    """
    size = out.numel // tangents
    extra_size = 0 if extra is None else extra.numel
    shape = "many parts" if partial.shape[0] >= MANY else "any"
    config = select("combine", shape, like.new_empty((1, 1, 0), dtype=partial.dtype))
    optional = [t for t in (bias, mask) if t is not None]
    # the bias is loaded once for each element, not once for each column
    shared = sum((size if t is bias else t.numel()) * t.element_size() for t in optional)
    cost = Cost(loaded=partial.bytes + shared, stored=out.bytes + (0 if extra is None else extra.bytes))
    bias_r, mask_r = replicas.strides
    return LaunchPlan(
        combine,
        (cdiv(size + extra_size, config.block_m), replicas.count, 1),
        {
            "tangents": tangents,
            "size": size,
            "extra_size": extra_size,
            "columns": 1 if bias is None else bias.numel(),
            "splits": partial.shape[0],
            "bias_r": bias_r,
            "mask_r": mask_r,
            "REPLICATED": replicas.several,
            "BIAS": bias is not None,
            "RELU": relu,
            "MASK": mask is not None,
            "EXTRA": extra is not None,
            "ROUND": config.block_k,
            "BLOCK": config.block_m,
        },
        config,
        cost.times(replicas.count),
        replicas.count,
    )
