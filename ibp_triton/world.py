"""Several processes that train one model, each on its own samples: what they add up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKETS = 16  # about so many calls add a gradient up,
SMALLEST, LARGEST = 1 << 16, 1 << 24  # of so many numbers each


@dataclass(frozen=True, eq=False)
class World:
    """The processes of a group. All must take the same steps, in the same order."""

    group: Any

    def total(self, count: int, weights: Tensor | None, device: torch.device) -> tuple[int, Tensor | None]:
        """The number of samples and the sum of their weights, over all processes; ``device``: of the labels."""
        if weights is None and "cpu:" in dist.get_backend_config(self.group):
            device = torch.device("cpu")  # no wait for another
        both = torch.zeros(2, dtype=torch.float64, device=device)
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

    def sums(self, parameters: Mapping[str, Tensor], *, forward: bool = False, early: bool = False) -> Sums:
        """What adds up gradients of these parameters, all processes' alike.

        Args:
            parameters: by name, the same ones in the same order on every process.
            forward: whether their gradients are made from the first to the last; else from the last to the first.
            early: whether sums may begin before ``finish``. No other sum of this group may then come in between.
        """
        order = list(parameters.items())
        return Sums(self, dict(order if forward else reversed(order)), early)

    def gradients(self, found: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: gradient} of these parameters, added up in large pieces; zero where a process has none."""
        return self.sums(parameters).finish(found)

    def begin(self, value: Tensor) -> Any:
        """Begin to add up numbers of each process, in their place; the result is to be waited for."""
        return dist.all_reduce(value, group=self.group, async_op=True)

    def _add_up(self, value: Tensor) -> None:
        dist.all_reduce(value, group=self.group)


class Sums:
    """Gradients on their way to their sums over the processes, in buckets of which each is sent once.

    A bucket is sent as soon as its gradients and all earlier buckets' are there, the rest in ``finish``, zeros for a
    gradient that this process has not. So buckets go in the order of the parameters alone, on every process, whatever
    each computed, and when.
    """

    def __init__(self, world: World, parameters: Mapping[str, Tensor], early: bool) -> None:
        self.world, self.parameters, self.early = world, parameters, early
        self._waiting = [dict.fromkeys(names) for names in _buckets(parameters)]  # names whose gradients are to come
        self._bucket = {name: k for k, names in enumerate(self._waiting) for name in names}
        self._flat: list[Tensor | None] = [None] * len(self._waiting)
        self._places: dict[str, Tensor] = {}
        self._sent: list[Any] = []

    def take(self, name: str, d: Tensor) -> None:
        """This process's whole gradient of a parameter, in any dtype."""
        if name not in self._places:
            self._open(self._bucket[name])
        self._places[name].copy_(d)
        del self._waiting[self._bucket[name]][name]
        while self.early and len(self._sent) < len(self._flat) and not self._waiting[len(self._sent)]:
            self._send()

    def finish(self, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of all parameters, once this process's others are ``rest``; zero where no process has one."""
        for name, d in rest.items():
            if name in self.parameters:
                self.take(name, d)
        while len(self._sent) < len(self._flat):
            self._send()
        for work in self._sent:
            work.wait()
        return {name: self._places[name] for name in self.parameters}

    def _open(self, k: int) -> None:
        """Make room for a bucket."""
        names = list(self._waiting[k])
        sizes = [self.parameters[n].numel() for n in names]
        flat = self._flat[k] = self.parameters[names[0]].new_empty(sum(sizes))
        for n, piece in zip(names, flat.split(sizes), strict=True):
            self._places[n] = piece.view(self.parameters[n].shape)

    def _send(self) -> None:
        """The next bucket."""
        k = len(self._sent)
        if self._flat[k] is None:
            self._open(k)
        for name in self._waiting[k]:
            self._places[name].zero_()
        flat = self._flat[k]
        assert flat is not None
        self._sent.append(self.world.begin(flat))


def _buckets(parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names in order, gathered while their dtype and device stay and they are not too many numbers."""
    most = min(max(sum(p.numel() for p in parameters.values()) // BUCKETS, SMALLEST), LARGEST)
    names: list[str] = []
    size, kind = 0, None
    for name, p in parameters.items():
        if names and (size + p.numel() > most or (p.dtype, p.device) != kind):
            yield names
            names, size = [], 0
        names.append(name)
        size, kind = size + p.numel(), (p.dtype, p.device)
    if names:
        yield names
