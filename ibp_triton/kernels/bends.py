"""The curvature of smooth activations: σ''(z) times the products of derivatives and tangents, in one pass."""

# Device code under @triton.jit has no Python types:
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibp_triton.kernels.launcher import Cost, LaunchPlan, cdiv, launch
from ibp_triton.kernels.plans import Layout, Result, planned
from ibp_triton.kernels.smooth import Activation, bent
from ibp_triton.kernels.tiles import select


@triton.jit(do_not_specialize=["tangents"])
def curve(d, t, z, out, size, tangents, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = σ''(z[i]) Σ_j d[j, i] t[j, i]; grid (blocks of i).

    Pointers:
        d, t: [tangents, size], any float type.
        z, out: [size].
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(tangents):
        left = tl.load(d + j * size + i, mask=ok, other=0.0).to(tl.float32)
        total += left * tl.load(t + j * size + i, mask=ok, other=0.0).to(tl.float32)
    second = bent(tl.load(z + i, mask=ok, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(out + i, second * total, mask=ok)


def activation_curvature(d: Tensor, t: Tensor, z: Tensor, activation: Activation | int) -> Tensor:
    """∇_z ⟨d, σ'(z) t⟩ = σ''(z) Σ_j d_j t_j.

    Args:
        d, t: [T, *S], contiguous, of z's dtype.
        z: [*S], contiguous; float32, bfloat16 or float16.
        activation: σ, an `Activation` other than NONE.

    Returns: [*S], like z.
    Raises: ValueError for a shape, dtype, stride or activation other than these.
    """
    plan = planned(_curve, (Activation(activation),), d, t, z)
    out = plan.out.empty(z)
    launch(plan.plan, d, t, z, out)
    return out


def _curve(activation: Activation, d: Tensor, t: Tensor, z: Tensor) -> Result:
    if activation == Activation.NONE or z.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{activation.name} in {z.dtype}: an activation in float32, bfloat16 or float16 is wanted")
    for side in (d, t):
        if side.shape != d.shape or side.shape[1:] != z.shape or side.dtype != z.dtype:
            raise ValueError(
                f"a side {tuple(side.shape)} in {side.dtype} does not meet z {tuple(z.shape)} in {z.dtype}"
            )
    if not all(x.is_contiguous() for x in (d, t, z)):
        raise ValueError("both sides and z must be contiguous")
    config = select("pointwise", "any", z)
    size, width = z.numel(), z.element_size()
    constants = {"size": size, "tangents": len(d), "ACTIVATION": int(activation), "BLOCK": config.block_m}
    cost = Cost(loaded=(2 * len(d) + 1) * size * width, stored=size * width)
    return Result(Layout.of(z), LaunchPlan(curve, (cdiv(size, config.block_m), 1, 1), constants, config, cost))
