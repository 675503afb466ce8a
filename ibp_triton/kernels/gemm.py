"""Linear layers: forward, linear sweep and reverse are one contraction with the weight's strides swapped."""

import torch
from torch import Tensor

from ibp_triton.kernels.combine import Ending
from ibp_triton.kernels.contract import Contraction, contraction, run
from ibp_triton.kernels.geometry import ONE, sample_stride
from ibp_triton.kernels.plans import Layout, planned
from ibp_triton.kernels.replica_axis import taken_apart
from ibp_triton.kernels.smooth import Activation


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    mask: Tensor | None = None,
    slope: Tensor | None = None,
    sign: bool = False,
) -> Tensor:
    """y[t] = φ(ψ(x[t]) Wᵀ + b), φ a ReLU, a mask, a slope, or nothing; ψ = sign if `sign`.

    With an axis of replicas in front of all tensors, of stride 0 where they share one, R such layers in one launch.

    Args:
        x: [T, N, I], the last axis contiguous; float32, bfloat16 or float16.
        weight: [O, I], contiguous, of x's dtype.
        bias: [O]; none on the linear sweep.
        relu: clip the result at zero (the forward pass).
        mask: [N, O], contiguous; the result is kept where mask > 0, for every tangent (the linear sweep's ReLU).
        slope: [N, O], contiguous; the result is multiplied by it, for every tangent (a smooth activation's sweep).
        sign: read x as sign(x): the seed of norm 1, without a tensor for it.

    Returns: [T, N, O], contiguous, of x's dtype.
    Raises: ValueError for a shape, dtype or stride other than these, and for a slope together with a mask or a ReLU.
    """
    if relu and slope is not None:
        raise ValueError("a result behind a ReLU is not multiplied by a slope")
    bias, factor = run(bias), _one_of(mask, slope)
    kept = planned(_forward, (relu, Activation.NONE, sign, slope is not None), x, weight, bias, factor)
    return kept(x, weight, bias, factor)


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | int
) -> tuple[Tensor, Tensor]:
    """y[t] = σ(z) and σ'(z) for z = x[t] Wᵀ + b in float32: what every later sweep multiplies by.

    With an axis of replicas in front of all tensors as `linear`.

    Args:
        x, weight, bias: as of `linear`.
        activation: σ, an `Activation` other than NONE.

    Returns: both [T, N, O], contiguous, of x's dtype.
    Raises: ValueError for a shape, dtype, stride or activation other than these.
    """
    if activation == Activation.NONE:
        raise ValueError("an activation is wanted: `linear` does without")
    bias = run(bias)
    kept = planned(_forward, (False, Activation(activation), False, False), x, weight, bias, None)
    slope = kept.out.empty(x)
    return kept(x, weight, bias, slope=slope), slope


def linear_vjp(d: Tensor, weight: Tensor, mask: Tensor | None = None, slope: Tensor | None = None) -> Tensor:
    """e[t] = (d[t] W) ⊙ [mask > 0]: the reverse of `linear`, through the ReLU before it if its output is the mask.

    With an axis of replicas in front of all tensors as `linear`.

    Args:
        d: [T, N, O], the last axis contiguous.
        weight: [O, I], contiguous, of d's dtype.
        mask: [N, I], contiguous.
        slope: [N, I], contiguous; the result is multiplied by it instead, for a smooth activation before the layer.

    Returns: [T, N, I], contiguous, of d's dtype.
    Raises: ValueError for a shape, dtype or stride other than these, and for a mask and a slope together.
    """
    factor = _one_of(mask, slope)
    return planned(_reverse, (slope is not None,), d, weight, factor)(d, weight, mask=factor)


def _one_of(mask: Tensor | None, slope: Tensor | None) -> Tensor | None:
    if mask is not None and slope is not None:
        raise ValueError("a result is kept by a mask or multiplied by a slope, not both")
    return mask if slope is None else slope


def _forward(
    relu: bool,
    activation: Activation,
    sign: bool,
    factor: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Contraction:
    replicas, (x, weight, bias, mask) = taken_apart(weight.dim() == 3, x, weight, bias, mask)
    _check(x, weight, x.shape[2], weight.shape[1], mask)
    outputs, inputs = weight.shape
    return contraction(
        x, Layout.dense((*x.shape[:2], outputs), x.dtype), ONE.constants,
        x_strides=(x.stride(0), sample_stride(x, 1), 0, 0, 1), w_strides=(inputs, 1, 0, 0),
        channels=inputs, columns=outputs, inside=1, replicas=replicas, sign=sign,
        ending=Ending(bias, relu, int(activation), mask, factor),
    )  # fmt: skip


def _reverse(factor: bool, d: Tensor, weight: Tensor, mask: Tensor | None) -> Contraction:
    replicas, (d, weight, _, mask) = taken_apart(weight.dim() == 3, d, weight, None, mask)
    _check(d, weight, d.shape[2], weight.shape[0], mask)
    outputs, inputs = weight.shape
    return contraction(
        d, Layout.dense((*d.shape[:2], inputs), d.dtype), ONE.constants,
        x_strides=(d.stride(0), sample_stride(d, 1), 0, 0, 1), w_strides=(1, inputs, 0, 0),
        channels=outputs, columns=inputs, inside=1, replicas=replicas, ending=Ending(mask=mask, factor=factor),
    )  # fmt: skip


def _check(x: Tensor, weight: Tensor, features: int, expected: int, mask: Tensor | None) -> None:
    if features != expected:
        raise ValueError(f"{features} features do not meet a weight of shape {tuple(weight.shape)}")
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtypes {x.dtype} and {weight.dtype}: both must be the same of float32, bfloat16, float16")
    if not weight.is_contiguous() or (x.numel() and x.stride(-1) != 1):
        raise ValueError(f"strides {x.stride()} and {weight.stride()}: the last axis must be contiguous")
    if mask is not None and not mask.is_contiguous():
        raise ValueError(f"a mask must be contiguous, and a slope; this one has strides {mask.stride()}")
