"""The five Lie operators against finite differences of warping the smoothed image."""

import math

import pytest
import torch
import torch.nn.functional as F

import ibp_triton as ibp
from ibp_triton.tangents import TRANSFORMATIONS

SIZE = 28


def blobs():
    """A smooth image of three blobs, with two channels, in [0, 1]."""
    y, x = torch.meshgrid(
        torch.arange(SIZE, dtype=torch.float64), torch.arange(SIZE, dtype=torch.float64), indexing="ij"
    )
    image = sum(
        torch.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * s * s)) for a, b, s in ((9, 12, 3.5), (18, 10, 3), (14, 19, 4))
    )
    image = image / image.max()
    return torch.stack([image, 1 - image.t()])[None]


def smoothed(images, sigma=0.9):
    k = torch.arange(-4, 5, dtype=torch.float64)
    g = torch.exp(-k.square() / (2 * sigma**2))
    g /= g.sum()
    rows = F.conv2d(images, g.view(1, 1, 1, 9).expand(2, 1, 1, 9), padding=(0, 4), groups=2)
    return F.conv2d(rows, g.view(1, 1, 9, 1).expand(2, 1, 9, 1), padding=(4, 0), groups=2)


def warped(images, matrix, shift):
    """images sampled at source = matrix · (target − centre) + centre + shift, bilinear, x first."""
    theta = torch.cat([torch.tensor(matrix), torch.tensor(shift)[:, None] * 2 / SIZE], 1)[None].to(images)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


UNIT = [[1.0, 0.0], [0.0, 1.0]]


def moved(name, step):
    """The warp whose derivative at step 0 is the tangent, coordinates in pixels."""
    if name == "shift x":
        return UNIT, [step, 0.0]
    if name == "shift y":
        return UNIT, [0.0, step]
    if name == "scale x":
        return [[1 + step, 0.0], [0.0, 1.0]], [0.0, 0.0]
    if name == "scale y":
        return [[1.0, 0.0], [0.0, 1 + step]], [0.0, 0.0]
    return [[math.cos(step), -math.sin(step)], [math.sin(step), math.cos(step)]], [0.0, 0.0]


@pytest.mark.parametrize("index", range(5))
def test_tangents_are_derivatives_of_warps(index):
    images, name = blobs(), TRANSFORMATIONS[index]
    tangent = ibp.lie_tangents(images, coordinate_scale=1)[index]
    base, step = smoothed(images), 0.05 if name.startswith("shift") else 0.005
    difference = (warped(base, *moved(name, step)) - warped(base, *moved(name, -step))) / (2 * step)
    inside = (..., slice(5, -5), slice(5, -5))
    gap = (tangent[inside] - difference[inside]).norm() / difference[inside].norm()
    assert float(gap) < 0.04
    assert float(difference[inside].norm()) > 0.1


def test_default_coordinates_are_in_half_widths():
    images = blobs()
    pixels, default = ibp.lie_tangents(images, coordinate_scale=1), ibp.lie_tangents(images)
    assert torch.allclose(default[:2], pixels[:2])
    assert torch.allclose(default[2:] * SIZE / 2, pixels[2:])


def test_borders_and_normalisation():
    flat = torch.full((1, 1, 12, 12), 0.7)
    assert ibp.lie_tangents(flat, border="replicate").abs().max() < 1e-6
    assert ibp.lie_tangents(flat, border="zeros").abs().max() > 0.1
    norms = ibp.lie_tangents(blobs(), normalise=True).flatten(2).norm(dim=2)
    assert torch.allclose(norms, torch.ones_like(norms))


def test_each_image_and_channel_stands_alone_in_any_layout():
    images = torch.rand(3, 2, 10, 14)
    together = ibp.lie_tangents(images)
    assert together.shape == (5, 3, 2, 10, 14)
    assert torch.allclose(together[:, 1:2, 1:2], ibp.lie_tangents(images[1:2, 1:2]), atol=1e-6)
    last = ibp.lie_tangents(images.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(last, together, atol=1e-6)
    assert last.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "expected", "message"),
    [
        (lambda x: ibp.lie_tangents(x[0]), ValueError, r"\[N, C, H, W\]"),
        (lambda x: ibp.lie_tangents((x * 255).to(torch.uint8)), TypeError, "images / 255"),
        (lambda x: ibp.lie_tangents(x, border="mirror"), ValueError, "'zeros' or 'replicate', not 'mirror'"),
        (lambda x: ibp.lie_tangents(x, sigma=0), ValueError, "must be positive"),
    ],
)
def test_wrong_images_are_refused(change, expected, message):
    with pytest.raises(expected, match=message):
        change(blobs())
