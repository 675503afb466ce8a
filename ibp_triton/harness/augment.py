"""Random affine maps of images, bilinear, zero outside (METHODS: shift, scale per axis, rotation about the centre)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.harness.config import Augment


def augment(images: Tensor, choice: Augment, generator: torch.Generator) -> Tensor:
    """source = R(φ)·S·(target − centre) + centre + shift for each image [N, C, H, W] in [0, 1]; same shape.

    The numbers are drawn on the CPU from `generator`, so that every device sees the same maps.
    """
    matrix, shift = (part.to(images.device) for part in draw(len(images), choice, generator))
    return warp(images, matrix, shift)


def draw(count: int, choice: Augment, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """R(φ)·S [count, 2, 2] and the shift in pixels [count, 2], both in (x, y) order."""
    uniform = 2 * torch.rand(count, 5, generator=generator) - 1
    shift = choice.shift * uniform[:, :2]
    angle = math.radians(choice.angle) * uniform[:, 4]
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    return rotation * _scales(uniform[:, 2:4], choice)[:, None, :], shift


def _scales(uniform: Tensor, choice: Augment) -> Tensor:
    if choice.scaling == "log-uniform":
        return choice.scale**uniform
    low, high = 1 / choice.scale, choice.scale
    return low + (high - low) * (uniform + 1) / 2


def warp(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Sample each image [N, C, H, W] at matrix·(target − centre) + centre + shift, bilinear, zero outside."""
    height, width = images.shape[-2:]
    half = images.new_tensor([width / 2, height / 2])
    # affine_grid works in units of half the image: conjugate by it, in pixels on both sides.
    scaled = matrix * half / half[:, None]
    theta = torch.cat([scaled, (shift / half)[:, :, None]], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
