from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ibp_triton.harness.augment import augment, draw, warp
from ibp_triton.harness.config import Augment
from ibp_triton.harness.streams import stream

EYE = torch.eye(2)[None]


def image() -> Tensor:
    return torch.rand(1, 2, 9, 7, generator=torch.Generator().manual_seed(1))


def by_definition(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """source = matrix·(target − centre) + centre + shift, pixel by pixel, bilinear, 0 outside."""
    height, width = x.shape[-2:]
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    out = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            sx, sy = (matrix @ (torch.tensor([float(column), float(row)]) - centre) + centre + shift).tolist()
            for r in (math.floor(sy), math.floor(sy) + 1):
                for c in (math.floor(sx), math.floor(sx) + 1):
                    if 0 <= r < height and 0 <= c < width:
                        out[..., row, column] += (1 - abs(sy - r)) * (1 - abs(sx - c)) * x[..., r, c]
    return out


def test_warp_is_the_definition_in_pixels() -> None:
    matrix, shift = draw(1, Augment(), stream(0, "test"))
    expected = by_definition(image(), matrix[0], shift[0])
    assert torch.allclose(warp(image(), matrix, shift), expected, atol=1e-5)


def test_whole_pixel_shift_moves_the_image() -> None:
    moved = warp(image(), EYE, torch.tensor([[2.0, 1.0]]))
    assert torch.allclose(moved, F.pad(image(), (0, 2, 0, 1))[..., 1:, 2:], atol=1e-6)


def test_a_quarter_turn_of_a_square() -> None:
    x = image()[..., :7, :7]
    turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    assert torch.allclose(warp(x, turn, torch.zeros(1, 2)), x.rot90(1, (2, 3)), atol=1e-5)


@pytest.mark.parametrize(("scaling", "mean_log"), [("log-uniform", 0.0), ("uniform", 0.039)])
def test_draws_fill_their_ranges(scaling: str, mean_log: float) -> None:
    choice = Augment.model_validate({"scaling": scaling, "angle": 0.0})
    matrix, shift = draw(4000, choice, stream(0, "test"))
    scales = torch.stack([matrix[:, 0, 0], matrix[:, 1, 1]])
    assert 1 / 1.4 <= scales.min() < 0.73
    assert 1.37 < scales.max() <= 1.4001
    assert scales.log().mean().item() == pytest.approx(mean_log, abs=0.01)
    assert 1.98 < shift.abs().max() <= 2.0


def test_angles_fill_their_range() -> None:
    matrix, _ = draw(4000, Augment(scale=1.0), stream(0, "test"))
    angles = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]) * 180 / math.pi
    assert 17.9 < angles.abs().max() <= 18.001
    assert angles.mean().abs() < 0.5


def test_equal_seeds_give_equal_images_each_sample_its_own_map() -> None:
    x = image().repeat(2, 1, 1, 1)
    first, second = (augment(x, Augment(), stream(5, "augmentation", 0)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, augment(x, Augment(), stream(5, "augmentation", 1)))
