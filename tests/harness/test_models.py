from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ibp_triton.errors import NetworkError
from ibp_triton.harness import models


def maps(model: nn.Sequential, x: torch.Tensor) -> list[int]:
    sizes = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
            sizes.append(x.shape[-1])
    return sizes


@pytest.mark.parametrize(("pool", "sizes"), [("ceil", [13, 7]), ("torch-ceil", [12, 6]), ("floor", [12, 5])])
def test_mnist_maps(pool: str, sizes: list[int]) -> None:
    assert maps(models.paper_mnist(pool=pool), torch.rand(1, 1, 28, 28)) == sizes


@pytest.mark.parametrize(
    ("side", "pool", "sizes"), [(32, "ceil", [14, 7, 4]), (28, "ceil", [12, 6, 3]), (32, "floor", [13, 6, 2])]
)
def test_cifar_maps(side: int, pool: str, sizes: list[int]) -> None:
    model = models.paper_cifar10((3, side, side), pool=pool)
    assert maps(model, torch.rand(1, 3, side, side)) == sizes
    assert model(torch.rand(2, 3, side, side)).shape == (2, 10)


def test_partial_windows_take_the_maximum_of_what_is_there() -> None:
    pooling, size = models._pooling((5, 5), "ceil")
    x = -torch.arange(25.0).view(1, 1, 5, 5) - 1
    assert size == (3, 3)
    expected = -torch.tensor([[1.0, 3, 5], [11, 13, 15], [21, 23, 25]])
    assert torch.equal(nn.Sequential(*pooling)(x)[0, 0], expected)


def test_normal_weights_have_the_toolbox_spread_and_zero_biases() -> None:
    model = models.paper_mnist(generator=torch.Generator().manual_seed(0))
    assert model[0].weight.std().item() == pytest.approx(0.01, rel=0.1)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert linear[0].weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_uniform_weights_fill_half_a_standard_deviation_either_side() -> None:
    model = models.paper_mnist(init="uniform", generator=torch.Generator().manual_seed(0))
    bound = math.sqrt(2 / (32 * 25)) / 2
    conv = [layer for layer in model if isinstance(layer, nn.Conv2d)][1]
    assert 0.99 * bound < conv.weight.abs().max().item() <= bound
    small = models.paper_mnist(init="uniform-0.01")
    assert small[0].weight.abs().max().item() <= 0.005


def test_equal_generators_give_equal_weights() -> None:
    first, second = (models.paper_mnist(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(NetworkError, match="pool 'max' is unknown"):
        models.paper_mnist(pool="max")
    with pytest.raises(NetworkError, match="init 'zeros' is unknown"):
        models.paper_mnist(init="zeros")
    with pytest.raises(NetworkError, match="image is too small"):
        models.paper_mnist((1, 4, 4))
    with pytest.raises(NetworkError, match="one entry a convolution"):
        models.paper_mnist(widths=[3])
    with pytest.raises(NetworkError, match=r"cannot import 'nowhere:build'"):
        models.imported("nowhere:build", (1, 8, 8), 2, {})
    with pytest.raises(NetworkError, match=r"math:dist returned float, not a torch.nn.Module"):
        models.imported("math:dist", (1, 1, 1), (2, 2, 2), {})  # type: ignore[arg-type]


class Pair(nn.Flatten):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:  # type: ignore[override]
        return super().forward(x), 1


def own(layers: list[nn.Module], *, trains: bool = True) -> Callable[..., nn.Module]:
    return lambda shape, classes, **options: nn.Sequential(nn.Flatten(), *layers).requires_grad_(trains)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (own([nn.Linear(16, 3)]), r"must return logits \[2, 4\], returned \[2, 3\]"),
        (own([nn.Linear(16, 4), Pair()]), r"must return logits \[2, 4\], returned tuple"),
        (own([nn.Linear(5, 4)]), r"given \[2, C, H, W\], raised RuntimeError: mat1 and mat2 .*\(.*, line \d+\)"),
        (own([nn.Linear(16, 4)], trains=False), r"has no parameter with requires_grad"),
        (lambda shape: None, r"raised TypeError: .* takes 1 positional argument but 2 were given"),
        (3, r"raised TypeError: 'int' object is not callable"),
    ],
)
def test_own_models_that_cannot_be_trained_are_refused(
    build: object, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(math, "build", build, raising=False)
    with pytest.raises(NetworkError, match=rf"network.import: .*math:build.* {expected}"):
        models.imported("math:build", (1, 4, 4), 4, {})


def test_own_models_come_back_in_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (nn.Flatten(), nn.LazyLinear(4), nn.BatchNorm1d(4))
    monkeypatch.setattr(math, "build", lambda shape, classes: nn.Sequential(*layers), raising=False)
    model = models.imported("math:build", (1, 4, 4), 4, {})
    assert model.training
    assert not model[2].running_mean.any(), "the trial leaves no trace"  # type: ignore[index]
