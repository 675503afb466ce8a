"""Loss IBP in a training loop of one's own, with weights in float32 and computation in bfloat16 if asked for."""

from __future__ import annotations

import torch
from torch import nn

import ibp_triton as ibp


def main(steps: int = 200, dtype: torch.dtype | None = None) -> float:
    """Train on two classes of noise; the last step's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    network, method = ibp.Network(model, dtype=dtype), ibp.LossIBP(beta=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = torch.zeros(())
    for _ in range(steps):
        labels = torch.randint(2, (32,))
        x = torch.randn(32, 20) + labels[:, None]
        optimizer.zero_grad()
        loss = method(network, x, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(loss.detach())


if __name__ == "__main__":
    print(main(), main(dtype=torch.bfloat16))
