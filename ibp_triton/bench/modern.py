"""Networks of today's shapes for 32×32 images in plain torch, each a function of its sizes; modules in train mode."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


class Shortcut(nn.Module):
    """shortcut(x) + branch(x)."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Maps of one shape from both."""
        across: Tensor = x if self.shortcut is None else self.shortcut(x)
        result: Tensor = across + self.branch(x)
        return result


class PreActivated(nn.Module):
    """z = first(x), then z + branch(z) or, where the shape changes, shortcut(z) + branch(z)."""

    def __init__(self, first: nn.Module, branch: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.first, self.branch, self.shortcut = first, branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """As Zagoruyko and Komodakis draw it: a projection sees the activated map, an identity the map itself."""
        z = self.first(x)
        across: Tensor = x if self.shortcut is None else self.shortcut(z)
        result: Tensor = across + self.branch(z)
        return result


class Joined(nn.Module):
    """x and branch(x), one after another in the channels."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C + growth, H, W]."""
        return torch.cat((x, self.branch(x)), dim=1)


def _convolution(a: int, b: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, size, stride, size // 2, groups=groups, bias=False)


def _unit(a: int, b: int, size: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU) -> list:  # type: ignore[type-arg]
    """Convolution, BatchNorm, activation."""
    return [_convolution(a, b, size, stride, groups), nn.BatchNorm2d(b), act()]


def _head(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def resnet18(width: int = 64, classes: int = CLASSES) -> nn.Module:
    """ResNet-18 with the stem for CIFAR: 3×3, no pooling; `width` channels in the first stage."""
    layers: list[nn.Module] = _unit(3, width)
    a = width
    for stage in range(4):
        for block in range(2):
            b, stride = width * 2**stage, 2 if stage and not block else 1
            branch = nn.Sequential(*_unit(a, b, stride=stride), _convolution(b, b), nn.BatchNorm2d(b))
            project = nn.Sequential(_convolution(a, b, 1, stride), nn.BatchNorm2d(b)) if a != b else None
            layers += [Shortcut(branch, project), nn.ReLU()]
            a = b
    return nn.Sequential(*layers, *_head(a, classes))


def wide_resnet(depth: int = 16, widen: int = 4, classes: int = CLASSES) -> nn.Module:
    """WRN-depth-widen: (depth − 4) / 6 pre-activated blocks in each of three stages."""
    layers: list[nn.Module] = [_convolution(3, 16)]
    a = 16
    for stage in range(3):
        for block in range((depth - 4) // 6):
            b, stride = 16 * widen * 2**stage, 2 if stage and not block else 1
            branch = nn.Sequential(*_unit(a, b, stride=stride), _convolution(b, b))
            first = nn.Sequential(nn.BatchNorm2d(a), nn.ReLU())
            layers.append(PreActivated(first, branch, _convolution(a, b, 1, stride) if a != b else None))
            a = b
    return nn.Sequential(*layers, nn.BatchNorm2d(a), nn.ReLU(), *_head(a, classes))


def vgg_bn(width: int = 64, classes: int = CLASSES) -> nn.Module:
    """VGG-11 with BatchNorm, one linear layer at the end."""
    layers: list[nn.Module] = []
    a = 3
    for factors in ((1,), (2,), (4, 4), (8, 8), (8, 8)):
        for factor in factors:
            layers += _unit(a, factor * width)
            a = factor * width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(a, classes))


def mobilenet_v2(width: float = 1.0, classes: int = CLASSES) -> nn.Module:
    """MobileNetV2: inverted residuals around depthwise convolutions; the first strides are 1, as images are small."""
    a = int(32 * width)
    layers: list[nn.Module] = _unit(3, a, act=nn.ReLU6)
    for expand, channels, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(count):
            b, step, wide = int(channels * width), stride if block == 0 else 1, a * expand
            widening = _unit(a, wide, 1, act=nn.ReLU6) if expand > 1 else []
            branch = nn.Sequential(
                *widening, *_unit(wide, wide, 3, step, wide, nn.ReLU6), _convolution(wide, b, 1), nn.BatchNorm2d(b)
            )
            layers.append(Shortcut(branch) if step == 1 and a == b else branch)
            a = b
    last = int(1280 * max(1.0, width))
    return nn.Sequential(*layers, *_unit(a, last, 1, act=nn.ReLU6), *_head(last, classes))


def densenet_bc(depth: int = 40, growth: int = 12, classes: int = CLASSES) -> nn.Module:
    """DenseNet-BC: (depth − 4) / 6 bottlenecks in each of three blocks, channels halved between them."""
    a = 2 * growth
    layers: list[nn.Module] = [_convolution(3, a)]
    for block in range(3):
        for _ in range((depth - 4) // 6):
            inner = [nn.BatchNorm2d(a), nn.ReLU(), _convolution(a, 4 * growth, 1)]
            layers.append(
                Joined(nn.Sequential(*inner, nn.BatchNorm2d(4 * growth), nn.ReLU(), _convolution(4 * growth, growth)))
            )
            a += growth
        if block < 2:
            layers += [nn.BatchNorm2d(a), nn.ReLU(), _convolution(a, a // 2, 1), nn.AvgPool2d(2)]
            a //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(a), nn.ReLU(), *_head(a, classes))


class ConvNeXtBranch(nn.Module):
    """7×7 depthwise, LayerNorm over channels, a wide layer with GELU, a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.across = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], the linear layers with channels last."""
        z: Tensor = self.wide(self.norm(self.across(x).permute(0, 2, 3, 1))) * self.scale
        return z.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W]."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext(
    widths: Sequence[int] = (40, 80, 160, 320), depths: Sequence[int] = (2, 2, 6, 2), classes: int = CLASSES
) -> nn.Module:
    """ConvNeXt of atto's widths, its first patches 2×2."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 2, 2), ChannelNorm(widths[0])]
    for stage, (b, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            layers += [ChannelNorm(widths[stage - 1]), nn.Conv2d(widths[stage - 1], b, 2, 2)]
        layers += [Shortcut(ConvNeXtBranch(b)) for _ in range(depth)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], classes)
    )


class SelfAttention(nn.Module):
    """Several heads, all three projections as one product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        z: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return z


def _wide(width: int, inner: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


def _blocks(width: int, heads: int, depth: int) -> list[nn.Module]:
    """Norm first."""
    parts: list[nn.Module] = []
    for _ in range(depth):
        parts.append(Shortcut(nn.Sequential(nn.LayerNorm(width), SelfAttention(width, heads))))
        parts.append(Shortcut(nn.Sequential(nn.LayerNorm(width), _wide(width, 4 * width))))
    return parts


class Tokens(nn.Module):
    """Patches of an image as tokens, with a class token and positions to learn if `places`."""

    def __init__(self, width: int, patch: int, places: int | None) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.token = self.place = None
        if places is not None:
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            self.place = nn.Parameter(0.02 * torch.randn(1, places + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, L, D]."""
        z: Tensor = self.embed(x).flatten(2).transpose(1, 2)
        if self.token is None or self.place is None:
            return z
        return torch.cat((self.token.expand(len(z), -1, -1), z), dim=1) + self.place


class FirstToken(nn.Module):
    """The class token alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, D] → [N, D]."""
        return x[:, 0]


class MeanToken(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, D] → [N, D]."""
        return x.mean(1)


class Swapped(nn.Module):
    """The inner module along the tokens instead of the channels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, D]."""
        z: Tensor = self.inner(x.transpose(1, 2))
        return z.transpose(1, 2)


def vit(dim: int = 96, depth: int = 6, heads: int = 3, patch: int = 4, classes: int = CLASSES) -> nn.Module:
    """A vision Transformer on patches of a 32×32 image."""
    tokens = Tokens(dim, patch, (32 // patch) ** 2)
    return nn.Sequential(tokens, *_blocks(dim, heads, depth), nn.LayerNorm(dim), FirstToken(), nn.Linear(dim, classes))


def mixer(dim: int = 128, depth: int = 6, patch: int = 4, classes: int = CLASSES) -> nn.Module:
    """MLP-Mixer on patches of a 32×32 image."""
    parts: list[nn.Module] = [Tokens(dim, patch, None)]
    for _ in range(depth):
        parts.append(Shortcut(nn.Sequential(nn.LayerNorm(dim), Swapped(_wide((32 // patch) ** 2, dim // 2)))))
        parts.append(Shortcut(nn.Sequential(nn.LayerNorm(dim), _wide(dim, 4 * dim))))
    return nn.Sequential(*parts, nn.LayerNorm(dim), MeanToken(), nn.Linear(dim, classes))


def text_transformer(dim: int = 128, depth: int = 4, heads: int = 4, classes: int = CLASSES) -> nn.Module:
    """torch's encoder on embedded tokens [N, L, dim], their mean to the classes."""
    layer = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.LayerNorm(dim), MeanToken(), nn.Linear(dim, classes))


def mlp(inputs: int = 784, hidden: int = 512, depth: int = 3, classes: int = CLASSES) -> nn.Module:
    """`depth` linear layers with ReLU between them."""
    sizes = [inputs, *[hidden] * (depth - 1)]
    inner = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *inner, nn.Linear(sizes[-1], classes))


def stack(width: int = 32, depth: int = 4, classes: int = CLASSES) -> nn.Module:
    """28×28 images → `width` channels of 7×7 → `depth` 3×3 convolutions with ReLU → logits: linear in its depth."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 4, 4), nn.ReLU()]
    for _ in range(depth):
        convolution = nn.Conv2d(width, width, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")  # torch's own would let 32 of them fade
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(49 * width, classes))
