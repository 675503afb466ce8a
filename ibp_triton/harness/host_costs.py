"""What the host does for a training step on the Triton kernels: microseconds of Python, with nothing launched."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ibp_triton import LossIBP, Method
from ibp_triton.harness.step_counts import NETWORKS, on_kernels


@dataclass(frozen=True)
class HostCost:
    """One training step before the optimizer: medians over steps, in µs of this machine."""

    network: str
    method: str
    batch: int
    dtype: str
    launches: int
    launch_us: float  # from the entry into a kernel's function to the launcher, a launch
    fastest_us: float  # the same in the fastest step, which nothing else on the machine held up
    step_us: float  # the whole step, the walk over the graph and the operators included

    @property
    def step_us_a_launch(self) -> float:
        """The whole step's share of a launch."""
        return self.step_us / self.launches


def measured(
    networks: Sequence[str] = tuple(NETWORKS), method: Method | None = None, batch: int = 32, steps: int = 200
) -> list[HostCost]:
    """A row for each paper network in float32, Loss IBP by default; the first step compiles: 0.5 s a kernel."""
    from ibp_triton.kernels.tiles import on_chip  # here, so that the harness does without triton
    from ibp_triton.kernels.workbench.cases import allowing_tf32
    from ibp_triton.kernels.workbench.host import empty_driver, stopwatch

    chosen, rows = method or LossIBP(0.1), []
    for name in networks:
        network, x, labels, tau = on_kernels(name, chosen, batch)
        launched = [0]

        def count(*_: object, launched: list[int] = launched) -> None:
            launched[0] += 1

        with empty_driver("sm_90", count), on_chip("sm_90"), allowing_tf32(False):
            for _ in range(3):
                launched[0] = 0
                chosen.gradients(network, x, labels, tau)
            launches, whole, within = launched[0], [], []
            for _ in range(steps):
                start = time.thread_time_ns()
                chosen.gradients(network, x, labels, tau)
                whole.append(time.thread_time_ns() - start)
            for _ in range(steps):
                with stopwatch() as seen:
                    chosen.gradients(network, x, labels, tau)
                within.append(sum(spent for _, spent in seen))
        launch_us, fastest_us = (some(within) / launches / 1e3 for some in (statistics.median, min))
        step_us = statistics.median(whole) / 1e3
        rows.append(HostCost(name, chosen.key, batch, "float32", launches, launch_us, fastest_us, step_us))
    return rows


NOTE = (
    "Host: µs of CPU time on this machine, medians over 200 steps with a driver that launches nothing. A "
    "launch is from the entry into the kernel's function, which allocates its results, to the launcher that Triton "
    "makes; a step is all of it, the walk over the graph and the operators included, before the optimizer."
)
HEAD = (
    *("network", "batch", "method", "dtype", "launches"),
    *("host µs/launch", "fastest", "host µs/step", "step µs/launch"),
)


def cells(row: HostCost) -> list[str]:
    """A row as the text of a table's cells."""
    return [
        *(row.network, f"{row.batch}", row.method, row.dtype, f"{row.launches}"),
        *(f"{row.launch_us:.1f}", f"{row.fastest_us:.1f}", f"{row.step_us:,.0f}", f"{row.step_us_a_launch:.1f}"),
    ]
