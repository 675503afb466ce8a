"""The networks that tests run on, small enough for float64, each with the shape of its input (without the batch)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def paper_mnist() -> nn.Module:
    """The paper's MNIST network, four and eight channels wide."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 4), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU()),
        *(nn.Conv2d(4, 8, 5, padding=2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 10)),
    )


def paper_cifar10() -> nn.Module:
    """The paper's CIFAR-10 network, four channels wide."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 5), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU()),
        *(nn.Conv2d(4, 4, 5, padding=2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU()),
        *(nn.Conv2d(4, 4, 5, padding=2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4 * 9, 16), nn.ReLU(), nn.Linear(16, 10)),
    )


def sigmoid_mlp() -> nn.Module:
    """Smooth, curved activations."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Sigmoid(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 10))


class Residual(nn.Module):
    """Two residual blocks with BatchNorm and in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.one, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.two, self.norm2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.short, self.relu, self.head = nn.Conv2d(4, 6, 1, stride=2), nn.ReLU(inplace=True), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        out = self.norm1(self.one(x))
        out += x
        x = self.relu(out)
        x = self.relu(self.norm2(self.two(x)) + self.short(x))
        return self.head(x.mean((2, 3)))


class Normalised(nn.Module):
    """GELU and LayerNorm, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(36, 12), nn.LayerNorm(12), nn.Linear(12, 10)
        self.gelu, self.drop = nn.GELU(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.drop(self.gelu(self.norm(self.one(x.flatten(1))))))


class Attention(nn.Module):
    """A small ViT: class token, positions, nn.MultiheadAttention, SDPA, a hand-written attention, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Conv2d(1, 8, 3, stride=3), nn.Linear(8, 24), nn.Linear(8, 10)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8) / 2)
        self.attend, self.norm, self.scale = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.LayerNorm(8),
            nn.Parameter(torch.ones(8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(n, -1, -1), x], dim=1) + self.position
        h = self.norm(x)
        x = x + self.scale * self.attend(h, h, h, need_weights=False)[0]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        weights = torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, dim=-1)
        x = x + weights @ v
        return self.head(x[:, 0])


class SqueezeExcitation(nn.Module):
    """A depthwise convolution whose channels are gated by their own means."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.point = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.down, self.up, self.head = nn.Linear(6, 3), nn.Linear(3, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.depth(x))
        x = F.leaky_relu(self.point(x), 0.1)
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1).flatten(1)))))
        x = x * gate[:, :, None, None]
        return self.head(F.avg_pool2d(x, 2).mean(dim=(-2, -1)))


class Dense(nn.Module):
    """A DenseNet block: each layer sees all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 + 3 * i, 3, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(1 + 3 * i) for i in range(3))
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(F.softplus(norm(x)))], 1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def vgg() -> nn.Module:
    """A VGG with BatchNorm and dropout."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(24, 12), nn.ReLU(True), nn.Linear(12, 10)),
    )


class BasicBlock(nn.Module):
    """ResNet's block of two 3×3 convolutions."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        plain = stride == 1 and channels == width
        short = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.downsample = None if plain else short

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def resnet18(width: int = 4) -> nn.Module:
    """ResNet-18 as published, but narrow."""
    stem = [
        nn.Conv2d(1, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    stages = [
        nn.Sequential(BasicBlock(before, after, 1 if i == 0 else 2), BasicBlock(after, after, 1))
        for i, (before, after) in enumerate(itertools.pairwise(widths))
    ]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(8 * width, 10))


class Branching(nn.Module):
    """A branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x))
        if x.sum() > 1e9:
            return x
        return self.two(torch.tanh(x))


def partly_branching() -> nn.Module:
    """A chain with a module inside that branches."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), Branching(), nn.Linear(12, 10))


class Whole(nn.Module):
    """A model that writes to its input and takes sizes as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = partly_branching()

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(int(x.shape[0]), -1)
        x = x.div_(2)
        return self.body(x)


def evaluating(model: nn.Module) -> nn.Module:
    """The model in eval mode, with statistics that are not the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


SMALL = (1, 6, 6)
NETWORKS = {
    "paper_mnist": (paper_mnist, (1, 28, 28)),
    "paper_cifar10": (paper_cifar10, (3, 32, 32)),
    "sigmoid_mlp": (sigmoid_mlp, SMALL),
    "residual_train": (Residual, SMALL),
    "residual_eval": (lambda: evaluating(Residual()), SMALL),
    "gelu_layer_norm": (Normalised, SMALL),
    "attention": (Attention, SMALL),
    "squeeze_excitation": (SqueezeExcitation, SMALL),
    "dense_block": (Dense, SMALL),
    "vgg_train": (vgg, SMALL),
    "vgg_eval": (lambda: evaluating(vgg()), SMALL),
    "partly_branching": (partly_branching, SMALL),
    "in_place_input": (Whole, SMALL),
}


def build(name: str, batch: int = 3, tangents: int = 3) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A float64 model with a batch, labels and tangents, always the same."""
    make, shape = NETWORKS[name]
    torch.manual_seed(7)
    model = make().double()
    generator = torch.Generator().manual_seed(11)
    x = torch.rand(batch, *shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    tau = torch.randn(tangents, batch, *shape, generator=generator, dtype=torch.float64)
    return model, x, labels, tau
