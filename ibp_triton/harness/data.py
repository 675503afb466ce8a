"""A data set on the training device as one tensor: subset, validation and test split, crop and mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ibp_triton.errors import DataError
from ibp_triton.harness import sources
from ibp_triton.harness.config import Data
from ibp_triton.harness.sources import Examples
from ibp_triton.harness.streams import stream


@dataclass(frozen=True)
class Dataset:
    """Images [N, C, H, W] float32 in [0, 1] (mean not subtracted), labels [N] int64, the mean to subtract [C, h, w]."""

    train: Examples
    validation: Examples
    test: Examples
    mean: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> Dataset:
        """The whole set on a device."""
        moved = [Examples(s.images.to(device), s.labels.to(device)) for s in (self.train, self.validation, self.test)]
        return Dataset(moved[0], moved[1], moved[2], self.mean.to(device), self.classes)


def load(data: Data, subset_seed: int) -> Dataset:
    """The data set of a run; `subset_seed` draws the training subset and the validation examples from the rest.

    Raises DataError for missing or damaged files and for splits larger than the set.
    """
    train, test, classes = sources.load(data)
    train, validation = _draw(train, data, subset_seed)
    if not len(test.labels):
        raise DataError(f"{data.source}: the test set is empty; give examples to measure the error on")
    test = _first(test, data.test, "data.test")
    train, validation, test = (_crop(split, data.crop) for split in (train, validation, test))
    train, validation, test = (Examples(_unit(s.images), s.labels) for s in (train, validation, test))
    return Dataset(train, validation, test, _mean(train.images, data.mean), classes)


def shape_of(data: Data) -> tuple[tuple[int, int, int], int] | None:
    """Image shape and number of classes without reading any file; None for sources that only the files tell."""
    known = sources.shape_of(data)
    if known is None or data.crop is None:
        return known
    (channels, _, _), classes = known
    return (channels, data.crop, data.crop), classes


def _draw(train: Examples, data: Data, seed: int) -> tuple[Examples, Examples]:
    available = len(train.labels)
    wanted = data.subset or available - data.validation
    if wanted < 1 or wanted + data.validation > available:
        subset = "one example to train on" if data.subset is None else f"data.subset {data.subset}"
        raise DataError(
            f"{subset} and data.validation {data.validation} do not fit into the {available} training examples of "
            f"{data.source}; make them smaller"
        )
    order = torch.randperm(available, generator=stream(seed, "subset"))
    chosen, held = order[:wanted], order[wanted : wanted + data.validation]
    return train.take(chosen), train.take(held)


def _first(split: Examples, count: int | None, key: str) -> Examples:
    if count is not None and count > len(split.labels):
        raise DataError(f"{key}: {count} examples asked for, the test set has {len(split.labels)}")
    return split.take(torch.arange(count or len(split.labels)))


def _crop(split: Examples, side: int | None) -> Examples:
    if side is None:
        return split
    height, width = split.images.shape[-2:]
    if side > min(height, width):
        raise DataError(f"data.crop: {side} is larger than the images ({height}×{width})")
    top, left = (height - side) // 2, (width - side) // 2
    return Examples(split.images[..., top : top + side, left : left + side].contiguous(), split.labels)


def _unit(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _mean(images: Tensor, kind: str) -> Tensor:
    if kind == "none":
        return torch.zeros(images.shape[1], 1, 1)
    if kind == "channel":
        return images.mean((0, 2, 3))[:, None, None]
    return images.mean(0)
