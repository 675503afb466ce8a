"""On a Ray cluster: each run a task, which another node takes up from its last epoch when a worker or a node dies."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from ibp_triton.errors import ConfigError, LaunchError
from ibp_triton.harness.executors.desk import DEATHS, Desk, Do, Event
from ibp_triton.harness.executors.parcel import Parcel
from ibp_triton.harness.grid import Run

AHEAD = 16  # runs that wait for room besides those that are trained: an autoscaler adds nodes for them
PATIENCE = 2.0  # seconds before a run is taken up again: the system is to free the lock of a process that has died


@dataclass(frozen=True)
class Ray:
    """Tasks on a Ray cluster, each of which reserves so many CPUs and GPUs; without an address one on this machine.

    `apart`: a node that lacks this command's folder does without it.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    apart: bool = False

    def _connected(self) -> Any:
        """Ray itself, connected."""
        try:
            import ray
        except ModuleNotFoundError:
            raise ConfigError("--executor ray: Ray is not installed; pip install 'ibp-triton[ray]'") from None
        if not ray.is_initialized():
            try:
                with _own_signals():
                    ray.init(address=self.address, **({} if self.address else {"include_dashboard": False}))
            except (ConnectionError, RuntimeError, ValueError) as error:
                where = f"--address {self.address}" if self.address else "--executor ray"
                raise LaunchError(f"{where}: no Ray cluster to be reached ({error}); see `ray status`") from error
        return ray

    @property
    def width(self) -> int:
        """How many runs the cluster has room for now; at least 1."""
        needs = {name: need for name, need in (("CPU", self.cpus), ("GPU", self.gpus)) if need}
        nodes = (node["Resources"] for node in self._connected().nodes() if node["Alive"])
        return max(1, sum(int(min((own.get(n, 0.0) / need for n, need in needs.items()), default=1)) for own in nodes))

    def __call__(self, do: Do, desk: Desk) -> None:
        """Do them all; the cluster is left as it was."""
        ray = self._connected()
        try:
            task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(_attempt)
            _Fleet(ray, task, do, desk, self.apart).serve(self)
        finally:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray has its own end of a process on TERM, an abort; this command's is to stop as on Ctrl-C."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _attempt(parcel: Parcel, delay: float) -> Iterator[Event]:
    """Train the run in a parcel after a delay, and say what happens as it does."""
    time.sleep(delay)
    do, run = parcel.open()
    told: SimpleQueue[Event | None] = SimpleQueue()

    def work() -> None:
        try:
            do(run, told.put)
        finally:
            told.put(None)

    threading.Thread(target=work, daemon=True).start()
    while event := told.get():
        yield event


class _Fleet:
    """Tasks under way by the stream of events that each sends, and the run each is at."""

    def __init__(self, ray: Any, task: Any, do: Do, desk: Desk, apart: bool) -> None:
        self._ray, self._task, self._do, self._desk, self._apart = ray, task, do, desk, apart
        self._at: dict[Any, Run] = {}
        self._deaths: Counter[str] = Counter()
        self._lost: set[str] = set()  # runs of which a process may live on though its node is given up

    def serve(self, cluster: Ray) -> None:
        """Until no run is left."""
        self._fill(cluster.width)
        while self._at:
            streams = list(self._at)
            ready, _ = self._ray.wait(streams, num_returns=len(streams), timeout=0)
            for stream in ready or self._ray.wait(streams, timeout=1.0)[0]:
                self._take(stream)
            if len(self._at) < len(streams):
                self._fill(cluster.width)

    def _fill(self, room: int) -> None:
        most = 2 * room + AHEAD if self._desk.eager else room
        while len(self._at) < most and (run := self._desk.next()):
            self._send(run)

    def _send(self, run: Run, delay: float = 0.0) -> None:
        self._at[self._task.remote(Parcel.of(self._do, run, apart=self._apart), delay)] = run

    def _take(self, stream: Any) -> None:
        """The next event of a task, or its end."""
        run = self._at[stream]
        try:
            event = self._ray.get(next(stream))
        except StopIteration:
            del self._at[stream]
        except self._ray.exceptions.RayError as error:
            del self._at[stream]
            self._bury(run, error)
        else:
            self._hear(run, event)

    def _hear(self, run: Run, event: Event) -> None:
        if event["kind"] == "busy" and run.name in self._lost:
            return self._send(run, PATIENCE)
        self._desk.hear(event)

    def _bury(self, run: Run, error: Any) -> None:
        """A task has died: its run is taken up again; one that ends its workers itself not for ever."""
        reasons = self._ray.exceptions
        if isinstance(error, reasons.RayTaskError | reasons.RuntimeEnvSetupError):
            cause = getattr(error, "cause", error)
            what = str(cause).partition("\n")[0]
            cure = "" if isinstance(cause, LaunchError) else "; each node needs the packages of this machine"
            raise LaunchError(f"on the cluster: {what}{cure}") from error
        gone = isinstance(error, reasons.NodeDiedError | reasons.ObjectLostError)
        reason = "its node died" if gone else f"its Ray worker died ({type(error).__name__})"
        self._deaths[run.name] += not gone
        self._lost |= {one.name for one in run.together}
        if self._deaths[run.name] >= DEATHS:
            text = f"{reason} while it trained this run, as one before"
            return self._desk.hear({"kind": "failed", "run": run.name, "message": text})
        self._desk.hear({"kind": "note", "run": run.name, "message": f"{reason}; another one takes this run up"})
        for one in run.together:  # each alone: one of several may be what ends a worker
            self._send(one, PATIENCE)
