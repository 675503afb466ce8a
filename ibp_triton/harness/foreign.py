"""Robustness of a model trained anywhere: `ibp-triton evaluate package.module:build --checkpoint FILE --data …`."""

from __future__ import annotations

import importlib
import inspect
import pickle
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ibp_triton.attacks import from_torchattacks
from ibp_triton.errors import ConfigError
from ibp_triton.evaluation import Sizes, robustness
from ibp_triton.harness import data, models, plugins
from ibp_triton.harness.config import Data, data_sources
from ibp_triton.harness.sources import SOURCES
from ibp_triton.outcomes import Robustness

OTHERS = "torchattacks."  # what attacks of that package begin with
NESTED = ("state_dict", "model_state_dict", "model")  # where training loops keep the weights in a checkpoint


def evaluate(
    target: str,
    checkpoint: Path,
    examples: str,
    *,
    folder: str | None = None,
    count: int | None = None,
    attacks: list[str] | None = None,
    mean: str | None = None,
    std: str | None = None,
    norm: str = "linf",
    device: str = "cpu",
    progress: bool = True,
) -> Robustness:
    """Errors of the model that `build(input_shape, classes)` makes, with the weights of a checkpoint, on a test set.

    Args:
        target: package.module:build.
        checkpoint: a state dict, as .safetensors or as torch.save wrote it.
        examples: a data source's name, an .npz file of arrays, or a folder of images.
        folder: of the source's files.
        count: the first so many examples only.
        attacks: such as "fgsm=2/255,8/255", or "torchattacks.AutoAttack=8/255" of that package; none for usual ones.
        mean: a number, or one a channel, between commas.
        std: likewise.
        norm: "linf" or "l2".
        device: to compute on.
        progress: whether to show how far it is.

    Raises:
        ConfigError: for options or files that do not fit.
    """
    chosen = {key: _sizes(key, value, norm) for key, _, value in (a.partition("=") for a in attacks or [])}
    loaded = data.load(_source(examples, count).found_in(folder), 0)
    model = models.imported(target, loaded.shape, loaded.classes, {})
    _load(model, checkpoint)
    centre, scale = (
        None if text is None else _numbers(text, name) for name, text in (("--mean", mean), ("--std", std))
    )
    test = loaded.test
    return robustness(
        model.to(device), (test.images, test.labels), chosen or None, mean=centre, std=scale, norm=norm, device=device,
        progress=progress,
    )  # fmt: skip


def _source(examples: str, count: int | None) -> Data:
    if examples in SOURCES or plugins.target_of("sources", examples):
        return Data.model_validate({"source": examples, "mean": "none", "test": count})
    path = Path(examples)
    if not path.exists():
        known = ", ".join(sorted(data_sources()))
        raise ConfigError(f"--data: {examples!r} is no file or folder, nor one of the data sources {known}")
    source = "image_folder" if path.is_dir() else "arrays"
    return Data.model_validate({"source": source, "path": examples, "mean": "none", "test": count})


def _sizes(name: str, text: str, norm: str) -> Sizes:
    """The sizes of an attack, with the attack where another package has it."""
    sizes = _numbers(text, name)
    if not name.startswith(OTHERS):
        return sizes
    try:
        kind = getattr(importlib.import_module("torchattacks"), name.removeprefix(OTHERS))
        accepted = inspect.signature(kind).parameters
    except ImportError as error:
        raise ConfigError(f"--attack {name} needs torchattacks: pip install 'ibp-triton[attacks]'") from error
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"--attack {name}: torchattacks has no such attack; write such as {OTHERS}AutoAttack"
        ) from error
    options = {"norm": norm.capitalize()} if "norm" in accepted else {}
    return from_torchattacks(kind, sizes, **options)


def _numbers(text: str, name: str) -> list[float]:
    """Numbers or fractions such as 8/255, between commas."""
    try:
        return [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{name}: {text!r} is no list of numbers; write such as 2/255,8/255") from error


def _load(model: nn.Module, checkpoint: Path) -> None:
    """The weights, also where they lie under a key of a training loop's checkpoint; nothing else is unpickled."""
    try:
        if checkpoint.suffix == ".safetensors":
            found: Any = load_file(checkpoint)
        else:
            found = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"--checkpoint: {checkpoint} does not exist") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--checkpoint: {checkpoint} can't be read ({reason}); give a state dict of tensors, as .safetensors or by "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    nested = next(
        (found[key] for key in NESTED if isinstance(found, Mapping) and isinstance(found.get(key), dict)), found
    )
    if not isinstance(nested, Mapping) or not all(isinstance(value, Tensor) for value in nested.values()):
        raise ConfigError(f"--checkpoint: {checkpoint} holds no state dict of tensors")
    weights = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in nested.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"--checkpoint: {checkpoint} does not fit the model: {error}") from error
