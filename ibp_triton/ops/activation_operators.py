"""A linear layer with the smooth activation behind it as one operator, with fake implementation and derivative.

The slope is what the sweeps of ``linear`` and ``linear_vjp`` multiply by. It has no derivative of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ibp_triton.kernels import bends as _bends
from ibp_triton.kernels import gemm as _gemm
from ibp_triton.ops import operators as ops
from ibp_triton.ops.derivatives import LINEAR, keep_sparse, kept, parameters


@custom_op("ibp_triton::linear_activation", mutates_args=())
def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> tuple[Tensor, Tensor]:
    """σ(z) and σ'(z) for z = x Wᵀ + b, x [T, N, I], weight [O, I], bias [O] → both [T, N, O].

    ``activation`` is an ``ibp_triton.kernels.smooth.Activation``.
    """
    return _gemm.linear_activation(x, weight, bias, activation)


@linear_activation.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:2], weight.shape[0]))
    return y, torch.empty_like(y)


@custom_op("ibp_triton::activation_curvature", mutates_args=())
def activation_curvature(d: Tensor, t: Tensor, z: Tensor, activation: int) -> Tensor:
    """σ''(z) Σ_j d_j t_j for d and t [T, *S], z [*S] → [*S], contiguous; what is not is copied."""
    return _bends.activation_curvature(d.contiguous(), t.contiguous(), z.contiguous(), activation)


activation_curvature.register_fake(lambda d, t, z, activation: z.new_empty(z.shape))


def _backward(ctx: Any, g: Tensor | None, g_slope: Tensor | None) -> Any:
    x, weight, bias, _, _, slope = kept(ctx)
    if g_slope is not None:
        raise NotImplementedError("the slope of an activation has no derivative: no second one of linear_activation")
    if g is None:
        return None, None, None, None
    g = (g * slope).contiguous()
    d = ops.linear_vjp(g, weight) if ctx.needs_input_grad[0] else None
    return d, *parameters(ctx, 1, x, g, weight, LINEAR, bias is not None), None


def _no_third(ctx: Any, g: Tensor) -> Any:
    raise NotImplementedError("the curvature of an activation has no derivative")


activation_curvature.register_autograd(_no_third)
linear_activation.register_autograd(_backward, setup_context=keep_sparse)
