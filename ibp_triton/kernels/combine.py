"""Second stage of a split reduction: the sum of the parts, in a fixed order, and the epilogue that they left out."""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv
from ibp_triton.kernels.plans import Layout
from ibp_triton.kernels.replica_axis import Replicas
from ibp_triton.kernels.smooth import activated
from ibp_triton.kernels.tiles import select

ALONE = Replicas(1, False, (0, 0))


@dataclass(frozen=True)
class Ending:
    """What becomes of a sum before it is stored, one after the other."""

    bias: Tensor | None = None
    relu: bool = False
    activation: int = 0  # an `Activation`, whose slopes are stored besides
    mask: Tensor | None = None  # the sum is kept where it is positive
    factor: bool = False  # or multiplied by the mask


NOTHING = Ending()
MANY = 64  # parts from which a program takes few numbers and many parts at a time


@triton.jit(do_not_specialize=["tangents", "splits", "bias_r", "mask_r"])
def combine(
    partial,
    bias,
    mask,
    out,
    slope,
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
    ACTIVATION: tl.constexpr,
    MASK: tl.constexpr,
    FACTOR: tl.constexpr,
    EXTRA: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t, i] = epilogue(scale * sum_s partial[s, t, i]); grid (blocks of i, replicas).

    Pointers:
        partial: [splits, tangents, size + extra_size] float32.
        bias: [columns], added to element i as bias[i % columns]; read when BIAS.
        mask: [size], shared by the tangents; the result is kept where mask > 0, or if FACTOR multiplied by it; read
            when MASK.
        out: [tangents, size], any float type.
        slope: like out; the activation's derivatives, written where there is an ACTIVATION.
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
        if ACTIVATION:
            slope += replica * (tangents * size)
        extra += replica * extra_size
    if BIAS:
        shift = tl.load(bias + i % columns, mask=ok, other=0.0).to(tl.float32)
    if FACTOR:
        factor = tl.load(mask + i, mask=ok, other=0.0).to(tl.float32)
    elif MASK:
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
        if ACTIVATION:
            y, steep = activated(y, ACTIVATION)
            tl.store(slope + t * size + i, steep, mask=i < size)
        if FACTOR:
            y *= factor
        elif MASK:
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
    ending: Ending = NOTHING,
) -> LaunchPlan:
    """Sum `partial` [S, tangents, size + extra] over S into `out` (size · tangents elements, dense) and `extra`.

    These are one replica's; `replicas` has the strides of bias and mask.

    On the device of `like`. What changes are partial, bias, mask, out, slope, extra and the scale; `out` stands for
    those that are not there.
    """
    size = out.numel // tangents
    extra_size = 0 if extra is None else extra.numel
    shape = "many parts" if partial.shape[0] >= MANY else "any"
    config = select("combine", shape, like.new_empty((1, 1, 0), dtype=partial.dtype))
    bias, mask = ending.bias, ending.mask
    optional = [t for t in (bias, mask) if t is not None]
    # the bias is loaded once for each element, not once for each column
    shared = sum((size if t is bias else t.numel()) * t.element_size() for t in optional)
    stored = out.bytes * (2 if ending.activation else 1) + (0 if extra is None else extra.bytes)
    cost = Cost(loaded=partial.bytes + shared, stored=stored)
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
            "RELU": ending.relu,
            "ACTIVATION": ending.activation,
            "MASK": mask is not None,
            "FACTOR": ending.factor and mask is not None,
            "EXTRA": extra is not None,
            "ROUND": config.block_k,
            "BLOCK": config.block_m,
        },
        config,
        cost.times(replicas.count),
        replicas.count,
    )
