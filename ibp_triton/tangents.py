"""Tangent vectors of five image transformations: Lie operators after Gaussian smoothing (Simard et al. 1992)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TRANSFORMATIONS = ("shift x", "shift y", "scale x", "scale y", "rotation")
_RADIUS = 4
_BORDERS = {"zeros": "constant", "replicate": "replicate"}


def lie_tangents(
    images: Tensor,
    sigma: float = 0.9,
    border: str = "zeros",
    coordinate_scale: float | None = None,
    normalise: bool = False,
) -> Tensor:
    """τ = I_x, I_y, X I_x, Y I_y, X I_y − Y I_x, each channel by itself.

    I_x and I_y are the derivatives of the image smoothed by a Gaussian; X and Y are pixel coordinates from the centre.

    Args:
        images: [N, C, H, W], pixels in [0, 1] before mean subtraction.
        sigma: the Gaussian's width in pixels.
        border: what lies outside: "zeros" (digits on black) or "replicate" (photographs).
        coordinate_scale: pixels per unit of X and Y; half the image width by default, 1 for pixel coordinates.
        normalise: divide each tangent vector by its Euclidean norm.

    Returns:
        [5, N, C, H, W] in the order of ``TRANSFORMATIONS``; in the memory format of ``images``.

    Raises:
        ValueError: for another shape, an unknown border, a sigma or scale that is not positive.
        TypeError: for images that are not floating point.
    """
    _check(images, sigma, border, coordinate_scale)
    height, width = images.shape[-2:]
    scale = width / 2 if coordinate_scale is None else coordinate_scale
    smooth, slope = _kernels(sigma, images)
    along_x = _convolve(_convolve(images, smooth, 2, border), slope, 3, border)
    along_y = _convolve(_convolve(images, smooth, 3, border), slope, 2, border)
    x = (torch.arange(width, dtype=images.dtype, device=images.device) - (width - 1) / 2) / scale
    y = (torch.arange(height, dtype=images.dtype, device=images.device)[:, None] - (height - 1) / 2) / scale
    parts = [along_x, along_y, x * along_x, y * along_y, x * along_y - y * along_x]
    result = images.new_empty(5, *images.shape)
    if images.is_contiguous(memory_format=torch.channels_last):
        result = result.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (5, -1))
    torch.stack(parts, out=result)
    return result / result.flatten(2).norm(dim=2).clamp_min(1e-12)[..., None, None, None] if normalise else result


def _kernels(sigma: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """The Gaussian and its derivative at −4 … 4, [9] each, as correlation kernels."""
    k = torch.arange(-_RADIUS, _RADIUS + 1, dtype=torch.float64)
    gauss = torch.exp(-k.square() / (2 * sigma * sigma))
    gauss /= gauss.sum()
    slope = k / (sigma * sigma) * gauss  # D_k = −(k/σ²) g_k convolves; correlation takes its mirror image
    return gauss.to(like), slope.to(like)


def _convolve(images: Tensor, kernel: Tensor, axis: int, border: str) -> Tensor:
    shape = [1, 1, 1, 1]
    shape[axis] = kernel.numel()
    pads = [0, 0, _RADIUS, _RADIUS] if axis == 2 else [_RADIUS, _RADIUS, 0, 0]
    padded = F.pad(images, pads, mode=_BORDERS[border])
    weight = kernel.view(shape).expand(images.shape[1], 1, *shape[2:])
    return F.conv2d(padded, weight, groups=images.shape[1])


def _check(images: Tensor, sigma: float, border: str, coordinate_scale: float | None) -> None:
    if images.dim() != 4:
        raise ValueError(f"lie_tangents needs images [N, C, H, W], got {list(images.shape)}; add axes with x[:, None]")
    if not images.is_floating_point():
        raise TypeError(f"lie_tangents needs floating-point images in [0, 1], got {images.dtype}; use images / 255")
    if border not in _BORDERS:
        raise ValueError(f"border must be 'zeros' or 'replicate', not {border!r}")
    if sigma <= 0 or (coordinate_scale is not None and coordinate_scale <= 0):
        raise ValueError(f"sigma and coordinate_scale must be positive, got {sigma} and {coordinate_scale}")
