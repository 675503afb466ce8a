"""Worker processes on this machine, one run each at a time, by a pipe to each."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from ibp_triton.errors import LaunchError
from ibp_triton.harness.executors.desk import DEATHS, Desk, Do, Event
from ibp_triton.harness.grid import Run


def spread(do: Do, workers: int, desk: Desk) -> None:
    """Do every run of the desk in processes, each with a pipe of its own.

    A process that is killed neither blocks the others nor loses its run, which another one takes up.
    """
    crew = Crew(do)
    try:
        for _ in range(workers):
            crew.hire()
        while crew.lines:
            for line in crew.heard():
                _serve(line, crew, desk)
    finally:
        crew.dismiss()


def _serve(line: Connection, crew: Crew, desk: Desk) -> None:
    event = crew.receive(line)
    if event is None:
        crew.bury(line, desk)
    elif event["kind"] == "idle":
        crew.give(line, desk.next())
    else:
        desk.hear(event)


class Crew:
    """Worker processes by the pipe that leads to each, and the run each is at."""

    def __init__(self, do: Do) -> None:
        self._do, self._context = do, multiprocessing.get_context("spawn")
        self.lines: dict[Connection, Any] = {}
        self._processes: list[Any] = []
        self._at: dict[Connection, Run] = {}
        self._deaths: Counter[str] = Counter()

    def hire(self) -> None:
        """Start one more worker."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_worker, args=(self._do, theirs), daemon=True)
        self._processes.append(process)
        process.start()
        self.lines[ours] = process
        theirs.close()

    def heard(self) -> Sequence[Any]:
        """Pipes with an event, or whose process has died though a child of its own holds its end."""
        dead = [line for line, process in self.lines.items() if process.exitcode is not None]
        return dead or wait(list(self.lines), timeout=1.0)

    def receive(self, line: Connection) -> Event | None:
        """The next event of a worker; None if it is gone."""
        try:
            event: Event | None = line.recv() if line.poll() else None
        except (EOFError, OSError):
            return None
        return event

    def give(self, line: Connection, run: Run | None) -> None:
        """The next run for a worker, or its end."""
        self._at.pop(line, None)
        if run is None:
            self.lines.pop(line)
        else:
            self._at[line] = run
        with suppress(OSError):  # it has died since, as will be noticed
            line.send(run)

    def bury(self, line: Connection, desk: Desk) -> None:
        """A worker has died: another one takes its run up, though not for ever."""
        process, run = self.lines.pop(line), self._at.pop(line, None)
        process.join()
        reason = _death(process.exitcode)
        name = run.name if run else ""
        self._deaths[name] += 1
        given_up = self._deaths[name] >= DEATHS
        if not run and given_up:
            raise LaunchError(f"{reason} before it trained anything; finished runs and epochs are stored")
        if run and given_up:
            desk.hear({"kind": "failed", "run": name, "message": f"{reason} while it trained this run, as one before"})
        elif run:
            desk.hear({"kind": "note", "run": name, "message": f"{reason}; another one takes this run up"})
            desk.again(name)
        self.hire()

    def dismiss(self) -> None:
        """End every process that is left."""
        for process in self._processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _death(code: int) -> str:
    return f"a worker process ended by signal {-code}" if code < 0 else f"a worker process ended with code {code}"


def _worker(do: Do, line: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        line.send({"kind": "idle", "run": ""})
        while run := line.recv():
            do(run, line.send)
            line.send({"kind": "idle", "run": ""})
    except (KeyboardInterrupt, EOFError, OSError):
        os._exit(130)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
