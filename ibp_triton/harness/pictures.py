"""Folders of pictures: which files are of which class, and their pixels."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ibp_triton.errors import DataError
from ibp_triton.harness.config import Data


def has_parts(root: Path) -> bool:
    """Whether a folder is divided into train/ and test/."""
    return (root / "train").is_dir() and (root / "test").is_dir()


def classes(root: Path) -> dict[str, list[Path]]:
    """The pictures of each class, by name; hidden files and folders, and folders without a picture, are no class."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = {folder.name: sorted(filter(_is_picture, folder.iterdir())) for folder in folders}
    return {name: pictures for name, pictures in found.items() if pictures}


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in (".png", ".jpg", ".jpeg") and not path.name.startswith(".") and path.is_file()


def read(path: Path, data: Data) -> Tensor:
    """Pixels [C, size, size] uint8, turned upright as its camera says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.verify()  # a PNG's checksums, down to its end
            with Image.open(path) as image:
                upright = _eight_bits(ImageOps.exif_transpose(image))
        mode = "L" if data.channels == 1 else "RGB"
        pixels = np.asarray(upright.convert(mode).resize((data.size, data.size)))
    except Exception as error:  # what a damaged or hostile picture makes its decoder raise
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or delete it") from error
    return torch.from_numpy(pixels.copy()).reshape(data.size, data.size, data.channels).permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen bits a pixel scaled to eight, which `convert` would cut off at white."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
