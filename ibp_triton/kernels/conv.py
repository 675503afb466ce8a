"""Convolutions as implicit matrix products, channels last: forward, linear sweep and reverse."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ibp_triton.kernels.combine import Ending
from ibp_triton.kernels.contract import Contraction, contraction, run
from ibp_triton.kernels.fold import folding
from ibp_triton.kernels.gates import is_dense
from ibp_triton.kernels.geometry import ONE, Geometry, sample_stride
from ibp_triton.kernels.launcher import SPAN, LaunchPlan, launch
from ibp_triton.kernels.plans import Layout, planned
from ibp_triton.kernels.replica_axis import Replicas, taken_apart


def conv2d(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    mask: Tensor | None = None,
    sign: bool = False,
) -> Tensor:
    """y[t] = φ(ψ(x[t]) ∗ W + b), φ a ReLU, a mask, or nothing; ψ = sign if `sign`.

    With an axis of replicas in front of all tensors, of stride 0 where they share one, R such layers in one launch.

    Args:
        x: [T, N, C, H, W], any strides (channels-last ones load 128 bits at a time); float32, bfloat16 or float16.
        weight: [O, C, KH, KW], any strides, of x's dtype.
        geometry: the sizes, as `Geometry.conv` gives them.
        bias: [O]; none on the linear sweep.
        relu: clip the result at zero (the forward pass).
        mask: [N, O, OH, OW], channels last; the result is kept where mask > 0, for every tangent.
        sign: read x as sign(x): the seed of norm 1, without a tensor for it.

    Returns: [T, N, O, OH, OW], channels last, of x's dtype.
    Raises: ValueError for a shape or dtype other than these.
    """
    bias = run(bias)
    return planned(_forward, (geometry, relu, sign), x, weight, bias, mask)(x, weight, bias, mask)


def conv2d_vjp(d: Tensor, weight: Tensor, geometry: Geometry, mask: Tensor | None = None) -> Tensor:
    """e[t] = (Wᵀ ∗ d[t]) ⊙ [mask > 0]: the reverse of `conv2d`, through the ReLU before it if its output is the mask.

    With an axis of replicas in front of all tensors as `conv2d`.

    Args:
        d: [T, N, O, OH, OW], any strides (channels-last ones load 128 bits at a time).
        weight: [O, C, KH, KW], any strides, of d's dtype.
        geometry: that of the forward pass.
        mask: [N, C, H, W], channels last.

    Returns: [T, N, C, H, W], channels last, of d's dtype. With a stride s, one multiplication in s² is not by zero,
        except where many positions have few channels.
    Raises: ValueError for a shape or dtype other than these.
    """
    return planned(_reverse, (geometry, MANY), d, weight, mask)(d, weight, mask=mask)


def _forward(
    geometry: Geometry,
    relu: bool,
    sign: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Contraction:
    replicas, (x, weight, bias, mask) = taken_apart(weight.dim() == 5, x, weight, bias, mask)
    tangents, samples, channels = x.shape[:3]
    outputs = weight.shape[0]
    _check(x, weight, (channels, *x.shape[3:]), (weight.shape[1], *geometry.size), mask)
    return contraction(
        x, Layout.channels_last((tangents, samples, outputs, *geometry.out), x.dtype), geometry.constants,
        x_strides=_strides(x), w_strides=weight.stride(),
        channels=channels, columns=outputs, inside=geometry.inside, replicas=replicas,
        sign=sign, ending=Ending(bias, relu, mask=mask),
    )  # fmt: skip


def _reverse(geometry: Geometry, many: int, d: Tensor, weight: Tensor, mask: Tensor | None) -> "Contraction | _ByTaps":
    replicas, (d, weight, _, mask) = taken_apart(weight.dim() == 5, d, weight, None, mask)
    tangents, samples, outputs = d.shape[:3]
    channels = weight.shape[1]
    _check(d, weight, (outputs, *d.shape[3:]), (weight.shape[0], *geometry.out), mask)
    out = Layout.channels_last((tangents, samples, channels, *geometry.size), d.dtype)
    if _few_channels(d, weight, many // replicas.count):
        return _by_taps(out, d, weight, geometry, replicas, mask)
    by_output, by_channel, *by_tap = weight.stride()
    return contraction(
        d, out, geometry.reversed,
        x_strides=_strides(d), w_strides=(by_channel, by_output, *by_tap),
        channels=outputs, columns=channels, inside=geometry.inside, replicas=replicas, transposed=True,
        ending=Ending(mask=mask),
    )  # fmt: skip


FEW = 16  # columns that a matrix unit wants
MANY = 1 << 15  # positions from which a second launch is worth it


def _few_channels(d: Tensor, weight: Tensor, many: int) -> bool:
    """Whether the reverse is cheaper as one product with all taps and a sum: few channels, all of it dense."""
    outputs, channels = weight.shape[:2]
    taps, rows = weight[0].numel(), d.numel() // max(outputs, 1)
    whole = weight.stride(0) == taps and is_dense(weight) and d.movedim(2, -1).is_contiguous()
    return channels < FEW <= taps and many <= rows <= SPAN // taps and whole


@dataclass(frozen=True)
class _ByTaps:
    """p = d W over all positions, as a linear layer with the taps for columns, then their sum."""

    out: Layout
    product: Contraction
    sum: LaunchPlan

    def __call__(self, d: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        p, out = self.product(d, weight), self.out.empty(d)
        launch(self.sum, p, p if mask is None else mask, out)
        return out


def _by_taps(
    out: Layout, d: Tensor, weight: Tensor, geometry: Geometry, replicas: Replicas, mask: Tensor | None
) -> _ByTaps:
    outputs, columns = weight.shape[0], weight[0].numel()
    rows = d.numel() // max(outputs, 1)
    d_r, w_r, _, mask_r = replicas.strides
    product = contraction(
        d.movedim(2, -1).reshape(1, rows, outputs),
        Layout.dense((1, rows, columns), torch.float32), ONE.constants,
        x_strides=(0, outputs, 0, 0, 1), w_strides=(1, columns, 0, 0),
        channels=outputs, columns=columns, inside=1, replicas=replicas.only(d_r, w_r, 0, 0),
    )  # fmt: skip
    total = folding(d, out, geometry, weight.stride()[1:], replicas.only(mask_r), mask)
    return _ByTaps(replicas.layout(out), product, total)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides in the kernels' order: tangent, sample, row, column, channel (1 where the channel axis is trivial)."""
    t, _, c, h, w = x.stride()
    return t, sample_stride(x, 1), h, w, 1 if x.shape[2] == 1 else c


def _check(x: Tensor, weight: Tensor, got: tuple[int, ...], expected: tuple[int, ...], mask: Tensor | None) -> None:
    if got != expected:
        raise ValueError(f"channels and image {got} do not meet {expected}, the weight's and the geometry's")
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtypes {x.dtype} and {weight.dtype}: both must be the same of float32, bfloat16, float16")
    if mask is not None and not mask.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"a mask must be channels last; this one has strides {mask.stride()}")
