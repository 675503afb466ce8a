"""On this machine: one run after another in this process, or several at a time in processes of their own."""

from __future__ import annotations

from dataclasses import dataclass

from ibp_triton.harness.executors.crew import spread
from ibp_triton.harness.executors.desk import Desk, Do


@dataclass(frozen=True)
class Serial:
    """One run after another in this process."""

    width: int = 1

    def __call__(self, do: Do, desk: Desk) -> None:
        """Do them all."""
        while run := desk.next():
            do(run, desk.hear)


@dataclass(frozen=True)
class Processes:
    """So many local processes, one run each at a time; what a killed one was at, another one takes up."""

    width: int

    def __call__(self, do: Do, desk: Desk) -> None:
        """Do them all."""
        spread(do, min(self.width, len(desk)), desk)


@dataclass(frozen=True)
class Local:
    """Processes where several have something to do, this process alone otherwise."""

    width: int

    def __call__(self, do: Do, desk: Desk) -> None:
        """Do them all."""
        count = min(self.width, len(desk))
        (Processes(count) if count > 1 else Serial())(do, desk)
