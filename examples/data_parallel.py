"""Several processes, one model: `torchrun --nproc-per-node=2 -m examples.data_parallel`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import ibp_triton as ibp


def main(steps: int = 50) -> float:
    """Train on each process's own samples; the objective of all of them at the last step, the same everywhere."""
    torch.manual_seed(0)  # the same weights on every process
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    network = ibp.Network(model, process_group=dist.group.WORLD)
    step = ibp.EagerStep(network, ibp.LossIBP(0.01), torch.optim.SGD(model.parameters(), lr=0.1))
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    loss = 0.0
    for _ in range(steps):
        labels = torch.randint(2, (16,), generator=generator)
        x = torch.randn(16, 20, generator=generator) + labels[:, None]
        loss = float(step(x, labels).loss)
    return loss


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(f"{main()}\n", end="")  # in one write: lines of several processes do not mix
    dist.destroy_process_group()
