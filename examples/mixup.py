"""Mixup: soft targets, with Prediction IBP's exact gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import ibp_triton as ibp


def main(steps: int = 200) -> float:
    """Train on mixed samples; the last step's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 3))
    method = ibp.PredictionIBP(0.01, semantics="exact", criterion=nn.CrossEntropyLoss(label_smoothing=0.05))
    step = ibp.EagerStep(model, method, torch.optim.SGD(model.parameters(), lr=0.1))
    loss = 0.0
    for _ in range(steps):
        labels = torch.randint(3, (32,))
        x, y = torch.randn(32, 20) + labels[:, None], F.one_hot(labels, 3).float()
        share, order = torch.distributions.Beta(0.4, 0.4).sample((32, 1)), torch.randperm(32)
        mixed = [share * one + (1 - share) * one[order] for one in (x, y)]
        loss = float(step(*mixed).loss)
    return loss


if __name__ == "__main__":
    print(main())
