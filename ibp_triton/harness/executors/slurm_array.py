"""By Slurm: one job array for all runs, submitted and left to itself; what is cut off by its time goes on."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ibp_triton.errors import ConfigError, LaunchError
from ibp_triton.harness.executors.desk import Desk, Do
from ibp_triton.harness.executors.local import Serial
from ibp_triton.harness.executors.parcel import Parcel
from ibp_triton.harness.progress import Progress

MOST = 1000  # elements of an array: Slurm takes no more unless its MaxArraySize is raised
TIMEOUTS = 100  # times that an element goes on after its time was up


@dataclass(frozen=True)
class Slurm:
    """A job array whose elements each train every so-manieth run, one after another.

    `folder` gets the array's script and what its elements print, `minutes` is an element's time, `cluster` is slurm,
    or local for processes of this machine in its place.
    """

    folder: Path
    partition: str | None = None
    minutes: int = 60
    cpus: int = 1
    gpus: int = 0
    cluster: str = "slurm"
    width: int = 1

    def __call__(self, do: Do, desk: Desk) -> None:
        """Submit them all; they are in other hands then."""
        runs = []
        while run := desk.next():
            runs.append(run)
        if not runs:
            return
        shares = [runs[k::MOST] for k in range(min(MOST, len(runs)))]
        elements = [Element(Parcel.of(do, [one for run in share for one in run.together])) for share in shares]
        jobs = self._submitted(elements)
        array = str(jobs[0].job_id).partition("_")[0]
        output = f"{self.folder.resolve() / array}_*_log.out"
        told = f"submitted as job {array}, {len(jobs)} elements; their output: {output}"
        desk.hear({"kind": "note", "run": "", "message": told})
        for one in (one for run in runs for one in run.together):
            desk.hear({"kind": "busy", "run": one.name})

    def _submitted(self, elements: list[Element]) -> list[Any]:
        try:
            import submitit
        except ModuleNotFoundError:
            raise ConfigError("--executor slurm: submitit is not installed; pip install 'ibp-triton[slurm]'") from None
        try:
            executor = submitit.AutoExecutor(self.folder, cluster=self.cluster, slurm_max_num_timeout=TIMEOUTS)
            own = {"slurm_partition": self.partition} if self.partition else {}
            executor.update_parameters(
                name="ibp-triton", timeout_min=self.minutes, cpus_per_task=self.cpus, gpus_per_node=self.gpus, **own
            )
            with executor.batch():
                jobs = [executor.submit(element) for element in elements]
        except (RuntimeError, submitit.core.utils.FailedJobError) as error:
            raise LaunchError(f"--executor slurm: nothing was submitted ({error}); see `sinfo` and `sbatch`") from error
        return jobs


@dataclass(frozen=True)
class Element:
    """What one element of the array does; when its time is nearly up Slurm puts it into the queue again."""

    parcel: Parcel

    def __call__(self) -> None:
        """Train its runs. The end that submitit asks for, by a signal's SystemExit, is no failure of a run."""
        work = threading.Thread(target=self._work, daemon=True)
        work.start()
        try:
            work.join()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)

    def _work(self) -> None:
        do, runs = self.parcel.open()
        left = {run.name: 1.0 for run in runs}
        with Progress(Console(emoji=False, width=200), runs, left, 1) as listen:
            Serial()(do, Desk(runs, listen, {}))

    def checkpoint(self) -> Any:
        """The same once more: runs go on from their last epoch."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)
