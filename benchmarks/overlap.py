"""What beginning sums of gradients early saves: `python -m benchmarks.overlap`, or under torchrun with K processes.

Milliseconds a step, the best of 30, of six layers, 1024 wide, on 32 samples a process, and of these the ones that it
waited for sums: with sums that begin at the end, and as they are. Alone, a process pretends a link of 1 GB/s, which
takes nothing of the processor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ibp_triton as ibp
from ibp_triton.allocator import keep_freed_memory
from ibp_triton.backends.torch.sync_batch_norm import Synchronised
from ibp_triton.methods.base import Method
from ibp_triton.world import Sums, World

STEPS, WARM_UP, WIDTH = 30, 5, 1024
SPEED = 1e9  # bytes a second
METHODS = (ibp.BP(), ibp.LossIBP(0.03), ibp.LossIBP(0.03, semantics="exact"))


class Timed(World):
    """Its processes write down how long they wait."""

    waited = 0.0

    def begin(self, value: Tensor) -> Any:
        """As ever."""
        return _Timed(super().begin(value))


class _Timed:
    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self) -> None:
        begin = time.perf_counter()
        self.work.wait()
        Timed.waited += time.perf_counter() - begin


class Late(Timed):
    """Sums begin when all gradients are there."""

    def sums(self, parameters: Mapping[str, Tensor], *, forward: bool = False, early: bool = False) -> Sums:
        """Without ``early``."""
        return super().sums(parameters, forward=forward)


class Link(World):
    """One process's sums, which take the time of a link."""

    free = 0.0  # when the link will be

    def total(self, count: int, weights: Tensor | None, device: torch.device) -> tuple[int, Tensor | None]:
        """Its own."""
        return count, weights

    def sum(self, value: Tensor) -> Tensor:
        """Its own."""
        return value

    def begin(self, value: Tensor) -> Any:
        """One after another."""
        Link.free = max(Link.free, time.perf_counter()) + value.nbytes / SPEED
        return _Until(Link.free)


class _Until:
    def __init__(self, moment: float) -> None:
        self.moment = moment

    def wait(self) -> None:
        time.sleep(max(0.0, self.moment - time.perf_counter()))


class LinkTimed(Timed, Link):
    """A link, timed."""


class LinkLate(Late, Link):
    """A link that begins when all gradients are there."""


def step(method: Method, world: World) -> ibp.EagerStep:
    """One that trains in this world."""
    torch.manual_seed(0)
    inner = [part for _ in range(4) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(nn.Linear(784, WIDTH), nn.ReLU(), *inner, nn.Linear(WIDTH, 10))
    network = ibp.Network(model)
    network.world, network._synchronised = world, Synchronised(world, False)
    return ibp.EagerStep(network, method, torch.optim.SGD(model.parameters(), lr=1e-3))


def main() -> None:
    """Time the steps of this process, one of each kind after the other."""
    torch.set_num_threads(1)
    keep_freed_memory()
    alone = "RANK" not in os.environ
    if not alone:
        dist.init_process_group("gloo")
    kinds: tuple[type[World], ...] = (LinkLate, LinkTimed) if alone else (Late, Timed)
    x, y = torch.rand(32, 784), torch.arange(32) % 10
    for method in METHODS:
        steps = [step(method, kind(None if alone else dist.group.WORLD)) for kind in kinds]
        times: list[list[tuple[float, float]]] = [[], []]
        for _ in range(WARM_UP + STEPS):
            for own, measured in zip(steps, times, strict=True):
                begin, Timed.waited = time.perf_counter(), 0.0
                own(x, y)
                measured.append((time.perf_counter() - begin, Timed.waited))
        if alone or dist.get_rank() == 0:
            late, early = (min(measured[WARM_UP:]) for measured in times)
            print(f"{method}: sums at the end {_shown(*late)}, early {_shown(*early)}")
    if not alone:
        dist.destroy_process_group()


def _shown(whole: float, waited: float) -> str:
    return f"{1e3 * whole:.1f} ms, {1e3 * waited:.1f} of them waiting"


if __name__ == "__main__":
    main()
