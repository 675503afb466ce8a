"""The one table of what is measured: networks, batches, precisions, methods and their steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import ibp_triton as ibp
from ibp_triton.bench import modern
from ibp_triton.harness.models import PRECISIONS, paper_cifar10, paper_mnist

TANGENTS = 5
COUNTS = {"tangents": "T", "replicas": "R", "processes": "P"}  # of a cell, and their letters
METHODS: dict[str, ibp.Method] = {
    "bp": ibp.BP(),
    "loss_ibp": ibp.LossIBP(0.03),
    "fast_tbp": ibp.FastTangentBP(0.01),
    "fast_at": ibp.FastAdversarialTraining(0.03),
    "at": ibp.AdversarialTraining(0.05),
    "prediction_ibp": ibp.PredictionIBP(1 / 32),
    "tbp": ibp.TangentBP(0.01),
    "loss_ibp_exact": ibp.LossIBP(0.03, semantics="exact"),
}
MORE: dict[str, ibp.Method] = {
    "fast_tbp_exact": ibp.FastTangentBP(0.01, semantics="exact"),
    "prediction_ibp_exact": ibp.PredictionIBP(1 / 32, semantics="exact"),
    "tbp_exact": ibp.TangentBP(0.01, semantics="exact"),
    "jacobian": ibp.JacobianRegularisation(0.01),
    "pgd_training": ibp.PGDTraining(0.03, 0.01, 3),
    "trades": ibp.TRADES(1.0, 0.03, 0.01, 3),
}


@dataclass(frozen=True)
class Entry:
    """A network: how it is made, its input [C, H, W] or [L, D], its family, and whether it is piecewise linear."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    family: str
    flat: bool = False  # linear but for ReLU and max-pooling: the paper's gradient is what autograd finds
    classes: int = 10
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # that `build` has, for who reads the results


def _paper(make: Callable[..., nn.Module], shape: tuple[int, ...]) -> Entry:
    return Entry(functools.partial(make, shape, pool="torch-ceil", init="torch"), shape, "paper", flat=True)


IMAGE = (3, 32, 32)
NETWORKS: dict[str, Entry] = {
    "mnist": _paper(paper_mnist, (1, 28, 28)),
    "cifar10": _paper(paper_cifar10, IMAGE),
    "resnet18": Entry(modern.resnet18, IMAGE, "convnet"),
    "wide_resnet": Entry(modern.wide_resnet, IMAGE, "convnet"),
    "vgg_bn": Entry(modern.vgg_bn, IMAGE, "convnet"),
    "mobilenet_v2": Entry(modern.mobilenet_v2, IMAGE, "convnet"),
    "densenet_bc": Entry(modern.densenet_bc, IMAGE, "convnet"),
    "convnext": Entry(modern.convnext, IMAGE, "transformer"),  # LayerNorm and GELU: judged as those are
    "vit": Entry(modern.vit, IMAGE, "transformer"),
    "mixer": Entry(modern.mixer, IMAGE, "transformer"),
    "text_transformer": Entry(modern.text_transformer, (64, 128), "transformer"),
    "mlp": Entry(modern.mlp, (1, 28, 28), "mlp", flat=True),
    "stack": Entry(modern.stack, (1, 28, 28), "convnet", flat=True),
}


def word(key: str, value: object) -> str:
    """One fact of a cell as its name, targets and `skip` have it: T=5 of its tangents, else the value alone."""
    return f"{COUNTS[key]}={value}" if key in COUNTS else str(value)


@dataclass(frozen=True)
class Case:
    """One network at one batch size, precision and memory layout, on CPU or CUDA."""

    network: str
    batch: int
    precision: str
    channels_last: bool = True
    device: str = "cpu"
    backend: str = "torch"
    own: Entry | None = None  # a network that ``NETWORKS`` does not hold
    tangents: int = TANGENTS
    replicas: int = 1
    processes: int = 1

    @property
    def entry(self) -> Entry:
        """How the network is made."""
        return self.own or NETWORKS[self.network]

    @property
    def shape(self) -> list[int]:
        """[N, C, H, W], or [N, L, D]."""
        return [self.batch, *self.entry.shape]

    @property
    def layout(self) -> torch.memory_format:
        """Of weights and, where they have four axes, activations."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def dtype(self) -> torch.dtype | None:
        """That the network computes in, if not its own."""
        return PRECISIONS[self.precision]  # type: ignore[index]

    @property
    def name(self) -> str:
        """Unlike that of any other case of a suite."""
        layout = "channels_last" if self.channels_last else "contiguous"
        parts = [self.network, str(self.batch), self.precision, layout, self.backend, self.device]
        usual = {"tangents": TANGENTS, "replicas": 1, "processes": 1}
        return "-".join(parts + [word(key, getattr(self, key)) for key in usual if getattr(self, key) != usual[key]])

    def model(self, seed: int = 0) -> nn.Module:
        """The network, always the same weights of a seed, float32, in train mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.entry.build()
        return model.to(device=self.device, memory_format=self.layout)  # type: ignore[call-overload,no-any-return]

    def data(self, process: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """A batch [N, ...] in [0, 1], labels [N], tangents [T, N, ...]: five, over and over, Lie's of images.

        Of several processes each has its own.
        """
        generator = torch.Generator().manual_seed(1 + process)
        x = torch.rand(self.shape, generator=generator)
        images = x.dim() == 4
        if images:
            x = nn.functional.avg_pool2d(x, 3, 1, 1).to(self.device).contiguous(memory_format=self.layout)
        labels = torch.randint(0, self.entry.classes, (self.batch,), generator=generator).to(self.device)
        if images:
            five = ibp.lie_tangents(x)
        else:
            five = 0.1 * torch.randn([TANGENTS, *self.shape], generator=generator).to(self.device)
        chosen = five if self.tangents == TANGENTS else five[torch.arange(self.tangents) % TANGENTS]
        return x.to(self.device), labels, chosen

    def info(self) -> dict[str, object]:
        """What a row of results says of itself."""
        return {
            "network": self.network,
            "shape": self.shape,
            "precision": self.precision,
            "layout": "channels_last" if self.channels_last else "contiguous",
            "tangents": self.tangents,
            "replicas": self.replicas,
            "processes": self.processes,
            "options": dict(self.entry.options),
        }


Step = Callable[[], tuple[Tensor, dict[str, Tensor]]]


def network_of(case: Case, model: nn.Module | None = None) -> ibp.Network:
    """The case's model in its precision, for its backend."""
    return ibp.Network(model or case.model(), backend=case.backend, dtype=case.dtype)


def ours(case: Case, method: str | ibp.Method, model: nn.Module | None = None) -> Step:
    """A step of a method, or of one of ``METHODS`` by name: objective and gradients."""
    chosen = METHODS[method] if isinstance(method, str) else method
    network, (x, labels, tau) = network_of(case, model), case.data()
    tangents = tau if chosen.needs_tangents else None
    return lambda: chosen.gradients(network, x, labels, tangents)


def predicted(case: Case, method: ibp.Method) -> float:
    """Multiply-adds of the method's step over those of BP."""
    return method.predicted_ratio(ibp.Network(case.model(), backend="torch"), case.shape, case.tangents)
