"""Regression on a table: squares as the criterion, a smooth function by an exact gradient penalty."""

from __future__ import annotations

import torch
from torch import nn

import ibp_triton as ibp


def main(steps: int = 300) -> float:
    """Fit a noisy plane; the last step's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 1))
    method = ibp.LossIBP(1e-3, norm=2, semantics="exact", criterion=nn.MSELoss())
    step = ibp.EagerStep(model, method, torch.optim.Adam(model.parameters(), lr=0.01))
    loss = 0.0
    for _ in range(steps):
        x = torch.randn(64, 6)
        y = x @ torch.arange(6.0)[:, None] / 6 + 0.1 * torch.randn(64, 1)
        loss = float(step(x, y).loss)
    return loss


if __name__ == "__main__":
    print(main())
