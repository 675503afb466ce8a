"""Training batches as tensor operations: the whole set on the device, shuffled and augmented from the run's seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

import ibp_triton as ibp
from ibp_triton.harness.augment import augment
from ibp_triton.harness.config import Seeds, Tangents, Training
from ibp_triton.harness.data import Dataset
from ibp_triton.harness.streams import stream


@dataclass(frozen=True)
class Batch:
    """Inputs [n, C, H, W] with the mean subtracted, labels [n], tangents [5, n, C, H, W] if the method needs them.

    `size` is n, or the sum of it over the processes that share the batch.
    """

    x: Tensor
    labels: Tensor
    tangents: Tensor | None
    size: int


def _all(count: int) -> slice:
    return slice(count)


class Batches:
    """One pass an epoch over the training set, in an order that only the order seed and the epoch decide.

    `share` says which of a batch's samples are given, of so many: all, or those of one of several processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        training: Training,
        seeds: Seeds,
        tangents: Tangents | None,
        share: Callable[[int], slice] = _all,
    ) -> None:
        self._share = share
        self._images, self._labels, self._mean = dataset.train.images, dataset.train.labels, dataset.mean
        self._training, self._seeds, self._tangents = training, seeds, tangents
        self._format = torch.channels_last if training.channels_last else torch.contiguous_format
        fixed = training.augment is None
        self._inputs = self._images - self._mean if fixed else None
        self._fixed_tangents = self._lie(self._images) if fixed and tangents else None

    def __len__(self) -> int:
        return len(self._labels)

    def of(self, seeds: Seeds) -> Batches:
        """The same set in the order of other seeds."""
        other = copy(self)
        other._seeds = seeds
        return other

    def epoch(self, number: int) -> Iterator[Batch]:
        """Batches of epoch `number` (from 0), the last one smaller if the set does not divide."""
        order = torch.randperm(len(self), generator=stream(self._seeds.order, "order", number))
        draws = stream(self._seeds.order, "augmentation", number)
        for index in torch.split(order.to(self._labels.device), self._training.batch_size):
            yield self._batch(index, draws, self._share(len(index)))

    def first(self, count: int) -> Batch:
        """The first `count` training examples in stored order, augmented alike at every call."""
        index = torch.arange(min(count, len(self)), device=self._labels.device)
        return self._batch(index, stream(self._seeds.order, "probe"), _all(len(index)))

    def _batch(self, whole: Tensor, draws: torch.Generator, share: slice) -> Batch:
        index = whole[share]
        labels = self._labels[index]
        if self._inputs is not None:
            tangents = None if self._fixed_tangents is None else self._fixed_tangents[:, index]
            return Batch(self._inputs[index].contiguous(memory_format=self._format), labels, tangents, len(whole))
        assert self._training.augment is not None
        images = augment(self._images[whole], self._training.augment, draws)[share]  # the draws are the batch's
        x = (images - self._mean).contiguous(memory_format=self._format)
        return Batch(x, labels, self._lie(images) if self._tangents else None, len(whole))

    def _lie(self, images: Tensor) -> Tensor:
        assert self._tangents is not None
        tangents: Tensor = ibp.lie_tangents(images, **self._tangents.model_dump())
        return tangents
