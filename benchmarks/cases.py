"""The one table of what is measured: networks, batches, precisions, methods and their steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ibp_triton as ibp
from ibp_triton.harness.models import paper_cifar10, paper_mnist

NETWORKS = {
    "mnist": (functools.partial(paper_mnist, pool="torch-ceil", init="torch"), (1, 28, 28)),
    "cifar10": (functools.partial(paper_cifar10, pool="torch-ceil", init="torch"), (3, 32, 32)),
}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
TANGENTS = 5
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


@dataclass(frozen=True)
class Case:
    """One network at one batch size, precision and memory layout, on CPU or CUDA."""

    network: str
    batch: int
    precision: str
    channels_last: bool = True
    device: str = "cpu"

    @property
    def shape(self) -> list[int]:
        """[N, C, H, W]."""
        return [self.batch, *NETWORKS[self.network][1]]

    @property
    def layout(self) -> torch.memory_format:
        """Of activations and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def model(self) -> nn.Module:
        """The paper's network, always the same weights, float32."""
        make, shape = NETWORKS[self.network]
        torch.manual_seed(0)
        return make(shape).to(device=self.device, memory_format=self.layout)

    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """A batch [N, C, H, W] in [0, 1], labels [N], tangents [5, N, C, H, W]."""
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(self.shape, generator=generator)
        x = nn.functional.avg_pool2d(x, 3, 1, 1).to(self.device).contiguous(memory_format=self.layout)
        labels = torch.randint(0, 10, (self.batch,), generator=generator).to(self.device)
        return x, labels, ibp.lie_tangents(x)

    def info(self) -> dict[str, object]:
        """What a row of results says of itself."""
        return {
            "network": self.network,
            "shape": self.shape,
            "precision": self.precision,
            "layout": "channels_last" if self.channels_last else "contiguous",
            "tangents": TANGENTS,
        }


Step = Callable[[], tuple[Tensor, dict[str, Tensor]]]


def ours(
    case: Case, key: str, method: ibp.Method | None = None, backend: str = "torch", model: nn.Module | None = None
) -> Step:
    """A step of one of ``METHODS`` (or of ``method``, of the same kind): objective and gradients."""
    network = ibp.Network(model or case.model(), backend=backend, dtype=PRECISIONS[case.precision])
    x, labels, tau = case.data()
    method = METHODS[key] if method is None else method
    tangents = tau if method.needs_tangents else None
    return lambda: method.gradients(network, x, labels, tangents)
