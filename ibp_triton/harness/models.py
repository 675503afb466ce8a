"""The paper's two networks, their open choices as arguments, and models imported from the user's own code."""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ibp_triton.errors import NetworkError
from ibp_triton.harness import plugins
from ibp_triton.harness.config import Init, NetworkChoice, Pool, Precision
from ibp_triton.harness.streams import derive

Shape = tuple[int, int, int]
# The dtype that a network computes in, if not its own.
PRECISIONS: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
POOLS, INITS = get_args(Pool), get_args(Init)


def paper_mnist(
    input_shape: Shape = (1, 28, 28),
    classes: int = 10,
    *,
    pool: str = "ceil",
    init: str = "normal",
    widths: Sequence[int] = (32, 64),
    kernels: Sequence[int] = (4, 5),
    pads: Sequence[int] = (0, 2),
    hidden: int = 256,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Conv 32@4×4, conv 64@5×5, each with max-pool 3/2 and ReLU, then 256 and `classes` units (paper, section 5).

    Input [N, *input_shape], output logits [N, classes]. `pool` is one of POOLS, `init` one of INITS; `generator`
    draws the weights. Raises NetworkError for unknown choices and for inputs too small.
    """
    layers = _convolutions(input_shape, pool, widths, kernels, pads)
    return _finish(layers, input_shape, hidden, classes, init, generator)


def paper_cifar10(
    input_shape: Shape = (3, 32, 32),
    classes: int = 10,
    *,
    pool: str = "ceil",
    init: str = "normal",
    widths: Sequence[int] = (64, 64, 64),
    kernels: Sequence[int] = (5, 5, 5),
    pads: Sequence[int] = (0, 2, 2),
    hidden: int = 256,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Three 5×5 convolutions, each with max-pool 3/2 and ReLU, then 256 and `classes` units; as `paper_mnist`."""
    layers = _convolutions(input_shape, pool, widths, kernels, pads)
    return _finish(layers, input_shape, hidden, classes, init, generator)


BUILDERS = {"paper_mnist": paper_mnist, "paper_cifar10": paper_cifar10}


def imported(target: str, input_shape: Shape, classes: int, options: dict[str, Any]) -> nn.Module:
    """Call `pkg.mod:build(input_shape, classes, **options)` and try its model on two black images.

    Raises NetworkError when there is no such function, when it or its model fails, and when it does not classify.
    """
    module_name, _, attribute = target.partition(":")
    plugins.code_in_use(target)
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise NetworkError(f"network.import: cannot import {target!r} ({error}); write package.mod:function") from error
    except (Exception, SystemExit) as error:
        raise NetworkError(f"network.import: {module_name} {_raised(error)}") from error
    try:
        model = build(input_shape, classes, **options)
    except (Exception, SystemExit) as error:
        raise NetworkError(f"network.import: {target}({input_shape}, {classes}, …) {_raised(error)}") from error
    if not isinstance(model, nn.Module):
        raise NetworkError(f"network.import: {target} returned {type(model).__name__}, not a torch.nn.Module")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise NetworkError(f"network.import: the model of {target} has no parameter with requires_grad to train")
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *input_shape, device=trained[0].device))
    except (Exception, SystemExit) as error:
        raise NetworkError(f"network.import: the model of {target}, given [2, C, H, W], {_raised(error)}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 2 or logits.shape[1] < classes:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise NetworkError(f"network.import: the model of {target} must return logits [2, {classes}], returned {got}")
    return model.train()


def _raised(error: BaseException) -> str:
    """What went wrong in the user's code, and the last line there: where torch was called, if torch raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames[1:] if Path(torch.__file__).parent not in Path(frame.filename).parents]
    place = (own or frames)[-1]
    return f"raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


def build(network: NetworkChoice, shape: Shape, classes: int, seed: int) -> nn.Module:
    """The network of a config for images of `shape` [C, H, W]; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        target = network.target or plugins.target_of("networks", network.name or "")
        if target is not None and network.name not in BUILDERS:
            return imported(target, shape, classes, network.options)
        choices = network.model_dump(exclude={"name", "target", "options"}, exclude_none=True)
        return BUILDERS[network.name or ""](shape, classes, **choices)


def _convolutions(
    input_shape: Shape, pool: str, widths: Sequence[int], kernels: Sequence[int], pads: Sequence[int]
) -> list[nn.Module]:
    if not len(widths) == len(kernels) == len(pads):
        raise NetworkError(f"widths {widths}, kernels {kernels} and pads {pads} must have one entry a convolution")
    channels, size = input_shape[0], input_shape[1:]
    layers: list[nn.Module] = []
    for width, kernel, pad in zip(widths, kernels, pads, strict=True):
        size = (size[0] + 2 * pad - kernel + 1, size[1] + 2 * pad - kernel + 1)
        pooling, size = _pooling(size, pool)
        layers += [nn.Conv2d(channels, width, kernel, padding=pad), *pooling, nn.ReLU()]
        channels = width
    return layers


def _pooling(size: tuple[int, ...], pool: str) -> tuple[list[nn.Module], tuple[int, int]]:
    """Max-pool 3/2 on maps of `size`; "ceil" gives ceil(n/2), for which torch needs a column of -inf where n is odd."""
    if pool not in POOLS:
        raise NetworkError(f"pool {pool!r} is unknown; choose one of {', '.join(POOLS)}")
    if min(size) < 3:
        raise NetworkError(f"the image is too small: max-pool 3/2 got a map of {size[0]}×{size[1]}; use larger images")
    if pool == "floor":
        return [nn.MaxPool2d(3, 2)], _map(size, lambda n: (n - 3) // 2 + 1)
    window = nn.MaxPool2d(3, 2, ceil_mode=True)
    if pool == "torch-ceil" or all(n % 2 == 0 for n in size):
        return [window], _map(size, lambda n: math.ceil((n - 3) / 2) + 1)
    margin = nn.ConstantPad2d((0, size[1] % 2, 0, size[0] % 2), -math.inf)
    return [margin, window], _map(size, lambda n: math.ceil(n / 2))


def _map(size: tuple[int, ...], rule: Any) -> tuple[int, int]:
    return rule(size[0]), rule(size[1])


def _finish(
    layers: list[nn.Module],
    input_shape: Shape,
    hidden: int,
    classes: int,
    init: str,
    generator: torch.Generator | None,
) -> nn.Sequential:
    with torch.no_grad():
        features = nn.Sequential(*layers)(torch.zeros(1, *input_shape)).numel()
    head = [nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
    model = nn.Sequential(*layers, *head)
    initialise(model, init, generator)
    return model


@torch.no_grad()
def initialise(model: nn.Module, init: str, generator: torch.Generator | None = None) -> None:
    """Draw the weights of every Conv2d and Linear, biases 0; `init` is one of INITS ("torch" leaves them alone)."""
    if init not in INITS:
        raise NetworkError(f"init {init!r} is unknown; choose one of {', '.join(INITS)}")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and init != "torch":
            _draw(module.weight, init, isinstance(module, nn.Conv2d), generator)
            if module.bias is not None:
                module.bias.zero_()


def _draw(weight: Tensor, init: str, convolution: bool, generator: torch.Generator | None) -> None:
    if init == "normal":
        weight.normal_(0.0, 0.01 if convolution else 0.1, generator=generator)
        return
    std = 0.01 if init == "uniform-0.01" else math.sqrt(2.0 / weight[0].numel())
    weight.uniform_(-std / 2, std / 2, generator=generator)
