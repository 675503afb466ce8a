"""Second stage of a split reduction: the sum of the parts, in a fixed order, and the epilogue that they left out."""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv, launch
from ibp_triton.kernels.plans import Layout, planned
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
MOST = 4  # sums of one launch
RUN = 16  # numbers: a part of so many times n begins where a 128-bit load may


@triton.jit
def parts_added(partial, t, i, ok, tangents, width, splits, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """sum_s partial[s, t, i] in a fixed order; the loads of ROUND parts are under way together."""
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, splits, ROUND):
        s = start + tl.arange(0, ROUND)
        at = (s * tangents + t)[:, None] * width + i[None, :]
        y += tl.sum(tl.load(partial + at, mask=(s < splits)[:, None] & ok[None, :], other=0.0), 0)
    return y


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
        y = parts_added(partial, t, i, ok, tangents, width, splits, BLOCK, ROUND)
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


@triton.jit(
    do_not_specialize=[
        *("begin1", "begin2", "begin3"),
        *(f"{name}{i}" for name in ("size", "runs", "splits") for i in range(4)),
    ]
)
def combine_several(
    partial0, partial1, partial2, partial3,
    out0, out1, out2, out3,
    extra0, extra1, extra2, extra3,
    scale,
    begin1, begin2, begin3,
    size0, size1, size2, size3,
    runs0, runs1, runs2, runs3,
    splits0, splits1, splits2, splits3,
    RUN: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = scale * sum_s partial[s, i] of up to four sums; grid (the blocks of one after those of the other).

    Pointers:
        partial: [splits, runs * RUN] float32.
        out: [size] float32.
        extra: [runs * RUN - size] float32, the elements beyond `size`.

    A sum's blocks begin at begin1, begin2, begin3; that of none is the end of the grid.
    """
    block = tl.program_id(0)
    partial = partial0
    out = out0
    extra = extra0
    begin = 0
    size = size0
    runs = runs0
    splits = splits0
    if block >= begin3:
        partial = partial3
        out = out3
        extra = extra3
        begin = begin3
        size = size3
        runs = runs3
        splits = splits3
    elif block >= begin2:
        partial = partial2
        out = out2
        extra = extra2
        begin = begin2
        size = size2
        runs = runs2
        splits = splits2
    elif block >= begin1:
        partial = partial1
        out = out1
        extra = extra1
        begin = begin1
        size = size1
        runs = runs1
        splits = splits1
    i = (block - begin) * BLOCK + tl.arange(0, BLOCK)
    width = runs * RUN
    ok = i < width
    y = scale * parts_added(partial, 0, i, ok, 1, width, splits, BLOCK, ROUND)
    tl.store(out + i, y, mask=i < size)
    tl.store(extra + i - size, y, mask=ok & (i >= size))


class PartSums:
    """Sums that nothing reads before the end of a block of code: made four to a launch, or when asked for."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Tensor, float]] = []

    @staticmethod
    def takes(partial: Layout, out: Layout) -> bool:
        """Whether a sum of these layouts may share a launch: float32, whose parts begin where a 128-bit load may."""
        return out.dtype == torch.float32 and partial.shape[-1] % RUN == 0

    def add(self, partial: Tensor, out: Tensor, extra: Tensor | None, scale: float) -> None:
        """scale · Σ_s partial [S, 1, size + extra], to be written into `out` and `extra`, both dense."""
        if self._waiting and self._waiting[0][-1] != scale:
            self.now()
        self._waiting.append((partial, out, out if extra is None else extra, scale))
        if len(self._waiting) == MOST:  # the parts of more would be too much memory
            self.now()

    def now(self) -> None:
        """Make those that wait."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            partials, outs, extras, scales = zip(*waiting, *waiting[:1] * (MOST - len(waiting)), strict=True)
            plan = planned(_several, (len(waiting),), *partials, *outs)
            launch(plan, *partials, *outs, *extras, scales[0])


def _several(count: int, *tensors: Tensor) -> LaunchPlan:
    """`tensors`: MOST partials, then as many results; the first `count` of each are wanted."""
    partials, outs = tensors[:MOST], tensors[MOST:]
    config = select("combine", "several", partials[0])
    widths = [partial.shape[-1] for partial in partials]
    ends = [0]
    for i, width in enumerate(widths):
        ends.append(ends[-1] + (cdiv(width, config.block_m) if i < count else 0))
    moved = [4 * partial.numel() for partial in partials[:count]]
    return LaunchPlan(
        combine_several,
        (ends[-1], 1, 1),
        {
            **{f"begin{i}": ends[i] if i < count else ends[-1] for i in range(1, MOST)},
            **{f"size{i}": out.numel() for i, out in enumerate(outs)},
            **{f"runs{i}": width // RUN for i, width in enumerate(widths)},
            **{f"splits{i}": partial.shape[0] for i, partial in enumerate(partials)},
            "RUN": RUN, "ROUND": config.block_k, "BLOCK": config.block_m,
        },
        config,
        Cost(loaded=sum(moved), stored=4 * sum(widths[:count])),
    )  # fmt: skip


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
