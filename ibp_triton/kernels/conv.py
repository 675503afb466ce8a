"""Convolutions as implicit matrix products, channels last: forward, linear sweep and reverse."""

import torch
from torch import Tensor

from ibp_triton.kernels.contract import contract_into
from ibp_triton.kernels.fold import fold_taps
from ibp_triton.kernels.gates import is_dense
from ibp_triton.kernels.geometry import ONE, Geometry, sample_stride
from ibp_triton.kernels.launcher import SPAN


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
    tangents, samples, channels = x.shape[:3]
    outputs = weight.shape[0]
    _check(x, weight, (channels, *x.shape[3:]), (weight.shape[1], *geometry.size))
    out = channels_last(x, (tangents, samples, outputs, *geometry.out))
    contract_into(
        out, x, weight, geometry.constants,
        x_strides=_strides(x), w_strides=weight.stride(),
        channels=channels, columns=outputs, inside=geometry.inside,
        sign=sign, bias=bias, relu=relu, mask=_dense(mask),
    )  # fmt: skip
    return out


def conv2d_vjp(d: Tensor, weight: Tensor, geometry: Geometry, mask: Tensor | None = None) -> Tensor:
    """e[t] = (Wᵀ ∗ d[t]) ⊙ [mask > 0]: the reverse of `conv2d`, through the ReLU before it if its output is the mask.

    Args:
        d: [T, N, O, OH, OW], any strides (channels-last ones load 128 bits at a time).
        weight: [O, C, KH, KW], any strides, of d's dtype.
        geometry: that of the forward pass.
        mask: [N, C, H, W], channels last.

    Returns: [T, N, C, H, W], channels last, of d's dtype. With a stride s, one multiplication in s² is not by zero,
        except where many positions have few channels.
    Raises: ValueError for a shape or dtype other than these.
    """
    tangents, samples, outputs = d.shape[:3]
    channels = weight.shape[1]
    _check(d, weight, (outputs, *d.shape[3:]), (weight.shape[0], *geometry.out))
    out = channels_last(d, (tangents, samples, channels, *geometry.size))
    if _by_taps(d, weight):
        _through_taps(out, d, weight, geometry, _dense(mask))
        return out
    by_output, by_channel, *by_tap = weight.stride()
    contract_into(
        out, d, weight, geometry.reversed,
        x_strides=_strides(d), w_strides=(by_channel, by_output, *by_tap),
        channels=outputs, columns=channels, inside=geometry.inside, transposed=True, mask=_dense(mask),
    )  # fmt: skip
    return out


FEW = 16  # columns that a matrix unit wants
MANY = 1 << 16  # positions from which a second launch is worth it


def _by_taps(d: Tensor, weight: Tensor) -> bool:
    """Whether the reverse is cheaper as one product with all taps and a sum: few channels, all of it dense."""
    outputs, channels = weight.shape[:2]
    taps, rows = weight[0].numel(), d.numel() // max(outputs, 1)
    whole = weight.stride(0) == taps and is_dense(weight) and d.movedim(2, -1).is_contiguous()
    return channels < FEW <= taps and MANY <= rows <= SPAN // taps and whole


def _through_taps(out: Tensor, d: Tensor, weight: Tensor, geometry: Geometry, mask: Tensor | None) -> None:
    """p = d W over all positions, as a linear layer with the taps for columns, then their sum."""
    outputs, columns = weight.shape[0], weight[0].numel()
    rows = d.numel() // max(outputs, 1)
    p = d.new_empty((1, rows, columns), dtype=torch.float32)
    contract_into(
        p, d.movedim(2, -1).reshape(1, rows, outputs), weight, ONE.constants,
        x_strides=(0, outputs, 0, 0, 1), w_strides=(1, columns, 0, 0),
        channels=outputs, columns=columns, inside=1,
    )  # fmt: skip
    fold_taps(p, out, geometry, weight.stride()[1:], mask)


def channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty [T, N, C, H, W] tensor with the channels contiguous, of the dtype and on the device of `like`."""
    tangents, samples, channels, height, width = shape
    return like.new_empty((tangents, samples, height, width, channels)).permute(0, 1, 4, 2, 3)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides in the kernels' order: tangent, sample, row, column, channel (1 where the channel axis is trivial)."""
    t, _, c, h, w = x.stride()
    return t, sample_stride(x, 1), h, w, 1 if x.shape[2] == 1 else c


def _dense(mask: Tensor | None) -> Tensor | None:
    if mask is not None and not mask.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"a mask must be channels last; this one has strides {mask.stride()}")
    return mask


def _check(x: Tensor, weight: Tensor, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise ValueError(f"channels and image {got} do not meet {expected}, the weight's and the geometry's")
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtypes {x.dtype} and {weight.dtype}: both must be the same of float32, bfloat16, float16")
