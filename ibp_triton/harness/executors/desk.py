"""Who does which run: the desk that hands runs out and hears what becomes of them, and what an executor is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ibp_triton.errors import LaunchError
from ibp_triton.harness.grid import Run
from ibp_triton.harness.team import ALONE, Team

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
    """Hands out runs, notes which failed, and fails those at once whose data or network another run could not use."""

    eager = True  # whether runs may be handed out long before there is room for them

    def __init__(self, runs: Sequence[Run], listen: Listener, failures: dict[str, Event]) -> None:
        self._waiting, self._runs = deque(runs), {run.name: run for run in runs}
        self._listen, self._failures = listen, failures
        self._unfit: dict[Any, Event] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def next(self) -> Run | None:
        """The next run to train; None if there is none left."""
        while self._waiting:
            run = self._waiting.popleft()
            known = [self._unfit[key] for kind in ("data", "network") if (key := _part(run, kind)) in self._unfit]
            if not known:
                return run
            self._failures[run.name] = {**known[0], "run": run.name}
        return None

    def again(self, name: str) -> None:
        """Hand this run out once more."""
        self._waiting.appendleft(self._runs[name])

    def hear(self, event: Event) -> None:
        """Take in an event and pass it on."""
        if event["kind"] == "fatal":
            raise LaunchError(event["message"])
        if event["kind"] == "failed":
            self._failures[event["run"]] = event
            if event.get("unfit"):
                self._unfit[_part(self._runs[event["run"]], event["unfit"])] = event
        self._listen(event)


def _part(run: Run, kind: str) -> Any:
    return run.data if kind == "data" else (run.data, run.network.model_dump_json())
