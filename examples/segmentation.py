"""Segmentation: a label a pixel, classes of unlike size, unlabelled pixels."""

from __future__ import annotations

import torch
from torch import nn

import ibp_triton as ibp


def main(steps: int = 100) -> float:
    """Tell bright pixels from dark ones; the last step's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0]), ignore_index=255)
    step = ibp.EagerStep(model, ibp.LossIBP(0.01, criterion=criterion), torch.optim.Adam(model.parameters(), lr=0.01))
    loss = 0.0
    for _ in range(steps):
        x = torch.rand(4, 1, 16, 16)
        labels = (x[:, 0] > 0.7).long()
        labels[:, :2] = 255  # nobody labelled the upper border
        loss = float(step(x, labels).loss)
    return loss


if __name__ == "__main__":
    print(main())
