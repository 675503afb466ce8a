"""Several processes that train one model, each on its own samples: what they add up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 1 << 22  # numbers that are added up in one call


@dataclass(frozen=True, eq=False)
class World:
    """The processes of a group. All must take the same steps, in the same order."""

    group: Any

    def total(self, count: int, weights: Tensor | None) -> tuple[int, Tensor | None]:
        """The number of samples and the sum of their weights, over all processes."""
        both = torch.zeros(2, dtype=torch.float64, device=None if weights is None else weights.device)
        both[0] = count
        if weights is not None:
            both[1] = weights
        self._add_up(both)
        return int(both[0]), None if weights is None else both[1]

    def sum(self, value: Tensor) -> Tensor:
        """A number of each process, added up."""
        total = value.double()
        self._add_up(total)
        return total.to(value.dtype)

    def gradients(self, found: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: gradient} of these parameters, added up in large pieces; zero where a process has none."""
        own = {n: found[n] if n in found else torch.zeros_like(p) for n, p in parameters.items()}
        for names in _buckets(own):
            flat = torch.cat([own[n].reshape(-1) for n in names])
            self._add_up(flat)
            for n, piece in zip(names, flat.split([own[n].numel() for n in names]), strict=True):
                own[n] = piece.view(own[n].shape)
        return own

    def _add_up(self, value: Tensor) -> None:
        dist.all_reduce(value, group=self.group)


def _buckets(gradients: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names in order, gathered while their dtype and device stay and they are not too many numbers."""
    names: list[str] = []
    size, kind = 0, None
    for name, g in gradients.items():
        if names and (size + g.numel() > BUCKET or (g.dtype, g.device) != kind):
            yield names
            names, size = [], 0
        names.append(name)
        size, kind = size + g.numel(), (g.dtype, g.device)
    if names:
        yield names
