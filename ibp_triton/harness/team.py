"""Processes that train one run together: which samples are whose, and what process 0 tells the others."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ibp_triton.errors import LaunchError

POLL = 0.02  # seconds between two looks at what the others say
PATIENCE = 20.0  # seconds for the others to fail as this process has


class Team:
    """This process, alone: every sample is its own. It is process 0, which writes all files."""

    rank, size = 0, 1
    group: Any = None

    def share(self, count: int) -> slice:
        """Which of `count` samples are this process's, the shares as even as can be."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def call(self, work: Any) -> None:
        """Let the others begin the same work."""

    def spread(self, value: Any = None) -> Any:
        """The value that process 0 has, for every process."""
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all processes do at the same time; see `Ranks` for several."""
        yield


class Ranks(Team):
    """One of several processes, which have a group of torch.distributed and its store."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = dist.group.WORLD, rank, size
        self._store, self._calls = store, 0

    def call(self, work: Any) -> None:
        """Let the others begin the same work; None: to end."""
        self._calls += 1
        self._store.set(f"work {self._calls}", pickle.dumps(work))

    def called(self) -> Any:
        """What process 0 calls for next, as soon as it does; raises LaunchError if it can't any more."""
        self._calls += 1
        name = f"work {self._calls}"
        try:
            while not self._store.check([name]):  # process 0 evaluates; a wait of the store's own would see no signal
                time.sleep(POLL)
            return pickle.loads(self._store.get(name))
        except dist.DistError as error:
            raise LaunchError(f"process {self.rank} of {self.size} lost the others ({_line(error)})") from error

    def spread(self, value: Any = None) -> Any:
        """The value that process 0 has, for every process; through main memory."""
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all processes raise in here is raised; what some raise alone, or their death, is a LaunchError.

        The others' sums would wait for them, or be cut off.
        """
        try:
            yield
        except Exception as error:
            if self._all_failed():
                raise
            raise LaunchError(
                f"process {self.rank} of {self.size} stopped ({_line(error)}), and not all others did alike: one has "
                "died, or it alone failed; what is finished is stored, and the same command goes on, by itself with "
                "torchrun --max-restarts"
            ) from error

    def _all_failed(self) -> bool:
        names = [f"failed {self._calls} {rank}" for rank in range(self.size)]
        last = time.monotonic() + PATIENCE
        try:
            self._store.set(names[self.rank], "")
            while not (found := self._store.check(names)) and time.monotonic() < last:
                time.sleep(POLL)
        except (dist.DistError, KeyboardInterrupt):  # torchrun ends the others of a process that died
            return False
        return bool(found)


ALONE = Team()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
