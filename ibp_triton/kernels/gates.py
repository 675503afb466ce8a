"""Pointwise work: the ReLU where no other kernel took it over, and its mask on derivatives and tangents."""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv, launch
from ibp_triton.kernels.plans import Layout, Result, planned
from ibp_triton.kernels.replica_axis import side_by_side, taken_apart
from ibp_triton.kernels.tiles import select


@triton.jit
def number(c, at, READ: tl.constexpr):
    """c, or what lies `at` places behind it: a strength that captured steps may change is on the device."""
    if READ:  # noqa: SIM108 - Triton chooses between statements at compile time, not between expressions
        value = tl.load(c + at)
    else:
        value = c
    return value


@triton.jit(do_not_specialize=["tangents", "x_r", "mask_r"])
def gate(x, mask, out, size, tangents, x_r, mask_r, REPLICATED: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = x[t] where mask > 0, else 0 (MASK), or max(x[t], 0); grid (blocks of elements, replicas).

    Pointers:
        x: [tangents, size], any float type.
        mask: [size], read once for all tangents; read when MASK.
        out: [tangents, size].
    If REPLICATED these lie x_r times and mask_r times `size` in front of the next replica's, without gaps in out.
    """
    if REPLICATED:
        replica = tl.program_id(1).to(tl.int64)
        x += replica * x_r * size
        mask += replica * mask_r * size
        out += replica * tangents * size
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    if MASK:
        alive = tl.load(mask + i, mask=ok, other=0.0) > 0
    for t in range(tangents):
        v = tl.load(x + t * size + i, mask=ok, other=0.0)
        if MASK:  # noqa: SIM108 - Triton chooses between statements at compile time, not between expressions
            v = tl.where(alive, v, 0.0)
        else:
            v = tl.where(v <= 0, 0.0, v)  # a NaN stays a NaN
        tl.store(out + t * size + i, v, mask=ok)


def scalar(value: float | Tensor) -> float | Tensor:
    """A kernel's argument for a number: a float, or a tensor's one number as float32 where it lies."""
    return value.float() if isinstance(value, Tensor) else float(value)


def there(number: float | Tensor) -> Tensor | None:
    """The tensor of a number that the kernel reads itself; None for one that is passed to it."""
    return number if isinstance(number, Tensor) else None


def relu(x: Tensor, mask: Tensor | None = None, *, replicated: bool = False) -> Tensor:
    """max(x, 0), or with a mask the ReLU's Jacobian on x: x ⊙ [mask > 0], shared by a leading axis of tangents.

    Args:
        x: [*S], or [T, *S] with a mask of shape S; dense in any order of axes.
        mask: [*S], with x's order of axes; the first pass's activation, before the ReLU or behind it.
        replicated: both have an axis of replicas in front, of stride 0 where these share one.

    Returns: a tensor like x.
    Raises: ValueError for a mask whose shape or order of axes is not that of x, or for x with gaps.
    """
    if replicated:
        x, mask = side_by_side(x), None if mask is None else side_by_side(mask)
    gated = planned(_gate, (replicated,), x, mask)
    out = gated.out.empty(x)
    launch(gated.plan, x, x if mask is None else mask, out)
    return out


def _gate(replicated: bool, x: Tensor, mask: Tensor | None) -> Result:
    replicas, (x, mask) = taken_apart(replicated, x, mask)
    tangents = x.shape[0] if mask is not None and x.dim() > mask.dim() else 1
    size = x.numel() // max(tangents, 1)
    one = x[0] if mask is not None and x.dim() > mask.dim() and tangents else x
    apart = one is x or tangents == 1 or x.stride(0) == size
    if not is_dense(one) or not apart or (mask is not None and x.numel() and not same_layout(one, mask)):
        raise ValueError(
            f"x {tuple(x.shape)} by {x.stride()} and its mask "
            f"{None if mask is None else (tuple(mask.shape), mask.stride())} must be dense, in one order of axes"
        )
    config = select("pointwise", "any", x)
    x_r, mask_r = (step // max(size, 1) for step in replicas.strides)
    cost = Cost((x.numel() + (0 if mask is None else size)) * x.element_size(), x.numel() * x.element_size())
    plan = LaunchPlan(
        gate,
        (cdiv(size, config.block_m), replicas.count, 1),
        {
            "size": size, "tangents": tangents, "x_r": x_r, "mask_r": mask_r,
            "REPLICATED": replicas.several, "MASK": mask is not None, "BLOCK": config.block_m,
        },
        config,
        cost.times(replicas.count),
        replicas.count,
    )  # fmt: skip
    return Result(replicas.layout(Layout.of(x)), plan)


def is_dense(x: Tensor) -> bool:
    """Whether x has no gaps, in any order of axes."""
    expected = 1
    for stride, extent in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= extent
    return True


def same_layout(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have one shape and the same strides along every axis longer than one."""
    return x.shape == y.shape and all(a == b for a, b, n in zip(x.stride(), y.stride(), x.shape, strict=True) if n > 1)
