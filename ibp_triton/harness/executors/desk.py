"""Who does which run: the desk that hands runs out and hears what becomes of them, and what an executor is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ibp_triton.errors import LaunchError
from ibp_triton.harness.grid import Run
from ibp_triton.harness.team import ALONE, Team

AUTO = 16  # runs side by side at most, where the experiment says auto
DEATHS = 2  # of workers within one run, before it is given up
Event = dict[str, Any]
Listener = Callable[[Event], None]


class Do(Protocol):
    """Trains and evaluates a run, as process 0 of a team."""

    def __call__(self, run: Run, listen: Listener, *, team: Team = ALONE) -> None:
        """Do it, and tell all that happens."""


class Executor(Protocol):
    """Does every run of a desk, and lets the desk hear every event of each."""

    @property
    def width(self) -> int:
        """How many runs it does at a time, as far as that is known."""

    def __call__(self, do: Do, desk: Desk) -> None:
        """Do them all."""


class Desk:
    """Hands out runs, notes which failed, and fails those at once whose data or network another run could not use.

    Runs of one structure come as one, the others `beside` it, as many as their training says. `width` is how many
    workers there are.
    """

    eager = True  # whether runs may be handed out long before there is room for them

    def __init__(self, runs: Sequence[Run], listen: Listener, failures: dict[str, Event], width: int = 1) -> None:
        self._waiting, self._runs = deque(runs), {run.name: run for run in runs}
        self._width, self._alone = width, set[str]()  # the names of those that go on alone
        self._listen, self._failures = listen, failures
        self._unfit: dict[Any, Event] = {}
        self._handed: dict[str, Run] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def next(self) -> Run | None:
        """The next run to train; None if there is none left."""
        while self._waiting:
            run = self._waiting.popleft()
            known = self._known(run)
            if known is None:
                self._handed[run.name] = found = replace(run, beside=self._others(run))
                return found
            self._failures[run.name] = {**known, "run": run.name}
        return None

    def _known(self, run: Run) -> Event | None:
        """What has made another run of the same data or network fail."""
        return next(
            (self._unfit[key] for kind in ("data", "network") if (key := _part(run, kind)) in self._unfit), None
        )

    def _others(self, run: Run) -> tuple[Run, ...]:
        """Those that are trained beside it, taken from the waiting ones."""
        others, left = list[Run](), deque[Run]()
        most = 1 if run.name in self._alone else beside(run, len(self._waiting) + 1, self._width)
        while self._waiting and len(others) < most - 1:
            one = self._waiting.popleft()
            fits = one.name not in self._alone and one.structure == run.structure and self._known(one) is None
            (others if fits else left).append(one)
        self._waiting.extendleft(reversed(left))
        return tuple(others)

    def again(self, name: str) -> None:
        """Hand this run out once more, and those beside it, each alone: one of them may be what ends a worker."""
        every = self._handed.get(name, self._runs[name]).together
        self._alone |= {run.name for run in every if len(every) > 1}
        self._waiting.extendleft(reversed(every))

    def hear(self, event: Event) -> None:
        """Take in an event and pass it on."""
        if event["kind"] == "fatal":
            raise LaunchError(event["message"])
        if event["kind"] == "failed":
            self._failures[event["run"]] = event
            if event.get("unfit"):
                self._unfit[_part(self._runs[event["run"]], event["unfit"])] = event
        self._listen(event)


def beside(run: Run, waiting: int, width: int) -> int:
    """How many of so many runs like this one are trained side by side by each of so many workers."""
    replicas = run.training.replicas
    most = replicas if isinstance(replicas, int) else min(AUTO, math.ceil(waiting / width))
    return max(1, min(most, waiting))


def _part(run: Run, kind: str) -> Any:
    return run.data if kind == "data" else (run.data, run.network.model_dump_json())
