"""The same losses in other people's loops: Lightning Fabric, a Lightning module, Accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ibp_triton as ibp


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Two classes of noise."""
    labels = torch.arange(32) % 2
    return [(torch.randn(32, 20) + labels[:, None], labels) for _ in range(count)]


def model() -> nn.Module:
    """A small classifier."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))


def with_fabric(steps: int = 20) -> nn.Module:
    """Fabric sets up, and runs backward."""
    from lightning.fabric import Fabric

    fabric, own = Fabric(accelerator="cpu", devices=1), model()
    wrapped, optimizer = fabric.setup(own, torch.optim.SGD(own.parameters(), lr=0.1))
    network, method = ibp.Network(wrapped), ibp.LossIBP(0.01)
    for x, y in batches(steps):
        optimizer.zero_grad()
        fabric.backward(method(network, x, y))
        optimizer.step()
    return own


def with_lightning(steps: int = 20) -> nn.Module:
    """The loss is what training_step returns."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model()
            self.method = ibp.LossIBP(0.01)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.method(self.model, *batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(batches(steps), batch_size=None))  # type: ignore[arg-type]
    return module.model


def with_accelerate(steps: int = 20) -> nn.Module:
    """Accelerate prepares, and runs backward."""
    from accelerate import Accelerator

    accelerator, own = Accelerator(cpu=True), model()
    prepared, optimizer = accelerator.prepare(own, torch.optim.SGD(own.parameters(), lr=0.1))
    network, method = ibp.Network(prepared), ibp.LossIBP(0.01)
    for x, y in batches(steps):
        optimizer.zero_grad()
        accelerator.backward(method(network, x, y))
        optimizer.step()
    return own


def right(trained: nn.Module) -> float:
    """The share of other samples that a model gets right."""
    found = [(trained(x).argmax(1) == y).float().mean() for x, y in batches(8)]
    return float(torch.stack(found).mean())


if __name__ == "__main__":
    print(*(right(train()) for train in (with_fabric, with_lightning, with_accelerate)))
